"""What the tests with Hypothesis share."""

from hypothesis import settings


def few(examples, **how):
    """Settings under which every run sees the same examples, so that none fails by chance."""
    return settings(max_examples=examples, deadline=None, derandomize=True, **how)
