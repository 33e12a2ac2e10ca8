"""The structures of ioctls, between their bytes and the Python values of `uapi`."""

import errno
from collections.abc import Iterable
from typing import Final

from softtdx.abi import kvm as abi
from softtdx.kvm.errors import KvmError
from softtdx.kvm.uapi import CpuidEntry, Regs, Segment, Sregs, TdxInitMemRegion, TdxInitVm

__all__ = [
    "cpuid_entries", "mem_region", "pack_regs", "parse_cpuid", "parse_init_vm", "unpack_regs", "unpack_sregs2",
]  # fmt: skip

# struct kvm_regs has rax rbx rcx rdx rsi rdi rsp rbp; the encoding order is rax rcx rdx rbx rsp rbp rsi rdi.
_ENCODING: Final = (0, 3, 1, 2, 6, 7, 4, 5, *range(8, 16))
# struct kvm_segment from byte 14 on, one byte each: where it goes in the access rights of the VMCS.
_ACCESS_SHIFT: Final = (0, 7, 5, 14, 4, 13, 15, 12, 16)  # type, present, dpl, db, s, l, g, avl, unusable
_SEGMENT_SIZE: Final = 24
_SEGMENTS: Final = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")


def cpuid_entries(entries: Iterable[CpuidEntry]) -> list[bytes]:
    """Each as struct kvm_cpuid_entry2."""
    found = []
    for entry in entries:
        raw = abi.CpuidEntry2()
        raw.function, raw.index = entry.function, entry.index or 0
        raw.flags = 0 if entry.index is None else abi.CPUID_FLAG_SIGNIFICANT_INDEX
        raw.eax, raw.ebx, raw.ecx, raw.edx = entry.eax, entry.ebx, entry.ecx, entry.edx
        found.append(bytes(raw))
    return found


def parse_cpuid(data: bytes) -> tuple[CpuidEntry, ...]:
    """The inverse, of entries that follow each other."""
    size = abi.CpuidEntry2.SIZE
    rows = (abi.CpuidEntry2.parse(data[at : at + size], strict=False) for at in range(0, len(data), size))
    return tuple(
        CpuidEntry(
            row.function,
            row.index if row.flags & abi.CPUID_FLAG_SIGNIFICANT_INDEX else None,
            row.eax,
            row.ebx,
            row.ecx,
            row.edx,
        )
        for row in rows
    )


def parse_init_vm(data: bytes, cpuid: bytes) -> TdxInitVm:
    """What struct kvm_tdx_init_vm says. EINVAL when a reserved byte is set."""
    head = abi.TdxInitVmHead.parse(data, strict=False)
    if not head.reserved_is_zero():
        raise KvmError(errno.EINVAL, "a reserved byte of struct kvm_tdx_init_vm is set")
    return TdxInitVm(
        attributes=head.attributes,
        xfam=head.xfam,
        mrconfigid=head.mrconfigid,
        mrowner=head.mrowner,
        mrownerconfig=head.mrownerconfig,
        cpuid=parse_cpuid(cpuid),
    )


def mem_region(raw: abi.TdxInitMemRegion, *, measure: bool) -> TdxInitMemRegion:
    """What struct kvm_tdx_init_mem_region says."""
    return TdxInitMemRegion(raw.source_addr, raw.gpa, raw.nr_pages, measure)


def pack_regs(regs: Regs) -> bytes:
    """Struct kvm_regs."""
    raw = abi.RegsStruct()
    raw.gprs = tuple(regs.gprs[index] for index in _ENCODING)
    raw.rip, raw.rflags = regs.rip, regs.rflags
    return bytes(raw)


def unpack_regs(data: bytes) -> Regs:
    """The inverse."""
    raw = abi.RegsStruct.parse(data)
    gprs = [0] * 16
    for number, index in enumerate(_ENCODING):
        gprs[index] = raw.gprs[number]
    return Regs(tuple(gprs), raw.rip, raw.rflags)


def unpack_sregs2(data: bytes) -> Sregs:
    """Struct kvm_sregs2, as far as it is used: PDPTRs, CR2, CR8 and the APIC base are not."""
    segments = {name: _segment(data[i * _SEGMENT_SIZE : (i + 1) * _SEGMENT_SIZE]) for i, name in enumerate(_SEGMENTS)}
    at = len(_SEGMENTS) * _SEGMENT_SIZE

    def number(offset: int, size: int = 8) -> int:
        return int.from_bytes(data[at + offset : at + offset + size], "little")

    return Sregs(
        **segments,
        gdt_base=number(0),
        gdt_limit=number(8, 2),
        idt_base=number(16),
        idt_limit=number(24, 2),
        cr0=number(32),
        cr3=number(48),
        cr4=number(56),
        efer=number(72),
    )


def _segment(raw: bytes) -> Segment:
    access = sum(value << shift for value, shift in zip(raw[14:23], _ACCESS_SHIFT, strict=True))
    return Segment(
        selector=int.from_bytes(raw[12:14], "little"),
        base=int.from_bytes(raw[0:8], "little"),
        limit=int.from_bytes(raw[8:12], "little"),
        access=access,
    )
