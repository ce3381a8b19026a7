"""The one exception that means: the user's input is at fault, not this program."""


class InputError(ValueError):
    """Bad input of a user: a file, a flag, a config or a checkpoint.

    The message is one line that says what came, what was expected and what to do. The command
    line prints it without a traceback and exits with code 2; any other exception is a bug and
    keeps its traceback.
    """
