"""``trimig docs``: the pages of this package on the terminal."""

from __future__ import annotations

import difflib
import io
import re
import shutil
import sys
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Final

import click

from ..exit_codes import DONE
from ..options import debug_option, json_option
from ..output import out, write_json

#: The order of the list; other pages follow by name.
FIRST: Final = ("guide", "operating", "testing", "security", "design", "glossary", "contributing", "changes")
#: Wider lines are hard to read.
MOST_COLUMNS: Final = 110


@dataclass(frozen=True)
class Page:
    """A page: ``guide``, or ``protocol/ram``."""

    topic: str
    text: str

    @property
    def title(self) -> str:
        """Its first heading."""
        return self.text.partition("\n")[0].removeprefix("# ").strip()

    @property
    def summary(self) -> str:
        """Its first sentence, without marks of Markdown."""
        paragraph = next(part for part in self.text.split("\n\n")[1:] if not part.startswith(("#", "|", "`" * 3)))
        plain = re.sub(r"\[([^\]]+)\]\([^)]*\)|[*`]", r"\1", " ".join(paragraph.split()))
        return re.split(r"(?<=\.)\s", plain)[0]


def pages() -> list[Page]:
    """Every page, in the order of the list."""
    found = [
        Page(topic, file.read_text(encoding="utf-8")) for topic, file in _files(resources.files("trimig") / "docs")
    ]
    order = {topic: place for place, topic in enumerate(FIRST)}
    return sorted(found, key=lambda page: (order.get(page.topic, len(order)), page.topic))


def _files(folder: Traversable, prefix: str = "") -> list[tuple[str, Traversable]]:
    found = []
    for entry in folder.iterdir():
        if entry.is_dir():
            found += _files(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".md"):
            found.append((prefix + entry.name.removesuffix(".md"), entry))
    return found


def find(topic: str) -> Page:
    """The page *topic*: its name, with or without its folder and ``.md``.

    Raises:
        click.UsageError: there is no such page; near names are in the message.
    """
    wanted = topic.removesuffix(".md").lower()
    there = pages()
    for page in there:
        if wanted in (page.topic, page.topic.rpartition("/")[2]):
            return page
    names = [name for page in there for name in {page.topic, page.topic.rpartition("/")[2]}]
    near = difflib.get_close_matches(wanted, names)
    guess = f"did you mean {' or '.join(near)}?" if near else "trimig docs lists the pages"
    raise click.UsageError(f"there is no page {topic!r}; {guess}")


def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """For the completion of a shell."""
    return [page.topic for page in pages() if page.topic.startswith(incomplete)]


@click.command()
@click.argument("topic", required=False, shell_complete=complete)
@json_option
@debug_option
def docs(topic: str | None, as_json: bool) -> int:
    """Show a page of this documentation; without a topic, list the pages.

    On a terminal a page is shown through the pager; elsewhere its Markdown is written.
    """
    if topic is None:
        _list(pages(), as_json=as_json)
        return DONE
    page = find(topic)
    if as_json:
        write_json({"topic": page.topic, "title": page.title, "text": page.text})
    elif sys.stdout.isatty():
        click.echo_via_pager(rendered(page.text, shutil.get_terminal_size().columns), color=True)
    else:
        out(plain(page.text))
    return DONE


def _list(found: list[Page], *, as_json: bool) -> None:
    if as_json:
        topics = [{"topic": page.topic, "title": page.title, "summary": page.summary} for page in found]
        write_json({"topics": topics})
        return
    width = max(len(page.topic) for page in found)
    out("\n".join(f"{page.topic:{width}}  {page.summary}" for page in found))


def plain(text: str) -> str:
    """A page as text: its Markdown, without comments."""
    return re.sub(r"^<!--.*?-->\n", "", text, flags=re.MULTILINE).rstrip()


def rendered(text: str, columns: int) -> str:
    """A page for a terminal of *columns*."""
    from rich.console import Console
    from rich.markdown import Markdown

    to = io.StringIO()
    console = Console(file=to, force_terminal=True, width=min(columns, MOST_COLUMNS))
    console.print(Markdown(plain(text)))
    # A terminal cannot follow the links of a page.
    others = ", ".join(page.topic for page in pages())
    console.print(f"\nother pages: trimig docs NAME, with one of {others}", markup=False, highlight=False)
    return to.getvalue()
