"""``trimig demo``, ``send`` and ``receive`` by postcopy, as processes: the switch, a cut, and signals after the
switch."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import signal
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import trio

import trimig
from tests.guests.saved import check, devices
from tests.processes.cli.command import LIMIT, LISTEN, first_line, started, text_of, trimig_command
from tests.processes.cli.demo import lives, run
from tests.processes.cli.demo import started as started_demo
from trimig.cli.errors import error_record
from trimig.cli.exit_codes import INCOMPLETE
from trimig.cli.postcopy import PostcopyInterrupts, recovering
from trimig.errors import Ownership
from trimig.status import IN_POSTCOPY
from trimig.stream import read_record
from trimig.wire import RecordWriter, Section
from trimig.wire import encoder as wire
from trimig.wire.devices import description

DEMO = ("demo", "--size", "32M", "--hot", "8M", "--dirty-rate", "16M", "--json")
#: A first copy of half a second, so that a test can act in the middle.
SLOW = ("--bandwidth", "64M")


# -- the demo ----------------------------------------------------------------------------------------------------------


def test_a_demo_by_postcopy_and_by_two_hops_proves_its_guest() -> None:
    code, out, err = run(*DEMO, "--postcopy", "--hops", "2")
    result = json.loads(out)
    assert (code, result["verified"]) == (0, True), err
    assert result["recoveries"] == 0
    assert "postcopy-active" in statuses(err)
    for hop in result["hops"]:
        assert hop["confirmed"]
        assert 0 <= hop["fault_median_ms"] <= hop["fault_p99_ms"]
    assert result["page_faults"] == sum(hop["page_faults"] for hop in result["hops"])


def test_a_demo_that_is_cut_recovers_by_itself_and_shows_it() -> None:
    """O6: postcopy-paused is no end; --cut-after shows the recovery."""
    # The guest writes all of its memory, so most is left at the switch, and the rest takes a second.
    code, out, err = run(*DEMO, "--hot", "32M", *SLOW, "--postcopy-after", "30%", "--cut-after", "40%")
    result = json.loads(out)
    assert (code, result["verified"], result["recoveries"]) == (0, True, 1), err
    assert result["page_faults"] > 0
    assert 0 < result["fault_median_ms"] <= result["fault_p99_ms"]
    seen = [status for status, _ in itertools.groupby(statuses(err))]
    assert seen.index("postcopy-active") < seen.index("postcopy-paused") < len(seen) - 1
    assert not [pid for pid in result["hosts"] if lives(pid)]


def test_a_demo_says_the_cut_and_the_faults_in_words() -> None:
    words = [word for word in DEMO if word != "--json"]
    code, out, err = run(*words, "--postcopy", "--cut-after", "20%")
    assert code == 0, err
    assert out.startswith("Verified: all 8192 pages are as ")
    assert re.search(
        r"page faults +(\d+, median [\d.]+ m?s, 99 of 100 within [\d.]+ m?s|none: .*); the connection was lost 1 time",
        out,
    )


def test_a_demo_without_postcopy_has_no_figures_of_it() -> None:
    code, out, _err = run(*DEMO)
    assert code == 0
    assert not {"page_faults", "fault_median_ms", "fault_p99_ms", "recoveries"} & json.loads(out).keys()


def test_the_first_signal_behind_the_switch_is_refused_and_the_second_gives_up() -> None:
    """Gaps G7 and G8: no cancel in postcopy; the text of the refusal, and the effect of a second signal."""
    with started_demo(*DEMO, *SLOW, "--postcopy-after", "10%", "-p", "max-postcopy-bandwidth=1M") as process:
        assert process.stderr is not None
        assert process.stdout is not None
        until(process.stderr, '"postcopy-active"')
        process.send_signal(signal.SIGINT)
        assert "too late to cancel: the guest is at the destination" in until(process.stderr, "SIGINT")
        # The demo goes on.
        until(process.stderr, '"postcopy-active"')
        process.send_signal(signal.SIGINT)
        assert "giving the rest up" in until(process.stderr, "SIGINT")
        result = json.loads(process.stdout.read())
        assert process.wait(LIMIT) == INCOMPLETE
    assert (result["owner"], result["verified"], result["exit_code"]) == ("destination", False, INCOMPLETE)
    assert result["guest"] == "paused"
    assert "a part of its memory never came" in result["fate"]
    assert not [pid for pid in result["hosts"] if lives(pid)]


@pytest.mark.parametrize(
    ("victim", "state", "said"),
    [(0, "paused", "which is paused there: a part of its memory never came"), (1, "lost", "which died with it")],
)
def test_a_host_that_is_killed_behind_the_switch(victim: int, state: str, said: str) -> None:
    """O6, T1: the owner is the destination, whichever process dies; the source is never reported as the owner again."""
    with started_demo(*DEMO, *SLOW, "--postcopy-after", "10%", "-p", "max-postcopy-bandwidth=1M") as process:
        assert process.stderr is not None
        assert process.stdout is not None
        hosts = json.loads(until(process.stderr, '"hosts"'))["hosts"]
        until(process.stderr, '"postcopy-active"')
        os.kill(hosts[victim], signal.SIGKILL)
        until(process.stderr, "was killed by signal 9")
        result = json.loads(process.stdout.read())
        assert process.wait(LIMIT) == INCOMPLETE
    assert (result["owner"], result["guest"], result["exit_code"]) == ("destination", state, INCOMPLETE)
    assert said in result["fate"]
    assert not [pid for pid in result["hosts"] if lives(pid)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--cut-after", "40%"), "--cut-after needs --postcopy"),
        (("--postcopy-after", "140%"), "not between 0% and 100%"),
        (("--postcopy-after", "soon"), "no percentage"),
    ],
)
def test_shares_that_make_no_sense_are_refused_before_anything_starts(words: tuple[str, ...], said: str) -> None:
    code, out, _err = run(*DEMO, *words)
    assert code == 2
    assert said in json.loads(out)["error"]


def statuses(err: str) -> list[str]:
    return [m["status"] for m in map(json.loads, err.splitlines()) if m["event"] == "progress"]


def until(lines: Iterable[str], word: str) -> str:
    for line in lines:
        if word in line:
            return line
    raise AssertionError(f"{word} was not said")


# -- send and receive --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [("--postcopy",), ("--postcopy-after", "0%")])
async def test_a_guest_goes_from_file_to_file_by_postcopy(saved: Path, tmp_path: Path, how: tuple[str, ...]) -> None:
    target = tmp_path / "target"
    with trio.fail_after(LIMIT):
        async with started("receive", LISTEN, "--save", target, "-c", "postcopy-ram") as receiver:
            assert receiver.stdout is not None
            address = (await first_line(receiver.stdout)).removeprefix("listening on ")
            code, out, err = await trimig_command("send", saved, address, *how, "--json")
            assert code == 0, err
            assert json.loads(out)["confirmed"]
            await text_of(receiver.stdout)
            assert await receiver.wait() == 0
    with await trimig.ParkedGuest.load(target) as guest:
        check(guest)
    record = read_record(saved)
    assert record is not None
    assert record.owner is Ownership.DESTINATION


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A guest whose memory arrives for half a minute at the rate of :data:`TRICKLE`."""
    records, pages = RecordWriter(), 2048
    memory = np.random.default_rng(1).integers(1, 255, (pages, 4096), np.uint8)
    out = wire.file_header() + wire.configuration("toy-1.0", [])
    out += wire.section_start(Section.START, 2, "ram", 0, 4) + wire.ram_list([("ram", pages * 4096)])
    out += wire.END_WORD + wire.section_footer(2) + wire.section_continue(Section.END, 2)
    out += records.page_records("ram", np.arange(pages, dtype=np.int64) * 4096, memory)
    out += wire.END_WORD + wire.section_footer(2)
    sections = devices()
    out += b"".join(wire.device_section(s, s.section_id or 0) for s in sections) + wire.end_of_stream()
    out += wire.description(description.build(4096, [s.description or {} for s in sections]))
    path = tmp_path / "guest"
    path.write_bytes(out)
    return path


#: The guest first, and then its memory at this slow rate.
TRICKLE = ("--postcopy-after", "0%", "-p", "max-postcopy-bandwidth=256K", "--json")


async def until_line(pipe: trio.abc.ReceiveStream, word: str) -> str:
    while word not in (line := await first_line(pipe)):
        pass
    return line


async def test_a_sender_says_that_it_has_switched(large: Path, tmp_path: Path) -> None:
    with trio.fail_after(LIMIT):
        async with started("receive", LISTEN, "--save", tmp_path / "target", "-c", "postcopy-ram") as receiver:
            assert receiver.stdout is not None
            address = (await first_line(receiver.stdout)).removeprefix("listening on ")
            code, out, err = await trimig_command("send", large, address, "--postcopy-after", "0%")
            assert code == 0, err
            await text_of(receiver.stdout)
    assert f"switched to postcopy: the guest is at {address}, and the rest of its memory follows (" in err
    assert re.search(r"; by postcopy: [\d.]+ [KM]iB of it followed the guest\n", out), out


async def test_a_receiver_that_dies_behind_the_switch_takes_the_guest_with_it(large: Path, tmp_path: Path) -> None:
    """O6, T1: the source keeps its half, and reports the owner; nothing may start the guest again by accident."""
    with trio.fail_after(LIMIT):
        async with started("receive", LISTEN, "--save", tmp_path / "target", "-c", "postcopy-ram") as receiver:
            assert receiver.stdout is not None
            address = (await first_line(receiver.stdout)).removeprefix("listening on ")
            async with started("send", large, address, *TRICKLE, "--recover-for", "0.5") as sender:
                assert sender.stdout is not None
                assert sender.stderr is not None
                await until_line(sender.stderr, '"postcopy-active"')
                receiver.kill()
                await until_line(sender.stderr, '"postcopy-paused"')
                said = json.loads(await text_of(sender.stdout))
                assert await sender.wait() == INCOMPLETE
    assert (said["kind"], said["owner"], said["exit_code"]) == ("PostcopyLost", "destination", INCOMPLETE)
    assert "no connection on which the migration could go on came within 500 ms" in said["error"]
    record = read_record(large)
    assert record is not None
    assert record.owner is Ownership.DESTINATION


async def test_a_sender_that_is_told_twice_gives_the_rest_up(large: Path, tmp_path: Path) -> None:
    """Gap G7: the first signal is refused with the reason. The receiver reports that its guest is incomplete, and keeps
    its half; both halves make the guest again."""
    target = tmp_path / "target"
    waiting = ("receive", LISTEN, "--save", target, "-c", "postcopy-ram", "--recover-for", "0.5", "--json")
    with trio.fail_after(LIMIT):
        async with started(*waiting) as receiver:
            assert receiver.stdout is not None
            assert receiver.stderr is not None
            address = json.loads(await until_line(receiver.stderr, "listening on "))["address"]
            async with started("send", large, address, *TRICKLE) as sender:
                assert sender.stdout is not None
                assert sender.stderr is not None
                await until_line(sender.stderr, '"postcopy-active"')
                sender.send_signal(signal.SIGINT)
                assert "too late to cancel" in await until_line(sender.stderr, "SIGINT")
                await until_line(sender.stderr, '"postcopy-active"')
                sender.send_signal(signal.SIGINT)
                assert "giving the rest up" in await until_line(sender.stderr, "SIGINT")
                assert json.loads(await text_of(sender.stdout))["kind"] == "PostcopyLost"
                assert await sender.wait() == INCOMPLETE
            kept = json.loads(await until_line(receiver.stderr, "trimig merge makes one guest of both"))
            said = json.loads(await text_of(receiver.stdout))
            assert await receiver.wait() == INCOMPLETE
    assert (said["kind"], said["owner"]) == ("PostcopyLost", "destination")
    assert kept["partial"] == f"{target}.partial"
    record = read_record(large)
    assert record is not None
    assert record.owner is Ownership.DESTINATION
    assert sorted(os.listdir(tmp_path)) == ["guest", "guest.owner", "target.partial"]
    code, out, err = await trimig_command("merge", f"{target}.partial", large, "--out", target)
    assert code == 0, err
    assert "came from the source's half" in out
    with await trimig.ParkedGuest.load(target) as merged, await trimig.ParkedGuest.load(large) as whole:
        assert np.array_equal(merged.ram[0].pages, whole.ram[0].pages)
        assert [s.payload for s in merged.sections] == [s.payload for s in whole.sections]


async def test_a_receiver_that_is_told_twice_keeps_its_half(large: Path, tmp_path: Path) -> None:
    """Also after a quick second signal: the received pages exist nowhere else, if the source is lost as well."""
    target = tmp_path / "target"
    with trio.fail_after(LIMIT):
        async with started("receive", LISTEN, "--save", target, "-c", "postcopy-ram", "--json") as receiver:
            assert receiver.stdout is not None
            assert receiver.stderr is not None
            address = json.loads(await until_line(receiver.stderr, "listening on "))["address"]
            async with started("send", large, address, *TRICKLE, "--recover-for", "0.5") as sender:
                assert sender.stdout is not None
                await until_line(receiver.stderr, '"postcopy-active"')
                for _ in range(2):
                    receiver.send_signal(signal.SIGINT)
                    await until_line(receiver.stderr, "SIGINT")
                await text_of(receiver.stdout)
                assert await receiver.wait() == INCOMPLETE
                assert json.loads(await text_of(sender.stdout))["kind"] == "PostcopyLost"
    assert sorted(os.listdir(tmp_path)) == ["guest", "guest.owner", "target.partial"]
    with await trimig.ParkedGuest.load(f"{target}.partial", partial=True) as half:
        assert 0 < sum(end - first for first, end in half.holes["ram"]) < 2048


# -- the parts ---------------------------------------------------------------------------------------------------------


def in_status(status: trimig.Status) -> tuple[PostcopyInterrupts, list[str]]:
    given_up: list[str] = []
    return PostcopyInterrupts(lambda: status, functools.partial(given_up.append, "given up")), given_up


@pytest.mark.parametrize("status", list(trimig.Status))
def test_only_behind_the_switch_a_signal_has_to_insist(status: trimig.Status) -> None:
    interrupts, given_up = in_status(status)
    if status not in IN_POSTCOPY:
        assert interrupts.decide() is None
        return
    first = interrupts.decide()
    assert first is not None
    assert not first[1]
    assert not given_up
    second = interrupts.decide()
    assert second is not None
    assert second[1]
    assert given_up == ["given up"]


def test_a_lost_rest_is_a_failure_whose_guest_is_at_the_destination() -> None:
    code, record = error_record(trimig.PostcopyLost("no new connection came", missing={"ram": [(0, 4)]}))
    assert (code, record["kind"], record["owner"]) == (INCOMPLETE, "PostcopyLost", "destination")


def test_recover_for_needs_the_capability_and_goes_over_the_file() -> None:
    plain = trimig.Config()
    assert recovering(plain, 5.0) == plain
    on = recovering(trimig.Config(capabilities=trimig.Capabilities(postcopy_ram=True)), None)
    assert (on.capabilities.postcopy_ram, on.recovery_retry, on.recovery_timeout) == (True, True, 60.0)
    assert recovering(on, 5.0).recovery_timeout == 5.0
    of_file = trimig.Config(capabilities=on.capabilities, recovery_retry=True, recovery_timeout=7.0)
    assert recovering(of_file, None).recovery_timeout == 7.0
