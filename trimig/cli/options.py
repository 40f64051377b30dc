"""Options that several commands have, and the types of their values."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from trimig import formats
from trimig.config import Config, parse_size
from trimig.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:
    _SizeBase = click.ParamType[int]
else:
    _SizeBase = click.ParamType  # takes no parameter in older versions of click


class SizeType(_SizeBase):
    """A number of bytes: ``4096``, ``256M``, ``1.5G``."""

    name = "size"

    def __init__(self, *, low: int = 0, pages: bool = False) -> None:
        """At least *low* bytes; with *pages*, a multiple of 4096."""
        self._low = low
        self._pages = pages

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            size = parse_size(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)
        if size < self._low:
            self.fail(f"{value} is too small; at least {formats.size(self._low)}", param, ctx)
        if self._pages and size % 4096:
            self.fail(f"{value} is not a multiple of the page size, 4096 bytes", param, ctx)
        return size


#: A size in bytes, 0 included.
SIZE: Final = SizeType()
#: The size of guest memory: whole pages, at least one.
RAM_SIZE: Final = SizeType(low=4096, pages=True)


class PercentType(click.ParamType[float]):
    """A share: "40%" or "40" is 0.4."""

    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            share = float(str(value).removesuffix("%")) / 100
        except ValueError:
            self.fail(f"{value!r} is no percentage, like 40%", param, ctx)
        if not 0 <= share <= 1:
            self.fail(f"{value} is not between 0% and 100%", param, ctx)
        return share


PERCENT: Final = PercentType()


class SecondsType(click.ParamType[float]):
    """A time limit, above 0; NaN and infinity are refused."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = float(value)
        except ValueError:
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        if not 0 < seconds <= _MOST_SECONDS:
            self.fail(f"{value} is not a number of seconds above 0, at most {_MOST_SECONDS}", param, ctx)
        return seconds


class FileType(click.Path):
    """The name of a file: not empty, and no directory. A `pathlib.Path`, or with *text* a str (which may be ``-``)."""

    def __init__(self, *, text: bool = False) -> None:
        super().__init__(dir_okay=False, path_type=str if text else Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("an empty name is no file; was a variable not set?", param, ctx)
        return super().convert(value, param, ctx)


#: As for the options of the engine.
_MOST_SECONDS: Final = 1_000_000_000
SECONDS: Final = SecondsType()
FILE: Final = FileType()
#: A name, or "-".
FILE_OR_DASH: Final = FileType(text=True)

json_option: Final = click.option(
    "--json", "as_json", is_flag=True, help="For machines: the result as one JSON object on stdout."
)
#: :class:`trimig.cli.Group` looks for ``--debug`` before click parses the options; this option only accepts it.
debug_option: Final = click.option(
    "--debug", is_flag=True, expose_value=False, help="Print the traceback of an error as well."
)


def migration_options(command: F) -> F:
    """Options of every command that migrates a guest. The command gets ``config: trimig.Config`` and ``as_json: bool``.

    The file of ``--config`` is applied first; ``-c`` and ``-p`` override it.
    """
    return config_options()(json_option(debug_option(command)))


def encoding_option(command: F) -> F:
    """``--encoding`` for a command whose guest may be a source. Use it below the options of the configuration, which it changes."""

    @click.option(
        "--encoding",
        type=click.Choice(("off", "auto")),
        help="Choose for each batch of pages among the encodings of -c xbzrle and -c compress, by what they cost and save (auto).",
    )
    @functools.wraps(command)
    def with_encoding(*args: Any, encoding: str | None, config: Config, **kwargs: Any) -> Any:
        if encoding is not None:
            config = dataclasses.replace(config, encoding="auto" if encoding == "auto" else "off")
        return command(*args, config=config, **kwargs)

    return with_encoding  # type: ignore[return-value]  # as below


def config_options(base: Config | None = None) -> Callable[[F], F]:
    """``-c``, ``-p``, ``--config`` and the TLS options only, for a command that takes ``config``.

    Args:
        base: used without ``--config``; None for trimig's defaults.
    """

    def decorate(command: F) -> F:
        @click.option(
            "--config",
            "config_file",
            metavar="FILE.toml",
            type=FILE,
            help="Read capabilities, parameters and the rest from this file.",
        )
        @click.option(
            "-p",
            "--parameter",
            "parameters",
            metavar="NAME=VALUE",
            multiple=True,
            help="Set a migration parameter, by its QMP name; for example -p max-bandwidth=1G.",
        )
        @click.option(
            "-c",
            "--capability",
            "capabilities",
            metavar="NAME[=on|off]",
            multiple=True,
            help="Turn a migration capability on, or off, by its QMP name; for example -c return-path=off.",
        )
        @click.option(
            "--object",
            "objects",
            metavar="TYPE,id=ID,...",
            multiple=True,
            help="Make an object that a parameter names, spelled as for QEMU; for example "
            "--object tls-creds-x509,id=tls0,dir=DIR,endpoint=client -p tls-creds=tls0.",
        )
        @click.option(
            "--tls",
            metavar="DIR",
            type=click.Path(),
            help="Use TLS, with the certificates in this directory: ca-cert.pem, server-cert.pem, server-key.pem, "
            "client-cert.pem, client-key.pem.",
        )
        @functools.wraps(command)
        def with_config(
            *args: Any,
            capabilities: tuple[str, ...],
            parameters: tuple[str, ...],
            objects: tuple[str, ...],
            tls: str | None,
            config_file: Path | None,
            **kwargs: Any,
        ) -> Any:
            config = Config.from_toml(config_file) if config_file else base or Config()
            return command(*args, config=config.with_options(capabilities, parameters, objects, tls=tls), **kwargs)

        return with_config  # type: ignore[return-value]  # the same callable with other keywords: not expressible

    return decorate
