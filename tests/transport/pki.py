"""Throw-away certificates in directories with QEMU's layout, and streams between two ends of trimig."""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio
import trustme

from trimig import transport
from trimig.config import Config, ConfigObject, Parameters, TlsX509
from trimig.errors import ConfigError, TrimigError

ID: Final = "tls0"


class Pki:
    """A CA, and a directory for each set of credentials that it has signed.

    Args:
        root: the directories are made below it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._count = 0
        self.ca = trustme.CA()

    def _directory(self) -> Path:
        self._count += 1
        directory = self._root / f"pki{self._count}"
        directory.mkdir(parents=True)
        self.ca.cert_pem.write_to_path(str(directory / "ca-cert.pem"))
        return directory

    def anonymous(self) -> Path:
        """Only the CA: a client without a certificate."""
        return self._directory()

    def make(self, side: str, *names: str, common_name: str | None = None, expired: bool = False) -> Path:
        """Credentials of a server with these names (localhost and 127.0.0.1 if none), or of a client."""
        directory = self._directory()
        self.write(directory, side, *names, common_name=common_name, expired=expired)
        return directory

    def write(
        self, directory: Path, side: str, *names: str, common_name: str | None = None, expired: bool = False
    ) -> None:
        """Put the certificate and key of *side* into *directory*."""
        now = datetime.datetime.now(datetime.UTC)
        cert = self.ca.issue_cert(
            *(names or ("localhost", "127.0.0.1")),
            common_name=common_name,
            not_before=now - datetime.timedelta(days=9),
            not_after=now + datetime.timedelta(days=-2 if expired else 2),
        )
        (directory / f"{side}-cert.pem").write_bytes(b"".join(pem.bytes() for pem in cert.cert_chain_pems))
        (directory / f"{side}-key.pem").write_bytes(cert.private_key_pem.bytes())


def secure(
    directory: Path | None,
    *more: ConfigObject,
    hostname: str = "",
    authz: str = "",
    verify_peer: bool = True,
    endpoint: str | None = None,
) -> Config:
    """A configuration with the certificates of *directory*, or without TLS."""
    if directory is None:
        return Config()
    creds = TlsX509(id=ID, dir=directory, verify_peer=verify_peer, endpoint=endpoint)  # type: ignore[arg-type]  # a word
    return Config(parameters=Parameters(tls_creds=ID, tls_hostname=hostname, tls_authz=authz), objects=(creds, *more))


Ends = tuple[trio.abc.Stream, trio.abc.Stream]


async def outcome(call: Awaitable[object]) -> object:
    """The result of *call*, or the trimig error that it raises."""
    try:
        return await call
    except TrimigError as error:
        return error


async def try_both(uri: str, client: Config, server: Config, to: Callable[[str], str] = str) -> tuple[object, object]:
    """The results of a connecting client and an accepting server: a stream, or an error."""
    found: dict[str, object] = {}
    with trio.fail_after(30):
        async with transport.listening(uri, lambda _: None, server) as listener, trio.open_nursery() as nursery:

            async def accept() -> None:
                found["server"] = await outcome(listener.accept())

            nursery.start_soon(accept)
            found["client"] = await outcome(transport.connect(to(listener.uri), client))
            if isinstance(found["client"], ConfigError):
                found["server"] = None  # there was no connection
                nursery.cancel_scope.cancel()
    return found["client"], found["server"]


@asynccontextmanager
async def connected(uri: str, client: Config, server: Config) -> AsyncIterator[Ends]:
    """A connection between two ends of trimig: client, server."""
    near, far = await try_both(uri, client, server)
    for end in (near, far):
        if isinstance(end, TrimigError):
            raise end
    assert isinstance(near, trio.abc.Stream)
    assert isinstance(far, trio.abc.Stream)
    try:
        yield near, far
    finally:
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(near)
            await trio.aclose_forcefully(far)
