"""samples.jsonl: a few responses token by token, from what the loss saw to what is shown of it."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import KEY, SCRIPT, sample_record, write_run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from prune_opd.config import HorizonConfig, TrackConfig, TrainConfig
from prune_opd.data.prompts import Prompt
from prune_opd.errors import UserError
from prune_opd.loss.stats import BatchStats, GateStats
from prune_opd.rollout.batch import Response, Rollouts
from prune_opd.track.redact import MASK, redact, redact_tokens
from prune_opd.track.samples import read_samples, sample_records, sampled_rows, token_texts, tokens_html
from prune_opd.track.tracker import Tracker

CPU = torch.device("cpu")


class ByteTokenizer:
    """A byte-level tokenizer of the tokenizers library whose every token is one byte."""

    def __init__(self) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        self.fast = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
        self.fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.fast.decoder = decoders.ByteLevel()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.fast.encode(text).ids
        return ids

    def decode(self, ids: list[int], **_: Any) -> str:
        text: str = self.fast.decode(ids)
        return text


def rollouts(*texts: str, stopped: tuple[int, ...] = ()) -> Rollouts:
    tokenizer = ByteTokenizer()
    prompts = tuple(Prompt(70 + i, tuple(tokenizer.encode(f"ask {i}")), None, "test") for i in range(len(texts)))
    responses = tuple(
        Response(tuple(tokenizer.encode(text)), finished=i == 0, stopped=i in stopped, dropped=2 * (i in stopped))
        for i, text in enumerate(texts)
    )
    return Rollouts(prompts, responses)


def gate_stats(lengths: list[int], first: int) -> GateStats:
    """Statistics of a micro-batch: token i, counted from `first`, has overlap i / 1000; every fifth is an event."""
    number_N = torch.arange(first, first + sum(lengths))
    values: dict[str, Any] = {field.name: torch.zeros(len(number_N)) for field in fields(GateStats)}
    values |= {"overlap_N": number_N / 1000, "event_N": number_N % 5 == 0, "weight_N": 2 - number_N / 1000}
    values |= {"length_B": torch.tensor(lengths), "reliable_length_B": torch.tensor([max(0, n - 1) for n in lengths])}
    return GateStats(**(values | {"policy": None, "ends_5M": None}))


def test_the_texts_of_the_tokens_join_to_the_response_also_where_a_character_is_several_tokens() -> None:
    tokenizer, text = ByteTokenizer(), "Ünï → 数 🙂 end"
    ids = tokenizer.encode(text)
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids) and "".join(texts) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(texts) and "🙂" in texts
    assert token_texts(ids[:-6], tokenizer)[-1] == "\N{REPLACEMENT CHARACTER}"  # a response that was cut in a character
    assert token_texts([], tokenizer) == []


def prompts_of(*sources: str, responses: int = 1) -> list[Prompt]:
    """A batch whose prompts come from these sources, each with its responses."""
    return [Prompt(i, (i,), None, source) for i, source in enumerate(sources) for _ in range(responses)]


@pytest.mark.parametrize(("step", "kept"), [(1, True), (2, False), (10, True), (19, False), (20, True), (23, True)])
def test_the_first_the_last_and_every_so_many_steps_are_sampled(step: int, kept: bool) -> None:
    assert bool(sampled_rows(TrackConfig(samples=3, samples_every=10), step, 23, prompts_of(*"a" * 8))) == kept


@pytest.mark.parametrize("step", range(1, 20))
def test_sampled_rows_are_of_every_source_of_a_mixture(step: int) -> None:
    """Rows 1, 3, 5, 7 of 8 are all of one source where two sources alternate."""
    track = TrackConfig(samples=4, samples_every=1)
    for batch in (prompts_of(*"ab" * 4), prompts_of(*"aaab" * 4), prompts_of(*"ab" * 4, responses=4)):
        sources = [batch[row].source for row in sampled_rows(track, step, 99, batch)]
        assert sorted(sources) == ["a", "a", "b", "b"]
    batch = prompts_of(*"abcd" * 4)
    chosen = sampled_rows(track, step, 99, batch, stopped=[1, 5, 9])  # the stopped ones are all of source b
    assert sorted(batch[row].source for row in chosen) == ["a", "b", "c", "d"] and set(chosen) & {1, 5, 9}


def test_more_sources_than_samples_all_have_their_turn_over_the_steps() -> None:
    track, batch = TrackConfig(samples=2, samples_every=1), prompts_of(*"abcdef")
    seen = {batch[row].source for step in range(1, 30) for row in sampled_rows(track, step, 99, batch)}
    assert seen == set("abcdef")


def test_sampled_rows_are_spread_over_the_prompts_and_have_stopped_ones_among_them() -> None:
    track, batch = TrackConfig(samples=4), prompts_of(*"a" * 4, responses=4)
    assert len({batch[row] for row in sampled_rows(track, 1, 9, batch)}) == 4
    chosen = sampled_rows(track, 1, 9, batch, stopped=[2, 5, 6])
    assert len(set(chosen)) == 4 and len(set(chosen) & {2, 5, 6}) == 2
    assert sampled_rows(track, 1, 9, prompts_of("a", "a")) == [0, 1]
    assert sampled_rows(TrackConfig(samples=0), 1, 9, batch) == []


def test_sampled_rows_are_the_same_for_everybody_who_asks() -> None:
    track, batch = TrackConfig(samples=4), prompts_of(*"ab" * 32, responses=4)
    assert sampled_rows(track, 10, 99, batch) == sampled_rows(track, 10, 99, batch)
    assert sampled_rows(track, 10, 99, batch) != sampled_rows(track, 20, 99, batch)


def test_a_record_has_each_token_as_the_loss_saw_it_whatever_micro_batch_it_was_in() -> None:
    batch = rollouts("one", "two and more", "", "three!", stopped=(1,))
    stats = BatchStats(4, 2, 16, CPU, watched=[1, 3])
    stats.add([3, 0], gate_stats([6, 3], first=0))
    stats.add([2, 1], gate_stats([0, 12], first=100))
    stopped, cut = sample_records(7, 16, batch, stats, ByteTokenizer())
    assert (stopped["step"], stopped["row"], stopped["problem"], stopped["horizon"]) == (7, 1, 71, 16)
    assert (stopped["prompt"], "".join(stopped["tokens"])) == ("ask 1", "two and more")
    assert stopped["overlap"] == [round(0.1 + i / 1000, 4) for i in range(12)]
    assert stopped["weight"] == [round(1.9 - i / 1000, 4) for i in range(12)]
    assert (stopped["events"], stopped["reliable_length"]) == ([0, 5, 10], 11)
    assert (stopped["finished"], stopped["stopped"], stopped["dropped"]) == (False, True, 2)
    assert cut["overlap"] == [i / 1000 for i in range(6)] and cut["events"] == [0, 5]
    assert (cut["finished"], cut["stopped"]) == (False, False)
    assert "teacher_prompt" not in stopped


def test_what_the_teacher_reads_stands_in_the_record_where_it_is_another_text_with_its_middle_left_out() -> None:
    tokenizer, plain = ByteTokenizer(), rollouts("a", "b", "c")
    hints = [None, "ask 1, and it is b", f"begins {'x' * 2000} ends"]
    prompts = tuple(
        replace(prompt, teacher_ids=hint and tuple(tokenizer.encode(hint)))
        for prompt, hint in zip(plain.prompts, hints, strict=True)
    )
    stats = BatchStats(3, 2, 16, CPU, watched=[0, 1, 2])
    stats.add([0, 1, 2], gate_stats([1, 1, 1], first=0))
    first, second, third = sample_records(1, 16, Rollouts(prompts, plain.responses), stats, tokenizer)
    assert "teacher_prompt" not in first and second["teacher_prompt"] == "ask 1, and it is b"
    shown = third["teacher_prompt"]
    assert shown.startswith("begins x") and shown.endswith("x ends") and " […] " in shown and len(shown) < 620


def test_a_response_that_could_not_be_judged_has_no_numbers() -> None:
    stats = BatchStats(1, 2, 16, CPU, watched=[0])
    stats.miss([0])
    (record,) = sample_records(1, 16, rollouts("abc"), stats, ByteTokenizer())
    assert record["overlap"] == [None] * 3 and record["events"] == [] and record["reliable_length"] is None
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_watching_rows_changes_no_sum() -> None:
    found = []
    for watched in ([], [0, 1]):
        stats = BatchStats(2, 2, 16, CPU, watched)
        stats.add([0, 1], gate_stats([5, 7], first=0))
        found.append(stats.record())
    assert found[0] == found[1]


def test_lengths_are_counted_where_their_last_tokens_are() -> None:
    stats = BatchStats(6, 4, 8, CPU)
    assert stats.lengths([0, 1, 2, 3, 8, 9]) == [3, 1, 0, 2]


def test_a_resumed_run_drops_the_samples_that_it_takes_again(tmp_path: Path) -> None:
    write_run(tmp_path, steps=6, evaluate_every=0)
    config = TrainConfig("run", "s", "t", 6, HorizonConfig("full"), track=TrackConfig(wandb="disabled", report=False))
    stats = BatchStats(1, 2, 16, CPU, watched=[0])
    stats.add([0], gate_stats([3], first=0))
    with Tracker(tmp_path, config, {}, resume_step=4, tokenizer=ByteTokenizer()) as tracker:
        tracker.samples(5, 16, rollouts("new"), stats)
    lines = read_samples(tmp_path / "samples.jsonl")
    assert [line["step"] for line in lines] == [1, 1, 1, 3, 3, 3, 5] and lines[-1]["tokens"] == ["n", "e", "w"]


def test_a_samples_file_that_is_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    assert read_samples(path) == []
    path.write_text(f"rubbish\n{json.dumps(sample_record(1, 'finished'))}\n")
    with pytest.raises(UserError, match="line 1"):
        read_samples(path)


def test_a_table_of_wandb_has_tokens_in_colour_and_no_markup_of_a_model() -> None:
    html = tokens_html(sample_record(1, "stopped", f" {SCRIPT}"))
    assert "<script" not in html and "&lt;s" in html
    assert "rgba(217,130,43,0.68);border-bottom" in html and "overlap 0.25, weight 0.5, drift event" in html
    before, _, after = html.partition("✂")
    assert "word30" in before and "word31" in after and "stopped in flight, 3 tokens dropped" in after


@pytest.mark.parametrize(
    "secret", [KEY, "sk-" + 20 * "a", "ghp_" + 24 * "b", "AKIA" + 16 * "C", "value-of-the-variable"]
)
def test_secrets_are_masked_as_long_as_they_are(monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "value-of-the-variable")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "before and")  # no secret, by its name
    text = f"before and {secret} after"
    assert redact(text) == f"before and {MASK * len(secret)} after"
    pieces = [text[i : i + 4] for i in range(0, len(text), 4)]
    masked = redact_tokens(pieces)
    assert "".join(masked) == redact(text) and [len(piece) for piece in masked] == [len(piece) for piece in pieces]


def test_a_password_in_an_address_is_masked_and_nothing_else() -> None:
    assert (
        redact("s3://me:hidden@host/a and mail me@host: 1 + 1 = 2")
        == f"s3://{9 * MASK}@host/a and mail me@host: 1 + 1 = 2"
    )
    assert redact("hf_short sk-no /path/to/sk-1 math.pi") == "hf_short sk-no /path/to/sk-1 math.pi"
