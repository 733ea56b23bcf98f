"""A vLLM server of a teacher, on this machine alone: vLLM's own, under a name that says whose weights it has.

    python -m prune_opd.elsewhere.server MODEL_DIR [--port 8200] [--k 32] [-- any option of vllm serve]

`make serve-teacher MODEL=DIR` runs it, with the packages that the CPU set lacks for it (requirements/serve.txt). On a
GPU machine `vllm serve` will do as well: give it the name that this prints (`--name`), or set teacher_server.model.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from prune_opd.elsewhere.teacher_digest import served_name
from prune_opd.errors import ConfigError
from prune_opd.process import has_gpu

MODULE = "vllm.entrypoints.openai.api_server"
# It shares the cores with others and compiles nothing: the one small function that counts ranks takes a compiler long.
# What a shell sets goes before.
ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
QUIET = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def command(model: Path, name: str, port: int, k: int, gpu: bool) -> list[str]:
    """vLLM's server with these settings, on the loopback."""
    fixed = [sys.executable, "-m", MODULE, "--model", str(model), "--served-model-name", name]
    fixed += ["--host", "127.0.0.1", "--port", str(port), "--max-logprobs", str(k), "--no-enable-log-requests"]
    return fixed + ([] if gpu else ["--enforce-eager"])


def main(
    model: Annotated[Path, typer.Argument(help="The teacher's Hugging Face directory.", metavar="MODEL_DIR")],
    options: Annotated[list[str] | None, typer.Argument(help="Options of vLLM's server, after --.")] = None,
    port: Annotated[int, typer.Option(help="On the loopback.", min=1, max=65535)] = 8200,
    k: Annotated[int, typer.Option(help="Most ids that a run may ask for: its teacher_server.top_k.", min=1)] = 32,
    name: Annotated[bool, typer.Option("--name", help="Only print the name that it would have.")] = False,
) -> None:
    """Serve a teacher to runs with teacher_server.url=http://127.0.0.1:PORT."""
    try:
        called = served_name(model)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if name:
        print(called)
        return
    gpu = has_gpu()
    print(f"{called}: teacher_server.url=http://127.0.0.1:{port}", flush=True)
    for key, value in (QUIET if gpu else QUIET | ON_CPU).items():
        os.environ.setdefault(key, value)
    whole = command(model, called, port, k, gpu) + (options or [])
    os.execv(whole[0], whole)  # its signals and its exit code are vLLM's


if __name__ == "__main__":
    typer.run(main)
