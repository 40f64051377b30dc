"""File systems for new files."""

from __future__ import annotations

from tests.guests.conftest import file_system

__all__ = ["file_system"]
