"""What the shell offers after Tab (`prune-opd --install-completion`): recipes, settings and their choices."""

from __future__ import annotations

from prune_opd.config.describe import all_settings
from prune_opd.config.recipe import list_recipes


def recipe_names(incomplete: str) -> list[tuple[str, str]]:
    """(name, what it is) of the recipes that begin so."""
    return [(name, about) for name, about in list_recipes().items() if name.startswith(incomplete)]


def setting_names(incomplete: str) -> list[tuple[str, str]]:
    """(dotted name and `=`, meaning); once the name is there, its choices."""
    name, equals, value = incomplete.partition("=")
    if not equals:
        return [(f"{one.name}=", one.meaning) for one in all_settings() if one.name.startswith(name)]
    types = [one.type.removesuffix(" or null") for one in all_settings() if one.name == name]
    return [
        (f"{name}={choice}", "")
        for choice in (types[0].split(", ") if types else [])
        if choice.startswith(value) and " " not in choice and choice not in ("integer", "number", "text")
    ]
