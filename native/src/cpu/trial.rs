//! A processor with one small guest, that executes test cases in bulk: 64-bit user mode, a page of code, four pages
//! of data of which two are writable, one is read-only and one is missing. Every exception leaves the guest.
//!
//! Cases and results are records of [`RECORD`] bytes, the same that a native oracle understands.

use std::sync::Arc;

use super::ext::{Ext, MXCSR_MASK};
use super::run::Outcome;
use super::state::{cr0, cr4, efer, Cpu, RSP};
use super::vmcs::{field, Field};
use super::vmx_ctl::{entry_ctl, pin, primary, secondary};
use super::VmError;
use crate::mem::{Agent, Config, Integrity, Memory, Requester};

/// Bytes of a record: registers (128), RFLAGS, RIP (in: bytes of code), vector and error code, CR2, code (64 at 160),
/// checksum of the data pages (at 224), instructions (at 232), FXSAVE image (512 at 256), data window (256 at 768).
pub const RECORD: usize = 1024;
const FLAGS: usize = 128;
const RIP: usize = 136;
const VECTOR: usize = 144;
const CR2: usize = 152;
const CODE_BYTES: usize = 160;
const SUM: usize = 224;
const COUNT: usize = 232;
const FX: usize = 256;
const WINDOW: usize = 768;
/// What a record says in place of a vector when the guest did not leave by an exception: 0x100 and the exit reason.
pub const NO_VECTOR: u32 = 0x100;

/// Linear addresses.
pub const CODE: u64 = 0x1000_0000;
pub const DATA: u64 = 0x2000_0000;
/// Two pages are writable; the third is read-only; the fourth is missing.
const DATA_BYTES: usize = 0x2000;
/// The record's data window lies around the boundary of the two.
const WINDOW_AT: usize = 0x1000 - 128;

const CODE_PA: u64 = 0x1_0000;
const DATA_PA: u64 = 0x2_0000;
const TABLES: u64 = 0x4_0000;
const VMCS_PA: u64 = 0x8_0000;
const MEMORY: u64 = 0x10_0000;
/// Steps of 32 instructions after which a guest that does not end is stopped.
const LIMIT: u64 = 1 << 10;

pub struct Trial {
    cpu: Box<Cpu>,
    mem: Arc<Memory>,
    launched: bool,
}

fn word(record: &[u8], at: usize) -> u64 {
    record[at..at + 8]
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn put(record: &mut [u8], at: usize, value: u64) {
    record[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// FNV over words: shows that the two pages differ, and is the same code everywhere.
fn checksum(bytes: &[u8]) -> u64 {
    bytes
        .chunks_exact(8)
        .fold(0xcbf2_9ce4_8422_2325, |sum, chunk| {
            (sum ^ word(chunk, 0)).wrapping_mul(0x100_0000_01b3)
        })
}

impl Trial {
    pub fn new() -> Result<Trial, VmError> {
        let mem = Arc::new(
            Memory::new(&Config {
                ranges: vec![(0, MEMORY)],
                keyid_bits: 0,
                first_private_keyid: 1,
                integrity: Integrity::None,
                tme: false,
                seed: 0,
            })
            .map_err(|_| VmError::Fail(0))?,
        );
        let mut trial = Trial {
            cpu: Box::new(Cpu::new(mem.clone(), 0)),
            mem,
            launched: false,
        };
        trial.map()?;
        trial.describe()?;
        Ok(trial)
    }

    fn host(&self) -> Agent<'static> {
        Agent {
            mode: Requester::Host,
            cpu: None,
        }
    }

    /// Page tables: one of each level, and a page table for code and one for data.
    fn map(&mut self) -> Result<(), VmError> {
        const USER: u64 = 4;
        const WRITE: u64 = 2;
        const PRESENT: u64 = 1;
        let table = |n: u64| TABLES + n * 0x1000;
        let link = PRESENT | WRITE | USER;
        let set = |at: u64, value: u64| {
            let agent = self.host();
            self.mem.wr64(at, value, agent)
        };
        set(table(0), table(1) | link)?;
        set(table(1), table(2) | link)?;
        for (linear, level1) in [(CODE, 3), (DATA, 4)] {
            set(table(2) + (linear >> 21 & 511) * 8, table(level1) | link)?;
        }
        set(table(3), CODE_PA | PRESENT | USER)?;
        for page in 0..3 {
            let rights = if page == 2 {
                PRESENT | USER
            } else {
                PRESENT | USER | WRITE
            };
            set(table(4) + page * 8, (DATA_PA + page * 0x1000) | rights)?;
        }
        Ok(())
    }

    fn set(&mut self, field: Field, value: u64) {
        self.cpu.vmcs.set(field, value);
    }

    /// The guest: long mode, CPL 3, every exception an exit.
    fn describe(&mut self) -> Result<(), VmError> {
        let revision = self.cpu.options.vmcs_revision;
        let agent = self.host();
        self.mem.wr32(VMCS_PA, revision, agent)?;
        self.cpu.vmclear(VMCS_PA)?;
        self.cpu.vmptrld(VMCS_PA)?;
        self.set(field::PIN_CTLS, (pin::EXT_INT | pin::PREEMPTION).into());
        self.set(
            field::PRIMARY_CTLS,
            (primary::SECONDARY | primary::HLT).into(),
        );
        self.set(
            field::SECONDARY_CTLS,
            (secondary::VPID | secondary::RDTSCP | secondary::INVPCID).into(),
        );
        self.set(field::VPID, 1);
        self.set(field::EXCEPTION_BITMAP, 0xffff_ffff);
        self.set(
            field::ENTRY_CTLS,
            (entry_ctl::IA32E | entry_ctl::LOAD_EFER).into(),
        );
        self.set(field::LINK_POINTER, u64::MAX);
        self.set(
            field::GUEST_CR0,
            cr0::PE | cr0::PG | cr0::NE | cr0::WP | cr0::MP,
        );
        self.set(field::GUEST_CR3, TABLES);
        self.set(
            field::GUEST_CR4,
            cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::FSGSBASE | cr4::OSXSAVE,
        );
        self.set(
            field::GUEST_EFER,
            efer::LME | efer::LMA | efer::NXE | efer::SCE,
        );
        let code = 0xa0fb;
        let data = 0xc0f3;
        for (index, rights) in [data, code, data, data, data, data].into_iter().enumerate() {
            let selector = if index == 1 { 0x33 } else { 0x2b };
            self.set(field::GUEST_ES_SEL.nth(index), selector);
            self.set(field::GUEST_ES_LIMIT.nth(index), 0xffff_ffff);
            self.set(field::GUEST_ES_RIGHTS.nth(index), rights);
        }
        self.set(field::GUEST_LDTR_RIGHTS, 1 << 16);
        self.set(field::GUEST_TR_RIGHTS, 0x8b);
        self.set(field::GUEST_TR_LIMIT, 0x67);
        Ok(())
    }

    /// Executes the records, one after the other, each in place.
    pub fn run(&mut self, records: &mut [u8]) -> Result<(), VmError> {
        for record in records.chunks_exact_mut(RECORD) {
            self.one(record)?;
        }
        Ok(())
    }

    fn one(&mut self, record: &mut [u8]) -> Result<(), VmError> {
        self.load(record)?;
        let before = self.cpu.icount;
        let mut outcome = self.cpu.vmenter(!self.launched)?;
        while outcome == Outcome::Pause {
            outcome = self.cpu.resume()?;
        }
        self.launched = true;
        put(record, COUNT, self.cpu.icount - before);
        self.store(record, outcome)
    }

    fn load(&mut self, record: &[u8]) -> Result<(), VmError> {
        let agent = self.host();
        let mut page = [0xcc; 0x1000];
        let length = (word(record, RIP) as usize).min(64);
        page[..length].copy_from_slice(&record[CODE_BYTES..CODE_BYTES + length]);
        self.mem.write(CODE_PA, &page, agent)?;
        let mut data = [0; DATA_BYTES];
        data[WINDOW_AT..WINDOW_AT + 256].copy_from_slice(&record[WINDOW..WINDOW + 256]);
        self.mem.write(DATA_PA, &data, agent)?;
        for n in 0..16 {
            self.cpu.gpr[n] = word(record, n * 8);
        }
        self.set(field::GUEST_RSP, word(record, RSP * 8));
        self.set(field::GUEST_RFLAGS, word(record, FLAGS) & 0x24_0cd5 | 2);
        self.set(field::GUEST_RIP, CODE);
        self.set(field::PREEMPTION_TIMER, LIMIT);
        self.set(field::GUEST_INTERRUPTIBILITY, 0);
        self.set(field::GUEST_ACTIVITY, 0);
        self.cpu.ext = Ext::default();
        self.cpu.ext.load_image(&record[FX..FX + 512]);
        Ok(())
    }

    fn store(&mut self, record: &mut [u8], outcome: Outcome) -> Result<(), VmError> {
        for n in 0..16 {
            put(record, n * 8, self.cpu.gpr[n]);
        }
        put(record, RSP * 8, self.cpu.vmcs.get(field::GUEST_RSP));
        put(record, FLAGS, self.cpu.vmcs.get(field::GUEST_RFLAGS));
        let mut rip = self.cpu.vmcs.get(field::GUEST_RIP);
        let info = self.cpu.vmcs.get(field::EXIT_INTR_INFO) as u32;
        let (vector, error) = match outcome {
            Outcome::Exit(0) => {
                let error = if info >> 11 & 1 != 0 {
                    self.cpu.vmcs.get(field::EXIT_INTR_ERROR) as u32
                } else {
                    0
                };
                (info & 0xff, error)
            }
            Outcome::Exit(reason) => (NO_VECTOR | reason & 0xff, 0),
            _ => (NO_VECTOR | 0xff, 0),
        };
        // A breakpoint exits at the instruction, and is delivered behind it.
        if vector == 3 {
            rip += self.cpu.vmcs.get(field::EXIT_INSTR_LEN);
        }
        put(record, RIP, rip);
        put(record, VECTOR, u64::from(vector) | u64::from(error) << 32);
        let cr2 = if vector == 14 {
            self.cpu.vmcs.get(field::EXIT_QUALIFICATION)
        } else {
            0
        };
        put(record, CR2, cr2);
        let mut data = [0; DATA_BYTES];
        let agent = self.host();
        self.mem.read(DATA_PA, &mut data, agent)?;
        record[WINDOW..WINDOW + 256].copy_from_slice(&data[WINDOW_AT..WINDOW_AT + 256]);
        put(record, SUM, checksum(&data));
        let image = self.cpu.ext.image();
        record[FX..FX + 512].copy_from_slice(&image);
        Ok(())
    }

    /// Instructions that this interpreter does not have, as far as the cases had any.
    pub fn undefined(&self) -> Vec<String> {
        self.cpu.undefined.iter().cloned().collect()
    }
}

impl Ext {
    /// FXRSTOR64 of an image; reserved bits of MXCSR are dropped.
    pub fn load_image(&mut self, image: &[u8]) {
        self.load_legacy(image);
        self.mxcsr &= MXCSR_MASK;
    }

    /// FXSAVE64.
    pub fn image(&self) -> [u8; 512] {
        let mut image = [0; 512];
        self.save_legacy(&mut image);
        image
    }
}
