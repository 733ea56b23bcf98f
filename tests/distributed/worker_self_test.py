"""Ranks of test_self_test.py: the self-test of good and of spoilt teachers.

    torchrun … worker_self_test.py OUT TENSOR TEACHER_PIPELINE STUDENT NAME=TEACHER …

Every rank writes OUT/rank<r>.json: what is said of each teacher, or the refusal; and what is said
of ids that differ between the ranks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from prune_opd import platform
from prune_opd.config import ParallelConfig
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import load_recipe
from prune_opd.errors import UserError


def main(out: Path, tensor: int, pipeline: int, student: str, teachers: dict[str, str]) -> None:
    machine = platform.prepare()
    from transformers import AutoTokenizer

    from prune_opd.data.prompts import make_sampler
    from prune_opd.megatron import layout as layouts
    from prune_opd.megatron.self_test import check_teacher
    from prune_opd.megatron.teacher import Teacher
    from prune_opd.ranks.agreement import must_agree

    parallel = ParallelConfig(tensor=tensor, teacher_tensor=1, teacher_pipeline=pipeline)
    layout = layouts.initialize(parallel, machine, seed=0)
    said = {}
    for name, directory in teachers.items():
        source = out / "text.jsonl" if name.startswith("prompts") else "ledger"
        config = apply_overrides(
            load_recipe("tiny_compatible"),
            [f"student={student}", f"teacher={directory}", f"data.source={source}", "evaluation.problems=0"],
        )
        if name == "off":
            config = apply_overrides(config, ["survival.teacher_test=0"])
        teacher = Teacher(directory, layout, torch.float32, machine.device, token_budget=512)
        sampler = make_sampler(config.data, AutoTokenizer.from_pretrained(directory), seed=0)
        try:
            said[name] = check_teacher(config, teacher, sampler, teacher.spec.vocab_size)
        except UserError as error:
            said[name] = f"refused: {error}"
    must_agree("the ids", (0, 2), "not said")
    try:
        must_agree("the ids", (layout.rank, 2), "copy the files")
    except UserError as error:
        said["agreement"] = str(error)
    (out / f"rank{layout.rank}.json").write_text(json.dumps(said))
    layouts.shutdown()


if __name__ == "__main__":
    pairs = dict(pair.split("=", 1) for pair in sys.argv[5:])
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], pairs)
