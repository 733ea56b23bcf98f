"""`prune-opd bench pair`: its columns against a plain computation, its rules on made-up numbers, its refusals."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.studies.pair.command import pair_config
from benchmarks.studies.pair.measure import MEANS, along, gate_row, load, summary, usual
from benchmarks.studies.pair.rules import KINDS, kind, suggestions
from benchmarks.studies.pair_check.command import QUICK, full_opd
from prune_opd.config import GateConfig, ObjectiveConfig
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.paths import shipped_models_dir
from prune_opd.config.recipe import load_recipe
from prune_opd.errors import ConfigError
from tests.forked.command import run_command

STUDENT, TEACHER = (str(shipped_models_dir() / name) for name in ("student", "teacher"))
ROWS = [([5, 6, 7], [8, 9, 10, 2]), ([11, 12], [13, 40])]


def plain(student: Any, teacher: Any, k: int, objective_k: int) -> list[dict[str, float]]:
    """What stands in the tables, a token at a time and in plain Python, from whole logits of one row at a time."""
    found = []
    for prompt, response in ROWS:
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            logits = [model(ids).logits[0, len(prompt) - 1 : -1].double() for model in (student, teacher)]
        for p, q in zip(*(x.softmax(-1).tolist() for x in logits), strict=True):
            best = [sorted(range(len(x)), key=lambda v, x=x: -x[v]) for x in (p, q)]
            overlap = len({*best[0][:k]} & {*best[1][:k]}) / k
            top, log = best[0][:objective_k], lambda x: float(torch.tensor(x, dtype=torch.double).log())
            mass = sum(p[v] for v in top)
            found.append(
                {
                    "overlap": overlap,
                    "event": overlap < 0.7,
                    "acceptance": sum(min(p[v], q[v]) for v in best[0][:k]),
                    "student_mass": mass,
                    "teacher_mass": sum(q[v] for v in top),
                    "divergence": sum(p[v] / mass * (log(p[v]) - log(q[v])) for v in top),
                    "reverse_kl": sum(a * (log(a) - log(b)) for a, b in zip(p, q, strict=True)),
                    "forward_kl": sum(b * (log(b) - log(a)) for a, b in zip(p, q, strict=True)),
                    "student_entropy": -sum(a * log(a) for a in p),
                    "teacher_entropy": -sum(b * log(b) for b in q),
                    "sure": best[0][0] == best[1][0] and p[best[0][0]] > 0.9 and q[best[0][0]] > 0.9,
                }
            )
    return found


def test_columns_of_padded_rows_are_those_of_a_plain_computation() -> None:
    student, teacher = load(STUDENT), load(TEACHER)
    found = along(student, teacher, ROWS, GateConfig(k=5), ObjectiveConfig(k=3))
    expected = plain(student, teacher, 5, 3)
    assert {row["event"] for row in expected} == {True, False}
    for name, column in found.items():
        assert column.tolist() == pytest.approx([row[name] for row in expected], abs=2e-5), name


def test_a_gate_row_says_what_its_events_find_and_keep() -> None:
    event, kl = torch.tensor([0, 1, 1, 0, 0]).bool(), torch.tensor([2.0, 2.0, 0.5, 0.0, 0.0])
    row = gate_row("g", event, kl, [4, 1], GateConfig(w_drop=0.5))  # R is 0 at a second event
    assert (row["events"], row["precision"], row["recall"], row["kept"]) == (0.4, 0.5, 0.5, 3 / 5)
    assert row["kl_kept"] == 4.0 / 4.5  # of the first two tokens of the first response, and all of the second
    assert (row["responses"], row["half_by"]) == (0.5, 1)


def test_a_fall_of_acceptance_is_an_alarm_where_it_begins_and_the_early_tokens_set_what_is_usual() -> None:
    lengths, falls = [64, 64], torch.tensor([0.9] * 40 + [0.1] * 24)
    found = {name: torch.zeros(128) for name in MEANS} | {"acceptance": torch.cat([falls, torch.full((64,), 0.9)])}
    found |= {name: torch.zeros(128, dtype=torch.bool) for name in ("event", "sure")}
    gate = GateConfig(k=4)
    normal = usual(found, lengths, gate)
    assert normal.mean == pytest.approx(0.9)
    text = summary(found, lengths, gate, normal._replace(overlap=0.25, kl=1.0), max_len=64)
    alarm = {row["gate"]: row for row in text["gates"]}["change_point"]
    assert (alarm["responses"], alarm["half_by"]) == (0.5, 43)  # 2.5 a token: 8 is reached by the fourth
    (kat,) = (row for row in text["gates"] if row["gate"] == "kl_agreement < 0.01")
    assert (kat["responses"], kat["half_by"], kat["kept"]) == (1, 7, 14 / 128)  # no KL at all: from the eighth token on
    assert text["by_position"]["width"] == 16 and text["by_position"]["tokens"] == [32] * 4


# ---------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in the words that the ledger's tokenizer has."""
    words = [
        word for word in json.loads(Path(STUDENT, "tokenizer.json").read_text())["model"]["vocab"] if word.isalpha()
    ]
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": " ".join(words[i : i + 4])}) + "\n" for i in range(6)))
    return file


def test_a_model_and_itself_agree_everywhere_and_the_command_says_so(prompts: Path, tmp_path: Path) -> None:
    room = "rollout.max_prompt_len=96"
    done = run_command("bench", "pair", STUDENT, STUDENT, room, "--prompts", prompts, "--quick", folder=tmp_path)
    assert done.code == 0, done.stderr
    result = json.loads((tmp_path / "bench" / "pair.json").read_text())
    for text in result["texts"].values():
        assert (text["overlap"], text["events"], text["reverse_kl"], text["forward_kl"]) == (1, 0, 0, 0)
        assert sum(text["by_position"]["tokens"]) == text["tokens"] > 4
        assert not any(gate["events"] for gate in text["gates"] if gate["gate"].startswith("overlap"))
    assert result["gamma"] == 1
    assert all(0 < model["kl"] < 0.1 for model in result["bf16"].values())
    assert "gate.metric=overlap gate.threshold=0.7 gate.k=16" in done.stdout


def refusal(*words: str, prompts: Path | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        pair_config(["rollout.max_prompt_len=96", *words], prompts, 32, None, 0)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_measured_is_refused_in_one_line(prompts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(TEACHER, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {word + "x": i for word, i in tokenizer["model"]["vocab"].items()}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "another tokenizer than the student" in refusal(STUDENT, str(other), prompts=prompts)
    assert "there is no such file" in refusal(STUDENT, TEACHER, prompts=tmp_path / "none.jsonl")
    assert "there is no such directory" in refusal(STUDENT, "nowhere", prompts=prompts)
    assert "--prompts is not set" in refusal(STUDENT, TEACHER)
    assert "tiny_student" in refusal("tiny_student")


def test_what_is_no_pair_that_reads_the_same_text_is_refused() -> None:
    assert "teachers = ledger, sorting: a pair has one" in refusal("tiny_two_teachers")
    assert "teacher = student: the student is its own" in refusal("tiny_hint")
    hint = "data.teacher_prompt={prompt} {solution}"
    assert "would not have its hint" in refusal("tiny_hint", f"teacher={TEACHER}", hint)
    with pytest.raises(ConfigError, match="teacher = student"):
        full_opd("tiny_hint", QUICK)


def test_a_broken_prompt_is_named_without_a_traceback(tmp_path: Path) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text('{"question": ""}\n')
    names = ("bench", "pair", STUDENT, TEACHER, "rollout.max_prompt_len=96", "--prompts", file, "--quick")
    done = run_command(*names, folder=tmp_path)
    assert done.code == 1 and "broken.jsonl:1" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------- recipes


def recipe(folder: Path, change: str) -> Path:
    """tiny_compatible with one part changed."""
    path = folder / "changed.py"
    path.write_text(
        "from dataclasses import replace\n"
        "from prune_opd.config import DataConfig, ParallelConfig\n"
        "from prune_opd.recipes.tiny_compatible import tiny_compatible\n"
        f"def changed():\n    return replace(tiny_compatible(), {change})\n"
    )
    return path


def test_a_recipes_layout_is_of_no_matter(tmp_path: Path) -> None:
    path = recipe(tmp_path, "parallel=ParallelConfig(nproc=4, pipeline=2, tensor=2)")
    config = pair_config([str(path), "gate.threshold=0.6"], None, None, None, 7)
    assert config.gate is not None and (config.gate.k, config.gate.threshold) == (4, 0.6)
    assert (config.horizon.max_len, config.data.source, config.seed) == (216, "ledger", 7)
    for one in (config, full_opd(str(path), QUICK)):
        assert (one.parallel.nproc, one.parallel.tensor, one.parallel.pipeline) == (1, 1, 1)


@pytest.mark.parametrize(
    "data", ["source='p.jsonl'", "mixture=('p.jsonl', 'q.jsonl')", "mixture=('ledger', 'p.jsonl')"]
)
def test_pair_check_names_the_command_for_other_pairs(data: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*`prune-opd bench pair`[^\n]*$"):
        full_opd(str(recipe(tmp_path, f"data=DataConfig({data})")), QUICK)


# ---------------------------------------------------------------------------------------------------- the rules


def result(**changes: Any) -> dict[str, Any]:
    """A healthy pair's numbers, some changed: `own_…` of the student's text, `false_…`, `drift_…` of gates, `bf16_…`"""
    gate = {"responses": 0.0, "half_by": None, "kept": 1.0}
    own: dict[str, Any] = {"early_events": 0.1, "noise_of_events": 0.1, "student_mass": 0.99, "gates": [gate]}
    own |= {"tokens": 100, "by_position": {"overlap": [0.8, 0.95, None]}}
    given, bf16 = copy.deepcopy(own), {"events": 0.0, "kl": 1e-4}
    parts: dict[str, Any] = {"own": own, "false": given["gates"][0], "drift": gate, "bf16": bf16}
    for name, value in changes.items():
        part, _, key = name.partition("_")
        parts[part][key] = value
    return {"texts": {"student": own, "teacher": given}, "bf16": {"teacher": bf16}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "gate.metric=overlap gate.threshold=0.7 gate.k=16 precision.params=bf16"),
        ({"own_early_events": 0.31}, "gate.metric=change_point gate.k=16 precision.params=bf16"),
        ({"own_noise_of_events": 0.51}, "gate.metric=change_point gate.k=16 precision.params=bf16"),
        ({"own_student_mass": 0.9}, "objective.name=full_vocab_reverse_kl"),
        ({"drift_responses": 0.5, "drift_half_by": 40}, "horizon.init_len=40"),
        ({"bf16_events": 0.002}, "precision.params=fp32"),
        ({"bf16_kl": 0.02}, "precision.params=fp32"),
    ],
)
def test_settings_follow_from_the_numbers_and_a_recipe_takes_them(changes: dict[str, Any], expected: str) -> None:
    overrides = [word for one in suggestions(result(**changes), 16, 16, 0.7) for word in one.overrides]
    assert expected in " ".join(overrides)
    apply_overrides(load_recipe("tiny_compatible"), overrides)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "compatible"),
        ({"own_early_events": 0.31, "drift_responses": 0.9}, "far"),
        ({"drift_responses": 0.5}, "drift"),
        ({"own_tokens": 126}, "trap"),
        ({"own_tokens": 126, "own_by_position": {"overlap": [0.95, 0.8, None]}}, "compatible"),
    ],
)
def test_the_kind_of_a_pair_follows_from_its_numbers(changes: dict[str, Any], expected: str) -> None:
    found = result(**changes)
    assert kind(found) == expected
    assert KINDS[expected] in suggestions(found, 16, 16, 0.7)[-1].why


@pytest.mark.parametrize(("early", "false", "warned"), [(0.9, 0.2, True), (0.9, 0.05, False), (0.1, 0.2, False)])
def test_a_warning_where_the_gate_stops_the_teachers_own_text(early: float, false: float, warned: bool) -> None:
    found = suggestions(result(own_early_events=early, false_responses=false), 16, 16, 0.7)
    assert any(one.why.startswith("warning") for one in found) == warned
