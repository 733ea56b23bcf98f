"""The main job from start to end, as `make quickstart` runs it: one real run, looked at from every side."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prune_opd.track.metrics import meaning, read_metrics
from tests.end_to_end.runs import forked, prune_opd, tiny_model

PROBLEMS = 256
CONTRACT = {
    *("step", "horizon", "overlap", "event_rate", "reliable_length", "response_length", "weight_mean"),
    *("pruned_inflight", "tokens_generated", "tokens_trained", "loss", "grad_norm", "lr"),
    *("time_sync", "time_rollout", "time_teacher", "time_train", "time_step"),
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny_model("student"), tiny_model("teacher")
    path = tmp_path_factory.mktemp("quickstart") / "run"
    prune_opd("train", "tiny_compatible", "--run-dir", path, timeout=600)
    return path


def test_at_least_half_of_the_gap_to_the_teacher_is_closed(run_dir: Path, tmp_path: Path) -> None:
    """T = 1 accuracy on fresh problems, which no run and no recipe has seen; half of the gap is ten standard errors."""
    models = [tiny_model("student"), run_dir / "checkpoints" / "step_000040", tiny_model("teacher")]
    options = ("--task", "ledger", "-k", "1", "--problems", str(PROBLEMS), "--max-len", "216", "--nproc", "2")
    table = forked("eval", *models, *options, "--out", tmp_path)
    results = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert [line["model"] for line in results] == [str(model) for model in models]
    for number, line in enumerate(results):
        assert f"{line['avg@1']:.1%}" in table
        answers = [json.loads(row) for row in (tmp_path / f"generations-{number}.jsonl").read_text().splitlines()]
        assert sum(row["correct"] for row in answers) == round(PROBLEMS * line["avg@1"]) and len(answers) == PROBLEMS
    before, after, teacher = (line["avg@1"] for line in results)
    assert teacher > 0.5 and before < 0.15, "not the compatible pair: a strong teacher and a weak student"
    assert after - before >= 0.5 * (teacher - before), f"student {before} → {after}, teacher {teacher}"


def test_the_window_opens_to_its_maximum_by_itself(run_dir: Path) -> None:
    horizons = [step["horizon"] for step in read_metrics(run_dir / "metrics.jsonl")[0]]
    assert horizons[0] == 64 and horizons[-1] == 216 and len(horizons) == 40


def test_every_step_has_the_keys_of_the_contract_and_no_undocumented_one(run_dir: Path) -> None:
    steps, evaluations = read_metrics(run_dir / "metrics.jsonl")
    for record in steps:
        assert set(record) >= CONTRACT
    assert [record["step"] for record in evaluations] == [0, 10, 20, 30, 40]
    for record in steps + evaluations:
        assert all(meaning(key) for key in record), record.keys()


def test_the_window_saved_tokens_and_phases_add_up(run_dir: Path) -> None:
    steps, _ = read_metrics(run_dir / "metrics.jsonl")
    assert sum(step["tokens_generated"] for step in steps) < sum(step["tokens_full"] for step in steps)
    for step in steps:
        assert step["tokens_trained"] == step["tokens_generated"]
        phases = sum(step[f"time_{phase}"] for phase in ("sync", "rollout", "teacher", "train"))
        assert phases <= step["time_step"]


def test_every_evaluation_leaves_sampled_answers(run_dir: Path) -> None:
    _, evaluations = read_metrics(run_dir / "metrics.jsonl")
    for line in evaluations:
        file = run_dir / "generations" / f"step-{line['step']:06d}.jsonl"
        answers = [json.loads(row) for row in file.read_text(encoding="utf-8").splitlines()]
        assert len(answers) == 64 and all(row["response"] for row in answers)
        assert line["eval_ledger_low"] < line["eval_ledger"] < line["eval_ledger_high"]


def test_the_run_directory_is_complete(run_dir: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "report.html", "report.png", "hf/model.safetensors", "wandb"):
        assert (run_dir / name).exists(), name
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == "step_000040"


def test_transformers_and_vllm_load_the_export_with_the_same_logprobs(run_dir: Path) -> None:
    worker = Path(__file__).with_name("worker_vllm_logprobs.py")
    result = subprocess.run(
        [sys.executable, str(worker), str(run_dir / "hf")], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    rows: list[dict[str, Any]] = json.loads(result.stdout.strip().splitlines()[-1])
    assert len(rows) == 4

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run_dir / "hf", dtype=torch.float32).eval()
    for row in rows:
        ids = torch.tensor([row["prompt"] + row["response"]])
        with torch.no_grad():
            logp_TV = model(ids).logits[0].log_softmax(-1)[len(row["prompt"]) - 1 : -1]
        ours = logp_TV.gather(1, torch.tensor(row["response"])[:, None])[:, 0]
        assert (ours - torch.tensor(row["logprobs"])).abs().max() < 1e-3


def test_an_exported_checkpoint_is_the_student_that_the_run_left(run_dir: Path, tmp_path: Path) -> None:
    forked("export", run_dir / "checkpoints" / "step_000040", tmp_path / "out")
    left, exported = (load_file(path / "model.safetensors") for path in (run_dir / "hf", tmp_path / "out"))
    assert left.keys() == exported.keys()
    assert all(torch.equal(left[name], exported[name]) for name in left)


def test_a_finished_run_is_not_trained_again(run_dir: Path) -> None:
    before = (run_dir / "metrics.jsonl").read_bytes()
    prune_opd("train", "tiny_compatible", "--run-dir", run_dir)
    assert (run_dir / "metrics.jsonl").read_bytes() == before
