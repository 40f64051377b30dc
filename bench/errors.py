"""The one error of the benchmarks: a sentence for the user."""

from __future__ import annotations


class BenchError(Exception):
    """A measurement could not be made; the message says which part and why."""
