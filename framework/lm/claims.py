"""Claims: who asks which call now, so that an equal one waits for its answer instead of being asked beside it."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from weakref import WeakValueDictionary


class Claims:
    """The calls under way, by their keys; any number of threads."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return how many calls are under way or waited for."""
        return len(self._locks)

    @contextmanager
    def of(self, keys: Sequence[str]) -> Generator[set[str]]:
        """Claim those of the keys that nobody has; where others have them all, wait for the first.

        Whoever has any must not wait for further ones: two would wait for each other.
        """
        with self._lock:
            locks = {key: self._locks.setdefault(key, threading.Lock()) for key in keys}
        mine = {key for key, lock in locks.items() if lock.acquire(blocking=False)}
        if not mine:
            locks[keys[0]].acquire()
            mine = {keys[0]}
        try:
            yield mine
        finally:
            for key in mine:
                locks[key].release()
