"""Settings of hypothesis for all tests: the same few examples in every run, unless TINYLLM_PROFILE says otherwise."""

from tinyllm.testing.strategies import register_profiles

register_profiles(default="ci")
