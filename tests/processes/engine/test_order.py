"""Elements of the stream out of order, for a guest that is a process."""

from __future__ import annotations

import trimig
from tests.engine.test_order import check_without_ram
from tests.engine.test_postcopy_bad_input import RAM
from trimig.guest import PAGE_SIZE


async def test_a_process_without_its_ram() -> None:
    """A header, a configuration and an end are no guest; on the real clock, since there is a process."""
    async with trimig.WorkloadGuest.open(size=RAM["ram"], hot=PAGE_SIZE, running=False, name="scripted") as target:
        await check_without_ram(target, "process", opened=True)
