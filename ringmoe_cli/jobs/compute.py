"""The one thread that does the networks' arithmetic.

OpenMP gives every thread that asks for it helpers of its own, and once there are more of them than
cores none waits awake for the next piece of work any more: a forward pass beside a main thread that
has computed anything takes twice as long. So whatever computes, loading included, comes here.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

THREAD = ThreadPoolExecutor(1, "network")
"""Started when first used; its process ends it."""


def computed(work: Callable[[], T]) -> T:
    """What some work gives, done in the computing thread; its exceptions are raised here."""
    return THREAD.submit(work).result()
