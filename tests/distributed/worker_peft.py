"""One process of test_lora.py that has `peft`: students with the exported adapter, and merged ones.

worker_peft.py STUDENT EXPORTED OUT [STUDENT EXPORTED OUT …]

Weights in fp32 are multiplied in float64: what is found is the difference of the weights and not of the products.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.distributed.tiny_run import made_up_rollouts


@torch.no_grad()
def main(student: Path, exported: Path, out: Path) -> None:
    merged = AutoModelForCausalLM.from_pretrained(exported)
    base = AutoModelForCausalLM.from_pretrained(student, dtype=merged.dtype)
    plain = AutoModelForCausalLM.from_pretrained(student, dtype=merged.dtype)
    adapted = PeftModel.from_pretrained(plain, exported / "adapter").eval()
    exact = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    if merged.dtype == torch.float32:
        for model in (merged, base, adapted, exact):
            model.double()
    rollouts, differences, rounding, from_base, logprobs = made_up_rollouts(0), [], [], [], []
    for prompt, response in zip(rollouts.prompt_ids, rollouts.response_ids, strict=True):
        ids = torch.tensor([[*prompt, *response]])
        ours, theirs, without = (model(ids).logits[0].double() for model in (adapted, merged, base))
        differences.append((ours - theirs).abs().flatten())
        rounding.append((without - exact(ids).logits[0]).abs().flatten())
        from_base.append((ours - without).abs().max())
        logp = ours.log_softmax(-1)[len(prompt) - 1 : -1]
        logprobs += logp.gather(1, torch.tensor(response)[:, None])[:, 0].tolist()
    difference = torch.cat(differences)
    config = adapted.peft_config["default"]
    found = {
        "rank": config.r,
        "adapters": sum("lora_A" in name for name, _ in adapted.named_parameters()),
        "largest difference": difference.max().item(),
        "mean difference": difference.mean().item(),
        "mean difference of bf16": torch.cat(rounding).mean().item(),  # the student's own
        "largest difference from the base": torch.stack(from_base).max().item(),
        "logprobs": logprobs,
    }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    for first in range(1, len(sys.argv), 3):
        main(*map(Path, sys.argv[first : first + 3]))
