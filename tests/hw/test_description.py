"""The platform description: presets, TOML files, and what no machine could have."""

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softtdx.errors import SoftTdxError
from softtdx.hw.description import DescriptionError, PlatformDescription, preset, preset_names


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_machine(name):
    d = preset(name)
    assert d.name == name
    assert d.cpuid[(0, None)][1:] == (0x756E6547, 0x6C65746E, 0x49656E69)
    assert len(d.private_keyids) >= 1


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(DescriptionError, match="spr"):
        preset("pentium")


def test_a_file_starts_from_its_base_and_changes_what_it_names(tmp_path):
    path = tmp_path / "box.toml"
    path.write_text('base = "spr"\nname = "box"\nlps = 4\n[msrs]\n"0x1a0" = 7\n[cpuid]\n"0x7.0" = [1, 2, 3, 4]\n')
    d = PlatformDescription.from_toml(path)
    assert (d.name, d.lps, d.msrs[0x1A0], d.cpuid[(7, 0)]) == ("box", 4, 7, (1, 2, 3, 4))
    assert d.cmrs == preset("spr").cmrs


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"lps": 0}, "lps"),
        ({"lps": 3, "packages": 2}, "lps"),
        ({"packages": 9}, "packages"),
        ({"keyid_bits": 0}, "keyid_bits"),
        ({"first_private_keyid": 64}, "first_private_keyid"),
        ({"first_private_keyid": 0}, "first_private_keyid"),
        ({"integrity": "maybe"}, "integrity"),
        ({"tsc_hz": 0}, "tsc_hz"),
        ({"cpu_svn": b"short"}, "cpu_svn"),
        ({"cmrs": ()}, "cmrs"),
        ({"cmrs": ((0x1000, 0x800),)}, "cmrs"),
        ({"cmrs": ((0x2000, 0x1000), (0x1000, 0x1000))}, "cmrs"),
        ({"cmrs": ((0x6000_0000, 0x1000),)}, "SEAMRR"),
        ({"cmrs": ((0x1_0000_0000, 0x1000),)}, "ram"),
        ({"seamrr": (0x6000_0000, 0x1000)}, "seamrr"),
        ({"seamrr": (0x6100_0000, 0x200_0000 - 1)}, "seamrr"),
        ({"ram": ((0, 1 << 60),)}, "ram"),
    ],
)
def test_an_impossible_machine_is_refused_by_the_field_that_makes_it_so(change, field):
    with pytest.raises(DescriptionError, match=field):
        replace(preset("spr"), **change)


@pytest.mark.parametrize(
    "text",
    [
        'lps = "two"',
        "lps = true",
        "bananas = 1",
        'base = "nowhere"',
        "cmrs = 7",
        "cmrs = [[1]]",
        '[cpuid]\n"x" = [1, 2, 3, 4]',
        '[cpuid]\n"0x1.-" = [1, 2, 3]',
        '[cpuid]\n"0x1.-" = [1, 2, 3, -1]',
        '[msrs]\n"q" = 1',
        'cpu_svn = "zz"',
        "lps = ",
    ],
)
def test_a_wrong_file_gets_one_clear_error(tmp_path, text):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(SoftTdxError):
        PlatformDescription.from_toml(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DescriptionError, match=r"nothing\.toml"):
        PlatformDescription.from_toml(tmp_path / "nothing.toml")


@given(st.binary(max_size=300))
def test_no_bytes_give_anything_but_a_description_or_a_clear_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("toml") / "any.toml"
    path.write_bytes(data)
    with contextlib.suppress(SoftTdxError):
        PlatformDescription.from_toml(path)
