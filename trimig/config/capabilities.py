"""Capabilities: the switches of a migration, and the rules for combining them (config.md part 1, newer.md part 7).

The rules are plain functions over a :class:`Proposal`, one per row of config.md 1.1 and of newer.md 7, each returning
the error or None. They cover the capabilities of QEMU 7.2 to 11.1. The check for *supported* capabilities comes last.
So a contradiction is always reported as a contradiction, and each rule can be tested before its feature exists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, Final, final

from ..errors import ConfigError
from .built import BUILT
from .types import Flag, Syntax, check_fields, check_value, name_of, qmp_name, short_repr, types_of, unknown_name

_Switch = Annotated[bool, Flag()]

#: Spellings of older versions, accepted wherever a name is read.
CAPABILITY_ALIASES: Final[Mapping[str, str]] = {"x-multifd": "multifd"}

_SNAPSHOT_CONFLICTS: Final = (
    "postcopy-ram",
    "dirty-bitmaps",
    "postcopy-blocktime",
    "late-block-activate",
    "return-path",
    "multifd",
    "pause-before-switchover",
    "auto-converge",
    "release-ram",
    "rdma-pin-all",
    "compress",
    "xbzrle",
    "x-colo",
    "validate-uuid",
    "zero-copy-send",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A complete set of wanted capabilities, and the facts that the rules need to check it."""

    #: The capabilities that would be on, in QMP spelling.
    enabled: frozenset[str]
    #: The capabilities that are on now.
    before: frozenset[str] = frozenset()
    #: This side waits for, or is, an incoming migration.
    inmigrate: bool = False
    #: This side listens at an address already; its connections are handled by the capabilities of the time of opening.
    listening: bool = False
    #: The incoming address can give more than one channel.
    several_channels: bool = True
    #: The reason why this host cannot do postcopy, or None if it can.
    postcopy_obstacle: str | None = None
    #: The reason why this host or this guest's memory cannot be snapshotted by write protection, or None.
    snapshot_obstacle: str | None = None
    #: The parameter ``multifd-compression``.
    multifd_compression: str = "none"
    #: The parameter ``tls-creds`` is not empty.
    tls: bool = False
    #: The peer profile's use of compressed pages, see :attr:`.peer.PeerProfile.compressed_pages`.
    compressed_pages: str = "yes"


Rule = Callable[[Proposal], ConfigError | None]


def _refused(name: str, why: str) -> ConfigError:
    return ConfigError(f"capability '{name}' {why}", name=name)


def rule_postcopy_host(proposal: Proposal) -> ConfigError | None:
    """``postcopy-ram``, when turned on for an incoming migration, needs the host's support."""
    if "postcopy-ram" in proposal.enabled - proposal.before and proposal.inmigrate and proposal.postcopy_obstacle:
        return _refused("postcopy-ram", f"is not supported by this host: {proposal.postcopy_obstacle}")
    return None


def rule_postcopy_shared(proposal: Proposal) -> ConfigError | None:
    """``postcopy-ram`` cannot omit shared RAM."""
    if {"postcopy-ram", "x-ignore-shared"} <= proposal.enabled:
        return _refused("postcopy-ram", "is not compatible with x-ignore-shared")
    return None


def rule_snapshot(proposal: Proposal) -> ConfigError | None:
    """``background-snapshot`` needs the kernel and the memory for it, and almost nothing else may be on."""
    if "background-snapshot" not in proposal.enabled:
        return None
    if proposal.snapshot_obstacle:
        return _refused("background-snapshot", f"is not supported here: {proposal.snapshot_obstacle}")
    for other in _SNAPSHOT_CONFLICTS:
        if other in proposal.enabled:
            return _refused("background-snapshot", f"is not compatible with {other}")
    return None


def rule_zero_copy(proposal: Proposal) -> ConfigError | None:
    """``zero-copy-send`` is for plain multifd only: compressing or encrypting pages copies them anyway."""
    if "zero-copy-send" not in proposal.enabled:
        return None
    if "multifd" not in proposal.enabled:
        return _refused("zero-copy-send", "needs multifd")
    for other in ("compress", "xbzrle"):
        if other in proposal.enabled:
            return _refused("zero-copy-send", f"is not compatible with {other}")
    if proposal.multifd_compression != "none":
        return _refused("zero-copy-send", f"is not compatible with multifd-compression {proposal.multifd_compression}")
    if proposal.tls:
        return _refused("zero-copy-send", "is not compatible with TLS (tls-creds)")
    return None


def rule_incoming_channels(proposal: Proposal) -> ConfigError | None:
    """An incoming side can only do ``multifd`` on an address that accepts several connections."""
    if "multifd" in proposal.enabled and proposal.inmigrate and not proposal.several_channels:
        return _refused("multifd", "needs several channels, and the incoming address can give only one")
    return None


def rule_before_listening(proposal: Proposal) -> ConfigError | None:
    """The capabilities that decide the number of connections must be set before the first connection (newer.md part
    7).
    """
    for name in ("multifd", "postcopy-preempt"):
        if proposal.listening and name in proposal.enabled ^ proposal.before:
            return _refused(name, "must be set before the incoming migration starts to listen")
    return None


def rule_preempt_postcopy(proposal: Proposal) -> ConfigError | None:
    """``postcopy-preempt`` needs ``postcopy-ram``."""
    if "postcopy-preempt" in proposal.enabled and "postcopy-ram" not in proposal.enabled:
        return _refused("postcopy-preempt", "needs postcopy-ram")
    return None


def rule_preempt_compress(proposal: Proposal) -> ConfigError | None:
    """``postcopy-preempt`` cannot interrupt a compression thread."""
    if {"postcopy-preempt", "compress"} <= proposal.enabled:
        return _refused("postcopy-preempt", "is not compatible with compress")
    return None


def rule_postcopy_compress(proposal: Proposal) -> ConfigError | None:
    """A QEMU of the age of 2.11 places whole pages only in postcopy."""
    if {"postcopy-ram", "compress"} <= proposal.enabled and proposal.compressed_pages == "precopy":
        return _refused("postcopy-ram", "is not compatible with compress for the peer profile qemu-2.11")
    return None


def rule_removed_compress(proposal: Proposal) -> ConfigError | None:
    """QEMU 9.1 and later have no ``compress``."""
    if "compress" in proposal.enabled and proposal.compressed_pages == "no":
        return _refused(
            "compress",
            "was removed in QEMU 9.1, and the peer profile is of that version or a later one: turn it off, or name the "
            "profile of an older QEMU",
        )
    return None


def rule_multifd_compress(proposal: Proposal) -> ConfigError | None:
    """``multifd`` has compression of its own."""
    if {"multifd", "compress"} <= proposal.enabled:
        return _refused("multifd", "is not compatible with compress")
    return None


def rule_multifd_xbzrle(proposal: Proposal) -> ConfigError | None:
    """``multifd`` sends whole pages, so ``xbzrle`` has no effect (refused by QEMU 10.0 and later)."""
    if {"multifd", "xbzrle"} <= proposal.enabled:
        return _refused("multifd", "is not compatible with xbzrle")
    return None


def rule_return_path(proposal: Proposal) -> ConfigError | None:
    """A capability that waits for a message of the destination needs the return path."""
    for name in ("switchover-ack", "x-colo"):
        if name in proposal.enabled and "return-path" not in proposal.enabled:
            return _refused(name, "needs return-path")
    return None


def rule_dirty_limit(proposal: Proposal) -> ConfigError | None:
    """``dirty-limit`` and ``auto-converge`` are two ways to slow the guest down."""
    if {"dirty-limit", "auto-converge"} <= proposal.enabled:
        return _refused("dirty-limit", "is not compatible with auto-converge")
    return None


def rule_mapped_ram(proposal: Proposal) -> ConfigError | None:
    """``mapped-ram`` gives each page a fixed place in a file, so it excludes deltas, and postcopy."""
    if "mapped-ram" in proposal.enabled:
        for other in ("xbzrle", "postcopy-ram"):
            if other in proposal.enabled:
                return _refused("mapped-ram", f"is not compatible with {other}")
    return None


#: The rules in the order of checking; the first error is reported.
RULES: Final[tuple[Rule, ...]] = (
    rule_postcopy_host,
    rule_postcopy_shared,
    rule_snapshot,
    rule_zero_copy,
    rule_incoming_channels,
    rule_before_listening,
    rule_preempt_postcopy,
    rule_preempt_compress,
    rule_postcopy_compress,
    rule_removed_compress,
    rule_multifd_compress,
    rule_multifd_xbzrle,
    rule_return_path,
    rule_dirty_limit,
    rule_mapped_ram,
)


def check_proposal(proposal: Proposal, *, built: AbstractSet[str] = BUILT) -> None:
    """Raise ConfigError for the first rule that *proposal* breaks, then for the first capability not in *built*."""
    for rule in RULES:
        error = rule(proposal)
        if error is not None:
            raise error
    for name in CAPABILITY_NAMES:
        if name in proposal.enabled and name not in built:
            hint = "; mirror the disks over NBD instead" if name == "block" else ""
            raise _refused(name, f"is not built into trimig yet{hint}")


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """The switches, all off but ``return_path``, in the order in which QMP lists them.

    In QEMU ``return-path`` is off as well. Here it is on, because without it the destination cannot confirm that it has
    loaded everything, nor that it owns the guest (design.md part 5).

    Raises:
        ConfigError: on construction, if a rule of config.md 1.1 or newer.md 7 is broken, or a capability is not
            supported yet.
    """

    #: Send changed pages as differences after the first iteration.
    xbzrle: _Switch = False
    #: Pin all memory for ``rdma:``.
    rdma_pin_all: _Switch = False
    #: Slow the guest down until it converges.
    auto_converge: _Switch = False
    #: Block migration sends zero chunks without data.
    zero_blocks: _Switch = False
    #: Compress pages in threads.
    compress: _Switch = False
    #: Report status and iterations as events.
    events: _Switch = False
    #: Allow the switch to postcopy.
    postcopy_ram: _Switch = False
    #: Keep a second running copy.
    x_colo: _Switch = False
    #: Release the memory of sent pages to the host in postcopy.
    release_ram: _Switch = False
    #: Migrate disks in the stream.
    block: _Switch = False
    #: Open the return path in precopy too.
    return_path: _Switch = True
    #: Wait for permission before the switchover.
    pause_before_switchover: _Switch = False
    #: Send pages over several channels.
    multifd: _Switch = False
    #: Migrate the dirty bitmaps of disks.
    dirty_bitmaps: _Switch = False
    #: Measure how long vCPUs wait in postcopy.
    postcopy_blocktime: _Switch = False
    #: Activate disks only when the guest starts.
    late_block_activate: _Switch = False
    #: Do not send RAM that both sides share.
    x_ignore_shared: _Switch = False
    #: Compare the UUID of the machines.
    validate_uuid: _Switch = False
    #: Save a running guest by write protection.
    background_snapshot: _Switch = False
    #: Let the kernel send from guest memory without a copy (multifd).
    zero_copy_send: _Switch = False
    #: A separate channel for pages that the destination requests in postcopy.
    postcopy_preempt: _Switch = False
    #: Switch over only when the destination's devices have reported that they are ready.
    switchover_ack: _Switch = False
    #: Slow down the vCPUs that write most, with KVM's dirty ring.
    dirty_limit: _Switch = False
    #: Each page has one fixed place in a file.
    mapped_ram: _Switch = False

    def __post_init__(self) -> None:
        check_fields("capability", self, _TYPES)
        self.check()

    @property
    def enabled(self) -> frozenset[str]:
        """The capabilities that are on, in QMP spelling."""
        return frozenset(qmp_name(name) for name in _TYPES if getattr(self, name))

    def check(
        self,
        *,
        built: AbstractSet[str] = BUILT,
        before: Capabilities | None = None,
        inmigrate: bool = False,
        listening: bool = False,
        several_channels: bool = True,
        postcopy_obstacle: str | None = None,
        snapshot_obstacle: str | None = None,
        multifd_compression: str = "none",
        tls: bool = False,
        compressed_pages: str = "yes",
    ) -> None:
        """Check the set again in a given situation: the arguments are those of :class:`Proposal`.

        Raises:
            ConfigError: a rule is broken.
        """
        proposal = Proposal(
            enabled=self.enabled,
            before=frozenset() if before is None else before.enabled,
            inmigrate=inmigrate,
            listening=listening,
            several_channels=several_channels,
            postcopy_obstacle=postcopy_obstacle,
            snapshot_obstacle=snapshot_obstacle,
            multifd_compression=multifd_compression,
            tls=tls,
            compressed_pages=compressed_pages,
        )
        check_proposal(proposal, built=built)

    @classmethod
    def from_qmp(cls, capabilities: object, base: Capabilities | None = None) -> Capabilities:
        """*base* (or the defaults) changed by the argument list of ``migrate-set-capabilities``, as a whole or not at
        all.

        Raises:
            ConfigError: not a list of ``{"capability": name, "state": bool}``, an unknown name, or a broken rule.
        """
        if not isinstance(capabilities, (list, tuple)):
            raise ConfigError(f"'capabilities' expects a list, not {short_repr(capabilities)}")
        changes = []
        for item in capabilities:
            if not isinstance(item, Mapping) or item.keys() != {"capability", "state"}:
                raise ConfigError(f"'capabilities' expects objects of 'capability' and 'state', not {short_repr(item)}")
            changes.append((item["capability"], item["state"]))
        return read_capabilities(cls() if base is None else base, changes, Syntax.QMP)

    def to_qmp(self) -> list[dict[str, object]]:
        """The answer to ``query-migrate-capabilities``; without ``block`` unless it is supported, as in QEMU."""
        return [
            {"capability": qmp_name(name), "state": getattr(self, name)}
            for name in _TYPES
            if name != "block" or name in BUILT
        ]


_TYPES: Final = types_of(Capabilities)

#: All names, in QMP spelling and in the order of the list.
CAPABILITY_NAMES: Final[tuple[str, ...]] = tuple(qmp_name(name) for name in _TYPES)


def read_capabilities(base: Capabilities, changes: Iterable[tuple[object, object]], form: Syntax) -> Capabilities:
    """*base* with *changes*, pairs of name and state, applied one after the other and checked once, as a whole.

    The names have QMP spelling; in the form TEXT they may also have underscores.

    Raises:
        ConfigError: an unknown name, an invalid state, or a broken rule.
    """
    states: dict[str, Any] = {}
    for given, state in changes:
        name = name_of(given, CAPABILITY_ALIASES, form)
        if not isinstance(name, str) or name not in CAPABILITY_NAMES:
            raise unknown_name("capability", given, CAPABILITY_NAMES)
        field = name.replace("-", "_")
        kind = _TYPES[field]
        states[field] = kind.read(state, form)
        typed = str(given) if form is Syntax.TEXT else None
        check_value("capability", field, kind, states[field], typed=typed)
    return dataclasses.replace(base, **states)
