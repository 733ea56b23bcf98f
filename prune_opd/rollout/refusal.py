"""What vLLM says of too little memory while an engine starts, in our settings: its advice names options of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from prune_opd.config import RolloutConfig
from prune_opd.errors import ConfigError

# Parts of vLLM's sentences: the memory that is asked for is not free; what it took leaves too little for the cache.
NOT_FREE = ("on kv cache allocation is less than requested memory", "on startup is less than")
NO_ROOM = ("No available memory for the cache blocks", "cache is needed, which is larger than the available KV cache")
ADVICE = re.compile(r"\s*(Decrease|Reduce|Try increasing|Based on the available|To resolve|On the CPU backend)\b.*")


@contextmanager
def in_our_words(rollout: RolloutConfig, on_cpu: bool, max_model_len: int) -> Iterator[None]:
    """Raises ConfigError where vLLM has too little memory; see `memory_refusal`."""
    try:
        yield
    except ValueError as error:
        if refusal := memory_refusal(error, rollout, on_cpu, max_model_len):
            raise refusal from error
        raise


def memory_refusal(error: Exception, rollout: RolloutConfig, on_cpu: bool, max_model_len: int) -> ConfigError | None:
    """The error to raise in place of vLLM's; None if that is not of memory.

    max_model_len: tokens of a prompt and its response that the engine is built for.
    """
    text = " ".join(str(error).split())
    fact = ADVICE.sub("", text).rstrip(".")
    if on_cpu:
        name, value = "rollout.kv_cache_gb", f"{rollout.kv_cache_gb:g} (GiB a rank)"
    else:
        name, value = "rollout.gpu_memory_utilization", f"{rollout.gpu_memory_utilization:g}"
    if any(part in text for part in NOT_FREE):
        return ConfigError(
            f"{name} = {value} is more memory than is free now (vLLM: {fact}): lower it, or free memory: fewer ranks "
            "on the machine, or end what else runs there"
        )
    if any(part in text for part in NO_ROOM):
        return ConfigError(
            f"{name} = {value} has no room for one response of {max_model_len} tokens with its prompt (vLLM: {fact}): "
            "raise it, or lower horizon.max_len or rollout.max_prompt_len (prune-opd eval: --max-len)"
        )
    return None
