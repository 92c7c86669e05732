"""Dtypes by name, and the device that a name stands for."""

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
