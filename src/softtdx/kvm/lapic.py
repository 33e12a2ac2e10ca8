"""The local APIC of a vCPU, in x2APIC mode (SDM vol. 3, 11.12; arch/x86/kvm/lapic.c).

The processor's virtual-APIC page holds what the guest touches without an exit: TPR, PPR, EOI, ISR, IRR, self-IPI. For
a TD that page is the module's. KVM keeps the rest here: the timer, LVT, ICR and ESR. An interrupt reaches the guest
through the posted-interrupt descriptor (SDM 30.6), whether it runs or not; for a TD there is no other way.
"""

from threading import Condition
from typing import TYPE_CHECKING, Final

from softtdx.abi.kvm import MpState
from softtdx.abi.msrs import Msr
from softtdx.hw import LogicalProcessor
from softtdx.kvm.memory import PAGE

if TYPE_CHECKING:
    from softtdx.kvm.vcpu import Vcpu

__all__ = ["APIC_BUS_HZ", "NOTIFICATION_VECTOR", "LocalApic", "deliver_msi"]

NOTIFICATION_VECTOR: Final = 0xF2
APIC_BUS_HZ: Final = 25_000_000
"""The APIC timer counts the core crystal clock, as CPUID 15H tells it (KVM_CAP_X86_APIC_BUS_CYCLES_NS)."""

_VERSION: Final = 0x0005_0014  # integrated APIC, LVT entries up to 5
_SIVR_RESET, _LVT_RESET = 0xFF, 1 << 16
_LVT_MASKED: Final = 1 << 16
_MODE_ONESHOT, _MODE_PERIODIC, _MODE_DEADLINE = 0, 1, 2
_ON: Final = 1 << 0  # outstanding notification, at byte 32 of the descriptor
_CONTROL: Final = 32
_FIXED, _LOWEST, _NMI = 0, 1, 4
_TO_DEST, _TO_SELF, _TO_ALL, _TO_OTHERS = range(4)
_BROADCAST: Final = 0xFFFF_FFFF
_FIRST_LEGAL_VECTOR: Final = 16
_ERROR_SEND_ILLEGAL: Final = 1 << 5
_POLL: Final = 0.05
_U32: Final = 0xFFFF_FFFF

_KEPT: Final[dict[int, int]] = {
    Msr.X2APIC_SIVR: _SIVR_RESET,
    Msr.X2APIC_LVT_CMCI: _LVT_RESET,
    Msr.X2APIC_LVT_TIMER: _LVT_RESET,
    Msr.X2APIC_LVT_THERMAL: _LVT_RESET,
    Msr.X2APIC_LVT_PMI: _LVT_RESET,
    Msr.X2APIC_LVT_LINT0: _LVT_RESET,
    Msr.X2APIC_LVT_LINT1: _LVT_RESET,
    Msr.X2APIC_LVT_ERROR: _LVT_RESET,
    Msr.X2APIC_INIT_COUNT: 0,
    Msr.X2APIC_DIV_CONF: 0,
}
"""Registers that are remembered: reset values."""


class LocalApic:
    """One vCPU's APIC. `post` and `wake` may come from any thread, the rest from the vCPU's own."""

    def __init__(self, vcpu: "Vcpu") -> None:
        """As after reset, enabled in x2APIC mode; its ID is the vCPU's."""
        self.vcpu = vcpu
        self.id = vcpu.vcpu_id
        self._memory = vcpu.vm.host.memory
        self._bus = vcpu.vm.host.platform.memory
        self.descriptor = self._memory.alloc(zero=True)
        self._registers = dict(_KEPT)
        self._icr = 0
        self._errors = 0  # ESR shows what a write to it latched
        self._error_latch = 0
        self._deadline: int | None = None  # when the timer fires, on the guest's TSC
        self._tsc_deadline = 0
        self._started = 0
        self.changed = Condition()

    def free(self) -> None:
        """Give the descriptor back."""
        self._memory.free(self.descriptor)

    # --- interrupts coming in
    def post(self, vector: int) -> None:
        """Make `vector` pending in the posted-interrupt descriptor and notify the processor if the vCPU runs."""
        self._set_bits(self.descriptor + vector // 64 * 8, 1 << vector % 64)
        if not self._set_bits(self.descriptor + _CONTROL, _ON) & _ON:
            lp = self.vcpu.in_guest
            if lp is not None:
                lp.core.posted_interrupt()
        self.wake()

    def wake(self) -> None:
        """Whoever waits in `block` looks again."""
        with self.changed:
            self.changed.notify_all()

    def _set_bits(self, pa: int, bits: int) -> int:
        """LOCK OR; returns the old value."""
        old = self._memory.rd64(pa)
        while (found := self._bus.cas64(pa, old, old | bits)) != old:
            old = found
        return old

    @property
    def posted(self) -> bool:
        """Whether the descriptor has an interrupt that the processor has not taken."""
        return bool(self._memory.rd64(self.descriptor + _CONTROL) & _ON)

    def posted_vectors(self) -> list[int]:
        """The vectors in the posted-interrupt descriptor."""
        bits = int.from_bytes(self._memory.read(self.descriptor, _CONTROL), "little")
        return [vector for vector in range(256) if bits >> vector & 1]

    # --- saved and restored by user space
    @property
    def kept(self) -> tuple[int, ...]:
        """The registers that this APIC remembers, as x2APIC MSRs."""
        return tuple(self._registers)

    def restore(self, registers: dict[int, int]) -> None:
        """Give the remembered registers these values, and start the timer anew."""
        self._registers.update(registers)
        self._deadline, self._tsc_deadline = None, 0
        if self._timer_mode() != _MODE_DEADLINE:
            self._start_count()

    # --- the guest's register accesses that exit
    def read(self, msr: int) -> int | None:
        """RDMSR of an x2APIC register or of IA32_TSC_DEADLINE; None for one that cannot be read."""
        if msr in self._registers:
            return self._registers[msr]
        if msr == Msr.X2APIC_APICID:
            return self.id
        if msr == Msr.X2APIC_VERSION:
            return _VERSION
        if msr == Msr.X2APIC_LDR:
            return self.logical_id
        if msr == Msr.X2APIC_ESR:
            return self._errors
        if msr == Msr.X2APIC_ICR:
            return self._icr
        if msr == Msr.X2APIC_CUR_COUNT:
            return self._current_count()
        if msr == Msr.TSC_DEADLINE:
            return self._tsc_deadline
        return None

    def write(self, msr: int, value: int) -> bool:
        """WRMSR; False for a register that is not there, is read-only, or for reserved bits."""
        if msr == Msr.X2APIC_ICR:
            self._icr = value
            return self._send(value)
        if msr == Msr.TSC_DEADLINE:
            if self._timer_mode() == _MODE_DEADLINE:
                self._tsc_deadline = value
                self._deadline = value or None
            return True
        if value >> 32:
            return False
        if msr == Msr.X2APIC_ESR:
            if value:
                return False
            self._errors, self._error_latch = self._error_latch, 0
            return True
        if msr not in self._registers:
            return False
        old_mode = self._timer_mode()
        self._registers[msr] = value
        if msr == Msr.X2APIC_LVT_TIMER and self._timer_mode() != old_mode:
            self._deadline, self._tsc_deadline = None, 0
        elif msr == Msr.X2APIC_INIT_COUNT and self._timer_mode() != _MODE_DEADLINE:
            self._start_count()
        return True

    @property
    def logical_id(self) -> int:
        """The logical x2APIC ID: cluster in bits 31:16, one bit of 15:0."""
        return self.id >> 4 << 16 | 1 << (self.id & 15)

    # --- interrupts going out
    def _send(self, icr: int) -> bool:
        vector, mode = icr & 0xFF, icr >> 8 & 7
        shorthand, dest, logical = icr >> 18 & 3, icr >> 32, bool(icr >> 11 & 1)
        if mode in (_FIXED, _LOWEST) and vector < _FIRST_LEGAL_VECTOR:
            self._error_latch |= _ERROR_SEND_ILLEGAL
            return True
        for apic in _apics(self.vcpu):
            if shorthand == _TO_SELF:
                chosen = apic is self
            elif shorthand in (_TO_ALL, _TO_OTHERS):
                chosen = shorthand == _TO_ALL or apic is not self
            else:
                chosen = apic.is_addressed(dest, logical=logical)
            if chosen:
                apic.accept(mode, vector)
                if mode == _LOWEST:
                    break
        return True

    def is_addressed(self, dest: int, *, logical: bool) -> bool:
        """Whether a message with this destination is for this APIC."""
        if dest == _BROADCAST:
            return True
        if logical:
            mine = self.logical_id
            return dest >> 16 == mine >> 16 and bool(dest & mine & 0xFFFF)
        return dest == self.id

    def accept(self, mode: int, vector: int) -> None:
        """Take a message of a delivery mode. INIT and SIPI do nothing: vCPUs start through the firmware's mailbox."""
        self.vcpu.vm.stats["interrupts posted"] += 1
        if mode == _NMI:
            self.vcpu.nmi()
        elif mode in (_FIXED, _LOWEST):
            self.post(vector)

    # --- the timer
    def _timer_mode(self) -> int:
        return self._registers[Msr.X2APIC_LVT_TIMER] >> 17 & 3

    def _ticks_per_count(self) -> int:
        """TSC ticks of one count: the bus clock divided by 2 to the power in the divide configuration."""
        code = self._registers[Msr.X2APIC_DIV_CONF]
        power = ((code & 3 | code >> 1 & 4) + 1) & 7
        return (self.vcpu.vm.host.platform.description.tsc_hz // APIC_BUS_HZ) << power

    def _start_count(self) -> None:
        count = self._registers[Msr.X2APIC_INIT_COUNT]
        self._started = self.vcpu.ops.guest_tsc()
        self._deadline = self._started + count * self._ticks_per_count() if count else None

    def _current_count(self) -> int:
        if self._deadline is None or self._timer_mode() == _MODE_DEADLINE:
            return 0
        left = max(0, self._deadline - self.vcpu.ops.guest_tsc())
        return min(-(-left // self._ticks_per_count()), _U32)

    def _expire(self, now: int) -> bool:
        """Fire if the deadline has passed."""
        deadline = self._deadline
        if deadline is None or now < deadline:
            return False
        self._deadline, self._tsc_deadline = None, 0
        lvt = self._registers[Msr.X2APIC_LVT_TIMER]
        if self._timer_mode() == _MODE_PERIODIC:
            period = max(self._registers[Msr.X2APIC_INIT_COUNT] * self._ticks_per_count(), 1)
            self._deadline = deadline + ((now - deadline) // period + 1) * period
        if not lvt & _LVT_MASKED:
            self.vcpu.vm.stats["timer interrupts"] += 1
            self.post(lvt & 0xFF)
        return True

    # --- around each entry
    def enter(self, lp: LogicalProcessor) -> None:
        """Just before a VM entry: arm the processor's timer, and have it take what was posted meanwhile."""
        if self._deadline is not None:
            self._expire(self.vcpu.ops.guest_tsc(lp))
        deadline = self._deadline
        lp.core.set_host_timer(None if deadline is None else self.vcpu.ops.host_tsc(deadline))
        if self.posted:
            lp.core.posted_interrupt()

    def leave(self, lp: LogicalProcessor) -> None:
        """Just after a VM exit."""
        lp.core.set_host_timer(None)

    # --- HLT
    def block(self) -> bool:
        """The vCPU halted: wait until an interrupt is there for it. False when a kick came first (kvm_vcpu_block)."""
        vcpu = self.vcpu
        while True:
            if vcpu.kick_pending or vcpu.vm.dead:
                return False
            if self.posted or vcpu.nmi_pending or vcpu.ops.interrupt_waits():
                return True
            left = None
            if self._deadline is not None:
                now = vcpu.ops.guest_tsc()
                if self._expire(now):
                    return True
                left = self._deadline - now
            self._idle(left)

    def wait_for_kick(self) -> bool:
        """The vCPU was not started: wait until it is (True) or a kick comes (False)."""
        vcpu = self.vcpu
        while not vcpu.kick_pending and not vcpu.vm.dead:
            if vcpu.mp_state is MpState.RUNNABLE:
                return True
            self._sleep(None)
        return False

    def _idle(self, ticks: int | None) -> None:
        """Let time pass until something happens, at most the `ticks` up to the timer."""
        vcpu = self.vcpu
        description = vcpu.vm.host.platform.description
        seconds = None if ticks is None else ticks / description.tsc_hz
        if description.tsc_real:
            self._sleep(seconds)
            return
        # A virtual TSC stands still while no instruction executes: the time that passes is given to it.
        if ticks is not None and not vcpu.vm.idle_in_real_time:
            vcpu.ops.advance_tsc(ticks)
            return
        slept = self._sleep(seconds)
        vcpu.ops.advance_tsc(round(slept * description.tsc_hz) + 1)

    def _sleep(self, seconds: float | None) -> float:
        from time import perf_counter

        start = perf_counter()
        with self.changed:
            if not self.vcpu.kick_pending and not self.posted and not self.vcpu.nmi_pending:
                self.changed.wait(_POLL if seconds is None else min(seconds, _POLL))
        return perf_counter() - start


def _apics(vcpu: "Vcpu") -> list[LocalApic]:
    return [other.apic for other in list(vcpu.vm.vcpus.values()) if other.apic is not None]


def deliver_msi(apics: list[LocalApic], address: int, data: int) -> bool:
    """A message-signalled interrupt (SDM vol. 3, 11.11), destination bits 14:8 in address bits 11:5. True if taken."""
    if address >> 20 != 0xFEE:
        return False
    dest = address >> 12 & 0xFF | (address >> 5 & 0x7F) << 8
    logical = bool(address >> 2 & 1)
    if dest == 0xFF:
        dest = _BROADCAST
    mode, vector = data >> 8 & 7, data & 0xFF
    taken = False
    for apic in apics:
        if apic.is_addressed(dest, logical=logical):
            apic.accept(mode, vector)
            taken = True
            if mode == _LOWEST:
                break
    return taken


assert _CONTROL + 8 <= PAGE
