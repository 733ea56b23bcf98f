"""docs/metrics.md, made from `METRICS`: python -m prune_opd.track.metrics_page > docs/metrics.md"""

from __future__ import annotations

import re

from prune_opd.track import samples
from prune_opd.track.metrics import METRICS

_PAGE = """# Metrics

<!-- Made by `python -m prune_opd.track.metrics_page`, and the tests hold it against that: edit the code. -->

A run writes one JSON object a line to `metrics.jsonl` in its directory: a *step record* after each optimizer step, and
an *evaluation line* with the `eval_*` keys under the number of steps that were finished by then (0 before training).
Console, wandb, TensorBoard and report only show what is in it. wandb and TensorBoard have the same names; a list has
one curve a bin there (`overlap_by_position/03`). wandb also gets `samples` (a table), `samples_by_token` (the same with
tokens in colour) and `overlap_by_position_curves` (a chart). `<task>` is the name of an evaluation task.

| name | meaning | unit |
|---|---|---|
{rows}

## samples.jsonl

{samples}
"""


def metrics_page() -> str:
    """The page as Markdown: every metric with its meaning and unit, and the fields of samples.jsonl."""
    rows = []
    for key, text in METRICS.items():
        meaning, unit = re.fullmatch(r"(.*?)(?: \[([^\]]*)\])?", text, re.DOTALL).groups("")  # type: ignore[union-attr]
        rows.append(f"| `{key}` | {meaning.replace('|', '/')} | {unit} |")
    return _PAGE.format(rows="\n".join(rows), samples=(samples.__doc__ or "").strip())


if __name__ == "__main__":
    print(metrics_page(), end="")
