"""vLLM's sentences about memory become ours: they name our setting, and none of its options."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from prune_opd.config import RolloutConfig
from prune_opd.errors import ConfigError
from prune_opd.rollout.refusal import NO_ROOM, NOT_FREE, in_our_words, memory_refusal

CPU = (
    "Available memory on node 0 (0.61/7.75 GiB) on kv cache allocation is less than requested memory for kv (1.0 GiB). "
    "Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by other processes."
)
GPU = (
    "Free memory on device cuda:0 (30.1/79.1 GiB) on startup is less than desired GPU memory utilization (0.5, 39.5 "
    "GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)
LONG = (
    "To serve at least one request with the model's max seq len (131072), (2.0 GiB KV cache is needed, which is larger "
    "than the available KV cache memory (1.0 GiB). Based on the available memory, the estimated maximum model length "
    "is 65408. Try increasing `gpu_memory_utilization` (which also controls CPU memory on the CPU backend) or "
    "decreasing `max_model_len` when initializing the engine. See https://docs.vllm.ai/ for more details."
)
NONE = "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine."


@pytest.mark.parametrize(
    ("said", "on_cpu", "begins", "fact"),
    [
        (CPU, True, "rollout.kv_cache_gb = 1 (GiB a rank) is more memory than is free now", "(0.61/7.75 GiB)"),
        (GPU, False, "rollout.gpu_memory_utilization = 0.5 is more memory than is free now", "(30.1/79.1 GiB)"),
        (LONG, True, "rollout.kv_cache_gb = 1 (GiB a rank) has no room for one response of 96 tokens", "2.0 GiB"),
        (NONE, False, "rollout.gpu_memory_utilization = 0.5 has no room for one response of 96 tokens", "No available"),
    ],
)
def test_the_sentence_names_our_setting_and_keeps_the_numbers(said: str, on_cpu: bool, begins: str, fact: str) -> None:
    refusal = memory_refusal(ValueError(said.replace(". ", ".\n ")), RolloutConfig(), on_cpu, 96)
    assert refusal is not None
    text = str(refusal)
    assert text.startswith(begins) and fact in text and "\n" not in text
    assert not re.search(r"--kv|VLLM_|max_model_len|`|https", text)


def test_other_errors_stay_what_they_are() -> None:
    assert memory_refusal(ValueError("no such quantization"), RolloutConfig(), True, 96) is None
    with pytest.raises(ValueError, match=r"^no such quantization$"), in_our_words(RolloutConfig(), True, 96):
        raise ValueError("no such quantization")
    with pytest.raises(ConfigError, match=r"^rollout.kv_cache_gb = 1 "), in_our_words(RolloutConfig(), True, 96):
        raise ValueError(CPU)


def test_the_installed_vllm_still_says_so() -> None:
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None
    worker = Path(spec.origin).parent / "v1"
    files = [worker / "worker" / name for name in ("cpu_worker.py", "utils.py")] + [
        worker / "core" / "kv_cache_utils.py"
    ]
    source = re.sub(r'"\s*f?"', "", " ".join(path.read_text(encoding="utf-8") for path in files))
    assert all(part in source for part in (*NOT_FREE, *NO_ROOM))
