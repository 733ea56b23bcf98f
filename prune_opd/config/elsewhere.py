"""Settings of a teacher that is not, or not always, in this job: on disk since an earlier one, or in a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from prune_opd.config.checks import Checked, Count, CountOrZero, Positive, required
from prune_opd.config.method import GateConfig, HorizonConfig, ObjectiveConfig, WeightingConfig
from prune_opd.config.rollout import RolloutConfig
from prune_opd.config.teacher import EMA
from prune_opd.errors import ConfigError


@dataclass(frozen=True)
class TeacherCacheConfig(Checked, name="teacher_cache"):
    """The teacher's hidden states on disk, row by row, for runs that meet the same rollouts again."""

    # off | use: rows that are there are not computed again, the others are computed and kept | only: every row must be
    # there; of the teacher nothing is loaded but its output head
    mode: Literal["off", "use", "only"] = "off"
    dir: str | None = None  # its folder; several runs may share it, and several teachers
    max_gb: Positive = 20.0  # of the folder, all teachers together [10⁹ bytes]; the rows not needed for longest go out

    @property
    def on(self) -> bool:
        return self.mode != "off"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on:
            required("teacher_cache.dir", self.dir, f"teacher_cache.mode = {self.mode} needs a folder")


def check_moving_teacher(teacher: str, cache: TeacherCacheConfig, server: TeacherServerConfig) -> None:
    """ConfigError where the teacher's weights move, and what is elsewhere would be of others."""
    fields = {f"teacher_cache.mode = {cache.mode}": cache.on, f"teacher_server.url = {server.url!r}": server.on}
    for field in (field for field, on in fields.items() if on and teacher == EMA):
        raise ConfigError(
            f"{field} with teacher = ema: the average moves at every step, and what is known of it elsewhere is of "
            "yesterday's; set teacher=student, a directory, or leave the former out"
        )


def check_teacher_cache(cache: TeacherCacheConfig, rollout: RolloutConfig) -> None:
    """ConfigError where a teacher without layers would have to look at new text."""
    if cache.mode == "only" and rollout.refresh_every != 0:
        raise ConfigError(
            f"teacher_cache.mode = only with rollout.refresh_every = {rollout.refresh_every}: the student moves, so it "
            "samples responses that no earlier run has met; set rollout.refresh_every=0 (the initial student's "
            "rollouts for the whole run), or teacher_cache.mode=use"
        )


@dataclass(frozen=True)
class TeacherServerConfig(Checked, name="teacher_server"):
    """A vLLM server that scores the responses, in place of a teacher in the job. It knows the teacher's best ids only.

    `teacher` is its directory all the same: its config.json and tokenizer are needed here.
    """

    url: str | None = None  # http://HOST:PORT; null: the teacher is in the job
    # the id that it must serve; null: that of `teacher`'s weights, NAME-DIGEST, as `make serve-teacher` names it
    model: str | None = None
    top_k: Count = 16  # of the teacher's best ids, for each token; at most the server's --max-logprobs
    concurrency: Count = 8  # requests of a rank that are under way at a time
    timeout: Positive = 120.0  # seconds for a request and its whole answer
    retries: CountOrZero = 4  # of a request that failed, after 1, 2, 4 … seconds

    @property
    def on(self) -> bool:
        return self.url is not None

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = urlsplit(self.url or "http://host:1")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.path.strip("/"):
            raise ConfigError(
                f"teacher_server.url = {self.url!r} is no address of a server: give http://HOST:PORT, without a path"
            )


WHOLE_VOCABULARY = ("full_vocab_reverse_kl", "full_vocab_forward_kl", "full_vocab_mixed_kl", "full_vocab_jsd")
ON_SAMPLED = ("sampled_token", "sampled_k2", "sampled_k3")


def check_teacher_server(
    server: TeacherServerConfig,
    gate: GateConfig | None,
    objective: ObjectiveConfig,
    weighting: WeightingConfig,
    rollout: RolloutConfig,
    horizon: HorizonConfig,
    cache: TeacherCacheConfig,
) -> None:
    """ConfigError naming each setting that needs more of the teacher than its best ids and the sampled one."""
    if not server.on:
        return
    problems = _objective_problems(server, objective) + _other_problems(server, gate, weighting)
    if rollout.inflight.on:
        problems.append(
            "rollout.inflight.mode = gate: the teacher would look at every response on its way; set "
            "rollout.inflight.mode=off"
        )
    if horizon.strategy == "fastopd":
        problems.append(
            "horizon.strategy = fastopd: one of its signals is the teacher's mass on the student's best ids, which is "
            "not known; take another strategy"
        )
    if cache.on and server.model is not None:
        problems.append(
            f"teacher_server.model = {server.model!r} and teacher_cache.mode = {cache.mode}: rows on disk are named by "
            "the checksum of the teacher's weights, and a name that is yours has none; leave teacher_server.model out, "
            "or set teacher_cache.mode=off"
        )
    if problems:
        here = "or leave teacher_server.url out, for a teacher in the job"
        raise ConfigError("\n".join(f"teacher_server.url with {problem}, {here}" for problem in problems))


def _objective_problems(server: TeacherServerConfig, objective: ObjectiveConfig) -> list[str]:
    best, found = f"the server knows the teacher's {server.top_k} best ids and the sampled one", []
    if objective.name in WHOLE_VOCABULARY:
        found.append(
            f"objective.name = {objective.name}: it is on the whole vocabulary, and {best}; take topk_forward_kl, "
            "local_support_matching, priced_reverse_kl, or topk_reverse_kl with objective.support=teacher"
        )
    if objective.name == "topk_reverse_kl" and objective.support in ("student", "union"):
        found.append(
            f"objective.support = {objective.support}: {best}, not the student's; set objective.support=teacher or "
            "intersection"
        )
    if objective.k > server.top_k:
        found.append(
            f"objective.k = {objective.k}: {best}; raise teacher_server.top_k, or set objective.k={server.top_k}"
        )
    if objective.tail == "bucket" and server.top_k < 2 * objective.k:
        found.append(
            f"objective.tail = bucket and objective.k = {objective.k}: {best}; where it is sure, the mass beside "
            f"these is lost in rounding, so ids beyond them must be known: set teacher_server.top_k={2 * objective.k}"
        )
    if objective.baseline != "none":
        found.append(
            f"objective.baseline = {objective.baseline}: it is on the whole vocabulary, and {best}; set "
            "objective.baseline=none"
        )
    if objective.of_teacher != 1:
        name = "temperature" if objective.teacher_temperature is None else "teacher_temperature"
        found.append(
            f"objective.{name} = {objective.of_teacher:g}: the server's log-probabilities are at temperature 1; set "
            "objective.teacher_temperature=1"
        )
    if objective.ends != "as_is":
        found.append(
            f"objective.ends = {objective.ends}: the teacher's mass on every end is not known, and {best}; set "
            "objective.ends=as_is"
        )
    return found


def _other_problems(server: TeacherServerConfig, gate: GateConfig | None, weighting: WeightingConfig) -> list[str]:
    best, found = f"the server knows the teacher's {server.top_k} best ids and the sampled one", []
    if gate is not None and gate.metric in ("acceptance", "change_point", "kl_agreement"):
        found.append(
            f"gate.metric = {gate.metric}: it needs the teacher's probability of the student's ids, and {best}; take "
            "overlap, overlap_quantile, shared_mass or teacher_top_p"
        )
    if gate is not None and gate.k > server.top_k:
        found.append(f"gate.k = {gate.k}: {best}; raise teacher_server.top_k, or set gate.k={server.top_k}")
    if weighting.name in ("entropy_aware", "tip"):
        found.append(
            f"weighting.name = {weighting.name}: it is made of sums over the teacher's whole vocabulary, and {best}; "
            "take iw_opd, sdar or tropd"
        )
    if weighting.name == "tropd" and weighting.forward_k > server.top_k:
        found.append(
            f"weighting.forward_k = {weighting.forward_k}: {best}; raise teacher_server.top_k, or set "
            f"weighting.forward_k={server.top_k}"
        )
    return found
