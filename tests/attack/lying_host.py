"""A host between KVM and a TD's vCPU that changes what TDVMCALLs return."""

import random

from softtdx.abi.exits import ExitReason
from softtdx.abi.ghci import VmcallStatus

U64 = (1 << 64) - 1
ANSWERS = ("r11", "r12", "r13", "r14", "r15")
STATUSES = [int(status) for status in VmcallStatus]


class Liar:
    """Lies with probability `rate` in the replies to `leaves` (all, when there are none).

    After `entries` of them the machine is stopped: whoever waits for a better answer by then may wait for good.
    """

    def __init__(self, machine, seed, *, rate=0.5, leaves=(), entries=4000):
        self.machine, self.random, self.rate, self.leaves = machine, random.Random(seed), rate, leaves
        self.ops = machine.vcpus[0].ops
        self.enter, self.ops.run = self.ops.run, self.run
        self.answer, self.ops.handle_exit = self.ops.handle_exit, self.handle_exit
        self.left, self.asked = entries, False
        self.lies = 0

    def handle_exit(self, lp):
        regs = self.ops.regs
        self.asked = regs.rax == ExitReason.TDCALL and (not self.leaves or regs.r11 in self.leaves)
        return self.answer(lp)

    def run(self, lp):
        self.left -= 1
        if not self.left:
            self.machine.stop()
        if self.asked and self.random.random() < self.rate:
            self.lies += 1
            self.lie(self.ops.regs)
        self.asked = False
        self.enter(lp)

    def lie(self, regs):
        for name in ANSWERS:
            if self.random.random() < 0.5:
                setattr(regs, name, self.value(getattr(regs, name)))
        if self.random.random() < 0.3:
            regs.r10 = self.random.choice([*STATUSES, self.random.getrandbits(64)])

    def value(self, honest):
        return self.random.choice(
            [0, 1, U64, 1 << 63, 1 << 47, 1 << 51, honest ^ 1, honest + 4096 & U64, self.random.getrandbits(64)]
        )
