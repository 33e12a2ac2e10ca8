"""VMX controls of a TD's VMCS: the values they start with, which bits may change, and the checks against the CPU.

For each control the interface gives INIT (the bits a TD VMCS sets), VARIABLE (bits that the module or a debugger
may flip) and UNKNOWN (bits without a known meaning: they take whatever the CPU fixes) (TDX Module ABI, "TD VMCS").
"""

from typing import Final, NamedTuple

from softtdx.abi.status import Status

from .errors import LeafError

__all__ = ["GUEST_CR0_INIT", "GUEST_CR4_INIT", "Control", "Controls", "check_cr_fixed", "for_l2", "for_td"]

U32: Final = 0xFFFF_FFFF
MSR_CR0_FIXED0, MSR_CR0_FIXED1, MSR_CR4_FIXED0, MSR_CR4_FIXED1 = 0x486, 0x487, 0x488, 0x489
MSR_PROCBASED2, MSR_PINBASED, MSR_PROCBASED, MSR_EXIT, MSR_ENTRY, MSR_PROCBASED3 = (
    0x48B,
    0x48D,
    0x48E,
    0x48F,
    0x490,
    0x492,
)

ENCLV_EXITING: Final = 1 << 28
USER_WAIT_PAUSE: Final = 1 << 26
VIRTUALIZE_SPEC_CTRL: Final = 1 << 7
CR0_PE_PG: Final = 1 << 31 | 1

GUEST_CR0_INIT: Final = 0x21
GUEST_CR4_INIT: Final = 0x2040
GUEST_CR0_L2_VARIABLE: Final = 0x8005_001F
GUEST_CR4_L2_VARIABLE: Final = 0x1BFF_1FBF


class Control(NamedTuple):
    """One control field."""

    init: int
    variable: int
    unknown: int


class Controls(NamedTuple):
    """The six control fields: values to put into a VMCS, or their definitions."""

    pin: int
    primary: int
    secondary: int
    tertiary: int
    exit: int
    entry: int


PIN: Final = Control(0x29, 0x80, 0xFFFF_FF16)
PRIMARY: Final = Control(0x9122_0088, 0x2040_0C00, 0x0404_6173)
SECONDARY: Final = Control(0x133C_B3FA, 0xCC00_0400, 0)
TERTIARY: Final = Control(0, 0xA0, 0xFFFF_FFFF_FFFF_FF40)
EXIT: Final = Control(0x1F3C_9204, 0x4000_0000, 0x0003_6DFB)
ENTRY: Final = Control(0x003E_E004, 0x0040_0200, 0xFF80_11FB)

L2_PIN: Final = Control(0x29, 0, 0xFFFF_FF16)
L2_PRIMARY: Final = Control(0x9122_0088, 0x68D9_9E04, 0x0404_6173)
L2_SECONDARY: Final = Control(0x1338_B3FA, 0xCC51_3E0C, 0)
L2_TERTIARY: Final = Control(0, 0xAE, 0xFFFF_FFFF_FFFF_FF40)


def _fit(msr: int, capability: int, control: Control, init: int | None = None) -> int:
    """The value of a 32-bit control on this CPU: INIT and what is fixed to 1. LeafError INCORRECT_MSR_VALUE."""
    wanted = control.init if init is None else init
    must, may = capability & U32, capability >> 32
    if must & ~(wanted | control.unknown) or wanted & ~may or (must | ~may & U32) & control.variable:
        raise LeafError(Status.INCORRECT_MSR_VALUE, msr)
    return wanted | must


def _fit_tertiary(capability: int, control: Control) -> int:
    variable = control.variable & ~VIRTUALIZE_SPEC_CTRL  # variable only where the CPU has it
    if (control.init | variable) & ~capability:
        raise LeafError(Status.INCORRECT_MSR_VALUE, MSR_PROCBASED3)
    return control.init


def _secondary_init(control: Control, capability: int, waitpkg: bool) -> int:
    wanted = control.init & ~USER_WAIT_PAUSE | (USER_WAIT_PAUSE if waitpkg else 0)
    return wanted if capability >> 32 & ENCLV_EXITING else wanted & ~ENCLV_EXITING


def for_td(msrs: dict[int, int], *, waitpkg: bool, ddpd: bool) -> Controls:
    """The control values of a TD VMCS (L1). LeafError INCORRECT_MSR_VALUE when the CPU cannot do what TDX needs."""
    pin = _fit(MSR_PINBASED, msrs[MSR_PINBASED], PIN)
    primary = _fit(MSR_PROCBASED, msrs[MSR_PROCBASED], PRIMARY)
    capability = msrs[MSR_PROCBASED2]
    secondary = _fit(MSR_PROCBASED2, capability, SECONDARY, _secondary_init(SECONDARY, capability, waitpkg))
    if ddpd and not msrs[MSR_PROCBASED3] & VIRTUALIZE_SPEC_CTRL:
        raise LeafError(Status.INCORRECT_MSR_VALUE, MSR_PROCBASED3)
    tertiary = _fit_tertiary(msrs[MSR_PROCBASED3], TERTIARY)
    leave = _fit(MSR_EXIT, msrs[MSR_EXIT], EXIT)
    enter = _fit(MSR_ENTRY, msrs[MSR_ENTRY], ENTRY)
    return Controls(pin, primary, secondary, tertiary, leave, enter)


def for_l2(msrs: dict[int, int], *, waitpkg: bool) -> Controls:
    """The control values of an L2 VM's VMCS, and the checks of CR0 and CR4 for it."""
    pin = _fit(MSR_PINBASED, msrs[MSR_PINBASED], L2_PIN)
    primary = _fit(MSR_PROCBASED, msrs[MSR_PROCBASED], L2_PRIMARY)
    capability = msrs[MSR_PROCBASED2]
    secondary = _fit(MSR_PROCBASED2, capability, L2_SECONDARY, _secondary_init(L2_SECONDARY, capability, waitpkg))
    tertiary = _fit_tertiary(msrs[MSR_PROCBASED3], L2_TERTIARY)
    leave = _fit(MSR_EXIT, msrs[MSR_EXIT], EXIT)
    enter = _fit(MSR_ENTRY, msrs[MSR_ENTRY], ENTRY)
    must, may = msrs[MSR_CR0_FIXED0] & ~CR0_PE_PG, msrs[MSR_CR0_FIXED1]
    if must & ~GUEST_CR0_INIT or ~may & GUEST_CR0_INIT or (must | ~may) & GUEST_CR0_L2_VARIABLE:
        raise LeafError(Status.INCORRECT_MSR_VALUE, MSR_CR0_FIXED0)
    return Controls(pin, primary, secondary, tertiary, leave, enter)


def check_cr_fixed(msrs: dict[int, int]) -> None:
    """CR0 and CR4 as a TD starts with them must be possible on this CPU. LeafError INCORRECT_MSR_VALUE."""
    if msrs[MSR_CR0_FIXED0] & ~CR0_PE_PG & ~GUEST_CR0_INIT:
        raise LeafError(Status.INCORRECT_MSR_VALUE, MSR_CR0_FIXED0)
    if ~msrs[MSR_CR0_FIXED1] & GUEST_CR0_INIT:
        raise LeafError(Status.INCORRECT_MSR_VALUE, MSR_CR0_FIXED1)
    if msrs[MSR_CR4_FIXED0] & ~GUEST_CR4_INIT:
        raise LeafError(Status.INCORRECT_MSR_VALUE, MSR_CR4_FIXED0)
    if ~msrs[MSR_CR4_FIXED1] & GUEST_CR4_INIT:
        raise LeafError(Status.INCORRECT_MSR_VALUE, MSR_CR4_FIXED1)
