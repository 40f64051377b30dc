"""Peer profiles: what the other side expects of the stream beyond capabilities and parameters.

In QEMU these are properties of the migration object and of the machine. The machine type sets them, not the version of
the program: an older type switches off what older programs cannot read (config.md part 3, newer.md part 1). Both ends
must agree on them, because neither the configuration section nor a footer can be told from its absence in advance.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, final

from ..errors import ConfigError
from .types import Choice, Flag, Form, Text, check_fields, check_value, dashed, kinds_of, unknown


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PeerProfile:
    """How the peer writes and reads a stream. The defaults are those of QEMU 7.2's own machine types.

    Raises:
        ConfigError: on construction, for a value of the wrong type.
    """

    #: For logs and messages.
    name: Annotated[str, Text()] = "custom"
    #: The stream begins with a configuration section.
    send_configuration: Annotated[bool, Flag()] = True
    #: Every section ends with a footer.
    send_section_footer: Annotated[bool, Flag()] = True
    #: The run state travels always; if off, only where it is neither running nor paused.
    store_global_state: Annotated[bool, Flag()] = True
    #: Nothing describes the devices after the end of file.
    suppress_vmdesc: Annotated[bool, Flag()] = False
    #: The second connection of postcopy-preempt is made right behind the first, as machine types up to 7.2 have it; if
    #: off, at the switch to postcopy.
    preempt_pre_7_2: Annotated[bool, Flag()] = True
    #: A source says by the command SWITCHOVER_START that the last pages are next. No QEMU before 10.0 can read it.
    send_switchover_start: Annotated[bool, Flag()] = False
    #: With the capability switchover-ack a destination whose devices ask for nothing sends one SWITCHOVER_ACK; if off,
    #: none. One too few and such a source waits for ever; one too many and an 11.1 fails.
    switchover_ack_legacy: Annotated[bool, Flag()] = True
    #: How the channels of the capability multifd (not built yet) are synchronised, and where pages of zeros travel: ``7.2``
    #: at the end of each section, ``8.1`` once for each pass, ``9.0`` also with pages of zeros in the channels.
    multifd_scheme: Annotated[Literal["7.2", "8.1", "9.0"], Choice(("7.2", "8.1", "9.0"))] = "7.2"
    #: The machine type of the guest decides what is not in :attr:`explicit` and has its default here.
    by_machine: Annotated[bool, Flag()] = False
    #: Python names of the switches that were given beside ``by-machine``, and so are not the machine type's.
    explicit: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        check_fields("peer profile", self, _KINDS)

    @property
    def switchover_acks(self) -> int:
        """How many SWITCHOVER_ACK a source of this profile expects of a destination whose devices ask for none."""
        return 1 if self.switchover_ack_legacy else 0

    @staticmethod
    def named(name: str) -> PeerProfile:
        """The profile of :data:`PEERS` with this name.

        Raises:
            ConfigError: there is none.
        """
        try:
            return PEERS[name]
        except KeyError:
            raise unknown("peer profile", name, PEERS) from None

    def for_machine(self, machine: str | None, *, arriving: bool = False) -> PeerProfile:
        """This profile for one guest: itself, unless the machine type is to decide.

        How the stream is framed (configuration section, footers, run state) is never the machine type's: who knows its
        name has read a configuration section.

        Args:
            machine: the machine type that the configuration section names; None for a guest of trimig's own.
            arriving: as for :func:`profile_for_machine`.
        """
        if not self.by_machine:
            return self
        found = OWN if machine is None else profile_for_machine(machine, arriving=arriving)
        changes = {
            field: getattr(self, field)
            for field in _FIELDS
            # A configuration section that names the machine is there, and so is what has been read of the stream.
            if field in _SEEN or field in self.explicit or getattr(self, field) != getattr(BY_MACHINE, field)
        }
        return _changed(found, {field: value for field, value in changes.items() if value != getattr(found, field)})


_KINDS: Final = kinds_of(PeerProfile)
#: The switches by their Python names, and as they are written.
_FIELDS: Final = tuple(name for name in _KINDS if name not in ("name", "by_machine"))
#: How multifd is done comes with the profile only: nothing reads it before the capability is built.
_SWITCHES: Final = tuple(dashed(name) for name in _FIELDS if name != "multifd_scheme")
#: What can be told from the stream itself.
_SEEN: Final = frozenset({"send_configuration", "send_section_footer", "store_global_state"})

#: Machine types of 2.4 to 7.2.
QEMU_7_2: Final = PeerProfile(name="qemu-7.2")
#: Machine types of 8.0.
QEMU_8_0: Final = PeerProfile(name="qemu-8.0", preempt_pre_7_2=False)
#: Machine types of 8.1 and 8.2.
QEMU_8_1: Final = dataclasses.replace(QEMU_8_0, name="qemu-8.1", multifd_scheme="8.1")
#: Machine types of 9.0 to 9.2.
QEMU_9_0: Final = dataclasses.replace(QEMU_8_1, name="qemu-9.0", multifd_scheme="9.0")
#: Machine types of 10.0 to 11.0.
QEMU_10_0: Final = dataclasses.replace(QEMU_9_0, name="qemu-10.0", send_switchover_start=True)
#: Machine types of 11.1 and later.
QEMU_11_1: Final = dataclasses.replace(QEMU_10_0, name="qemu-11.1", switchover_ack_legacy=False)
#: Machine types of 2.3.
LEGACY_2_3: Final = PeerProfile(
    name="legacy-2.3", send_configuration=False, send_section_footer=False, store_global_state=False
)
#: Machine types up to 2.2.
LEGACY_2_2: Final = dataclasses.replace(LEGACY_2_3, name="legacy-2.2", suppress_vmdesc=True)
#: The machine type decides; the default. The switches are those that every reader begins with.
BY_MACHINE: Final = PeerProfile(name="by-machine", by_machine=True)

#: A guest of trimig's own, whatever its name is: as machine types of 7.2, which every version of trimig reads.
OWN: Final = dataclasses.replace(QEMU_7_2, name="trimig's own")
#: A machine type without a version (``none``, ``microvm``, ``q35``): as new as the program that runs it, and that cannot
#: be told. What is sent is what every program can read.
UNVERSIONED: Final = dataclasses.replace(QEMU_7_2, name="a machine type without a version")

#: The profiles that come with trimig, by name.
PEERS: Final[Mapping[str, PeerProfile]] = MappingProxyType(
    {
        profile.name: profile
        for profile in (
            BY_MACHINE,
            LEGACY_2_2,
            LEGACY_2_3,
            QEMU_7_2,
            QEMU_8_0,
            QEMU_8_1,
            QEMU_9_0,
            QEMU_10_0,
            QEMU_11_1,
        )
    }
)

#: From which version of the machine type on a profile holds, the newest first.
_SINCE: Final = (
    ((11, 1), QEMU_11_1),
    ((10, 0), QEMU_10_0),
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
    """The profile that a QEMU uses with the machine type *machine*: found by the version at the end of its name.

    Args:
        machine: the name in the configuration section, such as ``pc-i440fx-10.0``.
        arriving: for the destination. Where no version can be told it waits for nothing that may not come.
    """
    version = _VERSION.fullmatch(machine)
    if version is None:
        return dataclasses.replace(UNVERSIONED, preempt_pre_7_2=False) if arriving else UNVERSIONED
    number = int(version[1]), int(version[2])
    return next(profile for since, profile in _SINCE if number >= since)


def read_peer(changes: Iterable[tuple[str, object]], form: Form) -> PeerProfile:
    """A profile from pairs of name and value: ``profile`` names the one to begin with, the others are its switches.

    Without ``profile`` it begins with ``by-machine``.

    Raises:
        ConfigError: an unknown name or profile, or a switch with a value that it cannot have.
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
            raise unknown("peer switch", name, ("profile", *_SWITCHES))
        field = name.replace("-", "_")
        switches[field] = _KINDS[field].read(value, form)
        check_value("peer profile", field, _KINDS[field], switches[field])
    if base.by_machine:
        return _changed(base, switches)
    return _changed(base, {field: value for field, value in switches.items() if value != getattr(base, field)})


def _changed(base: PeerProfile, changes: Mapping[str, Any]) -> PeerProfile:
    """*base* with *changes*; its name tells a reader of the log that this is no longer the profile as it comes."""
    if not changes:
        return base
    words = ", ".join(
        f"{dashed(field)} {value if isinstance(value, str) else 'on' if value else 'off'}"
        for field, value in changes.items()
    )
    explicit = base.explicit | changes.keys() if base.by_machine else base.explicit
    return dataclasses.replace(base, name=f"{base.name} with {words}", explicit=explicit, **changes)
