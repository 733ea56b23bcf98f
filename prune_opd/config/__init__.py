"""Everything a run is made of, as frozen dataclasses. A recipe returns one `TrainConfig` (or one `SftConfig`).

Each dataclass checks its own values when it is made, so a wrong setting never reaches a model; what needs files or
several parts at once (does TP divide the heads? do the tokenizers agree?) is in
`check/run.py`. Symbols are the paper's.
"""

from prune_opd.config.data import DataConfig
from prune_opd.config.elsewhere import TeacherCacheConfig, TeacherServerConfig
from prune_opd.config.lora import LoraConfig
from prune_opd.config.method import GateConfig, HorizonConfig, ObjectiveConfig, WeightingConfig
from prune_opd.config.reward import RewardConfig
from prune_opd.config.rollout import InflightConfig, RolloutConfig
from prune_opd.config.run import (
    CheckpointConfig,
    EvalConfig,
    SurvivalConfig,
    TrainConfig,
    to_dict,
)
from prune_opd.config.sft import CorpusConfig, ModelShape, SftConfig, SftStage
from prune_opd.config.teacher import TeacherEmaConfig
from prune_opd.config.teachers import TeacherConfig, TeacherLayout
from prune_opd.config.track import PlanningConfig, TrackConfig
from prune_opd.config.training import Fp8Config, MemoryConfig, OptimizerConfig, ParallelConfig, PrecisionConfig

RunConfig = TrainConfig | SftConfig  # what a recipe may return

__all__ = [
    "CheckpointConfig",
    "CorpusConfig",
    "DataConfig",
    "EvalConfig",
    "Fp8Config",
    "GateConfig",
    "HorizonConfig",
    "InflightConfig",
    "LoraConfig",
    "MemoryConfig",
    "ModelShape",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PlanningConfig",
    "PrecisionConfig",
    "RewardConfig",
    "RolloutConfig",
    "SftConfig",
    "SftStage",
    "SurvivalConfig",
    "TeacherCacheConfig",
    "TeacherConfig",
    "TeacherEmaConfig",
    "TeacherLayout",
    "TeacherServerConfig",
    "TrackConfig",
    "TrainConfig",
    "WeightingConfig",
    "to_dict",
]
