"""Files and structures that come from outside: what parsers are given, and what the SEAM loader is given."""

import contextlib
import random
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Final

from softtdx._silicon import PAYLOADS
from softtdx.abi.leaves import SeamcallLeaf, SeamldrLeaf
from softtdx.abi.msrs import Msr
from softtdx.abi.status import SeamldrStatus
from softtdx.attack.fuzz.core import EDGES
from softtdx.attack.fuzz.world import PAGE, RELEASE, install, write_release
from softtdx.attack.oracle import BrokenInvariantError
from softtdx.attest.bench import NOW, sample_platform
from softtdx.attest.collateral import Collateral
from softtdx.attest.eventlog import EventLog, EventType, parse_ccel
from softtdx.attest.policy import Policy
from softtdx.attest.quote import Quote
from softtdx.attest.tdreport import parse_tdreport
from softtdx.attest.verifier import Verifier
from softtdx.errors import SoftTdxError
from softtdx.hw import Platform, PlatformDescription, Registers, preset
from softtdx.hw.faults import ModeFault, VmFail
from softtdx.seamldr import Release, development_release, launch_np_seamldr
from softtdx.vmm import parse_payload
from softtdx.vmm.linux.bzimage import parse_bzimage

__all__ = ["files", "loader"]

_WORLD_LASTS = 400
_SIGNED = 48 + 584  # bytes of a version 4 quote: header and TD report body
_LEAVES: Final = tuple(SeamldrLeaf)


@cache
def _genuine() -> tuple[bytes, Collateral, Verifier]:
    """A quote, its collateral, and a verifier that accepts it."""
    pki, enclave, report = sample_platform()
    quote, collateral = enclave.quote(report), pki.collateral()
    verifier = Verifier(pki.root_der)
    verifier.verify(quote, collateral, now=NOW).require()
    return quote, collateral, verifier


def _verify(data: bytes) -> None:
    """Whatever was changed: what a verifier accepts says what the enclave signed."""
    quote, collateral, verifier = _genuine()
    if verifier.verify(data, collateral, now=NOW).accepted and data[:_SIGNED] != quote[:_SIGNED]:
        raise BrokenInvariantError("a quote was accepted whose header or body was changed")


def _description(data: bytes) -> None:
    try:
        table = tomllib.loads(data.decode())
    except (ValueError, RecursionError):
        return
    PlatformDescription.from_dict(table)


def _text(parse: Callable[[str], object]) -> Callable[[bytes], object]:
    return lambda data: parse(data.decode(errors="replace"))


def files(rng: random.Random, steps: int) -> Iterator[int]:
    """Files that are nearly good: each parser answers, or refuses with SoftTdxError. A step is a file."""
    quote, collateral, _ = _genuine()
    log = EventLog.empty().measured(2, EventType.IPL, b"a kernel").to_bytes()
    header = bytearray(PAGE)
    header[0x1FE:0x206] = b"\x55\xaaHdrS\x0f\x02"[:8]
    bases: list[tuple[Callable[[bytes], object], bytes]] = [
        (parse_payload, PAYLOADS["demo"]),
        (parse_bzimage, bytes(header)),
        (EventLog.parse, log),
        (parse_ccel, bytes(56)),
        (Quote.parse, quote),
        (_verify, quote),
        (_text(Collateral.from_json), collateral.to_json().encode()),
        (_text(Policy.from_toml), b"[tcb]\nallow = ['UpToDate']\n[td]\nallow_debug = true\n"),
        (_description, b"ram = [[0, 0x80000000]]\nkeyid_bits = 6\nintegrity = 'logical'\nlps = 4\n"),
        (parse_tdreport, sample_platform()[2]),
    ]
    for _ in range(steps):
        parser, base = rng.choice(bases)
        data = bytearray(base)
        _spoil(rng, data, rng.randrange(8))
        cut = rng.choice((len(data), len(data), rng.randrange(len(data))))
        yield 1
        with contextlib.suppress(SoftTdxError):
            parser(bytes(data[:cut]))


def _spoil(rng: random.Random, data: bytearray, times: int, within: int | None = None) -> None:
    size = within or len(data)
    for _ in range(times):
        at = rng.randrange(min(size, rng.choice((64, 512, 2048, size))))
        data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, data[at] ^ 1 << rng.randrange(8), rng.randrange(256)))


def loader(rng: random.Random, steps: int) -> Iterator[int]:
    """SEAMLDR calls with parameters, SIGSTRUCT and image nearly good, and NP-SEAMLDR launches. A step is a call.

    An image that was changed must not be installed, whatever else is right: a SIGSTRUCT is signed.
    """
    good = development_release()
    done = 0
    while done < steps:
        platform = Platform(preset("spr"))
        if rng.randrange(4):
            launch_np_seamldr(platform)
        if rng.randrange(2):
            install(platform, good)
        for _ in range(min(_WORLD_LASTS, steps - done)):
            done += 1
            yield 1
            _loader_call(rng, platform, good)
            if platform.seam.loader is None and platform.seam.shut_down and rng.randrange(4) == 0:
                break


def _loader_call(rng: random.Random, platform: Platform, good: Release) -> None:
    lp = rng.choice(platform.lps)
    kind = rng.randrange(24)
    if kind == 0:
        with contextlib.suppress(ModeFault):  # firmware has locked them
            lp.wrmsr(rng.choice((Msr.SEAMRR_PHYS_BASE, Msr.SEAMRR_PHYS_MASK)), rng.choice(EDGES))
        SeamldrStatus(launch_np_seamldr(platform, rng.randrange(len(platform.lps))))
        return
    if kind < 10:
        _install_nearly_good(rng, platform, good)
        return
    leaf = rng.choice((*_LEAVES, SeamcallLeaf.SYS_INFO, rng.getrandbits(64)))
    if leaf == SeamldrLeaf.SHUTDOWN and rng.randrange(8):
        leaf = SeamldrLeaf.INFO
    regs = Registers(rax=leaf, rcx=rng.choice((*EDGES, RELEASE, RELEASE + 0x100, platform.seam.base)))
    _call(platform, lp.index, regs)


def _install_nearly_good(rng: random.Random, platform: Platform, good: Release) -> None:
    """SEAMLDR.INSTALL on all processors with one of the three structures changed."""
    image, sigstruct = bytearray(good.image), bytearray(good.sigstruct)
    what = rng.randrange(4)
    if what == 0:
        _spoil(rng, image, rng.randint(1, 3))
    elif what == 1:
        _spoil(rng, sigstruct, rng.randint(1, 3))
    params = bytearray(bytes(write_release(platform, Release(bytes(image), bytes(sigstruct))).view))
    if what == 2:
        _spoil(rng, params, rng.randint(1, 3), within=128)
        if rng.randrange(2):
            slot = 128 + 8 * rng.randrange(496)  # a module page
            params[slot : slot + 8] = rng.choice((*EDGES, RELEASE, platform.seam.base)).to_bytes(8, "little")
    platform.memory.write(RELEASE, bytes(params))
    changed = bytes(image) != good.image or bytes(sigstruct) != good.sigstruct
    before = platform.seam.module
    statuses = []
    for lp in platform.lps:
        where = rng.choice((*EDGES, RELEASE + 8)) if what == 3 and rng.randrange(2) else RELEASE
        regs = Registers(rax=SeamldrLeaf.INSTALL, rcx=where)
        if not _call(platform, lp.index, regs):
            return
        statuses.append(regs.rax)
    installed = platform.seam.module is not None and platform.seam.module is not before and not any(statuses)
    if installed and changed:
        raise BrokenInvariantError("a module was installed whose image or SIGSTRUCT was changed")


def _call(platform: Platform, lp: int, regs: Registers) -> bool:
    """A SEAMCALL to the loader; False when there is none. Its status must be one that has a name."""
    to_loader = regs.rax >> 63
    try:
        platform.lps[lp].seamcall(regs)
    except (VmFail, ModeFault):
        return False
    if to_loader:
        SeamldrStatus(regs.rax)  # ValueError is a finding
    return True
