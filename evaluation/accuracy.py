"""How often gates and the retriever find a task's own adapter."""

import torch

from common.progress import track
from common.tokenizer import check_ids
from methods.batch import set_methods
from methods.session import Mole, retriever_of
from moe_lora import attached
from tasks.folders import Task, collate, encode, micro_batches
from training.losses import GateLoss

FIRST_QKV = {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}


@torch.inference_mode()
def gate_accuracy(mole: Mole, tasks: dict[str, Task], method: str, args) -> dict:
    """How often a gate's first choice is the task's own adapter, while the gates route.

    In percent of the response tokens of the test splits: "right" is the mean over all gates but
    q, k, v of layer 0, "first_qkv" the mean over these three, which see the token's embedding
    alone, "linears" each gate by its Linear's module path; "tokens" is how many tokens that were.
    """
    set_methods(mole, [method], args.top_k, args.gate_temperature)
    inner = {path: linear.gate.inner for path, linear in attached(mole.model).items()}
    gates = {path: gate for path, gate in inner.items() if hasattr(gate, "keep_logits")}
    loss = GateLoss(gates)
    right = 0  # becomes (m,)
    n = 0
    examples = []
    for name, task in tasks.items():
        examples += [encode(mole.tokenizer, mole.template, row, name) for row in task.test]
    check_ids([max(example.ids) for example in examples], mole.model.config.vocab_size)
    for part in track(micro_batches(examples, 4096, padded=True), f"gates of {method}"):
        batch = collate(part)
        set_methods(mole, [method] * len(part), args.top_k, args.gate_temperature)
        labels = batch.slots(mole.pool).masked_fill(batch.prompt, -100)
        mole.model.model(batch.ids.to(mole.device))
        right = right + loss(labels.flatten().to(mole.device))[1]
        n = n + int((labels >= 0).sum())
    loss.remove()
    linears = {path: 100 * float(count) / n for path, count in zip(gates, right, strict=True)}
    first = [share for path, share in linears.items() if path in FIRST_QKV]
    rest = [share for path, share in linears.items() if path not in FIRST_QKV]
    found = {"right": mean(rest), "first_qkv": mean(first), "tokens": n}
    return found | {"linears": {path: round(share, 2) for path, share in linears.items()}}


def mean(values: list[float]) -> float:
    """The mean to two decimals, 0 of none."""
    return round(sum(values) / max(1, len(values)), 2)


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
