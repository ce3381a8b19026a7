"""Training: the trainer, what it is told by and tells, checkpoints, engines and safeguards."""

__all__: list[str] = []
