"""SIGINT, SIGTERM and SIGHUP of a process that runs one command, before and after the command watches for them.

SIGHUP comes when a terminal is closed, and counts like the others; an ignored SIGHUP (nohup) stays ignored. A signal at
the beginning ends the process with 130 and without a traceback. A signal at the end, when the outcome for the guest is
known, changes nothing: the exit code must tell that outcome. In between :func:`trimig.cli.runner.run` handles signals.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Final

_NUMBERS: Final = (signal.SIGINT, signal.SIGTERM)


class ProcessSignals:
    """The handler of these signals. The process has one, found through :func:`current`.

    Attributes:
        numbers: the signals that a command has to watch for.
    """

    def __init__(self) -> None:
        self._holding = False
        self._pending: int | None = None
        self._decided = False
        self.numbers: tuple[signal.Signals, ...] = _NUMBERS

    def install(self) -> None:
        """Handle the signals from now on."""
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
        """Raise no KeyboardInterrupt any more, and keep a signal until the command watches for signals."""
        self._holding = True

    def watched(self) -> None:
        """The command watches for signals from now on: send it the kept signal."""
        if self._pending is not None:
            number, self._pending = self._pending, None
            signal.raise_signal(number)

    def decided(self) -> None:
        """Ignore later signals, because the outcome for the guest is known."""
        self._decided = True

    def ending(self) -> None:
        """Ignore signals until the end of the process, because its exit code is known."""
        self._decided = True
        if isinstance(signal.getsignal(signal.SIGTERM), ProcessSignals):
            for number in self.numbers:
                # The kernel must ignore the signals: the interpreter removes its own handlers before it has ended.
                signal.signal(number, signal.SIG_IGN)


def current() -> ProcessSignals:
    """The handler of the process; an uninstalled one if another program calls a command."""
    found = signal.getsignal(signal.SIGTERM)
    return found if isinstance(found, ProcessSignals) else ProcessSignals()
