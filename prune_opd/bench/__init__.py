"""`prune-opd bench NAME`: measurements that claims rest on. Each writes NAME.json and prints a table."""

from __future__ import annotations

import difflib
from pathlib import Path

from prune_opd.bench import compare_loss, fp8_noise, packing, peers, reshard
from prune_opd.errors import ConfigError

BENCHMARKS = {
    "loss": compare_loss.run,
    "packing": packing.run,
    "reshard": reshard.run,
    "fp8-noise": fp8_noise.run,
    "peers": peers.run,
}


def run_benchmark(name: str, out: Path, quick: bool) -> int:
    """Run a benchmark and write `out`/NAME.json. ConfigError for a name that does not exist."""
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1, cutoff=0.0)
        raise ConfigError(f"there is no benchmark {name!r}: did you mean {near[0]!r}?")
    return BENCHMARKS[name](out / f"{name}.json", quick)
