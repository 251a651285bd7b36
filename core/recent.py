"""What is at hand because it was asked for lately."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Values by key: the last ``most`` that were asked for, or all; what is no longer there is made anew."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of ``key``, by ``make`` where it is not there; what that raises is not kept."""
        if key in self._values:
            self._values.move_to_end(key)
        else:
            self._values[key] = make()
            while self._most is not None and len(self._values) > self._most:
                self._values.popitem(last=False)
        return self._values[key]
