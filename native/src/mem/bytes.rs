//! Loads and stores on memory that other threads use at the same time.
//!
//! DRAM is shared by every simulated processor, so a data race on it is not a bug of this program but something a
//! guest does. All of it is therefore done with relaxed atomics: on the hosts we run on they compile to the plain
//! moves that a hardware access is, and an aligned access of up to 8 bytes is single-copy atomic, as the SDM
//! promises (vol. 3A, 9.1.1). Atomics of different sizes meet on the same bytes; Rust's model does not describe
//! that, the processors do (each access is one load or store of cached memory).

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, AtomicU8, Ordering};

/// An integer that one load or store moves.
pub trait Word: Copy + Eq {
    /// # Safety
    /// `at` is aligned to the size of `Self` and valid for reads for that size.
    unsafe fn load(at: *const u8) -> Self;
    /// # Safety
    /// `at` is aligned to the size of `Self`, and memory that only atomics access while shared.
    unsafe fn store(at: *mut u8, value: Self);
    /// Compare and exchange; returns the value found.
    /// # Safety
    /// As for `store`.
    unsafe fn cas(at: *mut u8, old: Self, new: Self) -> Self;
    fn from_wide(value: u128) -> Self;
    fn wide(self) -> u128;
}

macro_rules! word {
    ($int:ty, $atomic:ty) => {
        impl Word for $int {
            #[inline(always)]
            unsafe fn load(at: *const u8) -> $int {
                // SAFETY: aligned and valid by the caller's promise; atomics need no exclusive access.
                <$int>::from_le(
                    unsafe { <$atomic>::from_ptr(at.cast_mut().cast()) }.load(Ordering::Relaxed),
                )
            }

            #[inline(always)]
            unsafe fn store(at: *mut u8, value: $int) {
                // SAFETY: as in `load`.
                unsafe { <$atomic>::from_ptr(at.cast()) }.store(value.to_le(), Ordering::Relaxed);
            }

            #[inline]
            unsafe fn cas(at: *mut u8, old: $int, new: $int) -> $int {
                // SAFETY: as in `load`.
                let cell = unsafe { <$atomic>::from_ptr(at.cast()) };
                let (Ok(found) | Err(found)) = cell.compare_exchange(
                    old.to_le(),
                    new.to_le(),
                    Ordering::SeqCst,
                    Ordering::SeqCst,
                );
                <$int>::from_le(found)
            }

            fn from_wide(value: u128) -> $int {
                value as $int
            }

            fn wide(self) -> u128 {
                u128::from(self)
            }
        }
    };
}

word!(u8, AtomicU8);
word!(u16, AtomicU16);
word!(u32, AtomicU32);
word!(u64, AtomicU64);

/// Copies out of shared memory in the widest aligned steps.
///
/// # Safety
/// `from` is valid for reads of `into.len()` bytes.
pub unsafe fn copy_out(from: *const u8, into: &mut [u8]) {
    let mut at = 0;
    if (from as usize).is_multiple_of(8) {
        let (words, _) = into.as_chunks_mut::<8>();
        for word in words {
            // SAFETY: 8-byte aligned, and `at + 8 <= into.len()`.
            *word = unsafe { u64::load(from.add(at)) }.to_le_bytes();
            at += 8;
        }
    }
    while at < into.len() {
        // SAFETY: `at + step <= into.len()`, and `step` divides the address.
        at += unsafe {
            let here = from.add(at);
            match step(here, into.len() - at) {
                8 => put(&mut into[at..], u64::load(here).to_le_bytes()),
                4 => put(&mut into[at..], u32::load(here).to_le_bytes()),
                2 => put(&mut into[at..], u16::load(here).to_le_bytes()),
                _ => put(&mut into[at..], u8::load(here).to_le_bytes()),
            }
        };
    }
}

/// Copies into shared memory in the widest aligned steps.
///
/// # Safety
/// `into` is valid for `from.len()` bytes of memory that only atomics access while shared.
pub unsafe fn copy_in(into: *mut u8, from: &[u8]) {
    let mut at = 0;
    if (into as usize).is_multiple_of(8) {
        let (words, _) = from.as_chunks::<8>();
        for word in words {
            // SAFETY: 8-byte aligned, and `at + 8 <= from.len()`.
            unsafe { u64::store(into.add(at), u64::from_le_bytes(*word)) };
            at += 8;
        }
    }
    while at < from.len() {
        let rest = &from[at..];
        // SAFETY: `at + step <= from.len()`, and `step` divides the address.
        at += unsafe {
            let here = into.add(at);
            let step = step(here, rest.len());
            match step {
                8 => u64::store(here, u64::from_le_bytes(take(rest))),
                4 => u32::store(here, u32::from_le_bytes(take(rest))),
                2 => u16::store(here, u16::from_le_bytes(take(rest))),
                _ => u8::store(here, rest[0]),
            }
            step
        };
    }
}

/// Zeroes whole 8-byte words.
///
/// # Safety
/// `into` is 8-byte aligned and valid for `len` bytes (a multiple of 8) that only atomics access while shared.
pub unsafe fn zero(into: *mut u8, len: usize) {
    for at in (0..len).step_by(8) {
        // SAFETY: in bounds and aligned by the caller's promise.
        unsafe { u64::store(into.add(at), 0) };
    }
}

/// The widest access (8, 4, 2, 1) that is aligned at `at` and fits in `left`.
#[inline(always)]
fn step(at: *const u8, left: usize) -> usize {
    let address = at as usize;
    match () {
        () if address.is_multiple_of(8) && left >= 8 => 8,
        () if address.is_multiple_of(4) && left >= 4 => 4,
        () if address.is_multiple_of(2) && left >= 2 => 2,
        () => 1,
    }
}

#[inline(always)]
fn put<const N: usize>(into: &mut [u8], bytes: [u8; N]) -> usize {
    into[..N].copy_from_slice(&bytes);
    N
}

#[inline(always)]
fn take<const N: usize>(from: &[u8]) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&from[..N]);
    bytes
}
