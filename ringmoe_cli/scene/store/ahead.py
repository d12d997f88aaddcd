"""Making the next item while the last one is used."""

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """The same items, made in a thread of their own, up to `depth` before they are asked for.

    An exception there is raised here; leaving early stops the thread.
    """
    maker = Maker(items, depth)
    maker.start()
    try:
        while True:
            held = [maker.ready.get()]
            if not held[0][0]:
                break
            yield held.pop()[1]  # not kept here: whoever uses it gives its memory back
        if held[0][1] is not None:
            raise held[0][1]
    finally:
        maker.stop()


class Maker(threading.Thread, Generic[T]):
    """Puts (True, item) into a queue for every item, then (False, exception or None)."""

    def __init__(self, items: Iterable[T], depth: int) -> None:
        super().__init__(daemon=True)
        self.items = items
        self.ready: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
        self.left = threading.Event()

    def run(self) -> None:
        """Make items until there are no more, or nobody wants them."""
        try:
            for item in self.items:
                self.put(True, item)
                if self.left.is_set():
                    break
            self.put(False, None)
        except BaseException as error:  # handed over, whatever it is
            self.put(False, error)
        finally:
            getattr(self.items, "close", lambda: None)()

    def put(self, more: bool, item: Any) -> None:
        """Wait for room in the queue, unless nobody is waiting."""
        while not self.left.is_set():
            try:
                self.ready.put((more, item), timeout=0.1)
            except queue.Full:
                continue
            return

    def stop(self) -> None:
        """Nobody wants more items; wait for the one in the making."""
        self.left.set()
        if threading.current_thread() is not self:  # where garbage is collected is up to chance
            self.join()
