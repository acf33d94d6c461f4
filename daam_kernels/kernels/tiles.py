"""Where the density kernels' slices and tiles lie, and what of them is valid, in functions of Triton.

A tile is [BLOCK_R, BLOCK_S]: elements of a slice along the first axis, slices of one head along the second; numbers
per slice are [BLOCK_S]. Offsets are 64 bits wide.
"""

import triton
import triton.language as tl
from triton import knobs


@triton.jit
def head_span(head, num_heads, chunk, length, COLUMNS: tl.constexpr, VEC: tl.constexpr):
    """(first row, number of rows) of a head along R, in elements; the last head takes the remainder.

    Sizes along the contiguous axis come divided by VEC and are multiplied here, which tells the compiler what divides
    them.
    """
    start = head.to(tl.int64) * chunk
    count = tl.where(head == num_heads - 1, length - start, chunk)
    if not COLUMNS:
        start = start * VEC
        count = count * VEC
    return start, count


@triton.jit
def slice_coordinates(block, outer, inner, COLUMNS: tl.constexpr, VEC: tl.constexpr, BLOCK_S: tl.constexpr):
    """(position in outer, position in inner, is inside) of the slices of a block."""
    lane = tl.arange(0, BLOCK_S)
    if COLUMNS:
        width = inner * VEC
        blocks = tl.cdiv(width, BLOCK_S)
        o = (block // blocks).to(tl.int64)
        i = (block % blocks).to(tl.int64) * BLOCK_S + lane
        inside = (i < width) & (o < outer)
    else:
        s = block.to(tl.int64) * BLOCK_S + lane
        o = s // inner
        i = s % inner
        inside = o < outer
    return o, i, inside


@triton.jit
def program_slices(
    cu_seqlens_ptr, num_heads, chunk, length, outer, inner,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """What a program works on: (head, block of slices, first row, rows, and of each slice: position in outer, in
    inner, whether it is inside).

    With ``cu_seqlens_ptr`` outer counts sequences packed along R, and a block has slices of one of them, rows too.
    """
    head = tl.program_id(0) % num_heads
    block = tl.program_id(0) // num_heads
    if cu_seqlens_ptr is None:
        start, n = head_span(head, num_heads, chunk, length, COLUMNS, VEC)
        o, i, inside = slice_coordinates(block, outer, inner, COLUMNS, VEC, BLOCK_S)
    else:  # VEC is 1 in rows, so both ways of counting in units of it are the same
        o, i, inside = slice_coordinates(block, outer, inner, True, VEC, BLOCK_S)
        begin = tl.load(cu_seqlens_ptr + o).to(tl.int64)
        own = tl.load(cu_seqlens_ptr + o + 1).to(tl.int64) - begin
        start, n = head_span(head, num_heads, own // num_heads, own, True, VEC)
        start += begin
    return head, block, start, n, o, i, inside


@triton.jit
def slice_number(o, i, head, outer, inner, COLUMNS: tl.constexpr, VEC: tl.constexpr):
    """Where numbers per slice are stored: counted through heads, then outer and inner, so that it does not matter
    which axes are outer: the incoming gradient may ask for another split of them than the forward pass took."""
    return (head.to(tl.int64) * outer + o) * inner * (VEC if COLUMNS else 1) + i


@triton.jit
def slice_offsets(o, i, start, stride_o, stride_r, stride_i, COLUMNS: tl.constexpr, VEC: tl.constexpr):
    """Offsets, in elements, of the first row of each slice."""
    return o * stride_o * VEC + start * stride_r * (VEC if COLUMNS else 1) + i * stride_i * (1 if COLUMNS else VEC)


@triton.jit
def tile_offsets(base, r, stride_r, COLUMNS: tl.constexpr, VEC: tl.constexpr):
    """Offsets, in elements, of rows r of the slices that start at base."""
    return r.to(tl.int64)[:, None] * stride_r * (VEC if COLUMNS else 1) + base[None, :]


@triton.jit
def rows_within(r, n, inside, WHOLE: tl.constexpr):
    """Which elements of a tile are in a slice of n rows; all of them where every tile is WHOLE, which costs nothing."""
    if WHOLE:
        within = tl.full([r.shape[0], inside.shape[0]], True, tl.int1)
    else:
        within = (r < n)[:, None] & inside[None, :]
    return within


@triton.constexpr_function
def takes_ptx():
    """Whether the target takes assembly for NVIDIA's GPUs; the interpreter does not, whatever GPU is beside it."""
    target = None if knobs.runtime.interpret else tl.target_info.current_target()
    return target is not None and target.backend == "cuda"


@triton.jit
def widen(values, ACC: tl.constexpr):
    """Values in the arithmetic type."""
    if values.dtype == tl.bfloat16 and ACC == tl.float32 and takes_ptx():
        # Two of them are a register's halves, and an instruction makes a float32 of each; the compiler takes three.
        wide = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [values], tl.float32, is_pure=True, pack=2
        )
    else:
        wide = values.to(ACC)
    return wide


@triton.jit
def load_tile(ptr, base, r, stride_r, within, COLUMNS: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr):
    """Rows r of the slices that start at base, in the arithmetic type; 0 outside."""
    return widen(tl.load(ptr + tile_offsets(base, r, stride_r, COLUMNS, VEC), mask=within, other=0.0), ACC)


@triton.jit
def find_valid(x, inside, mask_ptr, mask_base, r, mask_stride_r, PADDING: tl.constexpr, HAS_MASK: tl.constexpr):
    """Which elements of a tile are not padding. The mask's strides are never divided by VEC."""
    valid = inside
    if PADDING is not None:
        valid = valid & (x != PADDING)
    if HAS_MASK:
        at = r.to(tl.int64)[:, None] * mask_stride_r + mask_base[None, :]
        valid = valid & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
    return valid


@triton.jit
def first_valid(ptr, base, valid, r, stride_r, BLOCK_R: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr):
    """The value of each slice's first valid element in a tile whose rows are r, 0 where it has none."""
    lane = tl.arange(0, BLOCK_R)
    first = tl.min(tl.where(valid, lane[:, None], BLOCK_R), axis=0)
    row = first.to(tl.int64) + tl.min(r, axis=0)
    at = base + row * stride_r * (VEC if COLUMNS else 1)
    return tl.load(ptr + at, mask=first < BLOCK_R, other=0.0)


@triton.jit
def load_slices(
    x_ptr, base, stride_r, mask_ptr, mask_base, mask_stride_r, r, n, inside,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(x, which elements are in their slice, which are no padding, which the densities are summed over) of rows r."""
    within = rows_within(r, n, inside, WHOLE)
    x = load_tile(x_ptr, base, r, stride_r, within, COLUMNS, VEC, ACC)
    valid = within
    if PADDED:
        valid = find_valid(x, within, mask_ptr, mask_base, r, mask_stride_r, PADDING, HAS_MASK)
    return x, within, valid, valid if EXCLUDE else within


@triton.jit
def first_of_run(
    ptr, base, stride_r, x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, first, tiles, n, inside,
    PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PADDED: tl.constexpr,
    COLUMNS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The value at ``ptr`` of each slice's first valid element from row ``first`` on, 0 where ``tiles`` have none."""
    if PADDED:
        found = tl.zeros([inside.shape[0]], ACC)
        missing = inside
        t = 0
        while (t < tiles) & (tl.max(missing.to(tl.int32), axis=0) > 0):
            r = first + t * BLOCK_R + tl.arange(0, BLOCK_R)
            _, _, valid, _ = load_slices(
                x_ptr, x_base, x_stride_r, mask_ptr, mask_base, mask_stride_r, r, n, inside,
                PADDING, HAS_MASK, PADDED, True, COLUMNS, VEC, WHOLE, ACC,
            )  # fmt: skip
            value = first_valid(ptr, base, valid, r, stride_r, BLOCK_R, COLUMNS, VEC).to(ACC)
            present = tl.max(valid.to(tl.int32), axis=0) > 0
            found = tl.where(missing & present, value, found)
            missing = missing & (present == 0)
            t += 1
    else:
        at = base + first * stride_r * (VEC if COLUMNS else 1)
        found = tl.load(ptr + at, mask=inside & (first < n), other=0.0).to(ACC)
    return found


@triton.jit
def parameter_number(head, i, inner, COLUMNS: tl.constexpr, VEC: tl.constexpr):
    """Where the parameters [heads, inner] of the per-feature Gaussian are for slices at i in inner."""
    return head.to(tl.int64) * inner * (VEC if COLUMNS else 1) + i


@triton.jit
def store_rounded(pointers, values, mask):
    """Store float64 values in the pointers' type; to bfloat16 by way of float32, as every backend of Triton can."""
    element_type: tl.constexpr = pointers.dtype.element_ty
    if element_type == tl.bfloat16:
        values = values.to(tl.float32)
    tl.store(pointers, values.to(element_type), mask=mask)
