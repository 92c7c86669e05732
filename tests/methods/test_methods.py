"""Every method against a construction by hand, alone and in a batch; missing parts, wrong names,
and the way back."""

import math
import re
import shlex
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train
from common.files import InputError, read_json, write_json
from common.options import parse_command
from common.template import TEMPLATE
from generate import answer, load, stream
from helpers_methods import IDS, LOGO, LORAHUB, NAMES, USABLE, close, logits_of
from helpers_models import random_adapter, write_adapters
from methods.batch import (
    check_method,
    default_method,
    find_method,
    for_task,
    force_adapters,
    set_methods,
    split_methods,
)
from methods.joint import Joint
from methods.lorahub import lorahub
from methods.smear import SmearLinear
from model import load_llama
from moe_lora import Mixture, attach, attached, detach, meteora_gates
from pool.adapters import linear_shapes, load_adapter, save_adapter
from pool.folder import PoolFolder, read_pool, write_pool
from pool.load import load_base

# By hand ------------------------------------------------------------------------------------------------------------

# What has a reference here; a method that is added brings a test of its own.
BY_HAND = ["base", "adapter:bee", "lora_f", "lora_b", "uniform", "average_ba", "average_ab", "ties_ab", "dare_ab",
           "svd", "ties_ba", "dare_ba", "lorahub:fox", "arrow", "meteora", "meteora_top1", "meteora_top2", "soft",
           "loraflow", "smear", "moe_top1", "moe_top3", "drlora", "selection", "mixture", "fusion", "adaptersoup",
           "ramole", "logo", "logo_entropy"]  # fmt: skip


def trim(x, density):
    """The `density` largest entries in magnitude of those that aren't zero."""
    keep = max(1, int(density * int((x != 0).sum())))
    least = x.abs().flatten().sort(descending=True).values[keep - 1]
    return torch.where(x.abs() >= least, x, 0)


def ties(parts):
    parts = torch.stack([trim(x, 0.2) for x in parts])
    sign = torch.where(parts.sum(0) >= 0, 1, -1)
    kept = torch.where(parts.sign() == sign, parts, 0)
    return kept.sum(0) / (kept != 0).sum(0).clamp(min=1)


def dare(parts, generator):
    return sum(x * torch.bernoulli(torch.full(x.shape, 0.1), generator=generator) / 0.1 for x in parts) / len(
        parts
    )


def merged_by_hand(name, A, B, generator):
    """A method's delta (o, i) in float64 for one Linear; A [(r, i)] and B [(o, r)], scaled, padded
    to one rank."""
    products = [b @ a for a, b in zip(A, B, strict=True)]
    mean = sum(products) / len(products)
    if name.startswith("adapter:"):
        return products[NAMES.index(name.partition(":")[2])]
    if name in ("uniform", "average_ba"):
        return mean
    if name == "average_ab":
        return sum(B) / 3 @ (sum(A) / 3)
    if name == "selection":
        return products[2]
    if name == "mixture":
        return (products[2] + products[0]) / 2
    if name in ("fusion", "adaptersoup"):
        return (B[2] + B[0]) / 2 @ ((A[2] + A[0]) / 2)
    if name in LOGO:
        return products[2] * 2 / 3 + products[0] / 3
    if name == "svd":
        U, S, Vh = torch.linalg.svd(mean)
        return U[:, :5] @ S[:5].diag() @ Vh[:5]
    if name == "lorahub:fox":
        return sum(LORAHUB[n] * b for n, b in zip(NAMES, B, strict=True)) @ sum(
            LORAHUB[n] * a for n, a in zip(NAMES, A, strict=True)
        )
    if name == "ties_ba":
        return ties(products)
    if name == "dare_ba":
        return dare(products, generator)
    if name == "ties_ab":
        return ties(B) @ ties(A)
    if name == "dare_ab":
        A = dare(A, generator)
        return dare(B, generator) @ A
    raise AssertionError(f"no reference for {name}")


class ByHand(nn.Module):
    """W x + the sum over adapters of weights(x)[j] * delta_j x, or for smear one product of weighed
    factors."""

    def __init__(self, base, A, B, weights, smear=False):
        super().__init__()
        self.base, self.A, self.B, self.weights, self.smear = base, A, B, weights, smear

    def forward(self, x):
        y = []
        for sample in x.double().unflatten(0, (-1, IDS.shape[1])):
            weight = self.weights(sample)  # (t, e), or (e,) of the whole sample
            if self.smear:
                A, B = (sum(w * m for w, m in zip(weight, ms, strict=True)) for ms in (self.A, self.B))
                y.append(sample @ A.T @ B.T)
            else:
                each = [sample @ a.T @ b.T for a, b in zip(self.A, self.B, strict=True)]
                y.append(sum(weight[:, j, None] * out for j, out in enumerate(each)))
        return self.base(x) + torch.cat(y).float()


def top(logits, k):
    """Softmax over the k largest of each row, zero elsewhere."""
    values, idx = logits.topk(k, -1)
    return torch.zeros_like(logits).scatter(-1, idx, values.softmax(-1))


def weigher(name, path, A, B, tensors, leaders):
    """x (t, i) float64 -> the weights that a gated method gives."""
    if name == "arrow":
        v = torch.stack([torch.linalg.svd(b @ a).Vh[0] for a, b in zip(A, B, strict=True)])
        return lambda x: top((x @ v.T).abs(), 2)
    if name == "loraflow":
        layer = path.split(".self_attn")[0].split(".mlp")[0]
        if f"{path}.gate.weight" in tensors:
            G, bias = (tensors[f"{path}.gate.{part}"].double() for part in ("weight", "bias"))
            leaders[layer] = []

            def lead(x):
                leaders[layer].append((x @ G.T).softmax(-1) + bias)
                return leaders[layer][-1]

            return lead
        seen = iter(range(10**6))
        return lambda x: leaders[layer][next(seen)]
    if name == "ramole":
        A_r, B_r = (tensors[f"{path}.router_{part}.weight"].double() for part in "AB")

        def weigh(x):
            outputs = torch.stack([x @ a.T @ b.T for a, b in zip(A, B, strict=True)], 1)  # (t, e, o)
            scores = ((outputs @ B_r) * (x @ A_r.T)[:, None]).sum(-1) / 5**0.5
            scores[:, 1] = -math.inf  # bee was not retrieved
            return scores.softmax(-1)

        return weigh
    G = tensors[f"{path}.gate.weight"].double()
    if name == "smear":
        return lambda x: (x.mean(0) @ G.T).softmax(-1)
    k = {"soft": 3, "moe_top1": 1, "moe_top3": 3, "meteora_top1": 1}.get(name, 2)
    if name.startswith("moe"):
        return lambda x: (p := (x @ G.T).softmax(-1)) * (p >= p.topk(k).values[:, -1:])
    return lambda x: top(x @ G.T, k)


@torch.no_grad()
def reference(small_model, folder, name, rows=1):
    """The logits of a method by arithmetic alone: of the project only the base Llama and the file
    readers."""
    from safetensors.torch import load_file

    model, generator = load_llama(small_model), torch.Generator().manual_seed(0)
    own = folder / "baselines" / name
    paths = {name: own} if own.is_dir() else dict(sorted(read_pool(folder).adapters.items()))
    adapters = [load_adapter(path, key) for key, path in paths.items()]
    gated = {"meteora": "meteora_top2"}.get(name, name)
    file, leaders = folder / "gates" / f"{gated}.safetensors", {}
    file = folder / "router.safetensors" if name == "ramole" else file
    tensors = load_file(file) if file.exists() else {}
    for path in linear_shapes(model):
        A = [F.pad(a.A[path].double(), (0, 0, 0, 7 - a.rank)) for a in adapters]
        B = [F.pad(a.scale[path] * a.B[path].double(), (0, 7 - a.rank)) for a in adapters]
        if len(adapters) == 3:  # the largest rank is 5
            A, B = [a[:5] for a in A], [b[:, :5] for b in B]
        linear = model.get_submodule(path)
        if tensors or name == "arrow":
            parent, _, last = path.rpartition(".")
            weights = weigher(name, path, A, B, tensors, leaders)
            setattr(model.get_submodule(parent), last, ByHand(linear, A, B, weights, name == "smear"))
        elif name != "base":
            delta = B[0] @ A[0] if len(adapters) == 1 else merged_by_hand(name, A, B, generator)
            linear.weight.data = (linear.weight.double() + delta).float()
    return model(IDS[:rows])


def test_gates_have_rows_in_the_order_that_the_reference_reads(folder):
    """Without it the reference could join rows and adapters wrongly in the way that it is to
    notice."""
    from common.tensors import read_safetensors

    for file in (folder / "gates").iterdir():
        names = read_safetensors(file)[1]["names"].split("\n")
        assert names[:3] == sorted(NAMES) and names[3:] in ([], ["lora_b"])  # which ase shares


@pytest.mark.parametrize("name", BY_HAND)
def test_a_method_is_what_its_name_says(small_model, folder, mole, name):
    """Baselines that are not what they are called make the comparison worthless, and no score would
    show it: a merge of B A for one of A and B, a scale forgotten, another file's gates, an adapter
    that does nothing."""
    got, want = logits_of(mole, [name, name]), reference(small_model, folder, name, 2)
    assert close(got, want), float((got - want).abs().max() / want.abs().max())
    plain = load_llama(small_model)(IDS[:2])
    assert name == "base" or not close(got, plain, 0.01)


def test_methods_differ(mole):
    """Two names for one thing, but for uniform = average_ba and a kind of gate = its top-2, would be
    a table's mistake."""
    logits = {name: logits_of(mole, [name]) for name in USABLE}
    alike = {(a, b) for a in logits for b in logits if a < b and close(logits[a], logits[b], 1e-3)}
    alike -= {("adaptersoup", "fusion")}  # they differ in what they find, as LoGo's and random ones do
    alike = {(a, b) for a, b in alike if not b.startswith("random_adapters")}
    alike -= {("lag", "spectr"), ("lag_weighted", "spectr_weighted")}  # LAG's shortlist holds all three
    alike -= {(a, b) for a, b in alike if a.startswith("logo") and b.startswith("logo")}
    top_2 = {(name, f"{name}_top2") for name in ("meteora", "meteora_once", "ase")}
    assert alike == {("average_ba", "uniform"), *top_2}
    assert close(logits_of(mole, ["meteora"], top_k=1), logits["meteora_top1"])


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_every_method_answers(small_model, folder, dtype):
    """Setting up is not yet decoding: with a cache, token by token, in the model's own dtype, and
    the routing shown."""
    mole = load(small_model, folder, dtype=dtype)
    for name in USABLE:
        tokens = list(stream(mole, ["the fox", "what is it"], method=name, max_new_tokens=3, routing=True))
        assert {t.row for t in tokens} == {0, 1} and len(tokens) >= 2, name


def test_temperature_and_k_reach_the_gates(mole):
    """An option that is read and not passed on gives a table of equal columns."""
    for name in ("meteora", "arrow"):
        one, hot, three = (
            logits_of(mole, [name], **options) for options in ({}, {"gate_temperature": 9.0}, {"top_k": 1})
        )
        assert not close(one, hot, 1e-3) and not close(one, three, 1e-3), name
    cold = logits_of(mole, ["arrow"], gate_temperature=1e-8)
    assert close(cold, logits_of(mole, ["arrow"], top_k=1), 1e-4)


# Batches ------------------------------------------------------------------------------------------

BATCHES = [
    ["base", "adapter:cat", "uniform", "adapter:ant", "average_ba"],
    ["meteora", "base", "adapter:bee", "meteora_top2", "uniform"],
    ["soft", "adapter:ant", "base", "soft", "uniform"],
    ["uniform", "arrow", "arrow", "base", "adapter:cat"],
    ["loraflow", "uniform", "base", "adapter:ant", "loraflow"],
    ["ase", "adapter:cat", "base", "ase_top2", "uniform"],
    ["meteora_once", "uniform", "adapter:bee", "meteora_once_top2", "base"],
    ["svd", "base", "lora_b", "average_ab", "lorahub:fox"],
    ["lorahub:dog", "ties_ab", "dare_ab", "lora_f", "lorahub:fox"],
    ["ramole", "selection", "base", "mixture", "logo"],
    ["fusion", "base", "adaptersoup", "svd", "fusion"],
    ["moe_top3", "moe_top3", "base", "adapter:cat", "uniform"],
    ["smear"] * 5,
    ["ties_ba"] * 5,
]


@pytest.mark.parametrize("methods", BATCHES, ids=lambda methods: methods[0])
def test_a_mixed_batch_is_each_alone(mole, methods):
    """Requests with other methods come together by chance: none may notice."""
    together = logits_of(mole, methods)
    for row, name in enumerate(methods):
        alone = logits_of(mole, [name], IDS[row : row + 1])[0]
        assert close(together[row], alone), (row, name)


CLASHES = [
    ("meteora_top1", "meteora_top2"), ("arrow", "soft"), ("loraflow", "meteora"), ("svd", "arrow"),
    ("ase", "meteora"), ("meteora_once_top2", "meteora_top2"),
    ("lora_b", "smear"),
    ("smear", "ties_ba"), ("ties_ba", "dare_ba"), ("base", "smear"), ("base", "dare_ba"), ("soft", "dare_ba"),
    ("uniform", "ties_ba"), ("adapter:ant", "smear"), ("adapter:ant", "svd"), ("uniform", "average_ab"),
]  # fmt: skip


@pytest.mark.parametrize("pair", CLASHES, ids="+".join)
@pytest.mark.parametrize("turn", [1, -1])
def test_methods_that_need_another_setup_are_refused_together(mole, pair, turn):
    """The alternative is that one of the two rows is answered by the other's method, in silence."""
    with pytest.raises(InputError, match="one batch can't hold both") as refusal:
        set_methods(mole, [*pair, pair[0]][::turn])
    assert all(f" {name}" in str(refusal.value).partition(": they")[0] for name in pair)
    assert close(logits_of(mole, ["uniform"]), logits_of(mole, ["average_ba"]))  # and the next batch works


def test_forced_adapters_hold_for_each_token_then_for_each_row(mole):
    """force_adapters() is what the composites' ceiling stands on; here its two forms against
    methods that exist."""
    names = [["ant"] * 11, [None] * 11]
    set_methods(mole, ["base"] * 2)
    force_adapters(mole, names)
    with torch.no_grad():
        got = mole.model(IDS[:2])
        force_adapters(mole, ["cat", None])
        rows = mole.model(IDS[:2])
    assert close(got, logits_of(mole, ["adapter:ant", "base"])) and close(
        rows, logits_of(mole, ["adapter:cat", "base"])
    )
    set_methods(mole, ["base"] * 2)
    force_adapters(mole, [["ant"] * 4 + ["bee"] * 7, ["bee"] * 11])
    with torch.no_grad():
        mixed = mole.model(IDS[:2])
    ant, bee = (logits_of(mole, [f"adapter:{name}"] * 2) for name in ("ant", "bee"))
    assert close(mixed[0, :4], ant[0, :4]) and close(mixed[1], bee[1])
    assert not close(mixed[0, 4:], bee[0, 4:], 0.01)  # the first four are in their past
    assert torch.equal(logits_of(mole, ["adapter:bee"] * 2), bee)  # nothing of it stays


def test_the_way_back_leaves_no_trace(small_model, mole):
    """A merge left in W, or a Linear that isn't the base's own, makes every later answer wrong by a
    little."""
    plain = load_base(small_model)
    with torch.no_grad():
        want = plain(IDS)
    for name in USABLE:
        logits_of(mole, [name])
        assert torch.equal(logits_of(mole, ["base"] * 5), want), name
        logits_of(mole, [name])
        detach(mole.model)
        mole.attached = None
        with torch.no_grad():
            assert torch.equal(mole.model(IDS), want), name
        assert {n: type(m) for n, m in mole.model.named_modules()} == {
            n: type(m) for n, m in plain.named_modules()
        }
    kept = {name: logits_of(mole, [name]) for name in USABLE}
    for name in reversed(USABLE):
        assert torch.equal(logits_of(mole, [name]), kept[name]), name


def test_the_same_setup_is_attached_once(mole):
    """eval.py sets up for every batch: merging 28 adapters anew each time would take longer than
    the answers."""
    for name in ("svd", "ties_ba", "smear", "meteora", "arrow"):
        logits_of(mole, [name, name])
        before = list(mole.model.modules())
        logits_of(mole, [name])
        assert all(a is b for a, b in zip(before, mole.model.modules(), strict=True)), name
    set_methods(mole, ["adapter:ant", "uniform"])
    before = list(attached(mole.model).values())
    set_methods(mole, ["base", "adapter:cat", "uniform"])
    assert before and before == list(attached(mole.model).values())


def test_an_adapter_that_leaves_is_left_out(small_model, folder):
    """Merges and prototypes of adapters that are no longer there answer for nobody."""
    mole = load(small_model, folder)
    small = load(small_model, adapters={name: folder / "adapters" / name for name in ("ant", "bee")})
    logits_of(mole, ["svd"])
    mole.pool.remove("cat")
    for name in ("uniform", "svd", "average_ab", "ties_ba", "arrow"):
        assert close(logits_of(mole, [name]), logits_of(small, [name])), name
    with pytest.raises(InputError, match=r"smear\.safetensors.*cat \(missing"):
        set_methods(mole, ["smear"])
    assert close(logits_of(mole, ["adapter:bee"]), logits_of(small, ["adapter:bee"]))


# Names --------------------------------------------------------------------------------------------


def test_adapters_called_like_methods(small_model, tmp_path):
    """A task may be called "base" or "soft": its adapter is adapter:soft, and the method stays the
    method."""
    names = ("base", "soft", "svd", "uniform")
    base = load_llama(small_model)
    paths = write_adapters(tmp_path / "adapters", base, names, size=0.1)
    write_pool(PoolFolder(tmp_path, paths, base.fingerprint(), TEMPLATE))
    mole = load(small_model, tmp_path)
    others = load(small_model, adapters=dict(zip("abcd", paths.values(), strict=True)))
    for name, other in zip(names, "abcd", strict=True):
        assert close(
            logits_of(mole, [f"adapter:{name}", "base"]), logits_of(others, [f"adapter:{other}", "base"])
        ), name
    for name in ("base", "svd", "uniform"):
        assert close(logits_of(mole, [name]), logits_of(others, [name])), name
    methods = ["adapter:base", "base", "adapter:uniform", "uniform"]
    together = logits_of(mole, methods)
    for row, name in enumerate(methods):
        assert close(together[row], logits_of(mole, [name], IDS[row : row + 1])[0]), name
    with pytest.raises(InputError, match=r"soft\.safetensors.*train\.py gates --kind soft"):
        set_methods(mole, ["soft"])
    force_adapters(mole, ["base", None])
    with torch.no_grad():
        forced = mole.model(IDS[:2])
    assert close(forced, logits_of(mole, ["adapter:base", "base"]))


def test_a_baseline_of_ones_own_is_a_method(small_model, folder, tmp_path):
    """--joint lora_b --name mine writes POOL/baselines/mine: without its name as a method nothing
    could answer with it. It is no member of the pool."""
    base = load_llama(small_model)
    paths = write_adapters(tmp_path / "adapters", base, ("ant", "bee"), size=0.1)
    write_pool(PoolFolder(tmp_path, paths, base.fingerprint(), TEMPLATE))
    save_adapter(
        random_adapter("mine", linear_shapes(base), r=3, seed=9, size=0.1), tmp_path / "baselines" / "mine"
    )
    mole = load(small_model, tmp_path)
    assert mole.pool.names == ["ant", "bee"] and default_method(mole, 2)[0] == "logo_top1"
    assert close(logits_of(mole, ["mine"]), reference(small_model, tmp_path, "mine"))
    for name in ("minee", "../adapters/ant", "baselines/mine", ""):
        with pytest.raises(InputError, match="no method"):
            set_methods(mole, [name])


MISSING = {
    "meteora": ("meteora_top2.safetensors", "gates --top_k 2"),
    "meteora_top1": ("meteora_top1.safetensors", "gates --top_k 1"),
    "meteora_top13": ("meteora_top13.safetensors", "gates --top_k 13"),
    "soft": ("soft.safetensors", "gates --kind soft"),
    "loraflow": ("loraflow.safetensors", "gates --kind loraflow"),
    "smear": ("smear.safetensors", "gates --kind smear"),
    "moe_top3": ("moe_top3.safetensors", "gates --kind moe --top_k 3"),
    "drlora": ("drlora.safetensors", "drlora"),
    "ase": ("ase_top2.safetensors", "gates --kind ase --top_k 2"),
    "meteora_once_top1": ("meteora_once_top1.safetensors", "gates --kind meteora_once --top_k 1"),
    "ramole": ("router.safetensors", "router"),
    "lora_f": ("baselines/lora_f", "adapters --joint lora_f"),
    "lora_b": ("baselines/lora_b", "adapters --joint lora_b"),
    "lorahub:fox": ("lorahub.json", "lorahub"),
}


@pytest.fixture(scope="module")
def bare(small_model, folder, tmp_path_factory):
    """Two moles without trained parts: a pool folder of PEFT folders, and adapters named one by
    one."""
    paths = read_pool(folder).adapters
    plain = tmp_path_factory.mktemp("bare") / "peft"
    plain.mkdir()
    for name, path in paths.items():
        (plain / name).symlink_to(path)
    return load(small_model, plain), load(small_model, adapters=paths)


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_part_names_the_command_that_makes_it(bare, name):
    """ "needs gates" sends people to the source; and a command that train.py doesn't know sends them
    there twice."""
    part, command = MISSING[name]
    for mole in bare:
        with pytest.raises(
            InputError, match=f"method {name.partition(':')[0]}.*: python train.py {command} makes it"
        ):
            set_methods(mole, ["base", name])
        with pytest.raises(InputError) as refusal:
            check_method(mole, name)
        assert mole.folder is None or part in str(refusal.value)
    commands = {name: cls for name, (cls, *_) in train.COMMANDS.items()}
    asked = re.search("python train.py (.*) makes it", str(refusal.value))[1]
    made, o = parse_command(commands, [*shlex.split(asked), "--model", "m"])
    assert made == asked.split()[0] and o.model == "m"


def test_what_needs_no_parts_works_without_a_pool_folder(bare):
    """PEFT adapters from anywhere are enough for everything that isn't trained."""
    for name in (
        "base",
        "adapter:ant",
        "uniform",
        "average_ba",
        "average_ab",
        "ties_ab",
        "dare_ba",
        "svd",
        "arrow",
    ):
        assert close(*(logits_of(mole, [name]) for mole in bare)), name


@pytest.mark.parametrize("name", [name for name in USABLE if name != "base"])
def test_without_adapters_there_is_only_the_base(small_model, name):
    """A mixture of nothing would be the base under another name."""
    mole = load(small_model)
    with pytest.raises(InputError, match=f"method {name}: needs adapters.*--pool"):
        set_methods(mole, ["base", name])
    assert len(answer(mole, "the fox", method="base", max_new_tokens=2)) == 1


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("metora", "did you mean meteora"), ("avrage_ab", "average_ab"), ("smeer", "smear"), ("Base", "base"),
        ("zzzzz", "one of base, oracle"), ("adapter:ent", "'ent'.*did you mean ant"),
        ("adapter:", "no method 'adapt"),
        ("lorahub:fix", "no weights for 'fix', did you mean fox"), ("lorahub:zzz", "only for fox, dog"),
        ("meteora_top0", "no method 'meteora_top0'"), ("meteora_topx", "meteora_top1"),
        ("lorahub:", "no method"),
        ("base:ant", "no method"), ("oracle", "adapter:NAME.*eval.py"), ("lorahub", "lorahub:NAME.*eval.py"),
    ],
)  # fmt: skip
def test_a_wrong_name_gets_the_nearest_right_one(mole, name, hint):
    """A typo that falls back to something else is a column of a table under a wrong name; oracle
    and lorahub are another method for each task, which only eval.py knows."""
    for call in (check_method, lambda mole, name: set_methods(mole, ["base", name])):
        with pytest.raises(InputError, match=hint):
            call(mole, name)


def test_the_oracle_is_each_tasks_own(mole):
    """eval.py asks for_task; a method that is left alone must come back as it is."""
    got = [
        for_task(mole, name, "fox")
        for name in ("oracle", "lorahub", "base", "adapter:ant", "lora_b", "smear")
    ]
    assert got == ["adapter:fox", "lorahub:fox", "base", "adapter:ant", "lora_b", "smear"]


class First(nn.Module):
    """A gate of one's own: each token's adapter by the sign of its first feature."""

    def forward(self, x, sample, ax):
        idx = (x[:, :1] > 0).long() * 2
        return Mixture(idx, torch.full(idx.shape, 0.5))


@torch.no_grad()
def test_a_gate_of_ones_own_is_a_method(small_model, folder):
    """The promise to whoever forks this: an nn.Module in mole.custom_gates, and generate and eval
    know it by its name; replaced by another under that name it must not stay attached."""
    mole = load(small_model, folder)
    with pytest.raises(InputError, match="no method 'mine'"):
        set_methods(mole, ["mine"])
    mole.custom_gates["mine"] = First()
    got = logits_of(mole, ["mine", "base", "adapter:bee"])
    assert close(
        got[1:],
        torch.cat([logits_of(mole, [n], IDS[j : j + 1]) for j, n in ((1, "base"), (2, "adapter:bee"))]),
    )
    model = load_llama(small_model)
    attach(model, mole.pool, First())
    assert close(got[:1], model(IDS[:1])) and not close(got[:1], logits_of(mole, ["base"]), 0.01)
    gates = meteora_gates(mole.pool, 1)
    for gate in gates.values():
        gate.weight.data[1] = 1.0
    logits_of(mole, ["mine"])
    mole.custom_gates["mine"] = gates
    detach(model)
    attach(model, mole.pool, gates)
    assert close(logits_of(mole, ["mine"]), model(IDS[:1]))
    assert len(answer(mole, "the fox", method="mine", max_new_tokens=2)) == 1
    with pytest.raises(InputError, match="one batch can't hold both"):
        set_methods(mole, ["mine", "meteora"])
    with pytest.raises(InputError, match="a gate of your own chooses among all adapters, 'bee' too"):
        set_methods(mole, ["mine"], exclude=("bee",))


def test_smear_shares_the_pools_prompt(mole):
    """With a prompt of their own the routers would never be told which tokens to look at."""
    set_methods(mole, ["smear"])
    linears = attached(mole.model)
    assert len(linears) == 21 and all(type(linear) is SmearLinear for linear in linears.values())
    assert all(linear.gate.prompt is mole.prompt for linear in linears.values())


def test_the_name_of_a_gate_of_ones_own_may_begin_like_anothers(small_model, folder):
    """meteora_mine must not be answered by meteora."""
    mole = load(small_model, folder)
    mole.custom_gates |= {"mine": First(), "meteora_mine": First()}
    assert close(logits_of(mole, ["meteora_mine", "uniform"]), logits_of(mole, ["mine", "uniform"]))


@pytest.mark.parametrize("method", ["svd", "average_ab", "lora_b"])
def test_a_derived_adapter_is_traced_by_its_own_name(mole, method):
    """--routing, --json and --html would credit an adapter of the pool with what a merge has done."""
    tokens = list(stream(mole, "the fox", method=method, routing=True, max_new_tokens=2))
    assert [token.adapters for token in tokens] == [[[method, 1.0]]] * len(tokens)


def test_what_gates_exclude_stays_on_disk(small_model, folder):
    """Fetched for its slot number, an excluded adapter takes the place of one that the gates
    choose."""
    whole, few = load(small_model, folder), load(small_model, folder, resident=len(NAMES) - 1)
    for mole in (whole, few):
        set_methods(mole, ["meteora"], exclude=[NAMES[-1]])
    assert NAMES[-1] not in few.pool.resident
    assert close(few.model(IDS[:1]), whole.model(IDS[:1]))


def test_gates_of_excluded_adapters_alone(small_model, folder):
    """An adapter that joined later doesn't help gates that don't know it: with all others excluded
    nothing is left."""
    mole = load(small_model, folder)
    mole.pool.add(random_adapter("late", mole.shapes, 3))
    with pytest.raises(InputError, match="meteora_top2.safetensors: all its adapters are excluded"):
        set_methods(mole, ["meteora"], exclude=NAMES)


def test_lorahub_without_the_tasks_own_adapter(mole):
    """Its weights are searched anew without that adapter: those searched with it are for other
    sums."""
    file = mole.folder.path / "baselines" / "lorahub.json"
    with pytest.raises(InputError, match="lorahub_ood.json: python train.py lorahub --ood makes it"):
        set_methods(mole, ["lorahub:ant"], exclude=["ant"])
    write_json(file.with_name("lorahub_ood.json"), read_json(file) | {"weights": {"ant": {"bee": 0.5}}})
    set_methods(mole, ["lorahub:ant"], exclude=["ant"])
    want = replace(lorahub(mole.pool, {"bee": 0.5}), name="lorahub:ant")
    assert mole.attached[1].members["lorahub:ant"].hash == want.hash


def test_lorahub_without_an_excluded_adapter(mole):
    """Its weights were searched with the adapter; with that still in the sum, --ood would score
    what it has to do without."""
    weights = read_json(mole.folder.path / "baselines" / "lorahub.json")["weights"]["fox"]
    set_methods(mole, ["lorahub:fox"], exclude=["bee"])
    want = lorahub(mole.pool, {name: w for name, w in weights.items() if name != "bee"})
    assert (
        weights["bee"]
        and mole.attached[1].members["lorahub:fox"].hash == replace(want, name="lorahub:fox").hash
    )


def test_what_a_method_says_of_itself(mole):
    """eval.py goes by it: a row that is left out without need, or refused, or scored with what it
    should do without."""
    said = {
        name: find_method(mole, name)
        for name in ("lorahub", "lorahub:fox", "lora_b", "oracle", "adapter:ant")
    }
    assert [name for name, method in said.items() if not method.answers_composites] == ["lorahub"]
    assert [name for name, method in said.items() if method.has_task_adapter] == ["lora_b", "adapter:ant"]
    assert [name for name, method in said.items() if method.is_ceiling] == ["oracle"]
    assert not Joint.parse("mine_of_all").has_task_adapter
    kinds = {
        name: find_method(mole, name, 2).has_temperature
        for name in ("meteora", "meteora_top1", "arrow", "ramole")
    }
    assert kinds == {"meteora": True, "meteora_top1": False, "arrow": True, "ramole": False}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("base,oracle", ["base", "oracle"]),
        ("mix:a=0.7,b=-5e-1", ["mix:a=0.7,b=-5e-1"]),
        (
            "base,mix:a=1,b=2,oracle,mix:c=3,adapter:d",
            ["base", "mix:a=1,b=2", "oracle", "mix:c=3", "adapter:d"],
        ),
    ],
)
def test_a_list_of_methods_may_hold_mixes(text, want):
    """Without it eval.py can't score a mix, whose weights are separated as methods are."""
    assert split_methods(text) == want
