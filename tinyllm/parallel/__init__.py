"""A task on every core of this machine.

A `Team` calls a task on every rank, itself rank 0 and the others forks or threads, and returns what each gave; arrays
that were put into shared memory (`share`) are the same in all of them.
"""

from tinyllm.parallel.team import Team, can_fork, is_shared, share

__all__ = ["Team", "can_fork", "is_shared", "share"]
