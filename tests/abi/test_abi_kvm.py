"""KVM's numbers and layouts against the kernel headers that are installed, as far as those know them."""

import re
import shutil
import subprocess

import pytest

from softtdx.abi import kvm, kvm_run
from softtdx.abi import kvm_structs as wire

STRUCTS = {
    wire.TdxCmd: "kvm_tdx_cmd", wire.TdxInitMemRegion: "kvm_tdx_init_mem_region",
    wire.CpuidEntry2: "kvm_cpuid_entry2", wire.Cpuid2Head: "kvm_cpuid2", wire.MsrEntry: "kvm_msr_entry",
    wire.MsrsHead: "kvm_msrs", wire.MsrListHead: "kvm_msr_list",
    wire.UserspaceMemoryRegion: "kvm_userspace_memory_region",
    wire.UserspaceMemoryRegion2: "kvm_userspace_memory_region2", wire.CreateGuestMemfd: "kvm_create_guest_memfd",
    wire.MemoryAttributes: "kvm_memory_attributes", wire.PreFaultMemory: "kvm_pre_fault_memory",
    wire.Translation: "kvm_translation", wire.EnableCap: "kvm_enable_cap", wire.Msi: "kvm_msi",
    wire.IrqRoutingHead: "kvm_irq_routing", wire.IrqRoutingEntry: "kvm_irq_routing_entry", wire.Irqfd: "kvm_irqfd",
    wire.Ioeventfd: "kvm_ioeventfd", wire.IrqLevel: "kvm_irq_level", wire.SegmentStruct: "kvm_segment",
    wire.DescriptorTable: "kvm_dtable", wire.FpuStruct: "kvm_fpu", wire.DebugregsStruct: "kvm_debugregs",
    wire.Xcr: "kvm_xcr", wire.XcrsStruct: "kvm_xcrs", wire.VcpuEventsStruct: "kvm_vcpu_events",
    wire.SregsStruct: "kvm_sregs", wire.Sregs2Struct: "kvm_sregs2", wire.RegsStruct: "kvm_regs",
}  # fmt: skip
"""By the names that C has for them."""
IN_C = {
    wire.IrqRoutingEntry: {name: f"u.msi.{name}" for name in ("address_lo", "address_hi", "data", "devid")},
    wire.SregsStruct: {"segments": "cs", "tables": "gdt"},
    wire.Sregs2Struct: {"segments": "cs", "tables": "gdt"},
    wire.RegsStruct: {"gprs": "rax"},
    wire.VcpuEventsStruct: {
        field.name: re.sub(r"^(exception|interrupt|nmi|smi|triple_fault)_(?!has_payload|payload)", r"\1.", field.name)
        for field in wire.VcpuEventsStruct.fields
    },
}
"""Members that have other names there."""
RUN = {
    kvm_run.KvmRun: {
        "request_interrupt_window": "", "immediate_exit": "", "exit_number": "exit_reason",
        "ready_for_interrupt_injection": "", "if_flag": "", "flags": "", "cr8": "", "apic_base": "", "exit": "hw",
        "kvm_valid_regs": "", "kvm_dirty_regs": "", "sync_regs": "s",
    },
    kvm_run.MmioExit: {
        "gpa": "mmio.phys_addr", "data": "mmio.data", "size": "mmio.len", "is_write": "mmio.is_write",
    },
    kvm_run.IoExit: {name: f"io.{name}" for name in ("direction", "size", "port", "count", "data_offset")},
    kvm_run.HypercallExit: {name: f"hypercall.{name}" for name in ("nr", "args", "ret")},
    kvm_run.SystemEventExit: {name: f"system_event.{name}" for name in ("type", "ndata", "data")},
    kvm_run.FailEntry: {name: f"fail_entry.{name}" for name in ("hardware_entry_failure_reason", "cpu")},
    kvm_run.InternalError: {name: f"internal.{name}" for name in ("suberror", "ndata", "data")},
    kvm_run.MsrExit: {name: f"msr.{name}" for name in ("error", "reason", "index", "data")},
}  # fmt: skip


@pytest.fixture
def run_c(tmp_path):
    """Compile and run the body of a C program; None when the headers do not know what it names."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")

    def run(body):
        source, program = tmp_path / "p.c", tmp_path / "p"
        source.write_text(
            f"#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\nint main(void) {{{body}\nreturn 0;}}\n"
        )
        built = subprocess.run([compiler, "-w", "-o", program, source], capture_output=True, text=True, check=False)
        if built.returncode:
            if re.search(r"incomplete type|No such file|undefined type", built.stderr):
                return None
            pytest.fail(built.stderr)
        return subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()

    return run


@pytest.mark.parametrize("kind", list(STRUCTS), ids=lambda kind: kind.__name__)
def test_a_structure_is_laid_out_as_the_c_compiler_does(run_c, kind):
    struct, names = STRUCTS[kind], IN_C.get(kind, {})
    members = [names.get(field.name, field.name) for field in kind.fields]
    lines = [f'printf("%zu\\n", sizeof(struct {struct}));']
    lines += [f'printf("%zu\\n", offsetof(struct {struct}, {member}));' for member in members]
    printed = run_c("".join(lines))
    if printed is None:
        pytest.skip(f"the installed kernel headers do not know struct {struct}")
    assert [int(value) for value in printed] == [kind.SIZE, *(field.at for field in kind.fields)]


@pytest.mark.parametrize("kind", list(RUN), ids=lambda kind: kind.__name__)
def test_the_run_is_laid_out_as_the_c_compiler_does(run_c, kind):
    names = RUN[kind]
    at = 0 if kind in (kvm_run.KvmRun, kvm_run.IoExit) else kvm_run.EXIT_AT
    fields = [field for field in kind.fields if field.name in names]
    body = "".join(
        f'printf("%zu\\n", offsetof(struct kvm_run, {names[field.name] or field.name}));' for field in fields
    )
    printed = run_c(body)
    if printed is None:
        pytest.skip("there are no kernel headers")
    assert [int(value) for value in printed] == [at + field.at for field in fields]


@pytest.mark.parametrize(
    ("prefix", "numbers"),
    [
        ("KVM_", kvm.KvmIoctl), ("KVM_CAP_", kvm.KvmCap), ("KVM_EXIT_", kvm.KvmExit), ("KVM_MP_STATE_", kvm.MpState),
        ("KVM_VCPUEVENT_", kvm.VcpuEventFlag), ("KVM_IRQFD_FLAG_", kvm.IrqfdFlag), ("KVM_TDX_", kvm.TdxCommand),
        ("KVM_IRQ_ROUTING_", kvm.IrqRoutingType), ("KVM_MSR_EXIT_REASON_", kvm.MsrExitReason),
        ("KVM_MEM_", kvm.MemorySlotFlag),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_numbers_are_the_headers(run_c, prefix, numbers):
    lines = [
        f'\n#ifdef {prefix}{n.name}\nprintf("{n.name} %lu\\n", (unsigned long)(unsigned)({prefix}{n.name}));\n#endif'
        for n in numbers
    ]
    printed = run_c("".join(lines))
    if printed is None:
        pytest.skip("there are no kernel headers")
    known = dict(zip(printed[::2], map(int, printed[1::2]), strict=True))
    assert known == {name: int(numbers[name]) for name in known}
    assert len(known) > len(numbers) // 2 or prefix in ("KVM_TDX_", "KVM_IRQ_ROUTING_")
