/* The launcher: the small measured firmware that `softtdx run` puts in front of a payload.
 *
 * It accepts the TD's memory, gives every vCPU an IDT whose #VE handler does by TDVMCALL what an unmodified program
 * does by IN, OUT, CPUID, RDMSR, WRMSR and HLT, and enters the payload with the boot info in RDI and the vCPU's index
 * in RSI. In an ordinary VM the same instructions exit to the VMM and the handler stays idle.
 *
 * If the boot info names an agent, that vCPU never enters the payload: it gives the TD's report to who asks outside.
 */
#include "accept.h"
#include "boot_info.h"
#include "layout.h"
#include "tdx.h"

extern struct boot_info boot_info;
extern uint64_t shared_window_table[512];
extern const char vectors[];

void enter_payload(uint64_t entry, uint64_t stack_top, uint64_t rdi, uint64_t rsi) __attribute__((noreturn));
void load_tables(const void *gdt, const void *idt);

_Static_assert(__builtin_offsetof(struct boot_info, percpu_base) == BOOT_INFO_PERCPU_BASE, "layout.h");
_Static_assert(__builtin_offsetof(struct boot_info, ap_index) == BOOT_INFO_AP_INDEX, "layout.h");
_Static_assert(PERCPU_SIZE == 1 << PERCPU_SHIFT, "layout.h");
_Static_assert(sizeof(struct boot_info) <= 4096, "the boot info is one page");

#define VECTOR_COUNT 32
#define VECTOR_STRIDE 16
#define VECTOR_VE 20
#define REPORT_DATA_SIZE 64
#define REPORT_SIZE 1024

struct frame {
    uint64_t r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax;
    uint64_t vector, error;
    uint64_t rip, cs, rflags, rsp, ss;
};

struct __attribute__((packed)) pointer {
    uint16_t limit;
    uint64_t base;
};

struct gate {
    uint16_t offset_low, selector;
    uint8_t ist, type;
    uint16_t offset_middle;
    uint32_t offset_high, reserved;
};

struct __attribute__((packed)) tss {
    uint32_t reserved0;
    uint64_t rsp[3];
    uint64_t reserved1;
    uint64_t ist[7];
    uint64_t reserved2;
    uint16_t reserved3, io_bitmap;
};

/* At the start of each vCPU's area; the stacks follow: IST 1 for exceptions, then the launcher's own at the end. */
struct percpu {
    uint64_t gdt[6];
    struct gate idt[VECTOR_COUNT];
    struct tss tss;
};

#define IST_TOP 0x3000

static uint32_t agent_data[REPORT_DATA_SIZE / 4] __attribute__((aligned(REPORT_DATA_SIZE)));
static uint32_t agent_report[REPORT_SIZE / 4] __attribute__((aligned(REPORT_SIZE)));

/* --- the console, for the launcher's last words */

static void put(char c)
{
    if (boot_info.is_td)
        vmcall(VMCALL_IO, 1, 1, PORT_SERIAL, (uint8_t)c, 0);
    else
        outb(PORT_SERIAL, (uint8_t)c);
}

static void put_string(const char *s)
{
    while (*s)
        put(*s++);
}

static void put_hex(uint64_t value)
{
    int shift = 60;

    while (shift && !(value >> shift))
        shift -= 4;
    for (; shift >= 0; shift -= 4)
        put("0123456789abcdef"[value >> shift & 15]);
}

static void __attribute__((noreturn)) stop(void)
{
    for (;;) {
        if (boot_info.is_td) {
            vmcall(VMCALL_IO, 1, 1, PORT_EXIT, EXIT_FAULT, 0);
            vmcall(VMCALL_HLT, 1, 0, 0, 0, 0);
        } else {
            outb(PORT_EXIT, EXIT_FAULT);
            __asm__ volatile("hlt");
        }
    }
}

static void __attribute__((noreturn)) die(const char *what, uint64_t value)
{
    put_string("\r\nlauncher: ");
    put_string(what);
    put_string(" 0x");
    put_hex(value);
    put_string("\r\n");
    stop();
}

/* --- #VE: what the TDX module leaves to us (GHCI, "#VE handling") */

static void set_low(uint64_t *reg, uint64_t value, unsigned size)
{
    if (size == 4)
        *reg = (uint32_t)value; /* a 32-bit write clears the upper half */
    else
        *reg = (*reg & ~((1ull << 8 * size) - 1)) | (value & ((1ull << 8 * size) - 1));
}

static uint64_t read_port(unsigned port, unsigned size)
{
    uint64_t value = 0;

    if (vmcall(VMCALL_IO, size, 0, port, 0, &value))
        return ~0ull; /* nobody answered: the bus floats */
    return value;
}

static uint64_t load(const void *from, unsigned size)
{
    return size == 1 ? *(const uint8_t *)from : size == 2 ? *(const uint16_t *)from : *(const uint32_t *)from;
}

static void store(void *to, uint64_t value, unsigned size)
{
    if (size == 1)
        *(uint8_t *)to = (uint8_t)value;
    else if (size == 2)
        *(uint16_t *)to = (uint16_t)value;
    else
        *(uint32_t *)to = (uint32_t)value;
}

/* Exit qualification of an I/O instruction: size - 1 in 2:0, in 3, string 4, REP 5, port 31:16. */
static void emulate_io(struct frame *f, uint64_t qualification)
{
    unsigned size = (qualification & 7) + 1, port = qualification >> 16 & 0xffff;
    int in = qualification >> 3 & 1, rep = qualification >> 5 & 1;
    int64_t step = f->rflags & 0x400 ? -(int64_t)size : (int64_t)size;

    if (!(qualification & 0x10)) {
        if (in)
            set_low(&f->rax, read_port(port, size), size);
        else
            vmcall(VMCALL_IO, size, 1, port, size == 4 ? (uint32_t)f->rax : f->rax & ((1ull << 8 * size) - 1), 0);
        return;
    }
    for (; !rep || f->rcx; f->rcx--) {
        if (in) {
            store((void *)f->rdi, read_port(port, size), size);
            f->rdi += step;
        } else {
            vmcall(VMCALL_IO, size, 1, port, load((const void *)f->rsi, size), 0);
            f->rsi += step;
        }
        if (!rep)
            break;
    }
}

static void emulate_cpuid(struct frame *f)
{
    struct vmcall_regs regs = {0, VMCALL_CPUID, (uint32_t)f->rax, (uint32_t)f->rcx, 0, 0};
    uint64_t status = tdvmcall(&regs);

    f->rax = status ? 0 : (uint32_t)regs.r12;
    f->rbx = status ? 0 : (uint32_t)regs.r13;
    f->rcx = status ? 0 : (uint32_t)regs.r14;
    f->rdx = status ? 0 : (uint32_t)regs.r15;
}

static void handle_ve(struct frame *f)
{
    struct tdcall_regs info = {0};
    uint64_t value = 0;

    if (tdcall(TDG_VP_VEINFO_GET, &info))
        die("#VE without information at", f->rip);
    switch ((uint32_t)info.rcx) {
    case VMCALL_CPUID:
        emulate_cpuid(f);
        break;
    case VMCALL_HLT:
        vmcall(VMCALL_HLT, !(f->rflags & 0x200), 0, 0, 0, 0);
        break;
    case VMCALL_IO:
        emulate_io(f, info.rdx);
        break;
    case VMCALL_RDMSR:
        if (vmcall(VMCALL_RDMSR, (uint32_t)f->rcx, 0, 0, 0, &value))
            die("RDMSR of a register that neither the module nor the VMM has:", (uint32_t)f->rcx);
        f->rax = (uint32_t)value;
        f->rdx = value >> 32;
        break;
    case VMCALL_WRMSR:
        if (vmcall(VMCALL_WRMSR, (uint32_t)f->rcx, (uint32_t)f->rax | f->rdx << 32, 0, 0, 0))
            die("WRMSR of a register that neither the module nor the VMM has:", (uint32_t)f->rcx);
        break;
    case VMCALL_MMIO:
        die("access to a guest-physical address without memory:", info.r9);
    default:
        die("#VE for exit reason", (uint32_t)info.rcx);
    }
    f->rip += (uint32_t)info.r10; /* the length of the instruction */
}

void handle_exception(struct frame *f)
{
    uint64_t cr2;

    if (f->vector == VECTOR_VE && boot_info.is_td) {
        handle_ve(f);
        return;
    }
    put_string("\r\nlauncher: the payload took exception 0x");
    put_hex(f->vector);
    put_string(" error 0x");
    put_hex(f->error);
    __asm__("movq %%cr2, %0" : "=r"(cr2));
    put_string(" cr2 0x");
    put_hex(cr2);
    die(" rip", f->rip);
}

/* --- starting up */

static void accept(uint64_t base, uint64_t size)
{
    uint64_t end = accept_range(base, size);

    if (end != base + size)
        die("cannot accept memory at", end);
}

static void fill_shared_window(uint64_t shared_bit)
{
    for (uint64_t i = 0; i < 512; i++)
        shared_window_table[i] = i << 30 | shared_bit | 0x83;
    boot_info.shared_bit = shared_bit;
    boot_info.shared_window = (uint64_t)SHARED_WINDOW_SLOT << 39;
}

static void set_up_vcpu(uint64_t index)
{
    struct percpu *cpu = (struct percpu *)(boot_info.percpu_base + index * PERCPU_SIZE);
    uint64_t tss = (uint64_t)&cpu->tss;
    struct pointer gdt = {sizeof cpu->gdt - 1, (uint64_t)cpu->gdt}, idt = {sizeof cpu->idt - 1, (uint64_t)cpu->idt};

    cpu->gdt[0] = 0;
    cpu->gdt[1] = 0x00cf9b000000ffff;
    cpu->gdt[2] = 0x00af9b000000ffff;
    cpu->gdt[3] = 0x00cf93000000ffff;
    cpu->gdt[4] = (sizeof cpu->tss - 1) | (tss & 0xffffff) << 16 | 0x89ull << 40 | (tss >> 24 & 0xff) << 56;
    cpu->gdt[5] = tss >> 32;
    cpu->tss = (struct tss){.ist = {(uint64_t)cpu + IST_TOP}, .io_bitmap = sizeof cpu->tss};
    for (int i = 0; i < VECTOR_COUNT; i++) {
        uint64_t handler = (uint64_t)vectors + i * VECTOR_STRIDE;

        cpu->idt[i] = (struct gate){handler & 0xffff, SELECTOR_CODE, 1, 0x8e, handler >> 16 & 0xffff, handler >> 32, 0};
    }
    load_tables(&gdt, &idt);
}

/* Serves requests until the TD ends: report data in, the status of TDG.MR.REPORT out, and the report if there is one. */
static void __attribute__((noreturn)) agent(void)
{
    for (;;) {
        struct tdcall_regs regs = {.rcx = (uint64_t)agent_report, .rdx = (uint64_t)agent_data};
        uint64_t status;

        if (read_port(PORT_AGENT, 1) != 1) /* waits for a request */
            continue;
        for (int i = 0; i < REPORT_DATA_SIZE / 4; i++)
            agent_data[i] = (uint32_t)read_port(PORT_AGENT, 4);
        status = tdcall(TDG_MR_REPORT, &regs) >> 32;
        vmcall(VMCALL_IO, 4, 1, PORT_AGENT, status, 0);
        for (int i = 0; !status && i < REPORT_SIZE / 4; i++)
            vmcall(VMCALL_IO, 4, 1, PORT_AGENT, agent_report[i], 0);
    }
}

/* Starts the agent as a payload starts a vCPU, and waits until the mailbox is free for the payload. */
static void start_agent(void)
{
    boot_info.ap_index = boot_info.agent;
    vmcall(VMCALL_IO, 1, 1, PORT_PARK, 0, 0);
    while (boot_info.ap_index)
        __asm__ volatile("pause");
}

void __attribute__((noreturn)) launcher_main(uint64_t is_td, uint64_t vcpu, uint64_t gpa_width)
{
    boot_info.is_td = is_td;
    if (boot_info.magic != BOOT_INFO_MAGIC || boot_info.range_count > MAX_RANGES)
        die("no boot info, but", boot_info.magic);
    if (is_td) {
        struct tdcall_regs info = {0};

        if (tdcall(TDG_VP_INFO, &info))
            die("TDG.VP.INFO failed on a TD of GPA width", gpa_width);
        for (uint64_t i = 0; i < boot_info.range_count; i++)
            if (boot_info.ranges[i].kind == RANGE_TO_ACCEPT)
                accept(boot_info.ranges[i].base, boot_info.ranges[i].size);
        fill_shared_window(1ull << ((info.rcx & 0x3f) - 1));
    } else {
        fill_shared_window(0);
    }
    set_up_vcpu(vcpu);
    if (is_td && boot_info.agent)
        start_agent();
    enter_payload(boot_info.entry, boot_info.stack_top, (uint64_t)&boot_info, vcpu);
}

void __attribute__((noreturn)) launcher_ap_main(uint64_t vcpu)
{
    set_up_vcpu(vcpu);
    boot_info.ap_index = 0; /* tells who started us that the mailbox is free again */
    if (boot_info.is_td && vcpu == boot_info.agent)
        agent();
    enter_payload(boot_info.ap_entry, boot_info.ap_stack, boot_info.ap_argument, vcpu);
}
