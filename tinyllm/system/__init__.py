"""What everything else stands on and knows nothing of language models: errors, files, locks, progress, settings."""
