"""MRTD under construction: an incremental SHA-384 whose state lies in the TDCS (TDX Module Base Spec, "MRTD").

The measured stream is 128-byte records: TDH.MEM.PAGE.ADD puts one ("MEM.PAGE.ADD", GPA), TDH.MR.EXTEND one
("MR.EXTEND", GPA) and the 256 bytes measured. So the stream is always whole SHA-384 blocks and nothing is buffered.
"""

import struct
from typing import Final

from softtdx._silicon import sha384_final, sha384_init

from . import tdcs
from .td import Td

__all__ = ["CHUNK", "abandon", "extend", "finish", "page_added", "start"]

CHUNK: Final = 256  # bytes that one TDH.MR.EXTEND measures
_record: Final = struct.Struct("<16sQ104x").pack
MRTD_STATE: Final = tdcs.MRTD_STATE  # the context of `SeamCpu.extend_sha384`; MRTD_LENGTH is behind the state
PAGE_ADD: Final = b"MEM.PAGE.ADD"
MR_EXTEND: Final = b"MR.EXTEND"


def start(td: Td) -> None:
    """TDH.MNG.INIT: nothing is measured yet."""
    td.write(tdcs.MRTD_STATE, sha384_init())
    td.wr64(tdcs.MRTD_LENGTH, 0)
    td.wr64(tdcs.MRTD_UNDER_WAY, 1)
    _count(td, 1)


def page_added(td: Td, gpa: int) -> None:
    """TDH.MEM.PAGE.ADD of `gpa`: its record goes into the stream."""
    td.call.cpu.extend_sha384(td.p0 + MRTD_STATE, _record(PAGE_ADD, gpa))


def extend(td: Td, gpa: int, source: int) -> None:
    """TDH.MR.EXTEND of `gpa`: its record, and the 256 bytes at the bus address `source`."""
    td.call.cpu.extend_sha384(td.p0 + MRTD_STATE, _record(MR_EXTEND, gpa), source, CHUNK)


def abandon(td: Td) -> None:
    """TDH.MNG.VPFLUSHDONE: no measurement is under way in this TD any more."""
    if td.rd64(tdcs.MRTD_UNDER_WAY):
        td.wr64(tdcs.MRTD_UNDER_WAY, 0)
        _count(td, -1)


def finish(td: Td) -> bytes:
    """TDH.MR.FINALIZE: the digest becomes MRTD."""
    digest = sha384_final(td.read(tdcs.MRTD_STATE, 64), td.rd64(tdcs.MRTD_LENGTH))
    td.write(tdcs.MRTD, digest)
    abandon(td)
    return digest


def _count(td: Td, change: int) -> None:
    """TD builds in progress: an update of the module may have to wait for them (TDH.SYS.SHUTDOWN)."""
    g = td.call.g
    with g.mutex:
        g.td_build_count += change
