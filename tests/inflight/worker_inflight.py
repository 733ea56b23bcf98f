"""Ranks of test_inflight.py: one engine configuration, as one process can have only one.

    torchrun … worker_inflight.py MODELS OUT ROLLOUT_TP MAX_NUM_SEQS

The trainer takes all ranks as TP ranks if the engine does, and as replicas otherwise. Rank r writes OUT/rank<r>.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prune_opd import platform
from prune_opd.config import GateConfig, InflightConfig, ParallelConfig, RolloutConfig
from prune_opd.data.prompt import Prompt
from prune_opd.errors import UserError
from prune_opd.method.calibration import Calibration
from prune_opd.rollout.batch import Rollouts
from prune_opd.rollout.request import TokenSampling, new_rows
from tests.distributed.tiny_run import build_run, look, train_config
from tests.models import VOCAB

MAX_TOKENS, RESPONSES, PROMPTS = 40, 2, 6
ROWS = RESPONSES * PROMPTS
SPENT = 4  # events: w_drop = 0.25
GATE = GateConfig(k=4, threshold=0.5, w_drop=0.25, w_base=0.0)
TOP_P = replace(GATE, metric="teacher_top_p", top_p=0.9)
CHANGE_POINT = replace(GATE, metric="change_point", alarm=2.0)
KAT = replace(GATE, metric="kl_agreement", threshold=0.8, low_tokens=4)
QUANTILE = replace(GATE, metric="overlap_quantile", threshold=0.0)  # γ is found: .5 too
GEOMETRIC = InflightConfig(mode="gate", first_check=4)  # 4, 8, 16, 32
FIXED = InflightConfig(mode="gate", schedule="fixed", first_check=6, chunk=5, min_keep=8)  # 11, 16, 21, 26, 31, 36
# Where the scripted teacher drifts, by row: token numbers from 0. R reaches 0 with the fourth of them.
SCRIPT = {
    0: (0, 1, 2, 3),  # with the fourth token: the first look sees it
    1: (1, 2, 3, 4),  # with the fifth: one too late for it
    3: (0, 3, 9, 15),  # with the last one before 16
    4: (0, 3, 9, 16),  # with the first one after
    6: (2, 5, 30),  # three are not enough
    7: (0, 0, 5, 6, 7),  # the same place twice is one event: 8
    10: (33, 34, 35, 36),  # after the last look
}


class Scripted:
    """A teacher that agrees with the student everywhere but at the places of a script, with its logits reversed."""

    def __init__(self, teacher: Any, script: dict[int, Iterable[int]]) -> None:
        self.teacher, self.script = teacher, script
        self.rows_computed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)

    def hidden(self, rollouts: Rollouts, deals: Any, kept: Any = None) -> Any:
        return self.look(rollouts, deals, kept)[0]

    def look(self, rollouts: Rollouts, deals: Any, kept: Any = None) -> Any:
        known = dict(kept.of_row) if kept else {}
        self.rows_computed += len(rollouts.responses) - len(kept.holders_of if kept else ())
        hidden, computed = self.teacher.look(rollouts, deals, kept)
        for of_row in (hidden.of_row, computed.of_row):
            for i in of_row.keys() - (known.keys() if of_row is computed.of_row else kept.holders_of if kept else {}):
                for token in set(self.script.get(row_of(rollouts.prompts[i], rollouts, i), ())):
                    if token < len(of_row[i]):
                        of_row[i] = of_row[i].index_copy(0, torch.tensor([token]), -of_row[i][token : token + 1])
        return hidden, computed


def row_of(prompt: Prompt, rollouts: Rollouts, i: int) -> int:
    """The batch's number of a row: two samples of a prompt differ in their first tokens."""
    return FIRST_TOKENS[prompt.index, rollouts.response_ids[i][:2]]


FIRST_TOKENS: dict[tuple[int, tuple[int, ...]], int] = {}


def make_prompts() -> list[Prompt]:
    draw = torch.Generator().manual_seed(4)
    return [
        Prompt(i, tuple(torch.randint(3, VOCAB, (n,), generator=draw).tolist()), None, "test")
        for i, n in enumerate((5, 40, 1, 17, 12, 8))
    ]


def responses(rollouts: Rollouts) -> list[list[Any]]:
    return [[list(r.ids), r.finished, r.stopped] for r in rollouts.responses]


class Checks:
    def __init__(self, run: Any, engine: Any) -> None:
        from prune_opd.inflight.gate import InflightGate

        self.run, self.engine, self.teacher, self.make_gate = run, engine, run.teacher, InflightGate

    def watch(self, inflight: InflightConfig, gate: GateConfig = GATE) -> Any:
        rollout = replace(self.run.config.rollout, inflight=inflight)
        self.run.config = replace(self.run.config, rollout=rollout, gate=gate)
        self.run.inflight = self.make_gate(self.run.config, self.run.teacher, self.run.layout, self.run.vocab_size)
        self.run.calibration = Calibration(gate)
        # Acceptance .6 ± .1, of which this pair falls short here and there; overlap is k / 2 but for 4 tokens in 100.
        # The KL is .5, above that of most tokens.
        shared = [0.0] * (gate.k + 1)
        shared[0], shared[gate.k // 2] = 4, 96
        self.run.calibration.update([100, 60.0, 37.0, *shared], 50.0)
        self.run.inflight.calibrate(self.run.calibration.usual)
        return self.run.inflight

    def generate(self, watch: Any = None) -> Rollouts:
        rows = new_rows(make_prompts(), RESPONSES, MAX_TOKENS)
        return self.engine.generate(rows, TokenSampling(seed=11, step=3), watch=watch)

    def losses_gate(self, rollouts: Rollouts, kept: Any = None) -> dict[str, Any]:
        """E of every response by the loss, and the mean weight, without a step of the optimizer."""
        stats = look(self.run, rollouts, kept)
        return {"reliable_length_B": stats.reliable_length_B.tolist(), "weight_mean": stats.record()["weight_mean"]}

    def scripted(self, inflight: InflightConfig, gate: GateConfig, plain: Rollouts) -> dict[str, Any]:
        self.run.teacher = Scripted(self.teacher, SCRIPT)
        watch = self.watch(inflight, gate)
        stopped = self.generate(watch)
        in_flight = self.run.teacher.rows_computed
        result = {
            "responses": responses(stopped),
            "loss": self.losses_gate(stopped, watch.kept),
            "rows computed": [in_flight, self.run.teacher.rows_computed - in_flight],
            "loss, nothing kept": self.losses_gate(stopped),
            "loss of all": self.losses_gate(plain),
        }
        result["record"] = watch.record(stopped, torch.tensor(result["loss"]["reliable_length_B"]))
        result["record"].pop("time_inflight")
        self.run.teacher = self.teacher
        return result

    def error(self, what: str) -> str:
        """The error of the ranks when the last rank's engine fails, or does something else than the others."""
        from prune_opd.rollout import stepwise

        engine, last = self.engine.llm.llm_engine, self.run.layout.rank == self.run.layout.world - 1
        step, abort, stalled = engine.step, engine.abort_request, stepwise.STALLED
        watch = self.watch(GEOMETRIC)
        watch.stop = lambda prefixes: {prefix.row for prefix in prefixes}
        if what == "exception" and last:
            engine.step = _raise
        elif what == "never finishes":
            engine.step, stepwise.STALLED = (lambda: []), 50
        elif what == "disagrees" and last:
            watch.stop = lambda prefixes: set()
        try:
            self.generate(watch)
            return ""
        except UserError as error:
            return str(error)
        finally:
            engine.step, engine.abort_request, stepwise.STALLED = step, abort, stalled
            engine.abort_request([str(row) for row in range(ROWS)])  # what is left over

    def late_abort(self) -> bool:
        """An abort of requests that have finished changes nothing."""
        before = responses(self.generate())
        engine = self.engine.llm.llm_engine
        engine.abort_request([f"{row}" for row in range(ROWS)])
        engine.abort_request(["0-ab12", "never there"], internal=True)
        return responses(self.generate()) == before and not engine.has_unfinished_requests()


def _raise() -> Sequence[Any]:
    raise RuntimeError("the device fell off")


def schedule_asynchronously() -> None:
    """As vLLM does on a GPU: a step is planned before the last one's tokens are there. Its CPU platform forbids it."""
    from vllm.platforms.cpu import CpuPlatform

    forbids = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def allows(cls: Any, vllm_config: Any) -> None:
        forbids(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(allows)  # type: ignore[assignment]


def main(models: Path, out: Path, rollout_tp: int, max_num_seqs: int) -> None:
    machine = platform.prepare()
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.teacher import Teacher
    from prune_opd.rollout.engine import EngineOptions, RolloutEngine

    parallel = ParallelConfig(tensor=rollout_tp, timeout_minutes=0.3)
    layout = layouts.initialize(parallel, machine, seed=0)
    rollout = RolloutConfig(
        tensor_parallel=rollout_tp, max_prompt_len=64, max_num_seqs=max_num_seqs, kv_cache_gb=0.05, inflight=GEOMETRIC
    )
    config = train_config(models, rollout_tp, rollout=rollout, gate=GATE, parallel=parallel)
    run = build_run(config, layout, out)
    drifting = run.teacher
    run.teacher = Teacher(config.student, layout, torch.float32, machine.device, parallel.microbatch_tokens)
    if rollout_tp > 1:
        schedule_asynchronously()
    options = EngineOptions(max_logprobs=8, timeout_minutes=parallel.timeout_minutes)
    engine = RolloutEngine(config.student, rollout, MAX_TOKENS, torch.float32, machine, options)
    core = engine.llm.llm_engine.engine_core.engine_core
    assert core.vllm_config.scheduler_config.async_scheduling == (core.batch_queue is not None) == (rollout_tp > 1)
    checks = Checks(run, engine)
    plain = checks.generate()
    FIRST_TOKENS.update({(plain.prompts[i].index, r.ids[:2]): i for i, r in enumerate(plain.responses)})
    assert len(FIRST_TOKENS) == ROWS
    results: dict[str, Any] = {"plain": responses(plain)}
    results["scripted, geometric"] = checks.scripted(GEOMETRIC, GATE, plain)
    results["scripted, fixed"] = checks.scripted(FIXED, GATE, plain)
    results["scripted, two events"] = checks.scripted(replace(GEOMETRIC, stop_events=2), GATE, plain)
    run.teacher = checks.teacher = drifting
    gates = {"overlap": GATE, "top-p": TOP_P, "change point": CHANGE_POINT, "overlap quantile": QUANTILE}
    gates["KL agreement"] = KAT
    for name, gate in ((f"real, {name}", gate) for name, gate in gates.items()):
        watch = checks.watch(GEOMETRIC, gate)
        rollouts = checks.generate(watch)
        loss = checks.losses_gate(rollouts, watch.kept)
        results[name] = {
            "responses": responses(rollouts),
            "loss": loss,
            "loss of all": checks.losses_gate(plain),
            "too early": watch.record(rollouts, torch.tensor(loss["reliable_length_B"]))["inflight_too_early"],
        }
    results["late abort"] = checks.late_abort()
    results["errors"] = {what: checks.error(what) for what in ("never finishes", "disagrees")}
    results["afterwards"] = responses(checks.generate())
    if rollout_tp == 1:
        results["errors"]["exception"] = checks.error("exception")
    (out / f"rank{layout.rank}.json").write_text(json.dumps(results))
    if rollout_tp > 1:  # the other rank stays inside the engine's step: the launcher has to end it
        raise SystemExit(checks.error("exception"))
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
