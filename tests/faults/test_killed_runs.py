"""One run that everything happens to, and one that nothing does: they must end with the same metrics, bit for bit.

Each launch goes on where the one before it was ended, by a fault in another phase and step, on one rank or the other.
The first and the one that gets two signals go through torchrun, as a user's do; the ranks of the others are forked.
"""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from prune_opd.config import TrainConfig
from prune_opd.errors import REQUEUE_EXIT_CODE
from tests.distributed.tiny_run import write_pair
from tests.faults.runs import STEPS, Ended, Launch, config_of, ended_run, latest, quick_watchdog, records, write_prompts

KILLED = 128 + signal.SIGKILL
PLANTED = "planted-0123456789abcdef0123456789abcdef01234567"


class Story:
    """What each launch of the run ended with, and which checkpoint was the last good one by then."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.config, self.run_dir = config, folder / "faulty"
        self.ended: dict[str, Ended] = {}
        self.latest: dict[str, str] = {}

    def launch(self, fault: str, step: int, rank: int, config: TrainConfig | None = None) -> None:
        self.note(fault, ended_run(config or self.config, self.run_dir, fault, step, rank))

    def note(self, name: str, ended: Ended) -> None:
        self.ended[name], self.latest[name] = ended, latest(self.run_dir)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_pair(folder), write_prompts(folder / "prompts.jsonl")
    ended = ended_run(config_of(folder), folder / "run")
    (folder / "output").write_text(ended.output)
    assert ended.code == 0, ended.output
    return folder


@pytest.fixture(scope="module")
def story(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    config = config_of(undisturbed)
    story = Story(config, tmp_path_factory.mktemp("faulty"))
    checkpoints = story.run_dir / "checkpoints"
    story.note("kill in rollout", Launch(config, story.run_dir, "kill in rollout", 3, 1).ended())
    story.launch("kill in teacher", 4, rank=0)
    story.launch("kill in backward", 5, rank=1)
    story.launch("kill in save", 6, rank=0)

    last = checkpoints / latest(story.run_dir)
    shard = max(last.glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(shard, shard.stat().st_size // 2)
    story.launch("signal", 6, rank=1)  # and a truncated shard before it

    shard = max((checkpoints / latest(story.run_dir)).glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    story.launch("engine fails", 7, rank=1)  # and a bit that was flipped before it

    (checkpoints / "latest").write_bytes(b"\xff\xfe\x00nonsense")
    stuck = quick_watchdog(config, 12)
    story.launch("hang", 8, rank=1, config=stuck)  # and a pointer that cannot be read before it

    story.run_dir.with_name("reached").unlink()
    launch = Launch(config, story.run_dir, "hang", 9, 0)
    end = time.monotonic() + 90
    while not launch.reached.exists() and time.monotonic() < end:
        time.sleep(0.1)
    story.note("second run", ended_run(config, story.run_dir))  # the same command typed twice
    launch.process.send_signal(signal.SIGUSR1)
    time.sleep(2)
    assert launch.process.poll() is None  # it has time to finish its step and save
    launch.process.send_signal(signal.SIGUSR1)
    story.note("second signal", launch.ended(timeout=20))

    with_wandb = replace(config, track=replace(config.track, wandb="offline", report=True))
    umask = os.umask(0)
    keys = {"WANDB_API_KEY": PLANTED, "HF_TOKEN": PLANTED}
    story.note("none", ended_run(with_wandb, story.run_dir, **keys))
    os.umask(umask)
    return story


def test_a_second_run_in_the_directory_is_refused_while_the_first_lives(story: Story) -> None:
    ended = story.ended["second run"]
    assert ended.code == 1
    assert f"error: --run-dir {story.run_dir} is in use by process" in " ".join(ended.output.split())


def test_the_run_ends_with_the_metrics_of_an_undisturbed_one(story: Story, undisturbed: Path) -> None:
    assert story.ended["none"].code == 0, story.ended["none"].output
    assert [record["step"] for record in records(story.run_dir)] == list(range(1, STEPS + 1))
    assert records(story.run_dir) == records(undisturbed / "run")


def test_the_window_and_the_loss_move_in_this_comparison(undisturbed: Path) -> None:
    steps = records(undisturbed / "run")
    assert len({step["horizon"] for step in steps}) > 1
    assert len({step["loss"] for step in steps}) == STEPS == len({step["rollout_digest"] for step in steps})


def test_bad_rows_of_a_prompt_file_are_skipped_counted_and_named(undisturbed: Path) -> None:
    output = " ".join((undisturbed / "output").read_text().split())
    assert "4 of 16 rows are bad, lines 3, 6, 8, 11" in output


@pytest.mark.parametrize("phase", ["rollout", "teacher", "backward", "save"])
def test_a_killed_rank_ends_the_run(story: Story, phase: str) -> None:
    ended = story.ended[f"kill in {phase}"]
    assert ended.code == KILLED, ended.output


def test_the_launcher_names_the_rank_that_was_killed(story: Story) -> None:
    assert "error: rank 1 was ended by SIGKILL" in story.ended["kill in rollout"].output


def test_every_launch_goes_on_from_the_last_good_checkpoint(story: Story) -> None:
    """Asynchronous saves: a kill costs the step under way and at most the one whose checkpoint was being written."""
    for fault, step in {"kill in rollout": 3, "kill in teacher": 4, "kill in backward": 5, "kill in save": 6}.items():
        assert story.latest[fault] in (f"step_{step - 2:06d}", f"step_{step - 1:06d}"), fault
    assert "resumed from" not in story.ended["kill in rollout"].output
    for fault in list(story.ended)[1:]:
        assert ("resumed from" in story.ended[fault].output) == (fault != "second run"), fault  # that one is refused


def test_a_truncated_shard_is_passed_over_and_the_run_says_so(story: Story) -> None:
    output = " ".join(story.ended["signal"].output.split())
    assert re.search(r"step_00000[45] is damaged and passed over: \S+\.distcp has \d+ bytes instead of \d+", output)


def test_a_flipped_bit_is_noticed_and_the_run_says_so(story: Story) -> None:
    output = " ".join(story.ended["engine fails"].output.split())
    assert re.search(r"step_000006 is damaged and passed over: \S+\.distcp has another checksum", output)


def test_a_pointer_that_cannot_be_read_does_not_stop_the_run(story: Story) -> None:
    output = " ".join(story.ended["hang"].output.split())
    assert "latest is missing or cannot be read" in output
    assert "resumed from" in output


def test_a_signal_to_one_rank_stops_all_after_the_step_with_a_checkpoint(story: Story) -> None:
    ended = story.ended["signal"]
    assert ended.code == REQUEUE_EXIT_CODE, ended.output
    assert story.latest["signal"] == "step_000006"


def test_a_second_signal_ends_the_run_at_once(story: Story) -> None:
    ended = story.ended["second signal"]
    assert ended.code == 128 + signal.SIGUSR1, ended.output
    assert story.latest["second signal"] in ("step_000007", "step_000008")


def test_a_failing_engine_ends_the_run_and_is_named(story: Story) -> None:
    ended = story.ended["engine fails"]
    assert ended.code == 1, ended.output
    assert "rank 1" in ended.output and "the engine's core has died" in ended.output


def test_a_rank_that_stops_answering_ends_the_run_with_the_stacks_of_all(story: Story) -> None:
    ended = story.ended["hang"]
    assert ended.code == 1, ended.output
    assert re.search(r"error: rank \d has been in phase teacher for 12 seconds", ended.output)


def test_stacks_say_where_each_rank_stood(story: Story, undisturbed: Path, tmp_path: Path) -> None:
    assert "worker_run.py" in story_stacks(story, 1) and "in hang" in story_stacks(story, 1)
    assert "in hidden" in story_stacks(story, 0)


def story_stacks(story: Story, rank: int) -> str:
    return (story.run_dir / "stacks" / f"rank_{rank}.txt").read_text()


def test_no_key_of_the_environment_is_written_anywhere(story: Story) -> None:
    assert PLANTED not in story.ended["none"].output
    files = [path for path in story.run_dir.rglob("*") if path.is_file()]
    assert any("wandb" in str(path) for path in files)
    assert [path for path in files if PLANTED.encode() in path.read_bytes()] == []


def test_no_file_of_a_run_can_be_changed_by_everybody(story: Story) -> None:
    """The last launch had umask 0."""
    paths = [path for path in (story.run_dir, *story.run_dir.rglob("*")) if not path.is_symlink()]
    assert [path for path in paths if path.stat().st_mode & 0o002] == []
