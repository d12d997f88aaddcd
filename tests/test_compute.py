"""Batches side by side: in order, with their errors, each on its share of the cores."""

import threading
import time
from itertools import chain

import pytest
import torch

from ringmoe_cli.jobs import compute
from ringmoe_cli.jobs.compute import (
    HANDED_BYTES,
    HANDED_SECONDS,
    Handful,
    Lanes,
    computed,
    in_order,
)


@pytest.fixture
def two_lanes(monkeypatch):
    """Two threads, however many cores there are."""
    monkeypatch.setattr(compute, "cores", lambda: 2)
    Lanes.open(2)
    yield
    monkeypatch.undo()
    Lanes.open(compute.LANES)


def test_results_come_in_the_items_order(two_lanes):
    def slow(n):
        time.sleep(0.02 * (n % 2))
        return n * n

    assert list(in_order(slow, range(9))) == [(n, n * n) for n in range(9)]


def test_two_items_are_in_work_at_once(two_lanes):
    both = threading.Barrier(2)
    assert [n for n, _ in in_order(lambda _: both.wait(10), range(4))] == [0, 1, 2, 3]


def test_every_thread_has_its_share_of_the_cores(two_lanes, monkeypatch):
    assert computed(torch.get_num_threads) == 1
    monkeypatch.setattr(compute, "cores", lambda: 6)
    Lanes.open(1)
    assert computed(torch.get_num_threads) == 6
    Lanes.open(2)
    assert computed(torch.get_num_threads) == 3


def test_an_error_comes_where_its_item_would_and_stops_the_rest(two_lanes):
    begun = []

    def fails(n):
        begun.append(n)
        if n == 1:
            raise ValueError("item 1")
        return n

    results = in_order(fails, range(100))
    assert next(results) == (0, 0)
    with pytest.raises(ValueError, match="item 1"):
        next(results)
    assert len(begun) < 6


@pytest.mark.parametrize(
    ("seconds", "size", "count"),
    [
        (0.001, HANDED_BYTES // 6, 6),
        (HANDED_SECONDS / 4, HANDED_BYTES // 6, 4),
        (1.0, 1, 1),
        (0.001, 2 * HANDED_BYTES, 1),
    ],
)
def test_a_thread_is_handed_more_batches_of_a_quick_network(seconds, size, count):
    handful, sizes = Handful(), []
    for several in handful.of(range(40)):
        sizes.append(several)
        handful.took(len(several), seconds * len(several), size * len(several))
    assert list(chain(*sizes)) == list(range(40))
    assert [len(several) for several in sizes[:2]] == [1, count]
