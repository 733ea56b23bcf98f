r"""From response texts to accuracy: is an answer right, and avg@k over problems with its uncertainty.

    texts ── source.score ──▶ correct (problems × samples) ── avg_at_k ──▶ Accuracy

Mathematical answers are compared by math-verify, in a child process: it evaluates what a model wrote, and an answer
such as \boxed{9^{9^{9^9}}} would compute for ever or take all memory. math-verify's own time limit needs SIGALRM and
the main thread, which a training process uses for other things. A child can simply be ended.
"""

from __future__ import annotations

import atexit
import functools
import json
import math
import re
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:  # this file is also the program of the child process, which should import as little as it can
    from prune_opd.data.prompt import Prompt, PromptSource

COMPARE_SECONDS: Final = 10  # for one answer; usual ones take a millisecond
COMPARE_MEMORY_BYTES: Final = 4 << 30
TINY: Final = 1e-3  # numbers below it are compared by their relative difference


# ---------------------------------------------------------------------------------------------------- accuracy


@dataclass(frozen=True)
class Accuracy:
    """avg@k: the mean over problems of the share of right samples.

    `stderr` is the standard error of that mean over problems (samples of one problem are not independent); NaN for a
    single problem. `pass_at_k` is the share of problems with at least one right sample.
    """

    mean: float
    stderr: float
    pass_at_k: float
    n_problems: int
    k: int

    @property
    def interval(self) -> tuple[float, float]:
        """A 95 % confidence interval of the mean over problems like these: Wilson's, with an effective sample size.

        The sample size is the number of independent answers that would have this standard error, at least the number of
        problems: more samples of a problem help, but do not count as problems. So the interval stays inside [0, 1], and
        does not shrink to nothing where all answers are right, or all wrong.
        """
        p, n = self.mean, float(self.n_problems)
        if p * (1 - p) > 0 and self.stderr > 0:  # NaN compares false
            n = max(n, p * (1 - p) / self.stderr**2)
        z = statistics.NormalDist().inv_cdf(0.975)
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)


def pass_at(correct: Sequence[Sequence[bool]], k: int) -> float:
    """Probability that at least one of `k` samples is right, over problems: the unbiased estimate from n >= k samples.

    Source: Chen et al. 2021, arXiv 2107.03374, §2.1: 1 - C(n - c, k) / C(n, k) with c right samples of n.

    Raises:
        ValueError: there is no problem, or a problem has fewer than `k` samples.
    """
    if not correct or min(map(len, correct)) < k:
        raise ValueError(f"pass@{k} needs at least {k} samples of every problem, and a problem")
    return statistics.fmean(1 - math.comb(len(row) - sum(row), k) / math.comb(len(row), k) for row in correct)


def avg_at_k(correct: Sequence[Sequence[bool]]) -> Accuracy:
    """The accuracy of `correct[problem][sample]`.

    Raises:
        ValueError: there is no problem, or the problems differ in their number of samples, or have none.
    """
    sizes = {len(samples) for samples in correct}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"avg@k needs the same number of samples, at least 1, of every problem: got {sorted(sizes)}")
    means = [sum(samples) / len(samples) for samples in correct]
    n = len(means)
    return Accuracy(
        mean=statistics.fmean(means),
        stderr=statistics.stdev(means) / math.sqrt(n) if n > 1 else math.nan,
        pass_at_k=sum(map(any, correct)) / n,
        n_problems=n,
        k=sizes.pop(),
    )


def score_responses(
    source: PromptSource, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]]
) -> list[list[bool]]:
    """`correct[problem][sample]` of the response texts `texts[problem][sample]`, as `avg_at_k` takes it.

    Raises:
        ValueError: a prompt has no answer, or there is not one list of texts per prompt.
    """
    correct = []
    for prompt, samples in zip(prompts, texts, strict=True):
        if prompt.answer is None:
            raise ValueError(f"prompt {prompt.index} of {prompt.source} has no answer to score against")
        correct.append([source.score(text, prompt) for text in samples])
    return correct


# ---------------------------------------------------------------------------------------------------- one answer


def last_boxed(text: str) -> str | None:
    r"""The content of a text's last `\boxed`: what its braces hold, or the next word if it has no braces.

    None if there is no `\boxed`, or if the text was cut off inside it.
    """
    _, boxed, after = text.rpartition("\\boxed")
    after = after.lstrip()
    if not boxed or not after:
        return None
    if after[0] != "{":
        return after.split()[0]
    depth = 0
    for brace in re.finditer(r"(?<!\\)[{}]", after):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return after[1 : brace.start()].strip()
    return None


def math_equal(given: str, answer: str) -> bool:
    r"""Whether an answer that was read (extract.py) equals the right one, both LaTeX or plain text, as mathematics.

    Of the right one the last `\boxed{...}` counts, if it has one. An answer that cannot be compared within
    `COMPARE_SECONDS` is wrong, and so is an empty one.

    Raises:
        RuntimeError: math-verify cannot be started.
    """
    given, wanted = _bare(given), _bare(last_boxed(answer) or answer)
    if not given or not wanted:
        return False
    if given == wanted or (given.isalpha() and given.lower() == wanted.lower() and len(given) > 1):
        return True
    from prune_opd.data.notation import as_latex, in_base, rate_unit  # not in the child

    values = [in_base(side) for side in (given, wanted)]  # math-verify does not look at a base
    if None not in values:
        return values[0] == values[1]
    units = [rate_unit(side) for side in (given, wanted)]
    if None not in units and units[0] != units[1]:
        return False
    latex = [as_latex(side) for side in (given, wanted)]
    return _comparer().equal(*latex) or (latex != [given, wanted] and _comparer().equal(given, wanted))


def _bare(expression: str) -> str:
    return expression.strip().strip("$").strip()


class _Comparer:
    """math-verify behind a pipe: one JSON line asks, one JSON line answers. A child that dies counts as a no."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        atexit.register(self.close)

    def equal(self, given: str, wanted: str) -> bool:
        with self._lock:
            if self._child is not None and self._child.poll() is not None:
                self.close()  # it ended while nobody asked: Ctrl-C, or the kernel short of memory
            child = self._child = self._child or self._start()
            assert child.stdin is not None and child.stdout is not None
            reply = ""
            try:
                child.stdin.write(json.dumps([given, wanted]) + "\n")
                child.stdin.flush()
                reply = child.stdout.readline()
            except BrokenPipeError:
                pass
            finally:  # also on Ctrl-C: the next question must not get this one's unread reply
                if not reply:
                    self.close()
            return reply.strip() == "true"

    def _start(self) -> subprocess.Popen[str]:
        # -P: no imports from this file's folder. stderr: math-verify logs a line for every answer that it cannot read.
        child = subprocess.Popen(
            [sys.executable, "-P", __file__, str(COMPARE_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        assert child.stdout is not None
        if child.stdout.readline().strip() != "ready":
            child.kill()
            child.communicate()
            raise RuntimeError(
                f"math-verify could not be started: `{sys.executable} -P {__file__} 1` shows why "
                "(is the package math-verify installed?)"
            )
        return child

    def close(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()  # closes the pipes and collects the exit status


@functools.cache
def _comparer() -> _Comparer:
    return _Comparer()


def _serve(seconds: int) -> None:
    """The child: compares until its input ends.

    The alarm has no handler, so it ends the process whatever it is doing, also when the parent is gone.
    """
    import resource
    import signal

    from math_verify import parse, verify

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = COMPARE_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(COMPARE_MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies, sys.stdout = sys.stdout, sys.stderr  # a stray print of a library must not pass for a reply
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.alarm(seconds)
        try:
            given, wanted = (parse(f"\\boxed{{{side}}}", parsing_timeout=None) for side in json.loads(line))
            equal = bool(verify(wanted, given, timeout_seconds=None)) and not _far(wanted[:1], given[:1])
        except Exception:  # sympy may raise anything for what a model made up, and none of it is equal
            equal = False
        signal.alarm(0)
        print(json.dumps(equal), file=replies, flush=True)


def _far(wanted: Any, given: Any) -> bool:
    """Whether two tiny numbers, or those at one place of two tuples, sets or intervals, differ by over 1 in 100,000.

    math-verify rounds to six decimals, so all numbers below them are equal to it.
    """
    from sympy import Expr, FiniteSet, Interval, Tuple

    pairs = (list, tuple, Tuple, FiniteSet, Interval)
    if isinstance(wanted, pairs) and isinstance(given, pairs):
        sides = [side.args if isinstance(side, Tuple | FiniteSet | Interval) else side for side in (wanted, given)]
        return len(sides[0]) == len(sides[1]) and any(map(_far, *sides))
    if not (isinstance(wanted, Expr) and isinstance(given, Expr) and wanted.is_number and given.is_number):
        return False
    wanted, given = (side.doit().evalf(30) for side in (wanted, given))  # a percentage comes as 10 * (1/100)
    size = max(abs(wanted), abs(given))
    return bool(size < TINY and abs(wanted - given) > size / 100_000)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
