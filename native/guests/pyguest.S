/* The stub under a guest written in Python: the instructions that its function asks for, one snippet each.
 *
 * Every snippet, and every exception, ends in the escape instruction (UD1 with the hook's number), where the Python
 * side takes over: it reads and sets the registers, and sends the vCPU to the next snippet. So everything that the
 * function does goes through the interpreter, and leaves the guest as any program's instruction would.
 * softtdx/vmm/python_guest.py knows the table below and puts the hook's number into the image.
 */
#include "layout.h"

#define ESCAPE .byte 0x0f, 0xb9, 0x05, 0x00, 0x58, 0x44, 0x54
#define VECTORS 0xffffe000 /* as pyguest.ld places .vectors */
#define STACK_SIZE 256
#define MAX_VCPUS 24


    .text
    .globl start64
start64:
    leaq 1(%rsi), %rax
    imulq $STACK_SIZE, %rax, %rax
    leaq stacks(%rip), %rsp
    addq %rax, %rsp
    lidt idt_pointer(%rip)
    leaq shared_window_table(%rip), %rax
    movl $0x83, %ebx            /* present, writable, 1 GiB */
    testl %edi, %edi
    jz 1f
    leal -1(%rbp), %ecx         /* the shared bit is the top bit of the GPA width */
    btsq %rcx, %rbx
1:  movl $512, %ecx
2:  movq %rbx, (%rax)
    addq $8, %rax
    addq $1 << 30, %rbx
    loop 2b
    ESCAPE
    ud2

/* Sixteen bytes each, in this order. */
    .section .snippets, "ax"
    .macro begin
    .balign 16, 0xcc
    .endm
    begin                       /* 0 tdcall */
    .byte 0x66, 0x0f, 0x01, 0xcc
    ESCAPE
    begin                       /* 1 vmcall */
    vmcall
    ESCAPE
    begin                       /* 2 cpuid */
    cpuid
    ESCAPE
    begin                       /* 3 rdmsr */
    rdmsr
    ESCAPE
    begin                       /* 4 wrmsr */
    wrmsr
    ESCAPE
    begin                       /* 5 in, 1 byte */
    inb %dx, %al
    ESCAPE
    begin                       /* 6 in, 2 bytes */
    inw %dx, %ax
    ESCAPE
    begin                       /* 7 in, 4 bytes */
    inl %dx, %eax
    ESCAPE
    begin                       /* 8 out, 1 byte */
    outb %al, %dx
    ESCAPE
    begin                       /* 9 out, 2 bytes */
    outw %ax, %dx
    ESCAPE
    begin                       /* 10 out, 4 bytes */
    outl %eax, %dx
    ESCAPE
    begin                       /* 11 hlt */
    hlt
    ESCAPE
    begin                       /* 12 copy RCX bytes from RSI to RDI */
    rep movsb
    ESCAPE
    begin                       /* 13 load 8 bytes */
    movq (%rsi), %rax
    ESCAPE
    begin                       /* 14 store 8 bytes */
    movq %rax, (%rdi)
    ESCAPE
    begin                       /* 15 rdtsc */
    rdtsc
    ESCAPE
    begin                       /* 16 wait for good */
3:  pause
    jmp 3b

    .section .vectors, "ax"
    .set n, 0
    .rept 32
    .balign 16, 0xcc
    .if (n == 8) || ((n >= 10) && (n <= 14)) || (n == 17) || (n == 21)
    .else
    pushq $0
    .endif
    pushq $n
    ESCAPE
    .set n, n + 1
    .endr

    .section .data.idt, "aw"
    .balign 16
idt:
    .set n, 0
    .rept 32
    .word (VECTORS + 16 * n) & 0xffff, SELECTOR_CODE, 0x8e00, (VECTORS + 16 * n) >> 16
    .quad 0
    .set n, n + 1
    .endr
idt_pointer:
    .word idt_pointer - idt - 1
    .quad idt

    .section .stack, "aw"
    .balign 16
stacks:
    .skip MAX_VCPUS * STACK_SIZE

    .section .note.GNU-stack, "", @progbits
