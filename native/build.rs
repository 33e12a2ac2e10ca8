//! Builds the guest programs in `guests/` with the machine's C compiler; `face::payloads` embeds them.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

const GUESTS: &str = "guests";

/// A guest program: what it is built from, and how it is linked.
struct Guest {
    name: &'static str,
    sources: &'static [&'static str],
    script: &'static str,
    flags: &'static [&'static str],
}

const PROGRAMS: &[Guest] = &[
    // A flat image at the top of 4 GiB: position independent, since such addresses do not fit signed 32 bits.
    Guest {
        name: "launcher",
        sources: &["launcher.c", "startup.S", "launcher_entry.S", "memory.c"],
        script: "launcher.ld",
        flags: &["-fpie", "-Wl,--oformat=binary"],
    },
    // The same for Linux: the TD firmware.
    Guest {
        name: "firmware",
        sources: &[
            "firmware.c",
            "startup.S",
            "firmware_entry.S",
            "sha384.c",
            "memory.c",
        ],
        script: "firmware.ld",
        flags: &["-fpie", "-Wl,--oformat=binary"],
    },
    Guest {
        name: "pyguest",
        sources: &["startup.S", "pyguest.S"],
        script: "pyguest.ld",
        flags: &["-fpie", "-Wl,--oformat=binary"],
    },
    Guest {
        name: "demo",
        sources: &["demo.c", "sha384.c", "memory.c"],
        script: "demo.ld",
        flags: &["-fno-pic"],
    },
];

const FLAGS: &[&str] = &[
    "-std=c11",
    "-O2",
    "-ffreestanding",
    "-fvisibility=hidden",
    "-mno-red-zone",
    "-mgeneral-regs-only",
    "-fno-stack-protector",
    "-fcf-protection=none",
    "-fno-asynchronous-unwind-tables",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-Wl,--build-id=none",
];

fn main() {
    println!("cargo:rerun-if-changed={GUESTS}");
    for variable in ["CC", "SOFTTDX_GUEST_CC"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    // Only the Python face carries the guests; `cargo test` of the silicon needs no C compiler.
    if env::var_os("CARGO_FEATURE_PYTHON").is_none() {
        return;
    }
    let compiler = x86_compiler();
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for guest in PROGRAMS {
        build(guest, &compiler, &out);
    }
}

/// A compiler command whose programs run on x86-64: $SOFTTDX_GUEST_CC, the one the `cc` crate finds, or a cross
/// compiler by its usual name.
fn x86_compiler() -> Vec<String> {
    let mut candidates: Vec<Vec<String>> = Vec::new();
    if let Ok(command) = env::var("SOFTTDX_GUEST_CC") {
        candidates.push(command.split_whitespace().map(String::from).collect());
    } else {
        let mut found = cc::Build::new();
        found.cargo_metadata(false).cargo_warnings(false);
        if let Ok(tool) = found.try_get_compiler() {
            candidates.push(vec![tool.path().to_string_lossy().into_owned()]);
        }
        candidates.push(vec!["x86_64-linux-gnu-gcc".into()]);
        candidates.push(vec![
            "clang".into(),
            "--target=x86_64-unknown-none-elf".into(),
            "-fuse-ld=lld".into(),
        ]);
    }
    let usable = candidates.iter().find(|command| targets_x86_64(command));
    let Some(command) = usable else {
        panic!(
            "no C compiler that makes x86-64 programs: install gcc or clang (on another architecture \
             x86_64-linux-gnu-gcc, or clang with lld), or name one in SOFTTDX_GUEST_CC; tried {candidates:?}"
        );
    };
    command.clone()
}

fn targets_x86_64(command: &[String]) -> bool {
    let Some((program, arguments)) = command.split_first() else {
        return false;
    };
    let answer = Command::new(program)
        .args(arguments)
        .arg("-dumpmachine")
        .output();
    answer.is_ok_and(|output| {
        let machine = String::from_utf8_lossy(&output.stdout);
        machine.starts_with("x86_64") && !machine.contains("darwin") && !machine.contains("windows")
    })
}

fn build(guest: &Guest, compiler: &[String], out: &Path) {
    let folder = Path::new(GUESTS);
    let mut command = Command::new(&compiler[0]);
    command
        .args(&compiler[1..])
        .args(FLAGS)
        .args(guest.flags)
        .arg("-T")
        .arg(folder.join(guest.script));
    command.args(guest.sources.iter().map(|source| folder.join(source)));
    command.arg(OsStr::new("-o")).arg(out.join(guest.name));
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    if !output.status.success() {
        panic!(
            "the guest program {} does not build:\n{command:?}\n{}",
            guest.name,
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
