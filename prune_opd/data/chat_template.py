"""The chat template of a model directory, read and rendered without a tokenizer: as transformers does, in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def chat_template(directory: Path) -> str | None:
    """The chat template of a model directory (of several the one called default); None if it has none."""
    try:
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, ValueError):
        template = read_object(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def render(directory: Path, template: str, turns: Sequence[Mapping[str, str]], **options: Any) -> str | None:
    """The turns in this template's form; options: its own variables. None if it does not render here."""
    try:
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:  # a login node without torch may not have it
        return None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **settings: json.dumps(value, ensure_ascii=False)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: "today"}
    tokenizer = read_object(directory / "tokenizer_config.json")
    words = {name: token_text(value) for name, value in tokenizer.items() if name.endswith("_token")}
    try:
        return environment.from_string(template).render(**words, messages=turns, tools=None, documents=None, **options)
    except Exception:  # a template is a program of the model's author: it may raise what it likes
        return None


def read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file; a file that is missing or broken says nothing."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def token_text(token: Any) -> str:
    """A token of tokenizer_config.json: a text, or an object with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _refuse(message: str) -> None:
    raise ValueError(message)
