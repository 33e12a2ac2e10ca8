"""Hosts that lie in their replies: what a guest asks by TDVMCALL is answered by the attacker."""

from collections.abc import Callable

from softtdx.abi.ghci import GetQuoteHeader, QuoteStatus, VmcallLeaf
from softtdx.attack.lab import Observation, Outcome, attack
from softtdx.attack.scene import PAGE, SECRET, SECRET_GPA, SPARE_GPA, Scene, Seen, Victim, judge
from softtdx.hw import LogicalProcessor
from softtdx.kvm.tdx_vcpu import TdxVcpu
from softtdx.kvm.uapi import IoExit, TdxExit
from softtdx.kvm.vmx import VmxVcpu
from softtdx.vmm import GuestError, Machine, MachineConfig, parse_payload
from softtdx.vmm.attesting_td import AttestingTd
from softtdx.vmm.quoting import QuotingService

__all__: list[str] = []

_KEYBOARD = 0x60
_TABLE = 0x100  # offset in the payload
_QUOTE_BUFFER = 0x8000  # the attesting TD's
_SECRET_AT = 0x1000  # from the table on
# lea rsi, [rip+table]; mov edx, 60h; xor eax, eax; in al, dx; add rsi, rax; then 64 bytes from [rsi] to the serial
# port; exit with status 0
_LOOK_UP = (
    b"\x48\x8d\x35" + (_TABLE - 7).to_bytes(4, "little")
    + bytes.fromhex("ba60000000 31c0 ec 4801c6 b940000000 baf8030000 ac ee ffc9 75fa ba01050000 31c0 ee f4 ebfd")
)  # fmt: skip


def _payload() -> bytes:
    code = bytearray(_TABLE + _SECRET_AT + PAGE)
    code[: len(_LOOK_UP)] = _LOOK_UP
    code[_TABLE + _SECRET_AT :] = SECRET
    return bytes(code)


def _lie_after(machine: Machine, port: int, value: int) -> None:
    """The reply to an IN from `port` is `value`, all 64 bits of it, in whatever register the host has for it."""
    ops, access = machine.vcpus[0].ops, machine._ports.access
    enter = ops.run
    lying = False

    def answer(vcpu: int, io: IoExit) -> None:
        nonlocal lying
        access(vcpu, io)
        lying = lying or (io.port == port and not io.write)

    def run(lp: LogicalProcessor) -> None:
        nonlocal lying
        if lying:
            lying = False
            if isinstance(ops, TdxVcpu):
                ops.regs.r11 = value
            elif isinstance(ops, VmxVcpu):
                ops.gprs[0] = value
        enter(lp)

    machine._ports.access = answer  # type: ignore[method-assign]
    ops.run = run  # type: ignore[method-assign]


@attack(
    "reply-too-wide",
    "control",
    title="The host answers a one-byte IN with sixty-four bits",
    promise="The host's answer is a register of the TDVMCALL; the guest's firmware puts one byte of it into AL.",
    expected=Outcome.STOPPED,
    unprotected="an ordinary VM, whose registers the host writes",
)
def reply_too_wide(scene: Scene) -> Observation:
    """A program, unaware that it runs in a TD, looks a byte from the keyboard up in a table of 256.

    `in al, dx` cannot give more than 255, so it checks nothing. The host answers with the distance to a secret. The
    program runs on the project's own launcher, whose #VE handler makes a TDVMCALL of the instruction.
    """
    with Machine(scene.host, MachineConfig(memory=16 << 20, vm=not scene.is_td)) as machine:
        machine.load(parse_payload(_payload(), "look-up"))
        _lie_after(machine, _KEYBOARD, _SECRET_AT)
        result = machine.run()
    assert result.status == 0, result.message
    return judge(Seen(result.console, f"the program showed {len(result.console)} bytes of its table"), SECRET, "")


_LIES: tuple[Callable[[GetQuoteHeader], None], ...] = (
    lambda header: setattr(header, "out_len", _QUOTE_BUFFER - GetQuoteHeader.SIZE + 1),
    lambda header: setattr(header, "out_len", 0xFFFF_FFFF),
    lambda header: setattr(header, "status", 0x1234),
)


@attack(
    "reply-quote-length",
    "attestation",
    title="The host says that a quote is longer than the buffer it lies in",
    promise="None: the length is in shared memory, the host's to write. The guest has to check it, and ours does.",
    expected=Outcome.STOPPED,
    unprotected="a guest that copies its buffer, and sends on as many bytes as the host says",
)
def reply_quote_length(scene: Scene) -> Observation:
    """GetQuote's buffer says how many bytes the quote has. What lies behind the guest's copy of it is a secret.

    On the protected side the project's own TD asks for a quote, several times, and each time the host tells another
    lie: too long, much too long, a status that there is not.
    """
    scene.always_td = True
    return _checked(scene) if scene.protected else _heartbleed(scene)


def _checked(scene: Scene) -> Observation:
    refused = []
    with AttestingTd(scene.host, QuotingService(scene.host.platform), MachineConfig(memory=2 << 20)) as td:
        services = td._guest.machine._services
        serve = services.tdx
        for lie in _LIES:

            def tell(request: TdxExit, apic_id: int = 0, lie: Callable[[GetQuoteHeader], None] = lie) -> None:
                serve(request, apic_id)
                if request.nr == VmcallLeaf.GET_QUOTE:
                    header = GetQuoteHeader.parse(services._memory.read(request.data[0], GetQuoteHeader.SIZE))
                    lie(header)
                    services._memory.write(request.data[0], bytes(header))

            services.tdx = tell  # type: ignore[method-assign]
            try:
                td.quote(bytes(64))
            except GuestError as error:
                refused.append(str(error))
            else:
                return Observation(Outcome.CORRUPTED, "the TD took what the host said for a quote")
        services.tdx = serve  # type: ignore[method-assign]
        td.quote(bytes(64))
    return Observation(Outcome.STOPPED, "; ".join(refused))


def _heartbleed(scene: Scene) -> Observation:
    """A guest of this kind in a few lines: a buffer of a page, a copy of it right before the secret."""
    sent = b""

    def act(victim: Victim) -> Seen:
        nonlocal sent
        td = victim.td
        copy = SECRET_GPA - PAGE
        victim.touch(copy)
        td.tdvmcall(VmcallLeaf.MAP_GPA, SPARE_GPA | td.shared_bit, PAGE)
        header = GetQuoteHeader()
        header.version, header.in_len = 1, 1024
        td.write(td.shared(SPARE_GPA), bytes(header))
        td.tdvmcall(VmcallLeaf.GET_QUOTE, SPARE_GPA | td.shared_bit, PAGE)
        slot = victim.machine.vm.memslots.find(SPARE_GPA)
        assert slot is not None
        header.status, header.out_len = QuoteStatus.SUCCESS, 2 * PAGE
        victim.machine.kvm.mm.write(slot.hva(SPARE_GPA), bytes(header))  # the host's answer
        td.write(copy, td.read(td.shared(SPARE_GPA), PAGE))
        length = GetQuoteHeader.parse(td.read(copy, GetQuoteHeader.SIZE)).out_len
        sent = td.read(copy, length)
        return Seen(sent, f"the guest sent {length} bytes to the relying party, by way of the host")

    return scene.under_attack(act)
