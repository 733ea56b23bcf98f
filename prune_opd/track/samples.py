"""`samples.jsonl`: a few responses of every `track.samples_every`-th step, token by token, as the gate saw them.

One JSON object a line, one line a response:

    step, row         the step, and the response's row of its batch
    problem, source   the prompt's place in its source
    horizon           response tokens that the step's rollouts were allowed
    prompt            the prompt as text
    teacher_prompt    what the teacher reads in its place, where that is another text: both ends of it
    tokens            the response: the text of each token; a token that completes no character has an empty one
    overlap           top-k overlap O of each token [0..1]
    weight            training weight W of each token, times that of a weighting if there is one
    divergence        the objective's divergence of each token [nats]
    events            the tokens that are drift events (B), by number from 0
    reliable_length   tokens until reliability R has reached 0 (E), or all of them
    finished          it ended by itself; if it was not stopped either, it reached the horizon
    stopped, dropped  the in-flight gate cut it off, and threw away as many tokens that came after the cut

Values are null where the loss was not finite. Secrets are masked (`redact.py`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prune_opd.config import TrackConfig
from prune_opd.track.metrics import Record, doubts, read_records, settle
from prune_opd.track.redact import redact, redact_tokens

if TYPE_CHECKING:  # the command line draws reports, and torch takes seconds
    from prune_opd.data.prompt import Prompt
    from prune_opd.loss.stats import BatchStats
    from prune_opd.rollout.batch import Rollouts

Item = TypeVar("Item")

FILE_NAME = "samples.jsonl"
_DECIMALS = 4
_SHOWN = 600  # characters of a teacher's prompt
_CONTEXT = 6  # so many tokens before a token may change its text: spaces, characters of several tokens


def sampled_rows(
    track: TrackConfig, step: int, steps: int, prompts: Sequence[Prompt], stopped: Sequence[int] = ()
) -> list[int]:
    """The rows of this step's batch to keep: drawn by the step's number, so the same ones on every rank.

    All sources have as many rows among them as whole rows allow, and up to half of the rows are `stopped` ones. Rows at
    even distances would not do: where two sources alternate, every second row is of the same one.

    prompts: of each row of the batch.
    """
    if step not in (1, steps) and step % track.samples_every:
        return []
    rows, were_stopped = list(range(len(prompts))), set(stopped)
    random.Random(step).shuffle(rows)
    chosen: list[int] = []
    while rows and len(chosen) < track.samples:
        taken = [prompts[row] for row in chosen]
        wants_stopped = 2 * len(were_stopped.intersection(chosen)) < track.samples
        ranks = [
            (
                sum(other.source == prompts[row].source for other in taken),
                (row in were_stopped) != wants_stopped,
                taken.count(prompts[row]),
            )
            for row in rows
        ]
        chosen.append(rows.pop(ranks.index(min(ranks))))
    return sorted(chosen)


def sample_records(step: int, horizon: int, rollouts: Rollouts, stats: BatchStats, tokenizer: Any) -> list[Record]:
    """The lines of the rows that `stats` has watched; `stats` must be reduced."""
    records = []
    for row, seen_4T in zip(stats.watched, stats.tokens_W4T, strict=True):
        prompt, response = rollouts.prompts[row], rollouts.responses[row]
        reliable = stats.reliable_length_B[row].item()
        seen = seen_4T[:, : len(response.ids)].tolist()
        overlap, event, weight, divergence = seen if math.isfinite(reliable) else [[math.nan] * len(response.ids)] * 4
        records.append(
            {
                "step": step,
                "row": row,
                "problem": prompt.index,
                "source": prompt.source,
                "horizon": horizon,
                "prompt": redact(_decode(tokenizer, prompt.ids)),
                **_hint(prompt, tokenizer),
                "tokens": redact_tokens(token_texts(response.ids, tokenizer)),
                "overlap": _rounded(overlap),
                "weight": _rounded(weight),
                "divergence": _rounded(divergence),
                "events": [place for place, value in enumerate(event) if value == 1],
                "reliable_length": int(reliable) if math.isfinite(reliable) else None,
                "finished": response.finished,
                "stopped": response.stopped,
                "dropped": response.dropped,
            }
        )
    return records


def read_samples(path: Path) -> list[Record]:
    """The lines of a samples file in their order, none if there is no file. What is a secret by now is masked too.

    As of the metrics, of equal responses the last one counts, and of different ones of the same row none.

    Raises:
        UserError: a line before the last is not a JSON object with a step.
    """
    lines = settle(read_records(path), _place)[0] if path.is_file() else []
    return [
        line
        | {name: redact(line[name]) for name in ("prompt", "teacher_prompt") if name in line}
        | {"tokens": redact_tokens(line["tokens"])}
        for line in lines
    ]


def sample_doubts(path: Path) -> list[str]:
    """What `metrics.doubts` says of a samples file; nothing of one that is not there."""
    return doubts(path, read_records(path), _place) if path.is_file() else []


def _place(line: Record) -> tuple[int, int | None]:
    return line["step"], line.get("row")


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text that each token adds: joined, they are the response (special tokens are shown)."""
    texts: list[str] = []
    read = 0  # tokens whose text is in `texts`
    for end in range(1, len(ids) + 1):
        first = max(0, read - _CONTEXT)
        before = _decode(tokenizer, ids[first:read])
        text = _decode(tokenizer, ids[first:end])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):  # the rest of a character is to come
            texts.append("")
            continue
        texts.append(text[len(before) :])
        read = end
    return texts


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, evenly spaced, the last one included."""
    count = min(count, len(items))
    return [items[(i + 1) * len(items) // count - 1] for i in range(count)]


def tokens_html(record: Record) -> str:
    """A response as self-contained HTML: less overlap is more orange, events are underlined, the cut is marked."""
    events, reliable = set(record["events"]), record["reliable_length"]
    parts = []
    for place, (text, overlap, weight) in enumerate(
        zip(record["tokens"], record["overlap"], record["weight"], strict=True)
    ):
        if place == reliable:
            parts.append('<b title="reliability has reached 0">✂</b>')
        style = f"background:rgba(217,130,43,{0 if overlap is None else 0.9 * (1 - overlap):.2f})"
        style += ";border-bottom:2px solid #7b4fa6" if place in events else ""
        told = f"token {place}: overlap {overlap}, weight {weight}" + (", drift event" if place in events else "")
        parts.append(f'<span style="{style}" title="{told}">{escape(text)}</span>')
    parts.append(f"<b> ■ {ending(record)}</b>")
    return f'<div style="font:13px monospace;white-space:pre-wrap">{"".join(parts)}</div>'


def ending(record: Record) -> str:
    """How a response ended, as text."""
    if record["stopped"]:
        return f"stopped in flight, {record['dropped']} tokens dropped"
    return "ended by itself" if record["finished"] else "cut by the horizon"


def _hint(prompt: Prompt, tokenizer: Any) -> Record:
    """The teacher's prompt as text, where it is another one. The middle of a long one is left out."""
    if prompt.teacher_ids in (None, prompt.ids):
        return {}
    text = redact(_decode(tokenizer, prompt.teacher_ids))
    return {"teacher_prompt": text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} […] {text[-_SHOWN // 2 :]}"}


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [round(value, _DECIMALS) if math.isfinite(value) else None for value in values]
