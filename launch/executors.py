"""A Cluster as NeMo-Run's executor, with our own lines where NeMo-Run's generator is not safe.

It writes `export NAME=value` without quotes and changes names to capitals, traces every line (`set -x`), and queues a
failed job again whatever the reason. So variables, secrets and the requeue rule are our own lines (`setup_lines`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nemo_run as run

from launch.cluster import FROM_ENVIRONMENT, Cluster
from launch.jobs import Job, secret_lines
from launch.packager import Brought
from prune_opd.errors import REQUEUE_EXIT_CODE, UserError

JOB_PREFIX = "prune-opd."


def make_executor(cluster: Cluster, job: Job) -> Any:
    """The executor of one job, on the job's number of nodes (not the cluster's)."""
    packager = Brought(files=dict(job.files)) if job.files else run.Packager()
    if cluster.kind == "local":  # its executor ignores packagers: the script writes the files
        return run.LocalExecutor(env_vars=dict(cluster.environment), packager=run.Packager())
    if cluster.kind == "docker":
        return run.DockerExecutor(
            container_image=cluster.container_image,
            num_gpus=cluster.gpus_per_node or None,
            runtime="nvidia" if cluster.gpus_per_node else None,
            ipc_mode="host",
            volumes=list(cluster.container_mounts),
            env_vars=dict(cluster.environment),
            packager=packager,
        )
    more = dict(cluster.more)
    return run.SlurmExecutor(
        account=cluster.account,
        partition=cluster.partition,
        qos=cluster.qos,
        exclude=cluster.exclude,
        constraint=cluster.constraint,
        exclusive=cluster.exclusive or None,
        mem=cluster.mem,
        time=cluster.time,
        nodes=job.nodes,
        ntasks_per_node=1,  # one task a node: prune_opd.ranks.node watches over its ranks
        gpus_per_node=cluster.gpus_per_node,
        # The signal goes to the job's steps, not to the batch shell, and from there to the ranks.
        signal=f"USR1@{cluster.signal_before_end}" if cluster.signal_before_end else None,
        container_image=cluster.container_image,
        container_mounts=list(cluster.container_mounts),
        container_env=sorted([*cluster.environment, *cluster.secrets]) if cluster.container_image else None,
        srun_args=list(cluster.srun_args) or None,
        setup_lines=setup_lines(cluster),
        retries=0,  # NeMo-Run would queue every failure again
        # else a job waits for ever for one that has failed
        additional_parameters={"kill_on_invalid_dep": "yes"} | more.pop("additional_parameters", {}),
        job_name_prefix=f"{JOB_PREFIX}{job.label}." if job.label else JOB_PREFIX,
        poll_estimated_start_time=bool(more.pop("poll_estimated_start_time", False)),
        tunnel=_tunnel(cluster),
        packager=packager,
        **more,
    )


def setup_lines(cluster: Cluster) -> str:
    """Bash for the batch script, before its srun: tracing off, variables, secrets, and when to queue again."""
    lines = [
        "{ set +x; } 2>/dev/null  # a trace would show secrets",
        "queue_again() {",
        "    local code=$?",
        f'    if [ "$code" -eq {REQUEUE_EXIT_CODE} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {cluster.max_requeues} ];'
        " then",
        '        echo "saved; queueing job $SLURM_JOB_ID again (restart $((${SLURM_RESTART_COUNT:-0} + 1)))"',
        '        scontrol requeue "$SLURM_JOB_ID"',
        "    fi",
        "}",
        "trap queue_again EXIT",
        "unset SLURM_UNBUFFEREDIO  # srun would give the ranks a terminal, and progress bars would fill the logs",
    ]
    lines += [f"export {name}={_quoted(value)}" for name, value in sorted(cluster.environment.items())]
    return "\n".join([*lines, *secret_lines(cluster)])


def _quoted(value: str) -> str:
    """The value in quotes, even where bash needs none: `NAME==eth0` would look like a mistake."""
    return "'" + value.replace("'", "'\\''") + "'"


def check_secrets(cluster: Cluster) -> None:
    """Raises UserError if a secret that comes from this environment is not set."""
    for name, source in cluster.secrets.items():
        if source == FROM_ENVIRONMENT and not os.environ.get(name):
            raise UserError(f"secrets.{name} is to come from the environment, and it is not set: export {name}")


def _tunnel(cluster: Cluster) -> Any:
    if cluster.ssh is None:
        return run.LocalTunnel(job_dir="")
    ssh = cluster.ssh
    identity = str(Path(ssh.identity).expanduser()) if ssh.identity else None
    return run.SSHTunnel(host=ssh.host, user=ssh.user, job_dir=ssh.job_dir, port=ssh.port, identity=identity)
