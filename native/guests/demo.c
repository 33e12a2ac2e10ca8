/* The demo's guest: shows that it runs in a TD, uses its memory, measures something and asks for a quote of itself.
 *
 * An ordinary freestanding program: it prints to the serial port and leaves #VE to the launcher. What only a TD can do
 * (TDCALL) it does itself.
 */
#include "accept.h"
#include "boot_info.h"
#include "sha384.h"
#include "tdx.h"

#define PAGE 4096
#define TDREPORT_SIZE 1024
#define RTMR_INDEX 3
#define QUOTE_BUFFER_SIZE (4 * PAGE)

/* The head of a GetQuote buffer (GHCI, "TDG.VP.VMCALL<GetQuote>"). */
struct quote_buffer {
    uint64_t version, status;
    uint32_t in_size, out_size;
    uint8_t data[QUOTE_BUFFER_SIZE - 24];
};

#define QUOTE_IN_FLIGHT ~0ull

static uint8_t report_data[64] __attribute__((aligned(64)));
static uint8_t digest[48] __attribute__((aligned(64)));
static uint8_t report[TDREPORT_SIZE] __attribute__((aligned(TDREPORT_SIZE)));
static uint8_t shared_area[QUOTE_BUFFER_SIZE] __attribute__((aligned(PAGE)));
static uint64_t pattern[64 * 1024];

static void put(char c)
{
    while (!(inb(PORT_SERIAL + 5) & 0x20))
        ;
    outb(PORT_SERIAL, (uint8_t)c);
}

static void print(const char *s)
{
    for (; *s; s++) {
        if (*s == '\n')
            put('\r');
        put(*s);
    }
}

static void print_hex(const uint8_t *bytes, int size)
{
    for (int i = 0; i < size; i++) {
        put("0123456789abcdef"[bytes[i] >> 4]);
        put("0123456789abcdef"[bytes[i] & 15]);
    }
}

static void print_number(uint64_t value)
{
    if (value >= 10)
        print_number(value / 10);
    put('0' + value % 10);
}

static void print_value(const char *name, uint64_t value)
{
    print(name);
    print_number(value);
    print("\n");
}

static void __attribute__((noreturn)) finish(uint8_t status)
{
    for (;;)
        outb(PORT_EXIT, status);
}

static void check(uint64_t status, const char *what)
{
    if (!status)
        return;
    print("demo: ");
    print(what);
    print(" failed with status 0x");
    for (int shift = 56; shift >= 0; shift -= 8)
        print_hex((uint8_t[]){status >> shift}, 1);
    print("\n");
    finish(1);
}

static void introduce(const struct boot_info *boot)
{
    uint32_t vendor[4] = {0};
    uint32_t eax = 0, ecx = 0;

    __asm__ volatile("cpuid" : "+a"(eax), "=b"(vendor[0]), "+c"(ecx), "=d"(vendor[1]));
    vendor[2] = ecx;
    print("Hello from an x86-64 program on ");
    print((const char *)vendor);
    print(".\n");
    if (!boot->is_td)
        return;
    struct tdcall_regs info = {0};

    check(tdcall(TDG_VP_INFO, &info), "TDG.VP.INFO");
    print("This is a trust domain");
    print(info.rdx & 1 ? " under debug.\n" : ".\n");
    print_value("  guest-physical address bits: ", info.rcx & 0x3f);
    print_value("  vCPUs: ", info.r8 & 0xffffffff);
}

static void use_memory(void)
{
    uint64_t x = 88172645463325252ull, sum = 0;

    for (unsigned i = 0; i < sizeof pattern / 8; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        pattern[i] = x;
        sum += x;
    }
    for (unsigned i = 0; i < sizeof pattern / 8; i++)
        sum -= pattern[i];
    check(sum, "reading memory back");
    print_value("Memory written and read back, KiB: ", sizeof pattern / 1024);
}

static void measure(void)
{
    static const char event[] = "softtdx demo: the payload speaks for itself";
    struct tdcall_regs regs = {.rcx = (uint64_t)digest, .rdx = RTMR_INDEX};

    sha384(event, sizeof event - 1, digest);
    check(tdcall(TDG_MR_RTMR_EXTEND, &regs), "TDG.MR.RTMR.EXTEND");
    print("RTMR3 extended with ");
    print_hex(digest, 48);
    print("\n");
}

static void make_report(void)
{
    static const char nonce[] = "softtdx demo";
    uint8_t hash[48];
    struct tdcall_regs regs = {.rcx = (uint64_t)report, .rdx = (uint64_t)report_data};

    sha384(nonce, sizeof nonce - 1, hash);
    for (int i = 0; i < 48; i++)
        report_data[i] = hash[i];
    check(tdcall(TDG_MR_REPORT, &regs), "TDG.MR.REPORT");
    print("TDREPORT made; its MRTD is ");
    print_hex(report + 512 + 16, 48);
    print("\n");
}

static void map_gpa(uint64_t gpa, uint64_t size)
{
    uint64_t status, end = gpa + size, next = gpa;

    do { /* the VMM may do a part and say in R11 where to go on; it must not lead us elsewhere */
        gpa = next;
        status = vmcall(VMCALL_MAP_GPA, gpa, end - gpa, 0, 0, &next);
    } while (status == VMCALL_RETRY && next > gpa && next < end && next % PAGE == 0);
    check(status, "MapGPA");
}

static void get_quote(const struct boot_info *boot)
{
    volatile struct quote_buffer *shared;
    uint64_t gpa = (uint64_t)shared_area;

    map_gpa(gpa | boot->shared_bit, sizeof shared_area);
    shared = (volatile struct quote_buffer *)(gpa + boot->shared_window);
    shared->version = 1;
    shared->status = 0;
    shared->in_size = TDREPORT_SIZE;
    shared->out_size = 0;
    for (int i = 0; i < TDREPORT_SIZE; i++)
        shared->data[i] = report[i];
    check(vmcall(VMCALL_GET_QUOTE, gpa | boot->shared_bit, sizeof shared_area, 0, 0, 0), "GetQuote");
    while (shared->status == QUOTE_IN_FLIGHT)
        __builtin_ia32_pause();
    check(shared->status, "the quoting service");
    print_value("Quote received, bytes: ", shared->out_size);

    /* Back to private memory: a fresh page, to be accepted anew. */
    map_gpa(gpa, sizeof shared_area);
    for (unsigned at = 0; at < sizeof shared_area; at += PAGE)
        check(accept_page(gpa + at, 0), "TDG.MEM.PAGE.ACCEPT");
}

void payload_main(struct boot_info *boot);

void payload_main(struct boot_info *boot)
{
    introduce(boot);
    use_memory();
    if (boot->is_td) {
        measure();
        make_report();
        get_quote(boot);
    }
    print("Goodbye.\n");
    finish(0);
}
