"""The exceptions that mean: the user's input or machine is at fault, not this program."""


class InputError(ValueError):
    """Bad input of a user: a file, a flag, a config or a checkpoint.

    The message is one line that says what came, what was expected and what to do. The command
    line prints it without a traceback and exits with code 2; any other exception is a bug and
    keeps its traceback.
    """


class UnreadableError(InputError):
    """A file that is there and cannot be read now, which says nothing of what it holds."""


class NoSpaceError(InputError):
    """A file that cannot be written because the disk, or the user's part of it, is full."""


class WorkerEndedError(InputError):
    """A worker process that has ended, killed by the system most often."""
