"""The host kernel's part: what Linux's KVM and arch/x86/virt/vmx/tdx do.

Wall 1 lies below: this floor reaches the TDX module by SEAMCALL only. Reading order: `host` (what boots), `tdx_host`
and `tdmr` (bringing TDX up), `seamcalls`; `kvm`, `vm`, `vcpu` (the ioctl surface; `ioctl` and `ioctl_*` have it by
number, `eventfd` and `irq_routing` what it binds), `x86_ops` (the table of operations), `vmx`, `vmx_registers`,
`vmx_msrs`, `tdx`, `tdx_vcpu`, `td_debug`, `tdvmcall` (its two implementations); `mmu`, `memslots`, `ept`, `mirror`,
`guest_memfd`, `page_moves`, `mmu_notifier`, `dirty_log` (memory); `memory`, `cpus`, `mm`, `memfd`, `swap` and
`host_mm` with `khugepaged` and `numa`, `hotplug` (the rest of a kernel, as far as it is needed).
"""

from softtdx.kvm.errors import KvmError as KvmError
from softtdx.kvm.errors import SeamcallError as SeamcallError
from softtdx.kvm.host import Host as Host
from softtdx.kvm.kvm import Kvm as Kvm
from softtdx.kvm.tdx_host import TdxHost as TdxHost
from softtdx.kvm.tdx_host import TdxUnavailableError as TdxUnavailableError
from softtdx.kvm.vcpu import Vcpu as Vcpu
from softtdx.kvm.vm import Vm as Vm
