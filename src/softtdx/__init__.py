"""Intel TDX in software.

The house, top floor first; each floor uses only those below it, and the two walls are crossed only as written:

    cli                    what people touch
    vmm                    QEMU's part: machine, payloads, devices, hypercall services
    kvm                    the host kernel's part: TDX bring-up, ioctl surface, MMU, run loop
    ════ wall 1: SEAMCALL. Only registers and physical memory cross it; kvm never imports module ════
    module                 the TDX module: host leaves, guest leaves, VM-exit policy, S-EPT, PAMT, measurement
    seamldr                the SEAM loader: verifies and installs the module
    ════ wall 2: the instruction set. module and seamldr use only what SEAM-mode code may use ════
    hw                     platform, logical processors, modes, MSRs, CPUID, SEAM, KeyIDs, report key
    _silicon               Rust: DRAM, MKTME-i, the interpreter, page walks, VMX non-root operation
    abi, attest, errors    beside all: numbers and layouts; quotes, PKI, verification
"""

from softtdx.errors import SoftTdxError as SoftTdxError

__version__ = "0.1.0"
