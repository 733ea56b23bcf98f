"""TensorBoard: the event files hold what was logged, a missing package is refused early, a failure spreads nowhere."""

import importlib.util
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic import evaluation_record, step_record

from prune_opd.check.run import check_train
from prune_opd.config import HorizonConfig, TrackConfig, TrainConfig
from prune_opd.track.tensorboard_log import PIN, TensorBoardLog, tensorboard_problems
from prune_opd.track.tracker import Tracker
from tests.fake_models import train_config, write_model


def stored(folder: Path) -> dict[tuple[str, int], float]:
    """The scalars of all event files by name and step (records framed as TensorFlow does it, checksums left out)."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[tuple[str, int], float] = {}
    for path in sorted(folder.glob("events.*")):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (size,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + size])
            place += size + 16
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    return found


def config() -> TrainConfig:
    track = TrackConfig(wandb="disabled", tensorboard=True, report=False)
    return TrainConfig("run", "student", "teacher", 4, HorizonConfig("full"), track=track)


def test_event_files_hold_every_number_of_the_records(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [evaluation_record(0, 4), step_record(1, 4) | {"rollout_digest": "text"}]
    with Tracker(tmp_path, config(), {}, resume_step=0, tokenizer=None) as tracker:
        tracker.evaluation(records[0])
        tracker.step(records[1])
    with Tracker(tmp_path, config(), {}, resume_step=1, tokenizer=None) as tracker:
        tracker.step(step_record(2, 4))
    found = stored(tmp_path / "tensorboard")
    assert found["eval_ledger", 0] == pytest.approx(records[0]["eval_ledger"])
    assert found["loss", 1] == pytest.approx(records[1]["loss"]) and ("loss", 2) in found
    assert found["overlap_by_position/00", 1] == pytest.approx(records[1]["overlap_by_position"][0])
    names = {name for name, _ in found}
    scalars = {key for key, value in records[1].items() if isinstance(value, int | float) and key != "step"}
    assert scalars <= names and "rollout_digest" not in names


def test_without_the_setting_there_is_no_file(tmp_path: Path) -> None:
    log = TensorBoardLog(None, 0, pytest.fail)
    log.log(step_record(1, 1))
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_refused_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tensorboard_problems(config().track) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (problem,) = tensorboard_problems(config().track)
    assert "track.tensorboard = true" in problem and f"pip install {PIN}" in problem
    assert tensorboard_problems(TrackConfig()) == []
    asked = train_config(write_model(tmp_path / "student"), write_model(tmp_path / "teacher"))
    asked = replace(asked, track=config().track)
    assert check_train(asked, 2, None, "auto") == [problem]


def test_the_pin_in_the_message_is_the_one_that_is_installed() -> None:
    pins = (Path(__file__).resolve().parents[2] / "requirements" / "cpu.txt").read_text(encoding="utf-8").splitlines()
    assert PIN in pins


def test_a_failure_is_one_warning_and_never_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    log = TensorBoardLog(tmp_path / "tensorboard", 0, warnings.append)
    log.log(step_record(1, 2))
    log.close()
    assert len(warnings) == 1 and "the run goes on" in warnings[0]
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    TensorBoardLog(tmp_path / "other", 0, warnings.append).log(step_record(1, 2))
    assert len(warnings) == 2
