"""A small set of combinations of many parameters, in which each value occurs with each other value at least once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TypeAlias

#: A value for each parameter, in the order of the parameters.
Combination: TypeAlias = tuple[str, ...]
#: The numbers of two parameters, and a value of each.
Pair: TypeAlias = tuple[int, int, str, str]


def pairs_of(combination: Combination) -> set[Pair]:
    """The pairs of values in the combination."""
    numbered = list(enumerate(combination))
    return {(i, j, one, other) for (i, one), (j, other) in itertools.combinations(numbered, 2)}


def by_pairs(possible: Iterable[Combination]) -> Sequence[Combination]:
    """Some of the *possible* combinations, with each pair of values that occurs in them.

    The result is always the same for the same argument. The function repeatedly takes the combination with the most new
    pairs; among equal ones, the first. That is not the smallest possible set, but not a much larger one.
    """
    rest = {combination: pairs_of(combination) for combination in possible}
    missing: set[Pair] = set().union(*rest.values()) if rest else set()
    chosen = []
    while missing:
        best = max(rest, key=lambda combination: len(rest[combination] & missing))
        missing -= rest.pop(best)
        chosen.append(best)
    return chosen
