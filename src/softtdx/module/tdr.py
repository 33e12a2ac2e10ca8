"""TDR, the root page of a TD: field offsets, and its life-cycle helpers.

One page under the global private KeyID (TDX Module Base Spec, "TDR"; offsets of the module's field table).
"""

from typing import Final

__all__ = ["CHLDCNT", "FATAL", "HKID", "LIFECYCLE_STATE", "NUM_TDCX", "PKG_CONFIG_BITMAP", "TDCX_PA", "TD_UUID"]

FATAL: Final = 0x0  # u8
NUM_TDCX: Final = 0x4  # u32
CHLDCNT: Final = 0x8  # u64
LIFECYCLE_STATE: Final = 0x10  # u32
TDCX_PA: Final = 0x18  # u64[9]
TD_UUID: Final = 0x60  # u64[4]
HKID: Final = 0x100  # u16
PKG_CONFIG_BITMAP: Final = 0x108  # u64
HANDOFF_VERSION: Final = 0x140  # u16
SEAMDB_INDEX: Final = 0x148  # u64
SEAMDB_NONCE: Final = 0x150  # 32 bytes

HEAD_SIZE: Final = 0x110  # what `td.open_td` reads: up to and including PKG_CONFIG_BITMAP
