"""How the bytes of a migration go: the kind of address, and what encodes and distributes the pages.

A way is named in the rows of :mod:`bench.precopy`, :mod:`bench.cancel` and :mod:`bench.encodings`. Its capabilities and
parameters have QEMU's names and are set on both sides, whether they are a QEMU or a trimig.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

import trimig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way."""

    name: str
    #: A unix socket; else TCP over loopback.
    unix: bool = False
    capabilities: tuple[str, ...] = ()
    parameters: Mapping[str, int | str] = dataclasses.field(default_factory=dict)
    #: The source chooses the encoding of each batch among these capabilities, which no QEMU does.
    choose: bool = False
    #: The version of QEMU that this way is compared with; "" for the one that is measured otherwise.
    qemu: str = ""

    def address(self, directory: str) -> str:
        """Where a destination listens; a socket is in *directory*."""
        return f"unix:{directory}/socket" if self.unix else "tcp:127.0.0.1:0"

    def parameter_options(self) -> list[str]:
        """The parameters as ``NAME=VALUE``."""
        return [f"{name}={value}" for name, value in self.parameters.items()]

    def refusal(self) -> str:
        """Why trimig cannot go this way, in one sentence; empty if it can."""
        try:
            trimig.Config().with_options(self.capabilities, self.parameter_options())
        except trimig.ConfigError as exc:
            return f"not built in trimig: {exc}"
        return ""


def _multifd(name: str, channels: int, compression: str = "none", *, unix: bool = False, qemu: str = "") -> Way:
    parameters: dict[str, int | str] = {"multifd-channels": channels, "multifd-compression": compression}
    if compression != "none":
        parameters[f"multifd-{compression}-level"] = 1
    return Way(name=name, unix=unix, capabilities=("multifd",), parameters=parameters, qemu=qemu)


TCP: Final = Way(name="tcp")

#: The ways of :mod:`bench.precopy`.
WAYS: Final[dict[str, Way]] = {
    way.name: way
    for way in (
        TCP,
        Way(name="unix", unix=True),
        _multifd("multifd-1", 1),
        _multifd("multifd-2", 2),
        _multifd("multifd-4", 4),
        _multifd("unix-multifd-2", 2, unix=True),
    )
}

_XBZRLE: Final = {"xbzrle-cache-size": 256 << 20}
_COMPRESS: Final = {"compress-level": 1, "compress-threads": 2, "decompress-threads": 2}

#: The encodings of :mod:`bench.encodings` and :mod:`bench.cancel`, each with the QEMU to compare with: ``compress`` was
#: removed in 9.1, and multifd is compared with the newest.
ENCODINGS: Final[dict[str, Way]] = {
    way.name: way
    for way in (
        Way(name="plain", qemu="7.2"),
        Way(name="xbzrle", capabilities=("xbzrle",), parameters=_XBZRLE, qemu="7.2"),
        Way(name="compress", capabilities=("compress",), parameters=_COMPRESS, qemu="7.2"),
        Way(name="auto", capabilities=("xbzrle", "compress"), parameters={**_XBZRLE, **_COMPRESS}, choose=True),
        _multifd("multifd-none", 2, qemu="11.1"),
        _multifd("multifd-zlib", 2, "zlib", qemu="11.1"),
        _multifd("multifd-zstd", 2, "zstd", qemu="11.1"),
    )
}
