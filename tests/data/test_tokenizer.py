"""Loading a tokenizer: its tokenizer.json is right, whatever class the folder names. The tokenizers library judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from prune_opd.config import DataConfig
from prune_opd.data.prompts import FileSource
from prune_opd.data.tokenizer import PROBE, load_tokenizer

TEXT = ["Find the value of x such that 3x + 7 = 22.", "user assistant system", "def f(n):\n    return n + 1\n"] * 9
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(split: Any = None, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, last]) if split is not None else last
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False))


def spaces_as_marks() -> Tokenizer:
    """As Llama 2's: spaces become a mark, unknown characters bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(fallback)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    return trained(tokenizer, trainer)


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return trained(
        tokenizer,
        trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False),
    )


def trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


FILES = {
    "byte level, GPT-2's split": byte_level,
    "byte level, Llama 3's split": lambda: byte_level(pre_tokenizers.Split(Regex(LLAMA3), "isolated")),
    "byte level, digits alone": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "byte level, NFKC": lambda: byte_level(normalizer=normalizers.NFKC()),
    "spaces as marks": spaces_as_marks,
    "unigram": unigram,
}
CLASSES = (
    "LlamaTokenizerFast",
    "LlamaTokenizer",
    "Qwen2Tokenizer",
    "GPT2TokenizerFast",
    "GemmaTokenizer",  # it has no place in most of these vocabularies, and transformers says so with an Exception
    "PreTrainedTokenizerFast",
    None,
)


def write(folder: Path, tokenizer: Tokenizer, kind: str, of_class: str | None) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for turn in messages %}<|im_start|>{{ turn.content }}<|im_end|>\n{% endfor %}<|im_start|>"
    settings = {"eos_token": "<|im_end|>", "clean_up_tokenization_spaces": False, "chat_template": template}
    named = {} if of_class is None else {"tokenizer_class": of_class}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | named))
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return folder


@pytest.mark.parametrize("name", FILES)
def test_ids_and_text_are_those_of_the_file_under_every_class(name: str, tmp_path: Path) -> None:
    file = FILES[name]()
    texts = (PROBE, "3x + 7", " a", "<|im_start|>user\nIn a box.<|im_end|>\n", "é\n\n  ½")
    for kind in ("llama", "qwen2", "qwen3"):
        for of_class in CLASSES:
            loaded = load_tokenizer(write(tmp_path / f"{kind}-{of_class}", file, kind, of_class))
            for text in texts:
                ids = file.encode(text, add_special_tokens=False).ids
                assert loaded(text, add_special_tokens=False)["input_ids"] == ids, (kind, of_class, text)
                assert loaded.decode(ids) == file.decode(ids, skip_special_tokens=False), (kind, of_class, text)
            assert loaded.eos_token == "<|im_end|>" and loaded.chat_template, (kind, of_class)


def test_a_prompt_keeps_its_spaces_under_the_label_of_deepseeks_llama(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", byte_level(), "llama", "LlamaTokenizerFast")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "Find x such that 3x + 7 = 22."}))
    tokenizer = load_tokenizer(folder)
    (prompt,) = FileSource(DataConfig(source=str(tmp_path / "rows.jsonl")), tokenizer).prompts
    assert "Find x such that 3x + 7 = 22." in tokenizer.decode(list(prompt.ids))
