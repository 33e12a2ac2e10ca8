//! `Core`: a logical processor, for Python.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyTuple};

use super::errors::{raise, vm_fail};
use super::memory::Memory;
use super::sha384;
use crate::cpu::{event, Cpu, Outcome, Shared, VmError};
use crate::mem::{Fault, TOP_LEVEL};

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Core>()
}

fn vm_error(py: Python<'_>, error: VmError) -> PyErr {
    match error {
        VmError::Memory(fault) => raise(py, fault),
        VmError::Fail(number) => vm_fail(py, number),
    }
}

/// Pages from which on zeroing them takes longer than to let other Python threads run meanwhile.
const LONG: u64 = 64;

/// Above every exit reason: the guest stopped at the escape instruction of a hook.
const ESCAPE: u32 = 0x1_0000;

#[pyclass(frozen, module = "softtdx._silicon")]
pub struct Core {
    cpu: Mutex<Box<Cpu>>,
    shared: Arc<Shared>,
    memory: Arc<crate::mem::Memory>,
}

impl Core {
    fn cpu(&self) -> PyResult<MutexGuard<'_, Box<Cpu>>> {
        self.cpu
            .try_lock()
            .map_err(|_| PyRuntimeError::new_err("this Core is in use by another thread"))
    }

    /// For an instruction that works on more than this processor's memory.
    pub fn with_cpu<T>(&self, op: impl FnOnce(&mut Cpu) -> T) -> PyResult<T> {
        Ok(op(&mut *self.cpu()?))
    }

    fn bus<T>(&self, py: Python<'_>, op: impl FnOnce(&mut Cpu) -> Result<T, Fault>) -> PyResult<T> {
        op(&mut *self.cpu()?).map_err(|fault| raise(py, fault))
    }

    fn vmx<T>(
        &self,
        py: Python<'_>,
        op: impl FnOnce(&mut Cpu) -> Result<T, VmError>,
    ) -> PyResult<T> {
        op(&mut *self.cpu()?).map_err(|error| vm_error(py, error))
    }

    fn run(
        &self,
        py: Python<'_>,
        mut step: impl FnMut(&mut Cpu) -> Result<Outcome, VmError> + Send,
    ) -> PyResult<u32> {
        let mut cpu = self.cpu()?;
        let cpu: &mut Cpu = &mut cpu;
        let mut outcome = py
            .detach(|| step(&mut *cpu))
            .map_err(|error| vm_error(py, error))?;
        loop {
            match outcome {
                Outcome::Exit(reason) => return Ok(reason),
                Outcome::Escape(hook) => return Ok(ESCAPE | u32::from(hook)),
                Outcome::Pause => {
                    py.check_signals()?;
                    outcome = py
                        .detach(|| cpu.resume())
                        .map_err(|error| vm_error(py, error))?;
                }
            }
        }
    }
}

fn index(value: usize, limit: usize) -> PyResult<usize> {
    if value < limit {
        Ok(value)
    } else {
        Err(PyValueError::new_err(format!(
            "register index {value}, must be below {limit}"
        )))
    }
}

#[pymethods]
impl Core {
    #[new]
    fn new(memory: &Bound<'_, Memory>, apic_id: u32) -> Core {
        let cpu = Box::new(Cpu::new(memory.get().0.clone(), apic_id));
        let (shared, memory) = (cpu.shared.clone(), cpu.mem.clone());
        Core {
            cpu: Mutex::new(cpu),
            shared,
            memory,
        }
    }

    #[getter]
    fn get_seam(&self) -> PyResult<bool> {
        Ok(self.cpu()?.seam)
    }
    #[setter]
    fn set_seam(&self, on: bool) -> PyResult<()> {
        self.cpu()?.set_seam(on);
        Ok(())
    }

    fn rd8(&self, py: Python<'_>, pa: u64) -> PyResult<u8> {
        self.bus(py, |c| c.mem.rd8(pa, c.root_agent()))
    }
    fn rd16(&self, py: Python<'_>, pa: u64) -> PyResult<u16> {
        self.bus(py, |c| c.mem.rd16(pa, c.root_agent()))
    }
    fn rd32(&self, py: Python<'_>, pa: u64) -> PyResult<u32> {
        self.bus(py, |c| c.mem.rd32(pa, c.root_agent()))
    }
    fn rd64(&self, py: Python<'_>, pa: u64) -> PyResult<u64> {
        self.bus(py, |c| c.mem.rd64(pa, c.root_agent()))
    }
    fn wr8(&self, py: Python<'_>, pa: u64, value: u8) -> PyResult<()> {
        self.bus(py, |c| c.mem.wr8(pa, value, c.root_agent()))
    }
    fn wr16(&self, py: Python<'_>, pa: u64, value: u16) -> PyResult<()> {
        self.bus(py, |c| c.mem.wr16(pa, value, c.root_agent()))
    }
    fn wr32(&self, py: Python<'_>, pa: u64, value: u32) -> PyResult<()> {
        self.bus(py, |c| c.mem.wr32(pa, value, c.root_agent()))
    }
    fn wr64(&self, py: Python<'_>, pa: u64, value: u64) -> PyResult<()> {
        self.bus(py, |c| c.mem.wr64(pa, value, c.root_agent()))
    }
    fn read<'py>(&self, py: Python<'py>, pa: u64, size: usize) -> PyResult<Bound<'py, PyBytes>> {
        PyBytes::new_with(py, size, |into| {
            self.bus(py, |c| c.mem.read(pa, into, c.root_agent()))
        })
    }
    fn write(&self, py: Python<'_>, pa: u64, data: &[u8]) -> PyResult<()> {
        self.bus(py, |c| c.mem.write(pa, data, c.root_agent()))
    }
    fn cas64(&self, py: Python<'_>, pa: u64, old: u64, new: u64) -> PyResult<u64> {
        self.bus(py, |c| c.mem.cas64(pa, old, new, c.root_agent()))
    }
    #[pyo3(signature = (pa, pages = 1))]
    fn zero_page(&self, py: Python<'_>, pa: u64, pages: u64) -> PyResult<()> {
        if pages < LONG {
            return self.bus(py, |c| c.mem.zero_pages(pa, pages, c.root_agent()));
        }
        let mut cpu = self.cpu()?;
        let cpu: &mut Cpu = &mut cpu;
        py.detach(move || cpu.mem.zero_pages(pa, pages, cpu.root_agent()))
            .map_err(|fault| raise(py, fault))
    }
    fn copy_page(&self, py: Python<'_>, dst: u64, src: u64) -> PyResult<()> {
        self.bus(py, |c| c.mem.copy_page(dst, src, c.root_agent()))
    }

    /// Down an EPT by one call: (address of the entry, the entry, its level).
    fn walk_ept(
        &self,
        py: Python<'_>,
        table: u64,
        top: u32,
        gpa: u64,
        level: u32,
    ) -> PyResult<(u64, u64, u32)> {
        if top > TOP_LEVEL {
            return Err(PyValueError::new_err(format!(
                "level {top} of a table, the highest is {TOP_LEVEL}"
            )));
        }
        let end = self.bus(py, |c| {
            c.mem.walk_ept(table, top, gpa, level, c.root_agent())
        })?;
        Ok((end.at, end.entry, end.level))
    }
    /// SHA-384 of memory into memory: `record`, then `size` bytes at `source`, into the context at `pa`.
    #[pyo3(signature = (pa, record, source = 0, size = 0))]
    fn extend_sha384(
        &self,
        py: Python<'_>,
        pa: u64,
        record: &[u8],
        source: u64,
        size: usize,
    ) -> PyResult<()> {
        let mut input = sha384::Input::new(record, size)?;
        self.bus(py, |c| {
            let agent = c.root_agent();
            let mut context = [0; sha384::CONTEXT];
            c.mem.read(source, input.space(), agent)?;
            c.mem.read(pa, &mut context, agent)?;
            input.compress_into(&mut context);
            c.mem.write(pa, &context, agent)
        })
    }

    fn gpr(&self, number: usize) -> PyResult<u64> {
        Ok(self.cpu()?.gpr[index(number, 16)?])
    }
    fn set_gpr(&self, number: usize, value: u64) -> PyResult<()> {
        self.cpu()?.gpr[index(number, 16)?] = value;
        Ok(())
    }
    fn gprs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let cpu = self.cpu()?;
        PyTuple::new(py, &cpu.gpr[..16])
    }
    fn set_gprs(&self, values: [u64; 16]) -> PyResult<()> {
        self.cpu()?.gpr[..16].copy_from_slice(&values);
        Ok(())
    }
    fn load_gprs(&self, py: Python<'_>, pa: u64) -> PyResult<()> {
        self.bus(py, |c| {
            let mut bytes = [0; 128];
            c.mem.read(pa, &mut bytes, c.root_agent())?;
            for (number, word) in bytes.chunks_exact(8).enumerate() {
                c.gpr[number] = word
                    .iter()
                    .rev()
                    .fold(0, |value, byte| value << 8 | u64::from(*byte));
            }
            Ok(())
        })
    }
    fn store_gprs(&self, py: Python<'_>, pa: u64) -> PyResult<()> {
        self.bus(py, |c| {
            let mut bytes = [0; 128];
            for (number, word) in bytes.chunks_exact_mut(8).enumerate() {
                word.copy_from_slice(&c.gpr[number].to_le_bytes());
            }
            c.mem.write(pa, &bytes, c.root_agent())
        })
    }
    fn xmm(&self, number: usize) -> PyResult<u128> {
        Ok(self.cpu()?.ext.xmm[index(number, 16)?])
    }
    fn set_xmm(&self, number: usize, value: u128) -> PyResult<()> {
        self.cpu()?.ext.xmm[index(number, 16)?] = value;
        Ok(())
    }
    fn xsave(&self, py: Python<'_>, pa: u64, mask: u64) -> PyResult<()> {
        self.bus(py, |c| c.root_xsaves(pa, mask))
    }
    fn xrstor(&self, py: Python<'_>, pa: u64, mask: u64) -> PyResult<()> {
        let restored = self.bus(py, |c| c.root_xrstors(pa, mask))?;
        if restored {
            Ok(())
        } else {
            Err(PyValueError::new_err(format!(
                "the XSAVE area at {pa:#x} is not one XRSTORS accepts (#GP)"
            )))
        }
    }
    fn xinit(&self, mask: u64) -> PyResult<()> {
        self.cpu()?.xinit(mask);
        Ok(())
    }

    #[getter]
    fn get_xcr0(&self) -> PyResult<u64> {
        Ok(self.cpu()?.xcr0)
    }
    #[setter]
    fn set_xcr0(&self, value: u64) -> PyResult<()> {
        self.cpu()?.xcr0 = value;
        Ok(())
    }
    #[getter]
    fn get_cr2(&self) -> PyResult<u64> {
        Ok(self.cpu()?.cr2)
    }
    #[setter]
    fn set_cr2(&self, value: u64) -> PyResult<()> {
        self.cpu()?.cr2 = value;
        Ok(())
    }
    #[getter]
    fn get_cr8(&self) -> PyResult<u64> {
        Ok(self.cpu()?.cr8)
    }
    #[setter]
    fn set_cr8(&self, value: u64) -> PyResult<()> {
        self.cpu()?.cr8 = value & 15;
        Ok(())
    }
    #[getter]
    fn get_dr(&self) -> PyResult<[u64; 5]> {
        let dr = self.cpu()?.dr;
        Ok([dr[0], dr[1], dr[2], dr[3], dr[6]])
    }
    #[setter]
    fn set_dr(&self, values: [u64; 5]) -> PyResult<()> {
        let mut cpu = self.cpu()?;
        cpu.dr[..4].copy_from_slice(&values[..4]);
        cpu.dr[6] = values[4];
        Ok(())
    }

    fn rdmsr(&self, msr: u32) -> PyResult<Option<u64>> {
        Ok(self.cpu()?.msr_read(msr))
    }
    fn wrmsr(&self, msr: u32, value: u64) -> PyResult<()> {
        self.cpu()?.msr_define(msr, value);
        Ok(())
    }
    fn rdtsc(&self) -> PyResult<u64> {
        Ok(match self.cpu.try_lock() {
            Ok(cpu) => cpu.tsc(),
            Err(_) => self.memory.tsc.load(Ordering::SeqCst),
        })
    }
    /// Time passes on the virtual TSC of this processor: the host was idle for `ticks`.
    fn advance_tsc(&self, ticks: u64) {
        self.shared.tsc_jump.fetch_add(ticks, Ordering::Relaxed);
    }
    /// The processor's own deadline timer: an external interrupt at this TSC value. `None` disarms it.
    #[pyo3(signature = (tsc))]
    fn set_host_timer(&self, tsc: Option<u64>) -> PyResult<()> {
        self.cpu()?.host_timer = tsc;
        Ok(())
    }

    #[pyo3(signature = (**options))]
    fn configure(&self, options: Option<&Bound<'_, PyDict>>) -> PyResult<()> {
        let mut cpu = self.cpu()?;
        for (name, value) in options.iter().flat_map(|options| options.iter()) {
            let name: String = name.extract()?;
            let number: u64 = match value.extract::<bool>() {
                Ok(on) => u64::from(on),
                Err(_) => value.extract()?,
            };
            cpu.configure(&name, number)
                .map_err(PyValueError::new_err)?;
        }
        Ok(())
    }

    fn vmclear(&self, py: Python<'_>, pa: u64) -> PyResult<()> {
        self.vmx(py, |c| c.vmclear(pa))
    }
    fn vmptrld(&self, py: Python<'_>, pa: u64) -> PyResult<()> {
        self.vmx(py, |c| c.vmptrld(pa))
    }
    /// The address of the current VMCS; all ones if there is none.
    fn vmptrst(&self) -> PyResult<u64> {
        Ok(self.cpu()?.vmcs_pa.unwrap_or(u64::MAX))
    }
    fn vmread(&self, py: Python<'_>, field: u32) -> PyResult<u64> {
        self.vmx(py, |c| c.vmread(field))
    }
    fn vmwrite(&self, py: Python<'_>, field: u32, value: u64) -> PyResult<()> {
        self.vmx(py, |c| c.vmwrite(field, value))
    }
    fn vmenter(&self, py: Python<'_>, launch: bool) -> PyResult<u32> {
        self.run(py, |cpu| cpu.vmenter(launch))
    }
    fn vmcontinue(&self, py: Python<'_>) -> PyResult<u32> {
        if !self.cpu()?.live {
            return Err(PyRuntimeError::new_err(
                "no guest stands at an escape of this Core",
            ));
        }
        self.run(py, Cpu::resume)
    }
    fn invept(&self, py: Python<'_>, kind: u64, eptp: u64) -> PyResult<()> {
        self.vmx(py, |c| c.invept(kind, eptp))
    }
    fn invvpid(&self, py: Python<'_>, kind: u64, vpid: u64, gla: u64) -> PyResult<()> {
        self.vmx(py, |c| c.invvpid(kind, vpid, gla))
    }

    fn kick(&self) {
        self.shared.post(event::INTERRUPT);
    }
    fn nmi(&self) {
        self.shared.post(event::NMI);
    }
    fn posted_interrupt(&self) {
        self.shared.post(event::POSTED);
    }

    fn allow_escape(&self, on: bool) -> PyResult<()> {
        self.cpu()?.set_allow_escape(on);
        Ok(())
    }
    fn live_state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let state = PyDict::new(py);
        for (name, value) in self.cpu()?.live_state() {
            state.set_item(name, value)?;
        }
        Ok(state)
    }
    fn set_live(&self, name: &str, value: u64) -> PyResult<()> {
        self.cpu()?
            .set_live(name, value)
            .map_err(PyValueError::new_err)
    }
    fn guest_read<'py>(
        &self,
        py: Python<'py>,
        gla: u64,
        size: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        PyBytes::new_with(py, size, |into| self.bus(py, |c| c.guest_read(gla, into)))
    }
    fn guest_write(&self, py: Python<'_>, gla: u64, data: &[u8]) -> PyResult<()> {
        self.bus(py, |c| c.guest_write(gla, data))
    }

    /// Instructions retired in non-root mode.
    #[getter]
    fn retired(&self) -> PyResult<u64> {
        Ok(self.cpu()?.icount)
    }
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = PyDict::new(py);
        let list = match self.cpu.try_lock() {
            Ok(cpu) => cpu.counter_list().to_vec(),
            // It runs: what it last showed.
            Err(_) => self
                .shared
                .counters
                .lock()
                .map(|list| list.clone())
                .unwrap_or_default(),
        };
        for (name, value) in list {
            counters.set_item(name, value)?;
        }
        Ok(counters)
    }
    fn samples(&self) -> PyResult<Vec<(u64, u64)>> {
        let samples = &self.cpu()?.samples;
        Ok(samples.as_ref().map_or_else(Vec::new, |kept| kept.list()))
    }
    fn undefined(&self) -> PyResult<Vec<String>> {
        Ok(self.cpu()?.undefined.iter().cloned().collect())
    }
}
