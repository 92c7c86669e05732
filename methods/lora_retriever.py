"""LoraRetriever (arXiv 2402.09997): composes the adapters whose samples are most like the prompt.

    selection      the best one
    mixture        sum_j (1/k) s_j B_j A_j x
    fusion         (mean of s_j B_j)(mean of A_j) x, which has cross terms
    adaptersoup    fusion of the adapters nearest to all prompts together

The encoder and the ranking are in pool/retriever.py. `train.py retriever` tunes the encoder
contrastively on a share of the tasks. The base stays frozen, so every prompt runs through it once;
what is tuned is the projection of its hidden states. It starts as the whitening of what varies
within a task, which makes prompts of one task alike. Then it learns by InfoNCE: m prompts of each
task are averaged as an adapter's samples are, and other prompts have to find their own task's mean.
"""

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.fields import Number
from common.files import InputError, say, write_text
from common.hub import find_folder
from common.llama_folder import read_config
from common.locks import alone
from common.options import Above0, NotNegative, Seed, ShareAbove0, Whole
from common.tables import markdown
from common.tokenizer import Tokenizer
from methods.protocol import ByText, FixedMixture, Merged
from methods.session import Mole, Ranking, retriever_of
from parallel.processes import one_process
from pool.adapters import Adapter, load_adapter, save_samples
from pool.folder import check_pool_base, is_pool, open_pool
from pool.load import load_base, read_adapters
from pool.retriever import LlamaEncoder, Retriever, save_retriever, strip_shared
from pool.stacks import average_factors
from tasks.folders import Task, load_tasks, some_tasks
from tasks.metrics import mean_score
from training.loop import required

SAMPLES = 20  # m, at most: the paper's


class Selection(ByText, FixedMixture):
    """The best adapter retrieved."""

    pattern = "selection"
    names = ("selection",)
    about = "LoraRetriever: the best adapter retrieved"
    paper = "2402.09997"

    def in_memory(self, mole: Mole, found: Ranking, exclude: tuple) -> list[str]:
        """The best."""
        return [found[0][0]]

    def weights(self, mole: Mole, found: Ranking, exclude: tuple) -> dict[str, float]:
        """The best, at weight 1."""
        return {found[0][0]: 1.0}

    @classmethod
    def default(cls, mole: Mole, k: int, k_asked: bool) -> tuple[str, str] | None:
        """Where every adapter can be found: of what needs no training the best on real tasks."""
        found = all(member.adapter.samples for member in mole.pool.members.values())
        return ("selection", "no gates, and samples to find each by") if found else None


class RetrievedMixture(ByText, FixedMixture):
    """The k best, each weighing 1/k."""

    pattern = "mixture"
    names = ("mixture",)
    about = "LoraRetriever: the k best, each weighing 1/k"
    paper = "2402.09997"

    def weights(self, mole: Mole, found: Ranking, exclude: tuple) -> dict[str, float]:
        """1/k each."""
        return {name: 1 / len(found) for name, _ in found}


class Fusion(ByText, Merged):
    """The mean of the k best's A and of their B: one adapter."""

    pattern = "fusion"
    names = ("fusion",)
    about = "LoraRetriever: the mean of the k best's A and of their B"
    paper = "2402.09997"
    decides = "per request, merged"

    def merge(self, mole: Mole, found: Ranking, exclude: tuple) -> Adapter:
        """(mean B)(mean A) of those retrieved."""
        return average_factors(mole.pool, self.name, [name for name, _ in found])


class AdapterSoup(Fusion):
    """Fusion of the adapters nearest to all the prompts together (arXiv 2302.07027)."""

    pattern = "adaptersoup"
    names = ("adaptersoup",)
    about = "AdapterSoup: fusion of the adapters nearest to all the prompts together"
    paper = "2302.07027"
    decides = "per set of requests, merged"

    def retrieve(self, mole: Mole, prompts: list[str], ids, k: int, exclude: tuple) -> list[Ranking]:
        """The k nearest to the mean of all prompts, for each of them."""
        retriever = retriever_of(mole)
        mean = retriever.embed(list(prompts)).mean(0, keepdim=True)
        return [retriever.nearest(mean, k, exclude)[0]] * len(prompts)


# Tuning the encoder -------------------------------------------------------------------------------


Prompts = Annotated[int, Number(int, 3, 1_000_000)]
Length = Annotated[int, Number(int, 32, 1_000_000)]


@dataclass
class RetrieverRun:
    """Options of `train.py retriever`."""

    model: str  # folder or hub name ORG/NAME[@REVISION]
    tasks: str = ""  # folder of task folders, or a file of {adapter, prompt, response} lines
    pool: str = ""  # pool folder; its tasks alone are used, its samples get vectors, missing ones are written
    adapter: list[str] = field(default_factory=list)  # NAME=DIR, a PEFT folder or hub name; repeatable
    share: ShareAbove0 = 1.0  # share of the tasks; the others are never seen
    depth: Whole = 0  # the block whose hidden states are used, 0 = two thirds of the way up
    prompts: Prompts = 60  # of each task, as they are and without what they share
    steps: Whole = 100  # of InfoNCE, 0 = the whitening alone
    lr: NotNegative = 1e-4  # learning rate
    temperature: Above0 = 0.02  # of the cosines
    max_length: Length = 160  # tokens of a text that are read, with the instruction
    test: bool = False  # compare retrieval for the tasks left out with bag of words and the untuned
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the base, auto = the file's
    device: str = "auto"  # auto = cuda where there is one, else cpu
    seed: Seed = 0  # of the tasks, of the prompts and of their order


def train_retriever(args: RetrieverRun) -> None:
    """Tunes the projection and writes POOL/retriever.safetensors."""
    one_process("train.py retriever")
    folder = Path(required(args, "pool"))
    extra = read_adapters(args.adapter)
    known = open_pool(folder, extra) if extra or is_pool(folder) else None
    adapters = sorted(known.adapters) if known else []
    tasks = load_tasks(required(args, "tasks"), adapters or None, adapters)
    names = some_tasks(tasks, args.share, args.seed)
    if args.test and len(names) == len(tasks):
        raise InputError(f"--test: all {len(tasks)} tasks are tuned on, none is left out: lower --share")
    with alone(folder / "runs" / "retriever"):
        _train_retriever(folder, known, tasks, names, args)


def _train_retriever(folder, known, tasks, names, args):
    base = find_folder(args.model, "model")
    layers = read_config(base)["num_hidden_layers"]
    if args.depth > layers:
        raise InputError(f"--depth is {args.depth}, expected at most {layers}, the base's blocks")
    model = load_base(base, args.dtype, args.device)
    model.fingerprint()  # of the files as they are now: another base may lie there when this ends
    if known:
        check_pool_base(known, model)
    tokenizer = Tokenizer(base)
    untuned = LlamaEncoder(model, tokenizer, args.depth or None, max_length=args.max_length)
    n = even_count([tasks[name] for name in names], args.prompts)
    views = []
    for bare in (False, True):
        texts = []
        for name in names:
            drawn = draw_prompts(tasks[name], n, args.seed, bare)
            texts += islice(cycle(drawn), n)  # again from the first, where a task has fewer
        views.append(F.normalize(untuned.pooled(texts), dim=-1).view(len(names), n, -1))
    mean, projection = whiten_within(views)
    projection = info_nce([view - mean for view in views], projection, args)
    encoder = LlamaEncoder(model, tokenizer, untuned.depth, mean, projection, args.max_length)
    retriever = Retriever(encoder)
    for name, path in sorted(known.adapters.items()) if known else ():
        retriever.add(name, samples_of(load_adapter(path, name, header=True), tasks[name], args.seed))
    file = folder / "retriever.safetensors"
    save_retriever(file, retriever, model, {"tasks": "\n".join(names)})
    say(f"wrote {file}")
    if args.test:
        pooled = cache(untuned.pooled)  # what both project, a forward pass of every text
        encoders = {"untuned": lambda texts: untuned.project(pooled(tuple(texts))),
                    "tuned": lambda texts: encoder.project(pooled(tuple(texts)))}  # fmt: skip
        table = compare({"bag of words": bag_of_words, **encoders}, tasks, names, args.seed)
        write_text(folder / "runs" / "retriever.md", table)
        print(table, end="")


def samples_of(adapter: Adapter, task: Task, seed: int) -> list[str]:
    """The adapter's samples. One that came without gets prompts of its task, in samples.jsonl in
    its folder, where every later command looks for them."""
    if not adapter.samples:
        adapter.samples = draw_prompts(task, SAMPLES, seed)
        save_samples(adapter.folder, adapter.samples)
        say(f"wrote {adapter.folder / 'samples.jsonl'}: prompts of the task")
    return adapter.samples


def even_count(tasks: list[Task], most: int) -> int:
    """How many prompts of each task to tune on: `most`, or as many as the largest task has. Raises
    InputError where a task has none, or none has two: then nothing varies within a task."""
    distinct = {task.name: len({row["prompt"] for row in task.train}) for task in tasks}
    if empty := [name for name, count in distinct.items() if not count]:
        raise InputError(f"task {empty[0]}: no training example")
    if max(distinct.values()) < 2:
        found = f"one prompt of each of {len(tasks)} tasks, expected two or more of some"
        without = "without retriever.safetensors the base's hidden states rank adapters"
        raise InputError(f"--tasks: {found}: {without}")
    return min(most, max(len(task.train) for task in tasks))


def draw_prompts(task, count: int, seed: int, bare=False, split="train") -> list[str]:
    """`count` of a task's prompts at most; `bare` without what the task's prompts share."""
    prompts = [row["prompt"] for row in getattr(task, split)]
    if bare:
        more = [row["prompt"] for row in task.train] if split != "train" else []
        prompts = strip_shared(prompts + more)[: len(prompts)]
    return random.Random(f"{seed}/{task.name}").sample(prompts, min(count, len(prompts)))


def whiten_within(views: list[Tensor], shrink=0.3) -> tuple[Tensor, Tensor]:
    """Pooled prompts, (tasks, n, h) for each view -> mean (h,) and the projection (h, h) that gives
    what varies within a task and view unit variance; `shrink` mean variances are added, or
    directions with hardly any would be blown up.
    """
    rest = torch.cat([(view - view.mean(1, keepdim=True)).flatten(0, 1) for view in views])
    values, vectors = torch.linalg.eigh(rest.T @ rest / len(rest))
    projection = (vectors * (values.clamp(min=0) + shrink * values.mean()).rsqrt()).T
    return torch.cat(views).mean((0, 1)), projection / projection.norm() * len(projection) ** 0.5


def info_nce(views: list[Tensor], projection: Tensor, args) -> Tensor:
    """`steps` of InfoNCE from `projection` (d, h); views are centred, each (tasks, n, h). Returns
    the tuned one."""
    W = projection.clone().requires_grad_()
    optimizer = torch.optim.AdamW([W], lr=args.lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(args.seed)
    tasks, n, h = views[0].shape
    labels = torch.arange(tasks)[:, None]
    for step in range(args.steps):
        m = min(int(SAMPLES ** torch.rand((), generator=generator)), n - 1)
        order = torch.rand(tasks, n, generator=generator).argsort(1)[..., None].expand(-1, -1, h)
        drawn = F.normalize(F.linear(views[step % 2].gather(1, order[:, : m + 8]), W), dim=-1)
        adapters = F.normalize(drawn[:, :m].mean(1), dim=-1)  # (tasks, d)
        scores = drawn[:, m:] @ adapters.T / args.temperature  # (tasks, others, tasks)
        loss = F.cross_entropy(scores.flatten(0, 1), labels.expand(scores.shape[:2]).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return W.detach()


# The test -----------------------------------------------------------------------------------------


def bag_of_words(texts: list[str], d=4096) -> Tensor:
    """Texts -> counts of words and signs (n, d), by hash: what retrieval has to beat."""
    counts = torch.zeros(len(texts), d)
    for row, text in enumerate(texts):
        for word, count in Counter(re.findall(r"\w+|[^\w\s]", text.lower())).items():
            counts[row, int.from_bytes(word.encode(), "big") % 4093] += count
    return counts


def compare(encoders: dict[str, Callable], tasks: dict, tuned_on: list[str], seed: int) -> str:
    """Top-1 retrieval, % of up to 50 test prompts of each task that is not in `tuned_on`, among all
    tasks, by m samples of their train prompts, with 95 % intervals. As Markdown."""
    names = sorted(tasks)
    rows = []
    others = [name for name in names if name not in tuned_on]
    for title, embed in encoders.items():
        for bare, kind in ((False, "as they are"), (True, "without shared wording")):
            known = [_embed_unit(embed, draw_prompts(tasks[n], 60, seed, bare)) for n in names]
            asked = []
            labels = []
            for name in others:
                asked.append(_embed_unit(embed, draw_prompts(tasks[name], 50, seed, bare, "test")))
                labels += [names.index(name)] * len(asked[-1])
            rows.append([title, kind])
            for m in (1, 5, SAMPLES):
                hits = top_1(known, torch.cat(asked), torch.tensor(labels), m)
                score = mean_score("top-1", hits.tolist(), seed)
                rows[-1].append(f"{score.score:.1f} [{score.low:.1f}, {score.high:.1f}]")
    lines = markdown(["encoder", "prompts", "m = 1", "m = 5", f"m = {SAMPLES}"], rows)
    lines += ["", f"{score.n} prompts of {len(others)} tasks among {len(names)}, "
              f"tuned on the other {len(tuned_on)}; intervals are over the prompts"]  # fmt: skip
    return "\n".join(lines) + "\n"


def _embed_unit(embed, texts):
    """Vectors of length 1, (n, d)."""
    return F.normalize(embed(texts), dim=-1)


def top_1(known: list[Tensor], asked: Tensor, labels: Tensor, m: int, repeats=5) -> Tensor:
    """How often each of `asked` (q, d) is nearest to its own task's mean: (q,). A task's mean is of m
    of its `known` (n, d), drawn `repeats` times."""
    hits = torch.zeros(len(asked))
    for repeat in range(repeats):
        means = []
        for j, some in enumerate(known):
            rows = random.Random(f"{repeat}/{j}").sample(range(len(some)), min(m, len(some)))
            means.append(F.normalize(some[rows].mean(0), dim=-1))
        hits += ((asked @ torch.stack(means).T).argmax(-1) == labels) / repeats
    return hits
