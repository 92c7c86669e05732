"""Baselines: merges, Arrow and their equality with PEFT's; LoRA-Flow, SMEAR and LoraHub against
their equations."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from generate import load
from helpers_models import random_adapter
from helpers_oracles import create_arrow_model, merge_utils, peft, transformers
from methods.arrow import ArrowGate, arrow_prototypes
from methods.batch import set_methods
from methods.loraflow import LoRAFlowGate, loraflow_gates
from methods.lorahub import lorahub, lorahub_search
from methods.merges import MERGES, dare, merge, merged_linear, ties
from methods.protocol import member_mask
from methods.session import PromptMask
from methods.shared_mixture import SharedMixture
from methods.smear import SmearLinear, SmearRouter
from model import load_llama
from moe_lora import MultiLoRALinear, SampleGate, attach, detach, fixed_rows
from pool.adapters import linear_shapes, load_adapter, save_adapter
from pool.slots import Pool

IDS = torch.randint(331, (3, 11), generator=torch.Generator().manual_seed(3))
RANKS = {"ant": 2, "bee": 7, "cat": 3, "dog": 5, "eel": 1}
ALPHAS = {"ant": 4.0, "bee": 3.0, "cat": 11.0, "dog": 8.0, "eel": 0.5}
UP = "model.layers.1.mlp.up_proj"  # (67, 44)
K = "model.layers.1.self_attn.k_proj"  # (12, 44): smaller than the ranks' sum, 18


@pytest.fixture(scope="module")
def shapes(small_model):
    return linear_shapes(load_llama(small_model))


@pytest.fixture(scope="module")
def pool(shapes):
    return make_pool(shapes)


def make_adapters(shapes, names=RANKS, r=None, alpha=None, **options):
    return [
        random_adapter(n, shapes, r or RANKS[n], alpha or ALPHAS[n], seed=RANKS[n], size=0.3, **options)
        for n in names
    ]


def make_pool(shapes, names=RANKS, capacity=None, rank=1, **options):
    """Five adapters of ranks 1 to 7 and five scales; `names` sets the order."""
    adapters = make_adapters(shapes, names, **options)
    pool = Pool({p: shapes[p] for p in shapes if p in adapters[0].A}, capacity or len(adapters), rank)
    for adapter in adapters:
        pool.add(adapter)
    return pool


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def deltas(merged):
    """{module path: (o, i)} of what merge or lorahub gave."""
    if isinstance(merged, dict):
        return merged
    return {path: merged.scale[path] * merged.B[path] @ A for path, A in merged.A.items()}


def product(pool, name, path):
    """An adapter's s B A in float64."""
    slot = pool.slot(name)
    return pool.scale[path][slot].double() * pool.B[path][slot].double() @ pool.A[path][slot].double()


def stacks(pool, path=UP):
    return pool.A[path], pool.B[path], pool.scale[path]


def close(a, b, limit=1e-5):
    """Largest difference, as a share of the largest value."""
    return (a - b).abs().max() <= limit * b.abs().max()


# PEFT's merges ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(small_model):
    """transformers' reading of the small Llama; deepcopy before changing it."""
    return transformers.LlamaForCausalLM.from_pretrained(small_model, dtype=torch.float32)


def peft_merge(base, folder, adapters, seed=None, weight=1.0, weights=(), **options):
    """{module path: delta} of PEFT's add_weighted_adapter over the adapters, each of the same
    weight, or of its own."""
    for adapter in adapters:
        save_adapter(adapter, folder / adapter.name)
    names = [adapter.name for adapter in adapters]
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    with pytest.MonkeyPatch.context() as patch:  # the last call before the merge draws: seed there
        freeze = peft.tuners.lora.model._freeze_adapter
        patch.setattr(
            peft.tuners.lora.model,
            "_freeze_adapter",
            lambda *args: (freeze(*args), torch.manual_seed(seed or 0)),
        )
        model.base_model.add_weighted_adapter(
            names, list(weights) or [weight] * len(names), "merged", **options
        )
    linears = {
        p: m for p, m in model.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.Linear)
    }
    return {path: linear.get_delta_weight("merged").detach() for path, linear in linears.items()}


# PEFT puts sqrt(weight * scale) on A and on B, takes the disjoint mean in ties but the sum in
# linear and dare_linear, and elects TIES' signs before scaling. So with e adapters of one scale,
# average_ab and dare_ab, (mean s B)(mean A), are its weights 1 / e^2 and ties_ab its weights 1; the
# merges of products take any scale, with 1 / e and 1.
PEERS = {
    "average_ab": ("linear", 1 / 25),
    "ties_ab": ("ties", 1.0),
    "dare_ab": ("dare_linear", 1 / 25),
    "svd": ("svd", 1 / 5),
    "ties_ba": ("ties_svd", 1.0),
    "dare_ba": ("dare_linear_svd", 1 / 5),
}


@pytest.mark.parametrize("method", MERGES)
def test_merges_equal_pefts(base, shapes, tmp_path, method):
    """The names average, TIES, DARE and SVD each have several meanings: without a second
    implementation the table would compare us with our own misreading."""
    kind, weight = PEERS[method]
    alike = {"r": 3, "alpha": 7.0} if method.endswith("_ab") else {}
    adapters = make_adapters(shapes, **alike)
    options = {"density": 0.3} if kind not in ("linear", "svd") else {}
    if method.endswith("_ba"):  # keep all singular values: the merge itself, of full rank
        options |= {"svd_rank": 67, "svd_full_matrices": False}
    want = peft_merge(base, tmp_path, adapters, seed=13, weight=weight, combination_type=kind, **options)
    got = deltas(merge(Pool.of(adapters, shapes), method, options.get("density"), seed=13))
    assert got.keys() == want.keys() == shapes.keys()
    assert all(close(got[path], want[path]) for path in want)


def test_uniform_is_pefts_cat(base, shapes, pool, tmp_path):
    """`uniform` is what most people mean by merging; its weights 1/e must be the mean of the
    products, scale included, not an average of A and of B."""
    want = peft_merge(base, tmp_path, make_adapters(shapes), weight=1 / 5, combination_type="cat")
    got = uniform_deltas(pool)
    assert all(close(got[path], want[path]) for path in want)


def test_a_mix_is_pefts_cat(base, shapes, small_model, tmp_path):
    """Without it a negative weight, or one beside an adapter's own scale, is another model than the
    one that the user merged in PEFT."""
    weights = {"ant": 0.7, "bee": -0.5, "dog": 1.75}
    adapters = []
    for name in weights:  # small ones: large ones amplify rounding past 1e-5
        adapters.append(random_adapter(name, shapes, RANKS[name], ALPHAS[name], seed=RANKS[name], size=0.1))
    deltas = peft_merge(base, tmp_path, adapters, weights=weights.values(), combination_type="cat")
    merged = copy.deepcopy(base)
    for path, delta in deltas.items():
        merged.get_submodule(path).weight.data += delta
    mole = load(small_model, adapters={name: tmp_path / name for name in weights})
    set_methods(mole, ["base", "mix:ant=0.7,bee=-0.5,dog=1.75", "adapter:dog"])
    with torch.no_grad():
        got = mole.model(IDS)[1]
        want = merged(IDS).logits[1]
    assert close(got, want)


def uniform_deltas(pool):
    """{module path: delta} of the mixture of weights 1/e, read off a MultiLoRALinear."""
    found, gate = {}, SampleGate()
    gate.set(*fixed_rows(pool, [dict.fromkeys(pool.names, 1 / len(pool.names))]))
    for path, (o, i) in pool.shapes.items():
        linear = nn.Linear(i, o, bias=False)
        with torch.no_grad():
            found[path] = (
                MultiLoRALinear(linear, *stacks(pool, path), gate)(torch.eye(i)[None])[0].T - linear.weight
            )
    return found


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 7), st.floats(0.05, 0.99), st.integers(0, 2**31))
def test_ties_equals_pefts_function(e, density, seed):
    """An element more or less, or a sign elected by count instead of by total, shows at some
    density and number."""
    stack = noise(e, 11, 13, seed=seed)
    want = merge_utils.ties(list(stack), torch.ones(e), density)
    torch.testing.assert_close(ties(stack, density), want, rtol=0, atol=1e-6)


def test_dare_equals_pefts_function():
    """The sum where the mean was meant, or no rescaling, would make each adapter e or 10 times too
    strong or weak."""
    stack = noise(5, 23, 31)
    torch.manual_seed(7)
    want = merge_utils.dare_linear(list(stack), torch.ones(5) / 5, 0.3)
    got = dare(stack, 0.3, torch.Generator().manual_seed(7))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


# What the merges promise --------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.floats(0.05, 1.0), st.integers(0, 2**31))
def test_ties_knows_no_order_and_no_zeros(e, density, seed):
    """The merge of a set: another order, an adapter that lacks the Linear and padded ranks change
    nothing; where all signs agree and nothing is trimmed it is the mean; it keeps the share that it
    says."""
    stack = noise(e, 5, 11, seed=seed)
    want = ties(stack, density)
    order = torch.randperm(e, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(ties(stack[order], density), want, rtol=0, atol=1e-6)
    padded = torch.cat([stack, torch.zeros(1, 5, 11)]), torch.cat([stack, torch.zeros(e, 2, 11)], dim=1)
    torch.testing.assert_close(ties(padded[0], density), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(ties(padded[1], density)[:5], want, rtol=0, atol=1e-6)
    torch.testing.assert_close(ties(-stack, density), -want, rtol=0, atol=1e-6)
    torch.testing.assert_close(ties(stack.abs(), 1.0), stack.abs().mean(0), rtol=0, atol=1e-6)
    assert want.abs().max() <= stack.abs().max() * 1.000001
    share = ties(stack[:1], density).count_nonzero()
    assert share == max(1, int(density * 55))


def test_ties_by_hand():
    """Trim, elect, disjoint mean, in numbers that can be checked by eye."""
    stack = torch.tensor([[5.0, -4, 0.1, 3], [-1, 6, 0.2, 7], [9, 8, 0.3, -5]])
    # kept 3 of 4: [5 -4 . 3], [-1 6 . 7], [9 8 . -5]; totals 13, 10, 0, 5
    assert ties(stack, 0.75).tolist() == [7.0, 7.0, 0.0, 5.0]
    assert ties(torch.zeros(3, 4), 0.2).tolist() == [0.0] * 4


def test_dare_drops_and_keeps_the_mean():
    """A drop rate of p for one of 1 - p, or a rescaling by p, passes every test of shape."""
    ones = torch.ones(1, 101, 103)
    got = dare(ones, 0.1, torch.Generator().manual_seed(0))
    assert set(got.unique().tolist()) == {0.0, 10.0} and abs(float(got.mean()) - 1) < 0.1
    stack = noise(3, 11, 13)
    torch.testing.assert_close(dare(stack, 1.0, torch.Generator()), stack.mean(0), rtol=0, atol=1e-6)


def test_defaults_are_the_papers(pool):
    """Another default density makes the baselines look worse than they are."""
    for method, density in (("ties_ba", 0.2), ("ties_ab", 0.2), ("dare_ba", 0.1), ("dare_ab", 0.1)):
        got, want = deltas(merge(pool, method)), deltas(merge(pool, method, density))
        other = deltas(merge(pool, method, 0.5))
        assert torch.equal(got[UP], want[UP]) and not close(got[UP], other[UP], 0.1)


def test_seed_of_dare(pool):
    """A run must come out again, and its spread over seeds must be measurable."""
    first, again, other = (deltas(merge(pool, "dare_ab", seed=seed))[UP] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not close(first, other, 0.1)


@pytest.mark.parametrize("path", [UP, K])
def test_svd_is_the_truncated_svd_of_the_mean(pool, path):
    """By way of the small factors, also where they are wider than the Linear, it must be the very
    same matrix."""
    mean = torch.stack([product(pool, name, path) for name in pool.names]).mean(0)
    U, S, Vh = torch.linalg.svd(mean)
    want = U[:, :7] * S[:7] @ Vh[:7]
    adapter = merge(pool, "svd")
    assert adapter.rank == 7 and close(deltas(adapter)[path].double(), want)
    assert not close(mean, want, 0.05)


def test_svd_of_a_linear_smaller_than_the_rank():
    """Tiny key heads: fewer singular values than the rank that the config states would not load
    again."""
    shapes = {K: (3, 11), UP: (13, 11)}
    pool = Pool.of([random_adapter("ant", shapes, 5), random_adapter("bee", shapes, 5, seed=1)], shapes)
    adapter = merge(pool, "svd")
    assert adapter.A[K].shape == (5, 11) and adapter.B[K].shape == (3, 5)
    mean = (product(pool, "ant", K) + product(pool, "bee", K)) / 2
    assert close(deltas(adapter)[K].double(), mean)


def test_averaging_factors_is_not_averaging_products(shapes, pool):
    """(mean B)(mean A) has cross terms B_i A_j; the two are one only where all A, or all s B, are
    equal."""
    assert not close(deltas(merge(pool, "average_ab"))[UP], uniform_deltas(pool)[UP], 0.5)
    twins = make_adapters(shapes, r=3)
    for adapter in twins[1:]:
        adapter.A = twins[0].A
    alike = Pool.of(twins, shapes)
    got, want = deltas(merge(alike, "average_ab")), uniform_deltas(alike)
    assert all(close(got[path], want[path]) for path in shapes)


@pytest.mark.parametrize("method", [*MERGES, "lorahub"])
def test_order_and_room_of_the_pool_change_nothing(shapes, pool, method):
    """Slots are an accident of loading, empty slots and padded ranks an accident of history: DARE's
    masks, TIES' shares and the mean's divisor must not depend on them. The adapter that left had a
    larger rank."""
    targets = {"targets": ["k_proj", "up_proj"]}
    roomy = make_pool(shapes, sorted(RANKS, reverse=True)[:2], 11, 13, **targets)
    roomy.add(random_adapter("gone", roomy.shapes, 13, seed=99))
    for adapter in make_adapters(shapes, sorted(RANKS, reverse=True)[2:], **targets):
        roomy.add(adapter)
    roomy.remove("gone")
    roomy.A[UP][7], roomy.scale[UP][7] = 5.0, 5.0  # nobody's slot
    weights = {"bee": 0.5, "eel": -1.0, "ant": 0.25, "cat": 1.5, "dog": 1.0}
    got, want = (
        deltas(lorahub(p, weights) if method == "lorahub" else merge(p, method))
        for p in (roomy, make_pool(shapes, **targets))
    )
    assert all(close(got[path], want[path], 1e-5) for path in want)


def test_ties_ab_trims_each_rank_by_its_own_size():
    """In a pool of rank 7 an adapter of rank 2 would keep 70 % of itself for 20 % of the padded
    tensor."""
    shapes = {UP: (23, 29)}
    two, seven = (
        random_adapter("ant", shapes, 2, size=0.1),
        random_adapter("bee", shapes, 7, seed=1, size=9.0),
    )
    adapter = merge(Pool.of([two, seven], shapes), "ties_ab")
    seven_only = merge(Pool.of([seven], shapes), "ties_ab")
    changed = (adapter.A[UP] != seven_only.A[UP]).sum()  # where the small one has a say: its 20 %, or less
    assert 0 < changed <= int(0.2 * 2 * 29)


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], ["model.layers.2.mlp.down_proj"]])
def test_adapters_on_different_linears(shapes, targets):
    """Where one adapter lacks a Linear it counts as zero in the mean, and the merged adapter covers
    all of theirs."""
    sits_on = {"ant": targets, "bee": ["up_proj"]}
    adapters = [random_adapter(name, shapes, 3, seed=RANKS[name], targets=t) for name, t in sits_on.items()]
    pool = Pool.of(adapters, shapes)
    got = deltas(merge(pool, "svd"))
    assert got.keys() == adapters[0].A.keys() | adapters[1].A.keys()
    for path, delta in got.items():
        mean = sum(a.scale[path] * a.B[path] @ a.A[path] for a in adapters if path in a.A) / 2
        if not all(path in a.A for a in adapters):  # of rank 3 at most: the approximation is exact
            assert close(delta, mean)


@pytest.mark.parametrize("method", ["average_ab", "ties_ab", "dare_ab", "svd"])
def test_merged_adapter_is_an_adapter(shapes, tmp_path, method):
    """It is saved, loaded and checked like any other: config, ranks and targets must fit, also
    where it sits on some layers only; else eval.py could not keep it."""
    some = {p: s for p, s in shapes.items() if "layers.1." in p or p.endswith("q_proj")}
    pool = Pool.of(make_adapters(some), some, torch.bfloat16)
    adapter = merge(pool, method)
    assert adapter.name == method and set(adapter.scale.values()) == {1.0}
    assert {t.dtype for t in adapter.tensors().values()} == {torch.float32}
    save_adapter(adapter, tmp_path / "merged")
    again = load_adapter(tmp_path / "merged", method, shapes)
    assert again.hash == adapter.hash and again.rank == 7
    assert set(deltas(again)) == set(some) == peft_targets(tmp_path / "merged", shapes)


def peft_targets(folder, shapes):
    """The Linears that PEFT's own rule finds for the config in `folder`."""
    config = peft.LoraConfig.from_pretrained(folder)
    return {p for p in shapes if peft.tuners.tuners_utils.check_target_module_exists(config, p)}


def test_unknown_merge_is_refused(pool):
    """A misspelt name must not fall through to one of the methods."""
    for method in ("ties", "average_ba", "svd_ab", "dare_a"):
        with pytest.raises(ValueError, match=method):
            merge(pool, method)


@pytest.mark.parametrize("bias", [False, True])
def test_merged_linear(bias):
    """W + delta in the base's dtype, rounded once; the base stays as it was, to be put back."""
    linear = nn.Linear(29, 17, bias=bias).bfloat16()
    before, delta = linear.weight.clone(), noise(17, 29) * 0.001
    merged = merged_linear(linear, delta)
    assert (
        merged.base is linear and torch.equal(linear.weight, before) and merged.weight.dtype == torch.bfloat16
    )
    assert torch.equal(merged.weight, (before.double() + delta.double()).bfloat16())
    plain = copy.deepcopy(linear)
    plain.weight.data = merged.weight.data
    x = noise(3, 5, 29).bfloat16()
    assert close(merged(x), plain(x), 1e-2) and not merged.weight.requires_grad


# Arrow --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [UP, K])
def test_arrow_prototypes_are_the_top_right_singular_vectors(shapes, path):
    """Of B A, not of A alone: the two can be far apart. Padded ranks and empty slots included."""
    pool = make_pool(shapes, capacity=7, rank=11)
    got = arrow_prototypes(pool.A[path], pool.B[path])
    assert got.shape == (7, 44) and got.dtype == torch.float32
    assert torch.equal(got.norm(dim=1) > 0, member_mask(pool))
    to_a = []
    for name in pool.names:
        want, of_a = (
            torch.linalg.svd(m)[2][0] for m in (product(pool, name, path), pool.A[path][pool.slot(name)])
        )
        mine = got[pool.slot(name)].double()
        assert abs(abs(float(mine @ want)) - 1) < 1e-6
        to_a.append(abs(float(mine @ of_a.double())))
    assert min(to_a) < 0.9


@pytest.mark.parametrize("k, temperature", [(1, 1.0), (2, 0.7), (3, 3.0), (5, 1.0)])
def test_arrow_equals_pefts(base, small_model, shapes, tmp_path, k, temperature):
    """Whole Linears, scale and all. The factors have a dominant direction, or PEFT's 15 power
    iterations would not reach the singular vector."""
    adapters = make_adapters(shapes, r=3)  # PEFT's takes one rank only; five scales
    for adapter in adapters:
        for A in adapter.A.values():
            A *= torch.tensor([1.0, 0.1, 0.05])[:, None]
        save_adapter(adapter, tmp_path / adapter.name)
    config = peft.tuners.lora.ArrowConfig(top_k=k, router_temperature=temperature, rng_seed=5)
    theirs = create_arrow_model(
        copy.deepcopy(base), [str(tmp_path / a.name) for a in adapters], config
    ).eval()
    pool = Pool.of(adapters, shapes)
    gates = {p: ArrowGate(arrow_prototypes(pool.A[p], pool.B[p]), k, temperature) for p in pool.A}
    model = load_llama(small_model)
    with torch.no_grad():
        plain = model(IDS)
        ours = attach(model, pool, gates)
        for path in (UP, K, "model.layers.2.mlp.down_proj"):
            x = noise(3, 11, shapes[path][1])
            want = theirs.get_submodule(f"base_model.model.{path}")(x)
            assert close(ours[path](x), want)
            assert not close(ours[path].base(x), want, 0.05)
        got = model(IDS)
        assert not close(got, plain, 0.05) and close(
            got, theirs(IDS).logits, 3e-5
        )  # 15 iterations, three layers
    detach(model)


def test_arrow_never_chooses_an_empty_slot(pool, shapes):
    """A zero prototype has the logit 0: with k above the number of adapters it would take weight
    from real ones."""
    roomy, x = make_pool(shapes, capacity=11, rank=13), noise(1, 5, 44)
    linear = nn.Linear(44, 67)
    with torch.no_grad():
        for k in (2, 5, 7, 11):
            gate, roomy_gate = (ArrowGate(arrow_prototypes(p.A[UP], p.B[UP]), k) for p in (pool, roomy))
            assert roomy_gate.k == min(k, 5)
            want = MultiLoRALinear(linear, *stacks(pool), gate)(x)
            assert close(MultiLoRALinear(linear, *stacks(roomy), roomy_gate)(x), want)
    known = torch.tensor([False, True, False, True, False])
    idx, weight = ArrowGate(arrow_prototypes(pool.A[UP], pool.B[UP]), 3, known=known)(x[0], None, None)
    assert set(idx.unique().tolist()) == {1, 3} and weight.shape == (5, 2)
    torch.testing.assert_close(weight.sum(1), torch.ones(5))


def test_arrow_of_untrained_adapters():
    """B is zero before training: the output is the base's, not NaN from a softmax over nothing."""
    A, B = noise(3, 2, 29), torch.zeros(3, 17, 2)
    prototypes = arrow_prototypes(A, B)
    assert torch.equal(prototypes, torch.zeros(3, 29))
    linear, x = nn.Linear(29, 17), noise(1, 5, 29)
    with torch.no_grad():
        assert torch.equal(
            MultiLoRALinear(linear, A, B, torch.ones(3), ArrowGate(prototypes, 2))(x), linear(x)
        )


def test_arrow_logits_are_float32_in_a_bfloat16_model():
    """The sign of x must not matter, and bfloat16's 8 bits can't tell 257 from 256."""
    prototypes = torch.tensor([[1.0, 0.0], [257 / 256, 0.0], [0.0, 1.0]])
    x = torch.tensor([[256.0, 0.0], [-256.0, 0.0]]).bfloat16()
    idx, weight = ArrowGate(prototypes, 2)(x, None, None)
    assert idx.tolist() == [[1, 0], [1, 0]] and weight.dtype == torch.float32
    torch.testing.assert_close(weight[:, 0], torch.full((2,), 0.7310586), rtol=0, atol=1e-6)


# LoRA-Flow ----------------------------------------------------------------------------------------


def test_loraflow_is_its_equation(pool):
    """softmax(W x) + b, with b outside the softmax: inside it would be a constant logit."""
    G, bias = noise(5, 44) * 0.2, noise(5, seed=1)
    A, B, scale = stacks(pool)
    linear, x = nn.Linear(44, 67), noise(3, 11, 44, seed=2)
    with torch.no_grad():
        got = MultiLoRALinear(linear, A, B, scale, LoRAFlowGate(G, bias))(x)
        want = linear(x).double()
        for b in range(3):
            for t in range(11):
                weight = torch.softmax(G.double() @ x[b, t].double(), 0) + bias.double()
                for j, name in enumerate(pool.names):
                    want[b, t] += weight[j] * product(pool, name, UP) @ x[b, t].double()
    assert close(got.double(), want)


def test_loraflow_one_gate_a_layer(small_model, shapes):
    """The layer's other Linears use q_proj's mixture: weights of their own would be seven times the
    paper's parameters, and shared ones listed twice would be stepped twice by an optimizer."""
    pool = make_pool(shapes, capacity=7)
    gates = loraflow_gates(pool)
    assert list(gates) == list(pool.A)
    leaders = {path: gate for path, gate in gates.items() if isinstance(gate, LoRAFlowGate)}
    assert list(leaders) == [f"model.layers.{n}.self_attn.q_proj" for n in range(3)]
    assert all(isinstance(gate, SharedMixture) for path, gate in gates.items() if path not in leaders)
    modules = nn.ModuleList(gates.values())
    assert sum(p.numel() for p in modules.parameters()) == 3 * (7 * 44 + 7)
    assert len(list(modules.parameters())) == len(modules.state_dict()) == 6

    model = load_llama(small_model).requires_grad_(False)
    with torch.no_grad():
        for n, gate in enumerate(leaders.values()):
            gate.weight += noise(7, 44, seed=n) * 0.2
    linears = attach(model, pool, gates)
    for linear in linears.values():
        linear.trace = torch.zeros(33, 7)
    logits = model(IDS)
    for n in range(3):
        first, *rest = [linear.trace for path, linear in linears.items() if f"layers.{n}." in path]
        assert len(rest) == 6 and all(torch.equal(first, other) for other in rest)
        torch.testing.assert_close(first.sum(1), torch.ones(33))
        assert torch.equal(first[:, 5:], torch.zeros(33, 2))
    assert not torch.equal(*(linears[f"model.layers.{n}.mlp.up_proj"].trace for n in (0, 1)))

    logits.logsumexp(-1).sum().backward()
    for gate in leaders.values():
        used, empty = (part.abs().sum() for part in (gate.weight.grad[:5], gate.weight.grad[5:]))
        assert used > 1e-6 and empty == 0
        assert gate.bias.grad[:5].abs().min() > 1e-6 and gate.bias.grad[5:].abs().max() == 0


def test_loraflow_starts_uniform_on_the_first_linear_there_is(shapes):
    """Adapters often sit on v and up alone: the first of those leads. Slots without an adapter take
    no share."""
    pool = make_pool(shapes, capacity=7, targets=["v_proj", "up_proj"])
    gates = loraflow_gates(pool)
    assert [path for path, g in gates.items() if isinstance(g, LoRAFlowGate)] == [
        f"model.layers.{n}.self_attn.v_proj" for n in range(3)
    ]
    path = "model.layers.2.self_attn.v_proj"
    gates[path].bias.data[:] = torch.arange(7.0)
    idx, weight = gates[path](noise(3, 44), None, None)
    want = torch.tensor([0.2, 1.2, 2.2, 3.2, 4.2, 0, 0]).expand(3, 7)
    torch.testing.assert_close(weight.detach(), want)
    assert idx.tolist() == [list(range(7))] * 3


# SMEAR --------------------------------------------------------------------------------------------


def smear(pool, G, mask, known=None):
    torch.manual_seed(0)
    return SmearLinear(nn.Linear(44, 67), *stacks(pool), SmearRouter(G, PromptMask(mask), known))


def prompt_mask(*lengths, t=11):
    return torch.arange(t)[None] < torch.tensor(lengths)[:, None]


@torch.no_grad()
def test_smear_is_its_equation(pool):
    """Parameters are merged, not outputs: a mixture of B A would have no cross terms. Each example
    has its own p, from its own prompt tokens."""
    x, mask, G = noise(3, 11, 44), prompt_mask(11, 5, 7), noise(5, 44, seed=1)
    linear = smear(pool, G, mask)
    y = linear(x)
    assert not close(linear.gate.p[0], linear.gate.p[1], 0.1)
    A, B, scale = (part.double() for part in stacks(pool))
    for b, length in enumerate((11, 5, 7)):
        p = torch.softmax(G.double() @ x[b, :length].double().mean(0), 0)
        torch.testing.assert_close(linear.gate.p[b].double(), p, rtol=0, atol=1e-5)
        merged_A, merged_B = sum(p[j] * A[j] for j in range(5)), sum(p[j] * scale[j] * B[j] for j in range(5))
        want = linear.base(x[b]).double() + x[b].double() @ (merged_B @ merged_A).T
        assert close(y[b].double(), want)


@torch.no_grad()
def test_smear_of_one_hot_weights_is_the_adapter_alone(pool):
    """Without it a scale counted twice, or in A as well, would pass for a merge."""
    x, linear = noise(3, 11, 44), smear(pool, noise(5, 44), None)
    linear.gate.p = torch.eye(5)[[2, 0, 4]]
    gate = SampleGate()
    gate.set(*fixed_rows(pool, [{pool.names[j]: 1.0} for j in (2, 0, 4)]))
    assert close(linear(x), MultiLoRALinear(linear.base, *stacks(pool), gate)(x))


@torch.no_grad()
def test_smear_keeps_its_prompts_choice_while_decoding(pool):
    """Decided anew from each generated token, the cache would hold one adapter's keys and the token
    another's."""
    x, linear = noise(3, 11, 44), smear(pool, noise(5, 44), prompt_mask(11, 5, 7))
    whole = linear(x)
    chosen = linear.gate.p
    linear.gate.prompt.mask = None
    assert (
        all(close(linear(x[:, t : t + 1]), whole[:, t : t + 1]) for t in (3, 9)) and linear.gate.p is chosen
    )
    linear.gate.prompt.mask = torch.ones(3, 1, dtype=torch.bool)
    assert not close(linear(x[:, :1]), whole[:, :1], 0.01)


@torch.no_grad()
def test_smear_padding_and_neighbours_change_nothing(pool, shapes):
    """A row of a batch is the same request alone: right padding, NaN even, must not enter the mean,
    nor empty slots the softmax."""
    G = noise(5, 44)
    x, mask = noise(3, 11, 44), prompt_mask(11, 5, 7)
    x[1, 5:], x[2, 7:] = float("nan"), 1e9
    together = smear(pool, G, mask)(x)
    roomy = make_pool(shapes, capacity=7, rank=13)
    for b, n in enumerate((11, 5, 7)):
        alone = smear(pool, G, torch.ones(1, n, dtype=torch.bool))(x[b : b + 1, :n])
        assert close(together[b : b + 1, :n], alone)
        wide = torch.cat([G, torch.full((2, 44), 9.0)])
        in_room = smear(roomy, wide, torch.ones(1, n, dtype=torch.bool), member_mask(roomy))(x[b : b + 1, :n])
        assert close(in_room, alone)


def test_smear_learns_and_shows_its_weights(pool):
    """G is all that trains; a detached p would leave it as it started. The trace is what --routing
    prints."""
    x, linear = noise(3, 11, 44), smear(pool, noise(5, 44), prompt_mask(11, 5, 7))
    linear.trace = torch.zeros(37, 5)
    linear(x).square().sum().backward()
    assert linear.gate.weight.grad.norm(dim=1).min() > 1e-6
    assert [name for name, _ in linear.named_parameters()] == ["base.weight", "base.bias", "gate.weight"]
    assert torch.equal(linear.trace[:33].view(3, 11, 5), linear.gate.p.detach()[:, None].expand(3, 11, 5))
    assert torch.equal(linear.trace[33:], torch.zeros(4, 5))


def test_smear_in_bfloat16(pool, shapes):
    """The model's dtype in and out, p in float32."""
    low = Pool.of(make_adapters(shapes), shapes, torch.bfloat16)
    x, mask, G = noise(3, 11, 44), prompt_mask(11, 5, 7), noise(5, 44)
    linear, want = smear(low, G, mask), smear(pool, G, mask)
    linear.base.bfloat16()
    with torch.no_grad():
        y = linear(x.bfloat16())
        assert y.dtype == torch.bfloat16 and linear.gate.p.dtype == torch.float32
        assert close(y.float(), want(x), 2e-2)


# LoraHub ------------------------------------------------------------------------------------------


def test_lorahub_is_its_equation(pool):
    """A and B are weighed apart, so that one adapter of weight 0.5 is a quarter of itself; absent
    names weigh 0."""
    weights = {"dog": 0.5, "ant": -1.25, "bee": 1.0}
    adapter = lorahub(pool, weights)
    A, B, scale = (part.double() for part in stacks(pool))
    slots = {name: pool.slot(name) for name in weights}
    want = sum(w * scale[slots[n]] * B[slots[n]] for n, w in weights.items()) @ sum(
        w * A[slots[n]] for n, w in weights.items()
    )
    assert adapter.name == "lorahub" and adapter.rank == 7 and close(deltas(adapter)[UP].double(), want)
    assert close(deltas(lorahub(pool, {"dog": 0.5}))[UP].double(), product(pool, "dog", UP) / 4)


def test_lorahub_with_equal_weights_is_average_ab(pool):
    """Two ways to the same adapter."""
    got, want = lorahub(pool, dict.fromkeys(pool.names, 1 / 5)), merge(pool, "average_ab")
    assert all(close(got.A[p], want.A[p]) and close(got.B[p], want.B[p]) for p in pool.A)


@pytest.mark.parametrize("e", [3, 7, 29])
def test_lorahub_search_finds_a_planted_minimum(e):
    """A search that never leaves zeros returns the base alone; one whose steps never shrink or grow
    hardly leaves it. The budget is what it costs: exactly `steps` evaluations."""
    target = noise(e, seed=e).clamp(-1, 1)
    seen = []

    def loss(w):
        seen.append(w)
        return float((torch.tensor(w) - target).square().sum())

    weights, best = lorahub_search(loss, e, steps=401, seed=1, l1=0.0)
    assert len(seen) == 401 and seen[0] == [0.0] * e and len(weights) == e
    assert best == pytest.approx(float((torch.tensor(weights) - target).square().sum()))
    assert best < 0.05 * float(target.square().sum())
    assert max(abs(v) for w in seen for v in w) <= 1.5
    short = lorahub_search(loss, e, seed=1, l1=0.0)[1]
    assert len(seen) == 441 and best < short < 0.95 * float(target.square().sum())


def test_lorahub_search_by_seed():
    """Same seed, same weights; the seed is not a decoration."""
    results = [lorahub_search(lambda w: sum((v - 1) ** 2 for v in w), 5, seed=seed) for seed in (3, 3, 4)]
    assert results[0] == results[1] != results[2]


def test_lorahub_search_penalises_and_bounds():
    """Without the penalty weights drift where the loss is flat; without the bounds a loss that
    falls forever takes them away. A NaN is never better."""
    assert lorahub_search(lambda w: 0.0, 5) == ([0.0] * 5, 0.0)
    weights, best = lorahub_search(lambda w: -sum(w), 2, steps=200)
    assert weights == [1.5, 1.5] and best == pytest.approx(-3 + 0.05 * 1.5)
    assert lorahub_search(lambda w: float("nan") if any(w) else 1.0, 3) == ([0.0] * 3, 1.0)
