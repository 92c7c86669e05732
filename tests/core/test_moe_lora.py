"""The gated Linear: the papers' identities, gates and their files, attach and detach, the recorder."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.files import InputError
from common.tensors import read_safetensors, write_safetensors
from helpers_models import RANKS, LoudestGate, make_pool, random_adapter, random_gates
from kernels import BACKENDS
from moe_lora import (
    MeteoraGate,
    MultiLoRALinear,
    Recorder,
    SampleGate,
    attach,
    attached,
    detach,
    fixed_rows,
)
from pool.adapters import linear_shapes
from pool.gate_files import load_gates, save_gates

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(331, (3, 11), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model(plain_or_fast):
    return plain_or_fast


@pytest.fixture
def shapes(model):
    return linear_shapes(model)


@pytest.fixture
def pool(shapes):
    return make_pool(shapes)


def fixed(pool, choices):
    gate = SampleGate()
    gate.set(*fixed_rows(pool, choices))
    return gate


@torch.no_grad()
def logits_of(model, pool, gates, ids=IDS, backend="auto"):
    """Logits with the pool attached; the model is given back as it was."""
    attach(model, pool, gates, backend)
    logits = model(ids)
    detach(model)
    return logits


def close(a, b, limit=1e-5):
    """Largest difference, as a share of the largest value."""
    return (a - b).abs().max() <= limit * b.abs().max()


# The papers' identities ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_adapters_by_softmax_is_the_dense_sum(pool, backend):
    """With k = e the top-k is the whole softmax: a weight joined to another slot's adapter, or a
    scale counted twice, shows against the sum written out."""
    path = "model.layers.1.mlp.up_proj"
    gate, A, B, scale = random_gates(pool, 5)[path], pool.A[path], pool.B[path], pool.scale[path]
    base = nn.Linear(44, 67)
    x = torch.randn(3, 11, 44, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = MultiLoRALinear(base, A, B, scale, gate, backend=backend)(x).double()
        weights = torch.softmax(x.double() @ gate.weight.double().T, -1)  # (3, 11, e)
        each = torch.einsum("eor,eri,bti->bteo", B.double(), A.double(), x.double())
        want = base(x).double() + torch.einsum("bte,e,bteo->bto", weights, scale.double(), each)
    assert close(y, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_adapter_of_weight_1_is_the_merged_model(model, pool, backend):
    """LoRA's definition is W + scale B A; this is its proof without PEFT (test_adapters.py has the
    one with it)."""
    got = {
        name: logits_of(model, pool, fixed(pool, [{name: 1.0}] * 3), backend=backend) for name in pool.names
    }
    plain = model(IDS)
    for name, logits in got.items():
        merge(model, pool.adapter(name), 1)
        assert close(logits, model(IDS)) and not close(logits, plain, 0.05)
        merge(model, pool.adapter(name), -1)


def merge(model, adapter, sign):
    for path, A in adapter.A.items():
        model.get_submodule(path).weight += sign * adapter.scale[path] * adapter.B[path] @ A


@pytest.mark.parametrize("k", [1, 2])
def test_top1_gets_no_gradient_from_the_lm_loss(model, pool, k):
    """k = 1 has the constant weight 1: training it by the LM loss alone would run for hours and
    change nothing. At k = 2 every gate must learn from it; a detached weight would leave them all
    as they started."""
    gates = random_gates(pool, k)
    attach(model, pool, gates)
    loss = F.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    if loss.requires_grad:
        loss.backward()
    norms = [0.0 if gate.weight.grad is None else float(gate.weight.grad.norm()) for gate in gates.values()]
    assert norms == [0.0] * 21 if k == 1 else min(norms) > 1e-6


def test_a_batch_of_different_requests_equals_each_alone(model, pool):
    """One user's adapters must never reach another's answer: samples are told apart after
    flattening (b, t) to n."""
    choices = [{"bee": 1.0}, {}, {"ant": 0.25, "eel": 0.75}]
    together = logits_of(model, pool, fixed(pool, choices))
    alone = [logits_of(model, pool, fixed(pool, [choices[j]]), IDS[j : j + 1]) for j in range(3)]
    assert close(together, torch.cat(alone))
    with torch.no_grad():
        assert torch.equal(together[1], model(IDS)[1])  # the base alone, untouched
    assert not close(together[0], logits_of(model, pool, fixed(pool, [{"ant": 1.0}] * 3))[0], 0.01)


def test_fixed_and_routed_rows_in_one_batch(model, pool):
    """Rows that name an adapter beside rows that ask the gates, of another k: a mask on the wrong
    axis, or weights without their indices, would give both the other's adapters."""
    gates = {path: SampleGate(inner) for path, inner in random_gates(pool, 2).items()}
    choices = [{"cat": 1.0}, {}, {"dog": 0.5, "ant": 0.25, "bee": 0.25}]
    for routed in ([False, True, False], [True, False, True], [True] * 3, [False] * 3):
        idx, weight = fixed_rows(pool, choices)
        for gate in gates.values():
            gate.set(idx, weight, torch.tensor(routed))
        got = logits_of(model, pool, gates)
        by_gates = logits_of(model, pool, random_gates(pool, 2))
        by_name = logits_of(model, pool, fixed(pool, choices))
        assert not close(by_gates, by_name, 0.01)
        for row, asks in enumerate(routed):
            assert close(got[row], by_gates[row] if asks else by_name[row])


def test_padded_tokens_change_nothing(model, pool):
    """Right padding goes through the gates as well; the real tokens of a shorter row must not
    notice."""
    short = IDS[1:2, :5]
    gates = random_gates(pool, 2)
    padded = IDS.clone()
    padded[1, 5:] = 0
    assert close(logits_of(model, pool, gates, padded)[1:2, :5], logits_of(model, pool, gates, short))


def test_zero_padding_changes_nothing(model, shapes, pool):
    """Ranks below the pool's and empty slots are zeros: were they anything else, adding an adapter
    would change the others."""
    roomy = make_pool(shapes, capacity=11, rank=13)
    gates, roomy_gates = random_gates(pool, 3), random_gates(roomy, 3)
    assert close(logits_of(model, roomy, roomy_gates), logits_of(model, pool, gates), 1e-5)
    for name in pool.names:
        choice = [{name: 1.0}] * 3
        want = logits_of(model, pool, fixed(pool, choice))
        assert close(logits_of(model, roomy, fixed(roomy, choice)), want, 1e-5)


def test_order_of_the_pool_changes_nothing(model, shapes, pool):
    """Slots are an accident of loading; gates and adapters meet by name."""
    other = make_pool(shapes, sorted(RANKS, reverse=True))
    assert other.names == pool.names[::-1]
    want = logits_of(model, pool, random_gates(pool, 2))
    assert close(logits_of(model, other, random_gates(other, 2)), want)


def test_backends_agree_through_the_whole_model(model, pool):
    """The choice of the kernel is one of speed: a prompt must get one answer."""
    gates = random_gates(pool, 2)
    want = logits_of(model, pool, gates, backend="loop")
    for backend in BACKENDS:
        assert close(logits_of(model, pool, gates, backend=backend), want)


@pytest.mark.parametrize(
    "targets", [[name] for name in SEVEN] + [["q_proj", "v_proj"], ["o_proj", "gate_proj", "down_proj"]]
)
def test_any_subset_of_the_linears(model, shapes, targets):
    """Many adapters sit on q and v alone: a seam that expects all of a group to be wrapped would
    break on them."""
    pool = make_pool(shapes, targets=targets)
    assert len(pool.A) == 3 * len(targets)
    got = logits_of(model, pool, fixed(pool, [{"bee": 1.0}] * 3))
    plain = model(IDS)
    merge(model, pool.adapter("bee"), 1)
    assert close(got, model(IDS)) and not close(got, plain, 0.01)


# MeteoRA's gate -----------------------------------------------------------------------------------


def gate_weights(logits, k, temperature=1.0, known=None):
    """Weights (n, e) of a gate whose logits are exactly `logits` (G is the identity)."""
    e = logits.shape[1]
    idx, weight = MeteoraGate(torch.eye(e), k, temperature, known)(logits, None, None)
    assert idx.shape == weight.shape == (len(logits), min(k, e)) and weight.dtype == torch.float32
    assert all(len(set(row)) == len(row) for row in idx.tolist())
    return torch.zeros(logits.shape).scatter(1, idx, weight.detach())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 31), st.data(), st.floats(0.05, 50), st.integers(0, 2**31))
def test_top_k_of_the_softmax_renormalised(e, data, temperature, seed):
    """The two ways that the gate is described in are one at any temperature that divides the logits
    in both; the one that the released training loop used, with the temperature in only one, is not.
    """
    k = data.draw(st.integers(1, e))
    logits = torch.randn(7, e, generator=torch.Generator().manual_seed(seed)) * 3
    probability = torch.softmax(logits.double() / temperature, -1)
    top = probability.topk(k, -1)
    want = torch.zeros(7, e).double().scatter(1, top.indices, top.values / top.values.sum(-1, keepdim=True))
    torch.testing.assert_close(gate_weights(logits, k, temperature).double(), want, rtol=0, atol=1e-5)


def test_temperature():
    """Hot is uniform over the k, cold is the best alone, and 15, the paper's setting for
    composites, turns 0.65/0.35 into 0.51/0.49."""
    logits = torch.tensor([[0.0, math.log(0.65 / 0.35), -9.0]])
    for temperature, first in ((1.0, 0.65), (15.0, 0.5103), (1e6, 0.5), (1e-3, 1.0)):
        want = torch.tensor([[1 - first, first, 0.0]])
        torch.testing.assert_close(gate_weights(logits, 2, temperature), want, rtol=0, atol=1e-4)
    assert torch.equal(gate_weights(logits, 1, 15.0), torch.tensor([[0.0, 1.0, 0.0]]))


def test_unknown_slots_are_never_chosen():
    """An adapter that came after the gates has a zero row, which beats every negative logit; and
    with more slots asked for than are known, a masked softmax over an empty rest would be NaN."""
    known = torch.tensor([False, True, False, True, False])
    logits = torch.tensor([[9.0, -1.0, 9.0, -2.0, 9.0]])
    want = torch.tensor([[0, 0.7310586, 0, 0.2689414, 0]])
    for k in (2, 3, 5, 7):
        torch.testing.assert_close(gate_weights(logits, k, known=known), want, rtol=0, atol=1e-6)
    assert torch.equal(gate_weights(logits, 1, known=known), torch.tensor([[0.0, 1, 0, 0, 0]]))


def test_logits_are_float32_in_a_bfloat16_model():
    """bfloat16 has 8 bits: it can't tell a logit of 257 from 256, so that ties would be broken by
    the slot's number."""
    G = torch.tensor([[256.0, 0], [256, 1], [-256, 0]]).bfloat16()
    idx, weight = MeteoraGate(G, 2)(torch.ones(1, 2).bfloat16(), None, None)
    assert idx.tolist() == [[1, 0]] and weight.dtype == torch.float32
    torch.testing.assert_close(weight[0], torch.tensor([0.7310586, 0.2689414]), rtol=0, atol=1e-6)


BASE = "0123456789abcdef" * 2  # a fingerprint

# Gate files ---------------------------------------------------------------------------------------


def test_gate_file_round_trip_with_the_pool_in_another_order(model, shapes, pool, tmp_path):
    """Rows joined by position give every token another task's adapter as soon as a folder is listed
    otherwise."""
    file = tmp_path / "meteora_top2.safetensors"
    want = logits_of(model, pool, random_gates(pool, 2))
    save_gates(file, random_gates(pool, 2), pool, 2, ["cat", "ant", "eel", "dog", "bee"], BASE)
    backwards = make_pool(shapes, sorted(RANKS, reverse=True))
    roomy = make_pool(shapes, ["dog", "bee", "ant", "eel", "cat"], 11)
    for other in (pool, backwards, roomy):
        assert close(logits_of(model, other, load_gates(file, other, BASE)), want)
    backwards.remove("eel")
    backwards.remove("bee")
    for name in ("bee", "eel"):  # each now in the other's slot
        backwards.add(random_adapter(name, shapes, RANKS[name], seed=RANKS[name], size=0.1))
    assert close(logits_of(model, backwards, load_gates(file, backwards, BASE)), want)
    assert {gate.k for gate in load_gates(file, pool, BASE).values()} == {2}
    assert {(gate.k, gate.temperature) for gate in load_gates(file, pool, BASE, 15.0, k=3).values()} == {
        (3, 15.0)
    }


def test_gates_of_other_adapters_are_refused(shapes, pool, tmp_path):
    """Gates trained on an adapter that is gone, or was trained again since, route to something they
    never saw. All of them are listed: found one at a time, twenty changed adapters take twenty
    runs."""
    file = tmp_path / "gates.safetensors"
    save_gates(file, random_gates(pool, 2), pool, 2, pool.names, BASE)
    other = make_pool(shapes, ["ant", "bee", "dog"])
    other.remove("bee")
    other.add(random_adapter("bee", shapes, 7, seed=13))
    with pytest.raises(InputError) as refused:
        load_gates(file, other, BASE)
    message = str(refused.value)
    hashes = [pool.members["bee"].hash[:12], other.members["bee"].hash[:12]]
    for word in (file, "bee", "cat (missing", "eel (missing", *hashes):
        assert str(word) in message
    assert "ant" not in message and "dog" not in message


def test_an_adapter_without_a_row_warns_and_is_never_chosen(model, shapes, pool, tmp_path, capsys):
    """Uploading an adapter must not break the gates; but that they never pick it has to be said."""
    file = tmp_path / "gates.safetensors"
    few = make_pool(shapes, ["eel", "ant", "dog"])
    save_gates(file, random_gates(few, 3), few, 3, few.names, BASE)
    gates = load_gates(file, pool, BASE)
    err = capsys.readouterr().err
    assert err.count("warning") == 1 and "bee, cat" in err
    attach(model, pool, gates)
    with torch.no_grad(), Recorder(model, 33) as seen:
        got = model(IDS)
    detach(model)
    assert not seen.read(33)[:, :, [pool.slot("bee"), pool.slot("cat")]].any()
    assert close(got, logits_of(model, few, random_gates(few, 3)))


def test_gate_files_that_do_not_fit(shapes, pool, tmp_path):
    """Each of these, let through, is a KeyError in the middle of an answer, or a gate of noise."""
    file = tmp_path / "gates.safetensors"
    save_gates(file, random_gates(pool, 2), pool, 2, pool.names, BASE)
    tensors, metadata = read_safetensors(file)
    first, *_ = tensors
    spoilt = [
        (tensors, {}, "not a gate file"),
        (tensors, metadata | {"k": "two"}, "k is 'two', expected a whole number from 1 to 5"),
        (tensors, metadata | {"hashes": metadata["hashes"].rpartition("\n")[0]}, "5 names and 4 hashes"),
        (
            {key: y for key, y in tensors.items() if key != first},
            metadata,
            rf"{first}: expected \(5, \d+\), found nothing",
        ),
        (tensors | {first: torch.zeros(5, 3)}, metadata, rf"{first}: expected \(5, \d+\), found \(5, 3\)"),
        (tensors | {first: torch.zeros(3, 44)}, metadata, rf"{first}: expected \(5, \d+\), found \(3, 44\)"),
        (tensors | {first: tensors[first] / 0}, metadata, f"{first} holds .* NaN or Inf"),
    ]
    for bad, about, message in spoilt:
        write_safetensors(file, bad, about)
        with pytest.raises(InputError, match=message):
            load_gates(file, pool, BASE)


# Attach and detach --------------------------------------------------------------------------------


def test_detach_gives_the_very_same_model_back(model, pool):
    """A base that comes back changed, or copied, answers otherwise from then on, and doubles its
    memory."""
    with torch.no_grad():
        before = model(IDS)
    modules, weights = dict(model.named_modules()), {n: p.data_ptr() for n, p in model.named_parameters()}
    linears = attach(model, pool, random_gates(pool, 2))
    assert list(attached(model)) == list(linears) == list(pool.A) and len(linears) == 21
    assert all(isinstance(linear, MultiLoRALinear) and not linear.training for linear in linears.values())
    with torch.no_grad():
        assert not close(model(IDS), before, 0.01)
    detach(model)
    assert all(module is modules[name] for name, module in model.named_modules())
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == weights and not attached(model)
    with torch.no_grad():
        assert torch.equal(model(IDS), before)


def test_the_base_alone_is_bit_identical(model, pool):
    """Weight 0 must be the base itself: that is the promise of --method base beside other requests."""
    with torch.no_grad():
        want = model(IDS)
    assert torch.equal(logits_of(model, pool, fixed(pool, [{}, {}, {}])), want)


def test_attaching_twice_is_an_error(model, pool):
    """The second wrapper would add its adapters on top of the first's."""
    attach(model, pool, fixed(pool, [{}]))
    wrapped = attached(model)
    with pytest.raises(ValueError, match="attached already"):
        attach(model, pool, fixed(pool, [{}]))
    assert attached(model) == wrapped
    detach(model)
    assert len(attach(model, pool, fixed(pool, [{}]))) == 21


def test_rows_name_their_adapters(pool):
    """Rows of different lengths are padded with weight 0; an unknown name must not become slot 0."""
    idx, weight = fixed_rows(pool, [{"dog": 0.75, "ant": 0.25}, {}, {"eel": 1.0}])
    assert idx.dtype == torch.int64 and weight.tolist() == [[0.75, 0.25], [0, 0], [1, 0]]
    assert idx[0].tolist() == [pool.slot("dog"), pool.slot("ant")] and idx[2, 0] == pool.slot("eel")
    with pytest.raises(InputError, match="'dgo'.*dog"):
        fixed_rows(pool, [{"dgo": 1.0}])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gate_of_ones_own(model, pool, backend, monkeypatch):
    """Forking a router in ten lines is what the protocol is for: one module with forward(x, sample,
    ax), and ax computed once however often it is asked for."""
    calls = []

    class Twice(LoudestGate):
        def forward(self, x, sample, ax):
            assert x.shape[0] == sample.shape[0] and sample.tolist() == [0] * 11 + [1] * 11 + [2] * 11
            calls.append(ax() is ax())
            return super().forward(x, sample, ax)

    computed = []

    def counted(compute_ax):
        return lambda *args: computed.append(1) or compute_ax(*args)

    for name in ("kernels", "moe_lora", "fast.kernels", "fast.moe_lora"):
        if module := sys.modules.get(name):
            monkeypatch.setattr(module, "compute_ax", counted(module.compute_ax))
    got = logits_of(model, pool, Twice(2), backend=backend)
    assert calls == [True] * 21 and len(computed) == 21

    def by_hand(path, linear):
        def forward(x):
            ax = torch.einsum("eri,ni->ner", pool.A[path], x)
            best = ax.norm(dim=-1).topk(2, -1).indices
            chosen = torch.zeros(ax.shape[:2]).scatter(-1, best, 0.5) * pool.scale[path]
            return F.linear(x, linear.weight) + torch.einsum("ne,eor,ner->no", chosen, pool.B[path], ax)

        return forward

    for path in pool.A:
        linear = model.get_submodule(path)
        linear.forward = by_hand(path, linear)
    assert close(got, model(IDS))


# The recorder -------------------------------------------------------------------------------------


def test_recorder_sees_what_the_gates_chose(model, pool):
    """Routing traces are what people believe: each module's row must be its own gate's choice, by
    module and by slot."""
    paths = list(pool.A)
    gates = {
        path: fixed(pool, [{pool.names[(j + row) % 5]: 1.0} for row in range(3)])
        for j, path in enumerate(paths)
    }
    attach(model, pool, gates)
    with torch.no_grad(), Recorder(model, 40) as seen:
        model(IDS)
        first = seen.read(33).clone()
        model(IDS[:, :7])  # shorter: nothing of the first forward may shine through
        second = seen.read(21).clone()
    for m in range(21):
        for trace, t in ((first, 11), (second, 7)):
            want = torch.stack(
                [F.one_hot(torch.tensor((m + row) % 5), 5).expand(t, 5) for row in range(3)]
            ).flatten(0, 1)
            assert torch.equal(trace[m], want.float())
    assert list(attached(model)) == paths


def test_recorded_weights_are_the_gates_own(model, pool):
    """Rows that don't sum to 1, or the pool's scales among the weights, would show adapters in the
    wrong shares."""
    gates = random_gates(pool, 3)
    linears = attach(model, pool, gates)
    inputs = {}
    for path, linear in linears.items():
        linear.register_forward_pre_hook(lambda module, args, path=path: inputs.update({path: args[0]}))
    with torch.no_grad(), Recorder(model, 33) as seen:
        model(IDS)
    trace = seen.read(33)
    assert trace.shape == (21, 33, 5)
    torch.testing.assert_close(trace.sum(-1), torch.ones(21, 33), rtol=0, atol=1e-6)
    assert ((trace > 0).sum(-1) == 3).all()
    for m, (path, x) in enumerate(inputs.items()):
        top = (x @ gates[path].weight.T).topk(3, -1)
        torch.testing.assert_close(trace[m].gather(1, top.indices), top.values.softmax(-1), rtol=0, atol=1e-5)
    detach(model)
    attach(model, pool, fixed(pool, [{"ant": 0.5, "eel": 0.25}] * 3))
    with torch.no_grad(), Recorder(model, 33) as seen:
        model(IDS)
    want = torch.zeros(5)
    want[pool.slot("ant")], want[pool.slot("eel")] = 0.5, 0.25
    assert torch.equal(seen.read(33), want.expand(21, 33, 5))


def test_recorder_lets_go(model, pool):
    """Left attached, it would copy every later forward's routing, and fail at the first prompt
    longer than the first one."""
    linears = attach(model, pool, fixed(pool, [{"ant": 1.0}] * 3))
    with Recorder(model, 33) as seen:
        assert all(linear.trace is not None for linear in linears.values())
        model(IDS)
    kept = seen.read(33).clone()
    with pytest.raises(KeyError), Recorder(model, 33):
        raise KeyError
    assert all(linear.trace is None for linear in linears.values())
    model(torch.cat((IDS, IDS), 1))
    assert torch.equal(seen.read(33), kept)


# LoRA dropout -------------------------------------------------------------------------------------


def test_dropout_is_for_training_and_for_adapters_alone(model, pool):
    """Dropout left on while generating makes answers random; on the base's own input it would train
    another model."""
    with torch.no_grad():
        plain = model(IDS)
        want = logits_of(model, pool, fixed(pool, [{"bee": 1.0}] * 3))
        dropout = dict.fromkeys(pool.A, nn.Dropout(0.5))
        attach(model, pool, fixed(pool, [{"bee": 1.0}] * 3), dropout=dropout)
        assert torch.equal(model(IDS), want)
        model.train()
        assert not close(model(IDS), want, 0.01)
        assert torch.equal(model.eval()(IDS), want)
        detach(model)
        attach(model, pool, fixed(pool, [{}] * 3), dropout=dropout)
        assert torch.equal(model.train()(IDS), plain)


def test_dropout_reaches_the_kernel_past_a_gate_that_asked_for_ax(pool):
    """The gate's A x is of the undropped input: shared with the kernel while training, it would
    switch dropout off unseen."""
    path = "model.layers.0.self_attn.q_proj"
    base = nn.Linear(44, 24, bias=False)
    x = torch.randn(1, 7, 44, generator=torch.Generator().manual_seed(0))
    stacks = pool.A[path], pool.B[path], pool.scale[path]
    halved = lambda x: x * (torch.arange(44) % 2)  # noqa: E731
    linear = MultiLoRALinear(base, *stacks, LoudestGate(5), backend="dense", dropout=halved)
    got = linear.train()(x)
    mean_ba = torch.einsum("e,eor,eri->oi", pool.scale[path], pool.B[path], pool.A[path]) / 5
    assert close(got, base(x) + halved(x[0]) @ mean_ba.T)
