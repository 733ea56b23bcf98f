"""wandb and the tracker: offline runs hold what was logged, resumed runs keep their id, failures never spread."""

import json
import struct
import sys
import time
import types
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import evaluation_record, sample_record, step_record, write_run

from prune_opd.config import HorizonConfig, TrackConfig, TrainConfig, to_dict
from prune_opd.loss.stats import BatchStats
from prune_opd.rollout.batch import Rollouts
from prune_opd.track import wandb_log
from prune_opd.track.metrics import FILE_NAME, read_metrics
from prune_opd.track.tracker import NullTracker, Tracker

OFFLINE = TrackConfig(wandb="offline")


def bodies(path: Path) -> Iterator[bytes]:
    """The records of an offline file: wandb writes LevelDB's log format after a seven-byte header."""
    data, position, partial = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        checksum, size, kind = struct.unpack("<IHB", data[position : position + 7])
        body = data[position + 7 : position + 7 + size]
        position += 7 + size
        assert zlib.crc32(bytes([kind]) + body) == checksum
        partial = partial + body if kind in (3, 4) else body
        if kind in (1, 4):
            yield partial


def stored(run_dir: Path) -> list[dict[str, Any]]:
    """Every offline run of the directory in order: id, config, history by step. Of finished runs, whole.

    wandb's own process may still be writing when `finish` has returned.
    """
    end = time.monotonic() + 60
    while True:
        try:
            found = stored_now(run_dir)
        except (AssertionError, struct.error):  # the last record is not all there
            found = []
        if found and all(run["exit"] is not None for run in found):
            return found
        assert time.monotonic() < end, "wandb has not written its runs to their end"
        time.sleep(0.1)


def stored_now(run_dir: Path) -> list[dict[str, Any]]:
    from wandb.proto import wandb_internal_pb2 as pb

    found = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime_ns):
        run: dict[str, Any] = {"id": None, "config": {}, "history": {}, "exit": None}
        for body in bodies(path):
            record = pb.Record()
            record.ParseFromString(body)
            match record.WhichOneof("record_type"):
                case "run":
                    run["id"] = record.run.run_id
                    run["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
                case "history":
                    items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                    run["history"][record.history.step.num] = items
                case "exit":
                    run["exit"] = record.exit.exit_code
        found.append(run)
    return found


def test_an_offline_run_holds_what_was_logged_and_a_resumed_one_continues_its_id(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    records = [evaluation_record(0, 4), *(step_record(s, 4) for s in (1, 2)), evaluation_record(2, 4)]
    run = wandb_log.start(tmp_path, {"gate": {"k": 16}}, OFFLINE, "first", warn=print)
    for record in records:
        run.log(record)
    run.finish()
    run.finish()
    resumed = wandb_log.start(tmp_path, {"gate": {"k": 16}}, OFFLINE, "first", warn=print)
    resumed.log(step_record(3, 4))
    resumed.finish(exit_code=1)
    assert capfd.readouterr() == ("", "")

    first, second = stored(tmp_path)
    assert first["id"] == second["id"] == (tmp_path / "wandb" / "run_id").read_text().strip()
    assert first["config"]["gate"] == {"k": 16}
    assert list(first["history"]) == [0, 1, 2] and list(second["history"]) == [3]
    assert (first["exit"], second["exit"]) == (0, 1)
    assert first["history"][0]["eval_ledger"] == records[0]["eval_ledger"]
    row = first["history"][2]  # the evaluation after step 2 is in the row of step 2
    assert row["loss"] == records[2]["loss"] and row["eval_ledger"] == records[3]["eval_ledger"]
    assert row["overlap_by_position/00"] == records[2]["overlap_by_position"][0]
    assert "overlap_by_position/15" not in row  # no token fell there


def test_a_requeued_run_goes_on_in_its_wandb_run_with_sample_tables_and_curves(tmp_path: Path) -> None:
    """As a job that was stopped after step 2 and started again: another tracker, the same run directory."""
    settings = replace(config(4), track=TrackConfig(wandb="offline", report=False))
    for done in (0, 2):
        with Tracker(tmp_path, settings, {}, resume_step=done, tokenizer=None) as tracker:
            for step in (done + 1, done + 2):
                tracker.step(step_record(step, 4))
            tracker._wandb.log_samples([sample_record(done + 2, kind, " <script>") for kind in ("horizon", "stopped")])
    first, second = stored(tmp_path)
    assert first["id"] == second["id"] and (list(first["history"]), list(second["history"])) == ([1, 2], [3, 4])
    for run, step in ((first, 2), (second, 4)):
        row = run["history"][step]
        assert row["loss"] == step_record(step, 4)["loss"]
        assert (row["samples/_type"], row["samples/nrows"]) == ("table-file", 2), sorted(row)
        assert any(key.startswith("overlap_by_position_curves") for key in row)
    media = tmp_path.glob("wandb/offline-run-*/files/media/html/**/*.html")
    pages = [path.read_text(encoding="utf-8") for path in media]
    assert len(pages) == 4 and all("background:rgba(" in page and "<script" not in page for page in pages)
    assert sum("stopped in flight" in page for page in pages) == 2


def test_a_new_run_in_an_old_directory_takes_a_new_id(tmp_path: Path) -> None:
    ids = [wandb_log._run_id(tmp_path, resume) for resume in (False, True, False)]
    assert ids[0] == ids[1] != ids[2]


def test_disabled_makes_nothing(tmp_path: Path) -> None:
    run = wandb_log.start(tmp_path, {}, TrackConfig(wandb="disabled"), "run", warn=print)
    run.log(step_record(1, 1))
    run.finish()
    assert list(tmp_path.iterdir()) == []


class BrokenRun:
    def log(self, *_: Any, **__: Any) -> None:
        raise OSError("disk full")

    finish = log


def fake_wandb(monkeypatch: pytest.MonkeyPatch, *, logged_in: bool, fail: tuple[str, ...] = ()) -> list[str]:
    """Puts a stub in wandb's place; returns the modes that init was called with."""
    modes: list[str] = []

    def init(mode: str, **_: Any) -> BrokenRun:
        modes.append(mode)
        if mode in fail:
            raise RuntimeError(f"no {mode}\nand a long trace")
        return BrokenRun()

    stub = types.SimpleNamespace(init=init, login=lambda prompt: logged_in, Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", stub)  # type: ignore[arg-type]
    return modes


def test_a_failing_run_warns_once_and_never_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_wandb(monkeypatch, logged_in=True)
    warnings: list[str] = []
    run = wandb_log.start(tmp_path, {}, OFFLINE, "run", warn=warnings.append)
    for step in (1, 2, 3):
        run.log(step_record(step, 3))
    run.finish()
    assert len(warnings) == 1 and "disk full" in warnings[0] and "metrics.jsonl" in warnings[0]


@pytest.mark.parametrize("logged_in", [True, False])
def test_online_falls_back_to_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged_in: bool) -> None:
    modes = fake_wandb(monkeypatch, logged_in=logged_in, fail=("online",))
    warnings: list[str] = []
    run = wandb_log.start(tmp_path, {}, TrackConfig(wandb="online"), "run", warn=warnings.append)
    assert modes == (["online", "offline"] if logged_in else ["offline"])  # without credentials: no prompt, no init
    assert isinstance(run._run, BrokenRun)
    assert len(warnings) == 1 and "logging offline" in warnings[0] and "\n" not in warnings[0]


def test_no_wandb_at_all_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    warnings: list[str] = []
    wandb_log.start(tmp_path, {}, OFFLINE, "run", warn=warnings.append).log(step_record(1, 1))
    assert len(warnings) == 1


# ---------------------------------------------------------------------------------------------------- the tracker


def config(steps: int) -> TrainConfig:
    horizon = HorizonConfig("prune", max_len=512, min_len=32, init_len=64)
    return TrainConfig("run", "student", "teacher", steps, horizon, track=TrackConfig(wandb="disabled"))


def test_a_resumed_tracker_continues_the_metrics_and_writes_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, steps=6, evaluate_every=3)  # killed after step 6, its last checkpoint is that of step 4
    with Tracker(tmp_path, config(6), to_dict(config(6)), resume_step=4, tokenizer=None) as tracker:
        for step in (5, 6):
            tracker.step(step_record(step, 6) | {"loss": 77.0})
        tracker.evaluation(evaluation_record(6, 6))
        tracker.note("done")
    steps, evaluations = read_metrics(tmp_path / FILE_NAME)
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6] and [r["loss"] == 77.0 for r in steps].count(True) == 2
    assert [r["step"] for r in evaluations] == [0, 3, 6]
    assert (tmp_path / "report.html").is_file() and (tmp_path / "report.png").is_file()
    printed = capsys.readouterr().out
    assert "step 5/6" in printed and "done" in printed and "tokens saved" in printed


def test_a_report_that_fails_does_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "prune_opd.track.report", None)
    tracker = Tracker(tmp_path, config(1), {}, resume_step=0, tokenizer=None)
    tracker.step(step_record(1, 1))
    tracker.close()
    tracker.close()
    assert capsys.readouterr().out.count("the report could not be written") == 1


def test_a_run_that_ends_before_its_first_step_leaves_quietly(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Tracker(tmp_path, config(1), {}, resume_step=0, tokenizer=None):
        raise KeyError
    assert not (tmp_path / "report.html").exists()


def test_the_null_tracker_has_the_trackers_methods() -> None:
    public = {name for name in vars(Tracker) if not name.startswith("_")}
    assert public == {name for name in vars(NullTracker) if not name.startswith("_")}
    with NullTracker() as tracker:
        tracker.step(step_record(1, 1))
        tracker.evaluation(evaluation_record(0, 1))
        tracker.note("nothing")
        tracker.samples(1, 16, Rollouts((), ()), BatchStats(0, 1, 1, torch.device("cpu")))
