"""Byte-pair encoding: learning merges, applying them, and their files."""

__all__: list[str] = []
