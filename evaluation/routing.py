"""What routing looks like on held-out responses, and how often a task's own adapter is found.

ESS    = (sum over j of |weight_j|)^2 / sum over j of weight_j^2
load_j = (sum of |weight_j|) / (sum of |weight| over all adapters),  sums over tokens and Linears

ESS is the effective number of adapters a token (by the formula of effective sample size): 1 for one adapter,
k for k of equal weight.
"""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from common.progress import track
from evaluation.choose import hidden_from
from methods.batch import find_method, for_task, retrieve, set_methods
from methods.protocol import Merged
from methods.session import Mole, retriever_of
from moe_lora import Recorder, attached
from tasks.folders import Batch, Task, collate, encode, micro_batches
from training.losses import GateLoss

FIRST_QKV = {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}
MAX_TOKENS = 4096  # of a forward pass, with padding


@torch.inference_mode()
def measure_routing(mole: Mole, tasks: dict[str, Task], method: str, args) -> dict:
    """How `method` routes the response tokens of the test splits, read from the targets (teacher
    forcing): {"routing": RoutingSums.routing(), "gates": RoutingSums.gates()}.

    "routing" is absent where no token uses an adapter of the pool by a weight of its own, as with
    adapters that are merged into one or into W. "gates" is there only for gates that were trained with
    each task's own adapter as their label, and not where that adapter is hidden.
    """
    kind = find_method(mole, method, args.top_k)
    if mole.pool is None or not kind.needs_adapters or isinstance(kind, Merged):
        return {}
    if mole.tokenizer.eos_id is None:  # encode() needs it to end a response
        return {}
    sums = RoutingSums()
    labelled = kind.gates_know_tasks and not (args.ood or args.unseen)
    for name, task in track(tasks.items(), f"routing of {method}"):
        own = name if labelled and name in mole.pool.members else ""
        for batch in set_up(mole, method, task, args):
            if not attached(mole.model):
                return {}
            sums.add(mole, batch, own)
    found = {"routing": sums.routing(), "gates": sums.gates()}
    return {key: value for key, value in found.items() if value}


def set_up(mole: Mole, method: str, task: Task, args) -> Iterator[Batch]:
    """Yields the task's test examples in batches. Before each the model is set up as for answering it.
    Examples that the model can't read are left out: longer than the context, or with ids beyond the
    vocabulary."""
    used = for_task(mole, method, task.name)
    hidden = hidden_from(mole, method, task.name, args)
    config = mole.model.config
    examples = []
    for row in task.test:
        example = encode(mole.tokenizer, mole.template, row, task.name)
        if len(example.ids) <= config.context and max(example.ids) < config.vocab_size:
            examples.append(example)
    if not examples:
        return
    prompts = [example.row["prompt"] for example in examples]
    ids = [example.ids[: example.n_prompt] for example in examples]
    rankings = retrieve(mole, [used] * len(ids), prompts, args.retrieve, hidden, ids)
    found = {id(example): ranking for example, ranking in zip(examples, rankings, strict=True)}
    for part in micro_batches(examples, MAX_TOKENS, padded=True):
        routing = {"retrieved": [found[id(example)] for example in part], "exclude": hidden}
        set_methods(mole, [used] * len(part), args.top_k, args.gate_temperature, **routing)
        yield collate(part, mole.device)


class RoutingSums:
    """Sums over the response tokens of all batches and over the attached Linears."""

    def __init__(self):
        self.tokens = 0
        self.ess = 0.0
        self.choices = 0  # pairs of a token and a Linear in which it uses any adapter
        self.load = Counter()  # {adapter: weight}
        self.labelled = 0  # tokens of tasks whose own adapter is the label
        self.right = Counter()  # {module path: tokens at which the largest logit is the label's}

    def add(self, mole: Mole, batch: Batch, own: str) -> None:
        """Adds the batch, by one forward pass. `own`: the adapter that is the gates' label, "" for none."""
        pool = mole.attached[1]
        response = (batch.real & ~batch.prompt).flatten()  # (n,)
        linears = attached(mole.model).items() if own else ()
        inner = {path: linear.gate.inner for path, linear in linears}
        paths = [path for path, gate in inner.items() if hasattr(gate, "keep_logits")]
        gate_loss = GateLoss(inner)
        mole.prompt.mask = batch.prompt
        with Recorder(mole.model, len(response)) as recorder:
            mole.model.model(batch.ids)
        mole.prompt.mask = None
        n = int(response.sum())
        self.tokens += n
        if paths:
            labels = batch.slots(pool).flatten().masked_fill(~response, -100)
            self.right.update(dict(zip(paths, gate_loss(labels)[1].tolist(), strict=True)))
            self.labelled += n
        gate_loss.remove()
        names = {pool.slot(name): name for name in pool.resident}
        for trace in recorder.traces:
            weight = trace[response].abs().double()  # (n, e); float64: a mix may have weights of any size
            ess = effective_number(weight)
            self.ess += float(ess.sum())
            self.choices += int((ess > 0).sum())
            load = weight.sum(0).tolist()
            self.load.update({name: load[slot] for slot, name in names.items()})

    def routing(self) -> dict:
        """{"ess": mean over the pairs of a token and a Linear in which it uses any adapter, "load":
        {adapter: its % of the weight}, "tokens": their number}; {} where no token uses any."""
        if not self.choices:
            return {}
        total = sum(self.load.values())
        load = {name: round(100 * self.load[name] / total, 2) for name in sorted(self.load)}
        return {"ess": round(self.ess / self.choices, 3), "load": load, "tokens": self.tokens}

    def gates(self) -> dict:
        """How often a gate's largest logit is that of the task's own adapter, in % of the tokens.

        "first_qkv": the mean over the gates of q, k, v of layer 0, which see the token's embedding
        alone. "right": the mean over the others. Where all gates are of one kind, "right" is their mean,
        and "first_qkv" is left out. "linears": {module path: that of its gate}. "tokens": the number of
        tokens. {} where no gate has a label.
        """
        if not self.labelled:
            return {}
        linears = {path: 100 * count / self.labelled for path, count in self.right.items()}
        first = [share for path, share in linears.items() if path in FIRST_QKV]
        rest = [share for path, share in linears.items() if path not in FIRST_QKV]
        found = {"right": mean(rest or first), "tokens": self.labelled}
        if first and rest:
            found["first_qkv"] = mean(first)
        return found | {"linears": {path: round(share, 2) for path, share in linears.items()}}


def effective_number(weight: Tensor) -> Tensor:
    """weight (..., e) -> ESS (...), from 1 to e; 0 where all weights are 0."""
    squares = weight.square().sum(-1)
    return weight.abs().sum(-1).square() / squares.clamp(min=torch.finfo(weight.dtype).tiny)


def mean(values: list[float]) -> float:
    """The mean to two decimals."""
    return round(sum(values) / len(values), 2)


def retrieval(mole: Mole, tasks: dict[str, Task]) -> dict[str, float]:
    """How often a test prompt's own adapter is among the k best retrieved, in percent.

    {"1": x, "3": x, "5": x, "8": x, "n": number of prompts}.
    """
    retriever = retriever_of(mole)
    found = dict.fromkeys((1, 3, 5, 8), 0)
    n = 0
    for name, task in track(tasks.items(), "retrieval"):
        prompts = [row["prompt"] for row in task.test]
        for pairs in retriever(prompts, max(found)):
            n += 1
            for k in found:
                found[k] += name in dict(pairs[:k])
    shares = {str(k): round(100 * count / n, 2) for k, count in found.items()}
    return {**shares, "n": n}
