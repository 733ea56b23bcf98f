"""vLLM inside the training ranks: every `tensor_parallel` ranks form one engine, and the rows are dealt to the engines.

Nothing here knows megatron: weights come in as a stream of (Hugging Face name, whole tensor).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from prune_opd.config import RolloutConfig
from prune_opd.data.prompt import Prompt
from prune_opd.errors import UserError
from prune_opd.platform import Platform, compiling, untouched_rng
from prune_opd.rollout.batch import Response, Rollouts
from prune_opd.rollout.long_tail import Race, deal_to_engines
from prune_opd.rollout.precision import rollout_arguments
from prune_opd.rollout.stepwise import StepLoop, Watch, run_together

# Read when vllm is imported. One process a rank (no engine subprocess), no telemetry, no hub; the V1 model runner on
# every platform, because the CPU has no other and both must behave alike.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
QUIET_LOGGERS = ("torch._library.triton",)  # "Triton not available", on every CPU start


def request_seed(run_seed: int, step: int, prompt: int, sample: int) -> int:
    """The sampler's seed of one response: the same whatever the batch, the order or the number of engines."""
    key = f"{run_seed}/{step}/{prompt}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little")


class Request(NamedTuple):
    """A row of the batch on its way to an engine. limit: tokens, `begun` included; sampling: vLLM's settings."""

    row: int
    prompt: Prompt
    limit: int
    begun: Response
    sampling: dict[str, Any]


class RolloutEngine:
    """One vLLM engine per `rollout.tensor_parallel` ranks (vLLM's external launcher, inside torchrun)."""

    def __init__(
        self,
        model_dir: str,
        rollout: RolloutConfig,
        max_response: int,
        dtype: torch.dtype,
        machine: Platform,
        *,
        sleep_level: int = 0,
        max_logprobs: int = 0,
        timeout_minutes: float | None = None,
    ):
        """max_logprobs: how many tokens' log-probabilities a request may ask for at a position, at most.

        timeout_minutes: of the job's collectives. Those inside an engine get half of it: where one of its ranks has
        failed, the others notice in time to meet the rest of the job, and all can say why they end.
        """
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.machine = machine
        self.compiled = rollout.enforce_eager is False or (rollout.enforce_eager is None and not machine.is_cpu)
        self.holds_weights = True  # it starts with those of `model_dir`
        self.sleep_level = 0 if machine.is_cpu else sleep_level  # vLLM's CPU build has no sleep
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.engines = self.world // rollout.tensor_parallel
        self.engine_index = self.rank // rollout.tensor_parallel
        max_model_len = rollout.max_prompt_len + max_response
        for name in QUIET_LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        set_num_threads = torch.set_num_threads
        with untouched_rng():
            from vllm import LLM

            if machine.is_cpu:
                import vllm.v1.sample.sampler  # noqa: F401  before `compiling`, which is for the model alone

                _own_shared_memory()
            with compiling() if self.compiled and machine.is_cpu else nullcontext():
                self.llm: Any = LLM(
                    model=model_dir,
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
                    max_logprobs=max(max_logprobs, 1),
                    **_timeouts(timeout_minutes),
                    **rollout_arguments(rollout, self.sleep_level),
                    **self._platform_settings(rollout, max_model_len),
                )
        torch.set_num_threads = set_num_threads  # vLLM replaces it with one that refuses

    def _platform_settings(self, rollout: RolloutConfig, max_model_len: int) -> dict[str, Any]:
        if self.machine.is_cpu:
            return {
                "kv_cache_memory_bytes": int(rollout.kv_cache_gb * 2**30),
                # After part of a prefill vLLM rewinds the request's generator, which a CPU generator cannot do.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(8192, max_model_len),
            }
        return {"gpu_memory_utilization": rollout.gpu_memory_utilization}

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the engine's weights. Collective: every rank draws the stream to its end."""
        with untouched_rng():
            if self.machine.is_cpu:
                self.llm.collective_rpc(_unpack_experts)
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
            if self.machine.is_cpu:
                self.llm.collective_rpc(_repack_tied_head)
        self.holds_weights = True
        if not self.llm.reset_prefix_cache():  # cached prefixes belong to the old weights
            raise UserError("the rollout engine kept prefixes of the old weights: was it loaded while it generated?")

    def sleep(self) -> None:
        """Give the device memory back: KV cache and weights, which level 1 keeps in host memory and level 2 does not.

        After level 2 the engine must be loaded again before it generates: `holds_weights` is False until then.
        """
        self.holds_weights = self.sleep_level < 2
        self.llm.sleep(level=self.sleep_level)

    def wake_up(self, tags: Sequence[str]) -> None:
        """Take memory for `weights`, `kv_cache` or both. The engine generates again once it has both."""
        self.llm.wake_up(tags=list(tags))

    def generate(
        self,
        prompts: Sequence[Prompt],
        responses: int,
        max_tokens: int | Sequence[int],
        seed: int,
        step: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        logprobs: bool = False,
        watch: Watch | None = None,
        expected: Sequence[float] | None = None,
        begun: Sequence[Response] | None = None,
        keep: int | None = None,
        wait_for: int = 0,
    ) -> Rollouts:
        """`responses` continuations of each prompt, at most `max_tokens` long; the whole batch on every rank.

        max_tokens: of all responses, or of each, in the order of the rows that come back.
        logprobs: with those of the sampled tokens.
        watch: who may stop a response at a look. The others have exactly the tokens that they have without it.
        expected: tokens that each row will need, for who starts first and where; `max_tokens` if nothing is known.
        begun: what there is of each row already; it goes on after that.
        keep: prompts whose responses come back, the first complete ones; the others are in `left`. None: all.
        wait_for: prompts at the front that are among them in any case.
        """
        rows = [(prompt, sample) for prompt in prompts for sample in range(responses)]
        limits = [max_tokens] * len(rows) if isinstance(max_tokens, int) else list(max_tokens)
        starts = list(begun or [Response((), finished=False, logprobs=())] * len(rows))
        sampling = [
            {
                "seed": request_seed(seed, step, prompt.index, sample),
                "temperature": temperature,
                "top_p": top_p,
                "max_tokens": max(limit - len(start.ids), 1),
                "detokenize": False,
            }
            for (prompt, sample), limit, start in zip(rows, limits, starts, strict=True)
        ]
        requests = [
            Request(row, prompt, limit, start, settings)
            for row, ((prompt, _), limit, start, settings) in enumerate(
                zip(rows, limits, starts, sampling, strict=True)
            )
        ]
        dealt = deal_to_engines(limits if expected is None else expected, self.engines)
        mine = [requests[row] for row in dealt[self.engine_index]]
        looks = () if watch is None else watch.looks(max(limits, default=0))
        race = None
        if keep is not None and keep < len(prompts):
            race = Race(len(prompts), responses, keep, must=wait_for)
            self.llm.reset_prefix_cache()  # who is first must not depend on what was generated before
        if watch is not None:
            watch.begin([prompt for prompt, _ in rows], limits, starts)
        if looks or race or begun:
            outputs = self._sample_together(mine, looks, watch, race, logprobs)
        else:
            with untouched_rng():
                outputs = self._sample(mine, logprobs)
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, outputs)
        ranks_per_engine = self.world // self.engines
        merged: list[Response] = [None] * len(rows)  # type: ignore[list-item]
        for engine, numbers in enumerate(dealt):
            for row, response in zip(numbers, everyone[engine * ranks_per_engine], strict=True):
                merged[row] = response
        whole = Rollouts(tuple(prompt for prompt, _ in rows), tuple(merged))
        if race is None:
            return whole
        winners = race.winners()
        if watch is not None:
            watch.keep([row for group in winners for row in range(group * responses, (group + 1) * responses)])
        return whole.split(winners, responses)

    def _sample(self, requests: Sequence[Request], logprobs: bool) -> list[Response]:
        from vllm import SamplingParams

        if not requests:
            return []
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(request.prompt.ids)} for request in requests],
            [SamplingParams(logprobs=0 if logprobs else None, **request.sampling) for request in requests],
            use_tqdm=False,
        )
        return [_response(output.outputs[0], logprobs) for output in outputs]

    def _sample_together(
        self,
        requests: Sequence[Request],
        looks: Sequence[int],
        watch: Watch | None,
        race: Race | None,
        logprobs: bool,
    ) -> list[Response]:
        """Collective over the job, for engines without rows too."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        loop = StepLoop(self.llm.llm_engine, looks, racing=race is not None, logprobs=logprobs)
        top = watch.top if watch is not None and looks else None
        top = 0 if top is None and logprobs else top

        def start() -> None:
            for request in requests:
                params = SamplingParams(
                    logprobs=top, flat_logprobs=top is not None, output_kind=RequestOutputKind.DELTA, **request.sampling
                )
                loop.add(request.row, request.prompt.ids, params, request.limit, request.begun)

        run_together(loop, start, watch, race, self.engine_index)
        return loop.responses()

    def close(self) -> None:
        """End the engine. vLLM also ends torch.distributed with it, so this is the last thing a rank does together."""
        dist.barrier()
        self.llm.llm_engine.engine_core.shutdown()


def _own_shared_memory() -> None:
    """Name the shared memory of an engine's ranks after this run.

    vLLM's CPU path names it after the ranks alone, so two runs on a machine would meet in it, and what a killed run
    leaves behind would end the next one: a name is not created twice.
    """
    from vllm.distributed.device_communicators import cpu_communicator

    theirs = cpu_communicator._CPUSHMDistributed

    class OfThisRun(theirs):  # type: ignore[misc, valid-type]
        @staticmethod
        def make_group_name(communicator: Any) -> str:
            run = f"prune-opd-{os.environ['MASTER_PORT']}"  # one run a port; a rank that is alone (0) shares no memory
            return run + theirs.make_group_name(communicator).replace("/", "")

        def _init_cpu_shm(self) -> int:
            # Before the ranks meet: each one's own segment, which a run with this port has left when it was killed.
            Path("/dev/shm", f"{self.group_name}_{self.communicator.rank}").unlink(missing_ok=True)
            return int(super()._init_cpu_shm())

    cpu_communicator._CPUSHMDistributed = OfThisRun


def _response(completion: Any, logprobs: bool) -> Response:
    ids = tuple(completion.token_ids)
    chosen = None
    if logprobs:
        chosen = tuple(at[token].logprob for at, token in zip(completion.logprobs, ids, strict=True))
    return Response(ids, completion.finish_reason == "stop", chosen)


def _timeouts(minutes: float | None) -> dict[str, int]:
    """vLLM's settings for the collectives inside an engine, in whole seconds."""
    if minutes is None:
        return {}
    seconds = max(1, int(minutes * 30))
    return {"distributed_timeout_seconds": seconds, "cpu_distributed_timeout_seconds": seconds}


def _unpack_experts(worker: Any) -> None:
    """vLLM's CPU path packs experts only while it has no kernel for them: a reload would leave them unpacked.

    Without its kernel each layer builds one anew as it is reloaded, and packs.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    for module in worker.model_runner.get_model().modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod):
            method.moe_kernel = None


def _repack_tied_head(worker: Any) -> None:
    """vLLM's CPU path keeps a packed copy of the output matrix, which a reload leaves stale when it is tied."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in worker.model_runner.get_model().modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear") and module.weight.numel():
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
