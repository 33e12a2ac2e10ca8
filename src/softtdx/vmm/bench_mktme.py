"""What memory encryption with integrity costs: nothing where nobody looks, and so much where somebody does.

Times are processor time, so that other work of the machine counts less.
"""

from dataclasses import replace
from functools import partial
from time import process_time

from softtdx._silicon import Memory
from softtdx.hw import PlatformDescription, preset
from softtdx.vmm.bench import LOOPS
from softtdx.vmm.boot import boot_host
from softtdx.vmm.errors import MachineError
from softtdx.vmm.machine import Machine, MachineConfig
from softtdx.vmm.payload import parse_payload

__all__ = ["bench_forced", "bench_hot_path"]

_LOAD_STORE = next(loop for loop in LOOPS if loop.name == "load_store")
_KEYID_BITS, _PRIVATE = 6, 33
_KEY = _PRIVATE << 52 - _KEYID_BITS


def bench_hot_path(*, vm: bool, count: int = 20_000_000, rounds: int = 4) -> dict[str, float]:
    """The load-store loop with encryption and integrity on against off: `ratio` of the times, 1.0 if they cost nothing.

    In an ordinary VM off is a machine without TME; in a TD, which cannot be without, it is one without integrity. Both
    run in turn, `rounds` times each, and the fastest counts: the loop is the same, what is more is other work.
    """
    on = preset("spr")
    off = replace(on, integrity="none", tme=not vm)
    run_on, run_off = (partial(_loop_seconds, description, vm=vm, count=count) for description in (on, off))
    pairs = [(run_on(), run_off()) for _ in range(rounds)]
    return {"ratio": min(a for a, _ in pairs) / min(b for _, b in pairs)}


def _loop_seconds(description: PlatformDescription, *, vm: bool, count: int) -> float:
    host = boot_host(description, tdx=not vm)
    with Machine(host, MachineConfig(memory=16 << 20, vm=vm)) as machine:
        machine.load(parse_payload(_LOAD_STORE.program(count)))
        start = process_time()
        result = machine.run()
        seconds = process_time() - start
    if not result.ok:
        raise MachineError(f"the load-store loop did not end as it should: {result.message}")
    return seconds


def bench_forced(mib: int = 32) -> dict[str, float]:
    """Work that is put off until somebody looks, in MB/s of TD memory.

    `dump`: a probe reads DRAM, everything is encrypted. `force`: it writes the same ciphertext back, for which each
    line is encrypted and its MAC made. `verify`: the TD reads again, each MAC is verified and each line decrypted.
    MachineError if what the TD reads is not what it wrote.
    """
    size = mib << 20
    memory = Memory([(0, size)], keyid_bits=_KEYID_BITS, first_private_keyid=32)
    memory.set_key(_PRIVATE)
    content = bytes(range(256)) * (size // 256)
    memory.write(_KEY, content, seam=True)
    times = [process_time()]
    raw = memory.raw_read(0, size)
    times.append(process_time())
    memory.raw_write(0, raw)
    times.append(process_time())
    back = memory.read(_KEY, size, seam=True)
    times.append(process_time())
    if back != content or raw == content:
        raise MachineError("memory that a probe wrote back as it was reads differently")
    names = ("dump", "force", "verify")
    return {name: size / (end - start) / 1e6 for name, start, end in zip(names, times, times[1:], strict=False)}
