"""Attacks on attestation: the attacker wants a secret that a relying party gives only to a TD it trusts.

The relying party knows the TD's measurements, sends a nonce, and verifies the quote that comes back. On the unprotected
side it is one that leaves out the check in question; everything else is the same, and the quotes are genuine too.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from softtdx.abi.structs import TdReport
from softtdx.attack.lab import Observation, Outcome, attack
from softtdx.attack.scene import SECRET, Scene, Seen, judge
from softtdx.attest import Collateral, Pki, Policy, Quote, QuotingEnclave, TcbStatus, TcbVariation, Verifier
from softtdx.attest.errors import QuotingError
from softtdx.attest.eventlog import EventLog, EventType
from softtdx.attest.keys import public_from_point, public_point, sign_raw, verify_raw
from softtdx.attest.verifier import Verdict
from softtdx.hw.faults import UndefinedOpcode
from softtdx.hw.seamops import SeamOpsStatus
from softtdx.vmm import MachineConfig
from softtdx.vmm.attesting_td import AttestingTd
from softtdx.vmm.boot import boot_host
from softtdx.vmm.quoting import QuotingService, platform_pki

__all__: list[str] = []

_NONCE = hashlib.sha512(b"the relying party's nonce").digest()
_OLD_NONCE = hashlib.sha512(b"the nonce of an earlier session").digest()
_OWNER = hashlib.sha384(b"the owner that the relying party trusts").digest()
_OTHER_OWNER = hashlib.sha384(b"somebody else").digest()
_NOW = 1_767_225_600  # 2026-01-01: a PKI's documents are in force then
_MEMORY = 2 << 20
_RTMR = 2


@dataclass
class _Party:
    """A TD that is attested, and the relying party's view of it. The owner stands for all measurements."""

    scene: Scene
    owner: bytes = _OWNER
    debug: bool = False
    extended: bytes | None = None
    configured: bytes = bytes(48)

    @cached_property
    def pki(self) -> Pki:
        """The PKI of the TD's platform, whose root the relying party trusts."""
        return platform_pki(self.scene.host.platform)

    def quote(self, nonce: bytes = _NONCE) -> bytes:
        """A genuine quote of the TD."""
        return self._ask(lambda td: td.quote(nonce))

    def report(self, nonce: bytes = _NONCE) -> bytes:
        """Its TDREPORT."""
        return self._ask(lambda td: td.report(nonce))

    def _ask(self, question: Callable[[AttestingTd], bytes]) -> bytes:
        config = MachineConfig(memory=_MEMORY, mrowner=self.owner, mrconfigid=self.configured, debug_td=self.debug)
        with AttestingTd(self.scene.host, QuotingService(self.scene.host.platform, self.pki), config) as td:
            if self.extended is not None:
                td.extend(_RTMR, self.extended)
            return question(td)

    def verify(
        self, quote: bytes, policy: Policy, collateral: Collateral | None = None, *, root: bytes | None = None
    ) -> Verdict:
        """The whole verdict."""
        return Verifier(root or self.pki.root_der).verify(
            quote, collateral or self.pki.collateral(), now=_NOW, policy=policy
        )

    @property
    def strict(self) -> Policy:
        """Measurements, nonce, no debugging, UpToDate only."""
        return Policy(measurements={"mr_owner": frozenset((_OWNER,))}).expecting(_NONCE)


def _released(reason: str) -> Observation:
    """What the relying party did: an empty `reason` says that the quote convinced it, and the secret went out."""
    if reason:
        return Observation(Outcome.STOPPED, reason)
    return judge(Seen(SECRET, "the relying party accepted the quote and sent the secret"), SECRET, "")


def _scene_of_tds(scene: Scene) -> None:
    scene.always_td = True


@attack(
    "report-forged",
    "attestation",
    title="The host changes a TDREPORT before it is quoted",
    promise="Only the processor can make the report's MAC; the quoting enclave has it verified.",
    expected=Outcome.STOPPED,
    unprotected="a quoting enclave that does not ask the processor for the MAC",
)
def report_forged(scene: Scene) -> Observation:
    """The attacker's TD has a genuine TDREPORT. The host writes the trusted owner into it and makes the hash fit."""
    _scene_of_tds(scene)
    party = _Party(scene, owner=_OTHER_OWNER)
    forged = TdReport.parse(bytearray(party.report()))
    forged.td_info.mrowner = _OWNER
    forged.report_mac.tee_info_hash = hashlib.sha384(forged.td_info.view).digest()
    return _quote_and_verify(party, bytes(forged.view))


@attack(
    "report-of-emulator",
    "attestation",
    title="A TD on another machine, or on none, is quoted here",
    promise="A report's MAC is under this processor's own report key.",
    expected=Outcome.STOPPED,
    unprotected="a quoting enclave that does not ask the processor for the MAC",
)
def report_of_emulator(scene: Scene) -> Observation:
    """The attacker runs the right TD on a platform he controls and carries its TDREPORT to a genuine one."""
    _scene_of_tds(scene)
    emulator = Scene(scene.side)
    emulator.host = boot_host(replace(scene.description, seed=scene.description.seed + 1))
    return _quote_and_verify(_Party(scene), _Party(emulator).report())


def _quote_and_verify(party: _Party, report: bytes, *, check_mac: bool | None = None) -> Observation:
    """The quoting enclave has the MAC checked on the protected side, unless `check_mac` says otherwise."""
    seamops = party.scene.host.platform.seamops
    checked = party.scene.protected if check_mac is None else check_mac

    def mac_is_good(head: bytes) -> bool:
        return not checked or seamops.verify(head) is SeamOpsStatus.SUCCESS

    try:
        quote = QuotingEnclave(party.pki, mac_is_good).quote(report)
    except QuotingError as error:
        return _released(str(error))
    return _released(party.verify(quote, party.strict).reason)


@attack(
    "seamops-by-host",
    "attestation",
    title="The host makes the MAC of a TDREPORT itself",
    promise="SEAMOPS, which has the processor's report key, is for SEAM root mode: #UD anywhere else.",
    expected=Outcome.STOPPED,
    unprotected="a processor that executes SEAMOPS for anybody",
)
def seamops_by_host(scene: Scene) -> Observation:
    """The host writes the TDREPORT it likes, with the trusted owner, and has the processor vouch for it."""
    _scene_of_tds(scene)
    party = _Party(scene, owner=_OTHER_OWNER)
    forged = TdReport.parse(bytearray(party.report()))
    forged.td_info.mrowner = _OWNER
    if scene.protected:
        try:
            scene.host.platform.lps[0].seamops()
        except UndefinedOpcode as fault:
            return _released(f"#UD: {fault}")
    info_hash = hashlib.sha384(forged.td_info.view).digest()
    mac = forged.report_mac
    _, head = scene.host.platform.seamops.report(bytes(mac.report_type.view), mac.report_data, info_hash)
    return _quote_and_verify(party, head[: len(mac.view)] + bytes(forged.view)[len(mac.view) :], check_mac=True)


@attack(
    "configuration-swapped",
    "attestation",
    title="The host gives the right TD another configuration",
    promise="MRCONFIGID, MROWNER and MROWNERCONFIG are the host's to set, and in the quote for everybody to compare.",
    expected=Outcome.STOPPED,
    unprotected="a policy that compares MRTD and owner only",
)
def configuration_swapped(scene: Scene) -> Observation:
    """The right image, for the right owner, reads its configuration from a disk; its hash should be MRCONFIGID.

    The host starts it with the configuration of a test system, in which secrets go to the log.
    """
    _scene_of_tds(scene)
    expected, swapped = (hashlib.sha384(name).digest() for name in (b"production", b"test system"))
    party = _Party(scene, configured=swapped)
    measurements = {"mr_owner": frozenset((_OWNER,))}
    if scene.protected:
        measurements["mr_config_id"] = frozenset((expected,))
    policy = Policy(measurements=measurements).expecting(_NONCE)
    return _released(party.verify(party.quote(), policy).reason)


@attack(
    "quote-of-another-td",
    "attestation",
    title="A genuine quote of another TD",
    promise="The quote carries the TD's measurements; a policy compares them.",
    expected=Outcome.STOPPED,
    unprotected="a policy without measurements",
)
def quote_of_another_td(scene: Scene) -> Observation:
    """The attacker builds a TD of his own on the same platform, with the nonce that the relying party sent."""
    _scene_of_tds(scene)
    party = _Party(scene, owner=_OTHER_OWNER)
    policy = party.strict if scene.protected else Policy().expecting(_NONCE)
    return _released(party.verify(party.quote(), policy).reason)


@attack(
    "quote-replayed",
    "attestation",
    title="A quote of an earlier session is sent again",
    promise="REPORTDATA binds the quote to the relying party's nonce.",
    expected=Outcome.STOPPED,
    unprotected="a policy that does not look at the report data",
)
def quote_replayed(scene: Scene) -> Observation:
    """The attacker recorded a quote of the right TD, whose channel key has leaked since, and answers with it."""
    _scene_of_tds(scene)
    party = _Party(scene)
    policy = party.strict if scene.protected else replace(party.strict, report_data=None)
    return _released(party.verify(party.quote(_OLD_NONCE), policy).reason)


@attack(
    "event-log-cleaned",
    "attestation",
    title="The event log leaves out what was really started",
    promise="RTMRs can be extended, never set: a log that does not lead to them is a lie.",
    expected=Outcome.STOPPED,
    unprotected="a relying party that reads the log and does not replay it",
)
def event_log_cleaned(scene: Scene) -> Observation:
    """The TD measured a root kit into RTMR2. The host shows a log in which a harmless kernel stands instead."""
    _scene_of_tds(scene)
    party = _Party(scene, extended=hashlib.sha384(b"kernel with a root kit").digest())
    log = EventLog.empty().measured(_RTMR, EventType.IPL, b"the kernel everybody knows")
    verdict = party.verify(party.quote(), party.strict)
    reason = verdict.reason
    if scene.protected and verdict.quote is not None and not log.replay(verdict.quote.body.rtmrs).ok:
        reason = f"RTMR{_RTMR} does not follow from the event log"
    return _released(reason)


def _without_signature(quote: bytes, policy: Policy) -> str:
    """A relying party that reads the fields of a quote and believes them."""
    return "; ".join(policy.complaints(Quote.parse(quote).body, TcbStatus.UP_TO_DATE, (), 99))


@attack(
    "measurement-edited",
    "attestation",
    title="The attacker edits the measurements in a quote",
    promise="The attestation key signs header and body: one changed bit and the signature fails.",
    expected=Outcome.STOPPED,
    unprotected="a relying party that parses quotes and does not verify them",
)
def measurement_edited(scene: Scene) -> Observation:
    """The trusted owner is written over the one in a quote of the attacker's TD."""
    _scene_of_tds(scene)
    party = _Party(scene, owner=_OTHER_OWNER)
    return _edited(party, party.quote().replace(_OTHER_OWNER, _OWNER))


@attack(
    "report-data-edited",
    "attestation",
    title="The attacker edits the report data in an old quote",
    promise="The attestation key signs the report data with the rest of the body.",
    expected=Outcome.STOPPED,
    unprotected="a relying party that parses quotes and does not verify them",
)
def report_data_edited(scene: Scene) -> Observation:
    """The fresh nonce is written over the one in a quote of an earlier session."""
    _scene_of_tds(scene)
    party = _Party(scene)
    return _edited(party, party.quote(_OLD_NONCE).replace(_OLD_NONCE, _NONCE))


def _edited(party: _Party, quote: bytes) -> Observation:
    if party.scene.protected:
        return _released(party.verify(quote, party.strict).reason)
    return _released(_without_signature(quote, party.strict))


@attack(
    "signing-key-swapped",
    "attestation",
    title="A quote signed with a key of the attacker's, beside a genuine QE report",
    promise="The QE report, signed by the PCK key, holds the hash of the one attestation key.",
    expected=Outcome.STOPPED,
    unprotected="a verifier that checks the signature with the key it finds in the quote",
)
def signing_key_swapped(scene: Scene) -> Observation:
    """The attacker writes the body he likes, signs it, and puts his public key where the attestation key stands."""
    _scene_of_tds(scene)
    party = _Party(scene, owner=_OTHER_OWNER)
    key = Pki.create(seed=666).keys["attestation"]
    genuine = Quote.parse(party.quote())
    forged = replace(
        genuine,
        body=replace(genuine.body, mr_owner=_OWNER),
        signature=replace(genuine.signature, attestation_key=public_point(key)),
    )
    signature = replace(forged.signature, signature=sign_raw(key, forged.signed_bytes()))
    quote = replace(forged, signature=signature).to_bytes()
    if scene.protected:
        return _released(party.verify(quote, party.strict).reason)
    parsed = Quote.parse(quote)
    own_key = public_from_point(parsed.signature.attestation_key)
    good = verify_raw(own_key, parsed.signature.signature, parsed.signed_bytes())
    return _released(_without_signature(quote, party.strict) if good else "the signature does not fit")


@attack(
    "quoting-enclave-swapped",
    "attestation",
    title="A quoting enclave of the attacker's on a genuine platform",
    promise="The QE identity names signer and product of the one enclave that may quote.",
    expected=Outcome.STOPPED,
    unprotected="a verifier of signatures only, without collateral",
)
def quoting_enclave_swapped(scene: Scene) -> Observation:
    """An enclave that signs whatever it is given, certified by the platform's PCK key like any other enclave."""
    _scene_of_tds(scene)
    party = _Party(scene, owner=_OTHER_OWNER)
    qe = replace(party.pki.options.qe, mr_signer=hashlib.sha256(b"the attacker").digest())
    report = TdReport.parse(bytearray(party.report()))
    report.td_info.mrowner = _OWNER
    report.report_mac.tee_info_hash = hashlib.sha384(report.td_info.view).digest()
    quote = QuotingEnclave(party.pki.revised(qe=qe), lambda _: True).quote(bytes(report.view))
    return _without_collateral(party, quote, party.pki.collateral())


def _without_collateral(party: _Party, quote: bytes, collateral: Collateral) -> Observation:
    if party.scene.protected:
        return _released(party.verify(quote, party.strict, collateral).reason)
    verdict = Verifier(party.pki.root_der).verify_signatures(quote)
    return _released(verdict.reason or _without_signature(quote, party.strict))


@attack(
    "tcb-out-of-date",
    "attestation",
    title="A platform with a known hole",
    promise="TCB info says which SVNs are out of date; a policy refuses them.",
    expected=Outcome.STOPPED,
    unprotected="a policy that takes any TCB status",
)
def tcb_out_of_date(scene: Scene) -> Observation:
    """The host did not install an update that closes a hole, and uses it. The TCB info in force says OutOfDate."""
    _scene_of_tds(scene)
    party = _Party(scene)
    collateral = party.pki.revised(vary=TcbVariation(status=TcbStatus.OUT_OF_DATE)).collateral()
    policy = party.strict if scene.protected else replace(party.strict, allow=Policy.any_status().allow)
    return _released(party.verify(party.quote(), policy, collateral).reason)


@attack(
    "pck-revoked",
    "attestation",
    title="A platform whose key was extracted",
    promise="Its PCK certificate stands on the CRL of the PCK CA.",
    expected=Outcome.STOPPED,
    unprotected="a verifier of signatures only, without collateral",
)
def pck_revoked(scene: Scene) -> Observation:
    """The PCK key of a platform got out and was revoked. Whoever has it can make any quote."""
    _scene_of_tds(scene)
    party = _Party(scene)
    return _without_collateral(party, party.quote(), party.pki.revised(revoked=frozenset(["pck"])).collateral())


@attack(
    "collateral-stale",
    "attestation",
    title="Old collateral, of the time before the hole was known",
    promise="TCB info, QE identity and CRLs run out; a verifier looks at its own clock.",
    expected=Outcome.STOPPED,
    unprotected="a verifier that takes the time from the one it verifies",
)
def collateral_stale(scene: Scene) -> Observation:
    """The attacker serves TCB info that says UpToDate, kept since it did. It has run out."""
    _scene_of_tds(scene)
    party = _Party(scene)
    stale = party.pki.revised(expired=frozenset(["tcb-info"]))
    now = _NOW if scene.protected else int(stale.options.issued.timestamp()) + 1
    verdict = Verifier(party.pki.root_der).verify(party.quote(), stale.collateral(), now=now, policy=party.strict)
    return _released(verdict.reason)


@attack(
    "root-foreign",
    "attestation",
    title="A PKI of the attacker's own",
    promise="A verifier has its root certificate from elsewhere than the quote.",
    expected=Outcome.STOPPED,
    unprotected="a verifier that trusts the root in the quote's chain",
)
def root_foreign(scene: Scene) -> Observation:
    """An emulator with certificates that look the same, down to the names, under a root that the attacker made."""
    _scene_of_tds(scene)
    party = _Party(scene)
    genuine_root = party.pki.root_der
    party.pki = Pki.create(seed=666, tcb=party.pki.options.tcb)
    root = genuine_root if scene.protected else party.pki.root_der
    return _released(party.verify(party.quote(), party.strict, root=root).reason)


@attack(
    "debug-td-quoted",
    "attestation",
    title="The host starts the TD as a debug TD",
    promise="ATTRIBUTES.DEBUG is in the quote: MRTD is the same, but everybody sees that the host may look in.",
    expected=Outcome.STOPPED,
    unprotected="a policy that allows debug TDs",
)
def debug_td_quoted(scene: Scene) -> Observation:
    """The right image, measured as ever, with ATTRIBUTES.DEBUG: the host could read the secret by TDH.MEM.RD."""
    _scene_of_tds(scene)
    party = _Party(scene, debug=True)
    policy = party.strict if scene.protected else replace(party.strict, allow_debug=True)
    return _released(party.verify(party.quote(), policy).reason)
