"""The charts of one run."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from prune_opd.track.metrics import PHASES
from prune_opd.track.plotting import (
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PHASE_COLOURS,
    PURPLE,
    RED,
    TEAL,
    Chart,
    accuracy_axis,
    axes,
    count_axis,
    from_zero,
    legend,
    percent_axis,
    trend,
)
from prune_opd.track.report_data import RunData
from prune_opd.track.report_positions import length_map, length_profile, overlap_map, profile
from prune_opd.track.report_teachers import by_teacher, teachers_of

_MAX_BARS = 60
_FULL_SHOWN = 1.7  # the full horizon is drawn if it is at most this many times the highest horizon
_TASK_COLOURS = (GREEN, *(colour for colour in CYCLE if colour != GREEN))


def run_charts(run: RunData) -> list[Chart]:
    """The charts that the run has numbers for, most telling first: accuracy stands beside overlap."""
    return [kind.chart(run) for kind in _CHARTS if kind.fits(run)]


def _horizon(fig: Any, run: RunData) -> None:
    ax = axes(fig, "step", "tokens")
    x = run.step_numbers()
    ax.step(x, run.series("horizon"), where="mid", color=BLUE, linewidth=2.2, label="horizon M", zorder=3)
    if run.has("response_length"):
        trend(ax, x, run.series("response_length"), color=ORANGE, label="mean response")
    if run.has("reliable_length"):
        trend(ax, x, run.series("reliable_length"), color=GREEN, linestyle=(0, (4, 1.5)), label="mean reliable length")
    if run.max_len is not None and run.max_len <= _FULL_SHOWN * np.nanmax(run.series("horizon")):
        ax.axhline(run.max_len, color=GREY, linewidth=1, linestyle=":", label="full horizon")
    elif run.max_len is not None:
        text = f"full horizon: {run.max_len:,} tokens"
        ax.text(0.015, 0.96, text, transform=ax.transAxes, va="top", color=MUTED, fontsize=8.5)
    if len(x) == 1:
        ax.plot(x, run.series("horizon"), color=BLUE, marker="o")
    from_zero(ax)
    count_axis(ax.xaxis)
    count_axis(ax.yaxis)
    legend(ax, ncols=4, columnspacing=1.2)


def _tokens(fig: Any, run: RunData) -> None:
    ax = axes(fig, "step", "response tokens")
    x, marker = run.step_numbers(), "o" if len(run.steps) == 1 else None
    generated = np.nancumsum(run.series("tokens_generated"))
    per_step = np.array(run.series("tokens_full"))
    if not np.isnan(per_step).all():
        # A step without an estimate counts as generated, so that it neither saves nor costs.
        full = np.cumsum(np.where(np.isnan(per_step), np.nan_to_num(run.series("tokens_generated")), per_step))
        ax.fill_between(x, generated, full, color=BLUE, alpha=0.08, linewidth=0)
        ax.plot(x, full, color=GREY, linestyle="--", marker=marker, label="full horizon (estimated)")
        saved = run.summary.saved or 0.0
        ax.annotate(
            f"{abs(saved):.0%} {'saved' if saved >= 0 else 'more'}",
            (x[-1], (generated[-1] + full[-1]) / 2),
            xytext=(-8, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=INK,
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},  # where the two lines are close
        )
    ax.plot(x, generated, color=BLUE, linewidth=2.2, marker=marker, label="generated")
    from_zero(ax)
    count_axis(ax.xaxis)
    count_axis(ax.yaxis)
    legend(ax)


def _overlap(fig: Any, run: RunData) -> None:
    upper, lower = fig.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    x = run.step_numbers()
    trend(upper, x, run.series("overlap"), color=BLUE)
    trend(lower, x, run.series("event_rate"), color=RED)
    upper.set_ylabel("mean overlap")
    lower.set(ylabel="event rate", xlabel="step")
    from_zero(lower)
    percent_axis(lower.yaxis)
    count_axis(lower.xaxis)


def _overlap_caption(run: RunData) -> str:
    accuracy = "accuracy is beside it." if run.tasks else "this run has no accuracy to put beside it."
    return "Overlap should rise and events fall as student and teacher agree. Overlap is not success: " + accuracy


def _panels(fig: Any, run: RunData, curves: dict[str, tuple[str, str]], share: bool) -> None:
    """One panel for each key that the run has. curves: its label and colour. share: from 0 to at least 1."""
    keys = [key for key in curves if run.has(key)]
    all_axes = fig.subplots(len(keys), 1, sharex=True, squeeze=False)[:, 0]
    for ax, key in zip(all_axes, keys, strict=True):
        label, colour = curves[key]
        trend(ax, run.step_numbers(), run.series(key), color=colour)
        ax.set_title(label, loc="left", fontsize=8.5, color=colour, pad=2)  # labels of low panels would overlap
        ax.yaxis.set_major_locator(MaxNLocator(nbins=max(2, 6 // len(keys)), min_n_ticks=2))
        ax.ticklabel_format(axis="y", useOffset=False)
        if share:
            ax.set_ylim(0, max(1.05, 1.05 * np.nanmax([0.0, *run.series(key)])))
        if key == "finished_rate":
            percent_axis(ax.yaxis)
    all_axes[-1].set_xlabel("step")
    count_axis(all_axes[-1].xaxis)


def _packing(fig: Any, run: RunData) -> None:
    upper, lower = fig.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    x = run.step_numbers()
    trend(upper, x, run.series("padding_waste_padded"), color=GREY, label="padded to the longest")
    trend(upper, x, run.series("padding_waste_packed"), color=TEAL, label="packed")
    trend(lower, x, [ratio - 1 for ratio in run.series("dp_imbalance")], color=ORANGE)
    upper.set_ylabel("padding")
    lower.set(ylabel="imbalance", xlabel="step")
    for ax in (upper, lower):
        from_zero(ax)
        percent_axis(ax.yaxis)
    legend(upper)
    count_axis(lower.xaxis)


def _accuracy(fig: Any, run: RunData, over: str) -> None:
    ax = axes(fig, "step" if over == "step" else "response tokens generated so far", "accuracy")
    for i, task in enumerate(run.tasks):
        x, y, error = run.accuracy(task, float if over == "step" else run.until("tokens_generated"))
        style = {"color": _TASK_COLOURS[i % len(_TASK_COLOURS)], "label": task}
        ax.errorbar(x, y, yerr=error, marker="o", capsize=3, elinewidth=1, **style)
    accuracy_axis(ax)
    count_axis(ax.xaxis)
    legend(ax, ncols=4)


def _phases(fig: Any, run: RunData) -> None:
    ax, side = fig.subplots(1, 2, width_ratios=[2.6, 1])
    per_bar = math.ceil(len(run.steps) / _MAX_BARS)
    groups = [run.steps[i : i + per_bar] for i in range(0, len(run.steps), per_bar)]
    x = [(g[0]["step"] + g[-1]["step"]) / 2 for g in groups]
    stacks = {label: [_mean(g, key) for g in groups] for key, label in PHASES.items()}
    whole = [_mean(g, "time_step") for g in groups]
    stacks["other"] = [max(0.0, w - sum(s)) for w, s in zip(whole, zip(*stacks.values(), strict=True), strict=True)]
    base = [0.0] * len(groups)
    for label, heights in stacks.items():
        if any(heights):
            ax.bar(x, heights, per_bar * 0.9, bottom=base, color=PHASE_COLOURS[label], label=label, linewidth=0)
        base = [b + h for b, h in zip(base, heights, strict=True)]
    ax.set(xlabel="step" if per_bar == 1 else f"step (means of {per_bar})", ylabel="seconds per step")
    ax.grid(axis="x", visible=False)
    count_axis(ax.xaxis)
    legend(ax, ncols=6, columnspacing=1.0, handlelength=0.9, handletextpad=0.4)

    names = list(run.summary.phases)[::-1]
    shares = [run.summary.phases[name] / run.summary.seconds for name in names]
    side.barh(names, shares, color=[PHASE_COLOURS[name] for name in names], height=0.62)
    for name, share in zip(names, shares, strict=True):
        side.text(share + 0.015, name, f"{share:.0%}", va="center", fontsize=8.5, color=INK)
    side.set_xlim(0, max(shares, default=1.0) * 1.3)
    side.set_xlabel("share of all time")
    side.grid(False)
    side.tick_params(axis="x", labelbottom=False, length=0)
    side.tick_params(axis="y", length=0)
    side.spines[["bottom", "left"]].set_visible(False)


def _memory(fig: Any, run: RunData) -> None:
    ax = axes(fig, "step", "GB")
    for key, label in PHASES.items():
        values = [value / 1e9 for value in run.series(key.replace("time_", "memory_"))]
        if all(map(math.isnan, values)):  # a phase that the run does not have
            continue
        trend(ax, run.step_numbers(), values, color=PHASE_COLOURS[label], label=label)
    from_zero(ax)
    count_axis(ax.xaxis)
    legend(ax, ncols=4)


def _mismatch(fig: Any, run: RunData) -> None:
    ax = axes(fig, "step", "nats")
    for engine, means in enumerate(zip(*run.by_position("mismatch_mean_by_engine"), strict=True)):
        label = "each engine, mean" if engine == 0 else None
        trend(ax, run.step_numbers(), means, color=BLUE, label=label)
    trend(ax, run.step_numbers(), run.series("mismatch_max"), color=ORANGE, label="largest of a token")
    ax.set_yscale("log", nonpositive="mask")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # plain text: nothing parses formulas
    count_axis(ax.xaxis)
    legend(ax)


def _mean(records: list[dict[str, Any]], key: str) -> float:
    values = [r[key] for r in records if r.get(key) is not None]
    return sum(values) / len(values) if values else 0.0


# -------------------------------------------------------------------------------------------- the charts of a report

_LOSSES = {
    "divergence": ("divergence", GREEN),
    "reverse_kl": ("full KL", TEAL),
    "loss": ("loss", BLUE),
    "grad_norm": ("gradient norm", ORANGE),
    "weight_norm": ("weight norm", PURPLE),
}
_OUTSIDE = {
    "student_entropy": ("student entropy", BLUE),
    "teacher_entropy": ("teacher entropy", ORANGE),
    "support_mass": ("mass of p's top k", GREEN),
    "support_mass_teacher": ("q's mass there", PURPLE),
}
_WEIGHTS = {"weight_mean": ("mean weight", TEAL), "finished_rate": ("finished", GREEN)}
_REWARDS = {
    "reward": ("mean reward", GREEN),
    "reward_scored": ("scored", BLUE),
    "reward_equal_groups": ("prompts without a difference", ORANGE),
}
_ACCURACY = "accuracy"  # among what a chart needs: an evaluation, where all others are keys of a step record


class _Kind(NamedTuple):
    """A chart for any run. caption: how to read it. needs: the chart is left out of runs without these metrics."""

    title: str
    needs: tuple[str, ...]
    draw: Callable[[Any, RunData], None]
    caption: str | Callable[[RunData], str]
    several: bool = False  # only for runs with several teachers

    def fits(self, run: RunData) -> bool:
        return (bool(teachers_of(run)) or not self.several) and all(
            run.tasks if key == _ACCURACY else run.has(key) for key in self.needs
        )

    def chart(self, run: RunData) -> Chart:
        caption = self.caption if isinstance(self.caption, str) else self.caption(run)
        return Chart(self.title, caption, lambda fig: self.draw(fig, run))


_CHARTS = (
    _Kind(
        "Horizon and lengths [tokens]",
        ("horizon",),
        _horizon,
        "The horizon M is what the rollouts of a step may use. It should follow the reliable length: where the two "
        "part, tokens are generated that the gate then discards.",
    ),
    _Kind(
        "Cumulative tokens generated",
        ("tokens_generated",),
        _tokens,
        "The gap is what the horizon saved. The full-horizon line is an estimate from the response length of the "
        "latest evaluation, not a second run.",
    ),
    _Kind("Overlap and drift events [share]", ("overlap",), _overlap, _overlap_caption),
    _Kind(
        "Accuracy over steps [%]",
        (_ACCURACY,),
        partial(_accuracy, over="step"),
        "Held-out problems, with 95 % confidence intervals. Differences smaller than the bars may be noise.",
    ),
    _Kind(
        "Overlap by position over training",
        ("overlap_by_position",),
        overlap_map,
        "Each column is a step, each row a stretch of the response; without colour there are no tokens. Drift shows as "
        "darkening upwards, learning as brightening to the right.",
    ),
    _Kind(
        "Overlap by position: early, middle, late",
        ("overlap_by_position",),
        partial(profile, key="overlap_by_position", ylabel="mean overlap"),
        "A curve that falls to the right is prefix drift. Later curves should lie higher and reach further.",
    ),
    _Kind(
        "Response lengths over training [share of the responses]",
        ("lengths_by_position",),
        length_map,
        "Each column is a step: where its responses ended. A band along the horizon was cut there; what lies below "
        "ended by itself, or was stopped in flight.",
    ),
    _Kind(
        "Response lengths: early, middle, late [share of the responses]",
        ("lengths_by_position",),
        length_profile,
        "The same as a distribution, over the first, middle and last steps.",
    ),
    _Kind(
        "Time by phase [s per step]",
        ("time_step",),
        _phases,
        "Left: the mean seconds of a step. Right: where the time of the run went, evaluation included.",
    ),
    _Kind(
        "Loss, divergence and norms",
        ("loss",),
        partial(_panels, curves=_LOSSES, share=False),
        "Divergence is what the objective looks at, unweighted; the full KL is the reverse KL over the whole "
        "vocabulary, and should fall with it. Loss is a policy-gradient surrogate that may be negative; all move with "
        "the horizon, so judge a run by accuracy. Spikes in the gradient norm (before clipping) come first when a run "
        "diverges; the norm of all weights should move slowly.",
    ),
    _Kind(
        "Entropy [nats] and mass of the best ids",
        ("student_entropy",),
        partial(_panels, curves=_OUTSIDE, share=False),
        "On the student's own text. The student's entropy should move towards the teacher's. Mass that leaves the "
        "student's best ids while its entropy rises is a leak: the text becomes word salad.",
    ),
    _Kind(
        "Full reverse KL by position: early, middle, late",
        ("reverse_kl_by_position",),
        partial(profile, key="reverse_kl_by_position", ylabel="nats per token", from_zero=True),
        "How far the student is from its teacher along the response. Later curves should lie lower.",
    ),
    _Kind(
        "Accuracy over generated tokens [%]",
        (_ACCURACY, "tokens_generated"),
        partial(_accuracy, over="tokens"),
        "The price of the accuracy: further left is cheaper. Evaluation tokens are not counted.",
    ),
    _Kind(
        "Training weight by position",
        ("weight_by_position",),
        partial(profile, key="weight_by_position", ylabel="mean weight W", from_zero=True),
        "How much each stretch of a response counts in the loss. Events lower the weight for good, so curves only "
        "fall; a late curve that stays up means reliable rollouts.",
    ),
    _Kind(
        "Mean weight and finished responses",
        ("weight_mean",),
        partial(_panels, curves=_WEIGHTS, share=True),
        "Mean weight: how much of what was generated trains. Finished: the share of responses that ended by "
        "themselves; near 100% the horizon no longer cuts anything.",
    ),
    _Kind(
        "By teacher",
        (),
        by_teacher,
        "Each teacher's own window, and the student's agreement with it on that teacher's prompts alone. A window that "
        "stays short is of the pair whose responses drift first.",
        several=True,
    ),
    _Kind(
        "Task reward",
        ("reward",),
        partial(_panels, curves=_REWARDS, share=False),
        "The mean reward of the scored responses should rise. A prompt whose responses all have the same reward "
        "teaches nothing: where all are alike, the reward has nothing left to say.",
    ),
    _Kind(
        "Memory by phase [GB]",
        ("memory_train",),
        _memory,
        "Of rank 0. On a GPU: torch's peak in each phase; a line that goes on climbing is a leak. On a CPU: what is "
        "resident at each phase's end. It climbs in training while the batches grow, since what is freed stays "
        "resident, and is flat once the longest batch has been there.",
    ),
    _Kind(
        "Rollout engines against the trainer [nats]",
        ("mismatch_mean",),
        _mismatch,
        "How far apart both are in the log-probability of the sampled tokens. Flat is well; an engine that jumps away "
        "has weights that are not the student's, one that climbs has a format that is too coarse for it.",
    ),
    _Kind(
        "Padding and balance of the micro-batches",
        ("padding_waste_padded",),
        _packing,
        "Padding: the share of the tokens that compute nothing, if rows were padded to the longest of the batch and as "
        "they are packed. Imbalance: how far the data-parallel rank with most tokens is above the mean, while the "
        "others wait.",
    ),
)
