r"""One notation for answers: plain text, typography and LaTeX dress, as math-verify's LaTeX parser reads them.

    as_latex("-1 + exp(16)") = "-1 + e^{16}"        as_latex("1 000") = "1000"        as_latex("½") = "\frac{1}{2}"

What is not recognised stays as it is. A word ("east") is never taken apart.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from typing import Final

LARGEST_EXPONENT: Final = 400  # of 1e400: more digits than an answer has

_SUBSCRIPTS: Final = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUPERSCRIPTS: Final = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SIGNS: Final = {
    "∞": r"\infty ",
    "π": r"\pi ",
    "°": r"^\circ ",
    "×": r"\times ",
    "·": r"\cdot ",
    "÷": "/",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "∅": r"\emptyset ",
    "√": "sqrt",
    "−": "-",
    "⁄": "/",
    r"\varnothing": r"\emptyset",
    r"\!": "",
}
# Macros that only dress their (last) argument.
_DRESS: Final = re.compile(r"\\(?:boldsymbol|mathbf|bm|underline|(?:text)?color\s*\{\w+\})\s*\{([^{}]*)\}")
_SCIENTIFIC: Final = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_TIMES_TEN: Final = re.compile(
    r"([-+]?(?:\d+\.?\d*|\.\d+))\s*(?:\\times|\\cdot|[x*])\s*10\s*\^\s*(?:\{\s*)?([-+]?\d+)\s*\}?"
)
_THOUSANDS: Final = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\\[,; ]|~|\s)\d{3})+(?![\d])")
_MIXED: Final = re.compile(r"([-+]?\d+)\s+(\d+)\s*/\s*(\d+)")
_COUNTED: Final = re.compile(r"\\text\s*\{\s*([-+]?[\d.,]*\d)\s+[A-Za-z ]+\}")
_SPEED: Final = re.compile(
    r"([-+]?[\d.,]*\d)\s*(?P<unit>(?:km|m|cm|mm|mi|miles?|ft|feet|in|kg|g|l|L)\s*/\s*"
    r"(?:h|hr|hours?|s|sec|min|day|m|cm|kg|l|L)(?:\^?\d)?)"
)
_POWER: Final = re.compile(r"\^\s*(-?\d{2,}|-\d)")
_FUNCTIONS: Final = (
    *("arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln"),
)
_NAMES: Final = {
    **{name: rf"\{name} " for name in _FUNCTIONS},
    **{f"a{name}": rf"\arc{name} " for name in ("sin", "cos", "tan")},
    "pi": r"\pi ",
    "inf": r"\infty ",
    "infinity": r"\infty ",
    "oo": r"\infty ",
    **{
        name: rf"\{name} "
        for name in ("alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "rho", "sigma", "tau", "phi", "omega")
    },
}
_WORD: Final = re.compile(r"[A-Za-z]+")
_START: Final = r"(?<![\\A-Za-z])"  # of a name that is no macro


def as_latex(text: str) -> str:
    r"""An answer in the notation that math-verify's parser reads.

    Scientific notation and thousands become plain digits, mixed numbers fractions, dress and trailing punctuation go,
    and plain text such as `2**10`, `sqrt(2)`, `exp(16)`, `pi/2` becomes LaTeX.
    """
    text = _signs(text).strip()
    while (bare := _DRESS.sub(r"\1", text)) != text:
        text = bare
    text = re.sub(r"(?<=[\w})\]])\s*(?:[.,;]|\\\\)+$", "", text.lstrip("~ ")).replace("+ -", "- ")
    if scientific := _TIMES_TEN.fullmatch(text):
        text = f"{scientific[1]}e{scientific[2]}"
    if _SCIENTIFIC.fullmatch(text):
        return _digits(text)
    text = _THOUSANDS.sub(lambda found: re.sub(r"\D", "", found[0]), text)
    if mixed := _MIXED.fullmatch(text):
        return rf"{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    if alone := _COUNTED.fullmatch(text) or _SPEED.fullmatch(text):
        return alone[1]
    return _plain(text) if _is_plain(text) else text


def rate_unit(text: str) -> str | None:
    """The unit behind a number where it is a rate, such as km/h; None for anything else."""
    found = _SPEED.fullmatch(text.strip())
    return "".join(found["unit"].split()) if found else None


def in_base(text: str) -> int | None:
    r"""The value of a number that is written with its base, `1011_2` or `52_{8}`; None for anything else."""
    found = re.fullmatch(r"(\w+?)_\{?(\d{1,2})\}?", _subscripts(text).strip())
    try:
        return int(found[1], int(found[2])) if found and int(found[2]) > 1 else None
    except ValueError:  # no digit of that base
        return None


def _subscripts(text: str) -> str:
    return re.sub("[₀-₉]+", lambda found: "_{" + found[0].translate(_SUBSCRIPTS) + "}", text)


def _signs(text: str) -> str:
    text = _subscripts(text)  # else they would become digits of the number before them
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda found: "^{" + found[0].translate(_SUPERSCRIPTS) + "}", text)
    # A vulgar fraction behind a number is a mixed one: 2½.
    text = re.sub("[¼-¾⅐-⅞]", lambda found: " " + unicodedata.normalize("NFKC", found[0]), text)
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}", text)
    for sign, latex in _SIGNS.items():
        text = text.replace(sign, latex)
    return text


def _digits(text: str) -> str:
    number = Decimal(text)
    exponent = number.as_tuple().exponent
    if not isinstance(exponent, int) or abs(exponent) > LARGEST_EXPONENT:
        return text
    digits = format(number, "f")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def _is_plain(text: str) -> bool:
    """Whether this is mathematics in plain text: names that are known, single letters, digits and signs."""
    words = _WORD.findall(re.sub(r"\\[A-Za-z]+", "", text))
    return all(len(word) == 1 or word in _NAMES or word in ("sqrt", "cbrt", "exp") for word in words)


def _plain(text: str) -> str:
    text = text.replace("**", "^").replace("!=", r"\ne ")
    text = _around(text, rf"{_START}sqrt\s*[({{]", r"\sqrt{")
    text = re.sub(rf"{_START}sqrt\s*(\d+)", r"\\sqrt{\1}", text)
    text = _around(text, rf"{_START}cbrt\s*[({{]", r"\sqrt[3]{")
    text = _around(text, rf"{_START}log10\s*[({{]", r"\log_{10}{")
    text = _around(text, rf"{_START}exp\s*[({{]", "e^{")
    text = _around(text, r"\^\s*\(", "^{")
    text = re.sub(rf"{_START}[A-Za-z]+", lambda found: _NAMES.get(found[0], found[0]), text)
    text = _POWER.sub(r"^{\1}", text)
    return text.replace("*", r" \cdot ")


def _around(text: str, call: str, before: str) -> str:
    """Every call, inner ones included, with its argument between `before` and a brace. call: up to the bracket."""
    at = 0
    while found := re.compile(call).search(text, at):
        opening = found[0][-1]
        closing = {"(": ")", "{": "}"}[opening]
        depth, end = 1, found.end()
        while end < len(text) and depth:
            depth += {opening: 1, closing: -1}.get(text[end], 0)
            end += 1
        if depth:
            return text
        text = text[: found.start()] + before + text[found.end() : end - 1] + "}" + text[end:]
        at = found.start() + len(before)
    return text
