"""The host kernel as a whole: what boots on a platform and what /dev/kvm stands on."""

from typing import TYPE_CHECKING

from softtdx.hw import Platform
from softtdx.kvm.cpus import HostCpus
from softtdx.kvm.errors import KvmError
from softtdx.kvm.host_mm import HostMm
from softtdx.kvm.hotplug import Hotplug
from softtdx.kvm.memory import HostMemory
from softtdx.kvm.tdx_host import ModuleRelease, TdxHost

if TYPE_CHECKING:
    from softtdx.kvm.vm import Vm

__all__ = ["Host"]


class Host:
    """A booted kernel: memory, processors and, once it is enabled, TDX."""

    def __init__(self, platform: Platform) -> None:
        """Boot without TDX."""
        self.platform = platform
        self.memory = HostMemory(platform)
        self.cpus = HostCpus(platform)
        self.tdx: TdxHost | None = None
        self.vms: list[Vm] = []  # of all processes, as in the kernel's vm_list
        self.zombies: list[Vm] = []  # closed, and not yet at their end because the module refused something
        self.mm = HostMm(self, swap_pages=self.memory.total_pages)
        self.hotplug = Hotplug(self)

    def enable_tdx(self, release: ModuleRelease) -> TdxHost:
        """Load the TDX module and bring TDX up on every processor. TdxUnavailableError says what stood in the way."""
        if self.tdx is None:
            tdx = TdxHost(self.platform, self.memory, self.cpus)
            tdx.enable(release)
            self.tdx = tdx
        return self.tdx

    def reap(self) -> int:
        """End the VMs that could not end when they were closed, and get back pages that the module kept.

        Returns how many VMs and pages remain. Each close of a VM does this, as does the background reclaim.
        """
        for vm in list(self.zombies):
            try:
                vm.end()
            except KvmError:
                continue
            self.zombies.remove(vm)
        return len(self.zombies) + (self.tdx.reap() if self.tdx is not None else 0)

    def kexec(self) -> None:
        """Hand the machine to another kernel now, TDs or not: all VMs are stopped, the module is shut down.

        Every page that was under a private KeyID is overwritten by MOVDIR64B, so that the next kernel meets neither a
        TD's data nor an integrity error. Descriptors of the VMs stay with their processes, and answer EIO.
        """
        for vm in list(self.vms):
            vm.stop()
        if self.tdx is not None:
            self.tdx.shut_down_module()
        for vm in list(self.vms):
            vm.close()
        if self.tdx is not None:
            self.reap()
            self.tdx.clear_memory()
            self.tdx = None

    def disable_tdx(self) -> None:
        """Take TDX down, as before the machine is handed to another kernel (kexec). EBUSY while a TD has a KeyID."""
        if self.tdx is not None:
            self.reap()
            self.tdx.shut_down()
            self.tdx = None
