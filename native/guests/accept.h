/* TDG.MEM.PAGE.ACCEPT over a range: by 2 MiB where the host gave such pages, else by 4 KiB. */
#ifndef SOFTTDX_ACCEPT_H
#define SOFTTDX_ACCEPT_H

#include "tdx.h"

/* One page; once more while the host is at it, splitting, merging or moving it. Status bits 63:32. */
static inline uint64_t accept_page(uint64_t gpa, uint64_t level)
{
    uint64_t status;

    do {
        struct tdcall_regs regs = {.rcx = gpa | level};

        status = tdcall(TDG_MEM_PAGE_ACCEPT, &regs) >> 32;
    } while (status == TDX_OPERAND_BUSY);
    return status;
}

/* The first GPA that could not be accepted, or `base` + `size`. */
static inline uint64_t accept_range(uint64_t base, uint64_t size)
{
    const uint64_t small = 0x1000, large = 0x200000;
    uint64_t gpa = base, end = base + size;

    while (gpa < end) {
        uint64_t level = gpa % large == 0 && end - gpa >= large;
        uint64_t status = accept_page(gpa, level);

        if (level && status == TDX_PAGE_SIZE_MISMATCH) {
            /* The host gave this block piecemeal. */
            if (accept_range(gpa, large - small) != gpa + large - small)
                return gpa;
            gpa += large - small;
            continue;
        }
        if (status && status != TDX_PAGE_ALREADY_ACCEPTED)
            return gpa;
        gpa += level ? large : small;
    }
    return end;
}

#endif
