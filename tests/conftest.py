"""The checks around every test: no open descriptor or process is left behind, and a missing QEMU is reported.

* A test that leaves a descriptor or a child process behind fails at its teardown, and the failure names them.
* Tests marked ``qemu`` are skipped without QEMU, but fail if ``CI`` is set, so that CI never omits them silently.
  The same holds for each version of QEMU that a test names.
* The option ``-m`` chooses between some, most and all of the tests (:mod:`tests.tiers`).
* ``--matrix FILE`` writes the outcome of each pairing with a QEMU (:mod:`tests.qemu.table`).
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path

import hypothesis
import pytest

from tests import tiers
from tests.fuzzed import Fuzzed, Inputs
from tests.qemu import installed
from tests.qemu.table import Outcomes, written

# The machines of these tests are shared and slow now and then: a slow example is no failure. CI draws the same examples
# each time; other runs draw new ones.
hypothesis.settings.register_profile("trimig", deadline=None, derandomize="CI" in os.environ, print_blob=True)
hypothesis.settings.load_profile("trimig")

_failed = pytest.StashKey[bool]()
_outcomes = Outcomes()
_inputs = Inputs()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options that this project adds."""
    parser.addoption("--matrix", metavar="FILE", type=Path, help="write the table of trimig and QEMU to this file")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """For the smallest tier, reading all test files would take most of the time."""
    return True if tiers.without_use(collection_path, config.option.markexpr) else None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    """Let pytest select the tests of the tier."""
    for item in items:
        if tiers.smoke(item.nodeid):
            item.add_marker(pytest.mark.smoke)
        if tiers.slow(item.nodeid) or item.get_closest_marker("full") is not None:
            item.add_marker(pytest.mark.slow)
    given = config.option.markexpr
    config.option.markexpr = tiers.choose(given, config.args)
    if tiers.everything():
        for item in items:
            if tiers.long(item.nodeid) or "fuzzed" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.timeout(tiers.LONG_SECONDS))
    try:
        return (yield)
    finally:
        config.option.markexpr = given


def pytest_report_header() -> str:
    """The data needed to repeat this run."""
    return f"trimig: samples of sweeps are drawn with TRIMIG_TEST_SEED={tiers.seed()}"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect the outcomes of the cells of the matrix, and the number of tried inputs."""
    _outcomes.note(report.user_properties, report.outcome)
    _inputs.note(report.user_properties, report.when)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the outcomes, and write them to a file."""
    if _outcomes.found:
        terminalreporter.section("trimig and QEMU")
        for cell in _outcomes.failed():
            terminalreporter.line(f"failed: {cell}")
        terminalreporter.line(_outcomes.counts())
    if _inputs.found:
        terminalreporter.section("fuzz")
        for line in _inputs.lines():
            terminalreporter.line(line)
    if (path := config.getoption("--matrix")) is not None:
        path.write_text(written(_outcomes.found, installed.versions()), encoding="utf-8")


@pytest.fixture
def fuzzed(record_property: Callable[[str, object], None]) -> Fuzzed:
    """Report the number of tried inputs and their kind, for the end of the run."""

    def count(subject: str, inputs: int) -> None:
        record_property("fuzzed", (subject, inputs))

    return count


def missing_qemu(found: object | None, environ: Mapping[str, str], version: str | None = None) -> None:
    """Skip, or fail in CI, if there is no QEMU: *found* is None. *version* is the requested one."""
    if found is not None:
        return
    if version is None:
        reason = "no qemu-system-x86_64 (Debian: apt-get install qemu-system-x86; or set TRIMIG_TEST_QEMU)"
    else:
        reason = f"no QEMU {version} (tests/qemu/roots.sh makes roots with 10.0 and 11.1; or set TRIMIG_QEMU_ROOTS)"
    if environ.get("CI"):
        pytest.fail(f"CI must test against a real QEMU: {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the fixtures, which may need QEMU themselves."""
    if item.get_closest_marker("qemu") is not None:
        missing_qemu(installed.default(), os.environ)
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            version = item.callspec.params.get("version")
            if isinstance(version, str):
                missing_qemu(installed.installed().get(version), os.environ, version)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Record failures: the traceback of a failed test keeps its objects alive, so the leak check says nothing there."""
    report = yield
    if report.failed:
        item.stash[_failed] = True
    return report


def open_descriptors() -> dict[int, str]:
    """The target of each open descriptor of this process: ``"socket:[4711]"``, ``"/dev/null"``, …"""
    found: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return found


def children() -> set[int]:
    """Ids of the child processes of all threads, zombies included."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            found |= {int(pid) for pid in (task / "children").read_text().split()}
        except FileNotFoundError:
            continue  # the thread has just ended
    return found


class LeakCheck:
    """Compares the process now with its state when this object was made."""

    def __init__(self) -> None:
        self._descriptors = open_descriptors()
        self._children = children()
        self._modules = len(sys.modules)

    def leaks(self) -> list[str]:
        """One line for each surplus descriptor and child."""
        if found := self._look():
            # Garbage in a reference cycle is no leak; a collection after each test would cost too much.
            gc.collect()
            found = self._look()
        return found

    def _look(self) -> list[str]:
        # An import may open a file once and keep it (a random device, a data file): allow that if a module was
        # imported.
        imported = len(sys.modules) > self._modules
        left = [
            f"descriptor {fd}: {target}"
            for fd, target in open_descriptors().items()
            if self._descriptors.get(fd) != target and not (imported and _opened_by_import(target))
        ]
        return left + [f"child process {pid}: {_command(pid)}" for pid in children() - self._children]


def _opened_by_import(target: str) -> bool:
    return target in ("/dev/null", "/dev/urandom", "/dev/random") or target.startswith((sys.prefix, sys.base_prefix))


def _command(pid: int) -> str:
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except FileNotFoundError:
        return "just ended, not reaped"
    return line or "a zombie"


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a passed test that leaves descriptors or child processes behind."""
    check = LeakCheck()
    yield
    if request.node.stash.get(_failed, False):
        return
    if leaks := check.leaks():
        pytest.fail("left behind:\n  " + "\n  ".join(leaks), pytrace=False)
