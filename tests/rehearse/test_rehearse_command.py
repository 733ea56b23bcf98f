"""What `prune-opd rehearse` refuses, before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from prune_opd.config.recipe import load_recipe
from prune_opd.errors import ConfigError
from prune_opd.rehearse.command import run_rehearse


def refusal(recipe: str, nodes: int | None, ranks: Sequence[int]) -> str:
    config: Any = load_recipe(recipe)
    with pytest.raises(ConfigError) as refused:
        run_rehearse(config, nodes, ranks, layers=1, microbatches=1)
    return str(refused.value)


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_that_the_job_does_not_have_is_refused(rank: int) -> None:
    said = refusal("qwen3_4b_base_from_4b_8xh100", None, [0, rank])
    assert f"--rank {rank} is outside the job" in said and "ranks 0 to 7" in said


def test_a_world_that_the_layout_does_not_fill_is_refused() -> None:
    said = refusal("qwen3_30b_a3b_from_235b_a22b_128xh100_fp8", 1, [0])
    assert "--nodes 1 (8 ranks)" in said and "parallel.teacher_expert = 32" in said


def test_a_recipe_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="no_such_recipe"):
        load_recipe("no_such_recipe")
