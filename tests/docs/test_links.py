"""Links of README and docs lead somewhere, and every page of the docs is on the site."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import DOCS, PAGES, ROOT, anchors, links

MKDOCS = ROOT / ".venv-docs" / "bin" / "mkdocs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_anchor_resolves(page: Path) -> None:
    for link in links(page):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}: there is no such heading"


def test_links_are_found_at_all() -> None:
    assert sum(len(links(page)) for page in PAGES) > 40


def test_every_page_is_in_the_navigation_once() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = [page for entry in nav for value in entry.values() for page in _pages(value)]
    assert sorted(named) == sorted(page.name for page in DOCS)


def _pages(value: str | list[dict[str, str]]) -> list[str]:
    return [value] if isinstance(value, str) else [page for entry in value for page in entry.values()]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    if not MKDOCS.exists():
        pytest.skip("the site was NOT built: `make setup-docs` brings mkdocs into .venv-docs")
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # no --quiet: what is not logged is not counted as a warning
    done = subprocess.run(
        [MKDOCS, "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert "prune_opd.method.gate.apply_gate" in reference and "prune_opd.method.horizon.make_controller" in reference
    assert not [page for page in (tmp_path / "site").rglob("*.html") if "fonts.googleapis" in page.read_text()]
