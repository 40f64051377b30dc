"""The QEMUs that may be measured: the installed one, one that is named by its path, or one of the versions of the tests."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Mapping
from typing import Final

from bench.errors import BenchError
from tests.qemu import installed

_NAME: Final = "qemu-system-x86_64"
_VERSION: Final = re.compile(r"\d+\.\d+")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QemuProgram:
    """A QEMU that can be started."""

    #: The begin of its command line.
    command: tuple[str, ...]
    #: Variables that it needs beside those of this process.
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def find_qemu(wanted: str | None) -> QemuProgram | None:
    """The QEMU to use; None if there is none.

    Args:
        wanted: a path, a name on the path, or a version such as ``11.1`` (:mod:`tests.qemu.installed`); None for the
            installed one.
    """
    if wanted is not None and _VERSION.fullmatch(wanted):
        try:
            found = installed.installed().get(wanted)
        except installed.BrokenRoot as exc:
            raise BenchError(str(exc)) from exc
        return None if found is None else QemuProgram(command=found.command, environment=found.environment)
    path = shutil.which(wanted or _NAME)
    return None if path is None else QemuProgram(command=(path,))
