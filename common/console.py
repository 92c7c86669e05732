"""The console commands of an installed checkout: nanomole-generate, nanomole-train, nanomole-eval,
nanomole-bench."""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(name):
    """main() of the repository's NAME.py, with the repository first on sys.path: another package
    that is installed may have the name of a file here, as Hugging Face's kernels has."""
    sys.path.insert(0, str(ROOT))
    files = importlib.import_module("common.files")
    files.run_script(importlib.import_module(name).main)


def generate():
    """nanomole-generate, which is generate.py."""
    run("generate")


def train():
    """nanomole-train, which is train.py."""
    run("train")


def evaluate():
    """nanomole-eval, which is eval.py."""
    run("eval")


def bench():
    """nanomole-bench, which is bench.py."""
    run("bench")
