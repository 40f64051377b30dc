"""The tool that changes the program: on a program of a few lines, and its list against the present one."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tests.mutate import __main__ as command
from tests.mutate import named, operators
from tests.mutate.run import Mutant, run

PROGRAM = '''"""A program."""


def größer(a: int, b: int) -> bool:
    """Whether a ≥ b."""
    return a >= b


def unused(a: int) -> int:
    return a + 1
'''
TESTS = """from trimig.program import größer

def test_größer():
    assert größer(2, 1)
    assert größer(1, 1)
    assert not größer(1, 2)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("trimig", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / "trimig" / "program.py").write_text(PROGRAM)
    (tmp_path / "tests" / "test_program.py").write_text(TESTS)
    (tmp_path / "pyproject.toml").write_text("")
    return tmp_path


def mutants(tree: Path) -> list[Mutant]:
    found = operators.sample(tree, ["trimig/program.py"], 99, seed=1)
    return sorted((Mutant(change, ("tests/test_program.py",)) for change in found), key=lambda m: str(m.change))


def test_changes_of_a_program(tree: Path) -> None:
    assert [str(mutant) for mutant in mutants(tree)] == [
        "trimig/program.py:10: + -> -",
        "trimig/program.py:10: 1 -> 0",
        "trimig/program.py:10: 1 -> 2",
        "trimig/program.py:10: a + 1 -> (not (a + 1))",
        "trimig/program.py:6: >= -> >",
        "trimig/program.py:6: a >= b -> (not (a >= b))",
    ]


def test_what_is_noticed_and_what_survives(tree: Path) -> None:
    """In a copy: the tree itself is never changed."""
    wanted = [mutant for mutant in mutants(tree) if mutant.change.new in (">", "-")]
    verdicts = run(tree, wanted, jobs=2, limit=60, broken=pytest.fail)
    assert {v.mutant.change.new: v.outcome for v in verdicts} == {">": "noticed", "-": "survived"}
    assert "test_größer" in next(v.by for v in verdicts if v.outcome == "noticed")
    assert json.loads(json.dumps(verdicts[0].as_json()))["file"] == "trimig/program.py"
    assert (tree / "trimig" / "program.py").read_text() == PROGRAM


def test_what_hangs_is_ended(tree: Path) -> None:
    source = "import time\n\n\ndef wait(a: int) -> None:\n    while a > 0:\n        a -= 1\n        time.sleep(0.01)\n"
    (tree / "trimig" / "program.py").write_text(source)
    (tree / "tests" / "test_program.py").write_text("from trimig.program import wait\n\ndef test_it():\n    wait(2)\n")
    (endless,) = [mutant for mutant in mutants(tree) if mutant.change.old == "a -= 1"]
    (verdict,) = run(tree, [endless], limit=10, broken=pytest.fail)
    assert verdict.outcome == "hung"


def test_tests_that_fail_unchanged_are_said(tree: Path) -> None:
    (tree / "tests" / "test_program.py").write_text(TESTS.replace("assert not", "assert"))
    said: list[str] = []
    assert run(tree, mutants(tree)[:1], limit=60, broken=said.append) == []
    assert len(said) == 1
    assert "test_größer" in said[0]


def test_named_changes_stand_in_the_program() -> None:
    """Each once, and the changed module still compiles; a change of the program changes the list with it."""
    found = named.mutants(command.ROOT)
    assert len(found) >= 30
    for mutant in found:
        changed = mutant.change.apply((command.ROOT / mutant.change.file).read_text())
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse((command.ROOT / mutant.change.file).read_text()))
        for test in mutant.tests:
            assert (command.ROOT / test.partition("::")[0]).exists(), test


def test_random_changes_are_the_same_each_time() -> None:
    first, second = command.randomly(100, 10), command.randomly(100, 10)
    assert first == second
    assert len(set(map(str, first))) > 95
    assert {str(m) for m in command.randomly(100, 11)} != {str(m) for m in first}
    assert all((command.ROOT / test).exists() for mutant in first for test in mutant.tests)


def test_the_command_lists_and_chooses(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list", "--named", "--only", "PING 4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("PING 4 left out: trimig/engine/source/switchover.py:")
    assert out.count("\n") == 1
