/* The TD firmware's view of guest-physical memory, and the boot window that the VMM fills (softtdx/vmm/linux).
 *
 * The window is shared memory, so that MRTD covers the firmware alone: nothing in it is trusted, all of it is copied
 * into private memory, checked there and measured into an RTMR before use.
 */
#ifndef SOFTTDX_FIRMWARE_H
#define SOFTTDX_FIRMWARE_H

#include "layout.h"

#define BOOT_PARAMS 0x10000   /* Linux's struct boot_params, one page */
#define COMMAND_LINE 0x20000  /* up to COMMAND_LINE_MAX bytes with its final zero */
#define COMMAND_LINE_MAX 0x10000
#define LOW_MEMORY_END 0xa0000
#define ACPI_BASE 0x100000    /* the tables, RSDP first */
#define ACPI_MAX 0x10000
#define MAILBOX 0x110000      /* multiprocessor wake-up mailbox (ACPI 6.4, 5.2.12.19) */
#define EVENT_LOG 0x120000    /* CCEL's log area */
#define EVENT_LOG_SIZE 0x10000
#define USABLE_FROM 0x200000  /* from 1 MiB up to here is the firmware's */
#define BOOT_WINDOW 0xc0000000
#define BOOT_WINDOW_MAX 0x20000000
#define HIGH_MEMORY 0x100000000

#define PORT_STAGE 0x80  /* progress, for who watches: a STAGE_ number */
#define PORT_PAUSE 0x511 /* a read takes a moment of real time: what a waiting vCPU does */

#define STAGE_STARTED 1
#define STAGE_MEMORY 2
#define STAGE_MEASURED 3
#define STAGE_KERNEL 4

#ifndef __ASSEMBLER__
#include <stdint.h>

#define BOOT_WINDOW_MAGIC 0x42584454544f5346ull
#define BOOT_WINDOW_VERSION 1

struct part {
    uint64_t offset; /* from the start of the window */
    uint64_t size;
};

struct boot_window {
    uint64_t magic;
    uint64_t version;
    uint64_t memory_low;  /* RAM from 0, below BOOT_WINDOW */
    uint64_t memory_high; /* RAM from HIGH_MEMORY */
    uint64_t vcpus;
    struct part kernel; /* a bzImage */
    struct part initrd; /* may be empty */
    struct part command_line;
    struct part acpi; /* linked to ACPI_BASE */
};
#endif
#endif
