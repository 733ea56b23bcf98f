r"""A reasoning-gym problem in the words of the tiny models.

Of the 105 tasks that reasoning-gym can make by name none has a question within the ledger's 199 words (seen with its
0.1 release: the nearest, grids of digits, still begin with English sentences). One task is therefore told again in
those words, for models with the ledger's tokenizer; its problems and its scorer stay reasoning-gym's own:

    number_sorting   <bos> +1 56 25 75 9 <ask>          +1: ascending, -1: descending; whole numbers 0 to 99
    response         HDR 9 SEP 25 SEP 56 SEP 75 SEP <eos>

HDR and SEP stand for twelve synonyms each, as in the ledger. The answer is every number of the response, in its order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from prune_opd.data.ledger import ASK, BOS, EOS, HEADERS, NUMBERS, SEPARATORS, synonym

SORTING = "number_sorting"
# Settings of the task that keep it within the words. Prompts have 3 + max_numbers tokens, responses twice that at most.
SETTINGS: dict[str, float] = {"min_value": 0, "max_value": 99, "max_decimals": 0}
_WHOLE = {f"{number}.0": word for number, word in enumerate(NUMBERS)}


def told(task: str, entry: Mapping[str, Any]) -> str | None:
    """The prompt of a problem of reasoning-gym in the ledger's words; None if it cannot be told in them."""
    if task != SORTING:
        return None
    given = entry["metadata"]["original_numbers"]
    if any(number not in _WHOLE for number in given):
        return None
    direction = "+1" if entry["metadata"]["direction"] == "ascending" else "-1"
    return " ".join([BOS, direction, *(_WHOLE[number] for number in given), ASK])


def answer_in(response_text: str) -> str:
    """The answer that a response gives, as the task's scorer reads it: a list of all its numbers."""
    return str([word for word in response_text.split() if word in NUMBERS])


def worked(entry: Mapping[str, Any], rng: np.random.Generator) -> list[str]:
    """The words of a right response, from the header to `<eos>`."""
    words = [synonym(HEADERS, rng)]
    for number in entry["metadata"]["sorted_numbers"]:
        words += (_WHOLE[number], synonym(SEPARATORS, rng))
    return [*words, EOS]
