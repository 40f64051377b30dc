"""TLS over any stream of both directions.

:class:`trio.SSLStream` returns one TLS record (16 KiB) for each call. With both ends in Python it reached 0.3 of the
speed of blocking sockets. This class is faster than blocking sockets, because it decrypts all available records into
the caller's buffer. It also keeps two things that trio's class hides. One is the alert of a peer that has refused,
although the write fails first. The other is close_notify, the announced end, even if there is no time left to wait.
"""

from __future__ import annotations

import contextlib
import math
import re
import ssl
from typing import TYPE_CHECKING, Final, NoReturn, cast

import trio

from .. import formats
from ..channel.socket_options import enlarge
from ..errors import ConfigError, TransportFailed
from ._credentials import Credentials, distinguished_name
from ._interface import Listener
from ._layered import HANDSHAKE_SECONDS, READ_BYTES, LayeredStream, closed_on_failure, text_of

if TYPE_CHECKING:
    from ..channel.channel import AnyStream

#: Seconds for the alert behind a failed write, and seconds for an orderly end.
_VERDICT_SECONDS: Final = 1.0
_CLOSE_SECONDS: Final = 1.0
#: Bytes that are encrypted and handed over at once; about 0.2 ms of work.
_PIECE: Final = 1 << 18

_ALERT = re.compile(r"(?:SSLV3|TLSV1|TLSV13)_ALERT_(.+)")
#: OpenSSL's errors for bytes that are not TLS.
_NO_TLS: Final = frozenset(
    {
        "WRONG_VERSION_NUMBER",
        "PACKET_LENGTH_TOO_LONG",
        "HTTP_REQUEST",
        "HTTPS_PROXY_REQUEST",
        "RECORD_LAYER_FAILURE",
        "BAD_RECORD_TYPE",
        "UNKNOWN_PROTOCOL",
    }
)
#: Explanations of alerts whose name does not say enough.
_ALERT_HINTS: Final = {
    "certificate required": "it wants to see a certificate of this side",
    "unknown ca": "it does not know the CA that signed this side's certificate",
    "certificate unknown": "it does not accept this side's certificate",
    "bad certificate": "it does not accept this side's certificate",
    "handshake failure": "the two sides have no way of authentication or encryption in common",
    "decrypt error": "the two sides have different keys",
    "unknown psk identity": "it does not know this user, or not with this key",
}
#: Hint for peers that close without a TLS alert (QEMU does).
_CLOSE_HINT: Final = "the other side may not want TLS, or not this side's certificate, name or key"


def reason(error: ssl.SSLError) -> str:
    """The reason of the failure in words, seen from this side."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate of the other side is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLEOFError):
        return "the connection was cut (it ended without the end of TLS)"
    code = error.reason or ""
    if alert := _ALERT.fullmatch(code):
        name = alert[1].lower().replace("_", " ")
        behind = f": {_ALERT_HINTS[name]}" if name in _ALERT_HINTS else ""
        return f"the other side refused, with the TLS alert '{name}'{behind}"
    if code in _NO_TLS:
        return "what the other side sends is not TLS; is TLS turned on there (tls-creds)?"
    if code == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "the client shows no certificate, and verify-peer asks for one"
    return code.lower().replace("_", " ") or str(error)


class TlsStream(LayeredStream):
    """One end of a TLS connection; :func:`secure` makes them.

    Args:
        transport: is owned, and closed with this stream.
        tls: the credentials; their context decides which side this is.
        name: the server's name, for a client.
    """

    def __init__(self, transport: trio.abc.Stream, tls: Credentials, name: str | None = None) -> None:
        super().__init__(transport, "TLS connection")
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = tls.side == "server"
        self._ssl = tls.context.wrap_bio(self._in, self._out, server_side=server, server_hostname=name)
        self._raw = memoryview(bytearray(READ_BYTES))
        self._handshake_done = False
        self._ended = False  # the peer sent close_notify
        self._peer_has_sent = False  # a byte of the peer came after the handshake
        self._verdict = trio.Event()

    def peer_certificate(self) -> bytes | None:
        """The verified certificate of the peer, in DER; None without one."""
        return self._ssl.getpeercert(True)

    @property
    def ssl_object(self) -> ssl.SSLObject:
        """Python's information about the connection: version, cipher, the peer's certificate."""
        return self._ssl

    # -- the transport below -------------------------------------------------------------------------------------------

    async def _flush(self) -> None:
        """Send the encrypted bytes. One task at a time, so that the order of records is kept."""
        async with self._below.writing:
            while self._out.pending:
                await self._below.write(self._out.read())

    async def _fill(self) -> None:
        """Take in received bytes, or the end of the transport."""
        if count := await self._below.read_into(self._raw):
            self._in.write(self._raw[:count])
        else:
            self._in.write_eof()

    # -- handshake -----------------------------------------------------------------------------------------------------

    async def do_handshake(self) -> None:
        """Agree on keys, and check the certificate of the other side as far as the configuration asks for it.

        Raises:
            trio.BrokenResourceError: the handshake failed; the cause says why. The peer was told, as far as TLS can.

        **Cancellation:** the stream can only be closed.
        """
        try:
            while True:
                try:
                    self._ssl.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    # A failed write may have its reason, an alert, among the bytes to read.
                    with contextlib.suppress(trio.BrokenResourceError):
                        await self._flush()
                    await self._fill()
            await self._flush()
        except ssl.SSLError as error:
            # Send the alert to the other side; a failure to send it adds nothing to the error.
            with contextlib.suppress(trio.BrokenResourceError), trio.move_on_after(_CLOSE_SECONDS):
                await self._flush()
            self._fail_by(error)
        except trio.BrokenResourceError as error:
            self._break(f"{text_of(error)}, in the handshake; {_CLOSE_HINT}", error)
        self._handshake_done = True
        if self._below.socket is not None:
            enlarge(self._below.socket)

    def _fail_by(self, error: ssl.SSLError) -> NoReturn:
        words = reason(error)
        if isinstance(error, ssl.SSLEOFError) and not self._peer_has_sent:
            words = f"{words}; {_CLOSE_HINT}"
        self._break(words, error)

    def _break(self, words: str, error: Exception) -> NoReturn:
        """Raise an error with the text *words* and the cause *error*. Every later call raises the same error."""
        self._verdict.set()
        broken = ssl.SSLError(0, words)
        broken.__cause__ = error
        self._fail(broken)

    # -- sending -------------------------------------------------------------------------------------------------------

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of *data*, encrypted in large pieces.

        **Cancellation:** a part may have been sent; nothing more can be sent.
        """
        with self._sending:
            await trio.lowlevel.checkpoint_if_cancelled()
            self._check_whole()
            view = memoryview(data).cast("B")
            if not view:
                await trio.lowlevel.cancel_shielded_checkpoint()
            for start in range(0, len(view), _PIECE):
                try:
                    self._encrypt(view[start : start + _PIECE])
                    await self._flush()
                except ssl.SSLError as error:
                    self._fail_by(error)
                except trio.BrokenResourceError as error:
                    self._check_open(error)
                    await self._await_verdict()
                    self._break(text_of(error), error)

    def _encrypt(self, piece: memoryview) -> None:
        while piece:
            piece = piece[self._ssl.write(piece) :]

    async def _await_verdict(self) -> None:
        """Wait for the alert of the peer after a failed write: if the peer has refused, the alert has the reason."""
        with trio.move_on_after(_VERDICT_SECONDS):
            if self._receiving.inside:
                await self._verdict.wait()
                return
            scratch = memoryview(bytearray(1 << 14))
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
                while await self.receive_into(scratch):
                    pass  # data from before the refusal does not matter any more

    # -- receiving -----------------------------------------------------------------------------------------------------

    async def receive_into(self, view: memoryview) -> int:
        """Like :meth:`receive_some`, into *view*, all that has arrived; returns the number of bytes, 0 at the end.

        **Cancellation:** nothing was taken.
        """
        with self._receiving:
            await trio.lowlevel.checkpoint_if_cancelled()
            self._check_open()
            try:
                # An earlier call left an answer to the peer's key update; a task that sends takes it along.
                if self._out.pending and not self._below.writing.locked():
                    await self._flush()
                waited = False
                while (count := self._decrypt(view)) is None:
                    await self._fill()
                    waited = True
                if not waited:
                    await trio.lowlevel.cancel_shielded_checkpoint()
                return count
            except ssl.SSLError as error:
                self._fail_by(error)
            except trio.BrokenResourceError as error:
                self._check_open(error)
                words = text_of(error)
                if not self._peer_has_sent:
                    words = f"{words}; {_CLOSE_HINT}"
                self._break(words, error)

    def _decrypt(self, view: memoryview) -> int | None:
        """The number of bytes put into *view*: 0 at the end, None if more must arrive first."""
        done = 0
        while done < len(view) and not self._ended:
            try:
                # With a buffer `read` returns a number; any buffer will do.
                count = cast("int", self._ssl.read(len(view) - done, cast("bytearray", view[done:])))
            except ssl.SSLWantReadError:
                if not done:
                    return None
                break
            except ssl.SSLZeroReturnError:
                count = 0
            except ssl.SSLError:
                # The data before the error is valid; the next call raises the error again.
                if not done:
                    raise
                break
            self._ended = count == 0
            done += count
        self._peer_has_sent = True
        if self._ended:
            self._verdict.set()
        return done

    # -- the end -------------------------------------------------------------------------------------------------------

    async def announce_end(self) -> None:
        """Send a close_notify.

        **Cancellation:** the stream can only be closed.
        """
        if not self._handshake_done or self._failure is not None or self._below.cut:
            return
        # The usual error is that the peer's close_notify has not come; it is not waited for.
        with contextlib.suppress(ssl.SSLError):
            self._ssl.unwrap()
        if self._out.pending and not self._below.writing.locked():
            await self._below.write_last(self._out.read(), _CLOSE_SECONDS)


# -- what the transports use -------------------------------------------------------------------------------------------


async def secure(
    stream: AnyStream, tls: Credentials, where: str, name: str | None = None, *, seconds: float = HANDSHAKE_SECONDS
) -> TlsStream:
    """*stream* with TLS over it, after the handshake. The function owns *stream*, and closes it unless it succeeds.

    Args:
        where: the address, for messages.
        name: the host in that address, for a client whose configuration names none.
        seconds: for the handshake.

    Raises:
        ConfigError: the stream has only one direction, or the name cannot be the name of a host.
        TransportFailed: the handshake failed, took too long, or one side does not accept the other.

    **Cancellation:** the stream is closed.
    """
    async with closed_on_failure(stream):
        if not isinstance(stream, trio.abc.Stream):
            raise ConfigError(f"{where} has only one direction, and TLS needs both", name="tls-creds")
        name = tls.hostname or name
        if tls.checks_name and not name:
            # Only here and not earlier, so that the other side, which waits in the handshake, gets an error as well.
            raise TransportFailed(
                f"no TLS with {where}: there is no host name to check the certificate with; set tls-hostname"
            )
        try:
            secured = TlsStream(stream, tls, name)
        except ValueError as error:
            raise ConfigError(f"{name!r} cannot be the name of a host: {error}", name="tls-hostname") from error
        with trio.move_on_after(seconds) as limit:
            try:
                await secured.do_handshake()
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise TransportFailed(f"no TLS with {where}: {error}") from error.__cause__
        if limit.cancelled_caught:
            raise TransportFailed(f"no TLS with {where}: the handshake was not over within {formats.duration(seconds)}")
        try:
            who = distinguished_name(secured.ssl_object) if tls.authz is not None else ""
        except ValueError as error:
            raise TransportFailed(f"no TLS with {where}: the certificate's name cannot be read: {error}") from error
        if tls.authz is not None and not tls.authz.allows(who):
            raise TransportFailed(f"no TLS with {where}: tls-authz {tls.authz.id!r} does not let {who!r} in")
        return secured


class TlsListener(Listener):
    """A listener whose connections begin with a TLS handshake.

    A client that fails in the handshake makes :meth:`accept` raise; the listener can go on to the next one.
    """

    def __init__(self, inner: Listener, tls: Credentials) -> None:
        self._inner = inner
        self._tls = tls

    @property
    def uri(self) -> str:
        """The address to connect to."""
        return self._inner.uri

    async def accept(self) -> TlsStream:
        """The next connection, after its handshake.

        Raises:
            TransportFailed: the handshake failed.

        **Cancellation:** the connection, if there was one, is closed.
        """
        return await secure(await self._inner.accept(), self._tls, f"the client at {self.uri}")

    async def meet(self) -> AnyStream:
        """The next connection, before its handshake. OSError if the system refuses it.

        **Cancellation:** nothing was accepted.
        """
        return await self._inner.meet()

    async def admit(self, stream: AnyStream) -> TlsStream:
        """*stream* after its handshake, without a time limit.

        Raises:
            TransportFailed: the handshake failed.

        **Cancellation:** *stream* is closed.
        """
        return await secure(stream, self._tls, f"the client at {self.uri}", seconds=math.inf)

    def close(self) -> None:
        """Stop listening."""
        self._inner.close()
