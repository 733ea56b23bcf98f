"""Dataset directories: the rows of each split are those that `datasets` loads, or the directory is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from prune_opd.data import dataset_directory
from prune_opd.data.rows import read_rows
from prune_opd.errors import ConfigError

datasets.disable_progress_bars()


def card(*configs: dict[str, Any]) -> str:
    return f"---\n{yaml.safe_dump({'license': 'mit', 'configs': list(configs)})}---\nA dataset.\n"


def make(folder: Path, names: list[str], texts: dict[str, str] | None = None) -> Path:
    """Files of one row each, which says the file's own name."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist([{"question": name}]), file)
        elif file.suffix == ".jsonl":
            file.write_text(json.dumps({"question": name}) + "\n", encoding="utf-8")
        else:
            file.write_text("other", encoding="utf-8")
    for name, text in (texts or {}).items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def rows(folder: Path, split: str | None) -> list[str]:
    found = [row for _, _, row in read_rows(folder, split)]
    return [row["question"] for row in found if isinstance(row, dict)]


TWO = [f"all/{split}-0.parquet" for split in ("train", "test")] + ["cn/train-0.parquet"]
SHAPES: dict[str, tuple[list[str], dict[str, str]]] = {
    "one file": (["aime24.jsonl"], {}),
    "one test file": (["test.jsonl"], {}),
    "two files": (["b.jsonl", "a.jsonl"], {}),
    "split in the names": (["gsm8k_train.parquet", "gsm8k_test.parquet"], {}),
    "other words for splits": (["training.jsonl", "val.jsonl", "eval.jsonl"], {}),
    "no word, only letters of one": (["contest.jsonl", "latest.jsonl"], {}),
    "shards in data": (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], {}),
    "named shards": (["data/hard-00000-of-00001.parquet", "data/easy-00000-of-00001.parquet"], {}),
    "named shards with a word": (["data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"], {}),
    "shards beside other files": (["data/train-00000-of-00001.jsonl", "extra/test.jsonl"], {}),
    "converted": (["default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"], {}),
    "half converted": (["partial-train/0000.parquet", "partial-test/0000.parquet"], {}),
    "folders": (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], {}),
    "folders in data": (["data/train/a.jsonl", "data/dev/a.jsonl"], {}),
    "hidden and special": (["train.jsonl", ".cache/test.jsonl", "__pycache__/test.jsonl", "_x.jsonl"], {}),
    "more parquet": (["train-0.parquet", "train-1.parquet", "train.jsonl", "notes.md"], {}),
    "infos beside": (["train.jsonl"], {"dataset_infos.json": "{}", "README.md": "Nothing.\n"}),
    "default of a card": (
        TWO,
        {
            "README.md": card(
                {"config_name": "cn", "data_files": "cn/*"},
                {
                    "config_name": "all",
                    "default": True,
                    "data_files": [
                        {"split": "train", "path": "all/train-*"},
                        {"split": "test", "path": ["all/test-*"]},
                    ],
                },
            )
        },
    ),
    "default by name": (
        TWO,
        {
            "README.md": card(
                {"config_name": "default", "data_files": ["all/train*", "cn/*"]},
                {"config_name": "cn", "data_files": "cn/*"},
            )
        },
    ),
    "one configuration of a card": (TWO, {"README.md": card({"config_name": "cn", "data_files": "cn/*"})}),
    "folder of a card": (
        TWO,
        {
            "README.md": card(
                {"config_name": "all", "data_dir": "all", "default": True}, {"config_name": "cn", "data_dir": "cn"}
            )
        },
    ),
    "a file twice in a card": (TWO, {"README.md": card({"config_name": "x", "data_files": ["cn/*", "cn/train-*"]})}),
    "card beside": (
        TWO,
        {
            ".huggingface.yaml": yaml.safe_dump(
                {"configs": [{"config_name": "all", "data_files": [{"split": "validation", "path": "all/test-*"}]}]}
            )
        },
    ),
    "splits of a card against the names": (
        TWO,
        {
            "README.md": card(
                {
                    "config_name": "x",
                    "data_files": [{"split": "train", "path": "all/test-*"}, {"split": "test", "path": "all/train-*"}],
                }
            )
        },
    ),
    "shards with a fingerprint": (
        ["data/train-00000-of-00001-abc123.parquet", "data/test-00000-of-00001-0f.parquet"],
        {},
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_split_has_the_rows_that_datasets_loads(shape: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "set", *SHAPES[shape])
    before = sorted(folder.rglob("*"))
    name = datasets.get_dataset_default_config_name(str(folder))
    loaded = datasets.load_dataset(str(folder), name, cache_dir=str(tmp_path / "cache"))
    for split in loaded:
        assert rows(folder, split) == list(dict.fromkeys(loaded[split]["question"]))
    if len(loaded) == 1 or "train" in loaded:
        assert rows(folder, None) == rows(folder, "train" if "train" in loaded else next(iter(loaded)))
    with pytest.raises(ConfigError, match=r"^data.split = 'other': .* has '.*; set data.split to one$"):
        rows(folder, "other")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("shards", [1, 3])
def test_what_datasets_saved_is_read_as_it_loads_it(shards: int, tmp_path: Path) -> None:
    splits = {
        name: datasets.Dataset.from_list([{"question": f"{name} {number}"} for number in range(5)])
        for name in ("train", "test", "hard")
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "both"), num_shards=dict.fromkeys(splits, shards))
    splits["train"].shuffle(seed=1).save_to_disk(str(tmp_path / "one"), num_shards=shards)
    for split in splits:
        assert rows(tmp_path / "both", split) == datasets.load_from_disk(str(tmp_path / "both"))[split]["question"][:]
    assert rows(tmp_path / "one", None) == datasets.load_from_disk(str(tmp_path / "one"))["question"][:]
    shutil.rmtree(tmp_path / "both" / "train")  # an interrupted copy: the test split is not taken for the only one
    with pytest.raises(ConfigError, match=r"lacks 'train', a split that its dataset_dict.json names"):
        rows(tmp_path / "both", "test")


REFUSED: dict[str, tuple[list[str], dict[str, str], str]] = {
    "configurations": (
        ["all/train-0.parquet", "cn/train-0.parquet", "en/test-0.parquet"],
        {},
        r"several configurations, '.*', '.*', '.*', which may .*: give the path of one, such as '/.*'$",
    ),
    "years": (["2024/test.jsonl", "2025/test.jsonl"], {}, r"several configurations, '2024', '2025'"),
    "converted configurations": (
        ["main/train/0000.parquet", "socratic/train/0000.parquet"],
        {},
        r"several configurations, 'main', 'socratic'",
    ),
    "a folder and the top": (["train.jsonl", "more/train.jsonl"], {}, r"several configurations, "),
    "no default in a card": (
        TWO,
        {"README.md": card({"config_name": "all", "data_dir": "all"}, {"config_name": "cn", "data_dir": "cn"})},
        r"several configurations, 'all', 'cn', .* its README.md names no default: give the path of one's files$",
    ),
    "two defaults in a card": (
        TWO,
        {
            "README.md": card(
                {"config_name": "default", "data_files": "all/*"},
                {"config_name": "b", "default": True, "data_files": "cn/*"},
            )
        },
        r"several default configs: 'default' and 'b'",
    ),
    "upper case": (["Train.jsonl", "TEST.jsonl"], {}, r"TEST.jsonl counts to the split 'train', and .* 'test'"),
    "upper case folders": (
        ["Train/a.jsonl", "Test/a.jsonl"],
        {},
        r"counts to the split 'train', and its name says 'test'",
    ),
    "a word of both": (["train_test_split.jsonl"], {}, r"belongs to the splits 'train' and 'test': rename it"),
    "a test file in train": (["train/test.jsonl", "train/a.jsonl"], {}, r"test.jsonl counts to the split 'train'"),
    "a file in two splits of a card": (
        TWO,
        {
            "README.md": card(
                {
                    "config_name": "x",
                    "data_files": [{"split": "train", "path": "all/*"}, {"split": "test", "path": "all/test-*"}],
                }
            )
        },
        r"all/test-0.parquet belongs to the splits 'train' and 'test'",
    ),
    "a card whose files are not there": (
        TWO,
        {"README.md": card({"config_name": "x", "data_files": "no/*"})},
        r"no dataset directory that can be read \(.*",
    ),
    "a card with a file of the network": (
        TWO,
        {"README.md": card({"config_name": "x", "data_files": ["cn/*", "https://example.invalid/a.jsonl"]})},
        r"'x' of its README.md has 'https://example.invalid/a.jsonl', and nothing is taken from the network",
    ),
    "a card of the hub": (
        TWO,
        {
            "README.md": card(
                {"config_name": "x", "data_files": [{"split": "train", "path": "hf://datasets/a/b/c.jsonl"}]}
            )
        },
        r"has 'hf://datasets/a/b/c.jsonl', and nothing is taken from the network",
    ),
    "a broken card": (
        TWO,
        {"README.md": "---\nconfigs: [\n---\n"},
        r"no dataset directory that can be read \(.*: correct it",
    ),
    "a card of another kind": (
        TWO,
        {"README.md": "---\nconfigs: 3\n---\n"},
        r"no dataset directory that can be read \(",
    ),
    "other formats": (["train.csv"], {}, r"has no .jsonl or .parquet files and was not saved by datasets"),
    "rows in two formats": (
        ["a.jsonl"],
        {"b.json": '[{"question": "b"}]'},
        r"b.json is to be read as rows of the split 'train', and is not one of",
    ),
    "a broken state": (["train.jsonl"], {"state.json": "{"}, r"no dataset directory that can be read"),
}


@pytest.mark.parametrize("shape", REFUSED)
def test_what_is_in_doubt_is_refused_in_one_line(shape: str, tmp_path: Path) -> None:
    names, texts, message = REFUSED[shape]
    folder = make(tmp_path / "set", names, texts)
    with pytest.raises(ConfigError, match=message) as refusal:
        rows(folder, None)
    assert "\n" not in str(refusal.value) and str(folder) in str(refusal.value)


def test_a_folder_whose_name_is_a_pattern_is_refused_and_a_file_in_it_is_read(tmp_path: Path) -> None:
    folder = make(tmp_path / "run[1]", ["train.jsonl", "test.jsonl"])
    with pytest.raises(ConfigError, match=r"has one of \* \? \[ in its name, a pattern to `datasets`: rename it"):
        rows(folder, None)
    assert rows(folder / "train.jsonl", None) == ["train.jsonl"]


def test_a_relative_path_and_a_link_to_a_folder_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "json", ["train.jsonl"])  # "json" is also the name of a reader in `datasets`
    (tmp_path / "link").symlink_to(tmp_path / "json")
    monkeypatch.chdir(tmp_path)
    assert rows(Path("json"), None) == rows(Path("link"), None) == ["train.jsonl"]


def test_a_copy_from_the_hubs_cache_is_read_through_its_links(tmp_path: Path) -> None:
    make(tmp_path / "blobs", ["0f.jsonl"])
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "test.jsonl").symlink_to("../blobs/0f.jsonl")
    assert rows(tmp_path / "snapshot", "test") == ["0f.jsonl"]


def test_without_datasets_the_error_names_the_pin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_directory.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"pip install {dataset_directory.PIN}, or give a file in it"):
        rows(make(tmp_path / "set", ["train.jsonl"]), None)
    assert f"\n{dataset_directory.PIN}\n" in (Path(__file__).parents[2] / "requirements" / "cpu.txt").read_text()


READ = """
import sys
from pathlib import Path
from prune_opd.data.rows import read_rows
list(read_rows(Path(sys.argv[1])))
print(sorted({"datasets", "pandas", "torch"} & sys.modules.keys()))
"""


def test_only_a_repository_imports_datasets_and_nothing_is_written_or_downloaded(tmp_path: Path) -> None:
    folder, home = make(tmp_path / "set", ["train.jsonl"]), tmp_path / "home"
    datasets.Dataset.from_list([{"question": "q"}]).save_to_disk(str(tmp_path / "saved"))
    home.mkdir()
    env = {"HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for path, imported in (
        (folder / "train.jsonl", "[]"),
        (tmp_path / "saved", "[]"),
        (folder, "['datasets', 'pandas']"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", READ, str(path)], capture_output=True, text=True, env=env, check=False
        )
        assert done.returncode == 0 and done.stdout.strip() == imported, done.stdout + done.stderr
        assert done.stderr == ""
    assert not list(home.rglob("*"))
