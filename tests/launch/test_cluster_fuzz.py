"""Generated cluster files: one is read, or refused in lines of our own, as the command prints them. No NeMo-Run."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch import __main__ as launch_main
from launch.cluster import Cluster, Ssh, load_cluster
from launch.jobs import Submission, plan_jobs
from prune_opd.errors import ConfigError

TRIES = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = [one.name for kind in (Cluster, Ssh) for one in dataclasses.fields(kind)]
THEIRS = ["gres", "cpus_per_task", "additional_parameters", "reservation", "array", "tunnel", "signal", "partion"]
# What YAML makes other things of than texts and numbers, or nothing at all.
SNIPPETS = [
    "2024-13-45",
    "04:00:00",
    "!!timestamp x",
    "!!float x",
    "!!int ''",
    "!!binary '?'",
    "!!python/object:os.system {}",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "&a [*a]",
    "&a {b: *a}",
    "*a",
    "=",
    "<<: 3",
    "? {a: b}\n  : c",
    "{<<: [1]}",
    "[",
    "{",
    "'",
    "%",
    "@",
    "|",
    ">-\n  a\n  b",
    "0x_",
    "0o8",
    "1e999",
    ".nan",
    "-.inf",
    "~",
    "''",
    '"\\0"',
    '"\\ud800"',
    "\t",
    "yes",
    "18446744073709551616",
    "[/a:/b, /a:/b:ro]",
    "[--mem=1, '$(x)']",
    "{A: b}",
    "{HF_TOKEN: environment}",
    "{1: 2}",
    "{host: h, user: u, job_dir: /j}",
    "{host: [], user: {}, job_dir: 3}",
    "[" * 300 + "]" * 300,
    "{a: " * 3000 + "}" * 3000,
]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.integers(), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from([*NAMES, *THEIRS, "1", "[a]", "? [a]", "null", "2024-01-01", "''"]) | TEXTS.map(repr)
VALUES = st.sampled_from(SNIPPETS) | JSON.map(lambda value: yaml.safe_dump(value, default_flow_style=True).strip())
LINES = st.lists(st.tuples(KEYS, VALUES).map(": ".join), max_size=4)
KINDS = st.sampled_from(
    [
        "kind: slurm\naccount: a",
        "kind: local",
        "kind: docker\ncontainer_image: i",
        "kind: slurm\naccount: a\nssh: {host: h, user: u, job_dir: /j}",
        "",
    ]
)


@dataclasses.dataclass
class SlurmExecutor:
    """A few fields of NeMo-Run's, of each type that they have."""

    SBATCH_FLAGS = ("reservation", "comment", "array")
    gres: str | None = None
    cpus_per_task: int | None = None
    wait_time_for_group_job: float = 30
    additional_parameters: dict[str, Any] | None = None
    segment: int | None = None
    monitor: bool = False
    packages: list[str] = dataclasses.field(default_factory=list)


@pytest.fixture
def with_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("nemo_run")
    module.SlurmExecutor = SlurmExecutor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nemo_run", module)


def read_or_refused(text: str | bytes) -> bool:
    """Whether a cluster file is taken, and then jobs are planned with it; else the command must say why."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        said: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["launch", "submit", "tiny_compatible", "--cluster", str(path), "--dry-run"])
            patch.setattr("builtins.print", lambda *parts, **options: said.append(" ".join(map(str, parts))))
            patch.setattr(launch_main, "wishes", lambda *parts: (_ for _ in ()).throw(TakenError))
            try:
                launch_main.main()
            except TakenError:
                cluster = load_cluster(str(path))
                assert all(job.script for job in plan_jobs(Submission("tiny_compatible"), cluster))
                return True
            except SystemExit as ended:
                assert ended.code == ConfigError.exit_code
        assert said and all(line.startswith("error: ") and "\n" not in line for line in said), said
    return False


class TakenError(Exception):
    """The file was read and its jobs planned."""


@TRIES
@given(kind=KINDS, lines=LINES)
def test_a_cluster_file_is_read_or_refused_in_lines(kind: str, lines: list[str], with_executor: None) -> None:
    read_or_refused("\n".join([kind, *lines]) + "\n")


@TRIES
@given(text=st.text(max_size=40) | st.binary(max_size=40))
def test_any_text_and_any_bytes_are_refused_in_lines(text: str | bytes, with_executor: None) -> None:
    read_or_refused(text)


@pytest.mark.parametrize(
    "key", ["time", "nodes", "environment", "secrets", "container_mounts", "ssh", "gres", "x", "more"]
)
def test_every_odd_value_at_every_kind_of_field(key: str, with_executor: None) -> None:
    for value in SNIPPETS:
        read_or_refused(f"kind: slurm\naccount: a\n{key}: {value}\n")


@pytest.mark.parametrize("value", ["{}", "{a: b}", "{? '' : null}"])
def test_where_the_executors_fields_are_kept_is_no_field(value: str, with_executor: None) -> None:
    assert not read_or_refused(f"kind: slurm\naccount: a\nmore: {value}\n")
