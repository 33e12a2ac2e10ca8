//! SHA-384 in pieces whose state is plain bytes, so that the TDX module can keep it in a TD's TDCS.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use sha2::block_api::compress512;

const STATE: usize = 64;
const BLOCK: usize = 128;
const DIGEST: usize = 48;
/// FIPS 180-4, 5.3.4.
const INITIAL: [u64; 8] = [
    0xcbbb_9d5d_c105_9ed8,
    0x629a_292a_367c_d507,
    0x9159_015a_3070_dd17,
    0x152f_ecd8_f70e_5939,
    0x6733_2667_ffc0_0b31,
    0x8eb4_4a87_6858_1511,
    0xdb0c_2e0d_64f9_8fa7,
    0x47b5_481d_befa_4fa4,
];

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(sha384_init, module)?)?;
    module.add_function(wrap_pyfunction!(sha384_blocks, module)?)?;
    module.add_function(wrap_pyfunction!(sha384_final, module)?)
}

/// A context in memory: the chaining value, and how many bytes went into it (64 bits, little endian).
pub const CONTEXT: usize = STATE + 8;
/// The most that one instruction takes in.
const MOST: usize = 8 * BLOCK;

/// Whole blocks: a record, and room behind it for what comes from memory.
pub struct Input {
    bytes: [u8; MOST],
    record: usize,
    length: usize,
}

impl Input {
    pub fn new(record: &[u8], more: usize) -> PyResult<Input> {
        let length = record.len().saturating_add(more);
        if length > MOST || !length.is_multiple_of(BLOCK) {
            return Err(PyValueError::new_err(format!(
                "{length} bytes to hash, must be a multiple of {BLOCK} and at most {MOST}"
            )));
        }
        let mut bytes = [0; MOST];
        bytes[..record.len()].copy_from_slice(record);
        Ok(Input {
            bytes,
            record: record.len(),
            length,
        })
    }

    pub fn space(&mut self) -> &mut [u8] {
        &mut self.bytes[self.record..self.length]
    }

    pub fn compress_into(&self, context: &mut [u8; CONTEXT]) {
        let (state, count) = context.split_at_mut(STATE);
        let (blocks, _) = self.bytes[..self.length].as_chunks::<BLOCK>();
        let (words, _) = state.as_chunks_mut::<8>();
        let mut value: [u64; 8] = std::array::from_fn(|n| u64::from_be_bytes(words[n]));
        compress512(&mut value, blocks);
        for (word, value) in words.iter_mut().zip(value) {
            *word = value.to_be_bytes();
        }
        let (words, _) = count.as_chunks_mut::<8>();
        for word in words {
            *word = u64::from_le_bytes(*word)
                .wrapping_add(self.length as u64)
                .to_le_bytes();
        }
    }
}

/// The 64-byte SHA-384 chaining value at the start (SHA-512 words, big endian).
#[pyfunction]
fn sha384_init(py: Python<'_>) -> Bound<'_, PyBytes> {
    PyBytes::new(py, &to_bytes(INITIAL))
}

/// Compresses whole 128-byte blocks of `data` into `state`.
#[pyfunction]
fn sha384_blocks<'py>(py: Python<'py>, state: &[u8], data: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
    let (blocks, rest) = data.as_chunks::<BLOCK>();
    if !rest.is_empty() {
        let text = format!(
            "data is {} bytes long, not a multiple of {BLOCK}",
            data.len()
        );
        return Err(PyValueError::new_err(text));
    }
    let mut words = from_bytes(state)?;
    compress512(&mut words, blocks);
    Ok(PyBytes::new(py, &to_bytes(words)))
}

/// The 48-byte digest of `length` bytes already compressed (a multiple of 128) and `tail`.
#[pyfunction]
#[pyo3(signature = (state, length, tail = b"".as_slice()))]
fn sha384_final<'py>(
    py: Python<'py>,
    state: &[u8],
    length: u64,
    tail: &[u8],
) -> PyResult<Bound<'py, PyBytes>> {
    if !length.is_multiple_of(BLOCK as u64) {
        return Err(PyValueError::new_err(format!(
            "length is {length}, not a multiple of {BLOCK}"
        )));
    }
    let mut words = from_bytes(state)?;
    let bits = (u128::from(length) + tail.len() as u128) * 8;
    let (blocks, rest) = tail.as_chunks::<BLOCK>();
    compress512(&mut words, blocks);
    let mut end = [[0; BLOCK]; 2];
    end.as_flattened_mut()[..rest.len()].copy_from_slice(rest);
    end.as_flattened_mut()[rest.len()] = 0x80;
    // The length takes the last 16 bytes; with the 0x80 before it a long rest needs a second block.
    let used = if rest.len() + 1 + 16 <= BLOCK { 1 } else { 2 };
    end[used - 1][BLOCK - 16..].copy_from_slice(&bits.to_be_bytes());
    compress512(&mut words, &end[..used]);
    Ok(PyBytes::new(py, &to_bytes(words)[..DIGEST]))
}

fn to_bytes(words: [u64; 8]) -> [u8; STATE] {
    let mut bytes = [0; STATE];
    for (slot, word) in bytes.chunks_exact_mut(8).zip(words) {
        slot.copy_from_slice(&word.to_be_bytes());
    }
    bytes
}

fn from_bytes(state: &[u8]) -> PyResult<[u64; 8]> {
    if state.len() != STATE {
        return Err(PyValueError::new_err(format!(
            "state is {} bytes long, not {STATE}",
            state.len()
        )));
    }
    let (words, _) = state.as_chunks::<8>();
    Ok(std::array::from_fn(|n| u64::from_be_bytes(words[n])))
}
