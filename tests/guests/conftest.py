"""File systems for new files."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest


@pytest.fixture(params=["without a name", "hidden name"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One that can keep a file without a name, and one that cannot."""
    if request.param == "hidden name":
        real = os.open

        def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)
            return real(path, flags, *rest, **more)

        monkeypatch.setattr(os, "open", refuse)
    return str(request.param)
