"""The one error of the benchmarks: a sentence for the user."""

from __future__ import annotations


class BenchError(Exception):
    """A measurement could not be made; the message says which part and why."""


def first_error(group: BaseExceptionGroup[BenchError]) -> BenchError:
    """One of the errors of both sides: the first, because the second is mostly its consequence."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, BenchError)
    return error
