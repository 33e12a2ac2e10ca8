"""The state ioctls: an ordinary VM's registers go in and come out by struct, a TD's are refused as the kernel does."""

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ioctl_td import Td, answered, fails

from softtdx.abi import kvm_structs as wire
from softtdx.abi.kvm import KvmExit, KvmIoctl, MpState, VcpuEventFlag, argument_size
from softtdx.abi.msrs import Msr
from softtdx.abi.structs import Attributes
from softtdx.kvm.ioctl import Process
from softtdx.kvm.memory import PAGE

E2BIG, EAGAIN, EFAULT, EINVAL, ENXIO = 7, 11, 14, 22, 6
SPLIT_IRQCHIP = 121
ENTRY = 0x1000


@pytest.fixture
def process(host):
    found = Process(host)
    yield found
    found.exit()


class Machine:
    """An ordinary VM in flat 32-bit mode, by ioctls; `apic` gives it a local APIC."""

    def __init__(self, process, code=b"\xf4", apic=False, spare=0):
        self.process, self.ioctl = process, process.ioctl
        kvm = process.open()
        self.vm = process.ioctl(kvm, KvmIoctl.CREATE_VM, 0)
        hva = process.mm.mmap(4 * PAGE)
        if spare:  # so that the VM's memory is elsewhere than the last one's
            process.mm.write(process.mm.mmap(spare * PAGE), bytes(spare * PAGE))
        process.mm.write(hva + ENTRY, code)
        region = struct.pack("<IIQQQ", 0, 0, 0, 4 * PAGE, hva)
        process.ioctl(self.vm, KvmIoctl.SET_USER_MEMORY_REGION, bytearray(region))
        if apic:
            process.ioctl(
                self.vm, KvmIoctl.ENABLE_CAP, bytearray(struct.pack("<II4Q64x", SPLIT_IRQCHIP, 0, 24, 0, 0, 0))
            )
        self.vcpu = process.ioctl(self.vm, KvmIoctl.CREATE_VCPU, 0)
        sregs = self.get(KvmIoctl.GET_SREGS, wire.SregsStruct)
        for segment, (selector, kind) in zip(sregs.segments, [(8, 11)] + [(16, 3)] * 5, strict=False):
            segment.selector, segment.type, segment.limit = selector, kind, 0xFFFF_FFFF
            segment.present = segment.s = segment.db = segment.g = 1
            segment.unusable = 0
        sregs.cr0 = 0x21
        self.set(KvmIoctl.SET_SREGS, sregs)
        regs = wire.RegsStruct()
        regs.rip, regs.rflags = ENTRY, 2
        self.set(KvmIoctl.SET_REGS, regs)

    def handle(self, vector, handler):
        """A GDT and an IDT with one gate, a stack, and interrupts enabled."""
        slot = self.process.file(self.vm).memslots.find(0)
        gate = struct.pack("<HHBBH", handler, 8, 0, 0x8E, 0)
        self.process.mm.write(slot.hva(0x2000) + 8 * vector, gate)
        self.process.mm.write(slot.hva(0x3000) + 8, struct.pack("<Q", 0x00CF9B000000FFFF))
        sregs = self.get(KvmIoctl.GET_SREGS, wire.SregsStruct)
        gdt, idt = sregs.tables
        gdt.base, gdt.limit, idt.base, idt.limit = 0x3000, 0xFF, 0x2000, 0x7FF
        self.set(KvmIoctl.SET_SREGS, sregs)
        regs = self.get(KvmIoctl.GET_REGS, wire.RegsStruct)
        regs.rflags = 0x202
        regs.gprs = (*regs.gprs[:6], 0x3F00, *regs.gprs[7:])
        self.set(KvmIoctl.SET_REGS, regs)

    def get(self, request, kind):
        data = bytearray(argument_size(request))
        assert self.ioctl(self.vcpu, request, data) == 0
        return kind.parse(data, strict=False)

    def set(self, request, value):
        assert self.ioctl(self.vcpu, request, bytearray(bytes(value))) == 0

    def run(self):
        self.ioctl(self.vcpu, KvmIoctl.RUN)
        return self.process.kvm_run(self.vcpu)

    def msrs(self, *indices):
        data = bytearray(struct.pack("<II", len(indices), 0) + b"".join(struct.pack("<IIQ", i, 0, 0) for i in indices))
        done = self.ioctl(self.vcpu, KvmIoctl.GET_MSRS, data)
        return [struct.unpack_from("<Q", data, 16 + 16 * i)[0] for i in range(done)]

    def set_msrs(self, *pairs):
        entries = b"".join(struct.pack("<IIQ", index, 0, value) for index, value in pairs)
        return self.ioctl(self.vcpu, KvmIoctl.SET_MSRS, bytearray(struct.pack("<II", len(pairs), 0) + entries))


def test_special_registers_come_out_as_they_went_in(process):
    machine = Machine(process)
    sregs = machine.get(KvmIoctl.GET_SREGS, wire.SregsStruct)
    sregs.cr2, sregs.cr3, sregs.tables[0].base, sregs.tables[1].limit = 0xDEAD, 0x2000, 0x3000, 0x7FF
    machine.set(KvmIoctl.SET_SREGS, sregs)
    assert machine.get(KvmIoctl.GET_SREGS, wire.SregsStruct) == sregs
    again = machine.get(KvmIoctl.GET_SREGS2, wire.Sregs2Struct)
    assert bytes(again)[:280] == bytes(sregs)[:280]
    again.cr3 = 0x3000
    machine.set(KvmIoctl.SET_SREGS2, again)
    assert machine.get(KvmIoctl.GET_SREGS, wire.SregsStruct).cr3 == 0x3000


@pytest.mark.parametrize(
    "wrong",
    [
        {"cr0": 1 << 32},
        {"cr0": 1 << 31},  # paging without protection
        {"cr0": 0x21 | 1 << 29},  # not write-through, without cache disable
        {"cr4": 1 << 13},  # VMXE
        {"cr4": 1 << 40},
        {"efer": 1 << 10},  # long mode active without paging
        {"efer": 1 << 3},
        {"cr0": 0x8000_0021, "efer": 1 << 8, "cr4": 1 << 5},  # LME and paging, but not active
        {"cr0": 0x8000_0021, "efer": 0x500, "cr4": 0},  # 64-bit mode without PAE
        {"apic_base": 1 << 60},
    ],
)
def test_registers_that_contradict_each_other_are_einval_and_change_nothing(process, wrong):
    machine = Machine(process)
    before = machine.get(KvmIoctl.GET_SREGS, wire.SregsStruct)
    bad = wire.SregsStruct.parse(bytes(before), strict=False)
    for name, value in wrong.items():
        setattr(bad, name, value)
    fails(EINVAL, machine.ioctl, machine.vcpu, KvmIoctl.SET_SREGS, bytearray(bytes(bad)))
    assert machine.get(KvmIoctl.GET_SREGS, wire.SregsStruct) == before
    flags = wire.Sregs2Struct()
    flags.flags = 2
    fails(EINVAL, machine.ioctl, machine.vcpu, KvmIoctl.SET_SREGS2, bytearray(bytes(flags)))


def test_what_the_guest_computes_is_in_its_registers_afterwards(process):
    # fld1; mov eax, 0x1234; mov dr0, eax; hlt
    machine = Machine(process, bytes.fromhex("d9e8b8341200000f23c0f4"))
    assert machine.run().exit_reason is KvmExit.HLT
    assert machine.get(KvmIoctl.GET_REGS, wire.RegsStruct).gprs[0] == 0x1234
    assert machine.get(KvmIoctl.GET_REGS, wire.RegsStruct).rip == ENTRY + 11
    assert machine.get(KvmIoctl.GET_DEBUGREGS, wire.DebugregsStruct).db[0] == 0x1234
    fpu = machine.get(KvmIoctl.GET_FPU, wire.FpuStruct)
    assert fpu.fpr[:10] == bytes.fromhex("0000000000000080ff3f")
    assert fpu.fsw >> 11 & 7 == 7


def test_extended_state_goes_in_by_one_struct_and_comes_out_by_another(process):
    # movdqu [0x2000], xmm3; hlt
    machine = Machine(process, bytes.fromhex("f30f7f1d00200000f4"))
    fpu = machine.get(KvmIoctl.GET_FPU, wire.FpuStruct)
    assert fpu.fcw == 0x37F
    fpu.xmm = bytes(range(256))
    machine.set(KvmIoctl.SET_FPU, fpu)
    xsave = bytearray(4096)
    machine.ioctl(machine.vcpu, KvmIoctl.GET_XSAVE, xsave)
    assert xsave[160:416] == bytes(range(256))
    assert struct.unpack_from("<QQ", xsave, 512) == (struct.unpack_from("<Q", xsave, 512)[0], 0)
    xsave[160 + 48 : 160 + 64] = b"a sixteenth part"
    machine.ioctl(machine.vcpu, KvmIoctl.SET_XSAVE, xsave)
    assert machine.get(KvmIoctl.GET_FPU, wire.FpuStruct).xmm[48:64] == b"a sixteenth part"
    sregs = machine.get(KvmIoctl.GET_SREGS, wire.SregsStruct)
    sregs.cr4 = 1 << 9  # OSFXSR
    machine.set(KvmIoctl.SET_SREGS, sregs)
    machine.run()
    slot = process.file(machine.vm).memslots.find(0x2000)
    assert process.mm.read(slot.hva(0x2000), 16) == b"a sixteenth part"
    for at, value in ((512, 1 << 2), (520, 1 << 63), (528, 1), (24, 1 << 31)):
        bad = bytearray(xsave)
        struct.pack_into("<Q", bad, at, value)
        fails(EINVAL, machine.ioctl, machine.vcpu, KvmIoctl.SET_XSAVE, bad)


def test_xcr0_and_debug_registers_are_checked(process):
    machine = Machine(process)
    xcrs = machine.get(KvmIoctl.GET_XCRS, wire.XcrsStruct)
    assert (xcrs.nr_xcrs, xcrs.xcrs[0].xcr, xcrs.xcrs[0].value) == (1, 0, 1)
    xcrs.xcrs[0].value = 3
    machine.set(KvmIoctl.SET_XCRS, xcrs)
    assert machine.get(KvmIoctl.GET_XCRS, wire.XcrsStruct) == xcrs
    for name, value in (("nr_xcrs", 17), ("flags", 1)):
        bad = wire.XcrsStruct.parse(bytes(xcrs), strict=False)
        setattr(bad, name, value)
        fails(EINVAL, machine.ioctl, machine.vcpu, KvmIoctl.SET_XCRS, bytearray(bytes(bad)))
    for value in (0, 2, 1 << 40):
        xcrs.xcrs[0].value = value
        fails(EINVAL, machine.ioctl, machine.vcpu, KvmIoctl.SET_XCRS, bytearray(bytes(xcrs)))
    debug = machine.get(KvmIoctl.GET_DEBUGREGS, wire.DebugregsStruct)
    for name, value in (("flags", 1), ("dr6", 1 << 32), ("dr7", 1 << 32)):
        bad = wire.DebugregsStruct.parse(bytes(debug), strict=False)
        setattr(bad, name, value)
        fails(EINVAL, machine.ioctl, machine.vcpu, KvmIoctl.SET_DEBUGREGS, bytearray(bytes(bad)))


def test_every_msr_of_the_list_can_be_read_and_written_back(process):
    machine = Machine(process, apic=True)
    kvm = process.open()
    few = bytearray(4)
    fails(E2BIG, process.ioctl, kvm, KvmIoctl.GET_MSR_INDEX_LIST, few)
    count = struct.unpack("<I", few)[0]
    room = bytearray(few + bytes(4 * count))
    process.ioctl(kvm, KvmIoctl.GET_MSR_INDEX_LIST, room)
    indices = struct.unpack_from(f"<{count}I", room, 4)
    assert Msr.LSTAR in indices
    values = machine.msrs(*indices)
    assert len(values) == count
    assert machine.set_msrs(*zip(indices, values, strict=True)) == count
    features = bytearray((64).to_bytes(4, "little") + bytes(256))
    process.ioctl(kvm, KvmIoctl.GET_MSR_FEATURE_INDEX_LIST, features)
    first = struct.unpack_from("<I", features, 4)[0]
    entry = bytearray(struct.pack("<IIIIQ", 1, 0, first, 0, 0))
    assert process.ioctl(kvm, KvmIoctl.GET_MSRS, entry) == 1
    assert process.ioctl(kvm, KvmIoctl.GET_MSRS, bytearray(struct.pack("<IIIIQ", 1, 0, Msr.LSTAR, 0, 0))) == 0


def test_msrs_are_done_up_to_the_first_that_is_not_there_or_takes_no_such_value(process):
    machine = Machine(process)
    assert machine.set_msrs((Msr.LSTAR, 0x1234), (0xDEAD_BEEF, 1), (Msr.CSTAR, 1)) == 1
    assert machine.msrs(Msr.LSTAR, Msr.CSTAR) == [0x1234, 0]
    assert machine.msrs(Msr.LSTAR, 0xDEAD_BEEF, Msr.CSTAR) == [0x1234]
    for index, value in (
        (Msr.LSTAR, 1 << 63), (Msr.KERNEL_GS_BASE, 1 << 47), (Msr.EFER, 1 << 3), (Msr.PAT, 2), (Msr.APIC_BASE, 1),
        (Msr.MTRR_DEF_TYPE, 2), (0x250, 7),
    ):  # fmt: skip
        assert machine.set_msrs((index, value)) == 0, hex(index)
    too_many = bytearray(struct.pack("<II", 256, 0) + bytes(16 * 256))
    for request in (KvmIoctl.GET_MSRS, KvmIoctl.SET_MSRS):
        fails(E2BIG, machine.ioctl, machine.vcpu, request, too_many)
        fails(EFAULT, machine.ioctl, machine.vcpu, request, bytearray(struct.pack("<II", 2, 0) + bytes(16)))


def test_a_guest_reads_the_tsc_that_user_space_set(process):
    # mov ecx, 0x10; rdmsr; hlt
    machine = Machine(process, bytes.fromhex("b9100000000f32f4"))
    assert machine.set_msrs((Msr.TSC, 5 << 40)) == 1
    machine.run()
    gprs = machine.get(KvmIoctl.GET_REGS, wire.RegsStruct).gprs
    assert 5 << 40 <= gprs[3] << 32 | gprs[0] < 6 << 40


@pytest.mark.parametrize("error", [0, 1])
def test_an_unknown_msr_goes_to_user_space_when_it_asks_for_it(process, error):
    # mov ecx, 0xdead; rdmsr; out 0x80, al; hlt
    machine = Machine(process, bytes.fromhex("b9adde00000f32e680f4"))
    cap = bytearray(struct.pack("<II4Q64x", 188, 0, 2, 0, 0, 0))
    machine.ioctl(machine.vm, KvmIoctl.ENABLE_CAP, cap)
    run = machine.run()
    assert (run.exit_reason, run.msr.index, run.msr.reason, run.msr.error) == (KvmExit.X86_RDMSR, 0xDEAD, 2, 0)
    run.msr.data, run.msr.error = 0x77, error
    machine.run()
    if error:  # #GP, and no IDT: a triple fault
        assert run.exit_reason is KvmExit.SHUTDOWN
    else:
        assert (run.exit_reason, run.io.port, run.io.value) == (KvmExit.IO, 0x80, 0x77)


def test_events_wait_and_block_as_they_are_set(process):
    machine = Machine(process)
    events = machine.get(KvmIoctl.GET_VCPU_EVENTS, wire.VcpuEventsStruct)
    flags = VcpuEventFlag.VALID_NMI_PENDING | VcpuEventFlag.VALID_SHADOW | VcpuEventFlag.VALID_SMM
    assert bytes(events) == bytes(20) + int(flags).to_bytes(4, "little") + bytes(40)
    events.exception_injected, events.exception_nr = 1, 13
    events.exception_has_error_code, events.exception_error_code = 1, 0x18
    events.nmi_masked, events.interrupt_shadow = 1, 1
    machine.set(KvmIoctl.SET_VCPU_EVENTS, events)
    assert machine.get(KvmIoctl.GET_VCPU_EVENTS, wire.VcpuEventsStruct) == events
    machine.ioctl(machine.vcpu, KvmIoctl.NMI)
    assert machine.get(KvmIoctl.GET_VCPU_EVENTS, wire.VcpuEventsStruct).nmi_pending == 1
    assert machine.run().exit_reason is KvmExit.SHUTDOWN  # the exception, without an IDT


@pytest.mark.parametrize(
    "wrong",
    [
        {"flags": 1 << 6},
        {"flags": VcpuEventFlag.VALID_PAYLOAD},
        {"flags": VcpuEventFlag.VALID_TRIPLE_FAULT},
        {"exception_injected": 1, "exception_nr": 32},
        {"exception_injected": 1, "exception_nr": 2},
        {"flags": VcpuEventFlag.VALID_SMM, "smi_smm": 1},
        {"flags": VcpuEventFlag.VALID_SMM, "smi_pending": 1},
    ],
)
def test_events_that_do_not_exist_are_einval(process, wrong):
    machine = Machine(process)
    events = wire.VcpuEventsStruct()
    for name, value in wrong.items():
        setattr(events, name, value)
    fails(EINVAL, machine.ioctl, machine.vcpu, KvmIoctl.SET_VCPU_EVENTS, bytearray(bytes(events)))


def test_an_injected_interrupt_is_delivered_through_the_guests_idt(process):
    machine = Machine(process, bytes.fromhex("90ebfe").ljust(0x100, b"\xf4") + bytes.fromhex("e680f4"))
    machine.handle(0x41, ENTRY + 0x100)
    machine.ioctl(machine.vcpu, KvmIoctl.INTERRUPT, bytearray((0x41).to_bytes(4, "little")))
    assert machine.get(KvmIoctl.GET_SREGS, wire.SregsStruct).interrupt_bitmap[1] == 1 << 1
    run = machine.run()
    assert (run.exit_reason, run.io.port) == (KvmExit.IO, 0x80)
    assert run.if_flag == 0
    fails(EINVAL, machine.ioctl, machine.vcpu, KvmIoctl.INTERRUPT, bytearray((256).to_bytes(4, "little")))


def test_user_space_is_told_when_the_guest_can_take_its_interrupt(process):
    # out 0x81, al; sti; nop; jmp $ ... the handler: out 0x80, al
    machine = Machine(process, bytes.fromhex("e681fb90ebfe").ljust(0x100, b"\xf4") + bytes.fromhex("e680f4"))
    machine.handle(0x41, ENTRY + 0x100)
    regs = machine.get(KvmIoctl.GET_REGS, wire.RegsStruct)
    regs.rflags = 2
    machine.set(KvmIoctl.SET_REGS, regs)
    run = machine.run()
    assert (run.io.port, run.if_flag, run.ready_for_interrupt_injection) == (0x81, 0, 0)
    run.request_interrupt_window = 1
    machine.run()
    assert (run.exit_reason, run.if_flag, run.ready_for_interrupt_injection) == (KvmExit.IRQ_WINDOW_OPEN, 1, 1)
    run.request_interrupt_window = 0
    machine.ioctl(machine.vcpu, KvmIoctl.INTERRUPT, bytearray((0x41).to_bytes(4, "little")))
    machine.run()
    assert (run.exit_reason, run.io.port) == (KvmExit.IO, 0x80)


def test_multiprocessing_states_need_a_local_apic(process):
    machine = Machine(process)
    state = bytearray(4)
    machine.ioctl(machine.vcpu, KvmIoctl.GET_MP_STATE, state)
    assert state == bytes(4)
    for value in (1, 3, 4, 9, 99):
        fails(EINVAL, machine.ioctl, machine.vcpu, KvmIoctl.SET_MP_STATE, bytearray(value.to_bytes(4, "little")))
    other = Machine(process, bytes.fromhex("e680f4"), apic=True)
    other.ioctl(other.vcpu, KvmIoctl.SET_MP_STATE, bytearray(int(MpState.HALTED).to_bytes(4, "little")))
    process.file(other.vcpu).kick()
    fails(4, other.ioctl, other.vcpu, KvmIoctl.RUN)  # it waits for an interrupt
    other.ioctl(other.vcpu, KvmIoctl.NMI)
    other.ioctl(other.vcpu, KvmIoctl.SET_MP_STATE, bytearray(4))
    fails(ENXIO, other.ioctl, other.vcpu, KvmIoctl.INTERRUPT, bytearray(4))


def test_a_local_apic_is_saved_and_restored_as_a_page(process):
    machine = Machine(process, apic=True)
    vcpu = process.file(machine.vcpu)
    vcpu.apic.post(0x55)
    page = bytearray(1024)
    machine.ioctl(machine.vcpu, KvmIoctl.GET_LAPIC, page)
    assert int.from_bytes(page[0x30:0x34], "little") >> 16 == 5  # version: six LVT entries
    assert page[0x220] == 1 << 0x15 - 16 or page[0x200 + 0x20 + 2] == 1 << 5
    page[0x80], page[0x320:0x324], page[0x380:0x384] = 0x20, (0x1_0060).to_bytes(4, "little"), bytes(4)
    machine.ioctl(machine.vcpu, KvmIoctl.SET_LAPIC, page)
    again = bytearray(1024)
    machine.ioctl(machine.vcpu, KvmIoctl.GET_LAPIC, again)
    assert again == page
    assert machine.get(KvmIoctl.GET_SREGS, wire.SregsStruct).cr8 == 2
    assert machine.msrs(Msr.X2APIC_LVT_TIMER, Msr.X2APIC_TPR) == [0x1_0060, 0x20]
    bare = Machine(process)
    fails(EINVAL, bare.ioctl, bare.vcpu, KvmIoctl.GET_LAPIC, page)
    fails(EINVAL, bare.ioctl, bare.vcpu, KvmIoctl.SET_LAPIC, page)


def test_addresses_are_translated_as_the_guest_would(process):
    machine = Machine(process)
    machine.run()
    raw = bytearray(struct.pack("<QQ8x", 0x1234, 0))
    machine.ioctl(machine.vcpu, KvmIoctl.TRANSLATE, raw)
    assert struct.unpack_from("<QQB", raw) == (0x1234, 0x1234, 1)


def test_cpuid_cannot_change_after_the_vcpu_has_run(process):
    machine = Machine(process)

    def entries(*rows):
        return bytearray(struct.pack("<II", len(rows), 0) + b"".join(struct.pack("<10I", *row) for row in rows))

    first = entries((1, 0, 0, 2, 0, 0, 0, 0, 0, 0))
    machine.ioctl(machine.vcpu, KvmIoctl.SET_CPUID2, first)
    fails(EINVAL, machine.ioctl, machine.vcpu, KvmIoctl.SET_CPUID2, entries((0x8000_0008, 0, 0, 40 << 8, *[0] * 6)))
    machine.run()
    machine.ioctl(machine.vcpu, KvmIoctl.SET_CPUID2, first)
    fails(EINVAL, machine.ioctl, machine.vcpu, KvmIoctl.SET_CPUID2, entries((1, 0, 0, 3, 0, 0, 0, 0, 0, 0)))
    assert machine.set_msrs((Msr.ARCH_CAPABILITIES, 0)) == 1
    assert machine.set_msrs((Msr.ARCH_CAPABILITIES, 1)) == 0


PROTECTED = ("REGS", "SREGS", "SREGS2", "FPU", "DEBUGREGS", "XSAVE", "XCRS", "LAPIC")


def test_the_state_of_a_td_is_refused_and_what_kvm_has_of_it_is_not(process):
    td = Td(process)
    for name in (*PROTECTED, "XSAVE2"):
        for verb in ("GET", "SET"):
            if f"{verb}_{name}" in KvmIoctl.__members__:
                request = KvmIoctl[f"{verb}_{name}"]
                fails(EINVAL, process.ioctl, td.vcpu, request, bytearray(argument_size(request)))
    fails(EINVAL, process.ioctl, td.vcpu, KvmIoctl.SET_GUEST_DEBUG, bytearray(72))
    fails(EFAULT, process.ioctl, td.vcpu, KvmIoctl.SET_REGS, bytearray(3))  # the structure is copied first
    fails(EINVAL, process.ioctl, td.vcpu, KvmIoctl.SET_SREGS2, bytearray(3))  # but here the state is looked at first
    process.ioctl(td.vcpu, KvmIoctl.NMI)
    events = bytearray(64)
    process.ioctl(td.vcpu, KvmIoctl.GET_VCPU_EVENTS, events)
    assert wire.VcpuEventsStruct.parse(events, strict=False).nmi_pending == 1
    process.ioctl(td.vcpu, KvmIoctl.SET_VCPU_EVENTS, bytearray(16) + bytes([0, 0, 0, 0, 1]) + bytes(43))
    assert not process.file(td.vcpu).nmi_pending
    process.ioctl(td.vcpu, KvmIoctl.GET_MP_STATE, bytearray(4))
    translation = bytearray(24)
    process.ioctl(td.vcpu, KvmIoctl.TRANSLATE, translation)
    assert translation[16] == 0


def test_the_msrs_of_a_td_are_those_that_kvm_emulates(process):
    td = Td(process)

    def get(index):
        entry = bytearray(struct.pack("<IIIIQ", 1, 0, index, 0, 0))
        done = process.ioctl(td.vcpu, KvmIoctl.GET_MSRS, entry)
        return struct.unpack_from("<Q", entry, 16)[0] if done else None

    def put(index, value):
        return process.ioctl(td.vcpu, KvmIoctl.SET_MSRS, bytearray(struct.pack("<IIIIQ", 1, 0, index, 0, value)))

    assert get(Msr.EFER) == 0xD01
    assert get(Msr.MTRRCAP) == 0x508
    assert put(0x250, 0x0606_0606) == 1
    assert get(0x250) == 0x0606_0606
    for index in (Msr.LSTAR, Msr.KERNEL_GS_BASE, Msr.TSC, Msr.SPEC_CTRL, Msr.TSC_ADJUST, 0xDEAD):
        assert get(index) is None, hex(index)
        assert put(index, 0) == 0
    for index in (Msr.EFER, Msr.APIC_BASE, Msr.FEATURE_CONTROL):
        assert put(index, get(index)) == 0


def test_the_numbers_say_how_long_the_structures_are():
    for name, kind in {
        "REGS": wire.RegsStruct, "SREGS": wire.SregsStruct, "SREGS2": wire.Sregs2Struct, "FPU": wire.FpuStruct,
        "DEBUGREGS": wire.DebugregsStruct, "XCRS": wire.XcrsStruct, "VCPU_EVENTS": wire.VcpuEventsStruct,
    }.items():  # fmt: skip
        assert argument_size(KvmIoctl[f"GET_{name}"]) == argument_size(KvmIoctl[f"SET_{name}"]) == kind.SIZE


STATE = [
    KvmIoctl[f"{verb}_{name}"]
    for name in (*PROTECTED, "VCPU_EVENTS", "MP_STATE", "MSRS", "CPUID2")
    for verb in ("GET", "SET")
]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_hostile_state_is_taken_or_refused_and_the_vm_runs_or_says_why_not(host, data):
    process = Process(host)
    try:
        machine = Machine(process, apic=data.draw(st.booleans()))
        for request in data.draw(st.lists(st.sampled_from(STATE), min_size=1, max_size=4)):
            size = argument_size(request)
            raw = data.draw(st.one_of(st.binary(min_size=size, max_size=size), st.binary(max_size=64)))
            if data.draw(st.booleans()) and request.name.startswith("SET"):
                # What is there, with a byte changed: nearly good.
                there = bytearray(size)
                answered(machine.ioctl, machine.vcpu, KvmIoctl[request.name.replace("SET", "GET", 1)], there)
                there[data.draw(st.integers(0, size - 1))] = data.draw(st.integers(0, 255))
                raw = bytes(there)
            answer = answered(machine.ioctl, machine.vcpu, request, bytearray(raw))
            assert answer >= 0 or -answer in (E2BIG, EFAULT, EINVAL)
        process.kvm_run(machine.vcpu).immediate_exit = 1
        fails(4, machine.ioctl, machine.vcpu, KvmIoctl.RUN)
    finally:
        process.exit()


def test_a_debug_td_shows_its_registers_and_no_other_td_does(process):
    td = Td(process, attributes=Attributes.SEPT_VE_DISABLE | Attributes.DEBUG)

    def get(request):
        data = bytearray(argument_size(request))
        process.ioctl(td.vcpu, request, data)
        return data

    regs = wire.RegsStruct.parse(get(KvmIoctl.GET_REGS))
    assert regs.gprs[2] == 0x1234  # RCX, as KVM_TDX_INIT_VCPU gave it
    assert regs.rip == 0xFFFF_FFF0
    regs.gprs = tuple(range(100, 116))
    regs.rip = 0x4000
    process.ioctl(td.vcpu, KvmIoctl.SET_REGS, bytearray(bytes(regs)))
    assert get(KvmIoctl.GET_REGS) == bytes(regs)
    sregs = wire.SregsStruct.parse(get(KvmIoctl.GET_SREGS), strict=False)
    assert sregs.cr0 & 1
    assert sregs.efer == 0xD01
    assert wire.XcrsStruct.parse(get(KvmIoctl.GET_XCRS), strict=False).xcrs[0].value & 1
    debug = wire.DebugregsStruct.parse(get(KvmIoctl.GET_DEBUGREGS), strict=False)
    debug.db = (1, 2, 3, 4)
    process.ioctl(td.vcpu, KvmIoctl.SET_DEBUGREGS, bytearray(bytes(debug)))
    assert get(KvmIoctl.GET_DEBUGREGS) == bytes(debug)
    for name in ("GET_FPU", "SET_FPU", "GET_XSAVE", "SET_XSAVE", "GET_LAPIC", "SET_SREGS2"):
        request = KvmIoctl[name]
        fails(EINVAL, process.ioctl, td.vcpu, request, bytearray(argument_size(request)))


def test_a_new_vm_sees_nothing_of_one_whose_page_tables_were_where_its_own_are(host):
    for value in range(1, 9):
        process = Process(host)
        code = b"\xb8" + value.to_bytes(4, "little") + b"\xf4"  # mov eax, value; hlt
        machine = Machine(process, code, spare=value % 3)
        machine.run()
        assert machine.get(KvmIoctl.GET_REGS, wire.RegsStruct).gprs[0] == value
        process.exit()
