"""The outside judge: its numbers on distributions made by hand, and its padding on a small random model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.studies.judge.command import run
from benchmarks.studies.judge.measure import Text, compare, generate, log_probabilities, summary
from prune_opd.data import ledger
from prune_opd.errors import ConfigError
from tests.models import write_model


def logs(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).log()


def test_both_divergences_and_entropies_are_those_of_the_whole_vocabulary() -> None:
    found = compare(logs([0.5, 0.5]), logs([0.75, 0.25]), torch.tensor([1]))
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    forward = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    wanted = {"reverse_kl": reverse, "forward_kl": forward, "student_entropy": math.log(2), "nll": math.log(2)}
    assert {name: float(found[name]) for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert float(found["teacher_nll"]) == pytest.approx(math.log(4), rel=1e-5)


def test_top_mass_is_the_students_and_the_teachers_on_the_students_sixteen() -> None:
    student = torch.tensor([[0.06] * 16 + [0.01] * 4])
    found = compare(student.log(), student.flip(1).log(), torch.tensor([0]))
    assert float(found["student_top_mass"]) == pytest.approx(0.96)
    assert float(found["teacher_mass_there"]) == pytest.approx(0.76)


def test_a_mean_is_over_tokens_and_its_error_over_prompts() -> None:
    alike = summary({"x": torch.tensor([1.0, 3.0, 1.0, 3.0])}, [2, 2])
    apart = summary({"x": torch.tensor([1.0, 1.0, 1.0, 3.0])}, [3, 1])
    assert alike == {"tokens": 4, "x": 2.0, "x_stderr": 0.0}
    assert apart["x"] == 1.5 and apart["x_stderr"] > 0


@pytest.mark.parametrize("seed", [3, None])
def test_padding_changes_no_log_probability(tmp_path: Path, seed: int | None) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_model(tmp_path, "llama")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    texts = [ledger.Ledger().problem(5, i).prompt for i in range(3)]
    assert len({len(tokenizer(text).input_ids) for text in texts}) > 1  # there is padding
    text, made_NV = generate(model, tokenizer, texts, 6, seed)
    again_NV = log_probabilities(model, text, batch=2)
    rows = []
    for ids, mask, length in zip(text.ids, text.mask, text.lengths, strict=True):
        row = ids[mask.bool()][None]
        alone = Text(row, torch.ones_like(row), row.shape[1] - length)
        rows.append(log_probabilities(model, alone, batch=1))
    assert (again_NV - torch.cat(rows)).abs().max() < 1e-5
    assert (made_NV - torch.cat(rows)).abs().max() < 1e-5


def test_a_pair_that_was_not_made_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNE_OPD_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no config\.json: run make real-pair"):
        run([tmp_path / "student"], out=tmp_path)
