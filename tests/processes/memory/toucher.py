"""Another process for tests: maps a memfd, hands out its userfaultfd, and reads the pages that it is told to.

Arguments: a socket and the memfd, both as numbers of inherited descriptors, and the length in bytes.
"""

from __future__ import annotations

import socket
import sys

from trimig.memory import MemfdBlock, MissingPages


def main() -> None:
    """Serve until the socket ends."""
    number, memory, length = (int(text) for text in sys.argv[1:])
    mapped = MemfdBlock("child", length, fd=memory)
    missing = MissingPages.open()
    missing.register(mapped.address, mapped.length)
    with socket.socket(fileno=number) as sock:
        socket.send_fds(sock, [mapped.address.to_bytes(8, "little")], [missing.fileno()])
        while wanted := sock.recv(4):
            sock.sendall(bytes([int(mapped.pages[int.from_bytes(wanted, "little"), 0])]))


if __name__ == "__main__":
    main()
