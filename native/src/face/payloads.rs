//! The guest programs that `build.rs` made from `guests/`, as `PAYLOADS` of the Python module.

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

const PAYLOADS: &[(&str, &[u8])] = &[
    (
        "launcher",
        include_bytes!(concat!(env!("OUT_DIR"), "/launcher")),
    ),
    (
        "firmware",
        include_bytes!(concat!(env!("OUT_DIR"), "/firmware")),
    ),
    ("pyguest", include_bytes!(concat!(env!("OUT_DIR"), "/pyguest"))),
    ("demo", include_bytes!(concat!(env!("OUT_DIR"), "/demo"))),
];

/// Adds `PAYLOADS`, a dictionary from a guest program's name to its image, to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let payloads = PyDict::new(module.py());
    for (name, image) in PAYLOADS {
        payloads.set_item(name, PyBytes::new(module.py(), image))?;
    }
    module.add("PAYLOADS", payloads)
}
