"""Semi-OPD on real engines with the teacher's rows on disk: the same run, resumed too, and then without a teacher."""

from __future__ import annotations

from pathlib import Path

from prune_opd.elsewhere.row_store import files
from prune_opd.track.metrics import CLOCKED
from tests.end_to_end.runs import BARE, check_ages, steps_of, tiny_model, train

SETTINGS = (
    *("steps=3", "rollout.prompts=8", "rollout.refresh_every=0", "horizon.strategy=full", "horizon.max_len=64"),
    *("optimizer.lr=1e-3", "checkpoint.every=0", *BARE[1:]),
    *("evaluation.problems=4", "evaluation.every=1"),  # which put other weights into the engine
)


def without_clock(run_dir: Path) -> list[dict[str, object]]:
    return [{key: value for key, value in step.items() if not key.startswith(CLOCKED)} for step in steps_of(run_dir)]


def test_a_second_run_needs_no_teacher(tmp_path: Path) -> None:
    tiny_model("teacher")
    cache, once = tmp_path / "rows", "checkpoint.last=false"
    use, only = ((f"teacher_cache.mode={mode}", f"teacher_cache.dir={cache}") for mode in ("use", "only"))
    whole = train(tmp_path / "whole", *SETTINGS, once)
    expected, rows = without_clock(tmp_path / "whole"), len(whole) * 8
    assert not any("cache_rows" in step for step in whole)

    check_ages(whole, [0, 1, 2])

    # The first run stops and goes on, as if nothing had been; the second one needs no layer of the teacher.
    train(tmp_path / "use", *SETTINGS, *use, "stop_after=2")
    train(tmp_path / "use", *SETTINGS, *use)
    assert without_clock(tmp_path / "use") == expected
    assert [step["cache_rows"] for step in steps_of(tmp_path / "use")] == [0, 0, 0]
    assert rows == len(files(cache))
    without = train(tmp_path / "only", *SETTINGS, *only, once)
    assert without_clock(tmp_path / "only") == expected
    assert sum(step["cache_rows"] for step in without) == rows
    assert all(step["cache_bytes_read"] > 0 and step["cache_bytes_written"] == 0 for step in without)
    assert sum(step["cpu_teacher"] for step in without) < sum(step["cpu_teacher"] for step in whole)
    assert "its layers are not loaded" in (tmp_path / "only" / "run.log").read_text(encoding="utf-8")
