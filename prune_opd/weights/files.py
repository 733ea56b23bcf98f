"""Writing a Hugging Face model directory: sharded safetensors with an index, config and tokenizer beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

BESIDE_THE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.json",
    "additional_chat_templates",
)


class HfDirectoryWriter:
    """Collects tensors into files of at most `max_file_bytes`. The directory appears under its name when complete."""

    def __init__(self, out_dir: Path, source_dir: Path, max_file_bytes: int):
        self.out_dir, self.source_dir, self.max_file_bytes = out_dir, source_dir, max_file_bytes
        self.partial = out_dir.with_name(out_dir.name + ".partial")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        self._file: dict[str, Tensor] = {}
        self._file_bytes = 0
        self._dtype: torch.dtype | None = None
        self._written: list[tuple[Path, list[str], int]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._file and self._file_bytes + size > self.max_file_bytes:
            self._flush()
        self._dtype = self._dtype or tensor.dtype
        self._file[name] = tensor.cpu().clone()  # the stream's buffer may be a view of a live parameter
        self._file_bytes += size

    def finish(self) -> None:
        self._flush()
        self._name_files()
        for name in BESIDE_THE_WEIGHTS:
            if (self.source_dir / name).is_dir():
                shutil.copytree(self.source_dir / name, self.partial / name)
            elif (self.source_dir / name).exists():
                shutil.copyfile(self.source_dir / name, self.partial / name)
        self._state_dtype()
        shutil.rmtree(self.out_dir, ignore_errors=True)
        self.partial.rename(self.out_dir)

    def _state_dtype(self) -> None:
        """config.json names the dtype that loaders take by default: it is the one of the weights written here."""
        path = self.partial / "config.json"
        if self._dtype is None or not path.exists():
            return
        config = json.loads(path.read_text())
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(self._dtype).removeprefix("torch.")
        path.write_text(json.dumps(config, indent=2) + "\n")

    def _flush(self) -> None:
        path = self.partial / f"part-{len(self._written):05d}.safetensors"
        save_file(self._file, path, metadata={"format": "pt"})
        path.chmod(self.partial.stat().st_mode & 0o666)  # safetensors gives it to its owner alone: as the umask has it
        self._written.append((path, list(self._file), self._file_bytes))
        self._file, self._file_bytes = {}, 0

    def _name_files(self) -> None:
        count = len(self._written)
        if count == 1:
            self._written[0][0].rename(self.partial / "model.safetensors")
            return
        weight_map = {}
        for i, (path, names, _) in enumerate(self._written, start=1):
            final = f"model-{i:05d}-of-{count:05d}.safetensors"
            path.rename(self.partial / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": sum(size for _, _, size in self._written)}, "weight_map": weight_map}
        (self.partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
