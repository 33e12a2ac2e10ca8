//! The exceptions of the silicon, and how a fault becomes one.

use pyo3::create_exception;
use pyo3::exceptions::PyException;
use pyo3::prelude::*;

use crate::mem::Fault;

create_exception!(
    softtdx._silicon,
    SiliconFault,
    PyException,
    "An access the hardware refuses. `pa` is the address, KeyID included."
);
create_exception!(
    softtdx._silicon,
    MachineCheck,
    SiliconFault,
    "#MC: poison was consumed (integrity failure of the line at `pa`)."
);
create_exception!(
    softtdx._silicon,
    BusFault,
    SiliconFault,
    "The address has reserved bits set, or names a private KeyID that may not be used (#PF with RSVD on hardware)."
);
create_exception!(
    softtdx._silicon,
    VmFail,
    PyException,
    "VMfailInvalid or VMfailValid. `error` is the VM-instruction error number, 0 for VMfailInvalid."
);

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("SiliconFault", py.get_type::<SiliconFault>())?;
    module.add("MachineCheck", py.get_type::<MachineCheck>())?;
    module.add("BusFault", py.get_type::<BusFault>())?;
    module.add("VmFail", py.get_type::<VmFail>())
}

/// The exception for `fault`.
pub fn raise(py: Python<'_>, fault: Fault) -> PyErr {
    let (error, pa) = match fault {
        Fault::Bus { pa } => (
            BusFault::new_err(format!("no access to physical address {pa:#x}")),
            pa,
        ),
        Fault::MachineCheck { pa } => (
            MachineCheck::new_err(format!("poison consumed at {pa:#x}")),
            pa,
        ),
    };
    with(py, error, "pa", pa)
}

/// VMfail with a VM-instruction error number (SDM vol. 3C, 32.4), 0 for VMfailInvalid.
pub fn vm_fail(py: Python<'_>, number: u32) -> PyErr {
    with(
        py,
        VmFail::new_err(format!("VM-instruction error {number}")),
        "error",
        u64::from(number),
    )
}

fn with(py: Python<'_>, error: PyErr, name: &str, value: u64) -> PyErr {
    match error.value(py).setattr(name, value) {
        Ok(()) => error,
        Err(other) => other,
    }
}
