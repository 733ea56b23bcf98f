"""Cluster files: what is refused, and with which message. No NeMo-Run."""

from pathlib import Path

import pytest
import yaml

from launch.cluster import CLUSTERS, load_cluster
from prune_opd.errors import ConfigError

SLURM = {"kind": "slurm", "account": "a"}


def write(folder: Path, settings: object) -> str:
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", sorted(path.stem for path in CLUSTERS.glob("*.yaml")))
def test_every_cluster_file_of_the_repository_is_valid(name: str) -> None:
    assert load_cluster(name).nodes is None, "nodes are the recipe's"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SLURM | {"partion": "b"}, "there is no setting 'partion': did you mean partition?"),
        (SLURM | {"nodes": "2"}, "nodes = '2' has the wrong type: give an integer"),
        (SLURM | {"nodes": True}, "nodes = True has the wrong type"),
        (SLURM | {"nodes": 0}, "nodes = 0 is out of range: give a number at least 1"),
        (SLURM | {"time": "4h"}, "time = '4h' is no time limit"),
        (SLURM | {"time": 14400}, "time = 14400 has the wrong type: give a text"),
        (SLURM | {"time": 43200}, "YAML makes a number of 12:00:00 without quotes"),
        (SLURM | {"run_root": "~/runs"}, "run_root = '~/runs': nothing puts your home folder in for ~"),
        (SLURM | {"container_image": "~/i.sqsh"}, "write the whole path"),
        (SLURM | {"numa_binding": True}, "give one of node, socket, exclusive, core-complex, or null"),
        (
            SLURM | {"numa_binding": "nodes", "gpus_per_node": 8},
            "numa_binding = 'nodes' is not known: choose one of node",
        ),
        ({"kind": "slurm"}, "account is missing"),
        ({"account": "a"}, "kind is not set"),
        (SLURM | {"kind": "pbs"}, "kind = 'pbs' is not known"),
        (SLURM | {"container_mounts": ["/a"]}, "'/a' is no mount"),
        (SLURM | {"container_mounts": "/a:/b"}, "give a text or several, as in container_mounts=[…,…]"),
        (SLURM | {"environment": {"A B": "c"}}, "'A B' cannot be the name of a variable"),
        (SLURM | {"environment": {"A": "b\nc"}}, "holds a line break"),
        (SLURM | {"environment": {"HF_TOKEN": "hf_x"}}, "move it to secrets"),
        (SLURM | {"secrets": {"HF_TOKEN": "hf_x"}}, "must say where the secret is, not what it is"),
        (SLURM | {"ssh": {"host": "h"}}, "ssh.user is not set"),
        (SLURM | {"ssh": {"host": "h", "user": "u", "job_dir": "/j"}, "secrets": {"K": "environment"}}, "through ssh"),
        ({"kind": "local", "nodes": 2}, "is this machine only"),
        ({"kind": "docker"}, "container_image is missing"),
        ("text", "stands where the settings of a Cluster belong"),
    ],
)
def test_refusals_name_the_file_and_the_field(tmp_path: Path, settings: object, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_cluster(write(tmp_path, settings))
    assert message in str(refused.value)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("beside", [{}, {"OTHER": 5}])
def test_a_refusal_never_repeats_a_secret(tmp_path: Path, beside: dict[str, int]) -> None:
    with pytest.raises(ConfigError) as refused:
        load_cluster(write(tmp_path, SLURM | {"secrets": {"HF_TOKEN": "hf_planted", **beside}}))
    assert "hf_planted" not in str(refused.value)


def test_an_unknown_cluster_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="choose docker, local, slurm, slurm-pyxis"):
        load_cluster("nowhere")
