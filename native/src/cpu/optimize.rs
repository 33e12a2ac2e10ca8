//! Improvements within a block, after decoding: nothing here changes what the guest can see.

use super::uop::Uop;

/// Placeholder for passes over a decoded block (see `exec::control` for the fusion of compare and branch).
pub fn pass(_block: &mut [Uop]) {}
