"""Cases of the loss whose teacher is known at its best ids only, and the settings that need no more of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from prune_opd.config import (
    GateConfig,
    HorizonConfig,
    ObjectiveConfig,
    RolloutConfig,
    TeacherCacheConfig,
    TeacherServerConfig,
    WeightingConfig,
)
from prune_opd.config.elsewhere import check_teacher_server
from prune_opd.errors import ConfigError
from prune_opd.loss import GateStats, Head, KnownTop, Method, Tokens, distill_loss
from tests.reference import GATE, NO_WEIGHTING, OBJECTIVES, USUAL, WEIGHTINGS, Case

K = 12  # twice the objectives' k, for the bucket
FULL = HorizonConfig(strategy="full")
SERVER = TeacherServerConfig(url="http://127.0.0.1:1", top_k=K)
GATES = [
    None,
    GATE,
    dataclasses.replace(GATE, weight_normalisation="mean"),
    GateConfig("teacher_top_p", k=K, w_drop=0.15, top_p=0.6),
    dataclasses.replace(GATE, metric="shared_mass"),
    dataclasses.replace(GATE, metric="acceptance", threshold=0.6),
    dataclasses.replace(GATE, metric="change_point", alarm=3.0, k=K),
    dataclasses.replace(GATE, metric="kl_agreement", low_tokens=1, threshold=0.2),
]


def served(gate: GateConfig | None, objective: ObjectiveConfig, weighting: WeightingConfig = NO_WEIGHTING) -> bool:
    """Whether the settings let such a teacher pass."""
    try:
        check_teacher_server(SERVER, gate, objective, weighting, RolloutConfig(), FULL, TeacherCacheConfig())
    except ConfigError:
        return False
    return True


SERVED_OBJECTIVES = [objective for objective in OBJECTIVES if served(None, objective)]
SERVED_WEIGHTINGS = [weighting for weighting in WEIGHTINGS if served(None, OBJECTIVES[3], weighting)]
SERVED_GATES = [gate for gate in GATES if served(gate, OBJECTIVES[3])]


def known_top(case: Case, k: int = K) -> KnownTop:
    """What a server says of the case's teacher: from all of its logits, in float64."""
    logits_NV = case.teacher_hidden.double() @ case.teacher_weight[: case.vocab_size].double().T
    logp_NV = logits_NV.log_softmax(-1)
    best = logp_NV.topk(k, dim=-1)
    return KnownTop(best.indices, best.values, logp_NV.gather(1, case.sampled[:, None])[:, 0])


@dataclasses.dataclass
class KnownCase(Case):
    """The case whose fused loss gets no more of the teacher than that."""

    known: KnownTop | None = None

    @staticmethod
    def of(case: Case, k: int = K) -> KnownCase:
        fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
        return KnownCase(**fields, known=known_top(case, k))

    def fused(
        self,
        gate: GateConfig | None = GATE,
        objective: ObjectiveConfig = OBJECTIVES[3],
        weighting: WeightingConfig = NO_WEIGHTING,
        context: Any = None,
        **options: Any,
    ) -> tuple[Tensor, int, GateStats]:
        assert self.known is not None
        dtype = self.student_hidden.dtype
        known = KnownTop(self.known.ids_NK, self.known.logp_NK.to(dtype), self.known.sampled_logp_N.to(dtype))
        return distill_loss(
            Head(self.student_hidden, self.student_weight),
            known,
            Tokens(
                self.sampled,
                torch.tensor(self.offsets, dtype=torch.int32),
                self.vocab_size,
                context,
                self.stale_logp,
                self.engine_logp,
                self.advantage,
            ),
            Method(gate, objective, weighting, USUAL, self.terminal_ids),
            **options,
        )
