"""vLLM inside the training ranks: every `tensor_parallel` ranks form one engine, and the rows are dealt to the engines.

Nothing here knows megatron: weights come in as a stream of (Hugging Face name, whole tensor).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from prune_opd import platform
from prune_opd.config import RolloutConfig
from prune_opd.errors import UserError
from prune_opd.model_spec import ModelSpec, model_config
from prune_opd.platform import Platform, untouched_rng
from prune_opd.process import progress, uncollected, watched
from prune_opd.rollout import cpu_norm
from prune_opd.rollout.batch import Response, Rollouts
from prune_opd.rollout.kv_cache import cache_bytes, give_pages_back
from prune_opd.rollout.long_tail import Race, deal_to_engines
from prune_opd.rollout.refusal import in_our_words
from prune_opd.rollout.request import NOTHING, Row, TokenSampling, told_apart
from prune_opd.rollout.stepwise import StepLoop, Watch, run_together, so_far

# Read when vllm is imported. One process a rank (no engine subprocess), no telemetry, no hub; the V1 model runner on
# every platform, because the CPU has no other and both must behave alike. FlashInfer would compile its sampler and its
# all-reduce when an engine starts, with an nvcc that may not be there: requests of ours never take the former, and the
# latter has vLLM's own in its place. What a shell sets goes before.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
}
BUILD_SECONDS = 1800  # of a collective while engines are built: the ranks compile and read at their own speed
HEAD_DTYPES = {"fp32": "float32"}  # rollout.head_dtype → vLLM's name
SLEEPERS = ("kv_cache", "weights")  # vLLM's names of what sleeps
QUIET_LOGGERS = ("torch._library.triton",)  # "Triton not available", on every CPU start


@dataclass(frozen=True)
class EngineOptions:
    """What an engine that is part of a run needs to know of the run.

    sleep_level: how much of its memory it gives back between rollouts (vLLM's levels; 0: it never sleeps).
    max_logprobs: how many tokens' log-probabilities a request may ask for at a position, at most.
    timeout_minutes: of the job's collectives; None: vLLM's own. Those inside an engine get half of it: where one of its
    ranks has failed, the others notice in time to meet the rest of the job, and all can say why they end.
    stop_ids: token ids that end a response, beside those of the model itself.
    end_id: the tokenizer's end of a sequence; None: vLLM loads the tokenizer, which it needs for nothing else.
    """

    sleep_level: int = 0
    max_logprobs: int = 0
    timeout_minutes: float | None = None
    stop_ids: tuple[int, ...] = ()
    end_id: int | None = None


def prepare_process() -> None:
    """What must be so in a process before vllm is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


class RolloutEngine:
    """One vLLM engine per `rollout.tensor_parallel` ranks (vLLM's external launcher, inside torchrun)."""

    def __init__(
        self,
        model_dir: str,
        rollout: RolloutConfig,
        max_response: int,
        dtype: torch.dtype,
        machine: Platform,
        options: EngineOptions = EngineOptions(),
    ):
        prepare_process()
        self.machine = machine
        self.compiled = rollout.enforce_eager is False or (rollout.enforce_eager is None and not machine.is_cpu)
        self.holds_weights = True  # it starts with those of `model_dir`
        self.asleep: set[str] = set()  # of SLEEPERS
        self.sleep_level = 0 if machine.is_cpu else options.sleep_level  # vLLM's CPU build has no sleep
        self.stop_ids = sorted({*options.stop_ids, *([] if options.end_id is None else [options.end_id])})
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.engines = self.world // rollout.tensor_parallel
        self.engine_index = self.rank // rollout.tensor_parallel
        max_model_len = rollout.max_prompt_len + max_response
        set_num_threads = torch.set_num_threads
        dist.barrier()  # a rank whose models took longer to read would use up the patience of the engine's own groups
        with untouched_rng():
            from vllm import LLM

            platform.prepare_vllm()
            compiled = platform.compiling() if self.compiled and machine.is_cpu else nullcontext()
            # A seventh of what compiling costs this process. On a GPU garbage would count as what the model needs.
            collecting = uncollected() if machine.is_cpu else nullcontext()
            with compiled, collecting, in_our_words(rollout, machine.is_cpu, max_model_len):
                self.llm: Any = LLM(
                    model=model_dir,
                    skip_tokenizer_init=options.end_id is not None,
                    load_format="safetensors",  # a pickle is a program
                    trust_remote_code=False,
                    dtype=str(dtype).removeprefix("torch."),
                    max_model_len=max_model_len,
                    max_num_seqs=rollout.max_num_seqs,
                    tensor_parallel_size=rollout.tensor_parallel,
                    distributed_executor_backend="external_launcher",
                    seed=0,
                    disable_log_stats=True,
                    enforce_eager=not self.compiled,
                    use_tqdm_on_load=False,
                    max_logprobs=max(options.max_logprobs, 1),
                    **_timeouts(options.timeout_minutes),
                    **rollout_arguments(rollout, self.sleep_level),
                    **self._platform_settings(rollout, max_model_len, model_dir, dtype),
                )
        if machine.is_cpu:
            self.llm.collective_rpc(give_pages_back)
        torch.set_num_threads = set_num_threads  # vLLM replaces it with one that refuses
        _answer_within(_seconds(options.timeout_minutes))

    def _platform_settings(
        self, rollout: RolloutConfig, max_model_len: int, model_dir: str, dtype: torch.dtype
    ) -> dict[str, Any]:
        if self.machine.is_cpu:
            spec = ModelSpec.of(model_config("student", model_dir), model_dir)
            value = dtype.itemsize if rollout.kv_cache_dtype == "auto" else 1
            token_bytes, limit = spec.kv_bytes(value, rollout.tensor_parallel), int(rollout.kv_cache_gb * 2**30)
            return {
                **({} if self.compiled else cpu_norm.engine_arguments()),
                "kv_cache_memory_bytes": cache_bytes(limit, rollout.max_num_seqs, max_model_len, token_bytes),
                # After part of a prefill vLLM rewinds the request's generator, which a CPU generator cannot do.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(8192, max_model_len),
            }
        # The tuning of FlashInfer's kernels ends in a barrier of all engines, and none of them is used here.
        return {
            "gpu_memory_utilization": rollout.gpu_memory_utilization,
            "enable_flashinfer_autotune": False,
        }

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the engine's weights. Collective: every rank draws the stream to its end."""
        with untouched_rng():
            platform.reload_weights(self.llm, weights)
        self.holds_weights = True
        if not self.llm.reset_prefix_cache():  # cached prefixes belong to the old weights
            raise UserError("the rollout engine kept prefixes of the old weights: was it loaded while it generated?")
        if self.machine.is_cpu:
            self.llm.collective_rpc(give_pages_back)

    def sleep(self) -> None:
        """Give the device memory back: KV cache and weights, which level 1 keeps in host memory and level 2 does not.

        After level 2 the engine must be loaded again before it generates: `holds_weights` is False until then.
        """
        self.holds_weights = self.sleep_level < 2
        self.llm.sleep(level=self.sleep_level)
        self.asleep = set(SLEEPERS)

    def wake_up(self, tags: Sequence[str]) -> None:
        """Take memory for `weights`, `kv_cache` or both. The engine generates again once it has both."""
        self.llm.wake_up(tags=list(tags))
        self.asleep -= set(tags)

    def generate(
        self, rows: Sequence[Row], sampling: TokenSampling, race: Race | None = None, watch: Watch | None = None
    ) -> Rollouts:
        """The responses that `rows` ask for, in their order: the whole batch on every rank. Collective over the job.

        race: the rows are groups, one a prompt, and those that are complete first come back; the others are in `left`.
        watch: who may stop a response at a look. The others have exactly the tokens that they have without it.
        """
        rows = told_apart(rows)
        looks = () if watch is None else watch.looks(max((row.limit for row in rows), default=0))
        if race is not None:
            self.llm.reset_prefix_cache()  # who is first must not depend on what was generated before
        if watch is not None:
            watch.begin([row.prompt for row in rows], [row.limit for row in rows], [row.begun for row in rows])
        dealt = deal_to_engines([row.work for row in rows], self.engines)
        mine = {number: rows[number] for number in dealt[self.engine_index]}
        if looks or race is not None or any(row.begun != NOTHING for row in rows):
            outputs = self._sample_together(mine, sampling, looks, race, watch)
        else:
            with untouched_rng():
                outputs = self._sample(list(mine.values()), sampling)
        whole = Rollouts(tuple(row.prompt for row in rows), tuple(self._gather(outputs, dealt)))
        if race is None:
            return whole
        winners = race.winners()
        if watch is not None:
            watch.keep([row for group in winners for row in race.rows(group)])
        return whole.split(winners, race.responses)

    def _sample(self, rows: Sequence[Row], sampling: TokenSampling) -> list[Response]:
        from vllm import SamplingParams

        if not rows:
            return []
        settings = {"logprobs": 0, "flat_logprobs": True} if sampling.logprobs else {}
        with _told(self.llm.llm_engine, len(rows)):
            outputs = self.llm.generate(
                [{"prompt_token_ids": list(row.prompt.ids)} for row in rows],
                [SamplingParams(**settings, **self._settings(row, sampling)) for row in rows],
                use_tqdm=False,
            )
        return [_response(output.outputs[0], sampling.logprobs) for output in outputs]

    def _sample_together(
        self,
        rows: Mapping[int, Row],
        sampling: TokenSampling,
        looks: Sequence[int],
        race: Race | None,
        watch: Watch | None,
    ) -> list[Response]:
        """rows: this engine's, by their number in the batch. Collective over the job, for engines without rows too."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        loop = StepLoop(self.llm.llm_engine, looks, racing=race is not None, logprobs=sampling.logprobs)
        top = watch.top if watch is not None and looks else None
        top = 0 if top is None and sampling.logprobs else top
        settings = {"logprobs": top, "flat_logprobs": top is not None, "output_kind": RequestOutputKind.DELTA}

        def start() -> None:
            for number, row in rows.items():
                params = SamplingParams(**settings, **self._settings(row, sampling))
                loop.add(number, row.prompt.ids, params, row.limit, row.begun)

        run_together(loop, start, watch, race, self.world // self.engines)
        return loop.responses()

    def _settings(self, row: Row, sampling: TokenSampling) -> dict[str, Any]:
        """vLLM's sampling settings of a row."""
        return {
            "seed": sampling.seed_of(row),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": max(row.limit - len(row.begun.ids), 1),
            "stop_token_ids": self.stop_ids,
            "detokenize": False,
        }

    def _gather(self, outputs: list[Response], dealt: Sequence[Sequence[int]]) -> list[Response]:
        """Every engine's responses in the order of the batch; dealt: the rows that each engine had."""
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, outputs)
        ranks_per_engine = self.world // self.engines
        by_row = {
            number: replace(response, engine=engine)
            for engine, numbers in enumerate(dealt)
            for number, response in zip(numbers, everyone[engine * ranks_per_engine], strict=True)
        }
        return [by_row[number] for number in range(len(by_row))]

    def close(self) -> None:
        """End the engine. vLLM also ends torch.distributed with it, so this is the last thing a rank does together.

        An engine that sleeps is woken first: its memory is mapped to nothing, and what ends it may touch that.
        """
        if self.asleep:
            self.wake_up(sorted(self.asleep))
        dist.barrier()
        self.llm.llm_engine.engine_core.shutdown()


@contextmanager
def _told(engine: Any, responses: int) -> Iterator[None]:
    """While it generates, an engine of vLLM says how far it is.

    vLLM's own progress bar moves only when a response ends, which is late where all of them are long.
    """
    if not watched():
        yield
        return
    plain, ended, tokens = engine.step, 0, 0  # tokens: of the responses that have ended

    def describe() -> str:
        under_way = engine.output_processor.request_states.values()
        return so_far(ended, responses, tokens + sum(one.detokenizer.num_output_tokens() for one in under_way))

    def step() -> Any:
        nonlocal ended, tokens
        outputs = plain()
        for output in outputs:
            if output.finished:
                ended += 1
                tokens += sum(len(completion.token_ids) for completion in output.outputs)
        progress(describe)
        return outputs

    engine.step = step
    try:
        yield
    finally:
        del engine.step  # the method of its class again


def rollout_arguments(rollout: RolloutConfig, sleep_level: int = 0) -> dict[str, Any]:
    """Number formats, of vLLM's `EngineArgs` (and `LLM`). sleep_level: 0: it will not be put to sleep."""
    head = {} if rollout.head_dtype == "auto" else {"hf_overrides": {"head_dtype": HEAD_DTYPES[rollout.head_dtype]}}
    return {
        **head,
        "quantization": rollout.quantization,
        "kv_cache_dtype": rollout.kv_cache_dtype,
        "enable_sleep_mode": sleep_level > 0,
    }


def _response(completion: Any, logprobs: bool) -> Response:
    ids = tuple(completion.token_ids)
    chosen = tuple(completion.logprobs.logprobs) if logprobs else None  # one a token, that of the sampled one
    return Response(ids, completion.finish_reason == "stop", chosen)


def _seconds(minutes: float | None) -> int | None:
    """Of the collectives inside an engine: half of the job's, so that all ranks can still meet and say what failed."""
    return None if minutes is None else max(1, int(minutes * 30))


def _timeouts(minutes: float | None) -> dict[str, int]:
    """vLLM's settings for the collectives inside an engine while it is built, in whole seconds."""
    seconds = _seconds(minutes)
    if seconds is None:
        return {}
    seconds = max(seconds, BUILD_SECONDS)
    return {"distributed_timeout_seconds": seconds, "cpu_distributed_timeout_seconds": seconds}


def _answer_within(seconds: int | None) -> None:
    """From here on a collective inside this process's engine ends with an error after so many seconds."""
    from vllm.distributed import parallel_state

    for reference in parallel_state._groups.values() if seconds is not None else ():
        if (coordinator := reference()) is None:
            continue
        for group in {coordinator.device_group, coordinator.cpu_group}:
            _set_pg_timeout(timedelta(seconds=seconds or 0), group)
