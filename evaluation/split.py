"""`bench.py split`: what it costs and what it saves to hold the pool in a process of its own.

InfiniLoRA (arXiv 2604.07173) takes the adapters out of the processes that hold a base and its KV
cache, so that several of these share one pool. Here each wrapped Linear sends its x to the process
of the pool, and adds what comes back:

    y = W x + delta,   delta = sum over the k adapters of  weight_j * scale_j * B_j A_j x

`overlapped` computes W x while the pool's process computes delta. Which adapters a token uses is
sent once a forward. The processes are ranks of torch.distributed: rank 0 has the pool, each other
rank a base. They talk through gloo on the loopback interface. They are compared with bases that have
a pool of their own, in further processes. Nothing is compiled: no graph can wait for a message.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.devices import DTYPES
from common.files import InputError
from common.llama_folder import read_config, without_init
from common.options import BatchSize, Count, Whole
from evaluation.bench_options import Bench
from evaluation.measure import ENDED, InSubprocess, Limits, in_turn, late_signals, spread
from evaluation.timed import Decoder, prompts, random_adapters
from kernels import lora_mix
from model import Llama, LlamaConfig
from moe_lora import Mixture, SampleGate, attach, fixed_rows, swap
from pool.adapters import linear_shapes
from pool.folder import read_pool
from pool.load import load_base
from pool.slots import Pool

BASES = (1, 2)  # how many bases decode at the same time; each number has its own rows
HOST = "127.0.0.1"
FOREVER = timedelta(days=1)  # no timeout is needed: a process that ends closes its connections


@dataclass
class SplitBench(Bench):
    """Options of `bench.py split`."""

    device: str = "cpu"  # cpu alone, as gloo sends from its memory
    threads: Whole = 1  # CPU threads of each process, 0 = one a core
    model: str = ""  # folder or hub name ORG/NAME[@REVISION], default tiny/
    pool: str = ""  # pool folder; default: random adapters
    tasks: str = ""  # task folders whose prompts are used; default: random tokens
    e: Count = 28  # random adapters in the pool
    context: Count = 64  # tokens of the prompt
    tokens: Count = 16  # tokens decoded in a repetition
    batch_size: BatchSize = 4  # requests that a base decodes together, each with its own adapter


def bench_split(args: SplitBench, limits: Callable[[], Limits]) -> list[dict]:
    """A row for each number of bases and place of the pool: milliseconds a step, bytes sent and received
    a token, private memory of the processes.

    Raises InputError where a process has ended, and where greedy tokens aren't those of the pool at home.
    """
    if args.device != "cpu":
        raise InputError(f"--device is {args.device!r}, expected cpu: gloo sends from its memory")
    if args.pool:
        read_pool(args.pool)  # raises for a wrong name before anything is loaded
    with processes(args) as (pool, homes, sharing):
        kinds = {
            "base": (sharing, "base"), "pool at home": (homes, "pool"),
            "pool apart": (sharing, "pool"), "pool apart, overlapped": (sharing, "overlapped"),
        }  # fmt: skip
        answers = {}  # {row: [(ids, bytes) of each base]}

        def run(row, bases, how):
            for base in bases:
                base.start(how)
            answers[row] = results(bases, others=[pool, *homes, *sharing])

        rows = {}
        for count in BASES:
            for kind, (group, how) in kinds.items():
                rows[count, kind] = partial(run, (count, kind), group[:count], how)
        table = []
        for (count, kind), times in in_turn(rows, args.repeats).items():
            requests = count * args.batch_size
            step = spread([seconds / args.tokens for seconds in times])
            row = {"row": kind, "bases": count, **step, "tokens/s": requests / step["ms"] * 1e3}
            row["bytes a token"] = sum(size for _, size in answers[count, kind]) // (requests * args.tokens)
            apart = kind.startswith("pool apart")
            row |= memory(kinds[kind][0][:count], [pool] if apart else [])
            table.append(row)
            home = answers[count, "pool at home"]
            if apart and [ids for ids, _ in answers[count, kind]] != [ids for ids, _ in home]:
                raise InputError(f"{kind}: its greedy tokens are not those of the pool at home")
    return table


def memory(bases: list[InSubprocess], pools: list[InSubprocess]) -> dict[str, float]:
    """Private memory in MB, which no other process shares; {} where the system doesn't tell it."""
    sizes = [list(map(private_bytes, group)) for group in (bases, pools)]
    if None in sizes[0] + sizes[1]:
        return {}
    of_bases, of_pools = (sum(group) / 1e6 for group in sizes)
    named = {"MB a base": of_bases / len(bases), "MB of the pool's process": of_pools}
    return named | {"MB in all": of_bases + of_pools}


def private_bytes(process: InSubprocess) -> int | None:
    """The bytes of a process that it shares with no other; None where the system isn't Linux."""
    try:
        lines = Path(f"/proc/{process.process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


# The processes --------------------------------------------------------------------------------------


@contextlib.contextmanager
def processes(args: SplitBench) -> Iterator[tuple[InSubprocess, list[InSubprocess], list[InSubprocess]]]:
    """Yields (the pool's process, those of bases with a pool of their own, those of bases that share the
    pool's process). Ends all of them afterwards, also after an error."""
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)  # at a free port
    makes = [partial(pool_process, port=store.port)]
    for port in (None, store.port):
        makes += [partial(base_process, port=port, number=number) for number in range(max(BASES))]
    started = []
    try:
        with late_signals():  # so that no process starts without being in `started`
            for make in makes:
                started.append(InSubprocess(make, args, wait=False))
        results(started)
        yield started[0], started[1 : 1 + max(BASES)], started[1 + max(BASES) :]
    finally:
        for process in started:
            process.end()


def results(running: list[InSubprocess], others: list[InSubprocess] = ()) -> list:
    """Waits for all the `running` processes -> what each gives. Raises InputError as soon as one of them,
    or of the `others`, has ended."""
    given = {}
    while len(given) < len(running):
        pipes = {process.pipe: process for process in (*running, *others) if process not in given}
        for pipe in wait(list(pipes)):
            given[pipes[pipe]] = pipes[pipe].take()
    return [given[process] for process in running]


def join(rank: int, port: int) -> None:
    """Makes this process a rank; `port` is that of the store of the process that has started it."""
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    os.environ["GLOO_SOCKET_IFNAME"] = loopback[0]
    store = dist.TCPStore(HOST, port, is_master=False)
    size = 1 + max(BASES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=FOREVER)


def load_adapters(args: SplitBench, shapes: dict[str, tuple[int, int]]) -> Pool:
    """The pool of --pool, or of random adapters."""
    dtype = DTYPES[args.dtype]
    if args.pool:
        return Pool.load(read_pool(args.pool).adapters, shapes, dtype)
    return Pool.of(random_adapters(args, args.e, shapes), shapes, dtype)


# The process of the pool ----------------------------------------------------------------------------


def pool_process(args: SplitBench, port: int) -> None:
    """Loads the pool, without the base's weights, and starts a thread that computes deltas for each base."""
    join(0, port)
    with torch.device("meta"), without_init():
        shapes = linear_shapes(Llama(LlamaConfig(**read_config(args.model))))
    pool = load_adapters(args, shapes)
    facts = SimpleNamespace(paths=list(pool.A), slots={name: pool.slot(name) for name in pool.names})
    dist.broadcast_object_list([facts], 0)
    for base in range(1, 1 + max(BASES)):
        threading.Thread(target=compute_deltas, args=(pool, base), daemon=True).start()


@torch.inference_mode()
def compute_deltas(pool: Pool, base: int) -> None:
    """Answers each forward of the rank `base`. Ends this process when that rank has ended."""

    def receive(*shape, dtype):
        y = torch.empty(shape, dtype=dtype)
        dist.recv(y, base)
        return y

    try:
        while True:
            n, k = receive(2, dtype=torch.int64).tolist()
            idx = receive(n, k, dtype=torch.int64)
            weight = receive(n, k, dtype=torch.float32)
            for path, A in pool.A.items():
                x = receive(n, A.shape[2], dtype=A.dtype)
                dist.send(lora_mix(x, A, pool.B[path], pool.scale[path], idx, weight), base)
    finally:
        os._exit(1)


# The process of a base ------------------------------------------------------------------------------


def base_process(args: SplitBench, port: int | None, number: int) -> Callable[[str], tuple[list, int]]:
    """A base that decodes -> a function run("base"), run("pool") or run("overlapped"), which returns
    (token ids of each row, bytes sent and received).

    With `port` the base shares the pool's process. Without it, it has a pool of its own. `number` says
    which base it is: each decodes other requests.
    """
    if port:
        join(1 + number, port)
    model = load_base(args.model, args.dtype, args.device, fast=False)
    b = args.batch_size
    rows = slice(number * b, (number + 1) * b)
    ids = prompts(args, max(BASES) * b, args.context, model.config.vocab_size)[rows]
    decoders = {"base": Decoder(model, ids, args.tokens)}
    if port:
        link = Link()
        pool = link.pool_there()
        make = partial(RemoteLinear, link)
    else:
        link = SimpleNamespace(size=0)
        pool = load_adapters(args, linear_shapes(model))
        make = None
    names = pool.names
    gate = SampleGate()
    gate.set(*fixed_rows(pool, [{names[j % len(names)]: 1.0} for j in range(rows.start, rows.stop)]))
    linears = attach(model, pool, gate, make=make)
    decoders["pool"] = decoders["overlapped"] = Decoder(model, ids, args.tokens)

    def run(how):
        for path, linear in linears.items():
            swap(model, path, linear.base if how == "base" else linear)
        link.overlap = how == "overlapped"
        link.size = 0
        return decoders[how]().tolist(), link.size

    return run


class Link:
    """A base's connection to the process of the pool. `size`: bytes sent and received."""

    def __init__(self):
        self.overlap = False
        self.size = 0
        self.linears = 0  # number of Linears wrapped so far
        self.next = 0  # the Linear whose turn it is

    def pool_there(self) -> SimpleNamespace:
        """What attach() and fixed_rows() need to know of the pool there: paths, names and slots."""
        received = [None]
        dist.broadcast_object_list(received, 0)
        facts = received[0]
        none = dict.fromkeys(facts.paths)
        return SimpleNamespace(A=none, B=none, scale=none, names=list(facts.slots), slot=facts.slots.get)

    def begin(self, mixture: Mixture) -> None:
        """Sends which adapters the tokens use; called before the first Linear of a forward."""
        self.send(torch.tensor(mixture.idx.shape))
        self.send(mixture.idx)
        self.send(mixture.weight)

    def ask(self, number: int, x: Tensor, delta: Tensor) -> Callable[[], None]:
        """Sends x (n, i) of Linear `number`. Returns a function that waits until delta (n, o) has been
        received. Raises ValueError for a Linear whose turn it isn't."""
        if number != self.next:
            raise ValueError(f"Linear {number} runs, and the process of the pool expects {self.next}")
        self.next = (number + 1) % self.linears
        with needs_the_pool():
            pending = dist.irecv(delta, 0)
        self.send(x)
        self.size += delta.nbytes

        def finish():
            with needs_the_pool():
                pending.wait()

        return finish

    def send(self, y: Tensor) -> None:
        """Sends y. Raises InputError where the process of the pool has ended."""
        self.size += y.nbytes
        with needs_the_pool():
            dist.send(y.contiguous(), 0)


@contextlib.contextmanager
def needs_the_pool() -> Iterator[None]:
    """Makes one line of gloo's error where a connection is closed. Raises InputError."""
    try:
        yield
    except RuntimeError:
        raise InputError(ENDED) from None


class RemoteLinear(nn.Module):
    """A Linear plus what the process of the pool computes for it: (n, i) -> (n, o)."""

    def __init__(self, link: Link, base: nn.Linear, A, B, scale, gate: SampleGate, token_rows, *options):
        super().__init__()
        self.link = link
        self.base = base
        self.gate = gate
        self.token_rows = token_rows
        self.number = link.linears
        link.linears += 1

    def forward(self, x: Tensor) -> Tensor:
        """x (n, i) -> (n, o)."""
        link = self.link
        if self.number == 0:
            link.begin(self.gate.fixed(self.token_rows.sample))
        delta = x.new_empty(len(x), self.base.out_features)
        finish = link.ask(self.number, x, delta)
        if not link.overlap:
            finish()
        y = self.base(x)
        if link.overlap:
            finish()
        return y + delta
