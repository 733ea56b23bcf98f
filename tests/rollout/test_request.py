"""The rows of a batch, and the seeds of their responses."""

from __future__ import annotations

from prune_opd.data.prompt import Prompt
from prune_opd.data.sampler import MixtureSampler, PromptSampler
from prune_opd.rollout.request import Row, TokenSampling, cached_tokens, new_rows, told_apart


class Three:
    """A source of three prompts."""

    size, name = 3, "three"

    def get(self, index: int) -> Prompt:
        return Prompt(index, (7, index), None, self.name)


def seeds(rows: list[Row], step: int = 4) -> list[int]:
    sampling = TokenSampling(seed=0, step=step)
    return [sampling.seed_of(row) for row in told_apart(rows)]


def test_a_prompt_that_comes_again_in_a_batch_has_other_responses() -> None:
    file_shorter_than_a_batch = PromptSampler(Three(), seed=0).next(12)
    across_two_epochs = PromptSampler(Three(), seed=0).next(4)
    twice_in_a_mixture = MixtureSampler([PromptSampler(Three(), 0), PromptSampler(Three(), 0)], [1, 1]).next(6)
    for prompts in (file_shorter_than_a_batch, across_two_epochs, twice_in_a_mixture):
        found = seeds(new_rows(prompts, 2, 9))
        assert len(set(found)) == 2 * len(prompts)


def test_where_nothing_comes_twice_the_seeds_are_those_of_the_rows_alone() -> None:
    rows = new_rows([Prompt(i, (i,), None, "a") for i in range(5)], 3, 9)
    assert told_apart(rows) == rows
    assert seeds(rows) == [TokenSampling(0, 4).seed_of(row) for row in rows]
    assert seeds(rows[::-1]) == seeds(rows)[::-1]


def test_two_prompts_of_one_index_are_no_repeat() -> None:
    rows = new_rows([Prompt(0, (1,), None, "a"), Prompt(0, (2,), None, "b")], 1, 9)
    assert [row.repeat for row in told_apart(rows)] == [0, 0]


def test_a_cache_on_a_cpu_holds_whole_blocks_but_one() -> None:
    each = 2 * 28 * 8 * 128 * 4  # a token of Qwen3-1.7B in fp32: 9.4 GB for its 40,960 positions
    assert cached_tokens(1.0, each) == (2**30 // (each * 128) - 1) * 128 < 40_960
    assert cached_tokens(1.0, 2**31) == 0
    assert cached_tokens(1.0, 2 * 2 * 4 * 16 * 64) == 65_408  # as vLLM says of a small model
