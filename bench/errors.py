"""The one error of the benchmarks: a sentence for the person who runs them."""

from __future__ import annotations


class BenchError(Exception):
    """A measurement could not be made; the message says which part and why."""
