/* Executes test records on the processor this runs on. The record format is that of softtdx._silicon.Trial; argv[1] is
   a file of records, which are replaced by their results. Only for x86-64 Linux. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/ucontext.h>
#include <unistd.h>

struct record {
    uint64_t gpr[16]; /* rax rcx rdx rbx rsp rbp rsi rdi r8.. */
    uint64_t rflags, rip;
    uint32_t vector, error;
    uint64_t cr2;
    uint8_t code[64];
    uint64_t sum, count, spare[2];
    uint8_t fx[512], window[256];
} __attribute__((aligned(16)));

#define CODE ((uint8_t *)0x10000000)
#define DATA ((uint8_t *)0x20000000)
#define DATA_BYTES 0x2000
#define WINDOW (DATA + 0x1000 - 128)

static struct record *current;
static sigjmp_buf back;
void *entry_target = (void *)0x10000000;

void enter(struct record *);
__asm__(".text\n.globl enter\nenter:\n"
        "mov %rdi, %rax\n"
        "fxrstor64 256(%rax)\n"
        "pushq 128(%rax)\n"
        "popfq\n"
        "mov 8(%rax), %rcx\n"
        "mov 16(%rax), %rdx\n"
        "mov 24(%rax), %rbx\n"
        "mov 32(%rax), %rsp\n"
        "mov 40(%rax), %rbp\n"
        "mov 48(%rax), %rsi\n"
        "mov 56(%rax), %rdi\n"
        "mov 64(%rax), %r8\n"
        "mov 72(%rax), %r9\n"
        "mov 80(%rax), %r10\n"
        "mov 88(%rax), %r11\n"
        "mov 96(%rax), %r12\n"
        "mov 104(%rax), %r13\n"
        "mov 112(%rax), %r14\n"
        "mov 120(%rax), %r15\n"
        "mov 0(%rax), %rax\n"
        "jmp *entry_target(%rip)\n");

static void caught(int signal, siginfo_t *info, void *context)
{
    static const int order[16] = { REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                   REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15 };
    ucontext_t *uc = context;
    greg_t *regs = uc->uc_mcontext.gregs;
    (void)signal;
    (void)info;
    for (int n = 0; n < 16; n++)
        current->gpr[n] = regs[order[n]];
    current->rflags = regs[REG_EFL];
    current->rip = regs[REG_RIP];
    current->vector = regs[REG_TRAPNO];
    current->error = regs[REG_ERR];
    current->cr2 = current->vector == 14 ? regs[REG_CR2] : 0;
    memcpy(current->fx, uc->uc_mcontext.fpregs, 512);
    siglongjmp(back, 1);
}

static uint64_t checksum(const uint8_t *bytes, unsigned length)
{
    uint64_t sum = 0xcbf29ce484222325, word;
    for (unsigned n = 0; n < length; n += 8) {
        memcpy(&word, bytes + n, 8);
        sum = (sum ^ word) * 0x100000001b3;
    }
    return sum;
}

int main(int argc, char **argv)
{
    static uint8_t stack[65536];
    static const int signals[] = { SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP };
    struct stat stat;
    int fd = argc > 1 ? open(argv[1], O_RDWR) : -1;
    if (fd < 0 || fstat(fd, &stat) || sizeof(struct record) != 1024)
        return 2;
    struct record *records = mmap(0, stat.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (records == MAP_FAILED)
        return 3;
    /* The code page may be read and executed; it is written through another view of the same memory. */
    int memory = memfd_create("code", 0);
    if (memory < 0 || ftruncate(memory, 0x1000))
        return 4;
    uint8_t *code = mmap(0, 0x1000, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    if (code == MAP_FAILED || mmap(CODE, 0x1000, PROT_READ | PROT_EXEC, MAP_SHARED | MAP_FIXED_NOREPLACE | MAP_POPULATE,
                                   memory, 0) != CODE)
        return 4;
    if (mmap(DATA, 0x3000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | MAP_POPULATE,
             -1, 0) != DATA)
        return 5;
    memset(DATA, 0, 0x3000);
    mprotect(DATA + 0x2000, 0x1000, PROT_READ);
    stack_t alternate = { .ss_sp = stack, .ss_size = sizeof stack };
    sigaltstack(&alternate, 0);
    for (unsigned n = 0; n < sizeof signals / sizeof *signals; n++) {
        struct sigaction action = { .sa_sigaction = caught, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER };
        sigaction(signals[n], &action, 0);
    }
    volatile long count = stat.st_size / sizeof(struct record);
    for (volatile long n = 0; n < count; n++) {
        current = &records[n];
        memset(code, 0xcc, 0x1000);
        memcpy(code, current->code, current->rip < 64 ? current->rip : 64);
        memset(DATA, 0, DATA_BYTES);
        memcpy(WINDOW, current->window, 256);
        if (!sigsetjmp(back, 0))
            enter(current);
        memcpy(current->window, WINDOW, 256);
        current->sum = checksum(DATA, DATA_BYTES);
    }
    return 0;
}
