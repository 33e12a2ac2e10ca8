//! VMX, SMX, SGX and SEAM instructions as a guest meets them: nearly all of them are VM exits.

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::decode::gpr;
use crate::cpu::exec::control;
use crate::cpu::flags::VM;
use crate::cpu::state::{cr4, Cpu};
use crate::cpu::uop::{last, Flow, Handler, Ip, Uop};
use crate::cpu::vmx_ctl::secondary;
use crate::cpu::vmx_exit::reason;

fn exits(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| Err(cpu.exit_with(u.imm as u32, 0)))
}

/// VMX instructions with an operand or a mode requirement.
fn vmx(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        let compatibility = cpu.long_mode() && !cpu.long;
        let vmxon = u.imm as u32 == reason::VMXON;
        if !cpu.protected()
            || cpu.flags & VM != 0
            || compatibility
            || vmxon && cpu.cr4_seen() & cr4::VMXE == 0
        {
            return Err(cpu.ud());
        }
        let stop = cpu.exit_with(u.imm as u32, if u.mem { u.disp } else { 0 });
        cpu.exit.info = cpu.instruction_info(u, u32::from(u.op) << 28);
        Err(stop)
    })
}

/// TDCALL is a VM exit in SEAM non-root mode and undefined everywhere else.
fn tdcall(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, _| {
        if !cpu.guest_seam {
            return Err(cpu.ud());
        }
        Err(cpu.exit_with(reason::TDCALL, 0))
    })
}

fn getsec(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, _| {
        if cpu.cr4_seen() & cr4::SMXE == 0 {
            return Err(cpu.ud());
        }
        Err(cpu.exit_with(reason::GETSEC, 0))
    })
}

fn vmfunc(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, _| {
        if !cpu.ctl.secondary(secondary::VMFUNC) {
            return Err(cpu.ud());
        }
        Err(cpu.exit_with(reason::VMFUNC, 0))
    })
}

/// Instructions that exist only if a secondary control (`disp`) says so, and then exit with reason `imm`.
fn enabled(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        if !cpu.ctl.secondary(u.disp as u32) {
            return Err(cpu.ud());
        }
        if cpu.cpl != 0 {
            return Err(cpu.gp(0));
        }
        Err(cpu.exit_with(u.imm as u32, 0))
    })
}

pub fn lower(insn: &Instruction, uop: &mut Uop, _mode: u32) -> Option<Handler> {
    let (handler, reason): (Handler, u32) = match insn.mnemonic() {
        Mnemonic::Vmcall => (exits, reason::VMCALL),
        Mnemonic::Seamcall => (exits, reason::SEAMCALL),
        Mnemonic::Tdcall => (tdcall, 0),
        Mnemonic::Seamret | Mnemonic::Seamops | Mnemonic::Rsm | Mnemonic::Enclu => {
            return Some(control::invalid(uop))
        }
        Mnemonic::Vmclear => (vmx, reason::VMCLEAR),
        Mnemonic::Vmlaunch => (vmx, reason::VMLAUNCH),
        Mnemonic::Vmptrld => (vmx, reason::VMPTRLD),
        Mnemonic::Vmptrst => (vmx, reason::VMPTRST),
        Mnemonic::Vmread => (vmx, reason::VMREAD),
        Mnemonic::Vmresume => (vmx, reason::VMRESUME),
        Mnemonic::Vmwrite => (vmx, reason::VMWRITE),
        Mnemonic::Vmxoff => (vmx, reason::VMXOFF),
        Mnemonic::Vmxon => (vmx, reason::VMXON),
        Mnemonic::Invept => (vmx, reason::INVEPT),
        Mnemonic::Invvpid => (vmx, reason::INVVPID),
        Mnemonic::Getsec => (getsec, 0),
        Mnemonic::Vmfunc => (vmfunc, 0),
        Mnemonic::Encls => {
            uop.disp = secondary::ENCLS.into();
            (enabled, reason::ENCLS)
        }
        Mnemonic::Enclv => {
            uop.disp = secondary::ENCLV.into();
            (enabled, reason::ENCLV)
        }
        Mnemonic::Pconfig => {
            uop.disp = secondary::PCONFIG.into();
            (enabled, reason::PCONFIG)
        }
        _ => return None,
    };
    if matches!(
        insn.mnemonic(),
        Mnemonic::Vmread | Mnemonic::Vmwrite | Mnemonic::Invept | Mnemonic::Invvpid
    ) {
        let register = if uop.mem && insn.op0_kind() == iced_x86::OpKind::Memory {
            insn.op1_register()
        } else {
            insn.op0_register()
        };
        uop.op = gpr(register) & 15;
        uop.src = uop.op;
    }
    uop.imm = reason.into();
    uop.ends = true;
    Some(handler)
}
