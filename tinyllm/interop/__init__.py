"""Other projects' names and layouts, one table each."""
