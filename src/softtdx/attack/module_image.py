"""Attacks on the TDX module's image and version, by whoever loads it."""

from softtdx.abi.leaves import SeamcallLeaf as Leaf
from softtdx.abi.leaves import SeamldrLeaf
from softtdx.abi.status import SeamldrStatus
from softtdx.abi.structs import SeamldrParams, SeamldrScenario, SeamSigstruct
from softtdx.attack.flawed import Flaw, attackers_key, host_with, image_with, signed
from softtdx.attack.lab import Observation, Outcome, attack
from softtdx.attack.scene import LINE, PAGE, SECRET_GPA, Scene, Seen, Victim
from softtdx.hw import Platform, Registers
from softtdx.kvm import Host
from softtdx.kvm.tdx_host import TdxUnavailableError
from softtdx.seamldr import development_release, launch_np_seamldr
from softtdx.seamldr.release import SEAM_SVN, Release, development_key

__all__: list[str] = []

_ANY_SIGNER = "a platform whose loader trusts the attacker's signing key"
NO_DEBUG_CHECK = Flaw("leaves/mem_rw.py", "    if not td.rd64(tdcs.ATTRIBUTES) & DEBUG:", "    if False:")


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
    image = image_with(NO_DEBUG_CHECK)
    for release in (Release(image, development_release().sigstruct), signed(image, attackers_key())):
        try:
            scene.host = host_with(scene, release)
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
    for release in (Release(genuine.image, bytes(edited.view)), signed(genuine.image, attackers_key(), higher)):
        try:
            identity = host_with(scene, release).platform.seamops.identity
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
    older = signed(development_release().image, development_key(), (SEAM_SVN[0] - 1, SEAM_SVN[1]))
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
