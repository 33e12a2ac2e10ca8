//! The DRAM cells and what the engine keeps beside them, page by page.
//!
//! Each range is reserved as one stretch of anonymous memory that the operating system zeroes on first touch, and
//! so are its per-page arrays. Nothing is allocated for memory that nobody touches, finding a page is one
//! subtraction, and no byte moves before `Dram` drops: host pointers into it stay valid until then.

use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicU8, Ordering};
use std::{io, ptr, slice};

use super::config::{Unfit, PAGE};

/// The grain of [`Dram::resident`].
pub const CHUNK: u64 = 2 << 20;

/// An atomic integer: any bytes are a value of it, and shared use is sound.
///
/// # Safety
/// All-zero bytes are a valid value, and `&Self` may be used from many threads.
unsafe trait Cell: Sync {}
// SAFETY: the standard atomics are both.
unsafe impl Cell for AtomicU8 {}
// SAFETY: as above.
unsafe impl Cell for AtomicU32 {}
// SAFETY: as above.
unsafe impl Cell for AtomicU64 {}

/// An array of zeroed cells that takes memory only where it is touched.
struct Lazy<T> {
    start: *mut T,
    len: usize,
    owns: PhantomData<T>,
}

// SAFETY: a `Lazy` owns its mapping, and its cells may be used from every thread (`Cell: Sync`).
unsafe impl<T: Cell> Send for Lazy<T> {}
// SAFETY: as above.
unsafe impl<T: Cell> Sync for Lazy<T> {}

impl<T: Cell> Lazy<T> {
    fn new(len: usize) -> io::Result<Lazy<T>> {
        // NORESERVE: a simulated machine may have more DRAM than its host.
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh anonymous mapping touches no existing memory.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len * size_of::<T>(),
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Lazy {
            start: start.cast(),
            len,
            owns: PhantomData,
        })
    }
}

impl<T> Deref for Lazy<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: the mapping is page aligned, `len` cells long, zeroed (a valid value), and lives as long as `self`.
        unsafe { slice::from_raw_parts(self.start, self.len) }
    }
}

impl<T> Drop for Lazy<T> {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that `new` made; `&mut self` proves nobody borrows from it.
        unsafe { libc::munmap(self.start.cast(), self.len * size_of::<T>()) };
    }
}

struct Region {
    base: u64,
    size: u64,
    cells: Lazy<AtomicU64>,
    words: Lazy<AtomicU64>,
    code: Lazy<AtomicU32>,
    out_at: Lazy<AtomicU64>,
    touched: Lazy<AtomicU8>,
}

/// All DRAM ranges of a platform.
pub(super) struct Dram {
    regions: Vec<Region>,
}

/// One page: its cells and its bookkeeping.
#[derive(Clone, Copy)]
pub(super) struct Page<'m> {
    /// DRAM address of the page.
    pub address: u64,
    /// Start of its 4096 bytes, 4 KiB aligned.
    pub data: *mut u8,
    /// The state word, see `page.rs`.
    pub word: &'m AtomicU64,
    /// The code generation.
    pub code: &'m AtomicU32,
    /// The epoch when a pointer was last handed out.
    pub out_at: &'m AtomicU64,
    touched: &'m AtomicU8,
}

impl Dram {
    pub fn new(ranges: &[(u64, u64)]) -> Result<Dram, Unfit> {
        let regions = ranges
            .iter()
            .map(|&(base, size)| Region::new(base, size))
            .collect::<Result<_, _>>()?;
        Ok(Dram { regions })
    }

    /// The page that the DRAM address `address` lies in.
    #[inline(always)]
    pub fn page(&self, address: u64) -> Option<Page<'_>> {
        self.regions.iter().find_map(|region| region.page(address))
    }

    /// Bytes in the chunks that were ever written to.
    pub fn resident(&self) -> u64 {
        self.regions.iter().map(Region::resident).sum()
    }
}

impl Region {
    fn new(base: u64, size: u64) -> Result<Region, Unfit> {
        let refuse = |error| {
            Unfit(format!(
                "the host cannot reserve {size:#x} bytes for the range at {base:#x}: {error}"
            ))
        };
        let pages = (size / PAGE) as usize;
        Ok(Region {
            base,
            size,
            cells: Lazy::new((size / 8) as usize).map_err(refuse)?,
            words: Lazy::new(pages).map_err(refuse)?,
            code: Lazy::new(pages).map_err(refuse)?,
            out_at: Lazy::new(pages).map_err(refuse)?,
            touched: Lazy::new(size.div_ceil(CHUNK) as usize).map_err(refuse)?,
        })
    }

    #[inline(always)]
    fn page(&self, address: u64) -> Option<Page<'_>> {
        let offset = address.wrapping_sub(self.base);
        if offset >= self.size {
            return None;
        }
        let index = (offset / PAGE) as usize;
        Some(Page {
            address: address & !(PAGE - 1),
            data: self.cells[index * (PAGE as usize / 8)].as_ptr().cast(),
            word: &self.words[index],
            code: &self.code[index],
            out_at: &self.out_at[index],
            touched: &self.touched[(offset / CHUNK) as usize],
        })
    }

    fn resident(&self) -> u64 {
        let chunk = |(index, _)| CHUNK.min(self.size - index as u64 * CHUNK);
        self.touched
            .iter()
            .enumerate()
            .filter(|(_, cell)| cell.load(Ordering::Relaxed) != 0)
            .map(chunk)
            .sum()
    }
}

impl Page<'_> {
    #[inline]
    pub fn touch(&self) {
        if self.touched.load(Ordering::Relaxed) == 0 {
            self.touched.store(1, Ordering::Relaxed);
        }
    }
}
