"""KVM_SET_GSI_ROUTING: which message-signalled interrupts a GSI stands for. (Kernel: virt/kvm/irqchip.c.)"""

import errno
from collections.abc import Sequence

from softtdx.abi.kvm import MAX_IRQ_ROUTES, IrqRoutingType
from softtdx.abi.kvm_structs import IrqRoutingEntry
from softtdx.kvm.errors import KvmError

__all__ = ["IrqRouting"]


class IrqRouting:
    """The table of one VM, whose I/O APIC and PIC are user space's: every route is an MSI."""

    def __init__(self) -> None:
        """No GSI leads anywhere."""
        self._routes: dict[int, list[tuple[int, int]]] = {}

    def set(self, entries: Sequence[IrqRoutingEntry], *, wide_apic_ids: bool) -> None:
        """Replace the table. EINVAL for what cannot be routed; the old table stays then."""
        if len(entries) > MAX_IRQ_ROUTES:
            raise KvmError(errno.EINVAL, f"{len(entries)} interrupt routes; there may be {MAX_IRQ_ROUTES}")
        routes: dict[int, list[tuple[int, int]]] = {}
        for entry in entries:
            if entry.type != IrqRoutingType.MSI or entry.flags or entry.gsi >= MAX_IRQ_ROUTES:
                raise KvmError(
                    errno.EINVAL, f"route of type {entry.type} with flags {entry.flags:#x} for GSI {entry.gsi}"
                )
            if wide_apic_ids and entry.address_hi & 0xFF:
                raise KvmError(errno.EINVAL, f"MSI address {entry.address_hi:#x} has low bits of a 32-bit APIC ID set")
            routes.setdefault(entry.gsi, []).append((entry.address_hi << 32 | entry.address_lo, entry.data))
        self._routes = routes

    def of(self, gsi: int) -> list[tuple[int, int]]:
        """The (address, data) of a GSI's messages."""
        return self._routes.get(gsi, [])
