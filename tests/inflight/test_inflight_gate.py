"""The in-flight gate's settings and its arithmetic: looks, refusals, and events that no rounding decides."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prune_opd.config import (
    GateConfig,
    HorizonConfig,
    InflightConfig,
    ObjectiveConfig,
    RolloutConfig,
    WeightingConfig,
)
from prune_opd.config.rollout import MARGIN
from prune_opd.data.prompt import Prompt
from prune_opd.errors import ConfigError
from prune_opd.inflight.certain_events import certain_overlap_events, certain_rejects, greatest_acceptance, one_end
from prune_opd.inflight.gate import is_spent
from prune_opd.loss.ends import fold_
from prune_opd.loss.vocab_parallel import VocabShard
from prune_opd.method.gate import overlap_events, overlap_ratio, top_p_reject
from prune_opd.rollout.batch import Response, Rollouts
from tests.fake_models import train_config

GATE = GateConfig(k=4, threshold=0.5, w_drop=0.2, w_base=0.0)
ON = InflightConfig(mode="gate", first_check=16)


def test_looks_are_geometric_or_regular_and_never_the_last_token() -> None:
    assert ON.looks(128) == (16, 32, 64)
    assert ON.looks(129) == (16, 32, 64, 128)
    assert ON.looks(16) == ()
    assert replace(ON, schedule="fixed", chunk=10).looks(50) == (16, 26, 36, 46)
    assert replace(ON, min_keep=20).looks(128) == (32, 64)


@pytest.mark.parametrize("length", (17, 100, 1000, 12288))
def test_geometric_looks_add_up_to_less_than_two_passes(length: int) -> None:
    assert sum(ON.looks(length)) < 2 * length


@pytest.mark.parametrize(
    ("changes", "inflight", "named"),
    [
        ({"gate": None, "horizon": HorizonConfig(strategy="full", max_len=256, min_len=32)}, ON, "gate = null"),
        ({"gate": replace(GATE, w_drop=0.0)}, ON, "gate.w_drop = 0"),
        ({"gate": replace(GATE, threshold=0.0)}, ON, "gate.threshold = 0"),
        ({}, replace(ON, first_check=256), "rollout.inflight.first_check = 256"),
        ({"gate": replace(GATE, w_drop=0.001)}, ON, "needs 1000 events"),
        ({}, replace(ON, stop_events=500), "needs 500 events"),
        ({}, replace(ON, stop_events=3, price=0.1), "rollout.inflight.price = 0.1 with"),
        ({"gate": replace(GATE, weight_normalisation="mean")}, ON, "gate.weight_normalisation = mean"),
        ({"weighting": WeightingConfig(name="tip")}, ON, "weighting.name = tip"),
        ({"objective": ObjectiveConfig("sampled_token", discount=0.9)}, ON, "objective.discount = 0.9"),
        ({"gate": replace(GATE, metric="acceptance")}, ON, "gate.metric = acceptance"),
        (
            {"gate": replace(GATE, metric="change_point"), "objective": ObjectiveConfig(temperature=0.7)},
            ON,
            "objective.temperature = 0.7",
        ),
        (
            {"gate": replace(GATE, metric="change_point"), "objective": ObjectiveConfig(k=4, ends="class")},
            ON,
            "objective.ends = class",
        ),
        ({"gate": replace(GATE, memory=False)}, ON, "gate.memory = false"),
        ({"gate": replace(GATE, metric="kl_agreement", threshold=0.0)}, ON, "gate.threshold = 0"),
        (
            {"gate": replace(GATE, metric="kl_agreement"), "objective": ObjectiveConfig(temperature=0.7)},
            ON,
            "gate.metric = kl_agreement and objective.temperature = 0.7",
        ),
    ],
)
def test_settings_that_could_never_stop_anything_are_refused(
    changes: dict[str, Any], inflight: InflightConfig, named: str
) -> None:
    here = Path(".")
    settings: dict[str, Any] = {"gate": GATE, **changes}
    train_config(here, here, **settings)  # without the in-flight gate it is fine
    with pytest.raises(ConfigError, match=r"rollout\.inflight") as error:
        train_config(here, here, **settings, rollout=RolloutConfig(prompts=4, max_prompt_len=64, inflight=inflight))
    assert named in str(error.value)


@pytest.mark.parametrize(("field", "value"), [("mode", "on"), ("schedule", "log"), ("first_check", 0), ("margin", -1)])
def test_values_that_do_not_exist_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"rollout.inflight.{field}"):
        InflightConfig(**{field: value})


def test_a_response_is_spent_when_its_reliability_is_0_or_its_budget_is() -> None:
    four, five = [True] * 4 + [False] * 9, [True, False] * 5
    assert not is_spent(four, GATE, ON) and is_spent(five, GATE, ON)
    assert is_spent(four, GATE, replace(ON, stop_events=4)) and not is_spent(four, GATE, replace(ON, stop_events=5))


# ---------------------------------------------------------------------------------------------------- certain events


def scores(seed: int, n: int = 400, vocab: int = 40) -> torch.Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)


def top(logp_NV: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, ids = logp_NV.topk(width, dim=-1)
    return ids, values


def overlap_pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    student = scores(seed)
    return student, (student + 0.6 * scores(seed + 100)).log_softmax(-1)


def plain_events(student: torch.Tensor, teacher: torch.Tensor, k: int = 4) -> torch.Tensor:
    return overlap_events(overlap_ratio(top(student, k)[0], top(teacher, k)[0]), k, 0.75)


def certain(student: torch.Tensor, teacher: torch.Tensor, margin: float, k: int = 4) -> torch.Tensor:
    return certain_overlap_events(*top(student, 2 * k), *top(teacher, 2 * k), k, 0.75, margin, student.shape[1])


def test_without_close_calls_the_events_are_those_of_the_gate() -> None:
    student, teacher = overlap_pair(1)
    events = plain_events(student, teacher)
    assert events.any() and not events.all()
    assert torch.equal(certain(student, teacher, 1e-6), events)


def test_no_error_within_the_margin_makes_a_certain_event_none() -> None:
    student, teacher = overlap_pair(2)
    margin, lost = 0.2, 0
    events = certain(student, teacher, margin)
    for seed in range(50):
        draw = torch.Generator().manual_seed(seed)
        off = [margin / 2 * (2 * torch.rand(student.shape, generator=draw) - 1) for _ in range(2)]
        other = plain_events(student + off[0], teacher + off[1])
        assert not (events & ~other).any()
        lost += int((plain_events(student, teacher) & ~other).sum())
    assert lost > 0  # the plain gate's events do change under such errors
    assert 0 < events.sum() < plain_events(student, teacher).sum()


def test_an_engine_that_rounds_its_logits_to_bf16_makes_no_event_certain_that_is_none() -> None:
    """Up to logits of 64 the rounding, 8 bits, is half of the margin at most (docs/gpu.md, 26)."""
    student, teacher = (61 + logp for logp in overlap_pair(7))
    rounded = student.bfloat16().float()
    events, margin = plain_events(student, teacher), MARGIN["bf16"]
    assert (rounded - student).abs().max() <= margin / 2
    assert (plain_events(rounded, teacher) != events).any()  # such an engine's own top-k decides otherwise
    certain_events = certain(rounded, teacher, margin)
    assert certain_events.any() and not (certain_events & ~events).any()


def test_ties_at_the_last_place_are_undecided() -> None:
    student = torch.tensor([[5.0, 4.0, 3.0, 3.0, 1.0, 0.0]])
    teacher = torch.tensor([[5.0, 4.0, 0.0, 3.0, 1.0, -1.0]])
    k, width = 3, 6
    ids, values = top(student, width)
    event = certain_overlap_events(ids, values, *top(teacher, width), k, 0.9, 0.0, 6)
    assert not event.any()  # id 3 may be the student's third, as it is the teacher's
    event = certain_overlap_events(ids, values, *top(teacher.flip(-1), width), k, 0.9, 0.0, 6)
    assert event.all()


def test_a_rejection_stands_if_no_error_within_the_margin_lets_the_token_in() -> None:
    teacher = (2 * scores(3)).log_softmax(-1)
    sampled = torch.randint(0, 12, (len(teacher),), generator=torch.Generator().manual_seed(5))
    sampled = top(teacher, 12)[0].gather(1, sampled[:, None]).squeeze(1)
    k, p, margin = 8, 0.7, 0.1
    events = certain_rejects(sampled, *top(teacher, 16), k, p, margin)
    plain = top_p_reject(sampled, *top(teacher, k), p)
    assert 0 < events.sum() < plain.sum() and not (events & ~plain).any()
    for seed in range(50):
        draw = torch.Generator().manual_seed(seed)
        other = teacher + margin / 4 * (2 * torch.rand(teacher.shape, generator=draw) - 1)
        assert not (events & ~top_p_reject(sampled, *top(other, k), p)).any()


def test_no_error_within_the_margin_gives_a_token_more_acceptance_than_the_greatest() -> None:
    student, teacher = overlap_pair(4)
    k, margin = 4, 0.2
    ids, logp = top(student, 2 * k)
    most = greatest_acceptance(ids, logp, teacher.gather(1, ids), k, margin, student.shape[1])
    for seed in range(50):
        draw = torch.Generator().manual_seed(seed)
        off = [margin / 2 * (2 * torch.rand(student.shape, generator=draw) - 1) for _ in range(2)]
        mine, other = student + off[0], teacher + off[1]
        chosen = top(mine, k)[0]
        acceptance = torch.minimum(mine.gather(1, chosen), other.gather(1, chosen)).exp().sum(-1)
        assert (acceptance <= most + 1e-6).all()
    assert (most < 1).any()  # it does say something


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_events_stay_certain_where_ends_are_one_outcome_and_some_of_them_are_no_candidates(temperature: float) -> None:
    """Against the loss's own view: the whole vocabulary with the ends folded. k = 2 of 4 candidates hides many ends."""
    ends, k, all_found = (3, 20, 31), 2, 0
    for seed in range(6):
        student, teacher = overlap_pair(seed)
        student[:, 20] += 1.0  # an end that the student likes
        student = student.log_softmax(-1)
        folded = []
        for logp_NV in (student / temperature, teacher / temperature):
            folded.append(logp_NV.clone())
            fold_(folded[-1], logp_NV[:, list(ends)], ends, VocabShard(40, 40))
        events = plain_events(*folded, k=k)
        ids_NC, logp_NC, slack_N1 = one_end(*top(student, 2 * k), ends, temperature)
        logp_NC, order_NC = logp_NC.sort(dim=-1, descending=True, stable=True)
        teacher_ids_NC, teacher_logp_NC = top(folded[1], 2 * k)
        found = certain_overlap_events(
            ids_NC.gather(1, order_NC), logp_NC, teacher_ids_NC, teacher_logp_NC * temperature, k, 0.75, slack_N1, 40
        )
        assert not (found & ~events).any()
        all_found += int(found.sum())
    assert all_found > 50


def test_candidates_that_are_ends_become_one_with_their_mass() -> None:
    ids, logp = torch.tensor([[20, 5, 3, 7], [1, 2, 4, 6]]), torch.tensor([[0.5, 0.2, 0.1, 0.04]] * 2).log()
    ids, logp, slack = one_end(ids, logp, (3, 20), 1.0)
    assert ids.tolist() == [[3, 5, -1, 7], [1, 2, 4, 6]]
    torch.testing.assert_close(logp[0].exp(), torch.tensor([0.6, 0.2, 0.04, 0.04]))
    # No end is a candidate: together they may have twice what the last candidate has.
    torch.testing.assert_close(logp[1].exp(), torch.tensor([0.5, 0.2, 0.1, 0.08]))
    assert slack.tolist() == [[0.0], [0.0]]
    close = one_end(torch.tensor([[1, 2, 4]]), torch.tensor([[0.5, 0.15, 0.1]]).log(), (3, 20), 1.0)
    assert close[2].item() == pytest.approx(math.log(2)) and close[1][0, 2].exp().item() == pytest.approx(0.1)
    half = one_end(torch.tensor([[20, 5]]), torch.tensor([[0.5, 0.2]]).log(), (3, 20), 1.0)[2]
    assert half.item() == pytest.approx(math.log(0.7 / 0.5))  # the missing one has at most the last candidate's


def test_the_gates_of_several_teachers_count_what_each_reads_of_a_row_that_it_knows() -> None:
    from prune_opd.inflight.by_teacher import InflightGates
    from prune_opd.megatron.redistribute import KeptHidden

    def gate(row: int) -> Any:
        own = {"kept": KeptHidden({row: (0,)}), "teacher_tokens": 5, "checks": 1, "seconds": 0.5}
        return SimpleNamespace(record=lambda *_: {"pruned_inflight": 1}, **own)

    gates = InflightGates.__new__(InflightGates)  # without models
    gates.of = {"a": gate(0), "b": gate(2)}
    prompts = [Prompt(i, (1, 2), None, "x", teacher_ids=(1,) * (10 + i), teacher="aab"[i]) for i in range(3)]
    batch = Rollouts(tuple(prompts), (Response((3, 4), finished=True),) * 3)
    record = gates.record(batch, torch.zeros(3))
    assert record["teacher_tokens_reused"] == (10 + 2 - 1) + (12 + 2 - 1)
    assert (record["teacher_tokens_inflight"], record["inflight_checks"], record["pruned_inflight"]) == (10, 2, 1)
