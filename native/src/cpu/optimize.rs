//! Improvements within a block, after decoding: nothing here changes what the guest can see.

use super::exec::{arith, control};
use super::uop::Uop;

/// Fuses the instruction before the closing conditional jump with it. The jump's own micro-operation stays behind,
/// unused: it is what closes the block.
pub fn pass(block: &mut [Uop]) {
    let [.., before, jump] = block else { return };
    if jump.alu == control::BRANCH {
        if let Some(run) = arith::fuse(before, jump.op) {
            before.run = run;
        }
    }
}
