"""What a step record says of each of several teachers: `overlap_of_NAME` and so on."""

from __future__ import annotations

from typing import Any

from prune_opd.loss.stats import BatchStats
from prune_opd.rollout.batch import Rollouts

FROM_STATS = ("overlap", "event_rate", "weight_mean", "divergence", "reverse_kl", "teacher_logp")


def record_by_teacher(stats: BatchStats, rollouts: Rollouts) -> dict[str, Any]:
    """Means over a teacher's own tokens and responses; null where it had none in the step. Empty with one teacher."""
    found: dict[str, Any] = {}
    for name, part in stats.parts.items():
        rows = [row for row, teacher in enumerate(rollouts.teacher_B) if teacher == name]
        tokens = sum(rollouts.length_B[row] for row in rows)
        seen = part.record() if rows else {}
        record = {key: seen.get(key) for key in FROM_STATS} | {
            "tokens": tokens,
            "reliable_length": part.reliable_length_B[rows].mean().item() if rows else None,
            "response_length": tokens / len(rows) if rows else None,
        }
        found |= {f"{key}_of_{name}": value for key, value in record.items()}
    return found
