"""Byte-pair encoding: learning merges, applying them, and their files."""
