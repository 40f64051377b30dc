"""The encoder of XBZRLE in C, where it was built: an optional part of an installation (:mod:`.xbzrle_pages` works without)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np

from ...guest import PAGE_SIZE, Pages

Encode: TypeAlias = Callable[[Pages, Pages], list[bytes | None]]

#: The library, beside its source. ``TRIMIG_KERNEL=1 pip install .`` builds it. With the name of this module Python would take it for
#: the module.
LIBRARY: Final = Path(__file__).with_name("libxbzrle.so")


def load(library: Path = LIBRARY) -> Encode | None:
    """The function of *library*, with the arguments and the result of :func:`.xbzrle_pages.encode_pages`.

    Returns:
        None if there is no library, or one for another machine.
    """
    try:
        function = ctypes.CDLL(os.fspath(library)).trimig_xbzrle_encode
    except (OSError, AttributeError):
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    function.argtypes = [pointer, pointer, size, size, pointer, pointer]
    function.restype = None

    def encode(old: Pages, new: Pages) -> list[bytes | None]:
        old, new, count = np.ascontiguousarray(old), np.ascontiguousarray(new), len(new)
        out = np.empty((count, PAGE_SIZE), np.uint8)
        lengths = np.empty(count, np.int32)
        function(old.ctypes.data, new.ctypes.data, count, PAGE_SIZE, out.ctypes.data, lengths.ctypes.data)
        # By the reference a delta that is empty is one of equal pages.
        return [
            None if length < 0 else row[:length].tobytes() for row, length in zip(out, lengths.tolist(), strict=True)
        ]

    return encode
