"""RAMoLE's router, fusion, mixture and selection, LoGo: the identities of the papers, against
float64 and by hand."""

import pytest
import torch
import torch.nn.functional as F

from common.files import InputError, warn_once
from decoding.loop import decode
from decoding.sampling import Sampling
from fast.moe_lora import FastAX
from generate import answer, load
from helpers_models import random_adapter, write_adapters
from methods.batch import retrieve, set_methods
from methods.logo import EVERYDAY, LogoProbe
from methods.mixtures import MoEGate
from methods.ramole import (
    RouterLoRA,
    candidate_rows,
    load_routers,
    router_loras,
    save_routers,
    set_candidates,
)
from model import load_llama
from moe_lora import AX, attached
from pool.adapters import linear_shapes, load_adapter
from pool.slots import Pool

SAMPLES = {"a": ["the quick fox", "the brown fox"], "b": ["sort these words"], "c": ["what is the plural"]}


def stacks(e=5, r=3, i=11, o=13, seed=0):
    g = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(size, generator=g, dtype=torch.float64) for size in ((e, r, i), (e, o, r)))
    return A, B, torch.rand(e, generator=g, dtype=torch.float64) + 0.5


def router(B, scale, r_q=7, i=11, **options):
    g = torch.Generator().manual_seed(1)
    parts = (torch.randn(size, generator=g, dtype=torch.float64) for size in ((r_q, i), (B.shape[1], r_q)))
    gate = RouterLoRA(*parts, **options).eval()
    gate.bind(B, scale)
    return gate


def fast_ax(x, A):
    return FastAX(x, A, lambda: torch.einsum("eri,ni->ner", A, x))


def by_hand(gate, x, A, B, scale, idx, bias):
    """Eqs. 6 to 11 token by token, each adapter's whole output formed."""
    rows = []
    for token in range(len(x)):
        q, scores = gate.A @ x[token], []
        for j, b in zip(idx[token], bias[token], strict=True):
            v = (scale[j] if gate.scaled else 1.0) * B[j] @ (A[j] @ x[token])
            scores.append((gate.B.T @ v) @ q / gate.divisor + b)
        rows.append(torch.softmax(torch.stack(scores), 0))
    return torch.stack(rows)


@pytest.mark.parametrize("make_ax", [AX, fast_ax])
@pytest.mark.parametrize("n", [2, 17])  # few tokens gather their adapters, many compute all
@pytest.mark.parametrize("options", [{}, {"scaled": False}, {"divisor": 1.0}])
def test_weights_from_inner_matrices_are_the_long_way(n, options, make_ax):
    """A transposed or unscaled inner matrix would still give weights that sum to one."""
    A, B, scale = stacks()
    gate, x = router(B, scale, **options), torch.randn(n, 11, dtype=torch.float64)
    idx = torch.tensor([[4, 0, 2], [1, 3, 0]])
    bias = torch.tensor([[0.0, 0.3, -0.2], [0.1, 0.0, float("-inf")]], dtype=torch.float64)
    set_candidates([gate], idx, bias)
    sample = torch.arange(n) % 2
    got = gate(x, sample, make_ax(x, A))
    assert torch.equal(got.idx, idx[sample])
    torch.testing.assert_close(got.weight, by_hand(gate, x, A, B, scale, idx[sample], bias[sample]))


def test_scores_some_tokens_at_a_time(monkeypatch):
    """A x of the candidates of a long prompt, copied for all tokens at once, takes gigabytes."""
    A, B, scale = stacks(e=200)
    gate, x, sample = router(B, scale), torch.randn(29, 11, dtype=torch.float64), torch.arange(29) % 2
    set_candidates([gate], torch.tensor([[4], [131]]), torch.zeros(2, 1, dtype=torch.float64))
    largest, real = [0], torch.Tensor.__getitem__

    def looked(self, key):
        found = real(self, key)
        largest[0] = max(largest[0], found.numel())
        return found

    monkeypatch.setattr("fast.kernels.COPIES", 7 * 3 * 11 * 8)  # of seven tokens
    monkeypatch.setattr(torch.Tensor, "__getitem__", looked)
    a = fast_ax(x, A)(gate.idx[sample])
    assert largest[0] == 7 * 3 * 11
    torch.testing.assert_close(a[:, 0], torch.einsum("nri,ni->nr", A[gate.idx[sample][:, 0]], x))


def test_gradients_in_a_fixed_order():
    """Summed as threads happen to come, a resumed run is another run."""
    A, B, scale = (y.float() for y in stacks())
    gate, x, sample = router(B, scale).float().train(), torch.randn(1009, 11), torch.arange(1009) % 2
    gate.bind(B, scale)
    set_candidates([gate], torch.tensor([[4, 0, 2], [1, 3, 0]]), torch.zeros(2, 3))
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for _ in range(9):
            weight = gate(x, sample, AX(x, A)).weight
            found.append(
                torch.autograd.grad((weight * torch.arange(1009)[:, None] * torch.arange(3)).sum(), gate.B)[0]
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(slope, found[0]) for slope in found)


def test_one_candidate_weighs_one_and_none_weighs_nothing():
    """A masked softmax over an empty row is NaN, and NaN times an unused adapter is NaN in every
    row of the batch."""
    A, B, scale = stacks()
    gate, x = router(B, scale), torch.randn(3, 11, dtype=torch.float64)
    pool_like = type("P", (), {"slot": staticmethod(lambda name: int(name))})
    set_candidates([gate], *candidate_rows(pool_like, [[("4", 0.5)], []], 1))
    got = gate(x, torch.tensor([0, 1, 0]), AX(x, A))
    assert got.weight[:, 0].tolist() == [1.0, 0.0, 1.0] and got.idx[:, 0].tolist() == [4, 0, 4]


def test_only_the_router_learns():
    """With both A_r and B_r zero neither would ever move; with neither the start would not be even
    weights."""
    A, B, scale = (y.float() for y in stacks())
    pool = type("P", (), {"A": {"p": A}, "B": {"p": B}, "scale": {"p": scale}})
    gate = router_loras(pool, 7)["p"]
    x = torch.randn(5, 11)
    set_candidates([gate], torch.tensor([[0, 1, 3]]), torch.zeros(1, 3))
    mixture = gate(x, torch.zeros(5, dtype=torch.int64), AX(x, A))
    torch.testing.assert_close(mixture.weight, torch.full((5, 3), 1 / 3))
    mixture.weight[:, 0].sum().backward()
    assert gate.B.grad.abs().sum() > 0 and {name for name, _ in gate.named_parameters()} == {"A", "B"}


@pytest.mark.parametrize("k", [1, 3])
def test_an_expert_keeps_its_share_of_the_full_softmax(k):
    """Renormalised over one it would be the constant 1, and the LM loss could not teach it."""
    x, G = torch.randn(7, 11), torch.randn(5, 11, requires_grad=True)
    idx, weight = MoEGate(G, k, temperature=1.5)(x, None, None)
    top = (x @ G.T / 1.5).softmax(-1).topk(k)
    assert torch.equal(idx, top.indices)
    torch.testing.assert_close(weight, top.values)
    assert weight.requires_grad


def test_logo_scores_are_the_adapters_outputs():
    """Scores of A x alone, or entropies without the scale, would rank adapters by their
    bookkeeping."""
    A, B, scale = stacks()
    x = 0.1 * torch.randn(
        7, 11, dtype=torch.float64
    )  # a softmax that is nearly one-hot has no entropy left to compare
    v = torch.stack([B[j] @ (A[j] @ x[-1]) for j in range(5)])
    p = (scale[:, None] * v).softmax(-1)
    norm = v.norm(dim=-1)
    want = {"": (norm / x[-1].norm()).log(), "norm": scale * norm, "entropy": 1 / -(p * p.log()).sum(-1)}
    for measure, scores in want.items():
        probe = LogoProbe(B, scale, measure)
        nothing = probe(x, torch.zeros(7, dtype=torch.int64), AX(x, A))
        assert not nothing.weight.any()
        torch.testing.assert_close(probe.score.double(), scores, rtol=1e-4, atol=1e-5)


def test_an_adapter_without_entropy_is_the_surest():
    """One over zero, of the wrong sign, would rank it last and make weights of NaN."""
    A, B, scale = stacks()
    scale[2] = 1e5
    probe = LogoProbe(B, scale, "entropy")
    probe(
        torch.randn(7, 11, dtype=torch.float64),
        torch.zeros(7, dtype=torch.int64),
        AX(torch.ones(7, 11).double(), A),
    )
    assert probe.score.isfinite().all() and int(probe.score.argmax()) == 2


# In a model ---------------------------------------------------------------------------------------


@pytest.fixture
def mole(small_model, tmp_path):
    (tmp_path / "base").symlink_to(small_model)
    folders = write_adapters(tmp_path / "pool", load_llama(small_model), SAMPLES)
    for name, folder in folders.items():
        lines = "".join(f'{{"prompt": "{prompt}"}}\n' for prompt in SAMPLES[name])
        (folder / "samples.jsonl").write_text(lines)
    return load(small_model, tmp_path / "pool")


def logits(mole, prompts, methods, found):
    ids = torch.tensor([mole.tokenizer.encode(prompt)[:3] for prompt in prompts])
    set_methods(mole, methods, retrieved=found)
    with torch.inference_mode():
        return mole.model(ids)


def routed(mole, tmp_path, prior=0.0):
    """The mole with a random router beside its pool."""
    routers = router_loras(mole.pool, 5, prior=prior)
    for gate in routers.values():
        gate.B.data.normal_(generator=torch.Generator().manual_seed(3))
    save_routers(mole.folder.path / "router.safetensors", routers, mole.model, {"tasks": "a"})
    return routers


PROMPTS = ["the quick fox", "sort these words", "what is the plural"]


def test_a_batch_of_different_sets_is_each_request_alone(mole, tmp_path):
    """Candidates of one row seen by another would be nobody's error and everybody's wrong answer."""
    routed(mole, tmp_path)
    found = [[("a", 0.9), ("b", 0.4)], [("c", 0.5)], [("b", 0.8), ("c", 0.7), ("a", 0.1)]]
    for methods in (["ramole"] * 3, ["ramole", "selection", "mixture"], ["fusion"] * 3):
        together = logits(mole, PROMPTS, methods, found)
        for row in range(3):
            alone = logits(mole, PROMPTS[row : row + 1], methods[row : row + 1], found[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_ramole_over_one_candidate_is_that_adapter(mole, tmp_path):
    routed(mole, tmp_path)
    one = [[("b", 0.7)]] * 3
    want = logits(mole, PROMPTS, ["adapter:b"] * 3, None)
    for method in ("ramole", "selection", "mixture", "fusion"):
        torch.testing.assert_close(logits(mole, PROMPTS, [method] * 3, one), want, rtol=1e-4, atol=1e-4)


def test_fusion_is_mixture_where_all_A_are_equal(small_model):
    """And not otherwise: fusion has cross terms B_i A_j."""
    shapes = linear_shapes(load_llama(small_model))
    mole, adapters = (
        load(small_model),
        [random_adapter(name, shapes, 3, seed=j) for j, name in enumerate("ab")],
    )
    found, results = [[("a", 0.9), ("b", 0.8)]] * 3, []
    for A in (adapters[1].A, adapters[0].A):
        adapters[1].A = A
        mole.pool, mole.attached = Pool.of(adapters, shapes), None
        pair = (logits(mole, PROMPTS, [method] * 3, found) for method in ("fusion", "mixture"))
        results.append(float(torch.dist(*pair)))
    assert results[1] < 1e-3 < results[0] / 10


def test_an_adapter_that_joins_changes_nothing_for_others(mole, tmp_path):
    """Bit for bit: whoever doesn't retrieve it must not even see its zeros in another order."""
    routed(mole, tmp_path)
    mole.pool._grow(7, 13)
    found = [[("a", 0.9), ("b", 0.4)]] * 3
    before = logits(mole, PROMPTS, ["ramole"] * 3, found)
    mole.pool.add(random_adapter("late", mole.shapes, 3, seed=9))
    assert torch.equal(before, logits(mole, PROMPTS, ["ramole"] * 3, found))
    assert not torch.equal(before, logits(mole, PROMPTS, ["ramole"] * 3, [[("a", 0.9), ("late", 0.4)]] * 3))


def test_routers_survive_their_file(mole, tmp_path):
    routers = routed(mole, tmp_path, prior=0.25)
    again = load_routers(mole.folder.path / "router.safetensors", mole.pool, mole.model)
    for path, gate in routers.items():
        assert torch.equal(gate.A, again[path].A) and torch.equal(gate.B, again[path].B)
        assert (gate.divisor, gate.scaled, gate.prior) == (
            again[path].divisor,
            again[path].scaled,
            again[path].prior,
        )


def test_router_of_another_base_is_refused(mole, tmp_path):
    routed(mole, tmp_path)
    mole.model.fingerprint = lambda: "f" * 32
    with pytest.raises(InputError, match=r"router.safetensors: trained on base .*train.py router"):
        set_methods(mole, ["ramole"], retrieved=[[("a", 1.0)]])


def test_what_is_retrieved_is_what_answers(mole, tmp_path):
    """The whole way: prompts to adapters to text, its own for each prompt of a batch, with one left
    out on demand."""
    routed(mole, tmp_path)
    found = retrieve(mole, ["ramole", "base", "selection"], PROMPTS, 2)
    assert [pairs[0][0] for pairs in found if pairs] == ["a", "c"] and found[1] == []
    out = retrieve(mole, ["selection"], PROMPTS[:1], 2, exclude=["a"])[0]
    assert len(out) == 2 and "a" not in dict(out)
    options = {"max_new_tokens": 5}
    texts = answer(mole, PROMPTS, method=["ramole", "base", "selection"], **options)
    alone = [
        answer(mole, p, method=m, **options)[0]
        for p, m in zip(PROMPTS, ["ramole", "base", "adapter:c"], strict=True)
    ]
    assert texts == alone
    with pytest.raises(InputError, match="every adapter is excluded"):
        retrieve(mole, ["selection"], PROMPTS[:1], 2, exclude=["a", "b", "c"])


def test_logo_is_blind_to_scale_rank_and_absence(mole):
    """Of adapters that PEFT users have at hand one is on all Linears, another has four times the
    scale: these would win whatever is asked."""
    ids = [mole.tokenizer.encode(prompt) for prompt in PROMPTS]
    before = retrieve(mole, ["logo"] * 3, PROMPTS, 3, ids=ids)
    adapters = {name: load_adapter(member.adapter.folder, name) for name, member in mole.pool.members.items()}
    large = adapters["b"]  # four times its scale, and of rank 23 by rows that add nothing
    large.scale = {path: 4 * s for path, s in large.scale.items()}
    large.A = {path: F.pad(a, (0, 0, 0, 23 - len(a))) for path, a in large.A.items()}
    large.B = {path: F.pad(b, (0, 23 - b.shape[1])) for path, b in large.B.items()}
    mole.pool = Pool.of(adapters.values(), mole.shapes)
    for rows, others in zip(before, retrieve(mole, ["logo"] * 3, PROMPTS, 3, ids=ids), strict=True):
        assert [name for name, _ in rows] == [name for name, _ in others]
        assert [s for _, s in rows] == pytest.approx([s for _, s in others], rel=1e-4)
    fewer = adapters["a"]
    for part in (fewer.A, fewer.B, fewer.scale):
        for path in [path for path in part if not path.endswith(("q_proj", "v_proj"))]:
            del part[path]
    mole.pool.remove("a")
    mole.pool.add(fewer)
    found = retrieve(mole, ["logo"] * 3, PROMPTS, 3, ids=ids)
    for rows, expected in zip(found, excess_by_hand(mole, fewer, ids), strict=True):
        assert dict(rows)["a"] == pytest.approx(expected, rel=1e-4), "over its own Linears alone"


def excess_by_hand(mole, adapter, ids):
    """[||B A x|| / ||x|| of the last token, as a multiple of its geometric mean over EVERYDAY, and the
    geometric mean of that over the adapter's Linears] of each prompt, in float64."""
    plain = load(mole.folder.path.parent / "base", fast=False)
    inputs = {}
    for path in adapter.A:
        plain.model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: inputs.update({path: args[0].flatten(0, -2)[-1].double()})
        )

    def logs(row):
        plain.model(torch.tensor([row]))
        found = []
        for path, x in inputs.items():
            out = adapter.B[path].double() @ (adapter.A[path].double() @ x)
            found.append(torch.log(out.norm() / x.norm()))
        return torch.stack(found)

    with torch.inference_mode():
        usual = torch.stack([logs(mole.tokenizer.encode(text)) for text in EVERYDAY]).mean(0)
        return [float((logs(row) - usual).mean().exp()) for row in ids]


def test_logo_knows_what_is_usual_in_the_pool_and_template_of_now(mole):
    """What is usual for an adapter that has left, or under another template, makes any choice."""
    ids = [mole.tokenizer.encode(prompt) for prompt in PROMPTS]
    scores = []
    for template in ("{prompt}", "the {prompt} of", "{prompt}"):
        mole.template = template
        scores.append(retrieve(mole, ["logo"] * 3, PROMPTS, 3, ids=ids))
    assert scores[0] == scores[2] != scores[1]
    again = load_adapter(mole.pool.members["a"].adapter.folder, "a")
    again.B = {
        path: torch.roll(b, 1, 0) @ torch.ones(b.shape[1], b.shape[1]).triu() for path, b in again.B.items()
    }
    mole.pool.remove("a")
    mole.pool.add(again)
    fresh = excess_by_hand(mole, again, ids)
    for rows, expected in zip(retrieve(mole, ["logo"] * 3, PROMPTS, 3, ids=ids), fresh, strict=True):
        assert dict(rows)["a"] == pytest.approx(expected, rel=1e-4)


def test_uneven_adapters_are_warned_of(mole, capsys):
    """Arrow and LoGo's entropy send everything to the adapter of the largest scale or on the most
    Linears, and the answers alone don't show why."""
    ids = [mole.tokenizer.encode(prompt) for prompt in PROMPTS]
    warn_once.cache_clear()
    set_methods(mole, ["arrow"])
    retrieve(mole, ["logo_entropy"] * 3, PROMPTS, 2, ids=ids)
    retrieve(mole, ["logo"] * 3, PROMPTS, 2, ids=ids)
    said = capsys.readouterr().err.splitlines()
    assert [line.partition("rank or scale, and ")[2].split()[0] for line in said] == ["arrow", "logo_entropy"]
    for name in ("a", "b"):
        mole.pool.remove(name)
    warn_once.cache_clear()
    set_methods(mole, ["arrow"], top_k=1)
    assert capsys.readouterr().err == "", "of one kind none is favoured"


def test_logo_takes_the_adapters_that_do_most(mole):
    found = retrieve(mole, ["logo"] * 3, PROMPTS, 2, ids=[mole.tokenizer.encode(p) for p in PROMPTS])
    assert all(len(pairs) == 2 and pairs[0][1] >= pairs[1][1] > 0 for pairs in found)
    assert not attached(mole.model)  # the probes are gone


@pytest.mark.slow
def test_compiled_blocks_follow_requests_and_pool(mole, tmp_path):
    """Candidates, inner matrices and slots are read anew at each batch: compiled, the answers stay
    those without compiling, and whatever is asked after the first two batches compiles nothing."""
    routed(mole, tmp_path)
    mole.pool._grow(7, 13)
    batches = [(["a", "b"], 3), (["b", "c"], 1), (["c", "a"], 2), (["late", "a"], 3), (["late", "b"], 1)]
    texts, compiled = [], []
    for compile in (False, True):
        fresh = load(mole.folder.path.parent / "base", mole.folder.path)
        fresh.pool._grow(7, 13)
        for step, (names, b) in enumerate(batches):
            if step == 3:
                fresh.pool.add(random_adapter("late", mole.shapes, 3, seed=9))
            found = [[(name, 0.5) for name in names]] * b
            if compile:
                fresh.model.compile_blocks()
            set_methods(fresh, ["ramole"] * b, retrieved=found)
            ids = [fresh.tokenizer.encode(prompt) for prompt in PROMPTS[:b]]
            texts.append([(t.row, t.id) for t in decode(fresh, ids, Sampling(5))])
            compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert texts[: len(batches)] == texts[len(batches) :]
    assert (
        compiled[-1] == compiled[-4] > compiled[0]
    )  # all shapes had come after one batch of several and one of one
