"""The structures of ioctls, between their bytes and the Python values of `uapi`."""

import errno
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from softtdx.abi import kvm_structs as wire
from softtdx.abi.kvm import CPUID_FLAG_SIGNIFICANT_INDEX, MAX_CPUID_ENTRIES, MAX_IO_MSRS
from softtdx.kvm.errors import KvmError
from softtdx.kvm.uapi import CpuidEntry, Regs, Segment, Sregs, TdxInitVm
from softtdx.kvm.user_memory import Argument

__all__ = [
    "fpu_of", "give_cpuid", "give_indices", "give_msrs", "pack_regs", "pack_sregs", "parse_init_vm", "put_fpu",
    "put_msrs", "take_cpuid", "unpack_regs", "unpack_sregs",
]  # fmt: skip

_HEAD: Final = wire.Cpuid2Head.SIZE
_ADDRESS_LEAF: Final = 0x8000_0008
# struct kvm_regs has rax rbx rcx rdx rsi rdi rsp rbp; the encoding order is rax rcx rdx rbx rsp rbp rsi rdi.
_ENCODING: Final = (0, 3, 1, 2, 6, 7, 4, 5, *range(8, 16))
# Where the members of struct kvm_segment are in the access rights of the VMCS, and how many bits they have.
_ACCESS: Final = {
    "type": (0, 4), "s": (4, 1), "dpl": (5, 2), "present": (7, 1), "avl": (12, 1), "l": (13, 1), "db": (14, 1),
    "g": (15, 1), "unusable": (16, 1),
}  # fmt: skip
_UNUSABLE: Final = 1 << 16
_SEGMENTS: Final = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_VECTORS: Final = 256
# The legacy region of XSAVE (SDM vol. 1, 13.4.1), and XSTATE_BV behind it.
_ST, _XMM, _XSTATE_BV = slice(32, 160), slice(160, 416), slice(512, 520)
_X87_SSE: Final = 3


# --- CPUID
def take_cpuid(arg: Argument, offset: int = 0) -> tuple[CpuidEntry, ...]:
    """The entries of struct kvm_cpuid2. E2BIG for more than there may be."""
    head = arg.parse(wire.Cpuid2Head, offset)
    if head.nent > MAX_CPUID_ENTRIES:
        raise KvmError(errno.E2BIG, f"{head.nent} CPUID entries; there may be {MAX_CPUID_ENTRIES}")
    return tuple(
        CpuidEntry(
            row.function,
            row.index if row.flags & CPUID_FLAG_SIGNIFICANT_INDEX else None,
            row.eax,
            row.ebx,
            row.ecx,
            row.edx,
        )
        for row in arg.parse_list(wire.CpuidEntry2, head.nent, offset + _HEAD)
    )


def give_cpuid(arg: Argument, offset: int, entries: Iterable[CpuidEntry], *, tell: bool = False) -> None:
    """The inverse. E2BIG when there is room for fewer; with `tell`, the count needed is returned then."""
    found = [_cpuid_entry(entry) for entry in entries]
    head = arg.parse(wire.Cpuid2Head, offset)
    room, head.nent = head.nent, len(found)
    if room >= len(found) or tell:
        arg.write(head, offset)
    if room < len(found):
        raise KvmError(errno.E2BIG, f"{len(found)} CPUID entries, room for {room}")
    arg.write_list(found, offset + _HEAD)


def _cpuid_entry(entry: CpuidEntry) -> wire.CpuidEntry2:
    raw = wire.CpuidEntry2()
    raw.function, raw.index = entry.function, entry.index or 0
    raw.flags = 0 if entry.index is None else CPUID_FLAG_SIGNIFICANT_INDEX
    raw.eax, raw.ebx, raw.ecx, raw.edx = entry.eax, entry.ebx, entry.ecx, entry.edx
    return raw


def parse_init_vm(arg: Argument) -> TdxInitVm:
    """What struct kvm_tdx_init_vm says. EINVAL when a reserved byte is set, or the GPA width is not said."""
    head, size = arg.parse(wire.TdxInitVmHead), wire.TdxInitVmHead.SIZE
    cpuid = take_cpuid(arg, size)
    if not head.reserved_is_zero() or arg.parse(wire.Cpuid2Head, size).padding:
        raise KvmError(errno.EINVAL, "a reserved byte of struct kvm_tdx_init_vm is set")
    if not any(entry.function == _ADDRESS_LEAF for entry in cpuid):
        raise KvmError(errno.EINVAL, f"no CPUID entry {_ADDRESS_LEAF:#x}, which says how wide a GPA is")
    return TdxInitVm(head.attributes, head.xfam, head.mrconfigid, head.mrowner, head.mrownerconfig, cpuid)


# --- MSRs
def give_indices(arg: Argument, indices: Sequence[int]) -> None:
    """Struct kvm_msr_list. The count is returned in any case, E2BIG when there is room for fewer."""
    head = arg.parse(wire.MsrListHead)
    room, head.nmsrs = head.nmsrs, len(indices)
    arg.write(head)
    if room < len(indices):
        raise KvmError(errno.E2BIG, f"{len(indices)} MSRs, room for {room}")
    arg.write_list([int(index).to_bytes(4, "little") for index in indices], head.SIZE)


def give_msrs(arg: Argument, read: Callable[[int], int | None]) -> int:
    """KVM_GET_MSRS: read until the first that is not there; returns how many were."""
    entries = _msr_entries(arg)
    done = 0
    for entry in entries:
        value = read(entry.index)
        if value is None:
            break
        entry.data = value
        done += 1
    arg.write_list(entries, wire.MsrsHead.SIZE)
    return done


def put_msrs(arg: Argument, write: Callable[[int, int], bool]) -> int:
    """KVM_SET_MSRS: write until the first that does not take it; returns how many did."""
    done = 0
    for entry in _msr_entries(arg):
        if not write(entry.index, entry.data):
            break
        done += 1
    return done


def _msr_entries(arg: Argument) -> list[wire.MsrEntry]:
    head = arg.parse(wire.MsrsHead)
    if head.nmsrs >= MAX_IO_MSRS:
        raise KvmError(errno.E2BIG, f"{head.nmsrs} MSRs at once; there may be {MAX_IO_MSRS - 1}")
    return arg.parse_list(wire.MsrEntry, head.nmsrs, head.SIZE)


# --- registers
def pack_regs(regs: Regs) -> wire.RegsStruct:
    """Struct kvm_regs."""
    raw = wire.RegsStruct()
    raw.gprs = tuple(regs.gprs[index] for index in _ENCODING)
    raw.rip, raw.rflags = regs.rip, regs.rflags
    return raw


def unpack_regs(raw: wire.RegsStruct) -> Regs:
    """The inverse."""
    gprs, given = [0] * 16, raw.gprs
    for number, index in enumerate(_ENCODING):
        gprs[index] = given[number]
    return Regs(tuple(gprs), raw.rip, raw.rflags)


def pack_sregs(sregs: Sregs, raw: wire.SregsStruct | wire.Sregs2Struct) -> None:
    """Fill in struct kvm_sregs or kvm_sregs2."""
    for name, segment in zip(_SEGMENTS, raw.segments, strict=True):
        _pack_segment(getattr(sregs, name), segment)
    gdt, idt = raw.tables
    gdt.base, gdt.limit, idt.base, idt.limit = sregs.gdt_base, sregs.gdt_limit, sregs.idt_base, sregs.idt_limit
    raw.cr0, raw.cr2, raw.cr3, raw.cr4, raw.cr8 = sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.cr8
    raw.efer, raw.apic_base = sregs.efer, sregs.apic_base or 0
    if isinstance(raw, wire.SregsStruct) and sregs.pending_interrupt is not None:
        bitmap = 1 << sregs.pending_interrupt
        raw.interrupt_bitmap = tuple(bitmap >> 64 * i & (1 << 64) - 1 for i in range(_VECTORS // 64))


def unpack_sregs(raw: wire.SregsStruct | wire.Sregs2Struct) -> Sregs:
    """The inverse. PDPTRs, for 32-bit paging with PAE, are not kept: EINVAL for flags that say they are there."""
    if isinstance(raw, wire.Sregs2Struct) and raw.flags:
        raise KvmError(errno.EINVAL, f"struct kvm_sregs2 with flags {raw.flags:#x}")
    pending = None
    if isinstance(raw, wire.SregsStruct):
        bitmap = sum(word << 64 * i for i, word in enumerate(raw.interrupt_bitmap))
        pending = (bitmap & -bitmap).bit_length() - 1 if bitmap else None
    gdt, idt = raw.tables
    return Sregs(
        **{name: _unpack_segment(segment) for name, segment in zip(_SEGMENTS, raw.segments, strict=True)},
        gdt_base=gdt.base,
        gdt_limit=gdt.limit,
        idt_base=idt.base,
        idt_limit=idt.limit,
        cr0=raw.cr0,
        cr2=raw.cr2,
        cr3=raw.cr3,
        cr4=raw.cr4,
        cr8=raw.cr8,
        efer=raw.efer,
        apic_base=raw.apic_base,
        pending_interrupt=pending,
    )


def _pack_segment(segment: Segment, raw: wire.SegmentStruct) -> None:
    raw.base, raw.limit, raw.selector = segment.base, segment.limit, segment.selector
    for name, (shift, bits) in _ACCESS.items():
        setattr(raw, name, segment.access >> shift & (1 << bits) - 1)
    raw.present = 1 - raw.unusable  # as the kernel has it


def _unpack_segment(raw: wire.SegmentStruct) -> Segment:
    access = sum((getattr(raw, name) & (1 << bits) - 1) << shift for name, (shift, bits) in _ACCESS.items())
    if not raw.present:
        access |= _UNUSABLE
    return Segment(raw.selector, raw.base, raw.limit, access)


def fpu_of(image: bytes) -> wire.FpuStruct:
    """Struct kvm_fpu out of an XSAVE image."""
    raw = wire.FpuStruct()
    raw.fpr, raw.xmm = image[_ST], image[_XMM]
    raw.fcw, raw.fsw, raw.ftwx, raw.last_opcode = _int(image, 0, 2), _int(image, 2, 2), image[4], _int(image, 6, 2)
    raw.last_ip, raw.last_dp = _int(image, 8, 8), _int(image, 16, 8)
    return raw


def put_fpu(raw: wire.FpuStruct, image: bytes) -> bytes:
    """The XSAVE image with what struct kvm_fpu says."""
    new = bytearray(image)
    new[_ST], new[_XMM] = raw.fpr, raw.xmm
    new[0:4] = raw.fcw.to_bytes(2, "little") + raw.fsw.to_bytes(2, "little")
    new[4], new[6:8] = raw.ftwx, raw.last_opcode.to_bytes(2, "little")
    new[8:24] = raw.last_ip.to_bytes(8, "little") + raw.last_dp.to_bytes(8, "little")
    new[_XSTATE_BV] = (_int(image, 512, 8) | _X87_SSE).to_bytes(8, "little")
    return bytes(new)


def _int(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")
