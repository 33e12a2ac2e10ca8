"""A campaign on two Ray nodes of this machine, one of which is lost in the middle. Prints what came of it as JSON.

A program of its own, for Ray wants a process to itself. Usage: ray_scenario.py FOLDER
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from softtdx.attack.campaign import Job, run_campaign
from softtdx.attack.engines import RayEngine
from softtdx.attack.fuzz import Finding, Fuzzed

LOOPBACK = "127.0.0.1"
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "node_ip_address": LOOPBACK}
DIES, FINDS = 4, (3, 6)


def patient(folder: str, target: str, seed: int, steps: int) -> Fuzzed:
    """Say where it runs, and wait until the campaign may end. One seed kills its process, some find something."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    with open(f"{folder}/tries", "a") as tries:
        tries.write(f"{seed} {node} {os.getpid()}\n")
    if seed == DIES:
        os._exit(9)
    while not os.path.exists(f"{folder}/go"):
        time.sleep(0.02)
    found = (Finding(target, seed, 1, "the one cause", "here"),) if seed in FINDS else ()
    return Fuzzed(steps, found)


def tries(folder: Path) -> list[list[str]]:
    path = folder / "tries"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def listeners(root: int) -> list[str]:
    """The addresses on which a process and its descendants listen for TCP."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    inodes = set()
    for pid in family:
        for fd in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes.add(os.readlink(fd))
            except OSError:
                continue
    found = []
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = row.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in inodes:
                words = local.split(":")[0]  # of 32 bits, little endian
                raw = b"".join(bytes.fromhex(words[at : at + 8])[::-1] for at in range(0, len(words), 8))
                address = ip_address(raw)
                found.append(str(getattr(address, "ipv4_mapped", None) or address))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def lose(cluster: object, node: object, folder: Path) -> int:
    """A machine is gone, with every process on it. The seed that it took along."""
    seed, _, pid = next(row for row in tries(folder) if row[1] == node.node_id)
    cluster.remove_node(node, allow_graceful=False)
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(pid), 9)
    while alive(int(pid)):
        time.sleep(0.02)
    return int(seed)


def patiently(start: Callable[[], Any]) -> Any:
    """Ray gives its processes 30 s to start; a machine that is busy with something else takes longer."""
    for _ in range(9):
        try:
            return start()
        except Exception as error:
            print(f"again: {error}", file=sys.stderr)
    return start()


def main(folder: Path) -> None:
    RayEngine(address=LOOPBACK)  # before Ray is imported: it turns off what must be off
    from ray.cluster_utils import Cluster

    head = NODE | {"include_dashboard": False}
    cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
    second = patiently(lambda: cluster.add_node(**NODE))
    state = folder / "state.json"
    worker = partial(patient, str(folder))
    jobs = [Job("files", seed, 10) for seed in range(8)]
    results = []

    def campaign() -> None:
        results.append(run_campaign(jobs, engine=RayEngine(address=cluster.address), state_file=state, worker=worker))

    thread = threading.Thread(target=campaign)
    thread.start()
    while len(nodes := {row[1] for row in tries(folder)}) < 2 or second.node_id not in nodes:
        time.sleep(0.02)
    listening = listeners(os.getpid())
    lost = lose(cluster, second, folder)
    (folder / "go").touch()
    thread.join()
    before = len(tries(folder))
    again = run_campaign(jobs, engine=RayEngine(address=cluster.address), state_file=state, worker=worker)
    cluster.shutdown()
    report = {
        "campaign": results[0].describe(),
        "again": again.describe(),
        "tried_again": len(tries(folder)) - before,
        "lost": lost,
        "tries": [int(row[0]) for row in tries(folder)],
        "listening": sorted(set(listening)),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
