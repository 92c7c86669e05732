"""generate.py --export: each method that is one mixture, equal to the method itself; what is refused."""

import json

import pytest
import torch

from common.tensors import read_safetensors
from generate import load
from helpers_commands import assert_refused, command
from helpers_methods import IDS, MIX, close, logits_of
from helpers_models import random_adapter, tokenizer_bytes, write_llama
from helpers_oracles import peft_logits
from methods.batch import find_method, method_names
from methods.protocol import Gated
from model import load_llama
from pool.adapters import linear_shapes, load_adapter, save_adapter

SAME = ["uniform", "adapter:cat", "lorahub:fox", "average_ab", "ties_ab", "dare_ab", "svd", "lora_f"]
EDITED = ["ties_ba", "dare_ba"]


@pytest.fixture(scope="module")
def mole(small_model, pool_with_every_part):
    return load(small_model, pool_with_every_part)


@pytest.fixture
def export(small_model, pool_with_every_part, tmp_path):
    """Runs the command with --export OUT; returns (CompletedProcess, OUT)."""

    def run(*args, out="out"):
        known = ["--model", small_model, "--pool", pool_with_every_part]
        return command("generate.py", *known, "--export", tmp_path / out, *args), tmp_path / out

    return run


@pytest.mark.parametrize("method", [MIX, *SAME])
def test_an_exported_method_is_that_method(small_model, mole, export, method):
    """Without it a method that runs here is another one where it is served: in PEFT, or merged."""
    asked = ["--mix", method.removeprefix("mix:")] if method == MIX else ["--method", method]
    limit = 2e-5 if method == "lora_f" else 1e-5  # its adapter is large: PEFT is 9e-6 from float64's
    want = logits_of(mole, [method] * len(IDS))
    done, out = export(*asked)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"wrote {out}\n")
    assert {file.name for file in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert close(peft_logits(small_model, IDS, out), want, limit)
    done, out = export(*asked, "--export_merged", out="merged")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"wrote {out}\n")
    assert close(peft_logits(out, IDS), want, limit)
    assert close(logits_of(load(out), ["base"] * len(IDS)), want, limit)
    assert not close(want, logits_of(mole, ["base"] * len(IDS)), 1e-3)


@pytest.mark.parametrize("method", EDITED)
def test_an_edited_base_is_exported_merged(mole, export, method):
    """Without it what can't be an adapter can't leave this program at all."""
    done, out = export("--method", method, "--export_merged")
    assert done.returncode == 0, done.stderr
    assert close(peft_logits(out, IDS), logits_of(mole, [method] * len(IDS)), 1e-5)
    assert_refused(export("--method", method, out="adapter")[0], method, "--export_merged")


def test_every_other_method_is_refused(mole, export, tmp_path):
    """Without it the export of a method that chooses for each prompt is some mixture that nobody
    asked for. A new method has to be in one of the lists."""
    kinds = {"lora_b": "lora_f", "average_ba": "uniform"}  # of the same class as one above
    kinds |= {"adapter:NAME": "", "mix:NAME=WEIGHT,...": "", "lorahub:TASK": "", "oracle": ""}
    others = [name for name in method_names() if name not in (*SAME, *EDITED, *kinds)]
    assert any(isinstance(find_method(mole, name), Gated) for name in others)
    for name in others:
        for options in ([], ["--export_merged"]):
            # There is no such model: the refusal comes before one is opened.
            done = command(
                "generate.py",
                "--model",
                tmp_path / "no",
                "--export",
                tmp_path / "out",
                "--method",
                name,
                *options,
            )
            assert_refused(done, f"method {name} can't be exported")
    assert not (tmp_path / "out").exists()


def test_bad_combinations(export, tmp_path):
    """Without it an option is ignored in silence, or somebody's adapter is overwritten."""
    mix = ["--mix", "ant=1"]
    for args, *words in [
        ([], "--mix", "--method", "found 0"),
        ([*mix, *mix], "found 2"),
        ([*mix, "--method", "uniform"], "found 2"),
        ([*mix, "--prompt", "x"], "leave out --prompt"),
        ([*mix, "--interactive"], "leave out --interactive"),
        ([*mix, "--list"], "leave out --list"),
        ([*mix, "--html", "page.html"], "leave out --html"),
        ([*mix, "--export_rank", 3, "--export_merged"], "--export_rank", "--export_merged"),
        ([*mix, "--export_rank", -3], "export_rank", "from 0 to"),
        ([*mix, "--export_merged", "--dtype", "float32"], "--dtype"),
        ([*mix, "--exclude", "ant"], "ant is excluded"),
        (["--mix", "ant"], "'ant'", "NAME=WEIGHT"),
        (["--mix", "amt=1"], "amt", "ant"),
        (["--mix", "ant=1e6", "--dtype", "float16"], "out", "lora_B", "float16"),
        (["--method", "uniform", *(f"--exclude={name}" for name in ("ant", "bee", "cat"))], "excluded"),
        (["--method", "svd", *(f"--exclude={name}" for name in ("ant", "bee", "cat"))], "excluded"),
        (["--method", "oracle"], "oracle", "adapter:NAME"),
        (["--method", "lorahub:foxx"], "foxx", "fox"),
        (["--method", "unifrom"], "unifrom", "uniform"),
    ]:
        done, out = export(*args)
        assert_refused(done, *words)
        assert not out.exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "adapter_config.json").write_text("mine")
    assert_refused(export(*mix, out="taken")[0], "taken", "not empty")
    assert (tmp_path / "taken" / "adapter_config.json").read_text() == "mine"
    assert_refused(command("generate.py", "--export_rank", 3), "--export_rank", "--export DIR")
    assert_refused(command("generate.py", "--export_merged"), "--export_merged", "--export DIR")


def test_the_error_of_a_smaller_rank_is_printed(mole, export):
    """Without it a user can't tell a rank that is enough from one that isn't."""
    done, out = export("--method", "uniform", "--export_rank", 3)
    short = load_adapter(out)
    lost = {}
    whole = {}
    for path, a in short.A.items():
        D = sum(
            mole.pool.scale[path][slot].double()
            * mole.pool.B[path][slot].double()
            @ mole.pool.A[path][slot].double()
            for slot in map(mole.pool.slot, mole.pool.names)
        )
        S = torch.linalg.svdvals(D / 3)
        lost[path] = float((D / 3 - short.B[path].double() @ a.double()).square().sum())
        whole[path] = float(S.square().sum())
        assert lost[path] == pytest.approx(float(S[3:].square().sum()), rel=1e-4)
    worst = max(lost, key=lambda path: lost[path] / whole[path])
    error = (sum(lost.values()) / sum(whole.values())) ** 0.5
    worst_error = (lost[worst] / whole[worst]) ** 0.5
    assert done.stdout == f"rank 3: relative error {error:.3g}, worst {worst_error:.3g} in {worst}\n"


def test_a_bfloat16_base_takes_nothing_from_its_adapters(tmp_path):
    """Without it float32 adapters leave rounded to the dtype of the base they were loaded beside."""
    folder = write_llama(tmp_path / "base", dtype=torch.bfloat16, torch_dtype="bfloat16")
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes())
    stored = random_adapter("elk", linear_shapes(load_llama(folder)), alpha=6.0)
    save_adapter(stored, tmp_path / "elk")
    args = ["generate.py", "--model", folder, "--adapter", f"elk={tmp_path / 'elk'}", "--mix", "elk=-0.5"]
    assert command(*args, "--export", tmp_path / "exact").returncode == 0
    found = load_adapter(tmp_path / "exact")
    for path, a in stored.A.items():
        assert torch.equal(found.A[path], a) and torch.equal(found.B[path], -stored.B[path])
    assert command(*args, "--export", tmp_path / "short", "--dtype", "bfloat16").returncode == 0
    assert load_adapter(tmp_path / "short").A[path].dtype == torch.bfloat16
    assert command(*args, "--export", tmp_path / "merged", "--export_merged").returncode == 0
    tensors, _ = read_safetensors(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["torch_dtype"] == "bfloat16"
