"""The attack laboratory: a hostile host, a hostile DIMM and a hostile neighbour, each trying what real attackers try.

Reading order: `lab` (what an attack is and how its outcome is judged), `scene` (the machine under attack: a victim
with a secret, and what an attacker can reach), `flawed` (a module with one check taken out), then the attacks:
`memory`, `mapping`, `races`, `control`, `caches`, `parameters`, `modes`, `module_image`, `vcpu`, `events`, `stepping`,
`replies`, `attestation`; `probe` is what a probe on the memory bus sees. Every attack runs on the protected
platform, where TDX's promise must hold, and on an unprotected one, where it must succeed, or it proves nothing.

Beside them `fuzz` tries what nobody thought of, `oracle` says what must hold all the same, and `campaign` spreads seeds
over `engines`.
"""

from softtdx.attack.lab import Attack as Attack
from softtdx.attack.lab import Outcome as Outcome
from softtdx.attack.lab import Report as Report
from softtdx.attack.lab import all_attacks as all_attacks
from softtdx.attack.lab import find as find
from softtdx.attack.lab import run_attack as run_attack
