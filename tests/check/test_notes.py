"""Notes: what follows from settings that are seldom meant. They refuse nothing, and a plain run has none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from prune_opd.check.notes import check_notes
from prune_opd.check.run import check_train
from prune_opd.check.template import rendered_prompt
from prune_opd.config import DataConfig, TrainConfig
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import list_recipes, load_recipe
from tests.fake_models import train_config, write_model

CHAT = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ALWAYS_THINKS = CHAT.replace(
    "{% if enable_thinking is defined and not enable_thinking %}<think>", "{% if true %}<think>"
)
REWRITTEN = CHAT.replace("{%- for m in messages %}", "{# the same prompts #}{%- for m in messages %}")


@pytest.fixture
def pair(tmp_path: Path) -> TrainConfig:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"problem": "1 + 1?", "answer": "2"}) + "\n", encoding="utf-8")
    config = train_config(write_model(tmp_path / "student"), write_model(tmp_path / "teacher"))
    return apply_overrides(config, [f"data.source={rows}", "evaluation.problems=0", "gate.k=4"])


def notes(config: TrainConfig, *overrides: str) -> list[str]:
    return check_notes(apply_overrides(config, list(overrides)))


def only(found: list[str]) -> str:
    assert len(found) == 1, found
    assert found[0].startswith("note: ") and "\n" not in found[0]
    return found[0]


def give_template(directory: str, template: str, as_file: bool = False) -> None:
    if as_file:
        (Path(directory) / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        (Path(directory) / "tokenizer_config.json").write_text(
            json.dumps({"chat_template": template}), encoding="utf-8"
        )


def test_a_note_on_one_of_several_teachers_has_its_setting(pair: TrainConfig) -> None:
    path = f"teachers.twin.sources=[{pair.data.source}]"
    assert only(notes(pair, "teacher=", "teachers.twin.path=student", path)).startswith(
        "note: teachers.twin.path = student with data.teacher_prompt = null"
    )


def test_a_plain_run_has_no_notes(pair: TrainConfig) -> None:
    assert notes(pair) == []
    assert notes(pair, "rollout.temperature=0.7", "objective.temperature=0.7") == []
    assert notes(pair, "rollout.top_p=0.9") == [], "the objective looks at no sample"


def test_temperatures_apart(pair: TrainConfig) -> None:
    line = only(notes(pair, "rollout.temperature=0.7"))
    assert "rollout.temperature = 0.7 and objective.temperature = 1: the loss is of another policy" in line
    line = only(notes(pair, "objective.temperature=0.6", "objective.name=sampled_token"))
    assert "its estimate of the KL is biased" in line and "set both alike" in line


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["objective.name=sampled_token"], "objective.name = sampled_token"),
        (["rollout.oversample=1.5", "rollout.partial=true"], "rollout.partial = true"),
        (["optimizer.updates_per_batch=2"], "optimizer.updates_per_batch > 1"),
    ],
)
def test_a_nucleus_with_samples_or_ratios(pair: TrainConfig, overrides: list[str], named: str) -> None:
    line = only(notes(pair, "rollout.top_p=0.9", *overrides))
    assert f"rollout.top_p = 0.9 with {named}" in line and "set rollout.top_p=1" in line
    assert notes(pair, *overrides) == []


@pytest.mark.parametrize(
    ("overrides", "follows"),
    [
        (["objective.k=1"], "no other token is seen"),
        (["objective.k=1", "objective.name=topk_forward_kl"], "supervised training on its greedy choice"),
        (["gate.k=1"], "overlap is 0 or 1"),
        (["weighting.name=entropy_aware", "weighting.forward_k=1"], "where it is least sure"),
    ],
)
def test_one_candidate(pair: TrainConfig, overrides: list[str], follows: str) -> None:
    assert follows in only(notes(pair, *overrides))


def test_one_candidate_on_which_nothing_can_be_learnt_is_refused(pair: TrainConfig) -> None:
    config = apply_overrides(pair, ["objective.name=local_support_matching", "objective.k=1"])
    (line,) = check_train(config, 2, None, "auto")
    assert "loss and gradient are always 0; set objective.k=32" in line


# ---------------------------------------------------------------------------------------------------- templates


def test_equal_templates_and_equal_prompts_are_no_news(pair: TrainConfig) -> None:
    give_template(pair.student, CHAT)
    give_template(pair.teacher, CHAT, as_file=True)
    assert notes(pair) == []
    give_template(pair.teacher, REWRITTEN, as_file=True)
    assert notes(pair) == []


def test_another_template_is_named_with_where_a_prompt_differs(pair: TrainConfig) -> None:
    give_template(pair.student, CHAT)
    give_template(pair.teacher, CHAT.replace("im_start", "begin"))
    line = only(notes(pair))
    assert f"teacher = {pair.teacher!r} has another chat template" in line
    assert "'<|im_start|>user" in line and "'<|begin|>user" in line and "teacher_logp" in line


def test_another_thinking_mode_is_named(pair: TrainConfig) -> None:
    give_template(pair.student, CHAT)
    give_template(pair.teacher, ALWAYS_THINKS)
    assert "assistant\\n<think>" in only(notes(pair))
    line = only(notes(pair, "data.thinking=false"))
    assert "its chat template has no thinking switch and data.thinking = false" in line, "the prompts are equal then"


@pytest.mark.parametrize(("has", "lacks"), [("student", "teacher"), ("teacher", "student")])
def test_one_template_alone(pair: TrainConfig, has: str, lacks: str) -> None:
    give_template(getattr(pair, has), CHAT)
    assert f"the {has} has a chat template and the {lacks} has none" in only(notes(pair))


def test_prompts_without_a_template_say_nothing_of_it(pair: TrainConfig, tmp_path: Path) -> None:
    give_template(pair.teacher, CHAT)
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"prompt": "1 + 1 ="}) + "\n", encoding="utf-8")
    assert notes(pair, f"data.source={plain}") == []
    assert notes(pair, "data.chat=false") == []
    assert notes(pair, "data.source=ledger") == []


def test_a_template_that_cannot_be_rendered_is_compared_as_text(pair: TrainConfig) -> None:
    give_template(pair.student, CHAT)
    give_template(pair.teacher, CHAT + "{{ raise_exception('no') }}")
    assert "has another chat template than the student: the teacher scores" in only(notes(pair))


def test_a_machine_without_jinja2_compares_the_texts(pair: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    give_template(pair.student, CHAT)
    give_template(pair.teacher, REWRITTEN)
    assert notes(pair) == []
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    assert "has another chat template than the student: the teacher scores" in only(notes(pair))


def test_prompts_are_rendered_as_transformers_does(tmp_path: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    data = DataConfig(source="x.jsonl", system_prompt="Be brief.", suffix=" Think.", thinking=False)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 3? Think."}]
    expected, _ = render_jinja_template([turns], chat_template=CHAT, add_generation_prompt=True, enable_thinking=False)
    assert rendered_prompt(tmp_path, CHAT, data) == expected[0]


# ---------------------------------------------------------------------------------------------------- commands


def test_check_prints_notes_and_still_passes(
    pair: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prune_opd.cli import runs

    monkeypatch.setattr(runs, "load_recipe", lambda recipe: pair)
    monkeypatch.setattr(runs, "check_everything", lambda *args: [])
    application = typer.Typer()
    application.command()(lambda: print(runs.check("pair", ["rollout.temperature=0.5"])))
    lines = CliRunner().invoke(application, []).stdout.splitlines()
    assert lines[0].startswith("note: rollout.temperature = 0.5") and lines[1:] == ["ok", "0"]


def test_the_recipes_of_the_repository_have_only_known_notes() -> None:
    """Those whose models are not here have no note on templates either."""
    found = {
        name: check_notes(config) for name in list_recipes() if isinstance(config := load_recipe(name), TrainConfig)
    }
    assert {name for name, lines in found.items() if lines} <= {"tiny_drift", "tiny_trap"}
    assert "gate.k = 1" in only(found["tiny_drift"])


def test_a_server_that_takes_the_directorys_number_format_is_noted() -> None:
    served = ["teacher_server.url=http://127.0.0.1:1", "objective.support=teacher", "gate.metric=overlap"]
    pair = load_recipe("tiny_compatible", served)
    assert isinstance(pair, TrainConfig)
    (line,) = (line for line in check_notes(pair) if "teacher_server.url" in line)
    assert "takes bfloat16" in line and "--dtype float32" in line
    same = load_recipe("tiny_compatible", [*served, "precision.params=bf16"])
    assert isinstance(same, TrainConfig)
    assert not [line for line in check_notes(same) if "teacher_server.url" in line]
