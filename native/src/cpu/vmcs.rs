//! The VMCS: every field, dense, in the order of the SDM's encodings (vol. 3, appendix B) and TDX's additions.
//!
//! While a VMCS is current its fields live in the processor ([`Vmcs`]); VMCLEAR and the VMPTRLD of another one
//! write them back to the 4 KiB region, in a layout of our own. So a region that somebody overwrote, or wrote
//! with another key, has the consequences it has on hardware.

/// Number of fields of each (width, type) group; width and type are bits 14:13 and 11:10 of an encoding.
const GROUPS: [usize; 16] = [5, 0, 11, 7, 42, 1, 16, 4, 20, 8, 24, 1, 8, 6, 25, 15];
const SLOTS: usize = {
    let mut sum = 0;
    let mut group = 0;
    while group < 16 {
        sum += GROUPS[group];
        group += 1;
    }
    sum
};

/// Bytes of a VMCS region.
pub const REGION: usize = 4096;
const HEADER: usize = 16;

const fn slot(encoding: u32) -> Option<usize> {
    if encoding & !0x6ffe != 0 {
        return None;
    }
    let group = ((encoding >> 13 & 3) << 2 | (encoding >> 10 & 3)) as usize;
    let index = (encoding >> 1 & 0x1ff) as usize;
    if index >= GROUPS[group] {
        return None;
    }
    let mut base = 0;
    let mut before = 0;
    while before < group {
        base += GROUPS[before];
        before += 1;
    }
    Some(base + index)
}

macro_rules! fields {
    ($($name:ident = $encoding:literal,)*) => {
        $(pub const $name: Field = Field::new($encoding);)*
    };
}

/// A field named at compile time.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Field(u16);

impl Field {
    const fn new(encoding: u32) -> Field {
        match slot(encoding) {
            Some(index) => Field(index as u16),
            None => panic!("no such field"),
        }
    }

    /// The `n`th of a run of equal fields (segments, EOI-exit bitmaps).
    pub const fn nth(self, n: usize) -> Field {
        Field(self.0 + n as u16)
    }
}

/// Field encodings this processor acts on.
pub mod field {
    use super::Field;
    fields! {
        VPID = 0x0000, PI_VECTOR = 0x0002, EPTP_INDEX = 0x0004,
        GUEST_ES_SEL = 0x0800, GUEST_LDTR_SEL = 0x080C, GUEST_TR_SEL = 0x080E, GUEST_INTR_STATUS = 0x0810, PML_INDEX = 0x0812,
        IO_BITMAP_A = 0x2000, IO_BITMAP_B = 0x2002, MSR_BITMAP = 0x2004, EXIT_MSR_STORE = 0x2006,
        EXIT_MSR_LOAD = 0x2008, ENTRY_MSR_LOAD = 0x200A, PML_ADDRESS = 0x200E, TSC_OFFSET = 0x2010,
        VIRTUAL_APIC = 0x2012, APIC_ACCESS = 0x2014, PI_DESCRIPTOR = 0x2016, VM_FUNCTIONS = 0x2018, EPTP = 0x201A, EOI_EXIT0 = 0x201C,
        EPTP_LIST = 0x2024, VE_INFO = 0x202A, XSS_BITMAP = 0x202C, TSC_MULTIPLIER = 0x2032,
        TERTIARY_CTLS = 0x2034, SHARED_EPTP = 0x203C,
        GUEST_PHYSICAL = 0x2400,
        LINK_POINTER = 0x2800, GUEST_DEBUGCTL = 0x2802, GUEST_PAT = 0x2804, GUEST_EFER = 0x2806,
        GUEST_PDPTE0 = 0x280A, GUEST_PKRS = 0x2818, HOST_PAT = 0x2C00, HOST_EFER = 0x2C02,
        PIN_CTLS = 0x4000, PRIMARY_CTLS = 0x4002, EXCEPTION_BITMAP = 0x4004, PF_MASK = 0x4006, PF_MATCH = 0x4008,
        CR3_TARGET_COUNT = 0x400A, EXIT_CTLS = 0x400C, EXIT_MSR_STORE_COUNT = 0x400E, EXIT_MSR_LOAD_COUNT = 0x4010,
        ENTRY_CTLS = 0x4012, ENTRY_MSR_LOAD_COUNT = 0x4014, ENTRY_INTR_INFO = 0x4016, ENTRY_ERROR_CODE = 0x4018,
        ENTRY_INSTR_LEN = 0x401A, TPR_THRESHOLD = 0x401C, SECONDARY_CTLS = 0x401E, PLE_GAP = 0x4020,
        PLE_WINDOW = 0x4022, TD_HKID = 0x4026,
        VM_INSTRUCTION_ERROR = 0x4400, EXIT_REASON = 0x4402, EXIT_INTR_INFO = 0x4404, EXIT_INTR_ERROR = 0x4406,
        IDT_VECTORING_INFO = 0x4408, IDT_VECTORING_ERROR = 0x440A, EXIT_INSTR_LEN = 0x440C, EXIT_INSTR_INFO = 0x440E,
        GUEST_ES_LIMIT = 0x4800, GUEST_LDTR_LIMIT = 0x480C, GUEST_TR_LIMIT = 0x480E, GUEST_GDTR_LIMIT = 0x4810,
        GUEST_IDTR_LIMIT = 0x4812, GUEST_ES_RIGHTS = 0x4814, GUEST_LDTR_RIGHTS = 0x4820, GUEST_TR_RIGHTS = 0x4822,
        GUEST_INTERRUPTIBILITY = 0x4824, GUEST_ACTIVITY = 0x4826, GUEST_SYSENTER_CS = 0x482A,
        PREEMPTION_TIMER = 0x482E,
        CR0_MASK = 0x6000, CR4_MASK = 0x6002, CR0_SHADOW = 0x6004, CR4_SHADOW = 0x6006, CR3_TARGET0 = 0x6008,
        EXIT_QUALIFICATION = 0x6400, IO_RCX = 0x6402, IO_RSI = 0x6404, IO_RDI = 0x6406, IO_RIP = 0x6408, GUEST_LINEAR = 0x640A,
        GUEST_CR0 = 0x6800, GUEST_CR3 = 0x6802, GUEST_CR4 = 0x6804, GUEST_ES_BASE = 0x6806, GUEST_LDTR_BASE = 0x6812,
        GUEST_TR_BASE = 0x6814, GUEST_GDTR_BASE = 0x6816, GUEST_IDTR_BASE = 0x6818, GUEST_DR7 = 0x681A,
        GUEST_RSP = 0x681C, GUEST_RIP = 0x681E, GUEST_RFLAGS = 0x6820, GUEST_PENDING_DEBUG = 0x6822,
        GUEST_SYSENTER_ESP = 0x6824, GUEST_SYSENTER_EIP = 0x6826, GUEST_S_CET = 0x6828, GUEST_SSP = 0x682A,
    }
}

/// A VMCS's fields and launch state.
#[derive(Clone)]
pub struct Vmcs {
    fields: [u64; SLOTS],
    pub launched: bool,
}

impl Default for Vmcs {
    fn default() -> Self {
        Vmcs {
            fields: [0; SLOTS],
            launched: false,
        }
    }
}

impl Vmcs {
    /// From the bytes of a region, after its revision identifier was checked.
    pub fn from_region(region: &[u8; REGION]) -> Vmcs {
        let mut vmcs = Vmcs {
            launched: region[8] != 0,
            ..Vmcs::default()
        };
        for (index, value) in vmcs.fields.iter_mut().enumerate() {
            let at = HEADER + index * 8;
            let mut word = [0; 8];
            word.copy_from_slice(&region[at..at + 8]);
            *value = u64::from_le_bytes(word);
        }
        vmcs
    }

    /// Writes launch state and fields into a region, leaving the revision identifier and the abort indicator.
    pub fn to_region(&self, region: &mut [u8; REGION]) {
        region[8] = u8::from(self.launched);
        for (index, value) in self.fields.iter().enumerate() {
            let at = HEADER + index * 8;
            region[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
    }

    #[inline]
    pub fn get(&self, field: Field) -> u64 {
        self.fields[field.0 as usize]
    }

    #[inline]
    pub fn set(&mut self, field: Field, value: u64) {
        self.fields[field.0 as usize] = value;
    }

    /// VMREAD of any encoding; `None`: unsupported component.
    pub fn read(&self, encoding: u32) -> Option<u64> {
        if encoding & 1 == 0 {
            return Some(self.fields[slot(encoding)?]);
        }
        // High access: only 64-bit fields have one.
        (encoding >> 13 & 3 == 1).then_some(())?;
        Some(self.fields[slot(encoding & !1)?] >> 32)
    }

    /// VMWRITE of any encoding, truncated to the field's width; `None`: unsupported component.
    pub fn write(&mut self, encoding: u32, value: u64) -> Option<()> {
        let width = encoding >> 13 & 3;
        let index = slot(encoding & !1)?;
        let field = &mut self.fields[index];
        match (width, encoding & 1) {
            (0, 0) => *field = value & 0xffff,
            (1 | 3, 0) => *field = value,
            (2, 0) => *field = value & 0xffff_ffff,
            (1, _) => *field = *field & 0xffff_ffff | value << 32,
            _ => return None,
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_survives_its_region() {
        let mut vmcs = Vmcs::default();
        for index in 0..SLOTS {
            vmcs.fields[index] = 0x0101_0101_0101_0101u64.wrapping_mul(index as u64);
        }
        vmcs.launched = true;
        let mut region = [0; REGION];
        vmcs.to_region(&mut region);
        let back = Vmcs::from_region(&region);
        assert!(back.fields == vmcs.fields && back.launched);
    }

    #[test]
    fn widths_truncate_and_high_halves_join() {
        let mut vmcs = Vmcs::default();
        vmcs.write(0x0800, 0x12345).unwrap();
        assert_eq!(vmcs.read(0x0800), Some(0x2345));
        vmcs.write(0x2010, 0x1111_2222_3333_4444).unwrap();
        vmcs.write(0x2011, 0x5555_6666).unwrap();
        assert_eq!(vmcs.read(0x2010), Some(0x5555_6666_3333_4444));
        assert_eq!(vmcs.read(0x2011), Some(0x5555_6666));
        assert_eq!(vmcs.read(0x4001), None);
        assert_eq!(vmcs.read(0x203C), Some(0));
        for encoding in [0x7000, 0x2056, 0x0400, 0x8000, 0xffff_ffff, 0x1000] {
            assert_eq!(vmcs.read(encoding), None, "{encoding:#x}");
            assert_eq!(vmcs.write(encoding, 1), None, "{encoding:#x}");
        }
    }
}
