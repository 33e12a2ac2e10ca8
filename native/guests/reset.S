/* The launcher's entry: from the reset vector to 64-bit code.
 *
 * A vCPU of a TD starts here in flat 32-bit protected mode with paging off: ESI holds its index, EBX the GPA width
 * (TDX Module Base Specification, "Initial State of TD vCPUs"); the VMM gives an ordinary VM the same start. vCPU 0
 * goes on to launcher_main on a stack of the image; the others park until the payload starts them (boot_info.h).
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
    ljmp $SELECTOR_CODE, $start64

    .code64
start64:
    movl $SELECTOR_DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    movl %esi, %esi
    movl %edi, %edi
    testl %esi, %esi
    jnz park

    leaq boot_stack_top(%rip), %rsp
    movl %ebp, %edx             /* launcher_main(is_td, vcpu, gpa_width) */
    xorl %ebp, %ebp
    call launcher_main
    ud2

/* Wait, without a stack, until the payload starts vCPU ESI: each read of the park port returns after one wake-up. */
park:
    testl %edi, %edi
    jz park_vm
    xorl %eax, %eax             /* TDG.VP.VMCALL, Instruction.IO: one byte in from the park port */
    movl $0xfc00, %ecx
    xorl %r10d, %r10d
    movl $30, %r11d
    movl $1, %r12d
    xorl %r13d, %r13d
    movl $PORT_PARK, %r14d
    xorl %r15d, %r15d
    .byte 0x66, 0x0f, 0x01, 0xcc
    jmp woken
park_vm:
    movl $PORT_PARK, %edx
    inb %dx, %al
woken:
    leaq boot_info(%rip), %rbx
    cmpq %rsi, BOOT_INFO_AP_INDEX(%rbx)
    jne park
    movq %rsi, %rax             /* the launcher's own stack is the end of this vCPU's area */
    incq %rax
    shlq $PERCPU_SHIFT, %rax
    addq BOOT_INFO_PERCPU_BASE(%rbx), %rax
    movq %rax, %rsp
    movq %rsi, %rdi
    xorl %ebp, %ebp
    call launcher_ap_main
    ud2

/* void enter_payload(entry, stack_top, rdi, rsi): a payload that returns ends the machine with its status. */
    .globl enter_payload
enter_payload:
    movq %rdi, %rax
    movq %rsi, %rsp
    movq %rdx, %rdi
    movq %rcx, %rsi
    andq $-16, %rsp
    xorl %ebp, %ebp
    xorl %ebx, %ebx
    call *%rax
    movl $PORT_EXIT, %edx
    outb %al, %dx
1:  hlt
    jmp 1b

/* void load_tables(gdt pointer, idt pointer) */
    .globl load_tables
load_tables:
    lgdt (%rdi)
    lidt (%rsi)
    movl $SELECTOR_DATA, %eax
    movl %eax, %ss
    movl $SELECTOR_TSS, %eax
    ltr %ax
    ret

/* Exception entry: every vector pushes an error code (0 where the processor gives none) and its number. */
    .macro vector number
    .balign 16
    .if (\number == 8) || ((\number >= 10) && (\number <= 14)) || (\number == 17) || (\number == 21)
    .else
    pushq $0
    .endif
    pushq $\number
    jmp exception
    .endm

    .balign 16
    .globl vectors
vectors:
    .set n, 0
    .rept 32
    vector n
    .set n, n + 1
    .endr

    .balign 16
exception:
    cld
    pushq %rax
    pushq %rcx
    pushq %rdx
    pushq %rbx
    pushq %rbp
    pushq %rsi
    pushq %rdi
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, %rdi
    call handle_exception
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rdi
    popq %rsi
    popq %rbp
    popq %rbx
    popq %rdx
    popq %rcx
    popq %rax
    addq $16, %rsp
    iretq

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

    .section .stack, "aw"
    .balign 16
    .skip BOOT_STACK_SIZE
    .globl boot_stack_top
boot_stack_top:

    .section .boot_info, "aw"
    .globl boot_info
boot_info:
    .skip 4096

    .section .note.GNU-stack, "", @progbits
