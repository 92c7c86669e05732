"""Dtypes by name, the device that a name stands for, and its memory."""

import os

import torch

from common.files import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_device(name: str) -> str:
    """The device's name; auto is cuda where there is one. Raises InputError if torch has none."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.zeros(1, device=name).tolist()  # fails on the meta device, which holds no values
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)  # CUDA graphs, timing and RNG use the current device
    return name


def memory_of(device: str | torch.device) -> int:
    """How many bytes of memory a GPU has; for any other device: the machine."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(what: str, size: int, device: str | torch.device | None = None) -> None:
    """Raises InputError, before anything is allocated, where `what` needs `size` bytes and the
    device has fewer; None is the CPU."""
    device = torch.device(device or "cpu")
    has = memory_of(device)
    if size > has:
        whose = "this GPU" if device.type == "cuda" else "this machine"
        gib = f"{size / 2**30:,.1f} GiB of memory, {whose} has {has / 2**30:,.1f}"
        raise InputError(f"{what} need {gib}")
