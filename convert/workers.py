"""Threads that share work, stop at the first error, and raise it where they are waited for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import Any


class Workers:
    """Threads that work through items in order; the first error stops all and is raised in the caller."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self.stopped = threading.Event()

    def each(self, items: Iterable[Any], work: Callable[[Any], None], threads: int) -> None:
        """Start `threads` threads that share the items."""
        iterator = iter(items)

        def loop() -> None:
            while not self.stopped.is_set():
                with self._lock:
                    item = next(iterator, None)
                if item is None:
                    return
                work(item)

        for _ in range(threads):
            self.start(loop)

    def start(self, work: Callable[[], None]) -> None:
        """Start one thread."""

        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                with self._lock:
                    self._error = self._error or error
                self.stopped.set()

        self._threads.append(threading.Thread(target=guarded, daemon=True))
        self._threads[-1].start()

    def join(self) -> None:
        """Wait for all; raise the first error, or KeyboardInterrupt after stopping them."""
        try:
            for thread in self._threads:
                while thread.is_alive():
                    thread.join(0.2)
        except BaseException:
            self.stopped.set()
            for thread in self._threads:
                thread.join()
            raise
        if self._error is not None:
            raise self._error


def cores() -> int:
    """Cores that this process may use; where the system does not tell, all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
