"""What each rank runs: `python -m prune_opd.cli.worker COMMAND …`, started by `cli/start.py`.

The recipe was loaded, overridden and checked before; a rank only reads the resolved config. The heavy parts are
imported by the command that needs them.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from prune_opd.config import RunConfig, SftConfig, TrainConfig
from prune_opd.config.yaml import load_config
from prune_opd.errors import ConfigError, UserError
from prune_opd.eval.run import EvalJob, evaluate_model
from prune_opd.process import end_with_parent
from prune_opd.ranks.launcher import ASKING
from prune_opd.ranks.lease import held
from prune_opd.ranks.signals import Interruption
from prune_opd.track.moving import shown

MAIN_RANK_SPEAKS_FIRST = 3.0  # seconds


def is_main_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def report(error: UserError) -> None:
    """Print one `error:` line per problem, once for all ranks.

    Bad input fails on every rank alike, and rank 0 says so; the launcher then ends the others. A rank that failed alone
    is still there after a moment and speaks for itself.
    """
    if not is_main_rank():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)  # there will be no `Interruption` to do it
        time.sleep(MAIN_RANK_SPEAKS_FIRST)
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr, flush=True)


def run_reported(command: Callable[[], int]) -> int:
    """The exit code of a rank's command; a UserError is printed and becomes its exit code."""
    try:
        return command()
    except UserError as error:
        report(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # a library's, or ours: say whose rank it was, in the midst of what the others say
        traceback.print_exc()
        brief = str(error).partition("\n")[0]
        print(f"error: rank {os.environ.get('RANK', '0')} failed: {type(error).__name__}: {brief}", file=sys.stderr)
        return 1


def protect_files() -> None:
    """Nothing that this process writes can be changed by everybody, whatever umask it was started with."""
    os.umask(os.umask(0o077) | 0o002)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """A command with its config read. Raises ConfigError."""
    parser = argparse.ArgumentParser(
        prog="python -m prune_opd.cli.worker", description="One rank; see `prune-opd --help`."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("train")
    command.add_argument("config", type=partial(_config, kind=TrainConfig))
    command.add_argument("--run-dir", type=Path, required=True)
    command.add_argument("--resume", default="auto")
    command.add_argument("--allow-config-change", action="store_true")

    command = commands.add_parser("sft")
    command.add_argument("config", type=partial(_config, kind=SftConfig))

    command = commands.add_parser("eval")
    command.add_argument("job", type=EvalJob.from_json, help="an EvalJob as JSON")

    command = commands.add_parser("export")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("out_dir", type=Path)
    return parser.parse_args(argv)


def run(part: argparse.Namespace) -> int:
    """This rank's part of a command. Returns the exit code; what went wrong is printed."""
    return run_reported(lambda: _run(part))


def main(argv: list[str] | None = None) -> int:
    """Parse a command of `prune_opd.cli.main` and run it. Returns the exit code."""
    protect_files()
    end_with_parent(signal.SIGKILL)  # the agent ends its ranks in order; one that died cannot
    return run_reported(lambda: _run(parse(argv)))


def _run(part: argparse.Namespace) -> int:
    match part.command:
        case "train":
            interruption = Interruption()  # before the heavy imports: a job may be stopped while it starts
            with held(part.run_dir):
                from prune_opd.loop import train

                return train(part.config, part.run_dir, part.resume, interruption, part.allow_config_change)
        case "sft":
            from prune_opd.testbed import sft

            sft.run(part.config)
        case "eval":
            with shown("evaluating", is_main_rank()):
                evaluate_model(part.job)
        case _:
            from prune_opd.megatron.export import export_checkpoint

            with shown("exporting", is_main_rank()):
                export_checkpoint(part.checkpoint, part.out_dir)
    return 0


def _config(path: str, kind: type[RunConfig]) -> RunConfig:
    config = load_config(Path(path))
    if not isinstance(config, kind):
        raise ConfigError(f"{path} holds a {type(config).__name__}; this command takes a {kind.__name__}")
    return config


if __name__ == "__main__":
    sys.exit(main())
