"""A run read back: its settings, where its numbers come from, its metrics, and the report drawn again.

.venv/bin/python examples/read_a_run.py runs/quickstart
"""

import json
import sys
from pathlib import Path

from prune_opd import load_recipe
from prune_opd.track.metrics import meaning, read_metrics
from prune_opd.track.report import write_report

run_dir = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")

config = load_recipe(str(run_dir / "config.yaml"))
print(f"{config.name}: {config.steps} steps, k = {config.gate.k}, horizon {config.horizon.strategy}")

provenance = run_dir / "provenance.json"
if provenance.is_file():
    for start in json.loads(provenance.read_text(encoding="utf-8")):
        print(f"started {start['started']} with `{start['command']}`: {start['outcome']}")

steps, evaluations = read_metrics(run_dir / "metrics.jsonl")
for key in ("horizon", "overlap", "event_rate", "reliable_length"):
    print(f"{key:16} {steps[0][key]:8.3g} → {steps[-1][key]:8.3g}   {meaning(key)}")
for line in evaluations:
    print(f"step {line['step']:3}: " + ", ".join(f"{k} = {v:.3f}" for k, v in line.items() if k == "eval_ledger"))

out = run_dir / "again.html"
write_report([run_dir], out)
print(f"report: {out}, {out.stat().st_size / 1e6:.1f} MB")
