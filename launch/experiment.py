"""Jobs as a NeMo-Run experiment: submit, print, follow, read logs, cancel.

`NEMORUN_HOME` must be set before this module is imported: NeMo-Run reads it when it is imported itself.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nemo_run as run
from invoke.exceptions import UnexpectedExit

from launch.cluster import Cluster
from launch.executors import make_executor
from launch.jobs import CODE, EXIT_CODE, Job, end_of
from prune_opd.errors import UserError

POLL = 2.0  # seconds between two looks at a job
# Slurm's states of a job that will not go on. All others may still change, also REQUEUED.
ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "REVOKED",
    "TIMEOUT",
)
CANCELLED_CODE = 130


@dataclass(frozen=True)
class State:
    """A job as accounting sees it."""

    name: str
    job_id: str
    state: str  # as Slurm names it, or NeMo-Run where there is no Slurm
    exit_code: int
    restarts: int = 0

    @property
    def ended(self) -> bool:
        return self.state in (*ENDED, "SUCCEEDED")

    @property
    def code(self) -> int:
        """What a shell should see: the job's exit code, and never 0 for a job that did not succeed."""
        if self.state in ("COMPLETED", "SUCCEEDED"):
            return 0
        return self.exit_code or (CANCELLED_CODE if self.state == "CANCELLED" else 1)


def build(title: str, jobs: list[Job], cluster: Cluster) -> Any:
    """The experiment; nothing is submitted yet."""
    experiment = run.Experiment(title, executor=make_executor(cluster, jobs[0]))
    with experiment:
        for job in jobs:
            script = run.Script(inline=job.script(cluster))
            after = [job.after] if job.after else []
            experiment.add(
                script, executor=make_executor(cluster, job), name=job.name, dependencies=after, tail_logs=False
            )
    return experiment


def dry_run(title: str, jobs: list[Job], cluster: Cluster) -> dict[str, str]:
    """File name → text of the sbatch script and the nodes' script of every job; nothing is submitted."""
    experiment = build(title, jobs, cluster)
    with experiment:
        experiment.dryrun(log=False, delete_exp_dir=False)
    folder = Path(experiment._exp_dir)
    scripts = [
        *sorted(folder.glob("*_sbatch.sh")),
        *sorted(folder.glob("*/scripts/*.sh")),
        *sorted(folder.glob("scripts/*.sh")),
    ]
    return {str(path): path.read_text(encoding="utf-8") for path in scripts}


def as_script(title: str, jobs: list[Job], cluster: Cluster) -> str:
    """One bash script that does what submitting does: it writes the files of all jobs, and starts them in order."""
    files = dry_run(title, jobs, cluster)
    lines = [
        "#!/usr/bin/env bash",
        f"# {title}: what `make launch` would submit. Run it to submit it.",
        "set -euo pipefail",
    ]
    if cluster.ssh:
        lines.append(
            f"# on {cluster.ssh.user}@{cluster.ssh.host}, where NeMo-Run would copy these files and run sbatch"
        )
    for path, text in files.items():
        lines += _written(path, text)
    names: dict[str, str] = {}
    for job in jobs:
        script = next(path for path in files if path.endswith(f"/{job.name}/scripts/{job.name}.sh"))
        folder = Path(script).parent.parent
        lines.append(f"mkdir -p {shlex.quote(str(folder / CODE))}")
        for name, text in job.files if cluster.kind != "local" else ():
            lines += _written(str(folder / CODE / name), text)
        batch = next((path for path in files if path.endswith(f"/{job.name}_sbatch.sh")), None)
        if batch is None:
            lines.append(_started_here(cluster, job, folder, script))
            continue
        names[job.name] = f"job{len(names)}"
        waits = f'--dependency="afterok:${names[job.after]}" ' if job.after else ""
        lines.append(f"{names[job.name]}=$(sbatch --requeue --parsable {waits}{shlex.quote(batch)})")
        lines.append(f'echo "{job.name}: job ${names[job.name]}"')
    return "\n".join(lines) + "\n"


def _written(path: str, text: str) -> list[str]:
    """Bash lines that write a file, byte for byte but for a line break at its end."""
    end = end_of(text)
    return [
        f"# ---- {Path(path).name}",
        f"mkdir -p {shlex.quote(str(Path(path).parent))}",
        f"cat >{shlex.quote(path)} <<'{end}'",
        text.removesuffix("\n"),
        end,
    ]


def _started_here(cluster: Cluster, job: Job, folder: Path, script: str) -> str:
    """The command of a job without Slurm, as NeMo-Run's executor starts it: in its container, or plainly."""
    if cluster.kind == "local":
        settings = [f"{name}={value}" for name, value in sorted(cluster.environment.items())]
        return shlex.join(["env", *settings, "bash", script])
    executor = make_executor(cluster, job)
    gpus = ["--gpus", str(executor.num_gpus), "--runtime", executor.runtime] if executor.num_gpus else []
    volumes = [word for volume in [*executor.volumes, f"{folder}:/nemo_run"] for word in ("--volume", volume)]
    settings = [word for name, value in executor.env_vars.items() for word in ("--env", f"{name}={value}")]
    inside = ["--workdir", "/nemo_run/code", executor.container_image, "bash", f"/nemo_run/scripts/{Path(script).name}"]
    return shlex.join(["docker", "run", "--rm", "--ipc", executor.ipc_mode, *gpus, *volumes, *settings, *inside])


def submit(title: str, jobs: list[Job], cluster: Cluster) -> Any:
    experiment = build(title, jobs, cluster)
    with experiment, _readable_errors(cluster):
        experiment.run(detach=cluster.kind == "slurm", sequential=False, tail_logs=False)
    return experiment


@contextmanager
def _readable_errors(cluster: Cluster) -> Iterator[None]:
    """A UserError with the failed command's own message, for commands on the login node and copies to it."""
    try:
        yield
    except UnexpectedExit as error:
        message = " ".join((error.result.stderr or error.result.stdout).split())
        where = f"{cluster.ssh.user}@{cluster.ssh.host}" if cluster.ssh else "this machine"
        raise UserError(f"{error.result.command.split()[0]} failed on or to {where}: {message}") from error


def find(name: str) -> Any:
    """The latest experiment of that title, or the one with that id."""
    try:
        return run.Experiment.from_title(name)
    except Exception:
        pass
    try:
        return run.Experiment.from_id(name)
    except Exception as error:
        raise UserError(
            f"experiment {name!r} is not known here: it was launched from another place, or never"
        ) from error


def states(experiment: Any) -> list[State]:
    """The state of every job: under Slurm from sacct, which has exit codes and restarts, elsewhere from NeMo-Run."""
    known = experiment.status(return_dict=True)
    found = []
    for job in experiment.jobs:
        info = known[job.id]
        if isinstance(job.executor, run.SlurmExecutor):
            found.append(_accounted(job, info["job_id"]))
        else:
            said = re.findall(rf"^{EXIT_CODE} (\d+)$", _local_logs(job), flags=re.MULTILINE)
            found.append(State(job.id, info["job_id"], str(info["status"]), int(said[-1]) if said else 1))
    return found


def _accounted(job: Any, job_id: str) -> State:
    if not job_id:  # sbatch refused it
        return State(job.id, "-", "FAILED", 1)
    answer = job.executor.tunnel.run(f"sacct -D -X -n -P -j {shlex.quote(job_id)} -o State,ExitCode", warn=True)
    lines = [line.split("|") for line in answer.stdout.splitlines() if line.strip()]
    if not lines:  # accounting is a moment behind the controller
        return State(job.id, job_id, "UNKNOWN", 1)
    state, exit_code = lines[-1]  # a line for each attempt
    return State(job.id, job_id, state.split()[0], _shell_code(exit_code), len(lines) - 1)


def _shell_code(text: str) -> int:
    """Slurm's code:signal as a shell has it."""
    code, _, number = text.partition(":")
    return 128 + int(number) if int(number or 0) else int(code)


def wait(experiment: Any, say: Any) -> list[State]:
    """Follow all jobs to their end; `say` gets a line whenever one changes."""
    before: list[State] = []
    while True:
        now = states(experiment)
        for state in now:
            if state not in before:
                say(describe(state))
        if all(state.ended for state in now):
            return now
        before = now
        time.sleep(POLL)


def describe(state: State) -> str:
    again = f", restarted {state.restarts} ×" if state.restarts else ""
    code = f", exit code {state.code}" if state.ended and state.code else ""
    return f"{state.name}: job {state.job_id} {state.state}{again}{code}"


def first_failure(found: Iterable[State]) -> int:
    """0 if all jobs succeeded, else the code of the first that did not."""
    return next((state.code for state in found if state.code), 0)


def logs(experiment: Any, name: str | None) -> str:
    """What the ranks wrote in every attempt (NeMo-Run shows the first only), then the batch script's output."""
    parts = []
    for job in experiment.jobs:
        if name not in (None, job.id):
            continue
        folder = Path(job.executor.job_dir)
        if isinstance(job.executor, run.SlurmExecutor):
            remote = f"{job.executor.tunnel.job_dir}/{folder.name}"
            command = f'cd {shlex.quote(remote)} && for f in log-* sbatch_*; do echo "== $f"; cat -- "$f"; done'
            parts.append(job.executor.tunnel.run(command, warn=True).stdout)
        else:
            parts.append(_local_logs(job))
    if name is not None and not parts:
        raise UserError(
            f"job {name!r} is not in this experiment: choose {', '.join(job.id for job in experiment.jobs)}"
        )
    return "\n".join(parts)


def _local_logs(job: Any) -> str:
    files = sorted(Path(job.executor.job_dir).glob("**/std*.log"))
    return "\n".join(f"== {file}\n{file.read_text(errors='replace')}" for file in files)


def cancel(experiment: Any) -> None:
    """Cancel every job, beginning with those that wait for others."""
    for job in reversed(experiment.jobs):
        experiment.cancel(job.id)
