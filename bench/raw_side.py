"""One side of the raw socket copy: the upper limit that sockets and memory allow.

Blocking sockets, ``sendall`` straight from the source's memory, ``recv_into`` straight into the destination's, no
headers, one byte back at the end. Run by :mod:`bench.sides`.
"""

from __future__ import annotations

import json
import socket
import ssl
import sys

from bench.memory import MEMORY_KINDS, Pages, allocate, fill_in_fork, mismatches

#: Bytes requested at once; more does not help, fewer cost calls.
CHUNK = 1 << 20


def connect(uri: str) -> socket.socket:
    """A connection to the destination at *uri*, ``tcp:`` or ``unix:``."""
    scheme, _, rest = uri.partition(":")
    if scheme == "unix":
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(rest)
        return connection
    host, _, port = rest.rpartition(":")
    return socket.create_connection((host, int(port)))


def listen(uri: str) -> tuple[socket.socket, str]:
    """A listener at *uri*, and its address with the real port."""
    scheme, _, rest = uri.partition(":")
    if scheme == "unix":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(rest)
        listener.listen()
        return listener, uri
    listener = socket.create_server(("127.0.0.1", 0))
    return listener, f"tcp:127.0.0.1:{listener.getsockname()[1]}"


def send_memory(pages: Pages, uri: str, tls: str | None = None) -> None:
    """Connect, send all of *pages*, and wait for the answer of the other end; over TLS with *tls*'s files."""
    with _secured(connect(uri), tls, server=False) as connection:
        connection.sendall(pages.data.cast("B"))
        if connection.recv(1) != b"k":
            raise ConnectionError("the destination closed before it had everything")


def receive_memory(pages: Pages, listener: socket.socket, tls: str | None = None) -> None:
    """Accept one connection, receive into all of *pages*, and answer."""
    connection, _ = listener.accept()
    with _secured(connection, tls, server=True) as connection, pages.data.cast("B") as view:
        have = 0
        while have < len(view):
            count = connection.recv_into(view[have : have + CHUNK])
            if count == 0:
                raise ConnectionError(f"the source closed after {have} of {len(view)} bytes")
            have += count
        connection.sendall(b"k")


def _secured(connection: socket.socket, tls: str | None, *, server: bool) -> socket.socket:
    if tls is None:
        return connection
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    side = "server" if server else "client"
    context.load_verify_locations(f"{tls}/ca-cert.pem")
    context.load_cert_chain(f"{tls}/{side}-cert.pem", f"{tls}/{side}-key.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return context.wrap_socket(connection, server_side=server, server_hostname=None if server else "localhost")


def main() -> None:
    role, size, kind, pattern = sys.argv[1:]
    pages = allocate(int(size), MEMORY_KINDS[kind])
    if role == "source":
        fill_in_fork(pages, pattern)
    _say(ready=True)
    for line in sys.stdin:
        command = json.loads(line)
        match command["do"]:
            case "listen":
                listener, address = listen(command.get("at", "tcp:127.0.0.1:0"))
                with listener:
                    _say(listening=address)
                    receive_memory(pages, listener, command.get("tls"))
                _say(finished=True)
            case "migrate":
                send_memory(pages, command["uri"], command.get("tls"))
                _say(finished=True)
            case "report":
                _say(report={})
            case "verify":
                _say(mismatches=mismatches(pages, pattern))


def _say(**message: object) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
