"""Methods x tasks: one table, one JSON.

    python eval.py                                                       tiny/ on its own tasks
    python eval.py --model DIR --pool DIR --tasks DIR --methods base,oracle,meteora_top1,adapter:NAME --out DIR

Every answer is generated greedily from the test split and scored by its task's metric, with a 95 % bootstrap
interval over the examples. For MeteoRA's gates it also counts how often a gate's first choice, at the tokens of the
held-out responses, is the task's own adapter. Two runs with the same options write the same results.json.
"""

import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import tiny_tasks
from config import parse_args
from files import InputError, run_script, write_json, write_jsonl, write_text
from generate import TINY, Sampling, check_values, decode, encode_prompt
from methods import check_method, load_mole, set_methods
from metrics import score
from moe_lora import GateLoss, attached
from tasks import Task, collate, encode, load_tasks, micro_batches
from tokenizer import check_ids


@dataclass
class Options:
    model: str = ""  # model folder, default tiny/
    pool: str = ""  # pool folder, default the model's own
    tasks: str = ""  # folder of task folders, default those of tiny/
    only: list[str] = field(default_factory=list)  # this task alone; repeatable; default every adapter's own
    methods: str = "base,oracle,meteora"  # separated by commas; oracle is each task with its own adapter
    top_k: int = 2  # which gates `meteora` uses; meteora_top1, meteora_top2 name them
    gate_temperature: float = 1.0  # of MeteoRA's softmax over the k chosen adapters
    limit: int = 0  # examples a task, 0 = all
    max_new_tokens: int = 64  # tokens an answer may have
    batch_size: int = 16  # prompts decoded together
    dtype: str = "auto"  # of the weights, auto = the file's
    device: str = "auto"  # auto = cuda where there is one, else cpu
    seed: int = 0  # of the bootstrap
    out: str = "out/eval"  # folder for results.json, results.md, answers.jsonl, timing.json


def tiny_test_tasks(names, n=100):
    """The test splits of the embedded tasks, made on the spot."""
    return {name: Task(name, "exact_match", [], tiny_tasks.examples(name, "test", n)) for name in names}


def answer_all(mole, prompts, method, o):
    """Greedy answers to `prompts`, batched by length, in their own order."""
    ids = [encode_prompt(mole, prompt) for prompt in prompts]
    order, texts = sorted(range(len(ids)), key=lambda j: len(ids[j])), [""] * len(ids)
    for start in range(0, len(order), o.batch_size):
        rows = order[start : start + o.batch_size]
        set_methods(mole, [method] * len(rows), o.top_k, o.gate_temperature)
        for token in decode(mole, [ids[j] for j in rows], Sampling(o.max_new_tokens)):
            texts[rows[token.row]] += token.text
    return texts


@torch.inference_mode()
def gate_accuracy(mole, tasks, method, o):
    """How often a gate's first choice is the task's own adapter, the gates routing, in percent of the response tokens
    of the test splits: {"right": mean over all gates but layer 0's q, k, v, "first_qkv": mean over those three, which
    see the token's embedding alone, "tokens": how many}."""
    set_methods(mole, [method], o.top_k, o.gate_temperature)
    gates = {path: linear.gate.inner for path, linear in attached(mole.model).items()}
    loss, right, n = GateLoss(gates), 0, 0
    examples = [encode(mole.tokenizer, mole.template, row, name) for name, t in tasks.items() for row in t.test]
    check_ids([index for example in examples for index in example.ids], mole.model.config.vocab_size)
    for part in micro_batches(examples, 4096):
        batch = collate(part)
        set_methods(mole, [method] * len(part), o.top_k, o.gate_temperature)
        starts = torch.tensor([example.n_prompt for example in part])[:, None]
        response = batch.real & (torch.arange(batch.ids.shape[1]) >= starts)
        labels = torch.tensor([mole.pool.slot(name) for name in batch.tasks])[:, None].expand(batch.ids.shape)
        device = mole.model.model.embed_tokens.weight.device
        loss.start(labels.masked_fill(~response, -100).flatten().to(device))
        mole.model.model(batch.ids.to(device))
        right, n = right + loss.right, n + int(response.sum())
    loss.remove()
    share = {path: 100 * float(r) / n for path, r in zip(gates, right, strict=True)}
    blind = {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}
    first, rest = ([s for path, s in share.items() if (path in blind) is apart] for apart in (True, False))
    mean = [round(sum(part) / max(1, len(part)), 2) for part in (rest, first)]
    return {"right": mean[0], "first_qkv": mean[1], "tokens": n}


def table(results, tasks):
    """results.json as Markdown: a row a task, a column a method, score [low, high]."""
    methods = list(results)
    lines = ["| task | n | " + " | ".join(methods) + " |", "|---|---|" + "---|" * len(methods)]
    for name in tasks:
        cells = [results[m]["tasks"][name] for m in methods]
        shown = [f"{c['score']:.1f} [{c['low']:.1f}, {c['high']:.1f}]" for c in cells]
        lines.append(f"| {name} ({cells[0]['metric']}) | {cells[0]['n']} | " + " | ".join(shown) + " |")
    lines.append("| mean | | " + " | ".join(f"{results[m]['mean']:.1f}" for m in methods) + " |")
    lines += [
        f"\n{m}: gates' first choice right on {results[m]['gates']['right']:.1f} % of {results[m]['gates']['tokens']} "
        f"response tokens (q, k, v of layer 0: {results[m]['gates']['first_qkv']:.1f} %)"
        for m in methods
        if "gates" in results[m]
    ]
    return "\n".join(lines) + "\n"


def choose_tasks(mole, o):
    """{name: Task} to score: the tasks named, else those that the pool has an adapter for."""
    known = mole.pool.names if mole.pool else []
    if o.tasks:
        tasks = load_tasks(o.tasks, o.only or known)
    else:
        wanted = o.only or [name for name in known if name in tiny_tasks.TASKS]
        if unknown := [name for name in wanted if name not in tiny_tasks.TASKS]:
            raise InputError(f"no embedded task {unknown[0]!r}: name a folder with --tasks")
        tasks = tiny_test_tasks(wanted)
    if not tasks:
        raise InputError("nothing to evaluate: no adapter of the pool has the name of a task; name some with --only")
    for task in tasks.values():
        task.test = task.test[: o.limit or None]
        if not task.test:
            raise InputError(f"task {task.name}: test.jsonl holds no example")
    return tasks


def main():
    o = parse_args(Options, description="Score methods of choosing adapters on tasks.")
    methods = [m.strip() for m in o.methods.split(",") if m.strip()]
    for name, least in (("batch_size", 1), ("top_k", 1), ("limit", 0), ("seed", 0)):
        if getattr(o, name) < least:
            raise InputError(f"--{name} is {getattr(o, name)}, expected at least {least}")
    check_values(Sampling(o.max_new_tokens), o.top_k, o.gate_temperature)
    if not methods:
        raise InputError("--methods names none")
    mole = load_mole(o.model or TINY, o.pool or None, (), o.dtype, o.device)
    tasks = choose_tasks(mole, o)
    for method in methods:
        for name in tasks:
            check_method(mole, f"adapter:{name}" if method == "oracle" else method, o.top_k)
    results, answers, timing, known = {}, [], {}, {}  # known: what oracle and adapter:NAME share is generated once
    bar = tqdm(total=len(methods) * sum(len(t.test) for t in tasks.values()), file=sys.stderr, mininterval=1)
    for method in methods:
        begin, scores = time.perf_counter(), {}
        for name, task in tasks.items():
            bar.set_postfix_str(f"{method} on {name}")
            used = f"adapter:{name}" if method == "oracle" else method
            if (used, name) not in known:
                known[used, name] = answer_all(mole, [row["prompt"] for row in task.test], used, o)
            texts = known[used, name]
            scores[name] = asdict(score(task.metric, texts, [row["response"] for row in task.test], o.seed))
            rows = zip(task.test, texts, strict=True)
            answers += [{"method": method, "task": name, **row, "answer": text} for row, text in rows]
            bar.update(len(texts))
        mean = sum(s["score"] for s in scores.values()) / len(scores)
        results[method] = {"mean": round(mean, 2), "tasks": scores}
        own = {name: task for name, task in tasks.items() if mole.pool and name in mole.pool.members}
        if method.startswith("meteora") and own:
            results[method]["gates"] = gate_accuracy(mole, own, method, o)
        timing[method] = round(time.perf_counter() - begin, 2)
    bar.close()
    save(o, mole, tasks, results, answers, timing)


def save(o, mole, tasks, results, answers, timing):
    """Writes the files of OUT and prints the table."""
    out = Path(o.out)
    hashes = {name: mole.pool.members[name].hash for name in mole.pool.names} if mole.pool else {}
    meta = {"base": mole.model.fingerprint, "adapters": hashes, "options": asdict(o), "torch": torch.__version__}
    write_json(out / "results.json", {"setting": "iid", "methods": results, "meta": meta})
    write_jsonl(out / "answers.jsonl", answers)
    machine = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    write_json(out / "timing.json", {"seconds": timing} | machine)
    write_text(out / "results.md", table(results, tasks))
    print(table(results, tasks), end="")
    print(f"wrote {out}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
