"""Kinds of guests that an installed distribution adds to ``trimig run``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes.cli.command import trimig_command
from tests.processes.cli.hosted import ends, hosting
from trimig.cli.guests import BUILT_IN, find
from trimig.config import Config
from trimig.errors import ConfigError
from trimig.guests import GuestKind, GuestRequest, installed_kind, installed_names

MODULE = """
import contextlib, trimig
from trimig.guests import GuestKind

events = []

class Record:
    async def decide(self, uri):
        print("decided for", uri, flush=True)

    def on_event(self, event):
        print("event", event.name, flush=True)

@contextlib.asynccontextmanager
async def open_robot(request):
    if request.text == "bad":
        raise trimig.ConfigError("a robot needs a name")
    if request.text == "broken":
        raise ZeroDivisionError("no arms")
    if request.text == "thing":
        yield 5
        return
    with trimig.AppGuest(request.name or request.text, running=not (request.waiting or request.stopped)) as guest:
        guest.add_ram("arm", 1 << 20)
        yield guest

KIND = GuestKind(
    name="robot", syntax="robot:NAME", summary="A robot.", open=open_robot, record=lambda request: Record()
)
NUMBER = 5
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """``install("dist", robot="robots:KIND")`` puts a distribution with these entry points on the path."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "robots.py").write_text(MODULE)
    (tmp_path / "bad_robots.py").write_text("raise ImportError('no wheels')\n")

    def make(distribution: str, **points: str) -> None:
        info = tmp_path / f"{distribution}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        lines = "".join(f"{name} = {value}\n" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[trimig.guests]\n{lines}")

    return make


async def test_installed_kind_is_hosted_and_its_record_is_kept(tmp_path: Path, install: Install) -> None:
    install("machinery", robot="robots:KIND")
    words = ("--guest", "robot:arnold")
    async with hosting(f"unix:{tmp_path}/q", *words) as (process, client):
        assert (await client.execute("query-status"))["status"] == "running"
        await client.execute("migrate", {"uri": f"file:{tmp_path}/stream"})
        assert process.stdout is not None
        text = b""
        while b"decided for file:" not in text:
            more = await process.stdout.receive_some()
            assert more, text
            text += more
        assert b"event MIGRATION" in text
        await client.execute("quit")
        assert (await ends(process))[0] in (0, 3)


async def test_help_lists_every_kind_and_one_that_is_broken_hides_no_other(install: Install) -> None:
    install("machinery", robot="robots:KIND", car="bad_robots:KIND")
    code, out, _ = await trimig_command("run", "--help")
    assert code == 0
    text = " ".join(out.split())
    for name in BUILT_IN:
        assert find(name).syntax in text
    assert "robot:NAME A robot." in text
    assert "car Cannot be used" in text
    assert "machinery 1.5" in text


@pytest.mark.parametrize(
    ("spec", "code", "text"),
    [
        ("car:x", 2, "'car' of the distribution machinery 1.5 cannot be imported: ImportError('no wheels')"),
        ("boat", 2, "'boat' of the distribution machinery 1.5 is a int, and no trimig.guests.GuestKind"),
        ("ship", 2, "machinery 1.5 calls itself 'robot'"),
        ("twin", 2, "comes from copies 1.5 and machinery 1.5"),
        ("lost", 2, "AttributeError"),
        (
            "robto:x",
            2,
            "there are app, boat, car, lost, parked, process, robot, ship, twin, worker; did you mean robot?",
        ),
        ("robot:bad", 2, "a robot needs a name"),
        ("robot:broken", 1, "the kind of guest 'robot' failed: ZeroDivisionError('no arms')"),
        ("robot:thing", 1, "the kind of guest 'robot' made a int, which is no guest"),
    ],
)
async def test_kind_that_is_of_no_use_is_one_sentence(
    tmp_path: Path, install: Install, spec: str, code: int, text: str
) -> None:
    install(
        "machinery",
        robot="robots:KIND",
        car="bad_robots:KIND",
        boat="robots:NUMBER",
        ship="robots:KIND",
        twin="robots:KIND",
        lost="robots:NOTHING",
    )
    install("copies", twin="robots:KIND")
    found, out, err = await trimig_command("run", "--qmp", f"unix:{tmp_path}/q", "--guest", spec)
    assert (found, out, err.count("\n"), text in err) == (code, "", 1, True), err


def test_built_in_kind_cannot_be_replaced(install: Install) -> None:
    install("machinery", process="robots:KIND")
    assert find("process").summary.startswith("The workload")
    assert "process" in installed_names()


def test_kind_that_is_not_installed() -> None:
    with pytest.raises(ConfigError, match="no installed distribution"):
        installed_kind("robot")


@pytest.mark.parametrize("name", ["", "Robot", "a:b", "a" * 33, "é"])
def test_name_of_a_kind_has_a_form(name: str) -> None:
    with pytest.raises(ConfigError, match="no name of a kind"):
        GuestKind(name=name, syntax="", summary="", open=find("process").open)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_kind_describes_itself(name: str) -> None:
    kind = find(name)
    assert kind.name == name
    assert kind.syntax.startswith(name)
    assert kind.summary.endswith(".")
    waiting = GuestRequest(text="x", waiting=True, peer=Config().peer)
    assert (kind.record(waiting) is None) is (name != "parked"), "a file that will be saved has one owner, too"
