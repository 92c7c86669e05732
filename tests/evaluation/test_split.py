"""evaluation/split.py: a pool in a process of its own changes no answer, and no process stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.files import InputError
from evaluation.split import SplitBench, bench_split, memory, processes, results
from evaluation.timed import Decoder, prompts
from helpers_commands import ENVIRONMENT, ROOT
from helpers_models import write_adapters
from helpers_terminal import heard
from methods.batch import set_methods
from methods.session import find_mole, load_weights
from model import load_llama

NAMES = ["ant", "bee", "cat", "dog", "eel"]
SIZES = {"dtype": "float32", "threads": 1, "context": 5, "tokens": 7, "batch_size": 3, "repeats": 2}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def args(small_model, tmp_path_factory):
    """Options for a pool that adapts five of a block's seven Linears."""
    folder = tmp_path_factory.mktemp("split") / "pool"
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    write_adapters(folder, load_llama(small_model), NAMES, targets=targets)
    return SplitBench(model=str(small_model), pool=str(folder), **SIZES)


def test_answers_and_bytes(args):
    """Against the methods adapter:NAME in this process. Another request's adapter, a delta of another
    Linear or a missing one gives other tokens; messages that aren't counted would look cheap."""
    mole = load_weights(find_mole(args.model, args.pool), dtype="float32")
    ids = prompts(args, 6, 5, mole.model.config.vocab_size)
    want = {"base": [], "pool": []}
    for rows, names in ((ids[:3], NAMES[:3]), (ids[3:], ["dog", "eel", "ant"])):
        for how, methods in (("base", ["base"] * 3), ("pool", [f"adapter:{name}" for name in names])):
            set_methods(mole, methods)
            want[how].append(Decoder(mole.model, rows, 7)().tolist())
    assert want["base"][0] != want["pool"][0] and want["base"][1] != want["pool"][1]
    features = sum(sum(pair) for pair in mole.pool.shapes.values())
    messages = 7 * (3 * (4 * features + 8 + 4) + 16)  # x and deltas; idx, weight; n and k
    with processes(args) as (pool, homes, sharing):
        for how in ("base", "pool", "overlapped", "pool"):
            for group in (homes, sharing):
                for base in group:
                    base.start(how)
                found = results(group, [pool])
                assert [ids for ids, _ in found] == want["base" if how == "base" else "pool"]
                size = messages if group is sharing and how != "base" else 0
                assert [sent for _, sent in found] == [size, size]
        sizes = memory(sharing, [pool])
        assert sizes["MB in all"] == pytest.approx(2 * sizes["MB a base"] + sizes["MB of the pool's process"])
        started = [pool, *homes, *sharing]
    assert not any(process.process.is_alive() for process in started)


def test_rows(args):
    """Rows of one base that are two bases', or a table without the check, would compare anything."""
    table = bench_split(args, limits=None)
    kinds = ["base", "pool at home", "pool apart", "pool apart, overlapped"]
    assert [(row["bases"], row["row"]) for row in table] == [(n, kind) for n in (1, 2) for kind in kinds]
    for row in table:
        assert row["tokens/s"] == pytest.approx(3 * row["bases"] / row["ms"] * 1e3)
        assert (row["bytes a token"] > 0) == (row["MB of the pool's process"] > 0) == ("apart" in row["row"])


@pytest.mark.parametrize("victim", ["pool", "base"])
def test_a_process_that_dies(args, victim):
    """Without it the others wait for its answer for ever."""
    with pytest.raises(InputError, match="has ended"), processes(args) as (pool, homes, sharing):
        started = [pool, *homes, *sharing]
        died = pool if victim == "pool" else sharing[1]
        begin = time.monotonic()
        while True:
            for base in sharing:
                base.start("overlapped")
            os.kill(died.process.pid, signal.SIGKILL)
            results(sharing, started)
    assert time.monotonic() - begin < 10
    assert not any(process.process.is_alive() for process in started)


def of_session(number):
    """The processes of a session that haven't ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended in this moment
            continue
        if int(session) == number and state != "Z":
            found.append(stat.parent.name)
    return found


@pytest.mark.parametrize("count", [3, 7], ids=["while they start", "all started"])
def test_ctrl_c_ends_all(args, count):
    """Without it four processes with a model each stay in memory. Two of `count` are the command and
    Python's resource tracker."""
    line = [sys.executable, str(ROOT / "bench.py"), "split", "--model", args.model, "--repeats", "999999"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        line, env=ENVIRONMENT, preexec_fn=heard, start_new_session=True, **pipes
    ) as process:
        while len(of_session(process.pid)) < count:
            time.sleep(0.01)
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            for other in of_session(process.pid) if process.poll() is None else []:
                os.kill(int(other), signal.SIGKILL)
    assert process.returncode == 130 and err.splitlines()[-1] == "interrupted" and "Traceback" not in err
    while of_session(process.pid):  # Python's resource tracker ends a moment later
        time.sleep(0.1)
