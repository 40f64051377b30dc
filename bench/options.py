"""Types of options of the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from bench.errors import BenchError
from bench.memory import parse_size

F = TypeVar("F", bound=Callable[..., Any])


class Size(click.ParamType[int]):
    """256M, 1G or bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except BenchError as exc:
            self.fail(str(exc), param, ctx)


class Sizes(click.ParamType[tuple[int, ...]]):
    """Several sizes, separated by commas."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(parse_size(part.strip()) for part in value.split(","))
        except BenchError as exc:
            self.fail(str(exc), param, ctx)


class Counts(click.ParamType[tuple[int, ...]]):
    """Several positive numbers, separated by commas."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in value.split(",")]
        if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
            self.fail(f"{value!r} is not a list of positive numbers", param, ctx)
        return tuple(dict.fromkeys(int(part) for part in parts))


class Names(click.ParamType[tuple[str, ...]]):
    """A comma-separated choice of names, each once."""

    name = "names"

    def __init__(self, known: tuple[str, ...]) -> None:
        self._known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
        for name in names:
            if name not in self._known:
                self.fail(f"{name!r} is not one of {', '.join(self._known)}", param, ctx)
        return names


def names_option(flag: str, target: str, known: tuple[str, ...], default: str, help_text: str) -> Callable[[F], F]:
    """An option that takes a choice of *known*, separated by commas."""
    return click.option(
        flag, target, type=Names(known), default=default, show_default=True, help=f"{help_text} ({', '.join(known)})."
    )


def repeat_option(default: int) -> Callable[[F], F]:
    """``--repeat``."""
    return click.option(
        "--repeat", type=click.IntRange(min=1), default=default, show_default=True, help="Interleaved rounds."
    )


def timeout_option(default: float) -> Callable[[F], F]:
    """``--timeout``."""
    return click.option(
        "--timeout", type=click.FloatRange(min=1), default=default, show_default=True, help="Seconds for one run."
    )


json_option: Final = click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there."
)
qemu_option: Final = click.option(
    "--qemu", "qemu_path", help="The QEMU: a path, or a version such as 11.1 (else qemu-system-x86_64 of PATH)."
)
