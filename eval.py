"""Scores methods on tasks and on composite prompts: one table, one JSON.

    python eval.py                                                    tiny/ on its own tasks
    python eval.py --methods base,oracle,meteora --composite 3,5,10   and several questions a prompt
    python eval.py --methods oracle,mixture,fusion,ramole --ood       no task with its own adapter
    python eval.py --model DIR --pool DIR --tasks DIR --methods base,adapter:NAME --out DIR

Every answer to the test split is generated greedily and scored by its task's metric, with a 95 %
bootstrap interval over the examples. `--against METHOD` adds the other methods' differences to it,
over the same examples. At the tokens of the held-out responses eval.py also measures how many
adapters a token in effect uses, each adapter's share of the weight, and how often the first choice
of MeteoRA's gates is the task's own adapter. For methods that retrieve it counts how often that
adapter is among the k best. Finished answers are kept in OUT/cells: the same command continues
where it stopped. Runs with equal options write the same results.json.
"""

if __name__ == "__main__":  # Ctrl-C while torch is imported, which takes seconds, ends in one line
    from common.signals import end_at_once

    end_at_once()

import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import torch

from common.endings import run_script
from common.files import InputError, read_bytes, say, write_json, write_jsonl, write_text
from common.locks import alone
from common.options import ABOVE_0, Above0, Count, Counts, NewTokens, Seed, Whole, numbers, parse_args
from common.progress import progress, track
from common.template import TemplateOptions, asked_template
from evaluation.answers import AnswerCache, answer_all, sha256
from evaluation.choose import choose_tasks, hidden_from, with_adapters
from evaluation.composites import (
    answer_composites,
    choose_temperature,
    draw_composite,
    encode_spans,
    score_composites,
)
from evaluation.paired import compare_on_composites, compare_on_tasks
from evaluation.routing import measure_routing, retrieval
from evaluation.tables import composite_table, cosines_line, mean_of, table
from methods.batch import check_name, find_method, for_task, split_methods
from methods.protocol import Gated
from methods.session import Mole, find_mole, load_weights
from pool.cosines import describe_cosines
from pool.load import TINY, read_adapters
from pool.retriever import sentence_encoder
from tasks.composites import Composite, composites
from tasks.folders import Task
from tasks.metrics import score, score_meteora, signature

Temperatures = Annotated[str, ABOVE_0]


@dataclass
class Options(TemplateOptions):
    """Options of eval.py."""

    model: str = ""  # folder or hub name ORG/NAME[@REVISION], default tiny/
    pool: str = ""  # pool or a folder of PEFT folders, default the model's own
    adapter: list[str] = field(default_factory=list)  # NAME=DIR, a PEFT folder or hub name; repeatable
    tasks: str = ""  # folder of task folders, or file of {adapter, prompt, response} lines; default tiny/'s
    only: list[str] = field(default_factory=list)  # a task to score; repeatable; default: all
    methods: str = "base,oracle,meteora"  # separated by commas; oracle: each task's own adapter
    against: str = ""  # one of the methods: the others' differences to it, with paired intervals
    composite: Counts = ""  # questions in a composite prompt, as 3,5,10: two columns each
    composites: Count = 200  # composite prompts of each size
    composite_temperature: Temperatures = "1"  # gate temperature there; 1,5,15: the best on validation
    ood: bool = False  # each task without its own adapter: how well the others do
    unseen: bool = False  # only tasks that router and retriever never saw; gates lack them, too
    retrieve: Count = 3  # adapters retrieved for a prompt (ramole, selection, fusion, logo, ...)
    encoder: str = ""  # sentence-transformers folder to retrieve with, not the base's hidden states
    top_k: Count = 2  # which gates `meteora` uses; meteora_top1, meteora_top2 name them
    gate_temperature: Above0 = 1.0  # temperature of MeteoRA's softmax over the k chosen adapters
    limit: Whole = 0  # examples a task, 0 = all
    max_new_tokens: NewTokens = 64  # tokens an answer may have
    batch_size: Count = 16  # prompts decoded together
    meteora_metrics: bool = False  # score as MeteoRA's released code did (metrics.score_meteora)
    dtype: str = "auto"  # the weights' dtype, auto = the file's
    device: str = "auto"  # auto = cuda where there is one, else cpu
    seed: Seed = 0  # seed for the bootstrap and the composites
    out: str = "out/eval"  # folder for results.json, results.md, answers.jsonl, timing.json


# Options -------------------------------------------------------------------------------------------


def check_options(args: Options) -> tuple[list[str], list[int], list[float]]:
    """-> (methods, composite sizes, composite temperatures). Raises InputError for bad values."""
    if args.ood and args.unseen or (args.composite and (args.ood or args.unseen)):
        raise InputError("--ood, --unseen and --composite exclude each other")
    if args.composite and Path(args.tasks).is_file():
        needed = "solves training examples before it asks others, and a file has no others"
        raise InputError(f"--composite {needed}: name a folder of task folders with --tasks")
    methods = split_methods(args.methods)
    if args.against and args.against not in methods:
        raise InputError(f"--against is {args.against!r}, expected one of --methods: {', '.join(methods)}")
    if args.against and args.meteora_metrics:
        raise InputError("--against needs all answers, and --meteora_metrics drops the empty ones")
    temperatures = numbers("--composite_temperature", args.composite_temperature, ABOVE_0)
    sizes = numbers("--composite", args.composite) if args.composite else []
    return methods, sizes, temperatures


# Scoring -----------------------------------------------------------------------------------------


def evaluate(
    mole: Mole, tasks: dict[str, Task], methods: list[str], cells: AnswerCache, args: Options
) -> tuple[dict, list[dict], dict[str, float]]:
    """Every method on every task -> (results, rows of answers.jsonl, seconds a method)."""
    results = {}
    rows = []
    timing = {}
    examples = sum(len(task.test) for task in tasks.values())
    score_one = score_meteora if args.meteora_metrics else score
    with progress("answers", len(methods) * examples) as bar:
        for method in methods:
            scores = {}
            seconds = 0.0
            for name, task in tasks.items():
                bar.set_postfix_str(f"{method} on {name}", refresh=False)
                cell = _answer_task(mole, method, task, cells, args)
                seconds += cell["seconds"]
                targets = [row["response"] for row in task.test]
                scores[name] = asdict(score_one(task.metric, cell["answers"], targets, args.seed))
                for row, text in zip(task.test, cell["answers"], strict=True):
                    rows.append({**row, "method": method, "task": name, "answer": text})
                bar.update(len(targets))
            timing[method] = round(seconds, 2)
            results[method] = {**mean_of(scores), "tasks": scores}
            found = cells.get(f"routing of {method}", lambda: measure_routing(mole, tasks, method, args))
            results[method] |= {key: found[key] for key in ("gates", "routing") if key in found}
    return results, rows, timing


def _answer_task(mole, method, task, cells, args):
    """{"answers", "seconds"} of a method on a task's test split, cached where it is done."""
    used = for_task(mole, method, task.name)
    prompts = [row["prompt"] for row in task.test]
    hidden = hidden_from(mole, method, task.name, args)
    return cells.get(
        f"{used} on {task.name}",
        lambda: {"answers": answer_all(mole, prompts, used, args, hidden)},
    )


def evaluate_composites(
    mole: Mole, tasks: dict[str, Task], methods: list[str], asked: dict[int, list[Composite]],
    temperatures: list[float], cells: AnswerCache, args: Options,
) -> tuple[dict, list[dict]]:  # fmt: skip
    """Every method on the composites `asked`, by size -> (results, rows of answers.jsonl). The
    ceiling runs each question and each answer through its own task's adapter. A method that knows
    one task at a time is left out."""
    results = {}
    rows = []
    for n, group in asked.items():
        results[str(n)] = {}
        answering = [method for method in methods if find_method(mole, method, args.top_k).answers_composites]
        for method in track(answering, f"composite-{n}"):
            kind = find_method(mole, method, args.top_k)
            search = len(temperatures) > 1 and kind.has_temperature
            temperature = temperatures[0]
            if search:
                temperature = _best_temperature(mole, tasks, method, n, temperatures, cells, args)
            cell = cells.get(
                f"{method} on composite-{n}",
                lambda: {"answers": answer_composites(mole, group, method, temperature, args)},
            )
            texts = cell["answers"]
            scores = results[str(n)][method] = score_composites(group, texts, tasks, args)
            if search:
                scores["temperature"] = temperature
            if isinstance(kind, Gated):
                picture = draw_composite(mole, group[0], method, temperature, args)
                file = f"composite-{n}-{method.replace(':', '-')}.svg"  # Windows refuses a colon
                write_text(Path(args.out) / file, picture)
            for composite, text in zip(group, texts, strict=True):
                responses = [[name, row["response"]] for name, row in composite.questions]
                row = {"method": method, "composite": n, "prompt": composite.prompt, "answer": text}
                rows.append(row | {"responses": responses})
    return results, rows


def _best_temperature(mole, tasks, method, n, temperatures, cells, args):
    """The gate temperature that does best on composites of `n` training questions."""
    count = max(1, args.composites // 4)
    trial = composites(tasks, n, count, mole.template, args.seed, split="train")
    cell = cells.get(
        f"temperature of {method} on composite-{n}",
        lambda: {"best": choose_temperature(mole, trial, method, tasks, temperatures, args)},
    )
    return cell["best"]


def describe_run(mole: Mole, tasks: dict[str, Task], args: Options) -> dict:
    """All that the results depend on: base, adapters, trained parts, tasks, options, versions."""
    adapters = {}
    for name in mole.pool.names if mole.pool else ():
        adapters[name] = mole.pool.members[name].hash
    parts = {}
    for file in trained_parts(mole):
        parts[str(file.relative_to(mole.folder.path))] = sha256(read_bytes(file))
    examples = {}
    metrics = {}
    for name, task in tasks.items():
        examples[name] = sha256(repr((task.train, task.test)).encode())
        metrics[task.metric] = signature(task.metric)
    options = asdict(args)
    del options["out"]
    return {
        "base": mole.model.fingerprint(),
        "template": mole.template,
        "adapters": adapters,
        "parts": parts,
        "tasks": examples,
        "options": options,
        "metrics": dict(sorted(metrics.items())),
        "torch": torch.__version__,
    }


def trained_parts(mole: Mole) -> list[Path]:
    """What lies beside the pool's adapters: gates, baselines, router, retriever."""
    files = []
    if mole.folder:
        for pattern in ("*.safetensors", "gates/*.safetensors", "baselines/**/*.*"):
            files += mole.folder.path.glob(pattern)
    return sorted(file for file in files if file.name != "model.safetensors")


def main() -> None:
    """The command: scores methods on tasks and composites, writes results and tables."""
    args = parse_args(Options, description="Score methods of choosing adapters on tasks.")
    methods, sizes, temperatures = check_options(args)
    with alone(args.out):
        run(args, methods, sizes, temperatures)


def run(args: Options, methods: list[str], sizes: list[int], temperatures: list[float]) -> None:
    """Scores `methods` on tasks and on composites of `sizes` questions; writes OUT."""
    embed = sentence_encoder(args.encoder) if args.encoder else None
    folders = (args.model or TINY, args.pool or None, read_adapters(args.adapter))
    mole = find_mole(*folders, asked_template(args))  # what is wrong is refused before weights are read
    mole.embed = embed
    say(f"template: {mole.template!r} ({mole.template_from})")
    tasks = choose_tasks(mole, args)
    kinds = {}
    checked = []
    for method in methods:
        kinds[method] = find_method(mole, method, args.top_k)
        if args.ood and kinds[method].has_task_adapter:
            raise InputError(f"--ood: {method} has no adapter of a task that it could do without")
        checked += [check_name(mole, for_task(mole, method, name), args.top_k) for name in tasks]
    asked = {n: composites(tasks, n, args.composites, mole.template, args.seed) for n in sizes}
    load_weights(mole, args.dtype, args.device)
    for method in checked:
        method.check_adapters(mole)
    meta = describe_run(mole, tasks, args)
    for group in asked.values():
        for composite in group:
            encode_spans(mole, composite)  # refuses a prompt that doesn't fit before hours of work
    cells = AnswerCache(args.out, meta)
    results, rows, timing = evaluate(mole, tasks, methods, cells, args)
    on_composites, composite_rows = evaluate_composites(
        mole, tasks, methods, asked, temperatures, cells, args
    )
    ceiling = next((method for method, kind in kinds.items() if kind.is_ceiling), None)
    setting = "ood" if args.ood else "unseen" if args.unseen else "iid"
    written = {"setting": setting, "methods": results, "composite": on_composites, "meta": meta}
    against = {}
    if args.against:
        against = {"method": args.against}
        against["tasks"] = compare_on_tasks(rows, tasks, args.against, args.seed)
        against["composite"] = compare_on_composites(composite_rows, asked, tasks, args.against, args.seed)
        written["against"] = against
    text = table(results, tasks, ceiling, against)
    if mole.pool and (alike := describe_cosines(mole.pool)):
        written["cosines"] = alike
        text += cosines_line(alike)
    if on_composites:
        text += "\n" + composite_table(results, on_composites, against)
    if not args.ood and any(kind.retrieves == "by text" for kind in kinds.values()):
        written["retrieval"] = found = retrieval(mole, with_adapters(mole, tasks))
        shares = ", ".join(f"top-{k} {found[k]:.1f}" for k in found if k != "n")
        text += f"\nretrieved: the task's own adapter, % of {found['n']} prompts: {shares}\n"
    out = Path(args.out)
    write_json(out / "results.json", written)
    write_jsonl(out / "answers.jsonl", rows + composite_rows)
    machine = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    write_json(out / "timing.json", {"seconds": timing, "machine": machine, "threads": threads})
    write_text(out / "results.md", text)
    cells.remove()
    print(text, end="")
    say(f"wrote {out}")


if __name__ == "__main__":
    run_script(main)
