"""What LoRA adapters add to a linear layer, many of them in one launch: tokens are sorted by adapter, a tile of them
has one, and a table says where its matrices are.

A row of the table: address and rows of the narrow matrix, then of each part its address, first column, columns, first
row of the narrow matrix's that it takes, and how many (0: there is no such part).
"""

import triton
import triton.language as tl

COLUMNS = tl.constexpr(17)  # of the table: 2, and 5 for each of 3 parts


@triton.jit
def tile_of(tiles, BLOCK_M: tl.constexpr):
    """(adapter, sorted tokens, their end)"""
    tile = tiles + tl.program_id(0) * 3
    return tl.load(tile), tl.load(tile + 1) + tl.arange(0, BLOCK_M), tl.load(tile + 2)


@triton.jit
def matrix(address, dtype: tl.constexpr):
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit(do_not_specialize=["width"])
def narrow_product(
    x, order, tiles, table, out, size, stride, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [tokens, size] -> [sorted tokens, width], of which as many columns as the adapter has rows"""
    adapter, place, end = tile_of(tiles, BLOCK_M)
    rows = tl.load(table + adapter * COLUMNS + 1).to(tl.int32)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if tl.program_id(1) * BLOCK_N < rows:
        narrow = matrix(tl.load(table + adapter * COLUMNS), x.dtype.element_ty)
        token = tl.load(order + place, mask=place < end, other=0).to(tl.int64)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, size, BLOCK_K):
            at = start + tl.arange(0, BLOCK_K)
            some = tl.load(x + token[:, None] * stride + at[None, :],
                           mask=(place < end)[:, None] & (at < size)[None, :], other=0.0)  # fmt: skip
            part = tl.load(narrow + column[:, None] * size + at[None, :],
                           mask=(column < rows)[:, None] & (at < size)[None, :], other=0.0)  # fmt: skip
            acc = tl.dot(some, tl.trans(part), acc, input_precision="ieee")
        mask = (place < end)[:, None] & (column < rows)[None, :]
        tl.store(out + place.to(tl.int64)[:, None] * width + column[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["width", "blocks"])
def add_wide_product(
    inner, order, tiles, table, out, stride, width, blocks, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """To `out` [tokens, columns] of the parts' columns. Program k of the second axis has block k % blocks of part
    k / blocks."""
    adapter, place, end = tile_of(tiles, BLOCK_M)
    part = table + adapter * COLUMNS + 2 + (tl.program_id(1) // blocks) * 5
    columns, rank = tl.load(part + 2).to(tl.int32), tl.load(part + 4).to(tl.int32)
    column = (tl.program_id(1) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    if (rank > 0) & ((tl.program_id(1) % blocks) * BLOCK_N < columns):
        wide = matrix(tl.load(part), inner.dtype.element_ty)
        first, start = tl.load(part + 1).to(tl.int32), tl.load(part + 3).to(tl.int32)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for offset in range(0, rank, BLOCK_K):
            at = offset + tl.arange(0, BLOCK_K)
            some = tl.load(inner + place.to(tl.int64)[:, None] * width + start + at[None, :],
                           mask=(place < end)[:, None] & (at < rank)[None, :], other=0.0)  # fmt: skip
            own = tl.load(wide + column.to(tl.int64)[:, None] * rank + at[None, :],
                          mask=(column < columns)[:, None] & (at < rank)[None, :], other=0.0)  # fmt: skip
            acc = tl.dot(some, tl.trans(own), acc, input_precision="ieee")
        token = tl.load(order + place, mask=place < end, other=0).to(tl.int64)
        to = out + token[:, None] * stride + first + column[None, :]
        mask = (place < end)[:, None] & (column < columns)[None, :]
        acc += tl.load(to, mask=mask, other=0.0).to(tl.float32)
        tl.store(to, acc.to(out.dtype.element_ty), mask=mask)
