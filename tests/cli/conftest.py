"""The fixture that runs a command against a scripted guest."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
from click.testing import CliRunner, Result

from tests.cli.scripted import ADDRESS, Invoke, Scripted
from trimig import cli, qmp


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """``invoke(guest, "status", …)`` runs the command against that guest."""

    def call(guest: Scripted, *words: str) -> Result:
        @contextlib.asynccontextmanager
        async def connect(address: str) -> AsyncIterator[Scripted]:
            assert address == ADDRESS
            guest.connections += 1
            yield guest
            guest.left()

        monkeypatch.setattr(qmp, "connect", connect, raising=False)
        result = CliRunner().invoke(cli.main, [*words, "--qmp", ADDRESS])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return result

    return call
