"""GGUF's blocks as weights: the native kernels, the reference, and what the blocks say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sensorium import kernels as dispatcher
from sensorium.checkpoint.gguf_config import kept_bytes
from sensorium.checkpoint.gguf_file import BLOCK_TYPES
from sensorium.kernels import Blocks, Quantization, reference
from sensorium.kernels.backend import BLOCK_FORMS, MappedBlocks
from sensorium.kernels.cpu.blocks import BlockLinear, MappedBlockLinear
from sensorium.kernels.cpu.native import Native
from sensorium.kernels.reference.block_linear import decoded
from sensorium.kernels.reference.quantized import round_activations

BF16, CPU = torch.bfloat16, torch.device("cpu")
HALVES = {"Q3_K": (108,), "Q6_K": (208,)} | {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "NF4", "FP4"), (0,)),
    "Q2_K": (80, 82),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
}
"""Where a block has its float16 numbers."""


def random_blocks(kind: str, rows: int, size: int) -> Tensor:
    """Any bytes, but for scales that are numbers."""
    form = BLOCK_FORMS[kind]
    blocks = torch.randint(0, 256, (rows * size // form.weights, form.nbytes), dtype=torch.uint8)
    for at in HALVES[kind]:
        blocks[:, at : at + 2] = (torch.randn(len(blocks), 1) / 50).half().view(torch.uint8)
    return blocks.view(rows, -1)


def both(kernels: Native, size: int, blocks: Blocks, bias: Tensor | None = None) -> tuple[BlockLinear, Tensor]:
    """A native weight, filled in uneven parts, and the numbers that the blocks say."""
    out = sum(rows for rows, _ in blocks)
    native = kernels.empty_blocks(out, size, blocks)
    plain = reference.empty_blocks(out, size, blocks, dtype=torch.float32, device=CPU)
    first = 0
    for rows, kind in blocks:
        octets = random_blocks(kind, rows, size)
        for start, stop in ((0, rows // 3), (rows // 3, rows // 2), (rows // 2, rows)):
            if start < stop:
                native.fill_blocks(first + start, octets[start:stop])
        plain.fill_blocks(first, octets)
        first += rows
    native.set_bias(bias)
    return native, plain.rows(torch.arange(out))


def check(native: BlockLinear, weight: Tensor, bias: Tensor, rows: int) -> None:
    """The product of what activations become, and of a row by itself the same bits."""
    x = torch.randn(rows, weight.shape[1]).to(BF16)
    together = native(x, torch.float32)
    expected = round_activations(x, 32).double() @ weight.double().T + bias.double()
    size = (round_activations(x, 32).double().abs() @ weight.double().abs().T).amax()
    torch.testing.assert_close(together.double(), expected, rtol=0, atol=1e-5 * size.item())
    assert torch.equal(native(x), together.to(BF16))
    for row in range(0, rows, 5):
        assert torch.equal(native(x[row : row + 1], torch.float32)[0], together[row])


@pytest.mark.parametrize("kind", BLOCK_FORMS)
def test_native_is_what_the_blocks_say(kernels: Native, kind: str) -> None:
    """Bit for bit, and multiplied with rounding of activations alone."""
    whole = BLOCK_FORMS[kind].weights
    for out, size, counts in (
        (70, whole, (13,)),
        (33, 3 * whole, (1, 2, 8, 26)),
        (1, 9 * 32 if whole == 32 else 512, (1,)),
    ):
        bias = torch.randn(out)
        native, weight = both(kernels, size, ((out, kind),), bias)
        assert torch.equal(native.rows(torch.arange(out)), weight.to(BF16))
        for rows in counts:
            check(native, weight, bias, rows)


@pytest.mark.parametrize("kind", BLOCK_FORMS)
def test_mapped_blocks_are_packed_ones(kernels: Native, kind: str) -> None:
    """To the last bit, in as many rows as either way takes, of rows that lie anywhere and panels that are not whole."""
    whole = BLOCK_FORMS[kind].weights
    size, out = 3 * whole, 101
    octets = random_blocks(kind, out, size)
    odd = torch.empty(7 + 2 * octets.nbytes, dtype=torch.uint8)[7:].view(out, -1)[:, : octets.shape[1]]  # unaligned
    odd.copy_(octets)
    released: list[int] = []
    parts = [
        MappedBlocks(0, kind, octets[:40], lambda: released.append(0)),
        MappedBlocks(40, kind, odd[40:], lambda: released.append(40)),
    ]
    mapped, packed = MappedBlockLinear(kernels, out, size, parts), kernels.empty_blocks(out, size, ((out, kind),))
    packed.fill_blocks(0, octets)
    ids = torch.tensor([0, 100, 40, 31])
    assert torch.equal(mapped.rows(ids), packed.rows(ids))
    assert mapped.mapped_bytes == octets.nbytes
    for copied in (False, True):
        for rows in (1, 3, 7, 20):
            x = torch.randn(rows, size).to(BF16)
            assert torch.equal(mapped(x, torch.float32), packed(x, torch.float32))
        assert released == ([0, 40] if copied else [])
        mapped.pack()
    octets.zero_(), odd.zero_()
    assert mapped.mapped_bytes == 0 and mapped.nbytes == packed.nbytes
    assert torch.equal(mapped(x, torch.float32), packed(x, torch.float32))
    assert torch.equal(mapped.rows(ids), packed.rows(ids))


def test_mapped_blocks_of_several_kinds(fastest: Native) -> None:
    """Segments change where kinds do; what the kernels do not take at memory's speed is left to be packed."""
    blocks = ((40, "Q4_K"), (7, "Q6_K"), (33, "Q5_K"), (64, "Q8_0"), (5, "Q4_0"))
    first, parts, packed = 0, [], fastest.empty_blocks(149, 512, blocks)
    for rows, kind in blocks:
        octets = random_blocks(kind, rows, 512)
        packed.fill_blocks(first, octets)
        parts.append(MappedBlocks(first, kind, octets))
        first += rows
    mapped = fastest.mapped_blocks(parts[::-1], 149, 512)
    if not fastest.isa.startswith("avx512"):
        assert mapped is None
        return
    assert mapped is not None
    for count in (1, 8, 30):
        x = torch.randn(count, 512).to(BF16)
        assert torch.equal(mapped(x), packed(x))
    assert fastest.mapped_blocks([MappedBlocks(0, "Q2_K", random_blocks("Q2_K", 8, 512))], 8, 512) is None
    for broken in (
        [MappedBlocks(1, "Q8_0", random_blocks("Q8_0", 8, 512))],
        [MappedBlocks(0, "Q8_0", random_blocks("Q8_0", 9, 512))],
        [MappedBlocks(0, "Q8_0", random_blocks("Q8_0", 4, 512))],
        [MappedBlocks(0, "Q8_0", random_blocks("Q8_0", 8, 480))],
    ):
        with pytest.raises(ValueError, match=r"rows|blocks of 4 rows"):
            fastest.mapped_blocks(broken, 8, 512)
    with pytest.raises(TypeError, match="cannot be filled"):
        mapped.fill(0, torch.zeros(8, 512))


def test_rows_of_several_kinds(kernels: Native) -> None:
    """Each kind with panels of its own, whose last columns are not all there."""
    blocks = ((40, "Q4_K"), (7, "Q6_K"), (33, "Q5_K"), (1, "IQ4_XS"), (64, "Q8_0"))
    bias = torch.randn(145)
    native, weight = both(kernels, 512, blocks, bias)
    ids = torch.tensor([144, 0, 40, 46, 39, 80, 47, 81])
    assert torch.equal(native.rows(ids), weight[ids].to(BF16))
    for rows in (1, 5, 20):
        check(native, weight, bias, rows)


@pytest.mark.parametrize("gates", [256, 280])
def test_gates_and_ups_in_one(kernels: Native, gates: int) -> None:
    """As many rows as make the product and the gating one loop, where ups begin with a panel, and where not."""
    gate_up, _ = both(kernels, 256, ((gates, "Q4_K"), (512 - gates, "Q6_K")))
    down, _ = both(kernels, 256, ((256, "Q8_0"),))
    experts = kernels.experts([gate_up], [down], "silu")
    assert experts is not None
    x = torch.randn(40, 256).to(BF16)
    found = experts(x, torch.zeros(40, 1, dtype=torch.int64), torch.ones(40, 1))
    assert torch.equal(found, down(kernels.gated(gate_up(x), "silu")))


def test_the_reference_computes_the_same(fastest: Native) -> None:
    native, _ = both(fastest, 256, ((20, "Q5_K"), (9, "Q3_K")))
    torch.manual_seed(7)
    plain = reference.empty_blocks(29, 256, ((20, "Q5_K"), (9, "Q3_K")), dtype=torch.float32, device=CPU)
    plain.fill_blocks(0, random_blocks("Q5_K", 20, 256))
    plain.fill_blocks(20, random_blocks("Q3_K", 9, 256))
    assert torch.equal(plain.rows(torch.arange(29)).to(BF16), native.rows(torch.arange(29)))
    x = torch.randn(3, 256).to(BF16)
    torch.testing.assert_close(plain(x.float()), native(x, torch.float32), rtol=1e-4, atol=1e-3)


def test_results_do_not_depend_on_the_number_of_threads(kernels: Native) -> None:
    native, _ = both(kernels, 768, ((1000, "Q6_K"),))
    x, threads, found = torch.randn(50, 768).to(BF16), kernels.threads, []
    for count in (1, 3):
        kernels.set_threads(count)
        found.append((native(x), native(x[:1])))
    kernels.set_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("kind", [kind for kind in BLOCK_FORMS if kind not in ("NF4", "FP4")])  # none of GGUF's
def test_memory(fastest: Native, kind: str) -> None:
    """That of the file, but for scales of six bits, which take bytes: within 3.2 %, of two and three bits more."""
    stored = next(one for one in BLOCK_TYPES.values() if one.name == kind)
    assert (stored.weights, stored.nbytes) == (BLOCK_FORMS[kind].weights, BLOCK_FORMS[kind].nbytes)
    native = fastest.empty_blocks(64, 512, ((64, kind),))
    assert native.nbytes == 64 * 512 * kept_bytes(kind)
    assert native.nbytes <= 64 * 512 * stored.nbytes / stored.weights * (2 if kind in ("Q2_K", "Q3_K") else 1.032)


def test_what_it_does_not_take(fastest: Native) -> None:
    for weight in (
        fastest.empty_blocks(40, 256, ((8, "Q4_K"), (32, "Q6_K"))),
        reference.empty_blocks(40, 256, ((8, "Q4_K"), (32, "Q6_K")), dtype=BF16, device=CPU),
    ):
        with pytest.raises(TypeError, match="blocks as they are stored"):
            weight.fill(0, torch.zeros(8, 256))
        with pytest.raises(ValueError, match="do not fit"):
            weight.fill_blocks(4, random_blocks("Q4_K", 8, 256))
        with pytest.raises(ValueError, match="do not fit"):
            weight.fill_blocks(0, random_blocks("Q6_K", 8, 256))
    with pytest.raises(ValueError, match="do not fill rows of 96"):
        fastest.empty_blocks(40, 96, ((40, "Q4_K"),))
    with pytest.raises(ValueError, match="other rows than 41"):
        fastest.empty_blocks(41, 256, ((40, "Q4_K"),))
    made = dispatcher.empty_linear(8, 32, dtype=BF16, device=CPU, quantization=Quantization(8, blocks=((8, "Q8_0"),)))
    assert isinstance(made, BlockLinear)
    assert decoded("Q8_0", random_blocks("Q8_0", 8, 32), 32).shape == (8, 32)
