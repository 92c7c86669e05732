"""Which of several processes this is that compute together (parallel/processes.py). Else there is one."""

_place = {"rank": 0, "count": 1}


def rank() -> int:
    """The process's number, from 0."""
    return _place["rank"]


def count() -> int:
    """How many processes there are, on all machines."""
    return _place["count"]


def set_place(rank: int, count: int) -> None:
    """This process is number `rank` of `count`."""
    _place.update(rank=rank, count=count)
