"""The order of pages in postcopy: every page once, who waits first, neighbours next."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimig.guest import PageBitmap
from trimig.policy.postcopy import PageOrder, Run


def bitmap(text: str) -> PageBitmap:
    return np.array([c == "x" for c in text], np.bool_)


def urgent(block: int, first: int, count: int) -> Run:
    return Run(block=block, first=first, count=count, urgent=True)


def background(block: int, first: int, count: int) -> Run:
    return Run(block=block, first=first, count=count, urgent=False)


def drain(order: PageOrder, limit: int = 100) -> list[Run]:
    runs = []
    while (run := order.next_run(limit)) is not None:
        runs.append(run)
    assert order.remaining == 0
    return runs


def test_without_requests_the_blocks_in_their_order() -> None:
    order = PageOrder([bitmap("xx.x"), bitmap("...."), bitmap("..xx")])
    assert order.remaining == 5
    assert drain(order) == [background(0, 0, 2), background(0, 3, 1), background(2, 2, 2)]


def test_nothing_to_send() -> None:
    assert PageOrder([bitmap("..")]).next_run(1) is None
    assert PageOrder([]).next_run(1) is None


def test_a_request_goes_first_and_its_neighbours_next() -> None:
    """F16, O: what was before it comes last."""
    order = PageOrder([bitmap("x" * 10)])
    assert order.next_run(2) == background(0, 0, 2)
    assert order.request(0, 6, 1)
    assert order.urgent
    assert order.next_run(2) == urgent(0, 6, 1)
    assert drain(order, 2) == [background(0, 7, 2), background(0, 9, 1), background(0, 2, 2), background(0, 4, 2)]


def test_requests_in_the_order_they_came() -> None:
    order = PageOrder([bitmap("xxxx"), bitmap("xxxx")])
    order.request(1, 2, 1)
    order.request(0, 3, 1)
    order.request(1, 0, 1)
    assert [order.next_run(4) for _ in range(3)] == [urgent(1, 2, 1), urgent(0, 3, 1), urgent(1, 0, 1)]


def test_a_request_with_holes_of_what_was_sent() -> None:
    order = PageOrder([bitmap("x..x.x")])
    assert order.request(0, 0, 6)
    assert [order.next_run(4) for _ in range(3)] == [urgent(0, 0, 1), urgent(0, 3, 1), urgent(0, 5, 1)]
    assert order.next_run(4) is None


def test_a_long_request_goes_in_pieces() -> None:
    order = PageOrder([bitmap("xxxxx")])
    order.request(0, 0, 5)
    assert [order.next_run(2) for _ in range(3)] == [urgent(0, 0, 2), urgent(0, 2, 2), urgent(0, 4, 1)]


def test_what_was_sent_or_asked_for_is_no_news() -> None:
    order = PageOrder([bitmap("xx.x")])
    assert not order.request(0, 2, 1)
    assert order.request(0, 3, 1)
    assert not order.request(0, 3, 1)
    assert order.next_run(1) == urgent(0, 3, 1)
    assert not order.request(0, 3, 1)
    assert not order.urgent


def test_a_flood_of_requests_does_not_make_the_queue_longer_than_there_are_pages() -> None:
    order = PageOrder([bitmap("x" * 50)])
    news = sum(order.request(0, first, count) for count in (1, 2, 3, 5, 10) for first in range(40) for _ in range(10))
    assert news <= 50


@pytest.mark.parametrize("sparse", [1, 40_000, 99_999])
def test_one_page_in_many(sparse: int) -> None:
    pages = np.zeros(100_000, np.bool_)
    pages[sparse] = True
    assert drain(PageOrder([pages])) == [background(0, sparse, 1)]


@given(st.data())
def test_every_page_once_and_who_waits_first(data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=20), min_size=1, max_size=3))
    unsent = [np.array(flags, np.bool_) for flags in shapes]
    expected = {(b, p) for b, flags in enumerate(shapes) for p, flag in enumerate(flags) if flag}
    order = PageOrder(unsent)
    sent: set[tuple[int, int]] = set()
    waiting: set[tuple[int, int]] = set()
    while True:
        if data.draw(st.booleans()):
            block = data.draw(st.integers(0, len(shapes) - 1))
            first = data.draw(st.integers(0, len(shapes[block]) - 1))
            count = data.draw(st.integers(1, len(shapes[block]) - first))
            pages = {(block, p) for p in range(first, first + count)} & (expected - sent)
            assert order.request(block, first, count) == bool(pages - waiting)
            waiting |= pages
        run = order.next_run(data.draw(st.integers(1, 5)))
        if run is None:
            break
        pages = {(run.block, p) for p in range(run.first, run.first + run.count)}
        assert pages <= expected - sent
        assert run.urgent == bool(waiting)
        if run.urgent:
            assert pages & waiting
        sent |= pages
        waiting -= pages
        assert order.remaining == len(expected - sent)
    assert sent == expected
