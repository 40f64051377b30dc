"""The order of a migration: its statuses, the owner of the guest in each, and what may be sent when.

The first part has the statuses and their transitions, the second one the elements of the streams.

The names are QEMU's (states.md part 1), plus four of trimig for situations that QEMU has no name for:

* ``handover``: the decision has been given to the transport and is not answered yet. QEMU calls this ``active`` or
  ``device`` and resumes the guest if the connection breaks there, so that two guests may run (states.md part 14, G1 and
  G2).
* ``uncertain``: that answer never came. The guest stays paused until its owner is settled.
* ``postcopy-uncertain``: the same in postcopy. The connection may be recovered, which gives the answer.
* ``postcopy-lost``: the guest is at the destination for certain, and the rest of its memory is lost.

Both roles are in this one file, so that a reader sees the actions of one side beside the conclusions of the other. The
table decides: the engine changes a status only through :func:`check`. docs/design.md part 3 shows
the tables; ``python -m tests.diagram`` writes that page.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, TypeVar

from .errors import Owner, Ownership, RemoteProtocolError, StateError


class Role(enum.Enum):
    """The side of a migration."""

    SOURCE = "source"
    DESTINATION = "destination"


class Status(enum.Enum):
    """The status of a migration. The value is the spelling used in messages and in ``info()``."""

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    #: The decision is on its way and unanswered (source); the stream is complete and is being activated (destination).
    HANDOVER = "handover"
    #: The answer never came; a person or a program must settle the owner of the guest.
    UNCERTAIN = "uncertain"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    #: The guest runs at the destination, and the rest of its memory is being sent.
    POSTCOPY_ACTIVE = "postcopy-active"
    #: The connection was lost in postcopy; it can be recovered.
    POSTCOPY_PAUSED = "postcopy-paused"
    #: A new connection is open, and the two sides compare which pages are missing.
    POSTCOPY_RECOVER = "postcopy-recover"
    #: The connection was lost before the destination had said that it runs the guest. On the destination: before the
    #: source is known to have read this, if the source is one that takes its guest back without it.
    POSTCOPY_UNCERTAIN = "postcopy-uncertain"
    #: The migration was given up in postcopy: the destination has the guest and a part of its memory.
    POSTCOPY_LOST = "postcopy-lost"

    @property
    def qmp(self) -> str:
        """The nearest of QEMU's statuses, for clients that know only QEMU's."""
        return _NEAREST.get(self, self.value)


_S = Status
_NEAREST: Final = MappingProxyType(
    {
        _S.HANDOVER: "device",
        _S.UNCERTAIN: "failed",
        _S.POSTCOPY_UNCERTAIN: "postcopy-paused",
        _S.POSTCOPY_LOST: "failed",
    }
)
_SRC, _DST, _UNK = Ownership.SOURCE, Ownership.DESTINATION, Ownership.UNKNOWN

#: After the switch to postcopy both sides have the same transitions.
_POSTCOPY: Final = {
    _S.POSTCOPY_ACTIVE: frozenset({_S.COMPLETED, _S.POSTCOPY_PAUSED, _S.POSTCOPY_LOST}),
    _S.POSTCOPY_PAUSED: frozenset({_S.POSTCOPY_RECOVER, _S.POSTCOPY_LOST}),
    _S.POSTCOPY_RECOVER: frozenset({_S.POSTCOPY_ACTIVE, _S.POSTCOPY_PAUSED, _S.POSTCOPY_LOST}),
    _S.POSTCOPY_LOST: frozenset({_S.SETUP}),
}

TRANSITIONS: Final = MappingProxyType(
    {
        Role.SOURCE: MappingProxyType(
            {
                _S.NONE: frozenset({_S.SETUP}),
                _S.SETUP: frozenset({_S.ACTIVE, _S.FAILED, _S.CANCELLING}),
                _S.ACTIVE: frozenset({_S.PRE_SWITCHOVER, _S.DEVICE, _S.FAILED, _S.CANCELLING}),
                _S.PRE_SWITCHOVER: frozenset({_S.DEVICE, _S.FAILED, _S.CANCELLING}),
                _S.DEVICE: frozenset({_S.HANDOVER, _S.FAILED, _S.CANCELLING}),
                # No cancelling from here on: sent bytes cannot be taken back (G2). The status becomes failed only if
                # the destination refuses, or if it is certain that nothing was sent.
                _S.HANDOVER: frozenset(
                    {_S.COMPLETED, _S.FAILED, _S.UNCERTAIN, _S.POSTCOPY_ACTIVE, _S.POSTCOPY_UNCERTAIN}
                ),
                _S.UNCERTAIN: frozenset({_S.COMPLETED, _S.FAILED}),
                _S.POSTCOPY_UNCERTAIN: frozenset({_S.POSTCOPY_ACTIVE, _S.POSTCOPY_PAUSED, _S.FAILED, _S.UNCERTAIN}),
                **_POSTCOPY,
                _S.CANCELLING: frozenset({_S.CANCELLED, _S.FAILED}),
                _S.COMPLETED: frozenset({_S.SETUP}),
                _S.FAILED: frozenset({_S.SETUP}),
                _S.CANCELLED: frozenset({_S.SETUP}),
            }
        ),
        Role.DESTINATION: MappingProxyType(
            {
                _S.NONE: frozenset({_S.SETUP}),
                _S.SETUP: frozenset({_S.ACTIVE, _S.FAILED, _S.CANCELLING}),
                _S.ACTIVE: frozenset({_S.HANDOVER, _S.FAILED, _S.CANCELLING}),
                _S.HANDOVER: frozenset({_S.COMPLETED, _S.FAILED, _S.POSTCOPY_ACTIVE}),
                **_POSTCOPY,
                # The connection was lost after the last page, and the guest has all its memory.
                _S.POSTCOPY_PAUSED: _POSTCOPY[_S.POSTCOPY_PAUSED] | {_S.COMPLETED},
                # A QEMU from 11.1 on takes its guest back if it has not read that the guest runs here (newer.md part 4).
                _S.POSTCOPY_ACTIVE: _POSTCOPY[_S.POSTCOPY_ACTIVE] | {_S.POSTCOPY_UNCERTAIN},
                _S.POSTCOPY_UNCERTAIN: frozenset({_S.POSTCOPY_RECOVER, _S.UNCERTAIN}),
                _S.UNCERTAIN: frozenset({_S.COMPLETED, _S.POSTCOPY_LOST, _S.FAILED}),
                _S.CANCELLING: frozenset({_S.CANCELLED, _S.FAILED}),
                _S.COMPLETED: frozenset({_S.SETUP}),
                _S.FAILED: frozenset({_S.SETUP}),
                _S.CANCELLED: frozenset({_S.SETUP}),
            }
        ),
    }
)

_OWNERS: Final = MappingProxyType(
    {
        Role.SOURCE: MappingProxyType(
            {_S.HANDOVER: _UNK, _S.UNCERTAIN: _UNK, _S.POSTCOPY_UNCERTAIN: _UNK, _S.COMPLETED: _DST}
            | dict.fromkeys(_POSTCOPY, _DST)
        ),
        # On the destination `handover` begins when the source's decision has been read: from then on no other side may
        # run the guest, unless this side gives it back with SHUT 1.
        Role.DESTINATION: MappingProxyType(
            {_S.HANDOVER: _DST, _S.COMPLETED: _DST, _S.UNCERTAIN: _UNK, _S.POSTCOPY_UNCERTAIN: _UNK}
            | dict.fromkeys(_POSTCOPY, _DST)
        ),
    }
)

_ALL: Final = frozenset(_S)

# Each of these sets is named by a fact; its members are the statuses in which the fact is true.
#: No migration is running, and the owner is certain: a new attempt may begin, and capabilities may be changed.
IDLE: Final = frozenset({_S.NONE, _S.COMPLETED, _S.FAILED, _S.CANCELLED, _S.POSTCOPY_LOST})
#: The end of an attempt; after UNCERTAIN the owner is still to be settled.
TERMINAL: Final = frozenset({_S.COMPLETED, _S.FAILED, _S.CANCELLED, _S.UNCERTAIN, _S.POSTCOPY_LOST})
#: The attempt has failed or was cancelled, and the source has its guest.
UNSUCCESSFUL: Final = frozenset({_S.FAILED, _S.CANCELLED})
#: An attempt is under way.
IN_PROGRESS: Final = _ALL - IDLE - TERMINAL
#: No memory has been sent.
BEFORE_MEMORY: Final = frozenset({_S.NONE, _S.SETUP})
#: A source has figures of the transfer; QEMU calls these statuses running.
RUNNING: Final = IN_PROGRESS - BEFORE_MEMORY

#: A cancel is accepted in these statuses.
CANCELLABLE: Final = frozenset({_S.SETUP, _S.ACTIVE, _S.PRE_SWITCHOVER, _S.DEVICE})
#: A cancel has no effect: no attempt is under way, or it is being cancelled. In a status that is in neither of the last two
#: sets a cancel is refused.
CANCEL_IGNORED: Final = IDLE | TERMINAL | {_S.CANCELLING}
#: The source has stopped its guest for the handover.
SWITCHING: Final = frozenset({_S.PRE_SWITCHOVER, _S.DEVICE, _S.HANDOVER})
#: The source has stopped its guest for the handover, and may still take it back by itself.
REVOCABLE: Final = SWITCHING & CANCELLABLE
#: The part of the handover after pre-switchover, in which the engine waits for no person or program.
SWITCHOVER: Final = SWITCHING - {_S.PRE_SWITCHOVER}
#: A request for postcopy has an effect.
BEFORE_POSTCOPY: Final = CANCELLABLE - {_S.DEVICE}

#: The connection can be recovered.
RECOVERABLE: Final = frozenset({_S.POSTCOPY_PAUSED, _S.POSTCOPY_UNCERTAIN})
#: The guest was handed over before all of its memory was sent.
IN_POSTCOPY: Final = frozenset({_S.POSTCOPY_ACTIVE, _S.POSTCOPY_PAUSED, _S.POSTCOPY_RECOVER, _S.POSTCOPY_UNCERTAIN})
#: There is a connection of a postcopy migration, which can be dropped.
PAUSABLE: Final = IN_POSTCOPY - RECOVERABLE
#: The guest of a source has the run state ``finish-migrate``: only the engine decides whether it runs.
FINISH_MIGRATE: Final = SWITCHING | IN_POSTCOPY

#: The owner is unknown and no answer is on its way: the owner must be settled, or the connection recovered.
UNSETTLED: Final = frozenset(status for status, side in _OWNERS[Role.SOURCE].items() if side is _UNK) - {_S.HANDOVER}
#: The guest of a destination has been activated.
ARRIVED: Final = frozenset(_OWNERS[Role.DESTINATION]) - {_S.HANDOVER}
#: The attempt of a destination has ended, and its guest was activated and stays paused.
ARRIVED_PAUSED: Final = (ARRIVED & TERMINAL) - {_S.COMPLETED}
#: ``query-migrate`` shows the reason of the failure, if there is one.
WITH_ERROR: Final = (TERMINAL | RECOVERABLE) - {_S.COMPLETED, _S.CANCELLED}

#: The type MigrationStatus of QEMU 7.2, in its order. QMP shows no other status.
QMP_STATUSES: Final = (
    "none", "setup", "cancelling", "cancelled", "active", "postcopy-active", "postcopy-paused", "postcopy-recover",
    "completed", "failed", "colo", "pre-switchover", "device", "wait-unplug",
)  # fmt: skip
#: A status of newer QEMUs, before POSTCOPY_RECOVER: the new connection is being set up.
_RECOVER_SETUP: Final = "postcopy-recover-setup"
#: QMP: no migration is under way. All other statuses go on, also the unknown ones of a newer QEMU.
QMP_IDLE: Final = frozenset(status.qmp for status in IDLE)
#: QMP: the end of an attempt.
QMP_TERMINAL: Final = frozenset(status.qmp for status in TERMINAL)
#: QMP: the attempt is over, and the guest was not handed over, unless the answer has another ``owner``.
QMP_UNSUCCESSFUL: Final = frozenset(status.qmp for status in UNSUCCESSFUL)
#: QMP, and trimig's own names: the destination has the guest, and lacks memory.
QMP_IN_POSTCOPY: Final = frozenset(status.value for status in IN_POSTCOPY) | {_RECOVER_SETUP}
#: QMP: the connection of a postcopy migration can be dropped.
QMP_PAUSABLE: Final = frozenset(status.qmp for status in PAUSABLE) | {_RECOVER_SETUP}
#: QMP: a switch to postcopy can be asked for.
QMP_BEFORE_POSTCOPY: Final = frozenset(status.qmp for status in BEFORE_POSTCOPY)
#: QMP: the source can no longer run the guest.
QMP_HANDED_OVER: Final = (
    frozenset(status.value for status, side in _OWNERS[Role.SOURCE].items() if side is _DST and status not in _NEAREST)
    | {_RECOVER_SETUP}
)  # fmt: skip
#: QMP: the commit may have been sent, and is not answered.
QMP_COMMITTING: Final = frozenset({_S.HANDOVER.qmp, "postcopy-device"})
#: QMP: the source keeps the guest, also while it is stopped: no commit was sent, or a QEMU takes its guest back. A QEMU
#: stays in ACTIVE until the commit is answered, unless it pauses before the switchover.
QMP_KEPT: Final = frozenset(
    status.qmp for status in _ALL - _OWNERS[Role.SOURCE].keys() - {_S.ACTIVE, _S.DEVICE}
) | {"wait-unplug", "failing"}  # fmt: skip
#: QMP: a destination emits no event for these. ``migrate-incoming`` emits ``setup``; only a source has ``device``.
QMP_SILENT_INCOMING: Final = frozenset({_S.SETUP.qmp, _S.HANDOVER.qmp})


def check_idle(status: Status) -> None:
    """Raise StateError unless capabilities may be changed in *status*, as :data:`IDLE` says."""
    if status not in IDLE:
        raise StateError(
            f"capabilities cannot change while a migration is in progress ({status.value})", status=status.value
        )


def owner(role: Role, status: Status) -> Ownership:
    """The side that may run the guest, as far as the side in *role* can tell."""
    return _OWNERS[role].get(status, _SRC)


def guest_owner(role: Role, status: Status) -> Owner:
    """The owner that the engine sets for the guest in the process of the side in *role*."""
    side = owner(role, status)
    if side is Ownership.UNKNOWN:
        return Owner.UNKNOWN
    return Owner.HERE if side.value == role.value else Owner.ELSEWHERE


def check(role: Role, old: Status, new: Status) -> None:
    """Raise StateError unless *new* may follow *old*."""
    if new not in TRANSITIONS[role].get(old, frozenset()):
        raise StateError(f"a {role.value} cannot go from {old.value} to {new.value}", status=old.value)


#: Role -> the status of an attempt -> the status after an interruption: (by a cancellation, by a failure). An attempt in a
#: status that is not in the table keeps its status.
ENDS: Final = MappingProxyType(
    {
        role: MappingProxyType(
            dict.fromkeys((_S.SETUP, _S.ACTIVE, _S.PRE_SWITCHOVER, _S.DEVICE), (_S.CANCELLING, _S.FAILED))
            | dict.fromkeys((_S.POSTCOPY_ACTIVE, _S.POSTCOPY_PAUSED, _S.POSTCOPY_RECOVER), (_S.POSTCOPY_LOST,) * 2)
            | {_S.POSTCOPY_UNCERTAIN: (_S.UNCERTAIN,) * 2, _S.HANDOVER: (after_commit,) * 2}
        )
        # In `handover` the source cannot know whether its decision has arrived; the destination has not started the guest.
        for role, after_commit in ((Role.SOURCE, _S.UNCERTAIN), (Role.DESTINATION, _S.FAILED))
    }
)


def end_of(role: Role, status: Status, *, cancelled: bool) -> Status | None:
    """The status of an attempt after it was interrupted in *status*; None if the status does not change.

    Args:
        cancelled: True if a cancellation has interrupted the attempt, False for a failure.
    """
    ends = ENDS[role].get(status)
    return None if ends is None else ends[0 if cancelled else 1]


class Item(enum.Enum):
    """An element of a main stream, or a message of a return path. The value names it in messages."""

    FILE_HEADER = "a file header"
    CONFIGURATION = "a configuration section"
    START = "a section START"
    PART = "a section PART"
    END = "a section END"
    FULL = "a device section"
    RAM_LIST = "a list of RAM blocks"
    PAGES = "a page"
    RAM_END = "the end of the records of a section"
    #: All data channels of multifd have come to the same place (newer.md part 3.3).
    RAM_SYNC = "a synchronisation mark of data channels"
    PAYLOAD = "the state of a device"
    FOOTER = "a section footer"
    #: Bytes of unknown devices. Only the description at the end of the stream shows where each device ends.
    TAIL = "the state of an unknown device"
    PACKAGE = "the content of a package"
    EOF = "the end of the stream"
    DESCRIPTION = "a description"
    OPEN_RETURN_PATH = "command OPEN_RETURN_PATH"
    PING = "command PING"
    POSTCOPY_ADVISE = "command POSTCOPY_ADVISE"
    POSTCOPY_LISTEN = "command POSTCOPY_LISTEN"
    POSTCOPY_RUN = "command POSTCOPY_RUN"
    POSTCOPY_RAM_DISCARD = "command POSTCOPY_RAM_DISCARD"
    PACKAGED = "command PACKAGED"
    #: Legal in no state, because trimig does not have COLO.
    ENABLE_COLO = "command ENABLE_COLO"
    POSTCOPY_RESUME = "command POSTCOPY_RESUME"
    RECV_BITMAP = "command RECV_BITMAP"
    SWITCHOVER_START = "command SWITCHOVER_START"
    #: Marks, which only two trimigs exchange (return_path.md part 9). They have the same names in both directions.
    REASON = "mark REASON"
    CLOCK = "mark CLOCK"
    ATTEMPT = "mark ATTEMPT"
    PONG = "PONG"
    SWITCHOVER_ACK = "SWITCHOVER_ACK"
    REQ_PAGES = "a request for pages"
    RECEIVED_PAGES = "a bitmap of received pages"
    RESUME_ACK = "RESUME_ACK"
    ARRIVED = "the message that the guest has arrived (SHUT 0)"
    REFUSED = "a refusal (SHUT with an error)"


class Stream(enum.Enum):
    """The state of a main stream. The value completes the sentence "... has no place ..."."""

    OPENING = "before the file header"
    CONFIGURING = "behind the file header"
    SETUP = "before the list of RAM blocks"
    #: POSTCOPY_ADVISE was read: a switch to postcopy may follow.
    SETUP_ADVISED = "between POSTCOPY_ADVISE and the list of RAM blocks"
    RAM = "between the list of RAM blocks and the end of the RAM"
    RAM_ADVISED = "between the list of RAM blocks and the end of the RAM, with postcopy announced"
    #: In the section END of the RAM.
    ENDING = "in the section END of the RAM"
    DEVICES = "behind the end of the RAM"
    TAIL = "in the devices"
    PACKAGED = "between the command PACKAGED and its package"
    PACKAGE = "at the begin of a package"
    LISTENING = "in a package"
    FOLLOWING = "behind the switch to postcopy"
    #: On another connection of a paused postcopy migration.
    RECOVERING = "in a recovery, before RESUME"
    #: On the second connection of postcopy-preempt.
    URGENT = "on the connection for urgent pages"
    ENDED = "behind the end of the stream"


class ReturnPath(enum.Enum):
    """The state of a return path, for both sides. The value completes the sentence "... has no place ..."."""

    BEFORE = "before the guest is handed over"
    #: The end of the stream has been given to the transport.
    COMMITTED = "behind the end of the stream"
    #: The package has been given to the transport.
    FOLLOWING = "behind the switch to postcopy"
    RECOVERING = "in a recovery, before RESUME"
    RESUMING = "in a recovery, behind RESUME"
    ENDED = "behind SHUT"


_I, _T, _R = Item, Stream, ReturnPath
_State = TypeVar("_State", Stream, ReturnPath)


def _stay(state: _State, *items: Item) -> dict[Item, _State]:
    """Items that are legal in *state* and do not change it."""
    return dict.fromkeys(items, state)


#: Legal in each state in which a command is legal, without a change of the state (newer.md part 2 for SWITCHOVER_START).
_ALWAYS: Final = (_I.PING, _I.SWITCHOVER_START)
#: Elements that a trimig may send in any state except inside a package.
_SAYS: Final = (*_ALWAYS, _I.REASON, _I.CLOCK)
_DEVICE: Final = (_I.FULL, _I.PAYLOAD, _I.FOOTER)
_MEMORY: Final = (_I.PART, _I.PAGES, _I.RAM_SYNC, _I.RAM_END, _I.FOOTER)
#: Legal before the list of RAM blocks. Device sections may stand there (newer.md part 2). A second OPEN_RETURN_PATH has no
#: effect, as in QEMU.
_HEAD: Final = (*_SAYS, _I.ATTEMPT, _I.OPEN_RETURN_PATH, _I.START, *_DEVICE)
#: Legal while pages are sent. START may repeat the list (stream.md part 10). In a background snapshot devices follow a page
#: directly (files.md part 6), and so does the end of the stream if there are no devices.
_PAGES: Final = (*_HEAD, _I.RAM_LIST, *_MEMORY)
_PAGES_END: Final = {_I.END: _T.ENDING, _I.TAIL: _T.TAIL, _I.EOF: _T.ENDED}

#: State of a main stream -> each element that is legal there -> the state behind it. The source sends this, and the
#: destination refuses what is not here.
STREAM: Final = MappingProxyType(
    {
        state: MappingProxyType(row)
        for state, row in {
            _T.OPENING: {_I.FILE_HEADER: _T.CONFIGURING},
            # A machine type up to 2.3 has no configuration section.
            _T.CONFIGURING: {
                **_stay(_T.SETUP, _I.CONFIGURATION, *_HEAD),
                _I.POSTCOPY_ADVISE: _T.SETUP_ADVISED,
                _I.RAM_LIST: _T.RAM,
            },
            _T.SETUP: {**_stay(_T.SETUP, *_HEAD), _I.POSTCOPY_ADVISE: _T.SETUP_ADVISED, _I.RAM_LIST: _T.RAM},
            _T.SETUP_ADVISED: {**_stay(_T.SETUP_ADVISED, *_HEAD), _I.RAM_LIST: _T.RAM_ADVISED},
            _T.RAM: {**_stay(_T.RAM, *_PAGES), **_PAGES_END},
            _T.RAM_ADVISED: {
                **_stay(_T.RAM_ADVISED, *_PAGES, _I.POSTCOPY_RAM_DISCARD),
                **_PAGES_END,
                _I.PACKAGED: _T.PACKAGED,
            },
            _T.ENDING: {**_stay(_T.ENDING, _I.PAGES, _I.RAM_SYNC), _I.RAM_END: _T.DEVICES},
            _T.DEVICES: {
                **_stay(_T.DEVICES, *_SAYS, _I.OPEN_RETURN_PATH, *_DEVICE),
                _I.TAIL: _T.TAIL,
                _I.EOF: _T.ENDED,
            },
            _T.TAIL: {_I.TAIL: _T.TAIL},
            _T.PACKAGED: {_I.PACKAGE: _T.PACKAGE},
            _T.PACKAGE: {_I.POSTCOPY_LISTEN: _T.LISTENING},
            _T.LISTENING: {**_stay(_T.LISTENING, *_ALWAYS, *_DEVICE), _I.POSTCOPY_RUN: _T.FOLLOWING},
            _T.FOLLOWING: {**_stay(_T.FOLLOWING, *_SAYS, *_MEMORY, _I.END), _I.EOF: _T.ENDED},
            _T.RECOVERING: {
                **_stay(_T.RECOVERING, *_SAYS, _I.ATTEMPT, _I.RECV_BITMAP),
                _I.POSTCOPY_RESUME: _T.FOLLOWING,
            },
            _T.URGENT: {_I.PAGES: _T.URGENT, _I.RAM_END: _T.ENDED},
            _T.ENDED: {_I.DESCRIPTION: _T.ENDED},
        }.items()
    }
)

#: The states with which a connection begins.
BEGINNINGS: Final = frozenset({_T.OPENING, _T.RECOVERING, _T.URGENT})
#: The source sends the RAM, and has not ended it.
SENDING_RAM: Final = frozenset({_T.RAM, _T.RAM_ADVISED})
#: Pages may come, and the guest does not run at the destination.
STREAM_PRECOPY_PAGES: Final = SENDING_RAM | {_T.ENDING}
#: Behind the list of RAM blocks, up to the devices or to a package.
STREAM_IN_PRECOPY: Final = STREAM_PRECOPY_PAGES | {_T.PACKAGED}
#: The guest was handed over, and its memory follows on this connection.
STREAM_IN_POSTCOPY: Final = frozenset({_T.FOLLOWING, _T.RECOVERING})


#: Legal on every return path.
_ANSWERS: Final = (_I.PONG, _I.REASON, _I.CLOCK, _I.ATTEMPT)
_ENDS: Final = {_I.REFUSED: _R.ENDED, _I.ARRIVED: _R.ENDED}

#: State of a return path -> each message that is legal there -> the state behind it. The destination sends this, and the
#: source refuses what is not here. The source goes on from BEFORE to COMMITTED or FOLLOWING, and from RECOVERING to
#: RESUMING, by what it sends itself.
RETURN_PATH: Final = MappingProxyType(
    {
        state: MappingProxyType(row)
        for state, row in {
            _R.BEFORE: {**_stay(_R.BEFORE, *_ANSWERS, _I.SWITCHOVER_ACK), _I.REFUSED: _R.ENDED},
            # A page may be asked for, and an ack said, before the other side has read the last word.
            _R.COMMITTED: {**_stay(_R.COMMITTED, *_ANSWERS, _I.SWITCHOVER_ACK), **_ENDS},
            _R.FOLLOWING: {**_stay(_R.FOLLOWING, *_ANSWERS, _I.SWITCHOVER_ACK, _I.REQ_PAGES), **_ENDS},
            _R.RECOVERING: {**_stay(_R.RECOVERING, *_ANSWERS, _I.REQ_PAGES, _I.RECEIVED_PAGES), **_ENDS},
            _R.RESUMING: {**_stay(_R.RESUMING, *_ANSWERS, _I.REQ_PAGES), _I.RESUME_ACK: _R.FOLLOWING, **_ENDS},
            _R.ENDED: {},
        }.items()
    }
)


#: Elements that have no place yet, and what a source wants that sends them.
NOT_BUILT: Final = MappingProxyType({Item.ENABLE_COLO: "the source wants COLO"})


def after(state: _State, item: Item, *, offset: int | None = None, section: str | None = None) -> _State:
    """The state of a main stream, or of a return path, behind *item*.

    Args:
        offset: of the element in the stream, for the error.
        section: that the element is in, for the error.

    Raises:
        RemoteProtocolError: *item* is not legal in *state*; names both.
    """
    table: Mapping[_State, Mapping[Item, _State]] = STREAM if isinstance(state, Stream) else RETURN_PATH
    found = table[state].get(item)
    if found is None:
        places = [place.value for place, row in table.items() if item in row]
        where = f"; its place is {places[0]}" if len(places) == 1 else ""
        if item in NOT_BUILT:
            where = f": {NOT_BUILT[item]}, which is not built yet"
        raise RemoteProtocolError(f"{item.value} has no place {state.value}{where}", offset=offset, section=section)
    return found
