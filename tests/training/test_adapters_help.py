"""Whether the adapters help on their own examples, said before anything is learnt from them."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common.files import InputError
from common.template import TEMPLATE
from common.tensors import read_safetensors, write_safetensors
from common.tokenizer import Tokenizer
from helpers_oracles import LlamaForCausalLM, PeftModel
from helpers_training import ANSWERS, assert_same, contents, killed_at_write, options, run
from moe_lora import attached
from pool.adapters import linear_shapes
from pool.folder import read_pool
from pool.load import load_base
from pool.slots import Pool
from tasks.folders import draw, load_tasks, pick, tokenize
from training import gates as train_gates
from training.adapters_help import BETTER, check_adapters_help, first_examples, own_losses


def loaded(o, template=TEMPLATE):
    """(model, tokenizer, pool, examples) of a run's options."""
    model = load_base(o.model)
    pool = Pool.load(read_pool(o.pool).adapters, linear_shapes(model))
    rows = load_tasks(o.tasks)
    tokenizer = Tokenizer(o.model)
    return model, tokenizer, pool, tokenize(rows, tokenizer, model.config.vocab_size, template, 512)


def losses_of(o):
    """own_losses of the first examples of a run with seed 0."""
    model, _, pool, examples = loaded(o)
    return own_losses(model, pool, first_examples(examples, 0))


def mean_loss(llama, some):
    """The mean cross-entropy of the response tokens of Examples, one at a time, by transformers."""
    losses = []
    for example in some:
        with torch.no_grad():
            logits = llama(torch.tensor([example.ids])).logits[0, example.n_prompt - 1 : -1]
        targets = torch.tensor(example.ids[example.n_prompt :])
        losses += F.cross_entropy(logits.double(), targets, reduction="none").tolist()
    return sum(losses) / len(losses)


@pytest.mark.parametrize("tokens", [2048, 61])
def test_own_losses_are_pefts(tokens, trained):
    """A mean over other tokens, another's adapter or dropout that is left on would warn of good
    adapters and pass bad ones."""
    model, _, pool, examples = loaded(trained)
    seen = first_examples(examples, 7)
    found = own_losses(model, pool, seen, tokens=tokens)
    assert list(found) == sorted(ANSWERS) and not attached(model)
    for name, (own, base) in found.items():
        llama = LlamaForCausalLM.from_pretrained(trained.model, dtype=torch.float32)
        assert base == pytest.approx(mean_loss(llama, seen[name]), rel=1e-5)
        llama = PeftModel.from_pretrained(llama, Path(trained.pool) / "adapters" / name).eval()
        assert own == pytest.approx(mean_loss(llama, seen[name]), rel=1e-5) and own < 0.8 * base


def test_what_is_measured_is_what_a_run_sees_first(trained):
    """Other examples than the first steps' could hide what those are about to learn; without a
    bound a thousand adapters would be measured for longer than they are trained on."""
    examples = loaded(trained)[-1]
    names = sorted(examples)
    first = first_examples(examples, 3)
    assert [len(some) for some in first.values()] == [8, 8]
    step = pick(examples, 0, replace(options_of_a_step(), batch_size=16))
    assert [first[names[j % 2]][j // 2] for j in range(16)] == step
    few = {"animals": examples["animals"][:3], "plurals": examples["plurals"]}
    assert [len(some) for some in first_examples(few, 3).values()] == [3, 8]
    lengths = [len(example.ids) for example in step]
    assert first_examples(examples, 3, sum(lengths[:5])) == {
        "animals": step[0:5:2], "plurals": step[1:5:2]}  # fmt: skip
    assert first_examples(examples, 3, sum(lengths[:5]) - 1)["animals"] == step[0:3:2]
    assert first_examples(examples, 3, 1) == {"animals": draw(examples["animals"], "animals", 0, 1, 3)}


def options_of_a_step():
    """Of a run with seed 3."""
    return train_gates.GatesRun(model="", seed=3)


def negate(pool, names=tuple(ANSWERS)):
    """Turns the adapters `names` of a pool folder against their answers, as another base would."""
    for name in names:
        file = Path(pool) / "adapters" / name / "adapter_model.safetensors"
        tensors, metadata = read_safetensors(file)
        tensors = {key: -value if "lora_B" in key else value for key, value in tensors.items()}
        write_safetensors(file, tensors, metadata)


def test_right_is_silent_and_wrong_is_said(trained, tmp_path, capsys):
    """An adapter that makes its own answers less likely teaches gates nothing, and its user learns
    it only from the scores, hours later."""
    check_adapters_help(*loaded(trained), TEMPLATE, 0)
    assert capsys.readouterr().err == ""
    o = replace(trained, pool=str(shutil.copytree(trained.pool, tmp_path / "pool")))
    negate(o.pool, ["plurals"])
    own, base = losses_of(o)["plurals"]
    assert own > base
    check_adapters_help(*loaded(o), "<{prompt}>", 0)
    assert capsys.readouterr().err == (
        f"warning: adapter plurals doesn't help on its own examples: loss {own:.2f} with it, "
        f"{base:.2f} without (template '<{{prompt}}>'; were they trained with another one, or on another base?)\n"
    )
    negate(o.pool, ["animals"])
    losses = losses_of(o)
    shown = [f"{name} {own:.2f} / {base:.2f}" for name, (own, base) in losses.items()]
    with pytest.raises(InputError) as error:
        check_adapters_help(*loaded(o), TEMPLATE, 0)
    for part in [*shown, repr(TEMPLATE), "no adapter lowers the loss of its own examples"]:
        assert part in str(error.value)


def test_another_template_that_fits_better_is_named(trained, capsys):
    """A wrong template makes the base worse, too: adapters seem to help, and nothing is noticed."""
    strange = "lazy lazy {prompt} jumps over what what what"
    model, tokenizer, pool, examples = loaded(trained, strange)
    check_adapters_help(model, tokenizer, pool, examples, strange, 0)
    err = capsys.readouterr().err
    losses = {}
    for template in (TEMPLATE, strange):
        losses[template] = own_losses(model, pool, first_examples(loaded(trained, template)[-1], 0))
        assert all(own < base for own, base in losses[template].values())
    (line,) = (line for line in err.splitlines() if repr(TEMPLATE) in line)
    for name, (own, _) in losses[strange].items():
        fits = losses[TEMPLATE][name][0]
        assert (f"{name} {fits:.2f} / {own:.2f}" in line) == (fits < BETTER * own)
    assert " / " in line.partition(repr(strange))[2], "none is named: this proves nothing"


@pytest.mark.parametrize("kind", ["top2", "router", "lorahub"])
def test_trainers_stop_where_no_adapter_helps(kind, trained, small_model, tmp_path):
    """Gates of an hour's training over adapters that do harm look like any others."""
    o = options(kind, small_model, tmp_path / "out")
    shutil.rmtree(Path(o.pool) / "adapters")
    shutil.copytree(Path(trained.pool) / "adapters", Path(o.pool) / "adapters")
    negate(o.pool)
    before = contents(o)
    with pytest.raises(InputError, match="no adapter lowers the loss of its own examples"):
        run(o)
    assert contents(o) == before
    negate(o.pool)  # which turns them back
    run(o)
    assert contents(o) != before


@pytest.mark.parametrize("kind", ["top2", "router"])
def test_training_is_the_same_without_the_check(kind, small_model, tmp_path, monkeypatch):
    """A check that drew a random number, or left something attached, would change every run."""
    o = options(kind, small_model, tmp_path / "out")
    run(o)
    with_it = contents(o)
    shutil.rmtree(o.pool)
    o = options(kind, small_model, tmp_path / "out")
    monkeypatch.setattr("training.gates.check_adapters_help", lambda *args: None)
    monkeypatch.setattr("methods.ramole.check_adapters_help", lambda *args: None)
    run(o)
    assert_same(o, with_it)


def test_a_resumed_run_is_not_asked_again(small_model, tmp_path, monkeypatch):
    """It was asked at its start: to ask again costs the time of two steps at every restart."""
    asked = []
    monkeypatch.setattr(train_gates, "check_adapters_help", lambda *args: asked.append(args))
    o = options("top2", small_model, tmp_path / "out")
    assert killed_at_write(monkeypatch, o, 3, after=True) and len(asked) == 1
    run(o, resume=True)
    assert len(asked) == 1


def test_an_adapter_that_learnt_nothing(small_model, tmp_path, capsys):
    """A learning rate that is much too high or too low gives a pool that loads and does nothing."""
    o = options("adapters", small_model, tmp_path / "out", lr=0.0)
    run(o)
    err = capsys.readouterr().err
    for name, (own, base) in losses_of(o).items():
        assert own == base  # B is still zero
        found = f"loss {own:.2f} on its own examples after training, {base:.2f} before"
        assert f"warning: adapter {name} learnt nothing: {found}: change --lr (now 0.0) or --steps" in err
    run(replace(o, lr=1e-2, joint="lora_b", dropout=0.0))
    assert "learnt nothing" not in capsys.readouterr().err
    run(replace(o, lr=0.0, joint="lora_f", name="lora_f1"))
    assert "adapter lora_f1 learnt nothing" in capsys.readouterr().err
