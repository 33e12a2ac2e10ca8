/* TDCALL and the TDVMCALLs of the GHCI, for freestanding guests (TDX Module ABI; Guest-Host Communication Interface). */
#ifndef SOFTTDX_TDX_H
#define SOFTTDX_TDX_H

#include <stdint.h>

#define TDG_VP_VMCALL 0
#define TDG_VP_INFO 1
#define TDG_MR_RTMR_EXTEND 2
#define TDG_VP_VEINFO_GET 3
#define TDG_MR_REPORT 4
#define TDG_MEM_PAGE_ACCEPT 6

/* Status bits 63:32. */
#define TDX_OPERAND_BUSY 0x80000200ull
#define TDX_PAGE_ALREADY_ACCEPTED 0x00000b0aull
#define TDX_PAGE_SIZE_MISMATCH 0xc0000b0bull

#define VMCALL_CPUID 10
#define VMCALL_HLT 12
#define VMCALL_IO 30
#define VMCALL_RDMSR 31
#define VMCALL_WRMSR 32
#define VMCALL_MMIO 48
#define VMCALL_MAP_GPA 0x10001
#define VMCALL_GET_QUOTE 0x10002
#define VMCALL_REPORT_FATAL_ERROR 0x10003

#define VMCALL_RETRY 1

struct tdcall_regs {
    uint64_t rcx, rdx, r8, r9, r10, r11;
};

/* RAX of the call; the registers of `regs` go in and come out. */
static inline uint64_t tdcall(uint64_t leaf, struct tdcall_regs *regs)
{
    register uint64_t r8 __asm__("r8") = regs->r8;
    register uint64_t r9 __asm__("r9") = regs->r9;
    register uint64_t r10 __asm__("r10") = regs->r10;
    register uint64_t r11 __asm__("r11") = regs->r11;
    uint64_t rax = leaf;

    __asm__ volatile(".byte 0x66, 0x0f, 0x01, 0xcc"
                     : "+a"(rax), "+c"(regs->rcx), "+d"(regs->rdx), "+r"(r8), "+r"(r9), "+r"(r10), "+r"(r11)
                     :
                     : "r12", "r13", "memory", "cc");
    regs->r8 = r8;
    regs->r9 = r9;
    regs->r10 = r10;
    regs->r11 = r11;
    return rax;
}

struct vmcall_regs {
    uint64_t r10, r11, r12, r13, r14, r15;
};

/* TDG.VP.VMCALL with R10 to R15 exposed to the VMM; returns the VMM's status, R10. */
static inline uint64_t tdvmcall(struct vmcall_regs *regs)
{
    register uint64_t r10 __asm__("r10") = regs->r10;
    register uint64_t r11 __asm__("r11") = regs->r11;
    register uint64_t r12 __asm__("r12") = regs->r12;
    register uint64_t r13 __asm__("r13") = regs->r13;
    register uint64_t r14 __asm__("r14") = regs->r14;
    register uint64_t r15 __asm__("r15") = regs->r15;
    uint64_t rax = TDG_VP_VMCALL, exposed = 0xfc00;

    __asm__ volatile(".byte 0x66, 0x0f, 0x01, 0xcc"
                     : "+a"(rax), "+c"(exposed), "+r"(r10), "+r"(r11), "+r"(r12), "+r"(r13), "+r"(r14), "+r"(r15)
                     :
                     : "memory", "cc");
    regs->r10 = r10;
    regs->r11 = r11;
    regs->r12 = r12;
    regs->r13 = r13;
    regs->r14 = r14;
    regs->r15 = r15;
    return rax ? rax : r10;
}

/* One of the GHCI's standard calls; returns its status, and R11 in *out if `out` is not null. */
static inline uint64_t vmcall(uint64_t leaf, uint64_t r12, uint64_t r13, uint64_t r14, uint64_t r15, uint64_t *out)
{
    struct vmcall_regs regs = {0, leaf, r12, r13, r14, r15};
    uint64_t status = tdvmcall(&regs);

    if (out)
        *out = regs.r11;
    return status;
}

static inline void outb(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline uint8_t inb(uint16_t port)
{
    uint8_t value;

    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

#endif
