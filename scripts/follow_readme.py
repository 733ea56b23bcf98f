"""Follow README's "On your GPUs" word for word, as far as a machine without GPUs and Slurm can: up to the dry run.

    python scripts/follow_readme.py                in this checkout, whose environments are there
    python scripts/follow_readme.py --clean DIR    in a clone of it in DIR, set-up included (minutes)

Every command of README's block is run or said to be left out, with what it needs. The job script that comes out is held
against what README promises: four nodes of eight ranks, the models' folder, the recipe.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"## On your GPUs\n.*?```\n(.*?)```", re.S)
SET_UP = ("make setup", "source ")
RUN = ("export ", "prune-opd check ", "prune-opd plan ", "make dryrun ")
LEFT_OUT = {
    "make image": "Docker and enroot",
    "hf download ": "the hub",
    "prune-opd data convert ": "the file that hf download brings",
    "make launch ": "Slurm",
    "make status ": "what was launched",
    "make logs ": "what was launched",
    "prune-opd report ": "a finished run",
}
PROMISED = (
    "#SBATCH --nodes=4",
    "#SBATCH --gpus-per-node=8",
    "--job-name=prune-opd.qwen3_8b_from_32b_32xh100_fp8.train",
    "--ranks 8",
    "export PRUNE_OPD_MODELS='/shared/models'",
    "/shared/models:/shared/models:ro",
    "evaluation.sources=/shared/data/aime24",
    "sbatch --requeue --parsable",
)


def commands(readme: str) -> list[str]:
    """The lines of README's block, in order."""
    found = BLOCK.search(readme)
    if found is None:
        raise SystemExit("README has no block under 'On your GPUs'")
    return [line for line in found[1].splitlines() if line.strip()]


def chosen(lines: list[str], clean: bool) -> list[str]:
    """The commands to run. What is left out is said; a command that nobody knows ends it."""
    found = []
    for line in lines:
        if line.startswith(RUN) or (clean and line.startswith(SET_UP)):
            found.append(line)
        elif line.startswith(SET_UP):
            print(f"there already: {line}")
        elif needs := next((needs for start, needs in LEFT_OUT.items() if line.startswith(start)), None):
            print(f"left out, needs {needs}: {line}")
        else:
            raise SystemExit(f"README has a command that nobody follows: {line}")
    return found


def follow(place: Path, clean: bool) -> str:
    """Run the commands in `place` as one shell. Returns the job script."""
    lines = chosen(commands((place / "README.md").read_text(encoding="utf-8")), clean)
    if not clean:  # the environments are there: make must not look whether they are up to date
        lines = [line.replace("make dryrun ", "make -o setup-launch dryrun ") for line in lines]
        lines = [f'export PATH="{place}/.venv/bin:$PATH" PYTHONPATH="{place}"', *lines]
    for line in lines:
        print(f"$ {line}")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(lines)], cwd=place, capture_output=True, text=True, timeout=3600
    )
    print(done.stdout[-3000:], done.stderr[-3000:], sep="\n")
    if done.returncode:
        raise SystemExit(f"following README ended with exit code {done.returncode}")
    script = place / "job.sh"
    text = script.read_text(encoding="utf-8")
    script.unlink()
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", type=Path, metavar="DIR", help="a folder that is not there yet")
    place = parser.parse_args().clean
    if place is not None:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(place)], check=True)
    script = follow(place or ROOT, clean=place is not None)
    if missing := [promise for promise in PROMISED if promise not in script]:
        raise SystemExit(f"the job script lacks {missing}")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    print(f"README was followed to a job script of {len(script.splitlines())} lines that has all it promises")


if __name__ == "__main__":
    sys.exit(main())
