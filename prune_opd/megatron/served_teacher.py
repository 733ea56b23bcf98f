"""A teacher in a server (`elsewhere/client.py`): of each token its best ids and what was sampled, and no layer here.

    hidden(rollouts, deals)
      ├─ each row is asked for by the first rank that trains on it, all of a rank's rows at once
      ├─ what one rank cannot have is an error on all of them
      └─ the others that train on it get it on the way of hidden states (`redistribute`)

A token's numbers travel as int32: K ids, the bits of their K log-probabilities, and those of the sampled one's.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.config import TrainConfig
from prune_opd.config.rollout import MISMATCH_LIMIT
from prune_opd.elsewhere.client import Scores, TeacherClient
from prune_opd.elsewhere.row_store import RowStore
from prune_opd.elsewhere.teacher_digest import served_name
from prune_opd.errors import UserError
from prune_opd.loss import KnownTop
from prune_opd.megatron.layout import Layout
from prune_opd.megatron.redistribute import KeptHidden, TeacherHidden, find_routes, redistribute, replica_of_row
from prune_opd.megatron.row_cache import RowCache, asked_of
from prune_opd.model_spec import ModelSpec
from prune_opd.process import tell
from prune_opd.rollout.balance import Deal
from prune_opd.rollout.batch import Rollouts

NAME = "best_TC"  # of a row's tensor on disk
PROBE, PROBE_TOKENS = "teacher_probe.json", 32


class ServedTeacher:
    """What `Teacher` is to loop and loss. Collective to make; `UserError` on all ranks where the server will not do.

    run_dir: keeps what the server said of a fixed text (`PROBE`), for this run's later steps and continuations.
    """

    note: Callable[[str], None] = staticmethod(tell)

    def __init__(self, config: TrainConfig, layout: Layout, device: torch.device, run_dir: Path) -> None:
        self.server, self.layout, self.device = config.teacher_server, layout, device
        self.spec, self.client = ModelSpec.read(config.model_dirs["teacher"]), TeacherClient(config.teacher_server)
        self.chunks: list[Any] = []
        self.record: dict[str, float] = {}
        self.known: tuple[int, ...] = ()
        self.head_weight = torch.empty(0, device=device)
        self.nothing = torch.empty(0, 2 * self.server.top_k + 1, dtype=torch.int32, device=device)
        self.rows: RowCache | None = None
        self.probe = run_dir / PROBE
        self.most = MISMATCH_LIMIT[config.precision.params]
        self.name = self.server.model or served_name(config.model_dirs["teacher"])
        self.only = config.teacher_cache.mode == "only"  # every row is on disk: nobody is asked
        longest = config.teacher_prompt_limit + config.horizon.max_len
        self._together(lambda: None if self.only or not layout.is_main else self._meet(longest))

    @property
    def identity(self) -> str:
        """Of its rows on disk; the name has the digest of its weights (`check_teacher_server`)."""
        return hashlib.blake2b(f"{self.name} {self.server.top_k} best ids".encode(), digest_size=16).hexdigest()

    def keep_in(self, store: RowStore) -> None:
        self.rows = RowCache(store, self.layout, NAME, self.nothing)

    def hidden(self, rollouts: Rollouts, deals: Sequence[Deal], kept: KeptHidden | None = None) -> TeacherHidden:
        """What the server says of the rows that this rank trains on. Collective over the job."""
        began, before = time.perf_counter(), self.client.failures
        stored, problems = self.rows.find(rollouts, deals, KeptHidden()) if self.rows else (KeptHidden(), [])
        for problem in problems:
            self.note(f"teacher cache: {problem}")
        missing = sorted(replica_of_row(deals).keys() - stored.holders_of.keys())
        if missing and self.only and self.rows:
            raise UserError(self.rows.absent(rollouts, missing, problems))
        writes = self.rows is not None and self.rows.make_room(rollouts, missing, self.note)
        elapsed = time.perf_counter() - began
        mine = [row for row in asked_of(self.layout, deals) if row in set(missing)]
        asked = self._together(lambda: self._ask(rollouts, mine, bool(missing)))
        holders = {row: (rank,) for rank, rows in enumerate(self._everyone(list(asked))) for row in rows}
        known = KeptHidden(stored.holders_of | holders, stored.of_row | asked)
        began = time.perf_counter()
        written = self.rows.write(rollouts, known, missing) if self.rows and writes else 0
        routes = find_routes(known.holders_of, replica_of_row(deals), self.layout.student, rollouts.length_B)
        found = redistribute(known.of_row, rollouts.length_B, routes, self.nothing)
        self.known = tuple(replica_of_row(deals))
        self.record = {"served_rows": len(missing), "served_retries": self.client.failures - before}
        if self.rows:
            self.record |= {
                "cache_rows": len(stored.holders_of),
                "cache_bytes_read": self.rows.bytes_of(rollouts, list(stored.holders_of)),
                "cache_bytes_written": written,
                "time_teacher_cache": elapsed + time.perf_counter() - began,
            }
        return found

    def look(
        self, rollouts: Rollouts, deals: Sequence[Deal], kept: KeptHidden | None = None
    ) -> tuple[TeacherHidden, KeptHidden]:
        """What the self-test asks: as `hidden`, and nothing is kept on disk."""
        rows, self.rows = self.rows, None
        try:
            return self.hidden(rollouts, deals), KeptHidden()
        finally:
            self.rows = rows

    def view(self, best_MC: Tensor) -> KnownTop:
        """Some tokens' numbers as the loss takes them."""
        ids_MK, logp_MK, sampled_M1 = best_MC.split([self.server.top_k, self.server.top_k, 1], dim=1)
        logp_MK, sampled_M1 = (bits.contiguous().view(torch.float32) for bits in (logp_MK, sampled_M1))
        return KnownTop(ids_MK.long(), logp_MK, sampled_M1.squeeze(1))

    # ------------------------------------------------------------------------------------------------ the server

    def _ask(self, rollouts: Rollouts, rows: Sequence[int], any_asked: bool) -> dict[int, Tensor]:
        if any_asked and self.layout.is_main:
            self._check_probe()  # a server that was started again may have another model under the same name
        prompts = rollouts.teacher_prompt_ids
        texts = [(prompts[row], rollouts.responses[row].ids) for row in rows]
        scores = self.client.score(self.name, texts, self.server.top_k)
        return {row: _packed(of_row).to(self.device) for row, of_row in zip(rows, scores, strict=True)}

    def _meet(self, longest: int) -> None:
        """Refuse a server of another model: by its name, vocabulary and length, and by what it said before."""
        url, vocab = self.client.url, self.spec.vocab_size
        served = {model.name: model for model in self.client.models()}
        if self.name not in served:
            whose = "teacher_server.model" if self.server.model else "the weights of `teacher` are"
            raise UserError(
                f"teacher_server.url = {url!r} serves {', '.join(served) or 'nothing'}, and {whose} {self.name}: start "
                "the server with that directory (make serve-teacher), or set teacher_server.model to what it serves if "
                "that is the teacher"
            )
        room = served[self.name].max_len
        if room is not None and room < longest + 1:
            raise UserError(
                f"teacher_server.url = {url!r} takes {room} tokens, and the teacher's prompt + horizon.max_len + 1 may "
                f"be {longest + 1}: start it with a larger --max-model-len, or shorten one of them"
            )
        if self.client.refuses(self.name, vocab - 1) or not self.client.refuses(self.name, vocab):
            raise UserError(
                f"teacher_server.url = {url!r} has not the {vocab} token ids of the teacher's config.json: another "
                "model is served under its name; start the server with the teacher's directory (make serve-teacher)"
            )
        self._check_probe()

    def _check_probe(self) -> None:
        draw = random.Random(0)
        ids = [draw.randrange(self.spec.vocab_size) for _ in range(PROBE_TOKENS)]
        (scores,) = self.client.score(self.name, [(ids[:1], ids[1:])], 1)
        logp = scores.sampled_T.tolist()
        if not self.probe.is_file():
            self.probe.parent.mkdir(parents=True, exist_ok=True)
            self.probe.write_text(json.dumps({"model": self.name, "ids": ids, "logp": logp}) + "\n", encoding="utf-8")
            return
        try:
            before = json.loads(self.probe.read_text(encoding="utf-8"))
            apart = float(np.mean(np.abs(np.subtract(logp, before["logp"]))))
        except (ValueError, KeyError, TypeError) as reason:
            raise UserError(f"{self.probe} cannot be read ({reason!r}): remove it to trust the server anew") from None
        if before["ids"] != ids or not apart <= self.most:
            raise UserError(
                f"teacher_server.url = {self.client.url!r} is not the teacher that this run has begun with: its "
                f"log-probabilities of a fixed text are {apart:.2g} nats apart on average (limit: {self.most:g}); "
                f"start the server with the same weights, or remove {self.probe} if the change is meant"
            )

    def _together(self, act: Callable[[], Any]) -> Any:
        """What `act` returns on this rank. The first `UserError` of any rank is raised on all. Collective."""
        found, problem = None, ""
        try:
            found = act()
        except UserError as error:
            problem = str(error)
        for rank, text in enumerate(self._everyone(problem)):
            if text:
                raise UserError(f"rank {rank}: {text}" if self.layout.world > 1 else text)
        return found

    def _everyone(self, mine: Any) -> list[Any]:
        everyone: list[Any] = [None] * self.layout.world
        dist.all_gather_object(everyone, mine)
        return everyone


def _packed(scores: Scores) -> Tensor:
    parts = [scores.ids_TK, scores.logp_TK.view(np.int32), scores.sampled_T.view(np.int32)[:, None]]
    return torch.from_numpy(np.concatenate(parts, axis=1))
