"""Console commands of an installed checkout: nanomole-generate, -train, -eval and -bench."""

import importlib
import sys
from pathlib import Path

from common.signals import end_at_once

ROOT = Path(__file__).resolve().parent.parent


def run(name: str) -> None:
    """Runs main() of the repository's NAME.py.

    The repository comes first on sys.path, because an installed package may have the name of a file
    here, as Hugging Face's kernels has.
    """
    end_at_once()  # Ctrl-C while torch is imported ends in one line
    sys.path.insert(0, str(ROOT))
    endings = importlib.import_module("common.endings")
    endings.run_script(importlib.import_module(name).main)


def generate() -> None:
    """nanomole-generate runs generate.py."""
    run("generate")


def train() -> None:
    """nanomole-train runs train.py."""
    run("train")


def evaluate() -> None:
    """nanomole-eval runs eval.py."""
    run("eval")


def bench() -> None:
    """nanomole-bench runs bench.py."""
    run("bench")
