"""Refuses arguments of a wrong type by name, where they are given and not where they are first used."""

from __future__ import annotations

from typing import Any


def expect(name: str, value: object, kind: type[Any] | tuple[type[Any], ...], what: str) -> None:
    """Raise TypeError unless *value* is of *kind*.

    Args:
        name: the argument's name.
        what: the type in words, as the end of the sentence "... must be".
    """
    if isinstance(value, type) and kind is not type:  # a class has the methods of its instances, and so passes for one
        raise TypeError(
            f"{name} must be {what}, not the class {value.__name__} itself: {value.__name__}(...) makes one"
        )
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}, not {_article(type(value).__name__)}")


def expect_callable(name: str, value: object, what: str) -> None:
    """Raise TypeError unless *value* is None or can be called."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be {what}, not {_article(type(value).__name__)}")


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0].lower() in "aeiou" else f"a {kind}"
