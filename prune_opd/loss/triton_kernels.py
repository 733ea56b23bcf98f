"""Triton kernels for the loss, each one pass through whole matrices of logits (loss/triton_passes.py calls them).

A program has one token and goes through its logits a tile at a time, so that nothing is added up between programs. What
it needs of a token are a few numbers. Columns beyond the vocabulary hold `NOTHING` and have no part in anything. Sums
are taken in the logits' own dtype, fp32 (fp64 where the heads are): a tile's as a tree, the tiles' one after the other.

This module is imported where Triton is to be used, and nowhere else. TRITON_INTERPRET=1, set before that, runs the
kernels on a CPU, line by line.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

NOTHING = tl.constexpr(-1e30)  # as in vocab_parallel.py


class Logits(NamedTuple):
    """Of both models [N, width]; where a kernel does not look at the teacher's, it has the student's."""

    student: Any
    teacher: Any
    width: Any


class Points(NamedTuple):
    """Numbers at a few columns of a token, [N, count]; a column that the rank has not is below 0."""

    columns: Any
    numbers: Any
    count: Any


class Constants(NamedTuple):
    share: Any  # the objective's forward_share or beta
    outside: Any  # its outside_logp


# ---------------------------------------------------------------------------------------------------- statistics


@triton.jit
def statistics_kernel(logits, maxima, sums, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Block maxima [2, N, width / BLOCK], and sums [8, N] less the models' own maxima.

    Of student and teacher, with e, f, l, m as in vocab_sums.py: both maxima, Σ e, Σ f, Σ e l, Σ e m, Σ f l, Σ f m.
    """
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    width, blocks = logits.width, logits.width // BLOCK
    student, teacher = logits.student + row * width, logits.teacher + row * width
    maxima += row * blocks
    nothing = tl.zeros((), student.dtype.element_ty)
    top_s, top_t = nothing + NOTHING, nothing + NOTHING
    e_sum, f_sum, el, fm, e_gap, f_gap = nothing, nothing, nothing, nothing, nothing, nothing
    for begin in range(0, width, TILE):
        column = begin + tl.arange(0, TILE)
        block = begin // BLOCK + tl.arange(0, TILE // BLOCK)
        s = tl.load(student + column, mask=column < width, other=NOTHING)
        t = tl.load(teacher + column, mask=column < width, other=NOTHING)
        block_s = tl.max(tl.reshape(s, (TILE // BLOCK, BLOCK)), axis=1)
        block_t = tl.max(tl.reshape(t, (TILE // BLOCK, BLOCK)), axis=1)
        tl.store(maxima + block, block_s, mask=block < blocks)
        tl.store(maxima + rows * blocks + block, block_t, mask=block < blocks)
        higher_s, higher_t = tl.maximum(top_s, tl.max(block_s, axis=0)), tl.maximum(top_t, tl.max(block_t, axis=0))
        # What there is so far, less the higher maxima: l and m go down by these, e and f shrink.
        down_s, down_t = top_s - higher_s, top_t - higher_t
        less_s, less_t = tl.exp(down_s), tl.exp(down_t)
        log_s, log_t = s - higher_s, t - higher_t
        e, f = tl.exp(log_s), tl.exp(log_t)
        el = less_s * (el + down_s * e_sum) + tl.sum(e * log_s, axis=0)
        fm = less_t * (fm + down_t * f_sum) + tl.sum(f * log_t, axis=0)
        # Σ e (l − m), which is small where the models are close: a difference of two large sums would be all rounding.
        e_gap = less_s * (e_gap + (down_s - down_t) * e_sum) + tl.sum(e * (log_s - log_t), axis=0)
        f_gap = less_t * (f_gap + (down_s - down_t) * f_sum) + tl.sum(f * (log_s - log_t), axis=0)
        e_sum = less_s * e_sum + tl.sum(e, axis=0)
        f_sum = less_t * f_sum + tl.sum(f, axis=0)
        top_s, top_t = higher_s, higher_t
    sums += row
    tl.store(sums, top_s)
    tl.store(sums + rows, top_t)
    tl.store(sums + 2 * rows, e_sum)
    tl.store(sums + 3 * rows, f_sum)
    tl.store(sums + 4 * rows, el)
    tl.store(sums + 5 * rows, el - e_gap)
    tl.store(sums + 6 * rows, fm + f_gap)
    tl.store(sums + 7 * rows, fm)


@triton.jit
def rest_kernel(logits, maximum, columns, rest, width, count, TILE: tl.constexpr):
    """Σ exp(logit − maximum) [M] of rows [M, width] over all columns but those in `columns` [M, count]."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    columns += row * count
    top = tl.load(maximum + row)
    total = tl.zeros((), logits.dtype.element_ty)
    for begin in range(0, width, TILE):
        column = begin + tl.arange(0, TILE)
        e = tl.exp(tl.load(logits + column, mask=column < width, other=NOTHING) - top)
        for j in range(count):
            apart = tl.load(columns + j)
            if (apart >= begin) & (apart < begin + TILE):
                e = tl.where(column == apart, 0.0, e)
        total += tl.sum(e, axis=0)
    tl.store(rest + row, total)


# ------------------------------------------------------------------------------------- objectives on the vocabulary
#
# KIND: "candidates" for one on a few candidates alone; "kl", forward and reverse in any mixture; "priced", the reverse
# KL to a teacher that is known at a few ids; "jsd", generalised.


@triton.jit
def put(tile, begin, row, points, ADD: tl.constexpr, TILE: tl.constexpr):
    """A tile of a token with the points' numbers at their columns: in the place of what is there, or added to it."""
    column = begin + tl.arange(0, TILE)
    columns, numbers = points.columns + row * points.count, points.numbers + row * points.count
    for j in range(points.count):
        at, number = tl.load(columns + j), tl.load(numbers + j)
        if (at >= begin) & (at < begin + TILE):
            tile = tl.where(column == at, number + tile if ADD else number, tile)
    return tile


@triton.jit
def expm1(x):
    """e^x − 1 for x ≤ 0, with its digits near 0."""
    y = tl.maximum(x, -0.5)
    series = 1 + y / 14
    for i in tl.static_range(12):
        series = 1 + y * series / (13 - i)
    return tl.where(x > -0.5, y * series, tl.exp(x) - 1)


@triton.jit
def log1p(x):
    """log(1 + x) for −1 < x ≤ 0, with its digits near 0: 2 artanh(z), z = x / (2 + x)."""
    y = tl.maximum(x, -0.25)
    z = y / (2 + y)
    square = z * z
    series = square / 19
    for i in tl.static_range(9):
        series = 1 / (17 - 2 * i) + square * series if i else 1 / 17 + series
    return tl.where(x > -0.25, 2 * z * series, tl.log(1 + x))


@triton.jit
def divergence(student, teacher, share, KIND: tl.constexpr):
    """Value and slope of an objective at log p and log q, as in method/divergences.py."""
    p, gap = tl.exp(student), teacher - student
    if KIND == "jsd":
        below = log1p(share * expm1(tl.minimum(gap, 0.0)))
        above = gap + log1p((1 - share) * expm1(-tl.maximum(gap, 0.0)))
        ratio = tl.where(gap <= 0, below, above)  # log(m / p)
        slope = -(1 - share) * p * ratio
        return slope + share * tl.exp(teacher) * (gap - ratio), slope
    elif KIND == "priced":
        return -p * gap, -p * gap
    else:
        q, reverse = tl.exp(teacher), -p * gap
        return share * q * gap + (1 - share) * reverse, share * (p - q) + (1 - share) * reverse


@triton.jit
def both_logs(logits, norms, begin, row, prices, outside, KIND: tl.constexpr, TILE: tl.constexpr):
    """log p and log q of a tile of a token; log q is the price where the objective says so."""
    rows, width = tl.num_programs(0), logits.width
    column = begin + tl.arange(0, TILE)
    norms += row
    student = tl.load(logits.student + row * width + column, mask=column < width, other=NOTHING)
    # Two numbers, not their sum: large logits would cost digits of small log-probabilities.
    student = student - tl.load(norms) - tl.load(norms + 2 * rows)
    if KIND == "candidates":
        return student, student
    elif KIND == "priced":
        return student, put(tl.zeros_like(student) + outside, begin, row, prices, False, TILE)
    else:
        teacher = tl.load(logits.teacher + row * width + column, mask=column < width, other=NOTHING)
        return student, teacher - tl.load(norms + rows) - tl.load(norms + 3 * rows)


@triton.jit
def divergence_kernel(logits, norms, sums, prices, constants, KIND: tl.constexpr, TILE: tl.constexpr):
    """An objective's value and the sum of its slopes, [2, N]. norms: maxima and log-totals of both models [4, N]."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    value = tl.zeros((), logits.student.dtype.element_ty)
    total = value
    for begin in range(0, logits.width, TILE):
        student, teacher = both_logs(logits, norms, begin, row, prices, constants.outside, KIND, TILE)
        values, slopes = divergence(student, teacher, constants.share, KIND)
        value += tl.sum(values, axis=0)
        total += tl.sum(slopes, axis=0)
    tl.store(sums + row, value)
    tl.store(sums + rows + row, total)


@triton.jit
def gradient_kernel(logits, norms, gradient, slopes, prices, constants, KIND: tl.constexpr, TILE: tl.constexpr):
    """∂ℓ/∂logit = c − p Σ c [N, width], with c from the slopes at a few columns and from an objective on all of them.

    norms: [6, N], with Σ c and the weight of the objective on all columns. gradient: may be the student's logits.
    """
    row, rows, width = tl.program_id(0).to(tl.int64), tl.num_programs(0), logits.width
    total, weight = tl.load(norms + 4 * rows + row), tl.load(norms + 5 * rows + row)
    for begin in range(0, width, TILE):
        column = begin + tl.arange(0, TILE)
        student, teacher = both_logs(logits, norms, begin, row, prices, constants.outside, KIND, TILE)
        result = -total * tl.exp(student)
        if KIND != "candidates":
            _, slope = divergence(student, teacher, constants.share, KIND)
            result += weight * slope
        result = put(result, begin, row, slopes, True, TILE).to(gradient.dtype.element_ty)
        tl.debug_barrier()  # all has been read that this is written over
        tl.store(gradient + row * width + column, result, mask=column < width)
