"""What is usual for a pair is found in the first tokens of the first steps, and goes with the checkpoint."""

from __future__ import annotations

import pytest
import torch

from prune_opd.config import GateConfig
from prune_opd.errors import ConfigError
from prune_opd.method.calibration import LEAST_DEVIATION, Calibration, Usual, in_force
from prune_opd.method.gate import overlap_events


def early(acceptance: list[float], shared: list[int], k: int) -> list[float]:
    counts = [float(shared.count(number)) for number in range(k + 1)]
    return [len(acceptance), sum(acceptance), sum(a * a for a in acceptance), *counts]


def test_what_is_usual_is_found_in_the_first_steps_and_goes_with_the_checkpoint() -> None:
    gate = GateConfig("change_point", k=2, calibration_steps=2)
    calibration = Calibration(gate)
    assert calibration.usual is None and calibration.record() == {}
    for step in ([4, 3.2, 2.6, 0, 1, 3], [4, 3.6, 3.3, 0, 0, 4], [4, 0.0, 0.0, 4, 0, 0]):  # the third is too late
        calibration.update(step)
    usual = calibration.usual
    assert usual is not None
    assert usual == pytest.approx((6.8 / 8, (5.9 / 8 - (6.8 / 8) ** 2) ** 0.5, 0.5, 0))
    assert calibration.record() == {"usual_acceptance": usual.mean, "usual_deviation": usual.deviation}
    again = Calibration(gate)
    again.load_state_dict(calibration.state_dict())
    assert again.usual == usual
    again.update([4, 0.0, 0.0, 4, 0, 0])
    assert again.usual == usual
    with pytest.raises(ConfigError, match="calibration has no 'sums': resume from another checkpoint"):
        again.load_state_dict({"done": 1})
    of_an_older_version = {name: value for name, value in calibration.state_dict().items() if name in ("done", "sums")}
    again.load_state_dict(of_an_older_version)
    assert again.usual == usual._replace(overlap=0.0)  # which its gates do not ask for


def test_what_another_gate_has_found_is_refused() -> None:
    found = Calibration(GateConfig("overlap_quantile", k=16))
    found.update(early([0.5] * 4, [8, 8, 9, 16], 16))
    for gate in (GateConfig("overlap_quantile", k=8), GateConfig("change_point", k=16)):
        fresh = Calibration(gate)
        with pytest.raises(
            ConfigError, match=r"calibration is of gate .*'k': 16.*, this run has .*: restore those settings"
        ):
            fresh.load_state_dict(found.state_dict())
        assert fresh.usual is None
    with pytest.raises(ConfigError, match="of gate settings of before"):  # an older version has counted no ids
        Calibration(GateConfig("overlap_quantile")).load_state_dict({"done": 5, "sums": [4, 2, 1]})
    none = Calibration(None)
    none.load_state_dict(found.state_dict())
    assert none.usual is None
    with pytest.raises(ConfigError, match="of gate None"):
        Calibration(GateConfig("change_point")).load_state_dict(none.state_dict())


def test_other_gates_calibrate_nothing() -> None:
    for gate in (None, GateConfig()):
        calibration = Calibration(gate)
        calibration.update([4, 3.2, 2.6, 0, 4])
        assert calibration.usual is None and in_force(gate, None) is gate


def test_two_equal_models_have_a_least_deviation() -> None:
    calibration = Calibration(GateConfig("change_point", k=1))
    calibration.update([100, 99.9999, 99.9998, 0, 100])
    assert calibration.usual is not None and calibration.usual.deviation == LEAST_DEVIATION


@pytest.mark.parametrize("k", (1, 3, 8, 16, 64))
@pytest.mark.parametrize("quantile", (0.0, 0.05, 0.3, 1.0))
def test_the_pairs_threshold_is_the_highest_that_calls_no_more_than_the_quantile_of_its_tokens_events(
    k: int, quantile: float
) -> None:
    draw = torch.Generator().manual_seed(k)
    shared = torch.randint(0, k + 1, (400,), generator=draw).tolist()
    gate = GateConfig("overlap_quantile", k=k, quantile=quantile)
    calibration = Calibration(gate)
    calibration.update(early([0.5] * 400, shared, k))
    now = in_force(gate, calibration.usual)
    assert now is not None and now.metric == "overlap" and now.k == k
    assert calibration.record() == {"usual_overlap": now.threshold}

    def events(threshold: float) -> int:
        return int(overlap_events(torch.tensor(shared) / k, k, threshold).sum())

    assert events(now.threshold) <= quantile * 400
    higher = now.threshold + 1 / k
    assert higher > 1 or events(higher) > quantile * 400


def test_before_the_first_step_no_token_is_an_event() -> None:
    gate = in_force(GateConfig("overlap_quantile"), None)
    assert gate is not None and not overlap_events(torch.zeros(4), gate.k, gate.threshold).any()
    known = in_force(GateConfig("overlap_quantile"), Usual(0.5, 0.1, 0.25))
    assert known is not None and known.threshold == 0.25
