"""The world that cases are copied from and what runs them: once for all tests of a process."""

import pytest

from fuzz.runner import Runner
from fuzz.world import write_world


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The undamaged files. Don't write into it."""
    return write_world(tmp_path_factory.mktemp("fuzz") / "world")


@pytest.fixture(scope="session")
def runner(world, tmp_path_factory):
    """Runs cases of the world."""
    made = Runner(world, tmp_path_factory.mktemp("cases"))
    yield made
    made.close()
