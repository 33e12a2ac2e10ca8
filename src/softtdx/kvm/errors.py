"""What a KVM ioctl fails with: an errno, and for a SEAMCALL that failed the status the module gave."""

import os
from collections.abc import Mapping

from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.status import Status, describe, status_of

__all__ = ["KvmError", "SeamcallError"]


class KvmError(OSError):
    """An ioctl failed. `errno` is the kernel's; `hw_error` what KVM leaves in struct kvm_tdx_cmd.hw_error."""

    hw_error: int = 0

    def __init__(self, code: int, what: str) -> None:
        """`code` is an errno, `what` says which rule was broken."""
        super().__init__(code, f"{what} ({os.strerror(code)})")


class SeamcallError(KvmError):
    """A SEAMCALL returned an error that KVM did not expect or could not get over (-EIO in the kernel)."""

    def __init__(self, code: int, leaf: SeamcallLeaf, rax: int, outputs: Mapping[str, int] | None = None) -> None:
        """`outputs`: registers that say more of this error."""
        detail = "".join(f", {name} {value:#x}" for name, value in (outputs or {}).items())
        super().__init__(code, f"SEAMCALL {leaf.mnemonic} failed: {describe(rax)}{detail}")
        self.leaf = leaf
        self.hw_error = rax
        self.status: Status = status_of(rax)
