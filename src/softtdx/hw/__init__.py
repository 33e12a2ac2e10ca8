"""The hardware: platform, logical processors, modes, MSRs, CPUID, SEAM, KeyIDs, report key.

Reading order: `description` (what machine), `platform`, `lp` (modes and SEAMCALL), `isa` (wall 2: what SEAM software
may use), `seamops` (report key), `events`; `dram` is the fault model below the encryption. The silicon below is Rust
(`softtdx._silicon`).
"""

from softtdx.hw.description import PlatformDescription as PlatformDescription
from softtdx.hw.description import preset as preset
from softtdx.hw.dram import Dram as Dram
from softtdx.hw.dram import DramError as DramError
from softtdx.hw.dram import DramLine as DramLine
from softtdx.hw.events import Event as Event
from softtdx.hw.events import EventStream as EventStream
from softtdx.hw.lp import LogicalProcessor as LogicalProcessor
from softtdx.hw.lp import Mode as Mode
from softtdx.hw.platform import Platform as Platform
from softtdx.hw.registers import Registers as Registers
