"""What `prune-opd export` refuses before it writes anything; test_checkpoint_layouts.py exports for real."""

from __future__ import annotations

from pathlib import Path

import pytest

from prune_opd import platform
from prune_opd.config import ObjectiveConfig
from prune_opd.config.run import to_dict
from prune_opd.errors import UserError
from prune_opd.megatron import checkpoint
from prune_opd.megatron.export import export_checkpoint
from tests.fake_models import train_config, write_model


def test_a_class_of_ends_needs_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = ObjectiveConfig(k=4, ends="class")
    config = train_config(write_model(tmp_path / "student"), tmp_path / "gone", objective=ends)
    monkeypatch.setattr(platform, "prepare", lambda: None)
    monkeypatch.setattr(checkpoint, "read_state", lambda path: {"config": to_dict(config)})
    with pytest.raises(UserError, match=r"teacher = .*gone.* is not there.*objective.ends = class"):
        export_checkpoint(tmp_path / "step", tmp_path / "out")
    assert not (tmp_path / "out").exists()
