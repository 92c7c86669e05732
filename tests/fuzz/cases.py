"""Cases by number: case (seed, number) is always the same command in the same damaged folder."""

import random
import shutil
from pathlib import Path

import fuzz.kinds_model
import fuzz.kinds_options
import fuzz.kinds_pool
import fuzz.kinds_runs  # noqa: F401 (each of these registers its kinds)
from fuzz.plan import KINDS, Plan

NAMES = list(KINDS)


def kinds_of(*modules: str) -> list[str]:
    """The kinds that these files of tests/fuzz/ make."""
    return [name for name in NAMES if KINDS[name].make.__module__.removeprefix("fuzz.") in modules]


def kind_at(number: int) -> str:
    """The kind of case `number`: all kinds take turns."""
    return NAMES[number % len(NAMES)]


def copy_parts(world: Path, folder: Path, needs: tuple[str, ...]) -> None:
    """A fresh folder with copies of parts of the world."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in needs:
        shutil.copytree(world / name, folder / name, copy_function=shutil.copyfile)
    for file in world.iterdir():
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def make_case(world: Path, folder: Path, seed: int, number: int) -> Plan:
    """Writes the folder of case (seed, number); returns what is to be run there."""
    name = kind_at(number)
    kind = KINDS[name]
    copy_parts(world, folder, kind.needs)
    plan = kind.make(random.Random(f"{seed}/{number}"), folder)
    plan.kind, plan.number, plan.folder = name, number, folder
    return plan
