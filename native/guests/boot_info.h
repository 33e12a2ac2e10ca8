/* What the VMM tells the launcher, and the launcher the payload: one page at the start of the launcher's image.
 *
 * The VMM fills it before the page is measured, so a TD's MRTD covers it. The launcher adds what only the guest can
 * know (is_td, shared_bit, shared_window). A payload gets its address in RDI. softtdx/vmm/launcher.py writes it.
 */
#ifndef SOFTTDX_BOOT_INFO_H
#define SOFTTDX_BOOT_INFO_H

#include <stdint.h>

#define BOOT_INFO_MAGIC 0x3158445454464f53ull /* "SOFTTDX1", little endian */
#define MAX_RANGES 32

#define RANGE_TO_ACCEPT 0 /* memory that a TD has to accept before use */
#define RANGE_PRESENT 1   /* memory that was added, and measured, when the TD was built */

struct memory_range {
    uint64_t base;
    uint64_t size;
    uint64_t kind;
};

struct boot_info {
    uint64_t magic;
    uint64_t vcpus;
    uint64_t entry;       /* of the payload */
    uint64_t stack_top;   /* the payload's stack on vCPU 0, grows down */
    uint64_t percpu_base; /* PERCPU_SIZE bytes for each vCPU, for the launcher */
    uint64_t range_count;
    /* Written by the launcher. */
    uint64_t is_td;
    uint64_t shared_bit;    /* of a guest physical address, 0 in an ordinary VM */
    uint64_t shared_window; /* a virtual address: adding it to a GPA gives its shared alias */
    /* To start vCPU `ap_index`: write these three, then ap_index, then any byte to port PORT_PARK. */
    volatile uint64_t ap_entry;
    volatile uint64_t ap_stack;
    volatile uint64_t ap_argument;
    volatile uint64_t ap_index;
    struct memory_range ranges[MAX_RANGES];
    uint64_t agent; /* the vCPU on which the launcher answers at PORT_AGENT, 0 for none; the VMM fills it */
};

#define PERCPU_SIZE 0x4000

/* Ports of the machine that the launcher and payloads may use. */
#define PORT_SERIAL 0x3f8 /* 16550 */
#define PORT_EXIT 0x501   /* a byte written here ends the machine with that status */
#define PORT_PARK 0x510   /* reading waits until another vCPU writes */
#define PORT_AGENT 0x512  /* the launcher's own: requests for the TD's report (softtdx/vmm/agent.py) */

#define EXIT_FAULT 0xff

#endif
