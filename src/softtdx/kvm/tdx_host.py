"""Bringing TDX up: arch/x86/virt/vmx/tdx of the kernel, and the loading of the module before it.

The steps, in the only order there is: SEAMLDR.INSTALL on every processor; TDH.SYS.INIT; TDH.SYS.LP.INIT on every
processor; metadata; TDMRs over all memory of the page allocator, PAMTs carved from it; TDH.SYS.CONFIG with the global
KeyID; TDH.SYS.KEY.CONFIG on every package; TDH.SYS.TDMR.INIT until every TDMR is complete.
"""

import errno
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

from softtdx.abi.fields import table
from softtdx.abi.leaves import SeamldrLeaf
from softtdx.abi.status import SeamldrStatus
from softtdx.abi.structs import SeamldrParams
from softtdx.errors import SoftTdxError
from softtdx.hw import LogicalProcessor, Platform, Registers
from softtdx.kvm import seamcalls as sc
from softtdx.kvm.cpus import HostCpus
from softtdx.kvm.errors import KvmError
from softtdx.kvm.memory import PAGE, HostMemory
from softtdx.kvm.tdmr import Tdmr, build_tdmrs

__all__ = ["ModuleRelease", "SysInfo", "TdxHost", "TdxUnavailableError"]

_MAX_MODULE_PAGES = 496
_NO_SUBLEAF = 0xFFFF_FFFF


class TdxUnavailableError(SoftTdxError):
    """TDX cannot be brought up on this machine, with the step that failed."""


class ModuleRelease(Protocol):
    """A TDX module as it is shipped: the image and its SEAM_SIGSTRUCT."""

    @property
    def image(self) -> bytes:
        """The module's pages."""

    @property
    def sigstruct(self) -> bytes:
        """SEAM_SIGSTRUCT, 2048 bytes."""


@dataclass(frozen=True)
class CpuidConfig:
    """A CPUID leaf that the host may configure, and which bits of it."""

    leaf: int
    subleaf: int | None
    eax: int
    ebx: int
    ecx: int
    edx: int


@dataclass(frozen=True)
class SysInfo:
    """The module's global metadata that the kernel uses (TDH.SYS.RD)."""

    major: int
    minor: int
    features0: int
    cmrs: tuple[tuple[int, int], ...]
    max_tdmrs: int
    max_reserved_per_tdmr: int
    pamt_entry_size: tuple[int, int, int]  # 4K, 2M, 1G
    tdcs_pages: int
    tdvps_pages: int
    attributes_fixed0: int
    attributes_fixed1: int
    xfam_fixed0: int
    xfam_fixed1: int
    max_vcpus_per_td: int
    cpuid_config: tuple[CpuidConfig, ...]


@dataclass
class BootReport:
    """What bringing TDX up took: (step, seconds)."""

    steps: list[tuple[str, float]] = field(default_factory=list)


@dataclass(eq=False)
class _Kept:
    """A page of `pages` times 4 KiB that the module would not give back; `reclaimed`: only its flush is missing."""

    page: int
    pages: int
    tdr: bool
    reclaimed: bool = False


class TdxHost:
    """TDX on this host: the module's facts, the KeyIDs that are free, and the PAMTs."""

    def __init__(self, platform: Platform, memory: HostMemory, cpus: HostCpus) -> None:
        """Not yet enabled."""
        self.platform = platform
        self.memory = memory
        self.cpus = cpus
        self.report = BootReport()
        self.sysinfo: SysInfo
        self.tdmrs: list[Tdmr] = []
        self.global_keyid = 0
        self._free_keyids: list[int] = []
        self._lps_initialized: set[int] = set()
        self._unreclaimed: list[_Kept] = []
        self.gone = False

    # --- KeyIDs
    def alloc_keyid(self) -> int:
        """A private KeyID for a TD. ENOSPC when every one is in use."""
        if not self._free_keyids:
            raise KvmError(errno.ENOSPC, "no TDX private KeyID is free: too many TDs run at once")
        return self._free_keyids.pop(0)

    def free_keyid(self, keyid: int) -> None:
        """The TD that had it is gone."""
        self._free_keyids.append(keyid)
        self._free_keyids.sort()

    @property
    def free_keyids(self) -> int:
        """How many TDs could still be created."""
        return len(self._free_keyids)

    @property
    def keyids_in_use(self) -> int:
        """How many TDs have one (nr_configured_hkid)."""
        return len(self.platform.description.private_keyids) - 1 - self.free_keyids

    # --- pages that the module would not give back
    def reclaim_page(self, lp: LogicalProcessor, page: int, pages: int = 1, *, tdr: bool = False) -> bool:
        """PHYMEM.PAGE.RECLAIM of a page of a TD that has ended; it is clean, and the caller's to free.

        False when the module keeps it: it is no longer the caller's, and `reap` tries again.
        """
        kept = _Kept(page, pages, tdr)
        if not self._reclaim(lp, kept):
            self._unreclaimed.append(kept)
            return False
        return True

    def _reclaim(self, lp: LogicalProcessor, kept: "_Kept") -> bool:
        try:
            if not kept.reclaimed and not self.gone and sc.phymem_page_reclaim(lp, kept.page).rax:
                return False
            kept.reclaimed = True
            if kept.tdr and not self.gone:
                # Its lines were written with the module's own KeyID.
                sc.phymem_page_wbinvd(lp, self.platform.description.keyed(kept.page, self.global_keyid))
        except KvmError:
            return False
        self.memory.take_from_tdx(kept.page, kept.pages)
        lp.zero_page(kept.page, kept.pages)  # MOVDIR64B: clears poison too
        return True

    def reap(self) -> int:
        """Try again to get back what the module kept, in the order in which it was asked for; returns what it keeps.

        A kernel lets such pages go for good. Here a TD's end may be begun again, so nothing is lost to one refusal.
        """
        if self._unreclaimed:
            with self.cpus.run() as lp:
                for kept in list(self._unreclaimed):
                    if self._reclaim(lp, kept):
                        self._unreclaimed.remove(kept)
                        self.memory.free(kept.page, kept.pages)
        return len(self._unreclaimed)

    # --- enabling
    def enable(self, release: ModuleRelease) -> None:
        """Do every step. TdxUnavailableError names the first that fails; a half-initialised module stays unusable."""
        self._require_all_processors()
        try:
            self._step("SEAM loader launched", self._launch_loader)
            self._step("TDX module installed", lambda: self._install(release))
            self._step("TDX module initialised", self._init_module)
            self._step("TDMRs and PAMTs configured", self._configure)
            self._step("memory handed to TDX", self._init_tdmrs)
        except KvmError as error:
            raise TdxUnavailableError(f"TDX cannot be enabled: {error.strerror}") from error
        private = self.platform.description.private_keyids
        self._free_keyids = list(private[1:])

    def shut_down(self) -> None:
        """SEAMLDR.SHUTDOWN on every processor, then clear the PAMTs: nothing is left under a private KeyID.

        KvmError(EBUSY) while a TD exists. Pages that a TD had leaked are recovered too: their owner is gone.
        """
        if self.keyids_in_use:
            raise KvmError(errno.EBUSY, "TDX cannot be shut down while a TD has a KeyID")
        self.shut_down_module()
        self.clear_memory()

    def shut_down_module(self) -> None:
        """SEAMLDR.SHUTDOWN on every processor, whatever TDs there are: `gone` from then on, and no SEAMCALL is made."""
        self._require_all_processors()
        for lp in reversed(self.cpus.lps):  # the processor that launched the loader comes last
            regs = self.cpus.call_on(lp.index, lambda cpu: cpu.seamcall(Registers(rax=SeamldrLeaf.SHUTDOWN)))
            if regs.rax:
                raise KvmError(errno.EIO, f"SEAMLDR.SHUTDOWN failed: {SeamldrStatus(regs.rax).name}")
        self.gone = True

    def clear_memory(self) -> None:
        """MOVDIR64B over every page that the module had and nobody else has: the PAMTs, and what TDs left."""
        pages = list(self.memory.leaked())
        with self.cpus.run() as lp:
            for page in pages:
                lp.zero_page(page)
        for page in pages:
            self.memory.take_from_tdx(page)
            self.memory.free(page)
        self._unreclaimed.clear()
        self.tdmrs.clear()

    def _require_all_processors(self) -> None:
        """The loader counts the processors of the machine: each must call it, and TDH.SYS.CONFIG waits for each."""
        offline = [lp.index for lp in self.cpus.lps if not self.cpus.is_online(lp.index)]
        if offline:
            raise TdxUnavailableError(f"processor {offline[0]} is offline; TDX needs all of them online: cpu_up it")

    def cpu_enable(self, index: int) -> None:
        """TDH.SYS.LP.INIT on a processor, once for as long as the module is loaded (tdx_cpu_enable)."""
        if index not in self._lps_initialized:
            self.cpus.call_on(index, sc.sys_lp_init)
            self._lps_initialized.add(index)

    def _step(self, name: str, action: "_Action") -> None:
        start = perf_counter()
        action()
        self.report.steps.append((name, perf_counter() - start))

    def _launch_loader(self) -> None:
        from softtdx.seamldr import launch_np_seamldr

        status = SeamldrStatus(launch_np_seamldr(self.platform))
        if status not in (SeamldrStatus.SUCCESS, SeamldrStatus.EMODBUSY):
            raise TdxUnavailableError(f"the NP-SEAMLDR refused to launch: {status.name}")

    def _install(self, release: ModuleRelease) -> None:
        memory = self.memory
        pages = -(-len(release.image) // PAGE)
        if not 0 < pages <= _MAX_MODULE_PAGES:
            raise TdxUnavailableError(
                f"the module image has {len(release.image)} bytes; the loader takes up to 1984 KiB"
            )
        image, sigstruct, params_pa = memory.alloc(pages, zero=True), memory.alloc(zero=True), memory.alloc(zero=True)
        try:
            memory.write(image, release.image)
            memory.write(sigstruct, release.sigstruct[:PAGE])
            params = SeamldrParams()
            params.sigstruct_pa, params.num_module_pages = sigstruct, pages
            params.module_pages = [image + i * PAGE if i < pages else 0 for i in range(_MAX_MODULE_PAGES)]
            memory.write(params_pa, bytes(params.view))
            for lp in self.cpus.lps:
                regs = self.cpus.call_on(lp.index, lambda cpu: cpu.seamcall(_seamldr_install(params_pa)))
                status = SeamldrStatus(regs.rax)
                if status is not SeamldrStatus.SUCCESS:
                    raise TdxUnavailableError(f"SEAMLDR.INSTALL failed on LP {lp.index}: {status.name}")
        finally:
            for pa, count in ((image, pages), (sigstruct, 1), (params_pa, 1)):
                memory.free(pa, count)

    def _init_module(self) -> None:
        with self.cpus.run() as lp:
            sc.sys_init(lp)
        for lp in self.cpus.lps:
            self.cpu_enable(lp.index)
        self.sysinfo = self._read_sysinfo()

    def _configure(self) -> None:
        self.tdmrs = build_tdmrs(self.memory, self.sysinfo)
        private = self.platform.description.private_keyids
        self.global_keyid = private[0]
        array = self.memory.alloc(zero=True)
        infos = self.memory.alloc(-(-len(self.tdmrs) * 512 // PAGE), zero=True)
        try:
            for i, tdmr in enumerate(self.tdmrs):
                self.memory.write(infos + i * 512, bytes(tdmr.info().view))
                self.memory.wr64(array + i * 8, infos + i * 512)
            with self.cpus.run() as lp:
                sc.sys_config(lp, array, len(self.tdmrs), self.global_keyid)
        finally:
            self.memory.free(array)
            self.memory.free(infos, -(-len(self.tdmrs) * 512 // PAGE))
        for leader in self.cpus.package_leaders():
            self.cpus.call_on(leader, sc.sys_key_config)

    def _init_tdmrs(self) -> None:
        with self.cpus.run() as lp:
            for tdmr in self.tdmrs:
                end = tdmr.base + tdmr.size
                while sc.sys_tdmr_init(lp, tdmr.base) < end:
                    self.cpus.yield_if_wanted(lp)

    def _read_sysinfo(self) -> SysInfo:
        fields = table("sys")
        with self.cpus.run() as lp:

            def rd(name: str, index: int = 0) -> int:
                return sc.sys_rd(lp, fields[name].field_id + index)

            cpuid = []
            for i in range(rd("NUM_CPUID_CONFIG")):
                leaf = rd("CPUID_CONFIG_LEAVES", i)
                low, high = rd("CPUID_CONFIG_VALUES", 2 * i), rd("CPUID_CONFIG_VALUES", 2 * i + 1)
                subleaf = None if leaf >> 32 == _NO_SUBLEAF else leaf >> 32
                cpuid.append(CpuidConfig(leaf & _U32, subleaf, low & _U32, low >> 32, high & _U32, high >> 32))
            return SysInfo(
                major=rd("MAJOR_VERSION"),
                minor=rd("MINOR_VERSION"),
                features0=rd("TDX_FEATURES0"),
                cmrs=tuple((rd("CMR_BASE", i), rd("CMR_SIZE", i)) for i in range(rd("NUM_CMRS"))),
                max_tdmrs=rd("MAX_TDMRS"),
                max_reserved_per_tdmr=rd("MAX_RESERVED_PER_TDMR"),
                pamt_entry_size=(rd("PAMT_4K_ENTRY_SIZE"), rd("PAMT_2M_ENTRY_SIZE"), rd("PAMT_1G_ENTRY_SIZE")),
                tdcs_pages=rd("TDCS_BASE_SIZE") // PAGE,
                tdvps_pages=rd("TDVPS_BASE_SIZE") // PAGE,
                attributes_fixed0=rd("ATTRIBUTES_FIXED0"),
                attributes_fixed1=rd("ATTRIBUTES_FIXED1"),
                xfam_fixed0=rd("XFAM_FIXED0"),
                xfam_fixed1=rd("XFAM_FIXED1"),
                max_vcpus_per_td=rd("MAX_VCPUS_PER_TD"),
                cpuid_config=tuple(cpuid),
            )


_U32 = 0xFFFF_FFFF


class _Action(Protocol):
    def __call__(self) -> None: ...


def _seamldr_install(params: int) -> Registers:
    return Registers(rax=SeamldrLeaf.INSTALL, rcx=params)
