"""Checkpoints of a run: written, verified, pruned, and gone on from."""

__all__: list[str] = []
