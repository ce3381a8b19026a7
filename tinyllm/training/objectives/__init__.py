"""Objectives: what a model is trained for, one file each.

An engine cuts a batch into micro-batches, calls the objective on each, and differentiates the sum that it returns.
Evaluation, the report of a rejected step, and its replay call the same objective.
"""

from tinyllm.training.objectives.next_token import NextToken
from tinyllm.training.objectives.objective import Batch, Objective

__all__ = ["Batch", "NextToken", "Objective"]
