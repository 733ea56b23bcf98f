"""Sample from a Hugging Face directory with vLLM alone and print prompts, responses and log-probabilities as JSON."""

import json
import sys

from prune_opd.rollout.engine import ENVIRONMENT


def main(model_dir: str) -> None:
    import os

    os.environ.update(ENVIRONMENT)
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    from prune_opd.data.ledger import Ledger

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompts = [tokenizer(Ledger().problem(5, i).prompt, add_special_tokens=False)["input_ids"] for i in range(4)]
    llm = LLM(model_dir, dtype="float32", enforce_eager=True, max_model_len=400, kv_cache_memory_bytes=2**28)
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=64, logprobs=0)
    rows = []
    for prompt, output in zip(prompts, llm.generate([{"prompt_token_ids": p} for p in prompts], params), strict=True):
        response = list(output.outputs[0].token_ids)
        logprobs = [at[token].logprob for at, token in zip(output.outputs[0].logprobs, response, strict=True)]
        rows.append({"prompt": prompt, "response": response, "logprobs": logprobs})
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1])
