"""The busy guest of a QEMU: a boot sector that writes as :class:`bench.busy.Workload` says.

It runs in real mode with one segment of 4 GiB, FS, so that the BIOS handles the timer and all memory can be written.
Each tick it flushes the TLB (a QEMU 7.2 without KVM does not notice the next write to a page after a look at the dirty
pages until then, see :mod:`tests.qemu.bootsector`), makes its writes, and halts until the next tick.
"""

from __future__ import annotations

from typing import Final

from bench.busy import FIRST, TICKS_PER_SECOND, Workload
from bench.memory import PAGE_SIZE

_ORIGIN: Final = 0x7C00
_PIT_HZ: Final = 1193182
#: A null descriptor, and one for data: base 0, limit 4 GiB.
_DESCRIPTORS: Final = bytes(8) + bytes.fromhex("ff ff 00 00 00 92 cf 00")


def boot_sector(workload: Workload) -> bytes:
    """The first 512 bytes of the guest's disk."""
    start, length = FIRST * PAGE_SIZE, workload.hot * PAGE_SIZE
    setup = _setup()
    begin = b"\x66\xbf" + _long(start)  # mov edi, start
    flush = bytes.fromhex("0f 20 c0 66 35 00 00 01 00 0f 22 c0")  # mov eax, cr0; xor eax, 1 << 16; mov cr0, eax
    count = b"\x66\xb9" + _long(workload.per_tick)  # mov ecx, per_tick
    write = bytes.fromhex("67 66 64 ff 07")  # inc dword [fs:edi]
    write += b"\x66\x81\xc7" + _long(workload.stride * PAGE_SIZE)  # add edi, stride
    write += b"\x66\x81\xff" + _long(start + length)  # cmp edi, start + length
    write += b"\x72\x07"  # jb: over the next instruction
    write += b"\x66\x81\xef" + _long(length)  # sub edi, length
    write += b"\x66\x49"  # dec ecx
    write += b"\x75" + _back(len(write) + 2)  # jnz: the next write
    tick = flush + count + write + b"\xf4"  # hlt
    tick += b"\xeb" + _back(len(tick) + 2)  # jmp: the next tick
    code = setup + begin + tick
    table = _ORIGIN + len(code)
    register = (len(_DESCRIPTORS) - 1).to_bytes(2, "little") + _long(table)
    code = code.replace(b"\x0f\x01\x16\x00\x00", b"\x0f\x01\x16" + (table + len(_DESCRIPTORS)).to_bytes(2, "little"), 1)
    sector = code + _DESCRIPTORS + register
    return sector.ljust(510, b"\0") + b"\x55\xaa"


def _setup() -> bytes:
    """Segments, stack, the timer, and FS with a limit of 4 GiB; then interrupts are on."""
    divisor = _PIT_HZ // TICKS_PER_SECOND
    code = bytes.fromhex("fa 31 c0 8e d8 8e d0 bc 00 7c")  # cli; ds = ss = 0; mov sp, 0x7c00
    code += b"\xb0\x34\xe6\x43"  # channel 0 of the timer: low byte, then high byte, mode 2
    code += bytes((0xB0, divisor & 0xFF, 0xE6, 0x40, 0xB0, divisor >> 8, 0xE6, 0x40))
    code += bytes.fromhex("e4 21 24 fe e6 21")  # let IRQ 0 through
    code += bytes.fromhex("0f 01 16 00 00")  # lgdt, with its address filled in later
    code += bytes.fromhex("0f 20 c0 0c 01 0f 22 c0")  # protected mode on
    code += bytes.fromhex("bb 08 00 8e e3")  # mov fs, 8
    return code + bytes.fromhex("24 fe 0f 22 c0 fb")  # protected mode off; sti


def _long(value: int) -> bytes:
    return value.to_bytes(4, "little")


def _back(distance: int) -> bytes:
    """The offset of a short jump over *distance* bytes backwards, the jump itself included."""
    return (-distance).to_bytes(1, "little", signed=True)
