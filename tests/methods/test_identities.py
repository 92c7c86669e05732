"""What every method of the table has to keep, whatever it chooses: a new one is tested by its line."""

import pytest
import torch

from common.files import InputError
from generate import load
from helpers_methods import IDS, MIX, NAMES, USABLE, close, found_for, logits_of
from methods.batch import find_method, set_methods
from methods.session import add_adapter
from moe_lora import Recorder
from pool.folder import read_pool

# Methods that with one adapter to choose from do something else than use it, and why.
NOT_THE_ONE = {
    "base": "uses none",
    "adapter:bee": "uses another",
    MIX: "uses others",
    "lora_f": "uses one that isn't in the pool",
    "lora_b": "uses one that isn't in the pool",
    "samora": "uses experts that aren't in the pool",
    "samora:fox": "uses experts that aren't in the pool",
    "lorahub:fox": "weighs it by what its search has found",
    "loraflow": "adds a bias to the softmax",
    "meteora_once": "uses none before its gate",
    "meteora_once_top1": "uses none before its gate",
    "meteora_once_top2": "uses none before its gate",
    "ase": "shares with one that isn't in the pool",
    "ase_top2": "shares with one that isn't in the pool",
    "ties_ab": "trims it",
    "ties_ba": "trims it",
    "dare_ab": "drops entries",
    "dare_ba": "drops entries",
}
# exclude has no meaning for them, or is an error
NAMED = ("base", "adapter:bee", MIX, "lora_f", "lora_b", "samora", "samora:fox")


@pytest.mark.parametrize("name", USABLE)
def test_a_batch_is_each_alone(mole, name):
    """Without it a request's answer depends on who else asked."""
    together = logits_of(mole, [name] * 5)
    for row in range(5):
        alone = logits_of(mole, [name], IDS[row : row + 1])
        assert close(together[row], alone[0]), row


@pytest.mark.parametrize("name", USABLE)
def test_the_order_of_the_pool_changes_nothing(mole, small_model, pool_with_every_part, name):
    """Without it a row of a gate, a weight or a score could go to a slot instead of an adapter."""
    turned = load(small_model, pool_with_every_part)
    for adapter in NAMES:
        turned.pool.remove(adapter)
    folders = read_pool(pool_with_every_part).adapters
    for adapter in ("cat", "ant", "bee"):
        add_adapter(turned, adapter, folders[adapter])
    slots = [turned.pool.slot(adapter) for adapter in NAMES]
    assert slots != [mole.pool.slot(adapter) for adapter in NAMES]
    assert close(logits_of(turned, [name] * 2), logits_of(mole, [name] * 2))


@pytest.mark.parametrize("name", [name for name in USABLE if name not in NOT_THE_ONE])
def test_one_candidate_is_that_adapter(mole, name):
    """Without it scale, a softmax over free slots or a second factor could go unnoticed."""
    found = [pairs[1:] for pairs in found_for([name])]  # ant
    alone = logits_of(mole, [name], exclude=("bee", "cat"), retrieved=found)
    assert close(alone, logits_of(mole, ["adapter:ant"]))


@pytest.mark.parametrize("name", [name for name in USABLE if name not in NAMED])
def test_an_excluded_adapter_is_as_if_it_were_not_there(mole, small_model, name):
    """Without it eval.py --ood could measure tasks with their own adapter."""
    got = logits_of(mole, [name], exclude=("bee",))
    with Recorder(mole.model, IDS.shape[1]) as recorder:
        mole.prompt.mask = torch.ones(1, IDS.shape[1], dtype=torch.bool)
        with torch.no_grad():
            mole.model(IDS[:1])
        mole.prompt.mask = None
    if recorder.linears and mole.attached[1] is mole.pool:  # else they are merged into one
        weights = recorder.read(IDS.shape[1])  # (m, n, e)
        used = [mole.pool.slot(adapter) for adapter in ("ant", "cat")]
        assert weights[..., used].abs().sum() > 0
        weights[..., used] = 0
        assert weights.abs().max() == 0
    if not find_method(mole, name).made_by:  # it needs no files, and so can do with the others alone
        folders = read_pool(mole.folder.path).adapters
        others = load(small_model, adapters={adapter: folders[adapter] for adapter in ("ant", "cat")})
        assert close(got, logits_of(others, [name]))
    with pytest.raises(InputError, match=f"method {name}: every adapter is excluded"):
        set_methods(mole, [name], retrieved=found_for([name]), exclude=NAMES)


@pytest.mark.parametrize("name", USABLE)
def test_cached_is_uncached(mole, name):
    """Without it an answer depends on how its tokens were cut into forward passes."""
    n_prompt = 7
    ids = IDS[:2]
    whole = logits_of(mole, [name] * 2, n_prompt=n_prompt)
    cache = mole.model.new_cache(2, ids.shape[1])
    mole.prompt.mask = torch.ones(2, n_prompt, dtype=torch.bool)
    with torch.no_grad():
        parts = [mole.model(ids[:, :n_prompt], cache)]
        mole.prompt.mask = None
        for t in range(n_prompt, ids.shape[1]):
            parts.append(mole.model(ids[:, t : t + 1], cache))
    assert close(torch.cat(parts, 1), whole)
