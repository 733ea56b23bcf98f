"""A pretrained model through the whole path: from its package to Hugging Face files, check, two steps, and back.

The student keeps 4 of the 30 layers, which is enough for the path and cheap. Skipped where the package is missing.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_opd.config.paths import real_pair_dir
from tests.distributed.ranks import run_ranks
from tests.end_to_end.runs import BARE, forked, steps_of
from tests.forked.client import REPOSITORY, environment
from tests.models import tensors_of

WORKER = Path(__file__).with_name("worker_real_logits.py")
LOGITS = 1e-4  # largest difference allowed; the logits themselves reach about 40
ANSWERS = ("The answer is 42, because 28 + 14 = 42.<|im_end|>", "Naïve café 📚\n```python\nprint('x')\n```", "Sure.")
SMALL = (
    *("steps=2", "rollout.prompts=4", "parallel.nproc=1", "checkpoint.every=0"),
    *("horizon.max_len=16", "horizon.init_len=16", "horizon.min_len=8", "horizon.step=8", "horizon.margin=4"),
    *(setting for setting in BARE if not setting.startswith("checkpoint.")),
)

pytestmark = pytest.mark.skipif(
    not (REPOSITORY / ".venv-real" / ".setup-stamp").is_file(),
    reason="a pretrained model is missing: make setup-real-pair did not run, or pip cannot get it",
)


def make_pair() -> str:
    """`make real-pair` with this test's student; what it said."""
    command = [sys.executable, REPOSITORY / "scripts" / "real_pair.py", "--left-out", ",".join(map(str, range(2, 28)))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pair() -> Iterator[Path]:
    """The pair in a cache of the tests, which stays: it is made anew when the script or the package has changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNE_OPD_CACHE", str(REPOSITORY / "build" / "real-pair-test"))
        make_pair()
        yield real_pair_dir()


@pytest.fixture(scope="module")
def run_dir(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert forked("check", "real_pair", *SMALL) == "ok\n"
    path = tmp_path_factory.mktemp("real") / "run"
    forked("train", "real_pair", *SMALL, "--run-dir", path)
    return path


def test_two_steps_train_on_both_sources_and_change_the_weights(pair: Path, run_dir: Path) -> None:
    records = steps_of(run_dir)
    assert len(records) == 2
    assert all(math.isfinite(record["loss"]) and record["tokens_trained"] > 0 for record in records)
    before, after = tensors_of(pair / "student"), tensors_of(run_dir / "hf")
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == list(before)


def test_tokenizer_and_chat_template_come_back_byte_for_byte(pair: Path, run_dir: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (run_dir / "hf" / name).read_bytes() == (pair / "teacher" / name).read_bytes()
    assert "<|im_start|>" in (pair / "teacher" / "chat_template.jinja").read_text(encoding="utf-8")


@torch.no_grad()
def test_logits_of_the_import_and_of_the_export_are_those_of_transformers(
    pair: Path, run_dir: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair / "teacher")
    lines = (pair / "data" / "arithmetic_held_out.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [[{"role": "user", "content": json.loads(line)["question"]}] for line in lines[: len(ANSWERS)]]
    texts = [tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]
    rows = {
        name: [tokenizer(text, add_special_tokens=False)["input_ids"] for text in part]
        for name, part in (("prompts", texts), ("responses", ANSWERS))
    }
    expected: dict[str, Any] = {}
    for directory in (pair / "teacher", run_dir / "hf"):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        whole = [prompt + response for prompt, response in zip(rows["prompts"], rows["responses"], strict=True)]
        expected[str(directory)] = [model(torch.tensor([ids[:-1]])).logits[0] for ids in whole]
    torch.save((rows, expected), tmp_path / "expected.pt")
    run_ranks(WORKER, 1, [tmp_path / "expected.pt", tmp_path / "found.json", *expected])
    for directory, found in json.loads((tmp_path / "found.json").read_text(encoding="utf-8")).items():
        assert found["logits"] > 10, directory  # a real model's
        assert found["transformers"] <= LOGITS and found["alone"] <= LOGITS, (directory, found)


def test_what_is_there_is_not_made_again(pair: Path) -> None:
    weights = pair / "teacher" / "model.safetensors"
    made = weights.stat().st_mtime_ns
    assert make_pair().count("is there") == 3 and weights.stat().st_mtime_ns == made
