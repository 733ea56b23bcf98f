"""Where a job writes and reads, held against the cluster file: what a container writes under no mount goes with it."""

from __future__ import annotations

from launch.cluster import Cluster
from launch.jobs import Submission
from prune_opd.data.prompts import source_problem


def mount_of(path: str, cluster: Cluster) -> str | None:
    """The mount that a path in the container is under, the innermost of several; None if there is none."""
    found = [mount for mount in cluster.container_mounts if path == _target(mount) or path.startswith(_inside(mount))]
    return max(found, key=lambda mount: len(_target(mount)), default=None)


def behind(path: str, cluster: Cluster) -> str | None:
    """A path in the container as this machine has it; None if it is under no mount."""
    mount = mount_of(path, cluster)
    return None if mount is None else mount.split(":")[0] + path[len(_target(mount)) :]


def place_problems(submission: Submission, cluster: Cluster) -> list[str]:
    """What would be lost or not be found: a line for each folder that is written, and for the task of an evaluation."""
    folders = {"--run-dir": submission.run_dir} if submission.run_dir else {"run_root": cluster.run_root}
    if submission.export:
        folders["--export"] = submission.export
    problems = [problem for name, folder in folders.items() if (problem := _lost(name, str(folder), cluster))]
    task = submission.evaluate
    if task and "/" not in task and "." not in task and (wrong := source_problem("--evaluate", task)):
        problems.append(wrong)  # a file is on the cluster: the job looks for it
    return problems


def _lost(name: str, folder: str, cluster: Cluster) -> str | None:
    image = cluster.container_image is not None
    if not folder.startswith("/"):
        if not image and (cluster.kind != "slurm" or cluster.workdir):
            return None
        under = " under a mount" if image else ", or set workdir"
        return f"{name} = {folder!r} is relative, and jobs start in a folder of their own: give an absolute path{under}"
    if not image:
        return None
    mount = mount_of(folder, cluster)
    if mount is None:
        targets = ", ".join(map(_target, cluster.container_mounts)) or "none"
        return (
            f"{name} = {folder!r} is under no mount, so it would go with the container: choose a folder under one "
            f"({targets}), or add it to container_mounts"
        )
    if mount.endswith(":ro"):
        return f"{name} = {folder!r} is under {mount}, which can only be read: leave :ro out, or choose another folder"
    return None


def _target(mount: str) -> str:
    return mount.split(":")[1].rstrip("/") or "/"


def _inside(mount: str) -> str:
    return f"{_target(mount).rstrip('/')}/"
