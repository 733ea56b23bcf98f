"""The rollout viewer of the report: sampled responses, each token with its overlap, its weight and its cut.

`assets/viewer.html` is its frame, and `assets/report.js` draws it from a block of JSON in the page; what the models
wrote is never markup.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from prune_opd.track.metrics import Record
from prune_opd.track.report_data import RunData
from prune_opd.track.report_page import asset

_ROOM = 3_000_000  # characters of samples in one page, over its runs


def viewer(runs: Sequence[RunData]) -> str:
    """The section; empty for runs without samples. If there are too many samples, evenly spaced steps are shown."""
    runs = [run for run in runs if run.samples]
    if not runs:
        return ""
    fitting = {run.name: _fitting(run.samples, _ROOM // len(runs)) for run in runs}
    shown, taken = (sum(map(len, lists)) for lists in (fitting.values(), [run.samples for run in runs]))
    left_out = (
        f" {taken - shown} of {taken} responses are left out here; samples.jsonl has all." if shown < taken else ""
    )
    data = json.dumps([{"name": name, "samples": samples} for name, samples in fitting.items()], ensure_ascii=False)
    # Inside a script element only "</" and "<!--" mean anything to the browser, so no "<" may be left.
    block = data.replace("<", "\\u003c")
    return (
        asset("viewer.html").format(left_out=escape(left_out))
        + f'<script type="application/json" id="rollouts">{block}</script>'
    )


def _fitting(samples: Sequence[Record], room: int) -> list[Record]:
    """The samples of as many evenly spaced steps as fit into `room` characters; of one step at least."""
    steps = list(dict.fromkeys(record["step"] for record in samples))
    every = 1
    while True:
        kept = set(steps[::-every])  # from the last one back
        chosen = [record for record in samples if record["step"] in kept]
        if len(kept) == 1 or sum(len(json.dumps(record)) for record in chosen) <= room:
            return chosen
        every += 1
