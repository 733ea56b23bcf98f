"""The rollout viewer of the report: sampled responses, each token with its overlap, its weight and its cut.

`assets/report.js` draws it from a block of JSON in the page; what the models wrote is never markup.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from prune_opd.track.metrics import Record
from prune_opd.track.report_data import RunData

_ROOM = 3_000_000  # characters of samples in one page, over its runs

_VIEWER = """<h2 id="viewer">Rollout viewer</h2>
<p class="legend">Sampled responses as the gate saw them. The stronger a token's orange, the less the two models' top-k
sets overlap there. <span class="event">Underlined</span> tokens are
drift events; <span class="cut">✂</span> is where reliability has reached 0, and what follows is pale. Keys, after a
click into the viewer: ← → step, ↑ ↓ response, e next event.{left_out}</p>
<section class="viewer" tabindex="0" aria-label="Rollout viewer">
<div class="bar">
<label>run <select data-part="run"></select></label>
<label>step <button data-part="previous" title="previous step (←)">◀</button>
<select data-part="step"></select> <button data-part="next" title="next step (→)">▶</button></label>
<label>colour <select data-part="colour"><option value="overlap">overlap</option><option value="weight">weight</option>
<option value="divergence">divergence</option></select></label>
<label>show <select data-part="ending"><option value="any">all responses</option>
<option value="stopped">stopped in flight</option><option value="horizon">cut by the horizon</option>
<option value="finished">ended by themselves</option><option value="events">with drift events</option></select></label>
<label>search <input data-part="search" type="search" placeholder="in prompt and response"></label>
<button data-part="event" title="next drift event (e)">next event</button>
</div>
<div class="responses" role="tablist" data-part="responses"></div>
<canvas data-part="strip" title="one bar a token; events below; the line is the cut"></canvas>
<p class="legend"><span data-part="low"></span><span class="scale" data-part="scale"></span>
<span data-part="high"></span></p>
<div class="text" data-part="text"></div>
<div class="detail" data-part="detail" aria-live="polite"></div>
<noscript>The viewer needs JavaScript, which this browser does not run. samples.jsonl in the run directory has the
same.</noscript>
</section>
"""


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
    return _VIEWER.format(left_out=escape(left_out)) + f'<script type="application/json" id="rollouts">{block}</script>'


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
