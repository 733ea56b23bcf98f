"""metrics.jsonl: what is written can be read back to the bit, and a resumed run continues it cleanly."""

import json
import math
import random
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from synthetic import evaluation_record, step_record, write_run

from prune_opd.config import HorizonConfig, TrackConfig, TrainConfig
from prune_opd.errors import UserError
from prune_opd.track.metrics import (
    FILE_NAME,
    MetricsLog,
    meaning,
    meanings,
    read_doubts,
    read_metrics,
    task_names,
)
from prune_opd.track.samples import sample_doubts
from prune_opd.track.summary import summarise
from prune_opd.track.tracker import Tracker


def written(path: Path, records: list[dict]) -> Path:
    with closing(MetricsLog(path, keep_through=None)) as log:
        for record in records:
            log.write(record)
    return path


def test_floats_round_trip_exactly(tmp_path: Path) -> None:
    rng = random.Random(0)
    values = [rng.uniform(-1, 1) * 10 ** rng.randint(-300, 300) for _ in range(500)] + [0.1, 5e-324, 1e308, -0.0]
    path = written(tmp_path / FILE_NAME, [{"step": i + 1, "loss": v} for i, v in enumerate(values)])
    assert [r["loss"].hex() for r in read_metrics(path)[0]] == [v.hex() for v in values]


def test_floats_survive_the_rewriting_on_resume_exactly(tmp_path: Path) -> None:
    path = written(tmp_path / FILE_NAME, [step_record(s, 5) for s in range(1, 6)])
    before = path.read_text().splitlines()
    MetricsLog(path, keep_through=3).close()
    assert path.read_text().splitlines() == before[:3]


def test_a_diverged_loss_stays_visible(tmp_path: Path) -> None:
    path = written(tmp_path / FILE_NAME, [{"step": 1, "loss": math.nan, "grad_norm": math.inf}])
    record = read_metrics(path)[0][0]
    assert math.isnan(record["loss"]) and record["grad_norm"] == math.inf


def test_numpy_values_are_written_as_numbers_and_lists(tmp_path: Path) -> None:
    record = {"step": 1, "loss": np.float32(0.1), "overlap_by_position": np.array([0.5, 0.25])}
    read = read_metrics(written(tmp_path / FILE_NAME, [record]))[0][0]
    assert read == {"step": 1, "loss": float(np.float32(0.1)), "overlap_by_position": [0.5, 0.25]}


def test_every_line_is_on_disk_before_write_returns(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / FILE_NAME, keep_through=None)
    log.write({"step": 1, "loss": 0.5})
    assert len(read_metrics(tmp_path / FILE_NAME)[0]) == 1


def test_a_record_without_a_step_is_refused(tmp_path: Path) -> None:
    with (
        closing(MetricsLog(tmp_path / FILE_NAME, keep_through=None)) as log,
        pytest.raises(ValueError, match="integer step"),
    ):
        log.write({"loss": 1.0})


def test_resume_drops_later_steps_and_keeps_evaluations_up_to_the_checkpoint(tmp_path: Path) -> None:
    path = write_run(tmp_path, steps=10, evaluate_every=2) / FILE_NAME
    with closing(MetricsLog(path, keep_through=4)) as log:
        log.write(step_record(5, 10))
    steps, evaluations = read_metrics(path)
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5]
    assert [r["step"] for r in evaluations] == [0, 2, 4]
    assert list(tmp_path.glob("*.tmp")) == []


def test_resume_of_a_run_without_metrics_starts_a_file(tmp_path: Path) -> None:
    with closing(MetricsLog(tmp_path / "run" / FILE_NAME, keep_through=7)) as log:
        log.write({"step": 8, "loss": 1.0})
    assert [r["step"] for r in read_metrics(tmp_path / "run" / FILE_NAME)[0]] == [8]


def test_starting_anew_empties_the_file_but_destroys_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / FILE_NAME, [{"step": 1, "loss": 1.0}])
    MetricsLog(path, keep_through=None).close()
    assert read_metrics(path) == ([], [])
    assert read_metrics(tmp_path / "metrics.previous.jsonl")[0] == [{"step": 1, "loss": 1.0}]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step"', "{", "\x00\x00", '{"step": 3, "x": "\udcc3'])
def test_a_torn_last_line_is_left_out_and_gone_after_resume(tmp_path: Path, torn: str) -> None:
    path = written(tmp_path / FILE_NAME, [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}])
    with path.open("ab") as file:
        file.write(torn.encode("utf-8", "surrogateescape"))
    assert [r["step"] for r in read_metrics(path)[0]] == [1, 2]
    with closing(MetricsLog(path, keep_through=2)) as log:
        log.write({"step": 3, "loss": 3.0})
    assert [r["step"] for r in read_metrics(path)[0]] == [1, 2, 3]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = written(tmp_path / FILE_NAME, [{"step": 1, "loss": 1.0}])
    path.write_text(path.read_text().rstrip("\n"))
    with closing(MetricsLog(path, keep_through=1)) as log:
        log.write({"step": 2, "loss": 2.0})
    assert [r["step"] for r in read_metrics(path)[0]] == [1, 2]


def test_a_file_of_one_run_is_beyond_doubt_and_a_cut_line_is_said(tmp_path: Path) -> None:
    path = write_run(tmp_path, steps=6, evaluate_every=2) / FILE_NAME
    assert read_doubts(path) == sample_doubts(tmp_path / "samples.jsonl") == []
    for file in (path, tmp_path / "samples.jsonl"):
        text = file.read_bytes()
        for cut in (len(text) - 2, len(text) - 40):
            file.write_bytes(text[:cut])
            (doubt,) = read_doubts(file) if file == path else sample_doubts(file)
            assert doubt.startswith(f"{file}: the last line is cut off, and left out")


def test_a_step_that_stands_there_twice_counts_once_or_not_at_all(tmp_path: Path) -> None:
    def line(step: int, loss: float, seconds: float) -> dict:
        return {"step": step, "loss": loss, "time_step": seconds, "tokens_generated": 10}

    again = [line(step, step / 8, 2.0) for step in (2, 3, 6)]  # a resume that kept what it wrote again
    other = [line(step, 5.0, 1.0) for step in (4, 8)]  # another process's
    path = written(
        tmp_path / FILE_NAME, [*(line(step, step / 8, 1.0) for step in (1, 2, 3, 4, 5, 6, 8)), *again, *other]
    )
    steps, evaluations = read_metrics(path)
    assert [(r["step"], r["loss"], r["time_step"]) for r in steps] == [
        (1, 0.125, 1.0), (2, 0.25, 2.0), (3, 0.375, 2.0), (5, 0.625, 1.0), (6, 0.75, 2.0)
    ]  # fmt: skip
    assert summarise(steps, evaluations).tokens_generated == 50
    same, different, missing = read_doubts(path)
    assert same == f"{path} has steps 2-3, 6 more than once, with the same values: each counts once"
    assert different.startswith(f"{path} has steps 4, 8 more than once, with different values: they are left out.")
    assert missing == f"{path} has no record of step 7: no total counts them"


def test_lines_of_two_processes_come_out_in_the_order_of_their_steps(tmp_path: Path) -> None:
    path = written(tmp_path / FILE_NAME, [{"step": step, "loss": 1.0} for step in (10, 1, 11, 2, 3, 12)])
    assert [r["step"] for r in read_metrics(path)[0]] == [1, 2, 3, 10, 11, 12]
    assert read_doubts(path) == [f"{path} has no record of steps 4-9: no total counts them"]


def test_evaluations_of_two_tasks_at_one_step_are_no_doubles_and_of_one_task_are(tmp_path: Path) -> None:
    lines = [
        {"step": 2, "eval_a": 0.5, "eval_response_length": 3},
        {"step": 2, "eval_b": 0.25, "eval_response_length": 4},
    ]
    path = written(tmp_path / FILE_NAME, lines)
    assert read_metrics(path)[1] == [lines[0] | lines[1]] and read_doubts(path) == []
    path = written(tmp_path / FILE_NAME, [*lines, lines[0] | {"eval_a": 0.75}])
    assert read_metrics(path)[1] == [lines[1]] and "has step 2 more than once, with different" in read_doubts(path)[0]


def test_a_resumed_run_says_that_a_line_was_cut_off_and_at_its_end_that_another_process_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, steps=4, evaluate_every=0)
    path = tmp_path / FILE_NAME
    path.write_text(path.read_text() + '{"step": 5, "lo')
    track = TrackConfig(wandb="disabled", report=False)
    config = TrainConfig("run", "s", "t", 6, HorizonConfig("full"), track=track)
    with Tracker(tmp_path, config, {}, resume_step=4, tokenizer=None) as tracker:
        assert "note: " + str(path) + ": the last line is cut off" in capsys.readouterr().out
        tracker.step(step_record(5, 6))
        with path.open("a") as other:
            other.write('{"step": 5, "loss": 9.0}\n')
        tracker.step(step_record(6, 6))
    said = capsys.readouterr().out
    assert "has step 5 more than once, with different values: they are left out" in said and "cut off" not in said
    assert "has step 5 more than once" in (tmp_path / "run.log").read_text()


def test_a_broken_line_in_the_middle_is_named_and_the_file_left_alone(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match="line 2"):
        read_metrics(path)
    with pytest.raises(UserError, match="line 2"):
        MetricsLog(path, keep_through=3)
    assert path.read_bytes() == before


def test_a_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        read_metrics(tmp_path / FILE_NAME)


def test_every_key_written_is_documented() -> None:
    for key in {**step_record(1, 10), **evaluation_record(0, 10)}:
        assert meaning(key), f"{key} is not in metrics.yaml"
    assert meaning("eval_ledger") == meanings()["eval_<task>"]
    assert meaning("eval_aime_24_stderr") == meanings()["eval_<task>_stderr"]
    assert meaning("nonsense") is None


def test_a_task_may_be_called_like_the_end_of_a_key() -> None:
    line = {"step": 0, "eval_math_high": 0.1, "eval_math_high_high": 0.2, "eval_my_answers": 0.3}
    line |= {"eval_math": 0.4, "eval_math_answers": 8, "eval_my_answers_answers": 4, "eval_response_length": 9.0}
    assert task_names(line) == ["my_answers", "math"], "math_high beside math is the upper end of its interval"
    assert task_names({"step": 0, "eval_math_high": 0.1, "eval_math_high_readable": 0.2}) == ["math_high"]


def test_every_documented_key_has_a_unit() -> None:
    for key, text in meanings().items():
        assert key == "step" or text.endswith("]"), key


def test_summary_adds_up(tmp_path: Path) -> None:
    steps = [
        {"step": 1, "horizon": 64, "tokens_generated": 100, "tokens_full": None, "time_rollout": 1.0, "time_step": 3.0},
        {"step": 2, "horizon": 72, "tokens_generated": 100, "tokens_full": 400, "time_rollout": 2.0, "time_step": 3.0},
    ]
    evaluations = [
        {"step": 0, "eval_a": 0.1, "eval_a_stderr": 0.01, "time_eval": 2.0},  # from before answers were counted
        {"step": 2, "eval_a": 0.6, "eval_a_readable": 5 / 6, "eval_a_answers": 6, "eval_b": 0.5, "time_eval": 2.0},
    ]
    summary = summarise(steps, evaluations)
    assert (summary.steps, summary.final_horizon, summary.tokens_generated) == (2, 72, 200)
    assert summary.tokens_full == 400 and summary.saved == 0.75  # only the step that has an estimate counts
    assert summary.phases == {"rollout": 3.0, "other": 3.0, "evaluation": 4.0} and summary.seconds == 10.0
    a, b = summary.accuracy
    assert (a.before, a.after, a.first_step, a.last_step) == (0.1, 0.6, 0, 2)
    assert (a.readable_before, a.readable_after) == (None, (5, 6))
    assert (b.before, b.after, b.readable_before, b.readable_after) == (0.5, None, None, None)


def test_padding_of_a_run_is_the_mean_of_the_steps_that_have_it() -> None:
    steps = [
        {"step": 1, "padding_waste_padded": 0.2, "padding_waste_packed": 0.0},
        {"step": 2},  # of a run from before it was measured
        {"step": 3, "padding_waste_padded": 0.4, "padding_waste_packed": 0.02},
    ]
    assert summarise(steps, []).padding == pytest.approx((0.3, 0.01))
    assert summarise(steps[1:2], []).padding is None


def test_a_line_is_one_json_object(tmp_path: Path) -> None:
    path = write_run(tmp_path, steps=3) / FILE_NAME
    assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines())
