/* The launcher's 64-bit entry, exception entry and other steps that C cannot take.
 *
 * vCPU 0 goes on to launcher_main on a stack of the image; the others park until the payload starts them (boot_info.h).
 */
#include "layout.h"

    .text
    .globl start64
start64:
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

    .section .stack, "aw"
    .balign 16
    .skip BOOT_STACK_SIZE
boot_stack_top:

    .section .note.GNU-stack, "", @progbits
