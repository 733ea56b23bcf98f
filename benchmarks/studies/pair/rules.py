"""From the numbers of `prune-opd bench pair` to settings: every rule, in one place.

    gate        change_point (ours) where γ fires from the first tokens on, before anything can have drifted, or mostly
                where both models are sure of the same token; else overlap with γ. A warning where the change-point gate
                stops the teacher's own text
    objective   full_vocab_reverse_kl where the student's top k leave out too much mass for the published form
    horizon     M_0 at the token by which half of the responses have begun to drift, by the change-point gate
    format      fp32 where bf16 alone makes events or a KL that counts

`kind` says which of the tiny pairs the numbers are like, and docs/choosing.md what was best on those.

A recipe takes the settings as they are printed. No training run has tested the limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Rules:
    """The limits. Shares are of tokens unless they say otherwise."""

    busy: float = 0.30  # events in the student's first 16 tokens (gate.early_tokens), where nothing has drifted yet
    noise: float = 0.50  # of the events: where most are noise, their number says nothing
    false_alarms: float = 0.05  # of the teacher's own responses
    mass: float = 0.95  # of the student on its top k: with less the published objective moves mass out of it
    drifts: float = 0.50  # of the student's responses have an alarm of the change-point gate
    agrees: float = 0.90  # overlap on the student's own text in its last part: high
    longer: float = 1.25  # the student's responses beside the teacher's
    rounding: float = 1e-3  # events that bf16 alone makes
    rounding_kl: float = 0.01  # and its KL, in nats


RULES = Rules()


class Suggestion(NamedTuple):
    """Settings as one types them, or none for a remark, and why."""

    overrides: tuple[str, ...]
    why: str


def suggestions(result: dict[str, Any], k: int, objective_k: int, threshold: float) -> list[Suggestion]:
    """What `measure` found, as settings. threshold: the γ whose events it counted."""
    own, given = (result["texts"][role] for role in ("student", "teacher"))
    change, false = (text["gates"][-1] for text in (own, given))
    return [
        *_gate(own, false, k, threshold),
        _objective(own, objective_k),
        _horizon(change),
        _format(result["bf16"]),
        Suggestion((), f"the pair is {KINDS[kind(result)]}: docs/choosing.md has what was best on such a tiny pair"),
    ]


KINDS = {
    "far": "far apart from the first token on",
    "drift": "one that drifts",
    "trap": "one whose teacher goes along with lost texts",
    "compatible": "compatible",
}


def kind(result: dict[str, Any]) -> str:
    """far, drift, trap or compatible: by early events, change points, and overlap at the end of too long texts."""
    own, given = (result["texts"][role] for role in ("student", "teacher"))
    if own["early_events"] > RULES.busy:
        return "far"
    if own["gates"][-1]["responses"] >= RULES.drifts:
        return "drift"
    overlap = [value for value in own["by_position"]["overlap"] if value is not None]
    lost = own["tokens"] > RULES.longer * given["tokens"] and bool(overlap) and overlap[-1] >= RULES.agrees
    return "trap" if lost else "compatible"


def _gate(own: dict[str, Any], false: dict[str, Any], k: int, threshold: float) -> list[Suggestion]:
    early, noise = own["early_events"], own["noise_of_events"] or 0.0
    fires = f"overlap < {threshold:g} fires on {early:.0%} of a response's first tokens"
    if early > RULES.busy:
        why = f"{fires}, before anything can have drifted: a constant γ does not fit this pair"
    elif noise > RULES.noise:
        why = (
            f"both models are sure of the same token at {noise:.0%} of the events: overlap < {threshold:g} counts noise"
        )
    else:
        settings = ("gate.metric=overlap", f"gate.threshold={threshold:g}", f"gate.k={k}")
        return [Suggestion(settings, f"{fires}, and {noise:.0%} of all events are noise")]
    found = [Suggestion(("gate.metric=change_point", f"gate.k={k}"), why)]
    if false["responses"] > RULES.false_alarms:
        warning = f"warning: the change-point gate also stops {false['responses']:.0%} of the teacher's own responses"
        found.append(Suggestion((), f"{warning}, with {false['kept']:.0%} of their tokens kept: raise gate.alarm"))
    return found


def _objective(own: dict[str, Any], k: int) -> Suggestion:
    mass = own["student_mass"]
    holds = f"the student's top {k} hold {mass:.1%} of its mass"
    if mass >= RULES.mass:
        return Suggestion((), f"objective: the published form fits, {holds}")
    leak = "with the published form it would leak out of them, whatever the teacher says"
    return Suggestion(
        ("objective.name=full_vocab_reverse_kl",), f"{holds}: {leak}; objective.tail=bucket is the smaller change"
    )


def _horizon(change: dict[str, Any]) -> Suggestion:
    drift = f"{change['responses']:.0%} of the responses drift"
    if change["half_by"] is None:
        return Suggestion((), f"horizon: {drift}, fewer than half, so nothing bounds the first one")
    return Suggestion((f"horizon.init_len={max(1, change['half_by'])}",), f"{drift}, half of all by that token")


def _format(bf16: dict[str, dict[str, float]]) -> Suggestion:
    events, kl = (max(model[name] for model in bf16.values()) for name in ("events", "kl"))
    fine = events <= RULES.rounding and kl <= RULES.rounding_kl
    why = f"bf16 alone makes {events:.2%} events and a KL of {kl:.4f}, {'which is fine' if fine else 'too much'}"
    return Suggestion((f"precision.params={'bf16' if fine else 'fp32'}",), why)
