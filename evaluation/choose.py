"""Which tasks eval.py scores, and which adapters it hides from a method meanwhile."""

from collections.abc import Iterable
from pathlib import Path

from common.files import InputError
from common.tensors import read_metadata
from methods.batch import find_method
from methods.session import Mole
from pool.folder import check_twice
from tasks import tiny as tiny_tasks
from tasks.folders import Task, load_tasks


def tiny_test_tasks(names: Iterable[str], n: int = 100) -> dict[str, Task]:
    """The embedded tasks, generated on the spot: `n` test examples and `n` training examples."""
    tasks = {}
    for name in names:
        train = tiny_tasks.examples(name, "train", n)
        tasks[name] = Task(name, "exact_match", train, tiny_tasks.examples(name, "test", n))
    return tasks


def hidden_from(mole: Mole, method: str, name: str, args) -> tuple[str, ...]:
    """The adapters that `method` may not use on task `name`: with --ood the task's own; with
    --unseen, for methods trained on a fixed pool, those of all unseen tasks."""
    found = find_method(mole, method, args.top_k)
    if args.ood and name in mole.pool.members and not found.is_ceiling:
        return (name,)
    if args.unseen and found.trained_on_pool:
        return tuple(sorted(mole.pool.members.keys() - seen_tasks(mole)))
    return ()


def seen_tasks(mole: Mole) -> set[str]:
    """The tasks that the pool's router and retriever were trained on. Raises InputError where the
    pool has neither, and where one of them lists a task twice."""
    files = []
    if mole.folder:
        folder = mole.folder.path
        files = [folder / "router.safetensors", folder / "retriever.safetensors"]
    files = list(filter(Path.exists, files))
    if not files:
        raise InputError("--unseen: the pool has neither router.safetensors nor retriever.safetensors")
    seen = set()
    for file in files:
        tasks = read_metadata(file).get("tasks", "").split("\n")
        check_twice(file, tasks)
        seen.update(tasks)
    return seen


def with_adapters(mole: Mole, tasks: dict[str, Task]) -> dict[str, Task]:
    """Those of `tasks` that the pool has an adapter for."""
    members = mole.pool.members if mole.pool else {}
    return {name: task for name, task in tasks.items() if name in members}


def choose_tasks(mole: Mole, args) -> dict[str, Task]:
    """{name: Task} to score: --only's tasks, by default those that the pool has an adapter for."""
    adapters = mole.pool.names if mole.pool else []
    if args.tasks:
        tasks = load_tasks(args.tasks, args.only or adapters, () if args.only else adapters)
    else:
        wanted = args.only or [name for name in adapters if name in tiny_tasks.TASKS]
        for name in wanted:
            if name not in tiny_tasks.TASKS:
                raise InputError(f"no embedded task {name!r}: name a folder with --tasks")
        tasks = tiny_test_tasks(wanted)
    if not tasks:
        hint = "no adapter of the pool has the name of a task; name some with --only"
        raise InputError(f"nothing to evaluate: {hint}")
    if args.unseen:
        seen = seen_tasks(mole)
        tasks = {name: task for name, task in tasks.items() if name not in seen}
        if not tasks:
            hint = "train.py router --share 0.4"
            raise InputError(f"--unseen: router and retriever have seen every task: {hint}")
    for task in tasks.values():
        task.test = task.test[: args.limit or None]
        if not task.test:
            raise InputError(f"task {task.name}: test.jsonl holds no example")
    return tasks
