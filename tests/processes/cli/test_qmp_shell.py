"""QEMU's own ``qmp-shell`` drives two ``trimig run``: settings, a cancelled migration, and a completed one."""

from __future__ import annotations

import sys
from pathlib import Path

import trio

from tests.processes.cli.hosted import GUEST, hosting, status


async def shell(address: Path, *lines: str) -> list[str]:
    """The output of qmp-shell for these lines, each answer without its prompt."""
    tool = Path(sys.executable).with_name("qmp-shell")
    done = await trio.run_process(
        [str(tool), str(address)],
        stdin="".join(f"{line}\n" for line in lines).encode(),
        capture_stdout=True,
        check=False,
    )
    assert done.returncode == 0
    answers = [text.removeprefix("(QEMU) ").strip() for text in done.stdout.decode().splitlines()]
    return [text for text in answers if text.startswith(('{"return"', '{"error"'))]


ON = 'migrate-set-capabilities capabilities=[{"capability":"events","state":true}]'


async def test_qmp_shell_drives_a_migration_from_the_settings_to_the_end(tmp_path: Path) -> None:
    """Set, migrate, query, cancel, migrate again, complete; errors are QMP errors."""
    here, there = tmp_path / "a", tmp_path / "b"
    async with (
        hosting(f"unix:{here}", "--guest", GUEST) as (_, source),
        hosting(f"unix:{there}", "--guest", GUEST, "--incoming", "defer") as (_, destination),
    ):
        first, second = f"unix:{tmp_path}/m1", f"unix:{tmp_path}/m2"
        assert await shell(there, ON, f"migrate-incoming uri={first}") == ['{"return": {}}'] * 2
        answers = await shell(
            here, ON, "migrate-set-parameters max-bandwidth=100000", f"migrate uri={first}", "query-migrate", "no-such"
        )
        assert answers[:3] == ['{"return": {}}'] * 3
        assert '"status"' in answers[3]
        assert "CommandNotFound" in answers[4]
        await status(source, "active")
        assert await shell(here, "migrate_cancel") == ['{"return": {}}']
        await status(source, "cancelled")
        await status(destination, "failed", "cancelled")
        assert (await source.execute("query-status"))["status"] == "running"

        assert await shell(there, f"migrate-incoming uri={second}") == ['{"return": {}}']
        assert (
            await shell(here, "migrate-set-parameters max-bandwidth=0", f"migrate uri={second}")
            == ['{"return": {}}'] * 2
        )
        await status(source, "completed")
        await status(destination, "completed")
        (answer,) = await shell(there, "query-status")
        assert '"status": "running"' in answer
