"""The command line: arguments to dataclasses to one library call."""
