//! Processors that run while others take pages away from them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use super::super::bytes::Word;
use super::super::*;
use super::{memory, with_key, BASE, PRIVATE};

/// Ends the other threads of a test also when its own assertions fail.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Two fleets: processors that store through pointers, and a host that takes their page away and gives it back.
/// Each processor counts in its own word; no count may get lost and none may be seen where it must not be.
#[test]
fn no_store_through_a_pointer_outlives_a_shootdown() {
    let memory = memory(Integrity::Crypto);
    let pa = with_key(PRIVATE, BASE);
    let done = AtomicBool::new(false);
    let stores = AtomicU64::new(0);
    memory.zero_pages(pa, 1, Agent::SEAM).unwrap();
    thread::scope(|scope| {
        for n in 0..3 {
            let (memory, done, stores) = (&memory, &done, &stores);
            scope.spawn(move || {
                let slot = memory.register_cpu();
                let agent = Agent {
                    mode: Requester::Seam,
                    cpu: Some(&slot),
                };
                let mut pointer = None;
                slot.enter();
                while !done.load(Ordering::Relaxed) {
                    if slot.poll() {
                        pointer = None;
                    }
                    let Some(page) = pointer else {
                        if let Ok(PageAccess::Direct(page)) = memory.page_ptr(pa, true, agent) {
                            pointer = if slot.poll() { None } else { Some(page) };
                        }
                        continue;
                    };
                    for _ in 0..100 {
                        let page: *mut u8 = page;
                        // SAFETY: a page pointer in force: no poll said otherwise since it was handed out.
                        unsafe {
                            let cell = page.add(8 * n);
                            u64::store(cell, u64::load(cell) | 0x5A5A << 48);
                        }
                        stores.fetch_add(1, Ordering::Relaxed);
                    }
                }
                slot.leave();
            });
        }
        let _ends = Ends(&done);
        let mut rounds = 0;
        while rounds < 300 || stores.load(Ordering::Relaxed) < 1000 {
            // The host takes the whole line: from here on it must hold what the host wrote.
            memory.write_line(BASE, &[0x11; 64], Agent::HOST).unwrap();
            for _ in 0..20 {
                assert_eq!(memory.rd64(BASE, Agent::HOST), Ok(0x1111_1111_1111_1111));
            }
            memory.write_line(pa, &[0; 64], Agent::SEAM).unwrap();
            thread::yield_now();
            let line = memory.raw_line(BASE);
            assert!(line.owner && !line.poisoned);
            memory.raw_set_line(BASE, &line.data, line.mac, true, Agent::HOST);
            assert!(
                matches!(memory.rd64(pa, Agent::SEAM), Ok(0 | 0x5A5A_0000_0000_0000)),
                "verifies and decrypts"
            );
            rounds += 1;
        }
    });
}

/// Processors that take pages from each other while they run: nobody waits for one who waits.
#[test]
fn running_processors_take_pages_from_each_other_without_deadlock() {
    let memory = memory(Integrity::Crypto);
    thread::scope(|scope| {
        for n in 0..4u32 {
            let memory = &memory;
            scope.spawn(move || {
                let slot = memory.register_cpu();
                let agent = Agent {
                    mode: Requester::Seam,
                    cpu: Some(&slot),
                };
                slot.enter();
                for round in 0..2000u64 {
                    let keyid = [0, 1, PRIVATE, PRIVATE + 1][(n as usize + round as usize) % 4];
                    let pa = with_key(keyid, BASE + (round % 3) * PAGE);
                    memory.zero_pages(pa, 1, agent).unwrap();
                    slot.poll();
                    let _ = memory.page_ptr(pa, round % 2 == 0, agent).unwrap();
                    slot.poll();
                    memory.mark_code(pa, agent).unwrap();
                    slot.poll();
                    // Another may have taken the page since: then this is poison, and that is well.
                    let _ = memory.rd64(pa, agent);
                    slot.poll();
                    if round % 50 == 0 {
                        memory.set_key(1, None, agent).unwrap();
                        slot.poll();
                    }
                }
                slot.leave();
            });
        }
    });
}

#[test]
fn locked_counting_loses_nothing_between_pointers_and_the_bus() {
    let memory = memory(Integrity::Crypto);
    let pa = with_key(PRIVATE, BASE);
    memory.zero_pages(pa, 1, Agent::SEAM).unwrap();
    const EACH: u64 = 20_000;
    thread::scope(|scope| {
        for direct in [true, false] {
            let memory = &memory;
            scope.spawn(move || {
                let slot = memory.register_cpu();
                let agent = Agent {
                    mode: Requester::Seam,
                    cpu: Some(&slot),
                };
                slot.enter();
                for _ in 0..EACH {
                    loop {
                        slot.poll();
                        let old = memory.rd64(pa, agent).unwrap();
                        slot.poll();
                        let found = match memory.page_ptr(pa, true, agent).unwrap() {
                            // SAFETY: handed out just now, and `poll` says it is still in force.
                            PageAccess::Direct(page) if direct && !slot.poll() => unsafe {
                                u64::cas(page, old, old + 1)
                            },
                            _ => memory.cas64(pa, old, old + 1, agent).unwrap(),
                        };
                        if found == old {
                            break;
                        }
                    }
                }
                slot.leave();
            });
        }
        let memory = &memory;
        scope.spawn(move || {
            for _ in 0..200 {
                // A 16-byte exchange shuts everybody out for a moment.
                let found = memory.cas(pa + 16, 16, 0, 0, Agent::SEAM).unwrap();
                assert_eq!(found, 0);
                thread::yield_now();
            }
        });
    });
    assert_eq!(memory.rd64(pa, Agent::SEAM), Ok(2 * EACH));
}
