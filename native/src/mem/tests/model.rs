//! The lazy memory against an eager one: a model that keeps nothing but ciphertext, and computes each rule anew.

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::engine::{KeyPair, LineKey};
use super::super::*;
use super::{memory, with_key, BASE, KEYID_BITS, PRIVATE};
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

/// Two pages, so that accesses cross from one to the next.
const LINES: usize = 128;
const SPAN: usize = LINES * 64;
const KEYIDS: [u32; 4] = [0, 1, PRIVATE, PRIVATE + 1];

/// The model has its own keys: these pairs are programmed into both.
fn pair(keyid: u32, generation: u8) -> KeyPair {
    ([keyid as u8; 16], [generation; 16])
}

struct Eager {
    lines: Vec<RawLine>,
    generations: [u8; 4],
    integrity: Integrity,
    /// Keys of KeyID 0 are drawn, so the model borrows them.
    tme: std::sync::Arc<LineKey>,
    platform: [u8; 32],
}

impl Eager {
    fn new(memory: &Memory) -> Eager {
        let lines = (0..LINES as u64)
            .map(|n| memory.raw_line(BASE + n * 64))
            .collect();
        Eager {
            lines,
            generations: [0; 4],
            integrity: memory.integrity,
            tme: memory.keys.key(keys::Tag::TME),
            platform: engine::KeySource::new(7).draw(),
        }
    }

    fn key(&self, who: usize) -> LineKey {
        LineKey::new(&self.platform, &pair(KEYIDS[who], self.generations[who]))
    }

    fn crypt(&self, who: usize, line: usize, data: &mut [u8; 64], encrypt: bool) {
        let at = BASE + line as u64 * 64;
        match (who, encrypt) {
            (0, true) => self.tme.encrypt(at, data),
            (0, false) => self.tme.decrypt(at, data),
            (_, true) => self.key(who).encrypt(at, data),
            (_, false) => self.key(who).decrypt(at, data),
        }
    }

    fn mac(&self, who: usize, line: usize, data: &[u8; 64]) -> u32 {
        let at = BASE + line as u64 * 64;
        match (self.integrity, who) {
            (Integrity::Crypto, 0) => self.tme.mac(at, false, data),
            (Integrity::Crypto, _) => self.key(who).mac(at, who >= 2, data),
            _ => 0,
        }
    }

    fn read_line(&mut self, who: usize, line: usize) -> Result<[u8; 64], usize> {
        let raw = self.lines[line].clone();
        let mut data = raw.data;
        if raw.poisoned {
            return Err(line);
        }
        if who < 2 && raw.owner {
            return Ok([0; 64]);
        }
        let good = match self.integrity {
            Integrity::Crypto => who < 2 || raw.owner && raw.mac == self.mac(who, line, &data),
            Integrity::Logical => who < 2 || raw.owner,
            Integrity::None => true,
        };
        if !good {
            self.lines[line].poisoned = true;
            return Err(line);
        }
        self.crypt(who, line, &mut data, false);
        Ok(data)
    }

    fn write_line(
        &mut self,
        who: usize,
        line: usize,
        start: usize,
        bytes: &[u8],
    ) -> Result<(), usize> {
        let mut data = [0; 64];
        if bytes.len() < 64 {
            if who < 2 && (self.lines[line].poisoned || self.lines[line].owner) {
                self.lines[line].poisoned = true;
                return Ok(());
            }
            data = self.read_line(who, line)?;
        }
        data[start..start + bytes.len()].copy_from_slice(bytes);
        self.crypt(who, line, &mut data, true);
        let owner = who >= 2 && self.integrity != Integrity::None;
        self.lines[line] = RawLine {
            data,
            mac: self.mac(who, line, &data),
            owner,
            poisoned: false,
        };
        Ok(())
    }

    fn read(&mut self, who: usize, at: usize, into: &mut [u8]) -> Result<(), usize> {
        for (n, byte) in into.iter_mut().enumerate() {
            *byte = self.read_line(who, (at + n) / 64)?[(at + n) % 64];
        }
        Ok(())
    }

    fn write(&mut self, who: usize, at: usize, bytes: &[u8]) -> Result<(), usize> {
        let mut done = 0;
        while done < bytes.len() {
            let start = (at + done) % 64;
            let end = bytes.len().min(done + 64 - start);
            self.write_line(who, (at + done) / 64, start, &bytes[done..end])?;
            done = end;
        }
        Ok(())
    }
}

#[derive(Debug, Clone)]
enum Step {
    Read {
        who: usize,
        at: usize,
        len: usize,
    },
    Write {
        who: usize,
        at: usize,
        bytes: Vec<u8>,
    },
    Cas {
        who: usize,
        at: usize,
        size: usize,
        new: u128,
    },
    Zero {
        who: usize,
        page: usize,
    },
    Copy {
        dst: usize,
        src: usize,
    },
    Pointer {
        who: usize,
        at: usize,
        store: Option<u8>,
    },
    Flip {
        at: usize,
        bit: u8,
    },
    Move {
        from: usize,
        to: usize,
    },
    Mark {
        page: usize,
    },
    Rekey {
        who: usize,
        generation: u8,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let who = 0..4usize;
    // Few places, so that steps meet: the end of the first page and the start of the second.
    let at = prop_oneof![0..64usize, 4000..4200usize, SPAN - 256..SPAN - 192];
    let len = prop_oneof![Just(1usize), Just(8), Just(64), 1..192usize];
    let line = prop_oneof![0..3usize, 62..66usize];
    vec(
        prop_oneof![
            4 => (who.clone(), at.clone(), len.clone()).prop_map(|(who, at, len)| Step::Read { who, at, len }),
            4 => (who.clone(), at.clone(), len, any::<u8>(), any::<bool>()).prop_map(|(who, at, len, byte, line)| {
                let at = if line { at & !63 } else { at };
                Step::Write { who, at, bytes: vec![byte; len] }
            }),
            2 => (who.clone(), at.clone(), 0..5u32, any::<u128>())
                .prop_map(|(who, at, size, new)| Step::Cas { who, at, size: 1 << size, new }),
            2 => (who.clone(), 0..2usize).prop_map(|(who, page)| Step::Zero { who, page }),
            1 => (who.clone(), who.clone()).prop_map(|(dst, src)| Step::Copy { dst, src }),
            3 => (who.clone(), at.clone(), any::<Option<u8>>())
                .prop_map(|(who, at, store)| Step::Pointer { who, at, store }),
            1 => (at, 0..8u8).prop_map(|(at, bit)| Step::Flip { at, bit }),
            2 => (line.clone(), line).prop_map(|(from, to)| Step::Move { from, to }),
            1 => (0..2usize).prop_map(|page| Step::Mark { page }),
            1 => (1..4usize, 0..3u8).prop_map(|(who, generation)| Step::Rekey { who, generation }),
        ],
        1..60,
    )
}

/// Faults by the line they name.
fn by_line<T>(result: Result<T, Fault>) -> Result<T, usize> {
    result.map_err(|fault| match fault {
        Fault::MachineCheck { pa } => {
            ((pa & ((1 << (PA_BITS - KEYID_BITS)) - 1)) - BASE) as usize / 64
        }
        Fault::Bus { pa } => panic!("bus fault at {pa:#x}"),
    })
}

struct Both {
    lazy: Memory,
    eager: Eager,
    slot: Arc<CpuSlot>,
    /// The TLB: page and writability of each pointer that was not taken back yet.
    held: Vec<(usize, usize, bool, *mut u8)>,
    /// By page: the code generation when it was marked, and its lines then.
    marked: [Option<(u32, Vec<RawLine>)>; 2],
}

impl Both {
    fn new(integrity: Integrity) -> Both {
        let lazy = memory(integrity);
        for keyid in &KEYIDS[1..] {
            lazy.set_key(*keyid, Some(pair(*keyid, 0)), Agent::SEAM)
                .unwrap();
        }
        let slot = lazy.register_cpu();
        slot.enter();
        Both {
            eager: Eager::new(&lazy),
            lazy,
            slot,
            held: Vec::new(),
            marked: [None, None],
        }
    }

    fn run(&mut self, step: &Step) {
        let agent = Agent {
            mode: Requester::Seam,
            cpu: Some(&self.slot),
        };
        let pa = |who: usize, at: usize| with_key(KEYIDS[who], BASE + at as u64);
        let (lazy, eager) = (&self.lazy, &mut self.eager);
        match *step {
            Step::Read { who, at, len } => {
                let (mut ours, mut theirs) = (vec![0; len], vec![0; len]);
                let done = by_line(lazy.read(pa(who, at), &mut ours, agent));
                assert_eq!(done, eager.read(who, at, &mut theirs));
                assert!(done.is_err() || ours == theirs);
            }
            Step::Write { who, at, ref bytes } => {
                assert_eq!(
                    by_line(lazy.write(pa(who, at), bytes, agent)),
                    eager.write(who, at, bytes)
                );
            }
            Step::Cas { who, at, size, new } => {
                let mut found = vec![0; size];
                let mut then = eager.read(who, at, &mut found);
                if then.is_ok() {
                    then = eager.write(who, at, &new.to_le_bytes()[..size]);
                }
                let mut old = [0; 16];
                old[..size].copy_from_slice(&found);
                let old = u128::from_le_bytes(old);
                assert_eq!(
                    by_line(lazy.cas(pa(who, at), size, old, new, agent)),
                    then.map(|()| old)
                );
            }
            Step::Zero { who, page } => {
                lazy.zero_pages(pa(who, page * 4096), 1, agent).unwrap();
                eager.write(who, page * 4096, &[0; 4096]).unwrap();
            }
            Step::Copy { dst, src } => {
                let mut page = [0; 4096];
                let done = eager.read(src, 0, &mut page);
                assert_eq!(
                    by_line(lazy.copy_page(pa(dst, 4096), pa(src, 0), agent)),
                    done
                );
                if done.is_ok() {
                    eager.write(dst, 4096, &page).unwrap();
                }
            }
            Step::Pointer { who, at, store } => {
                let same = |entry: &&(usize, usize, bool, *mut u8)| {
                    (entry.0, entry.1) == (who, at / 4096) && entry.2 >= store.is_some()
                };
                let page = match self.held.iter().find(same) {
                    Some(entry) => entry.3,
                    None => {
                        let got = lazy.page_ptr(pa(who, at), store.is_some(), agent).unwrap();
                        let PageAccess::Direct(page) = got else {
                            return;
                        };
                        page
                    }
                };
                self.held.push((who, at / 4096, store.is_some(), page));
                // SAFETY: a page pointer that `poll` did not take back, used by the only thread there is.
                let cell = unsafe { AtomicU8::from_ptr(page.add(at % 4096)) };
                let mut byte = [0];
                let done = eager.read(who, at, &mut byte);
                assert_eq!(done, Ok(()), "a page handed out is readable");
                assert_eq!(cell.load(Relaxed), byte[0]);
                if let Some(value) = store {
                    cell.store(value, Relaxed);
                    eager.write(who, at, &[value]).unwrap();
                }
            }
            Step::Flip { at, bit } => {
                let mut byte = [0];
                lazy.raw_read(BASE + at as u64, &mut byte);
                byte[0] ^= 1 << bit;
                lazy.raw_write(BASE + at as u64, &byte, agent);
                eager.lines[at / 64].data[at % 64] ^= 1 << bit;
            }
            Step::Move { from, to } => {
                let line = lazy.raw_line(BASE + from as u64 * 64);
                lazy.raw_set_line(
                    BASE + to as u64 * 64,
                    &line.data,
                    line.mac,
                    line.owner,
                    agent,
                );
                eager.lines[to] = RawLine {
                    poisoned: false,
                    ..eager.lines[from].clone()
                };
            }
            Step::Mark { page } => {
                let generation = lazy.mark_code(pa(0, page * 4096), agent).unwrap();
                self.marked[page] = Some((generation, eager.lines[page * 64..][..64].to_vec()));
            }
            Step::Rekey { who, generation } => {
                lazy.set_key(KEYIDS[who], Some(pair(KEYIDS[who], generation)), agent)
                    .unwrap();
                eager.generations[who] = generation;
            }
        }
        if self.slot.poll() {
            self.held.clear();
        }
        for (page, marked) in self.marked.iter().enumerate() {
            let Some((generation, lines)) = marked else {
                continue;
            };
            let changed = self.eager.lines[page * 64..][..64] != *lines;
            let noticed = self.lazy.code_gen(BASE + page as u64 * 4096) != *generation;
            assert!(noticed || !changed, "a store to a code page went unnoticed");
        }
    }

    fn compare(&self) {
        let mut dump = vec![0; SPAN];
        self.lazy.raw_read(BASE, &mut dump);
        for (n, theirs) in self.eager.lines.iter().enumerate() {
            assert_eq!(
                &self.lazy.raw_line(BASE + n as u64 * 64),
                theirs,
                "line {n}"
            );
            assert_eq!(dump[n * 64..][..64], theirs.data, "line {n} of the dump");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn lazy_and_eager_memory_cannot_be_told_apart(
        steps in steps(),
        integrity in prop_oneof![Just(Integrity::Crypto), Just(Integrity::Logical), Just(Integrity::None)],
    ) {
        let mut both = Both::new(integrity);
        for step in &steps {
            both.run(step);
        }
        both.compare();
    }

    #[test]
    fn any_flipped_bit_is_noticed(bit in 0..512usize, bytes in vec(any::<u8>(), 64)) {
        let memory = memory(Integrity::Crypto);
        memory.write(with_key(PRIVATE, BASE), &bytes, Agent::SEAM).unwrap();
        let mut byte = [0];
        memory.raw_read(BASE + bit as u64 / 8, &mut byte);
        byte[0] ^= 1 << (bit % 8);
        memory.raw_write(BASE + bit as u64 / 8, &byte, Agent::HOST);
        prop_assert!(memory.rd8(with_key(PRIVATE, BASE + 63), Agent::SEAM).is_err());
    }
}
