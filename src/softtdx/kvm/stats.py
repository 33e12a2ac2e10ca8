"""What KVM and TDX are doing: one sample of the host and of every VM on it (as /sys/kernel/debug/kvm has it)."""

from dataclasses import dataclass, field
from time import monotonic

from softtdx.kvm.host import Host
from softtdx.kvm.memory import PAGE
from softtdx.kvm.tdx import TdxVm
from softtdx.kvm.vm import Vm

__all__ = ["HostSample", "VmSample", "rate", "sample"]

_EXITS = "exits:"


@dataclass(frozen=True)
class VmSample:
    """One VM. Memory in 4 KiB pages; exits by reason since it was created."""

    kind: str
    state: str
    keyid: int | None
    vcpus: int
    in_guest: int
    private_pages: int
    huge_pages: int
    shared_pages: int
    table_pages: int
    conversions: int
    relocated: int
    promotions: int
    instructions: int
    exits: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class HostSample:
    """The host at one moment: `time` in seconds of the monotonic clock, counters since boot, memory in bytes."""

    time: float
    seamcalls: int
    keyids: int
    keyids_free: int
    pamt_bytes: int
    pamt_share: float  # of the machine's memory
    tdx_pages: dict[str, int]  # by use; the PAMTs are among them
    free_bytes: int
    vms: list[VmSample]


def sample(host: Host) -> HostSample:
    """Look at the host, without stopping anything."""
    tdx, memory = host.tdx, host.memory
    pages = dict(memory.tdx_pages())
    pamt = pages.get("PAMT", 0)
    return HostSample(
        time=monotonic(),
        seamcalls=host.platform.events.counts["seamcall"],
        keyids=len(host.platform.description.private_keyids) - 1 if tdx is not None else 0,
        keyids_free=tdx.free_keyids if tdx is not None else 0,
        pamt_bytes=pamt * PAGE,
        pamt_share=pamt / memory.total_pages,
        tdx_pages=pages,
        free_bytes=memory.free_pages * PAGE,
        vms=[_vm(vm) for vm in list(host.vms)],
    )


def _vm(vm: Vm) -> VmSample:
    ops, ept, stats = vm.ops, vm.ept, vm.stats.copy()
    td = ops if isinstance(ops, TdxVm) else None
    secure = getattr(td, "secure", None)  # there is none before KVM_TDX_INIT_VM
    vcpus = list(vm.vcpus.values())
    exits = {name.removeprefix(_EXITS): n for name, n in sorted(stats.items()) if name.startswith(_EXITS)}
    if td is None and not exits:
        exits = {"all": sum(vcpu.exits for vcpu in vcpus)}
    return VmSample(
        kind="TD" if td is not None else "VM",
        state="dead" if vm.dead else td.state.value if td is not None else "runnable",
        keyid=td.hkid if td is not None else None,
        vcpus=len(vcpus),
        in_guest=sum(vcpu.running_on is not None for vcpu in vcpus),
        private_pages=secure.mapped_pages if secure is not None else 0,
        huge_pages=secure.huge_pages if secure is not None else 0,
        shared_pages=ept.mapped if ept is not None else 0,
        table_pages=(secure.table_pages if secure is not None else 0) + (ept.table_pages if ept is not None else 0),
        conversions=stats["conversions"],
        relocated=stats["pages relocated"],
        promotions=stats["promotions"],
        instructions=sum(vcpu.instructions for vcpu in vcpus),
        exits=exits,
    )


def rate(before: int, after: int, seconds: float) -> float:
    """Events a second; 0 for no time."""
    return (after - before) / seconds if seconds > 0 else 0.0
