/* From the reset vector to 64-bit code: what the launcher and the Python guest's stub start with.
 *
 * A vCPU of a TD starts here in flat 32-bit protected mode with paging off: ESI holds its index, EBX the GPA width
 * (TDX Module Base Specification, "Initial State of TD vCPUs"); the VMM gives an ordinary VM the same start. `start64`
 * is entered with the vCPU's index in RSI, 1 in RDI for a TD and 0 for an ordinary VM, and the GPA width in RBP.
 */
#include "layout.h"

#define CR0_PE 0x1
#define CR0_MP 0x2
#define CR0_NE 0x20
#define CR0_WP 0x10000
#define CR0_PG 0x80000000
#define CR4_PAE 0x20
#define CR4_OSFXSR 0x200
#define CR4_OSXMMEXCPT 0x400
#define MSR_EFER 0xc0000080
#define EFER_SCE_LME_NXE 0x901
#define CPUID_TDX 0x21

    .section .reset, "ax"
    .code32
    .globl reset_vector
reset_vector:
    jmp start32
    .balign 16, 0xf4

    .section .text.start, "ax"
    .code32
start32:
    cli
    cld
    movl %ebx, %ebp             /* CPUID overwrites EBX */
    lgdtl gdt_pointer32
    movl %cr4, %eax
    orl $(CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT), %eax
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3

    /* In a TD, EFER.LME is set from the start and writing EFER is not for us to do. */
    xorl %eax, %eax
    cpuid
    cmpl $CPUID_TDX, %eax
    jb not_td
    movl $CPUID_TDX, %eax
    xorl %ecx, %ecx
    cpuid
    cmpl $0x65746e49, %ebx      /* "Inte" */
    jne not_td
    cmpl $0x5844546c, %edx      /* "lTDX" */
    jne not_td
    movl $1, %edi
    jmp paging
not_td:
    xorl %edi, %edi
    movl $MSR_EFER, %ecx
    movl $EFER_SCE_LME_NXE, %eax
    xorl %edx, %edx
    wrmsr
paging:
    movl %cr0, %eax
    orl $(CR0_PG | CR0_WP | CR0_NE | CR0_MP | CR0_PE), %eax
    movl %eax, %cr0
    ljmp $SELECTOR_CODE, $enter64

    .code64
enter64:
    movl $SELECTOR_DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    movl %esi, %esi
    movl %edi, %edi
    movl %ebp, %ebp
    jmp start64

    .section .data.tables, "aw"
    .balign 16
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff    /* 08: 32-bit code */
    .quad 0x00af9b000000ffff    /* 10: 64-bit code */
    .quad 0x00cf93000000ffff    /* 18: data */
gdt_pointer32:
    .word gdt_pointer32 - gdt - 1
    .long gdt

/* Identity map of the first 512 GiB by 1 GiB pages, and a window on the shared half that launcher_main fills. */
    .section .tables, "aw"
    .balign 4096
    .globl pml4
pml4:
    .quad identity + 0x3
    .skip 8 * (SHARED_WINDOW_SLOT - 1)
    .quad shared_window_table + 0x3
    .balign 4096
identity:
    .set page, 0
    .rept 512
    .quad (page << 30) + 0x83
    .set page, page + 1
    .endr
    .globl shared_window_table
shared_window_table:
    .skip 4096

    .section .boot_info, "aw"
    .globl boot_info
boot_info:
    .skip 4096

    .section .note.GNU-stack, "", @progbits
