"""How often gates and the retriever find a task's own adapter."""

import torch

from common.tokenizer import check_ids
from methods.batch import set_methods
from methods.meteora import GateLoss
from methods.session import retriever_of
from moe_lora import attached
from tasks.folders import collate, encode, micro_batches


@torch.inference_mode()
def gate_accuracy(mole, tasks, method, args):
    """How often a gate's first choice is the task's own adapter, the gates routing, in percent of
    the response tokens of the test splits: {"right": mean over all gates but layer 0's q, k, v,
    "first_qkv": mean over those three, which see the token's embedding alone, "tokens": how many}.
    """
    set_methods(mole, [method], args.top_k, args.gate_temperature)
    gates = {path: linear.gate.inner for path, linear in attached(mole.model).items()}
    loss = GateLoss(gates)
    right = 0
    n = 0
    examples = [
        encode(mole.tokenizer, mole.template, row, name) for name, t in tasks.items() for row in t.test
    ]
    check_ids([index for example in examples for index in example.ids], mole.model.config.vocab_size)
    for part in micro_batches(examples, 4096, padded=True):
        batch = collate(part)
        set_methods(mole, [method] * len(part), args.top_k, args.gate_temperature)
        labels = batch.slots(mole.pool).masked_fill(batch.prompt, -100)
        mole.model.model(batch.ids.to(mole.device))
        right = right + loss(labels.flatten().to(mole.device))[1]
        n = n + int((labels >= 0).sum())
    loss.remove()
    share = {path: 100 * float(r) / n for path, r in zip(gates, right, strict=True)}
    blind = {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}
    first, rest = ([s for path, s in share.items() if (path in blind) is apart] for apart in (True, False))
    mean = [round(sum(part) / max(1, len(part)), 2) for part in (rest, first)]
    return {"right": mean[0], "first_qkv": mean[1], "tokens": n}


def retrieval(mole, tasks):
    """How often a test prompt's own adapter is among the k best retrieved, in percent, k 1, 3, 5,
    8: {"1": x, ...}, and "n": of how many prompts."""
    retriever = retriever_of(mole)
    best = dict.fromkeys((1, 3, 5, 8), 0)
    n = 0
    for name, task in tasks.items():
        for pairs in retriever([row["prompt"] for row in task.test], max(best)):
            place = [adapter for adapter, _ in pairs].index(name) if name in dict(pairs) else len(pairs)
            best = {k: count + (place < k) for k, count in best.items()}
            n = n + 1
    return {**{str(k): round(100 * count / n, 2) for k, count in best.items()}, "n": n}
