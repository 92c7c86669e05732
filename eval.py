"""Methods x tasks, and composites: one table, one JSON.

    python eval.py                                                       tiny/ on its own tasks
    python eval.py --methods base,oracle,meteora --composite 3,5,10      and several questions in one prompt
    python eval.py --methods oracle,selection,mixture,fusion,ramole --ood   each task without its own adapter
    python eval.py --model DIR --pool DIR --tasks DIR --methods base,oracle,meteora_top1,adapter:NAME --out DIR

Every answer is generated greedily from the test split and scored by its task's metric, with a 95 %
bootstrap interval over the examples. For MeteoRA's gates it also counts how often a gate's first
choice, at the tokens of the held-out responses, is the task's own adapter, and for methods that
retrieve how often that is among the k best. What is done lies in OUT/cells: the same command goes
on where it was stopped. Two runs with the same options write the same results.json.
"""

import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from common.files import InputError, read_metadata, run_script, write_json, write_jsonl, write_text
from common.options import Count, Whole, check_bounds, numbers, parse_args
from decoding.sampling import Sampling, check_values
from evaluation.accuracy import gate_accuracy, retrieval
from evaluation.answers import AnswerCache, answer_all, sha256
from evaluation.composites import (
    answer_composites,
    choose_temperature,
    draw_composite,
    encode_spans,
    score_composites,
)
from evaluation.tables import composite_table, mean_of, table
from methods.batch import check_method, find_method, for_task
from methods.protocol import Gated
from methods.session import load_mole
from pool.load import TINY
from pool.retriever import sentence_encoder
from tasks import tiny as tiny_tasks
from tasks.composites import composites
from tasks.folders import Task, load_tasks
from tasks.metrics import score, score_meteora, signature


@dataclass
class Options:
    """Options of eval.py."""

    model: str = ""  # model folder, default tiny/
    pool: str = ""  # pool folder, default the model's own
    tasks: str = ""  # folder of task folders, default those of tiny/
    only: list[str] = field(default_factory=list)  # this task alone; repeatable; default every adapter's own
    methods: str = "base,oracle,meteora"  # separated by commas; oracle is each task with its own adapter
    composite: str = ""  # questions in a composite prompt, as 3,5,10; each size has its columns in a table
    composites: Count = 200  # composite prompts of each size
    composite_temperature: str = (
        "1"  # of the gates on composites; several, as 1,5,15: the best on validation prompts
    )
    ood: bool = False  # each task without its own adapter: what do the others make of it
    unseen: bool = (
        False  # only tasks that router and retriever were not trained on; gates do without those adapters
    )
    retrieve: Count = 3  # adapters retrieved for a prompt (ramole, selection, mixture, fusion, logo)
    encoder: str = ""  # sentence-transformers folder that finds them, instead of the base's hidden states
    top_k: Count = 2  # which gates `meteora` uses; meteora_top1, meteora_top2 name them
    gate_temperature: float = 1.0  # of MeteoRA's softmax over the k chosen adapters
    limit: Whole = 0  # examples a task, 0 = all
    max_new_tokens: int = 64  # tokens an answer may have
    batch_size: Count = 16  # prompts decoded together
    meteora_metrics: bool = (
        False  # score as MeteoRA's released code did (metrics.score_meteora), to compare with it
    )
    dtype: str = "auto"  # of the weights, auto = the file's
    device: str = "auto"  # auto = cuda where there is one, else cpu
    seed: Whole = 0  # of the bootstrap and of the composites
    out: str = "out/eval"  # folder for results.json, results.md, answers.jsonl, timing.json


def tiny_test_tasks(names, n=100):
    """The embedded tasks, made on the spot: test splits, and some training examples for composites."""
    splits = {name: [tiny_tasks.examples(name, split, n) for split in ("train", "test")] for name in names}
    return {name: Task(name, "exact_match", *both) for name, both in splits.items()}


def hidden_from(mole, method, name, args):
    """The adapters that `method` has to do without on task `name`: in --ood the task's own; in
    --unseen what is trained for a fixed pool does without those of all tasks that are unseen."""
    found = find_method(mole, method, args.top_k)
    if args.ood and name in mole.pool.members and not found.is_ceiling:
        return (name,)
    if args.unseen and found.trained_on_pool:
        return tuple(sorted(mole.pool.members.keys() - seen_tasks(mole)))
    return ()


def seen_tasks(mole):
    """The tasks that the pool's router and retriever were trained on. Raises InputError where there
    is neither."""
    files = (
        [mole.folder.path / f"{part}.safetensors" for part in ("router", "retriever")] if mole.folder else []
    )
    found = [read_metadata(file).get("tasks", "").split("\n") for file in files if file.exists()]
    if not found:
        raise InputError("--unseen: the pool has neither router.safetensors nor retriever.safetensors")
    return {name for names in found for name in names}


# What is asked for --------------------------------------------------------------------------------------------------


def choose_tasks(mole, args):
    """{name: Task} to score: the tasks named, else those that the pool has an adapter for."""
    known = mole.pool.names if mole.pool else []
    if args.tasks:
        tasks = load_tasks(args.tasks, args.only or known)
    else:
        wanted = args.only or [name for name in known if name in tiny_tasks.TASKS]
        if unknown := [name for name in wanted if name not in tiny_tasks.TASKS]:
            raise InputError(f"no embedded task {unknown[0]!r}: name a folder with --tasks")
        tasks = tiny_test_tasks(wanted)
    if not tasks:
        raise InputError(
            "nothing to evaluate: no adapter of the pool has the name of a task; name some with --only"
        )
    if args.unseen:
        seen = seen_tasks(mole)
        tasks = {name: task for name, task in tasks.items() if name not in seen}
        if not tasks:
            raise InputError(
                "--unseen: router and retriever have seen every task: train.py router --share 0.4"
            )
    for task in tasks.values():
        task.test = task.test[: args.limit or None]
        if not task.test:
            raise InputError(f"task {task.name}: test.jsonl holds no example")
    return tasks


def check_options(args):
    """Raises InputError for values out of range; returns methods, composite sizes, composite
    temperatures."""
    if args.ood and args.unseen or (args.composite and (args.ood or args.unseen)):
        raise InputError("--ood, --unseen and --composite exclude each other")
    check_bounds(args)
    check_values(Sampling(args.max_new_tokens), args.top_k, args.gate_temperature)
    methods = list(dict.fromkeys(m.strip() for m in args.methods.split(",") if m.strip()))
    if not methods:
        raise InputError("--methods names none")
    temperatures = numbers("--composite_temperature", args.composite_temperature, float)
    return methods, numbers("--composite", args.composite) if args.composite else [], temperatures


# Scoring ------------------------------------------------------------------------------------------------------------


def evaluate(mole, tasks, methods, cells, args):
    """Every method on every task -> (results, rows of answers.jsonl, seconds a method)."""
    results = {}
    answers = []
    timing = {}
    score_one = score_meteora if args.meteora_metrics else score
    with tqdm(
        total=len(methods) * sum(len(t.test) for t in tasks.values()), file=sys.stderr, mininterval=1
    ) as bar:
        for method in methods:
            scores = {}
            timing[method] = 0.0
            for name, task in tasks.items():
                bar.set_postfix_str(f"{method} on {name}")
                used = for_task(mole, method, name)
                prompts = [row["prompt"] for row in task.test]
                hidden = hidden_from(mole, method, name, args)
                cell = cells.get(
                    f"{used} on {name}",
                    lambda p=prompts, m=used, x=hidden: {"answers": answer_all(mole, p, m, args, x)},
                )
                texts = cell["answers"]
                timing[method] = timing[method] + cell["seconds"]
                scores[name] = asdict(
                    score_one(task.metric, texts, [row["response"] for row in task.test], args.seed)
                )
                rows = zip(task.test, texts, strict=True)
                answers += [{"method": method, "task": name, **row, "answer": text} for row, text in rows]
                bar.update(len(texts))
            results[method] = {**mean_of(scores), "tasks": scores}
            own = {name: task for name, task in tasks.items() if mole.pool and name in mole.pool.members}
            if (
                find_method(mole, method, args.top_k).gates_know_tasks
                and own
                and not (args.ood or args.unseen)
            ):
                found = cells.get(f"gates of {method}", lambda m=method: gate_accuracy(mole, own, m, args))
                results[method]["gates"] = {key: found[key] for key in ("right", "first_qkv", "tokens")}
    return results, answers, {method: round(seconds, 2) for method, seconds in timing.items()}


def evaluate_composites(mole, tasks, methods, drawn, temperatures, cells, args):
    """Every method on the composites `drawn`, {n: [Composite]} -> (results, rows of answers.jsonl).
    `oracle` is the ceiling: each question and each answer runs through its own task's adapter. A
    method that knows one task at a time is left out."""
    results = {}
    answers = []
    for n, asked in drawn.items():
        table = results[str(n)] = {}
        answering = [method for method in methods if find_method(mole, method, args.top_k).answers_composites]
        for method in tqdm(answering, desc=f"composite-{n}", file=sys.stderr):
            kind = find_method(mole, method, args.top_k)
            search = len(temperatures) > 1 and kind.has_temperature
            temperature = temperatures[0]
            if search:
                trial = composites(
                    tasks, n, max(1, args.composites // 4), mole.template, args.seed, split="train"
                )
                temperature = cells.get(
                    f"temperature of {method} on composite-{n}",
                    lambda m=method, t=trial: {
                        "best": choose_temperature(mole, t, m, tasks, temperatures, args)
                    },
                )["best"]
            cell = cells.get(
                f"{method} on composite-{n}",
                lambda m=method, t=temperature, a=asked: {"answers": answer_composites(mole, a, m, t, args)},
            )
            table[method] = score_composites(asked, cell["answers"], tasks, args)
            if isinstance(kind, Gated):
                picture = draw_composite(mole, asked[0], method, temperature, args)
                write_text(Path(args.out) / f"composite-{n}-{method}.svg", picture)
            if search:
                table[method]["temperature"] = temperature
            for c, text in zip(asked, cell["answers"], strict=True):
                row = {"method": method, "composite": n, "prompt": c.prompt, "answer": text}
                answers.append(row | {"responses": [[name, row["response"]] for name, row in c.questions]})
    return results, answers


def main():
    """The command: scores methods on tasks and composites, writes results and tables."""
    args = parse_args(Options, description="Score methods of choosing adapters on tasks.")
    methods, sizes, temperatures = check_options(args)
    embed = sentence_encoder(args.encoder) if args.encoder else None
    mole = load_mole(args.model or TINY, args.pool or None, (), args.dtype, args.device)
    mole.embed = embed
    tasks = choose_tasks(mole, args)
    for method in methods:
        if args.ood and find_method(mole, method, args.top_k).has_task_adapter:
            raise InputError(f"--ood: {method} has no adapter of a task that it could do without")
        for name in tasks:
            check_method(mole, for_task(mole, method, name), args.top_k)
    hashes = {name: mole.pool.members[name].hash for name in mole.pool.names} if mole.pool else {}
    parts = {str(f.relative_to(mole.folder.path)): sha256(f.read_bytes()) for f in trained_parts(mole)}
    options = {key: value for key, value in asdict(args).items() if key != "out"}
    examples = {name: sha256(repr((task.train, task.test)).encode()) for name, task in tasks.items()}
    meta = {"base": mole.model.fingerprint, "adapters": hashes, "parts": parts, "tasks": examples, "options": options,
            "metrics": {m: signature(m) for m in sorted({t.metric for t in tasks.values()})},
            "torch": torch.__version__}  # fmt: skip
    asked = {n: composites(tasks, n, args.composites, mole.template, args.seed) for n in sizes}
    for composite in [composite for some in asked.values() for composite in some]:
        encode_spans(mole, composite)  # one that doesn't fit is refused before hours of work
    cells = AnswerCache(args.out, meta)
    results, answers, timing = evaluate(mole, tasks, methods, cells, args)
    composite, more = evaluate_composites(mole, tasks, methods, asked, temperatures, cells, args)
    ceiling = next((name for name in methods if find_method(mole, name, args.top_k).is_ceiling), None)
    text = table(results, tasks, ceiling) + ("\n" + composite_table(results, composite) if composite else "")
    out = Path(args.out)
    setting = "ood" if args.ood else "unseen" if args.unseen else "iid"
    written = {"setting": setting, "methods": results, "composite": composite, "meta": meta}
    if not args.ood and any(find_method(mole, name, args.top_k).retrieves == "by text" for name in methods):
        own = {name: task for name, task in tasks.items() if name in mole.pool.members}
        written["retrieval"] = found = retrieval(mole, own)
        shares = ", ".join(f"top-{k} {found[k]:.1f}" for k in found if k != "n")
        text += f"\nretrieved: the task's own adapter, % of {found['n']} prompts: {shares}\n"
    write_json(out / "results.json", written)
    write_jsonl(out / "answers.jsonl", answers + more)
    machine = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    write_json(out / "timing.json", {"seconds": timing} | machine)
    write_text(out / "results.md", text)
    cells.remove()
    print(text, end="")
    print(f"wrote {out}", file=sys.stderr)


def trained_parts(mole):
    """What lies beside the pool's adapters: gates, baselines, router, retriever."""
    folder = mole.folder.path if mole.folder else None
    parts = ("*.safetensors", "gates/*.safetensors", "baselines/**/*.*")
    return (
        sorted(file for part in parts for file in folder.glob(part) if file.name != "model.safetensors")
        if folder
        else []
    )


if __name__ == "__main__":
    run_script(main)
