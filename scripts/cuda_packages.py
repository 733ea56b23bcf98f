"""Read a `pip install --report -` on stdin; print the packages in it that only a CUDA build of torch brings."""

from __future__ import annotations

import json
import sys

CUDA_ONLY = ("nvidia-", "cuda-")


def cuda_packages(report: dict) -> list[str]:
    names = (item["metadata"]["name"].lower() for item in report["install"])
    return sorted(
        (name for name in names if name.startswith(CUDA_ONLY)), key=lambda name: (name.startswith("cuda-"), name)
    )


if __name__ == "__main__":
    found = cuda_packages(json.load(sys.stdin))
    shown = ", ".join(found[:2])
    print(f"{shown} and {len(found) - 2} more" if len(found) > 2 else shown)
