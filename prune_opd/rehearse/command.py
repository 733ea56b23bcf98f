"""`prune-opd rehearse`: the program at its real size and world, on a machine without a GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prune_opd.check.run import check_structure
from prune_opd.config import TrainConfig
from prune_opd.errors import ConfigError


def run_rehearse(
    config: TrainConfig, nodes: int | None, ranks: Sequence[int], layers: int | None, microbatches: int
) -> int:
    """Go through one step as each of some ranks and print what was seen; 1 if a GPU would stop at something.

    ranks: none are the first, a middle and the last one, of a pipeline also the first one's neighbour.
    `ConfigError` for a rank or a world that cannot be.
    """
    nodes = nodes or config.planning.nodes
    world = nodes * config.parallel.nproc
    second_stage = world // config.parallel.pipeline % world  # it exchanges messages with rank 0
    chosen = list(ranks) or sorted({0, second_stage, world // 2, world - 1})
    for rank in chosen:
        if not 0 <= rank < world:
            raise ConfigError(
                f"--rank {rank} is outside the job: {nodes} nodes × parallel.nproc = {config.parallel.nproc} are "
                f"ranks 0 to {world - 1}"
            )
    away = {"teacher_cache.mode = only": config.teacher_cache.mode == "only"}
    away[f"teacher_server.url = {config.teacher_server.url!r}"] = config.teacher_server.on
    if fields := [field for field, there in away.items() if there]:
        raise ConfigError(
            f"{fields[0]}: a teacher that is not in the job is not rehearsed; leave it out, or ask prune-opd plan, "
            "which knows it"
        )
    if problems := check_structure(config, world):
        raise ConfigError(f"--nodes {nodes} ({world} ranks): {'; '.join(problems)}")

    from prune_opd.rehearse import machine

    machine.prepare()
    from prune_opd.rehearse.report import not_rehearsed, rank_lines
    from prune_opd.rehearse.report import problems as problems_of
    from prune_opd.rehearse.step import Cut, rehearse_rank
    from prune_opd.rehearse.traffic import disagreements

    cut, seen, started = Cut(layers, microbatches), [], time.process_time()
    print(f"{config.name} on {world} ranks", flush=True)
    for rank in chosen:
        seen.append(rehearse_rank(config, nodes, rank, cut))
        print("\n".join(rank_lines(seen[-1])), flush=True)
    apart = list(disagreements([(one.rank, one.watch.traffic) for one in seen]))
    for line in apart:
        print(f"PROBLEM {line}")
    for line in not_rehearsed(config, cut, seen):
        print(f"not rehearsed: {line}")
    print(f"{time.process_time() - started:.0f} CPU seconds")
    return 1 if apart or any(list(problems_of(one)) for one in seen) else 0
