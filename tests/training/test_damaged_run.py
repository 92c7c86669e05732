"""The files of an interrupted run, damaged: one line that names the file and what is wrong in it, and
no step of training."""

import shutil

import pytest
import torch

from common.files import InputError, read_json, write_json
from common.tensors import read_safetensors, write_safetensors
from helpers_training import contents, killed_at_write, options, run, run_folder

KINDS = ["adapters", "base"]  # trained by AdamW, and by Muon beside it
WRITES = {"adapters": 3, "base": 5}  # after so many a checkpoint is there


@pytest.fixture(scope="module")
def interrupted(small_model, tmp_path_factory):
    """{kind: options of a run that was killed after a checkpoint}."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for kind in KINDS:
            made[kind] = options(kind, small_model, tmp_path_factory.mktemp(kind) / "out")
            assert killed_at_write(patch, made[kind], WRITES[kind], after=True)
    return made


@pytest.fixture
def folder(request, interrupted):
    """The run's folder of request.param's kind, put back afterwards."""
    where = run_folder(interrupted[request.param])
    kept = where.with_name("kept")
    shutil.copytree(where, kept)
    yield interrupted[request.param], where
    shutil.rmtree(where)
    kept.rename(where)


def named(tensors, start):
    return next(name for name in sorted(tensors, reverse=True) if name.startswith(start))


def rename(start):
    def change(tensors, about):
        name = named(tensors, start)
        tensors[f"{name}x"] = tensors.pop(name)

    return change


def drop(start):
    return lambda tensors, about: tensors.pop(named(tensors, start))


def put(start, value):
    def change(tensors, about):
        name = named(tensors, start)
        tensors[name] = value(tensors[name])

    return change


def say(**fields):
    def change(tensors, about):
        about |= fields

    return change


TENSORS = {
    "param renamed": (rename("param."), "no tensor param.*: damaged, .*: remove "),
    "param missing": (drop("param."), "no tensor param.*: damaged, .*: remove "),
    "param of another shape": (
        put("param.", lambda y: y[..., :1].clone()),
        r"param\..* is \(.*, expected \(",
    ),
    "param of whole numbers": (
        put("param.", lambda y: y.long()),
        r"param\..* in int64, expected .* in float32",
    ),
    "state renamed": (rename("exp_avg_sq."), "unknown tensor 'exp_avg_sq.*x': damaged, .*: remove "),
    "state missing": (drop("exp_avg_sq."), "tensors, its metadata say '.*': damaged, .*: remove "),
    "state of another shape": (
        put("exp_avg.", lambda y: y.flatten()[:1]),
        r"exp_avg\..* is \(1,\) in float32",
    ),
    "step tensor -1": (put("step.", lambda y: y * 0 - 1), r"step\..* is -1.0, expected a number from 1 to"),
    "random state missing": (drop("rng"), "no tensor rng: damaged, .*: remove "),
    "random state cut": (put("rng", lambda y: y[:9].clone()), r"rng is \(9,\) in uint8"),
    "random state zero": (put("rng", torch.zeros_like), "the random state is damaged"),
    "no count": (say(tensors=""), "tensors, its metadata say ''"),
    "step a word": (say(step="one"), "step is 'one', expected a whole number from 1 to "),
    "step a power": (say(step="²"), "step is '²', expected a whole number from 1 to "),
    "step of 5,000 digits": (say(step="1" * 5000), "step is '111.*1', expected a whole number from 1 to "),
    "step 0": (say(step="0"), "step is 0, expected a whole number from 1 to "),
    "step beyond": (say(step="99"), "step is 99, expected a whole number from 1 to "),
}


@pytest.mark.parametrize("folder", KINDS, indirect=True)
@pytest.mark.parametrize("damage", TENSORS)
def test_a_damaged_checkpoint(folder, damage):
    """Without it a tensor that is missing is a KeyError, and one of another run goes on training
    without a word."""
    o, where = folder
    change, line = TENSORS[damage]
    tensors, about = read_safetensors(where / "checkpoint.safetensors")
    change(tensors, about)
    write_safetensors(where / "checkpoint.safetensors", tensors, about)
    before = contents(o)
    with pytest.raises(InputError, match=f"checkpoint.safetensors: .*{line}|checkpoint.safetensors: {line}"):
        run(o, resume=True)
    assert contents(o) == before


@pytest.mark.parametrize("folder", ["adapters"], indirect=True)
def test_a_missing_momentum(folder, interrupted):
    """Without it Muon's state may be gone: the run would go on as if it had just begun."""
    where = run_folder(interrupted["base"])
    tensors, about = read_safetensors(where / "checkpoint.safetensors")
    whole = dict(tensors)
    del tensors[named(tensors, "momentum_buffer.")]
    write_safetensors(where / "checkpoint.safetensors", tensors, about)
    with pytest.raises(InputError, match="tensors, its metadata say '.*': damaged, .*: remove "):
        run(interrupted["base"], resume=True)
    write_safetensors(where / "checkpoint.safetensors", whole, about)


LOGS = {
    "empty": (lambda text: "", "log.csv:2: '', expected step 1: damaged"),
    "cut": (lambda text: text[: text.rindex(",")], "log.csv:.* expected step .: damaged"),
    "a line removed": (lambda text: "".join(text.splitlines(True)[:1] + text.splitlines(True)[2:]), "expected step 1"),
    "a power": (lambda text: text.replace("\n1,", "\n²,"), "expected step 1: damaged"),
    "long": (lambda text: text.replace("\n1,", "\n" + "1" * 5000 + ","), "expected step 1: damaged"),
    "a zero byte": (lambda text: text.replace("\n1,", "\n\0,"), "expected step 1: damaged"),
    "not utf-8": (lambda text: text.encode().replace(b"\n1,", b"\n\xff,"), "log.csv: not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("folder", ["adapters"], indirect=True)
@pytest.mark.parametrize("damage", LOGS)
def test_a_damaged_log(folder, damage):
    """Without it rows are lost or doubled, or a digit of another script is a ValueError."""
    o, where = folder
    change, line = LOGS[damage]
    changed = change((where / "log.csv").read_text())
    (where / "log.csv").write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    with pytest.raises(InputError, match=line):
        run(o, resume=True)


CONFIGS = {
    "finished": ({"finished": "no"}, "config.json: finished is 'no', expected true or false"),
    "wrote": ({"wrote": [{}]}, r"config.json: wrote is \[{}\], expected a list of texts"),
    "bound": ({"bound": [1]}, r"config.json: bound is \[1\], expected an object of texts"),
    "finished early": (
        {"finished": True},
        "config.json: wrote is empty, expected the files of a finished run",
    ),
}


@pytest.mark.parametrize("folder", ["adapters"], indirect=True)
@pytest.mark.parametrize("damage", CONFIGS)
def test_a_damaged_config(folder, damage):
    """Without it a list in a run's config.json is a TypeError, and a run that is said to have
    finished loses its checkpoint."""
    o, where = folder
    fields, line = CONFIGS[damage]
    write_json(where / "config.json", read_json(where / "config.json") | fields)
    with pytest.raises(InputError, match=line):
        run(o, resume=True)
