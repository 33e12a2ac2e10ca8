//! Control registers: what writes to them check and change, and what the VMCS makes of accesses to them.

use super::state::{cr0, cr4, efer, Cpu, Stop, CS};
use super::vmcs::field;
use super::vmx_ctl::{primary, secondary};
use super::vmx_exit::reason;

/// CR0 bits that exist.
const CR0_VALID: u64 = 0xe005_003f;

impl Cpu {
    /// What MOV from CR0 and SMSW see.
    pub fn cr0_seen(&self) -> u64 {
        self.cr0 & !self.ctl.cr0_mask | self.ctl.cr0_shadow & self.ctl.cr0_mask
    }

    pub fn cr4_seen(&self) -> u64 {
        self.cr4 & !self.ctl.cr4_mask | self.ctl.cr4_shadow & self.ctl.cr4_mask
    }

    /// MOV to CR0, LMSW, CLTS after interception: `value` for the bits the guest owns.
    pub fn write_cr0(&mut self, value: u64) -> Result<(), Stop> {
        let mask = self.ctl.cr0_mask;
        let value = value & !mask | self.cr0 & mask;
        if value >> 32 != 0
            || value & cr0::PG != 0 && value & cr0::PE == 0
            || value & cr0::NW != 0 && value & cr0::CD == 0
        {
            return Err(self.gp(0));
        }
        let value = value & CR0_VALID | cr0::ET;
        if value & cr0::PE == 0 && !self.ctl.secondary(secondary::UNRESTRICTED) {
            return Err(self.gp(0));
        }
        let changed = value ^ self.cr0;
        let mut efer = self.efer;
        if changed & cr0::PG != 0 {
            if value & cr0::PG != 0 {
                if self.efer & efer::LME != 0 {
                    if self.cr4 & cr4::PAE == 0 || self.seg[CS].long() {
                        return Err(self.gp(0));
                    }
                    efer |= efer::LMA;
                } else if self.cr4 & cr4::PAE != 0 && !self.load_pdptes(self.cr3)? {
                    return Err(self.gp(0));
                }
            } else {
                if self.long || self.cr4 & cr4::PCIDE != 0 {
                    return Err(self.gp(0));
                }
                efer &= !efer::LMA;
            }
        }
        self.cr0 = value;
        self.efer = efer;
        if changed & cr0::PE != 0 && value & cr0::PE == 0 {
            self.cpl = 0;
        }
        if changed & (cr0::PG | cr0::WP | cr0::PE) != 0 {
            self.flush_tlb();
        }
        self.refresh();
        Ok(())
    }

    pub fn write_cr3(&mut self, value: u64) -> Result<(), Stop> {
        let keep = self.cr4 & cr4::PCIDE != 0 && value >> 63 != 0;
        let value = if self.cr4 & cr4::PCIDE != 0 {
            value & !(1 << 63)
        } else {
            value
        };
        if self.long_mode() && value >> self.options.pa_bits.min(52) != 0 {
            return Err(self.gp(0));
        }
        if self.paging()
            && self.cr4 & cr4::PAE != 0
            && !self.long_mode()
            && !self.load_pdptes(value)?
        {
            return Err(self.gp(0));
        }
        let before = self.cr3;
        self.cr3 = value;
        if self.cr4 & cr4::PCIDE != 0 {
            self.switch_pcid(before as u16 & 0xfff, value as u16 & 0xfff, keep);
        } else {
            self.flush_tlb();
        }
        Ok(())
    }

    pub fn write_cr4(&mut self, value: u64) -> Result<(), Stop> {
        let mask = self.ctl.cr4_mask;
        let value = value & !mask | self.cr4 & mask;
        let changed = value ^ self.cr4;
        let bad = value & !self.options.cr4_valid & !(mask & self.cr4) != 0
            || self.long_mode() && value & cr4::PAE == 0
            || self.long_mode() && changed & cr4::LA57 != 0
            || changed & value & cr4::PCIDE != 0 && (!self.long_mode() || self.cr3 & 0xfff != 0);
        if bad {
            return Err(self.gp(0));
        }
        let paging = cr4::PAE | cr4::PSE | cr4::PGE | cr4::SMEP;
        if self.paging() && changed & paging != 0 && value & cr4::PAE != 0 && !self.long_mode() {
            let before = self.cr4;
            self.cr4 = value;
            let loaded = self.load_pdptes(self.cr3);
            self.cr4 = before;
            if !loaded? {
                return Err(self.gp(0));
            }
        }
        self.cr4 = value;
        let flush = paging | cr4::SMAP | cr4::PCIDE | cr4::PKE | cr4::LA57 | cr4::PKS;
        if changed & flush != 0 {
            self.flush_tlb();
        }
        self.refresh();
        Ok(())
    }

    /// Interception of MOV to CR0, CR3, CR4, CR8. `register` is the source's number.
    pub fn intercept_cr_write(&mut self, number: u8, register: u8, value: u64) -> Result<(), Stop> {
        let ctl = &self.ctl;
        let exits = match number {
            0 => (value ^ ctl.cr0_shadow) & ctl.cr0_mask != 0,
            4 => (value ^ ctl.cr4_shadow) & ctl.cr4_mask != 0,
            3 => {
                let targets = self.vmcs.get(field::CR3_TARGET_COUNT).min(4) as usize;
                let listed =
                    (0..targets).any(|n| self.vmcs.get(field::CR3_TARGET0.nth(n)) == value);
                ctl.primary(primary::CR3_LOAD) && !listed
            }
            8 => ctl.primary(primary::CR8_LOAD),
            _ => false,
        };
        if exits {
            return Err(self.exit_with(
                reason::CR_ACCESS,
                u64::from(number) | u64::from(register) << 8,
            ));
        }
        Ok(())
    }

    pub fn intercept_cr_read(&mut self, number: u8, register: u8) -> Result<(), Stop> {
        let exits = match number {
            3 => self.ctl.primary(primary::CR3_STORE),
            8 => self.ctl.primary(primary::CR8_STORE),
            _ => false,
        };
        if exits {
            return Err(self.exit_with(
                reason::CR_ACCESS,
                u64::from(number) | 1 << 4 | u64::from(register) << 8,
            ));
        }
        Ok(())
    }
}
