"""What torchrun's processes do together: share out a step's examples, add up what they computed.

All processes run the same command and choose the same examples for a step. Each computes a share of
them, with the loss divided by the number of tokens of all. So the sum over the processes is the
gradient that one process computes. gloo adds on CPUs, NCCL on GPUs. Without torchrun nothing here
does anything.
"""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from common.devices import find_device
from common.files import InputError
from common.processes import count, rank, set_place
from common.signals import Terminated
from tasks.folders import Example, PackedExample

_members = []  # (host, process id) of each process


class ProcessDied(InputError):
    """Another process is gone, so this one can't go on."""


@contextlib.contextmanager
def joined(device: str, show_all: bool = False) -> Iterator[None]:
    """Inside, the processes that torchrun started compute together, and only the first one writes to the
    terminal, unless `show_all`. `device`: a name as in find_device(). Raises InputError."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    name = find_device(device)
    if name.startswith("cuda"):
        torch.cuda.set_device(own_gpu(name))
    store, number, several = next(dist.rendezvous("env://"))
    set_place(number, several)
    dist.init_process_group(
        "nccl" if name.startswith("cuda") else "gloo", store=store, rank=number, world_size=several
    )
    try:
        _members[:] = gathered((socket.gethostname(), os.getpid()))
        with _ending(store), contextlib.ExitStack() as stack:
            if number and not show_all:
                null = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stderr(null))
                stack.enter_context(contextlib.redirect_stdout(null))
            yield
    finally:
        dist.destroy_process_group()


def own_gpu(name: str) -> int:
    """The GPU of this process, by its number among the machine's processes. Raises InputError."""
    number = int(os.environ["LOCAL_RANK"])
    if name != "cuda":
        raise InputError(f"device is {name!r}, expected cuda: each of several processes has a GPU of its own")
    if number >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} GPUs here"
        raise InputError(f"process {number} of this machine has no GPU, there are {found}")
    return number


@contextlib.contextmanager
def _ending(store):
    """Says in `store` how this process ended, and on the terminal which others ended without saying it."""
    said = ""
    try:
        try:
            yield
        except ProcessDied:
            time.sleep(30)  # torchrun ends this one sooner; at once, it would be one more that has died
            raise
        except InputError as error:
            said = str(error)
            raise
        finally:
            store.set(f"ended/{rank()}", said)
    except Terminated:  # by torchrun: it ends those that are left when one has died
        gone = [number for number in dead() if not store.check([f"ended/{number}"])]
        here = [number for number, (host, _) in enumerate(_members) if host == socket.gethostname()]
        if gone and rank() == min(set(here) - set(gone)):  # one says it
            print(f"error: process {', '.join(map(str, gone))} died", file=sys.__stderr__, flush=True)
        raise
    except InputError:
        if rank() and said and _says_the_same(store, said):
            sys.exit(2)
        raise


def _says_the_same(store, message):
    """Whether the first process ends with the same message, within some seconds."""
    for _ in range(50):
        if store.check(["ended/0"]):
            return store.get("ended/0").decode() == message
        time.sleep(0.1)
    return False


def dead() -> list[int]:
    """Numbers of the processes on this machine that are there no more."""
    gone = []
    for number, (host, pid) in enumerate(_members):
        if host == socket.gethostname() and not _is_alive(pid):
            gone.append(number)
    return gone


def _is_alive(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:  # a zombie still has its id
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # no /proc, or not ours
        return True


@contextlib.contextmanager
def _together():
    """Around an exchange between processes. Raises ProcessDied where one of them is gone."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ProcessDied(f"another process is gone: {str(error).splitlines()[0]}") from None


def gathered(value: Any) -> list[Any]:
    """The `value` of each process, in their order."""
    if count() == 1:
        return [value]
    values = [None] * count()
    with _together():
        dist.all_gather_object(values, value)
    return values


def share_of(examples: list[Example | PackedExample]) -> list[Example | PackedExample]:
    """This process's share of a step's examples. Each example is in one share, and the shares have
    about as many tokens each."""
    shares = [[] for _ in range(count())]
    tokens = [0] * count()
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        least = tokens.index(min(tokens))
        shares[least].append(example)
        tokens[least] += len(example.ids)
    return shares[rank()]


def add_up(tensors: Iterable[torch.Tensor]) -> None:
    """Each tensor becomes its sum over the processes, in place."""
    tensors = list(tensors)
    if count() == 1 or not tensors:
        return
    total = torch.cat([tensor.flatten() for tensor in tensors])
    with _together():
        dist.all_reduce(total)
    for tensor, some in zip(tensors, total.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(some.view_as(tensor))


def add_gradients(params: Iterable[torch.Tensor]) -> None:
    """Each gradient becomes its sum over the processes. One that a process lacks counts as zero."""
    if count() == 1:
        return
    gradients = []
    for param in params:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        gradients.append(param.grad)
    add_up(gradients)


def add_values(values: dict[str, float]) -> dict[str, float]:
    """{name: sum over the processes}; a process without examples has no values."""
    total = {}
    for some in gathered(values):
        for name, value in some.items():
            total[name] = total.get(name, 0.0) + value
    return total


def check_same(what: dict[str, Any]) -> None:
    """Raises InputError, in all processes, where one has other options, data or versions than the first."""
    first, *others = gathered(what)
    for number, other in enumerate(others, 1):
        for name in sorted(first.keys() | other.keys()):
            if other.get(name) != first.get(name):
                found = f"{name} is {other.get(name)!r}, in process 0 {first.get(name)!r}"
                raise InputError(f"process {number}: {found}: start all with the same")


def wait() -> None:
    """Until all processes are here."""
    gathered(None)


def one_process(what: str) -> None:
    """Raises InputError where there are several."""
    if count() > 1:
        raise InputError(f"{what} runs in one process: leave out torchrun")


def leave() -> None:
    """Ends all processes but the first, which goes on alone."""
    if rank():
        sys.exit()
