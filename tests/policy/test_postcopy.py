"""The order of pages in postcopy: every page once, awaited pages first, neighbours next."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimig.guest import PageBitmap
from trimig.policy.page_order import PageOrder


def bitmap(text: str) -> PageBitmap:
    return np.array([c == "x" for c in text], np.bool_)


#: Block, pages, whether the guest waits for them.
Seen = tuple[int, list[int], bool]


def urgent(block: int, *pages: int) -> Seen:
    return block, list(pages), True


def background(block: int, *pages: int) -> Seen:
    return block, list(pages), False


def take(order: PageOrder, limit: int) -> Seen | None:
    batch = order.next_batch(limit)
    return None if batch is None else (batch.block, batch.pages.tolist(), batch.urgent)


def drain(order: PageOrder, limit: int = 100) -> list[Seen]:
    batches = []
    while (batch := take(order, limit)) is not None:
        batches.append(batch)
    assert order.remaining == 0
    return batches


def test_without_requests_the_blocks_in_their_order() -> None:
    order = PageOrder([bitmap("xx.x"), bitmap("...."), bitmap("..xx")])
    assert order.remaining == 5
    assert drain(order) == [background(0, 0, 1, 3), background(2, 2, 3)]


def test_nothing_to_send() -> None:
    assert PageOrder([bitmap("..")]).next_batch(1) is None
    assert PageOrder([]).next_batch(1) is None


def test_a_request_goes_first_and_its_neighbours_next() -> None:
    """O7: what was before it comes last."""
    order = PageOrder([bitmap("x" * 10)])
    assert take(order, 2) == background(0, 0, 1)
    assert order.request(0, 6, 1)
    assert order.urgent
    assert take(order, 2) == urgent(0, 6)
    assert drain(order, 2) == [background(0, 7, 8), background(0, 9), background(0, 2, 3), background(0, 4, 5)]


def test_requests_in_the_order_they_came() -> None:
    order = PageOrder([bitmap("xxxx"), bitmap("xxxx")])
    order.request(1, 2, 1)
    order.request(0, 3, 1)
    order.request(1, 0, 1)
    assert [take(order, 4) for _ in range(3)] == [urgent(1, 2), urgent(0, 3), urgent(1, 0)]


def test_a_request_with_holes_of_what_was_sent() -> None:
    order = PageOrder([bitmap("x..x.x")])
    assert order.request(0, 0, 6)
    assert [take(order, 4) for _ in range(3)] == [urgent(0, 0, 3, 5), None, None]


def test_a_long_request_goes_in_pieces() -> None:
    order = PageOrder([bitmap("xxxxx")])
    order.request(0, 0, 5)
    assert [take(order, 2) for _ in range(3)] == [urgent(0, 0, 1), urgent(0, 2, 3), urgent(0, 4)]


def test_what_was_sent_or_asked_for_is_no_news() -> None:
    order = PageOrder([bitmap("xx.x")])
    assert not order.request(0, 2, 1)
    assert order.request(0, 3, 1)
    assert not order.request(0, 3, 1)
    assert take(order, 1) == urgent(0, 3)
    assert not order.request(0, 3, 1)
    assert not order.urgent


def test_a_flood_of_requests_does_not_make_the_queue_longer_than_there_are_pages() -> None:
    order = PageOrder([bitmap("x" * 50)])
    news = sum(order.request(0, first, count) for count in (1, 2, 3, 5, 10) for first in range(40) for _ in range(10))
    assert news <= 50


def test_what_is_taken_back_is_the_next() -> None:
    order = PageOrder([bitmap("xxxx")])
    order.request(0, 2, 1)
    batch = order.next_batch(1)
    assert batch is not None
    order.take_back(batch)
    assert (order.remaining, order.urgent) == (4, True)
    assert take(order, 1) == urgent(0, 2)
    assert drain(order) == [background(0, 3), background(0, 0, 1)]


@pytest.mark.parametrize("sparse", [1, 40_000, 99_999])
def test_one_page_in_many(sparse: int) -> None:
    pages = np.zeros(100_000, np.bool_)
    pages[sparse] = True
    assert drain(PageOrder([pages])) == [background(0, sparse)]


@given(st.data())
def test_every_page_once_and_awaited_pages_first(data: st.DataObject) -> None:
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
        batch = order.next_batch(data.draw(st.integers(1, 5)))
        if batch is None:
            break
        pages = {(batch.block, p) for p in batch.pages.tolist()}
        assert pages <= expected - sent
        assert batch.urgent == bool(waiting)
        if batch.urgent:
            assert pages & waiting
        sent |= pages
        waiting -= pages
        assert order.remaining == len(expected - sent)
    assert sent == expected
