"""New files of processes that are killed or may not write."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trimig.guests.parked.newfile import NewFile, check_target


def test_a_directory_without_permission_is_refused_at_once(tmp_path: Path) -> None:
    """In a process of its own, because root may write everywhere."""
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom trimig.guests.parked.newfile import check_target\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setegid(65534); os.seteuid(65534)\n"
        "os.chdir('closed')\n"
        "check_target(Path('out'), replace=False)"
    )
    tmp_path.chmod(0o755)
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
    )
    assert done.returncode == 1
    assert b"PermissionError" in done.stderr
    assert any(name in done.stderr for name in (b"out", b"'.'"))


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    """Where the file system can keep a file without a name, as the usual ones of Linux can."""
    try:
        os.close(os.open(tmp_path, os.O_TMPFILE | os.O_RDWR, 0o600))
    except OSError as error:
        pytest.skip(f"this file system cannot: {error.strerror}")
    code = (
        "import os, signal\nfrom pathlib import Path\nfrom trimig.guests.parked.newfile import NewFile\n"
        "file = NewFile(Path('out'), replace=False)\nfile.write_at(0, bytes(1 << 20))\nfile.sync()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("replace", [False, True])
def test_what_a_killed_process_has_left_is_removed_by_the_next(
    tmp_path: Path, file_system: str, *, replace: bool
) -> None:
    """Killed between the link and the rename, by which a file takes the place of another."""
    (tmp_path / "out").write_bytes(b"precious")
    code = (
        "import errno, os, signal, sys\nfrom pathlib import Path\nfrom trimig.guests.parked.newfile import NewFile\n"
        "os.rename = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "file = NewFile(Path('out'), replace=True)\nfile.write_at(0, bytes(1 << 20))\nfile.finish()"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert done.returncode == -signal.SIGKILL
    left = sorted(os.listdir(tmp_path))
    assert len(left) == 2
    assert left[0].endswith(".part")
    # Of another file, of another program, or no such name: these stay.
    others = [".out.mine.part", ".out2.0123456789ab.part", f"x{left[0]}"]
    for name in others:
        (tmp_path / name).write_bytes(b"precious")
    check_target(tmp_path / ("out" if replace else "out2.0123456789ab.part"), replace=True)
    assert (left[0] in os.listdir(tmp_path)) is not replace
    NewFile(tmp_path / "out", replace=True).discard()
    assert sorted(os.listdir(tmp_path)) == sorted(["out", *others])
    assert (tmp_path / "out").read_bytes() == b"precious"
