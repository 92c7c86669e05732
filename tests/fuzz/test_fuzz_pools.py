"""Damaged pools, tasks and interrupted runs: the right answer, the same answer, or one line.

A failure's message says how to run its case alone. `python tests/fuzz --help` runs more of them.
"""

import dataclasses

import pytest

from fuzz.cases import kinds_of
from fuzz.kinds_runs import RUNS, resumed
from fuzz.plan import SAME
from fuzz.runner import failures

KINDS = kinds_of("kinds_pool", "kinds_runs")


@pytest.mark.parametrize("kind", KINDS)
def test_damage(kind, runner):
    """Without it a damaged file or a strange option ends in a traceback, hangs, takes over the
    terminal, or silently changes answers."""
    assert failures(runner, kind, seed=0, cases=200) == ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_more_damage(kind, runner):
    """The same of other cases, ten times as many."""
    assert failures(runner, kind, seed=1, cases=2000) == ""


@pytest.mark.parametrize("name", RUNS)
def test_undamaged_runs_go_on(name, runner):
    """Without it the options of a run may be others than those it began with: then every damage is
    refused, whatever it is."""
    plan = dataclasses.replace(resumed(name, "", SAME), kind="checkpoints")
    _, files = runner.undamaged(plan)
    assert files
