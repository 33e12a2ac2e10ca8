//! `Memory` for Python, and the accesses that `Core` shares with it.
//!
//! An access that needs no wait keeps the GIL: to let it go costs more than the access. Everything else, in
//! particular whatever can lead to a shootdown, lets it go first, so that a processor that runs on another thread
//! may finish its block even if it needs Python for that.

use std::sync::Arc;

use pyo3::exceptions::{PyMemoryError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::errors::raise;
use crate::mem::{self, Agent, Config, Integrity, Unfit};

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Memory>()
}

/// All DRAM of a platform, behind its memory-encryption engine.
#[pyclass(frozen, module = "softtdx._silicon")]
pub struct Memory(pub Arc<mem::Memory>);

#[pymethods]
impl Memory {
    #[new]
    #[pyo3(signature = (ranges, *, keyid_bits, first_private_keyid, integrity = "crypto", tme = true, seed = 0))]
    fn new(
        ranges: Vec<(u64, u64)>,
        keyid_bits: u32,
        first_private_keyid: u32,
        integrity: &str,
        tme: bool,
        seed: u64,
    ) -> PyResult<Memory> {
        let integrity = match integrity {
            "crypto" => Integrity::Crypto,
            "logical" => Integrity::Logical,
            "none" => Integrity::None,
            other => {
                let text =
                    format!("integrity is {other:?}; it is \"crypto\", \"logical\" or \"none\"");
                return Err(PyValueError::new_err(text));
            }
        };
        let config = Config {
            ranges,
            keyid_bits,
            first_private_keyid,
            integrity,
            tme,
            seed,
        };
        Ok(Memory(Arc::new(mem::Memory::new(&config).map_err(unfit)?)))
    }

    /// PCONFIG. A key is (data key, tweak key), 16 bytes each; None draws it from the seeded source.
    #[pyo3(signature = (keyid, key = None))]
    fn set_key(
        &self,
        py: Python<'_>,
        keyid: u32,
        key: Option<([u8; 16], [u8; 16])>,
    ) -> PyResult<()> {
        py.detach(|| self.0.set_key(keyid, key, Agent::SEAM))
            .map_err(unfit)
    }

    fn set_seamrr(&self, py: Python<'_>, base: u64, size: u64) {
        py.detach(|| self.0.set_seamrr(base, size, Agent::HOST));
    }

    fn clear_key(&self, py: Python<'_>, keyid: u32) -> PyResult<()> {
        py.detach(|| self.0.clear_key(keyid, Agent::SEAM))
            .map_err(unfit)
    }

    #[pyo3(signature = (pa, size, seam = false))]
    fn read<'py>(
        &self,
        py: Python<'py>,
        pa: u64,
        size: usize,
        seam: bool,
    ) -> PyResult<Bound<'py, PyBytes>> {
        read(py, &self.0, pa, size, agent(seam))
    }

    #[pyo3(signature = (pa, data, seam = false))]
    fn write(&self, py: Python<'_>, pa: u64, data: &[u8], seam: bool) -> PyResult<()> {
        write(py, &self.0, pa, data, agent(seam))
    }

    /// LOCK CMPXCHG of 8 bytes: what was found; it was replaced if that equals `old`.
    #[pyo3(signature = (pa, old, new, seam = false))]
    fn cas64(&self, py: Python<'_>, pa: u64, old: u64, new: u64, seam: bool) -> PyResult<u64> {
        py.detach(|| self.0.cas64(pa, old, new, agent(seam)))
            .map_err(|fault| raise(py, fault))
    }

    /// Ciphertext, as a probe sees it; no KeyID in `pa`.
    fn raw_read<'py>(
        &self,
        py: Python<'py>,
        pa: u64,
        size: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        bytes(py, size, |into| {
            py.detach(|| self.0.raw_read(pa, into));
            Ok(())
        })
    }

    fn raw_write(&self, py: Python<'_>, pa: u64, data: &[u8]) {
        py.detach(|| self.0.raw_write(pa, data, Agent::HOST));
    }

    /// (64 bytes of ciphertext, 28-bit MAC, TD-owner bit, poisoned) of the line at `pa`.
    fn raw_line<'py>(&self, py: Python<'py>, pa: u64) -> (Bound<'py, PyBytes>, u32, bool, bool) {
        let line = self.0.raw_line(pa);
        (
            PyBytes::new(py, &line.data),
            line.mac,
            line.owner,
            line.poisoned,
        )
    }

    /// Puts a line back as `raw_line` gave it (replay), or at another address (splice).
    fn raw_set_line(&self, py: Python<'_>, pa: u64, data: [u8; 64], mac: u32, owner: bool) {
        py.detach(|| self.0.raw_set_line(pa, &data, mac, owner, Agent::HOST));
    }

    /// Bytes of DRAM that anything was ever written to, in whole chunks.
    fn resident(&self, py: Python<'_>) -> u64 {
        py.detach(|| self.0.resident())
    }
}

/// Reads `size` bytes as `agent`.
pub fn read<'py>(
    py: Python<'py>,
    memory: &mem::Memory,
    pa: u64,
    size: usize,
    agent: Agent,
) -> PyResult<Bound<'py, PyBytes>> {
    bytes(py, size, |into| fill(py, memory, pa, into, agent))
}

/// Reads an integer's `N` bytes, little endian.
pub fn load<const N: usize>(
    py: Python<'_>,
    memory: &mem::Memory,
    pa: u64,
    agent: Agent,
) -> PyResult<[u8; N]> {
    let mut into = [0; N];
    fill(py, memory, pa, &mut into, agent)?;
    Ok(into)
}

/// Writes `data`, an integer's bytes as well as a buffer.
pub fn write(
    py: Python<'_>,
    memory: &mem::Memory,
    pa: u64,
    data: &[u8],
    agent: Agent,
) -> PyResult<()> {
    if memory.write_now(pa, data, agent) {
        return Ok(());
    }
    py.detach(|| memory.write(pa, data, agent))
        .map_err(|fault| raise(py, fault))
}

fn fill(
    py: Python<'_>,
    memory: &mem::Memory,
    pa: u64,
    into: &mut [u8],
    agent: Agent,
) -> PyResult<()> {
    if memory.read_now(pa, into, agent) {
        return Ok(());
    }
    py.detach(|| memory.read(pa, into, agent))
        .map_err(|fault| raise(py, fault))
}

/// New `bytes` of `size`, filled by `fill`.
fn bytes<'py>(
    py: Python<'py>,
    size: usize,
    fill: impl FnOnce(&mut [u8]) -> PyResult<()>,
) -> PyResult<Bound<'py, PyBytes>> {
    if size > isize::MAX as usize / 2 {
        return Err(PyMemoryError::new_err(format!("{size} bytes asked for")));
    }
    PyBytes::new_with(py, size, fill)
}

fn agent(seam: bool) -> Agent<'static> {
    if seam {
        Agent::SEAM
    } else {
        Agent::HOST
    }
}

fn unfit(error: Unfit) -> PyErr {
    PyValueError::new_err(error.0)
}
