r"""Reading the answer out of a response: `evaluation.extract`.

    text ── read_answer ──▶ "48" | None ── math_equal, or the task's own scorer ──▶ right or wrong

What follows the last `</think>` is read first; the whole text only if nothing can be read there.
"""

from __future__ import annotations

import re
from typing import Final

from prune_opd.config.run import REGEX
from prune_opd.data.answers import last_boxed

# A minus belongs to its number where no other term stands before it: -5 and x=-5, but not 8-5.
_NUMBER: Final = re.compile(
    r"""
    (?: (?<![\w)}\]%]) (?P<sign>[-−+]) \\?\$? )?
    (?P<number>
        \\[dt]?frac \s* (?: \{\s*-?\d+\s*\} \s* \{\s*\d+\s*\} | \d\d )
      | (?<!\w) (?: \d{1,3} (?: (?:,|\{,\}) \d{3} )+ (?!\d) | \d+ ) (?: \.\d+ )? (?: /\d+ )? (?: \s?\\?% )?
      | (?<![\w.]) \.\d+ (?: \s?\\?% )?
    )
    """,
    re.VERBOSE | re.ASCII,
)

_LETTER: Final = r"(?:[A-HJ]|I(?!\s+[a-z]))(?![\w'’])"  # "I think" is no choice
_MARKS: Final = r"[\s:*_$\"'(\[{]{0,20}(?:\\(?:text|math)\w*\s*\{\s*\(?)?"
_STATED: Final = re.compile(  # \boxed{B}; answer: B; the answer to this is option (B)
    rf"(?:\\boxed|(?i:\banswer\b(?:[^.\n]{{0,60}}?(?:\bis\b|:))?(?:[\s:*_]{{0,20}}\b(?:option|choice)\b)?))"
    rf"{_MARKS}(?P<letter>{_LETTER})"
)
_MARKED: Final = re.compile(  # (B); a line of its own; a text that begins with "B."
    rf"[(\[](?P<a>{_LETTER})[)\]]|^[ *_$]*(?P<b>{_LETTER})[ *_$.):]*$|\A[\s*_]*(?P<c>{_LETTER})[*_]*[.):]", re.M
)


def read_answer(text: str, extract: str) -> str | None:
    r"""The answer that a response gives, as text; None if none can be read.

    Args:
        extract: one of
            box: what the last `\boxed` holds;
            last_number: the last number, with sign, thousands separators, decimals, `%`, or as a fraction;
            box_or_last_number: the box or, without one that holds anything, the last number;
            choice: the last letter A to J that is boxed or follows "answer is" or "answer:", else the last one in
                brackets, on a line of its own, or before a dot at the very beginning;
            regex:PATTERN: the first group (or all) of the pattern's last match, without a full stop at its end.
    """
    return _read(text.rpartition("</think>")[2], extract) or _read(text, extract)


def _read(text: str, extract: str) -> str | None:
    match extract:
        case "box":
            found = last_boxed(text)
        case "last_number":
            found = _last_number(text)
        case "box_or_last_number":
            found = last_boxed(text) or _last_number(text)
        case "choice":
            found = _choice(text)
        case _:
            found = _last_match(extract.removeprefix(REGEX), text)
    return (found or "").strip() or None


def _last_number(text: str) -> str | None:
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007 (the last one counts)
        pass
    return None if found is None else (found["sign"] or "").replace("−", "-") + found["number"]


def _choice(text: str) -> str | None:
    for pattern in (_STATED, _MARKED):
        if letters := [match[match.lastgroup or 0] for match in pattern.finditer(text)]:
            return letters[-1]
    return None


def _last_match(pattern: str, text: str) -> str | None:
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    group: str | None = matches[-1][min(1, matches[-1].re.groups)]
    return None if group is None else group.strip().removesuffix(".")
