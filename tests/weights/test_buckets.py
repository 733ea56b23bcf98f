"""The buckets of the resharding stream: layers share them, and the ranks share the work."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from prune_opd import platform
from prune_opd.config import TrainConfig
from prune_opd.config.recipe import load_recipe
from prune_opd.model_spec import ModelSpec, model_config
from prune_opd.weights.buckets import ALIGNMENT, Bucket, Holding, Item, make_buckets, make_items
from prune_opd.weights.cut import VOCABULARY, WHOLE
from prune_opd.weights.mapping import entries
from tests.weights.test_mapping import model_spec

FLOAT = torch.float32


def holdings(spec: Any, tp: int, stages: int) -> list[dict[str, Holding]]:
    """Of ranks numbered tp-first; the layers divided evenly, a tied embedding also on the last stage."""
    ranks: list[dict[str, Holding]] = [{} for _ in range(tp * stages)]
    for entry in entries(spec):
        for index in range(tp):
            for stage in stages_of(entry.megatron, spec, stages):
                shard = (0, 1) if entry.cut == WHOLE else (index, tp)
                ranks[stage * tp + index][entry.megatron] = Holding(*shard, FLOAT)
    return ranks


def stages_of(megatron: str, spec: Any, stages: int) -> set[int]:
    if megatron.startswith("decoder.layers."):
        return {int(megatron.split(".")[2]) * stages // spec.layers}
    if megatron.startswith("embedding."):
        return {0, stages - 1} if spec.tied else {0}
    return {stages - 1}


def buckets_of(spec: Any, tp: int, stages: int, bucket_bytes: int, staging: bool = False) -> list[Bucket]:
    items = make_items(entries(spec), holdings(spec, tp, stages))
    return make_buckets(items, bucket_bytes, staging=staging)


def ends(item: Item) -> list[tuple[int, int]]:
    sizes = [torch.Size(shape).numel() * item.dtype.itemsize for shape in item.entry.shapes]
    found = [(offset, offset + size) for offset, size in zip(item.offsets, sizes, strict=False)]
    return [*found, *((begin, begin + sum(item.wire_sizes(index))) for index, begin in enumerate(item.wires))]


@pytest.mark.parametrize("staging", [False, True])
@pytest.mark.parametrize("bucket_bytes", [1, 3000, 12_000, 10**9])
@pytest.mark.parametrize(("tp", "stages"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_buckets_hold_every_parameter_once_without_overlap_in_the_size_asked_for(
    tp: int, stages: int, bucket_bytes: int, staging: bool
) -> None:
    spec = model_spec(layers=4, tied=False)
    buckets = buckets_of(spec, tp, stages, bucket_bytes, staging)
    found = [item.entry.megatron for bucket in buckets for item in bucket.items]
    assert sorted(found) == sorted(entry.megatron for entry in entries(spec))
    for bucket in buckets:
        assert bucket.nbytes <= bucket_bytes or sum(not item.at_home for item in bucket.items) == 1
        places = sorted(place for item in bucket.items for place in ends(item))
        assert all(end <= begin for (_, end), (begin, _) in pairwise(places))
        assert all(begin % ALIGNMENT == 0 for begin, _ in places)
        assert max((end for _, end in places), default=0) <= bucket.nbytes


def test_a_layer_that_fits_into_a_bucket_is_not_cut() -> None:
    spec = model_spec(layers=4)
    layer_bytes = buckets_of(spec, 2, 1, 10**9)[0].nbytes // 4  # the embedding is smaller than what is rounded off here
    for bucket_bytes in (layer_bytes + 20_000, 2 * layer_bytes + 20_000):
        buckets = buckets_of(spec, 2, 1, bucket_bytes)
        layers = [{i.entry.megatron.split(".")[2] for i in b.items if "layers" in i.entry.megatron} for b in buckets]
        assert len(buckets) > 1
        assert sum(len(found) for found in layers) == 4


def test_pipeline_stages_send_in_turn_and_the_vocabulary_comes_last() -> None:
    spec = model_spec(layers=4, tied=False)
    (bucket,) = buckets_of(spec, 1, 2, 10**9)
    layers = [item.entry.megatron.split(".")[2] for item in bucket.items if "layers" in item.entry.megatron]
    assert list(dict.fromkeys(layers)) == ["0", "2", "1", "3"]
    assert [item.entry.cut for item in bucket.items[-2:]] == [VOCABULARY] * 2


def test_the_order_of_the_parameters_is_kept_where_it_is_asked_for() -> None:
    spec = model_spec(layers=4, tied=False)
    items = make_items(entries(spec), holdings(spec, 1, 2))
    (bucket,) = make_buckets(items, 10**9, staging=False, in_order=True)
    assert [item.entry for item in bucket.items] == list(entries(spec))


def test_what_every_rank_has_takes_no_room_and_is_not_sent() -> None:
    spec = model_spec(tied=True)
    at_home = {item.entry.megatron for bucket in buckets_of(spec, 1, 2, 10**9) for item in bucket.items if item.at_home}
    assert at_home == {"embedding.word_embeddings.weight"}  # on the first stage and, tied, on the last
    norms = {item.entry.megatron for bucket in buckets_of(spec, 2, 1, 10**9) for item in bucket.items if item.at_home}
    assert norms == {entry.megatron for entry in entries(spec) if entry.cut == WHOLE}


def test_of_ranks_with_the_same_shard_the_one_that_sends_less_sends_it() -> None:
    """Two stages of two ranks: a norm is on both ranks of its stage."""
    spec = model_spec(layers=4, tied=False)
    owners = [item.owners for bucket in buckets_of(spec, 2, 2, 10**9) for item in bucket.items if item.count == 1]
    assert {owner for (owner,) in owners} == {0, 1, 2, 3}


@pytest.mark.parametrize("bucket_bytes", [3000, 12_000, 10**9])
@pytest.mark.parametrize(("tp", "stages"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_what_a_rank_sends_of_a_bucket_lies_in_its_segment_and_nothing_else(
    tp: int, stages: int, bucket_bytes: int
) -> None:
    """One broadcast for each sender of a bucket: a shard travels in its sender's segment, or arrives in its place."""
    spec = model_spec(layers=4, tied=False)
    for bucket in buckets_of(spec, tp, stages, bucket_bytes, staging=True):
        bounds = sorted(bucket.segments.values())
        assert all(end <= begin for (_, end), (begin, _) in pairwise(bounds))
        room = dict.fromkeys(bucket.segments, 0)
        for item in bucket.items:
            for index, owner in enumerate(item.owners):
                if item.everywhere:
                    assert not item.wires
                    continue
                begin, end = bucket.segments[owner]
                shard = [(item.wires[index], sum(item.wire_sizes(index)))] if item.wires else []
                sizes = [torch.Size(shape).numel() * item.dtype.itemsize for shape in item.entry.shapes]
                for start, size in shard or zip(item.offsets, sizes, strict=True):
                    assert begin <= start and start + size <= end
                    room[owner] += -(-size // ALIGNMENT) * ALIGNMENT
        assert room == {owner: end - begin for owner, (begin, end) in bucket.segments.items()}


def test_a_model_of_128_experts_travels_in_few_broadcasts() -> None:
    """Qwen3-30B-A3B in its recipe's layout, TP4 × EP8: one broadcast of each tensor's part took 19,208."""
    config = load_recipe("qwen3_30b_a3b_from_235b_a22b_128xh100_fp8")
    assert isinstance(config, TrainConfig)
    spec = ModelSpec.of(model_config("student", config.student), "student")
    tp, ep = config.parallel.tensor_size(128), config.parallel.expert
    assert spec.moe is not None and (tp, ep) == (4, 8)
    table, ranks = list(entries(spec)), []
    for rank in range(ep):
        ours: dict[str, Holding] = {}
        for entry in table:
            if entry.expert is None:
                shard = (0, 1) if not entry.cut.divided else (rank % tp, tp)
            elif entry.expert // (spec.moe.experts // ep) == rank:
                shard = (0, 1)
            else:
                continue
            ours[entry.megatron] = Holding(*shard, torch.bfloat16)
        ranks.append(ours)
    buckets = make_buckets(make_items(table, ranks), int(config.rollout.bucket_mb * 2**20), staging=True)
    tensors = sum(len(item.entry.hf) for bucket in buckets for item in bucket.items)
    assert tensors == 18_867
    assert sum(len(bucket.segments) for bucket in buckets) <= 300


def test_a_shard_that_nobody_has_is_an_error() -> None:
    spec = model_spec()
    found = holdings(spec, 2, 1)
    del found[1]["decoder.layers.1.mlp.linear_fc2.weight"]
    with pytest.raises(ValueError, match=r"decoder\.layers\.1\.mlp\.linear_fc2\.weight"):
        list(make_items(entries(spec), found))


def setup_module() -> None:
    platform.prepare()
