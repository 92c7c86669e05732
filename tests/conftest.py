"""Fixtures and options that all tests share."""

import os
import re

import pytest

from helpers_commands import ENVIRONMENT
from helpers_models import tokenizer_bytes, write_llama
from model import load_llama
from pool.load import make_fast

pytest.register_assert_rewrite("helpers_kernels", "helpers_training")

QUICK = ("tests/core/", "tests/methods/test_identities.py", "tests/house/test_readme.py")


def pytest_addoption(parser):
    parser.addoption(
        "--real_model", help="folder of a real Llama with its tokenizer, for the tests marked real"
    )


def pytest_configure(config):
    """All tests but those of a GPU are the CPU's, on every machine."""
    if not re.search(r"(?<!not )\bcuda", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ENVIRONMENT["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks as quick what tells in under a minute whether an installation works: the idea against
    its oracles, what all methods share, what the README shows."""
    longer = {"slow", "real", "dist", "cuda", "browser"}
    for item in items:
        name = item.nodeid.partition("::")[0]
        if name.startswith(QUICK) and not longer & {mark.name for mark in item.iter_markers()}:
            item.add_marker("quick")


@pytest.fixture
def real_model(request):
    """The folder given as --real_model; asking for real tests without one is an error, not a skip."""
    folder = request.config.getoption("--real_model")
    assert folder, "tests marked real need --real_model DIR"
    return folder


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """A random small Llama with a sentencepiece tokenizer: a whole model folder. Don't write into
    it."""
    folder = write_llama(tmp_path_factory.mktemp("small") / "small")
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes())
    return folder


@pytest.fixture(params=["plain", "fast"])
def plain_or_fast(small_model, request):
    """small_model as it is read and as it is used; without fast/ the plain one twice."""
    model = load_llama(small_model)
    return make_fast(model) if request.param == "fast" else model


@pytest.fixture(scope="session")
def pool_with_every_part(small_model, tmp_path_factory):
    """A pool folder over small_model with the parts for every method. Don't write into it."""
    from helpers_methods import write_every_part

    return write_every_part(tmp_path_factory.mktemp("methods"), small_model)


@pytest.fixture(scope="session")
def trained(small_model, tmp_path_factory):
    """The options of a run of train.py adapters over two small tasks, both learned. Adds to its
    pool only."""
    from helpers_training import options, run

    o = options(
        "adapters", small_model, tmp_path_factory.mktemp("trained") / "out", steps=40, r=5, dropout=0.1
    )
    run(o)
    return o
