"""What a Hugging Face config.json says of a model, and whether this project builds such a model. No torch in here."""

from __future__ import annotations

import functools
import json
import math
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_opd.config.paths import cache_dir, models_dir, real_pair_dir, recipes_dir
from prune_opd.errors import ConfigError

VOCAB_MULTIPLE = 128  # rows of the vocabulary matrices per tensor-parallel rank: GEMM sizes that H100 likes
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
# Settings of a Hugging Face config that change the mathematics, and the one value of each that is built here.
# (attention_bias of Llama and Qwen3 also puts a bias on o_proj; Qwen2 looks at none, and has its bias on q, k and v.)
BUILT = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ROPE_NEEDS = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}
# What transformers takes for a setting that a config.json leaves out, where the families differ.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": (),
    },
}


def not_built(config: dict[str, Any]) -> str | None:
    """Which setting of a config.json this project does not build, and what would do; None if there is none."""
    family = config.get("model_type")
    if family not in FAMILIES:
        return f"model_type = {family!r} is not supported: use a model of {', '.join(FAMILIES)}"
    rope = _rope_settings(config)
    if not isinstance(rope, dict):
        return f"rope_scaling = {rope!r} is no set of settings: use a model with null, or an object with rope_type"
    for name, built in BUILT.items():
        found = config.get(name, rope.get(name))
        if (family, name) == ("qwen2", "attention_bias"):
            continue
        if found not in (built, None):
            return f"{name} = {found!r} is not supported yet: use a model with {built!r}"
    if other := sorted(set(config.get("layer_types") or ()) - {"full_attention"}):
        return f"layer_types has {', '.join(other)}, which is not supported yet: use a model with full attention only"
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    groups = DEFAULTS[family].get("num_key_value_heads", heads) if groups is None else groups
    if isinstance(heads, int) and isinstance(groups, int) and (groups < 1 or heads % groups):
        return (
            f"num_key_value_heads = {groups} does not divide num_attention_heads = {heads} (left out it is "
            "transformers' default of the family): copy the model's config.json again"
        )
    return _rope_not_built(rope) or (_experts_not_built(config) if family == "qwen3_moe" else None)


def _rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The newer `rope_parameters`, or the older `rope_scaling`: where that is filled in, transformers takes it."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _rope_type(rope: dict[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))  # "type" is the older name


def _rope_not_built(rope: dict[str, Any]) -> str | None:
    kind = _rope_type(rope)
    if kind not in ROPE_TYPES:
        return f"rope_type = {kind!r} is not supported: use a model with {', '.join(ROPE_TYPES)}"
    for name in ROPE_NEEDS.get(kind, ()):
        if not isinstance(rope.get(name), int | float):
            return f"{name} = {rope.get(name)!r} beside rope_type = {kind!r}: it must be a number"
    return None


def _experts_not_built(config: dict[str, Any]) -> str | None:
    if config.get("decoder_sparse_step", 1) < 1:
        return f"decoder_sparse_step = {config['decoder_sparse_step']}: it must be at least 1"
    moe = _moe_spec(config)
    if moe is None:
        return None
    if not 1 <= moe.per_token <= moe.experts:
        return f"num_experts_per_tok = {moe.per_token}: it must be between 1 and num_experts = {moe.experts}"
    if moe.per_token == 1 and moe.normalised:  # the router would get no gradient at all
        return "norm_topk_prob = True is not supported with num_experts_per_tok = 1: use a model with False"
    return None


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions: `theta`, and how the frequencies are stretched for longer contexts (`kind`).

    original_positions: of the pretraining. factor: of the stretch. The rest belongs to one kind each, as named.
    `megatron/rope.py` turns this into frequencies.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: whole dimensions as bounds
    attention_factor: float = 1.0  # yarn: what rotated queries and keys are multiplied by


@dataclass(frozen=True)
class MoeSpec:
    """Sparse feed-forward layers: each token goes through `per_token` of `experts`, all of them, whatever their load.

    ffn: width of one expert. normalised: the chosen experts' weights are made to sum to 1. sparse: which layers have
    experts; the others have a dense feed-forward layer of the model's own width.
    """

    experts: int
    per_token: int
    ffn: int
    normalised: bool
    sparse: tuple[bool, ...]


@dataclass(frozen=True)
class ModelSpec:
    """What the two worlds must agree on, read from a Hugging Face config.json (Llama, Qwen2, Qwen3, Qwen3-MoE)."""

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rope: RopeSpec
    norm_eps: float
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    moe: MoeSpec | None = None

    @classmethod
    def read(cls, model_dir: str | Path) -> ModelSpec:
        """Raises `ConfigError` for a model that this project does not build."""
        path = Path(model_dir) / "config.json"
        return cls.of(json.loads(path.read_text()), str(path))

    @classmethod
    def of(cls, config: dict[str, Any], where: str) -> ModelSpec:
        """From the contents of a config.json; `where` it is from, for the errors of `read`."""
        if problem := not_built(config):
            raise ConfigError(f"{where}: {problem}")
        try:
            return cls._of(DEFAULTS[config["model_type"]] | {k: v for k, v in config.items() if v is not None})
        except KeyError as missing:
            raise ConfigError(f"{where}: {missing.args[0]} is missing: copy the model's config.json again") from None

    @classmethod
    def _of(cls, hf: dict[str, Any]) -> ModelSpec:
        family = hf["model_type"]
        return cls(
            family=family,
            layers=hf["num_hidden_layers"],
            hidden=hf["hidden_size"],
            ffn=hf["intermediate_size"],
            heads=hf["num_attention_heads"],
            kv_heads=hf.get("num_key_value_heads", hf["num_attention_heads"]),
            head_dim=hf.get("head_dim", hf["hidden_size"] // hf["num_attention_heads"]),
            vocab_size=hf["vocab_size"],
            max_positions=hf["max_position_embeddings"],
            rope=_rope_spec(hf),
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            tied=hf.get("tie_word_embeddings", False),
            qkv_bias=family == "qwen2",
            qk_norm=family in ("qwen3", "qwen3_moe"),
            moe=_moe_spec(hf) if family == "qwen3_moe" else None,
        )

    def padded_vocab(self, tp_size: int) -> int:
        multiple = VOCAB_MULTIPLE * tp_size
        return -(-self.vocab_size // multiple) * multiple

    def kv_bytes(self, value: int, tensor: int = 1) -> int:
        """Bytes that a token takes of a KV cache over `tensor` ranks, on each; value: bytes of one number."""
        return 2 * self.layers * -(-self.kv_heads // tensor) * self.head_dim * value

    def is_sparse(self, layer: int) -> bool:
        return self.moe is not None and self.moe.sparse[layer]


def _rope_spec(hf: dict[str, Any]) -> RopeSpec:
    rope = {name: value for name, value in _rope_settings(hf).items() if value is not None}
    theta = float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))
    kind = _rope_type(rope)
    if kind == "default":
        return RopeSpec(theta)
    trained_on = rope.get("original_max_position_embeddings", hf["max_position_embeddings"])
    return RopeSpec(
        theta=theta,
        kind=kind,
        factor=float(rope["factor"]),
        original_positions=hf.get("original_max_position_embeddings", trained_on),
        low_freq_factor=rope.get("low_freq_factor", 1.0),
        high_freq_factor=rope.get("high_freq_factor", 4.0),
        beta_fast=rope.get("beta_fast") or 32,
        beta_slow=rope.get("beta_slow") or 1,
        truncate=rope.get("truncate", True),
        attention_factor=_yarn_attention_factor(rope) if kind == "yarn" else 1.0,
    )


def _yarn_attention_factor(rope: dict[str, Any]) -> float:
    """What rotated queries and keys are multiplied by (YaRN, arXiv 2309.00071, section 3.4; mscale is DeepSeek's)."""
    if "attention_factor" in rope:
        return rope["attention_factor"]

    def growth(scale: float = 1.0) -> float:
        return 0.1 * scale * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return growth(rope["mscale"]) / growth(rope["mscale_all_dim"])
    return growth()


def _moe_spec(config: dict[str, Any]) -> MoeSpec | None:
    """None if every layer is dense."""
    hf = DEFAULTS["qwen3_moe"] | {name: value for name, value in config.items() if value is not None}
    experts = hf.get("num_local_experts", hf["num_experts"])  # as transformers 5 and as the published models call it
    step, dense = hf["decoder_sparse_step"], hf["mlp_only_layers"]
    layers = range(hf.get("num_hidden_layers", 0))
    sparse = tuple(experts > 0 and i not in dense and (i + 1) % step == 0 for i in layers)
    if not any(sparse):
        return None
    return MoeSpec(experts, hf["num_experts_per_tok"], hf["moe_intermediate_size"], hf["norm_topk_prob"], sparse)


def gguf_problem(role: str, directory: str) -> str | None:
    """How a GGUF file, or a directory of them without a config.json, becomes a model directory; None for all others.

    role: the setting that names it. As transformers loads it the model counts as quantised, and so cannot be saved.
    """
    path = Path(directory)
    named_so = path.suffix.lower() == ".gguf" and not path.is_dir()  # whether or not it is there
    files = [path] if named_so or path.is_file() else []
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*"))
    file = next((file for file in files if file.suffix.lower() == ".gguf"), None)
    if file is None:
        return None
    named = f"from_pretrained({str(file.parent)!r}, gguf_file={file.name!r})"
    return (
        f"{role} = {directory!r} is GGUF, which is not read here: convert it in Python with transformers and the "
        f"packages gguf and accelerate: model = AutoModelForCausalLM.{named}; model.hf_quantizer = None; "
        "del model.config.quantization_config; model.save_pretrained('MODEL_DIR'); "
        f"AutoTokenizer.{named}.save_pretrained('MODEL_DIR')"
    )


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # owner/name, as the Hugging Face hub has it


def absent_problem(role: str, directory: str, name: str) -> str:
    """Why `directory` is no model directory, and what would make it one. name: the file that is not in it."""
    path = Path(directory)
    if not directory:
        return f"{role} is empty: give a Hugging Face model directory"
    if directory.startswith("~"):
        return f"{role} = {directory!r}: no shell puts your home folder in for ~ after the =: write $HOME or the path"
    if path.suffix in (".safetensors", ".bin", ".json"):
        return f"{role} = {directory!r} is one file of a model: give the directory that holds it, {path.parent}"
    what = (
        f"there is no {name} in it"
        if path.is_dir()
        else "it is a file"
        if path.exists()
        else "there is no such directory"
    )
    problem = f"{role} = {directory!r}: {what}; "
    hub_id = "/".join(path.parts[-2:])
    if path.exists() or not (hub_id in published() or HUB_ID.fullmatch(directory)):
        return f"{role} = {directory!r}: {what}; give a Hugging Face model directory{_made_here(path)}"
    if path.parts[0] == "runs":
        return problem + "give a run directory, a checkpoint of one, or a Hugging Face model directory"
    place = path if hub_id != directory else models_dir() / hub_id
    then = "" if place == path else f", and give {role}={place}"
    return problem + f"nothing is downloaded here: hf download {hub_id} --local-dir {place}{then}"


def _made_here(path: Path) -> str:
    """Which command makes the models of the cache."""
    if real_pair_dir() in path.parents:
        return " (`make real-pair` makes those of real_pair)"
    return " (`make tiny-models` makes those of the tiny recipes)" if cache_dir() in path.parents else ""


NO_MODEL = "its config.json is not that of a causal language model"
_NUMBERS = (
    *("num_attention_heads", "max_position_embeddings", "vocab_size"),
    *("hidden_size", "intermediate_size", "num_hidden_layers"),
)
_NUMBERS_IF_THERE = (
    *("num_key_value_heads", "head_dim", "moe_intermediate_size", "num_experts", "num_experts_per_tok"),
    *("decoder_sparse_step", "rope_theta", "rms_norm_eps"),
)


def shape_problem(settings: Any) -> str | None:
    """What in a config.json is not of the kind that the shape of a causal language model needs; None if all is."""
    if not isinstance(settings, dict):
        return "it is no object"
    for name in (*_NUMBERS, *_NUMBERS_IF_THERE):
        value = settings.get(name)
        if value is None and name in _NUMBERS_IF_THERE:
            continue
        whole = name not in ("rope_theta", "rms_norm_eps")
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not value > 0:
            return f"{name} = {value!r}, where a {'whole ' if whole else ''}number above 0 is wanted"
    wanted = {"model_type": str, "tie_word_embeddings": bool, "rope_scaling": dict, "rope_parameters": dict}
    for name, kind in wanted.items():
        if settings.get(name) is not None and not isinstance(settings[name], kind):
            return f"{name} = {settings[name]!r} is of the wrong type"
    return None


def model_config(role: str, directory: str) -> dict[str, Any]:
    """The settings of a model, whether or not its weights are there. role: the setting that names it.

    A published model is known by the last two parts of its path (`…/Qwen/Qwen3-8B`). Raises `ConfigError` if the
    directory has no readable config.json and its name is not a published model's.
    """
    path = Path(directory) / "config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise ConfigError(f"{role} = {directory!r}: its config.json cannot be read ({error})") from error
        if problem := shape_problem(config):
            raise ConfigError(f"{role} = {directory!r}: {NO_MODEL} ({problem})")
        return dict(config)
    if problem := gguf_problem(role, directory):
        raise ConfigError(problem)
    name = "/".join(Path(directory).parts[-2:])
    if name not in (known := published()):
        raise ConfigError(
            f"{role} = {directory!r}: there is no config.json in it, and {name} is none of the published models that "
            f"are known without one ({', '.join(known)}): give a Hugging Face model directory"
        )
    return dict(known[name])


@functools.cache
def published() -> dict[str, dict[str, Any]]:
    """config.json by `owner/name`, as far as it says something of the shape."""
    return typing.cast(
        dict[str, dict[str, Any]],
        json.loads((recipes_dir() / "shapes.json").read_text(encoding="utf-8"))["models"],
    )
