"""``trimig export`` and ``merge``: write the memory of a saved guest for other tools; join two halves."""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path

import click

from trimig import formats, stream
from trimig.stream import check_target

from .. import saved
from ..exit_codes import DONE
from ..options import FILE, FILE_OR_DASH, debug_option, json_option
from ..output import say, write_json
from ..runner import run

_PAGE = 4096


@click.command()
@click.argument("file", metavar="FILE|-", type=FILE_OR_DASH)
@click.option("--format", "form", metavar="raw|elf|lime", required=True, help="What to write; raw for now.")
@click.option("--block", metavar="NAME", required=True, help="The RAM block; trimig inspect lists them.")
@click.option("--out", metavar="PATH|-", type=FILE_OR_DASH, required=True, help="Where to; - for standard output.")
@click.option("--partial", is_flag=True, help="Write zeros for what FILE lacks, instead of refusing it.")
@click.option(
    "--holes",
    metavar="PATH",
    type=FILE,
    help="Write a map of what FILE lacks to PATH, as JSON. Implies --partial.",
)
@click.option("--force", is_flag=True, help="Replace PATH if it exists.")
@json_option
@debug_option
def export(
    file: str, form: str, block: str, out: str, partial: bool, holes: Path | None, force: bool, as_json: bool
) -> int:
    """Write the RAM of a saved guest to a file for other tools.

    raw is one RAM block, byte for byte; zero pages become holes of the file.

    FILE may be what a lost postcopy has left (FILE.partial of trimig receive): then --partial writes what there is, and
    --holes says what there is not.
    """
    if form not in stream.FORMATS:
        raise click.BadParameter(
            f"{form!r} is not built yet; there is {', '.join(stream.FORMATS)}"
            if form in ("elf", "lime")
            else f"unknown format {form!r}; there is {', '.join(stream.FORMATS)}",
            param_hint="--format",
        )
    if as_json and out == "-":
        raise click.UsageError("--json and --out - both want standard output")
    if holes is not None:
        if out != "-" and holes.resolve() == Path(out).resolve():
            raise click.BadParameter(f"{holes} is what --out names", param_hint="--holes")
        _check_new(holes, force, "--holes")
    if out != "-":
        _check_new(Path(out), force, "--out")
    job = functools.partial(_export, file, block, out, partial or holes is not None, holes, force, as_json)
    with contextlib.ExitStack() as stack:
        for written in (holes, None if out == "-" else Path(out)):
            if written is not None:
                stack.enter_context(saved.replacing(written))
        code = run(job, as_json=as_json)
        if code == DONE and out != "-":
            saved.forget_record(Path(out))
        return code


def _check_new(path: Path, force: bool, option: str) -> None:
    """Refuse a bad output path before anything is read."""
    if not path.resolve().parent.is_dir():
        raise click.BadParameter(f"there is no directory {path.parent}", param_hint=option)
    try:
        check_target(path, replace=force)
    except FileExistsError as error:
        what = "is a symbolic link" if path.is_symlink() else "exists"
        raise click.BadParameter(f"{error.filename} {what}; --force replaces it", param_hint=option) from None
    except OSError as error:
        raise click.BadParameter(f"{error.filename or path}: {error.strerror}", param_hint=option) from error


async def _export(
    file: str, block: str, out: str, partial: bool, holes: Path | None, force: bool, as_json: bool
) -> int:
    try:
        done = await stream.export_raw(file, block, out, replace=force, partial=partial)
    except FileExistsError as error:
        raise click.BadParameter(f"{error.filename} exists; --force replaces it", param_hint="--out") from None
    length, lacking = done.length, sum(size for _, size in done.holes)
    if holes is not None:
        record = {
            "block": block,
            "length": length,
            "holes": [{"offset": at, "length": size} for at, size in done.holes],
        }
        await stream.write_new(holes, json.dumps(record) + "\n", replace=force)
    if as_json:
        write_json({"file": file, "block": block, "out": out, "bytes": length, "missing_bytes": lacking})
        return DONE
    if lacking:
        say(f"warning: {formats.size(lacking)} of it are not in {file}, and zero")
    if out != "-":
        print(f"wrote {formats.size(length)} of {block} to {out}", flush=True)
    return DONE


class _Raw(click.ParamType[tuple[str, Path]]):
    """``BLOCK=PATH``."""

    name = "raw"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        name, equals, path = str(value).partition("=")
        if not equals or not name or not path:
            self.fail(f"{value!r} is not BLOCK=PATH, for example pc.ram=ram.bin", param, ctx)
        return name, Path(path)


@click.command()
@click.argument("partial", type=FILE)
@click.argument("source", type=FILE, required=False)
@click.option("--out", metavar="FILE", required=True, type=FILE, help="Where to; the guest is complete there.")
@click.option(
    "--raw",
    type=_Raw(),
    multiple=True,
    metavar="BLOCK=PATH",
    help="The source's half of one RAM block, byte for byte: its memory-backend-file, or pmemsave of a paused QEMU. "
    "May be given for several blocks.",
)
@click.option("--accept-differences", is_flag=True, help="Take PARTIAL's pages where the halves are not the same.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@json_option
@debug_option
def merge(
    partial: Path,
    source: Path | None,
    out: Path,
    raw: tuple[tuple[str, Path], ...],
    accept_differences: bool,
    force: bool,
    as_json: bool,
) -> int:
    """Make one guest of the two halves that a lost postcopy has left.

    PARTIAL is the destination's half: the file FILE.partial of trimig receive. SOURCE is the source's half as a stream:
    the file that was sent. A QEMU's half is given with --raw, block by block. Pages in both halves must be the same.

    Afterwards there must be only this guest: end the source, or settle it with trimig settle --owner destination.
    """
    if source is None and not raw:
        raise click.UsageError("give the source's half: a stream as SOURCE, or its RAM with --raw BLOCK=PATH")
    _check_new(out, force, "--out")
    job = functools.partial(_merge, partial, source, out, dict(raw), force, accept_differences, as_json)
    with contextlib.ExitStack() as stack:
        stack.enter_context(saved.replacing(out))
        if source is not None and source.is_file() and not (out.is_file() and source.samefile(out)):
            stack.enter_context(stream.locked(source))
        return run(job, as_json=as_json)


async def _merge(
    partial: Path,
    source: Path | None,
    out: Path,
    raw: dict[str, Path],
    force: bool,
    accept_differences: bool,
    as_json: bool,
) -> int:
    merged = await stream.merge(partial, source, out, raw=raw, replace=force, accept_differences=accept_differences)
    with stream.locked(out):
        saved.forget_record(out)
    different = sum(merged.different.values())
    if as_json:
        write_json(
            {
                "file": str(out),
                "machine": merged.machine,
                "filled_pages": dict(merged.filled),
                "different_pages": dict(merged.different),
            }
        )
        return DONE
    if different:
        say(f"warning: {different} pages were not the same in both halves; those of {partial} were taken")
    filled = sum(merged.filled.values()) * _PAGE
    print(
        f"merged {merged.machine or 'the guest'} into {out}: {formats.size(filled)} came from the source's half",
        flush=True,
    )
    return DONE
