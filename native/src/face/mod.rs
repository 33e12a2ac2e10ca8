//! The Python face: thin, and no policy. The contract is `src/softtdx/_silicon.pyi`.

pub mod core;
mod errors;
mod locks;
pub mod memory;
mod payloads;
mod sha384;
mod trial;

use pyo3::prelude::*;

pub use errors::{raise, vm_fail};

#[pymodule]
#[pyo3(name = "_silicon")]
fn silicon(module: &Bound<'_, PyModule>) -> PyResult<()> {
    errors::register(module)?;
    memory::register(module)?;
    core::register(module)?;
    locks::register(module)?;
    sha384::register(module)?;
    trial::register(module)?;
    payloads::register(module)
}
