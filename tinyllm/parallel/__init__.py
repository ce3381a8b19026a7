"""A task on every core of this machine (`team`)."""
