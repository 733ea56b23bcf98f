"""A cluster file, checked before anything is submitted: names, types, and which settings go together."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from launch.fields import executor_fields
from prune_opd.config.checks import Checked, Count, CountOrZero, check_fields
from prune_opd.config.yaml import from_dict, parse
from prune_opd.errors import ConfigError, located

CLUSTERS = Path(__file__).parent / "clusters"
TIME = re.compile(r"(\d+-)?\d{1,2}:\d{2}:\d{2}")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
LOOKS_SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|API_?KEY)$", re.IGNORECASE)
FROM_ENVIRONMENT = "environment"


@dataclass(frozen=True)
class Ssh(Checked, name="ssh"):
    """A login node that jobs are submitted through; without it this machine submits them."""

    host: str
    user: str
    job_dir: str  # there, on a file system that the nodes share
    port: int = 22
    identity: str | None = None  # a private key file here


@dataclass(frozen=True)
class Cluster(Checked, name=""):
    """Where and how jobs run. Times are Slurm's [days-]HH:MM:SS."""

    kind: Literal["slurm", "local", "docker"]
    workdir: str | None = None  # the folder that the job changes to: recipes and relative paths are found there
    python: str = "python"  # the interpreter of the jobs, with prune_opd or a workdir that holds it
    run_root: str = "runs"  # run directories are made in it
    nodes: Count | None = None  # null: the recipe's planning.nodes
    ranks_per_node: Count | None = None  # one per GPU; null: the recipe's parallel.nproc
    gpus_per_node: int | None = None
    # torchrun holds every rank to the cores near its GPU: those of its NUMA node, of its socket, a share of the node's,
    # or one core complex; null: the kernel moves them as it likes
    numa_binding: Literal["node", "socket", "exclusive", "core-complex"] | None = None
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    exclude: str | None = None
    constraint: str | None = None
    exclusive: bool = False
    mem: str | None = None
    time: str = "04:00:00"
    # seconds before the time limit in which training saves and asks to be queued again; null: a step, a checkpoint and
    # a margin, as planned; 0: never
    signal_before_end: CountOrZero | None = None
    max_requeues: CountOrZero = 20
    container_image: str | None = None  # of pyxis: a .sqsh file or an image name; of docker: an image name
    container_mounts: tuple[str, ...] = ()  # SOURCE:TARGET[:ro]
    srun_args: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)  # NAME: environment, or the path of a file that holds it
    ssh: Ssh | None = None
    more: dict[str, Any] = field(default_factory=dict)  # other fields of NeMo-Run's SlurmExecutor (launch/fields.py)

    def __post_init__(self) -> None:
        check_fields(self, "", but=("more",))
        if not TIME.fullmatch(self.time):
            raise ConfigError(f"time = {self.time!r} is no time limit: write it as 'HH:MM:SS' or 'D-HH:MM:SS', quoted")
        if self.kind == "slurm" and not self.account:
            raise ConfigError("account is missing: name the Slurm account that jobs are charged to")
        if self.kind != "slurm" and ((self.nodes or 1) > 1 or self.ssh):
            raise ConfigError(f"kind = {self.kind!r} is this machine only: set nodes: 1 and leave ssh out")
        if self.kind == "docker" and not self.container_image:
            raise ConfigError("container_image is missing: name the image, such as prune-opd")
        if self.numa_binding and not self.gpus_per_node:
            raise ConfigError("numa_binding holds ranks near their GPUs: set gpus_per_node, or leave it out")
        if self.kind == "local" and self.container_image:
            raise ConfigError("container_image belongs to kind slurm or docker: leave it out, or set kind: docker")
        for name in ("workdir", "python", "run_root", "container_image"):
            if (value := str(getattr(self, name) or "")).startswith("~"):
                raise ConfigError(f"{name} = {value!r}: nothing puts your home folder in for ~: write the whole path")
        self._check_variables()
        for mount in self.container_mounts:
            parts = mount.split(":")
            if len(parts) not in (2, 3) or not all(part.startswith("/") for part in parts[:2]) or "," in mount:
                raise ConfigError(f"container_mounts: {mount!r} is no mount: write it as /SOURCE:/TARGET or …:ro")

    def _check_variables(self) -> None:
        for name in [*self.environment, *self.secrets]:
            if not VARIABLE.fullmatch(name):
                raise ConfigError(f"{name!r} cannot be the name of a variable: use letters, digits and _")
        for name in self.environment:
            if LOOKS_SECRET.search(name):
                raise ConfigError(f"environment.{name} would be written into job scripts: move it to secrets")
        for name, source in self.secrets.items():
            if source != FROM_ENVIRONMENT and not source.startswith("/"):
                raise ConfigError(
                    f"secrets.{name} must say where the secret is, not what it is:"
                    f" write {FROM_ENVIRONMENT!r} or the absolute path of a file on the nodes"
                )
            if source == FROM_ENVIRONMENT and (self.ssh or self.kind == "docker"):
                raise ConfigError(
                    f"secrets.{name}: jobs do not see this environment through ssh or docker; give a file that they see"
                )


OWN = tuple(one.name for one in dataclasses.fields(Cluster) if one.name != "more")


def load_cluster(name_or_path: str) -> Cluster:
    """The cluster file of `launch/clusters/`, or any .yaml by its path. Raises ConfigError naming file and field."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = CLUSTERS / f"{name_or_path}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in CLUSTERS.glob("*.yaml")))
        raise ConfigError(f"cluster {name_or_path!r} is not known: choose {known}, or give the path of a .yaml file")
    try:
        data = parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cluster {path}: it cannot be read as YAML ({' '.join(str(error).split())})") from error
    try:
        _check_texts("", data)
        more: dict[str, Any] = {}
        if isinstance(data, dict) and "more" in data:
            raise ConfigError("more is no field of a cluster file: write the fields of the executor beside the others")
        if isinstance(data, dict) and data.get("kind") == "slurm":
            unknown = {name: value for name, value in data.items() if name not in OWN}
            more = executor_fields(unknown, OWN)
            data = {name: value for name, value in data.items() if name not in more}
        cluster = from_dict(Cluster, data)
        return dataclasses.replace(cast(Cluster, cluster), more=more)
    except ConfigError as error:
        raise located(f"cluster {path}", error) from error


def _check_texts(name: str, value: Any) -> None:
    """No line breaks, since most texts go into job scripts; and a variable's message must not repeat the others."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        _check_texts(f"{name}.{key}".lstrip("."), part)
    if isinstance(value, str) and ("\n" in value or "\0" in value):
        raise ConfigError(f"{name} holds a line break: write it on one line")
    if name == "time" and isinstance(value, int):
        raise ConfigError(
            f"time = {value} has the wrong type: give a text; YAML makes a number of 12:00:00 without quotes"
        )
    if name.startswith(("environment.", "secrets.")) and not isinstance(value, str):
        raise ConfigError(f"{name} has the wrong type: give a text (quote it)")


def without_idle_secrets(cluster: Cluster, online: bool) -> Cluster:
    """The cluster without wandb's secrets where no run talks to wandb: nobody needs a key for it then."""
    secrets = {name: source for name, source in cluster.secrets.items() if online or not name.startswith("WANDB_")}
    return dataclasses.replace(cluster, secrets=secrets)
