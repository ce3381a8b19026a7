"""Training: the trainer, what it is told by and tells, checkpoints, engines and safeguards.

`Trainer` takes batches from its sampler and gives them to an engine, which asks the objective for the loss and makes
the step or not. It tells the outcome to callbacks, asks the safeguards what is to be done after a step that was not
made, and writes checkpoints. `runs` does all of it from texts and settings.
"""

__all__: list[str] = []
