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

    .text
    .globl start64
start64:
    testl %esi, %esi
    jnz wait_for_work
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
    cmpw $COMMAND_WAKE, (%rbx)
    jne wait_for_work
    cmpl %esi, MAILBOX_APIC_ID(%rbx)
    jne wait_for_work
    movq MAILBOX_VECTOR(%rbx), %rax
    movw $COMMAND_NOOP, (%rbx)  /* tells the OS that the vector was taken */
    jmp *%rax

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

    .section .data.firmware, "aw"
    .globl mailbox_ready
mailbox_ready:
    .long 0

    .section .stack, "aw"
    .balign 16
    .skip BOOT_STACK_SIZE
firmware_stack_top:

    .section .note.GNU-stack, "", @progbits
