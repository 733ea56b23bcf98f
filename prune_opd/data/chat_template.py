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
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:  # a login node without torch may not have it
        return None

    class Generation(Extension):
        """What stands between `generation` and `endgeneration`: transformers marks its tokens, and it has a scope."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    extensions = [Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
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


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise ValueError(message)
