"""train.py's command line: every command is dispatched, and its bad options are refused in one
clear line."""

import dataclasses
import json
import math

import pytest

import train
from common.files import InputError
from helpers_training import COMMANDS, argv, main, options

BAD = {
    "adapters": [
        {"r": 0}, {"dropout": 1.0}, {"samples": -1}, {"template": "no place for it"}, {"target": ["q_porj"]},
        {"max_length": 3}, {"steps": 0}, {"lr": math.nan}, {"only": ["animal"]}, {"alpha": math.inf},
    ],
    "base": [{"hidden_size": 0}, {"num_attention_heads": 5}, {"num_key_value_heads": 3}, {"block_size": 0},
             {"text": ""}, {"vocab_size": 20}, {"seed": -1}, {"clip": -1.0}],
    "top2": [{"top_k": 3}, {"top_k": 0}, {"l2": -1.0}, {"adapter_lr": -1.0}, {"max_length": 3},
             {"warmup": -0.5}],
    "lorahub": [{"steps": 0}, {"shots": 0}, {"l1": -1.0}, {"only": ["animal"]}, {"tasks": ""}],
}  # fmt: skip
ROWS = [pytest.param(kind, bad, id=f"{kind} {next(iter(bad))}") for kind, rows in BAD.items() for bad in rows]


@pytest.mark.parametrize("kind, bad", ROWS)
def test_bad_options_are_one_clear_line(kind, bad, small_model, tmp_path, monkeypatch):
    """Without it a bad option is a traceback, or a long training whose pool nothing can read (a
    template without {prompt}): each must be an InputError that names the option or its value."""
    few = {} if kind == "lorahub" else {"steps": 1}
    o = dataclasses.replace(options(kind, small_model, tmp_path / "out", **few), **bad)
    name, value = next(iter(bad.items()))
    with pytest.raises(InputError) as refusal:
        main(monkeypatch, *argv(o))
    value = value[0] if isinstance(value, list) else value
    assert name in str(refusal.value) or str(value) in str(refusal.value)


@pytest.mark.parametrize("cls", COMMANDS, ids=lambda cls: COMMANDS[cls][0])
def test_each_command_gets_its_own_options(cls, monkeypatch, capsys):
    """Without it a command of the table runs another's function, or an option given on the command
    line is not the one that is trained with; what is printed first is what a log keeps of it."""
    name, function = COMMANDS[cls]
    got = []
    assert train.COMMANDS[name][:2] == (cls, function)
    monkeypatch.setitem(train.COMMANDS, name, (cls, got.append, None))
    main(monkeypatch, name, "--model", "somewhere", "--steps", 7)
    assert got == [cls(model="somewhere", steps=7)]
    assert json.loads(capsys.readouterr().err) == dataclasses.asdict(got[0])
