"""The general-purpose registers as they cross a wall: what SEAMCALL and SEAMRET carry."""

from collections.abc import Iterator

__all__ = ["GPR_NAMES", "U64", "Registers"]

U64 = (1 << 64) - 1

GPR_NAMES = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
"""In encoding order (SDM vol. 2, table 3-1), the order of `Core.gprs`."""


class Registers:
    """Sixteen 64-bit registers of a software agent in root mode, by name.

    A leaf function reads its operands here and leaves its results here; values are unsigned 64-bit integers.
    RSP is carried for completeness: no leaf uses it. XMM registers, which TDG.VP.VMCALL may pass, are in `xmm`
    (sixteen 128-bit integers) and exist only once somebody asked for them.
    """

    __slots__ = (*GPR_NAMES, "_xmm")

    def __init__(self, **values: int) -> None:
        """Registers with the given values, the others 0. ValueError for a value that is not 64 bits unsigned."""
        self.rax = self.rcx = self.rdx = self.rbx = self.rsp = self.rbp = self.rsi = self.rdi = 0
        self.r8 = self.r9 = self.r10 = self.r11 = self.r12 = self.r13 = self.r14 = self.r15 = 0
        self._xmm: list[int] | None = None
        for name, value in values.items():
            if name not in GPR_NAMES:
                raise ValueError(f"no general-purpose register is named {name!r}")
            if not 0 <= value <= U64:
                raise ValueError(f"{name}={value:#x} does not fit in 64 bits")
            setattr(self, name, value)

    @property
    def xmm(self) -> list[int]:
        """XMM0..XMM15 as 128-bit integers."""
        if self._xmm is None:
            self._xmm = [0] * 16
        return self._xmm

    def clear_xmm(self) -> None:
        """XMM0..XMM15 = 0."""
        self._xmm = None

    def values(self) -> tuple[int, ...]:
        """All sixteen, in encoding order."""
        return (
            self.rax, self.rcx, self.rdx, self.rbx, self.rsp, self.rbp, self.rsi, self.rdi,
            self.r8, self.r9, self.r10, self.r11, self.r12, self.r13, self.r14, self.r15,
        )  # fmt: skip

    def items(self) -> Iterator[tuple[str, int]]:
        """(name, value) of all sixteen."""
        return zip(GPR_NAMES, self.values(), strict=True)

    def __eq__(self, other: object) -> bool:
        """Equal when all sixteen are."""
        return self.values() == other.values() if isinstance(other, Registers) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """The registers that are not zero."""
        shown = ", ".join(f"{name}={value:#x}" for name, value in self.items() if value)
        return f"Registers({shown})"
