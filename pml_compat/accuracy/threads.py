"""Work in several threads, each of which multiplies for itself.

torch multiplies with threads of its own, which after each product wait for the next at full speed: for loops of ours in
between no core would be free. So torch has one thread for as long as ours are at work.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_lock = threading.Lock()
_users = 0
_before = 1  # torch's threads, before the first user came


def thread_count() -> int:
    """Return how many threads torch has, when nobody is at work here."""
    return _before if _users else torch.get_num_threads()


def in_threads(work: Callable[[Item], Result], items: Iterable[Item], count: int) -> Iterator[Result]:
    """Yield what ``work`` gives for each of the items, in their order, from as many threads.

    Items are taken in the caller's thread, one more at a time than there are threads.
    """
    if count == 1:
        yield from map(work, items)
        return
    left = iter(items)
    at_work: deque[Future[Result]] = deque()
    with _one_thread_a_product(), ThreadPoolExecutor(count) as pool:
        try:
            at_work.extend(pool.submit(work, item) for item in itertools.islice(left, count + 1))
            while at_work:
                result = at_work.popleft().result()
                at_work.extend(pool.submit(work, item) for item in itertools.islice(left, 1))
                yield result
        finally:
            for one in at_work:
                one.cancel()


@contextmanager
def _one_thread_a_product() -> Iterator[None]:
    """Let torch multiply in the thread that asks; several may ask for it at a time."""
    global _users, _before
    with _lock:
        if not _users:
            _before = torch.get_num_threads()
            torch.set_num_threads(1)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users and torch.get_num_threads() == 1:  # or the user has set another number meanwhile
                torch.set_num_threads(_before)
