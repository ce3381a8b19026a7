"""Tokenizers in SentencePiece's form: characters are the smallest pieces, bytes the fallback."""

__all__: list[str] = []
