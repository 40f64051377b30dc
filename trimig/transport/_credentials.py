"""Turns the TLS credentials of a configuration and the files they name into an SSL context for the handshake.

Directories have QEMU's layout. Every error in them is found here, before any connection is made, and reported with the
name of the file: a handshake could only report that it failed, and often only on the other side.
"""

from __future__ import annotations

import dataclasses
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NoReturn, cast

from ..config.objects import AuthzList, AuthzSimple, ConfigObject, TlsPsk, TlsX509
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..config.config import Config

Side = Literal["client", "server"]

#: The names that GnuTLS, and so QEMU, uses for parts of a distinguished name; Python uses longer names.
_SHORT: Final[Mapping[str, str]] = {
    "commonName": "CN",
    "countryName": "C",
    "domainComponent": "DC",
    "emailAddress": "EMAIL",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "stateOrProvinceName": "ST",
    "streetAddress": "street",
    "surname": "surName",
    "userId": "UID",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Everything that one side needs for its handshakes."""

    side: Side
    context: ssl.SSLContext
    #: Client: the name that the server's certificate must have, if it differs from the one in the address.
    hostname: str | None = None
    #: Server: the clients that it lets in, None for all verified ones; and the id of that list.
    authz: AuthzSimple | AuthzList | None = None

    @property
    def checks_name(self) -> bool:
        """The other side must show a certificate with the expected name."""
        return self.context.check_hostname


def load(config: Config, side: Side) -> Credentials | None:
    """The credentials that ``tls-creds`` names, with their files read and checked; None without TLS.

    Raises:
        ConfigError: there is no such object, it is for the other side, or one of its files is missing, unreadable,
            expired, or does not fit the others.
    """
    wanted = config.parameters.tls_creds
    if not wanted:
        return None
    found = _find(config, wanted, "tls-creds", "TLS credentials")
    if not isinstance(found, (TlsX509, TlsPsk)):
        raise ConfigError(f"the object {wanted!r} is {found.qom_type}, not TLS credentials", name="tls-creds")
    if found.endpoint is not None and found.endpoint != side:
        role = "connects" if side == "client" else "listens"
        raise ConfigError(
            f"the TLS credentials {wanted!r} are for a {found.endpoint}, but this side {role} (it needs endpoint={side})",
            name="tls-creds",
        )
    context = _x509(found, side) if isinstance(found, TlsX509) else _psk(found, side)
    if side == "client":
        return Credentials(side=side, context=context, hostname=config.parameters.tls_hostname or None)
    return Credentials(side=side, context=context, authz=_authz(config, context))


def system(hostname: str | None) -> Credentials:
    """Credentials for a client without any of its own: the client trusts the CAs of this machine."""
    return Credentials(side="client", context=ssl.create_default_context(), hostname=hostname)


def _find(config: Config, wanted: str, name: str, what: str) -> ConfigObject:
    for one in config.objects:
        if one.id == wanted:
            return one
    known = ", ".join(repr(one.id) for one in config.objects) or "none at all"
    raise ConfigError(f"there are no {what} with the id {wanted!r}; the objects are: {known}", name=name)


def _authz(config: Config, context: ssl.SSLContext) -> AuthzSimple | AuthzList | None:
    wanted = config.parameters.tls_authz
    if not wanted:
        return None
    found = _find(config, wanted, "tls-authz", "access rules")
    if not isinstance(found, (AuthzSimple, AuthzList)):
        raise ConfigError(f"the object {wanted!r} is {found.qom_type}, not a list of allowed clients", name="tls-authz")
    if context.verify_mode is not ssl.CERT_REQUIRED:
        raise ConfigError(
            "tls-authz needs x509 credentials with verify-peer=on: names must be proved", name="tls-authz"
        )
    return found


def _common(context: ssl.SSLContext, side: Side) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    if side == "server":
        context.num_tickets = 0  # a migration never resumes a session


# -- certificates ------------------------------------------------------------------------------------------------------


def _x509(creds: TlsX509, side: Side) -> ssl.SSLContext:
    directory = Path(creds.dir)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if side == "client" else ssl.PROTOCOL_TLS_SERVER)
    _common(context, side)
    if creds.verify_peer:
        context.check_hostname = side == "client"
        context.verify_mode = ssl.CERT_REQUIRED
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    _trust(context, directory)
    certificate, key = directory / f"{side}-cert.pem", directory / f"{side}-key.pem"
    if side == "server" or certificate.exists() or key.exists():
        _own(context, certificate, key)
        if creds.sanity_check:
            _sanity(directory, certificate, key, side)
    return context


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}", name="tls-creds") from error


def _trust(context: ssl.SSLContext, directory: Path) -> None:
    """Trust the CA of the directory, except for the certificates on its revocation list."""
    authority, revoked = directory / "ca-cert.pem", directory / "ca-crl.pem"
    _read(authority)
    try:
        context.load_verify_locations(cafile=authority)
    except ssl.SSLError as error:
        raise ConfigError(f"{authority} holds no certificate in PEM form", name="tls-creds") from error
    if not revoked.exists():
        return
    _read(revoked)
    try:
        context.load_verify_locations(cafile=revoked)
    except ssl.SSLError as error:
        raise ConfigError(f"{revoked} holds no revocation list in PEM form", name="tls-creds") from error
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


class _Passphrase(Exception):
    """OpenSSL asks for a passphrase: refuse, because OpenSSL would otherwise ask on the terminal."""


def _no_passphrase() -> NoReturn:
    raise _Passphrase


def _own(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    text = _read(certificate)
    _read(key)
    try:
        context.load_cert_chain(certificate, key, _no_passphrase)
    except _Passphrase:
        raise ConfigError(f"{key} is protected by a passphrase; give it without one", name="tls-creds") from None
    except (ssl.SSLError, ValueError) as error:
        reason = (error.reason if isinstance(error, ssl.SSLError) else None) or ""
        if "MISMATCH" in reason:
            raise ConfigError(f"{key} is not the key of {certificate}", name="tls-creds") from error
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
        except (ssl.SSLError, ValueError):
            raise ConfigError(f"{certificate} holds no certificate in PEM form", name="tls-creds") from error
        weak = "KEY_TOO_SMALL" in reason or "MD_TOO_WEAK" in reason
        raise ConfigError(
            f"{certificate} is too weak: {reason.lower().replace('_', ' ')}"
            if weak
            else f"{key} holds no private key in PEM form",
            name="tls-creds",
        ) from error


def _sanity(directory: Path, certificate: Path, key: Path, side: Side) -> None:
    """Check this side's certificate with a handshake in memory, as the peer will check it.

    Raises:
        ConfigError: expired, not valid yet, not signed by the CA, revoked, or not made for this purpose.
    """
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    judge, other = (client, server) if side == "server" else (server, client)
    other.verify_mode = ssl.CERT_NONE
    judge.verify_mode = ssl.CERT_REQUIRED
    _trust(judge, directory)
    # A client's certificate also plays the server's part here, and that part is not checked.
    _own(server, certificate, key)
    if side == "client":
        _own(client, certificate, key)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)]
    try:
        for _ in range(4):
            for end in ends:
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"{certificate} cannot be used by a {side}: {error.verify_message} (checked with ca-cert.pem beside it)",
            name="tls-creds",
        ) from error
    except ssl.SSLError as error:
        raise ConfigError(f"{certificate} and {key} cannot be used: {error}", name="tls-creds") from error


def distinguished_name(stream: ssl.SSLObject) -> str:
    """The subject of the peer's verified certificate, in the form that QEMU compares."""
    certificate = stream.getpeercert() or {}
    # A sequence of parts; each part is a set of (name, value), mostly with one element.
    subject = cast("tuple[tuple[tuple[str, str], ...], ...]", certificate.get("subject", ()))
    return ",".join("+".join(f"{_SHORT.get(name, name)}={_escaped(value)}" for name, value in part) for part in subject)


def _escaped(value: str) -> str:
    text = "".join(f"\\{c}" if c in ',+"\\<>;' else c for c in value)
    if text[:1] in ("#", " "):
        text = f"\\{text}"
    if text[-1:] == " " and len(text) > 1 and text != "\\ ":
        text = f"{text[:-1]}\\ "
    return text


# -- shared secrets ----------------------------------------------------------------------------------------------------


def _psk(creds: TlsPsk, side: Side) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if side == "client" else ssl.PROTOCOL_TLS_SERVER)
    register = getattr(context, f"set_psk_{side}_callback", None)
    if register is None:
        raise ConfigError(
            f"the TLS credentials {creds.id!r} are a shared secret (tls-creds-psk), which Python's ssl module has only "
            "from Python 3.13 on; use that, or certificates (tls-creds-x509)",
            name="tls-creds",
        )
    path = Path(creds.dir) / "keys.psk"
    keys = _keys(path)
    # The secret proves both sides to each other, so there is no certificate to check.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    _common(context, side)
    context.set_ciphers("PSK")
    if side == "client":
        if creds.username not in keys:
            raise ConfigError(f"{path} has no key of the user {creds.username!r}", name="tls-creds")
        register(lambda hint: (creds.username, keys[creds.username]))
    else:
        register(lambda identity: keys.get(identity or "", b""), "trimig")
    return context


def _keys(path: Path) -> dict[str, bytes]:
    keys: dict[str, bytes] = {}
    for number, line in enumerate(_read(path).splitlines(), 1):
        user, colon, digits = line.strip().rpartition(":")
        if not line.strip():
            continue
        try:
            key = bytes.fromhex(digits)
        except ValueError:
            key = b""
        if not colon or not user or not key:
            raise ConfigError(f"{path} line {number} is not USER:KEY with a key in hexadecimal", name="tls-creds")
        keys[user] = key
    return keys
