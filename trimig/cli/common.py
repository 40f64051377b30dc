"""What the commands share: options, one way to run, one way to fail.

A command that moves something looks like this::

    @click.command()
    @click.argument("uri")
    @migration_options
    def send(uri: str, config: trimig.Config, as_json: bool) -> int:
        async def job() -> int:
            ...
            return 0

        return run(job, as_json=as_json)

It raises :class:`trimig.TrimigError`, OSError or click's errors, and the frame makes sentences and exit codes of
them. What it returns is its exit code.
"""

from __future__ import annotations

import dataclasses
import functools
import signal
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
import trio

import trimig
from trimig import formats

from . import signals
from .exit_codes import CANCELLED, DONE, exit_code
from .output import say, write_error, write_json

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


# -- options -----------------------------------------------------------------------------------------------------------

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
            size = trimig.parse_size(value)
        except trimig.ConfigError as error:
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
    """A time limit, above 0; not a number and infinity are none."""

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
#: ``--debug`` is looked for by the frame, before anything else is understood; here it is only let through.
debug_option: Final = click.option(
    "--debug", is_flag=True, expose_value=False, help="Print the traceback of an error as well."
)


def migration_options(command: F) -> F:
    """Options of every command that moves something. The command gets ``config: trimig.Config`` and ``as_json: bool``.

    The file of ``--config`` comes first, ``-c`` and ``-p`` over it.
    """
    return config_options()(json_option(debug_option(command)))


def config_options(base: trimig.Config | None = None) -> Callable[[F], F]:
    """``-c``, ``-p``, ``--config`` and those of TLS alone, for a command that takes ``config``.

    Args:
        base: used where no ``--config`` is given; None for trimig's defaults.
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
            metavar="NAME[=off]",
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
            config = trimig.Config.from_toml(config_file) if config_file else base or trimig.Config()
            return command(*args, config=config.with_options(capabilities, parameters, objects, tls=tls), **kwargs)

        return with_config  # type: ignore[return-value]  # the same callable with other keywords: not expressible

    return decorate


# -- running -----------------------------------------------------------------------------------------------------------


def run(
    job: Callable[[], Awaitable[int | None]],
    *,
    as_json: bool = False,
    interrupt: Callable[[str], None] | None = None,
    doing: Callable[[], str] = lambda: "ending",
    judge: Callable[[], tuple[str, bool] | None] | None = None,
    truth: Callable[[], trimig.TrimigError | None] = lambda: None,
) -> int:
    """Run *job* in trio and return the exit code: the one it returns, or 130 if a signal cancelled it.

    SIGINT, SIGTERM and SIGHUP (a closed terminal) cancel it, through a cancel scope, so that the guest is put back first. Further signals change
    nothing: what is still going on by then is bounded in time and must not be cut short. A job that finishes in spite
    of the signal, because the guest had been handed over already, counts as finished. Errors pass through.

    Args:
        interrupt: called with the name of the first signal instead, for a job that has to ask others to stop; the
            exit code is then what the job returns.
        doing: asked upon the first signal what it leads to, in words.
        judge: asked at each signal until one is followed: what is said, and whether it is followed; None for
            *doing*.
        truth: asked when a signal has cancelled the job: the error that says what became of the guest, where that is not
            as it was.
    """
    life = signals.current()
    call = functools.partial(_run, job, life, as_json, interrupt, doing, judge, truth)
    life.hold()
    return trio.run(call, strict_exception_groups=True)


async def _run(
    job: Callable[[], Awaitable[int | None]],
    life: signals.ProcessSignals,
    as_json: bool,
    interrupt: Callable[[str], None] | None,
    doing: Callable[[], str],
    judge: Callable[[], tuple[str, bool] | None] | None,
    truth: Callable[[], trimig.TrimigError | None],
) -> int:
    with trio.open_signal_receiver(*life.numbers) as received:
        scope = trio.CancelScope()

        async def cancellable() -> int | None:
            with scope:
                return await job()
            return None

        async def watch() -> None:
            await _first_signal(received, interrupt or scope.cancel, doing, judge)

        life.watched()
        try:
            code = await alongside(cancellable, watch)
        finally:
            life.decided()
    if not scope.cancelled_caught:
        return code or DONE
    if (error := truth()) is not None:
        raise error
    if as_json:
        write_json({"error": "cancelled by a signal", "kind": "Cancelled", "exit_code": CANCELLED})
    say("cancelled")
    return CANCELLED


async def _first_signal(
    signals: AsyncIterator[int],
    cancel: Callable[[str], None],
    doing: Callable[[], str],
    judge: Callable[[], tuple[str, bool] | None] | None,
) -> None:
    asked = False
    async for number in signals:
        name = signal.Signals(number).name
        if not asked:
            text, asked = (judge() if judge is not None else None) or (doing(), True)
            say(f"{name}: {text}")
            if asked:
                cancel(name)
        else:
            say(f"{name}: that is being done already")


async def alongside(call: Callable[[], Awaitable[T]], other: Callable[[], Awaitable[None]]) -> T:
    """The result of *call*, with *other* running meanwhile; *other* is cancelled when *call* is done.

    An error of either leaves as itself, not in a group.

    **Cancellation:** as for *call*. If *call* has returned, its result is returned: it says what has happened, and a
    cancellation that came too late for it must not hide that.
    """
    results: list[T] = []
    failure: BaseException | None = None
    try:
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            nursery.start_soon(other)
            results.append(await call())
            nursery.cancel_scope.cancel("done")
    except BaseExceptionGroup as group:
        failure = _only_one(group)
    except trio.Cancelled:
        if not results:
            raise
    # Raised out here, so that the error does not get the group as its context.
    if failure is not None and not (results and _is_cancelled(failure)):
        raise failure
    return results[0]


def _is_cancelled(error: BaseException) -> bool:
    """Nothing but cancellation."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)[1] is None
    return isinstance(error, trio.Cancelled)


def _only_one(error: BaseException) -> BaseException:
    """The exception in a group of one real one; Cancelled beside it says nothing. Otherwise the group."""
    while isinstance(error, BaseExceptionGroup):
        _, real = error.split(trio.Cancelled)
        inner = (real or error).exceptions
        if len(inner) != 1:
            return error
        error = inner[0]
    return error


# -- telling -----------------------------------------------------------------------------------------------------------


def report_error(error: Exception, *, as_json: bool, debug: bool) -> int:
    """Say what went wrong, on stderr and with *as_json* on stdout as well; returns the exit code."""
    code, record = error_record(error)
    if debug:
        write_error("".join(traceback.format_exception(error)))
    if as_json:
        write_json(record)
    usage = ""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        write_error(f"{error.format_message()}\n")
        return code
    if isinstance(error, click.UsageError) and error.ctx is not None:
        usage = f" (see '{error.ctx.command_path} --help')"
    say(f"{record['error'].rstrip('.')}{usage}")
    return code


def error_record(error: Exception) -> tuple[int, dict[str, Any]]:
    """The exit code for *error*, and what ``--json`` prints: ``error``, ``kind``, ``exit_code``, and, where they apply,
    ``owner`` (source, destination or unknown), ``offset``, ``section``, ``name``, ``code``."""
    code, text = exit_code(error), str(error)
    record: dict[str, Any] = {"error": "", "kind": type(error).__name__, "exit_code": code}
    if isinstance(error, click.ClickException):
        text = error.format_message()
    elif isinstance(error, trimig.ConfigError):
        record["name"] = error.name
    elif isinstance(error, trimig.TrimigError):
        if error.owner is not None:
            record["owner"] = error.owner.value
        for name in ("offset", "section", "code"):
            if (value := getattr(error, name, None)) is not None:
                record[name] = value
    elif isinstance(error, OSError):
        text = error.strerror or str(error)
        if error.filename is not None:
            text = f"{error.filename}: {text}"
    record["error"] = " ".join(text.split()) or type(error).__name__
    return code, record


def summary_record(summary: trimig.Summary) -> dict[str, Any]:
    """A summary as JSON: times in ms, sizes in bytes, the downtime in its parts."""
    return {
        "role": summary.role.value,
        "confirmed": summary.confirmed,
        "prepared": summary.prepared,
        "total_ms": formats.ms(summary.total_time),
        "setup_ms": formats.ms(summary.setup_time),
        "downtime_ms": formats.ms(summary.downtime),
        "downtime": {part.name: formats.ms(getattr(summary.downtime_parts, part.name)) for part in _PARTS},
        "throughput_bytes_per_s": round(summary.throughput),
        "iterations": summary.iterations,
        "dirty_tracking": summary.dirty_tracking,
        "ram_bytes": summary.ram_bytes,
        "transferred_bytes": summary.bytes_transferred,
        "normal_bytes": summary.normal_pages * 4096,
        "zero_bytes": summary.zero_pages * 4096,
        "warnings": list(summary.warnings),
    }


_PARTS: Final = dataclasses.fields(trimig.Downtime)
