"""README: short, in plain sentences, and whoever follows it gets to the job of four nodes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from scripts.follow_readme import BLOCK, SET_UP, commands
from tests.docs.pages import FENCE, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
LAUNCH = ROOT / ".venv-launch" / "bin" / "python"


def test_it_has_at_most_900_words() -> None:
    assert len(README.split()) <= 900


def test_a_sentence_has_20_words_on_average() -> None:
    prose = FENCE.sub("", README)
    prose = "\n".join(line for line in prose.splitlines() if not line.startswith(("|", "#", "!", "- ", "*")))
    prose = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose)
    sentences = [words for part in re.split(r"[.:?!]\s", prose) if len(words := part.split()) > 2]
    assert len(sentences) > 25
    assert sum(map(len, sentences)) / len(sentences) <= 20


def test_its_parts_come_in_order() -> None:
    headings = re.findall(r"^## (.+)$", README, re.M)
    assert headings == [
        *("What and why", "Quickstart", "On your GPUs", "The result", "Your own run", "Is it for you?", "Inside"),
        "Docs, help, contributing",
    ]
    assert README.count("](docs/img/") == 1, "one picture"


def test_every_command_of_the_four_nodes_is_one_that_the_script_knows() -> None:
    lines = commands(README)
    assert len(lines) > 12 and lines[0].startswith(SET_UP) and BLOCK.search(README)


def test_whoever_follows_it_gets_the_job_of_four_nodes() -> None:
    if not LAUNCH.is_file() or shutil.which("make") is None:
        pytest.skip("make setup-launch has not run")
    command = [sys.executable, str(ROOT / "scripts" / "follow_readme.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "that has all it promises" in done.stdout and "4 nodes × 8 ranks as the recipe has it" in done.stdout
