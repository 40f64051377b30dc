"""An argument of the wrong kind is a TypeError that names it, before anything has been done."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import trimig
from trimig import Owner, Ownership
from trimig.portal import Portal

GUEST = trimig.AppGuest("g")
WRONG: tuple[Any, ...] = (
    ("tcp", "host", 4444),
    Path("/tmp/socket"),
    {"uri": "tcp:host:4444"},
    4444,
    None,
    b"tcp:host:4444",
)


@pytest.mark.parametrize("value", WRONG, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(("name", "call"), [("to", trimig.migrate), ("at", trimig.receive)])
async def test_a_way_that_is_none(name: str, call: Callable[..., Awaitable[object]], value: Any) -> None:
    guest = trimig.AppGuest("g", running=name == "to")
    with pytest.raises(TypeError, match=rf"^{name} must be a URI .* or a trio stream, not an? {type(value).__name__}$"):
        await call(guest, value)
    assert guest.owner is (trimig.Owner.HERE if name == "to" else trimig.Owner.ELSEWHERE)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("guest", {"guest": "g"}),
        ("config", {"config": {"capabilities": {}}}),
        ("config", {"config": Path("trimig.toml")}),
        ("monitor", {"monitor": True}),
        ("commit", {"commit": "now"}),
        ("fence", {"fence": trimig.Ownership.SOURCE}),
    ],
)
async def test_other_arguments_of_migrate(name: str, arguments: dict[str, Any]) -> None:
    given = {"guest": GUEST, "to": "tcp:127.0.0.1:1", **arguments}
    with pytest.raises(TypeError, match=f"^{name} must be "):
        await trimig.migrate(**given)


@pytest.mark.parametrize("owner", [Ownership.DESTINATION, Ownership.SOURCE, "elsewhere", True, None], ids=str)
async def test_a_guest_is_settled_by_an_owner_only(owner: Any) -> None:
    """Owner and Ownership are easily confused: nothing is done, and above all nothing runs."""
    guest = trimig.AppGuest("g")
    await guest.pause()
    asked: list[Owner] = []

    async def settle(owner: Owner) -> None:
        asked.append(owner)

    guest.set_owner(Owner.UNKNOWN, settle=settle)
    with pytest.raises(TypeError, match=r"^owner must be trimig\.Owner\.HERE or trimig\.Owner\.ELSEWHERE, not an? "):
        await guest.settle(owner)
    assert (asked, guest.owner, guest.run_state) == ([], Owner.UNKNOWN, "paused")
    await guest.settle(Owner.ELSEWHERE)
    assert asked == [Owner.ELSEWHERE]


@pytest.mark.parametrize("owner", [Owner.HERE, Owner.ELSEWHERE, Owner.UNKNOWN, "source", False, None], ids=str)
async def test_an_error_is_settled_by_a_side_only(owner: Any) -> None:
    asked: list[Owner] = []

    async def settle(owner: Owner) -> None:
        asked.append(owner)

    error = trimig.HandoverUncertain("the answer is missing", settle=settle)
    with pytest.raises(TypeError, match=r"^owner must be trimig\.Ownership\.SOURCE or .*guest\.settle"):
        await error.settle(owner)
    assert (asked, error.settled, error.owner) == ([], None, Ownership.UNKNOWN)
    await error.settle(Ownership.SOURCE)
    assert asked == [Owner.HERE]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("reason", lambda monitor: monitor.cancel(None)),
        ("reason", lambda monitor: monitor.pause(7)),
        ("reason", lambda monitor: monitor.abandon(b"no")),
        ("uri", lambda monitor: monitor.recover(("127.0.0.1", 4444))),
        ("listener", lambda monitor: monitor.add_listener(None)),
        ("every", lambda monitor: monitor.watch("1 s")),
        ("guest", lambda monitor: setattr(monitor, "guest", "g")),
    ],
)
def test_what_steers(name: str, call: Callable[[trimig.Monitor], object]) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be "):
        call(trimig.Monitor())


async def test_a_status_that_is_none_is_not_waited_for() -> None:
    with pytest.raises(TypeError, match=r"^statuses must be of trimig\.Status, not a str$"):
        await trimig.Monitor().wait_status("completed")  # type: ignore[arg-type]


def test_through_a_portal() -> None:
    with Portal() as portal:
        with pytest.raises(TypeError, match=r"^to must be a URI"):
            portal.migrate(GUEST, Path("/tmp/socket"))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^at must be a URI"):
            portal.start_receive(GUEST, ("a", "b"))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^config must be"):
            portal.start_migrate(GUEST, "tcp:127.0.0.1:1", {})  # type: ignore[arg-type]
        assert portal.call(int) == 0  # it is still of use


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("name", lambda: trimig.AppGuest(7)),  # type: ignore[arg-type]
        ("name", lambda: GUEST.add_ram(b"ram", 4096)),  # type: ignore[arg-type]
        ("length", lambda: GUEST.add_ram("ram", "64M")),  # type: ignore[arg-type]
        ("device", lambda: GUEST.add_device("clock")),  # type: ignore[arg-type]
        ("save_to", lambda: trimig.ParkedGuest(7)),  # type: ignore[arg-type]
        ("max_ram", lambda: trimig.ParkedGuest(max_ram="1G")),  # type: ignore[arg-type]
        ("peer", lambda: trimig.ParkedGuest(peer="qemu-7.2")),  # type: ignore[arg-type]
        ("source", lambda: trimig.Config.from_toml({"engine": {}})),  # type: ignore[arg-type]
    ],
)
def test_what_makes_guests_and_configurations(name: str, call: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be "):
        call()


def test_a_class_in_place_of_an_instance_is_named() -> None:
    class Clock(trimig.Device):
        vmstate = trimig.VMState("clock", fields=(trimig.Field("t", "uint8"),))

    with pytest.raises(
        TypeError, match=r"device must be a trimig\.Device, not the class Clock itself: Clock\(\.\.\.\) makes one"
    ):
        trimig.AppGuest("g").add_device(Clock)  # type: ignore[arg-type]


async def test_a_closed_guest_says_so() -> None:
    with trimig.AppGuest("g") as guest:
        guest.add_ram("ram", 4096)
    with pytest.raises(trimig.StateError, match="guest 'g' is closed"):
        await trimig.migrate(guest, "tcp:127.0.0.1:1")


@pytest.mark.parametrize("call", [trimig.migrate, trimig.receive])
def test_outside_of_trio_the_portal_is_named(call: Callable[..., Coroutine[Any, Any, object]]) -> None:
    with pytest.raises(RuntimeError, match=r"task of trio; .* trimig\.portal"):
        call(GUEST, "tcp:127.0.0.1:1").send(None)
