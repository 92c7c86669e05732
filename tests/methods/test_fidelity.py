"""LoRA-Flow and LoGo as their released code has them: what is read, where, and by which score."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.files import InputError
from common.tensors import read_safetensors, write_safetensors
from fast.moe_lora import ready_to_compile
from generate import answer, load
from helpers_methods import IDS, close, logits_of, noise
from helpers_models import make_pool
from helpers_training import of_kind, options, run
from methods.batch import listed_method, retrieve, set_methods
from methods.loraflow import LoRAFlow, LoRAFlowGate, loraflow_gates
from model import load_llama
from moe_lora import Recorder, attach
from pool.adapters import linear_shapes, load_adapter
from pool.folder import read_pool
from pool.slots import Pool

# LoRA-Flow ----------------------------------------------------------------------------------------


def trained_flow(small_model, folder, **more):
    """Options of a finished run of LoRA-Flow's gates over a random pool, far from their start."""
    o = options("top2", small_model, folder / "out", steps=2, lr=0.3, clip=0.0)
    o = replace(of_kind(o, "loraflow"), **more)
    run(o)
    return o


def gate_file(o):
    """Where its gates are."""
    return Path(o.pool) / "gates" / "loraflow.safetensors"


@pytest.fixture(scope="module")
def flow(small_model, tmp_path_factory):
    """A run whose gates read the residual stream at temperature 1.7. Don't write into it."""
    how = {"reads": "residual", "gate_temperature": 1.7, "bias_start": -0.25}
    return trained_flow(small_model, tmp_path_factory.mktemp("flow"), **how)


def watch_norms(model):
    """{layer: the last input of its input_layernorm}, filled by hooks of the test's own."""
    seen = {}
    for index, block in enumerate(model.model.layers):
        block.input_layernorm.register_forward_pre_hook(
            lambda _, args, index=index: seen.update({index: args[0].double()})
        )
    return seen


@pytest.mark.parametrize("reads", ["residual", "input"])
def test_a_gate_file_is_read_as_it_was_trained(small_model, flow, tmp_path, reads):
    """G of one input multiplied by another gives weights that no error shows; so does another T.
    The norm's output is computed from its input here, both in float64."""
    o = flow if reads == "residual" else trained_flow(small_model, tmp_path)
    T = o.gate_temperature
    mole = load(o.model, o.pool)
    seen = watch_norms(mole.model)
    set_methods(mole, ["loraflow"] * 2, gate_temperature=5.0)  # that of the file counts
    with torch.no_grad(), Recorder(mole.model, 22) as recorder:
        mole.model(IDS[:2])
    weights = recorder.read(22)  # (m, n, e)
    tensors, metadata = read_safetensors(gate_file(o))
    assert (metadata["reads"], metadata["temperature"]) == (reads, repr(T))
    slots = [mole.pool.slot(name) for name in metadata["names"].split("\n")]
    for row, path in enumerate(mole.pool.A):
        layer = int(path.split(".")[2])
        h = seen[layer]
        if reads == "input":
            norm = mole.model.model.layers[layer].input_layernorm
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) * norm.weight.double()
        q = f"model.layers.{layer}.self_attn.q_proj.gate"
        G, bias = tensors[f"{q}.weight"].double(), tensors[f"{q}.bias"].double()
        want = (h @ G.T / T).softmax(-1) + bias
        torch.testing.assert_close(weights[row][:, slots].double(), want, rtol=1e-4, atol=1e-5)
    assert (weights - weights[0]).abs().max() > 1e-2  # the gates have left their start


def test_a_bias_starts_where_it_is_told(small_model, tmp_path):
    """An option without effect, which no loss curve would show."""
    o = trained_flow(small_model, tmp_path, lr=0.0, bias_start=-0.25)
    tensors, _ = read_safetensors(gate_file(o))
    starts = {key.rpartition(".")[2]: tensor.unique().tolist() for key, tensor in tensors.items()}
    assert starts == {"weight": [0.0], "bias": [-0.25]}


def test_packed_sequences_read_their_own_residual(small_model):
    """Training packs examples into one row: a gate must not read another token's residual."""
    model = load_llama(small_model)
    pool = make_pool(linear_shapes(model))
    gates = loraflow_gates(pool, reads="residual")
    for number, gate in enumerate(gates.values()):
        for param in gate.parameters():
            param.data += noise(*param.shape, seed=number) * 0.2
    attach(model, pool, gates)
    assert len(LoRAFlow.hooks(model, gates)) == 3
    with torch.no_grad():
        packed = model.model(torch.cat([IDS[0], IDS[1, :7]])[None], lengths=[11, 7])[0]
        alone = torch.cat([model.model(IDS[:1])[0], model.model(IDS[1:2, :7])[0]])
    assert close(packed, alone)


def test_the_residual_is_read_with_fast_and_without(flow):
    """fast/ runs a block by functions of its own: a hook that these skip leaves a gate without its
    input, or with the last batch's."""
    prompts = ["the quick fox", "sort these words for me"]
    texts = []
    for fast in (False, True):
        mole = load(flow.model, flow.pool, fast=fast)
        texts.append(answer(mole, prompts, method="loraflow", max_new_tokens=9))
    assert texts[0] == texts[1]
    assert not ready_to_compile(mole.model.model.layers, decode=False)  # compiled blocks have no hooks


def test_hooks_leave_with_their_gates(flow):
    """Hooks that stay slow every other method down, and keep the gates in memory."""
    mole = load(flow.model, flow.pool)
    norms = [block.input_layernorm for block in mole.model.model.layers]
    logits_of(mole, ["loraflow"])
    assert [len(norm._forward_pre_hooks) for norm in norms] == [1, 1, 1]
    logits_of(mole, ["base"])
    assert [len(norm._forward_pre_hooks) for norm in norms] == [0, 0, 0]


@pytest.mark.parametrize("target", ["o_proj", "down_proj", "up_proj"])
def test_the_residual_is_as_wide_as_the_model(small_model, target):
    """The first adapted Linear needn't read from the residual stream: o_proj's input is narrower."""
    model = load_llama(small_model)
    pool = make_pool(linear_shapes(model), targets=[target])
    gates = loraflow_gates(pool, reads="residual")
    assert {gate.weight.shape[1] for gate in gates.values() if isinstance(gate, LoRAFlowGate)} == {44}
    attach(model, pool, gates)
    LoRAFlow.hooks(model, gates)
    with torch.no_grad():
        assert model(IDS).isfinite().all()


def test_what_a_gate_file_says_is_checked(small_model, tmp_path):
    """A file of before has no such metadata and means the defaults; a wrong value is no default."""
    o = trained_flow(small_model, tmp_path)
    mole = load(o.model, o.pool)
    file = gate_file(o)
    tensors, metadata = read_safetensors(file)
    want = logits_of(mole, ["loraflow"])
    old = {key: value for key, value in metadata.items() if key not in ("reads", "temperature")}
    wrong = {"reads is 'norm', expected input or residual": {"reads": "norm"}}
    wrong["temperature is 0.0, expected a number from"] = {"temperature": "0.0"}
    write_safetensors(file, tensors, old)
    assert torch.equal(logits_of(load(o.model, o.pool), ["loraflow"]), want)
    for words, fields in wrong.items():
        write_safetensors(file, tensors, metadata | fields)
        with pytest.raises(InputError, match=f"loraflow.safetensors: {words}"):
            set_methods(load(o.model, o.pool), ["loraflow"])


# LoGo ---------------------------------------------------------------------------------------------

LAST = "model.layers.2.self_attn.q_proj"


def encoded(mole, prompts):
    return [mole.tokenizer.encode(prompt) for prompt in prompts]


def outputs_by_hand(mole, ids, paths):
    """{adapter: [scale_j B_j A_j x (o,) for the last token's input x of each path]}, in float64."""
    plain = load_llama(mole.base_path)
    inputs = {}
    for path in paths:
        plain.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: inputs.update({path: args[0].flatten(0, -2)[-1].double()})
        )
    with torch.no_grad():
        plain.model(torch.tensor([ids]))
    found = {}
    for name, folder in read_pool(mole.folder.path).adapters.items():
        adapter = load_adapter(folder, name)
        found[name] = []
        for path in paths:
            v = adapter.B[path].double() @ (adapter.A[path].double() @ inputs[path])
            found[name].append(adapter.scale[path] * v)
    return found


def entropy(v):
    return -(v.softmax(-1) * v.log_softmax(-1)).sum()


SCORES = {"logo_norm": lambda v: v.norm(), "logo_entropy": lambda v: 1 / entropy(v)}


@pytest.mark.parametrize("last", ["", "_last"])
@pytest.mark.parametrize("name", SCORES)
def test_logo_by_the_papers_scores(small_model, pool_with_every_part, name, last):
    """Names that stand for the paper's and the code's score must be these, or a comparison with the
    paper compares something else."""
    mole = load(small_model, pool_with_every_part)
    ids = encoded(mole, ["the quick fox"])
    got = retrieve(mole, [f"{name}{last}"], ["the quick fox"], 3, ids=ids)[0]
    outputs = outputs_by_hand(mole, ids[0], [LAST] if last else list(mole.pool.A))
    want = {one: float(torch.stack([SCORES[name](v) for v in vs]).mean()) for one, vs in outputs.items()}
    assert dict(got) == pytest.approx(want, rel=1e-4)


def test_logo_last_is_logo_where_only_that_linear_is_adapted(small_model, pool_with_every_part):
    """The same score, computed over fewer Linears and not over others."""
    mole = load(small_model, pool_with_every_part)
    ids = encoded(mole, ["the quick fox", "sort these"])
    found = retrieve(mole, ["logo_last"] * 2, ["", ""], 3, ids=ids)
    assert found != retrieve(mole, ["logo"] * 2, ["", ""], 3, ids=ids)
    adapters = []
    for name, folder in read_pool(pool_with_every_part).adapters.items():
        adapters.append(load_adapter(folder, name))
        for part in (adapters[-1].A, adapters[-1].B, adapters[-1].scale):
            for path in set(part) - {LAST}:
                del part[path]
    mole.pool = Pool.of(adapters, mole.shapes)
    for rows, others in zip(found, retrieve(mole, ["logo"] * 2, ["", ""], 3, ids=ids), strict=True):
        assert dict(rows) == pytest.approx(dict(others), rel=1e-4)


def test_logo_last_needs_the_last_q_proj(small_model, pool_with_every_part):
    """Without it an index of nothing is a traceback, and an adapter that isn't there is the best."""
    mole = load(small_model, pool_with_every_part)
    adapters = [load_adapter(path, name) for name, path in read_pool(pool_with_every_part).adapters.items()]
    for adapter in adapters:
        for part in (adapter.A, adapter.B, adapter.scale):
            part.pop(LAST)
    ids = encoded(mole, ["the fox"])
    mole.pool = Pool.of(adapters, mole.shapes)
    with pytest.raises(
        InputError, match=f"method logo_last: no adapter of the pool changes {LAST}: use logo"
    ):
        retrieve(mole, ["logo_last"], [""], 3, ids=ids)
    whole = load_adapter(read_pool(pool_with_every_part).adapters["bee"], "whole")
    mole.pool = Pool.of([*adapters, whole], mole.shapes)
    for name in ("logo_last", "logo_norm_last_top20", "logo_entropy_last"):
        found = dict(retrieve(mole, [name], [""], 4, ids=ids)[0])
        assert found.pop("whole") > 0 and set(found.values()) == {0.0}


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("logo", ("", False, 0)), ("logo_top3", ("", False, 3)), ("logo_last_top1", ("", True, 1)),
        ("logo_norm", ("norm", False, 0)), ("logo_norm_last_top20", ("norm", True, 20)),
        ("logo_entropy_last", ("entropy", True, 0)), ("logo_entropy_top2", ("entropy", False, 2)),
        ("logo_last_norm", None), ("logo_norm_entropy", None), ("logo_top2_last", None), ("logo_top0", None),
    ],
)  # fmt: skip
def test_a_name_says_score_linears_and_k(name, want):
    """A name that is read as another method's is a wrong row of a table."""
    method = listed_method(name)
    assert (method and (method.measure, method.last, method.best)) == want
