"""``trimig demo`` as a user runs it: real processes, and its reports when they are killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

import trimig
from tests.processes.cli.demo import lives, run, started
from trimig.cli.demo.command import Demo
from trimig.cli.demo.options import Options
from trimig.cli.display import LineView
from trimig.cli.exit_codes import FAILED, INCOMPLETE

SMALL = ("demo", "--size", "16M", "--hot", "4M", "--dirty-rate", "8M")
#: Slow enough for a test to act in the middle of the first copy.
SLOW = (*SMALL, "--bandwidth", "16M")


def events(process: subprocess.Popen[str], phase: str) -> dict[str, Any]:
    """Read progress until a picture of that phase (or event) comes."""
    assert process.stderr is not None
    for line in process.stderr:
        message: dict[str, Any] = json.loads(line)
        if phase in (message["event"], message.get("phase")):
            return message
    raise AssertionError(f"no {phase} was shown")


def family(pid: int) -> list[int]:
    """*pid* and all its descendants."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            found += [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    return found


def test_demo_over_data_channels() -> None:
    """S13: the display and the result have them; the guest arrives whole."""
    code, out, err = run(
        *SMALL, "-c", "multifd", "-p", "multifd-channels=3", "-p", "multifd-compression=zlib", "--json"
    )
    result = json.loads(out)
    assert (code, result["verified"], result["data_channels"]) == (0, True, 3)
    assert 0 < result["multifd_bytes"] < result["transferred_bytes"]
    shown = [json.loads(line) for line in err.splitlines()]
    assert {message.get("data_channels") for message in shown if message["event"] == "end"} == {3}


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_demo_over_data_channels_shows_what_compression_saves(method: str) -> None:
    """Half of the guest's pages can be compressed."""
    code, out, _err = run(*SMALL, "-c", "multifd", "-p", f"multifd-compression={method}", "--json")
    result = json.loads(out)
    assert (code, result["verified"]) == (0, True)
    assert result["multifd_bytes"] < 0.7 * result["normal_bytes"]


def test_demo_shows_what_compress_saves() -> None:
    """S13: in each display, and in the result."""
    arguments = ("demo", "--size", "16M", "--hot", "1M", "-c", "compress")
    code, out, err = run(*arguments, "--json")
    result = json.loads(out)
    assert (code, result["verified"], result["dirty_rate"]) == (0, True, 10 << 20)
    assert result["encoded_bytes"] > 4 * result["encoded_sent_bytes"] > 0
    pictures = [message for line in err.splitlines() if (message := json.loads(line))["event"] == "progress"]
    assert pictures[-1]["encoded_bytes"] == result["encoded_bytes"]
    code, out, err = run(*arguments, "--bandwidth", "4M")
    assert (code, "in another encoding, sent as" in out) == (0, True)
    assert "(encoded)" in err


@pytest.mark.parametrize("hops", [1, 3])
def test_demo_proves_its_guest(hops: int) -> None:
    code, out, _err = run(*SMALL, "--hops", str(hops), "--json")
    result = json.loads(out)
    assert (code, result["verified"]) == (0, True)
    assert [hop["hop"] for hop in result["hops"]] == list(range(1, hops + 1))
    for hop in result["hops"]:
        assert hop["confirmed"]
        assert hop["prepared"]
        parts = {name: ms for name, ms in hop["downtime"].items() if name != "resume"}
        assert set(parts) == {"pause", "held", "ram", "devices", "prepare", "commit"}
        assert sum(parts.values()) == pytest.approx(hop["downtime_ms"], rel=0.2, abs=2)
    assert [hop["source"] for hop in result["hops"]] == (result["hosts"] * hops)[:hops]
    assert result["downtime_ms"] > 0
    assert result["total_ms"] == pytest.approx(sum(hop["total_ms"] for hop in result["hops"]), abs=0.01)
    assert result["iterations"] >= hops
    assert result["throughput_bytes_per_s"] > 0
    assert result["dirty_tracking"] in ("userfaultfd-wp", "compare")
    assert result["normal_bytes"] + result["zero_bytes"] >= hops * result["size"] == hops * 16 << 20
    assert not [pid for pid in result["hosts"] if lives(pid)]


def test_demo_says_it_in_words() -> None:
    code, out, err = run(*SMALL, "--hops", "2")
    assert code == 0
    assert out.startswith("Verified: all 4096 pages are as ")
    for word in (
        "pause",
        "rest of RAM",
        "devices",
        "prepare",
        "commit",
        "normal pages",
        "zero pages",
        "dirty tracking",
    ):
        assert word in out
    assert max(len(line) for line in out.splitlines()) <= 80
    assert all(line.startswith("trimig: ") for line in err.splitlines())


def test_progress_never_runs_backwards() -> None:
    code, _out, err = run(*SMALL, "--bandwidth", "24M", "--downtime-limit", "20", "--json")
    assert code == 0
    pictures = [message for line in err.splitlines() if (message := json.loads(line))["event"] == "progress"]
    assert {"first copy", "later passes", "completed"} <= {picture["phase"] for picture in pictures}
    for key in ("iteration", "copied_bytes", "sent_bytes", "elapsed_ms"):
        values = [picture[key] for picture in pictures]
        assert values == sorted(values), key
    order = ["connecting", "first copy", "later passes", "switchover", "completed"]
    phases = [order.index(picture["phase"]) for picture in pictures]
    assert phases == sorted(phases)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hot", "32M", "--size", "16M"], "does not fit"),
        (["--hot", "0"], "at least one page"),
        (["--hops", "0"], "--hops"),
        (["--downtime-limit", "-1"], "--downtime-limit"),
        (["--bandwidth", "fast"], "a size is"),
    ],
)
def test_sizes_that_make_no_sense(arguments: list[str], words: str) -> None:
    code, out, err = run("demo", *arguments)
    assert (code, out) == (2, "")
    assert words in err


def test_guest_that_cannot_converge_stays_at_the_source(tmp_path: Path) -> None:
    file = tmp_path / "bound.toml"
    file.write_text("max-iterations = 3\n[parameters]\nmax-bandwidth = '16M'\ndowntime-limit = 1\n")
    code, out, err = run("demo", "--size", "8M", "--hot", "6M", "--dirty-rate", "64M", "--config", str(file), "--json")
    result = json.loads(out)
    assert (code, result["verified"], result["owner"], result["guest"]) == (1, False, "source", "running")
    assert result["guest_verified"]
    assert "no convergence" in result["error"]
    assert result["error"] in err


def test_demo_throttles_its_guest_and_shows_it() -> None:
    """S3, G7: without the throttle this guest would not converge: it writes faster than can be sent."""
    guest = ("--size", "8M", "--hot", "4M", "--dirty-rate", "8M", "--downtime-limit", "100")
    code, out, err = run("demo", *guest, "-c", "auto-converge", "-p", "cpu-throttle-initial=70", "--json")
    result = json.loads(out)
    assert (code, result["verified"]) == (0, True)
    assert result["throttle_percent"] == result["hops"][0]["throttle_percent"] >= 70
    pictures = [message for line in err.splitlines() if (message := json.loads(line))["event"] == "progress"]
    throttles = [picture["throttle_percent"] for picture in pictures]
    assert throttles[0] == throttles[-1] == 0
    assert max(throttles) == result["throttle_percent"]
    assert {picture["max_bandwidth_bytes_per_s"] for picture in pictures} == {(8 << 20) * 9 // 10}


# -- killed ------------------------------------------------------------------------------------------------------------

MOMENTS = ["begin", "first copy", "later passes", "switchover", "end"]


@pytest.mark.parametrize("seed", range(10))
def test_killed_host_is_noticed_and_the_owner_is_told_right(seed: int) -> None:
    """Kill either process, at a random moment from the seed."""
    rng = random.Random(seed)
    victim, moment = seed % 2, MOMENTS[seed // 2]
    with started(*SMALL, "--bandwidth", "64M", "--downtime-limit", "10", "--hops", "3", "--json") as process:
        hosts = events(process, "note")["hosts"]
        events(process, moment)
        # A pause of up to 50 ms gives a random moment.
        select.select([], [], [], rng.random() * 0.05)
        below = family(hosts[0]) + family(hosts[1])
        os.kill(hosts[victim], signal.SIGKILL)
        out, err = process.communicate(timeout=60)
    result = json.loads(out)
    assert not [pid for pid in below if lives(pid)]
    assert str(hosts[victim]) in result["error"]
    source_pid = hosts[(result["hop"] - 1) % 2]
    killed = "source" if hosts[victim] == source_pid else "destination"
    survivor = "destination" if killed == "source" else "source"
    assert result["verified"] is False
    assert result["survivor"] == survivor
    assert str(result["owner"]) in ("source", "destination", "unknown")
    if result["owner"] == "unknown":
        # Only a source can be left with an unknown owner.
        assert (killed, process.returncode, result["guest"]) == ("destination", 3, "paused")
    else:
        assert process.returncode == 1
        # The worker itself reported its state and proved its memory, or no worker is left.
        expected = ("running", True) if result["owner"] == survivor else ("lost", None)
        assert (result["guest"], result.get("guest_verified")) == expected
    assert result["fate"] in err


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_worker_is_noticed_at_once(victim: int) -> None:
    with started("demo", "--size", "64M", "--dirty-rate", "1M", "--bandwidth", "1M", "--json") as process:
        hosts = events(process, "note")["hosts"]
        events(process, "first copy")
        (worker,) = family(hosts[victim])[1:]
        os.kill(worker, signal.SIGKILL)
        # The first copy would take a minute.
        out, _err = process.communicate(timeout=30)
    result = json.loads(out)
    assert (process.returncode, result["owner"]) == (1, "source")
    assert result["guest"] == ("lost" if victim == 0 else "running")
    assert str(worker) in result["error"]


def test_hosts_and_workers_end_with_the_demo() -> None:
    with started(*SLOW, "--json") as process:
        events(process, "first copy")
        below = family(process.pid)[1:]
        assert len(below) == 4
        handles = [os.pidfd_open(pid) for pid in below]
        process.kill()
        try:
            for handle in handles:
                assert select.select([handle], [], [], 30)[0]
        finally:
            for handle in handles:
                os.close(handle)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_puts_the_guest_back(number: signal.Signals) -> None:
    with started(*SLOW, "--json") as process:
        events(process, "first copy")
        below = family(process.pid)[1:]
        process.send_signal(number)
        process.send_signal(number)
        assert process.stdout is not None
        result = json.loads(process.stdout.read())
        assert process.wait(timeout=60) == 130
    assert (result["owner"], result["guest"]) == ("source", "running")
    assert not [pid for pid in below if lives(pid)]


# -- who owns it, case by case -----------------------------------------------------------------------------------------


class FakeHost:
    def __init__(self, pid: int, report: dict[str, Any] | None, ended: str | None) -> None:
        self.pid, self.report, self.ended, self.worker_died = pid, report, ended, False


def done(op: str) -> dict[str, Any]:
    return {"event": "done", "op": op}


def failed(op: str, owner: str = "source") -> dict[str, Any]:
    return {"event": "failed", "op": op, "owner": owner}


@pytest.mark.parametrize(
    ("source", "source_ended", "destination", "destination_ended", "owner"),
    [
        (done("migrate"), None, done("receive"), None, "destination"),
        (None, "killed", done("receive"), None, "destination"),
        (None, "killed", failed("receive"), None, "source"),
        (failed("migrate"), None, None, "killed", "source"),
        (failed("migrate", "unknown"), None, None, "killed", "unknown"),
        (failed("migrate", "unknown"), None, done("receive"), None, "destination"),
        (failed("migrate", "unknown"), None, failed("receive"), None, "source"),
        (done("migrate"), None, None, "killed", "destination"),
        (None, None, None, "killed", "source"),
        (None, "killed", None, "killed", None),
    ],
)
def test_owner_follows_from_the_reports(
    source: dict[str, Any] | None,
    source_ended: str | None,
    destination: dict[str, Any] | None,
    destination_ended: str | None,
    owner: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is guessed."""
    demo = Demo(Options(size=1 << 20, hot=4096, dirty_rate=0, hops=1, config=trimig.Config()), LineView())
    monkeypatch.setattr(demo, "source", FakeHost(1, source, source_ended), raising=False)
    monkeypatch.setattr(demo, "destination", FakeHost(2, destination, destination_ended), raising=False)
    monkeypatch.setattr(demo, "_migrating", True)
    found = demo._owner()
    assert (found.value if found else None) == owner


@pytest.mark.parametrize(
    ("source", "code"), [(done("migrate"), FAILED), (failed("migrate", "destination"), INCOMPLETE)]
)
def test_a_destination_that_dies_with_the_whole_guest_is_no_incomplete_one(
    source: dict[str, Any], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed behind its last word to the source, and before its report."""
    demo = Demo(Options(size=1 << 20, hot=4096, dirty_rate=0, hops=1, config=trimig.Config()), LineView())
    monkeypatch.setattr(demo, "source", FakeHost(1, source, None), raising=False)
    monkeypatch.setattr(demo, "destination", FakeHost(2, None, "killed"), raising=False)
    monkeypatch.setattr(demo, "_migrating", True)
    assert demo._code(FAILED) == code


def test_demo_shows_the_differences_of_xbzrle() -> None:
    """S1: a working set that does not fit into the downtime limit as whole pages does so as differences."""
    arguments = (
        *("demo", "--size", "16M", "--hot", "1M", "--dirty-rate", "4M"),
        *("-c", "xbzrle", "--bandwidth", "12M", "--downtime-limit", "40"),
    )
    code, out, err = run(*arguments, "--json")
    result = json.loads(out)
    assert (code, result["verified"], result["write_size"]) == (0, True, 64)
    assert result["encoded_bytes"] > 10 * result["encoded_sent_bytes"] > 0
    pictures = [message for line in err.splitlines() if (message := json.loads(line))["event"] == "progress"]
    assert any(picture["encoded_bytes"] for picture in pictures)
    code, out, _err = run(*arguments)
    assert (code, "in another encoding, sent as" in out) == (0, True)
