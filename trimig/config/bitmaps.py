"""The value of ``block-bitmap-mapping``: the names under which the dirty bitmaps of disks are sent.

It has a module of its own because it is the only parameter with a structure. It has no effect before the capability
``dirty-bitmaps`` is built, but like every parameter it may be set.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Final

from ..errors import ConfigError
from .types import Syntax, Type, short_repr

_NAME: Final = "block-bitmap-mapping"
#: A name is sent after a length of one byte.
_MAX_NAME: Final = 255


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BitmapAlias:
    """One bitmap: its *name* here, its *alias* on the wire, and whether the destination makes it persistent (None: as
    here).
    """

    name: str
    alias: str
    persistent: bool | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NodeAlias:
    """One disk: its *node_name* here, its *alias* on the wire, and the bitmaps that are sent."""

    node_name: str
    alias: str
    bitmaps: tuple[BitmapAlias, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Mappings(Type):
    """The type of ``block-bitmap-mapping``: a tuple of :class:`NodeAlias` in which every name has one alias."""

    @property
    def expects(self) -> str:
        return "a list of disks with their bitmaps, each name of 1 to 255 bytes and used once on either side"

    def legal(self, value: object) -> bool:
        if not isinstance(value, tuple) or not all(isinstance(node, NodeAlias) for node in value):
            return False
        return _one_to_one((node.node_name, node.alias) for node in value) and all(
            _legal_bitmaps(node.bitmaps) for node in value
        )

    def read(self, value: object, form: Syntax) -> object:
        if form is Syntax.TEXT and isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return value
        if not isinstance(value, list):
            return value
        return tuple(_node(item) for item in value)

    def write(self, value: object) -> object:
        assert isinstance(value, tuple), "only legal values are stored"
        return [
            {
                "node-name": node.node_name,
                "alias": node.alias,
                "bitmaps": [
                    {"name": bitmap.name, "alias": bitmap.alias}
                    | ({} if bitmap.persistent is None else {"transform": {"persistent": bitmap.persistent}})
                    for bitmap in node.bitmaps
                ],
            }
            for node in value
        ]


def _legal_bitmaps(value: object) -> bool:
    if not isinstance(value, tuple) or not all(isinstance(bitmap, BitmapAlias) for bitmap in value):
        return False
    return _one_to_one((bitmap.name, bitmap.alias) for bitmap in value) and all(
        bitmap.persistent in (None, True, False) for bitmap in value
    )


def _one_to_one(pairs: Iterable[tuple[object, object]]) -> bool:
    """Whether *pairs* of name and alias are strings of a legal length, and each occurs once on its side."""
    for names in zip(*pairs, strict=True):
        if not all(isinstance(name, str) and 1 <= len(name.encode(errors="replace")) <= _MAX_NAME for name in names):
            return False
        if len(set(names)) < len(names):
            return False
    return True


def _node(item: object) -> NodeAlias:
    members = _members(item, required=("node-name", "alias", "bitmaps"))
    bitmaps = members["bitmaps"]
    if not isinstance(bitmaps, list):
        raise ConfigError(f"'bitmaps' in '{_NAME}' expects a list, not {short_repr(bitmaps)}", name=_NAME)
    return NodeAlias(
        node_name=_string(members, "node-name"),
        alias=_string(members, "alias"),
        bitmaps=tuple(_bitmap(bitmap) for bitmap in bitmaps),
    )


def _bitmap(item: object) -> BitmapAlias:
    members = _members(item, required=("name", "alias"), optional=("transform",))
    transform = _members(members.get("transform", {}), optional=("persistent",))
    persistent = transform.get("persistent")
    if "persistent" in transform and not isinstance(persistent, bool):
        raise ConfigError(f"'persistent' in '{_NAME}' expects true or false, not {short_repr(persistent)}", name=_NAME)
    return BitmapAlias(
        name=_string(members, "name"),
        alias=_string(members, "alias"),
        persistent=persistent if isinstance(persistent, bool) else None,
    )


def _members(
    item: object, *, required: tuple[str, ...] = (), optional: tuple[str, ...] = ()
) -> Mapping[object, object]:
    if not isinstance(item, Mapping) or not set(required) <= item.keys() <= {*required, *optional}:
        wanted = ", ".join([*required, *(f"{name} (optional)" for name in optional)])
        raise ConfigError(f"'{_NAME}' expects objects with {wanted}, not {short_repr(item)}", name=_NAME)
    return item


def _string(members: Mapping[object, object], key: str) -> str:
    value = members[key]
    if not isinstance(value, str):
        raise ConfigError(f"'{key}' in '{_NAME}' expects a string, not {short_repr(value)}", name=_NAME)
    return value
