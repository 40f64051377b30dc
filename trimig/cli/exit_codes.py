"""The exit codes of all commands. An exit code says only what became of the guest."""

from __future__ import annotations

from typing import Final

import click

from trimig.errors import (
    ConfigError,
    GuestNotResumed,
    HandoverUncertain,
    NotOwner,
    Owner,
    Ownership,
    PostcopyLost,
    TrimigError,
)

DONE: Final = 0
#: The command failed. This side has its guest unchanged; for ``receive``: no guest arrived.
FAILED: Final = 1
#: Wrong usage; the command did nothing.
USAGE: Final = 2
#: It is not certain which side owns the guest.
UNCERTAIN: Final = 3
#: The destination has the guest without all of its memory.
INCOMPLETE: Final = 4
#: This side has the guest and could not put it back into its former run state.
NOT_RESUMED: Final = 5
#: A signal cancelled the command; otherwise as FAILED.
CANCELLED: Final = 130

#: The text of the help.
SENTENCE: Final = (
    "Exit codes: 0 done; 1 failed, and this side has its guest as it was (of receive: nothing arrived); 2 wrong usage; "
    "3 it is not certain which side owns the guest; 4 the destination has the guest without all of its memory; 5 the "
    "guest is here and could not be resumed; 130 cancelled by a signal, otherwise as 1."
)


def exit_code(error: Exception) -> int:
    """The exit code of a command that ends with *error*."""
    match error:
        case click.ClickException():
            return error.exit_code
        case ConfigError():
            return USAGE
        case PostcopyLost():
            return INCOMPLETE
        case GuestNotResumed():
            return NOT_RESUMED
        case HandoverUncertain():
            return UNCERTAIN
        case NotOwner(guest_owner=Owner.UNKNOWN):
            return UNCERTAIN
        case TrimigError(owner=Ownership.UNKNOWN):
            return UNCERTAIN
    return FAILED
