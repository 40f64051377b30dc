"""The command ``trimig``.

This file has the list of commands, and the one place that turns errors into a sentence and an exit code. Commands are
imported on first use; their shared parts are in :mod:`trimig.cli.options` and :mod:`trimig.cli.runner`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any, Final

import click

import trimig
from trimig.wire import XBZRLE_ENCODER

from . import signals
from .errors import report_error
from .exit_codes import CANCELLED, SENTENCE
from .options import debug_option
from .output import forgiving, logging_to_stderr, open_closed_files

#: Command -> the module that defines the function of that name, in the order of the help.
COMMANDS: Final = {
    "demo": "demo.command",
    "run": "commands.run",
    "migrate": "remote.migrate",
    "status": "remote.control",
    "info": "remote.control",
    "cancel": "remote.control",
    "set": "remote.control",
    "continue": "remote.control",
    "postcopy": "remote.control",
    "pause": "remote.control",
    "recover": "remote.control",
    "incoming": "remote.control",
    "events": "remote.control",
    "receive": "commands.parked",
    "send": "commands.parked",
    "settle": "commands.parked",
    "inspect": "commands.inspect",
    "export": "commands.images",
    "merge": "commands.images",
    "docs": "commands.docs",
}


#: The groups of the help.
GROUPS: Final = {
    "See it work, and read about it": ("demo", "docs"),
    "Host a guest": ("run",),
    "Drive a guest over QMP (of a trimig run or a QEMU)": (
        "migrate", "status", "info", "cancel", "set", "continue", "postcopy", "pause", "recover", "incoming", "events",
    ),
    "Guests in files, and streams": ("receive", "send", "settle", "inspect", "export", "merge"),
}  # fmt: skip


class Group(click.Group):
    """Imports commands on demand, and ends the process with the exit codes of the help text."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, module in COMMANDS.items() if importlib.util.find_spec(f"{__name__}.{module}")]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"{__name__}.{COMMANDS[cmd_name]}")
        # Commands whose names are words of Python (continue, set) have functions with a trailing underscore.
        found = getattr(module, cmd_name, None) or getattr(module, f"{cmd_name}_")
        assert isinstance(found, click.Command)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's own; for an unknown command the error lists similar ones."""
        word = args[0]
        if self.get_command(ctx, word) is None and not word.startswith("-"):
            near = difflib.get_close_matches(word, self.list_commands(ctx))
            guess = f"; did you mean {' or '.join(near)}?" if near else ""
            raise click.UsageError(f"No such command {word!r}{guess}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click's own, but in groups, and with whole sentences."""
        for title, names in GROUPS.items():
            commands = [(name, self.get_command(ctx, name)) for name in names]
            with formatter.section(title):
                formatter.write_dl(
                    [(name, command.get_short_help_str(limit=200)) for name, command in commands if command]
                )

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """As click's own, except for the handling of errors. A command returns its exit code, or None for 0."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        words = sys.argv[1:] if args is None else list(args)
        open_closed_files()
        with forgiving(), logging_to_stderr(as_json="--json" in words):
            code = self._code(words, prog_name or "trimig", complete_var, **extra)
        signals.current().ending()
        sys.exit(code)

    def _code(self, words: list[str], prog_name: str, complete_var: str | None, **extra: Any) -> int:
        # Read from the arguments themselves, because an error may be raised before click has parsed the options.
        options = words[: words.index("--")] if "--" in words else words
        try:
            return self._run(words, prog_name, complete_var, **extra)
        except (click.ClickException, trimig.TrimigError, OSError) as error:
            return report_error(error, as_json="--json" in options, debug="--debug" in options)
        except (click.Abort, KeyboardInterrupt):
            # The signal came before the command watched for signals: the command has done nothing yet.
            return CANCELLED

    def _run(self, words: list[str], prog_name: str, complete_var: str | None, **extra: Any) -> int:
        try:
            code = super().main(words, prog_name, complete_var, standalone_mode=False, **extra)
        except (click.ClickException, click.Abort, trimig.TrimigError, OSError):
            raise
        except Exception as error:
            raise trimig.InternalError(
                f"{type(error).__name__}: {error} (a fault of trimig: please report it with what --debug prints)"
            ) from error
        return code if isinstance(code, int) else 0


#: In a context's ``meta``: ``--verbose`` was given.
_VERBOSE: Final = "trimig.verbose"


def _note_verbose(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    context.meta[_VERBOSE] = value


def _show_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Print the version, and end."""
    if not value or context.resilient_parsing:
        return
    click.echo(f"trimig, version {trimig.__version__}")
    if context.meta.get(_VERBOSE):
        click.echo(f"XBZRLE is encoded by: {XBZRLE_ENCODER}")
    context.exit()


@click.group(
    cls=Group,
    name="trimig",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=SENTENCE,
)
@click.option(
    "-V", "--version", is_flag=True, expose_value=False, callback=_show_version, help="Show the version and exit."
)
@click.option(
    "--verbose",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_note_verbose,
    help="With --version: which optional parts are used.",
)
@debug_option
def main() -> None:
    """Move running guests between processes and hosts, over QEMU's migration stream.

    Addresses are written as for QEMU's -incoming: tcp:HOST:PORT, unix:PATH, exec:COMMAND, fd:NUMBER, file:PATH, and
    also ws://HOST:PORT/PATH and wss://…. The other end may be trimig or a QEMU.
    """
