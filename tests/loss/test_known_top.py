"""A teacher that is known at its best ids only gives the loss of the whole one, where no more of it is asked for."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from prune_opd.config import GateConfig, ObjectiveConfig, WeightingConfig
from prune_opd.loss import GateStats, KnownTop
from prune_opd.loss.known_top import KnownTopHead
from prune_opd.loss.vocab_parallel import topk
from tests.loss.checks import assert_agrees
from tests.loss.known_cases import GATES, SERVED_GATES, SERVED_OBJECTIVES, SERVED_WEIGHTINGS, K, KnownCase, served
from tests.reference import GATE, NO_WEIGHTING, OBJECTIVES, VOCAB, WEIGHTINGS, Case, describe, make_case
from tests.sharp import sharp_case

UNKNOWN = ("reverse_kl_N", "teacher_entropy_N", "teacher_mass_N", "acceptance_N")
TEACHERS = ObjectiveConfig(k=6, support="teacher")


def agrees(
    gate: GateConfig | None,
    objective: ObjectiveConfig,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-9,
    weighting: WeightingConfig = NO_WEIGHTING,
    case: KnownCase | None = None,
) -> GateStats:
    """Value, gradients and statistics against the plain reference, which has the whole teacher; then what is unknown.

    The check of the statistics that have no part in the loss is that they say so.
    """
    case = case or KnownCase.of(make_case())
    stats: GateStats | None = None

    class Ours(KnownCase):
        def reference(self, *settings):  # type: ignore[no-untyped-def]
            found = super().reference(*settings)
            return found._replace(outside={k: v for k, v in found.outside.items() if k not in UNKNOWN})

    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    stats = assert_agrees(Ours(**fields), gate, objective, dtype, tolerance, weighting, chunk=7)
    assert all(getattr(stats, name).isnan().all() for name in UNKNOWN)
    return stats


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize("objective", SERVED_OBJECTIVES, ids=describe)
def test_every_objective_that_is_let_pass_equals_the_reference(
    objective: ObjectiveConfig, dtype: torch.dtype, tolerance: float
) -> None:
    agrees(GATE, objective, dtype, tolerance)


@pytest.mark.parametrize("gate", SERVED_GATES, ids=str)
def test_every_gate_that_is_let_pass_equals_the_reference(gate: GateConfig | None) -> None:
    agrees(gate, TEACHERS)
    agrees(gate, ObjectiveConfig("sampled_token", k=6, discount=0.9))


@pytest.mark.parametrize("weighting", SERVED_WEIGHTINGS, ids=lambda weighting: weighting.name)
def test_every_weighting_that_is_let_pass_equals_the_reference(weighting: WeightingConfig) -> None:
    agrees(GATE, TEACHERS, weighting=weighting)
    agrees(GATE, TEACHERS, torch.float32, 2e-5, weighting)


def test_the_students_temperature_may_be_its_own() -> None:
    for name in ("topk_forward_kl", "sampled_token", "priced_reverse_kl"):
        agrees(GATE, ObjectiveConfig(name, k=6, temperature=0.7, teacher_temperature=1.0))


def test_a_reward_stale_tokens_and_an_engines_mismatch_go_with_it() -> None:
    agrees(GATE, TEACHERS, case=KnownCase.of(make_case().rewarded()))
    agrees(GATE, TEACHERS, case=KnownCase.of(make_case().stale()))
    agrees(GATE, dataclasses.replace(TEACHERS, mismatch="truncated"), case=KnownCase.of(make_case().mismatched()))


def test_what_is_let_pass_is_all_that_comes_out_right() -> None:
    """The refusals are no longer than they must be, and no shorter."""
    for objective in OBJECTIVES:
        assert right(GATE, objective) == (objective in SERVED_OBJECTIVES), describe(objective)
    for gate in GATES:
        assert right(gate, TEACHERS) == (gate in SERVED_GATES), gate
    for weighting in WEIGHTINGS:
        assert right(GATE, TEACHERS, weighting) == (weighting in SERVED_WEIGHTINGS), weighting


def right(gate: GateConfig | None, objective: ObjectiveConfig, weighting: WeightingConfig = NO_WEIGHTING) -> bool:
    """On several cases: a wrong event may by chance be none."""
    return all(right_once(make_case((30,), seed), gate, objective, weighting) for seed in range(4))


def right_once(case: Case, gate: GateConfig | None, objective: ObjectiveConfig, weighting: WeightingConfig) -> bool:
    """With as few ids as the settings could do with."""
    needed = [objective.k * (2 if objective.tail == "bucket" else 1), gate.k if gate else 1]
    k = max(*needed, weighting.forward_k if weighting.name == "tropd" else 1)
    ours, whole = KnownCase.of(case, k).leaves(torch.float64), case.leaves(torch.float64)
    losses = [case.fused(gate, objective, weighting, chunk=7)[0] for case in (ours, whole)]
    for loss in losses:
        loss.backward()
    pairs = zip([losses[0], *ours.gradients()], [losses[1], *whole.gradients()], strict=True)
    return all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in pairs)


def test_every_id_may_be_known() -> None:
    agrees(GATE, TEACHERS, case=KnownCase.of(make_case(), VOCAB))


def test_more_ids_than_the_loss_needs_change_nothing() -> None:
    for k in (K, 20, VOCAB - 1):
        agrees(GATE, dataclasses.replace(TEACHERS, tail="bucket"), case=KnownCase.of(make_case(), k))


def test_ids_that_the_student_has_not_are_no_candidates() -> None:
    """A server's vocabulary may be padded; the mass that lies there is spread over the rest."""
    case = KnownCase.of(make_case())
    assert case.known is not None
    ids_NK, logp_NK = case.known.ids_NK.clone(), case.known.logp_NK.clone()
    ids_NK[:, -1] = torch.tensor([-1, VOCAB] * 12)
    cut = dataclasses.replace(case, known=KnownTop(ids_NK, logp_NK, case.known.sampled_logp_N))
    for objective in (TEACHERS, ObjectiveConfig("sampled_token", k=6)):
        agrees(GATE, objective, case=cut)


def test_a_teacher_that_is_sure_has_a_finite_rest() -> None:
    case = KnownCase.of(make_case())
    assert case.known is not None
    sure_NK = torch.full_like(case.known.logp_NK, -120.0)
    sure_NK[:, 0] = 0.0
    case.sampled = torch.tensor([next(i for i in range(VOCAB) if i not in ids) for ids in case.known.ids_NK.tolist()])
    known = KnownTop(case.known.ids_NK, sure_NK, torch.full_like(case.known.sampled_logp_N, -150.0))
    for name in ("topk_reverse_kl", "topk_forward_kl", "sampled_token"):
        support = {"support": "teacher", "tail": "bucket"} if name == "topk_reverse_kl" else {}
        ours = dataclasses.replace(case, known=known).leaves(torch.float32)
        loss, _, stats = ours.fused(GATE, ObjectiveConfig(name, k=6, **support), chunk=7)
        loss.backward()
        assert loss.isfinite() and all(gradient.isfinite().all() for gradient in ours.gradients())
        assert stats.teacher_logp_N.tolist() == pytest.approx([-150.0] * 24)


SHARP = [(8.0, 0.01), (20.0, 0.02), (40.0, 0.05), (40.0, 0.5)]  # deviation of logits [nats], distance of the models


@pytest.mark.parametrize(("scale", "noise"), SHARP)
@pytest.mark.parametrize("objective", SERVED_OBJECTIVES, ids=describe)
def test_sure_models_have_the_gradient_of_the_whole_teacher(
    objective: ObjectiveConfig, scale: float, noise: float
) -> None:
    """In fp32, in which 1 less the mass of the best ids is nothing but rounding."""
    assert sharp_error(objective, scale, noise, K) < 2e-4


def test_a_bucket_needs_ids_beyond_its_own() -> None:
    """Why fewer than twice objective.k are refused: the rest is then a bound, and far from the truth."""
    bucket = dataclasses.replace(TEACHERS, tail="bucket")
    assert sharp_error(bucket, 40.0, 0.5, 6) > 0.5 > 2e-4 > sharp_error(bucket, 40.0, 0.5, 12)
    assert not served(None, dataclasses.replace(bucket, k=7)) and served(None, bucket)


def sharp_error(objective: ObjectiveConfig, scale: float, noise: float, k: int) -> float:
    """Of both gradients against those with the whole teacher, in fp32, relative to their norms."""
    case = sharp_case(scale=scale, noise=noise)
    logp_NV = (case.teacher_hidden.float() @ case.teacher_weight.float().T).log_softmax(-1)
    best = logp_NV.topk(k)
    known = KnownTop(best.indices, best.values, logp_NV.gather(1, case.sampled[:, None])[:, 0])
    ours = dataclasses.replace(KnownCase.of(case, k), known=known).leaves(torch.float32)
    whole = case.leaves(torch.float32)
    for one in (ours, whole):
        one.fused(GATE, objective, chunk=16)[0].backward()
    pairs = zip(ours.gradients(), whole.gradients(), strict=True)
    return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs)


def test_an_id_beside_the_best_never_comes_before_the_least_of_them() -> None:
    """At −40 nats two numbers of fp32 are 4e-6 apart: what is left must be below the least one in that very format."""
    logp_NV = torch.full((1, VOCAB), -90.0)
    logp_NV[0, -3:] = torch.tensor([0.0, -39.0, -40.0])
    known = KnownTop(torch.arange(VOCAB - 3, VOCAB).unsqueeze(0), logp_NV[:, -3:], torch.tensor([-39.0]))
    head = KnownTopHead(known, torch.tensor([VOCAB - 2]), VOCAB, VOCAB, None)
    logits_NV = head.logits_(slice(0, 1), torch.empty(1, VOCAB))
    assert topk(logits_NV, 3, head.shard).ids_NK.tolist() == [[VOCAB - 3, VOCAB - 2, VOCAB - 1]]
    assert logits_NV[0, :-3].max() < -40


def test_numbers_that_do_not_fit_together_are_refused() -> None:
    case = KnownCase.of(make_case())
    assert case.known is not None
    ids_NK, logp_NK, sampled_N = case.known
    for known in (KnownTop(ids_NK, logp_NK[:, 1:], sampled_N), KnownTop(ids_NK, logp_NK, sampled_N[1:])):
        with pytest.raises(ValueError, match="give K ids and as many numbers for each token"):
            dataclasses.replace(case, known=known).fused()
    with pytest.raises(ValueError, match="both models must have seen the same packed response tokens"):
        dataclasses.replace(case, known=KnownTop(ids_NK[1:], logp_NK[1:], sampled_N[1:])).fused()


def test_a_number_that_is_none_is_refused() -> None:
    case = KnownCase.of(make_case())
    assert case.known is not None
    broken_NK = case.known.logp_NK.clone()
    broken_NK[3, 2] = torch.nan
    with pytest.raises(ValueError, match="teacher_hidden gives logits that are not finite"):
        dataclasses.replace(case, known=case.known._replace(logp_NK=broken_NK)).fused()
