"""The TDVMCALLs that KVM leaves to the VMM: MapGPA, GetQuote, SetupEventNotifyInterrupt, GetTdVmCallInfo."""

from softtdx.abi.ghci import VmcallLeaf, VmcallStatus
from softtdx.abi.kvm import HC_MAP_GPA_RANGE, MAP_GPA_RANGE_ENCRYPTED, MEMORY_ATTRIBUTE_PRIVATE, KvmCap
from softtdx.attest.getquote import GetQuote
from softtdx.kvm import KvmError, Vm
from softtdx.kvm.memory import PAGE
from softtdx.kvm.uapi import HypercallExit, TdxExit
from softtdx.vmm.errors import MachineError

__all__ = ["GuestSharedMemory", "HypercallServices"]

_EINVAL = 22
_MSI_ADDRESS = 0xFEE0_0000


class GuestSharedMemory:
    """The shared memory of a VM, by GPA without the shared bit. MachineError where there is none."""

    def __init__(self, vm: Vm) -> None:
        """Of this VM."""
        self._vm = vm
        vm.enable_cap(KvmCap.EXIT_HYPERCALL, 1 << HC_MAP_GPA_RANGE)

    def read(self, gpa: int, size: int) -> bytes:
        """`size` bytes from `gpa`."""
        return self._vm.mm.read(self._hva(gpa, size), size)

    def write(self, gpa: int, data: bytes) -> None:
        """The bytes to `gpa`."""
        self._vm.mm.write(self._hva(gpa, len(data)), data)

    def _hva(self, gpa: int, size: int) -> int:
        slot = self._vm.memslots.find(gpa)
        if slot is None or gpa + size > slot.end or not self._vm.private.all_shared(gpa, gpa + size):
            raise MachineError(f"GPA {gpa:#x}+{size:#x} is not shared memory of the guest")
        return slot.hva(gpa)


class HypercallServices:
    """Answers KVM_EXIT_HYPERCALL and KVM_EXIT_TDX of one VM."""

    def __init__(self, vm: Vm, get_quote: GetQuote | None) -> None:
        """`get_quote` serves GetQuote; without one the guest is told that there is no such service."""
        self._vm = vm
        self._get_quote = get_quote
        self._memory = GuestSharedMemory(vm)
        self.event_notify_vector: int | None = None
        self._event_notify_apic = 0

    def hypercall(self, request: HypercallExit) -> None:
        """KVM_HC_MAP_GPA_RANGE: convert, and give back the memory behind the other alias."""
        if request.nr != HC_MAP_GPA_RANGE:
            request.ret = _EINVAL
            return
        gpa, pages, attributes = request.args[:3]
        private = bool(attributes & MAP_GPA_RANGE_ENCRYPTED)
        try:
            self._convert(gpa, pages * PAGE, private)
        except KvmError as error:
            request.ret = error.errno or _EINVAL

    def _convert(self, gpa: int, size: int, private: bool) -> None:
        vm = self._vm
        at = gpa
        while at < gpa + size:
            slot = vm.memslots.find(at)
            if slot is None:
                raise KvmError(_EINVAL, f"MapGPA of {at:#x}, where the machine has no memory")
            at = slot.end
        vm.set_memory_attributes(gpa, size, MEMORY_ATTRIBUTE_PRIVATE if private else 0)
        at = gpa
        while at < gpa + size:
            slot = vm.memslots.find(at)
            assert slot is not None
            end = min(slot.end, gpa + size)
            if private and vm.mm.backing(slot.hva(at)) == PAGE:  # a hugetlb page cannot be given up in parts
                vm.mm.discard(slot.hva(at), end - at)
            elif slot.guest_memfd is not None:
                slot.guest_memfd.punch_hole(slot.file_offset(at), end - at)
            at = end

    def tdx(self, request: TdxExit, apic_id: int = 0) -> None:
        """GetQuote and its companions, asked by the vCPU with that APIC id."""
        if request.nr == VmcallLeaf.GET_QUOTE and self._get_quote is not None:
            gpa, size = request.data[:2]
            request.ret = self._get_quote.call(self._memory, gpa, size, self._notify)
            if not self._get_quote.threaded:
                # Served before the call returns, so that a run does not depend on how fast this machine signs.
                self._get_quote.run_pending()
        elif request.nr == VmcallLeaf.SETUP_EVENT_NOTIFY_INTERRUPT:
            self.event_notify_vector, self._event_notify_apic = request.data[0], apic_id
            request.ret = VmcallStatus.SUCCESS
        elif request.nr == VmcallLeaf.GET_TDVMCALL_INFO:
            request.ret = VmcallStatus.SUCCESS
            request.answer_info(int(self._get_quote is not None))

    def close(self) -> None:
        """Answer what is in flight, and take no more."""
        if self._get_quote is not None:
            self._get_quote.close()

    def _notify(self) -> None:
        """The event-notify interrupt, to the vCPU that asked for it; none without a vector or local APICs."""
        if self.event_notify_vector is None or not self._vm.irqchip:
            return
        apic = self._event_notify_apic
        address = _MSI_ADDRESS | (apic & 0xFF) << 12 | apic >> 8 << 5
        self._vm.signal_msi(address, self.event_notify_vector)
