"""The emulation of FP8 number by number, and `prune-opd bench fp8-noise --quick` with forked ranks."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from benchmarks.studies.fp8_noise.emulation import E4M3_MAX, Recipe, blockwise, round_e4m3, tensorwise
from tests.forked.command import run_command

NOISE = 2**-4  # half a step of a number with three bits of mantissa, relative


def values(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------- emulation


def test_e4m3_numbers_stay_and_others_go_to_the_nearest() -> None:
    exact = torch.tensor([0.0, 1.0, 1.125, -448.0, 2.0**-9])
    assert torch.equal(round_e4m3(exact, 1.0), exact)
    assert round_e4m3(torch.tensor([1.05, 1.07, 1000.0, -1e9]), 1.0).tolist() == [1.0, 1.125, 448.0, -448.0]


def test_a_tensorwise_scale_puts_the_largest_value_at_the_end_of_the_range() -> None:
    x = values(8, 64) * 1e-4
    rounded = tensorwise(x)
    largest = x.abs().argmax()
    assert rounded.flatten()[largest] == pytest.approx(x.flatten()[largest].item(), rel=1e-6)
    normal = x.abs() > x.abs().max() / E4M3_MAX * 2**-6
    assert ((rounded - x).abs()[normal] <= NOISE * x.abs()[normal] * (1 + 1e-6)).all()
    assert torch.equal(tensorwise(torch.zeros(3, 3)), torch.zeros(3, 3))


@pytest.mark.parametrize("rows", [1, 128])
@pytest.mark.parametrize("shape", [(5, 130), (128, 256), (200, 64)])
def test_blocks_are_rounded_each_with_a_power_of_two_of_its_own(rows: int, shape: tuple[int, int]) -> None:
    x = values(*shape) * torch.logspace(-3, 3, shape[1])  # columns of very different size
    expected = torch.empty_like(x)
    for i in range(0, shape[0], rows):
        for j in range(0, shape[1], 128):
            block = x[i : i + rows, j : j + 128]
            scale = 2.0 ** torch.floor(torch.log2(E4M3_MAX / block.abs().max()))
            expected[i : i + rows, j : j + 128] = (block * scale).to(torch.float8_e4m3fn).float() / scale
    assert torch.equal(blockwise(x, rows), expected)


def test_small_blocks_keep_rows_that_one_scale_would_lose() -> None:
    x = torch.cat([values(1, 128), values(1, 128, 1) * 1e-6])
    assert tensorwise(x)[1].abs().max() == 0
    assert (blockwise(x, 1)[1] - x[1]).norm() < NOISE * x[1].norm()


def test_a_delayed_scale_is_that_of_the_calls_before() -> None:
    recipe, x = Recipe("delayed"), values(4, 32)
    assert torch.equal(recipe.input(x, "a"), round_e4m3(x, 1.0))  # nothing is known yet
    assert torch.equal(recipe.input(x / 2, "a"), round_e4m3(x / 2, E4M3_MAX / x.abs().max().item()))
    assert torch.equal(recipe.input(x, "b"), round_e4m3(x, 1.0))  # another layer
    assert recipe.input(3 * x, "a").abs().max() == pytest.approx(x.abs().max().item(), rel=1e-6)  # saturates
    short = Recipe("delayed", amax_history=1)
    for factor in (8, 1):
        short.input(factor * x, "a")
    assert torch.equal(short.input(x, "a"), tensorwise(x))  # the 8 is forgotten


# ---------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    done = run_command("bench", "fp8-noise", "--quick", folder=folder, env={"COLUMNS": "200"})
    assert done.code == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "bench" / "fp8-noise.json").read_text())
    (model,) = found["models"].values()
    assert all(pair["student"] in done.stdout for pair in model["pairs"])
    return {"stdout": done.stdout, **model}


def rows(result: dict[str, Any], student: str, teacher: str = "bf16") -> list[dict[str, Any]]:
    (pair,) = [p for p in result["pairs"] if (p["student"], p["teacher"]) == (student, teacher)]
    found: list[dict[str, Any]] = pair["by_k"]
    return found


def test_every_recipe_is_compared_with_bf16_and_with_another(result: dict[str, Any]) -> None:
    pairs = {(pair["student"], pair["teacher"]) for pair in result["pairs"]}
    assert {("bf16", "fp32"), ("delayed", "bf16"), ("tensorwise", "blockwise")} <= pairs
    assert [row["k"] for row in rows(result, "tensorwise")] == [1, 2, 4, 8, 16]


def test_fp8_is_noisier_than_bf16_and_touches_what_it_should(result: dict[str, Any]) -> None:
    error = result["hidden_error"]
    assert error["bf16"] == 0
    for recipe in ("tensorwise", "delayed", "blockwise"):
        assert error[recipe] > 2 * error["fp32"] > 0
    assert error["tensorwise, ends bf16"] < error["tensorwise"]  # two layers of four are exact


def test_events_follow_from_the_overlap(result: dict[str, Any]) -> None:
    for pair in result["pairs"]:
        for row in pair["by_k"]:
            rates = [row["event_rate"][t] for t in ("0.5", "0.6", "0.7", "0.8", "0.9")]
            assert rates == sorted(rates)
            if row["k"] == 1:  # an event is a token whose one id differs
                assert rates == pytest.approx([1 - row["overlap"]] * 5, abs=1e-6)


def test_the_recommended_threshold_is_the_largest_with_rare_events(result: dict[str, Any]) -> None:
    for recipe, by_k in result["recommended"].items():
        for row in rows(result, recipe):
            rare = [float(t) for t, rate in row["event_rate"].items() if rate <= 1e-3]
            assert by_k[str(row["k"])] == (max(rare) if rare else None)
