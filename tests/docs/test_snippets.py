"""Code on the pages about extending works, also after it has got its name in the tables that the pages say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from prune_opd import model_spec
from prune_opd.config import GateConfig, HorizonConfig, ObjectiveConfig, method
from prune_opd.loss import Head, Method, Tokens, distill_loss
from prune_opd.method import horizon, objective
from tests.docs.pages import ROOT, python_blocks


def run(page: str) -> dict[str, Any]:
    """The blocks of a page, one after the other, as one program; what it defines."""
    names: dict[str, Any] = {"__name__": page}
    for code in python_blocks(ROOT / "docs" / page):
        exec(compile(code, page, "exec", dont_inherit=True), names)
    return names


def test_the_objective_of_the_page_goes_through_the_fused_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "topk_symmetric_chi2"
    function = run("add-objective.md")[name]
    monkeypatch.setattr(method, "OBJECTIVES", (*method.OBJECTIVES, name))
    monkeypatch.setitem(objective.DIVERGENCES, name, function)
    monkeypatch.setitem(objective._OWN_SUPPORT, name, "teacher")

    torch.manual_seed(0)
    student_hidden, student_weight, teacher_hidden, teacher_weight = (
        torch.randn(rows, 6, dtype=torch.float64) for rows in (9, 11, 9, 11)
    )
    student_hidden.requires_grad_()
    loss, count, _ = distill_loss(
        Head(student_hidden, student_weight),
        Head(teacher_hidden, teacher_weight),
        Tokens(torch.randint(11, (9,)), [0, 4, 9], vocab_size=11),
        Method(gate=None, objective=ObjectiveConfig(name=name, k=3)),
        chunk=4,
    )
    (gradient,) = torch.autograd.grad(loss, student_hidden)

    p = (student_hidden @ student_weight.T).softmax(dim=-1)
    q = (teacher_hidden @ teacher_weight.T).softmax(dim=-1)
    best = q.topk(3).indices
    p, q = p.gather(1, best), q.gather(1, best)
    expected = ((p - q) ** 2 / (p + q)).sum()
    assert count == 9
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student_hidden)[0])


def test_the_horizon_strategy_of_the_page_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = run("add-horizon.md")["MedianHorizon"]
    monkeypatch.setattr(method, "STRATEGIES", (*method.STRATEGIES, "median"))
    monkeypatch.setitem(horizon.CONTROLLERS, "median", controller)
    chosen = horizon.make_controller(HorizonConfig(strategy="median", max_len=200, min_len=20, init_len=100))
    assert type(chosen) is controller and chosen.horizon == 100


def test_the_model_family_of_the_page_has_names_for_all_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_spec, "FAMILIES", model_spec.FAMILIES)
    monkeypatch.setattr(model_spec, "DEFAULTS", copy.deepcopy(model_spec.DEFAULTS))
    assert run("add-model-family.md")["spec"].family == "mistral"


def test_the_gate_of_the_concepts_page_has_the_papers_numbers() -> None:
    gate = GateConfig()
    assert (gate.k, gate.threshold, gate.w_drop, gate.w_base) == (16, 0.7, 0.01, 0.5)
