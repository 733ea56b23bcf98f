"""A teacher that reads other prompts than the student: its tokens are aligned, in every layout; so is its average.

Held against transformers token by token, against one process in every layout of two ranks, and the moving average
against its formula, after a resume too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.tiny_run import LENGTHS, write_pair
from tests.distributed.worker_hint import BUDGETS, HINTS, KINDS, STEPS, cases, rollouts
from tests.models import write_model

WORKER = Path(__file__).with_name("worker_hint.py")
REFERENCES = [f"{kind}: {budget}" for kind in KINDS for budget in BUDGETS]

Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_pair(folder / "dense", num_hidden_layers=4)
    write_model(folder / "untied" / "student", seed=3, tied=False)
    write_pair(folder / "moe", family="qwen3_moe")
    return folder


@pytest.fixture(scope="module")
def results(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Of each case, what every rank has got; the references are the runs of one process."""
    out = tmp_path_factory.mktemp("out")
    for ranks in (1, 2):
        run_ranks(WORKER, ranks, [models, out], timeout=500)
    return {case: got for ranks in (1, 2) for case, got in json.loads((out / f"{ranks}.json").read_text()).items()}


@pytest.mark.parametrize("kind", ["plain", "hint", "student", "untied", "moe"])
def test_log_probabilities_given_the_longer_prompt_are_those_of_transformers(
    results: Results, models: Path, kind: str
) -> None:
    """Token by token; with the larger budget rows of seven different prompts are packed into one micro-batch."""
    from transformers import AutoModelForCausalLM

    pair, teacher, hinted = KINDS[kind]
    directory = models / pair / ("teacher" if teacher == "another" else "student")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    batch = rollouts(0, hinted)
    assert [len(ids) for ids in batch.teacher_prompt_ids] == [
        hint if hinted and hint else len(prompt.ids) for hint, prompt in zip(HINTS, batch.prompts, strict=True)
    ]
    for budget in BUDGETS:
        (result,) = results[f"{kind}: {budget}"]
        for prompt, response, got in zip(batch.teacher_prompt_ids, batch.response_ids, result["logprobs"], strict=True):
            with torch.no_grad():
                logits_TV = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
            ids_T = torch.tensor(response)
            expected = logits_TV.double().log_softmax(-1)[torch.arange(len(ids_T)), ids_T]
            assert got == pytest.approx(expected.tolist(), abs=1e-4)


def test_the_hint_is_what_makes_the_difference(results: Results) -> None:
    """Rows with a hint have other numbers than without one, the others the same to the digit."""
    plain, hinted = (results[f"{kind}: {BUDGETS[1]}"][0]["logprobs"] for kind in ("plain", "hint"))
    drawn = rollouts(0, False).response_ids == rollouts(0, True).response_ids
    assert drawn  # the same responses
    for row, (without, given) in enumerate(zip(plain, hinted, strict=True)):
        assert len(without) == len(given) == LENGTHS[row]
        if HINTS[row]:
            assert max(abs(a - b) for a, b in zip(without, given, strict=True)) > 1e-2
        else:
            assert given == pytest.approx(without, abs=1e-6)


@pytest.mark.parametrize("case", [case for case in [*cases(), *REFERENCES] if case.startswith("hint")])
def test_the_teacher_reads_the_hint_in_flight_too(results: Results, case: str) -> None:
    """A look at a student with a hinted teacher is a look at a student who has the hint in its own prompt."""
    (hinted, tokens), (shown, as_many), (without, fewer) = results[case][0]["looks"]
    assert hinted == shown and tokens == as_many > fewer
    assert [len(row) for row in hinted] == list(LENGTHS)
    assert [a != b for a, b in zip(hinted, without, strict=True)].count(True) >= 2
    assert 0 < sum(map(sum, hinted)) < sum(LENGTHS)
    assert hinted == results[f"hint: {BUDGETS[0]}"][0]["looks"][0][0]


@pytest.mark.parametrize("case", [*cases(), *(f"{kind}: {BUDGETS[1]}" for kind in KINDS)])
def test_two_steps_equal_those_of_one_process(results: Results, case: str) -> None:
    (reference,) = results[f"{case.partition(':')[0]}: {BUDGETS[0]}"]
    for rank in results[case]:
        for got, expected in zip(rank["logprobs"], reference["logprobs"], strict=True):
            assert got == pytest.approx(expected, abs=1e-5)
        for got, expected in zip(rank["steps"], reference["steps"], strict=True):
            for name in ("loss", "grad_norm"):
                assert got[name] == pytest.approx(expected[name], rel=2e-5), name
            assert got["weight_norm"] == pytest.approx(expected["weight_norm"], rel=1e-6)
            assert got["sampled_tokens"] == pytest.approx(expected["sampled_tokens"], rel=2e-5, abs=2e-5)
            for name in ("event_rate", "reliable_length_B", "horizon", "tokens"):
                assert got[name] == expected[name], name


@pytest.mark.parametrize(
    "case", [case for case in [*cases(), *REFERENCES] if KINDS[case.partition(":")[0]][1] == "ema"]
)
def test_the_average_is_its_formulas_on_every_rank_and_a_resume_has_it_bit_for_bit(results: Results, case: str) -> None:
    for rank in results[case]:
        assert rank["mean"] <= 1e-6 and rank["moved"] > 1e-3
        assert rank["resumed"]
    layouts = case.partition(": ")[2].split(" | ")
    if len(layouts) == 2:  # both ways there are, of shards and of whole tensors
        same = layouts[0] == layouts[1] or layouts in (["DP2", "TP1"], ["CP2", "TP1"])
        assert all(rank["alike"] == same for rank in results[case])


def test_a_frozen_student_stays_as_it_began(results: Results) -> None:
    for case in (f"student: {BUDGETS[0]}", "student: PP2 | TP2"):
        assert [rank["moved"] for rank in results[case]] == [0.0] * len(results[case])


@pytest.mark.parametrize("reference", REFERENCES)
def test_the_comparison_has_something_to_compare(results: Results, reference: str) -> None:
    (result,) = results[reference]
    assert len(result["steps"]) == STEPS and len({step["weight_norm"] for step in result["steps"]}) == STEPS
    assert all(0 < step["event_rate"] < 1 and step["loss"] != 0 for step in result["steps"])
    several = reference.endswith(str(BUDGETS[0]))
    assert all((step["microbatches"] > 1) == several for step in result["steps"])
