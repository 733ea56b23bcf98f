"""The one error a user is meant to read: a sentence that names the field, its value and the remedy."""

from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


class UserError(Exception):
    """Bad input that the user can put right. The command line prints it as one line and exits with `exit_code`."""

    exit_code = 1


class ConfigError(UserError):
    """A recipe, an override or a setting is wrong. Raised before any model is built."""

    exit_code = 2


def for_all(act: Callable[[Item], Made], items: Iterable[Item]) -> list[Made]:
    """What `act` makes of each item. All that it refuses is in one ConfigError, a line each."""
    made, problems = [], []
    for item in items:
        try:
            made.append(act(item))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return made


def located(where: object, error: ConfigError) -> ConfigError:
    """The same problems, each with the place that it comes from before it."""
    return ConfigError("\n".join(f"{where}: {line}" for line in str(error).splitlines()))


class NotFiniteLogitsError(ValueError):
    """A model's logits have a NaN or an infinity: a batch that cannot be trained on, though the next one may be."""


# What a run that a signal stopped exits with, once every rank has saved: start the same command again (EX_TEMPFAIL of
# sysexits.h). Anything else that is not 0 is a failure, and starting again would meet it again.
REQUEUE_EXIT_CODE = 75
