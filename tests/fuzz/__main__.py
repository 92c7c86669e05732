"""Damages what the program reads, runs its commands, and counts what comes of it."""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


COLUMNS = """\
What may come of a case: refused (one line and status 2), same (the undamaged answer), right (that of
transformers), other (any answer will do). What is a failure: traceback, hang, escape (a control
character), silent (a wrong answer), crash (another status), untidy (not one line)."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python tests/fuzz", description=__doc__, epilog=COLUMNS)
    parser.add_argument("--seed", type=int, default=0, help="of the cases; the same seed, the same cases")
    parser.add_argument("--cases", type=int, default=200, help="how many, default 200; all kinds take turns")
    parser.add_argument("--only", type=int, help="the number of one case, whose output is shown")
    parser.add_argument("--kind", default="", help="only those of the cases whose kind has this in its name")
    parser.add_argument("--root", default=str(ROOT), help="another checkout, whose commands are run instead")
    parser.add_argument("--processes", type=int, default=2, help="how many run at a time, default 2")
    parser.add_argument("--failures", default="", help="file for the failures, default standard output")
    return parser.parse_args()


def table(counts: dict[str, Counter], seconds: Counter) -> str:
    """A row a kind: cases, and what came of them."""
    from fuzz.judge import BAD, GOOD

    columns = ["cases", *GOOD, *BAD]
    lines = ["| kind | " + " | ".join(columns) + " | s a case |", "|---" * (len(columns) + 2) + "|"]
    for kind, count in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        time = (seconds[kind] if kind in counts else seconds.total()) / max(1, count["cases"])
        cells = " | ".join(str(count[name] or "") for name in columns)
        lines.append(f"| {kind} | {cells} | {time:.2f} |")
    return "\n".join(lines)


def main() -> int:
    """Runs the cases; 1 where one failed."""
    from fuzz.cases import kind_at
    from fuzz.judge import BAD
    from fuzz.runner import Runner, describe
    from fuzz.world import write_world

    args = arguments()
    numbers = [number for number in range(args.cases) if args.kind in kind_at(number)]
    if args.only is not None:
        numbers = [args.only]
    counts = {}
    seconds = Counter()
    failed = []
    lock = threading.Lock()
    with tempfile.TemporaryDirectory() as temporary:
        world = Path(temporary) / "world"
        with contextlib.redirect_stderr(io.StringIO()):
            write_world(world)

        def work(turn):
            here = Path(temporary) / str(turn)
            here.mkdir()
            runner = Runner(world, here, args.root)
            for number in numbers[turn :: args.processes]:
                plan, done, verdict = runner.case(args.seed, number)
                with lock:
                    counts.setdefault(plan.kind, Counter()).update(["cases", verdict.what])
                    seconds[plan.kind] += done.seconds
                    if verdict.what in BAD:
                        failed.append((plan, verdict))
                if args.only is not None:
                    print(plan, done, verdict, sep="\n")
            runner.close()

        with ThreadPoolExecutor(args.processes) as workers:
            list(workers.map(work, range(args.processes)))
    lines = []
    for plan, verdict in sorted(failed, key=lambda pair: (pair[1].what, pair[0].kind, pair[0].number)):
        lines += describe(args.seed, plan, verdict)
    if args.failures:
        Path(args.failures).write_text("\n".join(lines) + "\n")
    else:
        print("\n".join(lines))
    print(table(dict(sorted(counts.items())), seconds))
    return bool(failed)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path[:1] = [str(ROOT), str(ROOT / "tests")]  # instead of this folder
    sys.exit(main())
