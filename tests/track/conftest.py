"""Makes `synthetic` and `browser` importable, however pytest was started; has the reports that several tests read."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from synthetic import KEY, PASSWORD, SCRIPT, TEXT, VALUE, write_run

from prune_opd.track import report
from prune_opd.track.report import write_report


@pytest.fixture
def first_chart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have but the first of their charts, which take most of the time: for tests of the text around them."""
    for name in ("run_charts", "comparison_charts"):
        plain = getattr(report, name)
        monkeypatch.setattr(report, name, lambda runs, plain=plain: plain(runs)[:1])


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    student = f"{TEXT} s3://someone:{PASSWORD}@place {VALUE}"
    planted = f" {TEXT} {KEY} {VALUE} end"
    return [
        write_run(folder / "prune", steps=12, evaluate_every=4, name=SCRIPT, student=student, planted=planted),
        write_run(folder / "full", steps=8, evaluate_every=4, strategy="full", name="$full_ & 'quoted'"),
    ]


@pytest.fixture(scope="session")
def single(runs: list[Path]) -> str:
    """The report of the first run; report.png and report/ are beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLANTED_API_KEY", VALUE)
        write_report(runs[:1], runs[0] / "report.html")
    return (runs[0] / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def comparison(runs: list[Path]) -> Path:
    """The report of both runs."""
    out = runs[0].parent / "new" / "comparison.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLANTED_API_KEY", VALUE)
        write_report(runs, out)
    return out
