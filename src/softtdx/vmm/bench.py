"""Measurements of the interpreter: small loops of machine code, run by the machine as any payload is."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter

from softtdx._silicon import PAYLOADS
from softtdx.kvm import Host
from softtdx.kvm.bench import bench_td_build
from softtdx.vmm.errors import MachineError
from softtdx.vmm.machine import Machine, MachineConfig
from softtdx.vmm.payload import parse_payload

__all__ = ["LOOPS", "Loop", "bench_exits", "bench_loop", "bench_side_by_side", "bench_vm_boot"]

# mov dx, 0x501; xor eax, eax; out dx, al: the exit port with status 0; then hlt for good measure.
_END = bytes.fromhex("66ba0105 31c0 ee f4")


@dataclass(frozen=True)
class Loop:
    """A loop: set-up code, body, and what stands behind the end. RCX counts down; the body ends in jnz."""

    name: str
    what: str
    setup: bytes
    body: bytes
    behind: bytes = b""

    def program(self, count: int) -> bytes:
        """A flat binary that runs the body `count` times and ends."""
        start = self.setup + b"\x48\xc7\xc1" + count.to_bytes(4, "little")  # mov rcx, count
        back = (-(len(self.body) + 2)) & 0xFF
        return start + self.body + bytes([0x75, back]) + _END + self.behind


LOOPS = (
    Loop(
        "integer",
        "add, xor, lea, shr, and, dec, jnz",
        b"",
        # add rax,rcx; xor rdx,rax; lea rbx,[rax+rcx+7]; shr rax,3; and rdx,rbx; dec rcx
        bytes.fromhex("4801c8 4831c2 488d5c0807 48c1e803 4821da 48ffc9"),
    ),
    Loop(
        "load_store",
        "load, add, store, inc, and, dec, jnz over 1 KiB",
        bytes.fromhex("4881ec00100000 31d2"),  # sub rsp,4096; xor edx,edx
        # mov rax,[rsp+rdx*8]; add rax,rcx; mov [rsp+rdx*8+8],rax; inc edx; and edx,127; dec rcx
        bytes.fromhex("488b04d4 4801c8 488944d408 ffc2 83e27f 48ffc9"),
    ),
    Loop(
        "call_return",
        "call, add, ret, dec, jnz",
        b"",
        # call behind; dec rcx
        b"\xe8" + (3 + 2 + len(_END)).to_bytes(4, "little") + bytes.fromhex("48ffc9"),
        bytes.fromhex("4883c001 c3"),  # add rax,1; ret
    ),
)


def bench_loop(host: Host, loop: Loop, *, vm: bool, count: int = 20_000_000) -> dict[str, float]:
    """Run a loop as a TD (or ordinary VM) on `host`: instructions, seconds, MIPS. MachineError if it fails."""
    with Machine(host, MachineConfig(memory=16 << 20, vm=vm)) as machine:
        machine.load(parse_payload(loop.program(count)))
        result = machine.run()
    if not result.ok:
        raise MachineError(f"the {loop.name} loop did not end as it should: {result.message}")
    return {
        "instructions": result.instructions,
        "seconds": result.wall_s,
        "mips": result.instructions / result.wall_s / 1e6,
    }


# Hashing by the guest itself, as firmware measures what it loads: rounds and message schedule of SHA-256.
_HASH_LOOP = Loop(
    "hash",
    "sha256rnds2 twice, sha256msg1, sha256msg2, dec, jnz",
    b"",
    # sha256rnds2 xmm1,xmm2; sha256rnds2 xmm2,xmm1; sha256msg1 xmm3,xmm4; sha256msg2 xmm3,xmm5; dec rcx
    bytes.fromhex("0f38cbca 0f38cbd1 0f38ccdc 0f38cddd 48ffc9"),
)


def bench_side_by_side(host: Host, *, mib: int = 4, count: int = 20_000_000) -> dict[str, float]:
    """Two TDs on two processors at once, against one after the other: how many times faster.

    `measured`: TDs built of `mib` MiB measured memory, which is SEAMCALLs one after the other, under Python's lock.
    `hashing`: TDs that are built, run and hash, `count` times round the loop.
    """

    def measured() -> None:
        bench_td_build(host, mib)

    def hashing() -> None:
        bench_loop(host, _HASH_LOOP, vm=False, count=count)

    return {"measured": _speedup(measured), "hashing": _speedup(hashing)}


def _speedup(task: Callable[[], None]) -> float:
    """A task done twice in turn, over the same task done twice at once."""
    start = perf_counter()
    task()
    task()
    in_turn = perf_counter() - start
    with ThreadPoolExecutor(2) as threads:
        start = perf_counter()
        for done in [threads.submit(task) for _ in range(2)]:
            done.result()
        return in_turn / (perf_counter() - start)


# out 0x80, al; dec rcx: an exit each time, in a TD by way of #VE and TDG.VP.VMCALL.
_PORT_LOOP = Loop("port", "out, dec, jnz", b"", bytes.fromhex("e680 48ffc9"))


def bench_exits(host: Host, *, vm: bool, count: int = 5_000) -> dict[str, float]:
    """A guest that does nothing but exit to user space. MachineError if it fails."""
    with Machine(host, MachineConfig(memory=16 << 20, vm=vm)) as machine:
        machine.load(parse_payload(_PORT_LOOP.program(count)))
        result = machine.run()
    if not result.ok:
        raise MachineError(f"the port loop did not end as it should: {result.message}")
    return {"exits_per_s": count / result.wall_s}


def bench_vm_boot(host: Host) -> dict[str, float]:
    """An ordinary VM from nothing to the end of the demo program, and its teardown."""
    start = perf_counter()
    with Machine(host, MachineConfig(memory=16 << 20, vm=True)) as machine:
        machine.load(parse_payload(PAYLOADS["demo"], "demo"))
        result = machine.run()
    if not result.ok:
        raise MachineError(f"the demo program did not end as it should: {result.message}")
    return {"ms": (perf_counter() - start) * 1e3}
