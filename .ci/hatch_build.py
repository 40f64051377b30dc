"""Builds the optional C parts of a wheel, if the environment has ``TRIMIG_KERNEL=1``. It never fails: a wheel without works."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = "trimig/wire/pages/libxbzrle.c"


class CustomBuildHook(BuildHookInterface[Any]):
    """See the module."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and tag the wheel with its platform."""
        if os.environ.get("TRIMIG_KERNEL") != "1":
            return
        source = Path(self.root) / SOURCE
        library = source.with_suffix(".so")
        command = [os.environ.get("CC", "cc"), "-O3", "-shared", "-fPIC", "-o", str(library), str(source)]
        try:
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            self.app.display_warning(f"no C encoder of XBZRLE, NumPy is used: {error}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["artifacts"].append(library.relative_to(self.root).as_posix())
