"""Text from a model: `sampling` draws token after token, `decoder` computes logits with a cache of keys and values."""

__all__: list[str] = []
