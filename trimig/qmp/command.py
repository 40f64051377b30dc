"""The type of a row in the table of commands."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from . import arguments as args
from .interface import Session

if TYPE_CHECKING:
    from .machine import Machine

Handler: TypeAlias = Callable[["Machine", Mapping[str, Any], Session], Awaitable[Any]]

#: The answer of a command that returns nothing.
NOTHING: Final = args.Argument("object", members={})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QmpCommand:
    """One command: its arguments, its handler and its answer.

    ``signature`` None: the handler checks its arguments itself. ``takes``: describes the arguments for the schema,
    where the signature does not say all of it.
    """

    signature: args.Signature | None
    handler: Handler
    takes: args.Argument | None = None
    returns: args.Argument = NOTHING

    @property
    def arguments(self) -> args.Argument:
        """All arguments as one object, for the schema."""
        if self.takes is not None:
            return self.takes
        assert self.signature is not None, "without a signature there is a description"
        return args.Argument("object", members=self.signature)
