"""Whether vLLM compiles the model in a CPU run that leaves it open (`rollout.enforce_eager=null`); on a GPU it does.

It does where all engine steps of the run save more CPU seconds than tracing costs:

    engine steps × LAYER_SAVES × layers  >  LAYER_TRACING × layers

An engine step makes a token of every response that runs. Its number follows from the planned horizons (plan/lengths.py)
and evaluations. What it saves is dispatch and unfused kernels, and what tracing costs is compiling them: both grow with
the layers, so it is the engine steps that decide. The whole run counts, also where this start is one of several, and
tracing counts as if nothing were kept of it. A start that resumes keeps what its checkpoint has (cli/runs.py).
docs/pace.md has the measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from prune_opd.config import TrainConfig
from prune_opd.plan.lengths import mean_horizon

# CPU seconds of a rank with the tiny models of four layers: 6.6 ms an engine step of 24 rows, 5.6 compiled (AVX2); 55
# to trace and compile with nothing kept.
LAYER_SAVES, LAYER_TRACING = 0.001 / 4, 55.0 / 4


@dataclass(frozen=True)
class Compiling:
    """saved, tracing: CPU seconds of a rank over the run."""

    engine_steps: float
    saved: float
    tracing: float

    @property
    def pays(self) -> bool:
        return self.saved > self.tracing

    def __str__(self) -> str:
        verb, sign = ("compiles", ">") if self.pays else ("does not compile", "≤")
        return (
            f"vLLM {verb} the model: {self.engine_steps:,.0f} engine steps planned would save {self.saved:,.0f} s, "
            f"{sign} {self.tracing:,.0f} s of tracing (rollout.enforce_eager=true or false decides otherwise)"
        )


def compiling(config: TrainConfig, layers: int, world: int) -> Compiling:
    """What compiling costs and saves on a CPU. layers: of the student. world: ranks of the job."""
    rollout, evaluation = config.rollout, config.evaluation
    engines = max(world // rollout.tensor_parallel, 1)

    def waves(rows: float) -> int:
        """How often an engine's running responses are others."""
        return int(-(-rows // (engines * rollout.max_num_seqs)))

    at_once = min(rollout.refresh_every or config.steps, config.steps)  # steps that one generates for
    rows = at_once * rollout.prompts * rollout.oversample * rollout.responses
    steps = -(-config.steps // at_once) * mean_horizon(config) * waves(rows)
    if evaluation.problems:
        times = 1 + (-(-config.steps // evaluation.every) if evaluation.every else 1)
        sources = len(evaluation.sources) or 1
        length = evaluation.max_len or config.horizon.max_len
        steps += times * sources * length * waves(evaluation.problems * evaluation.samples)
    saved = steps * LAYER_SAVES * layers
    return Compiling(steps, saved, LAYER_TRACING * layers)
