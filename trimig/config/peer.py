"""Peer profiles: what the other side expects of the stream beyond capabilities and parameters.

In QEMU these are properties of the migration object and of the machine, which older machine types switch off so that
older versions can read the stream (config.md part 3, stream.md part 11). Both ends must agree on them, because
neither the configuration section nor a footer can be told from its absence in advance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, final

from ..errors import ConfigError
from .kinds import Flag, Form, Text, check_fields, check_value, dashed, kinds_of, unknown


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
    #: The second connection of postcopy-preempt is made right behind the first, as 7.1 and 7.2 expect it; if off, at the
    #: switch to postcopy, as 8.0 and later do.
    preempt_pre_7_2: Annotated[bool, Flag()] = True

    def __post_init__(self) -> None:
        check_fields("peer profile", self, _KINDS)

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


_KINDS: Final = kinds_of(PeerProfile)
_SWITCHES: Final = tuple(dashed(name) for name in _KINDS if name != "name")

#: QEMU from 2.4 up to 7.2 and later, with machine types of 2.4 and later; and trimig itself.
QEMU_7_2: Final = PeerProfile(name="qemu-7.2")
#: QEMU 8.0 and later with machine types of 8.0 and later.
QEMU_8_0: Final = PeerProfile(name="qemu-8.0", preempt_pre_7_2=False)
#: Machine types of 2.3.
LEGACY_2_3: Final = PeerProfile(
    name="legacy-2.3", send_configuration=False, send_section_footer=False, store_global_state=False
)
#: Machine types up to 2.2.
LEGACY_2_2: Final = dataclasses.replace(LEGACY_2_3, name="legacy-2.2", suppress_vmdesc=True)

#: The profiles that come with trimig, by name.
PEERS: Final[Mapping[str, PeerProfile]] = MappingProxyType(
    {profile.name: profile for profile in (QEMU_7_2, QEMU_8_0, LEGACY_2_3, LEGACY_2_2)}
)


def read_peer(changes: Iterable[tuple[str, object]], form: Form) -> PeerProfile:
    """A profile from pairs of name and value: ``profile`` names the one to begin with, the others are its switches.

    Raises:
        ConfigError: an unknown name or profile, or a switch that is neither true nor false.
    """
    base = QEMU_7_2
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
    changed = {field: value for field, value in switches.items() if value != getattr(base, field)}
    if not changed:
        return base
    # The name tells a reader of the log that this is no longer the profile as it comes.
    words = ", ".join(f"{dashed(field)} {'on' if value else 'off'}" for field, value in changed.items())
    return dataclasses.replace(base, name=f"{base.name} with {words}", **changed)
