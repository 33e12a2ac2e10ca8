//! `LockWords` and `HeldLocks`: the lock words of SEAM software, for Python.

use std::sync::{Arc, Mutex, MutexGuard};

use pyo3::exceptions::{PyIndexError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::core::Core;
use crate::mem;
use crate::words::{Bus, Words};

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<LockWords>()?;
    module.add_class::<HeldLocks>()?;
    module.add_class::<PamtPath>()
}

/// A word's key: an address, or one of software's small negative numbers as 64 bits.
struct Key(u64);

impl<'a, 'py> FromPyObject<'a, 'py> for Key {
    type Error = PyErr;

    fn extract(number: Borrowed<'a, 'py, PyAny>) -> PyResult<Key> {
        match number.extract::<u64>() {
            Ok(key) => Ok(Key(key)),
            Err(_) => Ok(Key(number.extract::<i64>()? as u64)),
        }
    }
}

#[pyclass(frozen, module = "softtdx._silicon")]
pub struct LockWords(Arc<Words>);

#[pymethods]
impl LockWords {
    #[new]
    fn new() -> LockWords {
        LockWords(Arc::default())
    }

    fn load(&self, key: Key) -> u64 {
        self.0.bus().load(key.0)
    }

    fn cas(&self, key: Key, old: u64, new: u64) -> u64 {
        self.0.bus().cas(key.0, old, new)
    }

    fn release(&self, key: Key, exclusive: bool) -> PyResult<()> {
        release(&mut self.0.bus(), key.0, exclusive)
    }

    fn rows<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let rows = PyDict::new(py);
        for (key, word) in self.0.rows() {
            rows.set_item(key as i64, word)?;
        }
        Ok(rows)
    }
}

fn release(bus: &mut Bus<'_>, key: u64, exclusive: bool) -> PyResult<()> {
    bus.release(key, exclusive).map_err(|word| {
        PyValueError::new_err(format!(
            "lock {key:#x} is released in a mode in which it is not held ({word:#x})"
        ))
    })
}

/// The three entries of a PAMT above a 4 KiB page.
#[pyclass(frozen, module = "softtdx._silicon")]
pub struct PamtPath {
    e1g: u64,
    e2m: u64,
    e4k: u64,
}

#[pymethods]
impl PamtPath {
    #[new]
    fn new(e1g: u64, e2m: u64, e4k: u64) -> PamtPath {
        PamtPath { e1g, e2m, e4k }
    }
}

const MASK_2M: u64 = !0x1F_FFFF;
const MASK_1G: u64 = !0x3FFF_FFFF;
const KEY_2M: u64 = 1;
const KEY_1G: u64 = 2;

#[pyclass(frozen, module = "softtdx._silicon")]
pub struct HeldLocks {
    words: Arc<Words>,
    watcher: usize,
    held: Mutex<Vec<(u64, bool)>>,
}

impl HeldLocks {
    fn list(&self) -> PyResult<MutexGuard<'_, Vec<(u64, bool)>>> {
        self.held
            .try_lock()
            .map_err(|_| PyRuntimeError::new_err("these HeldLocks are in use by another thread"))
    }
}

#[pymethods]
impl HeldLocks {
    #[new]
    fn new(words: &Bound<'_, LockWords>) -> HeldLocks {
        let words = words.get().0.clone();
        let watcher = words.bus().new_watcher();
        HeldLocks {
            words,
            watcher,
            held: Mutex::default(),
        }
    }

    fn __len__(&self) -> PyResult<usize> {
        Ok(self.list()?.len())
    }

    fn entries(&self) -> PyResult<Vec<(i64, bool)>> {
        let list = self.list()?;
        Ok(list
            .iter()
            .map(|(key, mode)| (*key as i64, *mode))
            .collect())
    }

    fn note(&self, key: Key, exclusive: bool) -> PyResult<()> {
        self.list()?.push((key.0, exclusive));
        Ok(())
    }

    fn take(&self, key: Key, exclusive: bool) -> PyResult<bool> {
        let mut list = self.list()?;
        let taken = self.words.bus().take(key.0, exclusive);
        if taken {
            list.push((key.0, exclusive));
        }
        Ok(taken)
    }

    fn watch(&self, key: Key) -> PyResult<()> {
        let list = self.list()?;
        if !list.iter().any(|(held, _)| *held == key.0) {
            let text = format!("lock {:#x} is not held", key.0);
            return Err(PyIndexError::new_err(text));
        }
        self.words.bus().watch(self.watcher, key.0);
        Ok(())
    }

    fn take_watched(&self, key: Key) -> PyResult<bool> {
        let mut list = self.list()?;
        let taken = self.words.bus().take_watched(self.watcher, key.0);
        if taken {
            list.push((key.0, true));
        }
        Ok(taken)
    }

    fn take_all(&self, entries: Vec<(Key, bool)>) -> PyResult<bool> {
        let mut list = self.list()?;
        let mut bus = self.words.bus();
        for (number, (key, exclusive)) in entries.iter().enumerate() {
            if !bus.take(key.0, *exclusive) {
                for (key, exclusive) in &entries[..number] {
                    release(&mut bus, key.0, *exclusive)?;
                }
                return Ok(false);
            }
        }
        list.extend(entries.iter().map(|(key, mode)| (key.0, *mode)));
        Ok(true)
    }

    /// A PAMT walk down to a 4 KiB entry where nobody is in the way: shared locks above, the one asked for on it.
    fn take_page(
        &self,
        core: &Bound<'_, Core>,
        pa: u64,
        path: &Bound<'_, PamtPath>,
        exclusive: bool,
    ) -> PyResult<Option<(u64, u64)>> {
        let mut list = self.list()?;
        let path = path.get();
        let path = mem::PamtPath {
            e1g: path.e1g,
            e2m: path.e2m.wrapping_add((pa & !MASK_1G & MASK_2M) >> 17),
            e4k: path.e4k.wrapping_add((pa & !MASK_1G & !0xFFF) >> 8),
        };
        let locks = [
            (pa & MASK_1G | KEY_1G, false),
            (pa & MASK_2M | KEY_2M, false),
            (pa, exclusive),
        ];
        core.get().with_cpu(|cpu| {
            let agent = cpu.root_agent();
            let mut bus = self.words.bus();
            // Who changes an entry holds its lock exclusively, so what is read here holds once the locks are taken.
            let free = locks.iter().all(|(key, mode)| bus.is_free(*key, *mode));
            if !free || cpu.mem.pamt_is_split(&path, agent) != Some(true) {
                return None;
            }
            let first = cpu.mem.rd64_now(path.e4k, agent)?;
            for (key, mode) in locks {
                bus.take(key, mode);
                list.push((key, mode));
            }
            Some((path.e4k, first))
        })
    }

    fn release(&self, key: Key, exclusive: bool) -> PyResult<()> {
        let mut list = self.list()?;
        let key = key.0;
        let Some(at) = list.iter().rposition(|entry| *entry == (key, exclusive)) else {
            return Err(PyIndexError::new_err(format!("lock {key:#x} is not held")));
        };
        release(&mut self.words.bus(), key, exclusive)?;
        list.remove(at);
        Ok(())
    }

    #[pyo3(signature = (count = 0))]
    fn release_to(&self, count: usize) -> PyResult<()> {
        let mut list = self.list()?;
        if list.len() > count {
            let mut bus = self.words.bus();
            while list.len() > count {
                if let Some((key, exclusive)) = list.pop() {
                    release(&mut bus, key, exclusive)?;
                }
            }
        }
        Ok(())
    }
}
