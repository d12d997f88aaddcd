"""The threads that do the networks' arithmetic, side by side, each on its share of the cores.

Two batches at once, each on half of the cores, are done in four fifths of the time of one after the
other on all: operators are short, and cores that share one wait for each other at its end, above
all where reading and writing takes one of them away for a moment.

OpenMP gives every thread that asks for it helpers of its own, and once there are more of them than
cores none waits awake for the next piece of work any more: a forward pass beside a main thread that
has computed anything takes twice as long. So whatever computes, loading included, comes here.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import islice
from typing import TypeVar

from ringmoe_cli.machine import chosen_device

A = TypeVar("A")
T = TypeVar("T")

LANES = 2
"""Batches at once; each costs the memory of its activations."""
HANDED_BYTES = 8 << 20
"""Answers that a computing thread is asked for at once, at most."""
HANDED_SECONDS = 0.05
"""Work for so long is worth handing over."""


def lanes(device: str, alone: bool = False) -> int:
    """Batches that are computed at once: one on a GPU, or of a model that must work alone.

    Not a question of the cores: what decides the bits is the same everywhere.
    """
    return 1 if alone or device != "cpu" else LANES


@cache
def cores() -> int:
    """Threads that PyTorch would use; asked before they are shared out."""
    import torch

    return torch.get_num_threads()


class Lanes:
    """The threads of this process; its end ends them."""

    count = 0
    pool: ThreadPoolExecutor

    @classmethod
    def open(cls, most: int) -> None:
        """Share the cores among at most so many threads from now on."""
        import torch

        count = min(most, cores())
        if count == cls.count:
            return
        if cls.count:
            cls.pool.shutdown()
        share = cores() // count
        cls.pool = ThreadPoolExecutor(count, "network", torch.set_num_threads, (share,))
        cls.count = count

    @classmethod
    def submit(cls, work: Callable[[], T]) -> Future[T]:
        """Work for the next free thread."""
        if not cls.count:
            cls.open(LANES)
        return cls.pool.submit(work)


def computed(work: Callable[[], T]) -> T:
    """What some work gives, done in a computing thread; its exceptions are raised here."""
    return Lanes.submit(work).result()


def loaded(load: Callable[[], T], device: str, alone: bool = False) -> T:
    """A model loaded in a computing thread, after sharing the cores as it needs them.

    Args:
        load: gives the model.
        device: as the user named it.
        alone: one batch at a time, because the model is streamed or compiled.
    """
    Lanes.open(lanes(chosen_device(device), alone))
    return computed(load)


def in_order(work: Callable[[A], T], items: Iterable[A]) -> Iterator[tuple[A, T]]:
    """Every item and what the work makes of it, in the items' order, computed side by side."""
    running: deque[tuple[A, Future[T]]] = deque()
    try:
        for item in items:
            running.append((item, Lanes.submit(lambda item=item: work(item))))  # type: ignore[misc]
            if len(running) > Lanes.count:  # one waits, so that no thread does
                yield next_of(running)
        while running:
            yield next_of(running)
    finally:
        for _, future in running:
            future.cancel()


def each(work: Callable[[A], T], items: Iterable[A]) -> list[Future[T]]:
    """What some work makes of items here and now; the first exception, in its place, is the last.

    Work that was done before an exception is not lost.
    """
    outcomes: list[Future[T]] = []
    for item in items:
        outcomes.append(Future())
        try:
            outcomes[-1].set_result(work(item))
        except BaseException as error:  # raised again where the result is wanted
            outcomes[-1].set_exception(error)
            break
    return outcomes


def next_of(running: deque[tuple[A, Future[T]]]) -> tuple[A, T]:
    """The oldest item and its result, not kept here."""
    item, future = running.popleft()
    return item, future.result()


class Handful:
    """How many batches go to a computing thread at once: more of a quick network.

    Threads that wake each other for every batch take longer than such a network itself; a slow
    one gets its batches singly, as each costs memory and the last ones are shared out evenly.
    """

    def __init__(self) -> None:
        self.count = 1

    def took(self, batches: int, seconds: float, answered: int) -> None:
        """Learn from the time and the bytes of answers that so many batches took."""
        quick, small = HANDED_SECONDS / seconds, HANDED_BYTES / answered
        self.count = max(int(min(quick, small) * batches), 1)

    def of(self, batches: Iterable[A]) -> Iterator[list[A]]:
        """The same batches, in handfuls."""
        rest = iter(batches)
        while some := list(islice(rest, self.count)):
            yield some
