//! `Trial`: test cases for the interpreter, in bulk.

use std::sync::Mutex;

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::cpu::trial;

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Trial>()
}

#[pyclass(frozen, module = "softtdx._silicon")]
pub struct Trial(Mutex<trial::Trial>);

#[pymethods]
impl Trial {
    #[new]
    fn new() -> PyResult<Trial> {
        trial::Trial::new()
            .map(|trial| Trial(Mutex::new(trial)))
            .map_err(|error| PyRuntimeError::new_err(format!("{error:?}")))
    }

    fn run<'py>(&self, py: Python<'py>, records: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
        if !records.len().is_multiple_of(trial::RECORD) {
            return Err(PyValueError::new_err(format!(
                "{} bytes are no whole number of {}-byte records",
                records.len(),
                trial::RECORD
            )));
        }
        let mut trial = self
            .0
            .try_lock()
            .map_err(|_| PyRuntimeError::new_err("this Trial is in use by another thread"))?;
        let trial: &mut trial::Trial = &mut trial;
        let mut done = records.to_vec();
        py.detach(|| trial.run(&mut done))
            .map_err(|error| PyRuntimeError::new_err(format!("{error:?}")))?;
        Ok(PyBytes::new(py, &done))
    }

    fn undefined(&self) -> PyResult<Vec<String>> {
        let trial = self
            .0
            .try_lock()
            .map_err(|_| PyRuntimeError::new_err("this Trial is in use by another thread"))?;
        Ok(trial.undefined())
    }
}
