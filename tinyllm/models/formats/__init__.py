"""Files of models: safetensors, and the names and config keys of the transformers library."""

__all__: list[str] = []
