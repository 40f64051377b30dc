"""Recorded streams of each encoding, changed from a seed: gap G14, T4.

The number of inputs is printed at the end of the run. ``-m full`` tries many more.
"""

from __future__ import annotations

import pytest

from tests import tiers
from tests.engine.encodings_fuzz import KINDS, fuzz
from tests.fuzzed import Fuzzed

INPUTS = 40
MANY = 3_000


@pytest.mark.slow
@pytest.mark.parametrize("name", list(KINDS))
def test_a_spoiled_stream_is_one_error(fuzzed: Fuzzed, name: str) -> None:
    """T4, P4, P8: a typed error with a place and an owner, no hang, little memory, and no guest of a failed attempt runs."""
    count = MANY if tiers.everything() else INPUTS
    ends = fuzz(name, range(count))
    fuzzed(f"spoiled streams: {name}", count)
    assert ends.total() == count
    # All kinds of ends are among them, or the fuzz tests less than it says.
    assert {"sound", "completed", "RemoteProtocolError", "TransportFailed"} <= ends.keys()


@pytest.mark.slow
def test_silence_in_the_middle_of_a_footer_is_not_a_held_source() -> None:
    """A source that is held before its switchover is silent between two elements, without a limit. This one is not."""
    assert fuzz("multifd of 7.2", range(2603, 2604)) == {"TransportFailed": 1}
