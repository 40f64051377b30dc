"""TLS over streams, tcp and unix: accepted and refused peers, the errors on both sides, and the stream's contract."""

from __future__ import annotations

import functools
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing
import trustme
from trio.testing import check_two_way_stream, memory_stream_pair

import trimig
from tests.transport.pki import ID, Pki, connected, outcome, secure, try_both
from trimig import transport
from trimig.config import AuthzList, AuthzRule, AuthzSimple, Config, Parameters, TlsPsk
from trimig.errors import ConfigError, TransportFailed
from trimig.testing import ScriptedGuest
from trimig.transport import _credentials, _tls

TCP = "tcp:127.0.0.1:0"


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="session")
def server(pki: Pki) -> Path:
    return pki.make("server")


@pytest.fixture(scope="session")
def client(pki: Pki) -> Path:
    return pki.make("client", "source.example", common_name="host-a")


async def said(result: object) -> str:
    """The error in *result*; with TLS 1.3 a client may believe that it is accepted, then the error of its first
    read."""
    if isinstance(result, trio.abc.Stream):
        with pytest.raises(trio.BrokenResourceError) as caught:
            await result.receive_some(1)
        await trio.aclose_forcefully(result)
        # The engine reports the cause.
        return str(caught.value.__cause__)
    assert isinstance(result, TransportFailed), result
    return str(result)


async def refused(uri: str, near: Config, far: Config) -> tuple[str, str]:
    """The errors of client and server for a failed connection."""
    one, other = await try_both(uri, near, far)
    return await said(one), await said(other)


async def exchange(near: trio.abc.Stream, far: trio.abc.Stream, size: int) -> None:
    """Both ends send *size* bytes at once and get the other's."""
    words = {near: b"near" * (size // 4), far: b"far!" * (size // 4)}
    got: dict[trio.abc.Stream, bytes] = {}

    async def receive(end: trio.abc.Stream) -> None:
        data = bytearray()
        while len(data) < size:
            data += await end.receive_some(1 << 20)
        got[end] = bytes(data)

    async with trio.open_nursery() as nursery:
        for end in (near, far):
            nursery.start_soon(receive, end)
            nursery.start_soon(end.send_all, words[end])
    assert got == {near: words[far], far: words[near]}


# -- accepted and refused peers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
async def test_both_sides_prove_themselves_and_talk(scheme: str, pki: Pki, tmp_path: Path) -> None:
    """A.1 rows 5, 9: the name in the address, or over unix the one that tls-hostname gives."""
    directory = pki.make("server")
    pki.write(directory, "client", common_name="host-a")
    uri = TCP if scheme == "tcp" else f"unix:{tmp_path}/s"
    config = secure(directory, hostname="" if scheme == "tcp" else "localhost")
    async with connected(uri, config, config) as (near, far):
        assert isinstance(near, _tls.TlsStream)
        assert near.ssl_object.version() == "TLSv1.3"
        await exchange(near, far, 3_000_000)
        await near.aclose()
        assert await far.receive_some(1) == b""


async def test_name_of_the_certificate_is_that_of_tls_hostname(pki: Pki, client: Path) -> None:
    """A.1 row 10."""
    directory = pki.make("server", "dst.example")
    async with connected(TCP, secure(client, hostname="dst.example"), secure(directory)) as (near, far):
        await exchange(near, far, 4)


async def test_wrong_name_is_refused_by_the_client_and_both_say_so(server: Path, client: Path) -> None:
    """A.1 row 11, B17."""
    near, far = await refused(TCP, secure(client, hostname="other.example"), secure(server))
    assert "not accepted: Hostname mismatch, certificate is not valid for 'other.example'" in near
    assert "with the TLS alert 'bad certificate'" in far


async def test_unix_has_no_name_to_check(server: Path, client: Path, tmp_path: Path) -> None:
    """A.1 row 4: the listening side gets an error as well."""
    near, far = await refused(f"unix:{tmp_path}/s", secure(client), secure(server))
    assert "no host name to check the certificate with; set tls-hostname" in near
    assert "the connection was cut" in far


async def test_server_of_another_ca_is_refused(client: Path, tmp_path: Path) -> None:
    """B17."""
    near, far = await refused(TCP, secure(client), secure(Pki(tmp_path).make("server")))
    assert "the certificate of the other side is not accepted" in near
    assert "unknown ca" in far


async def test_client_without_a_certificate_is_refused_by_a_server_that_verifies(server: Path, pki: Pki) -> None:
    """A.1 row 15: TLS 1.3 tells the client after its handshake; the client's error has the alert, in words."""
    near, far = await refused(TCP, secure(pki.anonymous()), secure(server))
    assert "TLS alert 'certificate required': it wants to see a certificate of this side" in near
    assert "the client shows no certificate, and verify-peer asks for one" in far


async def test_client_without_a_certificate_is_let_in_by_a_server_that_does_not_verify(server: Path, pki: Pki) -> None:
    """A.1 row 14."""
    async with connected(TCP, secure(pki.anonymous()), secure(server, verify_peer=False)) as (near, far):
        await exchange(near, far, 4)


async def test_client_that_does_not_verify_goes_anywhere(client: Path, tmp_path: Path) -> None:
    directory = Pki(tmp_path).make("server", "elsewhere.example")
    config = secure(client, verify_peer=False)
    async with connected(TCP, config, secure(directory, verify_peer=False)) as (near, far):
        await exchange(near, far, 4)


async def test_only_clients_on_the_list_are_let_in(server: Path, client: Path) -> None:
    """A.1 rows 12, 13: names are compared in QEMU's form."""
    rule = AuthzRule(match="*,CN=host-a", policy="allow", format="glob")
    friendly = secure(server, AuthzList(id="who", rules=(rule,)), authz="who")
    async with connected(TCP, secure(client), friendly) as (near, far):
        await exchange(near, far, 4)
    hostile = secure(server, AuthzSimple(id="who", identity="CN=host-b"), authz="who")
    near_says, far_says = await refused(TCP, secure(client), hostile)
    assert "tls-authz 'who' does not let 'O=trustme v" in far_says
    assert ",CN=host-a' in" in far_says
    assert "the other side may not want TLS, or not this side's certificate" in near_says


async def test_revoked_server_is_refused(pki: Pki, tmp_path: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    directory = pki.make("server")
    leaf = x509.load_pem_x509_certificate((directory / "server-cert.pem").read_bytes())
    key = serialization.load_pem_private_key(pki.ca.private_key_pem.bytes(), None)
    assert leaf.not_valid_before_utc
    entry = x509.RevokedCertificateBuilder().serial_number(leaf.serial_number)
    crl = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(leaf.issuer)
        .last_update(leaf.not_valid_before_utc)
        .next_update(leaf.not_valid_after_utc)
        .add_revoked_certificate(entry.revocation_date(leaf.not_valid_before_utc).build())
        .sign(key, hashes.SHA256())  # type: ignore[arg-type]  # the CA's key is not one of Diffie-Hellman
    )
    sceptic = pki.make("client")
    (sceptic / "ca-crl.pem").write_bytes(crl.public_bytes(serialization.Encoding.PEM))
    near, far = await refused(TCP, secure(sceptic), secure(directory))
    assert "certificate revoked" in near
    assert "certificate revoked" in far
    async with connected(TCP, secure(sceptic), secure(pki.make("server"))) as (one, other):
        await exchange(one, other, 4)


# -- one side without TLS ----------------------------------------------------------------------------------------------


async def test_plain_client_of_a_tls_server_is_told_apart(server: Path) -> None:
    async with transport.listening(TCP, lambda _: None, secure(server)) as listener, trio.open_nursery() as nursery:

        async def plain() -> None:
            stream = await transport.connect(listener.uri)
            assert isinstance(stream, trio.SocketStream)
            async with stream:
                await stream.send_all(b"QEVM\0\0\0\3" + bytes(100))
                with trio.move_on_after(5):
                    try:
                        while await stream.receive_some():
                            pass
                    except trio.BrokenResourceError:
                        return

        nursery.start_soon(plain)
        with pytest.raises(TransportFailed, match=r"is not TLS; is TLS turned on there \(tls-creds\)\?"):
            await listener.accept()


async def test_tls_client_of_a_plain_server_says_what_it_may_be(client: Path) -> None:
    """The server finds no magic, and drops the connection, but goes on. The client cannot tell the reason."""
    guest, monitor = ScriptedGuest(run_state="prelaunch"), trimig.Monitor()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(
                    trimig.MigrationCancelled, match=r"enough; the source has TLS on.*set tls-creds there"
                ):
                    await trimig.receive(guest, TCP, monitor=monitor)

            nursery.start_soon(receive)
            while not monitor.addresses:
                await monitor.wait_changed()
            with pytest.raises(TransportFailed, match=r"no TLS with tcp:127\.0\.0\.1:"):
                await transport.connect(monitor.addresses[0], secure(client))
            assert monitor.status is trimig.Status.SETUP
            monitor.cancel("enough")


async def test_silent_peer_has_a_limited_time(client: Path, autojump_clock: trio.testing.MockClock) -> None:
    near, _far = memory_stream_pair()
    credentials = _credentials.load(secure(client), "client")
    assert credentials is not None
    with pytest.raises(TransportFailed, match="the handshake was not over within 20 s"):
        await _tls.secure(near, credentials, "the test", "localhost")
    with pytest.raises(trio.ClosedResourceError):
        await near.send_all(b"x")


async def test_cancelled_handshake_leaves_nothing_open(client: Path) -> None:
    """T3, rule C4: the stream below is closed."""
    near, far = memory_stream_pair()
    credentials = _credentials.load(secure(client), "client")
    assert credentials is not None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_tls.secure, near, credentials, "the test", "localhost")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    while await far.receive_some():
        pass  # the client's hello


async def test_listener_goes_on_after_a_client_that_failed(server: Path, client: Path) -> None:
    async with transport.listening(TCP, lambda _: None, secure(server)) as listener:
        results: list[object] = []
        for config in (secure(client, hostname="x.example"), secure(client)):
            async with trio.open_nursery() as nursery:

                async def connect(config: Config = config) -> None:
                    results.append(await outcome(transport.connect(listener.uri, config)))

                nursery.start_soon(connect)
                results.append(await outcome(listener.accept()))
    assert sum(isinstance(result, TransportFailed) for result in results[:2]) == 2
    for stream in results[2:]:
        assert isinstance(stream, _tls.TlsStream)
        await trio.aclose_forcefully(stream)


# -- errors in the files -----------------------------------------------------------------------------------------------


def spoil(directory: Path, name: str, content: bytes | None) -> None:
    path = directory / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
@pytest.mark.parametrize(("content", "words"), [(None, "No such file or directory"), (b"no", "in PEM form")])
async def test_bad_file_is_named_before_a_peer_connects(name: str, content: bytes | None, words: str, pki: Pki) -> None:
    """B17."""
    directory = pki.make("server")
    spoil(directory, name, content)
    with pytest.raises(ConfigError, match=words) as caught:
        async with transport.listening(TCP, lambda _: None, secure(directory)):
            pass
    assert str(directory / name) in str(caught.value)
    assert caught.value.name == "tls-creds"


@pytest.mark.parametrize("side", ["client", "server"])
def test_expired_certificate_is_named(side: _credentials.Side, pki: Pki) -> None:
    """B17; with sanity-check=off the other side refuses."""
    directory = pki.make(side, expired=True)
    with pytest.raises(ConfigError, match=f"{side}-cert.pem cannot be used by a {side}: certificate has expired"):
        _credentials.load(secure(directory), side)


def test_foreign_certificate_and_foreign_key_are_named(pki: Pki) -> None:
    """B17."""
    directory, other = pki.make("server"), pki.make("server")
    spoil(other, "ca-cert.pem", trustme.CA().cert_pem.bytes())
    with pytest.raises(ConfigError, match=r"server-cert.pem cannot be used by a server: .*issuer"):
        _credentials.load(secure(other), "server")
    spoil(other, "server-key.pem", (directory / "server-key.pem").read_bytes())
    with pytest.raises(ConfigError, match=r"server-key.pem is not the key of .*server-cert.pem"):
        _credentials.load(secure(other), "server")


def test_passphrase_is_not_asked_for(pki: Pki) -> None:
    from cryptography.hazmat.primitives import serialization as form

    directory = pki.make("server")
    key = form.load_pem_private_key((directory / "server-key.pem").read_bytes(), None)
    secret = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.BestAvailableEncryption(b"secret"))
    spoil(directory, "server-key.pem", secret)
    with pytest.raises(ConfigError, match=r"server-key\.pem is protected by a passphrase"):
        _credentials.load(secure(directory), "server")


def test_credentials_that_do_not_exist_or_are_for_the_other_side_are_refused(server: Path) -> None:
    """B17: a missing object."""
    missing = Config(parameters=Parameters(tls_creds="tls1"), objects=secure(server).objects)
    with pytest.raises(ConfigError, match="no TLS credentials with the id 'tls1'; the objects are: 'tls0'"):
        _credentials.load(missing, "server")
    with pytest.raises(ConfigError, match=r"for a client, but this side listens \(it needs endpoint=server\)"):
        _credentials.load(secure(server, endpoint="client"), "server")
    wrong = Config(parameters=Parameters(tls_creds="a"), objects=(AuthzSimple(id="a", identity="x"),))
    with pytest.raises(ConfigError, match="is authz-simple, not TLS credentials"):
        _credentials.load(wrong, "client")
    assert _credentials.load(Config(), "client") is None


def test_access_rules_that_cannot_work_are_refused(server: Path) -> None:
    with pytest.raises(ConfigError, match="no access rules with the id 'who'"):
        _credentials.load(secure(server, authz="who"), "server")
    with pytest.raises(ConfigError, match="not a list of allowed clients"):
        _credentials.load(secure(server, authz=ID), "server")
    config = secure(server, AuthzSimple(id="who", identity="x"), authz="who", verify_peer=False)
    with pytest.raises(ConfigError, match="needs x509 credentials with verify-peer=on"):
        _credentials.load(config, "server")


async def test_failed_credentials_are_the_error_of_the_migration(tmp_path: Path) -> None:
    """B17: status failed, with text; the guest runs."""
    guest, monitor = ScriptedGuest(run_state="running"), trimig.Monitor()
    with pytest.raises(ConfigError, match=r"cannot read .*ca-cert.pem"):
        await trimig.migrate(guest, "tcp:127.0.0.1:1", secure(tmp_path), monitor=monitor)
    assert monitor.info()["status"] == "failed"
    assert "ca-cert.pem" in str(monitor.info()["error-desc"])
    assert guest.run_state == "running"


# -- shared secrets ----------------------------------------------------------------------------------------------------

HAS_PSK = hasattr(ssl.SSLContext, "set_psk_client_callback")
needs_psk = pytest.mark.skipif(not HAS_PSK, reason="Python's ssl has PSK from 3.13 on")


def shared(directory: Path, key: str = "00112233445566778899aabbccddeeff", **options: str) -> Config:
    directory.mkdir(exist_ok=True)
    (directory / "keys.psk").write_text(f"other:ff\nqemu:{key}\n")
    return Config(parameters=Parameters(tls_creds=ID), objects=(TlsPsk(id=ID, dir=directory, **options),))  # type: ignore[arg-type]  # words


@pytest.mark.skipif(HAS_PSK, reason="this Python has PSK")
def test_psk_is_refused_with_a_reason_where_python_has_none(tmp_path: Path) -> None:
    """A.1 rows 3, 7, 8."""
    with pytest.raises(ConfigError, match=r"only from Python 3\.13 on; use that, or certificates"):
        _credentials.load(shared(tmp_path), "client")


@needs_psk
async def test_same_key_passes_over_tcp_and_unix(tmp_path: Path) -> None:
    """A.1 rows 3, 7: no certificates, and no name to check."""
    config = shared(tmp_path / "keys")
    for uri in (TCP, f"unix:{tmp_path}/s"):
        async with connected(uri, config, config) as (near, far):
            await exchange(near, far, 4)


@needs_psk
async def test_different_keys_fail_and_both_sides_say_so(tmp_path: Path) -> None:
    """A.1 row 8."""
    near, far = await refused(TCP, shared(tmp_path / "a"), shared(tmp_path / "b", key="ff" * 16))
    assert "TLS" in near
    assert far


@needs_psk
@pytest.mark.parametrize(
    ("text", "words"), [("qemu:xy", "line 1 is not USER:KEY"), ("x:00", "has no key of the user 'qemu'")]
)
def test_bad_keys_are_named(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "keys.psk").write_text(text)
    with pytest.raises(ConfigError, match=words):
        _credentials.load(Config(parameters=Parameters(tls_creds=ID), objects=(TlsPsk(id=ID, dir=tmp_path),)), "client")


# -- the stream --------------------------------------------------------------------------------------------------------


def pair_over(make: Callable[[], Awaitable[tuple[trio.abc.Stream, trio.abc.Stream]]], near: Config, far: Config):  # type: ignore[no-untyped-def]  # for trio's checks
    async def pair() -> tuple[_tls.TlsStream, _tls.TlsStream]:
        below = await make()
        sides = _credentials.load(near, "client"), _credentials.load(far, "server")
        ends = [
            _tls.TlsStream(one, side, "localhost" if side.side == "client" else None)
            for one, side in zip(below, sides, strict=True)
            if side is not None
        ]
        async with trio.open_nursery() as nursery:
            for end in ends:
                nursery.start_soon(end.do_handshake)
        return ends[0], ends[1]

    return pair


async def memory_pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
    await trio.lowlevel.checkpoint()
    return memory_stream_pair()


async def lockstep_pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
    await trio.lowlevel.checkpoint()
    return trio.testing.lockstep_stream_pair()


async def socket_pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
    await trio.lowlevel.checkpoint()
    one, other = trio.socket.socketpair()
    return trio.SocketStream(one), trio.SocketStream(other)


@pytest.mark.parametrize("below", [memory_pair, socket_pair])
async def test_it_is_a_stream_as_trio_wants_it(
    below: Callable[[], Awaitable[tuple[trio.abc.Stream, trio.abc.Stream]]], server: Path, client: Path
) -> None:
    make = functools.partial(pair_over, near=secure(client), far=secure(server))
    await check_two_way_stream(make(below), make(lockstep_pair) if below is memory_pair else None)


async def test_cut_connection_is_an_error_and_an_orderly_end_is_not(server: Path, client: Path) -> None:
    below: list[trio.abc.Stream] = []

    async def sockets() -> tuple[trio.abc.Stream, trio.abc.Stream]:
        below.extend(await socket_pair())
        return below[-2], below[-1]

    pair = pair_over(sockets, secure(client), secure(server))
    near, far = await pair()
    await near.send_all(b"something")
    await below[0].aclose()
    assert await far.receive_some() == b"something"
    with pytest.raises(trio.BrokenResourceError, match="the connection was cut"):
        await far.receive_some()
    await trio.aclose_forcefully(far)
    near, far = await pair()
    await near.send_all(b"something")
    with trio.CancelScope() as scope:
        scope.cancel()
        await near.aclose()  # the peer does not wait, and the end is announced all the same
    assert await far.receive_some() == b"something"
    assert await far.receive_some() == b""
    await trio.aclose_forcefully(far)


async def test_sender_is_told_why_the_other_side_refused(server: Path, pki: Pki) -> None:
    """A.1 row 15, with no task reading: the write fails, and the error has the alert that came before."""
    near, far = await try_both(TCP, secure(pki.anonymous()), secure(server))
    assert isinstance(far, TransportFailed)
    assert isinstance(near, trio.abc.Stream)
    with pytest.raises(trio.BrokenResourceError) as caught:
        await near.send_all(bytes(64 << 20))
    assert "certificate required" in str(caught.value.__cause__)
    with pytest.raises(trio.BrokenResourceError, match="certificate required"):
        await near.send_all(b"x")
    await trio.aclose_forcefully(near)


async def test_stream_of_one_direction_cannot_carry_tls(client: Path) -> None:
    credentials = _credentials.load(secure(client), "client")
    assert credentials is not None
    one_way, _ = trio.testing.memory_stream_one_way_pair()
    with pytest.raises(ConfigError, match="has only one direction, and TLS needs both"):
        await _tls.secure(one_way, credentials, "file:x", "localhost")
    with pytest.raises(trio.ClosedResourceError):
        await one_way.send_all(b"x")


async def test_host_name_that_is_none_is_refused(server: Path, client: Path) -> None:
    near, _ = memory_stream_pair()
    credentials = _credentials.load(secure(client, hostname=".x"), "client")
    assert credentials is not None
    with pytest.raises(ConfigError, match=r"'\.x' cannot be the name of a host"):
        await _tls.secure(near, credentials, "the test")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("B, C", "B\\, C"),
        ('Über"<>;#', 'Über\\"\\<\\>\\;#'),
        (" # lead+trail ", "\\ # lead\\+trail\\ "),
        ("#u\\v=w", "\\#u\\\\v=w"),
        (" ", "\\ "),
        ("", ""),
    ],
)
def test_names_are_escaped_as_gnutls_does(value: str, expected: str) -> None:
    """In the form in which QEMU 7.2 printed them for such a certificate."""
    assert _credentials._escaped(value) == expected
