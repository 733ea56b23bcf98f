"""Each check on a pair of fake model directories: a good run has no problem, each bad input has exactly one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from prune_opd.check import run as check
from prune_opd.check.run import check_eval, check_sft, check_structure, check_train
from prune_opd.config import CorpusConfig, ParallelConfig, SftConfig, SftStage, TrainConfig
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import load_recipe
from prune_opd.data.ledger import VOCABULARY
from prune_opd.data.prompts import doubled_names
from prune_opd.process import has_gpu
from tests.fake_models import TOKENS, tokenizer, train_config, with_weights, write_model


@pytest.fixture
def pair(tmp_path: Path) -> TrainConfig:
    return train_config(write_model(tmp_path / "student"), write_model(tmp_path / "teacher"))


def problems(config: TrainConfig, *overrides: str, nproc: int = 2) -> list[str]:
    return check_train(apply_overrides(config, list(overrides)), nproc, None, "auto")


def only(found: list[str]) -> str:
    assert len(found) == 1, found
    assert "\n" not in found[0]
    return found[0]


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_good_run_has_no_problem(pair: TrainConfig, nproc: int) -> None:
    assert problems(pair, nproc=nproc) == []
    assert problems(pair, "precision.params=bf16", "horizon.strategy=full", "gate=null", nproc=nproc) == []


def test_kernels_that_need_a_gpu_are_refused_without_one(pair: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    line = only(problems(pair, "objective.kernels=triton"))
    assert line.startswith("objective.kernels = triton needs a GPU") and "objective.kernels=torch" in line


# ---------------------------------------------------------------------------------------------------- models


def test_a_missing_model_says_what_is_wanted(pair: TrainConfig, tmp_path: Path) -> None:
    line = only(problems(dataclasses.replace(pair, teacher=str(tmp_path / "nowhere"))))
    assert line.startswith("teacher = ") and line.endswith(
        "there is no such directory; give a Hugging Face model directory"
    )


@pytest.mark.parametrize("named", ["the file", "its directory"])
def test_gguf_is_refused_with_what_converts_it(pair: TrainConfig, tmp_path: Path, named: str) -> None:
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "SmolLM2-135M.Q4_1.gguf").write_bytes(b"GGUF")
    student = folder if named == "its directory" else folder / "SmolLM2-135M.Q4_1.gguf"
    config = dataclasses.replace(pair, student=str(student))
    for line in (only(problems(config)), only(check_structure(config, 2))):
        assert line.startswith(f"student = {str(student)!r} is GGUF") and "no such" not in line
        assert f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, gguf_file='SmolLM2-135M.Q4_1.gguf')" in line
        assert "save_pretrained" in line and "packages gguf and accelerate" in line
    assert "is GGUF" in only(check_eval(student, ["ledger"], 1.0, None))


def test_a_model_directory_with_a_gguf_file_in_it_is_a_model_directory(pair: TrainConfig) -> None:
    (Path(pair.student) / "model.gguf").write_bytes(b"GGUF")
    assert problems(pair) == []


def test_a_file_that_is_there_is_not_called_missing(pair: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    line = only(problems(dataclasses.replace(pair, student=str(tmp_path / "model.safetensors"))))
    assert "model.safetensors' is one file of a model: give the directory that holds it" in line


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_an_incomplete_model_directory_is_named_with_what_it_lacks(pair: TrainConfig, name: str) -> None:
    (Path(pair.student) / name).unlink()
    assert f"there is no {name} in it" in only(problems(pair))


def test_a_damaged_config_json_is_refused(pair: TrainConfig) -> None:
    (Path(pair.student) / "config.json").write_text('{"model_type": "qwen3"}', encoding="utf-8")
    assert "not that of a causal language model" in only(problems(pair))


def test_an_unknown_family_is_refused_with_those_that_work(pair: TrainConfig, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", model_type="gpt2")
    line = only(problems(dataclasses.replace(pair, student=str(other))))
    assert "model_type = 'gpt2' is not supported: use a model of llama, qwen2, qwen3" in line


def test_a_setting_that_is_not_built_is_refused_before_a_model_is(pair: TrainConfig, tmp_path: Path) -> None:
    path = Path(pair.teacher) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_scaling": {"rope_type": "dynamic"}}))
    assert "teacher" in (line := only(problems(pair))) and "rope_type = 'dynamic' is not supported" in line


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (tokenizer(vocab={t: i for i, t in enumerate((*TOKENS[:-1], "other"))}), "id 31 is 'w29' for the student"),
        (tokenizer(vocab={t: i for i, t in enumerate(TOKENS[:-1])}), "'w29' for the student and unused for the"),
        (tokenizer(merges=["w 1", "w 3"]), "merge 1 is w + 2 for the student and w + 3 for the teacher"),
        (tokenizer(merges=["w 1"]), "merge 1 is w + 2 for the student and missing for the teacher"),
        (tokenizer() | {"added_tokens": []}, "id 0 ('<bos>') is a special token for the student only"),
        (
            tokenizer()
            | {"added_tokens": [*tokenizer()["added_tokens"], {"id": 32, "content": "<x>", "special": False}]},
            "id 32 is unused for the student and '<x>' for the teacher",
        ),
        ({"model": {}}, "cannot be read"),
    ],
)
def test_another_tokenizer_is_refused_with_the_first_difference(
    pair: TrainConfig, tmp_path: Path, other: dict[str, Any], difference: str
) -> None:
    teacher = write_model(tmp_path / "other", other)
    assert difference in only(problems(dataclasses.replace(pair, teacher=str(teacher))))


def test_the_same_tokenizer_written_in_another_way_is_no_difference(pair: TrainConfig, tmp_path: Path) -> None:
    teacher = write_model(tmp_path / "other", tokenizer(merges=["w 1", "w 2"]) | {"version": "1.0"})
    assert problems(dataclasses.replace(pair, teacher=str(teacher))) == []


def test_unigram_vocabularies_are_compared_in_the_order_of_their_ids(tmp_path: Path) -> None:
    scores = [[token, -1.0 * i] for i, token in enumerate(TOKENS)]
    student = write_model(tmp_path / "student", tokenizer(vocab=scores, merges=None))
    teacher = write_model(tmp_path / "teacher", tokenizer(vocab=[*scores[:30], ["other", -3.0]], merges=None))
    assert "id 30 is 'w28' for the student and 'other' for the teacher" in only(
        problems(train_config(student, teacher))
    )


# ---------------------------------------------------------------------------------------------------- layout and sizes


def test_tensor_parallel_must_divide_the_heads_of_both_models(pair: TrainConfig) -> None:
    field = "parallel.tensor = 3 (null: all ranks)"
    heads = (
        "the 4 attention heads of the student and the teacher and the 2 key-value heads of the student and the teacher"
    )
    assert only(problems(pair, nproc=3)) == f"{field} does not divide {heads}: choose one of 1, or another --nproc"


def test_tensor_parallel_must_divide_the_key_value_heads(pair: TrainConfig) -> None:
    line = only(problems(pair, "parallel.tensor=4", nproc=4))
    assert line.endswith(" does not divide the 2 key-value heads of the student and the teacher: choose one of 1, 2")


def test_tensor_parallel_must_divide_the_ranks(pair: TrainConfig) -> None:
    line = only(problems(pair, "parallel.tensor=2", nproc=1))
    assert line.startswith("parallel.tensor = 2 does not divide the 1 ranks: choose one of 1")


def test_rollout_tensor_parallel_must_divide_ranks_and_heads(pair: TrainConfig) -> None:
    assert "rollout.tensor_parallel = 2 does not divide the 1 ranks" in only(
        problems(pair, "rollout.tensor_parallel=2", nproc=1)
    )
    wide = problems(pair, "parallel.tensor=1", "rollout.tensor_parallel=3", nproc=3)
    assert "rollout.tensor_parallel = 3 does not divide the 4 attention heads" in only(wide)


def test_each_replica_needs_a_response(pair: TrainConfig) -> None:
    few = ("parallel.tensor=1", "rollout.prompts=1", "rollout.responses=3")
    assert "= 3 is fewer than the 4 data-parallel replicas" in only(problems(pair, *few, nproc=4))
    assert problems(pair, *few, nproc=3) == []


def test_a_horizon_above_the_positions_is_refused_with_the_room_there_is(pair: TrainConfig) -> None:
    found = problems(pair, "horizon.max_len=500")
    assert [line.split()[-4:-1] for line in found] == [["to", "at", "most"]] * 2
    assert found[0].startswith(
        "rollout.max_prompt_len + horizon.max_len = 64 + 500 is above the 512 positions of the student"
    )
    assert found[0].endswith("set horizon.max_len to at most 448")
    assert problems(pair, "horizon.max_len=448") == []
    assert "evaluation.max_len" in only(problems(pair, "evaluation.max_len=449"))


@pytest.mark.parametrize("field", ["gate.k", "objective.k"])
def test_more_candidates_than_token_ids_are_refused(pair: TrainConfig, field: str) -> None:
    found = problems(pair, f"{field}={len(TOKENS) + 1}")
    assert found[0] == f"{field} = 33 is above the 32 vocabulary entries of the student: set at most 32"
    assert problems(pair, f"{field}={len(TOKENS)}") == []


# ---------------------------------------------------------------------------------------------------- machine


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_do_not_count(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert not has_gpu()


def test_a_cpu_build_of_torch_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(check.Path, "exists", lambda self: True)
    monkeypatch.setattr(check.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    assert not has_gpu()
    monkeypatch.setattr(check.importlib.metadata, "version", lambda name: "2.13.0")
    assert has_gpu()


@pytest.mark.parametrize(("part", "accepted"), [("normalization", True), ("multi_tensor_apply", True), ("web", False)])
def test_only_nvidias_apex_is_accepted(
    pair: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, accepted: bool
) -> None:
    (tmp_path / "site" / "apex" / part).mkdir(parents=True)
    (tmp_path / "site" / "apex" / "__init__.py").write_text("raise AssertionError('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    found = problems(pair)
    assert found == [] if accepted else "apex is not NVIDIA's" in only(found)


# ---------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("field", ["data.source", "evaluation.sources"])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ledgr", "is no task: did you mean 'ledger'?"),
        ("prompts.jsonl", "there is no such file"),
        ("some/where", "there is no such file"),
    ],
)
def test_an_unknown_source_is_refused(pair: TrainConfig, field: str, source: str, message: str) -> None:
    line = only(problems(pair, f"{field}={source}"))
    assert line.startswith(f"{field} = {source!r}") and message in line


def test_a_prompt_file_is_a_jsonl_file(pair: TrainConfig, tmp_path: Path) -> None:
    for name, accepted in (("prompts.jsonl", True), ("prompts.csv", False)):
        (tmp_path / name).write_text('{"prompt": "w1"}\n', encoding="utf-8")
        found = problems(pair, f"data.source={tmp_path / name}", "evaluation.sources=ledger")
        assert found == [] if accepted else "is not a .jsonl or .parquet file" in only(found)


def test_a_task_that_is_called_like_a_result_of_another_is_refused() -> None:
    (line,) = doubled_names("--task", ["a/math.jsonl", "math_high.jsonl", "math_hard.jsonl"])
    assert line.startswith("--task has a task named 'math_high' ('math_high.jsonl'), as a result of the task 'math' is")
    assert doubled_names("--task", ["response_length.jsonl"]) and not doubled_names("--task", ["math_high.jsonl"])


@pytest.mark.parametrize(
    "names", [("a/aime.jsonl", "b/aime.jsonl"), ("aime.jsonl", "aime.parquet"), ("aime.jsonl", "aime")]
)
def test_two_tasks_whose_results_would_have_one_name_are_refused(
    names: tuple[str, str], pair: TrainConfig, tmp_path: Path
) -> None:
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        if path.suffix:
            path.write_text('{"prompt": "w1", "answer": "1"}\n', encoding="utf-8")
        else:
            path.mkdir()
    wanted = f"has several tasks named 'aime' ('{paths[0]}', '{paths[1]}')"
    assert wanted in only(problems(pair, f"evaluation.sources=[{paths[0]},{paths[1]}]"))
    with_weights(Path(pair.student))
    assert f"--task {wanted}" in only(check_eval(Path(pair.student), [str(path) for path in paths], 1.0, None))


def test_a_cache_that_does_not_hold_a_response_is_refused_with_our_setting(pair: TrainConfig) -> None:
    """vLLM's own words would be: increase gpu_memory_utilization."""
    small = "rollout.kv_cache_gb=0.0005"
    line = only(problems(pair, small))
    assert line.startswith(
        "rollout.kv_cache_gb = 0.0005 holds 0 tokens of the student, a prompt and its response may have"
    )
    remedy = line.rpartition("set ")[2].partition(",")[0]
    assert problems(pair, remedy) == []


def test_training_rows_are_not_evaluation_problems(pair: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w1", "answer": "1"}\n', encoding="utf-8")
    source = f"data.source={tmp_path / 'prompts.jsonl'}"
    assert only(problems(pair, source)).startswith("evaluation.sources is not set")
    assert problems(pair, source, "evaluation.problems=0") == []


# ---------------------------------------------------------------------------------------------------- sft and eval


def supervised(tmp_path: Path, **changes: Any) -> SftConfig:
    stages = (SftStage(steps=1, batch=2, lr=1e-3, corpus=CorpusConfig()),)
    return SftConfig(**({"name": "x", "output": str(tmp_path / "out"), "stages": stages} | changes))


def test_supervised_training_starts_from_nothing_or_from_a_model(tmp_path: Path) -> None:
    assert check_sft(supervised(tmp_path), 2) == []
    assert check_sft(supervised(tmp_path, init=str(write_model(tmp_path / "base"))), 2) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "nowhere"}, "init = 'nowhere': there is no such directory"),
        ({"parallel": ParallelConfig(tensor=2)}, "parallel.tensor = 2: supervised training is data parallel only"),
        ({"parallel": ParallelConfig(tensor=1, expert=2)}, "parallel.expert = 2: supervised training is data parallel"),
        ({"parallel": ParallelConfig(tensor=1, context=2)}, "parallel.context = 2: supervised training is data"),
        ({"parallel": ParallelConfig(tensor=1, sequence_parallel=True)}, "set parallel.sequence_parallel=false"),
        ({"output": ""}, "output = '' is no directory"),
    ],
)
def test_bad_supervised_training_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert message in only(check_sft(supervised(tmp_path, **changes), 2))


def test_an_evaluation_needs_a_model_and_a_task(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    assert check_eval(model, ["ledger"], 1.0, None) == []
    assert "--task = 'ledgre' is no task: did you mean 'ledger'?" in only(check_eval(model, ["ledgre"], 1.0, None))
    assert "MODEL_DIR = 'nowhere': there is no such directory" in only(
        check_eval(Path("nowhere"), ["ledger"], 1.0, None)
    )
    wrong = only(check_eval(model, ["ledger"], 1.0, None, "regex:("))
    assert wrong.startswith("--extract = 'regex:(' is no regular expression of Python (")


# ---------------------------------------------------------------------------------------------------- the recipes


def test_the_tiny_recipe_passes_on_a_model_of_its_shape(tmp_path: Path) -> None:
    base, recipe = load_recipe("tiny_base"), load_recipe("tiny_compatible")
    assert isinstance(base, SftConfig) and isinstance(recipe, TrainConfig)
    shape = base.shape
    settings: dict[str, Any] = {
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.max_positions,
        "vocab_size": len(VOCABULARY),
    }
    student, teacher = (str(write_model(tmp_path / name, **settings)) for name in ("student", "teacher"))
    recipe = dataclasses.replace(recipe, student=student, teacher=teacher)
    for nproc in (1, 2):
        assert problems(recipe, nproc=nproc) == []
