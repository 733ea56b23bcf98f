"""What a setting may be stands beside it, as its type; here is what reads the types and refuses the rest.

    k: Count = 16                                       a number in a range
    schedule: Literal["constant", "linear"] = "linear"  a choice
    init_len: Count | None = None                       may be left open

A settings class is a frozen dataclass that derives from `Checked`. Rules between several settings follow in its
`__post_init__`. Every refusal is a `ConfigError`: field, value, remedy.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

from annotated_types import Interval

from prune_opd.errors import ConfigError, for_all

Count = Annotated[int, Interval(ge=1)]
CountOrZero = Annotated[int, Interval(ge=0)]
Positive = Annotated[float, Interval(gt=0)]
PositiveOrZero = Annotated[float, Interval(ge=0)]
Share = Annotated[float, Interval(ge=0, le=1)]
ShareAboveZero = Annotated[float, Interval(gt=0, le=1)]


class Checked:
    """Base of the settings dataclasses: a value of the wrong type, choice or range is refused when one is made.

    name: where the settings are in a config ("gate"), for the messages; empty for those of the run itself.
    """

    _prefix: typing.ClassVar[str]

    def __init_subclass__(cls, *, name: str) -> None:
        cls._prefix = f"{name}." if name else ""

    def __post_init__(self) -> None:
        check_fields(self, self._prefix)


def check_fields(settings: Any, prefix: str, but: tuple[str, ...] = ()) -> None:
    """Hold every field of a dataclass against its annotation, `but` those. prefix: before their names (`gate.`).

    A list is as good as a tuple in a recipe, and becomes one: config.yaml reads it back as that.
    """
    hints = {name: hint for name, hint in field_types(type(settings)).items() if name not in but}
    for_all(lambda name: _check(f"{prefix}{name}", getattr(settings, name), hints[name]), hints)
    for name in hints:
        if isinstance(value := getattr(settings, name), list):
            object.__setattr__(settings, name, tuple(value))


def _check(name: str, value: Any, annotated: Any) -> None:
    hint, bounds = bare(annotated), limits(annotated)
    if value is None and may_be_none(annotated):
        return
    if typing.get_origin(hint) is typing.Literal:
        one_of(name, value, typing.get_args(hint))
    elif not fits(value, hint):
        raise ConfigError(f"{name} = {value!r} has the wrong type: give {wanted(name, annotated)}")
    if bounds is not None:
        _inside(name, value, bounds)


# ---------------------------------------------------------------------------------------------------- types


def _field_types(kind: Any) -> dict[str, Any]:
    """Field → annotation of a dataclass, with what `Annotated` adds."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


field_types: Callable[[Any], dict[str, Any]] = functools.cache(_field_types)


def may_be_none(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def limits(hint: Any) -> Interval | None:
    """The range that an annotation gives a number."""
    return next((extra for extra in getattr(_not_none(hint), "__metadata__", ()) if isinstance(extra, Interval)), None)


def bare(hint: Any) -> Any:
    """An annotation without `| None` and without what `Annotated` adds."""
    hint = _not_none(hint)
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _not_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    return hint


def is_list(hint: Any) -> bool:
    """Whether a type is a tuple of plain values, which is set as a whole: `evaluation.sources=[a.jsonl,b.jsonl]`."""
    return typing.get_origin(hint) is tuple and not dataclasses.is_dataclass(bare(typing.get_args(hint)[0]))


def is_part(hint: Any) -> bool:
    """Whether a type is made of further settings: another dataclass, a tuple of them, or several by name."""
    return dataclasses.is_dataclass(hint) or is_named(hint) or (typing.get_origin(hint) is tuple and not is_list(hint))


def is_named(hint: Any) -> bool:
    """Whether a type is a dictionary of dataclasses: settings of several things, each with a name."""
    return typing.get_origin(hint) is dict and dataclasses.is_dataclass(typing.get_args(hint)[1])


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type (`bare`). A whole number is a number too; true and false are none."""
    if typing.get_origin(hint) is tuple:
        part = bare(typing.get_args(hint)[0])
        return isinstance(value, list | tuple) and all(fits(one, part) for one in value)
    if typing.get_origin(hint) is dict:  # of texts: a launcher's variables; or of settings
        parts = typing.get_args(hint)
        return isinstance(value, dict) and all(
            part is Any or isinstance(one, part)
            for pair in value.items()
            for one, part in zip(pair, parts, strict=True)
        )
    if typing.get_origin(hint) is typing.Literal:
        return isinstance(value, str)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def wanted(name: str, annotated: Any) -> str:
    """What a setting takes, in words."""
    names = {int: "an integer", float: "a number", bool: "true or false", dict[str, str]: "names with texts"}
    hint = bare(annotated)
    if dataclasses.is_dataclass(hint):
        words = f"its settings one by one, as in {name}.{dataclasses.fields(hint)[0].name}=…"
    elif typing.get_origin(hint) is typing.Literal:
        words = f"one of {', '.join(map(str, typing.get_args(hint)))}"
    elif is_list(hint):
        words = f"{names.get(bare(typing.get_args(hint)[0]), 'a text')} or several, as in {name}=[…,…]"
    elif is_named(hint):
        words = f"its settings one by one, as in {name}.NAME.{dataclasses.fields(typing.get_args(hint)[1])[0].name}=…"
    elif is_part(hint):
        words = f"its settings one by one, as in {name}.0.…=…"
    else:
        words = names.get(hint, "a text")
    return words + (", or null" if may_be_none(annotated) else "")


# ---------------------------------------------------------------------------------------------------- values


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} = {value!r} is not known: choose one of {', '.join(choices)}")


def between(name: str, value: float, low: float, high: float | None = None) -> None:
    """A range that depends on another setting; a fixed one belongs to the type."""
    _inside(name, value, Interval(ge=low, le=high))


def required(name: str, value: Any, why: str) -> None:
    if value is None:
        raise ConfigError(f"{name} is not set: {why}")


def _inside(name: str, value: Any, bounds: Interval) -> None:
    holds = {"gt": operator.gt, "ge": operator.ge, "lt": operator.lt, "le": operator.le}
    if not all(holds[bound](value, limit) for bound, limit in _bounds(bounds).items()):  # no comparison holds for nan
        raise ConfigError(f"{name} = {value!r} is out of range: give a number {range_in_words(bounds)}")


def range_in_words(bounds: Interval) -> str:
    """For example: at least 1 and at most 40."""
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    return " and ".join(f"{words[bound]} {limit:g}" for bound, limit in _bounds(bounds).items())


def _bounds(bounds: Interval) -> dict[str, Any]:
    found = {bound: getattr(bounds, bound) for bound in ("gt", "ge", "lt", "le")}
    return {bound: limit for bound, limit in found.items() if limit is not None}
