"""The tokenizer of a model directory: what its tokenizer.json says, whatever class tokenizer_config.json names.

Some classes of transformers build their own pre-tokenizer and read only vocabulary and merges from the file: under
LlamaTokenizer, which DeepSeek-R1-Distill-Llama and its fine-tunes name, a byte-level tokenizer loses its spaces, and a
Qwen2 model always gets Qwen2's split of the text. The list of exceptions in transformers goes by names of the hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prune_opd.data.prompt import Tokenizer

PROBE = (
    "Find the value of x such that 3x + 7 = 22.\n\nThe answer is \\boxed{5}; 1234567 and 0.5."
    "\n    indented,  two  spaces\tHe's naïve: don't! Ünïcödé e\u0301 ﬁ 数学题 ½ \U0001f600 <tag> user:a\r\n end "
)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, as its tokenizer.json encodes and decodes.

    It is the class that transformers chooses where that can be made and agrees with the file on a text with everything
    in it, else the one that takes the file as it is. Without a tokenizer.json it is the class's.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    has_file = (Path(directory) / "tokenizer.json").is_file()
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        if not has_file or _agrees(tokenizer, directory):
            return tokenizer
    except Exception:  # a class that makes no tokenizer of this vocabulary raises what it likes
        if not has_file:
            raise
    return PreTrainedTokenizerFast.from_pretrained(directory)


def _agrees(tokenizer: Any, directory: str | Path) -> bool:
    from tokenizers import Tokenizer as File

    file = File.from_file(str(Path(directory) / "tokenizer.json"))
    added = [token.content for _, token in sorted(file.get_added_tokens_decoder().items())]
    for text in (PROBE, f" {PROBE}", "".join(f"{token}a {token}" for token in added)):
        try:
            ids = file.encode(text, add_special_tokens=False).ids
        except Exception:  # `tokenizers` has no exception of its own for text outside the vocabulary
            continue
        if list(tokenizer(text, add_special_tokens=False)["input_ids"]) != ids:
            return False
        decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if decoded != file.decode(ids, skip_special_tokens=False):
            return False
    return True
