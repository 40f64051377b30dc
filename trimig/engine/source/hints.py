"""What a lost connection means, for the error of the source: as far as this side can know it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ...errors import Loss, TransportFailed
from ...status import IN_POSTCOPY, SWITCHING, Status
from ..outcome import add_to_message, domain_error

if TYPE_CHECKING:
    from .outgoing import Outgoing

#: Linux keeps at most 6 MiB of a connection that the peer has not read (the last number of tcp_rmem). So a peer that was
#: given more has read some of it, and has accepted the list of RAM blocks in front of it.
_UNREAD_BYTES: Final = 8 << 20

_LOG: Final = "its own log says why"
_SHAPE: Final = (
    "it has another name of the guest (of a QEMU: another machine type or version), another size of the RAM or of a ROM, or "
    "a device that one side does not have"
)
_TLS: Final = "TLS is on there (tls-creds), and off at this side"
_POSTCOPY: Final = "postcopy-ram is off there (for a QEMU: trimig set -c postcopy-ram --qmp ADDR)"
_LATE: Final = "it has died, or the link broke"
_DEVICES: Final = (
    "it has died, or the link broke, or it cannot load the devices: its own log says that. One side may have a device that the "
    "other does not have"
)


def explain(out: Outgoing, failure: BaseException | None) -> None:
    """Add the likely reason to the message of a TransportFailed, while the guest is at this side."""
    error = domain_error(failure, out.monitor.owner) if failure is not None else None
    if not isinstance(error, TransportFailed) or out.monitor.status in {Status.HANDOVER, *IN_POSTCOPY}:
        return
    link = out.link
    if error.loss is Loss.SILENT and link.is_silent:
        add_to_message(error, link.silence)
    elif error.loss is Loss.CLOSED and not link.reader.reason and (link.answers or link.reader.heard or not link.asks):
        add_to_message(error, _closed(out))


def _closed(out: Outgoing) -> str:
    """Why a destination has closed the connection, from how far it came."""
    config, heard = out.config, out.link.reader.heard
    if out.monitor.status in SWITCHING:
        return _DEVICES
    if (heard or not out.link.asks) and out.link.channels.delivered > _UNREAD_BYTES:
        return _LATE
    suspects = [_POSTCOPY] if config.capabilities.postcopy_ram else []
    if not heard and not config.parameters.tls_creds:
        suspects.append(_TLS)  # a destination with TLS takes the begin of this stream for a failed handshake
    return f"{_LOG}. Perhaps {'; or '.join([*suspects, _SHAPE])}" if suspects else f"{_LOG}. Usually {_SHAPE}"
