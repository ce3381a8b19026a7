"""Who makes a training step: all processes of this machine, or a device."""

__all__: list[str] = []
