"""What the tests of methods share: a model with a pool that has the parts for every method."""

import pytest

from generate import load


@pytest.fixture(scope="module")
def folder(pool_with_every_part):
    """The pool's folder. Don't write into it."""
    return pool_with_every_part


@pytest.fixture(scope="module")
def mole(small_model, folder):
    """The loaded model."""
    return load(small_model, folder)
