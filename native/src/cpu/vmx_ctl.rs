//! VM-execution controls as the running guest feels them, read from the VMCS at VM entry.

use super::vmcs::{field, Vmcs};

/// Pin-based controls.
pub mod pin {
    pub const EXT_INT: u32 = 1;
    pub const NMI: u32 = 1 << 3;
    pub const VIRTUAL_NMI: u32 = 1 << 5;
    pub const PREEMPTION: u32 = 1 << 6;
    pub const POSTED: u32 = 1 << 7;
}

/// Primary processor-based controls.
pub mod primary {
    pub const INT_WINDOW: u32 = 1 << 2;
    pub const TSC_OFFSET: u32 = 1 << 3;
    pub const HLT: u32 = 1 << 7;
    pub const INVLPG: u32 = 1 << 9;
    pub const MWAIT: u32 = 1 << 10;
    pub const RDPMC: u32 = 1 << 11;
    pub const RDTSC: u32 = 1 << 12;
    pub const CR3_LOAD: u32 = 1 << 15;
    pub const CR3_STORE: u32 = 1 << 16;
    pub const TERTIARY: u32 = 1 << 17;
    pub const CR8_LOAD: u32 = 1 << 19;
    pub const CR8_STORE: u32 = 1 << 20;
    pub const TPR_SHADOW: u32 = 1 << 21;
    pub const NMI_WINDOW: u32 = 1 << 22;
    pub const MOV_DR: u32 = 1 << 23;
    pub const IO: u32 = 1 << 24;
    pub const IO_BITMAPS: u32 = 1 << 25;
    pub const MTF: u32 = 1 << 27;
    pub const MSR_BITMAPS: u32 = 1 << 28;
    pub const MONITOR: u32 = 1 << 29;
    pub const PAUSE: u32 = 1 << 30;
    pub const SECONDARY: u32 = 1 << 31;
}

/// Secondary processor-based controls.
pub mod secondary {
    pub const APIC_ACCESS: u32 = 1;
    pub const EPT: u32 = 1 << 1;
    pub const DESCRIPTOR: u32 = 1 << 2;
    pub const RDTSCP: u32 = 1 << 3;
    pub const X2APIC: u32 = 1 << 4;
    pub const VPID: u32 = 1 << 5;
    pub const WBINVD: u32 = 1 << 6;
    pub const UNRESTRICTED: u32 = 1 << 7;
    pub const APIC_REGISTER: u32 = 1 << 8;
    pub const VIRTUAL_INT: u32 = 1 << 9;
    pub const PAUSE_LOOP: u32 = 1 << 10;
    pub const RDRAND: u32 = 1 << 11;
    pub const INVPCID: u32 = 1 << 12;
    pub const VMFUNC: u32 = 1 << 13;
    pub const ENCLS: u32 = 1 << 15;
    pub const RDSEED: u32 = 1 << 16;
    pub const PML: u32 = 1 << 17;
    pub const EPT_VE: u32 = 1 << 18;
    pub const XSAVES: u32 = 1 << 20;
    pub const MODE_EXEC: u32 = 1 << 22;
    pub const TSC_SCALING: u32 = 1 << 25;
    pub const WAIT_PAUSE: u32 = 1 << 26;
    pub const PCONFIG: u32 = 1 << 27;
    pub const ENCLV: u32 = 1 << 28;
}

/// Tertiary processor-based controls.
pub mod tertiary {
    /// GPA width of a TD: 0 = 48 bits with the shared bit at 47, 1 = 52 bits with the shared bit at 51.
    pub const GPAW: u64 = 1 << 5;
}

/// VM-exit controls.
pub mod exit_ctl {
    pub const SAVE_DEBUG: u32 = 1 << 2;
    pub const HOST_64: u32 = 1 << 9;
    pub const ACK_INT: u32 = 1 << 15;
    pub const SAVE_PAT: u32 = 1 << 18;
    pub const LOAD_PAT: u32 = 1 << 19;
    pub const SAVE_EFER: u32 = 1 << 20;
    pub const LOAD_EFER: u32 = 1 << 21;
    pub const SAVE_PREEMPTION: u32 = 1 << 22;
}

/// VM-entry controls.
pub mod entry_ctl {
    pub const LOAD_DEBUG: u32 = 1 << 2;
    pub const IA32E: u32 = 1 << 9;
    pub const LOAD_PAT: u32 = 1 << 14;
    pub const LOAD_EFER: u32 = 1 << 15;
}

/// The controls of the running guest; controls that an inactive word would hold are zero.
#[derive(Clone, Copy, Default)]
pub struct Controls {
    pub pin: u32,
    pub primary: u32,
    pub secondary: u32,
    pub tertiary: u64,
    pub exit: u32,
    pub entry: u32,
    pub exceptions: u32,
    pub cr0_mask: u64,
    pub cr0_shadow: u64,
    pub cr4_mask: u64,
    pub cr4_shadow: u64,
    pub eptp: u64,
    pub shared_eptp: u64,
    /// The GPA bit that chooses the shared EPT; 0 outside SEAM non-root mode.
    pub shared_bit: u64,
    /// The TD's HKID at its place in a physical address.
    pub hkid: u64,
    pub tsc_offset: u64,
    /// Multiplier with 48 fraction bits; 0 when scaling is off.
    pub tsc_multiplier: u64,
    pub virtual_apic: u64,
    pub msr_bitmap: u64,
}

impl Controls {
    /// `hkid_shift`: position of the KeyID in a physical address. `seam`: SEAM non-root mode.
    pub fn read(vmcs: &Vmcs, seam: bool, hkid_shift: u32) -> Controls {
        let primary = vmcs.get(field::PRIMARY_CTLS) as u32;
        let secondary = if primary & primary::SECONDARY != 0 {
            vmcs.get(field::SECONDARY_CTLS) as u32
        } else {
            0
        };
        let tertiary = if primary & primary::TERTIARY != 0 {
            vmcs.get(field::TERTIARY_CTLS)
        } else {
            0
        };
        let shared_bit = match (seam, tertiary & tertiary::GPAW != 0) {
            (false, _) => 0,
            (true, false) => 1 << 47,
            (true, true) => 1 << 51,
        };
        Controls {
            pin: vmcs.get(field::PIN_CTLS) as u32,
            primary,
            secondary,
            tertiary,
            exit: vmcs.get(field::EXIT_CTLS) as u32,
            entry: vmcs.get(field::ENTRY_CTLS) as u32,
            exceptions: vmcs.get(field::EXCEPTION_BITMAP) as u32,
            cr0_mask: vmcs.get(field::CR0_MASK),
            cr0_shadow: vmcs.get(field::CR0_SHADOW),
            cr4_mask: vmcs.get(field::CR4_MASK),
            cr4_shadow: vmcs.get(field::CR4_SHADOW),
            eptp: vmcs.get(field::EPTP),
            shared_eptp: vmcs.get(field::SHARED_EPTP),
            shared_bit,
            hkid: if seam {
                vmcs.get(field::TD_HKID) << hkid_shift
            } else {
                0
            },
            tsc_offset: if primary & primary::TSC_OFFSET != 0 {
                vmcs.get(field::TSC_OFFSET)
            } else {
                0
            },
            tsc_multiplier: if secondary & secondary::TSC_SCALING != 0 {
                vmcs.get(field::TSC_MULTIPLIER)
            } else {
                0
            },
            virtual_apic: vmcs.get(field::VIRTUAL_APIC),
            msr_bitmap: vmcs.get(field::MSR_BITMAP),
        }
    }

    #[inline]
    pub fn primary(&self, bit: u32) -> bool {
        self.primary & bit != 0
    }
    #[inline]
    pub fn secondary(&self, bit: u32) -> bool {
        self.secondary & bit != 0
    }
    #[inline]
    pub fn pin(&self, bit: u32) -> bool {
        self.pin & bit != 0
    }
}
