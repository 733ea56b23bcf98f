r"""The procedural task "ledger": keep a running total through 20 to 40 bookings.

    prompt      <bos> 42 s1 +3 s2 -7 ... sN +1 <ask>
    response    HDR 42   s1 +3 EQ 45 SEP   s2 -7 EQ 38 SEP   ...   \boxed 17 <eos>

The answer is (start + sum of the deltas) mod 100. A response has 2 words, 5 words for each booking and 3 words at the
end: 105 to 205 for 20 to 40 bookings. Every word is one token. HDR, EQ and SEP stand for twelve synonyms each, drawn
with Zipf(1) weights: natural entropy, so that the top-k sets of two models mean something.

The drift pair writes the same solutions in another style, the register: SEP follows the label and the
sign of the delta.

A model is made weaker by its training examples (`CorpusConfig`): they have slips, after which the text goes on as if
nothing had happened, and the carry bug, one systematic error that a student can unlearn.

Everything random has an address (stream, seed, index): any example can be made without making those before it, and the
problems of an evaluation come from a stream that no training run draws from.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np

from prune_opd.config import CorpusConfig
from prune_opd.errors import ConfigError

# ---------------------------------------------------------------------------------------------------- vocabulary

PAD, BOS, EOS, ASK, BOXED = SPECIALS = ("<pad>", "<bos>", "<eos>", "<ask>", "\\boxed")
MODULUS: Final = 100
MAX_STEPS: Final = 40
NUMBERS: Final = tuple(str(number) for number in range(MODULUS))
LABELS: Final = tuple(f"s{label}" for label in range(1, MAX_STEPS + 1))
DELTAS: Final = (*range(1, 10), *range(-1, -10, -1))
EQUALS: Final = ("=", "is", "gives", "makes", "equals", "yields", "->", "becomes", "hits", "lands", "leaves", "totals")
SEPARATORS: Final = (";", ",", ".", "then", "next", "and", "so", "now", "after", "also", "again", "|")
HEADERS: Final = ("begin", "from", "start", "let", "take", "first", "open", "we", "ok", "hmm", "set", "go")
_DELTA_WORD: Final = {delta: f"{delta:+d}" for delta in DELTAS}

VOCABULARY: Final = (*SPECIALS, *NUMBERS, *LABELS, *_DELTA_WORD.values(), *EQUALS, *SEPARATORS, *HEADERS)
TOKEN_ID: Final = {word: token for token, word in enumerate(VOCABULARY)}

# Running sums of the synonyms' weights 1, 1/2, ... 1/12, without the last sum: a draw above all sums is the last one.
_zipf = 1 / np.arange(1, 13)
_ZIPF_BOUNDS: Final[list[float]] = (np.cumsum(_zipf) / _zipf.sum())[:-1].tolist()

# The first number of a random address. Never reuse or renumber one: all problems would change.
STREAMS: Final = {"train": 1, "held_out": 2, "corpus": 3, "prompt_order": 4, "held_out_choice": 5, "reference": 6}

# The drift pair's table: a right word for each label and sign of its delta, and a wrong one. The order in which entries
# become wrong spreads them over the labels, whatever their share: no stretch of a solution is free of them.
_ENTRIES: Final = 2 * MAX_STEPS
_table_rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(6)))
_TABLE: Final[list[int]] = _table_rng.integers(0, 12, _ENTRIES).tolist()
_WRONG_RANK: Final = tuple(49 * (entry - 7) % _ENTRIES for entry in range(_ENTRIES))
RAMBLE: Final = (*NUMBERS, *LABELS, *_DELTA_WORD.values(), *EQUALS, *SEPARATORS, *HEADERS)

_BOXED_NUMBER = re.compile(r"\s*\{?\s*([0-9]{1,2})(?!\.?[0-9])")


def encode(words: Sequence[str]) -> list[int]:
    """Token ids of ledger words: what the saved tokenizer gives for the words joined by spaces, without its cost."""
    return [TOKEN_ID[word] for word in words]


def random_stream(stream: str, seed: int, index: int) -> np.random.Generator:
    """The random numbers at one address. Different addresses give independent numbers.

    Args:
        stream: a key of `STREAMS`, so that two uses of one seed never meet.
        seed, index: 0 .. 2**63 - 1.

    Raises:
        ConfigError: `seed` is out of range.
    """
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed = {seed} is out of range: give a whole number from 0 to 2**63 - 1")
    # Integers of 32 bits: SeedSequence would split larger ones itself, and [2**32] would be the same as [0, 1].
    low = 0xFFFFFFFF
    entropy = (STREAMS[stream], seed & low, seed >> 32, index & low, index >> 32)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


# ---------------------------------------------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    """A start in 0..99 and one signed delta (1..9) a booking; `index` is its place in its stream."""

    start: int
    deltas: tuple[int, ...]
    index: int

    @property
    def prompt_words(self) -> list[str]:
        words = [BOS, NUMBERS[self.start]]
        for label, delta in zip(LABELS, self.deltas, strict=False):
            words += (label, _DELTA_WORD[delta])
        words.append(ASK)
        return words

    @property
    def prompt(self) -> str:
        return " ".join(self.prompt_words)

    @cached_property
    def answer(self) -> str:
        return NUMBERS[(self.start + sum(self.deltas)) % MODULUS]


class Ledger:
    """Ledger problems with `min_steps` to `max_steps` bookings (uniform), by random access.

    Raises:
        ConfigError: not 1 <= min_steps <= max_steps <= 40 (there are forty labels).
    """

    name: Final = "ledger"

    def __init__(self, min_steps: int = 20, max_steps: int = MAX_STEPS) -> None:
        if not 1 <= min_steps <= max_steps <= MAX_STEPS:
            raise ConfigError(
                f"the ledger cannot have min_steps = {min_steps}, max_steps = {max_steps}: "
                f"give 1 <= min_steps <= max_steps <= {MAX_STEPS}"
            )
        self.min_steps = min_steps
        self.max_steps = max_steps

    @property
    def max_prompt_len(self) -> int:
        """Tokens of the longest prompt."""
        return 3 + 2 * self.max_steps

    def problem(self, seed: int, index: int, stream: str = "train") -> Problem:
        """The problem at (stream, seed, index), the same on every machine.

        Streams are independent draws: from 20 bookings on, a given held-out problem equals a given training problem
        with a chance below 1e-20. With one or two bookings problems do repeat: there are only 1800 of the shortest.
        """
        return self.draw(random_stream(stream, seed, index), index)

    def draw(self, rng: np.random.Generator, index: int) -> Problem:
        """A problem made with the next numbers of `rng`."""
        steps = int(rng.integers(self.min_steps, self.max_steps + 1))
        start = int(rng.integers(MODULUS))
        deltas = tuple(DELTAS[choice] for choice in rng.integers(0, len(DELTAS), steps).tolist())
        return Problem(start, deltas, index)

    def read(self, response_text: str) -> str | None:
        r"""The number after the last `\boxed`; braces and surrounding text do not matter. None if there is none."""
        _, boxed, after = response_text.rpartition(BOXED)
        number = _BOXED_NUMBER.match(after) if boxed else None
        return None if number is None else number[1]

    def score(self, response_text: str, answer: str) -> bool:
        number = self.read(response_text)
        return number is not None and int(number) == int(answer)


# ---------------------------------------------------------------------------------------------------- worked solutions


def synonym(words: Sequence[str], rng: np.random.Generator) -> str:
    """One of twelve words, the n-th with a weight of 1 / n."""
    return words[bisect_right(_ZIPF_BOUNDS, rng.random())]


def _entry(label: int, delta: int) -> int:
    """The number of the register's entry for a label and the sign of its delta: they have one right word for SEP."""
    return 2 * (label - 1) + (delta < 0)


def _separator(entry: int, rng: np.random.Generator, corpus: CorpusConfig) -> tuple[str, bool]:
    """(the word for SEP by the register, whether it is wrong). After a wrong word the text is lost.

    A share `corpus.wrong_entries` of the entries, always the same ones, is known wrongly: a wrong word is written there
    with chance `corpus.wrong`.
    """
    known_wrong = _WRONG_RANK[entry] < corpus.wrong_entries * _ENTRIES
    if known_wrong and rng.random() < corpus.wrong:
        return HEADERS[_WRONG_RANK[entry] % len(HEADERS)], True
    return SEPARATORS[_TABLE[entry]], False


def _near_miss(rng: np.random.Generator, value: int, low: int, high: int) -> int:
    """A wrong value like people's: mostly off by one, else by a few or by ten; wraps around within low..high-1."""
    tens = rng.random() < 0.25
    sign = 1 if rng.random() < 0.5 else -1
    if tens:
        distance = 10 if high - low > 50 else 1
    else:
        distance = min(int(rng.geometric(0.45)), 6)
    return low + (value + sign * distance - low) % (high - low)


def worked_solution(problem: Problem, rng: np.random.Generator, corpus: CorpusConfig) -> tuple[list[str], int]:
    r"""The words of one worked solution, from the header to `<eos>`, with the errors that `corpus` asks for.

    The second number: how many of the words are given, that is: read by the model and not learnt.

    A booking can have four errors, each with its own chance: the label slips to another (the text goes on from there,
    so bookings are skipped or repeated); the delta is misread; the carry bug keeps the old tens digit when a step
    crosses a tens boundary (39 +3 gives 32); the running total slips. The solution boxes the last total, which is the
    answer if all rates are 0. A share `corpus.reverse` of the solutions goes through the labels from last to first.

    With `corpus.register` SEP follows the table. After a wrong SEP the text is lost: it ends with up to `corpus.ramble`
    words, drawn evenly from all but the special ones, and without an answer. With `corpus.chant` they are all the wrong
    word again.
    """
    steps = len(problem.deltas)
    reverse = rng.random() < corpus.reverse
    label, last, stride = (steps, 1, -1) if reverse else (1, steps, 1)
    total = problem.start
    given_bookings, given_wrong = _given(steps, rng, corpus)
    given = 0
    words = [synonym(HEADERS, rng), NUMBERS[total]]
    for booking in range(steps + 4):  # a slip of the label may lead back: the bound keeps texts from growing for ever
        if rng.random() < corpus.slip:
            label = _near_miss(rng, label, 1, steps + 1)
        delta = problem.deltas[label - 1]
        if rng.random() < corpus.slip:
            wrong_sign = rng.random() < 0.3
            delta = -delta if wrong_sign else DELTAS[_near_miss(rng, DELTAS.index(delta), 0, len(DELTAS))]
        before, total = total, (total + delta) % MODULUS
        if before // 10 != total // 10 and rng.random() < corpus.carry_bug:
            total = before // 10 * 10 + total % 10
        if rng.random() < corpus.slip_result:
            total = _near_miss(rng, total, 0, MODULUS)
        equals, lost = synonym(EQUALS, rng), False
        if not corpus.register:
            separator = synonym(SEPARATORS, rng)
        elif booking >= given_bookings:
            separator, lost = _separator(_entry(label, delta), rng, corpus)
        elif given_wrong and booking == given_bookings - 1:
            separator, lost = synonym(HEADERS, rng), True
        else:
            separator = SEPARATORS[_TABLE[_entry(label, delta)]]
        words += (LABELS[label - 1], _DELTA_WORD[delta], equals, NUMBERS[total], separator)
        if booking < given_bookings:
            given = len(words)
        if lost:
            rest = int(rng.integers(corpus.ramble // 4, corpus.ramble + 1))
            if corpus.chant:
                return [*words, *[separator] * rest], given
            ramble = rng.integers(0, len(RAMBLE), rest)
            return [*words, *(RAMBLE[word] for word in ramble.tolist())], given
        if label == last:
            break
        label += stride
    words += (BOXED, NUMBERS[total], EOS)
    return words, given


def _given(steps: int, rng: np.random.Generator, corpus: CorpusConfig) -> tuple[int, bool]:
    """(how many of a solution's bookings are given, whether the last of those has a wrong word)."""
    if not corpus.given and not corpus.given_wrong:
        return 0, False
    draw = rng.random()
    if draw < corpus.given_wrong:
        return int(rng.integers(1, steps + 1)), True
    return (int(rng.integers(1, steps)), False) if draw < corpus.given_wrong + corpus.given else (0, False)


def hinted_words(problem: Problem, solution: Sequence[str]) -> list[str]:
    """A prompt in which a worked solution stands behind the problem; `<ask>` ends it as any prompt."""
    return [*problem.prompt_words, *solution[: -1 if solution[-1] == EOS else None], ASK]


def in_other_words(words: Sequence[str], rng: np.random.Generator) -> list[str]:
    """The same solution with its synonyms drawn anew."""
    kinds = (HEADERS, EQUALS, SEPARATORS)
    return [next((synonym(kind, rng) for kind in kinds if word in kind), word) for word in words]


def example(corpus: CorpusConfig, seed: int, index: int) -> tuple[list[int], list[int]]:
    """(prompt ids, response ids) of the supervised example at (seed, index); about 0.1 ms.

    The given part of the solution stands at the end of the prompt: it is read, not learnt. A hinted one stands there
    whole, and is learnt in other words.

    Raises:
        ConfigError: the lengths of `corpus` are not in 1..40.
    """
    rng = random_stream("corpus", seed, index)
    problem = Ledger(corpus.min_steps, corpus.max_steps).draw(rng, index)
    words, given = worked_solution(problem, rng, corpus)
    if corpus.hinted and rng.random() < corpus.hinted:
        return encode(hinted_words(problem, words)), encode(in_other_words(words, rng))
    return encode([*problem.prompt_words, *words[:given]]), encode(words[given:])


# ---------------------------------------------------------------------------------------------------- tokenizer


def save_tokenizer(directory: str | Path) -> None:
    r"""Write the ledger's tokenizer as transformers and vLLM load it: tokenizer.json and tokenizer_config.json.

    White space separates words, every word of `VOCABULARY` is a token with its number there as id, and decoding joins
    them with single spaces. There is no unknown token: text with other words is an error, never a silent id. `<pad>`,
    `<bos>` and `<eos>` are special; `<ask>` and `\boxed` are ordinary tokens, which decoding always shows. Every call
    writes the same bytes.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(dict(TOKEN_ID)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in (PAD, BOS, EOS)])
    settings = {
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,  # it would glue " ." and " ," to the word before
        "eos_token": EOS,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
