"""`objective.ends = class`: several terminal ids are one outcome for both models, whatever the objective."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from prune_opd.config import GateConfig, ObjectiveConfig, WeightingConfig
from prune_opd.errors import ConfigError
from prune_opd.loss.ends import NOTHING, as_outcomes, end_record, fold_, unfold_
from prune_opd.loss.stats import BatchStats
from prune_opd.loss.vocab_parallel import VocabShard
from tests.ending import AS_CLASS, CLASS, TERMINAL_IDS, ending_case
from tests.loss.checks import assert_agrees
from tests.reference import (
    GATE,
    NO_WEIGHTING,
    VOCAB,
    WEIGHTINGS,
    describe,
    make_case,
)
from tests.reference_update import reference_update

GATES = [
    GATE,
    GateConfig("teacher_top_p", k=9, w_drop=0.15, top_p=0.6),
    *(dataclasses.replace(GATE, metric=metric) for metric in ("acceptance", "shared_mass")),
    dataclasses.replace(GATE, metric="change_point", alarm=3.0),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize("objective", AS_CLASS, ids=describe)
def test_every_objective_equals_the_reference_in_the_smaller_vocabulary(
    objective: ObjectiveConfig, dtype: torch.dtype, tolerance: float
) -> None:
    assert_agrees(ending_case(), GATE, objective, dtype, tolerance, chunk=7)


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.metric)
@pytest.mark.parametrize("weighting", [NO_WEIGHTING, *WEIGHTINGS], ids=lambda weighting: weighting.name)
def test_gates_and_weightings_see_one_outcome_at_any_temperature(gate: GateConfig, weighting: WeightingConfig) -> None:
    objective = dataclasses.replace(CLASS, temperature=0.7, teacher_temperature=1.6)
    assert_agrees(ending_case(seed=1), gate, objective, weighting=weighting, chunk=8)


@pytest.mark.parametrize("objective", AS_CLASS, ids=describe)
def test_a_moved_student_is_held_against_the_policy_that_sampled(objective: ObjectiveConfig) -> None:
    case = ending_case()
    before = case.fused(objective=objective, policy="keep", chunk=7)[2]
    ours, plain = (case.moved().leaves(torch.float64) for _ in range(2))
    loss = ours.fused(objective=objective, policy=before.policy, chunk=5)[0]
    expected = reference_update(case, plain, GATE, objective, NO_WEIGHTING)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    for got, wanted in zip(ours.gradients(), plain.gradients(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


def test_stale_tokens_are_corrected_by_the_probability_of_the_id_that_was_sampled() -> None:
    case = ending_case().stale()
    assert_agrees(case, GATE, CLASS, chunk=7)
    stats = case.fused(objective=CLASS)[2]
    assert case.stale_logp is not None and stats.token_logp_N is not None and stats.stale_ratio_N is not None
    torch.testing.assert_close(stats.stale_ratio_N, (stats.token_logp_N - case.stale_logp).exp(), equal_nan=True)
    ended_N = torch.isin(case.sampled, torch.tensor(TERMINAL_IDS))
    assert (stats.token_logp_N[ended_N] < stats.sampled_logp_N[ended_N]).all()
    assert torch.equal(stats.token_logp_N[~ended_N], stats.sampled_logp_N[~ended_N])


@pytest.mark.parametrize("name", ["topk_reverse_kl", "sampled_token", "full_vocab_reverse_kl", "full_vocab_jsd"])
def test_models_that_differ_only_in_which_end_they_prefer_have_nothing_to_learn(name: str) -> None:
    """The failure itself: as they are they disagree at every end."""
    case = ending_case()
    case.teacher_hidden, case.teacher_weight = case.student_hidden, case.student_weight.clone()
    ids = list(TERMINAL_IDS)
    case.teacher_weight[ids] = case.student_weight[[*ids[1:], ids[0]]]
    slopes = {}
    for ends in ("as_is", "class"):
        leaves = case.leaves(torch.float64)
        loss, _, stats = leaves.fused(objective=ObjectiveConfig(name, k=6, ends=ends))
        loss.backward()
        slopes[ends] = max(float(gradient.abs().max()) for gradient in leaves.gradients())
        assert (stats.overlap_N == 1).all() == (ends == "class")
    assert slopes["class"] < 1e-9 < 1e-2 < slopes["as_is"]


def test_terminal_ids_alone_change_nothing_but_the_statistics() -> None:
    case = ending_case().leaves(torch.float64)
    known, (loss, _, stats) = dataclasses.replace(case, terminal_ids=()), case.fused()
    assert torch.equal(known.fused()[0], loss) and stats.ends_5M is not None
    logits_NV = case.student_hidden.detach() @ case.student_weight.detach()[:VOCAB].T
    p_NM = logits_NV.softmax(-1)[:, list(TERMINAL_IDS)]
    ended_N = torch.isin(case.sampled, torch.tensor(TERMINAL_IDS))
    torch.testing.assert_close(stats.ends_5M[0], p_NM[ended_N].sum(0))
    torch.testing.assert_close(stats.ends_5M[2], p_NM.sum(0))
    counted = [(case.sampled == i).sum().item() for i in TERMINAL_IDS]
    assert stats.ends_5M[4].tolist() == counted and sum(counted) == ended_N.sum()
    folded = case.fused(objective=CLASS)[2]
    torch.testing.assert_close(folded.ends_5M, stats.ends_5M)  # the single ids' mass, of a class too


def test_a_class_of_one_is_no_class() -> None:
    case = dataclasses.replace(ending_case(), terminal_ids=TERMINAL_IDS[:1])
    assert torch.equal(case.fused(objective=CLASS)[0], dataclasses.replace(case, terminal_ids=()).fused()[0])


def test_settings_that_cannot_be_are_refused() -> None:
    case = ending_case()
    with pytest.raises(ConfigError, match=r"objective\.ends = class without terminal_ids"):
        make_case().fused(objective=CLASS)
    for ids in ((3, VOCAB), (20, 3), (3, 3), (-1, 3)):
        with pytest.raises(ConfigError, match=r"terminal_ids = .* ascending"):
            dataclasses.replace(case, terminal_ids=ids).fused()
    most = VOCAB - len(TERMINAL_IDS) + 1
    assert_agrees(case, GATE, dataclasses.replace(CLASS, k=most))
    with pytest.raises(ConfigError, match=f"objective.k = {most + 1} is larger than vocab_size = 61 less 3 ends"):
        case.fused(objective=dataclasses.replace(CLASS, k=most + 1))


def test_fold_and_unfold_worked_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0, 8.0]]).log()
    fold_(logits, logits[:, [1, 3]].clone(), (1, 3), VocabShard(4, 4))
    assert logits.exp()[0].tolist() == pytest.approx([1, 10, 4, 0]) and logits[0, 3] == torch.tensor(NOTHING)
    gradient = torch.tensor([[0.5, 3.0, 0.25, 0.0]])
    unfold_(gradient, torch.tensor([[0.2, 0.8]]).log() - 5, (1, 3), VocabShard(4, 4))
    assert gradient[0].tolist() == pytest.approx([0.5, 0.6, 0.25, 2.4])
    assert as_outcomes(torch.tensor([0, 1, 2, 3]), (1, 3)).tolist() == [0, 1, 2, 1]


def test_the_record_has_masses_at_the_ends_and_rates_over_all_tokens() -> None:
    stats = BatchStats(5, 4, 32, torch.device("cpu"), terminal_ids=TERMINAL_IDS)
    case = ending_case()
    stats.add(range(5), case.fused()[2])
    record = stats.record()
    assert record["end_mass_student"] == pytest.approx(sum(record[f"end_mass_student_{i}"] for i in TERMINAL_IDS))
    assert sum(record[f"end_share_{i}"] for i in TERMINAL_IDS) == pytest.approx(1)
    assert 0 < record["end_rate_teacher"] < 1 and 0 < record["end_mass_teacher"] < 1
    assert not [key for key in BatchStats(5, 4, 32, torch.device("cpu")).record() if key.startswith("end_")]
    none = end_record(torch.zeros(5, 2), (3, 4), 0)
    assert none == {"end_rate_student": 0, "end_rate_teacher": 0}
