"""Attacks on a running vCPU: its registers, its time, what it believes of the processor, what interrupts it."""

from dataclasses import replace

from softtdx.abi import vmcs
from softtdx.abi.exits import GP_VECTOR, ExitReason
from softtdx.abi.fields import table
from softtdx.abi.leaves import SeamcallLeaf as Leaf
from softtdx.abi.msrs import Msr
from softtdx.attack.lab import Observation, Outcome, attack
from softtdx.attack.scene import LINE, PAGE, SECRET, SECRET_GPA, SPARE_GPA, Scene, Seen, Victim, say
from softtdx.hw import LogicalProcessor, Registers
from softtdx.vmm.python_guest import GuestException

__all__: list[str] = []

_DEBUG_TD = "a TD with ATTRIBUTES.DEBUG, which the host may look into and change"
_STATE = "an ordinary VM, whose registers the host keeps"
_U64 = (1 << 64) - 1
_VALID, _ERROR_CODE, _HARDWARE_EXCEPTION = 1 << 31, 1 << 11, 3 << 8
_RDRAND = 1 << 30  # CPUID(1).ECX
_HALF_AN_HOUR = 1 << 42  # TSC ticks, about
_LOW, _HIGH = (int.from_bytes(SECRET[at : at + 8], "little") for at in (0, 8))
_ESCAPED = 0x10000  # the guest stopped where its Python program takes over
_INSTRUCTION = 16  # the guest program's instructions lie this far apart
_PRIMARY = "Primary Processor-Based VM-Execution Controls"


def _vp_wr(scene: Scene, victim: Victim, field: int, value: int, mask: int = _U64) -> str:
    regs = scene.seamcall(Leaf.VP_WR, rcx=victim.tdvpr(), rdx=field, r8=value, r9=mask)
    return say(Leaf.VP_WR, regs)


@attack(
    "mem-rd",
    "control",
    title="The host reads TD memory by the debug interface",
    promise="TDH.MEM.RD is for debug TDs: TD_NON_DEBUG.",
    expected=Outcome.STOPPED,
    unprotected=_DEBUG_TD,
)
def mem_rd(scene: Scene) -> Observation:
    """TDH.MEM.RD on the secret's GPA, eight bytes a call."""
    scene.debug_td = True

    def act(victim: Victim) -> Seen:
        tdr = victim.tdx().require_tdr()
        results = [scene.seamcall(Leaf.MEM_RD, rcx=SECRET_GPA + at, rdx=tdr) for at in range(0, LINE, 8)]
        return Seen(b"".join(regs.r8.to_bytes(8, "little") for regs in results), say(Leaf.MEM_RD, results[0]))

    return scene.under_attack(act)


@attack(
    "mem-wr",
    "control",
    title="The host writes TD memory by the debug interface",
    promise="TDH.MEM.WR is for debug TDs: TD_NON_DEBUG.",
    expected=Outcome.STOPPED,
    unprotected=_DEBUG_TD,
)
def mem_wr(scene: Scene) -> Observation:
    """TDH.MEM.WR of zero on the first eight bytes of the secret."""
    scene.debug_td = True

    def act(victim: Victim) -> Seen:
        regs = scene.seamcall(Leaf.MEM_WR, rcx=SECRET_GPA, rdx=victim.tdx().require_tdr(), r8=0)
        return Seen(note=say(Leaf.MEM_WR, regs))

    return scene.under_attack(act)


@attack(
    "vp-rd-registers",
    "control",
    title="The host reads a vCPU's registers by TDH.VP.RD",
    promise="Guest registers are readable in debug TDs only: METADATA_FIELD_NOT_READABLE.",
    expected=Outcome.STOPPED,
    unprotected=_DEBUG_TD,
)
def vp_rd_registers(scene: Scene) -> Observation:
    """The guest exits with a part of the secret in RSI and RDI; the host asks for both fields."""
    scene.debug_td = True
    learned, said = b"", ""

    def act(victim: Victim) -> Seen:
        def look(_: LogicalProcessor) -> None:
            nonlocal learned, said
            for name in ("RSI", "RDI"):
                regs = scene.seamcall(Leaf.VP_RD, rcx=victim.tdvpr(), rdx=table("vp")[name].field_id)
                learned += regs.r8.to_bytes(8, "little")
                said = say(Leaf.VP_RD, regs)

        victim.outside(look, rsi=_LOW, rdi=_HIGH)
        return Seen(learned, said)

    return scene.under_attack(act)


@attack(
    "vp-wr-register",
    "control",
    title="The host changes a vCPU's register by TDH.VP.WR",
    promise="Guest registers are writable in debug TDs only: METADATA_FIELD_NOT_WRITABLE.",
    expected=Outcome.STOPPED,
    unprotected=_DEBUG_TD,
)
def vp_wr_register(scene: Scene) -> Observation:
    """The guest keeps a value in RSI over an exit; the host writes zero there."""
    scene.debug_td = True
    said = ""

    def act(victim: Victim) -> Seen:
        def change(_: LogicalProcessor) -> None:
            nonlocal said
            said = _vp_wr(scene, victim, table("vp")["RSI"].field_id, 0)

        regs = victim.outside(change, rsi=_LOW)
        victim.td.store(SECRET_GPA, regs.rsi)
        return Seen(note=said)

    return scene.under_attack(act)


@attack(
    "vp-wr-rip",
    "control",
    title="The host redirects a vCPU to other code of the guest",
    promise="The guest state of the TD VMCS is writable in debug TDs only: METADATA_FIELD_NOT_WRITABLE.",
    expected=Outcome.STOPPED,
    unprotected=_DEBUG_TD,
)
def vp_wr_rip(scene: Scene) -> Observation:
    """Code reuse without a bug: the guest is out with RDI at its secret, and is resumed at a store through RDI."""
    scene.debug_td = True
    said = ""

    def act(victim: Victim) -> Seen:
        def redirect(_: LogicalProcessor) -> None:
            nonlocal said
            said = _vp_wr(scene, victim, table("vmcs")["Guest RIP"].field_id, store_at)

        victim.td.store(SECRET_GPA, _LOW)
        store_at = victim.td.last_instruction
        victim.outside(redirect, rdi=SECRET_GPA)
        return Seen(note=said)

    return scene.under_attack(act)


def _words(at: int) -> tuple[int, int]:
    """Sixteen bytes of the secret as two words."""
    return int.from_bytes(SECRET[at : at + 8], "little"), int.from_bytes(SECRET[at + 8 : at + 16], "little")


_U32 = (1 << 32) - 1
_MMX, _DEBUG = b"\x0f\x6f\x07\x0f\x6f\x4f\x08", b"\x0f\x23\xc0\x0f\x23\xcb"  # to MM0 and MM1; to DR0 and DR1
_X87_IN_FXSAVE, _X87_SIZE = 32, 16


def _fill_registers(victim: Victim) -> None:
    """A piece of the secret in each kind of register that VMX does not switch by itself."""
    td = victim.td
    victim.touch(SPARE_GPA)
    td.write(SPARE_GPA, (_MMX + td.escape).ljust(LINE, b"\xcc") + _DEBUG + td.escape)
    td.execute(SPARE_GPA, rdi=SECRET_GPA + 32)
    td.execute(SPARE_GPA + LINE, rax=_words(48)[0], rbx=_words(48)[1])
    star, rest = _words(64)
    td.wrmsr(Msr.STAR, star)
    td.wrmsr(Msr.KERNEL_GS_BASE, rest & _U32)
    td.wrmsr(Msr.LSTAR, rest >> 32)
    td.processor.core.set_xmm(5, int.from_bytes(SECRET[16:32], "little"))


def _look_at_registers(scene: Scene, lp: LogicalProcessor) -> dict[str, bytes]:
    """The processor's register file, as the host's own instructions read it."""
    core, page = lp.core, scene.host.memory.alloc(zero=True)
    core.xsave(page, 1)
    x87 = scene.memory.read(page + _X87_IN_FXSAVE, 2 * _X87_SIZE)
    scene.host.memory.free(page)
    msrs = core.rdmsr(Msr.STAR) or 0, core.rdmsr(Msr.KERNEL_GS_BASE) or 0, core.rdmsr(Msr.LSTAR) or 0
    return {
        "general registers": b"".join(value.to_bytes(8, "little") for value in core.gprs()),
        "XMM": b"".join(core.xmm(i).to_bytes(16, "little") for i in range(16)),
        "x87": x87[:8] + x87[_X87_SIZE : _X87_SIZE + 8],
        "debug registers": b"".join(value.to_bytes(8, "little") for value in core.dr),
        "MSRs": b"".join(value.to_bytes(size, "little") for value, size in zip(msrs, (8, 4, 4), strict=True)),
    }


@attack(
    "register-harvest",
    "control",
    title="The host looks at every register at an exit",
    promise="TD exit clears every register but those that the TD passes by TDG.VP.VMCALL.",
    expected=Outcome.STOPPED,
    unprotected=_STATE,
)
def register_harvest(scene: Scene) -> Observation:
    """The guest exits with a piece of its secret in registers of each kind; the host reads all of them.

    RSI and RDI, XMM5, MM0 and MM1, DR0 and DR1, IA32_STAR, IA32_LSTAR and IA32_KERNEL_GS_BASE; and in a TD what
    SEAMRET left in the registers of the SEAMCALL.
    """
    looks: dict[str, bytes] = {}

    def act(victim: Victim) -> Seen:
        def look(lp: LogicalProcessor) -> None:
            looks.update(_look_at_registers(scene, lp))
            if scene.is_td:
                regs = victim.tdx_vcpu().regs
                looks["SEAMRET"] = b"".join(value.to_bytes(8, "little") for value in regs.values())
                looks["SEAMRET"] += b"".join(value.to_bytes(16, "little") for value in regs.xmm)

        _fill_registers(victim)
        victim.outside(look, rsi=_LOW, rdi=_HIGH)
        if not scene.protected:
            kept = [kind for kind, data in looks.items() if not Seen(data).has_secret]
            assert not kept, f"an ordinary VM leaves nothing in its {kept}"
        return Seen(b"".join(looks.values()), f"looked at {', '.join(looks)}")

    return scene.under_attack(act)


@attack(
    "xmm-harvest",
    "control",
    title="The host looks at the vector registers at an exit",
    promise="TD exit saves the TD's extended state and puts it into its initial state.",
    expected=Outcome.STOPPED,
    unprotected="an ordinary VM, whose vector registers stay in the processor until the host needs them",
)
def xmm_harvest(scene: Scene) -> Observation:
    """The guest holds a key in XMM0, as AES code does. The host reads XMM0 to XMM15 after the exit."""
    learned = b""

    def act(victim: Victim) -> Seen:
        def look(lp: LogicalProcessor) -> None:
            nonlocal learned
            learned = b"".join(lp.core.xmm(i).to_bytes(16, "little") for i in range(16))

        victim.td.processor.core.set_xmm(0, int.from_bytes(SECRET[:16], "little"))
        victim.outside(look)
        return Seen(learned, "looked at XMM0 to XMM15")

    return scene.under_attack(act)


@attack(
    "inject-exception",
    "control",
    title="The host injects an exception that never happened",
    promise="The event-injection fields of the TD VMCS are not the host's: METADATA_FIELD_NOT_WRITABLE.",
    expected=Outcome.STOPPED,
    unprotected="an ordinary VM, whose host sets the VM-entry interruption information",
)
def inject_exception(scene: Scene) -> Observation:
    """The guest falls back to a default key if an instruction is missing, which it tells by #GP. The host sends #GP."""
    said = ""

    def act(victim: Victim) -> Seen:
        event = _VALID | _ERROR_CODE | _HARDWARE_EXCEPTION | GP_VECTOR

        def inject(lp: LogicalProcessor) -> None:
            nonlocal said
            if scene.is_td:
                said = _vp_wr(scene, victim, table("vmcs")["VM-entry interruption information"].field_id, event)
                return
            lp.core.vmwrite(vmcs.ENTRY_INTERRUPTION_INFO, event)
            lp.core.vmwrite(vmcs.ENTRY_EXCEPTION_ERROR_CODE, 0)

        try:
            victim.outside(inject)
        except GuestException as exception:
            victim.td.write(SECRET_GPA, bytes(LINE))
            return Seen(note=f"the guest believed {exception}")
        return Seen(note=said)

    return scene.under_attack(act)


@attack(
    "single-step",
    "control",
    title="The host single-steps the guest and follows its branches",
    promise="The monitor trap flag of a TD VMCS is not the host's, and a TD exit shows no RIP.",
    expected=Outcome.STOPPED,
    unprotected="an ordinary VM, whose host sets the monitor trap flag",
)
def single_step(scene: Scene) -> Observation:
    """The guest's code takes one path for a one of its key and another for a zero. The host traces RIP."""
    said, trace = "", []

    def act(victim: Victim) -> Seen:
        ops, td = victim.machine.vcpus[0].ops, victim.td
        answer = ops.handle_exit

        def step(lp: LogicalProcessor) -> bool:
            if lp.core.vmread(vmcs.EXIT_REASON) & 0xFFFF == ExitReason.MONITOR_TRAP_FLAG:
                trace.append(lp.core.vmread(vmcs.GUEST_RIP))
                return True
            return answer(lp)

        def arm(lp: LogicalProcessor) -> None:
            nonlocal said
            flag = int(vmcs.Primary.MONITOR_TRAP_FLAG)
            if scene.is_td:
                said = _vp_wr(scene, victim, table("vmcs")[_PRIMARY].field_id, flag, flag)
                return
            lp.core.vmwrite(vmcs.PROCESSOR_CONTROLS, lp.core.vmread(vmcs.PROCESSOR_CONTROLS) | flag)
            ops.handle_exit = step  # type: ignore[method-assign]

        victim.touch(SPARE_GPA)
        one, zero = _paths(victim)
        victim.outside(arm)
        for bit in range(128):
            if SECRET[bit // 8] >> bit % 8 & 1:
                td.store(SPARE_GPA, 1)
            else:
                td.load(SPARE_GPA)
        at = [rip - rip % _INSTRUCTION for rip in trace]
        taken = [rip == one for rip in at if rip in (one, zero)]
        key = sum(bit << i for i, bit in enumerate(taken[:128])).to_bytes(16, "little")
        return Seen(key, said or f"{len(trace)} steps were seen")

    return scene.under_attack(act)


def _paths(victim: Victim) -> tuple[int, int]:
    """Where the guest's two branches lie, which the host knows: it has the guest's program."""
    victim.td.store(SPARE_GPA, 0)
    one = victim.td.last_instruction
    victim.td.load(SPARE_GPA)
    return one, victim.td.last_instruction


@attack(
    "cpuid-lie",
    "control",
    title="The host hides RDRAND from the guest",
    promise="CPUID leaves that matter are answered by the module, not by the host.",
    expected=Outcome.STOPPED,
    unprotected="an ordinary VM, for which the host answers CPUID",
)
def cpuid_lie(scene: Scene) -> Observation:
    """Without RDRAND the guest would draw its key from a clock. The host clears the feature bit while it runs."""

    def act(victim: Victim) -> Seen:
        td, vcpu = victim.td, victim.machine.vcpus[0]
        assert td.cpuid(1)[2] & _RDRAND
        # KVM_SET_CPUID2 is refused once the vCPU has run; but here it is KVM itself that lies.
        vcpu.cpuid = {key: replace(e, ecx=e.ecx & ~_RDRAND) if e.function == 1 else e for key, e in vcpu.cpuid.items()}
        if not td.cpuid(1)[2] & _RDRAND:
            td.store(SECRET_GPA, 0)
            return Seen(note="the guest took a key that the host can guess")
        return Seen(note="the guest saw RDRAND as before")

    return scene.under_attack(act)


@attack(
    "msr-lie",
    "control",
    title="The host lies about the processor's immunity",
    promise="IA32_ARCH_CAPABILITIES is the module's to answer; the host is not asked.",
    expected=Outcome.STOPPED,
    unprotected="an ordinary VM, for which the host answers RDMSR",
)
def msr_lie(scene: Scene) -> Observation:
    """The guest decides on its mitigations by IA32_ARCH_CAPABILITIES. The host claims that none is needed."""

    def act(victim: Victim) -> Seen:
        td, vcpu = victim.td, victim.machine.vcpus[0]
        before = td.rdmsr(Msr.ARCH_CAPABILITIES)
        vcpu.msrs[Msr.ARCH_CAPABILITIES] = before ^ 0x1FF
        found = td.rdmsr(Msr.ARCH_CAPABILITIES)
        if found != before:
            td.store(SECRET_GPA, found)
        return Seen(note=f"the guest read {before:#x}, then {found:#x}")

    return scene.under_attack(act)


@attack(
    "time-back",
    "control",
    title="The host turns the guest's clock back",
    promise="TSC offset and multiplier of a TD are fixed when it is built: METADATA_FIELD_NOT_WRITABLE.",
    expected=Outcome.STOPPED,
    unprotected="an ordinary VM, whose TSC offset the host sets",
)
def time_back(scene: Scene) -> Observation:
    """A certificate that has expired is good again if the clock goes back."""
    said = ""

    def act(victim: Victim) -> Seen:
        def turn(lp: LogicalProcessor) -> None:
            nonlocal said
            if scene.is_td:
                regs = scene.seamcall(
                    Leaf.MNG_WR,
                    rcx=victim.tdx().require_tdr(),
                    rdx=table("td")["TSC_OFFSET"].field_id,
                    r8=-_HALF_AN_HOUR & _U64,
                    r9=_U64,
                )
                said = say(Leaf.MNG_WR, regs)
                return
            controls = lp.core.vmread(vmcs.PROCESSOR_CONTROLS) | int(vmcs.Primary.TSC_OFFSETTING)
            lp.core.vmwrite(vmcs.PROCESSOR_CONTROLS, controls)
            lp.core.vmwrite(vmcs.TSC_OFFSET, -min(_HALF_AN_HOUR, lp.core.rdtsc() // 2) & _U64)

        before = victim.td.rdtsc()
        victim.outside(turn)
        after = victim.td.rdtsc()
        if after < before:
            victim.td.store(SECRET_GPA, after)
        return Seen(note=said or f"the clock went from {before} to {after}")

    return scene.under_attack(act)


@attack(
    "shared-alias",
    "control",
    title="The host maps a page of its own where the guest's page is",
    promise="The host's tables serve GPAs with the shared bit only; a private GPA goes through the S-EPT.",
    expected=Outcome.STOPPED,
    unprotected="an ordinary VM, for which there is one table",
)
def shared_alias(scene: Scene) -> Observation:
    """The host puts the secret's GPA into the table it owns, as after a MapGPA that nobody asked for."""

    def act(victim: Victim) -> Seen:
        page, ept = scene.host.memory.alloc(zero=True), victim.machine.vm.ept
        assert ept is not None
        ept.map(SECRET_GPA, page)
        victim.flush()
        return Seen(note=f"the host's table leads to {page:#x}")

    return scene.under_attack(act)


@attack(
    "enter-elsewhere",
    "control",
    title="A second processor enters the vCPU's state with registers of its own choice",
    promise="A vCPU is on one processor at a time: others are told VCPU_STATE_INCORRECT or OPERAND_BUSY.",
    expected=Outcome.STOPPED,
    unprotected="an ordinary VM, whose VMCS any processor may load",
)
def enter_elsewhere(scene: Scene) -> Observation:
    """The host enters the vCPU on another processor, at a load of the guest's own, with RSI at the secret.

    In an ordinary VM it is a copy of the VMCS: the clone executes the guest's instruction in the guest's address space
    and hands over what it loaded.
    """

    def protected(victim: Victim) -> Seen:
        enter = scene.seamcall(Leaf.VP_ENTER, rcx=victim.tdvpr())
        flush = scene.seamcall(Leaf.VP_FLUSH, rcx=victim.tdvpr())
        assert enter.rax
        assert flush.rax
        return Seen(note=f"{say(Leaf.VP_ENTER, enter)}, {say(Leaf.VP_FLUSH, flush)}")

    def ordinary(victim: Victim) -> Seen:
        victim.td.load(SECRET_GPA)
        load_at, learned = victim.td.last_instruction, b""

        def clone(lp: LogicalProcessor) -> None:
            nonlocal learned
            vcpu, memory = victim.vmx_vcpu(), scene.host.memory
            vcpu.flush()
            copy = memory.alloc()
            memory.write(copy, memory.read(vcpu.vmcs, PAGE))
            other = next(cpu for cpu in scene.host.platform.lps if cpu is not lp).core
            for at in range(0, LINE, 8):
                other.vmptrld(copy)
                other.vmwrite(vmcs.GUEST_RIP, load_at)
                other.set_gprs(Registers(rsi=SECRET_GPA + at).values())
                reason = other.vmenter(True)
                assert reason & _ESCAPED, f"the clone left with reason {reason:#x}"
                learned += other.gpr(0).to_bytes(8, "little")
                other.vmclear(copy)
                memory.write(copy, memory.read(vcpu.vmcs, PAGE))
            memory.free(copy)
            vcpu.load(lp)

        victim.outside(clone)
        return Seen(learned, "a clone of the vCPU executed the guest's load")

    return scene.under_attack(protected if scene.protected else ordinary)
