"""What takes the place of the things that a rehearsal has not: prompts and vLLM."""

from __future__ import annotations

import sys
import types
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.config import memory_phases as phases
from prune_opd.data.prompt import Prompt
from prune_opd.data.sampler import PromptSampler
from prune_opd.rehearse.ledger import Ledger
from prune_opd.rollout.batch import Response, Rollouts
from prune_opd.rollout.engine import RolloutEngine
from prune_opd.rollout.long_tail import Race
from prune_opd.rollout.request import Row, TokenSampling
from prune_opd.rollout.stepwise import Prefix, Watch

TOKEN = 1  # any id of any vocabulary


class Prompts:
    """A source of prompts that are all as long as they may be."""

    name, size = "rehearsal", None

    def __init__(self, tokens: int, hinted: int | None = None, teachers: Sequence[str] = ()):
        """hinted: tokens of what the teacher reads; None: the same prompt. teachers: of several, which take turns."""
        self.tokens, self.hinted, self.teachers = tokens, hinted, tuple(teachers) or ("",)

    def get(self, index: int) -> Prompt:
        hint = None if self.hinted is None else (TOKEN,) * self.hinted
        teacher = self.teachers[index % len(self.teachers)]
        return Prompt(index, (TOKEN,) * self.tokens, None, self.name, hint, teacher)

    def read(self, response_text: str) -> str | None:
        return None

    def score(self, response_text: str, prompt: Prompt) -> bool:
        return False

    def sampler(self) -> PromptSampler:
        return PromptSampler(self, seed=0)


class Engine(RolloutEngine):
    """The product's engine around an `LLM` that only keeps books.

    lengths: of the responses, which take turns.
    """

    lengths: Sequence[int]

    def generate(
        self, rows: Sequence[Row], sampling: TokenSampling, race: Race | None = None, watch: Watch | None = None
    ) -> Rollouts:
        count, turns = len(rows), len(self.lengths)
        lengths = [min(self.lengths[number % turns], row.limit) for number, row in enumerate(rows)]
        engines = [number * self.engines // count for number in range(count)]
        if watch is not None:
            self._look(rows, lengths, [engine * (self.world // self.engines) for engine in engines], watch)
        return Rollouts(
            tuple(row.prompt for row in rows),
            tuple(
                Response((TOKEN,) * length, True, (1.0,) * length if sampling.logprobs else None, engine=engine)
                for length, engine in zip(lengths, engines, strict=True)
            ),
        )

    def _look(self, rows: Sequence[Row], lengths: Sequence[int], holders: Sequence[int], watch: Watch) -> None:
        """The first look, which all responses reach that are long enough; it stops none of them.

        holders: of each row, the lowest rank of its engine, which alone has the candidates.
        """
        watch.begin([row.prompt for row in rows], [row.limit for row in rows], [row.begun for row in rows])
        looks = watch.looks(max(row.limit for row in rows))
        if not looks:
            return
        ids = logp = None
        if watch.top:
            ids = np.tile(np.arange(watch.top, dtype=np.int32), (looks[0], 1))
            logp = np.zeros((looks[0], watch.top), dtype=np.float32)
        mine = dist.get_rank()
        watch.stop(
            [
                Prefix(row, (TOKEN,) * looks[0], holder, *((ids, logp) if holder == mine else ()))
                for row, (length, holder) in enumerate(zip(lengths, holders, strict=True))
                if length > looks[0]
            ]
        )


class Llm:
    """In place of `vllm.LLM`: what it was asked for, which tensors it was given, and the memory that it would take.

    memory: bytes of a GPU. workspace: what an engine takes beside weights and KV cache.
    """

    ledger: Ledger
    memory: float
    workspace: float
    made: list[Llm] = []  # noqa: RUF012

    def __init__(self, **arguments: Any):
        self.arguments = arguments
        self.loads: list[Counter[str]] = []
        self.llm_engine = self
        self._held: dict[str, Tensor] = {}
        self.weight_bytes = 0
        Llm.made.append(self)

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        """`reload_weights`: draws the stream to its end, and keeps nothing of it."""
        assert method == "reload_weights"
        sizes: Counter[str] = Counter()
        for name, tensor in kwargs["weights_iterator"]:
            sizes[name] += tensor.nbytes
        self.loads.append(sizes)

    def reset_prefix_cache(self) -> bool:
        return True

    def take(self, weights: float) -> None:
        """Allocate what vLLM would at its start. weights: bytes of this rank's."""
        share = self.memory * self.arguments["gpu_memory_utilization"]
        self.sizes = {phases.ROLLOUT_WEIGHTS: weights, phases.KV_CACHE: max(share - weights - self.workspace, 0)}
        self.wake_up(["weights", "kv_cache"])

    def sleep(self, level: int) -> None:
        self._held.clear()

    def wake_up(self, tags: Sequence[str]) -> None:
        names = {"weights": phases.ROLLOUT_WEIGHTS, "kv_cache": phases.KV_CACHE}
        for tag in tags:
            self._held[tag] = torch.empty(int(self.sizes[names[tag]]), dtype=torch.uint8, device="meta")
            self.ledger.label(names[tag], [self._held[tag]])


def put_in_place_of_vllm() -> None:
    module: Any = types.ModuleType("vllm")
    module.LLM = Llm
    sys.modules["vllm"] = module
