"""Named sets of settings for training; anything that a preset leaves out has the config's default."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # nanoGPT's budget for a CPU: 2000 steps of 12 windows of 64 characters, 0.81M parameters.
    "char": {
        "model": {"context_length": 64, "num_layers": 4, "num_heads": 4, "hidden_size": 128},
        "train": {"steps": 2000, "batch_size": 12, "optimizer": "muon"},
    },
    # 10.0M and 49.9M parameters, for a GPU or a day of a CPU.
    "10m": {
        "model": {
            "vocab_size": 8192,
            "context_length": 512,
            "num_layers": 6,
            "num_heads": 5,
            "hidden_size": 320,
            "tie_embeddings": True,
        },
        "train": {
            "tokenizer": "bpe",
            "steps": 10_000,
            "batch_size": 32,
            "log_every": 10,
            "learning_rate": 1e-3,
        },
    },
    "50m": {
        "model": {
            "vocab_size": 16384,
            "context_length": 1024,
            "num_layers": 8,
            "num_heads": 10,
            "hidden_size": 640,
            "tie_embeddings": True,
        },
        "train": {
            "tokenizer": "bpe",
            "steps": 20_000,
            "batch_size": 32,
            "log_every": 10,
            "learning_rate": 6e-4,
        },
    },
}
