"""The long tail of a rollout: how long each response will probably be, which engine gets it, what a step leaves behind.

A batch takes as long as its longest response. So the responses are dealt to the engines by expected length, and the
longest start first. With `rollout.oversample` more prompts are started than the step needs, and the first complete ones
are kept. With `rollout.partial` the others go on in the next step, which waits for them: nothing is lost, and no token
is older than a step. Without it they are dropped until the source brings them again, so long answers become rarer.

With `rollout.refresh_every` a step generates what the next ones train on as well, and these wait here too. The paper of
Semi-OPD ("When Do We Need On-Policy Distillation?", arXiv 2610.11291, read through others' summaries) generates once,
with the initial student, for all steps, and scores with the student as it is now: 0. Between that and on-policy (1) is
ours, and so is the correction of stale tokens, which `rollout.correct_stale=false` leaves out as that paper does.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

from prune_opd.config import RolloutConfig, TrainConfig
from prune_opd.data.prompt import Prompt
from prune_opd.data.sampler import Sampler
from prune_opd.errors import ConfigError, UserError
from prune_opd.rollout.batch import Group, Response, Rollouts
from prune_opd.rollout.request import NOTHING, Row

REMEMBERED = 200_000  # latest prompts whose lengths are kept: a few megabytes of a checkpoint


class LongTail:
    """The groups that wait for the next step, and how long each prompt's responses were the last time.

    Both are saved in checkpoints. Prompts of an endless source never come again and are not remembered.

    taught: the settings that give prompts their teachers and hints (`taught_by`), which waiting prompts have already.
    """

    def __init__(self, settings: RolloutConfig, endless: bool = False, taught: Mapping[str, Any] | None = None) -> None:
        self.settings, self.endless, self.taught = settings, endless, taught or {}
        self.waiting: list[Group] = []
        self.age = 0  # steps since the rollouts were generated that the last step trained on
        self.history: dict[str, float] = {}  # mean length [tokens] by prompt

    def next(self, sampler: Sampler) -> list[Group]:
        """The groups that a step starts: the waiting ones, then new ones; in all ⌈`prompts` · `oversample`⌉."""
        wanted = started_prompts(self.settings)
        groups, self.waiting = self.waiting[:wanted], self.waiting[wanted:]
        return groups + [Group(prompt) for prompt in sampler.next(wanted - len(groups))]

    @property
    def stocked(self) -> bool:
        """Whether the next step's rollouts are here already."""
        return self.settings.reuses and bool(self.waiting and self.waiting[0].begun)

    def ahead(self, step: int, steps: int) -> int:
        """For how many steps step number `step` of `steps` generates, itself included."""
        every = self.settings.refresh_every
        if every == 0 and step > 1:
            raise UserError(
                "rollout.refresh_every = 0 and the initial student's rollouts are used up: steps was raised, or a "
                "checkpoint of other settings resumed; start a new run, or give the steps between two refreshes"
            )
        return min(every or steps, steps - step + 1)

    def reuse(self) -> Rollouts:
        """The next step's rollouts out of the stock."""
        prompts = self.settings.prompts
        groups, self.waiting = self.waiting[:prompts], self.waiting[prompts:]
        self.age += 1
        return Rollouts(
            tuple(group.prompt for group in groups for _ in group.begun),
            tuple(response for group in groups for response in group.begun),
        )

    def rows(self, groups: Sequence[Group], limits: Sequence[int]) -> list[Row]:
        """The engine's request: `responses` rows of each group. limits: the most tokens that each row may have."""
        responses = self.settings.responses
        about = zip(limits, begun_rows(groups, responses), self.expected(groups, limits), strict=True)
        return [Row(groups[i // responses].prompt, i % responses, *of_row) for i, of_row in enumerate(about)]

    def race(self, groups: Sequence[Group]) -> Race | None:
        """The race for the groups that are kept; None if all are. Begun groups come first and are waited for."""
        if self.settings.reuses or len(groups) <= self.settings.prompts:
            return None
        begun = sum(bool(group.begun) for group in groups)
        return Race(len(groups), self.settings.responses, self.settings.prompts, must=begun)

    def expected(self, groups: Sequence[Group], limits: Sequence[int]) -> list[float]:
        """Tokens that each row is still expected to get, at most up to its limit; 0 for a complete response.

        A new prompt is expected to be like the mean of the known ones. A response that is already longer than expected
        is expected to reach its limit.
        """
        responses = self.settings.responses
        unknown = fmean(self.history.values()) if self.history else math.inf
        lengths = [self.history.get(_key(group.prompt), unknown) for group in groups]
        rows = begun_rows(groups, responses)
        return [
            0.0 if begun.ended(limit) else _rest(min(lengths[row // responses], limit), len(begun.ids), limit)
            for row, (begun, limit) in enumerate(zip(rows, limits, strict=True))
        ]

    def take(self, rollouts: Rollouts) -> None:
        """Remember the lengths of a step's responses, and the groups that it has left."""
        responses, self.age = self.settings.responses, 0
        if not self.endless:
            for first in range(0, len(rollouts.responses), responses):
                self._remember(rollouts.prompts[first], fmean(rollouts.length_B[first : first + responses]))
            for group in rollouts.left:  # where it is incomplete the length so far is a lower bound
                length = fmean(len(response.ids) for response in group.begun)
                self._remember(group.prompt, max(length, self.history.get(_key(group.prompt), 0.0)))
        if self.settings.partial or self.settings.reuses:
            self.waiting += [replace(group, begun=tuple(map(_stale, group.begun))) for group in rollouts.left]

    def _remember(self, prompt: Prompt, length: float) -> None:
        self.history.pop(_key(prompt), None)  # the latest are at the end
        self.history[_key(prompt)] = length
        if len(self.history) > REMEMBERED:
            del self.history[next(iter(self.history))]

    def record(self, rollouts: Rollouts) -> dict[str, int]:
        """The long tail's part of a step record; nothing where every prompt that is started is kept."""
        if self.settings.reuses:
            return {"rollout_age": self.age, "stale_tokens": sum(response.stale for response in rollouts.responses)}
        if self.settings.oversample <= 1:
            return {}
        return {
            "prompts_left": len(rollouts.left),
            "tokens_left": rollouts.left_tokens,
            "stale_tokens": sum(response.stale for response in rollouts.responses),
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: plain JSON values."""
        waiting = [asdict(group) for group in self.waiting]
        return {
            "history": self.history,
            "waiting": waiting,
            "age": self.age,
            "of": self._identity(),
            "taught": self.taught,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`. Under other settings, responses that had begun start anew.

        ConfigError where waiting prompts have the teachers or hints of other settings; they are given up then.
        """
        self.history, self.age = dict(state["history"]), state.get("age", 0)
        groups, self.waiting = [_group(entry) for entry in state["waiting"]], []
        then = state.get("taught") or self.taught  # an older version's has none
        if groups and (others := [name for name in self.taught if then.get(name) != self.taught[name]]):
            changes = "; ".join(f"{name} = {then.get(name)!r}, this run has {self.taught[name]!r}" for name in others)
            raise ConfigError(
                f"the checkpoint's {len(groups)} waiting prompts had {changes}: restore that to resume, or start a new "
                "run"
            )
        fits = all(len(group.begun) in (0, self.settings.responses) for group in groups)
        fits = fits and (self.settings.partial or self.settings.reuses)
        fits = fits and state.get("of", self._identity()) == self._identity()  # an older version's has none
        self.waiting = groups if fits else [Group(group.prompt) for group in groups]  # they start anew

    def _identity(self) -> list[int | bool]:
        """What the waiting groups are: left behind, to go on with; or whole, a step's `prompts` after the other."""
        settings = self.settings
        return [settings.responses, settings.partial, settings.refresh_every, settings.prompts * settings.reuses]


def taught_by(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide who teaches a prompt and what its teacher reads, by name; plain JSON values."""
    data = config.data
    return {
        "teachers' sources": {name: [*one.sources] for name, one in config.teachers.items()},
        "data.teacher_column": data.teacher_column,
        "data.teacher_prompt": data.teacher_prompt,
    }


def started_prompts(settings: RolloutConfig) -> int:
    """Prompt groups that a step starts."""
    return math.ceil(settings.prompts * settings.oversample - 1e-9)


def begun_rows(groups: Sequence[Group], responses: int) -> list[Response]:
    """What every row has before a step; of a new group, empty responses."""
    return [row for group in groups for row in group.begun or [NOTHING] * responses]


def deal_to_engines(expected: Sequence[float], engines: int) -> list[list[int]]:
    """The rows of each engine, in the order in which they start. expected: tokens of each row.

    The longest rows are dealt first, each to the engine with the least work. Equal ones go to the engines in turn.
    """
    parts: list[list[int]] = [[] for _ in range(engines)]
    loads = [(0.0, 0, engine) for engine in range(engines)]
    for row in sorted(range(len(expected)), key=lambda row: -expected[row]):  # stable
        load, rows, engine = heapq.heappop(loads)
        parts[engine].append(row)
        heapq.heappush(loads, (load + expected[row], rows + 1, engine))
    return parts


class Race:
    """Finds the `keep` prompt groups that are complete first, by the engine step at which their last response ended.

    Steps decide, not seconds, so that the same run has the same winners again. In a tie the lower number wins. The
    first `must` groups win in any case, and are waited for.
    """

    def __init__(self, groups: int, responses: int, keep: int, must: int = 0) -> None:
        self.responses, self.keep = responses, min(keep, groups)
        self.must = min(must, self.keep)
        self.done_at: dict[int, int] = {}  # by row
        self._open = [responses] * groups

    def arrive(self, done: Mapping[int, int]) -> None:
        """Rows that have ended, each with its engine's step."""
        for row in done.keys() - self.done_at.keys():
            self._open[row // self.responses] -= 1
        self.done_at.update(done)

    @property
    def over(self) -> bool:
        return self._open.count(0) >= self.keep and not any(self._open[: self.must])

    def winners(self) -> list[int]:
        """The groups that are kept, ascending. ValueError before it is over."""
        if not self.over:
            raise ValueError(
                f"{self._open.count(0)} groups are complete, {self.keep} are wanted, the first {self.must} among them"
            )
        complete = [group for group, rows in enumerate(self._open) if rows == 0]
        complete.sort(key=lambda g: (g >= self.must, max(self.done_at[row] for row in self.rows(g))))
        return sorted(complete[: self.keep])

    def rows(self, group: int) -> range:
        """The numbers of a group's rows in the batch."""
        return range(group * self.responses, (group + 1) * self.responses)


def _rest(expected: float, begun: int, limit: int) -> float:
    return expected - begun if begun < expected else float(limit - begun)


def _stale(response: Response) -> Response:
    """The response as the next step gets it: all its tokens come from an older student then."""
    return replace(response, stale=len(response.ids), dropped=0)


def _group(entry: Mapping[str, Any]) -> Group:
    """A group out of a checkpoint's JSON, where tuples have become lists."""
    lists = {name: tuple(value) for name, value in entry["prompt"].items() if isinstance(value, list)}
    prompt = Prompt(**{**entry["prompt"], **lists})
    begun = [
        Response(**{**row, "ids": tuple(row["ids"]), "logprobs": tuple(row["logprobs"] or ())})
        for row in entry["begun"]
    ]
    return Group(prompt, tuple(begun))


def _key(prompt: Prompt) -> str:
    """A hash of the prompt's tokens. Its index would not do: two files of a mixture both count from 0."""
    return hashlib.blake2b(repr(prompt.ids).encode(), digest_size=8).hexdigest()
