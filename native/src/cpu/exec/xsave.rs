//! FXSAVE, FXRSTOR and the XSAVE family.
//!
//! Components: 0 x87, 1 SSE, 2 AVX, 9 PKRU.

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::decode::mode;
use crate::cpu::exec::control;
use crate::cpu::ext::{Ext, MXCSR_INIT, MXCSR_MASK, X87};
use crate::cpu::state::{Cpu, Stop, RAX, RDX};
use crate::cpu::uop::{step, Flow, Handler, Ip, Uop};
use crate::cpu::vmx_ctl::secondary;
use crate::mem::Fault;

/// Largest area: legacy region, header, AVX, PKRU in the standard layout.
const AREA: usize = 2696;
const HEADER: usize = 512;
const LEGACY: usize = 576;
/// (component, offset in the standard layout, size) of those behind the header.
const EXTENDED: [(u32, usize, usize); 2] = [(2, 576, 256), (9, 2688, 8)];
const COMPACTED: u64 = 1 << 63;

fn put(area: &mut [u8], at: usize, bytes: &[u8]) {
    area[at..at + bytes.len()].copy_from_slice(bytes);
}

fn take<const N: usize>(area: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&area[at..at + N]);
    bytes
}

impl Ext {
    /// x87 part of the legacy region. `wide`: 64-bit instruction and data pointers.
    fn save_x87(&self, area: &mut [u8], wide: bool) {
        let x87 = &self.x87;
        put(area, 0, &x87.control.to_le_bytes());
        put(area, 2, &x87.status_word().to_le_bytes());
        area[4] = x87.valid;
        area[5] = 0;
        put(area, 6, &x87.opcode.to_le_bytes());
        if wide {
            put(area, 8, &x87.ip.to_le_bytes());
            put(area, 16, &x87.dp.to_le_bytes());
        } else {
            put(area, 8, &(x87.ip as u32).to_le_bytes());
            put(area, 12, &[0; 4]);
            put(area, 16, &(x87.dp as u32).to_le_bytes());
            put(area, 20, &[0; 4]);
        }
        for number in 0..8 {
            let (low, high) = x87.regs[usize::from(x87.top.wrapping_add(number)) & 7];
            let at = 32 + usize::from(number) * 16;
            put(area, at, &low.to_le_bytes());
            put(area, at + 8, &high.to_le_bytes());
            put(area, at + 10, &[0; 6]);
        }
    }

    fn load_x87(&mut self, area: &[u8], wide: bool) {
        let x87 = &mut self.x87;
        x87.control = u16::from_le_bytes(take(area, 0)) & 0x1f7f | 0x40;
        x87.set_status_word(u16::from_le_bytes(take(area, 2)));
        x87.valid = area[4];
        x87.opcode = u16::from_le_bytes(take(area, 6)) & 0x7ff;
        if wide {
            x87.ip = u64::from_le_bytes(take(area, 8));
            x87.dp = u64::from_le_bytes(take(area, 16));
        } else {
            x87.ip = u32::from_le_bytes(take(area, 8)).into();
            x87.dp = u32::from_le_bytes(take(area, 16)).into();
        }
        for number in 0..8 {
            let at = 32 + usize::from(number) * 16;
            let value = (
                u64::from_le_bytes(take(area, at)),
                u16::from_le_bytes(take(area, at + 8)),
            );
            x87.regs[usize::from(x87.top.wrapping_add(number)) & 7] = value;
        }
        x87.summarise();
    }

    /// The whole legacy region of 64-bit mode, MXCSR as it stands.
    pub fn load_legacy(&mut self, area: &[u8]) {
        self.load_x87(area, true);
        self.mxcsr = u32::from_le_bytes(take(area, 24));
        self.load_xmm(area, 16);
    }

    pub fn save_legacy(&self, area: &mut [u8]) {
        self.save_x87(area, true);
        put(area, 24, &self.mxcsr.to_le_bytes());
        put(area, 28, &MXCSR_MASK.to_le_bytes());
        self.save_xmm(area, 16);
    }

    fn save_xmm(&self, area: &mut [u8], registers: usize) {
        for (number, value) in self.xmm.iter().enumerate().take(registers) {
            put(area, 160 + number * 16, &value.to_le_bytes());
        }
    }

    fn load_xmm(&mut self, area: &[u8], registers: usize) {
        for (number, value) in self.xmm.iter_mut().enumerate().take(registers) {
            *value = u128::from_le_bytes(take(area, 160 + number * 16));
        }
    }
}

impl X87 {
    pub fn status_word(&self) -> u16 {
        self.status & !0x3800 | u16::from(self.top & 7) << 11
    }

    pub fn set_status_word(&mut self, value: u16) {
        self.top = (value >> 11 & 7) as u8;
        self.status = value & !0x3800;
    }
}

impl Cpu {
    /// Components that are not in their initial state.
    pub fn xinuse(&self) -> u64 {
        let initial = Ext::default();
        let x87 = &self.ext.x87;
        let fresh = x87.control == 0x37f
            && x87.status_word() == 0
            && x87.valid == 0
            && x87.regs.iter().all(|&register| register == (0, 0))
            && (x87.opcode, x87.ip, x87.dp) == (0, 0, 0);
        u64::from(!fresh)
            | u64::from(self.ext.xmm != initial.xmm) << 1
            | u64::from(self.ext.ymm != initial.ymm) << 2
            | u64::from(self.pkru != 0) << 9
    }

    /// The components of `mask` go to their initial state.
    pub fn xinit(&mut self, mask: u64) {
        if mask & 1 != 0 {
            self.ext.x87 = X87::default();
        }
        if mask & 2 != 0 {
            self.ext.xmm = [0; 16];
            self.ext.mxcsr = MXCSR_INIT;
        }
        if mask & 4 != 0 {
            self.ext.ymm = [0; 16];
        }
        if mask & 1 << 9 != 0 && self.pkru != 0 {
            self.pkru = 0;
            self.flush_tlb();
        }
    }

    fn save_component(&self, area: &mut [u8], component: u32, at: usize, registers: usize) {
        match component {
            2 => {
                for (number, value) in self.ext.ymm.iter().enumerate().take(registers) {
                    put(area, at + number * 16, &value.to_le_bytes());
                }
            }
            _ => put(area, at, &u64::from(self.pkru).to_le_bytes()),
        }
    }

    fn load_component(&mut self, area: &[u8], component: u32, at: usize, registers: usize) {
        match component {
            2 => {
                for (number, value) in self.ext.ymm.iter_mut().enumerate().take(registers) {
                    *value = u128::from_le_bytes(take(area, at + number * 16));
                }
            }
            _ => {
                let pkru = u32::from_le_bytes(take(area, at));
                if pkru != self.pkru {
                    self.pkru = pkru;
                    self.flush_tlb();
                }
            }
        }
    }

    /// Fills `area` (which holds what memory held) as XSAVE, XSAVEOPT, XSAVEC (`compact`) or XSAVES do. The bytes that
    /// may be written, in order of address.
    fn xsave_area(&self, area: &mut [u8], mask: u64, compact: bool, wide: bool) -> usize {
        let registers = if self.long { 16 } else { 8 };
        let inuse = self.xinuse() & mask;
        let mut end = LEGACY;
        if mask & 1 != 0 && (!compact || inuse & 1 != 0) {
            self.ext.save_x87(area, wide);
        }
        let mut saved = inuse;
        if mask & 6 != 0 {
            put(area, 24, &self.ext.mxcsr.to_le_bytes());
            put(area, 28, &MXCSR_MASK.to_le_bytes());
            if compact && mask & 2 != 0 && self.ext.mxcsr != MXCSR_INIT {
                saved |= 2;
            }
        }
        if mask & 2 != 0 && (!compact || saved & 2 != 0) {
            self.ext.save_xmm(area, registers);
        }
        for (component, standard, size) in EXTENDED {
            if mask >> component & 1 == 0 {
                continue;
            }
            let at = if compact { end } else { standard };
            if !compact || inuse >> component & 1 != 0 {
                self.save_component(area, component, at, registers);
            }
            end = end.max(at + size);
        }
        let before = u64::from_le_bytes(take(area, HEADER));
        if compact {
            put(area, HEADER, &saved.to_le_bytes());
            put(area, HEADER + 8, &(COMPACTED | mask).to_le_bytes());
            put(area, HEADER + 16, &[0; 48]);
        } else {
            put(area, HEADER, &(before & !mask | inuse).to_le_bytes());
        }
        end
    }

    /// XRSTOR and XRSTORS: `false` is #GP. `all`: components that may be restored (XCR0, or with IA32_XSS).
    fn xrstor_area(
        &mut self,
        area: &[u8],
        mask: u64,
        all: u64,
        only_compacted: bool,
        wide: bool,
    ) -> bool {
        let bv = u64::from_le_bytes(take(area, HEADER));
        let comp = u64::from_le_bytes(take(area, HEADER + 8));
        let compact = comp & COMPACTED != 0;
        let reserved = if compact {
            &area[HEADER + 16..HEADER + 64]
        } else {
            &area[HEADER + 16..HEADER + 24]
        };
        let format_ok = if compact {
            comp & !COMPACTED & !all == 0 && bv & !comp == 0
        } else {
            !only_compacted && comp == 0 && bv & !all == 0
        };
        if !format_ok || reserved.iter().any(|&byte| byte != 0) {
            return false;
        }
        let registers = if self.long { 16 } else { 8 };
        let loads = mask & bv & if compact { comp } else { u64::MAX };
        let mxcsr = u32::from_le_bytes(take(area, 24));
        let takes_mxcsr = if compact {
            loads & 2 != 0
        } else {
            mask & 6 != 0
        };
        if takes_mxcsr && mxcsr & !MXCSR_MASK != 0 {
            return false;
        }
        let kept = self.ext.mxcsr;
        self.xinit(mask & !loads);
        if !compact && mask & 2 == 0 {
            self.ext.mxcsr = kept;
        }
        if takes_mxcsr {
            self.ext.mxcsr = mxcsr;
        }
        if loads & 1 != 0 {
            self.ext.load_x87(area, wide);
        }
        if loads & 2 != 0 {
            self.ext.load_xmm(area, registers);
        }
        let mut end = LEGACY;
        for (component, standard, size) in EXTENDED {
            let at = if compact { end } else { standard };
            if loads >> component & 1 != 0 {
                self.load_component(area, component, at, registers);
            }
            if compact && comp >> component & 1 != 0 {
                end += size;
            }
        }
        true
    }

    /// Components of root-mode XSAVES: everything this processor has.
    fn root_components(&self) -> u64 {
        self.options.xcr0_valid | self.options.xss_valid
    }

    /// XSAVES by software in root mode.
    pub fn root_xsaves(&mut self, pa: u64, mask: u64) -> Result<(), Fault> {
        let mask = mask & self.root_components();
        let mut area = [0; AREA];
        let long = std::mem::replace(&mut self.long, true);
        let end = self.xsave_area(&mut area, mask, true, true);
        self.long = long;
        self.mem.write(pa, &area[..end], self.root_agent())
    }

    /// XRSTORS by software in root mode; `false`: the area is not one it accepts.
    pub fn root_xrstors(&mut self, pa: u64, mask: u64) -> Result<bool, Fault> {
        let mut area = [0; AREA];
        self.mem.read(pa, &mut area[..LEGACY], self.root_agent())?;
        let comp = u64::from_le_bytes(take(&area, HEADER + 8));
        let extra: usize = EXTENDED
            .iter()
            .filter(|(component, ..)| comp >> component & 1 != 0)
            .map(|(_, _, size)| size)
            .sum();
        self.mem.read(
            pa + LEGACY as u64,
            &mut area[LEGACY..LEGACY + extra],
            self.root_agent(),
        )?;
        let all = self.root_components();
        let long = std::mem::replace(&mut self.long, true);
        let ok = self.xrstor_area(&area, mask & all, all, true, true);
        self.long = long;
        Ok(ok)
    }
}

/// XSAVE (0), XSAVEOPT (1), XSAVEC (2), XSAVES (3). REX.W in `size`.
fn xsave(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let mut all = cpu.xcr0;
        if u.op == 3 {
            supervisor_form(cpu)?;
            all |= cpu.xss;
        }
        let mask = (cpu.gpr[RDX] << 32 | cpu.gpr[RAX] & 0xffff_ffff) & all;
        let at = aligned(cpu, u)?;
        let mut area = [0; AREA];
        let compact = u.op >= 2;
        // The whole extent is known before anything is written.
        let extent = extent(mask, compact);
        cpu.check_write(at, 1)?;
        cpu.read_linear(at, &mut area[..extent])?;
        cpu.check_write(at.wrapping_add(extent as u64 - 1), 1)?;
        let end = cpu.xsave_area(&mut area, mask, compact, u.size == 8);
        cpu.write_linear(at, &area[..end.max(extent)])
    })
}

fn extent(mask: u64, compact: bool) -> usize {
    let mut end = LEGACY;
    for (component, standard, size) in EXTENDED {
        if mask >> component & 1 != 0 {
            end = if compact { end + size } else { standard + size };
        }
    }
    end
}

fn xrstor(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let mut all = cpu.xcr0;
        if u.op == 3 {
            supervisor_form(cpu)?;
            all |= cpu.xss;
        }
        let mask = (cpu.gpr[RDX] << 32 | cpu.gpr[RAX] & 0xffff_ffff) & all;
        let at = aligned(cpu, u)?;
        let mut area = [0; AREA];
        cpu.read_linear(at, &mut area[..LEGACY])?;
        let comp = u64::from_le_bytes(take(&area, HEADER + 8));
        let end = if comp & COMPACTED != 0 {
            extent(comp & all, true)
        } else {
            extent(mask, false)
        };
        cpu.read_linear(at, &mut area[..end])?;
        if !cpu.xrstor_area(&area, mask, all, u.op == 3, u.size == 8) {
            return Err(cpu.gp(0));
        }
        Ok(())
    })
}

fn aligned(cpu: &mut Cpu, u: &Uop) -> Result<u64, Stop> {
    let at = cpu.ea(u)?;
    if at & 63 != 0 {
        return Err(cpu.gp(0));
    }
    Ok(at)
}

fn supervisor_form(cpu: &mut Cpu) -> Result<(), Stop> {
    if !cpu.ctl.secondary(secondary::XSAVES) {
        return Err(cpu.ud());
    }
    if cpu.cpl != 0 {
        return Err(cpu.gp(0));
    }
    Ok(())
}

fn fxsave(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let at = cpu.ea(u)?;
        if at & 15 != 0 {
            return Err(cpu.gp(0));
        }
        let registers = if cpu.long { 16 } else { 8 };
        let mut area = [0; 512];
        cpu.read_linear(at, &mut area)?;
        cpu.ext.save_x87(&mut area, u.size == 8);
        put(&mut area, 24, &cpu.ext.mxcsr.to_le_bytes());
        put(&mut area, 28, &MXCSR_MASK.to_le_bytes());
        cpu.ext.save_xmm(&mut area, registers);
        cpu.write_linear(at, &area[..416])
    })
}

fn fxrstor(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let at = cpu.ea(u)?;
        if at & 15 != 0 {
            return Err(cpu.gp(0));
        }
        let registers = if cpu.long { 16 } else { 8 };
        let mut area = [0; 512];
        cpu.read_linear(at, &mut area)?;
        let mxcsr = u32::from_le_bytes(take(&area, 24));
        if mxcsr & !MXCSR_MASK != 0 {
            return Err(cpu.gp(0));
        }
        cpu.ext.load_x87(&area, u.size == 8);
        cpu.ext.mxcsr = mxcsr;
        cpu.ext.load_xmm(&area, registers);
        Ok(())
    })
}

pub fn lower(insn: &Instruction, uop: &mut Uop, mode: u32) -> Option<Handler> {
    let wide = |uop: &mut Uop, wide: bool| uop.size = if wide { 8 } else { 4 };
    let mnemonic = insn.mnemonic();
    match mnemonic {
        Mnemonic::Fxsave | Mnemonic::Fxsave64 | Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => {
            if mode & (mode::TS | mode::EM) != 0 {
                return Some(control::unavailable(uop));
            }
            wide(
                uop,
                matches!(mnemonic, Mnemonic::Fxsave64 | Mnemonic::Fxrstor64),
            );
            let saves = matches!(mnemonic, Mnemonic::Fxsave | Mnemonic::Fxsave64);
            Some(if saves { fxsave } else { fxrstor })
        }
        Mnemonic::Xsave
        | Mnemonic::Xsave64
        | Mnemonic::Xsaveopt
        | Mnemonic::Xsaveopt64
        | Mnemonic::Xsavec
        | Mnemonic::Xsavec64
        | Mnemonic::Xsaves
        | Mnemonic::Xsaves64
        | Mnemonic::Xrstor
        | Mnemonic::Xrstor64
        | Mnemonic::Xrstors
        | Mnemonic::Xrstors64 => {
            if mode & mode::XSAVE == 0 {
                return Some(control::invalid(uop));
            }
            if mode & mode::TS != 0 {
                return Some(control::unavailable(uop));
            }
            wide(
                uop,
                matches!(
                    mnemonic,
                    Mnemonic::Xsave64
                        | Mnemonic::Xsaveopt64
                        | Mnemonic::Xsavec64
                        | Mnemonic::Xsaves64
                        | Mnemonic::Xrstor64
                        | Mnemonic::Xrstors64
                ),
            );
            uop.op = match mnemonic {
                Mnemonic::Xsave | Mnemonic::Xsave64 => 0,
                Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64 => 1,
                Mnemonic::Xsavec | Mnemonic::Xsavec64 => 2,
                Mnemonic::Xsaves | Mnemonic::Xsaves64 | Mnemonic::Xrstors | Mnemonic::Xrstors64 => {
                    3
                }
                _ => return Some(xrstor),
            };
            Some(
                if matches!(mnemonic, Mnemonic::Xrstors | Mnemonic::Xrstors64) {
                    xrstor
                } else {
                    xsave
                },
            )
        }
        _ => None,
    }
}
