"""Generated rows, settings and model files: an error is one of ours, in one line, and no text changes in silence."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prune_opd.check.run import check_train
from prune_opd.config import DataConfig, TrainConfig
from prune_opd.config.overrides import apply_overrides
from prune_opd.data.files import FileSource
from prune_opd.data.render import PROMPT_COLUMNS
from prune_opd.errors import ConfigError
from tests.fake_models import tokenizer, train_config, write_model

TRIES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = st.text(st.characters(exclude_categories=()), max_size=12)  # half surrogates too
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]) | TEXTS, "content": TEXTS | JSON}
    ),
    max_size=4,
)
COLUMNS = st.sampled_from([*PROMPT_COLUMNS, "answer", "Answer", "source", "other"])
ROWS = st.dictionaries(COLUMNS, TEXTS | TURNS | JSON, max_size=4) | JSON


@TRIES
@given(rows=st.lists(ROWS, min_size=1, max_size=4), chat=st.sampled_from([None, True, False]), suffix=TEXTS)
def test_rows_are_read_as_they_are_or_refused(
    rows: list[Any], chat: bool | None, suffix: str, byte_tokenizer: Any
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        try:
            source = FileSource(DataConfig(source=str(path), bad_rows="skip", chat=chat, suffix=suffix), byte_tokenizer)
        except ConfigError as error:
            assert str(error)
            return
    assert len(source.prompts) + len(source.skipped) == len(rows)
    for prompt, place in zip(source.prompts, source.places, strict=True):
        row = rows[int(place.rpartition(":")[2]) - 1]
        text = byte_tokenizer.decode(list(prompt.ids))
        said = row.get("prompt") or row.get("problem") or row.get("question")
        if said is not None and chat is not True and "prompt" in row:
            assert text == said + suffix
        elif isinstance(said, str):
            assert said + suffix in text
        assert prompt.answer is None or prompt.answer.encode()


KEYS = st.sampled_from(
    ["gate.k", "gate", "horizon.k", "optimizer.lr", "data.suffix", "seed", "parallel.tensor", "name", "x"]
)
VALUES = st.text(max_size=8) | st.sampled_from(
    [
        "!!int ''",
        "0x_",
        "!!timestamp x",
        "&a [*a]",
        "null",
        "[1,2]",
        "{a: 1}",
        "1e-4",
        "-1",
        "nan",
        "1e999",
        "'",
        '"',
        "[",
        "&a",
        "*a",
        "!!x",
    ]
)


@TRIES
@given(
    lines=st.lists(
        st.tuples(KEYS | st.text(max_size=8), st.sampled_from(["=", "", "=="]), VALUES), min_size=1, max_size=3
    )
)
def test_overrides_are_taken_or_refused_line_by_line(lines: list[tuple[str, str, str]]) -> None:
    config = train_config(Path("student"), Path("teacher"))
    try:
        changed = apply_overrides(config, ["".join(parts) for parts in lines])
    except ConfigError as error:
        assert str(error).strip()
        return
    assert isinstance(changed, TrainConfig)
    key, _, value = lines[-1]
    if key == "data.suffix" and lines[-1][1] == "=" and value[:1] not in tuple("'\"") and value != "null":
        assert changed.data.suffix == value


SETTINGS = st.sampled_from(
    [
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "vocab_size",
        "model_type",
        "tie_word_embeddings",
        "eos_token_id",
        "rope_scaling",
        "head_dim",
        "intermediate_size",
        "rope_theta",
        "rms_norm_eps",
    ]
)
FILES = st.sampled_from(["tokenizer_config.json", "generation_config.json", "added_tokens.json", "tokenizer.json"])


@TRIES
@given(
    changes=st.dictionaries(SETTINGS, JSON, max_size=3),
    beside=st.dictionaries(FILES, JSON | st.just(tokenizer()), max_size=2),
)
def test_check_answers_in_lines_whatever_the_model_files_hold(changes: dict[str, Any], beside: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        student, teacher = (write_model(Path(folder) / name) for name in ("student", "teacher"))
        config = json.loads((student / "config.json").read_text()) | changes
        (student / "config.json").write_text(json.dumps(config))
        for name, content in beside.items():
            (student / name).write_text(json.dumps(content))
        found = check_train(train_config(student, teacher), 2, None, "auto")
    assert all(isinstance(line, str) and line and "\n" not in line for line in found)
