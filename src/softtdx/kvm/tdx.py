"""A TD as KVM manages it: its ioctls, its secure EPT and its end (arch/x86/kvm/vmx/tdx.c).

Life: KVM_TDX_INIT_VM takes a KeyID and makes TDR and TDCS; INIT_VCPU, INIT_MEM_REGION (tdx_vcpu.py); FINALIZE_VM; then
it runs. Its end, whatever was reached: vCPUs flushed, VPFLUSHDONE, CACHE.WB on every package, KEY.FREEID; then every
page is reclaimed, the TDR last.
"""

import errno
from collections.abc import Callable
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING

from softtdx.abi.fields import table
from softtdx.abi.kvm import TdxCommand
from softtdx.abi.leaves import SeamcallLeaf as Leaf
from softtdx.abi.status import Status, status_of
from softtdx.abi.structs import Attributes as TdAttributes
from softtdx.abi.structs import ConfigFlags, TdParams
from softtdx.abi.vmcs import EPTP_MT_WB, EPTP_WALK_4, EPTP_WALK_5
from softtdx.kvm import seamcalls as sc
from softtdx.kvm.ept import Ept
from softtdx.kvm.errors import KvmError, SeamcallError
from softtdx.kvm.mirror import SecureEpt
from softtdx.kvm.tdx_host import SysInfo
from softtdx.kvm.uapi import CpuidEntry, TdxCapabilities, TdxInitVm
from softtdx.kvm.vcpu import Vcpu
from softtdx.kvm.x86_ops import VcpuOps, VmOps

if TYPE_CHECKING:
    from softtdx.kvm.vm import Vm

__all__ = ["TdState", "TdxVm", "capabilities"]

_SUPPORTED_ATTRIBUTES = TdAttributes.DEBUG | TdAttributes.SEPT_VE_DISABLE | TdAttributes.PKS | TdAttributes.MIGRATABLE
_SUPPORTED_XFAM = 0x3  # the state that the simulated processor keeps: x87 and SSE
_USER_TDVMCALLS = 1 << 0 | 1 << 1  # GetQuote, SetupEventNotifyInterrupt: they go to user space
_TSC_UNIT = 25_000_000
_TSC_LIMITS = range(4, 401)
_ADDRESS_LEAF = 0x8000_0008
_GPA_BITS = 0xFF << 16  # of EAX of that leaf: how user space chooses the GPA width
_TSX_EBX, _WAITPKG_ECX = 1 << 4 | 1 << 11, 1 << 5  # of leaf 7
_LEVELS_OF_52_BITS = 5
_SHARED_BIT = {4: 1 << 47, 5: 1 << 51}


class TdState(Enum):
    """How far a TD has come."""

    UNINITIALIZED = "created"
    INITIALIZED = "initialised"
    RUNNABLE = "runnable"


def capabilities(info: SysInfo) -> TdxCapabilities:
    """KVM_TDX_CAPABILITIES: what the module offers and this KVM supports."""
    cpuid = tuple(
        CpuidEntry(
            row.leaf,
            row.subleaf,
            row.eax | _GPA_BITS if row.leaf == _ADDRESS_LEAF else row.eax,
            row.ebx & ~_TSX_EBX if (row.leaf, row.subleaf) == (7, 0) else row.ebx,
            row.ecx & ~_WAITPKG_ECX if (row.leaf, row.subleaf) == (7, 0) else row.ecx,
            row.edx,
        )
        for row in info.cpuid_config
    )
    return TdxCapabilities(
        user_tdvmcallinfo=(_USER_TDVMCALLS, 0),
        supported_attrs=_SUPPORTED_ATTRIBUTES & info.attributes_fixed0 | info.attributes_fixed1,
        supported_xfam=_SUPPORTED_XFAM & info.xfam_fixed0 | info.xfam_fixed1,
        cpuid=cpuid,
    )


def _is_unsupported(entry: CpuidEntry) -> bool:
    """TSX and WAITPKG: features that need MSRs which this KVM does not switch for a TD."""
    return (entry.function, entry.index) == (7, 0) and bool(entry.ebx & _TSX_EBX or entry.ecx & _WAITPKG_ECX)


class TdxVm(VmOps):
    """The TDX half of a VM."""

    has_private_memory = True
    max_vcpus = 256  # more than there are processors makes no sense on hardware, here it is allowed

    def __init__(self, vm: "Vm") -> None:
        """KVM_CREATE_VM of type KVM_X86_TDX_VM: nothing of TDX is used yet."""
        super().__init__(vm)
        tdx = vm.host.tdx
        assert tdx is not None
        self.tdx = tdx
        self.state = TdState.UNINITIALIZED
        self.hkid: int | None = None
        self.tdr: int | None = None
        self.tdcs: list[int] = []
        self.attributes = 0
        self.xfam = 0
        self.levels = 4
        self.secure: SecureEpt
        self._flushed = False

    @property
    def shared_bit(self) -> int:
        """GPA bit 47 or 51; 0 before KVM_TDX_INIT_VM."""
        return _SHARED_BIT[self.levels] if self.state is not TdState.UNINITIALIZED else 0

    @property
    def secure_ept(self) -> SecureEpt | None:
        """The S-EPT's mirror, between KVM_TDX_INIT_VM and the loss of the KeyID."""
        gone = self.state is TdState.UNINITIALIZED or self.hkid is None or self.vm.closed
        return None if gone else self.secure

    def vcpu_create(self, vcpu: Vcpu) -> VcpuOps:
        """KVM_CREATE_VCPU: EIO before KVM_TDX_INIT_VM, as in the kernel.

        Linux also wants a local APIC in the kernel (EINVAL). Here a TD may do without, so that its HLT goes to user
        space.
        """
        from softtdx.kvm.tdx_vcpu import TdxVcpu

        if self.state is TdState.UNINITIALIZED:
            raise KvmError(errno.EIO, "a vCPU before KVM_TDX_INIT_VM")
        return TdxVcpu(vcpu)

    # --- KVM_MEMORY_ENCRYPT_OP
    def memory_encrypt_op(self, command: int, argument: object) -> object:
        """The KVM_TDX_* commands of a VM. EINVAL for one that does not exist."""
        if command == TdxCommand.CAPABILITIES:
            return capabilities(self.tdx.sysinfo)
        if command == TdxCommand.INIT_VM and isinstance(argument, TdxInitVm):
            self._init_vm(argument)
            return None
        if command == TdxCommand.FINALIZE_VM:
            self._finalize()
            return None
        raise KvmError(errno.EINVAL, f"KVM_MEMORY_ENCRYPT_OP {command} on a TD with {type(argument).__name__}")

    def _init_vm(self, params: TdxInitVm) -> None:
        if self.state is not TdState.UNINITIALIZED:
            raise KvmError(errno.EINVAL, "KVM_TDX_INIT_VM was done before")
        td_params, levels = self._td_params(params)
        memory, cpus = self.vm.host.memory, self.vm.host.cpus
        self.hkid = self.tdx.alloc_keyid()
        try:
            tdr = self._page()
            with cpus.run() as lp:
                try:
                    sc.mng_create(lp, tdr, self.hkid)
                except KvmError:
                    memory.free(tdr)
                    raise
                self.tdr = tdr
                memory.give_to_tdx(tdr, "TDR")
                for leader in cpus.package_leaders():
                    cpus.call_on(leader, lambda cpu: sc.mng_key_config(cpu, tdr))
                for _ in range(self.tdx.sysinfo.tdcs_pages):
                    self.tdcs.append(self.give(lambda page: sc.mng_addcx(lp, tdr, page), "TDCS"))
                params_pa = memory.alloc(zero=True)
                try:
                    memory.write(params_pa, bytes(td_params.view))
                    regs = sc.mng_init(lp, tdr, params_pa)
                finally:
                    memory.free(params_pa)
                if regs.rax:
                    code = errno.EINVAL if status_of(regs.rax) is Status.OPERAND_INVALID else errno.EIO
                    raise SeamcallError(code, Leaf.MNG_INIT, regs.rax, {"RCX": regs.rcx})
        except KvmError:
            try:
                self.release()
                self._reclaim_control_pages()
            except KvmError:
                self.vm.mark_dead()  # its end tries again
            raise
        self.levels = levels
        self.attributes, self.xfam = td_params.attributes, td_params.xfam
        self.state = TdState.INITIALIZED
        self.vm.memslots.max_gpa = self.shared_bit
        self.vm.ept = Ept(memory, levels=levels, shared_bit=self.shared_bit)
        self.secure = SecureEpt(memory, tdr, levels, self.vm.kick_all, self.vm.mark_dead)

    def _td_params(self, init: TdxInitVm) -> tuple[TdParams, int]:
        caps, info = capabilities(self.tdx.sysinfo), self.tdx.sysinfo
        if init.attributes & ~caps.supported_attrs:
            raise KvmError(errno.EINVAL, f"TD attributes {init.attributes:#x}, supported are {caps.supported_attrs:#x}")
        if init.xfam & ~caps.supported_xfam:
            raise KvmError(errno.EINVAL, f"XFAM {init.xfam:#x}, supported is {caps.supported_xfam:#x}")
        for name in ("mrconfigid", "mrowner", "mrownerconfig"):
            if len(getattr(init, name)) != 48:
                raise KvmError(errno.EINVAL, f"{name} has {len(getattr(init, name))} bytes, not 48")
        params = TdParams()
        chosen = {(entry.function, entry.index): entry for entry in init.cpuid}
        width = next((e.eax >> 16 & 0xFF for e in init.cpuid if e.function == _ADDRESS_LEAF), 0)
        if width not in (0, 48, 52):
            raise KvmError(errno.EINVAL, f"{width} guest-physical address bits; 48 or 52 are possible")
        levels = _LEVELS_OF_52_BITS if width == 52 else 4
        configurable = {(row.leaf, row.subleaf) for row in info.cpuid_config} | {(_ADDRESS_LEAF, None)}
        for entry in init.cpuid:
            if (entry.function, entry.index) not in configurable or _is_unsupported(entry):
                raise KvmError(errno.EINVAL, f"CPUID {entry.function:#x}, {entry.index} cannot be chosen for a TD")
        for slot, row in zip(params.cpuid_config, info.cpuid_config, strict=False):
            choice = chosen.get((row.leaf, row.subleaf))
            if choice is not None:
                eax = choice.eax & ~_GPA_BITS if row.leaf == _ADDRESS_LEAF else choice.eax
                values = (eax, choice.ebx, choice.ecx, choice.edx)
                masks = (row.eax, row.ebx, row.ecx, row.edx)
                slot.eax, slot.ebx, slot.ecx, slot.edx = (v & m for v, m in zip(values, masks, strict=True))
        ticks = round(self.vm.tsc_khz * 1000 / _TSC_UNIT)
        if ticks not in _TSC_LIMITS:
            raise KvmError(errno.EINVAL, f"a TD cannot have a TSC of {ticks * _TSC_UNIT} Hz")
        params.attributes, params.xfam = init.attributes | info.attributes_fixed1, init.xfam | info.xfam_fixed1
        params.max_vcpus = min(info.max_vcpus_per_td, self.max_vcpus)
        params.eptp_controls = EPTP_MT_WB | (EPTP_WALK_5 if levels == 5 else EPTP_WALK_4)
        params.config_flags = ConfigFlags.NO_RBP_MOD | (ConfigFlags.GPAW_52 if levels == 5 else 0)
        params.tsc_frequency = ticks
        params.mrconfigid, params.mrowner, params.mrownerconfig = init.mrconfigid, init.mrowner, init.mrownerconfig
        return params, levels

    def _finalize(self) -> None:
        if self.state is not TdState.INITIALIZED:
            raise KvmError(errno.EINVAL, "KVM_TDX_FINALIZE_VM before KVM_TDX_INIT_VM, or twice")
        with self.vm.host.cpus.run() as lp:
            sc.mr_finalize(lp, self.require_tdr())
        self.state = TdState.RUNNABLE

    # --- pages of the module
    def require_tdr(self) -> int:
        """The TDR page. EINVAL before KVM_TDX_INIT_VM."""
        if self.tdr is None:
            raise KvmError(errno.EINVAL, "the TD is not initialised")
        return self.tdr

    def _page(self) -> int:
        return self.vm.host.memory.alloc()

    def give(self, hand_over: Callable[[int], None], use: str) -> int:
        """A page that the SEAMCALL `hand_over` makes the module's; freed again when it fails."""
        memory = self.vm.host.memory
        page = memory.alloc()
        try:
            hand_over(page)
        except KvmError:
            memory.free(page)
            raise
        memory.give_to_tdx(page, use)
        return page

    def zap_private(self, start: int, end: int) -> None:
        """Remove what is mapped in the range; KVM_BUG_ON if the module refuses."""
        if self.secure_ept is None:
            return
        with self.vm.host.cpus.run() as lp:
            try:
                self.secure.zap(lp, start, end)
            except KvmError:
                self.vm.mark_dead()
                raise

    def migrate_private(self, start: int, end: int, within: tuple[int, int] | None) -> int:
        """BLOCK, TRACK and RELOCATE of what is mapped in the range."""
        from softtdx.kvm.page_moves import migrate

        if self.secure_ept is None:
            return 0
        with self.vm.host.cpus.run() as lp:
            return migrate(self.vm, lp, self.secure, start, end, within)

    def collapse_private(self, base: int) -> bool:
        """RELOCATE into one block, where the pages are not in one, and PROMOTE."""
        from softtdx.kvm.page_moves import collapse

        if self.secure_ept is None:
            return False
        with self.vm.host.cpus.run() as lp:
            return collapse(self.vm, lp, self.secure, base)

    @cached_property
    def tsc(self) -> tuple[int, int]:
        """TSC_OFFSET and TSC_MULTIPLIER (48 fraction bits) of the TD."""
        return self.read_td_field("TSC_OFFSET"), self.read_td_field("TSC_MULTIPLIER")

    def read_td_field(self, name: str, index: int = 0) -> int:
        """A TD-scope metadata field by name (TDH.MNG.RD)."""
        with self.vm.host.cpus.run() as lp:
            return sc.mng_rd(lp, self.require_tdr(), table("td")[name].field_id + index)

    # --- the end
    def release(self) -> None:
        """Give the KeyID back (tdx_mmu_release_hkid): no vCPU is on a processor any more.

        After a KvmError it can be called again, and goes on where it stopped.
        """
        if self.hkid is None:
            return
        cpus, tdr = self.vm.host.cpus, self.tdr
        if tdr is not None and not self.tdx.gone:
            with cpus.run() as lp:
                if not self._flushed:
                    sc.mng_vpflushdone(lp, tdr)
                    self._flushed = True
                for leader in cpus.package_leaders():
                    cpus.call_on(leader, sc.phymem_cache_wb)
                sc.mng_key_freeid(lp, tdr)
        self.tdx.free_keyid(self.hkid)
        self.hkid = None

    def destroy(self) -> None:
        """Reclaim the TD's memory and S-EPT, then TDCS, then TDR."""
        if self.state is not TdState.UNINITIALIZED:
            with self.vm.host.cpus.run() as lp:
                self.secure.reclaim(lp, self.tdx.reclaim_page)
        self._reclaim_control_pages()
        self.state = TdState.UNINITIALIZED

    def _reclaim_control_pages(self) -> None:
        for page in self.tdcs:
            self.reclaim_page(page)
        self.tdcs.clear()
        if self.tdr is not None:
            self.reclaim_page(self.tdr, tdr=True)
            self.tdr = None

    def reclaim_page(self, page: int, *, tdr: bool = False) -> None:
        """PHYMEM.PAGE.RECLAIM and free, of a page that is not the TD's memory."""
        with self.vm.host.cpus.run() as lp:
            if self.tdx.reclaim_page(lp, page, tdr=tdr):
                self.vm.host.memory.free(page)
