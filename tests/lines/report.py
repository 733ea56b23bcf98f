"""Print the share of prune_opd/'s lines that ran: `python tests/lines/report.py FOLDER [--missing]`."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path

from slipcover.slipcover import Slipcover

SOURCE = Path(__file__).resolve().parents[2] / "prune_opd"


def main(folder: Path, missing: bool) -> None:
    seen: dict[str, set[int]] = defaultdict(set)
    for path in folder.glob("*.json"):
        for name, lines in json.loads(path.read_text(encoding="utf-8")).items():
            seen[name].update(lines)
    os.chdir(SOURCE)  # slipcover names files from here
    files = Slipcover(source=[str(SOURCE)]).get_coverage()["files"]
    lines = {name: set(file["executed_lines"]) | set(file["missing_lines"]) for name, file in files.items()}
    ran = sum(len(lines[name] & seen[name]) for name in lines)
    if missing:
        for name in sorted(lines):
            if left := sorted(lines[name] - seen[name]):
                print(f"{name}: {', '.join(map(str, left))}")
    print(f"line coverage: {100 * ran / sum(map(len, lines.values())):.1f}%")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--missing" in sys.argv)
