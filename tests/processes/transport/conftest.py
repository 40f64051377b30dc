"""A pipe."""

from __future__ import annotations

from tests.transport.conftest import pipe

__all__ = ["pipe"]
