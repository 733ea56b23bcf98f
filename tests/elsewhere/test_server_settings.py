"""What a teacher in a server refuses by name, what check says of it, what a plan makes of it, and how it is started."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prune_opd.check.elsewhere import server_problems
from prune_opd.check.run import check_everything
from prune_opd.config import TeacherServerConfig, TrainConfig
from prune_opd.config import memory_phases as phases
from prune_opd.config.overrides import apply_overrides
from prune_opd.config.recipe import load_recipe
from prune_opd.elsewhere.server import command
from prune_opd.elsewhere.teacher_digest import served_name
from prune_opd.errors import ConfigError
from prune_opd.plan.planner import plan_run
from tests.elsewhere.fake_server import running
from tests.fake_models import train_config, with_weights, write_model

SERVED = ["teacher_server.url=http://127.0.0.1:8200", "objective.support=teacher"]


def recipe(*overrides: str) -> TrainConfig:
    config: Any = load_recipe("tiny_compatible")
    return apply_overrides(config, [*SERVED, *overrides])


def test_the_objectives_that_need_only_its_best_ids_are_let_pass() -> None:
    recipe()
    recipe("objective.support=intersection")
    for name in ("sampled_token", "topk_forward_kl", "local_support_matching", "topk_jsd", "priced_reverse_kl"):
        recipe("objective.support=student", f"objective.name={name}")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["objective.support=student"], r"objective\.support = student: .*16 best ids.*support=teacher"),
        (["objective.support=union"], r"objective\.support = union"),
        *(
            (["objective.support=student", f"objective.name={name}"], rf"objective\.name = {name}: it is on the whole")
            for name in ("full_vocab_reverse_kl", "full_vocab_forward_kl", "full_vocab_mixed_kl", "full_vocab_jsd")
        ),
        (["objective.k=32"], r"objective\.k = 32: .*raise teacher_server\.top_k, or set objective\.k=16"),
        (["gate.k=17"], r"gate\.k = 17"),
        (
            ["objective.support=student", "objective.name=sampled_token", "objective.baseline=reverse_kl"],
            r"objective\.baseline = reverse_kl",
        ),
        (["objective.temperature=0.7"], r"objective\.temperature = 0\.7: the server's log-probabilities are at"),
        (["objective.teacher_temperature=1.5"], r"objective\.teacher_temperature = 1\.5"),
        (["objective.ends=class"], r"objective\.ends = class"),
        (["gate.metric=acceptance"], r"gate\.metric = acceptance.*take overlap"),
        (["gate.metric=change_point"], r"gate\.metric = change_point"),
        (["gate.metric=kl_agreement"], r"gate\.metric = kl_agreement"),
        (["weighting.name=tip"], r"weighting\.name = tip"),
        (["weighting.name=entropy_aware"], r"weighting\.name = entropy_aware"),
        (["weighting.name=tropd", "weighting.forward_k=32"], r"weighting\.forward_k = 32"),
        (["rollout.inflight.mode=gate", "rollout.inflight.first_check=32"], r"rollout\.inflight\.mode = gate"),
        (["horizon.strategy=fastopd"], r"horizon\.strategy = fastopd"),
        (
            ["teacher_server.model=theirs", "teacher_cache.mode=use", "teacher_cache.dir=rows"],
            r"teacher_server\.model = 'theirs' and teacher_cache\.mode = use",
        ),
        (["teacher_server.url=localhost:8200"], r"teacher_server\.url = 'localhost:8200' is no address"),
        (["teacher_server.url=http://a:1/v1"], r"teacher_server\.url = 'http://a:1/v1' is no address.*without a path"),
        (["teacher_server.timeout=0"], r"teacher_server\.timeout = 0"),
    ],
)
def test_what_it_cannot_give_is_refused_by_name(overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        recipe(*overrides)
    if "server.url=" not in overrides[0]:
        assert "teacher" in str(caught.value)


def test_all_that_does_not_go_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        recipe("objective.support=student", "gate.metric=acceptance", "weighting.name=tip")
    assert len(str(caught.value).splitlines()) == 3


@pytest.fixture
def pair(tmp_path: Path) -> TrainConfig:
    config = train_config(write_model(tmp_path / "student"), with_weights(write_model(tmp_path / "teacher")))
    return apply_overrides(config, [*SERVED, "gate.k=4", "horizon.max_len=40", "horizon.min_len=8"])


def at(config: TrainConfig, url: str, **settings: Any) -> TrainConfig:
    return dataclasses.replace(config, teacher_server=TeacherServerConfig(url=url, **settings))


def test_check_asks_the_server(pair: TrainConfig, tmp_path: Path) -> None:
    short = dataclasses.replace(pair, rollout=dataclasses.replace(pair.rollout, max_prompt_len=16))
    with running() as fake:
        assert server_problems(at(short, fake.url)) == []
        assert server_problems(at(short, fake.url, model="teacher")) == []
        (problem,) = server_problems(at(short, fake.url, model="theirs"))
        assert "serves teacher and teacher_server.model = 'theirs'" in problem
        (problem,) = server_problems(at(pair, fake.url))
        assert "takes 64 tokens of teacher" in problem and "--max-model-len" in problem
        (tmp_path / "teacher" / "model.safetensors").unlink()
        (problem,) = server_problems(at(short, fake.url))
        assert "no .safetensors files" in problem and "set teacher_server.model" in problem
        assert server_problems(at(short, fake.url, model="teacher")) == []


def test_check_says_where_nobody_answers(pair: TrainConfig, tmp_path: Path) -> None:
    (problem,) = server_problems(at(pair, "http://127.0.0.1:9"))
    assert "teacher_server.url = 'http://127.0.0.1:9' does not answer" in problem and "make serve-teacher" in problem
    assert problem in check_everything(at(pair, "http://127.0.0.1:9"), 2, tmp_path / "run")
    with running(lambda path, body: (200, b"<html>")) as fake:
        assert "does not answer as a vLLM server does" in server_problems(at(pair, fake.url))[0]
    with running(lambda path, body: (500, {})) as fake:
        assert "HTTPError 500" in server_problems(at(pair, fake.url))[0]


def test_a_plan_gives_a_served_teacher_neither_memory_nor_operations() -> None:
    config: Any = load_recipe("r1_1_5b_from_r1_7b_8xh100")
    here, away = (plan_run(apply_overrides(config, SERVED[i:]), "h100", 1) for i in (1, 0))
    assert here.memory.parts[phases.TEACHER] > 10**9 and away.memory.parts[phases.TEACHER] == 0
    assert here.memory.parts[phases.TEACHER_HEAD] > 10**8 and away.memory.parts[phases.TEACHER_HEAD] == 0
    assert away.planned.seconds["teacher"] < 0.01 * here.planned.seconds["teacher"]
    assert away.planned.seconds["train"] < here.planned.seconds["train"]  # no logits of the teacher are made


def test_its_name_says_whose_weights_it_has(tmp_path: Path) -> None:
    model = with_weights(write_model(tmp_path / "big"))
    name = served_name(model)
    assert name.startswith("big-") and len(name) == 20 and served_name(model) == name
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert served_name(model) != name
    content[-3] ^= 1
    path.write_bytes(content)
    assert served_name(model) == name
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    assert served_name(model) != name


def test_the_server_is_on_the_loopback_and_compiles_nothing_on_a_cpu(tmp_path: Path) -> None:
    line = command(tmp_path, "big-0", 8200, 32, gpu=False)
    assert line[line.index("--host") + 1] == "127.0.0.1" and line[line.index("--max-logprobs") + 1] == "32"
    assert line[line.index("--served-model-name") + 1] == "big-0" and "--enforce-eager" in line
    assert "--enforce-eager" not in command(tmp_path, "big-0", 8200, 32, gpu=True)


def test_its_command_line_names_the_model_or_says_what_is_wrong(tmp_path: Path) -> None:
    def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "prune_opd.elsewhere.server", *map(str, args)]
        return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)

    model = with_weights(write_model(tmp_path / "big"))
    assert run(model, "--name").stdout.strip() == served_name(model)
    empty = run(write_model(tmp_path / "empty"))
    assert empty.returncode == 2 and "has no .safetensors files" in empty.stderr
