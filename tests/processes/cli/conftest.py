"""The file that commands read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guests.saved import stream


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "guest"
    path.write_bytes(stream())
    return path
