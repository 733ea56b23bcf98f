"""Whether both models would have a prompt in the same form: the student's template renders it, the teacher scores it.

Templates are read from the directories and rendered as transformers does it, in jinja2's sandbox.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prune_opd.config import DataConfig

SWITCH = "enable_thinking"
QUESTION = "What is 2 + 3?"
SHOWN = 60  # characters of a rendered prompt


def template_notes(student: Path, teacher: Path, data: DataConfig) -> list[str]:
    """What follows from a teacher with another chat template or thinking mode than the student, a sentence each."""
    ours, theirs = chat_template(student), chat_template(teacher)
    if ours == theirs:
        return []
    who = f"teacher = {str(teacher)!r}"
    if ours is None or theirs is None:
        has, lacks, form = (
            ("student", "teacher", "the student's template") if ours else ("teacher", "student", "no template")
        )
        return [
            f"{who}: the {has} has a chat template and the {lacks} has none: prompts are made with {form}, a form that "
            "the teacher was not trained on, so it may find good responses unlikely; choose a pair with one template"
        ]
    notes = []
    rendered = [render(path, text, data) for path, text in ((student, ours), (teacher, theirs))]
    if data.thinking is not None and SWITCH in ours and SWITCH not in theirs:
        notes.append(
            f"{who}: its chat template has no thinking switch and data.thinking = {str(data.thinking).lower()} sets "
            "the student's: the teacher scores responses of a mode that it may not know; choose a teacher of that mode"
        )
    mine, other = rendered
    if mine is None or mine != other:
        shown = "" if mine is None or other is None else f" (a prompt is {_parts(mine, other)})"
        notes.append(
            f"{who} has another chat template than the student{shown}: the teacher scores the student's form, which it "
            "was not trained on, and may find good responses unlikely; choose a pair with one template, or look at "
            "teacher_logp of the first steps"
        )
    return notes


def chat_template(directory: Path) -> str | None:
    """The chat template of a model directory (of several the one called default); None if it has none."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = _tokenizer_config(directory).get("chat_template")
    if isinstance(template, list):
        template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def render(directory: Path, template: str, data: DataConfig) -> str | None:
    """A question as this template gives it to the model, with the run's settings; None if it does not render here."""
    try:
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:  # a login node without torch may not have it
        return None
    turns = [{"role": "user", "content": QUESTION + data.suffix}]
    if data.system_prompt is not None:
        turns.insert(0, {"role": "system", "content": data.system_prompt})
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: "today"}
    options: dict[str, Any] = {} if data.thinking is None else {SWITCH: data.thinking}
    words = {name: _word(value) for name, value in _tokenizer_config(directory).items() if name.endswith("_token")}
    try:
        return environment.from_string(template).render(
            **words, messages=turns, add_generation_prompt=True, tools=None, documents=None, **options
        )
    except Exception:  # a template is a program of the model's author: it may raise what it likes
        return None


def _refuse(message: str) -> None:
    raise ValueError(message)


def _word(value: Any) -> str:
    """A special token, which is a text or an object with one."""
    return str(value["content"]) if isinstance(value, dict) and "content" in value else str(value or "")


def _tokenizer_config(directory: Path) -> dict[str, Any]:
    try:
        found = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _parts(mine: str, other: str) -> str:
    """Where two rendered prompts come apart, in few words."""
    first = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
    first = max(first - 10, 0)
    ours, theirs = (repr(text[first : first + SHOWN]) for text in (mine, other))
    return f"…{ours} for the student and …{theirs} for the teacher"
