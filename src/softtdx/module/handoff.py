"""What one module leaves for the next in a TD-preserving update (TDX Module Base Spec, "TD-Preserving Update").

It lies at the start of the module's data pages in SEAMRR, which the loader keeps through an update: a header, then
the global data that neither TDH.SYS.INIT nor TDH.SYS.LP.INIT makes: the key ownership table, the state of cache
write-backs, the TDMRs, the global KeyID and which packages have its key, and two counts.
"""

import struct
from dataclasses import dataclass
from typing import Final

from softtdx.hw.isa import SeamCpu

from . import limits
from .pamt import publish_block
from .state import MAX_PACKAGES, GlobalState, HandoffHeader, HkidState, PackageState, Tdmr

__all__ = ["Handoff", "read_header", "restore", "save", "withdraw"]

PAGE: Final = 4096
HEADER: Final = struct.Struct("<BxHI")
FIXED: Final = struct.Struct("<HH?BHHHI")  # see Handoff, then lengths of the tables
HKID: Final = struct.Struct("<HBB")
PACKAGE: Final = struct.Struct("<QH")
TDMR: Final = struct.Struct("<B6QB")
AREA: Final = struct.Struct("<QQ")
GIB_SHIFT: Final = 30


@dataclass(frozen=True)
class Handoff:
    """The global data that goes over."""

    hkid: int
    packages_keyed: int
    dynamic_pamt: bool
    td_build_count: int
    mig_interrupted_count: int
    kot: dict[int, tuple[HkidState, int]]
    packages: list[PackageState]
    tdmrs: list[Tdmr]

    def encode(self) -> bytes:
        """The bytes behind the header, for version `limits.MODULE_HV`."""
        parts = [
            FIXED.pack(
                self.hkid,
                self.packages_keyed,
                self.dynamic_pamt,
                len(self.packages),
                self.td_build_count,
                self.mig_interrupted_count,
                len(self.kot),
                len(self.tdmrs),
            )
        ]
        parts += [HKID.pack(hkid, state, packages) for hkid, (state, packages) in self.kot.items()]
        for package in self.packages:
            parts.append(PACKAGE.pack(package.resume_point, len(package.hkids_flushed)))
            parts += [struct.pack("<H", hkid) for hkid in package.hkids_flushed]
        for t in self.tdmrs:
            parts.append(
                TDMR.pack(t.index, t.base, t.size, t.pamt_1g, t.pamt_2m, t.pamt_4k, t.initialized, len(t.reserved))
            )
            parts += [AREA.pack(*area) for area in t.reserved]
        return b"".join(parts)

    @classmethod
    def decode(cls, data: bytes) -> "Handoff":
        """What `encode` made."""
        hkid, keyed, dynamic, package_count, building, interrupted, hkids, tdmr_count = FIXED.unpack_from(data)
        at = FIXED.size
        kot = {}
        for _ in range(hkids):
            number, state, to_flush = HKID.unpack_from(data, at)
            kot[number] = (HkidState(state), to_flush)
            at += HKID.size
        packages = []
        for _ in range(package_count):
            resume_point, count = PACKAGE.unpack_from(data, at)
            at += PACKAGE.size
            packages.append(PackageState(resume_point, set(struct.unpack_from(f"<{count}H", data, at))))
            at += 2 * count
        tdmrs = []
        for _ in range(tdmr_count):
            index, base, size, pamt_1g, pamt_2m, pamt_4k, initialized, areas = TDMR.unpack_from(data, at)
            at += TDMR.size
            reserved = tuple(AREA.unpack_from(data, at + AREA.size * i) for i in range(areas))
            at += AREA.size * areas
            tdmrs.append(Tdmr(index, base, size, pamt_1g, pamt_2m, pamt_4k, reserved, initialized))
        return cls(hkid, keyed, dynamic, building, interrupted, kot, packages, tdmrs)


def _address(g: GlobalState) -> int:
    """The module's first data page: behind SYS_INFO_TABLE and the SEAM transfer VMCS of each processor."""
    return g.seamrr[0] + PAGE * (1 + g.sysinfo.lps)


def read_header(cpu: SeamCpu, g: GlobalState) -> HandoffHeader:
    """What the module before this one left."""
    valid, version, size = HEADER.unpack(cpu.read(_address(g), HEADER.size))
    return HandoffHeader(bool(valid), version, size)


def withdraw(cpu: SeamCpu, g: GlobalState) -> None:
    """The data was taken over: nobody takes it a second time."""
    cpu.write(_address(g), HEADER.pack(0, g.handoff.version, 0))
    g.handoff = HandoffHeader(False, g.handoff.version, 0)


def save(cpu: SeamCpu, g: GlobalState) -> None:
    """TDH.SYS.SHUTDOWN: write everything that goes over."""
    data = Handoff(
        hkid=g.hkid,
        packages_keyed=g.packages_keyed,
        dynamic_pamt=g.dynamic_pamt,
        td_build_count=g.td_build_count,
        mig_interrupted_count=g.mig_interrupted_count,
        kot=g.kot,
        packages=g.packages,
        tdmrs=g.tdmrs,
    ).encode()
    room = (g.sysinfo.num_handoff_pages + 1) * PAGE - HEADER.size
    if len(data) > room:
        raise ValueError(f"{len(data)} bytes of handoff data do not fit into {room}")
    address = _address(g)
    cpu.write(address, HEADER.pack(1, limits.MODULE_HV, len(data)) + data)


def restore(cpu: SeamCpu, g: GlobalState) -> None:
    """TDH.SYS.UPDATE: take everything over; blocks of memory whose PAMT is ready may be used at once."""
    data = Handoff.decode(cpu.read(_address(g) + HEADER.size, g.handoff.size))
    g.hkid = data.hkid
    g.global_key_bits = data.hkid << g.hkid_shift
    g.packages_keyed = data.packages_keyed
    g.dynamic_pamt = data.dynamic_pamt
    g.td_build_count = data.td_build_count
    g.mig_interrupted_count = data.mig_interrupted_count
    g.kot = data.kot
    g.packages = data.packages + [PackageState() for _ in range(MAX_PACKAGES - len(data.packages))]
    g.tdmrs = data.tdmrs
    for tdmr in g.tdmrs:
        for base in range(tdmr.base, tdmr.initialized & ~((1 << GIB_SHIFT) - 1), 1 << GIB_SHIFT):
            publish_block(g, tdmr, base)
