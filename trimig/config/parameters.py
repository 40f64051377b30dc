"""Parameters: the numbers of a migration, with QEMU's names, ranges and defaults (config.md part 2, newer.md part 7).

All of them may be set, whether or not the feature that reads them is built, because existing scripts set many.
:data:`~trimig.config.built.UNREAD` lists the parameters without an effect yet, and :meth:`Parameters.warnings` names
those that were set. A value that would turn on a missing feature (compressed multifd, a mode other than ``normal``) is
refused until the feature is built.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, final

from ..errors import ConfigError
from .bitmaps import Mappings, NodeAlias
from .built import BUILT_VALUES, UNREAD
from .types import (
    Choice,
    Flag,
    Int,
    MiB,
    OrNone,
    Size,
    Syntax,
    Text,
    Type,
    Words,
    check_fields,
    check_value,
    name_of,
    qmp_name,
    short_repr,
    types_of,
    unknown_name,
)

#: Bytes of a target page (:data:`trimig.guest.PAGE_SIZE`, which this layer does not import).
_TARGET_PAGE: Final = 4096

#: Spellings of older versions, accepted wherever a name is read.
PARAMETER_ALIASES: Final[Mapping[str, str]] = {"x-multifd-channels": "multifd-channels"}

#: Older parameters that 7.2 no longer has: their range is checked and their value dropped. A multifd packet of 7.2
#: always has room for 512 KiB of pages.
_GONE: Final = {"x-multifd-page-count": Int(1, 10000)}


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """A complete set of parameters.

    Raises:
        ConfigError: on construction, for a value out of its range, or a value that needs a feature that is not built
            yet.
    """

    #: zlib level of the capability ``compress``, a number; 0 stores.
    compress_level: Annotated[int, Int(0, 9)] = 1
    #: Number of threads that compress, for the capability ``compress``.
    compress_threads: Annotated[int, Int(1, 255)] = 8
    #: Wait for a free compression thread instead of sending the page as it is.
    compress_wait_thread: Annotated[bool, Flag()] = True
    #: Number of threads that decompress.
    decompress_threads: Annotated[int, Int(1, 255)] = 2
    #: Percent of the bytes sent in an iteration that may be dirtied again before throttling starts.
    throttle_trigger_threshold: Annotated[int, Int(1, 100, "percent")] = 50
    #: Percent of the guest's running time that the first throttling takes (capability ``auto-converge``).
    cpu_throttle_initial: Annotated[int, Int(1, 99, "percent")] = 20
    #: Percent that each later throttling adds.
    cpu_throttle_increment: Annotated[int, Int(1, 99, "percent")] = 10
    #: Raise the throttling in smaller steps towards the end.
    cpu_throttle_tailslow: Annotated[bool, Flag()] = False
    #: Percent of the guest's running time that throttling takes at most; at least ``cpu_throttle_initial``.
    max_cpu_throttle: Annotated[int, Int(1, 99, "percent")] = 99
    #: Id of the TLS credentials (in ``Config.objects``); empty for no TLS.
    tls_creds: Annotated[str, Text()] = ""
    #: The name that the peer's certificate must have; empty for the one in the address.
    tls_hostname: Annotated[str, Text()] = ""
    #: Id of the access control list of a TLS server (in ``Config.objects``); empty to accept every verified client.
    tls_authz: Annotated[str, Text()] = ""
    #: Bytes per second; 0 for no limit.
    max_bandwidth: Annotated[int, Size(unit="bytes per second, 0 for no limit")] = 128 * MiB
    #: Milliseconds. The switchover begins when its expected downtime is not longer than this.
    downtime_limit: Annotated[int, Int(0, 2_000_000, "milliseconds")] = 300
    #: Period of COLO checkpoints in milliseconds.
    x_checkpoint_delay: Annotated[int, Int(0, 2**32 - 1, "milliseconds")] = 20_000
    #: Block migration sends the top image only.
    block_incremental: Annotated[bool, Flag()] = False
    #: Number of connections for pages, for the capability ``multifd``.
    multifd_channels: Annotated[int, Int(1, 255)] = 2
    #: The compression of pages with ``multifd``.
    multifd_compression: Annotated[str, Choice(("none", "zlib", "zstd"))] = "none"
    #: Level of that compression, a number. QEMU 7.2 accepts this parameter and the next one in a command without checking
    #: them; here they are checked and set.
    multifd_zlib_level: Annotated[int, Int(0, 9)] = 1
    #: Level of that compression, a number.
    multifd_zstd_level: Annotated[int, Int(0, 20)] = 1
    #: Bytes; a power of two of at least one target page.
    xbzrle_cache_size: Annotated[int, Size(_TARGET_PAGE, power_of_two=True)] = 64 * MiB
    #: Postcopy: bytes per second for pages that the destination has not requested; 0 for no limit.
    max_postcopy_bandwidth: Annotated[int, Size(unit="bytes per second, 0 for no limit")] = 0
    #: Self-announcement of network cards after the switchover: the first pause in milliseconds.
    announce_initial: Annotated[int, Int(0, 100_000, "milliseconds")] = 50
    #: The longest pause in milliseconds.
    announce_max: Annotated[int, Int(0, 100_000, "milliseconds")] = 550
    #: Number of announcements.
    announce_rounds: Annotated[int, Int(0, 1000)] = 5
    #: Milliseconds by which each pause is longer than the one before.
    announce_step: Annotated[int, Int(1, 10_000, "milliseconds")] = 100
    #: Aliases of disks and bitmaps; with None each has its own name.
    block_bitmap_mapping: Annotated[tuple[NodeAlias, ...] | None, OrNone(Mappings())] = None
    #: Network bandwidth for the last pages and the devices, in bytes per second; 0 for the measured bandwidth.
    avail_switchover_bandwidth: Annotated[int, Size(unit="bytes per second, 0 for what was measured")] = 0
    #: Where zero pages are found: ``legacy`` and ``none`` send them on the main connection, the latter as data; ``multifd``
    #: on the data channels of that capability, if the machine type is 9.0 or later. Memory that the guest has never touched
    #: is always sent as zero pages.
    zero_page_detection: Annotated[str, Choice(("none", "legacy", "multifd"))] = "multifd"
    #: The mode of migration; the others than ``normal`` move a guest to another program on the same host and are not
    #: built.
    mode: Annotated[str, Choice(("normal", "cpr-reboot", "cpr-transfer", "cpr-exec"))] = "normal"
    #: Bypass the host's page cache when writing a file, for the capability ``mapped-ram``.
    direct_io: Annotated[bool, Flag()] = False
    #: Level of the compression ``qatzip`` with ``multifd``, a number.
    multifd_qatzip_level: Annotated[int, Int(1, 9)] = 1
    #: For the capability ``dirty-limit``: milliseconds between its checks.
    x_vcpu_dirty_limit_period: Annotated[int, Int(1, 1000, "milliseconds")] = 1000
    #: For the capability ``dirty-limit``: MB per second that each vCPU may dirty.
    vcpu_dirty_limit: Annotated[int, Int(1, 2**64 - 1, "MB per second")] = 1
    #: The command line that the mode ``cpr-exec`` executes.
    cpr_exec_command: Annotated[tuple[str, ...], Words()] = ()
    #: Bytes; a power of two.
    x_rdma_chunk_size: Annotated[int, Size(MiB, 1024 * MiB, power_of_two=True)] = MiB

    def __post_init__(self) -> None:
        check_fields("parameter", self, _TYPES)
        if self.max_cpu_throttle < self.cpu_throttle_initial:
            raise ConfigError(
                f"parameter 'max_cpu_throttle' expects an integer from cpu_throttle_initial "
                f"({self.cpu_throttle_initial}) to 99, not {self.max_cpu_throttle}",
                name="max-cpu-throttle",
            )
        for name, values in BUILT_VALUES.items():
            value = getattr(self, name.replace("-", "_"))
            if value not in values:
                raise ConfigError(
                    f"parameter '{name}' cannot be {value}: that is not built into trimig yet",
                    name=name,
                )

    def warnings(self) -> list[str]:
        """A sentence for each parameter that is not at its default and has no effect yet; empty if there is none."""
        return [
            f"the parameter {name} has no effect yet: it belongs to {feature}, which is not built into trimig"
            for name, feature in UNREAD.items()
            if getattr(self, name.replace("-", "_")) != _DEFAULTS[name.replace("-", "_")]
        ]

    def replace(self, **changes: Any) -> Parameters:
        """This set with *changes*, in Python spelling.

        Raises:
            ConfigError: an unknown name, or a value out of its range; this set is unchanged in any case.
        """
        for name in changes:
            if name not in _TYPES:
                raise unknown_name("parameter", name, _TYPES)
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_qmp(cls, arguments: object, base: Parameters | None = None) -> Parameters:
        """*base* (or the defaults) changed by the arguments of ``migrate-set-parameters``, as a whole or not at all.

        Types are QMP's: a bool is no integer, null is the empty string for ``tls-*``, a size of -1 is 2^64-1.

        Raises:
            ConfigError: not an object, an unknown name, a wrong type or a value out of its range.
        """
        if not isinstance(arguments, Mapping):
            raise ConfigError(f"parameters are given as an object, not {short_repr(arguments)}")
        return read_parameters(cls() if base is None else base, arguments.items(), Syntax.QMP)

    def to_qmp(self) -> dict[str, object]:
        """The answer to ``query-migrate-parameters``: all parameters, but ``block-bitmap-mapping`` only if it is set."""
        return {
            qmp_name(name): kind.kind.write(value) if isinstance(kind, OrNone) else kind.write(value)
            for name, kind in _TYPES.items()
            if (value := getattr(self, name)) is not None
        }


_TYPES: Final = types_of(Parameters)
_DEFAULTS: Final = {field.name: field.default for field in dataclasses.fields(Parameters)}

#: The type of each parameter, by its name in QMP spelling.
PARAMETER_TYPES: Final[Mapping[str, Type]] = {qmp_name(name): kind for name, kind in _TYPES.items()}

#: All names, in QMP spelling and in the order of config.md part 2.
PARAMETER_NAMES: Final[tuple[str, ...]] = tuple(qmp_name(name) for name in _TYPES)


def read_parameters(
    base: Parameters, changes: Iterable[tuple[object, object]], form: Syntax, *, repeats: bool = False
) -> Parameters:
    """*base* with *changes*, pairs of name and value, checked together.

    The names have QMP spelling; in the form TEXT they may also have underscores.

    With *repeats* the last value of a name counts, as on a command line. Without *repeats* a name may occur once, in
    one spelling.

    Raises:
        ConfigError: an unknown or repeated name, a wrong type or a value out of its range.
    """
    values: dict[str, Any] = {}
    for given, value in changes:
        name = name_of(given, PARAMETER_ALIASES, form)
        typed = str(given) if form is Syntax.TEXT else None
        if isinstance(name, str) and name in _GONE:
            kind = _GONE[name]
            check_value("parameter", name.replace("-", "_"), kind, kind.read(value, form), typed=typed)
            continue
        if not isinstance(name, str) or name not in PARAMETER_NAMES:
            raise unknown_name("parameter", given, PARAMETER_NAMES)
        field = name.replace("-", "_")
        if field in values and not repeats:
            raise ConfigError(f"parameter '{field}' is given twice, as {name} and under its older name", name=name)
        stored = _TYPES[field].read(value, form)
        if stored is None:
            # None means "not set" only in Python; in a QMP command null is a value of the wrong type.
            raise ConfigError(f"parameter '{field}' cannot be null", name=name)
        check_value("parameter", field, _TYPES[field], stored, typed=typed)
        values[field] = stored
    return dataclasses.replace(base, **values)
