"""How bench.py measures: rows timed in turn or in a process each, and the machine's limits."""

import contextlib
import multiprocessing
import os
import platform
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from multiprocessing import resource_tracker
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from common.devices import find_device
from common.files import InputError, warn
from evaluation.peers import PEERS, has

ENDED = "a process that was to be timed has ended; was there too little memory?"


def in_turn(
    rows: dict[str, Callable], repeats: int, before: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """{name: function} -> {name: [seconds of each repetition]}.

    Each function first runs twice uncounted. `before` is called before each repetition.
    """
    for run in (*rows.values(), *rows.values()):
        run()
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    seconds = {name: [] for name in rows}
    for _ in range(repeats):
        for name, run in random.sample(list(rows.items()), len(rows)):
            before()
            wait()
            begin = time.perf_counter()
            run()
            wait()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds."""
    if len(seconds) == 1:
        seconds = seconds * 2  # quantiles() wants two
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"ms": 1e3 * median, "low": 1e3 * low, "high": 1e3 * high}


class InSubprocess:
    """make(args) in a process of its own, so that other rows' memory use can't slow it down.

    Each call runs once there what make() returned; `results` are the values that it gave. A process
    that doesn't `wait` for its make() begins while others do; its first take() says that it is done.
    """

    def __init__(self, make: Callable, args, wait: bool = True):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        given = (theirs, make, SimpleNamespace(**vars(args)))
        self.process = context.Process(target=_child, args=given, daemon=True)
        with late_signals():
            self.process.start()
        theirs.close()  # else recv() would wait for ever for a child that has ended
        self.results = []
        if wait:
            self.take()

    def start(self, *inputs: object) -> None:
        """Begins a run with `inputs`. Raises InputError where the process has ended."""
        try:
            self.pipe.send(inputs)
        except BrokenPipeError:
            raise InputError(ENDED) from None

    def take(self) -> object:
        """Waits for what make() or a run gives. Raises InputError where the process has ended, and
        what was raised there."""
        try:
            result = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise InputError(ENDED) from None
        if isinstance(result, Exception):
            raise result
        return result

    def __call__(self, *inputs: object) -> None:
        self.start(*inputs)
        self.results.append(self.take())

    def end(self) -> None:
        """Ends the process, whatever it does, and waits until it has ended."""
        self.process.kill()
        self.process.join()


@contextlib.contextmanager
def late_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect after the block: a process that they left half started would end
    in a traceback. Processes started within never hear Ctrl-C, which is for the one that waits."""
    came = []
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, lambda number, frame: came.append(number))
    resource_tracker.ensure_running()  # the first process would start it, which clears the mask
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a process started here inherits it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in came[:1]:
        signal.raise_signal(number)


def _child(pipe, make, args):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # a normal exit releases its locks
    torch.set_num_threads(args.threads or os.cpu_count())
    try:
        find_device(args.device)  # each process has a current device of its own
        run = make(args)
        result = None
        while True:
            pipe.send(result)
            result = run(*pipe.recv())
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
    except (EOFError, BrokenPipeError):
        pass  # the other process has closed the pipe, or has ended
    except Exception as error:
        with contextlib.suppress(BrokenPipeError):
            pipe.send(error)


# The machine --------------------------------------------------------------------------------------------------------


class Limits(NamedTuple):
    """What the machine can do a second, measured in this run."""

    bytes: float  # read from memory
    flops: float  # floating-point operations


def bandwidth(dtype: torch.dtype, device: str, compiled: bool) -> float:
    """Bytes a second that the best of several kernels reads from 1 GiB, which few caches hold.

    `compiled`: torch.compile works here, so one of the kernels is compiled.
    """
    W = torch.ones(2**30 // 8192 // dtype.itemsize, 8192, dtype=dtype, device=device)
    x = W[0].clone()
    y = torch.empty(len(W), dtype=dtype, device=device)
    rows = {"sum": W.view(torch.int64).sum, "max": W.max, "mv": lambda: torch.mv(W, x, out=y)}
    if compiled:
        sums = torch.compile(lambda W, x: (W * x).sum(-1, dtype=torch.float32))
        rows["compiled"] = lambda: sums(W, x)
    return W.nbytes / min(map(min, in_turn(rows, 9).values()))


def arithmetic(dtype: torch.dtype, device: str, linear: Callable) -> float:
    """Floating-point operations a second of a large matmul, linear(x, W)."""
    a, b = torch.ones(2, 2048, 2048, dtype=dtype, device=device)
    return 2 * 2048**3 / min(in_turn({"matmul": lambda: linear(a, b)}, 9)["matmul"])


def card(args) -> dict:
    """What a figure depends on besides the code."""
    load = os.getloadavg()[0]
    if load > 0.5:
        warn(f"the machine is busy (load {load:.1f}): ratios may hold, times don't")
    on_gpu = args.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(args.device) if on_gpu else "cpu",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "load": round(load, 2),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", *PEERS) if has(name)},
    }


def processor() -> str:
    """The CPU's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    except OSError:
        pass
    return platform.processor() or platform.machine()
