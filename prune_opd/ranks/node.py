"""One node's part of a job on several nodes.

    python -m prune_opd.ranks.node --ranks R --run-dir DIR RECIPE [key=value …]

The first node checks the recipe, then every node starts its ranks with torchrun. Slurm's variables say which node this
is and where the first one listens. Outside Slurm it is the only node. This process imports no torch.

Signals are passed on to the ranks, which save and end with `REQUEUE_EXIT_CODE`; on that code the job script queues the
job again. A scheduler ends all nodes as soon as one has failed, and this code looks like a failure. So a node waits
until the others have saved too before it ends with it (each node leaves a file in the run directory).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from prune_opd.errors import REQUEUE_EXIT_CODE, UserError
from prune_opd.process import rank_environment
from prune_opd.ranks.launcher import READY

SAVED_TOGETHER = 90.0  # seconds that a node which has saved waits for the others, at most
LEAVING = ".leaving"  # folder in the run directory with a file of each node that has saved and is about to end
ENDED_BY_ANOTHER = 1
PORTS = range(20000, 28000)
ASKING = (signal.SIGTERM, signal.SIGUSR1)


def torchrun_arguments(ranks: int, env: Mapping[str, str]) -> list[str]:
    """torchrun's arguments to find the other nodes, from Slurm's variables (or MASTER_ADDR and MASTER_PORT, if set).

    The port follows from the job's number, so that jobs on one node do not meet, and scripts stay the same.
    """
    nodes, node = int(env.get("SLURM_NNODES", "1")), int(env.get("SLURM_NODEID", "0"))
    address = env.get("MASTER_ADDR") or env.get("SLURM_LAUNCH_NODE_IPADDR") or "127.0.0.1"
    port = env.get("MASTER_PORT") or str(PORTS[int(env.get("SLURM_JOB_ID", os.getpid())) % len(PORTS)])
    # fmt: off
    return [
        "--nnodes", str(nodes), "--node-rank", str(node), "--nproc-per-node", str(ranks),
        "--master-addr", address, "--master-port", port,
    ]
    # fmt: on


class Supervisor:
    """Runs one child at a time and passes signals on to it."""

    def __init__(self) -> None:
        self.asked: int | None = None  # the signal that asked for an end
        self._child: subprocess.Popen[bytes] | None = None
        for number in ASKING:
            signal.signal(number, self._hand_on)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    @property
    def code_before_training(self) -> int:
        """Exit code after a signal when there is nothing to save: SIGUSR1 means time is up, SIGTERM a failed node."""
        return REQUEUE_EXIT_CODE if self.asked == signal.SIGUSR1 else ENDED_BY_ANOTHER

    def run(self, command: list[str], env: Mapping[str, str]) -> int:
        """Run a command. Returns its exit code as a shell has it."""
        if self.asked is not None:
            return self.code_before_training
        self._child = subprocess.Popen(command, env=dict(env))
        if self.asked is not None:  # between the question above and here
            self._child.send_signal(self.asked)
        code = self._child.wait()
        if code in (0, REQUEUE_EXIT_CODE):
            return code
        # A job's code is the highest of its nodes' codes. A node that was ended because another failed must not hide
        # that one's code.
        return ENDED_BY_ANOTHER if self.asked is not None else (128 - code if code < 0 else code)

    def leave_together(self, run_dir: Path, env: Mapping[str, str]) -> int:
        """Wait until every node of this attempt has saved, and return the code to end with.

        When the first node ends, the scheduler ends the others. So once all have saved, SIGTERM is ignored.
        """
        nodes, attempt = int(env.get("SLURM_NNODES", "1")), env.get("SLURM_RESTART_COUNT", "0")
        folder = run_dir / LEAVING / f"{env.get('SLURM_JOB_ID', 'alone')}_{attempt}"
        folder.mkdir(parents=True, exist_ok=True)
        self.asked = None
        (folder / env.get("SLURM_NODEID", "0")).touch()
        end = time.monotonic() + SAVED_TOGETHER
        while len(list(folder.iterdir())) < nodes and time.monotonic() < end:
            if self.asked == signal.SIGTERM:  # another node has failed
                return ENDED_BY_ANOTHER
            time.sleep(0.1)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return REQUEUE_EXIT_CODE


def binding_arguments(mode: str | None) -> list[str]:
    """torchrun's arguments that hold each rank to cores near its GPU; UserError without the program it does it with."""
    if mode is None:
        return []
    if shutil.which("numactl") is None:
        raise UserError(
            "numa_binding: torchrun binds ranks with the program numactl, and this node or image has none: install it, "
            "or leave numa_binding out of the cluster file"
        )
    return ["--numa-binding", mode]


def run_node(recipe: list[str], run_dir: Path, ranks: int, binding: str | None = None) -> int:
    """Check on the first node, then train on all of them. binding: torchrun's `--numa-binding`."""
    bound = binding_arguments(binding)
    supervisor = Supervisor()
    env = rank_environment({"HF_HUB_OFFLINE": "1"} | os.environ)
    command = [sys.executable, "-m", "prune_opd.cli"]
    if env.get("SLURM_NODEID", "0") == "0":
        shutil.rmtree(run_dir / LEAVING, ignore_errors=True)  # of the attempt before
        world = ranks * int(env.get("SLURM_NNODES", "1"))
        code = supervisor.run([*command, "check", *recipe, "--nproc", str(world), "--run-dir", str(run_dir)], env)
        if supervisor.asked is not None:
            return supervisor.code_before_training
        if code:
            return code
    ready = [READY, "prune_opd.cli.ready", "train/unknown"]  # the recipe is read by the ranks
    torchrun = [sys.executable, "-u", "-m", "prune_opd.ranks.launcher", *ready, *torchrun_arguments(ranks, env), *bound]
    code = supervisor.run([*torchrun, *command[1:], "train", *recipe, "--run-dir", str(run_dir)], env)
    return supervisor.leave_together(run_dir, env) if code == REQUEUE_EXIT_CODE else code


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m prune_opd.ranks.node", description="One node of a job.")
    parser.add_argument("--ranks", type=int, default=1, help="ranks on this node, one per GPU")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--numa-binding", metavar="MODE", help="torchrun's: holds ranks to the cores near their GPUs")
    parser.add_argument("--export-to", type=Path, help="write the run's last checkpoint there, train nothing")
    parser.add_argument("recipe", nargs="+", metavar="RECIPE [key=value …]")
    arguments = parser.parse_args(argv)
    if arguments.export_to is None:
        try:
            return run_node(arguments.recipe, arguments.run_dir.absolute(), arguments.ranks, arguments.numa_binding)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
    export = [sys.executable, "-m", "prune_opd.cli", "export"]
    checkpoints = arguments.run_dir / "checkpoints"
    checkpoint = checkpoints / (checkpoints / "latest").read_text(encoding="utf-8").strip()
    return Supervisor().run(
        [*export, str(checkpoint), str(arguments.export_to)], rank_environment({"HF_HUB_OFFLINE": "1"} | os.environ)
    )


if __name__ == "__main__":
    sys.exit(main())
