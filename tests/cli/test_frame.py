"""The common part of the command line: options, one way to run, errors as a sentence and an exit code."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import click
import pytest
import trio
from click.testing import CliRunner, Result

import trimig
from trimig.cli import Group, main, options, runner, tasks
from trimig.wire import XBZRLE_ENCODER


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> list[trimig.Config]:
    """A command ``demo`` that only records its configuration, and fails as ``--fail`` says."""
    seen: list[trimig.Config] = []

    @click.command()
    @click.option("--size", type=options.RAM_SIZE, default="4K")
    @click.option("--fail", type=click.Choice(sorted(FAILURES)))
    @options.migration_options
    def demo(size: int, fail: str | None, config: trimig.Config, as_json: bool) -> int:
        seen.append(config)

        async def job() -> int:
            await trio.lowlevel.checkpoint()
            if fail is not None:
                raise FAILURES[fail]
            return 0

        return runner.run(job, as_json=as_json)

    monkeypatch.setattr(Group, "get_command", lambda self, ctx, name: demo if name == "demo" else None)
    return seen


FAILURES: dict[str, Exception] = {
    "transport": trimig.TransportFailed("cannot connect to tcp:h:1: connection refused"),
    "bytes": trimig.RemoteProtocolError("bad magic", offset=4, section="ram"),
    "uncertain": trimig.HandoverUncertain("the owner is unknown"),
    "option": trimig.ConfigError("unknown protocol", name="uri"),
    "file": FileNotFoundError(2, "No such file or directory", "/no/file"),
    "bug": KeyError("x"),
}


def test_version_and_help() -> None:
    assert invoke("--version").output == f"trimig, version {trimig.__version__}\n"
    for words in (("--version", "--verbose"), ("--verbose", "-V")):
        said = invoke(*words).output
        assert said == f"trimig, version {trimig.__version__}\nXBZRLE is encoded by: {XBZRLE_ENCODER}\n"
    assert XBZRLE_ENCODER in ("C", "NumPy")
    text = invoke("--help")
    assert text.exit_code == 0
    assert "demo" in text.output
    assert "130 cancelled by a signal" in " ".join(text.output.split())


@pytest.mark.parametrize(
    ("words", "guess"),
    [
        (["sned"], "did you mean send?"),
        (["recieve", "tcp:h:1"], "did you mean receive"),
        (["stats"], "did you mean status"),
        (["send", "--recver-for", "3"], "--recover-for"),
        (["demo", "--hop", "3"], "--hops"),
    ],
)
def test_word_that_is_nearly_right_is_answered_with_the_right_one(words: list[str], guess: str) -> None:
    result = invoke(*words)
    assert (result.exit_code, guess in result.stderr) == (2, True), result.stderr


def test_word_that_looks_like_nothing_gets_no_guess() -> None:
    assert "did you mean" not in invoke("qqqqq").stderr


def test_without_a_command_the_help_goes_to_stderr() -> None:
    result = invoke()
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Usage: trimig")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "No such command"),
        (["demo", "--nonsense"], "No such option"),
        (["demo", "--size", "much"], "a size is a number of bytes"),
        (["demo", "--size", "4097"], "multiple of the page size"),
        (["demo", "--size", "0"], "too small"),
        (["demo", "-c", "nonsense"], "nonsense"),
        (["demo", "-c", "x-colo"], "not built"),
        (["demo", "-p", "downtime-limit"], "NAME=VALUE"),
        (["demo", "-p", "downtime-limit=soon"], "downtime-limit"),
        (["demo", "--config", "/no/such.toml"], "/no/such.toml"),
    ],
)
def test_wrong_usage_is_one_sentence_and_code_2(arguments: list[str], words: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("trimig: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert result.stdout == ""
    assert isinstance(result.exception, SystemExit)


def test_wrong_usage_with_json_is_an_object_on_stdout_too() -> None:
    result = invoke("demo", "--json", "--size", "much")
    record = json.loads(result.stdout)
    assert record["exit_code"] == result.exit_code == 2
    assert "much" in record["error"]
    assert "much" in result.stderr


def test_options_build_a_config(probe: list[trimig.Config], tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[parameters]\ndowntime-limit = 50\nmax-bandwidth = '1G'\n[engine]\nautostart = false\n")
    result = invoke(
        "demo", "--config", str(file), "-c", "return-path=off", "-p", "downtime-limit=70", "--parameter", "max_bandwidth=2M"
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (config,) = probe
    assert not config.capabilities.return_path
    assert config.parameters.downtime_limit == 70
    assert config.parameters.max_bandwidth == 2 * trimig.MiB
    assert not config.autostart


@pytest.mark.parametrize(
    ("fail", "code", "more"),
    [
        ("transport", 1, {"owner": "source", "kind": "TransportFailed"}),
        ("bytes", 1, {"offset": 4, "section": "ram"}),
        ("uncertain", 3, {"owner": "unknown"}),
        ("option", 2, {"name": "uri"}),
        ("file", 1, {"error": "/no/file: No such file or directory"}),
        ("bug", 1, {"kind": "InternalError"}),
    ],
)
def test_each_error_has_its_code_and_record(
    probe: list[trimig.Config], fail: str, code: int, more: dict[str, object]
) -> None:
    result = invoke("demo", "--json", "--fail", fail)
    assert result.exit_code == code
    record = json.loads(result.stdout)
    assert record["exit_code"] == code
    assert {key: record[key] for key in more} == more
    assert result.stderr == f"trimig: {record['error']}\n"
    assert "Traceback" not in result.stderr


def test_debug_prints_the_traceback(probe: list[trimig.Config]) -> None:
    for arguments in (["--debug", "demo"], ["demo", "--debug"]):
        result = invoke(*arguments, "--fail", "bug")
        assert "Traceback" in result.stderr
        assert "KeyError" in result.stderr
        assert result.exit_code == 1


def test_a_signal_cancels_cleanly_and_a_second_one_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    steps: list[str] = []

    async def job() -> int:
        signal.raise_signal(signal.SIGINT)
        try:
            await trio.sleep(math.inf)
        finally:
            steps.append("unwound")
        return 0

    assert runner.run(job) == 130
    assert steps == ["unwound"]
    assert "SIGINT: ending" in capsys.readouterr().err


def test_a_job_that_finishes_in_spite_of_the_signal_counts_as_finished() -> None:
    async def job() -> int:
        signal.raise_signal(signal.SIGTERM)
        for _ in range(5):
            await trio.lowlevel.cancel_shielded_checkpoint()
        return 0

    assert runner.run(job) == 0


async def test_alongside_returns_the_result_that_a_late_cancel_finds() -> None:
    async def call() -> str:
        scope.cancel()
        await trio.lowlevel.cancel_shielded_checkpoint()
        return "handed over"

    result = ""
    with trio.CancelScope() as scope:
        result = await tasks.alongside(call, trio.sleep_forever)
    assert result == "handed over"


async def test_alongside_raises_the_error_itself() -> None:
    error = trimig.TransportFailed("gone")

    async def call() -> None:
        await trio.lowlevel.checkpoint()
        raise error

    with pytest.raises(trimig.TransportFailed) as caught:
        await tasks.alongside(call, trio.sleep_forever)
    assert caught.value is error
    assert not isinstance(error.__context__, BaseExceptionGroup)
