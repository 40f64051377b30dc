"""SIGINT, SIGTERM and SIGHUP of a process that is one command, before and after the time in which the command watches for them.

SIGHUP comes when a terminal is closed, and counts like the others; where it is ignored (nohup), it stays so.
A signal at the beginning ends the process with 130 and without a traceback. One at the end, when it is decided what became
of the guest, changes nothing: the exit code must tell that. In between :func:`trimig.cli.runner.run` acts on them.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Final

_NUMBERS: Final = (signal.SIGINT, signal.SIGTERM)


class ProcessSignals:
    """The handler of them. There is one for the process, found through :func:`current`.

    Attributes:
        numbers: those that a command has to watch for.
    """

    def __init__(self) -> None:
        self._holding = False
        self._pending: int | None = None
        self._decided = False
        self.numbers: tuple[signal.Signals, ...] = _NUMBERS

    def install(self) -> None:
        """From now on."""
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            self.numbers = (*_NUMBERS, signal.SIGHUP)
        for number in self.numbers:
            signal.signal(number, self)

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if self._decided:
            return
        if not self._holding:
            raise KeyboardInterrupt
        self._pending = number

    def hold(self) -> None:
        """A command is about to watch: nothing is to be interrupted any more, and a signal is kept for it."""
        self._holding = True

    def watched(self) -> None:
        """The command watches from now on: give it the signal that was kept."""
        if self._pending is not None:
            number, self._pending = self._pending, None
            signal.raise_signal(number)

    def decided(self) -> None:
        """What became of the guest is known: a signal comes too late."""
        self._decided = True

    def ending(self) -> None:
        """The process ends, and its exit code is known."""
        self._decided = True
        if isinstance(signal.getsignal(signal.SIGTERM), ProcessSignals):
            for number in self.numbers:
                # Ignored by the kernel: the interpreter takes its own handlers away before it has ended.
                signal.signal(number, signal.SIG_IGN)


def current() -> ProcessSignals:
    """That of the process; where a program calls a command by itself, one that is not installed."""
    found = signal.getsignal(signal.SIGTERM)
    return found if isinstance(found, ProcessSignals) else ProcessSignals()
