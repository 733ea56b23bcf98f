"""Models of a run are evaluated as the run asked and read them, wherever the command finds them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from launch.cluster import load_cluster
from launch.jobs import Submission, plan_jobs
from prune_opd.cli import models
from prune_opd.config import DataConfig, EvalConfig, TrainConfig, to_dict
from prune_opd.config.yaml import save_config
from prune_opd.errors import UserError
from prune_opd.eval.inherit import of_run
from prune_opd.eval.run import EvalJob
from prune_opd.weights.files import BESIDE_THE_WEIGHTS
from tests.fake_models import train_config, write_model

DATA = DataConfig(source="train.jsonl", chat=True, system_prompt="Reason.", suffix=" Box it.", thinking=False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with an export and a checkpoint."""
    directory = tmp_path / "run"
    evaluation = EvalConfig(extract="last_number", sources=("held_out.jsonl",))
    config = train_config(tmp_path / "student", tmp_path / "teacher", data=DATA, evaluation=evaluation)
    write_model(directory / "hf")
    save_config(config, directory / "config.yaml")
    checkpoint = directory / "checkpoints" / "step_000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": 3, "config": to_dict(config)}))
    (directory / "checkpoints" / "latest").write_text("step_000003\n")
    return directory


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[EvalJob]:
    """What `prune-opd eval` sends to its ranks; checkpoints are exported to a directory that is never made."""
    sent: list[EvalJob] = []

    def on_ranks(nproc: int, command: str, *arguments: str) -> int:
        if command == "eval":
            sent.append(EvalJob.from_json(arguments[0]))
        return 0

    monkeypatch.setattr(models, "on_ranks", on_ranks)
    return sent


def file(tmp_path: Path) -> str:
    path = tmp_path / "aime.jsonl"
    path.write_text(json.dumps({"problem": "1 + 1?", "answer": "2"}) + "\n")
    return str(path)


@pytest.mark.parametrize("inside", ["", "hf", "checkpoints/step_000003"])
@pytest.mark.parametrize(
    ("setting", "value"), [("chat", True), ("system_prompt", "Reason."), ("suffix", " Box it."), ("thinking", False)]
)
def test_prompts_have_the_form_that_they_have_in_the_run(
    run: Path, tmp_path: Path, jobs: list[EvalJob], inside: str, setting: str, value: Any
) -> None:
    models.evaluate([run / inside], [file(tmp_path)])
    assert getattr(jobs[-1].tasks[0], setting) == value


@pytest.mark.parametrize("inside", ["", "hf", "checkpoints/step_000003"])
def test_answers_are_read_as_in_the_run(run: Path, tmp_path: Path, jobs: list[EvalJob], inside: str) -> None:
    models.evaluate([run / inside], [file(tmp_path)])
    assert jobs[-1].extract == "last_number"


def test_a_run_stands_for_its_export_or_its_newest_checkpoint(run: Path) -> None:
    assert of_run(run).model_dir == run / "hf"
    (run / "hf" / "config.json").unlink()
    assert of_run(run).model_dir == run / "checkpoints" / "step_000003"
    (run / "checkpoints" / "latest").unlink()
    with pytest.raises(UserError, match="is a run without a checkpoint: wait for its first one"):
        of_run(run)


def test_what_is_given_counts_before_the_run(run: Path, tmp_path: Path, jobs: list[EvalJob]) -> None:
    task = file(tmp_path)
    models.evaluate([run], [task], suffix="", system_prompt="", thinking=True, chat=False, extract="box")
    (got,) = jobs[-1].tasks
    assert (got.suffix, got.system_prompt, got.thinking, got.chat) == ("", None, True, False)
    assert jobs[-1].extract == "box"


def test_the_ledger_takes_no_form_of_prompts_over_and_other_models_have_the_defaults(
    run: Path, tmp_path: Path, jobs: list[EvalJob], capsys: pytest.CaptureFixture[str]
) -> None:
    alone = write_model(tmp_path / "alone")
    models.evaluate([run], ["ledger"])
    assert jobs[-1].tasks == (DataConfig(),)
    assert capsys.readouterr().err == f"note: {run / 'hf'} is asked and read as in its run: extract = 'last_number'\n"
    models.evaluate([run, alone], [file(tmp_path)])
    assert jobs[-1].extract == "box_or_last_number" and jobs[-1].tasks[0].suffix == ""
    said = capsys.readouterr().err
    assert "note: these models are of runs with different settings" in said
    assert said.count("as in its run") == 1 and "system_prompt = 'Reason.', suffix = ' Box it.'" in said


def test_launch_evaluates_a_directory_whose_run_is_found(run: Path, tmp_path: Path, jobs: list[EvalJob]) -> None:
    """The launched command itself, with the job's arguments."""
    from typer.testing import CliRunner

    from prune_opd.cli.main import app

    cluster = load_cluster("local")
    submission = Submission("tiny_compatible", run_dir=str(run), evaluate=file(tmp_path))
    job = next(job for job in plan_jobs(submission, cluster) if job.name.startswith("evaluate"))
    arguments = list(job.command)[list(job.command).index("eval") :]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, f"{shlex.join(arguments)}\n{done.output}"
    assert jobs[-1].model_dir == str(run / "hf") and jobs[-1].extract == "last_number"
    (task,) = jobs[-1].tasks
    assert (task.chat, task.system_prompt, task.suffix, task.thinking) == (True, "Reason.", " Box it.", False)


def test_stop_ids_tokenizer_and_template_are_copied_beside_the_weights(tmp_path: Path) -> None:
    """Both engines read them there: the run's in the student's directory, the evaluation's in the export."""
    import torch

    from prune_opd.weights.files import HfDirectoryWriter

    student = write_model(tmp_path / "student", eos_token_id=1)
    beside = {
        "generation_config.json": json.dumps({"eos_token_id": [1, 7]}),
        "chat_template.jinja": "{{ messages }}",
        "tokenizer_config.json": json.dumps({"chat_template": "{{ messages }}", "eos_token": "<eos>"}),
    }
    for name, text in beside.items():
        (student / name).write_text(text)
    writer = HfDirectoryWriter(tmp_path / "hf", student, 10**6)
    writer.add("weight", torch.zeros(2))
    writer.finish()
    for name in (*beside, "tokenizer.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (student / name).read_bytes()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 1
    assert {*beside, "tokenizer.json", "config.json"} <= set(BESIDE_THE_WEIGHTS)


def test_the_evaluation_inside_a_run_has_the_runs_settings(tmp_path: Path) -> None:
    from prune_opd.eval import evaluate as evaluate_module

    seen: list[tuple[DataConfig, str]] = []

    def make(tokenizer: Any, data: DataConfig, problems: int, longest: int, sampling: Any, extract: str) -> None:
        seen.append((data, extract))

    config: TrainConfig = train_config(
        tmp_path, tmp_path, data=DATA, evaluation=EvalConfig(extract="last_number", sources=("a.jsonl",))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_module, "make_evaluator", make)
        evaluate_module.make_evaluators(config, None)
    ((data, extract),) = seen
    assert (data.source, data.chat, data.system_prompt, data.suffix, data.thinking) == (
        *("a.jsonl", True, "Reason.", " Box it.", False),
    )
    assert extract == "last_number"
