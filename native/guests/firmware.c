/* The TD firmware: from the reset vector to Linux's 64-bit entry, every step measured.
 *
 * It accepts the TD's memory, takes kernel, initrd, command line and ACPI tables out of the boot window into private
 * memory, extends the RTMRs with what it took and logs that (TCG2, found through CCEL), parks the other vCPUs at the
 * wake-up mailbox, and enters the kernel with a boot_params of its own (Linux, Documentation/arch/x86/boot.rst). In an
 * ordinary VM it does the same without TDCALLs and without a log.
 */
#include "accept.h"
#include "firmware.h"
#include "sha384.h"

extern uint64_t shared_window_table[512];
extern volatile uint32_t mailbox_ready;

void enter_kernel(uint64_t entry, uint64_t boot_params) __attribute__((noreturn));
void *memset(void *to, int value, size_t size);
void *memcpy(void *to, const void *from, size_t size);

static uint64_t is_td, shared_bit;
static struct boot_window window; /* our copy: the VMM may change its own at any time */

#define PORT_SERIAL 0x3f8
#define PORT_EXIT 0x501
#define EXIT_FAULT 0xff

/* --- what the VMM is told */

static void out_byte(uint16_t port, uint8_t value)
{
    if (is_td)
        vmcall(VMCALL_IO, 1, 1, port, value, 0);
    else
        outb(port, value);
}

static void put_string(const char *s)
{
    while (*s)
        out_byte(PORT_SERIAL, (uint8_t)*s++);
}

static void __attribute__((noreturn)) die(const char *what)
{
    put_string("\r\nfirmware: ");
    put_string(what);
    put_string("\r\n");
    for (;;) {
        out_byte(PORT_EXIT, EXIT_FAULT);
        if (is_td)
            vmcall(VMCALL_HLT, 1, 0, 0, 0, 0);
        else
            __asm__ volatile("hlt");
    }
}

/* --- the event log and the RTMRs */

#define ALGORITHM_SHA384 0x000c
#define DIGEST_SIZE 48
#define EV_NO_ACTION 0x3
#define EV_SEPARATOR 0x4
#define EV_PLATFORM_CONFIG_FLAGS 0xa
#define EV_IPL 0xd
#define SPEC_ID_SIZE 33

static uint8_t *log_end = (uint8_t *)EVENT_LOG;

static void log_bytes(const void *data, uint64_t size)
{
    if (log_end + size > (uint8_t *)EVENT_LOG + EVENT_LOG_SIZE)
        die("the event log is full");
    memcpy(log_end, data, size);
    log_end += size;
}

static void log_u32(uint32_t value)
{
    log_bytes(&value, sizeof value);
}

/* TCG_PCClientPCREvent with TCG_EfiSpecIDEvent: SHA-384 is the one digest of the records that follow. */
static void start_log(void)
{
    static const uint8_t spec_id[SPEC_ID_SIZE] = "Spec ID Event03\0"
                                                 "\0\0\0\0" /* platform class: client */
                                                 "\0\2\0\2" /* 2.0, errata 0, UINTN of 64 bits */
                                                 "\1\0\0\0\x0c\0\x30\0";
    static const uint8_t no_digest[20];

    memset((void *)EVENT_LOG, 0, EVENT_LOG_SIZE);
    log_u32(1);
    log_u32(EV_NO_ACTION);
    log_bytes(no_digest, sizeof no_digest);
    log_u32(SPEC_ID_SIZE);
    log_bytes(spec_id, SPEC_ID_SIZE);
}

/* Extends RTMR[rtmr] with SHA-384(data) and logs it with `note` as the event's own data. */
static void measure(unsigned rtmr, uint32_t type, const void *data, uint64_t size, const void *note, uint32_t note_size)
{
    static uint8_t digest[64] __attribute__((aligned(64)));
    static const uint32_t one = 1;
    static const uint16_t algorithm = ALGORITHM_SHA384;
    struct tdcall_regs regs = {.rcx = (uint64_t)digest, .rdx = rtmr};

    if (!is_td)
        return;
    sha384(data, size, digest);
    if (tdcall(TDG_MR_RTMR_EXTEND, &regs))
        die("TDG.MR.RTMR.EXTEND failed");
    log_u32(rtmr + 1);
    log_u32(type);
    log_bytes(&one, sizeof one);
    log_bytes(&algorithm, sizeof algorithm);
    log_bytes(digest, DIGEST_SIZE);
    log_u32(note_size);
    log_bytes(note, note_size);
}

static void separate(unsigned rtmr)
{
    static const uint32_t zero;

    measure(rtmr, EV_SEPARATOR, &zero, sizeof zero, &zero, sizeof zero);
}

#define NOTE(text) text, sizeof text - 1

/* --- the boot window */

static const uint8_t *in_window(uint64_t offset)
{
    return (const uint8_t *)(((uint64_t)SHARED_WINDOW_SLOT << 39) + BOOT_WINDOW + offset);
}

static void take(struct part part, uint64_t to)
{
    memcpy((void *)to, in_window(part.offset), part.size);
}

static int part_ok(struct part part, uint64_t limit)
{
    return part.size <= limit && part.offset >= sizeof window && part.offset <= BOOT_WINDOW_MAX &&
           part.offset + part.size <= BOOT_WINDOW_MAX;
}

static void read_window(void)
{
    memcpy(&window, in_window(0), sizeof window);
    if (window.magic != BOOT_WINDOW_MAGIC || window.version != BOOT_WINDOW_VERSION)
        die("there is no boot window that this firmware knows");
    if (window.memory_low % 0x200000 || window.memory_low <= USABLE_FROM || window.memory_low > BOOT_WINDOW ||
        window.memory_high % 0x200000 || window.memory_high > 1ull << 40)
        die("the boot window describes memory that cannot be");
    if (!part_ok(window.kernel, BOOT_WINDOW_MAX) || !part_ok(window.initrd, BOOT_WINDOW_MAX) ||
        !part_ok(window.command_line, COMMAND_LINE_MAX - 1) || !part_ok(window.acpi, ACPI_MAX))
        die("the boot window has a part that lies outside of it");
}

static void accept_memory(void)
{
    if (!is_td)
        return;
    if (accept_range(0, window.memory_low) != window.memory_low ||
        accept_range(HIGH_MEMORY, window.memory_high) != HIGH_MEMORY + window.memory_high)
        die("the host does not give the memory it promised");
}

/* --- the kernel (offsets: boot.rst, "The Real-Mode Kernel Header") */

#define SECTOR 512
#define H_SETUP_SECTS 0x1f1
#define H_BOOT_FLAG 0x1fe
#define H_JUMP_LENGTH 0x201
#define H_MAGIC 0x202
#define H_VERSION 0x206
#define H_LOADER 0x210
#define H_LOAD_FLAGS 0x211
#define H_RAMDISK_IMAGE 0x218
#define H_RAMDISK_SIZE 0x21c
#define H_COMMAND_LINE 0x228
#define H_INITRD_MAX 0x22c
#define H_XLOADFLAGS 0x236
#define H_COMMAND_LINE_SIZE 0x238
#define H_PREFERRED 0x258
#define H_INIT_SIZE 0x260
#define ENTRY64 0x200
#define MAGIC_HDRS 0x53726448
#define VERSION_212 0x20c
#define XLF_KERNEL_64 1
#define LOADED_HIGH 1

#define BP_RSDP 0x70
#define BP_E820_COUNT 0x1e8
#define BP_E820 0x2d0
#define LOADER_UNKNOWN 0xff

#define E820_RAM 1
#define E820_ACPI 3
#define E820_NVS 4

static uint64_t get(const uint8_t *at, unsigned size)
{
    uint64_t value = 0;

    while (size--)
        value = value << 8 | at[size];
    return value;
}

static void set(uint8_t *at, uint64_t value, unsigned size)
{
    for (; size--; value >>= 8)
        *at++ = (uint8_t)value;
}

static void add_e820(uint8_t *boot_params, uint64_t base, uint64_t size, uint32_t type)
{
    uint8_t *entry = boot_params + BP_E820 + 20 * boot_params[BP_E820_COUNT];

    if (!size)
        return;
    set(entry, base, 8);
    set(entry + 8, size, 8);
    set(entry + 16, type, 4);
    boot_params[BP_E820_COUNT]++;
}

/* Of the header that lies in boot_params. */
static uint64_t setup_size(void)
{
    uint8_t sectors = ((uint8_t *)BOOT_PARAMS)[H_SETUP_SECTS];

    return ((sectors ? sectors : 4) + 1) * SECTOR;
}

/* Takes the kernel to where it wants to run, its setup sectors right in front; returns the address of its 64-bit part.
 * The header decides on the addresses, so it is read from a private copy, and must be the same in the whole one. */
static uint64_t load_kernel(void)
{
    uint8_t *head = (uint8_t *)BOOT_PARAMS;
    uint64_t setup, preferred, init_size;

    if (window.kernel.size < 2 * SECTOR)
        die("the kernel is too short");
    take((struct part){window.kernel.offset, 2 * SECTOR}, BOOT_PARAMS);
    setup = setup_size();
    preferred = get(head + H_PREFERRED, 8);
    init_size = get(head + H_INIT_SIZE, 4);
    if (get(head + H_BOOT_FLAG, 2) != 0xaa55 || get(head + H_MAGIC, 4) != MAGIC_HDRS ||
        get(head + H_VERSION, 2) < VERSION_212 || !(head[H_XLOADFLAGS] & XLF_KERNEL_64) ||
        window.kernel.size <= setup + ENTRY64)
        die("the kernel is no 64-bit bzImage");
    if (preferred < USABLE_FROM + 0x10000 || preferred > window.memory_low || preferred % 0x1000 ||
        init_size > window.memory_low - preferred || window.kernel.size - setup > window.memory_low - preferred)
        die("the kernel does not fit into memory");
    take(window.kernel, preferred - setup);
    for (unsigned i = H_SETUP_SECTS; i < 2 * SECTOR; i++)
        if (((uint8_t *)(preferred - setup))[i] != head[i])
            die("the kernel changed while it was read");
    return preferred;
}

static uint64_t load_initrd(uint64_t kernel)
{
    const uint8_t *head = (uint8_t *)BOOT_PARAMS;
    uint64_t top = get(head + H_INITRD_MAX, 4) + 1, low, room = get(head + H_INIT_SIZE, 4);

    if (top > window.memory_low)
        top = window.memory_low;
    if (window.kernel.size > room)
        room = window.kernel.size;
    low = kernel + room;
    if (low > top || window.initrd.size > top - low)
        die("the initrd does not fit into memory");
    top = (top - window.initrd.size) & ~0xfffull;
    if (top < low)
        die("the initrd does not fit into memory");
    take(window.initrd, top);
    return top;
}

/* boot_params around the header that load_kernel left in its place: zeroes but for the header and what we fill in. */
static void fill_boot_params(uint64_t initrd)
{
    uint8_t *bp = (uint8_t *)BOOT_PARAMS;
    unsigned header_end = H_MAGIC + bp[H_JUMP_LENGTH];

    memset(bp, 0, H_SETUP_SECTS);
    memset(bp + header_end, 0, 0x1000 - header_end);
    set(bp + BP_RSDP, ACPI_BASE, 8);
    bp[H_LOADER] = LOADER_UNKNOWN;
    bp[H_LOAD_FLAGS] |= LOADED_HIGH;
    set(bp + H_RAMDISK_IMAGE, window.initrd.size ? initrd : 0, 4);
    set(bp + H_RAMDISK_SIZE, window.initrd.size, 4);
    set(bp + H_COMMAND_LINE, COMMAND_LINE, 4);
    add_e820(bp, 0, LOW_MEMORY_END, E820_RAM);
    add_e820(bp, ACPI_BASE, ACPI_MAX, E820_ACPI);
    add_e820(bp, MAILBOX, USABLE_FROM - MAILBOX, E820_NVS);
    add_e820(bp, USABLE_FROM, window.memory_low - USABLE_FROM, E820_RAM);
    add_e820(bp, HIGH_MEMORY, window.memory_high, E820_RAM);
}

static void map_window(void)
{
    struct tdcall_regs info = {0};

    if (is_td) {
        if (tdcall(TDG_VP_INFO, &info))
            die("TDG.VP.INFO failed");
        shared_bit = 1ull << ((info.rcx & 0x3f) - 1);
    }
    for (uint64_t i = 0; i < 512; i++)
        shared_window_table[i] = i << 30 | shared_bit | 0x83;
}

void __attribute__((noreturn)) firmware_main(uint64_t td)
{
    uint64_t kernel, initrd;

    is_td = td;
    out_byte(PORT_STAGE, STAGE_STARTED);
    map_window();
    read_window();
    accept_memory();
    out_byte(PORT_STAGE, STAGE_MEMORY);

    start_log();
    measure(0, EV_PLATFORM_CONFIG_FLAGS, &window, sizeof window, &window, sizeof window);
    take(window.acpi, ACPI_BASE);
    measure(0, EV_PLATFORM_CONFIG_FLAGS, (void *)ACPI_BASE, window.acpi.size, NOTE("ACPI DATA"));
    kernel = load_kernel();
    measure(1, EV_IPL, (void *)(kernel - setup_size()), window.kernel.size, NOTE("kernel"));
    take(window.command_line, COMMAND_LINE);
    ((uint8_t *)COMMAND_LINE)[window.command_line.size] = 0;
    measure(2, EV_IPL, (void *)COMMAND_LINE, window.command_line.size, (void *)COMMAND_LINE, window.command_line.size);
    initrd = load_initrd(kernel);
    if (window.initrd.size)
        measure(2, EV_IPL, (void *)initrd, window.initrd.size, NOTE("initrd"));
    for (unsigned rtmr = 0; rtmr < 3; rtmr++)
        separate(rtmr);
    out_byte(PORT_STAGE, STAGE_MEASURED);

    fill_boot_params(initrd);
    memset((void *)MAILBOX, 0, 0x1000);
    mailbox_ready = 1;
    out_byte(PORT_STAGE, STAGE_KERNEL);
    enter_kernel(kernel + ENTRY64, BOOT_PARAMS);
}
