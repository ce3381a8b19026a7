"""Named sets of settings for training; anything that a preset leaves out has the config's default."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # nanoGPT's budget for a CPU: 2000 steps of 12 windows of 64 characters, 0.81M parameters.
    "char": {
        "model": {"context_length": 64, "num_layers": 4, "num_heads": 4, "hidden_size": 128},
        "train": {"steps": 2000, "batch_size": 12, "optimizer": "muon"},
    },
}
