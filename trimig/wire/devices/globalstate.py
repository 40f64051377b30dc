"""The section ``globalstate``: the run state that the guest had before the migration stopped it (vmstate.md part 4.2)."""

from __future__ import annotations

from typing import Final

from ...errors import LocalProtocolError, RemoteProtocolError
from ...guest import DeviceSection
from .vmstate import Field, VMState

IDSTR: Final = "globalstate"
_SIZE: Final = 100

#: Run states that a machine waiting for a migration may enter.
RUN_STATES: Final = frozenset(
    {
        "running",
        "paused",
        "prelaunch",
        "suspended",
        "shutdown",
        "io-error",
        "internal-error",
        "guest-panicked",
        "watchdog",
        "postmigrate",
        "inmigrate",
        "finish-migrate",
        "colo",
    }
)
#: Three other run states; a QEMU destination that is told to enter one of them aborts (states.md part 14, G21).
ILLEGAL_RUN_STATES: Final = frozenset({"debug", "save-vm", "restore-vm"})

GLOBAL_STATE: Final = VMState(
    IDSTR,
    fields=(Field("size", "uint32"), Field("runstate", "buffer", size=_SIZE)),
)


def refusal(run_state: str) -> str | None:
    """The reason why a guest cannot arrive in *run_state*; None if it can."""
    if run_state in RUN_STATES:
        return None
    if run_state in ILLEGAL_RUN_STATES:
        return f"a guest cannot arrive in {run_state!r}"
    return f"there is no run state {run_state!r}"


def fields_of(run_state: str) -> dict[str, object]:
    """The section's fields for *run_state*.

    Raises:
        LocalProtocolError: a destination could not enter this run state.
    """
    if (problem := refusal(run_state)) is not None:
        raise LocalProtocolError(f"the guest's run state cannot be sent: {problem}")
    text = run_state.encode() + b"\0"
    return {"size": len(text), "runstate": text.ljust(_SIZE, b"\0")}


def run_state_of(runstate: bytes) -> str:
    """The name of the run state, up to its NUL. The rest of a longer name may follow; the field ``size`` is not
    reliable.

    Raises:
        RemoteProtocolError: there is no such run state, or no guest can arrive in it.
    """
    name, end, _ = runstate.partition(b"\0")
    text = name.decode("ascii", "backslashreplace")
    problem = refusal(text) if end else "it has no end"
    if problem is not None:
        raise RemoteProtocolError(f"run state {text!r}: {problem}", section=IDSTR)
    return text


def section(run_state: str) -> DeviceSection:
    """The whole section for *run_state*; LocalProtocolError as for :func:`fields_of`."""
    fields = fields_of(run_state)
    return DeviceSection(
        idstr=IDSTR,
        version_id=1,
        payload=GLOBAL_STATE.encode(fields),
        description={"name": IDSTR, "instance_id": 0, **GLOBAL_STATE.describe(fields)},
    )


def measure(data: memoryview, version_id: int) -> int | None:
    """Length of the payload; None if *data* is shorter."""
    return GLOBAL_STATE.measure(data, version_id, section=IDSTR)


def decode(payload: bytes, version_id: int = 1) -> str:
    """The run state in a payload.

    Raises:
        RemoteProtocolError: wrong length or version, or a state that no guest can arrive in.
    """
    runstate = GLOBAL_STATE.decode(payload, version_id, section=IDSTR)["runstate"]
    assert isinstance(runstate, bytes)
    return run_state_of(runstate)
