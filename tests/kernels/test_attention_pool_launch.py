"""Launch configurations of attention pooling: tiles fit, hops and rows are covered, bags fill a GPU and no more."""

from hypothesis import given
from hypothesis import strategies as st

from daam_kernels.kernels import attention_pool_launch as launches


@given(
    bags=st.integers(1, 100_000),
    longest=st.integers(0, 10_000_000),
    hops=st.integers(1, 300),
    embed_dim=st.integers(1, 40_000),
    itemsize=st.sampled_from([2, 4, 8]),
    gradient=st.booleans(),
)
def test_tiles_fit_and_cover(bags, longest, hops, embed_dim, itemsize, gradient):
    found = launches.pool_launch(
        bags, longest, hops, embed_dim, (longest * embed_dim, embed_dim), itemsize, gradient=gradient
    )
    assert found.block_e * (found.column_blocks - 1) < embed_dim <= found.block_e * found.column_blocks
    for size in (found.block_e, found.block_h, found.block_t, found.num_warps):
        assert size & (size - 1) == 0
    elements = 8192 if itemsize < 8 else 2048
    assert found.block_e * found.block_h * found.block_t <= elements and 1 <= found.num_warps <= 8
    assert gradient or found.hop_blocks * found.block_h >= hops > (found.hop_blocks - 1) * found.block_h
    assert not gradient or found.hop_blocks == found.block_h == 1  # it takes them one by one
    assert found.vec * itemsize <= 16 and embed_dim % found.vec == 0
    programs = bags * found.hop_blocks * found.column_blocks
    assert found.num_chunks == 1 or (found.num_chunks - 1) * programs < launches.PROGRAMS
    assert (found.num_chunks - 1) * found.block_t * 4 < max(1, longest)  # a chunk of the longest bag has rows


def test_long_rows_are_cut_into_columns():
    for embed_dim, itemsize, blocks in ((8192, 2, 1), (8192, 4, 1), (8193, 4, 9), (2048, 8, 1), (2049, 8, 9)):
        found = launches.pool_launch(1, 100, 1, embed_dim, (embed_dim,), itemsize)
        assert (found.column_blocks, found.whole) == (blocks, blocks == 1)
    found = launches.pool_launch(1, 100, 9, 64, (64,), 4)
    assert (found.hop_blocks, found.whole) == (2, False)


@given(
    bags=st.integers(1, 100_000),
    longest=st.integers(0, 10_000_000),
    hops=st.integers(1, 40),
    hidden=st.integers(1, 300),
    embed_dim=st.integers(1, 10_000),
    sizes=st.sampled_from([(2, 2), (2, 4), (4, 4), (8, 8)]),
)
def test_tiles_of_hidden_layers(bags, longest, hops, hidden, embed_dim, sizes):
    tile = launches.hidden_launch(hidden, embed_dim, (embed_dim,), sizes[1])
    for size in (tile.block_t, tile.block_c, tile.block_k):
        assert size >= 16 and size & (size - 1) == 0  # what tl.dot takes
    assert tile.block_t * tile.block_c <= 32 * 32 * (4 if tile.block_c <= 32 else 8)
    assert tile.block_c >= min(hidden, 32)
    assert tile.block_t == 16 or tile.block_t * embed_dim * sizes[1] <= 2**18  # what is read again stays in the cache
    found = launches.hidden_pool_launch(bags, longest, hops, hidden, embed_dim, (embed_dim,), *sizes)
    if found is not None:
        rows = found.rows
        assert rows.whole and rows.hop_blocks == 1 and 8 >= rows.block_h >= hops
        assert rows.block_e * rows.block_h * rows.block_t <= (8192 if sizes[0] < 8 else 2048)
        assert found.hidden.block_t % rows.block_t == 0 and rows.num_warps == 8
        assert embed_dim % rows.vec == 0 and rows.vec * sizes[0] <= 16
        assert (rows.num_chunks - 1) * bags < launches.PROGRAMS
        assert (rows.num_chunks - 1) * tile.block_t * 4 < max(1, longest)


def test_what_is_swept_with_its_hidden_layer():
    def fits(hops, hidden, embed_dim, itemsize):
        return (
            launches.hidden_pool_launch(3, 500, hops, hidden, embed_dim, (embed_dim,), itemsize, itemsize) is not None
        )

    for itemsize, elements in ((2, 8192), (4, 8192), (8, 2048)):
        assert fits(1, 1024, elements, itemsize) and not fits(1, 256, elements + 1, itemsize)
        most = min(8, elements // 512)
        assert fits(most, 128, 512, itemsize) and not fits(most + 1, 128, 512, itemsize)


@given(
    bags=st.integers(1, 100_000),
    longest=st.integers(0, 10_000_000),
    hops=st.integers(1, 300),
    hidden=st.none() | st.integers(1, 2000),
    embed_dim=st.integers(1, 100_000),
    sizes=st.sampled_from([(2, 2), (2, 4), (4, 4), (8, 8)]),
    gradient=st.booleans(),
)
def test_tiles_of_wide_sweeps(bags, longest, hops, hidden, embed_dim, sizes, gradient):
    found = launches.wide_pool_launch(bags, longest, hops, hidden, embed_dim, (embed_dim,), *sizes, gradient)
    for size in (found.block_e, found.block_h, found.block_s, found.block_t, found.block_k):
        assert size > 0 and size & (size - 1) == 0
    assert found.block_s % found.block_t == 0 and found.block_t <= 32  # more are products of a warpgroup
    cached = found.block_s * embed_dim * sizes[0]  # what is read again
    assert cached <= 2**17 or found.block_s == (1 if hidden is None else found.block_t)
    assert hidden is None or found.block_t == (32 if 32 * embed_dim * sizes[1] <= 2**18 and embed_dim % 2 == 0 else 16)
    if found.block_t < 16:  # tl.dot takes 16 of every size
        assert hidden is None and found.block_h <= 8
        assert found.block_e * found.block_h * found.block_t <= (8192 if sizes[0] < 8 else 2048)
    else:
        assert 16 <= found.block_h <= 32 and 16 <= min(found.block_e, found.block_k) and found.block_e <= 64
    assert hidden is None or (found.block_t, found.block_k) == (found.hidden.block_t, found.hidden.block_k)
    assert hidden is None or 16 <= found.hidden.block_c <= 64
    assert found.hop_blocks == (1 if gradient else -(-hops // found.block_h))
    assert embed_dim % found.vec == 0 and found.vec * sizes[0] <= 16
    assert found.num_chunks == 1 or (found.num_chunks - 1) * bags * found.hop_blocks < launches.PROGRAMS
    # a chunk's sums are small beside its rows
    assert (found.num_chunks - 1) * max(4 * found.block_t, found.block_s, 8 * hops) < max(1, longest)


@given(
    bags=st.integers(1, 10_000),
    longest=st.integers(1, 1_000_000),
    hops=st.integers(1, 300),
    hidden=st.integers(1, 2000),
    layers=st.integers(1, 2),
    embed_dim=st.integers(1, 10_000),
    sizes=st.sampled_from([(2, 2), (2, 4), (4, 4), (8, 8)]),
)
def test_backward_sweeps_of_hidden_layers(bags, longest, hops, hidden, layers, embed_dim, sizes):
    rows = bags * longest
    found = launches.hidden_gradient_launch(bags, longest, rows, hops, hidden, layers, embed_dim, (embed_dim,), *sizes)
    tile, kept = found.hidden, layers * hidden + (0 if found.whole else hidden + hops)
    assert found.whole == (hops <= 8 and hidden <= (32 if sizes[1] == 8 else 128))
    if found.whole:
        assert found.block_h >= hops and tile.block_c >= hidden and found.block_h * tile.block_c <= 1024
    else:
        assert 16 <= found.block_h <= 32 and 16 <= tile.block_c <= 64 and tile.block_t <= 32
    assert found.block_r * found.block_s <= (8192 if sizes[0] < 8 else 2048) and 16 <= found.block_e <= found.block_s
    assert found.block_u * found.unit_blocks >= layers * hidden and found.block_s * found.column_blocks >= embed_dim
    assert found.segment_rows * kept <= 2**23 and (found.num_chunks - 1) * tile.block_t * 4 < longest
    assert found.segment_rows == rows or found.segment_rows % tile.block_t == 0
    assert found.sum_blocks * found.rows_each >= found.segment_rows
    sums = found.sum_blocks * layers * hidden  # of rows as long as x's: small beside x
    assert found.sum_blocks == 1 or sums * 4 <= found.segment_rows * layers
    assert found.sum_blocks == 1 or found.sum_blocks * hops * 4 <= found.segment_rows


def test_few_long_bags_are_cut_and_many_are_not():
    sizes = (8192 * 512, 512)
    assert launches.pool_launch(1, 100_000, 1, 512, sizes, 2).num_chunks == 528
    assert launches.pool_launch(16, 100_000, 1, 512, sizes, 2).num_chunks == 33
    assert launches.pool_launch(528, 100_000, 1, 512, sizes, 2).num_chunks == 1
    assert launches.pool_launch(1, 64, 1, 512, sizes, 2).num_chunks == 1
    assert launches.pool_launch(1, 64, 1, 512, (1, 511), 2).vec == 1
