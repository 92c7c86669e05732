"""fast.install changes speed alone: every method answers as without it, and without the folder all
runs."""

import subprocess
import sys

import pytest
import torch

from generate import answer, load
from helpers_commands import ENVIRONMENT, ROOT, python
from helpers_methods import NAMED
from helpers_models import write_llama
from methods.batch import retrieve, set_methods
from model import Llama, load_llama
from moe_lora import MultiLoRALinear, attached
from pool.load import make_fast

PROMPTS = ["the ant", "what is the plural of mouse", "sort these words"]


@pytest.fixture(scope="module")
def plain(small_model, pool_with_every_part):
    return load(small_model, pool_with_every_part, fast=False)


@pytest.fixture(scope="module")
def fast(small_model, pool_with_every_part):
    return load(small_model, pool_with_every_part)


@torch.no_grad()
def last_logits(mole, method):
    """(prompts, v) of each prompt by itself."""
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([mole.tokenizer.encode(prompt)])
        set_methods(mole, [method], retrieved=retrieve(mole, [method], [prompt], ids=ids.tolist()))
        mole.prompt.mask = torch.ones(ids.shape, dtype=torch.bool)
        rows.append(mole.model(ids)[0, -1])
        mole.prompt.mask = None
    return torch.stack(rows)


@pytest.mark.parametrize("method", [name for name in NAMED if name not in ("oracle", "lorahub")])
def test_every_method_is_the_same_without_it(plain, fast, method):
    """Speed that changes an answer is a bug that nobody looks for where the mathematics stands."""
    want = answer(plain, PROMPTS, method=method, max_new_tokens=7)
    assert answer(fast, PROMPTS, method=method, max_new_tokens=7, compile=False) == want
    got, want = last_logits(fast, method), last_logits(plain, method)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_what_is_installed(plain, fast):
    """A model that is loaded plain and is fast all the same, or the reverse, makes the other tests
    compare a thing with itself."""
    for mole, name in ((plain, "Llama"), (fast, "FastLlama")):
        set_methods(mole, ["meteora"])
        linear = next(iter(attached(mole.model).values()))
        assert type(mole.model).__name__ == name and isinstance(mole.model, Llama)
        assert type(linear).__name__ == name.replace("Llama", "MultiLoRALinear")
        assert isinstance(linear, MultiLoRALinear)
        assert type(linear.base).__name__ == name.replace("Llama", "Linear")


@pytest.mark.parametrize("wide", [(), (torch.bfloat16,)], ids=["library", "widened"])
def test_bfloat16_rounds_to_no_less(tmp_path, monkeypatch, wide):
    """Where a CPU has no bf16 matmul they are computed in float32: they round elsewhere, but not to
    less."""
    monkeypatch.setattr("fast.matmul.WIDENED", wide)
    folder = write_llama(tmp_path / "m", dtype=torch.bfloat16, head_dim=10, rope_theta=523.0)
    ids = torch.randint(331, (2, 31), generator=torch.Generator().manual_seed(0))
    whole = load_llama(folder, torch.float32)(ids)
    plain, fast = load_llama(folder)(ids), make_fast(load_llama(folder))(ids)
    assert fast.dtype == torch.bfloat16
    assert (fast - whole).abs().mean() < 1.05 * (plain - whole).abs().mean()


HALTED = "import sys; sys.modules['fast'] = None; "


def test_the_first_command_without_the_folder():
    """Who deletes fast/ to read or change what is left must still have a program."""
    argv = "sys.argv = ['generate.py', '--prompt', 'What is the plural of mouse?']; "
    path = f"sys.path[0] = {str(ROOT)!r}; "
    run = "import runpy; runpy.run_path('generate.py', run_name='__main__')"
    done = python(HALTED + argv + path + run, cwd=ROOT)
    assert done.returncode == 0 and done.stdout == "mice\n", done.stderr
    done = python(HALTED + argv.replace("]", ", '--compile']") + path + run, cwd=ROOT)
    assert done.stdout == "mice\n" and "warning: --compile needs fast/" in done.stderr


@pytest.mark.slow
def test_the_core_without_the_folder():
    """The three files that teach, and their tests, need nothing of it."""
    code = HALTED + "import pytest; sys.exit(pytest.main(['-q', 'tests/core', '-p', 'no:cacheprovider']))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:]
