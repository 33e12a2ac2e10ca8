"""Fuzzing of both walls and of what files come in: one seed, one run, the same findings each time.

A target is a function of a random generator and a number of steps. It raises nothing: what must not happen (a Python
exception that is no answer, a module that shut down, a lock left held, structures that contradict each other,
plaintext that the host can read) is a finding, with a signature by which equal ones are recognised.

`world` is the machine in every state that calls can meet, `calls` what a call is made of, `feedback` what is learned
from answers, `walls` the targets of wall 1; `guest`, `machine_code`, `ioctls` and `files` are the others.
"""

from softtdx.attack.fuzz.core import Finding as Finding
from softtdx.attack.fuzz.core import Fuzzed as Fuzzed
from softtdx.attack.fuzz.core import Target, run_target
from softtdx.attack.fuzz.files import files, loader
from softtdx.attack.fuzz.guest import guest
from softtdx.attack.fuzz.ioctls import ioctls
from softtdx.attack.fuzz.machine_code import code
from softtdx.attack.fuzz.walls import seamcalls, tdcalls
from softtdx.errors import SoftTdxError

__all__ = ["TARGETS", "Finding", "Fuzzed", "fuzz"]

TARGETS: dict[str, Target] = {
    "seamcall": seamcalls,
    "tdcall": tdcalls,
    "guest": guest,
    "code": code,
    "ioctl": ioctls,
    "files": files,
    "loader": loader,
}
"""Target -> what it does for a number of steps."""


def fuzz(target: str, seed: int, steps: int) -> Fuzzed:
    """Run one seed of a target. SoftTdxError for a target that does not exist."""
    if target not in TARGETS:
        raise SoftTdxError(f"there is no fuzzing target {target!r}; there are {', '.join(TARGETS)}")
    return run_target(target, TARGETS[target], seed, steps)
