//! What the processor does for software in VMX root mode: the VMX instructions that manage a VMCS, and the register
//! file as that software sees it. Loads and stores go straight to [`crate::mem::Memory`].

use crate::mem::Fault;

use super::state::Cpu;
use super::vmcs::{field, Vmcs, REGION};

/// How a VMX instruction failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmError {
    /// VMfailInvalid (error 0) or VMfailValid with its VM-instruction error number.
    Fail(u32),
    /// The VMCS region could not be read or written.
    Memory(Fault),
}

impl From<Fault> for VmError {
    fn from(fault: Fault) -> Self {
        VmError::Memory(fault)
    }
}

/// VM-instruction error numbers (SDM vol. 3, 31.4).
pub mod error {
    pub const VMCLEAR_ADDRESS: u32 = 2;
    pub const LAUNCH_NOT_CLEAR: u32 = 4;
    pub const RESUME_NOT_LAUNCHED: u32 = 5;
    pub const ENTRY_CONTROLS: u32 = 7;
    pub const ENTRY_HOST_STATE: u32 = 8;
    pub const PTRLD_ADDRESS: u32 = 9;
    pub const PTRLD_REVISION: u32 = 11;
    pub const UNSUPPORTED_FIELD: u32 = 12;
    pub const INVEPT_OPERAND: u32 = 28;
}

impl Cpu {
    /// SEAMCALL (`on`) and SEAMRET. Each root mode has a current VMCS of its own: the host's comes back with SEAMRET,
    /// and SEAM software finds the one that it loaded last, which VMPTRLD then has nothing to do for.
    pub fn set_seam(&mut self, on: bool) {
        if self.seam != on {
            self.seam = on;
            std::mem::swap(&mut self.vmcs, &mut self.parked_vmcs.0);
            std::mem::swap(&mut self.vmcs_pa, &mut self.parked_vmcs.1);
        }
    }

    /// VMfailValid if there is a current VMCS, VMfailInvalid otherwise.
    pub fn vm_fail(&mut self, number: u32) -> VmError {
        if self.vmcs_pa.is_none() {
            return VmError::Fail(0);
        }
        self.vmcs
            .set(field::VM_INSTRUCTION_ERROR, u64::from(number));
        VmError::Fail(number)
    }

    fn vmcs_address_ok(&self, pa: u64) -> bool {
        pa & 0xfff == 0 && self.mem.split(pa).is_ok()
    }

    fn write_back(&mut self) -> Result<(), Fault> {
        let Some(pa) = self.vmcs_pa else {
            return Ok(());
        };
        let mut region = [0; REGION];
        region[..4].copy_from_slice(&self.options.vmcs_revision.to_le_bytes());
        self.vmcs.to_region(&mut region);
        self.mem.write(pa, &region, self.root_agent())
    }

    /// VMCLEAR: the region at `pa` holds the VMCS's state, its launch state is clear, and it is not current.
    pub fn vmclear(&mut self, pa: u64) -> Result<(), VmError> {
        if !self.vmcs_address_ok(pa) {
            return Err(self.vm_fail(error::VMCLEAR_ADDRESS));
        }
        if self.vmcs_pa == Some(pa) {
            self.vmcs.launched = false;
            self.write_back()?;
            self.vmcs_pa = None;
            *self.vmcs = Vmcs::default();
        } else {
            // The launch state of our layout is one byte.
            self.mem.wr8(pa + 8, 0, self.root_agent())?;
        }
        Ok(())
    }

    /// VMPTRLD: makes the VMCS at `pa` current.
    pub fn vmptrld(&mut self, pa: u64) -> Result<(), VmError> {
        if !self.vmcs_address_ok(pa) {
            return Err(self.vm_fail(error::PTRLD_ADDRESS));
        }
        if self.vmcs_pa == Some(pa) {
            return Ok(());
        }
        let mut region = [0; REGION];
        self.mem.read(pa, &mut region, self.root_agent())?;
        let revision = u32::from_le_bytes([region[0], region[1], region[2], region[3]]);
        if revision != self.options.vmcs_revision {
            return Err(self.vm_fail(error::PTRLD_REVISION));
        }
        self.write_back()?;
        *self.vmcs = Vmcs::from_region(&region);
        self.vmcs_pa = Some(pa);
        Ok(())
    }

    pub fn vmread(&mut self, encoding: u32) -> Result<u64, VmError> {
        if self.vmcs_pa.is_none() {
            return Err(VmError::Fail(0));
        }
        match self.vmcs.read(encoding) {
            Some(value) => Ok(value),
            None => Err(self.vm_fail(error::UNSUPPORTED_FIELD)),
        }
    }

    pub fn vmwrite(&mut self, encoding: u32, value: u64) -> Result<(), VmError> {
        if self.vmcs_pa.is_none() {
            return Err(VmError::Fail(0));
        }
        match self.vmcs.write(encoding, value) {
            Some(()) => Ok(()),
            None => Err(self.vm_fail(error::UNSUPPORTED_FIELD)),
        }
    }

    /// INVEPT of type 1 (single context) or 2 (all). Both drop everything here, which is allowed.
    pub fn invept(&mut self, kind: u64, _eptp: u64) -> Result<(), VmError> {
        if !(1..=2).contains(&kind) {
            return Err(self.vm_fail(error::INVEPT_OPERAND));
        }
        self.ept.clear();
        self.flush_tlb();
        Ok(())
    }

    /// INVVPID of types 0 to 3. Drops everything, which is allowed.
    pub fn invvpid(&mut self, kind: u64, vpid: u64, linear: u64) -> Result<(), VmError> {
        let canonical = ((linear << 7) as i64 >> 7) as u64 == linear;
        if kind > 3 || vpid > 0xffff || (kind != 2 && vpid == 0) || (kind == 0 && !canonical) {
            return Err(self.vm_fail(error::INVEPT_OPERAND));
        }
        self.flush_tlb();
        Ok(())
    }
}
