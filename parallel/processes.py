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

from common.files import InputError
from common.processes import count, rank
from common.signals import Terminated
from tasks.folders import Example, PackedExample

_members = []  # (host, process id) of each process


class ProcessDied(InputError):
    """Another process is gone, so this one can't go on."""


@contextlib.contextmanager
def joined(device: str, show_all: bool = False) -> Iterator[None]:
    """Inside, this process computes with the others, and only the first one writes to the terminal,
    unless `show_all`. `device`: a name as in find_device()."""
    if count() == 1:
        yield
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        _members[:] = gathered((socket.gethostname(), os.getpid()))
        with contextlib.ExitStack() as stack:
            if rank() and not show_all:
                null = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stderr(null))
                stack.enter_context(contextlib.redirect_stdout(null))
            yield
    except Terminated:  # by torchrun: it ends the processes that are left when one has died
        name_dead()
        raise
    except ProcessDied:
        name_dead()
        time.sleep(30)  # torchrun ends this one sooner; at once, it would be one more that has died
        raise
    finally:
        dist.destroy_process_group()


def name_dead() -> None:
    """One line with the processes that died. The first of those that are left says it."""
    gone = dead()
    left = sorted(set(range(count())) - set(gone))
    if gone and rank() == left[0]:
        print(f"error: process {', '.join(map(str, gone))} died", file=sys.__stderr__, flush=True)


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
        with open(f"/proc/{pid}/stat") as file:  # a process that nobody has waited for is still there
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
    """The same for gradients. One that a process lacks counts as zero."""
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
