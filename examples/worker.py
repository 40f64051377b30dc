"""A worker of a ``trimig.ProcessGuest`` in Python: it writes its memory page after page, and can verify it.

Run without arguments, it shows itself: it hosts this worker twice and migrates the guest from one to the other. The
protocol is on the page protocol/worker.md; ``worker.c`` is the same in C, with dirty tracking by the kernel. Write n
(from 1 on) fills page (n - 1) % pages with the number n.
"""

import mmap
import os
import select
import socket
import sys

PAGE = 4096


class Worker:
    def __init__(self) -> None:
        self.ram = memoryview(b"")
        self.pages = self.count = self.throttle = 0
        self.running = False

    def write_page(self) -> None:
        start = self.count % self.pages * PAGE
        self.count += 1
        self.ram[start : start + PAGE] = self.count.to_bytes(8, "little") * (PAGE // 8)

    def is_whole(self) -> bool:
        for page in range(self.pages):
            last = (self.count - 1 - page) // self.pages * self.pages + page + 1 if page < self.count else 0
            if self.ram[page * PAGE : (page + 1) * PAGE] != last.to_bytes(8, "little") * (PAGE // 8):
                return False
        return True

    def answer(self, verb: str, words: list[str], body: bytes) -> tuple[str, bytes]:
        """The first words of the reply, and its body."""
        match verb:
            case "hello":
                return "ok 1 throttle", b""  # not "track": trimig finds the written pages by comparing
            case "ram":
                fd, length = int(words[0]), int(words[1])
                self.ram, self.pages = memoryview(mmap.mmap(fd, length)), length // PAGE
                return "ok 0", b""  # the address, which only the capabilities need
            case "throttle":
                self.throttle = int(words[0])
            case "pause" | "resume":
                self.running = verb == "resume"
            case "save":
                return "ok", str(self.count).encode()
            case "load":
                self.count = int(body)
            case "x-verify":
                return (f"ok {self.count}", b"") if self.is_whole() else ("error", b"a page is wrong")
            case "create" | "ping" | "quit":
                pass
            case _:
                return "error", b"this worker does not know " + verb.encode()
        return "ok", b""


def work(control: socket.socket) -> None:
    worker, verb = Worker(), ""
    while verb != "quit":
        pause = 0.1 / (100 - worker.throttle)  # 1 ms without a throttle, 2 ms with 50 percent
        if select.select([control], [], [], pause if worker.running else None)[0]:
            packet = control.recv(65536)
            if not packet:  # the host has ended
                return
            line, _, body = packet.partition(b"\n")
            number, verb, *words = line.decode().split(" ")
            reply, body = worker.answer(verb, words, body)
            control.send(f"{number} {reply}\n".encode() + body)
        for _ in range(8 if worker.running else 0):
            worker.write_page()


async def show() -> None:
    import trio
    import trio.testing

    import trimig

    argv = [sys.executable, __file__]
    a, b = trio.testing.memory_stream_pair()
    async with (
        trimig.ProcessGuest.open(argv, ram=4 * trimig.MiB, dirty_tracking="compare") as here,
        trimig.ProcessGuest.open(argv, ram=4 * trimig.MiB, running=False, dirty_tracking="compare") as there,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(trimig.receive, there, b)
        await trimig.migrate(here, a)
        print("written and verified:", int((await there.ask("x-verify")).words[0]) > 0)


if __name__ == "__main__":
    if descriptor := os.environ.get("TRIMIG_WORKER_SOCKET"):
        with socket.socket(fileno=int(descriptor)) as control:
            work(control)
    else:
        import trio

        trio.run(show)
