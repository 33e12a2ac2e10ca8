//! A platform with one processor and a guest in VMX non-root operation: identity-mapped, at privilege level 0 in
//! 64-bit mode, every exception a VM exit, unless a test asks for something else.

use std::sync::Arc;

use iced_x86::code_asm::CodeAssembler;
use softtdx_silicon::cpu::{Cpu, Outcome};
use softtdx_silicon::mem::{Agent, Config, Integrity, Memory};

pub const SIZE: u64 = 64 << 20;
pub const KEYID_BITS: u32 = 6;
pub const KEYID_SHIFT: u32 = 52 - KEYID_BITS;
pub const FIRST_PRIVATE: u32 = 32;

pub const CODE: u64 = 0x1_0000;
pub const IDT: u64 = 0x2_0000;
pub const GDT: u64 = 0x2_1000;
pub const TSS: u64 = 0x2_2000;
/// The handler of vector `v` is a VMCALL at `STUBS + 16 * v`.
pub const STUBS: u64 = 0x3_0000;
pub const STACK: u64 = 0x4_8000;
pub const RING0: u64 = 0x4_f000;
pub const IST1: u64 = 0x4_e000;
pub const DATA: u64 = 0x5_0000;
pub const EPT: u64 = 0x10_0000;
pub const TABLES: u64 = 0x11_0000;
pub const VMCS: u64 = 0x12_0000;
pub const BITMAPS: u64 = 0x13_0000;
pub const VAPIC: u64 = 0x14_0000;
pub const PID: u64 = 0x15_0000;
pub const VE_INFO: u64 = 0x16_0000;

pub mod selector {
    pub const CODE64: u64 = 0x08;
    pub const DATA: u64 = 0x10;
    pub const CODE32: u64 = 0x18;
    pub const USER32: u64 = 0x20 | 3;
    pub const USER_DATA: u64 = 0x28 | 3;
    pub const USER64: u64 = 0x30 | 3;
    pub const TSS: u64 = 0x40;
}

/// VMCS encodings that tests use.
pub mod field {
    pub const GUEST_CS_SEL: u32 = 0x0802;
    pub const INTR_STATUS: u32 = 0x0810;
    pub const MSR_BITMAP: u32 = 0x2004;
    pub const TSC_OFFSET: u32 = 0x2010;
    pub const EPTP: u32 = 0x201A;
    pub const GPA: u32 = 0x2400;
    pub const EFER: u32 = 0x2806;
    pub const PIN: u32 = 0x4000;
    pub const PRIMARY: u32 = 0x4002;
    pub const EXCEPTIONS: u32 = 0x4004;
    pub const ENTRY: u32 = 0x4012;
    pub const INJECT: u32 = 0x4016;
    pub const INJECT_ERROR: u32 = 0x4018;
    pub const INJECT_LENGTH: u32 = 0x401A;
    pub const SECONDARY: u32 = 0x401E;
    pub const INTR_INFO: u32 = 0x4404;
    pub const INTR_ERROR: u32 = 0x4406;
    pub const IDT_INFO: u32 = 0x4408;
    pub const IDT_ERROR: u32 = 0x440A;
    pub const LENGTH: u32 = 0x440C;
    pub const BLOCKING: u32 = 0x4824;
    pub const ACTIVITY: u32 = 0x4826;
    pub const CR0_MASK: u32 = 0x6000;
    pub const CR4_MASK: u32 = 0x6002;
    pub const CR0_SHADOW: u32 = 0x6004;
    pub const CR4_SHADOW: u32 = 0x6006;
    pub const QUALIFICATION: u32 = 0x6400;
    pub const LINEAR: u32 = 0x640A;
    pub const CR0: u32 = 0x6800;
    pub const CR3: u32 = 0x6802;
    pub const CR4: u32 = 0x6804;
    pub const RSP: u32 = 0x681C;
    pub const RIP: u32 = 0x681E;
    pub const RFLAGS: u32 = 0x6820;
}

pub mod exit {
    pub const EXCEPTION: u32 = 0;
    pub const INTERRUPT: u32 = 1;
    pub const TRIPLE_FAULT: u32 = 2;
    pub const CPUID: u32 = 10;
    pub const HLT: u32 = 12;
    pub const VMCALL: u32 = 18;
    pub const CR: u32 = 28;
    pub const IO: u32 = 30;
    pub const RDMSR: u32 = 31;
    pub const WRMSR: u32 = 32;
    pub const BAD_GUEST: u32 = 33 | 1 << 31;
    pub const MTF: u32 = 37;
    pub const EPT_VIOLATION: u32 = 48;
    pub const EPT_MISCONFIGURATION: u32 = 49;
    pub const SEAMCALL: u32 = 76;
    pub const TDCALL: u32 = 77;
}

pub struct Machine {
    pub mem: Arc<Memory>,
    pub cpu: Box<Cpu>,
    launched: bool,
}

pub fn memory() -> Arc<Memory> {
    Arc::new(
        Memory::new(&Config {
            ranges: vec![(0, SIZE)],
            keyid_bits: KEYID_BITS,
            first_private_keyid: FIRST_PRIVATE,
            integrity: Integrity::Crypto,
            tme: true,
            seed: 1,
        })
        .unwrap(),
    )
}

/// Machine code of what `write` assembles, placed at `at`.
pub fn assemble(bits: u32, at: u64, write: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).unwrap();
    write(&mut a);
    a.assemble(at).unwrap()
}

impl Machine {
    pub fn new() -> Machine {
        let mem = memory();
        let cpu = Box::new(Cpu::new(mem.clone(), 0));
        let mut m = Machine {
            mem,
            cpu,
            launched: false,
        };
        m.build_tables();
        m.build_descriptors();
        m.build_vmcs(VMCS);
        m
    }

    /// Another processor of a platform that is built already.
    pub fn on(mem: Arc<Memory>, cpu: Box<Cpu>) -> Machine {
        Machine {
            mem,
            cpu,
            launched: false,
        }
    }

    pub fn w64(&self, at: u64, value: u64) {
        self.mem.wr64(at, value, Agent::SEAM).unwrap();
    }

    pub fn r64(&self, at: u64) -> u64 {
        self.mem.rd64(at, Agent::SEAM).unwrap()
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.mem.write(at, bytes, Agent::SEAM).unwrap();
    }

    /// Identity: EPT of 2 MiB pages, guest tables of 4 KiB pages for the first 2 MiB and of 2 MiB pages behind.
    fn build_tables(&self) {
        self.w64(EPT, (EPT + 0x1000) | 7);
        self.w64(EPT + 0x1000, (EPT + 0x2000) | 7);
        self.w64(TABLES, (TABLES + 0x1000) | 7);
        self.w64(TABLES + 0x1000, (TABLES + 0x2000) | 7);
        self.w64(TABLES + 0x2000, (TABLES + 0x3000) | 7);
        for index in 0..SIZE >> 21 {
            self.w64(EPT + 0x2000 + index * 8, index << 21 | 0xb7);
            if index > 0 {
                self.w64(TABLES + 0x2000 + index * 8, index << 21 | 0x87);
            }
        }
        for index in 0..512 {
            self.w64(TABLES + 0x3000 + index * 8, index << 12 | 7);
        }
    }

    /// The guest's page-table entry of a linear address below 2 MiB.
    pub fn pte(linear: u64) -> u64 {
        TABLES + 0x3000 + (linear >> 12) * 8
    }

    fn build_descriptors(&self) {
        let segments: [u64; 8] = [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_9b00_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            0,
        ];
        for (index, segment) in segments.iter().enumerate() {
            self.w64(GDT + index as u64 * 8, *segment);
        }
        self.w64(
            GDT + selector::TSS,
            0x0000_8900_0000_0067 | (TSS & 0xff_ffff) << 16 | (TSS >> 24) << 56,
        );
        self.w64(GDT + selector::TSS + 8, TSS >> 32);
        self.w64(TSS + 4, RING0);
        self.w64(TSS + 0x24, IST1);
        // No I/O permission bitmap.
        self.write(TSS + 102, &[0x68, 0]);
        for vector in 0..256 {
            self.write(STUBS + vector * 16, &[0x0f, 0x01, 0xc1]);
            self.set_gate(vector, STUBS + vector * 16, 0, 0x8e);
        }
    }

    pub fn set_gate(&self, vector: u64, target: u64, ist: u64, rights: u64) {
        let low = target & 0xffff
            | selector::CODE64 << 16
            | ist << 32
            | rights << 40
            | (target >> 16 & 0xffff) << 48;
        self.w64(IDT + vector * 16, low);
        self.w64(IDT + vector * 16 + 8, target >> 32);
    }

    pub fn build_vmcs(&mut self, at: u64) {
        self.mem.wr32(at, 0x12, Agent::SEAM).unwrap();
        self.cpu.vmclear(at).unwrap();
        self.cpu.vmptrld(at).unwrap();
        self.launched = false;
        self.set(field::PIN, 1 | 8);
        // HLT, unconditional I/O, MSR bitmaps, secondary controls.
        self.set(field::PRIMARY, 1 << 7 | 1 << 24 | 1 << 28 | 1 << 31);
        // EPT, RDTSCP, VPID, unrestricted guest, INVPCID, XSAVES.
        self.set(
            field::SECONDARY,
            1 << 1 | 1 << 3 | 1 << 5 | 1 << 7 | 1 << 12 | 1 << 20,
        );
        self.set(0x0000, 1);
        self.set(field::MSR_BITMAP, BITMAPS);
        self.set(field::EPTP, EPT | 3 << 3 | 6);
        self.set(0x400C, 1 << 9 | 1 << 2 | 1 << 20);
        self.set(field::ENTRY, 1 << 9 | 1 << 2 | 1 << 15);
        self.set(0x2800, u64::MAX);
        self.set(field::EXCEPTIONS, 0xffff_ffff);
        self.set(field::CR0, 0x8005_0033);
        self.set(field::CR3, TABLES);
        // PAE, MCE, PGE, OSFXSR, OSXMMEXCPT, OSXSAVE.
        self.set(
            field::CR4,
            1 << 5 | 1 << 6 | 1 << 7 | 1 << 9 | 1 << 10 | 1 << 18,
        );
        self.set(field::EFER, 0xd01);
        for index in 0..6 {
            let (sel, rights) = if index == 1 {
                (selector::CODE64, 0xa09b)
            } else {
                (selector::DATA, 0xc093)
            };
            self.set(0x0800 + 2 * index, sel);
            self.set(0x4814 + 2 * index, rights);
            self.set(0x4800 + 2 * index, 0xffff_ffff);
        }
        self.set(0x4820, 0x1_0000);
        self.set(0x080E, selector::TSS);
        self.set(0x4822, 0x8b);
        self.set(0x480E, 0x67);
        self.set(0x6814, TSS);
        self.set(0x6816, GDT);
        self.set(0x4810, 0x4f);
        self.set(0x6818, IDT);
        self.set(0x4812, 0xfff);
        self.set(0x681A, 0x400);
        self.set(field::RIP, CODE);
        self.set(field::RSP, STACK);
        self.set(field::RFLAGS, 2);
    }

    pub fn set(&mut self, field: u32, value: u64) {
        self.cpu.vmwrite(field, value).unwrap();
    }

    pub fn get(&mut self, field: u32) -> u64 {
        self.cpu.vmread(field).unwrap()
    }

    pub fn or(&mut self, field: u32, bits: u64) {
        let value = self.get(field);
        self.set(field, value | bits);
    }

    /// Exceptions go to the guest's IDT.
    pub fn deliver_exceptions(&mut self) {
        self.set(field::EXCEPTIONS, 0);
    }

    /// The guest runs at privilege level 3 in 64-bit mode.
    pub fn user_mode(&mut self) {
        self.set(field::GUEST_CS_SEL, selector::USER64);
        self.set(0x4816, 0xa0fb);
        self.set(0x0804, selector::USER_DATA);
        self.set(0x4818, 0xc0f3);
    }

    pub fn load(&mut self, write: impl FnOnce(&mut CodeAssembler)) {
        let code = assemble(64, CODE, write);
        self.write(CODE, &code);
        self.set(field::RIP, CODE);
    }

    /// Enters the guest; the exit reason.
    pub fn enter(&mut self) -> u32 {
        let launch = !std::mem::replace(&mut self.launched, true);
        let mut outcome = self.cpu.vmenter(launch).unwrap();
        loop {
            match outcome {
                Outcome::Exit(reason) => {
                    if reason == exit::BAD_GUEST {
                        self.launched = !launch;
                    }
                    return reason;
                }
                Outcome::Escape(hook) => return 0x1_0000 | u32::from(hook),
                Outcome::Pause => outcome = self.cpu.resume().unwrap(),
            }
        }
    }

    /// Assembles, enters.
    pub fn run(&mut self, write: impl FnOnce(&mut CodeAssembler)) -> u32 {
        self.load(write);
        self.enter()
    }

    pub fn reg(&self, index: usize) -> u64 {
        self.cpu.gpr[index]
    }

    /// Vector of the exception that exited.
    pub fn vector(&mut self) -> u64 {
        let info = self.get(field::INTR_INFO);
        assert!(info >> 31 == 1, "no exception: {info:#x}");
        info & 0xff
    }

    /// Expects the run to end in an exception exit; (vector, error code or 0).
    pub fn fault(&mut self, write: impl FnOnce(&mut CodeAssembler)) -> (u64, u64) {
        assert_eq!(self.run(write), exit::EXCEPTION, "rip {:#x}", self.cpu.rip);
        (self.vector(), self.get(field::INTR_ERROR))
    }

    /// Expects the run to end in the stub of a vector; its number and the words on the stack.
    pub fn stub(&mut self) -> (u64, [u64; 6]) {
        let rip = self.get(field::RIP);
        assert!((STUBS..STUBS + 0x1000).contains(&rip), "rip {rip:#x}");
        let rsp = self.get(field::RSP);
        (
            (rip - STUBS) / 16,
            std::array::from_fn(|n| self.r64(rsp + n as u64 * 8)),
        )
    }
}

pub const RAX: usize = 0;
pub const RCX: usize = 1;
pub const RDX: usize = 2;
pub const RBX: usize = 3;
pub const RSI: usize = 6;
pub const RDI: usize = 7;
pub const R8: usize = 8;
