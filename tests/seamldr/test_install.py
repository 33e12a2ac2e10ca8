"""The way of a module into SEAMRR: launch, install on every processor, refusal of anything tampered with."""

import hashlib
from dataclasses import replace
from datetime import date

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softtdx.abi.leaves import SeamldrLeaf
from softtdx.abi.status import SeamldrStatus
from softtdx.abi.structs import SeamldrInfo, SeamldrParams, SeamldrScenario, SeamSigstruct
from softtdx.hw import Platform, Registers, preset
from softtdx.hw.faults import VmFail
from softtdx.seamldr import development_release, launch_np_seamldr
from softtdx.seamldr.image import PAGE
from softtdx.seamldr.release import SUPPORTED_CPUS
from softtdx.seamldr.sigstruct import sign

PARAMS, SIGSTRUCT, IMAGE, BUFFER = 0x20_0000, 0x20_2000, 0x40_0000, 0x30_0000


@pytest.fixture
def platform():
    platform = Platform()
    assert launch_np_seamldr(platform) == SeamldrStatus.SUCCESS
    return platform


def place(platform, image, sigstruct, **fields):
    lp = platform.lps[0]
    params = SeamldrParams()
    params.scenario = SeamldrScenario.LOAD
    params.sigstruct_pa = SIGSTRUCT
    pages = len(image) // PAGE
    params.num_module_pages = pages
    params.module_pages = [IMAGE + i * PAGE for i in range(pages)] + [0] * (496 - pages)
    for name, value in fields.items():
        setattr(params, name, value)
    lp.write(PARAMS, bytes(params))
    lp.write(SIGSTRUCT, sigstruct)
    lp.write(IMAGE, image)


def install(platform, pa=PARAMS):
    """INSTALL on every processor: (status, RDX) of the last, which does the work."""
    for lp in platform.lps:
        regs = lp.seamcall(Registers(rax=SeamldrLeaf.INSTALL, rcx=pa, rdx=7))
    return SeamldrStatus(regs.rax), regs.rdx


def load(platform, image=None, sigstruct=None, **fields):
    release = development_release()
    place(platform, image or release.image, sigstruct or release.sigstruct, **fields)
    return install(platform)


def test_the_module_is_installed_when_the_last_processor_has_called(platform):
    place(platform, development_release().image, development_release().sigstruct)
    for lp in platform.lps[:-1]:
        assert lp.seamcall(Registers(rax=SeamldrLeaf.INSTALL, rcx=PARAMS)).rax == SeamldrStatus.SUCCESS
        assert platform.seam.module is None
    assert platform.lps[-1].seamcall(Registers(rax=SeamldrLeaf.INSTALL, rcx=PARAMS)).rax == SeamldrStatus.SUCCESS
    assert platform.seam.module is not None


def test_mrseam_is_the_hash_of_the_image(platform):
    assert load(platform) == (SeamldrStatus.SUCCESS, 0)
    identity = platform.seamops.identity
    assert identity.mrseam == hashlib.sha384(development_release().image).digest()
    assert identity.mrsigner == bytes(48)


def test_the_image_is_the_same_each_time_it_is_built():
    first = development_release().image
    development_release.cache_clear()
    assert development_release().image == first


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_changed_byte_of_the_module_is_refused(platform, data):
    image = bytearray(development_release().image)
    position = data.draw(st.integers(0, len(image) - 1))
    image[position] ^= data.draw(st.integers(1, 255))
    status, rdx = load(platform, image=bytes(image))
    assert (status, rdx) == (SeamldrStatus.EBADHASH, 1)
    assert platform.seam.module is None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_changed_byte_of_the_sigstruct_is_refused(platform, data):
    sigstruct = bytearray(development_release().sigstruct)
    position = data.draw(st.integers(0, len(sigstruct) - 1))
    sigstruct[position] ^= data.draw(st.integers(1, 255))
    status, rdx = load(platform, sigstruct=bytes(sigstruct))
    assert status in (SeamldrStatus.EBADSIG, SeamldrStatus.EUNSUPCPU, SeamldrStatus.EUNSPECERR)
    assert rdx == 0
    assert platform.seam.module is None


def test_another_signer_is_refused(platform):
    image = development_release().image
    key = rsa.generate_private_key(65537, 3072)
    forged = sign(image, key, svn=(5, 1), cpus=SUPPORTED_CPUS, handoff_version=1, day=date(2026, 1, 1))
    assert load(platform, sigstruct=forged) == (SeamldrStatus.EBADSIG, 0)


def test_a_processor_that_the_module_does_not_name_is_refused():
    d = preset("spr")
    cpuid = dict(d.cpuid)
    cpuid[(1, None)] = (0x0000_0F00, *cpuid[(1, None)][1:])
    platform = Platform(replace(d, cpuid=cpuid))
    launch_np_seamldr(platform)
    assert load(platform) == (SeamldrStatus.EUNSUPCPU, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"version": 1},
        {"scenario": 2},
        {"scenario": SeamldrScenario.UPDATE},  # there is nothing to update
        {"num_module_pages": 0},
        {"num_module_pages": 497},
        {"num_module_pages": (1 << 64) - 1},
        {"sigstruct_pa": SIGSTRUCT + 8},
        {"sigstruct_pa": 1 << 52},
        {"sigstruct_pa": 0x6000_0000},  # SEAMRR
        {"sigstruct_pa": SIGSTRUCT | 40 << 46},  # a private KeyID
        {"module_pages": [IMAGE + 1] + [0] * 495},
    ],
    ids=str,
)
def test_wrong_parameters_are_refused(platform, fields):
    assert load(platform, **fields) == (SeamldrStatus.EBADPARAM, 0)


@pytest.mark.parametrize("pa", [PARAMS + 8, 1 << 52, (1 << 64) - 1, 0x6000_0000, PARAMS | 33 << 46])
def test_a_wrong_parameter_address_is_refused(platform, pa):
    assert install(platform, pa) == (SeamldrStatus.EBADPARAM, 0)


def test_a_processor_may_call_install_once_in_a_session(platform):
    place(platform, development_release().image, development_release().sigstruct)
    lp = platform.lps[0]
    assert lp.seamcall(Registers(rax=SeamldrLeaf.INSTALL, rcx=PARAMS)).rax == SeamldrStatus.SUCCESS
    assert lp.seamcall(Registers(rax=SeamldrLeaf.INSTALL, rcx=PARAMS)).rax == SeamldrStatus.EBADCALL


def test_seamcalls_do_not_reach_the_module_while_it_is_being_replaced(platform):
    load(platform)
    place(platform, development_release().image, development_release().sigstruct)
    platform.lps[0].seamcall(Registers(rax=SeamldrLeaf.INSTALL, rcx=PARAMS))
    with pytest.raises(VmFail):
        platform.lps[1].seamcall(Registers(rax=33))


def test_a_refused_replacement_leaves_the_old_module_at_work(platform):
    load(platform)
    module = platform.seam.module
    status, rdx = load(platform, version=9)
    assert (status, rdx) == (SeamldrStatus.EBADPARAM, 0)
    assert platform.seam.module is module


def test_a_lower_svn_does_not_replace_the_module(platform):
    from softtdx.seamldr.release import HANDOFF_VERSION, SEAM_SVN, development_key

    load(platform)
    image = development_release().image
    older = sign(
        image,
        development_key(),
        svn=(SEAM_SVN[0] - 1, SEAM_SVN[1]),
        cpus=SUPPORTED_CPUS,
        handoff_version=HANDOFF_VERSION,
        day=date(2026, 1, 1),
    )
    status, _ = load(platform, sigstruct=older, scenario=SeamldrScenario.UPDATE)
    assert status == SeamldrStatus.EBADSIG


def test_info_tells_what_is_installed(platform):
    lp = platform.lps[0]
    load(platform)
    assert lp.seamcall(Registers(rax=SeamldrLeaf.INFO, rcx=BUFFER)).rax == SeamldrStatus.SUCCESS
    info = SeamldrInfo(lp.read(BUFFER, SeamldrInfo.SIZE))
    assert info.vendor_id == 0x8086
    assert info.seam_extend.mrseam == SeamSigstruct(development_release().sigstruct).seamhash
    assert info.seam_extend.seam_ready == 1
    assert lp.seamcall(Registers(rax=SeamldrLeaf.INFO, rcx=BUFFER + 8)).rax == SeamldrStatus.EBADPARAM


def test_seaminfo_gives_the_platforms_own_table(platform):
    lp = platform.lps[0]
    assert lp.seamcall(Registers(rax=SeamldrLeaf.SEAMINFO, rcx=BUFFER)).rax == SeamldrStatus.SUCCESS
    assert lp.rd32(BUFFER + 8) == platform.description.lps


def test_shutdown_on_every_processor_removes_loader_and_module(platform):
    load(platform)
    for lp in reversed(platform.lps):  # the last call comes from the processor that launched the loader
        assert lp.seamcall(Registers(rax=SeamldrLeaf.SHUTDOWN)).rax == SeamldrStatus.SUCCESS
        assert platform.seam.module is None
    with pytest.raises(VmFail):
        platform.lps[0].seamcall(Registers(rax=SeamldrLeaf.INFO, rcx=BUFFER))
    assert launch_np_seamldr(platform) == SeamldrStatus.SUCCESS


def test_the_loader_is_launched_once(platform):
    assert launch_np_seamldr(platform) == SeamldrStatus.EMODBUSY


@pytest.mark.parametrize("rax", [1 << 63 | 5, 1 << 63 | 0xFE, (1 << 64) - 1])
def test_an_unknown_leaf_is_a_bad_parameter(platform, rax):
    assert platform.lps[0].seamcall(Registers(rax=rax)).rax == SeamldrStatus.EBADPARAM


def test_the_signing_key_is_for_its_owner_only(tmp_path, monkeypatch):
    from softtdx.seamldr import release

    monkeypatch.setenv("SOFTTDX_HOME", str(tmp_path / "new"))
    release.development_key.cache_clear()
    try:
        first = release.development_key()
        path = tmp_path / "new" / "module-signing-key.pem"
        assert path.stat().st_mode & 0o777 == 0o600
        release.development_key.cache_clear()
        assert release.development_key().private_numbers() == first.private_numbers()
        path.write_text("not a key")
        release.development_key.cache_clear()
        with pytest.raises(release.ReleaseError, match="remove it"):
            release.development_key()
    finally:
        release.development_key.cache_clear()
