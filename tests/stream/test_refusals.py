"""What is no damage is not called so: capabilities, page sizes and other files are named, everywhere, with what to do."""

from __future__ import annotations

import functools
import lzma
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
import trio
import trio.testing
from click.testing import CliRunner

import trimig
from tests.engine import test_destination as known
from tests.engine.pair import waiting
from tests.stream.made import content, elements, joined, received, text_of, with_before
from tests.wire.test_tail import headed
from trimig.cli import main
from trimig.guest import ConfigSubsection
from trimig.stream import export_raw, inspect_stream
from trimig.wire import Section
from trimig.wire import encoder as wire
from trimig.wire import postcopy as pc
from trimig.wire.formats import may_become_known, what_is
from trimig.wire.refusals import Unsupported

DATA = Path(__file__).parent.parent / "data"


def stored(name: str) -> bytes:
    return lzma.decompress((DATA / f"{name}.xz").read_bytes())


async def refused_everywhere(
    data: bytes, folder: Path, *, live: bool = True, export: bool = True, same: bool = True
) -> str:
    """Each reader refuses *data* with the same words; none speaks of damage, or of accepting what is missing."""
    path = folder / "in"
    path.write_bytes(data)
    said: set[str] = set()

    async def refuses(what: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(Unsupported) as caught:
            await what()
        said.add(caught.value.reason)

    await refuses(functools.partial(trimig.ParkedGuest.load, path))
    await refuses(functools.partial(trimig.ParkedGuest.load, path, partial=True))
    if export:
        for partial in (False, True):
            await refuses(functools.partial(export_raw, path, "ram", folder / "out", partial=partial))
    if live:
        for piece in (0, 4093):
            with trimig.ParkedGuest() as guest:
                await refuses(functools.partial(received, data, guest, piece=piece))
    report = await inspect_stream(path)
    assert (report.sound, report.damaged, report.size) == (False, False, len(data))
    assert isinstance(report.error, Unsupported)
    said.add(report.error.reason)
    text = "\n".join([*said, *report.problems])
    for word in ("amage", "missing", "not in the stream", "never received", "completeness"):
        assert word not in text
    assert not (folder / "out").exists()
    assert len(said) == 1 or not same
    return said.pop()


# -- capabilities ------------------------------------------------------------------------------------------------------


def with_capabilities(*names: str) -> bytes:
    payload = struct.pack(">I", len(names)) + b"".join(bytes([len(n)]) + n.encode() for n in names)
    sub = ConfigSubsection(name="configuration/capabilities", version=1, payload=payload)
    return joined(elements(configuration=wire.configuration("toy-1.0", [sub])))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("x-ignore-shared", "turn x-ignore-shared off there"),
        ("mapped-ram", "save it again with mapped-ram off"),
        ("multifd", "turn multifd off at the source"),
        ("of-the-future", "is not known here: turn it off at the source"),
    ],
)
async def test_capabilities_that_change_the_stream_are_refused_by_name(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, name: str, advice: str
) -> None:
    """At the configuration, before anything that they change is misread."""
    reason = await refused_everywhere(with_capabilities("events", name), tmp_path)
    assert name in reason
    assert advice in reason


async def test_capabilities_that_change_nothing_are_accepted(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """stream.md 4.2: known names that are not validated are ignored."""
    names = ("events", "return-path", "auto-converge", "postcopy-ram", "xbzrle", "compress")
    (tmp_path / "in").write_bytes(with_capabilities(*names))
    with await trimig.ParkedGuest.load(tmp_path / "in") as guest:
        assert np.array_equal(guest.ram[0].pages, content())
        assert guest.subsections[0].name == "configuration/capabilities"


@pytest.mark.parametrize("file", ["qemu-7.2-ignore-shared-head.mig", "qemu-7.2-dirty-bitmaps-head.mig"])
async def test_real_heads(tmp_path: Path, autojump_clock: trio.testing.MockClock, file: str) -> None:
    reason = await refused_everywhere(stored(file), tmp_path, export=False, same=False)
    assert ("x-ignore-shared" if "shared" in file else "turn the capability dirty-bitmaps off at the source") in reason


@pytest.mark.parametrize("on", [False, True])
async def test_the_empty_advise_is_of_dirty_bitmaps(autojump_clock: trio.testing.MockClock, on: bool) -> None:
    """The advice once was to turn postcopy-ram on, on both sides."""
    data = with_before(elements(answers=True), "start", bytes.fromhex("08 0003 0000"))
    config = trimig.Config(capabilities=trimig.Capabilities(postcopy_ram=on))
    with trimig.ParkedGuest() as guest, pytest.raises(Unsupported, match="turn the capability dirty-bitmaps off"):
        await received(data, guest, config)


async def test_the_empty_advise_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(with_before(elements(), "start", bytes.fromhex("08 0003 0000")))
    with pytest.raises(Unsupported, match="turn the capability dirty-bitmaps off"):
        await trimig.ParkedGuest.load(tmp_path / "in")


@pytest.mark.parametrize(
    ("idstr", "words"), [("block", "the capability block"), ("dirty-bitmap", "dirty-bitmaps"), ("pbs-state", "Proxmox")]
)
async def test_other_iterative_sections_are_named(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, idstr: str, words: str
) -> None:
    data = with_before(elements(), "start", wire.section_start(Section.START, 1, idstr, 0, 1))
    assert words in await refused_everywhere(data, tmp_path)


# -- page sizes --------------------------------------------------------------------------------------------------------


def of_pages(size: int, *, zero: bool, length: int = 1 << 18, sections: int = 1, named: bool = False) -> bytes:
    """A stream as a QEMU with target pages of *size* bytes writes it; *zero* pages only, or with content."""
    close = wire.END_WORD + wire.section_footer(2)
    rng = np.random.default_rng(3)
    records: list[bytes] = []
    for k in range(length // size):
        flag = (0x02 if zero or k % 3 == 2 else 0x08) | (0x20 if k and not named else 0)
        name = b"" if flag & 0x20 else b"\x03ram"
        body = b"\0" if flag & 0x02 else rng.integers(0, 256, size, np.uint8).tobytes()
        records.append(struct.pack(">Q", k * size | flag) + name + body)
    step = -(-len(records) // sections)
    parts = [b"".join(records[at : at + step]) for at in range(0, len(records), step)]
    made = elements(text=text_of(()).replace(b"4096", str(size).encode()), devices=())
    made["start"] = wire.section_start(Section.START, 2, "ram", 0, 4) + wire.ram_list([("ram", length)]) + close
    made["part"] = b"".join(wire.section_continue(Section.PART, 2) + part + close for part in parts)
    made["end"] = wire.section_continue(Section.END, 2) + close
    made["device 0"] = wire.device_section(trimig.guest.DeviceSection(idstr="x", payload=b"", version_id=1), 4)
    return joined({k: made[k] for k in ("header", "configuration", "start", "part", "end", "device 0", "eof", "text")})


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("sections", [1, 4])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("size", [256, 512, 1024, 2048, 8192, 16384, 65536])
async def test_page_sizes_of_other_architectures_are_named(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, size: int, zero: bool, sections: int, named: bool
) -> None:
    """Whether pages are zero or not, in one section or several, with the block's name in each record or not."""
    reason = await refused_everywhere(of_pages(size, zero=zero, sections=sections, named=named), tmp_path)
    assert f"target pages of {size} bytes" in reason


@pytest.mark.parametrize(
    ("file", "size"), [("qemu-7.2-avr-256-byte-pages.mig", 256), ("qemu-7.2-arm-1-kib-pages.mig", 1024)]
)
async def test_real_machines_with_small_pages(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, file: str, size: int
) -> None:
    data = stored(file)
    name = "flash" if size == 256 else "mps.ram"
    reason = await refused_everywhere(data, tmp_path, export=False)
    assert f"target pages of {size} bytes" in reason
    with pytest.raises(Unsupported, match=f"{size} bytes"):
        await export_raw(tmp_path / "in", name, tmp_path / "out", partial=True)


@pytest.mark.parametrize("bits", [8, 10, 13, 14, 16])
async def test_the_configuration_may_say_it(tmp_path: Path, autojump_clock: trio.testing.MockClock, bits: int) -> None:
    sub = ConfigSubsection(name="configuration/target-page-bits", version=1, payload=struct.pack(">I", bits))
    data = joined(elements(configuration=wire.configuration("virt", [sub])))
    assert f"target pages of {1 << bits} bytes" in await refused_everywhere(data, tmp_path)


async def test_the_description_may_be_the_first_to_say_it(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """One page of 16 KiB is all of its RAM: nothing else tells."""
    data = of_pages(16384, zero=True, length=16384)
    reason = await refused_everywhere(data, tmp_path, export=False)
    assert "target pages of 16384 bytes" in reason


async def test_a_guest_of_ordinary_pages_that_lacks_some_is_not_taken_for_one_of_large_pages(tmp_path: Path) -> None:
    """Only pages at even places have come, and too few of them: that is a guest with holes."""
    parts = elements()
    close = wire.END_WORD + wire.section_footer(2)
    parts["part"] = b""
    zeros = wire.RecordWriter().zero_records("ram", np.array([2], np.int64) * 4096)
    parts["end"] = wire.section_continue(Section.END, 2) + zeros + close
    (tmp_path / "in").write_bytes(joined(parts))
    with pytest.raises(trimig.RemoteProtocolError, match="3 pages of RAM block 'ram' are not in the stream"):
        await trimig.ParkedGuest.load(tmp_path / "in")


async def test_a_known_guest_is_told_too(autojump_clock: trio.testing.MockClock) -> None:
    fed = await known.Fed().feed(known.stream(opened=known.parts()["opened"] + pc.advise(pc.Advice(target_page=8192))))
    assert isinstance(fed.result, trimig.RemoteProtocolError)
    fed = await known.Fed(waiting(pages=4)).feed(
        known.stream(list=known.ram_list(("ram", 4 * 4096)), end=known.ram_end(known.zeros(0, 2)))
    )
    assert "target pages of 8192 bytes" in str(fed.result)


# -- other files -------------------------------------------------------------------------------------------------------


def libvirt(form: int, length: int = 1000, *, order: str = "<", magic: bytes = b"LibvirtQemudSave") -> bytes:
    return magic + struct.pack(f"{order}19I", 2, length, 1, form, *[0] * 15) + b"<domain/>\0"


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(600), "gzip -dc"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(600), "zstd -dc"),
    "xz": (lzma.compress(b"x"), "xz -dc"),
    "bzip2": (b"BZh91AY&SY" + bytes(600), "bzip2 -dc"),
    "lzop": (b"\x89LZO\0\r\n\x1a\n" + bytes(600), "lzop -dc"),
    "libvirt raw": (
        libvirt(0),
        "of libvirt, which is not read yet (raw): its stream is what tail -c +1093 FILE writes",
    ),
    "libvirt gzip": (libvirt(1), "tail -c +1093 FILE | gzip -dc"),
    "libvirt zstd": (libvirt(5), "| zstd -dc"),
    "libvirt sparse": (libvirt(6), "mapped-ram"),
    "libvirt, big-endian": (libvirt(3, order=">"), "tail -c +1093 FILE | xz -dc"),
    "libvirt, cut": (libvirt(0)[:20], "a save image of libvirt"),
    "libvirt, not complete": (libvirt(0, magic=b"LibvirtQemudPart"), "not complete"),
    "qcow2": (b"QFI\xfb\0\0\0\3" + bytes(600), "a qcow2 disk image"),
    "ELF core": (b"\x7fELF\2\1\1" + bytes(9) + b"\4\0\x3e\0" + bytes(600), "an ELF core"),
    "ELF program": (b"\x7fELF\2\1\1" + bytes(9) + b"\3\0\x3e\0" + bytes(600), "an ELF file"),
    "kdump": (b"makedumpfile\0\0\0\0" + bytes(600), "kdump"),
    "raw disk": (b"\xeb\x63\x90" + bytes(507) + b"\x55\xaa" + bytes(600), "a raw disk image"),
    "zeros": (bytes(4096), "zeros"),
    "something else": (b"hello world\n", "it starts with b'hell' instead of b'QEVM'"),
}


@pytest.mark.parametrize("name", list(FILES))
async def test_other_files_are_named(tmp_path: Path, autojump_clock: trio.testing.MockClock, name: str) -> None:
    """Never damage, and with the size that the file has."""
    data, words = FILES[name]
    reason = await refused_everywhere(data, tmp_path, live=False)
    assert words in reason
    if name not in ("empty", "something else"):
        said = what_is(data)
        assert said is not None
        assert said in reason


@pytest.mark.parametrize("command", ["inspect", "export", "send", "merge"])
def test_the_commands_say_what_a_file_is(tmp_path: Path, command: str) -> None:
    path = tmp_path / "in"
    path.write_bytes(FILES["gzip"][0] + bytes(3 << 20))
    more = {
        "inspect": [],
        "export": ["--format", "raw", "--block", "ram", "--out", str(tmp_path / "out")],
        "send": ["tcp:127.0.0.1:1"],
        "merge": [str(path), "--out", str(tmp_path / "out")],
    }[command]
    result = CliRunner().invoke(main, [command, str(path), *more])
    assert result.exit_code == 1
    assert "a gzip file: unpack it first (gzip -dc)" in result.stderr
    assert "amage" not in result.output
    if command == "inspect":
        assert f"({path.stat().st_size} bytes)" in result.stdout


STRANGERS = {
    "multifd": (b"\x11\x22\x33\x44\0\0\0\1" + bytes(56), "multifd"),
    "TLS": (b"\x16\x03\x01\x02\0\x01" + bytes(60), "TLS"),
    "HTTP": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP"),
}


@pytest.mark.parametrize("piece", [0, 1, 3])
@pytest.mark.parametrize("name", list(STRANGERS))
def test_other_protocols_are_named_in_any_pieces(name: str, piece: int) -> None:
    data, words = STRANGERS[name]
    assert words in str(what_is(data))
    decoder = trimig.wire.Decoder(measure=None)
    said: list[str] = []
    for at in range(0, len(data), piece or len(data)):
        decoder.feed(data[at : at + (piece or len(data))])
        try:
            assert decoder.next_event() is None
        except Unsupported as error:
            said.append(error.reason)
    assert words in said[0]


def test_a_few_bytes_are_waited_for_only_where_they_can_tell() -> None:
    assert may_become_known(b"L")
    assert may_become_known(b"\x11")
    assert not may_become_known(b"x")
    assert not may_become_known(b"Lx")
    assert not may_become_known(b"\x1f\x8b")
    assert what_is(wire.file_header()) is None


def test_text_of_descriptions_is_made_by_the_helpers() -> None:
    """The helper that changes the page size in these tests finds it."""
    assert b"4096" in text_of(())
    assert headed(b"{}")[:6] == b"\0\x06\0\0\0\x02"
