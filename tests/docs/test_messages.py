"""Every message that the troubleshooting page quotes is one that this project prints."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.docs.pages import ROOT, text

QUOTED = re.compile(r"^### `(.+?)`$", re.M)
GAP = "…"


def messages() -> Iterator[str]:
    """Every text in the code, with a gap where a value goes; scripts of the shell as they are, a line each."""
    for folder in ("prune_opd", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)  # type: ignore[misc]
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
    for path in sorted((ROOT / "scripts").glob("*.sh")):
        for line in path.read_text(encoding="utf-8").splitlines():
            yield re.sub(r"\$(\w+|\{.*?\})", GAP, line)


def occurs(quoted: str, known: list[str]) -> bool:
    pieces = quoted.split(GAP)
    pattern = re.compile(".*".join(map(re.escape, pieces)), re.S)
    return any(pattern.search(message) for message in known if all(piece in message for piece in pieces))


def test_every_quoted_message_occurs_in_the_code() -> None:
    known = [message for message in messages() if len(message) > 15]
    quoted = QUOTED.findall(text(ROOT / "docs" / "troubleshooting.md"))
    assert len(quoted) > 35
    for message in quoted:
        assert len(message.replace(GAP, "").strip()) > 20, f"{message}: too short to be found by"
    assert not [message for message in quoted if not occurs(message, known)]


def test_a_message_that_nobody_prints_is_noticed() -> None:
    known = list(messages())
    assert not occurs("horizon.strategy = … is a bad idea: choose another", known)
