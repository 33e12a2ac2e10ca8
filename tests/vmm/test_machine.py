"""Machines: the demo's guest, programs of other people, and every way a run can end."""

import shutil
import subprocess
import threading
import time
from dataclasses import replace

import pytest

from softtdx._silicon import PAYLOADS
from softtdx.attest.dcap import verify_with_dcap_qvl
from softtdx.hw import preset
from softtdx.vmm import End, Machine, MachineConfig, MachineError, parse_payload
from softtdx.vmm.boot import boot_host
from softtdx.vmm.quoting import QuotingService

MIB = 1 << 20
HELLO = r"""
static inline void outb(unsigned short port, unsigned char value)
{ __asm__ volatile("outb %0, %1" :: "a"(value), "Nd"(port)); }
static int counter = 41;
static volatile char zeroes[100000];
void _start(void)
{
    const char *text = "hello, world\n";
    for (; *text; text++) outb(0x3f8, *text);
    for (unsigned i = 0; i < sizeof zeroes; i++) if (zeroes[i]) counter = 0;
    counter++;
    outb(0x3f8, counter == 42 ? 'Y' : 'N');
    FINISH
}
"""


def compiled(tmp_path, finish):
    return built(tmp_path, HELLO.replace("FINISH", finish))


def built(tmp_path, text):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, program = tmp_path / "hello.c", tmp_path / "hello"
    source.write_text(text)
    base = ["-O2", "-ffreestanding", "-nostdlib", "-static", "-no-pie", "-fno-stack-protector", "-Wl,--build-id=none"]
    subprocess.run([compiler, *base, source, "-o", program], check=True, capture_output=True)
    return parse_payload(program.read_bytes(), "hello")


def run(host, payload, **options):
    with Machine(host, MachineConfig(**{"memory": 8 * MIB} | options)) as machine:
        machine.load(payload)
        return machine.run()


@pytest.mark.parametrize("vm", [False, True])
@pytest.mark.parametrize("finish", ['for (;;) __asm__("hlt");', "outb(0x501, 0);", "return;"])
def test_an_unmodified_freestanding_c_program_runs(host, tmp_path, vm, finish):
    if finish == "return;":
        finish = '__asm__ volatile("xorl %%eax, %%eax" ::: "eax");'
    result = run(host, compiled(tmp_path, finish), vm=vm)
    assert result.console == b"hello, world\nY"
    assert result.end is (End.HALTED if "hlt" in finish else End.EXIT)
    assert result.instructions > 1000


@pytest.mark.parametrize("vm", [False, True])
def test_the_status_that_a_program_ends_with_is_the_machines(host, tmp_path, vm):
    result = run(host, compiled(tmp_path, "outb(0x501, 7);"), vm=vm)
    assert (result.end, result.status, result.ok) == (End.EXIT, 7, False)


@pytest.mark.parametrize("vm", [False, True])
def test_string_output_works_too(host, vm):
    code = bytes.fromhex("66baf803b905000000488d3508000000f36eb00066ba0105ee") + b"12345"
    code = code.replace(bytes.fromhex("488d3508000000"), bytes.fromhex("488d3509000000"))
    result = run(host, parse_payload(code), vm=vm)
    assert result.console == b"12345"
    assert (result.end, result.status) == (End.EXIT, 0)


@pytest.mark.parametrize("vm", [False, True])
def test_an_exception_of_the_payload_is_reported_on_its_console(host, vm):
    result = run(host, parse_payload(bytes.fromhex("0f0b")), vm=vm)
    assert (result.end, result.status) == (End.EXIT, 0xFF)
    assert b"exception 0x6" in result.console
    assert b"rip 0x100000" in result.console


def test_the_demo_guest_proves_itself_to_an_independent_verifier(host):
    quoting = QuotingService(host.platform)
    with Machine(host, MachineConfig(memory=8 * MIB), quoting=quoting) as machine:
        machine.load(parse_payload(PAYLOADS["demo"], "demo"))
        result = machine.run()
    assert result.ok, result
    text = result.console.decode()
    assert "This is a trust domain." in text
    assert result.mrtd.hex() in text
    assert text.endswith("Goodbye.\r\n")
    assert verify_with_dcap_qvl(quoting.last_quote, quoting.pki).status == "UpToDate"


def test_the_demo_guest_runs_as_an_ordinary_vm(host):
    result = run(host, parse_payload(PAYLOADS["demo"], "demo"), vm=True)
    assert result.ok
    assert b"trust domain" not in result.console


def test_without_a_quoting_service_the_guest_is_told_so(host):
    result = run(host, parse_payload(PAYLOADS["demo"], "demo"))
    assert (result.end, result.status) == (End.EXIT, 1)
    assert b"GetQuote failed" in result.console


def test_two_runs_are_the_same_run(host):
    results = [run(host, parse_payload(PAYLOADS["demo"], "demo"), vm=True) for _ in range(2)]
    assert results[0].console == results[1].console
    assert results[0].instructions == results[1].instructions


@pytest.mark.parametrize("vm", [False, True])
def test_a_run_that_never_ends_is_stopped_from_outside(host, vm):
    with Machine(host, MachineConfig(memory=8 * MIB, vm=vm, vcpus=3)) as machine:
        machine.load(parse_payload(bytes.fromhex("ebfe")))
        threading.Timer(0.3, machine.stop).start()
        start = time.monotonic()
        assert machine.run().end is End.STOPPED
        assert time.monotonic() - start < 60


@pytest.mark.parametrize("vm", [False, True])
def test_other_vcpus_wait_until_the_payload_starts_them(host, vm):
    # Starts vCPU 1 through the boot info (RDI), waits until it wrote 'B', then ends.
    code = assemble_starter()
    result = run(host, parse_payload(code), vm=vm, vcpus=3)
    assert result.console == b"AB"
    assert (result.end, result.status) == (End.EXIT, 0)


def assemble_starter():
    entry = 0x10_0100
    main = b"".join(
        bytes.fromhex(part)
        for part in (
            "66baf803b041ee",  # out 'A'
            "48c74748" + entry.to_bytes(4, "little").hex(),  # ap_entry
            "48c7475000001800",  # ap_stack
            "48c7475800000000",  # ap_argument
            "48c7476001000000",  # ap_index = 1
            "66ba1005ee",  # wake
            "f390803c250002100001",  # pause; cmp byte [0x100200], 1
            "75f4",  # jne back
            "b00066ba0105ee",  # exit 0
        )
    )
    other = bytes.fromhex("66baf803b042eec604250002100001f4ebfd")
    image = bytearray(0x300)
    image[: len(main)] = main
    image[0x100 : 0x100 + len(other)] = other
    return bytes(image)


def test_tds_and_ordinary_vms_run_at_once(host, tmp_path):
    payload = compiled(tmp_path, "outb(0x501, 0);")
    results = []

    def one(vm):
        results.append(run(host, payload, vm=vm))

    threads = [threading.Thread(target=one, args=(vm,)) for vm in (False, True, False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(result.ok and result.console == b"hello, world\nY" for result in results)


def test_impossible_machines_are_refused():
    for options in ({"vcpus": 0}, {"vcpus": 65}, {"memory": 4096}):
        with pytest.raises(MachineError):
            MachineConfig(**options)


def test_a_seed_and_one_processor_give_the_same_run_twice():
    description = replace(preset("spr"), lps=1, seed=3)
    runs = []
    for _ in range(2):
        host = boot_host(description)
        quoting = QuotingService(host.platform)
        with Machine(host, MachineConfig(memory=4 * MIB), quoting=quoting) as machine:
            machine.load(parse_payload(PAYLOADS["demo"], "demo"))
            result = machine.run()
        assert result.ok
        runs.append((result.instructions, result.mrtd, result.console, quoting.last_report, result.stats))
    assert runs[0] == runs[1]


SMP = r"""
typedef unsigned long u64;
struct boot { u64 magic, vcpus, fixed[7]; volatile u64 entry, stack, argument, index; };
static inline void outb(unsigned short port, unsigned char value)
{ __asm__ volatile("outb %0, %1" :: "a"(value), "Nd"(port) : "memory"); }
static long counter, ready;
static char stacks[16][4096] __attribute__((aligned(16)));
static void work(void) { for (int i = 0; i < 20000; i++) __atomic_fetch_add(&counter, 1, __ATOMIC_SEQ_CST); }
static void other(u64 argument, u64 vcpu)
{
    if (argument == vcpu) __atomic_fetch_add(&ready, 1, __ATOMIC_SEQ_CST);
    work();
    __atomic_fetch_add(&ready, 1, __ATOMIC_SEQ_CST);
    for (;;) __asm__ volatile("cli; hlt");
}
void _start(struct boot *boot)
{
    for (u64 i = 1; i < boot->vcpus; i++) {
        boot->entry = (u64)other; boot->stack = (u64)stacks[i + 1]; boot->argument = i; boot->index = i;
        outb(0x510, 0);
        while (boot->index) __builtin_ia32_pause();
    }
    work();
    while (__atomic_load_n(&ready, __ATOMIC_SEQ_CST) != 2 * (long)(boot->vcpus - 1)) __builtin_ia32_pause();
    outb(0x501, counter == 20000 * (long)boot->vcpus ? 0 : 9);
}
"""


@pytest.mark.parametrize("vm", [False, True])
@pytest.mark.parametrize("vcpus", [2, 5])
def test_vcpus_share_memory_with_real_atomics_also_when_they_outnumber_processors(host, tmp_path, vm, vcpus):
    result = run(host, built(tmp_path, SMP), vm=vm, vcpus=vcpus)
    assert (result.end, result.status) == (End.EXIT, 0), result
