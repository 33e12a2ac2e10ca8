/* The firmware's 64-bit entry, the wait of the other vCPUs, and the step into the kernel.
 *
 * vCPU 0 goes on to firmware_main; the others wait for a command in the MADT's wake-up mailbox (ACPI 6.4, 5.2.12.19),
 * which they may not touch before vCPU 0 has accepted its page.
 */
#include "firmware.h"

#define MAILBOX_APIC_ID 4
#define MAILBOX_VECTOR 8
#define COMMAND_NOOP 0
#define COMMAND_WAKE 1
#define COMMAND_TEST 2

    .text
    .globl start64
start64:
    testl %esi, %esi
    jnz wait_for_work
    movl %edi, started_as_td(%rip)
    leaq firmware_stack_top(%rip), %rsp
    xorl %ebp, %ebp             /* firmware_main(is_td) */
    call firmware_main
    ud2

/* A vCPU's index is its x2APIC ID. No stack is needed here. */
wait_for_work:
    testl %edi, %edi
    jz pause_vm
    xorl %eax, %eax             /* TDG.VP.VMCALL, Instruction.IO: one byte in from the pause port */
    movl $0xfc00, %ecx
    xorl %r10d, %r10d
    movl $30, %r11d
    movl $1, %r12d
    xorl %r13d, %r13d
    movl $PORT_PAUSE, %r14d
    xorl %r15d, %r15d
    .byte 0x66, 0x0f, 0x01, 0xcc
    jmp look
pause_vm:
    movl $PORT_PAUSE, %edx
    inb %dx, %al
look:
    cmpl $0, mailbox_ready(%rip)
    je wait_for_work
    movl $MAILBOX, %ebx
    movzwl (%rbx), %eax
    cmpl %esi, MAILBOX_APIC_ID(%rbx)
    jne wait_for_work
    cmpl $COMMAND_TEST, %eax
    je acknowledge
    cmpl $COMMAND_WAKE, %eax
    jne wait_for_work
    movq MAILBOX_VECTOR(%rbx), %rax
    movw $COMMAND_NOOP, (%rbx)  /* tells the OS that the vector was taken */
    jmp *%rax
acknowledge:
    movw $COMMAND_NOOP, (%rbx)
    jmp wait_for_work

/* The MADT's reset vector (mailbox version 1): the OS gives a vCPU back, in 64-bit mode on page tables of its own. */
take_back:
    cli
    leaq pml4(%rip), %rcx
    movq %rcx, %cr3
    movl started_as_td(%rip), %edi
    testl %edi, %edi
    jz index_vm
    movl $1, %eax               /* TDG.VP.INFO: R9 bits 31:0 are the vCPU's index */
    .byte 0x66, 0x0f, 0x01, 0xcc
    movl %r9d, %esi
    movl started_as_td(%rip), %edi
    jmp wait_for_work
index_vm:
    movl $0x0b, %eax            /* EDX is the x2APIC ID */
    xorl %ecx, %ecx
    cpuid
    movl %edx, %esi
    jmp wait_for_work

/* void enter_kernel(entry, boot_params): Linux's 64-bit boot protocol. */
    .globl enter_kernel
enter_kernel:
    cli
    cld
    movq %rdi, %rax
    xorl %edi, %edi
    xorl %ebp, %ebp
    xorl %ebx, %ebx
    jmp *%rax

/* At a fixed place, so that the MADT can name it. */
    .section .take_back, "ax"
    .globl take_back_vector
take_back_vector:
    jmp take_back

    .section .data.firmware, "aw"
    .globl mailbox_ready
mailbox_ready:
    .long 0
started_as_td:
    .long 0

    .section .stack, "aw"
    .balign 16
    .skip BOOT_STACK_SIZE
firmware_stack_top:

    .section .note.GNU-stack, "", @progbits
