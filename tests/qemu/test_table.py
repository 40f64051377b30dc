"""The table of the matrix shows the outcomes of the tests."""

from __future__ import annotations

from tests.qemu.cells import Cell
from tests.qemu.table import Outcomes, written

ONE = Cell("10.0", "none", "to", "precopy")
OTHER = Cell("10.0", "pc", "from", "uuid")


def test_worst_phase_of_a_test_counts() -> None:
    outcomes = Outcomes()
    properties = [("cell", ["10.0", "none", "to", "precopy"]), ("other", 1)]
    for outcome in ("passed", "failed", "passed"):
        outcomes.note(properties, outcome)
    outcomes.note([("cell", ("10.0", "pc", "from", "uuid"))], "skipped")
    outcomes.note([("other", ["10.0", "pc", "from", "tls"])], "failed")
    assert outcomes.found == {ONE: "failed", OTHER: "skipped"}
    assert outcomes.failed() == [ONE]
    assert outcomes.counts() == "QEMU: 2 cells: 0 passed, 1 failed, 1 not possible on this machine"


def test_each_cell_has_its_place_and_its_reason() -> None:
    text = written({ONE: "failed", OTHER: "passed"}, ["7.2", "10.0"])
    to, from_, _through = text.split("\n## ")[1:]
    columns = to.splitlines()[2].split(" | ")
    assert columns[1:4] == ["7.2 pc", "7.2 pc-i440fx-7.2", "7.2 none"]
    precopy = next(line for line in to.splitlines() if line.startswith("| precopy")).split(" | ")
    assert precopy[columns.index("7.2 none")] == "not run"
    assert precopy[-1] == "**FAILED** |"
    uuid = next(line for line in from_.splitlines() if line.startswith("| uuid")).split(" | ")
    assert uuid[columns.index("10.0 pc")] == "ok"
    channels = next(line for line in to.splitlines() if line.startswith("| channels")).split(" | ")
    assert channels[1:5] == ["(1)", "(1)", "(1)", "not run"]
    assert "(1) QEMU 7.2 does not know" in text
    assert "trimig makes no background snapshots." in text
