"""The bridge for callers that do not run on trio: synchronous code, asyncio, and byte streams of anyio."""

from .portal import CommitHook as CommitHook
from .portal import FenceHook as FenceHook
from .portal import Handle as Handle
from .portal import Portal as Portal
from .streams import from_anyio as from_anyio
