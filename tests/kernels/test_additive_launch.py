"""Launch configurations of additive attention: every key once, tiles that tl.dot takes, whole GPUs for few queries."""

import pytest
from daam_kernels.kernels.additive_launch import backward_tile, forward_tile
from hypothesis import given
from hypothesis import strategies as st


@given(
    slices=st.integers(1, 1 << 20),
    queries=st.one_of(st.just(1), st.integers(1, 1 << 17)),
    keys=st.integers(1, 1 << 20),
    value_dim=st.integers(1, 4096),
    itemsize=st.sampled_from([4, 8]),
)
def test_splits_cover_every_key_once(slices, queries, keys, value_dim, itemsize):
    tile = forward_tile(slices, queries, keys, value_dim, itemsize)
    assert (tile.num_splits - 1) * tile.keys_per_split < keys <= tile.num_splits * tile.keys_per_split
    assert tile.keys_per_split % tile.block_k == 0 and tile.num_splits <= 128
    for size in (tile.block_q, tile.block_k, tile.block_c, tile.block_v):
        assert size & (size - 1) == 0
    assert tile.block_k >= 16 and tile.block_v >= 16 and (tile.block_q == 1) == (queries == 1)
    assert queries == 1 or tile.block_q >= 16
    elements = 32 * tile.num_warps * 128 * 4 // itemsize
    assert max(tile.block_k, tile.block_q) * tile.block_v <= elements
    assert tile.block_c * tile.block_k * tile.block_q <= elements


def test_one_query_is_split_over_a_whole_gpu_and_many_are_not():
    tile = forward_tile(8, 1, 8192, 64, 4)
    assert 132 <= 8 * tile.num_splits <= 528
    assert forward_tile(64, 2048, 2048, 64, 4).num_splits == 1
    assert forward_tile(1, 1, 1, 64, 4).num_splits == 1


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("queries", [1, 2, 16, 17, 5000])
def test_tiles_of_the_backward(queries, itemsize):
    tile = backward_tile(queries, itemsize)
    assert tile.block_k >= 16 and tile.block_v >= 16 and (tile.block_q == 1) == (queries == 1)
    assert queries == 1 or tile.block_q >= 16
    assert tile.block_c * tile.block_k * tile.block_q <= 32 * tile.num_warps * 64 * 4 // itemsize
