"""All commands of a machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from . import general, migration, settings
from .machine import Command

#: By name, in the order of ``query-commands``.
COMMANDS: Final[Mapping[str, Command]] = {**general.COMMANDS, **migration.COMMANDS, **settings.COMMANDS}
