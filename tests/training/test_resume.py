"""What --resume may go on with: the same options, base, adapters and data; and what is finished."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch

from common.files import InputError, read_json, read_jsonl, write_json, write_jsonl
from common.locks import alone
from common.tensors import read_safetensors, write_safetensors
from helpers_commands import assert_refused, command
from helpers_training import argv, assert_same, contents, killed_at_write, options, run, run_folder


def change_line(file):
    """Another answer in the last line; its length stays."""
    rows = read_jsonl(file, ("prompt", "response"))
    rows[-1]["response"] = rows[-1]["response"][::-1]
    write_jsonl(file, rows)


def change_data(o):
    """Changes a line of what the run trains on; returns its name."""
    if hasattr(o, "text"):
        Path(o.text).write_text(Path(o.text).read_text()[::-1])
        return o.text
    change_line(Path(o.tasks) / "animals" / "train.jsonl")
    return "animals"


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("kind", ["adapters", "top2", "base", "router"])
def test_other_data_is_not_resumed(kind, finished, small_model, tmp_path, monkeypatch):
    """Without it weights that half their steps saw other answers pass for those of a whole run, and
    a run of last week's data for one of today's."""
    o = options(kind, small_model, tmp_path / "out")
    if finished:
        run(o)
    else:
        assert killed_at_write(monkeypatch, o, 5 if kind == "base" else 3, after=True)
        assert (run_folder(o) / "checkpoint.safetensors").exists()
    before, name = contents(o), change_data(o)
    with pytest.raises(InputError, match=rf"config\.json: can't resume.*data of {name} has changed$"):
        run(o, resume=True)
    assert_same(o, before)


def test_held_out_lines_may_change(small_model, tmp_path, monkeypatch):
    """Nothing is trained on test.jsonl: that somebody adds to it must not cost a run."""
    o = options("adapters", small_model, tmp_path / "out")
    assert killed_at_write(monkeypatch, o, 3, after=True)
    change_line(Path(o.tasks) / "animals" / "test.jsonl")
    run(o, resume=True)
    assert read_json(run_folder(o) / "config.json")["finished"]


@pytest.mark.parametrize("file", ["pool.json", "samples.jsonl", "retriever.safetensors"])
def test_what_else_a_router_learns_from(file, small_model, tmp_path, monkeypatch):
    """Another template makes other prompts; another retriever or other samples, other candidates."""
    o = options("router", small_model, tmp_path / "out")
    pool = Path(o.pool)
    if file == "retriever.safetensors":
        done = command("train.py", "retriever", f"--model={o.model}", f"--tasks={o.tasks}", f"--pool={pool}",
                       "--share=1", "--prompts=5", "--steps=1")  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert killed_at_write(monkeypatch, o, 3, after=True)
    changed = ["retriever has changed"]
    if file == "pool.json":
        write_json(pool / file, read_json(pool / file) | {"template": "Q {prompt} A"})
        changed = ["data of animals has changed; data of plurals has changed"]
    elif file == "samples.jsonl":
        write_jsonl(pool / "adapters" / "animals" / file, [{"prompt": "a fox"}])
    else:
        tensors, metadata = read_safetensors(pool / file)
        write_safetensors(pool / file, {k: v + v.is_floating_point() for k, v in tensors.items()}, metadata)
    with pytest.raises(InputError, match=f"can't resume with other options or data: {changed[0]}$"):
        run(o, resume=True)


def test_lorahub_searches_again_for_a_task_whose_data_changed(small_model, tmp_path):
    """Weights that were searched on other examples would be kept as this task's; those of the other
    task, minutes of work, needn't be found again."""
    o = options("lorahub", small_model, tmp_path / "out")
    run(o)
    file = Path(o.pool) / "baselines" / "lorahub.json"
    first = read_json(file)
    kept = {name: {adapter: 9.0 for adapter in first["adapters"]} for name in first["weights"]}
    write_json(file, first | {"weights": kept})
    run(o)
    assert read_json(file)["weights"] == kept
    change_line(Path(o.tasks) / "animals" / "train.jsonl")
    run(o)
    again = read_json(file)
    assert again["weights"]["plurals"] == kept["plurals"] and again["weights"]["animals"] != kept["animals"]
    assert again["data"]["data of animals"] != first["data"]["data of animals"]
    write_json(file, first | {"weights": kept, "base": "another"})  # a pool without pool.json has no base
    run(o)
    assert read_json(file)["weights"]["plurals"] == first["weights"]["plurals"]


@pytest.mark.parametrize("kind", ["adapters", "top2", "base", "router"])
def test_a_finished_run_has_what_it_wrote(kind, small_model, tmp_path, capsys):
    """Who deletes an adapter to train it again is told "finished already", and has no adapter."""
    o = options(kind, small_model, tmp_path / "out")
    run(o)
    expected, wrote = contents(o), read_json(run_folder(o) / "config.json")["wrote"]
    names = {"adapters": "adapter_model.safetensors", "base": "tokenizer.model"}
    assert names.get(kind, ".safetensors") in " ".join(wrote)
    for name in wrote:
        file = (run_folder(o) / name).resolve()
        file.unlink()
        capsys.readouterr()
        run(o, resume=True)
        assert (
            f"warning: {file}: a finished run wrote it, and it is gone: training again"
            in capsys.readouterr().err
        )
        assert_same(o, expected)
    run(o, resume=True)
    assert "finished already" in capsys.readouterr().err


def test_gates_whose_new_adapters_were_deleted(small_model, tmp_path, capsys):
    """--adapters_too writes a pool: gates alone are half of what the run made."""
    o = options("top2", small_model, tmp_path / "old", adapters_too=str(tmp_path / "new"))
    run(o)
    before = (tmp_path / "new" / "gates" / "meteora_top2.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "new" / "adapters" / "plurals")
    run(o, resume=True)
    assert "it is gone: training again" in capsys.readouterr().err
    assert (tmp_path / "new" / "adapters" / "plurals" / "adapter_config.json").exists()
    assert (tmp_path / "new" / "gates" / "meteora_top2.safetensors").read_bytes() == before


def test_a_checkpoint_of_somebody_elses_stays(small_model, tmp_path):
    """A file of that name that another program wrote would be overwritten, and then removed."""
    o = options("adapters", small_model, tmp_path / "out")
    file = run_folder(o) / "checkpoint.safetensors"
    write_safetensors(file, {"w": torch.zeros(3)})
    write_json(run_folder(o) / "config.json", {"finished": True})
    before = file.read_bytes()
    done = command("train.py", *argv(o))
    assert_refused_last(done, file, "not a checkpoint that train.py made")
    assert file.read_bytes() == before


def assert_refused_last(done, *words):
    """assert_refused, but for the options that train.py prints first."""
    done.stderr = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("{"))
    assert_refused(done, *words)


@pytest.mark.parametrize("kind", ["adapters", "joint", "top2", "base", "router", "lorahub", "retriever"])
def test_a_second_trainer_in_one_folder(kind, small_model, tmp_path):
    """Both would write one checkpoint and one log, and the later one's weights would be half the
    other's; and the second must hear it before it loads a model for minutes."""
    o = options("adapters" if kind in ("joint", "retriever") else kind, small_model, tmp_path / "out")
    runs = {"joint": "lora_b", "lorahub": "lorahub", "retriever": "retriever"}
    folder = tmp_path / "out" / "runs" / runs.get(kind, run_folder(o).name)
    if kind == "joint":
        o = dataclasses.replace(o, joint="lora_b")
    line = argv(o)
    if kind == "retriever":
        line = ["retriever", f"--model={o.model}", f"--tasks={o.tasks}", f"--pool={o.pool}"]
    if kind != "base":
        line.append(f"--model={tmp_path}/nowhere")
    before = {file for file in (tmp_path / "out").rglob("*") if file.is_file()}
    with alone(folder):
        done = command("train.py", *line)
        assert_refused_last(done, f"error: {folder}: process {os.getpid()} on ", "is at work here")
    assert {file for file in (tmp_path / "out").rglob("*") if file.is_file()} == before
