"""Tools on streams in files or pipes: inspect, export, merge, and the record of the owner of a saved guest."""

from ..guests.parked.newfile import check_target as check_target
from .export import FORMATS as FORMATS
from .export import Exported as Exported
from .export import export_raw as export_raw
from .files import write_new as write_new
from .inspect import inspect_stream as inspect_stream
from .merge import Merged as Merged
from .merge import keep_partial as keep_partial
from .merge import merge as merge
from .owner import OwnerRecord as OwnerRecord
from .owner import locked as locked
from .owner import read_record as read_record
from .owner import record_decision as record_decision
from .owner import record_path as record_path
from .owner import write_record as write_record
from .report import BlockInfo as BlockInfo
from .report import CommandInfo as CommandInfo
from .report import DeviceInfo as DeviceInfo
from .report import SectionInfo as SectionInfo
from .report import StreamReport as StreamReport
