//! A guest seen from outside while it stands still: Python guests, options, counters.

use crate::mem::Fault;

use super::state::{Cpu, RSP};
use super::uop::Uop;

/// Linear addresses that do not translate are reported as bus faults at themselves.
fn untranslated(linear: u64) -> Fault {
    Fault::Bus { pa: linear }
}

impl Cpu {
    pub fn live_state(&self) -> Vec<(&'static str, u64)> {
        let mut state = vec![
            ("rip", self.rip),
            ("rsp", self.gpr[RSP]),
            ("rflags", self.rflags()),
            ("cr0", self.cr0),
            ("cr2", self.cr2),
            ("cr3", self.cr3),
            ("cr4", self.cr4),
            ("efer", self.efer),
            ("cpl", self.cpl.into()),
            ("long", self.long.into()),
            ("live", self.live.into()),
            ("fs_base", self.seg[super::state::FS].base),
            ("gs_base", self.seg[super::state::GS].base),
        ];
        state.extend([
            ("instructions", self.icount),
            ("interruptibility", self.blocking.into()),
        ]);
        state
    }

    pub fn set_live(&mut self, name: &str, value: u64) -> Result<(), String> {
        match name {
            "rip" => self.rip = value,
            "rsp" => self.gpr[RSP] = value,
            "rflags" => {
                self.set_rflags(value);
                self.refresh();
            }
            other => {
                return Err(format!(
                    "no live register {other:?}; there are rip, rsp and rflags"
                ))
            }
        }
        Ok(())
    }

    pub fn set_allow_escape(&mut self, on: bool) {
        self.allow_escape = on;
        self.refresh();
    }

    /// Reads the guest's memory through its page tables and EPT, without side effects.
    pub fn guest_read(&mut self, linear: u64, into: &mut [u8]) -> Result<(), Fault> {
        let size = into.len();
        let mut done = 0;
        while done < size {
            let at = linear.wrapping_add(done as u64);
            let part = (size - done).min((0x1000 - (at & 0xfff)) as usize);
            let pa = self.probe(at, false).ok_or(untranslated(at))?;
            self.mem
                .read(pa, &mut into[done..done + part], self.guest_agent())?;
            done += part;
        }
        Ok(())
    }

    /// Writes it; nothing is written unless all of it translates.
    pub fn guest_write(&mut self, linear: u64, from: &[u8]) -> Result<(), Fault> {
        let mut places = Vec::new();
        let mut done = 0;
        while done < from.len() {
            let at = linear.wrapping_add(done as u64);
            let part = (from.len() - done).min((0x1000 - (at & 0xfff)) as usize);
            places.push((self.probe(at, true).ok_or(untranslated(at))?, done, part));
            done += part;
        }
        for (pa, done, part) in places {
            self.mem
                .write(pa, &from[done..done + part], self.guest_agent())?;
        }
        Ok(())
    }

    fn probe(&mut self, linear: u64, write: bool) -> Option<u64> {
        let gpa = self.probe_linear(linear)?;
        self.probe_gpa(gpa, write)
    }

    pub fn counter_list(&self) -> [(&'static str, u64); 12] {
        let c = &self.counters;
        [
            ("instructions", self.icount),
            ("lookups", c.lookups),
            ("decoded", c.decoded),
            ("tlb_fills", c.tlb_fills),
            ("slow_accesses", c.slow_accesses),
            ("walks", c.walks),
            ("exits", c.exits),
            ("exceptions", c.exceptions),
            ("interrupts", c.interrupts),
            ("undefined", c.undefined),
            ("shootdowns", c.shootdowns),
            ("tsc", self.tsc()),
        ]
    }

    /// Sets an option of the processor's description.
    pub fn configure(&mut self, name: &str, value: u64) -> Result<(), String> {
        let o = &mut self.options;
        match name {
            "tsc_real" => o.tsc_real = value != 0,
            "tsc_hz" if value > 0 => o.tsc_hz = value,
            "tsc_per_1024" if value > 0 => o.tsc_per_1024 = value,
            "pa_bits" if (36..=52).contains(&value) => o.pa_bits = value as u32,
            "vmcs_revision" if value >> 31 == 0 => o.vmcs_revision = value as u32,
            "seed" => o.seed = value,
            "cr4_valid" => o.cr4_valid = value,
            "xcr0_valid" => o.xcr0_valid = value,
            "xss_valid" => o.xss_valid = value,
            "sample" => {
                self.samples =
                    (value != 0).then(|| Box::new(super::samples::Samples::new(value, self.icount)));
            }
            "tsc_hz" | "tsc_per_1024" | "pa_bits" | "vmcs_revision" => {
                return Err(format!("{name} cannot be {value:#x}"))
            }
            _ => {
                return Err(format!(
                    "no option {name:?}; there are tsc_real, tsc_hz, tsc_per_1024, pa_bits, vmcs_revision, seed, \
                     cr4_valid, xcr0_valid, xss_valid, sample"
                ))
            }
        }
        Ok(())
    }

    /// Counts and names an instruction that this processor does not have.
    #[cold]
    pub fn note_undefined(&mut self, u: &Uop) {
        self.counters.undefined += 1;
        let linear = self.gpr[super::state::BLOCK].wrapping_add(u.at.into());
        let linear = if self.long {
            linear
        } else {
            linear.wrapping_add(self.seg[super::state::CS].base) & 0xffff_ffff
        };
        let mut bytes = [0; 15];
        let mut have = 0;
        while have < 15
            && self
                .guest_read(linear.wrapping_add(have as u64), &mut bytes[have..=have])
                .is_ok()
        {
            have += 1;
        }
        let bits = super::decode::bitness(self.mode);
        let mut decoder =
            iced_x86::Decoder::with_ip(bits, &bytes[..have], linear, iced_x86::DecoderOptions::MPX);
        let insn = decoder.decode();
        let hex: String = bytes[..insn.len().min(have)]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let text = format!("{:?} [{hex}] at {linear:#x}", insn.code());
        if self.undefined.len() >= 100 {
            self.undefined.pop_front();
        }
        self.undefined.push_back(text);
    }
}
