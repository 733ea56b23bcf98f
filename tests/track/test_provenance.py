"""Where a run's numbers come from, what it says while it starts, and that neither holds a secret."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from prune_opd.process import COMMAND, tell
from prune_opd.track.provenance import FILE_NAME, REVISION, Provenance, revision
from prune_opd.track.startup import StartUp


def entries(run_dir: Path) -> list[dict[str, object]]:
    return list(json.loads((run_dir / FILE_NAME).read_text(encoding="utf-8")))


def test_every_start_has_its_entry_from_the_first_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "planted-secret-1")
    monkeypatch.setenv(COMMAND, "prune-opd train tiny name=planted-secret-1")
    first = Provenance(tmp_path, 0, ["a", "a", "b"], ["NVIDIA H100"])
    (entry,) = entries(tmp_path)
    assert (entry["ended"], entry["outcome"], entry["hosts"], entry["ranks"]) == (None, None, ["a", "b"], 3)
    assert entry["command"] == "prune-opd train tiny name=" + 16 * "•"
    assert {"python", "torch", "megatron-core", "transformers"} <= set(entry["versions"])  # type: ignore[call-overload]
    hardware = entry["hardware"]
    assert isinstance(hardware, dict) and hardware["gpus"] == ["NVIDIA H100"] and hardware["memory_gb"] > 0
    first.end("stopped", 7)
    Provenance(tmp_path, 7, ["c"]).end("finished", 40)
    assert [(e["first_step"], e["outcome"], e["last_step"]) for e in entries(tmp_path)] == [
        (0, "stopped", 7),
        (7, "finished", 40),
    ]
    assert all(str(e["started"]) <= str(e["ended"]) for e in entries(tmp_path))


def test_a_checkout_has_its_commit_and_says_whether_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REVISION, "of-the-image")
    assert revision(tmp_path) == ("of-the-image", None)
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "f").write_text("1")
    subprocess.run([*git, "add", "f"], check=True)
    subprocess.run([*git, "commit", "-qm", "m"], check=True)
    commit, dirty = revision(tmp_path)
    assert commit is not None and len(commit) == 40 and dirty is False
    (tmp_path / "f").write_text("2")
    assert revision(tmp_path) == (commit, True)


def test_a_broken_file_of_before_does_not_stop_a_run(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("{")
    Provenance(tmp_path, 0, ["a"]).end("failed", 0)
    assert [entry["outcome"] for entry in entries(tmp_path)] == ["failed"]


def test_only_the_rank_that_speaks_says_what_it_does_while_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with StartUp(speaks=True) as startup:
        tell("reading teacher, file 3 of 7")
    with StartUp(speaks=False):
        tell("of another rank")
    tell("after the start")
    assert [line.split(" s  ")[1] for line in startup.lines] == ["reading teacher, file 3 of 7"]
    assert capsys.readouterr().out == f"{startup.lines[0]}\n"
