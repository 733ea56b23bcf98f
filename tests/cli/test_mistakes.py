"""Plausible mistakes of a first week, as a table of command → message. In this process: no command gets to a model."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from prune_opd.check import machine
from prune_opd.cli.main import main
from prune_opd.config.yaml import save_config
from tests.fake_models import TOKENS, tokenizer, train_config, write_model

GIB = 2**30
# The command (fake.py is a recipe that passes), and what its answer must have in it. All end with an exit code above 0.
MISTAKES = Path(__file__).with_name("mistakes.txt").read_text(encoding="utf-8")
TABLE = [tuple(part.strip() for part in line.rsplit(" | ", 1)) for line in MISTAKES.splitlines()]
OWN_RECIPE = """
from pathlib import Path
from prune_opd.config.yaml import load_config

def fake():
    return load_config(Path('fake.yaml'))
"""
Disk = namedtuple("Disk", "total used free")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pair of models, a recipe, a run, and everything that is wrong in its own way."""
    folder = tmp_path_factory.mktemp("place")
    write_model(folder / "student"), write_model(folder / "teacher")
    write_model(folder / "other", tokenizer(vocab={token: i for i, token in enumerate(reversed(TOKENS))}))
    write_model(folder / "half").joinpath("tokenizer.json").unlink()
    write_model(folder / "gpt", model_type="gpt2")
    write_model(folder / "big", num_hidden_layers=400, hidden_size=512, intermediate_size=2048)
    config = train_config(Path("student"), Path("teacher"))
    save_config(config, folder / "fake.yaml")
    save_config(config, folder / "run" / "config.yaml")
    (folder / "run" / "checkpoints" / "step_2").mkdir(parents=True)
    files = {
        "fake.py": OWN_RECIPE,
        "wrong_name.py": OWN_RECIPE,
        "returns_none.py": "def returns_none():\n    pass\n",
        "raises.py": "def raises():\n    return 1 / 0\n",
        "no_syntax.py": "def no_syntax(:\n",
        "broken.yaml": "name: a\nstepps: 3\n",
        "notes.txt": "a note\n",
        "rows.jsonl": '{"prompt": "a"}\n{"prompt": 3}\n',
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def answer(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Exit code and output of a command line in `place`; `RANK=0` before it is its environment, `DISK=` its free GB."""
    words = shlex.split(command)
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "PRUNE_OPD_MODELS",
        "PRUNE_OPD_DATA",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    while words[0].partition("=")[0] in ("RANK", "DISK"):
        name, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    free = float(os.environ.get("DISK", "1000")) * GIB
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Disk(2000 * GIB, 0, int(free)))
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["prune-opd", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), f"{said.out}{said.err}"


@pytest.mark.parametrize(("command", "message"), TABLE, ids=[f"{i}" for i in range(len(TABLE))])
def test_a_mistake_is_answered_with_what_would_be_right(
    command: str, message: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = answer(command, place, monkeypatch, capsys)
    assert code > 0, said
    assert message in said, said
    assert "Traceback" not in said


def test_there_are_90_of_them() -> None:
    assert len({command for command, _ in TABLE}) >= 90


def test_a_text_keeps_the_spaces_around_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = 'show fake.py data.source=rows.jsonl "data.suffix= Box it. " --changed'
    code, said = answer(command, place, monkeypatch, capsys)
    assert code == 0 and "' Box it. '" in said


def test_a_run_that_goes_on_needs_no_room_for_what_it_replaces(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_config(place / "big", place / "teacher")
    needed = machine.checkpoint_bytes(config)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Disk(2 * needed, 0, needed // 2))
    assert machine.space_problems(config, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_1"
    checkpoint.mkdir(parents=True)
    with (checkpoint / "shard").open("wb") as file:
        file.truncate(needed // 2 + 1)  # a hole: it takes no room here
    assert machine.space_problems(config, tmp_path / "run") == []
    shutil.rmtree(checkpoint)
