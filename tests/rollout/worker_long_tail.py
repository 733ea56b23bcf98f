"""Ranks of test_long_tail.py: one engine configuration, as one process can have only one.

    torchrun … worker_long_tail.py MODELS OUT ROLLOUT_TP

Rank r writes OUT/rank<r>.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prune_opd import platform
from prune_opd.config import GateConfig, InflightConfig, ParallelConfig, RolloutConfig
from prune_opd.data.prompt import Prompt
from prune_opd.rollout.batch import Response, Rollouts
from prune_opd.rollout.long_tail import Race
from prune_opd.rollout.request import TokenSampling, new_rows
from tests.distributed.tiny_run import build_run, look, train_config
from tests.models import VOCAB

RESPONSES, KEEP = 2, 3
LIMITS = (40, 9, 64, 12, 33, 10)  # tokens of each prompt's responses: they almost never end by themselves
STALE = (0, 5, 1, 8, 3, 64, 7, 12, 0, 32, 4, 9)  # of each row, where responses are begun
GATE = GateConfig(k=4, threshold=0.5, w_drop=0.25, w_base=0.0)
# Where the scripted teacher drifts, by prompt: token numbers. Row 2 · i is the first sample of prompt i.
SCRIPT = {0: (0, 1, 2, 3), 1: (1, 9, 10, 11, 12)}


def make_prompts() -> list[Prompt]:
    draw = torch.Generator().manual_seed(4)
    return [
        Prompt(7 * i, tuple(torch.randint(3, VOCAB, (n,), generator=draw).tolist()), None, "test")
        for i, n in enumerate((5, 40, 1, 17, 12, 8))
    ]


def rows(rollouts: Rollouts) -> list[dict[str, Any]]:
    return [
        {
            "ids": list(r.ids),
            "finished": r.finished,
            "logprobs": list(r.logprobs or ()),
            "stale": r.stale,
            "stopped": r.stopped,
        }
        for r in rollouts.responses
    ]


class Nobody:
    """A watch that looks at responses and stops none."""

    top = 3

    def __init__(self) -> None:
        self.kept: list[int] = []

    def looks(self, max_tokens: int) -> tuple[int, ...]:
        return tuple(at for at in (8, 16, 32) if at < max_tokens)

    def begin(self, *batch: Any) -> None:
        pass

    def stop(self, prefixes: Any) -> set[int]:
        return set()

    def keep(self, rows: Any) -> None:
        self.kept = list(rows)


class Drifting:
    """A teacher that is the student, but with its logits reversed at the places of the script."""

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)

    def hidden(self, rollouts: Rollouts, deals: Any, kept: Any = None) -> Any:
        return self.look(rollouts, deals, kept)[0]

    def look(self, rollouts: Rollouts, deals: Any, kept: Any = None) -> Any:
        hidden, computed = self.teacher.look(rollouts, deals, kept)
        for of_row in {id(part): part for part in (hidden.of_row, computed.of_row)}.values():
            for i in of_row:
                if not (kept and i in kept.of_row):
                    places = [t for t in SCRIPT.get(rollouts.prompts[i].index // 7, ()) if t < len(of_row[i])]
                    index = torch.tensor(places, dtype=torch.int64)
                    of_row[i] = of_row[i].index_copy(0, index, -of_row[i][index])
        return hidden, computed


def scripted(run: Any, engine: Any) -> dict[str, Any]:
    """Both rows have begun with eight tokens: the script of the first is in them, most of the second's after them."""
    from prune_opd.inflight.gate import InflightGate

    inflight = InflightConfig(mode="gate", first_check=8)
    run.config = replace(run.config, gate=GATE, rollout=replace(run.config.rollout, inflight=inflight))
    run.teacher = Drifting(run.teacher)
    watch = InflightGate(run.config, run.teacher, run.layout, run.vocab_size)
    prompts = make_prompts()[:2]
    sampling = TokenSampling(seed=11, step=3, logprobs=True)
    start = engine.generate(new_rows(prompts, 1, 8), sampling).responses
    begun = [replace(response, stale=8) for response in start]
    wanted = [replace(row, begun=before) for row, before in zip(new_rows(prompts, 1, 40), begun, strict=True)]
    rollouts = engine.generate(wanted, replace(sampling, step=4), watch=watch)
    stats = look(run, rollouts, watch.kept)
    record = watch.record(rollouts, stats.reliable_length_B)
    return {
        "stopped": [[row, len(rollouts.responses[row].ids)] for row in rollouts.stopped_rows],
        "too early": record["inflight_too_early"],
    }


def main(models: Path, out: Path, rollout_tp: int) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.teacher import Teacher
    from prune_opd.rollout.engine import EngineOptions, RolloutEngine

    parallel = ParallelConfig(tensor=rollout_tp, timeout_minutes=0.5)
    layout = layouts.initialize(parallel, machine, seed=0)
    rollout = RolloutConfig(tensor_parallel=rollout_tp, max_prompt_len=64, max_num_seqs=64, kv_cache_gb=0.05)
    config = train_config(models, rollout_tp, rollout=rollout, gate=GATE, parallel=parallel)
    run = build_run(config, layout, out)
    engine = RolloutEngine(config.student, rollout, max(LIMITS), torch.float32, machine, EngineOptions(max_logprobs=8))
    limits = [limit for limit in LIMITS for _ in range(RESPONSES)]

    def generate(
        race: Race | None = None, watch: Any = None, of_row: Mapping[str, Sequence[Any]] | None = None, **sampling: Any
    ) -> Rollouts:
        """of_row: `expected` or `begun` of every row."""
        wanted = new_rows(make_prompts(), RESPONSES, limits)
        for name, values in (of_row or {}).items():
            wanted = [replace(row, **{name: value}) for row, value in zip(wanted, values, strict=True)]
        return engine.generate(wanted, TokenSampling(seed=11, step=3, **sampling), race, watch)

    def race(watch: Any = None) -> dict[str, Any]:
        result = generate(Race(len(LIMITS), RESPONSES, KEEP), watch)
        return {
            "prompts": [prompt.index for prompt in result.prompts],
            "kept": [{**row, "logprobs": []} for row in rows(result)],
            "left": [[group.prompt.index // 7, [list(r.ids) for r in group.begun]] for group in result.left],
            "generated": result.generated,
        }

    results: dict[str, Any] = {"plain": rows(generate())}
    results["other order"] = rows(generate(of_row={"expected": [float(i * 7 % 5) for i in range(len(limits))]}))
    results["race"] = race()
    watch = Nobody()
    results["race with a watch"] = race(watch=watch)
    assert watch.kept == [row for group in (1, 3, 5) for row in (2 * group, 2 * group + 1)]
    results["plain after the races"] = rows(generate())
    results["unfinished"] = engine.llm.llm_engine.has_unfinished_requests()
    whole = generate(temperature=0.0, logprobs=True)
    results["greedy"] = rows(whole)
    begun = [
        Response(
            r.ids[:stale], r.finished and stale >= len(r.ids), (r.logprobs or ())[:stale], stale=min(stale, len(r.ids))
        )
        for r, stale in zip(whole.responses, STALE, strict=True)
    ]
    results["greedy, begun"] = rows(generate(temperature=0.0, logprobs=True, of_row={"begun": begun}))
    ids = (3, 4, 5, 6, 7, 8)
    ended = [
        Response(ids[:3], True, (-1.0,) * 3, stale=3),
        Response(ids[:4], False, (-1.0,) * 4, stopped=True, stale=4),
        Response(ids, False, (-1.0,) * 6, stale=6),
        Response((), False, ()),
    ]
    wanted = [replace(row, begun=one) for row, one in zip(new_rows(make_prompts()[:2], 2, 5), ended, strict=True)]
    results["ended"] = rows(engine.generate(wanted, TokenSampling(seed=11, step=3, logprobs=True)))
    run.teacher = Teacher(config.student, layout, torch.float32, machine.device, parallel.microbatch_tokens)
    waited = generate(Race(len(LIMITS), RESPONSES, KEEP, must=1))
    results["waited for"] = [prompt.index // 7 for prompt in waited.prompts[::RESPONSES]]
    results["scripted, begun"] = scripted(run, engine)
    (out / f"rank{layout.rank}.json").write_text(json.dumps(results))
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
