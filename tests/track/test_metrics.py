"""metrics.jsonl: what is written can be read back to the bit, and a resumed run continues it cleanly."""

import json
import math
import random
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from synthetic import evaluation_record, step_record, write_run

from prune_opd.errors import UserError
from prune_opd.track.metrics import FILE_NAME, MetricsLog, meaning, meanings, read_metrics, summarise, task_names


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
