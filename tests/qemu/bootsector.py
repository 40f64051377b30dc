"""A 512-byte guest: a real-mode boot sector, assembled here, that counts, dirties memory and checks itself.

Each round it

1. checks that the first byte of every 4 KiB page of 0x10000..0x90000 equals the low byte of its counter, and increments
   that byte (so all 128 pages are dirty each round);
2. increments the 32-bit counter, and prints it on COM1 as eight hexadecimal digits and a newline;
3. sleeps until the next tick of the timer.

The guest flushes the processor's TLB before step 1 and before step 3. QEMU 7.2 without KVM needs that: after a look at
the dirty pages QEMU does not notice the next write to such a page until the TLB is flushed. A guest that never flushes
can lose its last writes in a migration, also between two QEMUs.

So a migrated guest goes on printing without a gap only if its RAM (checked by itself), its registers and the state of
its timer, interrupt controller and serial port all arrived. If a page is wrong it prints ``!`` and stops, which
:func:`parse_counts` reports.

The guest lives in the low 640 KiB, so that it needs no protected mode.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

#: The range that is dirtied, one byte in each page of 4 KiB. The BIOS does not use it after the boot.
DIRTY_START: Final = 0x10000
DIRTY_END: Final = 0x90000
#: The address of the 32-bit counter: right behind the sector itself.
COUNTER: Final = 0x7E00

_ORIGIN: Final = 0x7C00
_COM1: Final = 0x3F8
_PIT_HZ: Final = 1193182


class _Code:
    """Bytes with labels; jumps are filled in at the end, when all labels are known."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._labels: dict[str, int] = {}
        self._jumps: list[tuple[int, int, str]] = []

    def emit(self, hexadecimal: str) -> None:
        self._bytes += bytes.fromhex(hexadecimal)

    def word(self, value: int) -> None:
        self._bytes += value.to_bytes(2, "little")

    def label(self, name: str) -> None:
        self._labels[name] = len(self._bytes)

    def jump(self, opcode: str, target: str, *, width: int = 1) -> None:
        """A jump, loop or call relative to the next instruction, with an offset of *width* bytes."""
        self.emit(opcode)
        self._jumps.append((len(self._bytes), width, target))
        self._bytes += bytes(width)

    def out(self, port: int, value: int) -> None:
        """mov dx, port; mov al, value; out dx, al."""
        self.emit("ba")
        self.word(port)
        self._bytes += bytes((0xB0, value, 0xEE))

    def sector(self) -> bytes:
        """Resolve the jumps, pad to 512 bytes and sign."""
        for position, width, target in self._jumps:
            offset = self._labels[target] - (position + width)
            self._bytes[position : position + width] = offset.to_bytes(width, "little", signed=True)
        if len(self._bytes) > 510:
            raise ValueError(f"the boot sector has {len(self._bytes)} bytes, 510 is the most")
        return bytes(self._bytes.ljust(510, b"\0")) + b"\x55\xaa"


def boot_sector(*, hz: int = 100, idle: bool = True) -> bytes:
    """The image of a disk with only the guest; it counts *hz* times a second (19 to 1000).

    Without *idle* it does not sleep, and counts as fast as it can; it prints each 256th count.
    """
    if not 19 <= hz <= 1000:
        raise ValueError("hz: the timer can do 19 to 1000 here")
    code = _Code()
    _setup(code, divisor=_PIT_HZ // hz)
    _clear_pages(code)
    code.emit("fb")  # sti: from now on the timer ticks (its handler is the BIOS's)
    code.label("round")
    _flush_tlb(code)
    _check_and_dirty_pages(code)
    code.emit("66 ff 06")  # inc dword [COUNTER]
    code.word(COUNTER)
    if not idle:
        code.emit("80 3e")  # cmp byte [COUNTER], 0
        code.word(COUNTER)
        code.emit("00 0f")
        code.jump("85", "round", width=2)  # jne near
    _print_counter(code)
    _flush_tlb(code)
    if idle:
        code.emit("f4")  # hlt: until the next tick
    code.jump("e9", "round", width=2)
    _wrong_page(code)
    _putc(code)
    return code.sector()


def _setup(code: _Code, *, divisor: int) -> None:
    """Segments and stack, COM1 at 115200 8N1, timer channel 0 at 1193182 Hz / *divisor*, counter 0."""
    code.emit("fa")  # cli
    code.emit("31 c0 8e d8 8e d0")  # xor ax, ax; mov ds, ax; mov ss, ax
    code.emit("bc")  # mov sp, 0x7c00: the stack grows down from the sector
    code.word(_ORIGIN)
    code.out(_COM1 + 1, 0x00)  # no interrupts from the serial port: it is polled
    code.out(_COM1 + 3, 0x80)  # divisor latch open
    code.out(_COM1 + 0, 0x01)
    code.out(_COM1 + 1, 0x00)
    code.out(_COM1 + 3, 0x03)  # closed again; 8 data bits, no parity, 1 stop bit
    code.out(_COM1 + 2, 0xC7)  # FIFOs on and cleared
    code.out(0x43, 0x34)  # channel 0, low then high byte, mode 2
    code.out(0x40, divisor & 0xFF)
    code.out(0x40, divisor >> 8)
    code.emit("e4 21 24 fe e6 21")  # in al, 0x21; and al, 0xfe; out 0x21, al: let IRQ 0 through
    code.emit("66 c7 06")  # mov dword [COUNTER], 0
    code.word(COUNTER)
    code.emit("00 00 00 00")


def _for_each_page(code: _Code, name: str, body: str, check: str | None = None) -> None:
    """Run *body* with ES at each page in turn; *check* comes before it and jumps to ``wrong`` if not equal."""
    code.emit("b8")  # mov ax, DIRTY_START >> 4
    code.word(DIRTY_START >> 4)
    code.label(name)
    code.emit("8e c0")  # mov es, ax
    if check is not None:
        code.emit(check)
        code.jump("75", "wrong")  # jne wrong
    code.emit(body)
    code.emit("05 00 01")  # add ax, 0x100: one page
    code.emit("3d")  # cmp ax, DIRTY_END >> 4
    code.word(DIRTY_END >> 4)
    code.jump("72", name)  # jb


def _flush_tlb(code: _Code) -> None:
    """Change write protection, which has no effect without paging; a change flushes. Destroys EAX."""
    code.emit("0f 20 c0")  # mov eax, cr0
    code.emit("66 35 00 00 01 00")  # xor eax, 1 << 16
    code.emit("0f 22 c0")  # mov cr0, eax


def _clear_pages(code: _Code) -> None:
    _for_each_page(code, "clear", "26 c6 06 00 00 00")  # mov byte [es:0], 0


def _check_and_dirty_pages(code: _Code) -> None:
    code.emit("8a 1e")  # mov bl, [COUNTER]
    code.word(COUNTER)
    # cmp [es:0], bl ... inc byte [es:0]
    _for_each_page(code, "dirty", "26 fe 06 00 00", check="26 38 1e 00 00")


def _print_counter(code: _Code) -> None:
    code.emit("66 8b 1e")  # mov ebx, [COUNTER]
    code.word(COUNTER)
    code.emit("b9 08 00")  # mov cx, 8: digits
    code.label("digit")
    code.emit("66 c1 c3 04")  # rol ebx, 4
    code.emit("88 d8 24 0f")  # mov al, bl; and al, 15
    code.emit("3c 0a")  # cmp al, 10
    code.jump("72", "decimal")  # jb
    code.emit("04 27")  # add al, 'a' - '0' - 10
    code.label("decimal")
    code.emit("04 30")  # add al, '0'
    code.jump("e8", "putc", width=2)  # call
    code.jump("e2", "digit")  # loop
    code.emit("b0 0a")  # mov al, '\n'
    code.jump("e8", "putc", width=2)


def _wrong_page(code: _Code) -> None:
    code.label("wrong")
    code.emit("b0 21")  # mov al, '!'
    code.jump("e8", "putc", width=2)
    code.emit("b0 0a")
    code.jump("e8", "putc", width=2)
    code.emit("fa")  # cli
    code.label("stop")
    code.emit("f4")  # hlt
    code.jump("eb", "stop")


def _putc(code: _Code) -> None:
    """Wait until COM1 can take a byte, then give it AL. Destroys AX and DX."""
    code.label("putc")
    code.emit("88 c4")  # mov ah, al
    code.emit("ba")  # mov dx, line status register
    code.word(_COM1 + 5)
    code.label("busy")
    code.emit("ec a8 20")  # in al, dx; test al, 0x20: transmitter empty
    code.jump("74", "busy")  # jz
    code.emit("88 e0")  # mov al, ah
    code.emit("b2 f8")  # mov dl, low byte of COM1
    code.emit("ee c3")  # out dx, al; ret


_LINE = re.compile(r"[0-9a-f]{8}")


def parse_counts(text: str) -> list[int]:
    """The counter values in *text*, the output of the serial port; an unfinished last line does not count.

    For a migrated guest, pass the source's text followed by the destination's: a line may be cut between them.

    Raises:
        ValueError: a line is not a count; ``!`` means that the guest found a wrong page.
    """
    *lines, _unfinished = text.split("\n")
    for number, line in enumerate(lines, 1):
        if line == "!":
            raise ValueError(f"line {number}: the guest found a page that is not what it had written")
        if not _LINE.fullmatch(line):
            raise ValueError(f"line {number} is not a count: {line!r}")
    return [int(line, 16) for line in lines]


def assert_no_gap(counts: Sequence[int]) -> None:
    """Fail unless *counts* starts at 1 and goes on by one, without gap or repeat."""
    assert counts, "the guest printed nothing"
    for position, count in enumerate(counts, 1):
        assert count == position, f"after {position - 1} came {count} (gap, repeat or restart)"
