"""MRTD under construction: an incremental SHA-384 whose state lies in the TDCS (TDX Module Base Spec, "MRTD").

The measured stream is 128-byte records: TDH.MEM.PAGE.ADD puts one ("MEM.PAGE.ADD", GPA), TDH.MR.EXTEND one
("MR.EXTEND", GPA) and the 256 bytes measured. So the stream is always whole SHA-384 blocks and nothing is buffered.
"""

import struct
from typing import Final

from softtdx._silicon import sha384_final, sha384_init

from . import tdcs
from .td import Td

__all__ = ["abandon", "extend", "finish", "page_add_record", "start"]

RECORD: Final = struct.Struct("<16sQ104x")
PAGE_ADD: Final = b"MEM.PAGE.ADD"
MR_EXTEND: Final = b"MR.EXTEND"


def page_add_record(gpa: int) -> bytes:
    """What TDH.MEM.PAGE.ADD of `gpa` adds to the stream."""
    return RECORD.pack(PAGE_ADD, gpa)


def mr_extend_record(gpa: int) -> bytes:
    """What TDH.MR.EXTEND of `gpa` adds before the 256 bytes themselves."""
    return RECORD.pack(MR_EXTEND, gpa)


def start(td: Td) -> None:
    """TDH.MNG.INIT: nothing is measured yet."""
    td.write(tdcs.MRTD_STATE, sha384_init())
    td.wr64(tdcs.MRTD_LENGTH, 0)
    td.wr64(tdcs.MRTD_UNDER_WAY, 1)
    _count(td, 1)


def extend(td: Td, record: bytes, source: int = 0, size: int = 0) -> None:
    """Add a record to the stream, and `size` bytes from `source` (KeyID included): whole 128-byte blocks."""
    td.call.cpu.extend_sha384(td.p0 + tdcs.MRTD_STATE, record, source, size)


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
