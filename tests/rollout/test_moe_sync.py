"""Weight syncs of a mixture of experts: each is compared, and experts that a load leaves as they were are noticed."""

from __future__ import annotations

import json
from pathlib import Path

from tests.distributed.ranks import run_ranks
from tests.distributed.tiny_run import write_pair

WORKER = Path(__file__).with_name("worker_moe_sync.py")


def test_three_syncs_pass_and_experts_that_stay_behind_end_the_run(tmp_path: Path) -> None:
    write_pair(tmp_path, family="qwen3_moe", tied=False, moe_intermediate_size=128)  # as wide as the kernel wants
    run_ranks(WORKER, 1, [tmp_path, tmp_path], timeout=120)
    results = json.loads((tmp_path / "result.json").read_text())
    assert results["well"] == ["", "", ""]
    for said in results["packed once"]:
        assert "the weights in the engine are not the student's" in said
    assert results["well again"] == [""]
