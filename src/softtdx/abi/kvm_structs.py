"""The structures that KVM's ioctls take, as bytes. Structures with a trailing array hold their fixed head.

Kernel: arch/x86/include/uapi/asm/kvm.h and include/uapi/linux/kvm.h (6.16 and later). Members of an inner struct are
named with its name in front.
"""

from softtdx.abi.wire import Wire, array, raw, uint, uints


# --- TDX
class TdxCmd(Wire, size=24):
    """struct kvm_tdx_cmd: the argument of KVM_MEMORY_ENCRYPT_OP. `hw_error` returns the SEAMCALL status on -EIO."""

    id = uint(0, 4)
    flags = uint(4, 4)
    data = uint(8, 8)
    hw_error = uint(16, 8)


class TdxCapabilitiesHead(Wire, size=2048):
    """struct kvm_tdx_capabilities before its struct kvm_cpuid2."""

    supported_attrs = uint(0, 8)
    supported_xfam = uint(8, 8)
    kernel_tdvmcallinfo_1_r11 = uint(16, 8)
    user_tdvmcallinfo_1_r11 = uint(24, 8)
    kernel_tdvmcallinfo_1_r12 = uint(32, 8)
    user_tdvmcallinfo_1_r12 = uint(40, 8)


class TdxInitVmHead(Wire, size=256):
    """struct kvm_tdx_init_vm before its struct kvm_cpuid2; bytes 160 to 255 are reserved."""

    attributes = uint(0, 8)
    xfam = uint(8, 8)
    mrconfigid = raw(16, 48)
    mrowner = raw(64, 48)
    mrownerconfig = raw(112, 48)


class TdxInitMemRegion(Wire, size=24):
    """struct kvm_tdx_init_mem_region: `nr_pages` of user memory at `source_addr` become private pages from `gpa`."""

    source_addr = uint(0, 8)
    gpa = uint(8, 8)
    nr_pages = uint(16, 8)


# --- CPUID and MSRs
class CpuidEntry2(Wire, size=40):
    """struct kvm_cpuid_entry2."""

    function = uint(0, 4)
    index = uint(4, 4)
    flags = uint(8, 4)
    eax = uint(12, 4)
    ebx = uint(16, 4)
    ecx = uint(20, 4)
    edx = uint(24, 4)


class Cpuid2Head(Wire, size=8):
    """struct kvm_cpuid2 before its entries."""

    nent = uint(0, 4)
    padding = uint(4, 4)


class MsrEntry(Wire, size=16):
    """struct kvm_msr_entry."""

    index = uint(0, 4)
    data = uint(8, 8)


class MsrsHead(Wire, size=8):
    """struct kvm_msrs before its entries."""

    nmsrs = uint(0, 4)


class MsrListHead(Wire, size=4):
    """struct kvm_msr_list before its indices."""

    nmsrs = uint(0, 4)


# --- memory
class UserspaceMemoryRegion(Wire, size=32):
    """struct kvm_userspace_memory_region."""

    slot = uint(0, 4)
    flags = uint(4, 4)
    guest_phys_addr = uint(8, 8)
    memory_size = uint(16, 8)
    userspace_addr = uint(24, 8)


class UserspaceMemoryRegion2(Wire, size=160):
    """struct kvm_userspace_memory_region2."""

    slot = uint(0, 4)
    flags = uint(4, 4)
    guest_phys_addr = uint(8, 8)
    memory_size = uint(16, 8)
    userspace_addr = uint(24, 8)
    guest_memfd_offset = uint(32, 8)
    guest_memfd = uint(40, 4)


class DirtyLog(Wire, size=16):
    """struct kvm_dirty_log: `dirty_bitmap` is a user address."""

    slot = uint(0, 4)
    dirty_bitmap = uint(8, 8)


class ClearDirtyLog(Wire, size=24):
    """struct kvm_clear_dirty_log."""

    slot = uint(0, 4)
    num_pages = uint(4, 4)
    first_page = uint(8, 8)
    dirty_bitmap = uint(16, 8)


class CreateGuestMemfd(Wire, size=64):
    """struct kvm_create_guest_memfd; bytes 16 to 63 are reserved."""

    size = uint(0, 8)
    flags = uint(8, 8)


class MemoryAttributes(Wire, size=32):
    """struct kvm_memory_attributes."""

    address = uint(0, 8)
    size = uint(8, 8)
    attributes = uint(16, 8)
    flags = uint(24, 8)


class PreFaultMemory(Wire, size=64):
    """struct kvm_pre_fault_memory; on return `gpa` and `size` say what is left. Bytes 24 to 63 are not looked at."""

    gpa = uint(0, 8)
    size = uint(8, 8)
    flags = uint(16, 8)


class Translation(Wire, size=24):
    """struct kvm_translation."""

    linear_address = uint(0, 8)
    physical_address = uint(8, 8)
    valid = uint(16, 1)
    writeable = uint(17, 1)
    usermode = uint(18, 1)


# --- capabilities and interrupts
class EnableCap(Wire, size=104):
    """struct kvm_enable_cap."""

    cap = uint(0, 4)
    flags = uint(4, 4)
    args = uints(8, 8, 4)


class Msi(Wire, size=32):
    """struct kvm_msi."""

    address_lo = uint(0, 4)
    address_hi = uint(4, 4)
    data = uint(8, 4)
    flags = uint(12, 4)
    devid = uint(16, 4)


class IrqLevel(Wire, size=8):
    """struct kvm_irq_level; `irq` is `status` on return."""

    irq = uint(0, 4)
    level = uint(4, 4)


class IrqRoutingHead(Wire, size=8):
    """struct kvm_irq_routing before its entries."""

    nr = uint(0, 4)
    flags = uint(4, 4)


class IrqRoutingEntry(Wire, size=48):
    """struct kvm_irq_routing_entry; the members from byte 16 on are those of type MSI."""

    gsi = uint(0, 4)
    type = uint(4, 4)
    flags = uint(8, 4)
    address_lo = uint(16, 4)
    address_hi = uint(20, 4)
    data = uint(24, 4)
    devid = uint(28, 4)


class Irqfd(Wire, size=32):
    """struct kvm_irqfd."""

    fd = uint(0, 4)
    gsi = uint(4, 4)
    flags = uint(8, 4)
    resamplefd = uint(12, 4)


class Ioeventfd(Wire, size=64):
    """struct kvm_ioeventfd."""

    datamatch = uint(0, 8)
    addr = uint(8, 8)
    len = uint(16, 4)
    fd = uint(20, 4)
    flags = uint(24, 4)


# --- the state of a vCPU
class RegsStruct(Wire, size=144):
    """struct kvm_regs: `gprs` as it has them, rax rbx rcx rdx rsi rdi rsp rbp r8 to r15."""

    gprs = uints(0, 8, 16)
    rip = uint(128, 8)
    rflags = uint(136, 8)


class SegmentStruct(Wire, size=24):
    """struct kvm_segment."""

    base = uint(0, 8)
    limit = uint(8, 4)
    selector = uint(12, 2)
    type = uint(14, 1)
    present = uint(15, 1)
    dpl = uint(16, 1)
    db = uint(17, 1)
    s = uint(18, 1)
    l = uint(19, 1)  # noqa: E741 - the kernel's name
    g = uint(20, 1)
    avl = uint(21, 1)
    unusable = uint(22, 1)


class DescriptorTable(Wire, size=16):
    """struct kvm_dtable."""

    base = uint(0, 8)
    limit = uint(8, 2)


class SregsStruct(Wire, size=312):
    """struct kvm_sregs: `segments` are cs ds es fs gs ss tr ldt, `tables` gdt and idt."""

    segments = array(0, SegmentStruct, 8)
    tables = array(192, DescriptorTable, 2)
    cr0 = uint(224, 8)
    cr2 = uint(232, 8)
    cr3 = uint(240, 8)
    cr4 = uint(248, 8)
    cr8 = uint(256, 8)
    efer = uint(264, 8)
    apic_base = uint(272, 8)
    interrupt_bitmap = uints(280, 8, 4)


class Sregs2Struct(Wire, size=320):
    """struct kvm_sregs2: as struct kvm_sregs up to byte 279."""

    segments = array(0, SegmentStruct, 8)
    tables = array(192, DescriptorTable, 2)
    cr0 = uint(224, 8)
    cr2 = uint(232, 8)
    cr3 = uint(240, 8)
    cr4 = uint(248, 8)
    cr8 = uint(256, 8)
    efer = uint(264, 8)
    apic_base = uint(272, 8)
    flags = uint(280, 8)
    pdptrs = uints(288, 8, 4)


class FpuStruct(Wire, size=416):
    """struct kvm_fpu. KVM leaves `mxcsr` alone in both directions."""

    fpr = raw(0, 128)
    fcw = uint(128, 2)
    fsw = uint(130, 2)
    ftwx = uint(132, 1)
    last_opcode = uint(134, 2)
    last_ip = uint(136, 8)
    last_dp = uint(144, 8)
    xmm = raw(152, 256)
    mxcsr = uint(408, 4)


class DebugregsStruct(Wire, size=128):
    """struct kvm_debugregs."""

    db = uints(0, 8, 4)
    dr6 = uint(32, 8)
    dr7 = uint(40, 8)
    flags = uint(48, 8)


class Xcr(Wire, size=16):
    """struct kvm_xcr."""

    xcr = uint(0, 4)
    value = uint(8, 8)


class XcrsStruct(Wire, size=392):
    """struct kvm_xcrs."""

    nr_xcrs = uint(0, 4)
    flags = uint(4, 4)
    xcrs = array(8, Xcr, 16)


class VcpuEventsStruct(Wire, size=64):
    """struct kvm_vcpu_events."""

    exception_injected = uint(0, 1)
    exception_nr = uint(1, 1)
    exception_has_error_code = uint(2, 1)
    exception_pending = uint(3, 1)
    exception_error_code = uint(4, 4)
    interrupt_injected = uint(8, 1)
    interrupt_nr = uint(9, 1)
    interrupt_soft = uint(10, 1)
    interrupt_shadow = uint(11, 1)
    nmi_injected = uint(12, 1)
    nmi_pending = uint(13, 1)
    nmi_masked = uint(14, 1)
    sipi_vector = uint(16, 4)
    flags = uint(20, 4)
    smi_smm = uint(24, 1)
    smi_pending = uint(25, 1)
    smi_smm_inside_nmi = uint(26, 1)
    smi_latched_init = uint(27, 1)
    triple_fault_pending = uint(28, 1)
    exception_has_payload = uint(55, 1)
    exception_payload = uint(56, 8)
