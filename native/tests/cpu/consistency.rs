//! Blocks against single steps: the same program, once at full speed and once one instruction at a time, where nothing
//! is chained or fused. Both must agree on every register, flag, byte of memory and on the number of instructions.

use proptest::prelude::*;
use softtdx_silicon::mem::Agent;

use crate::machine::*;

/// One instruction of a random program, as bytes.
fn instruction() -> impl Strategy<Value = Vec<u8>> {
    // Registers other than RSP, RSI and RDI, which address memory below.
    let register = || prop::sample::select(vec![0u8, 1, 2, 3, 5]);
    let wide = || prop::bool::ANY.prop_map(|wide| if wide { vec![0x48] } else { vec![] });
    let modrm = move || {
        (register(), register(), 0..4u8, any::<i8>()).prop_map(|(reg, rm, kind, disp)| match kind {
            0 => vec![0x46 | reg << 3, disp as u8],
            1 => vec![0x07 | reg << 3],
            _ => vec![0xc0 | reg << 3 | rm],
        })
    };
    let join = |parts: Vec<Vec<u8>>| parts.concat();
    prop_oneof![
        // ALU, both directions and both widths.
        6 => (wide(), 0..8u8, 0..4u8, modrm()).prop_map(move |(w, op, form, m)| join(vec![w, vec![op * 8 + form], m])),
        // ALU with immediate.
        4 => (wide(), 0..8u8, modrm(), any::<u8>()).prop_map(move |(w, op, mut m, imm)| {
            m[0] = m[0] & !0x38 | op << 3;
            join(vec![w, vec![0x83], m, vec![imm]])
        }),
        // TEST, MOV, LEA, MOVZX, CMOV, SETcc, shifts, INC/DEC, BT, IMUL.
        3 => (wide(), prop::sample::select(vec![0x84u8, 0x85, 0x88, 0x89, 0x8a, 0x8b]), modrm())
            .prop_map(move |(w, op, m)| join(vec![w, vec![op], m])),
        2 => (wide(), 0x40..0x50u8, modrm()).prop_map(move |(w, op, m)| join(vec![w, vec![0x0f, op], m])),
        2 => (0x90..0xa0u8, modrm()).prop_map(move |(op, m)| join(vec![vec![0x0f, op], m])),
        2 => (wide(), prop::sample::select(vec![0xb6u8, 0xb7, 0xbe, 0xbf, 0xaf, 0xa3, 0xab, 0xc1]), modrm())
            .prop_map(move |(w, op, mut m)| {
                if matches!(op, 0xa3 | 0xab) {
                    m = vec![0xc0 | m[0] & 0x38 | 1];
                }
                join(vec![w, vec![0x0f, op], m])
            }),
        2 => (wide(), 0..8u8, modrm(), any::<u8>()).prop_map(move |(w, op, mut m, count)| {
            m[0] = m[0] & !0x38 | op << 3;
            join(vec![w, vec![0xc1], m, vec![count]])
        }),
        2 => (wide(), 0..2u8, modrm()).prop_map(move |(w, op, mut m)| {
            m[0] = m[0] & !0x38 | op << 3;
            join(vec![w, vec![0xff], m])
        }),
        1 => (register(),).prop_map(|(r,)| vec![0x50 | r]),
        1 => Just(vec![0x9c, 0x59]),
        // A conditional jump over the next few bytes: two one-byte NOPs stand there.
        6 => (0x70..0x80u8,).prop_map(|(op,)| vec![op, 2, 0x90, 0x90]),
        // A call over two bytes, which pops its return address again.
        1 => Just(vec![0xe8, 2, 0, 0, 0, 0x90, 0x90, 0x5b]),
    ]
}

#[derive(Debug, PartialEq, Eq)]
struct State {
    reason: u32,
    registers: Vec<u64>,
    rip: u64,
    rflags: u64,
    memory: Vec<u8>,
    retired: u64,
}

fn prepare(program: &[u8], registers: &[u64]) -> Machine {
    let mut m = Machine::new();
    m.write(CODE, program);
    m.write(CODE + program.len() as u64, &[0xf4]);
    m.cpu.gpr[..16].copy_from_slice(registers);
    m.cpu.gpr[RSI] = DATA + 0x100;
    m.cpu.gpr[RDI] = DATA + 0x200;
    m
}

fn state(m: &mut Machine, reason: u32) -> State {
    let mut memory = vec![0; 0x400];
    m.mem.read(DATA, &mut memory, Agent::SEAM).unwrap();
    State {
        reason,
        registers: m.cpu.gpr[..16].to_vec(),
        rip: m.get(field::RIP),
        rflags: m.get(field::RFLAGS),
        memory,
        retired: m.cpu.icount,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn blocks_and_single_steps_agree(
        program in proptest::collection::vec(instruction(), 1..60),
        registers in proptest::array::uniform16(any::<u64>()),
        rounds in 1..3,
    ) {
        let program = program.concat();
        let mut fast = prepare(&program, &registers);
        let mut slow = prepare(&program, &registers);
        slow.or(field::PRIMARY, 1 << 27);
        for _ in 0..rounds {
            // The second round runs along the chains that the first one made.
            let reason = fast.enter();
            let at_full_speed = state(&mut fast, reason);
            let reason = loop {
                let reason = slow.enter();
                if reason != exit::MTF {
                    break reason;
                }
            };
            prop_assert_eq!(&at_full_speed, &state(&mut slow, reason));
            for m in [&mut fast, &mut slow] {
                m.set(field::RIP, CODE);
            }
        }
    }

    #[test]
    fn an_interrupt_after_any_number_of_instructions_finds_the_same_state(
        program in proptest::collection::vec(instruction(), 5..40),
        registers in proptest::array::uniform16(any::<u64>()),
        after in 1u64..40,
    ) {
        let program = program.concat();
        let mut fast = prepare(&program, &registers);
        // The timer looks at block boundaries: stop where it stops.
        fast.cpu.host_timer = Some(after);
        let reason = fast.enter();
        let stopped = state(&mut fast, reason);
        let mut slow = prepare(&program, &registers);
        slow.or(field::PRIMARY, 1 << 27);
        while slow.cpu.icount < stopped.retired {
            prop_assert_eq!(slow.enter(), exit::MTF);
        }
        if reason == exit::INTERRUPT {
            prop_assert_eq!(stopped, state(&mut slow, exit::INTERRUPT));
        }
    }
}
