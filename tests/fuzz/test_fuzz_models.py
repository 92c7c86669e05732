"""Damaged model folders, adapters and options: the right answer, the same answer, or one line.

A failure's message says how to run its case alone. `python tests/fuzz --help` runs more of them.
"""

import json

import pytest

from fuzz.cases import copy_parts, kinds_of
from fuzz.judge import judge
from fuzz.plan import BEE, CHAT, GENERATE, ORACLE, SHARDS, Plan
from fuzz.runner import failures

KINDS = kinds_of("kinds_model", "kinds_options")


@pytest.fixture(scope="module", autouse=True)
def oracle(runner):
    """Begins to import transformers while the first cases run."""
    runner.oracle.start()


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


@pytest.mark.parametrize("argv", [GENERATE, CHAT, SHARDS, BEE], ids=["raw", "chat", "shards", "adapter"])
def test_oracle_agrees(argv, runner, tmp_path):
    """Without it the oracle may refuse everything, and each answer that is right would be a failure;
    or agree with everything."""
    copy_parts(runner.world, tmp_path / "case", ("hf", "shards", "bee"))
    plan = Plan(argv, "", ORACLE, folder=tmp_path / "case")
    edit(plan.folder / argv[2] / "config.json", rope_theta=7.0)
    edit(plan.folder / "bee" / "adapter_config.json", lora_alpha=70)
    done = runner.server.run(argv, plan.folder)
    assert judge(plan, done, lambda: None, runner.oracle).what == "right"
    edit(plan.folder / argv[2] / "config.json", rope_theta=700.0, rms_norm_eps=0.1)
    assert judge(plan, done, lambda: None, runner.oracle).what == "silent"


def edit(file, **fields):
    """Other values of some fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
