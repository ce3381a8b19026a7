"""Checkpoints of a run: written, verified, pruned, and gone on from."""
