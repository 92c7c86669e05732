"""Dtypes by name, and the device that is meant by a name."""

import torch

from common.files import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_device(name):
    """A device's name, auto: cuda where there is one. Raises InputError where torch has no such
    device here."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.zeros(1, device=name).tolist()  # of meta there is nothing to read
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)  # graphs, timing and random numbers are the current one's
    return name
