"""Which adapter leaves its slot for another: the least recently used (LRU) of those that can."""

from collections import OrderedDict
from collections.abc import Callable, Iterator


class Recency:
    """Names in the order in which they were last needed, the least recently used first."""

    def __init__(self):
        self._names = OrderedDict()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def need(self, name: str) -> None:
        """`name` is needed now: it moves to the end."""
        self._names[name] = None
        self._names.move_to_end(name)

    def leaver(self, can_leave: Callable[[str], bool] = lambda name: True) -> str:
        """The first name that can leave. Raises StopIteration where none can."""
        return next(filter(can_leave, self._names))

    def forget(self, name: str) -> None:
        """`name` has left its slot."""
        del self._names[name]
