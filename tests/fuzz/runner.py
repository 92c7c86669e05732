"""Runs cases and judges them: a world, a server of the program that is tested, an oracle."""

import dataclasses
from pathlib import Path

from fuzz.cases import NAMES, copy_parts, make_case
from fuzz.judge import BAD, Verdict, answer, judge
from fuzz.oracle import Oracle
from fuzz.plan import KINDS, Plan
from fuzz.server import ROOT, Done, Server


class Runner:
    """Runs cases one after the other in folders of its own under `here`."""

    def __init__(self, world: Path, here: Path, root: Path | str = ROOT, oracle=None, **limits):
        self.world, self.here = world, here
        self.server = Server(root, **limits)
        self.oracle = oracle or Oracle()
        self.known = {}  # answers without damage

    def case(self, seed: int, number: int) -> tuple[Plan, Done, Verdict]:
        """Makes, runs and judges a case."""
        plan = make_case(self.world, self.here / "case", seed, number)
        done = self.server.run(plan.argv, plan.folder, plan.stdin)
        verdict = judge(plan, done, lambda: self.undamaged(plan), self.oracle)
        return plan, done, verdict

    def undamaged(self, plan: Plan) -> list:
        """The answer of a plan's command in a folder without damage."""
        key = (plan.kind, *plan.argv)
        if key not in self.known:
            folder = self.here / "undamaged"
            copy_parts(self.world, folder, KINDS[plan.kind].needs)
            done = self.server.run(plan.argv, folder, plan.stdin)
            assert done.code == 0, done
            self.known[key] = answer(dataclasses.replace(plan, folder=folder), done)
        return self.known[key]

    def close(self) -> None:
        """Ends the processes."""
        self.server.close()
        self.oracle.close()


def failures(runner: Runner, kind: str, seed: int, cases: int) -> str:
    """Runs those of the first `cases` that are of a kind. Returns what failed, how to run it alone,
    and its damage; "" where nothing did."""
    lines = []
    for number in range(NAMES.index(kind), cases, len(NAMES)):
        plan, _, verdict = runner.case(seed, number)
        if verdict.what in BAD:
            lines += describe(seed, plan, verdict)
    return "\n".join(lines)


def describe(seed: int, plan: Plan, verdict: Verdict) -> list[str]:
    """Lines on a case that failed."""
    again = f"python tests/fuzz --seed {seed} --only {plan.number}"
    lines = [
        f"{verdict.what}: {plan.kind}: {again}: {plan.damage[:300]!r}",
        f"    {' '.join(plan.argv)[:300]!r}",
    ]
    return lines + [f"    {line[:500]!r}" for line in verdict.why.split("\n")[-4:]]
