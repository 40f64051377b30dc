"""Named faults, each with the tests that must notice it, and the tests of each module.

A change has the text of the file now, which must occur once, and the text that replaces it.
tests/processes/test_mutate.py fails when the program has changed and a line here must be adapted.
"""

from __future__ import annotations

from pathlib import Path

from .operators import Change
from .run import Mutant

#: The modules for random changes: an error in them can lose a guest.
MODULES = ("trimig/status.py", "trimig/wire/**/*.py", "trimig/channel/*.py", "trimig/engine/**/*.py")

_ENGINE = (
    "flow", "handover", "destination", "return_path", "pause", "one_way", "switch", "stream_options", "preempt",
    "postcopy_bad_input", "convergence", "lifecycle", "order", "block_order", "cut_on_socket", "postcopy",
    "recovery", "marks", "switchover_ack", "doubt", "placement", "lobby", "strangers",
)  # fmt: skip

#: Those of them in ``tests/processes``.
_WITH_SOCKETS = frozenset({"postcopy", "strangers"})


def _engine(*first: str) -> tuple[str, ...]:
    names = (*first, *(name for name in _ENGINE if name not in first))
    return tuple(f"tests/{'processes/' if name in _WITH_SOCKETS else ''}engine/test_{name}.py" for name in names)


#: By a part of the file's name: its tests, the likeliest first.
_TESTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("trimig/status.py", ("tests/test_status.py", "tests/test_monitor.py", *_engine("handover", "switch"))),
    (
        "trimig/wire/return_path",
        ("tests/wire/test_return_path.py", "tests/wire/test_postcopy.py", *_engine("return_path")),
    ),
    ("trimig/wire/postcopy", ("tests/wire/test_postcopy.py", *_engine("switch", "postcopy_bad_input"))),
    ("trimig/wire/", ("tests/wire", *_engine("stream_options", "destination"))),
    ("trimig/engine/ram/preempt", _engine("preempt", "postcopy")),
    ("trimig/engine/ram/placement", _engine("placement", "destination")),
    ("/postcopy", _engine("switch", "postcopy_bad_input", "preempt")),
    ("trimig/engine/destination", (*_engine("destination"), "tests/stream/test_early.py")),
    ("trimig/engine/sections", _engine("handover", "switch")),
    ("trimig/engine/source", (*_engine("handover"), "tests/stream/test_early.py")),
    ("trimig/channel/", _engine("lobby", "strangers")),
    ("trimig/engine/", _engine()),
)


def tests_of(file: str) -> tuple[str, ...]:
    """The tests that must notice a change of *file*."""
    return next(tests for part, tests in _TESTS if part in file)


_SWITCH, _OPTIONS = "tests/engine/test_switch.py", "tests/engine/test_stream_options.py"
_BAD = "tests/engine/test_postcopy_bad_input.py"
_HANDOVER, _PAUSE = "tests/engine/test_handover.py", "tests/engine/test_pause.py"
_CONVERGENCE = "tests/engine/test_convergence.py"
_RECEIVER, _SENDER = "tests/engine/test_multifd_receiver.py", "tests/engine/test_multifd_source.py"
_XBZRLE, _THROTTLE = "tests/engine/test_xbzrle.py", "tests/engine/test_throttle.py"

#: (name, file, old text, new text, tests).
NAMED: tuple[tuple[str, str, str, str, tuple[str, ...]], ...] = (
    (
        "pause ignored in postcopy", "trimig/engine/source/__init__.py",
        "if out.config.capabilities.pause_before_switchover:",
        "if out.config.capabilities.pause_before_switchover and not ahead:",
        (_SWITCH,),
    ),
    (
        "store-global-state ignored", "trimig/engine/device_writer.py",
        "isinstance(self._guest, OpaqueGuest) and self._peer.store_global_state",
        "isinstance(self._guest, OpaqueGuest)", (_OPTIONS,),
    ),
    (
        "section footers off at the source", "trimig/engine/sections/ram.py",
        "footers = self._config.peer.send_section_footer", "footers = False", (_SWITCH, _OPTIONS),
    ),
    (
        "blocktime always 0", "trimig/engine/destination/postcopy.py",
        "members.update(_blocktime(waited))", "members.update(_blocktime([0.0 for _ in waited]))", (_SWITCH,),
    ),
    (
        "max for min over the processors", "trimig/engine/destination/postcopy.py",
        "lambda: min(each, default=0)", "lambda: max(each, default=0)", (_SWITCH,),
    ),
    ("PING 4 left out", "trimig/engine/source/switchover.py", "package + wire.ping(PING_FOLLOWED)", "package", (_SWITCH,)),
    # -- statuses
    (
        "an open answer counts as the source's", "trimig/status.py",
        "{_S.HANDOVER: _UNK, _S.UNCERTAIN", "{_S.HANDOVER: _SRC, _S.UNCERTAIN", ("tests/test_status.py", _HANDOVER),
    ),
    (
        "a cancel is taken behind the decision", "trimig/status.py",
        "CANCELLABLE: Final = frozenset({_S.SETUP,", "CANCELLABLE: Final = frozenset({_S.HANDOVER, _S.SETUP,",
        ("tests/test_status.py", "tests/test_monitor.py"),
    ),
    (
        "uncertain is idle", "trimig/status.py",
        "IDLE: Final = frozenset({_S.NONE,", "IDLE: Final = frozenset({_S.UNCERTAIN, _S.NONE,",
        ("tests/test_status.py", "tests/test_monitor.py", "tests/engine/test_lifecycle.py"),
    ),
    # -- the wire
    (
        "thirteen ranges in a discard", "trimig/wire/postcopy.py",
        "RANGES_PER_COMMAND: Final = 12", "RANGES_PER_COMMAND: Final = 13", ("tests/wire/test_postcopy.py", _SWITCH),
    ),
    (
        "a request may end behind its block", "trimig/wire/return_path.py",
        "if length == 0 or start + length > self._blocks[block]:", "if length == 0 or start > self._blocks[block]:",
        ("tests/wire/test_return_path.py",),
    ),
    (
        "bits behind the last page are no error", "trimig/wire/postcopy.py",
        "if bits[pages:].any():", "if bits[pages + 64 :].any():", ("tests/wire/test_postcopy.py",),
    ),
    (
        "an illegal run state is sent", "trimig/wire/devices/globalstate.py",
        "    if run_state in ILLEGAL_RUN_STATES:", "    if not run_state:",
        ("tests/wire/test_globalstate.py", "tests/guests/test_device.py"),
    ),
    # -- the source
    (
        "what the last pass left is forgotten", "trimig/engine/sections/ram.py",
        "written[b.name] | left for", "written[b.name] for", (_SWITCH, _CONVERGENCE),
    ),
    ("the limit holds while the guest stands still", "trimig/engine/source/switchover.py", "out.link.limiter.lift()", "pass", (_CONVERGENCE,)),
    (
        "a paused guest is resumed after a failure", "trimig/engine/source/uncertain.py",
        "    if not out.paused_by_us:\n        return None", "    if False:\n        return None",
        (_PAUSE, _HANDOVER, "tests/engine/test_flow.py", _SWITCH),
    ),
    (
        "a guest is not resumed after a failure", "trimig/engine/source/outcome.py",
        "        if monitor.owner is Ownership.SOURCE:\n            guest_failure",
        "        if monitor.owner is Ownership.UNKNOWN:\n            guest_failure", (_HANDOVER,),
    ),
    (
        "a decision that was begun counts as not sent", "trimig/engine/source/outgoing.py",
        "return channel.sent <= self.commit_offset and not channel.unsure", "return channel.sent <= self.commit_offset + 1",
        ("tests/engine/test_cut_on_socket.py", _HANDOVER),
    ),
    (
        "an end of file is sent before the proof", "trimig/engine/source/switchover.py",
        "            await _wait_loaded(self._out, self._channel, PING_PREPARE)", "            await self._channel.send(wire.ping(PING_PREPARE))",
        (_HANDOVER,),
    ),
    (
        "pages without memory are looked at, and get some", "trimig/engine/sections/ram.py",
        "absent = await self._absent(block) if self._first else None", "absent = None",
        (_CONVERGENCE, "tests/engine/test_flow.py", "tests/guests/test_app.py", "tests/engine/test_lifecycle.py"),
    ),
    # -- postcopy
    (
        "a page may come twice behind the switch", "trimig/engine/ram/postcopy_receiver.py",
        "        if np.count_nonzero(here):\n            raise", "        if False:\n            raise",
        (_BAD, "tests/processes/engine/test_postcopy.py"),
    ),
    (
        "a new connection is not told the block's name", "trimig/engine/ram/postcopy_receiver.py",
        "self._last = None  # the new", "pass  # the new", ("tests/processes/engine/test_postcopy.py",),
    ),
    (
        "release-ram gives nothing back", "trimig/engine/source/postcopy.py",
        "if self._config.capabilities.release_ram:", "if False:",
        ("tests/processes/engine/test_postcopy_guests.py",),
    ),
    (
        "what the destination has is sent again", "trimig/engine/source/postcopy.py",
        "unsent = [~handshake.bitmaps[block.name] for block in blocks]",
        "unsent = [handshake.bitmaps[block.name] | True for block in blocks]",
        ("tests/engine/test_preempt.py", "tests/qmp/test_postcopy.py"),
    ),
    # -- guests and memory
    (
        "a pause does not wait for tasks inside", "trimig/guests/app.py",
        "            await self._gate.wait_empty()", "            await trio.lowlevel.checkpoint()", ("tests/guests/test_app.py",),
    ),
    (
        "a cancelled pause leaves the gate closed", "trimig/guests/app.py",
        "            except BaseException:\n                self._gate.open()\n                raise", "            except BaseException:\n                raise",
        ("tests/guests/test_app.py",),
    ),
    (
        "a throttle takes too little", "trimig/guests/app.py",
        "held * self._percent / (100 - self._percent)", "held * self._percent / 100", ("tests/guests/test_app.py",),
    ),
    (
        "pages are given back from the beginning", "trimig/memory/block.py",
        "self._map.madvise(mmap.MADV_REMOVE, first * PAGE_SIZE, count * PAGE_SIZE)",
        "self._map.madvise(mmap.MADV_REMOVE, 0, count * PAGE_SIZE)", ("tests/memory/test_block.py",),
    ),
    # -- policy
    (
        "one iteration more than the bound", "trimig/policy/convergence.py",
        "progress.iteration >= bounds.max_iterations", "progress.iteration > bounds.max_iterations",
        ("tests/policy/test_convergence.py", _CONVERGENCE),
    ),
    (
        "the debt of an old limit stays", "trimig/policy/rate.py",
        "self._used = min(self._used, rate * WINDOW)", "pass", ("tests/policy/test_rate.py",),
    ),
    (
        "what is asked for twice is sent in its old place", "trimig/policy/page_order.py",
        "news = self._unsent[block][pages] & ~self._wanted[block][pages]", "news = self._unsent[block][pages]",
        ("tests/policy/test_postcopy.py",),
    ),
    (
        "pages taken back are not counted", "trimig/policy/page_order.py",
        "        self.remaining += len(batch.pages)\n", "", ("tests/policy/test_postcopy.py",),
    ),
    # -- the rows of features.md that belong to multifd, XBZRLE, compression and the throttle
    (
        "B19: data channels in the seed profile", "trimig/engine/sections/ram.py",
        'if config.capabilities.multifd and config.peer.multifd_scheme != "2.11":', "if config.capabilities.multifd:",
        (_RECEIVER, _SENDER),
    ),
    (
        "B20: complete with a channel too few", "trimig/engine/ram/multifd_receiver.py",
        "while len(self._open) < self._count:", "while len(self._open) < self._count - 1:", (_RECEIVER,),
    ),
    (
        "C4: postcopy and compress in the seed profile", "trimig/config/capabilities.py",
        'proposal.enabled and proposal.compressed_pages == "precopy"', 'proposal.enabled and proposal.compressed_pages == "x"',
        ("tests/test_config.py",),
    ),
    (
        "D9: no data channel at all", "trimig/config/parameters.py",
        "multifd_channels: Annotated[int, Int(1, 255)]", "multifd_channels: Annotated[int, Int(0, 255)]",
        ("tests/test_config_parameters.py",),
    ),
    (
        "D9: a packet without room", "trimig/config/parameters.py",
        '"x-multifd-page-count": Int(1, 10000)', '"x-multifd-page-count": Int(0, 10001)', ("tests/test_config_parameters.py",),
    ),
    (
        "D14: the cache keeps its size", "trimig/engine/ram/xbzrle.py",
        "        try:\n            self._cache = PageCache(size, self._pages)", "        try:\n            pass", (_XBZRLE,),
    ),
    (
        "G6: xbzrle-cache without the capability", "trimig/engine/ram/encoding.py",
        "if config.capabilities.xbzrle else None", "if True else None", (_XBZRLE,),
    ),
    (
        "G6: misses and overflows exchanged", "trimig/engine/ram/xbzrle.py",
        '"cache-miss": self.misses,', '"cache-miss": self.overflows,', (_XBZRLE,),
    ),
    (
        "G7: a percentage without a throttle", "trimig/monitor/statistics.py",
        "        if c.throttle:\n", "        if True:\n", (_THROTTLE,),
    ),
    (
        "L10: the throttle stays", "trimig/engine/source/throttle.py", "await guest.throttle(0)", "pass", (_THROTTLE,),
    ),
    (
        "L16: a channel that cannot be opened is no matter", "trimig/engine/ram/multifd_sender.py",
        'return TransportFailed(f"data channel {self.number} of multifd could not be opened: {error}; {_HINT}")',
        "return None", (_SENDER,),
    ),
    (
        "P8: a bad packet is no matter", "trimig/engine/ram/multifd_receiver.py",
        "        except TransportFailed as error:\n            if not self._finished:",
        "        except RemoteProtocolError:\n            return\n        except TransportFailed as error:\n            if not self._finished:",
        (_RECEIVER,),
    ),
    (
        "Q4: differences one byte further", "trimig/wire/pages/xbzrle.py",
        "view[place:end] = delta[position:behind]", "view[place + 1 : end + 1] = delta[position:behind]",
        ("tests/wire/test_xbzrle.py",),
    ),
    (
        "Q4: a run of no different bytes", "trimig/wire/pages/xbzrle.py", "        if not count:\n", "        if False:\n",
        ("tests/wire/test_xbzrle.py",),
    ),
    (
        "Q5: a page of another size", "trimig/wire/pages/compressed.py",
        "if len(page) < PAGE_SIZE:", "if not page:", ("tests/wire/test_compressed.py",),
    ),
    (
        "S1: nothing is ever in the cache", "trimig/engine/ram/xbzrle.py",
        "hit = cache.hits(numbers)", "hit = np.zeros(len(numbers), np.bool_)", (_XBZRLE,),
    ),
    (
        "S3: the first step is the increment", "trimig/policy/throttle.py",
        "return min(steps.initial, steps.maximum)", "return min(steps.increment, steps.maximum)", (_THROTTLE,),
    ),
    (
        "S5: the level is always 1", "trimig/engine/ram/compress.py",
        "return [deflate(row.data, level) for row in copies]", "return [deflate(row.data, 1) for row in copies]",
        ("tests/engine/test_compress.py",),
    ),
    (
        "S5: as many threads as can be", "trimig/engine/ram/compress.py",
        "min(parameters.compress_threads, MAX_CALLS)", "MAX_CALLS", ("tests/engine/test_compress.py",),
    ),
    (
        "S13: a channel does not wait for the others", "trimig/engine/ram/multifd_receiver.py",
        "        await release.wait()\n", "        await trio.lowlevel.checkpoint()\n", (_RECEIVER,),
    ),
    (
        "U3: data channels are waited for without end", "trimig/engine/ram/multifd_receiver.py",
        "if not lobby.handshaking or waited >= _HANDSHAKE_SECONDS:", "if waited >= 1e9:", (_RECEIVER,),
    ),
    (
        "U7: a cache that cannot be resized is not told of", "trimig/engine/ram/xbzrle.py",
        "        except MemoryError:\n            self._counters.warnings.append(", "        except MemoryError:\n            str(", (_XBZRLE,),
    ),
)  # fmt: skip


def mutants(root: Path) -> list[Mutant]:
    """All of :data:`NAMED`.

    Raises:
        ValueError: the old text of a fault does not stand exactly once in its file.
    """
    found = []
    for name, file, old, new, tests in NAMED:
        source = (root / file).read_text()
        if source.count(old) != 1:
            raise ValueError(f"{name}: the text stands {source.count(old)} times in {file}")
        start = source.index(old)
        line = source.count("\n", 0, start) + 1
        found.append(Mutant(Change(file, line, start, start + len(old), old, new), tests, name))
    return found
