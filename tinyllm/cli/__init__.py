"""The command line: arguments become dataclasses, and those one call of the library.

`main` puts the commands together (one module each) and turns errors into one line and an exit code; `parser` is
argparse that names the nearest flag, `flags` makes a flag of each field of a dataclass.
"""

__all__: list[str] = []
