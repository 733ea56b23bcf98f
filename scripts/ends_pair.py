"""Make a tiny pair whose student ends a response with another token than its teacher, out of the shipped models.

    python scripts/ends_pair.py DIR

DIR/student prefers `<pad>` as its end and knows `<eos>` (about .92 and .08 at an end); DIR/teacher prefers `<eos>` and
gives `<pad>` about 1e-4. Both end where the shipped models end: the two rows of their (tied) embeddings are made of the
row of `<eos>`, the less preferred one a little shorter, and no other number changes. The student's
generation_config.json names `<pad>` alone, the teacher's both, as those of Qwen3-1.7B-Base and Qwen3-4B do.
docs/ends.md has what this shows.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from prune_opd.config.paths import shipped_models_dir
from prune_opd.data.ledger import EOS, PAD, TOKEN_ID

EMBEDDING = "model.embed_tokens.weight"
LOGIT = 215.0  # of `<eos>` at an end, in both models; the next best token has about 55
BELOW = {"student": 2.5, "teacher": 9.0}  # how far the less preferred end is below it [nats]


def make_pair(out: Path) -> None:
    """Write `out`/student and `out`/teacher; both folders are made anew."""
    eos, pad = TOKEN_ID[EOS], TOKEN_ID[PAD]
    for role, preferred, other in (("student", pad, eos), ("teacher", eos, pad)):
        model = out / role
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(shipped_models_dir() / role, model)
        weights = load_file(model / "model.safetensors")
        end = weights[EMBEDDING][eos].clone()
        weights[EMBEDDING][preferred] = end
        weights[EMBEDDING][other] = end * (1 - BELOW[role] / LOGIT)
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    write(out / "teacher" / "generation_config.json", {"eos_token_id": [eos, pad]})
    write(out / "student" / "generation_config.json", {"eos_token_id": pad})
    write(out / "student" / "config.json", {"eos_token_id": pad, "pad_token_id": eos})
    write(out / "student" / "tokenizer_config.json", {"eos_token": PAD, "pad_token": EOS})


def write(path: Path, settings: dict[str, object]) -> None:
    """Put settings into a JSON file, which need not be there."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(known | settings, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give the folder to make: python scripts/ends_pair.py DIR")
    make_pair(Path(sys.argv[1]))
