"""For the tests of the engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.threads import without_threads


@pytest.fixture(autouse=True)
def _no_threads_on_a_virtual_clock(request: pytest.FixtureRequest) -> Iterator[None]:
    if "autojump_clock" not in request.fixturenames:
        yield
        return
    with without_threads():
        yield
