"""``trimig docs``: the list, one page, and what is not there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import trimig
from trimig.cli import main
from trimig.cli.commands import docs

ROOT = Path(trimig.__file__).parent / "docs"
TOPICS = {path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.md")}


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["docs", *words])


def test_list_has_every_page_with_its_first_sentence() -> None:
    result = run()
    assert result.exit_code == 0
    lines = [re.split(r"  +", line, maxsplit=1) for line in result.stdout.splitlines()]
    assert {topic for topic, _ in lines} == TOPICS
    assert [topic for topic, _ in lines][: len(docs.FIRST)] == list(docs.FIRST)
    for topic, sentence in lines:
        assert re.fullmatch(r"[A-Zt].{20,200}\.", sentence), topic
        assert ". " not in sentence, topic
        assert not re.search(r"[*`]|\]\(", sentence), topic


def test_list_for_machines() -> None:
    found = json.loads(run("--json").stdout)["topics"]
    assert {entry["topic"] for entry in found} == TOPICS
    assert all(entry["title"] and entry["summary"] for entry in found)


@pytest.mark.parametrize("topic", ["guide", "GUIDE", "guide.md", "protocol/ram", "ram", "ram.md"])
def test_page_is_written_as_markdown_where_there_is_no_terminal(topic: str) -> None:
    result = run(topic)
    assert result.exit_code == 0
    name = topic.lower().removesuffix(".md")
    text = next(ROOT.rglob(f"{name.rpartition('/')[2]}.md")).read_text(encoding="utf-8")
    assert result.stdout.startswith(text.partition("\n")[0])
    assert "\x1b" not in result.stdout


def test_comments_are_left_out() -> None:
    assert "<!--" in (ROOT / "operating.md").read_text(encoding="utf-8")
    assert "<!--" not in run("operating").stdout


def test_page_for_machines() -> None:
    found = json.loads(run("glossary", "--json").stdout)
    assert found["topic"] == "glossary"
    assert found["text"].startswith(f"# {found['title']}")


@pytest.mark.parametrize(
    ("topic", "words"),
    [
        ("giude", "did you mean guide?"),
        ("operation", "did you mean operating?"),
        ("return-path", "return_path"),
        ("xyzzy", "trimig docs lists the pages"),
        ("../pyproject", "there is no page '../pyproject'"),
    ],
)
def test_unknown_page_is_one_error_with_near_names(topic: str, words: str) -> None:
    result = run(topic)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("columns", [40, 200])
def test_page_fits_the_terminal(columns: int) -> None:
    text = docs.rendered("# Title\n\nSome *words* " + "and more " * 50 + "\n\n<!-- x -->\n", columns)
    assert "\x1b[" in text
    assert "<!--" not in text
    bare = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(map(len, bare.splitlines())) <= min(columns, docs.MOST_COLUMNS)
    end = " ".join(bare.rpartition("\n\n")[2].split())
    assert end == f"other pages: trimig docs NAME, with one of {', '.join(page.topic for page in docs.pages())}"


def test_a_shell_completes_topics() -> None:
    environment = {"_TRIMIG_COMPLETE": "bash_complete", "COMP_WORDS": "trimig docs pro", "COMP_CWORD": "2"}
    result = CliRunner().invoke(main, prog_name="trimig", env=environment)
    assert "plain,protocol/ram" in result.stdout.splitlines()
