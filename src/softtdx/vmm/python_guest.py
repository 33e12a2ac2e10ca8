"""Guests written in Python: a function is a vCPU's program.

    def guest(td: Td) -> None:
        print(td.tdcall(rax=TdcallLeaf.VP_INFO).r9)

    run_python_guest(host, guest)

The vCPU runs a stub (native/guests/pyguest.S) that executes one instruction at a time on the function's behalf, so
TDCALL, CPUID, RDMSR, IN, OUT, HLT, loads and stores take the path they take in any TD: interpreter, VM exit, module,
host. What would be an exception in the guest arrives as a Python exception: #VE as VeError, #GP as GpError, #PF as
PfError.

Memory is identity mapped; `td.shared(gpa)` is the address of the shared alias. RAM has to be accepted before use.
"""

import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from softtdx._silicon import PAYLOADS, Core
from softtdx.abi.exits import GP_VECTOR, PF_VECTOR, VE_VECTOR, exception_name
from softtdx.abi.ghci import STANDARD_MASK, VmcallLeaf
from softtdx.abi.leaves import TdcallLeaf, rax_for
from softtdx.abi.status import Status
from softtdx.hw import LogicalProcessor, Registers
from softtdx.hw.registers import GPR_NAMES
from softtdx.kvm import Host
from softtdx.vmm.errors import GuestError, MachineError
from softtdx.vmm.launcher import FIRMWARE_BASE
from softtdx.vmm.machine import End, Machine, MachineConfig, MachineResult

__all__ = ["GpError", "GuestException", "PfError", "PythonGuest", "Td", "VeError", "run_python_guest"]

Program = Callable[["Td"], None]

MAX_VCPUS = 24
_ESCAPE = bytes.fromhex("0fb90500584454")
_HOOK_AT = 3
_HOOKS = 256
_SNIPPETS = FIRMWARE_BASE + 0x5000
_SNIPPET_SIZE = 16
_VECTORS = FIRMWARE_BASE + 0x6000
_VECTORS_END = _VECTORS + 32 * 16
_SHARED_WINDOW = 128 << 39
_FRAME = struct.Struct("<7Q")  # vector, error code, RIP, CS, RFLAGS, RSP, SS
_RFLAGS_RESERVED = 2
_RBP, _RDI = 5, 7
_BUFFER = FIRMWARE_BASE  # the boot info page: nobody reads it here
_BUFFER_SIZE = 4096
_SNIPPET_NAMES = (
    "tdcall", "vmcall", "cpuid", "rdmsr", "wrmsr", "in1", "in2", "in4", "out1", "out2", "out4", "hlt",
    "copy", "load", "store", "rdtsc", "spin",
)  # fmt: skip
_SNIPPET = {name: _SNIPPETS + i * _SNIPPET_SIZE for i, name in enumerate(_SNIPPET_NAMES)}


class GuestException(Exception):  # noqa: N818  an exception of the processor, not of Python
    """An exception that the processor delivered to the guest, at the instruction that a Td method executed."""

    def __init__(self, vector: int, error_code: int, rip: int, cr2: int) -> None:
        """`cr2` means something for #PF only."""
        super().__init__(f"{exception_name(vector)} error code {error_code:#x} at {rip:#x}, CR2 {cr2:#x}")
        self.vector, self.error_code, self.rip, self.cr2 = vector, error_code, rip, cr2


class VeError(GuestException):
    """#VE: `Td.ve_info` says why."""


class GpError(GuestException):
    """#GP."""


class PfError(GuestException):
    """#PF."""


_KINDS: dict[int, type[GuestException]] = {VE_VECTOR: VeError, GP_VECTOR: GpError, PF_VECTOR: PfError}


class _StoppedError(BaseException):
    """The machine ends: unwinds the guest function's thread."""


class Td:
    """What a guest function sees: one vCPU, instruction by instruction. Register values are unsigned integers."""

    def __init__(self, vcpu: int) -> None:
        """`vcpu` is the index."""
        self.vcpu = vcpu
        self.is_td = False
        self.gpa_width = 0
        self.last_instruction = 0  # RIP of the instruction that a method of this class executed last
        self.escape = b""  # the instruction that gives control back to the function: see `execute`
        self._lp: LogicalProcessor | None = None
        self._base_rsp = 0
        self._buffer_mapped = False
        self._hand_over: Callable[[], None]

    # --- instructions of a TD
    def tdcall(self, leaf: int = 0, version: int = 0, **operands: int) -> Registers:
        """TDCALL; returns all registers, RAX the status. The leaf may also be given as rax=."""
        registers = {"rax": rax_for(leaf, version)} | operands
        return self._execute("tdcall", Registers(**registers))

    def tdvmcall(self, leaf: int, r12: int = 0, r13: int = 0, r14: int = 0, r15: int = 0) -> Registers:
        """TDG.VP.VMCALL of a standard leaf; R10 is the VMM's status, R11 to R15 its results."""
        operands = {"r11": leaf, "r12": r12, "r13": r13, "r14": r14, "r15": r15}
        return self.tdcall(TdcallLeaf.VP_VMCALL, rcx=STANDARD_MASK, r10=0, **operands)

    def ve_info(self) -> Registers:
        """TDG.VP.VEINFO.GET: RCX exit reason, RDX qualification, R8 GLA, R9 GPA, R10 instruction length."""
        return self.tdcall(TdcallLeaf.VP_VEINFO_GET)

    def hold(self, **registers: int) -> Registers:
        """Exit to the host with these registers, and return all of them as they are afterwards.

        In a TD by TDG.VP.VMCALL<GetTdVmCallInfo>, which shows the host R10 to R15 only; in an ordinary VM by CPUID.
        """
        if self.is_td:
            leaf = VmcallLeaf.GET_TDVMCALL_INFO
            return self.tdcall(TdcallLeaf.VP_VMCALL, rcx=STANDARD_MASK, r10=0, r11=leaf, **registers)
        return self._execute("cpuid", Registers(**registers))

    def accept(self, gpa: int, level: int = 0) -> int:
        """TDG.MEM.PAGE.ACCEPT of one page, once more while the host is at it; returns the status."""
        while True:
            status = self.tdcall(TdcallLeaf.MEM_PAGE_ACCEPT, rcx=gpa | level).rax
            if status & ~0xFFFF_FFFF != Status.OPERAND_BUSY:
                return status

    # --- instructions of any guest
    def cpuid(self, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
        """CPUID: EAX, EBX, ECX, EDX."""
        regs = self._execute("cpuid", Registers(rax=leaf, rcx=subleaf))
        return regs.rax, regs.rbx, regs.rcx, regs.rdx

    def rdmsr(self, msr: int) -> int:
        """RDMSR."""
        regs = self._execute("rdmsr", Registers(rcx=msr))
        return regs.rdx << 32 | regs.rax

    def wrmsr(self, msr: int, value: int) -> None:
        """WRMSR."""
        self._execute("wrmsr", Registers(rcx=msr, rax=value & 0xFFFF_FFFF, rdx=value >> 32))

    def inb(self, port: int) -> int:
        """IN of one byte."""
        return self._execute("in1", Registers(rdx=port)).rax & 0xFF

    def inw(self, port: int) -> int:
        """IN of two bytes."""
        return self._execute("in2", Registers(rdx=port)).rax & 0xFFFF

    def inl(self, port: int) -> int:
        """IN of four bytes."""
        return self._execute("in4", Registers(rdx=port)).rax & 0xFFFF_FFFF

    def outb(self, port: int, value: int) -> None:
        """OUT of one byte."""
        self._execute("out1", Registers(rdx=port, rax=value))

    def outw(self, port: int, value: int) -> None:
        """OUT of two bytes."""
        self._execute("out2", Registers(rdx=port, rax=value))

    def outl(self, port: int, value: int) -> None:
        """OUT of four bytes."""
        self._execute("out4", Registers(rdx=port, rax=value))

    def hlt(self) -> None:
        """HLT."""
        self._execute("hlt", Registers())

    def rdtsc(self) -> int:
        """RDTSC."""
        regs = self._execute("rdtsc", Registers())
        return regs.rdx << 32 | regs.rax

    def execute(self, address: int, **registers: int) -> Registers:
        """Machine code of the guest's own, which the function wrote there; it must end with the bytes of `escape`."""
        return self._execute_at(address, Registers(**registers))

    # --- memory
    def load(self, address: int) -> int:
        """One load of 8 bytes."""
        return self._execute("load", Registers(rsi=address)).rax

    def store(self, address: int, value: int) -> None:
        """One store of 8 bytes."""
        self._execute("store", Registers(rdi=address, rax=value))

    def read(self, address: int, size: int) -> bytes:
        """REP MOVSB from `address`."""
        parts = []
        while size > 0:
            count = min(size, _BUFFER_SIZE)
            self._execute("copy", Registers(rsi=address, rdi=_BUFFER, rcx=count))
            parts.append(self._core().guest_read(_BUFFER, count))
            address, size = address + count, size - count
        return b"".join(parts)

    def write(self, address: int, data: bytes) -> None:
        """REP MOVSB to `address`."""
        for at in range(0, len(data), _BUFFER_SIZE):
            part = data[at : at + _BUFFER_SIZE]
            if not self._buffer_mapped:  # in an ordinary VM it is not there before its first access
                self.store(_BUFFER, 0)
                self._buffer_mapped = True
            self._core().guest_write(_BUFFER, part)
            self._execute("copy", Registers(rsi=_BUFFER, rdi=address + at, rcx=len(part)))

    def shared(self, gpa: int) -> int:
        """The address of the shared alias of a GPA; in an ordinary VM it is the same memory."""
        return gpa + _SHARED_WINDOW

    @property
    def shared_bit(self) -> int:
        """The shared bit of this guest's GPAs, 0 in an ordinary VM."""
        return 1 << self.gpa_width - 1 if self.is_td else 0

    def print(self, text: str) -> None:
        """Send text to the serial port, as hypercalls in a TD."""
        for byte in text.encode():
            if self.is_td:
                self.tdvmcall(VmcallLeaf.IO, 1, 1, 0x3F8, byte)
            else:
                self.outb(0x3F8, byte)

    @property
    def processor(self) -> LogicalProcessor:
        """The logical processor that the vCPU stands on, between two of its instructions."""
        self._core()
        assert self._lp is not None
        return self._lp

    # --- how an instruction is executed
    def _core(self) -> Core:
        if self._lp is None:
            raise _StoppedError
        return self._lp.core

    def _execute(self, snippet: str, registers: Registers) -> Registers:
        return self._execute_at(_SNIPPET[snippet], registers)

    def _execute_at(self, address: int, registers: Registers) -> Registers:
        core = self._core()
        core.set_gprs(registers.values())
        core.set_live("rsp", self._base_rsp)
        core.set_live("rflags", _RFLAGS_RESERVED)
        self.last_instruction = address
        core.set_live("rip", self.last_instruction)
        self._hand_over()
        core = self._core()
        rip = core.live_state()["rip"]
        if _VECTORS <= rip < _VECTORS_END:
            self._raise()
        return Registers(**dict(zip(GPR_NAMES, core.gprs(), strict=True)) | {"rsp": self._base_rsp})

    def _raise(self) -> None:
        core = self._core()
        vector, error, rip, _, _, _, _ = _FRAME.unpack(core.guest_read(core.live_state()["rsp"], _FRAME.size))
        raise _KINDS.get(vector, GuestException)(vector, error & 0xFFFF_FFFF, rip, core.cr2)


class _Vcpu:
    """One vCPU's program: its thread, and the baton between it and the thread that runs the vCPU."""

    def __init__(self, index: int, program: Program) -> None:
        self.td = Td(index)
        self.td._hand_over = self._to_guest
        self.error: BaseException | None = None
        self.done = False
        self._program = program
        self._mine = threading.Semaphore(0)  # the program may go on
        self._theirs = threading.Semaphore(0)  # the guest may go on
        self._thread: threading.Thread | None = None

    def escaped(self, lp: LogicalProcessor) -> None:
        """The guest executed the escape instruction: let the program say what comes next."""
        td = self.td
        td._lp = lp
        if self._thread is None:
            state = lp.core.live_state()
            td._base_rsp = state["rsp"]
            td.is_td, td.gpa_width = bool(lp.core.gpr(_RDI)), lp.core.gpr(_RBP)
            self._thread = threading.Thread(target=self._main, name=f"python-guest{td.vcpu}", daemon=True)
            self._thread.start()
        elif not self.done:
            self._mine.release()
        if not self.done:
            self._theirs.acquire()
        if self.done:
            self._rest(lp)

    def stop(self) -> None:
        """The machine is gone: end the program if it still waits for an instruction to complete."""
        self.td._lp = None
        self._mine.release()
        if self._thread is not None:
            self._thread.join(1)

    def _to_guest(self) -> None:
        self._theirs.release()
        self._mine.acquire()

    def _main(self) -> None:
        try:
            self._program(self.td)
        except _StoppedError:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.done = True
            self._theirs.release()

    def _rest(self, lp: LogicalProcessor) -> None:
        """The program has returned: the vCPU halts."""
        core = lp.core
        core.set_gprs(Registers(rcx=STANDARD_MASK, r11=VmcallLeaf.HLT, r12=1).values())
        core.set_live("rsp", self.td._base_rsp)
        core.set_live("rip", _SNIPPET["tdcall" if self.td.is_td else "hlt"])


class PythonGuest:
    """A machine whose vCPUs run Python functions, one each. Use it in a with statement, or close it."""

    def __init__(
        self,
        host: Host,
        programs: Program | Sequence[Program],
        config: MachineConfig | None = None,
        *,
        machine: Machine | None = None,
    ) -> None:
        """Build the machine. `config.vcpus` is the number of functions; MachineError for more than 24."""
        functions = list(programs) if isinstance(programs, Sequence) else [programs]
        base = config or MachineConfig(memory=1 << 20)
        if not 1 <= len(functions) <= MAX_VCPUS:
            raise MachineError(f"{len(functions)} Python guests on one machine; 1 to {MAX_VCPUS} are possible")
        self.host = host
        self.machine = machine or Machine(host, _with_vcpus(base, len(functions)))
        self._vcpus = [_Vcpu(i, function) for i, function in enumerate(functions)]
        self._hook = self._claim_hook()
        escape = _ESCAPE[:_HOOK_AT] + bytes([self._hook]) + _ESCAPE[_HOOK_AT + 1 :]
        for vcpu in self._vcpus:
            vcpu.td.escape = escape
        image = PAYLOADS["pyguest"].replace(_ESCAPE, escape)
        try:
            self.machine.load_contents([(FIRMWARE_BASE, image)])
        except BaseException:
            self.close()
            raise

    def run(self) -> MachineResult:
        """Run until every function has returned or the machine ends; raises what a function raised."""
        result = self.machine.run()
        for vcpu in self._vcpus:
            vcpu.stop()
        for vcpu in self._vcpus:
            if vcpu.error is not None:
                raise vcpu.error
        if result.end in (End.CRASH, End.FATAL):
            raise GuestError(f"the guest ended by {result.end.value}: {result.message}")
        return result

    def close(self) -> None:
        """Tear the machine down."""
        self.host.platform.release_escape(self._hook)
        self.machine.close()

    def __enter__(self) -> "PythonGuest":
        """Itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    def _claim_hook(self) -> int:
        platform = self.host.platform
        hook = next((n for n in range(_HOOKS) if n not in platform.escapes), None)
        if hook is None:
            raise MachineError(f"{_HOOKS} machines with Python guests run already")
        platform.escapes[hook] = self._escaped
        for lp in platform.lps:
            self.host.cpus.call_on(lp.index, lambda cpu: cpu.core.allow_escape(True))
        return hook

    def _escaped(self, lp: LogicalProcessor) -> None:
        index = next(v.vcpu_id for v in self.machine.vcpus if v.running_on is lp)
        self._vcpus[index].escaped(lp)


def run_python_guest(
    host: Host, programs: Program | Sequence[Program], config: MachineConfig | None = None
) -> MachineResult:
    """Build a machine, run the functions on its vCPUs, tear it down."""
    with PythonGuest(host, programs, config) as guest:
        return guest.run()


def _with_vcpus(config: MachineConfig, vcpus: int) -> MachineConfig:
    return replace(config, vcpus=vcpus)
