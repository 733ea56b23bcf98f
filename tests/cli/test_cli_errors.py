"""Bad input through the real `prune-opd` command: one `error:` line, the right exit code, nothing written, no torch.

A process that must answer in seconds may not import torch, megatron, vLLM or transformers: a `sitecustomize` in the
command's path writes down at exit which of them it had imported. Most of the commands here are forks of a process that
has imported the command line, and so has its hook (`tests/forked/`); some are started as a user does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from prune_opd.config.overrides import apply_overrides
from prune_opd.config.paths import recipes_dir
from prune_opd.config.recipe import load_recipe
from prune_opd.config.yaml import save_config
from tests.fake_models import TOKENS, tokenizer, train_config, with_weights, write_model
from tests.forked import client

COMMAND = Path(sys.executable).with_name("prune-opd")
AT_EXIT = """
import atexit, os, sys
HEAVY = {"torch", "megatron", "vllm", "transformers"}
atexit.register(lambda: open(os.environ["IMPORTED"], "a").write("done " + " ".join(HEAVY & sys.modules.keys()) + "\\n"))
"""
OTHER_RANKS = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
FP8 = "precision.student_fp8.format"
RECIPE = """
from prune_opd.config.yaml import load_config
from pathlib import Path

def fake():
    return load_config(Path({config!r}))
"""


@dataclass(frozen=True)
class Answer:
    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one error line; there must be nothing else on stderr."""
        lines = self.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), self.stderr
        return lines[0].removeprefix("error: ")


class Workplace:
    """A directory with a pair of fake models, a recipe for them, and the command run inside it."""

    def __init__(self, folder: Path, hook: Path) -> None:
        self.folder = folder / "work"
        self.student = with_weights(write_model(self.folder / "student"))
        self.teacher = with_weights(write_model(self.folder / "teacher"))
        self.config = train_config(self.student, self.teacher)
        save_config(self.config, self.folder / "fake.yaml")
        self.recipe = self.folder / "fake.py"
        self.recipe.write_text(RECIPE.format(config=str(self.folder / "fake.yaml")), encoding="utf-8")
        self.imported = folder / "imported"
        self.env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(hook), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "IMPORTED": str(self.imported),
            "PRUNE_OPD_CACHE": str(self.folder / "cache"),
            "CUDA_VISIBLE_DEVICES": "",
        }
        self.env.pop("RANK", None)

    def run(self, *args: str | Path) -> Answer:
        done = subprocess.run(
            [COMMAND, *map(str, args)], cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=60
        )
        return Answer(done.returncode, done.stdout, done.stderr)

    def fork(self, *args: str | Path) -> Answer:
        environment = client.environment(self.env)
        done = client.launch("light", args, 0, environment, folder=self.folder, timeout=60, apart=True)
        assert done.code is not None, args
        return Answer(done.code, done.stdout, done.stderr)

    def files(self) -> dict[str, bytes | None]:
        paths = sorted(self.folder.rglob("*"))
        return {str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else None for path in paths}

    def refuse(self, *args: str | Path, anew: bool = False) -> Answer:
        """Run a command that must fail at once: nothing written, nothing heavy imported. anew: no fork."""
        before = self.files()
        answer = self.run(*args) if anew else self.fork(*args)
        assert answer.code != 0
        assert self.files() == before
        assert self.imported.read_text(encoding="utf-8").strip() == "done"
        return answer


@pytest.fixture(scope="module")
def hook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the Python path."""
    folder = tmp_path_factory.mktemp("hook")
    (folder / "sitecustomize.py").write_text(AT_EXIT, encoding="utf-8")
    return folder


@pytest.fixture
def place(tmp_path: Path, hook: Path) -> Workplace:
    return Workplace(tmp_path, hook)


def test_the_hook_sees_heavy_imports(place: Workplace) -> None:
    subprocess.run([sys.executable, "-c", "import torch"], env=place.env, check=True)
    assert place.imported.read_text(encoding="utf-8").strip() == "done torch"


def test_a_fork_has_the_hook_and_nothing_heavy(place: Workplace) -> None:
    assert place.fork("recipes").stdout == place.run("recipes").stdout
    assert place.imported.read_text(encoding="utf-8").splitlines() == ["done ", "done "]


# ---------------------------------------------------------------------------------------------------- recipe, overrides


def test_unknown_recipe(place: Workplace) -> None:
    answer = place.refuse("train", "tiny_compatibel", anew=True)
    assert answer.code == 2
    assert answer.error.startswith("recipe 'tiny_compatibel' is not known: did you mean tiny_compatible")


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("horizon.stratgy=full", "there is no setting 'horizon.stratgy': did you mean horizon.strategy?"),
        ("gate=null", "gate = null with horizon.strategy = prune: the window follows the gate's reliable length"),
    ],
)
@pytest.mark.parametrize("command", ["train", "check"])
def test_bad_override(place: Workplace, command: str, override: str, error: str) -> None:
    answer = place.refuse(command, place.recipe, override, anew=override == "gate=null")
    assert answer.code == 2
    assert answer.error.startswith(error)


def test_a_recipe_of_the_other_kind(place: Workplace) -> None:
    assert "run `prune-opd sft tiny_base`" in place.refuse("train", "tiny_base").error
    assert "run `prune-opd train tiny_compatible`" in place.fork("sft", "tiny_compatible").error


# ---------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("args", "field", "remedy"),
    [
        (["data.source=missing.jsonl"], "data.source = 'missing.jsonl': there is no such file", "give the path of a"),
        (["horizon.max_len=1000"], "rollout.max_prompt_len + horizon.max_len = 64 + 1000", "to at most 448"),
        (
            ["precision.params=bf16", f"{FP8}=hybrid"],
            f"{FP8} = 'hybrid' needs a CUDA GPU",
            f"set {FP8}=null",
        ),
        (["--nproc", "3"], "parallel.tensor = 3 (null: all ranks) does not divide the 4 ", "or another --nproc"),
        (["gate.k=33"], "gate.k = 33 is above the 32 vocabulary entries", "set at most 32"),
        (["--resume", "nowhere"], "--resume nowhere: there is no such checkpoint", "or auto, or never"),
        (["--run-dir", "student"], "--run-dir", "choose an empty directory"),
        (["--run-dir", "fake.py"], "--run-dir", "choose another path"),
    ],
)
def test_what_the_checks_refuse(place: Workplace, args: list[str], field: str, remedy: str) -> None:
    answer = place.refuse("train", place.recipe, *args)
    assert answer.code == 1
    lines = answer.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert lines[0].removeprefix("error: ").startswith(field) and remedy in lines[0]


def test_missing_model(place: Workplace) -> None:
    cached = place.folder / "cache" / "tiny" / "0" / "teacher"
    assert "`make tiny-models`" in place.refuse("train", place.recipe, f"teacher={cached}").error


def test_a_teacher_with_another_tokenizer(place: Workplace) -> None:
    other = write_model(place.folder / "other", tokenizer(vocab={token: i for i, token in enumerate(reversed(TOKENS))}))
    answer = place.refuse("train", place.recipe, f"teacher={other}")
    assert answer.code == 1
    assert "has another tokenizer than the student: id " in answer.error and "choose a pair" in answer.error


def test_a_full_run_directory_of_another_config(place: Workplace) -> None:
    save_config(place.config, place.folder / "run" / "config.yaml")
    (place.folder / "run" / "checkpoints" / "step_2").mkdir(parents=True)
    answer = place.refuse("train", place.recipe, "seed=7", "--run-dir", "run")
    assert answer.code == 1
    assert "is a run with other settings (seed: 0 → 7): choose another directory" in answer.error


def test_never_resume_over_checkpoints(place: Workplace) -> None:
    save_config(place.config, place.folder / "run" / "config.yaml")
    (place.folder / "run" / "checkpoints" / "step_2").mkdir(parents=True)
    answer = place.refuse("train", place.recipe, "--run-dir", "run", "--resume", "never")
    assert "take --resume auto to go on, or another --run-dir" in answer.error


def test_each_problem_has_its_line(place: Workplace) -> None:
    answer = place.refuse("train", place.recipe, "rollout.quantization=fp8", "data.source=ledgre")
    assert [line.split(" = ")[0] for line in answer.stderr.splitlines()] == [
        "error: rollout.quantization",
        "error: rollout.quantization",
        "error: data.source",
    ]


# ---------------------------------------------------------------------------------------------------- other commands


def test_check_prints_the_problems_or_ok(place: Workplace) -> None:
    answer = place.refuse("check", place.recipe, "precision.params=bf16", f"{FP8}=e4m3")
    assert (answer.code, answer.stderr) == (1, "")
    assert answer.stdout.startswith(f"{FP8} = 'e4m3' needs a CUDA GPU") and answer.stdout.count("\n") == 1
    good = place.run("check", place.recipe)
    assert (good.code, good.stdout, good.stderr) == (0, "ok\n", "")


def test_sft_with_overrides_leaves_the_cached_model_alone(place: Workplace) -> None:
    answer = place.refuse("sft", "tiny_base", "stages.0.steps=1")
    assert answer.code == 2
    assert "belongs to the recipe without overrides: add output=DIR" in answer.error


def test_sft_without_its_start(place: Workplace) -> None:
    assert place.refuse("sft", "tiny_student").error.startswith("init = ")


def test_sft_if_missing_does_nothing_when_the_model_is_there(place: Workplace) -> None:
    output = place.folder / "made"
    made = apply_overrides(load_recipe("tiny_base"), [f"output={output}"])
    save_config(made, output / "sft_config.yaml")
    (output / "model.safetensors").write_bytes(b"")
    before = place.files()
    answer = place.fork("sft", "tiny_base", f"output={output}", "--if-missing")
    assert (answer.code, answer.stdout) == (0, f"{output} is there already\n")
    assert place.files() == before


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["eval", "nowhere", "--task", "ledger"], "MODEL_DIR = 'nowhere': there is no such directory"),
        (["eval", "student", "--task", "ledger", "--task", "no.jsonl"], "--task = 'no.jsonl': there is no such file"),
        (["eval", "student", "--task", "ledger", "--top-p", "0"], "--top-p = 0.0 leaves no token to sample"),
        (["eval", "student", "--task", "ledgre"], "--task = 'ledgre' is no task: did you mean 'ledger'?"),
        (
            ["eval", "student", "student", "--task", "ledger", "--extract", "boxes"],
            "--extract = 'boxes' is not known: ",
        ),
        (["export", "nowhere", "out"], "CHECKPOINT = 'nowhere': there is no such directory"),
        (["export", "student", "teacher"], "OUT_DIR = 'teacher' is there already: choose a new directory"),
        (["report", "student"], ""),
    ],
)
def test_the_other_commands_refuse_bad_input(place: Workplace, args: list[str], error: str) -> None:
    answer = place.refuse(*args)
    assert answer.code == 1
    assert answer.error.startswith(error)


def test_a_chat_setting_for_the_ledger_is_refused_not_ignored(place: Workplace) -> None:
    answer = place.refuse("eval", "student", "--task", "ledger", "--no-chat")
    assert (answer.code, answer.error) == (
        2,
        "data.chat = False: the ledger's problems are complete texts; leave it out",
    )


def test_the_recipes_are_listed(place: Workplace) -> None:
    names = {path.stem for path in recipes_dir().glob("[!_]*.py")}
    assert {line.split()[0] for line in place.fork("recipes").stdout.splitlines()} == names


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["recipes"]])
def test_help_imports_nothing_heavy(place: Workplace, args: list[str]) -> None:
    assert place.run(*args).code == 0
    assert place.imported.read_text(encoding="utf-8").strip() == "done"


# ---------------------------------------------------------------------------------------------------- under torchrun


def test_only_rank_0_speaks_for_an_error_that_all_ranks_share(place: Workplace) -> None:
    place.env |= {"RANK": "0", "WORLD_SIZE": "3", **OTHER_RANKS}
    assert "does not divide" in place.run("train", place.recipe).stderr
    place.env["RANK"] = "1"
    command = [str(COMMAND), "train", str(place.recipe)]
    silent = subprocess.Popen(command, cwd=place.folder, env=place.env, stderr=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        silent.communicate(timeout=2.5)  # the launcher has ended it by then
    assert "does not divide" in silent.communicate(timeout=30)[1]  # alone, it speaks after all
    assert silent.returncode == 1


def test_a_rank_evaluates_one_model_and_says_so(place: Workplace) -> None:
    place.env |= {"RANK": "0", "WORLD_SIZE": "1", **OTHER_RANKS}
    answer = place.refuse("eval", "student", "teacher", "--task", "ledger")
    assert answer.error == "eval under torchrun takes one Hugging Face directory: leave torchrun out and give --nproc"
