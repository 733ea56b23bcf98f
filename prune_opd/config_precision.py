"""Settings of number formats. `config.py` re-exports them; `precision.py` turns them into arguments and refusals."""

from __future__ import annotations

from dataclasses import dataclass, field

from prune_opd.config_checks import between, one_of
from prune_opd.errors import ConfigError

FP8_FORMATS = ("e4m3", "hybrid")
FP8_RECIPES = ("delayed", "tensorwise", "blockwise")
# Of vLLM: weights quantised when they are loaded, and again at every reload; how the KV cache is stored.
QUANTIZATIONS = ("fp8", "fp8_per_tensor", "fp8_per_channel", "fp8_per_block")
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "fp8_e5m2")


@dataclass(frozen=True)
class Fp8Config:
    """FP8 matrix products in one model's layers, through Transformer Engine on Hopper. The head always stays bf16.

    delayed: one scale a tensor, from the largest values of earlier batches | tensorwise: one scale a tensor, from its
    own largest value | blockwise: a scale for each 1 × 128 values of an activation and each 128 × 128 of a weight.
    """

    format: str | None = None  # null: no FP8 | e4m3 | hybrid: e4m3 forward, e5m2 gradients
    recipe: str = "blockwise"  # delayed | tensorwise | blockwise: how scales are chosen
    param: bool = False  # keep the weights in FP8 too; the optimizer's master weights stay fp32
    first_layers_bf16: int = 0  # layers at the start that stay in bf16; not with delayed
    last_layers_bf16: int = 0  # likewise, at the end
    amax_history: int = 1024  # delayed: batches that a scale looks back on

    @property
    def on(self) -> bool:
        return self.format is not None

    def validate(self, name: str) -> None:
        """Raises `ConfigError`. name: the dotted name of this part, for its messages."""
        if self.format is not None:
            one_of(f"{name}.format", self.format, FP8_FORMATS)
        if self.recipe == "mxfp8":
            raise ConfigError(
                f"{name}.recipe = 'mxfp8' needs a Blackwell GPU, and this project is for Hopper: "
                f"choose one of {', '.join(FP8_RECIPES)}"
            )
        one_of(f"{name}.recipe", self.recipe, FP8_RECIPES)
        between(f"{name}.amax_history", self.amax_history, 1)
        for end in ("first_layers_bf16", "last_layers_bf16"):
            between(f"{name}.{end}", getattr(self, end), 0)
            if self.on and self.recipe == "delayed" and getattr(self, end) > 0:
                raise ConfigError(
                    f"{name}.{end} = {getattr(self, end)} does not go with recipe = delayed, whose scales are updated "
                    f"for all layers at once: choose recipe=tensorwise or blockwise, or {end}=0"
                )
        self._refuse_idle(name)

    def _refuse_idle(self, name: str) -> None:
        """What is set and would do nothing is a mistake."""
        settings: tuple[str, ...] = ()
        why = remedy = ""
        if not self.on:
            settings = ("recipe", "param", "first_layers_bf16", "last_layers_bf16", "amax_history")
            why, remedy = f"{name}.format = null", f"{name}.format=hybrid"
        elif self.recipe != "delayed":
            settings, why, remedy = ("amax_history",), f"recipe = {self.recipe}", f"{name}.recipe=delayed"
        for setting in settings:
            if (value := getattr(self, setting)) != getattr(Fp8Config, setting):
                raise ConfigError(
                    f"{name}.{setting} = {value!r} does nothing with {why}: leave it out, or set {remedy}"
                )


@dataclass(frozen=True)
class PrecisionConfig:
    """Student and teacher are set separately. FP8 of the rollouts: rollout.quantization and rollout.kv_cache_dtype."""

    params: str = "bf16"  # bf16 | fp32, of both models and the rollouts; the optimizer's master weights are always fp32
    student_fp8: Fp8Config = field(default_factory=Fp8Config)
    teacher_fp8: Fp8Config = field(default_factory=Fp8Config)

    def __post_init__(self) -> None:
        one_of("precision.params", self.params, ("bf16", "fp32"))
        for role in ("student", "teacher"):
            fp8: Fp8Config = getattr(self, f"{role}_fp8")
            fp8.validate(f"precision.{role}_fp8")
            if fp8.on and self.params != "bf16":
                raise ConfigError(
                    f"precision.params = {self.params!r} does not go with precision.{role}_fp8.format = "
                    f"{fp8.format!r}: what is not FP8 in such a model is bf16, so set precision.params=bf16"
                )
