"""Items made ahead: in order, with their maker's exceptions, and left at any moment."""

import threading

import pytest

from ringmoe_cli.scene.store.ahead import ahead


def test_items_come_in_order_and_exceptions_after_them():
    def items():
        yield from range(5)
        raise ValueError("no more")

    made = ahead(items())
    assert [next(made) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="no more"):
        next(made)
    assert list(ahead(range(5), 1)) == [0, 1, 2, 3, 4]


def test_leaving_early_stops_the_thread_and_closes_the_items():
    closed = threading.Event()

    def items():
        try:
            while True:
                yield 1
        finally:
            closed.set()

    before, made = threading.active_count(), ahead(items())
    next(made)
    made.close()
    assert closed.is_set()
    assert threading.active_count() == before


def test_it_may_be_closed_in_the_thread_that_makes_its_items():
    tried, outcome = threading.Event(), []

    def items():
        yield 1
        given.wait(10)
        try:
            made.close()  # as a garbage collection that happens to run in this thread does
        except RuntimeError as error:
            outcome.append(error)
        tried.set()

    given, made = threading.Event(), ahead(items())
    next(made)
    given.set()
    assert tried.wait(10)
    assert not outcome
