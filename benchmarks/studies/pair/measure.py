"""The measurements of `prune-opd bench pair`: two models on the same text, token by token, with transformers.

The models are transformers', the KL sums are those of `bench judge`; top-k, overlap, events, gates and the divergence
on the top k are the product's own. Both models are in this process, whole: no layout of a recipe matters here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import answer
from benchmarks.studies.judge.measure import compare
from prune_opd.config import GateConfig, ObjectiveConfig, TrainConfig
from prune_opd.config.yaml import load_config
from prune_opd.loss.vocab_parallel import local_topk
from prune_opd.method.agreement import AgreementTrap
from prune_opd.method.calibration import Calibration, Usual
from prune_opd.method.change_point import ChangePoint
from prune_opd.method.gate import Views, apply_gate_packed, judge, overlap_events
from prune_opd.method.objective import topk_reverse_kl

Row = tuple[Sequence[int], Sequence[int]]  # prompt and response, in token ids
Columns = dict[str, Tensor]  # one value a response token, responses end to end

SAMPLED_TOGETHER = 32  # responses
READ_TOGETHER = 8192  # tokens of one forward pass, padding included
CHUNK = 512  # tokens whose logits are held at a time
SURE = 0.9  # both models give their common first choice more than this: an event here is noise of the tail
LARGE_KL = 1.0  # nats: what an event should find
THRESHOLDS = {"overlap": (0.7, 0.6, 0.5, 0.4), "acceptance": (0.5, 0.3), "kl_agreement": (0.1, 0.01, 0.001)}
MEANS = (
    *("overlap", "acceptance", "student_mass", "teacher_mass", "divergence"),
    *("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy"),
)


# ---------------------------------------------------------------------------------------------------- models


def load(directory: str | Path) -> Any:
    """A model in fp32, on the GPU if there is one. Nothing of its own sampling settings is left but the end tokens."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ends = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, eos_token_id=ends, pad_token_id=0)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def sample(model: Any, prompts: Sequence[Sequence[int]], max_len: int, seed: int) -> list[Row]:
    """A response to each prompt, from the whole vocabulary at T = 1, up to and with its end or `max_len` tokens."""
    torch.manual_seed(seed)
    given = model.generation_config.eos_token_id
    ends = set(given) if isinstance(given, list) else {given}
    rows: list[Row] = []
    for first in range(0, len(prompts), SAMPLED_TOGETHER):
        part = prompts[first : first + SAMPLED_TOGETHER]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in part])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in part])
        made = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=max_len)
        for prompt, response in zip(part, made[:, width:].tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(response) if token in ends), len(response))
            rows.append((prompt, response[:end]))
    return rows


def hidden(model: Any, rows: Sequence[Row]) -> Tensor:
    """The hidden states [N, hidden] that predict the response tokens. Padding comes last, where nothing sees it."""
    texts = [[*prompt, *response] for prompt, response in rows]
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=model.device)
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return torch.cat([s[len(p) - 1 : len(p) + len(r) - 1] for s, (p, r) in zip(states, rows, strict=True)])


# ---------------------------------------------------------------------------------------------------- token by token


def columns(
    student_NV: Tensor, teacher_NV: Tensor, sampled_N: Tensor, gate: GateConfig, objective: ObjectiveConfig
) -> Columns:
    """What the models' logits say at N tokens. Masses and divergence are on the student's top `objective.k`."""
    k = max(gate.k, objective.k)
    ours_NK, theirs_NK = (local_topk(logits_NV, k).ids_NK for logits_NV in (student_NV, teacher_NV))
    p_NV, q_NV = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    at_K = [p_NV.gather(1, ours_NK), q_NV.gather(1, ours_NK), q_NV.gather(1, theirs_NK)]
    p_NK, q_NK, theirs_at_NK = (logp_NK[:, : gate.k] for logp_NK in at_K)
    logp_2NK = torch.stack([p_NK, q_NK])
    found = judge(Views(sampled_N, ours_NK[:, : gate.k], logp_2NK, theirs_NK[:, : gate.k], theirs_at_NK), gate)
    p_NK, q_NK = (logp_NK[:, : objective.k] for logp_NK in at_K[:2])
    return {
        **compare(p_NV, q_NV, sampled_N),
        **{name: getattr(found, name) for name in ("overlap", "event", "acceptance")},
        "student_mass": p_NK.exp().sum(1),
        "teacher_mass": q_NK.exp().sum(1),
        "divergence": topk_reverse_kl(p_NK, q_NK, objective).divergence_N,
        "sure": (ours_NK[:, 0] == theirs_NK[:, 0]) & (torch.minimum(p_NK[:, 0], q_NK[:, 0]).exp() > SURE),
    }


@torch.inference_mode()
def along(
    student: Any, teacher: Any, rows: Sequence[Row], gate: GateConfig, objective: ObjectiveConfig | None = None
) -> Columns:
    """`columns` of every response token. Of two vocabularies the smaller counts: the rest is padding."""
    vocabulary = min(model.config.vocab_size for model in (student, teacher))
    together = max(1, READ_TOGETHER // max(len(prompt) + len(response) for prompt, response in rows))
    parts = []
    for first in range(0, len(rows), together):
        part = rows[first : first + together]
        ids_N = torch.tensor([token for _, response in part for token in response], device=student.device)
        states = [hidden(model, part) for model in (student, teacher)]
        for *chunks, sampled_C in zip(*(x.split(CHUNK) for x in (*states, ids_N)), strict=True):
            heads = zip((student, teacher), chunks, strict=True)
            logits = [model.get_output_embeddings()(chunk)[:, :vocabulary].float() for model, chunk in heads]
            parts.append(columns(logits[0], logits[1], sampled_C, gate, objective or ObjectiveConfig(k=gate.k)))
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in (*MEANS, "event", "sure")}


# ---------------------------------------------------------------------------------------------------- a text


def positions(lengths: Sequence[int]) -> Tensor:
    """Where in its response each token stands, from 0."""
    return torch.cat([torch.arange(length) for length in lengths])


def curves(overlap_M: Tensor, event_M: Tensor, lengths: Sequence[int], bins: int, max_len: int) -> dict[str, Any]:
    """Means by position, in `bins` of equal width over `max_len`; null where there are no tokens.

    overlap_M, event_M: one value a response token, responses end to end, `lengths` tokens each.
    """
    bin_M = (positions(lengths) * bins // max_len).clamp_max(bins - 1)
    count = torch.bincount(bin_M, minlength=bins).double()

    def means(value_M: Tensor) -> list[float | None]:
        total = torch.bincount(bin_M, weights=value_M.double(), minlength=bins)
        return [t / n if n else None for t, n in zip(total.tolist(), count.tolist(), strict=True)]

    return {"overlap": means(overlap_M), "events": means(event_M), "tokens": [int(n) for n in count.tolist()]}


def gate_row(name: str, event_N: Tensor, kl_N: Tensor, lengths: Sequence[int], gate: GateConfig) -> dict[str, Any]:
    """What a gate with these events would do: how well they find a large KL, where they begin, what is kept (R > 0)."""
    large_N = kl_N > LARGE_KL
    reliable = apply_gate_packed(event_N, [0, *accumulate(lengths)], gate).reliable_length_B
    begins = sorted(int(event.long().argmax()) for event in event_N.split(list(lengths)) if event.any())
    half = -(-len(lengths) // 2)
    return {
        "gate": name,
        "events": share(event_N),
        "precision": share(event_N & large_N, event_N),
        "recall": share(event_N & large_N, large_N),
        "responses": len(begins) / len(lengths),
        "half_by": begins[half - 1] if len(begins) >= half else None,
        "kept": int(reliable.sum()) / sum(lengths),
        "kl_kept": share(kl_N * _first(reliable, lengths), kl_N),
    }


def _first(reliable_B: Tensor, lengths: Sequence[int]) -> Tensor:
    """Which tokens are among the first ones of their response that are reliable, 0 or 1."""
    return positions(lengths) < reliable_B.repeat_interleave(torch.tensor(list(lengths)))


def share(part_N: Tensor, whole_N: Tensor | None = None) -> float | None:
    """Sum of one over that of the other; the mean without another; None of nothing."""
    whole = len(part_N) if whole_N is None else float(whole_N.sum())
    return float(part_N.double().sum()) / whole if whole else None


def usual(own: Columns, lengths: Sequence[int], gate: GateConfig) -> Usual:
    """What a gate that judges by it would take for usual after a step with these responses."""
    early_N = positions(lengths) < gate.early_tokens
    early, shared = own["acceptance"][early_N].double(), (own["overlap"][early_N] * gate.k).round().long()
    calibration = Calibration(replace(gate, metric="change_point"))
    counts = torch.bincount(shared, minlength=gate.k + 1).tolist()
    calibration.update([len(early), float(early.sum()), float(early.square().sum()), *counts])
    assert calibration.usual is not None
    return calibration.usual._replace(kl=float(own["reverse_kl"][early_N].double().mean()))  # KAT's


def summary(found: Columns, lengths: Sequence[int], gate: GateConfig, normal: Usual, max_len: int) -> dict[str, Any]:
    """A text's row of every table."""
    offsets = [0, *accumulate(lengths)]
    event_N, kl_N, noise_N = found["event"], found["reverse_kl"], found["event"] & found["sure"]
    width = max(16, -(-max_len // 8))
    bins = -(-max_len // width)
    gammas = sorted({*THRESHOLDS["overlap"], gate.threshold, normal.overlap} - {0}, reverse=True)
    events = {f"overlap < {at:g}": overlap_events(found["overlap"], gate.k, at) for at in gammas}
    events |= {f"acceptance < {at:g}": found["acceptance"] < at for at in THRESHOLDS["acceptance"]}
    rows = [gate_row(name, event, kl_N, lengths, gate) for name, event in events.items()]
    for at in THRESHOLDS["kl_agreement"]:
        kat = GateConfig("kl_agreement", threshold=at, low_tokens=max(1, max_len // 8), w_drop=1)
        low = AgreementTrap(offsets, kat, normal).advance(kl_N)
        rows.append(gate_row(f"kl_agreement < {at:g}", low, kl_N, lengths, kat))
    alarms = ChangePoint(offsets, replace(gate, metric="change_point"), normal).advance(found["acceptance"])
    rows.append(gate_row("change_point", alarms, kl_N, lengths, gate))
    return {
        "tokens": sum(lengths),
        **{name: share(found[name]) for name in MEANS},
        "events": share(event_N),
        "early_events": share(event_N[positions(lengths) < gate.early_tokens]),
        "by_position": {"width": width, **curves(found["overlap"], event_N, lengths, bins, bins * width)},
        "events_of_kl": share(kl_N * event_N, kl_N),
        "noise_of_events": share(noise_N, event_N),
        "noise_of_divergence": share(found["divergence"] * noise_N, found["divergence"]),
        "large_kl": share(kl_N > LARGE_KL),
        "gates": rows,
    }


def rounding(model: Any, rows: Sequence[Row], gate: GateConfig) -> dict[str, float | None]:
    """The model in bf16 as the student of itself in fp32."""
    found = along(copy.deepcopy(model).to(torch.bfloat16), model, rows, gate)
    return {"overlap": share(found["overlap"]), "events": share(found["event"]), "kl": share(found["reverse_kl"])}


def measure(recipe: str, rows: int) -> dict[str, Any]:
    """The pair of `recipe`, a resolved config file, on `rows` prompts of its data source."""
    from prune_opd.data.prompts import make_sampler
    from prune_opd.data.tokenizer import load_tokenizer

    config = load_config(Path(recipe))
    assert isinstance(config, TrainConfig) and config.gate is not None
    gate, max_len, tokenizer = config.gate, config.horizon.max_len, load_tokenizer(config.student)
    prompts = make_sampler(config.data, tokenizer, config.seed, config.rollout.max_prompt_len).next(rows)
    models = {role: load(getattr(config, role)) for role in ("student", "teacher")}
    texts = {
        role: sample(model, [prompt.ids for prompt in prompts], max_len, config.seed + number)
        for number, (role, model) in enumerate(models.items())
    }
    lengths = {role: [len(response) for _, response in text] for role, text in texts.items()}
    pair = models["student"], models["teacher"]
    found = {role: along(*pair, text, gate, config.objective) for role, text in texts.items()}
    normal = usual(found["student"], lengths["student"], gate)
    return {
        "gamma": normal.overlap,
        "usual_acceptance": {"mean": normal.mean, "deviation": normal.deviation},
        "usual_kl": normal.kl,
        "texts": {role: summary(found[role], lengths[role], gate, normal, max_len) for role in texts},
        "bf16": {role: rounding(model, texts[role], gate) for role, model in models.items()},
    }


if __name__ == "__main__":
    answer(measure)
