"""Settings of hypothesis for all tests, and what some of them need of the system."""

import functools
import os
import tempfile
from pathlib import Path

import pytest

from tinyllm.testing.strategies import register_profiles

register_profiles(default="ci")  # the same few examples in every run, unless TINYLLM_PROFILE says otherwise


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("forks") and not hasattr(os, "fork"):
        pytest.skip("no forks here")
    if item.get_closest_marker("links") and not has_links():
        pytest.skip("no symbolic links here")


@functools.cache
def has_links() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            (Path(folder) / "link").symlink_to(folder)
        except OSError:
            return False
    return True
