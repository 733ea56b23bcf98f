"""Evaluations over several tasks: their line in the metrics, and the answers that they write."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from prune_opd.check.run import eval_layout_problems
from prune_opd.cli import models
from prune_opd.config import DataConfig, RolloutConfig
from prune_opd.data.prompt import Prompt
from prune_opd.eval.evaluate import Evaluator, Sampling, evaluation_record, make_evaluator, write_rows
from prune_opd.eval.run import EvalJob, result, results_table, room_problem
from prune_opd.rollout.batch import Response, Rollouts
from prune_opd.rollout.request import Row, TokenSampling
from prune_opd.track.metrics import meaning, task_names
from tests.fake_models import write_model

SAMPLING = Sampling(samples=2, max_len=4, temperature=1.0, top_p=1.0, seed=7)


class SpelledIds:
    """A tokenizer whose token 12 is the text "12"."""

    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        return [self.decode(row) for row in rows]


class Doubling:
    """A stand-in for vLLM: the first sample is the prompt's number, the second is twice that, and cut off."""

    def generate(self, rows: Sequence[Row], sampling: TokenSampling) -> Rollouts:
        responses = [Response((row.prompt.index * (row.sample + 1),), finished=row.sample == 0) for row in rows]
        return Rollouts(tuple(row.prompt for row in rows), tuple(responses))


class Number:
    name, size = "number", None

    def get(self, index: int) -> Prompt:
        return Prompt(index, (index, 1), str(index), self.name)

    def read(self, response_text: str) -> str | None:
        return None if response_text == "10" else response_text

    def score(self, response_text: str, prompt: Prompt) -> bool:
        return response_text == prompt.answer


def evaluator(task: str, problems: Sequence[int]) -> Evaluator:
    source = Number()
    return Evaluator(SpelledIds(), task, source, [source.get(i) for i in problems], SAMPLING)


def test_a_line_has_every_task_and_only_documented_keys(tmp_path: Path) -> None:
    evaluators = [evaluator("small", [0, 3]), evaluator("large", [5, 6, 7])]
    record = evaluation_record(Doubling(), evaluators, 10, tmp_path / "generations", keep=3)  # type: ignore[arg-type]
    assert task_names(record) == ["small", "large"] and record["step"] == 10
    assert record["eval_small"] == 0.75, "0 is its own double"
    assert record["eval_large"] == 0.5 and record["eval_large_pass"] == 1.0
    assert record["eval_small_readable"] == 1 and record["eval_small_answers"] == 4
    assert record["eval_large_readable"] == 5 / 6 and record["eval_large_answers"] == 6
    assert all(meaning(key) for key in record)
    rows = [json.loads(line) for line in (tmp_path / "generations" / "step-000010.jsonl").read_text().splitlines()]
    assert [(row["task"], row["problem"], row["sample"]) for row in rows] == [
        *(("small", 0, 0), ("small", 0, 1), ("small", 3, 0)),
        *(("large", 5, 0), ("large", 5, 1), ("large", 6, 0)),
    ]
    assert rows[4] == {
        "task": "large",
        "problem": 5,
        "sample": 1,
        "source": "number",
        "prompt": "5 1",
        "response": "10",
        "read": None,
        "answer": "5",
        "correct": False,
        "tokens": 1,
        "finished": False,
    }


@pytest.mark.parametrize(("folder", "keep"), [(False, 3), (True, 0)])
def test_no_answers_are_kept_where_none_are_wanted(tmp_path: Path, folder: bool, keep: int) -> None:
    path = tmp_path / "generations"
    evaluation_record(Doubling(), [evaluator("small", [1])], 1, path if folder else None, keep)  # type: ignore[arg-type]
    assert not path.exists()


def test_a_result_says_how_sure_it_is_and_how_it_was_reached() -> None:
    scored = evaluator("small", [0, 3]).run(Doubling())  # type: ignore[arg-type]
    found = result(scored)
    assert found["avg@2"] == found["pass@1"] == 0.75 and found["pass@2"] == 1.0
    assert found["finished"] == 0.5 and found["response_length"] == 1 and found["problems"] == 2
    assert found["interval"][0] < 0.75 < found["interval"][1]
    unread = result(evaluator("small", [5]).run(Doubling()))  # type: ignore[arg-type]
    assert (found["readable"], found["answers"], unread["readable"], unread["answers"]) == (1, 4, 0.5, 2)


def test_the_table_has_a_row_a_model_and_a_column_a_task() -> None:
    lines = [
        {"model": model, **result(evaluator(task, [1, 2]).run(Doubling()))}  # type: ignore[arg-type]
        for model in ("a", "b")
        for task in ("x", "y")
    ]
    table = results_table(lines)
    assert [str(column.header) for column in table.columns] == ["model", "x", "y", "response tokens"]
    assert table.row_count == 2
    page = Console(file=io.StringIO(), width=120)
    page.print(results_table([{"model": "a", **result(evaluator("x", [1, 5]).run(Doubling()))}]))  # type: ignore[arg-type]
    assert "3 of 4 answers readable" in page.file.getvalue()  # type: ignore[attr-defined]


def test_a_file_s_answers_are_read_as_the_evaluator_was_told(tmp_path: Path) -> None:
    (tmp_path / "sums.jsonl").write_text('{"prompt": "20 28", "answer": "48"}\n')
    task = DataConfig(source=str(tmp_path / "sums.jsonl"))
    for extract, read in (("box", None), ("box_or_last_number", "48")):
        source = make_evaluator(SpelledIds(), task, 1, None, SAMPLING, extract).source
        assert source.read("So, the final answer is 48.") == read


def test_the_command_reads_what_was_asked_for_and_notes_whose_answers_it_could_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs: list[EvalJob] = []

    def ranks(nproc: int, command: str, text: str) -> int:
        jobs.append(job := EvalJob.from_json(text))
        lines = [
            result(evaluator(task.source, [0]).run(Doubling()))  # type: ignore[arg-type]
            | {"readable": float(job.model_dir == "b" or task.source == "fine")}
            for task in job.tasks
        ]
        assert job.results is not None
        write_rows(Path(job.results), lines)
        return 0

    monkeypatch.setattr(models, "on_ranks", ranks)
    monkeypatch.setattr(models, "check_eval", lambda *args: [])
    models.evaluate([Path("a"), Path("b")], ["fine", "gsm", "ledger"], extract="regex:is (.+)")
    shown = capsys.readouterr()
    assert "0 of 2 answers" in " ".join(shown.out.split()) and {job.extract for job in jobs} == {"regex:is (.+)"}
    (note,) = (line for line in shown.err.splitlines() if line.startswith("note:"))
    assert note.startswith("note: only 0 of 2 answers of a to gsm could be read, ") and "--extract says" in note
    models.evaluate([Path("b")], ["gsm"])
    assert jobs[-1].extract == "box_or_last_number"


def test_a_job_crosses_to_the_ranks_unchanged() -> None:
    file = DataConfig(source="a.jsonl", chat=True, system_prompt="Reason.", suffix=" Box it.", thinking=False)
    job = EvalJob("model", (DataConfig(), file), 8, SAMPLING, "regex:is (.+)", results="r.jsonl", tensor_parallel=2)
    assert EvalJob.from_json(job.to_json()) == job


def test_a_model_that_fills_its_gpu_is_refused_with_the_ranks_that_would_do(tmp_path: Path) -> None:
    """Qwen3-30B-A3B has 61 GB: on one GPU of 80 there is little room for its cache, on half of one none."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(61 * 10**9)  # sparse
    problem = room_problem(tmp_path, RolloutConfig(), 72e9)
    assert problem is not None and "61.0 GB of weights" in problem and "give --tensor-parallel 2" in problem
    assert room_problem(tmp_path, RolloutConfig(tensor_parallel=2), 72e9) is None
    narrow = room_problem(tmp_path, RolloutConfig(tensor_parallel=2), 20e9)
    assert narrow is not None and "give --tensor-parallel 4" in narrow


def test_tensor_parallel_ranks_of_an_evaluation_must_divide_ranks_and_heads(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", num_attention_heads=4)
    assert eval_layout_problems(model, nproc=4, tensor=2) == []
    (ranks,) = eval_layout_problems(model, nproc=3, tensor=2)
    assert ranks == "--tensor-parallel 2 does not divide the 3 ranks: give --nproc 2, or a multiple of it"
    (heads,) = eval_layout_problems(model, nproc=8, tensor=8)
    assert "does not divide the 4 attention heads" in heads
    assert eval_layout_problems(tmp_path / "a checkpoint", nproc=2, tensor=2) == []
