"""Planted bugs: mistakes that a learner makes, each put into this package for a while, and the checks that find them.

    python -m tinyllm.testing.mutants           the table: each mutant, and the check that kills it
    python -m tinyllm.testing.mutants --hunt    an unnamed one to find

Example:
    >>> with MUTANTS["softmax_backward_without_the_mean"].planted():
    ...     run_check("gradient of softmax")
    Traceback (most recent call last):
    ...
    tinyllm.testing.report.GradientError: gradient of argument 0 (inputs[0]): mean not subtracted ...
"""

# Importing the modules of mutants and of checks puts them into MUTANTS and CHECKS, in this order.
from tinyllm.testing.mutants import engine  # noqa: F401, I001
from tinyllm.testing.mutants import elementwise, shapes, functions, attention, formulas  # noqa: F401
from tinyllm.testing.mutants import models, optimizers, sampling  # noqa: F401
from tinyllm.testing.mutants import check_ops, check_formulas, check_models, check_training  # noqa: F401
from tinyllm.testing.mutants.checking import CHECKS, Kill, Survey, run_check, survey
from tinyllm.testing.mutants.planting import MUTANTS, Mutant

__all__ = ["CHECKS", "MUTANTS", "Kill", "Mutant", "Survey", "run_check", "survey"]
