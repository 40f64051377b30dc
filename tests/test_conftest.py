"""The guards in conftest.py are themselves able to fail."""

from __future__ import annotations

import os
import socket

import pytest

from tests import tiers
from tests.conftest import LeakCheck, missing_qemu


def test_open_file_socket_and_memfd_are_leaks() -> None:
    check = LeakCheck()
    assert check.leaks() == []
    fd = os.memfd_create("leak")
    with socket.socket():
        found = check.leaks()
        assert len(found) == 2
        assert any("memfd:leak" in line for line in found)
        assert any("socket:" in line for line in found)
    os.close(fd)
    assert check.leaks() == []


def test_descriptor_exchanged_for_another_one_is_a_leak() -> None:
    first = os.memfd_create("first")
    check = LeakCheck()
    second = os.memfd_create("second")
    os.dup2(second, first)
    os.close(second)
    assert [line for line in check.leaks() if "memfd:second" in line]
    os.close(first)


class _Owner:
    """Holds a descriptor, and itself, so that only the garbage collector ends it."""

    def __init__(self) -> None:
        self.myself = self
        self.fd = os.memfd_create("cycle")

    def __del__(self) -> None:
        os.close(self.fd)


def test_garbage_in_a_cycle_is_no_leak() -> None:
    check = LeakCheck()
    owner = _Owner()
    assert check.leaks()
    del owner
    assert check.leaks() == []


def test_missing_qemu_skips_on_a_desk_and_fails_in_ci() -> None:
    missing_qemu("/usr/bin/qemu-system-x86_64", {"CI": "true"})
    with pytest.raises(pytest.skip.Exception, match="qemu-system-x86"):
        missing_qemu(None, {})
    with pytest.raises(pytest.fail.Exception, match="must test against a real QEMU"):
        missing_qemu(None, {"CI": "true"})
    with pytest.raises(pytest.skip.Exception, match=r"no QEMU 11\.1 .*roots\.sh"):
        missing_qemu(None, {}, "11.1")
    with pytest.raises(pytest.fail.Exception, match=r"no QEMU 11\.1"):
        missing_qemu(None, {"CI": "true"}, "11.1")


def test_tier_is_chosen_by_the_marks_and_names_that_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "_everything", False)
    for expression, arguments, wanted in (
        ("", ["tests"], "not full"),
        ("", ["tests/test_x.py::test_one"], ""),
        ("smoke", [], "smoke"),
        ("qemu and full", [], "qemu and full"),
    ):
        assert tiers.choose(expression, arguments) == wanted
        assert not tiers.everything()
    assert tiers.choose("full", []) == ""
    assert tiers.everything()


def test_files_of_the_smallest_tier_are_there() -> None:
    missing = [name for name in tiers.SMOKE if not (tiers.ROOT / name.partition("::")[0]).is_file()]
    assert missing == []
    assert tiers.smoke("tests/test_status.py::test_one[x]")
    assert not tiers.smoke("tests/qemu/test_versions.py::test_guest_arrives_whole[7.2-pc-to-precopy]")


def test_samples_are_drawn_by_the_commit_unless_another_number_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMIG_TEST_SEED", "17")
    tiers.seed.cache_clear()
    assert tiers.seed() == 17
    monkeypatch.delenv("TRIMIG_TEST_SEED")
    tiers.seed.cache_clear()
    drawn = tiers.seed()
    tiers.seed.cache_clear()
    assert tiers.seed() == drawn
    monkeypatch.setenv("PATH", "/nonexistent")
    tiers.seed.cache_clear()
    assert tiers.seed() == 0
    tiers.seed.cache_clear()
