"""The measurements of `prune-opd bench judge`, with transformers and nothing of the product's training or loss."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import answer, cpu_time
from prune_opd.config.paths import cache_dir

TOP = 16


@dataclass(frozen=True)
class Text:
    """One response a prompt, left-padded prompts and right-padded responses."""

    ids: Tensor  # [rows, prompt + response]
    mask: Tensor  # the same shape: 1 where there is a token
    start: int  # the width of the prompts

    @property
    def sampled(self) -> Tensor:
        """The response tokens [N], row after row."""
        return self.ids[:, self.start :][self.mask[:, self.start :].bool()]

    @property
    def lengths(self) -> list[int]:
        """Response tokens of every row."""
        return list(self.mask[:, self.start :].sum(1).tolist())

    def part(self, first: int, count: int) -> Text:
        rows = slice(first, first + count)
        return Text(self.ids[rows], self.mask[rows], self.start)


def compare(student_NV: Tensor, teacher_NV: Tensor, sampled_N: Tensor) -> dict[str, Tensor]:
    """What is measured at each of N tokens, in nats, from log-probabilities over the vocabulary."""
    p_NV, q_NV = student_NV.exp(), teacher_NV.exp()
    difference_NV = student_NV - teacher_NV
    top = student_NV.topk(min(TOP, student_NV.shape[1])).indices
    return {
        "reverse_kl": (p_NV * difference_NV).sum(1),
        "forward_kl": -(q_NV * difference_NV).sum(1),
        "student_entropy": -(p_NV * student_NV).sum(1),
        "teacher_entropy": -(q_NV * teacher_NV).sum(1),
        "student_top_mass": p_NV.gather(1, top).sum(1),
        "teacher_mass_there": q_NV.gather(1, top).sum(1),
        "nll": -student_NV.gather(1, sampled_N[:, None])[:, 0],
        "teacher_nll": -teacher_NV.gather(1, sampled_N[:, None])[:, 0],
    }


def summary(values: dict[str, Tensor], lengths: Sequence[int]) -> dict[str, Any]:
    """Means over tokens and their standard errors over rows (`lengths` tokens each: a ratio of sums)."""
    found: dict[str, Any] = {"tokens": sum(lengths)}
    length_R = torch.tensor(lengths, dtype=torch.double)
    for name, value_N in values.items():
        total_R = torch.stack([row.double().sum() for row in value_N.split(list(lengths))])
        mean = total_R.sum() / length_R.sum()
        apart_R = (total_R - mean * length_R) / length_R.mean()
        found[name] = float(mean)
        found[f"{name}_stderr"] = float(apart_R.std() / len(lengths) ** 0.5) if len(lengths) > 1 else 0.0
    return found


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, texts: list[str], tokens: int, seed: int | None) -> tuple[Text, Tensor]:
    """One response a text, and the log-probabilities of its tokens as `log_probabilities` gives them.

    Sampled from the whole vocabulary at T = 1, or greedy without a seed.
    """
    torch.manual_seed(seed or 0)
    batch = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="left")
    end, start = tokenizer.eos_token_id, batch.input_ids.shape[1]
    how: dict[str, Any] = {"do_sample": False}
    if seed is not None:
        how = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    how |= {"pad_token_id": end, "eos_token_id": end, "output_logits": True, "return_dict_in_generate": True}
    made = model.generate(**batch, max_new_tokens=tokens, **how)
    ended = (made.sequences[:, start:] == end).long()
    before_end = (ended.cumsum(1) - ended) == 0  # the end itself is a token of the response
    text = Text(made.sequences, torch.cat([batch.attention_mask, before_end.long()], 1), start)
    return text, torch.stack(made.logits, 1)[before_end].log_softmax(-1)


@torch.inference_mode()
def log_probabilities(model: Any, text: Text, batch: int) -> Tensor:
    """Of every response token [N, vocabulary], row after row; `batch` rows at a time go through the model."""
    parts = []
    for first in range(0, len(text.ids), batch):
        part = text.part(first, batch)
        positions = (part.mask.cumsum(1) - 1).clamp_min(0)
        width = part.ids.shape[1] - part.start
        out = model(part.ids, attention_mask=part.mask, position_ids=positions, logits_to_keep=width + 1)
        parts.append(out.logits[:, :-1][part.mask[:, part.start :].bool()].log_softmax(-1))
    return torch.cat(parts)


def along(student_NV: Tensor, teacher_NV: Tensor, text: Text) -> dict[str, Any]:
    """The `summary` of `compare` over the response tokens."""
    sampled_N, lengths = text.sampled, text.lengths
    blocks = zip(*(x.split(256) for x in (student_NV, teacher_NV, sampled_N)), strict=True)  # for the memory
    parts = [compare(*block) for block in blocks]
    return summary({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, lengths)


def measure(
    models: list[str], teacher: str, files: list[str], prompts: int, tokens: int, greedy: int, batch: int, seed: int
) -> dict[str, Any]:
    from prune_opd.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(teacher)
    rows = [row for file in files for row in _rows(Path(file), prompts // len(files))]
    texts = [_prompt(tokenizer, row) for row in rows]
    start = cpu_time()
    judge = _load(teacher)
    given = _teacher_text(Path(teacher), judge, tokenizer, texts, tokens, seed)
    judge_given_NV = log_probabilities(judge, given, batch)
    shown = [i * len(texts) // greedy for i in range(greedy)]
    found: dict[str, Any] = {"prompts": len(texts), "cpu_seconds_teacher": cpu_time() - start, "models": []}
    for directory in models:
        start, begun = cpu_time(), time.monotonic()
        model = _load(directory)
        own, own_NV = generate(model, tokenizer, texts, tokens, seed + 1)
        along_own = along(own_NV, log_probabilities(judge, own, batch), own)
        along_given = along(log_probabilities(model, given, batch), judge_given_NV, given)
        best, _ = generate(model, tokenizer, [texts[i] for i in shown], tokens, None)
        ended = own.ids[:, own.start :].eq(tokenizer.eos_token_id).any(1).double().mean()
        found["models"].append(
            {
                "model": directory,
                "own": along_own,
                "given": along_given,
                "finished": float(ended),
                "greedy": [
                    {"prompt": _asked(rows[i]), "response": response}
                    for i, response in zip(shown, _responses(tokenizer, best), strict=True)
                ],
                "sampled": _responses(tokenizer, own),
                "seconds": time.monotonic() - begun,
                "cpu_seconds": cpu_time() - start,
            }
        )
        del model, own_NV
    return found


def _teacher_text(directory: Path, teacher: Any, tokenizer: Any, texts: list[str], tokens: int, seed: int) -> Text:
    """The teacher's responses. They stay in the per-user cache: the same for every student judged later."""
    weights = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(directory.glob("*.safetensors"))]
    key = hashlib.sha256(json.dumps([str(directory), weights, texts, tokens, seed]).encode()).hexdigest()[:16]
    file = cache_dir() / "judge" / f"{key}.pt"
    if file.is_file():
        kept = torch.load(file, weights_only=True)
        return Text(kept["ids"], kept["mask"], kept["start"])
    text, _ = generate(teacher, tokenizer, texts, tokens, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")  # another process may write the same
    torch.save({"ids": text.ids, "mask": text.mask, "start": text.start}, part)
    part.rename(file)
    return text


def _responses(tokenizer: Any, text: Text) -> list[str]:
    pairs = zip(text.ids[:, text.start :], text.mask[:, text.start :].bool(), strict=True)
    return [tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in pairs]


def _prompt(tokenizer: Any, row: dict[str, Any]) -> str:
    """The text that a model reads: a user's turn goes through the chat template if there is one."""
    if "prompt" in row or tokenizer.chat_template is None:
        return _asked(row)
    turns = row.get("messages") or [{"role": "user", "content": _asked(row)}]
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def _asked(row: dict[str, Any]) -> str:
    """The last turn, or the text of the first column that has one."""
    if "messages" in row:
        return str(row["messages"][-1]["content"])
    return str(next(row[name] for name in ("prompt", "problem", "question") if name in row))


def _rows(file: Path, count: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:count]]


def _load(directory: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


if __name__ == "__main__":
    answer(measure)
