"""Named sets of settings for training; anything that a preset leaves out has the config's default."""

from __future__ import annotations

from typing import Any

_MINI: dict[str, Any] = {
    "tokenizer": "bpe",
    "optimizer": "muon",
    "batch_size": 8,
    "warmup_steps": 100,
    "log_every": 1,
    "eval_every": 250,
    "eval_tokens": 1 << 18,
    "sample_every": 250,
}
"""What the presets of mini models train with; learning_rate is for what AdamW has."""

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # nanoGPT's budget for a CPU: 2000 steps of 12 windows of 64 characters, 0.81M parameters.
    "char": {
        "model": {"context_length": 64, "num_layers": 4, "num_heads": 4, "hidden_size": 128},
        "train": {"steps": 2000, "batch_size": 12, "optimizer": "muon"},
    },
    # 10.5M, 30.3M and 50.9M parameters, for ordinary machines: hours to days of a few cores.
    "mini-10m": {
        "model": {
            "vocab_size": 16_384,
            "context_length": 512,
            "num_layers": 8,
            "num_heads": 4,
            "hidden_size": 256,
            "tie_embeddings": True,
        },
        "train": {**_MINI, "steps": 1500, "learning_rate": 2e-3},
    },
    "mini-30m": {
        "model": {
            "vocab_size": 32_768,
            "context_length": 512,
            "num_layers": 10,
            "num_heads": 6,
            "hidden_size": 384,
            "tie_embeddings": True,
        },
        "train": {**_MINI, "steps": 3000, "learning_rate": 1.5e-3},
    },
    "mini-50m": {
        "model": {
            "vocab_size": 32_768,
            "context_length": 1024,
            "num_layers": 10,
            "num_heads": 8,
            "hidden_size": 512,
            "intermediate_size": 1536,
            "tie_embeddings": True,
        },
        "train": {**_MINI, "steps": 5000, "learning_rate": 1e-3, "batch_size": 4},
    },
}
