"""Prompt files: formats, splits, column names, and what the model gets to read."""

import json
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from prune_opd.cli import models as cli_models
from prune_opd.cli.main import app
from prune_opd.config import DataConfig
from prune_opd.data.files import FileSource
from prune_opd.data.prompts import held_out, make_source
from prune_opd.data.render import prompt_text
from prune_opd.errors import ConfigError
from prune_opd.eval.run import EvalJob
from tests.fake_models import write_model


def file_source(path: Path, tokenizer: Any, **settings: Any) -> FileSource:
    return FileSource(DataConfig(source=str(path), **settings), tokenizer)


def of_file(**settings: Any) -> DataConfig:
    return DataConfig(source="rows.jsonl", **settings)


ROWS = [{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": "4"}]


def texts(source: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(list(prompt.ids)) for prompt in source.prompts]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_saved(path: Path, rows: list[dict[str, Any]]) -> Path:
    """As `datasets.Dataset.save_to_disk` writes: two Arrow stream files and the state that names them."""
    path.mkdir(parents=True)
    names = []
    for number, row in enumerate(rows):
        names.append(f"data-{number:05d}-of-{len(rows):05d}.arrow")
        table = pa.Table.from_pylist([row])
        with pa.OSFile(str(path / names[-1]), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return path


# ---------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    "write",
    [
        lambda root: write_jsonl(root / "a.jsonl", ROWS),
        lambda root: write_parquet(root / "a.parquet", ROWS),
        lambda root: write_saved(root / "saved", ROWS),
        lambda root: write_parquet(root / "repository" / "data" / "train-00000-of-00001.parquet", ROWS).parents[1],
        lambda root: write_jsonl(root / "repository" / "test.jsonl", ROWS).parent,
    ],
    ids=["jsonl", "parquet", "saved by datasets", "repository of parquet", "repository of jsonl"],
)
def test_every_format_gives_the_same_prompts(write: Any, byte_tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path)
    source = make_source(DataConfig(source=str(path)), byte_tokenizer, 0)
    assert isinstance(source, FileSource)
    assert texts(source, byte_tokenizer) == ["<user>1 + 1?</><assistant>", "<user>2 + 2?</><assistant>"]
    assert [prompt.answer for prompt in held_out(DataConfig(source=str(path)), byte_tokenizer, 0, 9)] == ["2", "4"]


def test_a_split_is_chosen_by_name_and_train_if_there_is_one(byte_tokenizer: Any, tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", ROWS[:1])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", ROWS[1:])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [{"question": "3?", "answer": "3"}])
    sizes = {split: file_source(tmp_path, byte_tokenizer, split=split).size for split in (None, "train", "test")}
    assert sizes == {None: 2, "train": 2, "test": 1}
    with pytest.raises(ConfigError, match=r"data.split = 'dev': .* has 'test', 'train'"):
        file_source(tmp_path, byte_tokenizer, split="dev")


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (
            ["default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"],
            {None: 2, "test": 1},
        ),
        (["gsm8k_train.parquet", "gsm8k_test.parquet"], {None: 1, "test": 1}),
        (["data/train-00000-of-00001.jsonl", "data/dev-00000-of-00001.jsonl"], {None: 1, "dev": 1, "validation": 1}),
        (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], {None: 2, "test": 1}),
        (["train.jsonl", ".cache/test.jsonl"], {None: 1}),
        (["aime24.jsonl"], {None: 1}),
    ],
)
def test_splits_are_told_by_files_or_folders(
    names: list[str], sizes: dict[str | None, int], byte_tokenizer: Any, tmp_path: Path
) -> None:
    for name in names:
        write = write_parquet if name.endswith(".parquet") else write_jsonl
        write(tmp_path / name, ROWS[:1])
    assert {split: file_source(tmp_path, byte_tokenizer, split=split).size for split in sizes} == sizes


def test_a_folder_of_several_configurations_is_refused_and_one_of_them_is_taken(
    byte_tokenizer: Any, tmp_path: Path
) -> None:
    for name in ("all", "cn", "en"):
        write_parquet(tmp_path / name / "train-00000-of-00001.parquet", ROWS if name == "all" else ROWS[:1])
        write_parquet(tmp_path / name / "test-00000-of-00001.parquet", ROWS[:1])
    with pytest.raises(ConfigError, match=r"has several configurations, 'all', 'cn', 'en', .* give the path of one"):
        file_source(tmp_path, byte_tokenizer)
    assert file_source(tmp_path / "all", byte_tokenizer).size == 2


CARD = """---
license: mit
configs:
- config_name: all
  {default}
  data_files:
  - split: train
    path: all/train-*
  - split: test
    path: [all/test-*]
- config_name: cn
  data_files: cn/*.parquet
---
A dataset.
"""


def test_the_default_configuration_of_a_dataset_card_is_taken(byte_tokenizer: Any, tmp_path: Path) -> None:
    for name, rows in (("all/train-0", ROWS), ("all/test-0", ROWS[:1]), ("cn/train-0", ROWS)):
        write_parquet(tmp_path / f"{name}.parquet", rows)
    (tmp_path / "README.md").write_text(CARD.format(default="default: true"))
    sizes = {split: file_source(tmp_path, byte_tokenizer, split=split).size for split in (None, "test")}
    assert sizes == {None: 2, "test": 1}
    (tmp_path / "README.md").write_text(CARD.format(default=""))
    with pytest.raises(ConfigError, match=r"'all', 'cn', .* its README.md names no default"):
        file_source(tmp_path, byte_tokenizer)


def test_a_dictionary_of_saved_datasets_has_its_splits(byte_tokenizer: Any, tmp_path: Path) -> None:
    for split, rows in (("train", ROWS), ("test", ROWS[:1])):
        write_saved(tmp_path / "both" / split, rows)
    (tmp_path / "both" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert file_source(tmp_path / "both", byte_tokenizer).size == 2
    assert file_source(tmp_path / "both", byte_tokenizer, split="test").size == 1


def test_a_bad_row_of_a_parquet_file_is_named_by_file_and_row(byte_tokenizer: Any, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [*ROWS, {"question": " ", "answer": "1"}])
    with pytest.raises(ConfigError, match=r"a.parquet:3: \"question\" = ' ': give text that is not empty"):
        file_source(path, byte_tokenizer)


@pytest.mark.parametrize("name", ["a.parquet", "saved/data.arrow"])
def test_a_file_that_is_not_what_its_name_says_is_refused(name: str, byte_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("not so")
    if path.suffix == ".arrow":
        (path.parent / "state.json").write_text(json.dumps({"_data_files": [{"filename": path.name}]}))
        path = path.parent
    with pytest.raises(ConfigError, match=r"is not (a Parquet|an Arrow) file"):
        file_source(path, byte_tokenizer)


def test_a_directory_without_prompts_is_refused(byte_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no .jsonl or .parquet files"):
        file_source(tmp_path, byte_tokenizer)


# ---------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Q", "answer": 27.0, "url": "https://…"},  # math-ai/amc23
        {"id": 60, "problem": "Q", "solution": "…", "answer": "27", "url": "…", "year": "2024"},  # H4's aime_2024
        {"ID": "2024-I-1", "Problem": "Q", "Solution": "…", "Answer": 27},  # Maxwell-Jia/AIME_2024
        {"question": "Q", "answer": "27"},  # opencompass/AIME2025
        {"problem_idx": 1, "problem": "Q", "answer": "27", "problem_type": ["Algebra"]},  # MathArena's hmmt_feb_2025
    ],
)
def test_the_columns_of_published_benchmarks_are_understood(
    row: dict[str, Any], byte_tokenizer: Any, tmp_path: Path
) -> None:
    source = file_source(write_jsonl(tmp_path / "bench.jsonl", [row]), byte_tokenizer)
    (prompt,) = source.prompts
    assert byte_tokenizer.decode(list(prompt.ids)) == "<user>Q</><assistant>"
    assert source.score("so it is \\boxed{27}", prompt) and not source.score("so it is \\boxed{28}", prompt)


# ---------------------------------------------------------------------------------------------------- rendering


def documented(command: str) -> list[str]:
    """The arguments of a command of docs/data.md that has a suffix, as a shell splits its line."""
    lines = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.strip().startswith(f"prune-opd {command} ") and "suffix" in line]
    return shlex.split(line)[1:]


def test_the_documented_suffix_is_the_same_to_training_and_to_evaluation(
    byte_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("prompts.jsonl", "aime24.parquet"):
        (write_jsonl if name.endswith("l") else write_parquet)(tmp_path / name, ROWS)
    write_model(tmp_path / "MODEL_DIR")
    byte_tokenizer.save_pretrained(tmp_path / "MODEL_DIR")
    shown = CliRunner().invoke(app, documented("data inspect"))
    text = "<user>1 + 1? Put the answer in a box.</><assistant><think></think>"
    assert shown.exit_code == 0 and text in shown.output, shown.output

    jobs: list[EvalJob] = []
    monkeypatch.setattr(cli_models, "on_ranks", lambda nproc, command, job: jobs.append(EvalJob.from_json(job)) or 0)
    assert CliRunner().invoke(app, documented("eval")).exit_code == 0
    ((task,),) = [job.tasks for job in jobs]
    assert texts(make_source(task, byte_tokenizer, 0), byte_tokenizer)[0] == text


@pytest.mark.parametrize(
    ("row", "format", "text"),
    [
        ({"prompt": "as it is"}, of_file(), "as it is"),
        ({"prompt": "P"}, of_file(suffix=" Box it."), "P Box it."),
        ({"prompt": "P"}, of_file(chat=True), "<user>P</><assistant>"),
        ({"question": "Q"}, of_file(chat=False, suffix="!"), "Q!"),
        ({"question": "Q"}, of_file(suffix=" Box it."), "<user>Q Box it.</><assistant>"),
        ({"question": "Q"}, of_file(system_prompt="S"), "<system>S</><user>Q</><assistant>"),
        ({"question": "Q"}, of_file(thinking=True), "<user>Q</><assistant>"),
        ({"question": "Q"}, of_file(thinking=False), "<user>Q</><assistant><think></think>"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 1
             + [{"role": "user", "content": "c"}]},
            of_file(suffix="!"),
            "<user>a</><assistant>b</><user>c!</><assistant>",
        ),
    ],
)  # fmt: skip
def test_a_row_is_rendered_as_set(row: dict[str, Any], format: DataConfig, text: str, byte_tokenizer: Any) -> None:
    assert prompt_text(row, format, byte_tokenizer) == text


@pytest.mark.parametrize(
    ("row", "format", "message"),
    [
        ({"prompt": "P"}, of_file(system_prompt="S"), "data.system_prompt = 'S' has no place"),
        ({"prompt": "P"}, of_file(thinking=False), "data.thinking = False has no place"),
        ({"messages": [{"role": "user", "content": "a"}]}, of_file(chat=False), '"messages" need the chat template'),
        (
            {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]},
            of_file(system_prompt="S"),
            "a system turn of its own",
        ),
    ],
)
def test_settings_that_a_row_has_no_place_for_are_refused(
    row: dict[str, Any], format: DataConfig, message: str, byte_tokenizer: Any
) -> None:
    with pytest.raises(ConfigError, match=message):
        prompt_text(row, format, byte_tokenizer)


def test_a_template_without_the_switch_is_not_silently_left_thinking(byte_tokenizer: Any) -> None:
    byte_tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    with pytest.raises(ConfigError, match=r"data.thinking = False: .* has no such switch"):
        prompt_text({"question": "Q"}, of_file(thinking=False), byte_tokenizer)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"thinking": True}, "data.thinking = True: the tokenizer's chat template has no such switch; leave it out"),
        ({"chat": False, "system_prompt": "S"}, "data.system_prompt = 'S' has no place in a prompt"),
    ],
)
def test_what_is_wrong_with_a_setting_is_said_once_and_bad_rows_are_still_named(
    settings: dict[str, Any], problem: str, byte_tokenizer: Any, tmp_path: Path
) -> None:
    byte_tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": " "}, *ROWS * 20])
    with pytest.raises(ConfigError) as refusal:
        file_source(path, byte_tokenizer, **settings)
    setting, row = str(refusal.value).splitlines()
    assert setting.startswith(f"{path}:2: {problem}") and setting.endswith(" (so in 40 of 41 rows)")
    assert row.startswith(f"{path}:1: ") and "give text that is not empty" in row


def test_rows_that_a_setting_does_not_go_with_can_be_skipped(byte_tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "as it is"}, *ROWS])
    source = file_source(path, byte_tokenizer, system_prompt="S", bad_rows="skip")
    assert source.size == 2 and "1 of 3 rows are bad, lines 1 (line 1: data.system_prompt" in source.skipped_summary()


def test_a_chat_without_a_template_is_refused_and_a_question_goes_as_it_is(byte_tokenizer: Any) -> None:
    byte_tokenizer.chat_template = None
    assert prompt_text({"question": "Q"}, of_file(), byte_tokenizer) == "Q"
    with pytest.raises(ConfigError, match=r"data.chat = true needs a chat template"):
        prompt_text({"question": "Q"}, of_file(chat=True), byte_tokenizer)
