"""Peer profiles: the properties of the stream that the other side expects, in addition to capabilities and parameters.

In QEMU these are properties of the migration object and of the machine. The machine type sets them, not the version of
the program: an older type switches off the parts that older programs cannot read (config.md part 3, newer.md part 1).
Both ends must agree on them, because a reader cannot know in advance whether the configuration section or a footer is
present.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, final

from ..errors import ConfigError
from .types import Choice, Flag, Syntax, Text, check_fields, check_value, qmp_name, types_of, unknown_name


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PeerProfile:
    """The form in which the peer writes and reads a stream. The defaults are those of QEMU 7.2's own machine types.

    Raises:
        ConfigError: on construction, for a value of the wrong type.
    """

    #: For logs and messages.
    name: Annotated[str, Text()] = "custom"
    #: The stream begins with a configuration section.
    send_configuration: Annotated[bool, Flag()] = True
    #: Every section ends with a footer.
    send_section_footer: Annotated[bool, Flag()] = True
    #: The run state is always sent; if off, only if it is neither running nor paused.
    store_global_state: Annotated[bool, Flag()] = True
    #: No description of the devices follows the end of file.
    suppress_vmdesc: Annotated[bool, Flag()] = False
    #: The second connection of postcopy-preempt is made directly after the first, as for machine types up to 7.2; if
    #: off, at the switch to postcopy.
    preempt_pre_7_2: Annotated[bool, Flag()] = True
    #: The source sends the command SWITCHOVER_START before the last pages. No QEMU before 10.0 can read it.
    send_switchover_start: Annotated[bool, Flag()] = False
    #: With the capability switchover-ack, a destination whose devices need no acknowledgement sends one SWITCHOVER_ACK;
    #: if off, none. If one is missing, such a source waits for ever. If there is one too many, QEMU 11.1 fails.
    switchover_ack_legacy: Annotated[bool, Flag()] = True
    #: A destination with this profile can do the capabilities multifd and postcopy-ram together. A QEMU before 10.0 accepts
    #: both and loses the guest.
    multifd_postcopy: Annotated[bool, Flag()] = False
    #: The synchronisation of the channels of the capability multifd, and the channel of zero pages: ``7.2`` at the end of
    #: each section, ``8.1`` once for each pass, ``9.0`` also with zero pages in the channels. ``2.11`` opens no channel, as
    #: QEMU's ``x-multifd`` of that time.
    multifd_scheme: Annotated[Literal["2.11", "7.2", "8.1", "9.0"], Choice(("2.11", "7.2", "8.1", "9.0"))] = "7.2"
    #: The peer's use of compressed pages (capability compress): ``yes``; ``precopy`` not together with postcopy-ram, as in
    #: QEMU 2.11; ``no`` from QEMU 9.1 on, which has removed the capability.
    compressed_pages: Annotated[Literal["yes", "precopy", "no"], Choice(("yes", "precopy", "no"))] = "yes"
    #: The machine type of the guest decides the switches that are not in :attr:`explicit` and have their default here.
    by_machine: Annotated[bool, Flag()] = False
    #: Python names of the switches that were given together with ``by-machine``; they override the machine type.
    explicit: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        check_fields("peer profile", self, _TYPES)

    @property
    def switchover_acks(self) -> int:
        """Number of SWITCHOVER_ACK that a source of this profile expects if the destination's devices need none."""
        return 1 if self.switchover_ack_legacy else 0

    @staticmethod
    def named(name: str) -> PeerProfile:
        """The profile of :data:`PEERS` with this name.

        Raises:
            ConfigError: there is no such profile.
        """
        try:
            return PEERS[name]
        except KeyError:
            raise unknown_name("peer profile", name, PEERS) from None

    def for_machine(self, machine: str | None, *, arriving: bool = False) -> PeerProfile:
        """The profile for one guest: this profile, unless the machine type decides.

        The machine type never decides the framing of the stream (configuration section, footers, run state): a reader
        that knows the machine type has read a configuration section already.

        Args:
            machine: the machine type that the configuration section names; None for a guest of trimig's own.
            arriving: as for :func:`profile_for_machine`.
        """
        if not self.by_machine:
            return self
        found = OWN if machine is None else profile_for_machine(machine, arriving=arriving)
        if arriving and found.compressed_pages == "no":
            # A reader takes them in any case. So the capability may stay on, whatever arrives.
            found = dataclasses.replace(found, compressed_pages="yes")
        changes = {
            field: getattr(self, field)
            for field in _FIELDS
            # The stream has a configuration section, which names the machine, and its framing has been read already.
            if field in _SEEN or field in self.explicit or getattr(self, field) != getattr(BY_MACHINE, field)
        }
        return _changed(found, {field: value for field, value in changes.items() if value != getattr(found, field)})


_TYPES: Final = types_of(PeerProfile)
#: The switches by their Python names, and in their written form.
_FIELDS: Final = tuple(name for name in _TYPES if name not in ("name", "by_machine"))
_SWITCHES: Final = tuple(qmp_name(name) for name in _FIELDS)
#: The switches that can be seen in the stream itself.
_SEEN: Final = frozenset({"send_configuration", "send_section_footer", "store_global_state"})

#: Machine types of 2.4 to 7.2.
QEMU_7_2: Final = PeerProfile(name="qemu-7.2")
#: The program QEMU 2.11, with any of its machine types from 2.4 on: its ``x-multifd`` changes nothing.
QEMU_2_11: Final = dataclasses.replace(QEMU_7_2, name="qemu-2.11", multifd_scheme="2.11", compressed_pages="precopy")
#: Machine types of 8.0.
QEMU_8_0: Final = PeerProfile(name="qemu-8.0", preempt_pre_7_2=False)
#: Machine types of 8.1 and 8.2.
QEMU_8_1: Final = dataclasses.replace(QEMU_8_0, name="qemu-8.1", multifd_scheme="8.1")
#: Machine types of 9.0.
QEMU_9_0: Final = dataclasses.replace(QEMU_8_1, name="qemu-9.0", multifd_scheme="9.0")
#: Machine types of 9.1 and 9.2.
QEMU_9_1: Final = dataclasses.replace(QEMU_9_0, name="qemu-9.1", compressed_pages="no")
#: Machine types of 10.0 to 11.0.
QEMU_10_0: Final = dataclasses.replace(QEMU_9_1, name="qemu-10.0", send_switchover_start=True)
#: Machine types of 11.1 and later.
QEMU_11_1: Final = dataclasses.replace(QEMU_10_0, name="qemu-11.1", switchover_ack_legacy=False, multifd_postcopy=True)
#: Machine types of 2.3.
LEGACY_2_3: Final = PeerProfile(
    name="legacy-2.3", send_configuration=False, send_section_footer=False, store_global_state=False
)
#: Machine types up to 2.2.
LEGACY_2_2: Final = dataclasses.replace(LEGACY_2_3, name="legacy-2.2", suppress_vmdesc=True)
#: The default: the machine type decides. Every reader begins with these switches.
BY_MACHINE: Final = PeerProfile(name="by-machine", by_machine=True)

#: A guest of trimig itself, with any name: as machine types of 7.2, which every version of trimig reads.
OWN: Final = dataclasses.replace(QEMU_7_2, name="trimig's own")
#: A machine type without a version (``none``, ``microvm``, ``q35``): as new as the program that runs it, whose version
#: is not known. The stream has the form that every program can read.
UNVERSIONED: Final = dataclasses.replace(QEMU_7_2, name="a machine type without a version")

#: The profiles that come with trimig, by name.
PEERS: Final[Mapping[str, PeerProfile]] = MappingProxyType(
    {
        profile.name: profile
        for profile in (
            BY_MACHINE,
            LEGACY_2_2,
            LEGACY_2_3,
            QEMU_2_11,
            QEMU_7_2,
            QEMU_8_0,
            QEMU_8_1,
            QEMU_9_0,
            QEMU_9_1,
            QEMU_10_0,
            QEMU_11_1,
        )
    }
)

#: The first version of the machine type for each profile, the newest first.
_SINCE: Final = (
    ((11, 1), QEMU_11_1),
    ((10, 0), QEMU_10_0),
    ((9, 1), QEMU_9_1),
    ((9, 0), QEMU_9_0),
    ((8, 1), QEMU_8_1),
    ((8, 0), QEMU_8_0),
    ((2, 4), QEMU_7_2),
    ((2, 3), LEGACY_2_3),
    ((0, 0), LEGACY_2_2),
)
#: The version at the end of a machine type: ``pc-q35-10.0``, ``virt-8.2``, ``pseries-2.12-sxxm``. Names of distributions
#: (``pc-q35-rhel9.4.0``, ``pc-i440fx-jammy``) have none.
_VERSION: Final = re.compile(r".*-([0-9]{1,3})\.([0-9]{1,3})(?:-[a-z]+)?", re.DOTALL)


def profile_for_machine(machine: str, *, arriving: bool = False) -> PeerProfile:
    """The profile that QEMU uses with the machine type *machine*, found by the version at the end of its name.

    Args:
        machine: the name in the configuration section, such as ``pc-i440fx-10.0``.
        arriving: for the destination. If the version is not known, it does not wait for anything that may not come.
    """
    version = _VERSION.fullmatch(machine)
    if version is None:
        return dataclasses.replace(UNVERSIONED, preempt_pre_7_2=False) if arriving else UNVERSIONED
    number = int(version[1]), int(version[2])
    return next(profile for since, profile in _SINCE if number >= since)


def read_peer(changes: Iterable[tuple[str, object]], form: Syntax) -> PeerProfile:
    """Make a profile from pairs of name and value: ``profile`` names the base, the others are its switches.

    Without ``profile`` the base is ``by-machine``.

    Raises:
        ConfigError: an unknown name or profile, or an illegal value of a switch.
    """
    base = BY_MACHINE
    switches: dict[str, Any] = {}
    for name, value in changes:
        if name == "profile":
            if not isinstance(value, str):
                raise ConfigError(f"a peer profile is named by a string: one of {', '.join(PEERS)}", name="profile")
            try:
                base = PeerProfile.named(value)
            except ConfigError as error:
                raise ConfigError(str(error), name="profile") from None
            continue
        if name not in _SWITCHES:
            raise unknown_name("peer switch", name, ("profile", *_SWITCHES))
        field = name.replace("-", "_")
        switches[field] = _TYPES[field].read(value, form)
        check_value("peer profile", field, _TYPES[field], switches[field])
    if base.by_machine:
        return _changed(base, switches)
    return _changed(base, {field: value for field, value in switches.items() if value != getattr(base, field)})


def _changed(base: PeerProfile, changes: Mapping[str, Any]) -> PeerProfile:
    """*base* with *changes*; the new name lists the changes, for the log."""
    if not changes:
        return base
    words = ", ".join(
        f"{qmp_name(field)} {value if isinstance(value, str) else 'on' if value else 'off'}"
        for field, value in changes.items()
    )
    explicit = base.explicit | changes.keys() if base.by_machine else base.explicit
    return dataclasses.replace(base, name=f"{base.name} with {words}", explicit=explicit, **changes)
