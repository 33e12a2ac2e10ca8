"""Attacks on the control structures: TDR, TDCS, TDVPS, PAMT, KeyIDs, the module's image and version."""

import functools
import shutil
from collections.abc import Callable
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from cryptography.hazmat.primitives.asymmetric import rsa

from softtdx.abi import sept, vmcs
from softtdx.abi.leaves import SeamcallLeaf as Leaf
from softtdx.abi.leaves import SeamldrLeaf
from softtdx.abi.status import SeamldrStatus
from softtdx.abi.structs import SeamldrParams, SeamldrScenario, SeamSigstruct
from softtdx.attack.lab import Observation, Outcome, attack
from softtdx.attack.scene import LINE, PAGE, SECRET, SECRET_GPA, Scene, Seen, Victim, judge, say
from softtdx.hw import DramLine, LogicalProcessor, Platform, Registers
from softtdx.kvm import Host
from softtdx.kvm.tdx_host import TdxUnavailableError
from softtdx.seamldr import development_release, launch_np_seamldr
from softtdx.seamldr.image import build_image
from softtdx.seamldr.release import HANDOFF_VERSION, SEAM_SVN, SUPPORTED_CPUS, Release, development_key
from softtdx.seamldr.sigstruct import KEY_BITS, sign, signer_hash
from softtdx.vmm.python_guest import PythonGuest, Td

__all__: list[str] = []

_FORGED = b"a page of the attacker's making ".ljust(LINE) * (PAGE // LINE)
_VMCS = "an ordinary VM, whose VMCS the host writes"
_STATE = "an ordinary VM, whose registers the host keeps"
_PRIVATE = "The structure is private memory of the TDX module: what the host wrote there is met with a machine check."
_LEVELS = (3, 2, 1, 0)
_RSI = 6
_GPR_LINE, _SEPT_ROOT = 0x980, 3  # in the TDVPR page; among the TDCS pages


def _own_tables(scene: Scene, victim: Victim) -> int:
    """An EPT of the attacker's own: as the host's, but the secret's GPA leads to a forged page. Its root."""
    memory, ept = scene.host.memory, victim.machine.vm.ept
    assert ept is not None
    table, link, root, entry = ept.root, 0, 0, 0
    for level in _LEVELS:
        copy = memory.alloc()
        memory.write(copy, memory.read(table, PAGE))
        if link:
            memory.wr64(link, copy | sept.RWX)
        root, link = root or copy, copy + 8 * sept.entry_index(SECRET_GPA, level)
        entry = memory.rd64(link)
        table = entry & sept.HPA_MASK
    page = memory.alloc()
    memory.write(page, _FORGED)
    memory.wr64(link, page | entry & ~sept.HPA_MASK)
    return root


def _while_outside(
    scene: Scene, protected: Callable[[Victim], None], ordinary: Callable[[Victim], None]
) -> Observation:
    """What the host does between exit and entry; the guest keeps eight bytes of the secret in RSI meanwhile."""

    def act(victim: Victim) -> Seen:
        change = protected if scene.protected else ordinary
        kept = int.from_bytes(SECRET[:8], "little")
        regs = victim.outside(lambda _: change(victim), rsi=kept)
        victim.td.store(SECRET_GPA, regs.rsi)
        return Seen(note="the guest was entered again")

    return scene.under_attack(act)


@attack(
    "tdr-overwrite",
    "control",
    title="The host overwrites the TDR",
    promise=_PRIVATE,
    expected=Outcome.DETECTED,
    unprotected=_VMCS,
)
def tdr_overwrite(scene: Scene) -> Observation:
    """The root of the guest's control state is replaced while the guest is out.

    In a TD that is the TDR, which names the KeyID and the TDCS; the host stores over it with KeyID 0. In an ordinary
    VM it is the EPT pointer of the VMCS, which the host leads to page tables of its own.
    """

    def ordinary(victim: Victim) -> None:
        root, lp = _own_tables(scene, victim), victim.td.processor
        lp.core.vmwrite(vmcs.EPTP, root | lp.core.vmread(vmcs.EPTP) & (PAGE - 1))

    return _while_outside(scene, lambda victim: scene.memory.write(victim.tdx().require_tdr(), bytes(LINE)), ordinary)


@attack(
    "tdcs-overwrite",
    "control",
    title="The host overwrites the root of the page tables in the TDCS",
    promise=_PRIVATE,
    expected=Outcome.DETECTED,
    unprotected="an ordinary VM, whose EPT the host writes",
)
def tdcs_overwrite(scene: Scene) -> Observation:
    """The host puts an entry of its own into the root table: in a TD a page of the TDCS, in a VM the top of the EPT."""

    def protected(victim: Victim) -> None:
        scene.memory.write(victim.tdx().tdcs[_SEPT_ROOT], bytes(LINE))
        victim.flush()

    def ordinary(victim: Victim) -> None:
        ept = victim.machine.vm.ept
        assert ept is not None
        scene.host.memory.wr64(ept.root, scene.host.memory.rd64(_own_tables(scene, victim)))
        victim.flush()

    return _while_outside(scene, protected, ordinary)


@attack(
    "registers-overwrite",
    "control",
    title="The host overwrites the saved registers of a vCPU",
    promise=_PRIVATE,
    expected=Outcome.DETECTED,
    unprotected=_STATE,
)
def registers_overwrite(scene: Scene) -> Observation:
    """The guest keeps a value in a register while it exits; the host changes it where it was saved."""

    def ordinary(victim: Victim) -> None:
        victim.vmx_vcpu().gprs[_RSI] = 0

    return _while_outside(scene, lambda victim: scene.memory.write(victim.tdvpr() + _GPR_LINE, bytes(128)), ordinary)


@attack(
    "vmcs-overwrite",
    "control",
    title="The host overwrites the TD VMCS",
    promise=_PRIVATE,
    expected=Outcome.DETECTED,
    unprotected=_VMCS,
)
def vmcs_overwrite(scene: Scene) -> Observation:
    """The host has the VMCS written back and changes it in memory.

    TDH.VP.FLUSH (VMCLEAR in an ordinary VM) puts the VMCS into its page. The attacker overwrites it there: in a TD
    with KeyID 0; in a VM by what the host may write anyway, an EPT pointer of its own.
    """

    def protected(victim: Victim) -> None:
        vcpu = victim.tdx_vcpu()
        vcpu.flush()
        scene.memory.write(vcpu.tdcx[0], bytes(PAGE))

    def ordinary(victim: Victim) -> None:
        vcpu, lp, root = victim.vmx_vcpu(), victim.td.processor, _own_tables(scene, victim)
        vcpu.flush()
        vcpu.load(lp)
        lp.core.vmwrite(vmcs.EPTP, root | lp.core.vmread(vmcs.EPTP) & (PAGE - 1))

    return _while_outside(scene, protected, ordinary)


@attack(
    "pamt-overwrite",
    "control",
    title="The host rewrites the PAMT, so that a TD's page looks free",
    promise="The PAMT is private memory of the module: it takes a machine check when it looks the page up.",
    expected=Outcome.DETECTED,
    unprotected="an ordinary VM: who owns a page is in the host's own books",
)
def pamt_overwrite(scene: Scene) -> Observation:
    """The host clears the page's PAMT entry with KeyID 0, and offers the page for reclaim as if nobody owned it."""

    def act(victim: Victim) -> Seen:
        page = victim.pa()
        if not scene.protected:
            scene.memory.write(page, _FORGED)
            return Seen(note="the host used the page as its own")
        assert scene.host.tdx is not None
        tdmr = next(t for t in scene.host.tdx.tdmrs if t.base <= page < t.base + t.size)
        entry_size = scene.host.tdx.sysinfo.pamt_entry_size[0]
        entry = tdmr.pamt[0][0] + (page - tdmr.base) // PAGE * entry_size
        scene.memory.write(entry & -LINE, bytes(LINE))
        return Seen(note=say(Leaf.PHYMEM_PAGE_RECLAIM, scene.seamcall(Leaf.PHYMEM_PAGE_RECLAIM, rcx=page)))

    return scene.under_attack(act)


@attack(
    "tdvps-replay",
    "control",
    title="An old line of a vCPU's saved registers is put back",
    promise="None: MKTME-i has no freshness, for control structures no more than for the TD's memory.",
    expected=Outcome.CORRUPTED,
    unprotected=_STATE,
)
def tdvps_replay(scene: Scene) -> Observation:
    """An interposer on the bus records the saved registers at one exit and puts them back at a later one.

    A limit of the real scheme: the line is genuine, at its address, under the right key. Only its time is wrong.
    """
    recorded: list[DramLine] = []

    def act(victim: Victim) -> Seen:
        def record(_: LogicalProcessor) -> None:
            if scene.protected:
                recorded.extend(scene.dram.record(victim.tdvpr() + _GPR_LINE & -LINE, 2 * LINE))

        def put_back(_: LogicalProcessor) -> None:
            if scene.protected:
                scene.dram.replay(recorded)
            else:
                victim.vmx_vcpu().gprs[_RSI] = 0

        victim.outside(record, rsi=0)
        regs = victim.outside(put_back, rsi=int.from_bytes(SECRET[:8], "little"))
        victim.td.store(SECRET_GPA, regs.rsi)
        return Seen(note="the registers of an earlier exit were put back")

    return scene.under_attack(act)


@attack(
    "tdvps-read",
    "control",
    title="The host reads the pages in which a vCPU's state is saved",
    promise="The TDVPS is private memory: a load gives zeroes, the bus ciphertext.",
    expected=Outcome.STOPPED,
    unprotected=_STATE,
)
def tdvps_read(scene: Scene) -> Observation:
    """The guest exits with a part of the secret in its registers; the host looks where they were saved."""
    learned = b""

    def look(victim: Victim) -> None:
        nonlocal learned
        if not scene.protected:
            learned = b"".join(value.to_bytes(8, "little") for value in victim.vmx_vcpu().gprs)
            return
        for page in (victim.tdvpr(), *victim.tdx_vcpu().tdcx):
            learned += scene.memory.read(page, PAGE) + scene.dram.read(page, PAGE)

    def act(victim: Victim) -> Seen:
        low, high = (int.from_bytes(SECRET[at : at + 8], "little") for at in (0, 8))
        victim.outside(lambda _: look(victim), rsi=low, rdi=high)
        return Seen(learned, f"looked through {len(learned)} bytes")

    return scene.under_attack(act)


@attack(
    "snapshot-rollback",
    "control",
    title="The host takes the guest back to an earlier state",
    promise="The host can save only what it can read, and what it writes back is not the TD's any more.",
    expected=Outcome.DETECTED,
    unprotected="an ordinary VM, which any hypervisor can snapshot",
)
def snapshot_rollback(scene: Scene) -> Observation:
    """A snapshot of the guest's page, taken before an update, is restored after it: attempts start anew."""

    def act(victim: Victim) -> Seen:
        victim.td.write(SECRET_GPA, bytes(PAGE))
        snapshot = scene.memory.read(victim.pa(), PAGE)
        victim.td.write(SECRET_GPA, SECRET)
        scene.memory.write(victim.pa(), snapshot)
        return Seen(note="the page as it was before the update was written back")

    return scene.under_attack(act)


@attack(
    "keyid-reuse",
    "control",
    title="The host gives a live TD's KeyID to an accomplice",
    promise="A KeyID serves one TD at a time: HKID_NOT_FREE, and no key is programmed over one in use.",
    expected=Outcome.STOPPED,
    unprotected="an ordinary VM, under the KeyID that everybody uses",
)
def keyid_reuse(scene: Scene) -> Observation:
    """The host creates a TD under the victim's KeyID, whose guest would then read the victim's lines."""

    def act(victim: Victim) -> Seen:
        if not scene.protected:
            return Seen(scene.memory.read(victim.pa(), PAGE), "read under the same KeyID")
        hkid, tdr = victim.tdx().hkid, victim.tdx().require_tdr()
        assert hkid is not None
        page, said = scene.host.memory.alloc(zero=True), []

        def reuse(_: LogicalProcessor) -> None:
            said.append(say(Leaf.MNG_CREATE, scene.seamcall(Leaf.MNG_CREATE, rcx=page, rdx=hkid)))
            said.append(say(Leaf.MNG_KEY_CONFIG, scene.seamcall(Leaf.MNG_KEY_CONFIG, rcx=tdr)))

        victim.outside(reuse)
        return Seen(note=", ".join(said))

    return scene.under_attack(act)


@attack(
    "kill-and-read",
    "control",
    title="The host kills the guest and searches what it leaves behind",
    promise="None for service: the host may end a TD at any time. What is left is noise.",
    expected=Outcome.DENIED,
    unprotected="an ordinary VM, whose memory stays as it was",
)
def kill_and_read(scene: Scene) -> Observation:
    """The guest is stopped for good between two instructions. Then the host tears it down and reads its page."""
    place = 0

    def program(td: Td) -> None:
        nonlocal place
        place = Victim(guest, td).pa()
        guest.machine.stop()
        while True:
            td.hold()

    with PythonGuest(scene.host, program, scene.config()) as guest:
        guest.run()
    seen = Seen(scene.memory.read(place, PAGE) + scene.dram.read(place, PAGE), "the guest never ran again")
    return judge(seen, SECRET, "") if seen.has_secret else Observation(Outcome.DENIED, seen.note)


@attack(
    "add-after-finalize",
    "control",
    title="The host adds to a guest that was measured already",
    promise="TDH.MR.FINALIZE ends building: PAGE.ADD and MR.EXTEND give OP_STATE_INCORRECT.",
    expected=Outcome.STOPPED,
    unprotected="an ordinary VM, whose image the host may patch whenever it likes",
)
def add_after_finalize(scene: Scene) -> Observation:
    """The host changes the guest's initial image after its measurement was closed."""

    def act(victim: Victim) -> Seen:
        if not scene.protected:
            scene.memory.write(victim.pa(), _FORGED)
            return Seen(note="the image was patched")
        tdr, page, source = victim.tdx().require_tdr(), scene.host.memory.alloc(), scene.host.memory.alloc()
        scene.memory.write(source, _FORGED)
        said = []

        def add(_: LogicalProcessor) -> None:
            for leaf, operands in (
                (Leaf.MEM_PAGE_ADD, {"rcx": SECRET_GPA, "rdx": tdr, "r8": page, "r9": source}),
                (Leaf.MR_EXTEND, {"rcx": SECRET_GPA, "rdx": tdr}),
                (Leaf.MR_FINALIZE, {"rcx": tdr}),
            ):
                said.append(say(leaf, scene.seamcall(leaf, **operands)))

        victim.outside(add)
        return Seen(note=", ".join(said))

    return scene.under_attack(act)


# --- the module itself
@functools.cache
def _attackers_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, KEY_BITS)


def _signed(image: bytes, key: rsa.RSAPrivateKey, svn: tuple[int, int] = SEAM_SVN) -> Release:
    return Release(
        image,
        sign(image, key, svn=svn, cpus=SUPPORTED_CPUS, handoff_version=HANDOFF_VERSION, day=date(2026, 1, 1)),
    )


def _host_with(scene: Scene, release: Release) -> Host:
    """A host that loads `release`; without protection, on a platform whose loader trusts the attacker's key."""
    platform = Platform(scene.description)
    if not scene.protected:
        modulus = _attackers_key().public_key().public_numbers().n
        launch_np_seamldr(platform, signer=signer_hash(modulus.to_bytes(KEY_BITS // 8, "little")))
    host = Host(platform)
    host.enable_tdx(release)
    return host


_ANY_SIGNER = "a platform whose loader trusts the attacker's signing key"
_CHECK = "    if not td.rd64(tdcs.ATTRIBUTES) & DEBUG:"


@functools.cache
def _backdoored() -> bytes:
    """The module's image without the check that keeps TDH.MEM.RD from TDs that are not to be debugged."""
    spec = find_spec("softtdx.module")
    assert spec is not None
    assert spec.submodule_search_locations
    with TemporaryDirectory() as folder:
        sources = Path(folder) / "module"
        shutil.copytree(spec.submodule_search_locations[0], sources)
        file = sources / "leaves" / "mem_rw.py"
        text = file.read_text()
        assert _CHECK in text
        file.write_text(text.replace(_CHECK, "    if False:"))
        return build_image(sources)


@attack(
    "module-patched",
    "control",
    title="The host loads a TDX module with a back door",
    promise="The P-SEAMLDR loads only what the vendor signed: EBADHASH, EBADSIG.",
    expected=Outcome.STOPPED,
    unprotected=_ANY_SIGNER,
)
def module_patched(scene: Scene) -> Observation:
    """A check is removed from the module, so that TDH.MEM.RD reads any TD. Will the platform load it?

    The attacker tries it under the vendor's SIGSTRUCT and under one signed with a key of his own. Where that is
    accepted, a TD is started on the module and its secret read.
    """
    scene.always_td = True
    refused = []
    image = _backdoored()
    for release in (Release(image, development_release().sigstruct), _signed(image, _attackers_key())):
        try:
            scene.host = _host_with(scene, release)
        except TdxUnavailableError as error:
            refused.append(str(error))
    if len(refused) > 1:
        return Observation(Outcome.STOPPED, "; ".join(refused))

    def act(victim: Victim) -> Seen:
        tdr = victim.tdx().require_tdr()
        results = [scene.seamcall(Leaf.MEM_RD, rcx=SECRET_GPA + at, rdx=tdr) for at in range(0, LINE, 8)]
        return Seen(b"".join(regs.r8.to_bytes(8, "little") for regs in results), "the module with the back door runs")

    return scene.under_attack(act)


@attack(
    "sigstruct-forged",
    "control",
    title="The host claims a higher security version for the module",
    promise="The SVN is under the vendor's signature: EBADSIG.",
    expected=Outcome.STOPPED,
    unprotected=_ANY_SIGNER,
)
def sigstruct_forged(scene: Scene) -> Observation:
    """The genuine image, with a SIGSTRUCT whose SVN the attacker raised: edited, and signed anew with another key."""
    genuine = development_release()
    edited = SeamSigstruct(bytearray(genuine.sigstruct))
    edited.seamsvn += 1
    higher = (SEAM_SVN[0] + 1, SEAM_SVN[1])
    refused = []
    for release in (Release(genuine.image, bytes(edited.view)), _signed(genuine.image, _attackers_key(), higher)):
        try:
            identity = _host_with(scene, release).platform.seamops.identity
        except TdxUnavailableError as error:
            refused.append(str(error))
        else:
            assert identity is not None
            svn = identity.tee_tcb_svn[0]
            return Observation(Outcome.CORRUPTED, f"the module of SVN {SEAM_SVN[0]} reports SVN {svn}")
    return Observation(Outcome.STOPPED, "; ".join(refused))


@attack(
    "svn-rollback",
    "control",
    title="The host replaces the running module by an older one",
    promise="TDs live on under a module of the same or a higher SVN only: an update to a lower one is refused.",
    expected=Outcome.STOPPED,
    unprotected="a platform on which no module runs yet: there only attestation tells the old module",
)
def svn_rollback(scene: Scene) -> Observation:
    """An old, genuinely signed module with a known hole is offered as an update (SEAMLDR.INSTALL, scenario UPDATE)."""
    older = _signed(development_release().image, development_key(), (SEAM_SVN[0] - 1, SEAM_SVN[1]))
    host = Host(Platform(scene.description))
    scenario = SeamldrScenario.LOAD
    if scene.protected:
        host.enable_tdx(development_release())
        scenario = SeamldrScenario.UPDATE
    else:
        launch_np_seamldr(host.platform)
    status = _install(host, older, scenario)
    if status is SeamldrStatus.SUCCESS:
        return Observation(Outcome.CORRUPTED, f"the module of SVN {SEAM_SVN[0] - 1} is installed")
    return Observation(Outcome.STOPPED, f"SEAMLDR.INSTALL: {status.name}")


def _install(host: Host, release: Release, scenario: SeamldrScenario) -> SeamldrStatus:
    pages = len(release.image) // PAGE
    image, sigstruct, at = host.memory.alloc(pages), host.memory.alloc(), host.memory.alloc()
    host.memory.write(image, release.image)
    host.memory.write(sigstruct, release.sigstruct)
    params = SeamldrParams()
    params.scenario, params.sigstruct_pa, params.num_module_pages = scenario, sigstruct, pages
    unused = len(params.module_pages) - pages
    params.module_pages = [image + i * PAGE for i in range(pages)] + [0] * unused
    host.memory.write(at, bytes(params.view))
    status = SeamldrStatus.SUCCESS
    for lp in host.platform.lps:
        status = SeamldrStatus(lp.seamcall(Registers(rax=SeamldrLeaf.INSTALL, rcx=at)).rax)
    return status
