"""Which of torchrun's processes this is. Without torchrun there is one, the first."""

import os


def rank() -> int:
    """The process's number, from 0; torchrun sets RANK."""
    return int(os.environ.get("RANK", 0))


def count() -> int:
    """How many processes torchrun started, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))
