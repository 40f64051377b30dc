"""The output for an error, as text and as JSON."""

from __future__ import annotations

import traceback
from typing import Any

import click

from trimig.errors import ConfigError, PeerFailed, RemoteProtocolError, TrimigError

from .exit_codes import exit_code
from .output import say, write_error, write_json


def report_error(error: Exception, *, as_json: bool, debug: bool) -> int:
    """Print *error* on stderr and with *as_json* on stdout as well; returns the exit code."""
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
    """The exit code for *error*, and the object that ``--json`` prints: ``error``, ``kind``, ``exit_code``, and, if
    they apply, ``owner`` (source, destination or unknown), ``offset``, ``section``, ``name``, ``code``."""
    code, text = exit_code(error), str(error)
    record: dict[str, Any] = {"error": "", "kind": type(error).__name__, "exit_code": code}
    if isinstance(error, click.ClickException):
        text = error.format_message()
    elif isinstance(error, ConfigError):
        record["name"] = error.name
    elif isinstance(error, TrimigError):
        if error.owner is not None:
            record["owner"] = error.owner.value
        if isinstance(error, RemoteProtocolError):
            found = {"offset": error.offset, "section": error.section}
            record |= {name: value for name, value in found.items() if value is not None}
        elif isinstance(error, PeerFailed):
            record["code"] = error.code
    elif isinstance(error, OSError):
        text = error.strerror or str(error)
        if error.filename is not None:
            text = f"{error.filename}: {text}"
    record["error"] = " ".join(text.split()) or type(error).__name__
    return code, record
