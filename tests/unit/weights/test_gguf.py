"""GGUF files: blocks bit for bit, the container against hostile bytes, and whole tiny models."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import bert
from support.checkpoints import make_llama, make_qwen2
from support.encoder_support import pooled, run
from support.gguf_writer import container, tokenizer_metadata, write_gguf
from support.model_driver import Driver, Sequence
from support.tiny_tokenizers import sentencepiece, wordpiece
from tokenizers import Tokenizer as RawTokenizer
from torch import nn
from transformers import BertConfig, BertModel
from transformers.convert_slow_tokenizer import generate_merges

from sensorium import kernels
from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.gguf import describe, gguf_folder, gguf_in
from sensorium.checkpoint.gguf_file import BLOCK_TYPES, BlockType, read_gguf, read_gguf_set
from sensorium.checkpoint.gguf_tokenizer import chat_templates, tokenizer_of
from sensorium.cli.main import main
from sensorium.engine.loading import mapped_weight_bytes, mapped_weights
from sensorium.errors import CheckpointError
from sensorium.kernels import reference
from sensorium.kernels.cpu.blocks import MappedBlockLinear
from sensorium.kernels.cpu.native import fastest
from sensorium.kernels.reference import BlockLinear
from sensorium.kernels.reference.blocks import DECODERS, HALVES, LINES, are_numbers
from sensorium.kernels.reference.quantized import QuantizedLinear
from sensorium.models import loading
from sensorium.models.loading import load_model, packed_weights, weight_bytes
from sensorium.parallel.ranks import Span
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.weights import gguf as gguf_weights
from sensorium.weights.gguf import BlockCodes, read_gguf_tensors
from sensorium.weights.stored_codes import counted_from_zeros
from sensorium.weights.tensor_files import StoredTensor

PROMPT = [5, 300, 7, 42, 11, 17, 230, 8, 77, 19, 3]
TEXTS = [
    "Hello there, 1234 cats!",
    "naïve café\r\n\n  def f(x):\n\treturn x",
    "你好，世界。 Привет 🙂 \x00\x07",
    "<|im_start|>x</s>",
]
NIBBLES = "1063b6095caff24598eb3e81d4277acd"
GOLDEN = {
    "Q4_0": ("0038" + NIBBLES, {0: -4, 1: -2.5, 2: -1, 15: 2.5, 16: -3.5, 17: -1, 31: 2}),
    "Q4_1": ("003400bc" + NIBBLES, {0: -1, 1: -0.25, 15: 2.25, 16: -0.75, 31: 2}),
    "Q5_0": ("00b00fa533c0" + NIBBLES, {1: -0.375, 5: 0.125, 15: -1.625, 16: -0.125, 31: -1.5}),
    "IQ4_NL": ("1f25" + NIBBLES, {0: -2.5405426, 1: -1.30027771, 16: -2.08044434, 31: 1.06022644}),
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_blocks(kind: str) -> None:
    octets, expected = GOLDEN[kind]
    found = DECODERS[kind](torch.frombuffer(bytearray.fromhex(octets), dtype=torch.uint8)[None])
    for index, one in expected.items():
        assert found[0, index] == torch.tensor(one, dtype=torch.float32)


def hostile(change: Callable[[bytearray], None]) -> bytes:
    octets = bytearray(container({"general.architecture": "llama"}, {"a": ("F32", (2, 2), bytes(16))}))
    change(octets)
    return bytes(octets)


def put(at: int, layout: str, value: int) -> Callable[[bytearray], None]:
    return lambda octets: struct.pack_into(layout, octets, at, value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put(0, "<I", 0), "not a GGUF file"),
        (put(4, "<I", 1), "GGUF version 1"),
        (put(4, "<I", 3 << 24), "big-endian"),
        (put(8, "<Q", 1 << 60), "too many"),
        (put(16, "<Q", 1 << 60), "too many"),
        (put(24, "<Q", 1 << 62), "a text of"),
        (put(52, "<I", 77), "unknown type 77"),
        (put(56, "<Q", 1 << 62), "a text of"),
        (lambda octets: octets.__delitem__(slice(-20, None)), "cut short"),
        (lambda octets: octets.__delitem__(slice(40, None, 1)), "cut short"),
    ],
)
def test_hostile_files(tmp_path: Path, change: Callable[[bytearray], None], said: str) -> None:
    (tmp_path / "m.gguf").write_bytes(hostile(change))
    with pytest.raises(CheckpointError, match=said) as error:
        read_gguf(tmp_path / "m.gguf")
    assert "\n" not in error.value.message


ONE_TENSOR = {"token_embd.weight": ("F32", (2, 2), bytes(16))}


@pytest.mark.parametrize(
    ("name", "metadata", "said"),
    [
        ("m.gguf", {"general.architecture": "a\nb"}, "not supported"),
        ("m.gguf", {"general.architecture": "llama", "general.type": "a\nb"}, "not a model"),
        ("m.gguf", {"split.count": "x"}, "one of several parts"),
        ("m.gguf", {"split.count": [2, 2]}, "one of several parts"),
        ("m-00001-of-00001.gguf", {"split.no": [0, 0], "split.count": 1}, "not 0 of 1"),
        ("m-00001-of-00000.gguf", {}, "part 1 of 0"),
        (
            "m.gguf",
            {"general.architecture": "llama", "llama.attention.head_count": 1, "llama.block_count": 2**32 - 1},
            "states 4294967295 layers",
        ),
    ],
)
def test_mislabelled_files(tmp_path: Path, name: str, metadata: dict[str, Any], said: str) -> None:
    (tmp_path / name).write_bytes(container(metadata, ONE_TENSOR))
    with pytest.raises(CheckpointError, match=said) as error:
        describe(tmp_path / name)
    assert "\n" not in error.value.message


def test_what_a_file_says_stands_in_one_short_line(tmp_path: Path) -> None:
    """Control characters as escapes, long words cut."""
    metadata = {"general.architecture": "llama", "llama.block_count": 1, "llama.embedding_length": "x" * 5000}
    (tmp_path / "m.gguf").write_bytes(container(metadata, ONE_TENSOR))
    with pytest.raises(CheckpointError, match="embedding_length") as error:
        describe(tmp_path / "m.gguf")
    assert len(error.value.message) < 300
    assert CheckpointError("a\n\x1b\u2028").message == r"a\n\x1b\u2028"
    assert CheckpointError("a " + "b" * 5000).message == f"a {'b' * 100}…"


def test_types_that_are_not_served_say_what_to_make(tmp_path: Path) -> None:
    octets = bytearray(container({}, {"a": ("F32", (32, 8), bytes(1024))}))
    struct.pack_into("<I", octets, octets.index(b"a" + struct.pack("<IQQ", 2, 8, 32)) + 21, 17)
    (tmp_path / "m.gguf").write_bytes(octets)
    with pytest.raises(CheckpointError, match=r"'a' as IQ2_XS, not supported; .* anew with llama-quantize, as Q4_K_M"):
        read_gguf(tmp_path / "m.gguf")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="no file that can be mapped"):
        read_gguf(tmp_path / "m.gguf")


def test_more_rotated_than_a_head_has(tmp_path: Path) -> None:
    make_llama(tmp_path / "hub")
    more = {"llama.rope.dimension_count": 2**32 - 1}
    vocab = tokenizer_metadata(tmp_path / "hub", "gpt-2")
    write_gguf(tmp_path / "hub", tmp_path / "m.gguf", "F32", vocab, "llama", **more)
    with pytest.raises(CheckpointError, match="dimension_count"):
        describe(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"model": [1]}, "model must be one value"),
        ({"model": "gpt2", "pre": [1], "merges": ["a b"]}, "pre must be one value"),
        ({"model": "llama", "scores": [0.0]}, "token of 5000 characters"),
    ],
)
def test_mislabelled_tokenizers(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    metadata = {"tokenizer.ggml.tokens": ["a" * 5000], **{f"tokenizer.ggml.{key}": one for key, one in more.items()}}
    (tmp_path / "m.gguf").write_bytes(container({**metadata, "tokenizer.chat_templates": 5}, {}))
    file = read_gguf_set(tmp_path / "m.gguf")[0]
    assert chat_templates(file.metadata) == {}
    with pytest.raises(CheckpointError, match=said):
        tokenizer_of(file)


def logits(folder: Path) -> torch.Tensor:
    model = load_model(open_checkpoint(folder), dtype=torch.float32, device="cpu")
    driver = Driver(model)
    return driver.prefill(Sequence(PROMPT))


def test_a_set_of_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any part names the whole, and a load reads the header of each part once."""
    make_qwen2(tmp_path / "hub")
    vocabulary = tokenizer_metadata(tmp_path / "hub", "qwen2")
    write_gguf(tmp_path / "hub", tmp_path / "m.gguf", "F32", vocabulary, "qwen2", parts=3)
    part = tmp_path / "m-00002-of-00003.gguf"
    folder = gguf_folder(part, tmp_path / "cache")
    assert gguf_in(tmp_path) == tmp_path / "m-00001-of-00003.gguf"
    assert describe(part).parts == 3
    headers: list[str] = []

    def read(path: Path) -> Any:
        headers.append(path.name)
        return read_gguf(path)

    monkeypatch.setattr(gguf_weights, "read_gguf", read)
    assert torch.equal(logits(folder), logits(tmp_path / "hub"))
    assert headers == [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]


@torch.inference_mode()
def test_bert(tmp_path: Path) -> None:
    """transformers' states, pooled as the file says."""
    words = wordpiece()
    words.no_truncation()
    words.no_padding()
    tokens = [words.id_to_token(index) or "" for index in range(words.get_vocab_size())]
    config = BertConfig(**bert.SHAPE, vocab_size=len(tokens))
    oracle = bert.save(BertModel(config, add_pooling_layer=False), tmp_path / "hub")
    special = {token: index for index, token in enumerate(tokens) if token.startswith("[") and token.endswith("]")}
    spelled = [t if t in special else t[2:] if t.startswith("##") else "\u2581" + t for t in tokens]
    named = {"cls": "[CLS]", "seperator": "[SEP]", "unknown": "[UNK]", "padding": "[PAD]"}
    vocabulary = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": spelled,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        **{f"tokenizer.ggml.{name}_token_id": special[token] for name, token in named.items()},
    }
    more = {"bert.pooling_type": 1, "bert.attention.causal": False}
    write_gguf(tmp_path / "hub", tmp_path / "m.gguf", "F32", vocabulary, "bert", **more)
    folder = gguf_folder(tmp_path / "m.gguf", tmp_path / "cache")
    text = "What is shown in this picture? Einen schönen Tag"
    ids = torch.tensor(words.encode(text).ids)
    assert Tokenizer.from_folder(folder).encode(text, add_special_tokens=True) == ids.tolist()
    model = load_model(open_checkpoint(folder), dtype=torch.float32, device="cpu")
    states = run(model, [ids])[0]
    expected = oracle(ids[None]).last_hidden_state[0]
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)
    vector = nn.functional.normalize(expected.mean(0), dim=0)
    torch.testing.assert_close(pooled(model, "embed", states, ids), vector, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("Q4_0", "int4 in groups of 32, code for code, 4.5 bits a weight"),
        ("Q4_1", "the blocks as they are, 5 bits a weight"),
        ("Q8_0", "the blocks as they are, 8.5 bits a weight"),
    ],
)
def test_what_blocks_become(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, told: str) -> None:
    make_llama(tmp_path / "hub", hidden_size=64, intermediate_size=96)
    file = tmp_path / "m.gguf"
    write_gguf(tmp_path / "hub", file, kind, tokenizer_metadata(tmp_path / "hub", "gpt-2"), "llama")
    checkpoint = open_checkpoint(gguf_folder(file, tmp_path / "cache"))
    model = load_model(checkpoint, dtype=torch.float32, device="cpu")
    packed = model.get_submodule("model.layers.0.mlp.down_proj").packed
    (stored,) = [one for one in read_gguf_tensors([file]) if one.key == "model.layers.0.mlp.down_proj.weight"]
    meant = torch.cat([rows for _, rows in stored.pieces()])
    assert isinstance(packed, QuantizedLinear) and isinstance(packed, BlockLinear) == (kind != "Q4_0")
    assert torch.equal(packed.rows(torch.arange(64)), meant)
    assert main(["info", str(file)]) == 0
    said = capsys.readouterr().out
    assert "LlamaForCausalLM" in said and told in said


@pytest.mark.skipif(fastest() is None, reason="the native library is not built")
def test_info_tells_what_a_large_file_becomes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Q4_0, whose blocks are int4 in a small file alone; by what a load makes of both."""
    make_llama(tmp_path / "hub", hidden_size=64, intermediate_size=96)
    file = tmp_path / "m.gguf"
    write_gguf(tmp_path / "hub", file, "Q4_0", tokenizer_metadata(tmp_path / "hub", "gpt-2"), "llama")
    checkpoint = open_checkpoint(gguf_folder(file, tmp_path / "cache"))
    stored = sum(one.nbytes for one in read_gguf_tensors([file]))
    for least, said in ((stored, "the blocks as they are"), (stored + 1, "int4 in groups of 32")):
        for module in (kernels, loading):
            monkeypatch.setattr(module, "MAPPED_BYTES", least)
        model = load_model(checkpoint, dtype=torch.bfloat16, device="cpu", memory_mapped=True)
        packed = model.get_submodule("model.layers.0.mlp.down_proj").packed
        has_blocks = isinstance(packed, MappedBlockLinear)
        assert has_blocks == (said == "the blocks as they are" and kernels.maps_blocks("Q4_0", torch.bfloat16))
        assert main(["info", str(file)]) == 0
        assert (said if has_blocks else "int4 in groups of 32") in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_scale_that_is_no_number_is_named(tmp_path: Path, kind: str) -> None:
    """One bit of a file: of blocks that are kept, and of blocks that become codes."""
    make_llama(tmp_path / "hub", hidden_size=64, intermediate_size=96)
    file = tmp_path / "m.gguf"
    write_gguf(tmp_path / "hub", file, kind, tokenizer_metadata(tmp_path / "hub", "gpt-2"), "llama")
    (stored,) = [one for one in read_gguf_tensors([file]) if one.key == "model.layers.0.mlp.down_proj.weight"]
    assert isinstance(stored, BlockCodes)
    octets = bytearray(file.read_bytes())
    first = bytes(stored.parts["blocks"].view()[3].tolist())
    octets[octets.index(first) + 1] |= 0x7C
    file.write_bytes(octets)
    checkpoint = open_checkpoint(gguf_folder(file, tmp_path / "cache"))
    with pytest.raises(CheckpointError, match=r"tensor model.layers.0.mlp.down_proj.weight in m.gguf has a scale"):
        load_model(checkpoint, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("kind", [*HALVES, "MXFP4"])
def test_scales_that_are_no_numbers(kind: str) -> None:
    nbytes = {one.name: one.nbytes for one in BLOCK_TYPES.values()}[kind]
    blocks = torch.full((5, nbytes), 0x7B, dtype=torch.uint8)  # the largest finite scale
    assert are_numbers(kind, blocks) and bool(DECODERS[kind](blocks).isfinite().all())
    for at in [at + 1 for at in HALVES.get(kind, ())] or [0]:
        for octet in (0x7C, 0xFF) if kind != "MXFP4" else (0xFF,):
            damaged = blocks.clone()
            damaged[3, at] = octet
            assert not are_numbers(kind, damaged) and not bool(DECODERS[kind](damaged).isfinite().all())


MIXED = {"": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K"}  # what llama-quantize calls Q4_K_M


@torch.inference_mode()
def test_a_mixture_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are those of the numbers that the blocks say, and the same bits where the file is not copied; memory and
    what a step reads are the file's."""
    make_llama(tmp_path / "hub", hidden_size=256, intermediate_size=512, head_dim=64)
    file = tmp_path / "m.gguf"
    vocabulary = tokenizer_metadata(tmp_path / "hub", "gpt-2")
    write_gguf(tmp_path / "hub", file, MIXED, vocabulary, "llama")
    folder = gguf_folder(file, tmp_path / "cache")
    meant = {one.key: torch.cat([rows for _, rows in one.pieces()]) for one in read_gguf_tensors([file])}
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((tmp_path / "hub" / name).read_bytes())
    save_file({key: one.contiguous() for key, one in meant.items()}, tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "hub" / "model.safetensors")
    assert all((meant[key] - one).norm() < 0.1 * one.norm() for key, one in stored.items())
    expected = logits(tmp_path)
    assert (logits(folder) - expected).norm() < 0.02 * expected.norm()
    model = load_model(open_checkpoint(folder), dtype=torch.bfloat16, device="cpu")
    found = Driver(model, dtype=torch.bfloat16).prefill(Sequence(PROMPT))
    assert (found.float() - expected).norm() < 0.03 * expected.norm()
    assert weight_bytes(model) <= 1.05 * sum(one.nbytes for one in read_gguf_tensors([file]))
    monkeypatch.setattr(loading, "MAPPED_BYTES", 0)
    mapped = load_model(open_checkpoint(folder), dtype=torch.bfloat16, device="cpu", memory_mapped=True)
    assert torch.equal(Driver(mapped, dtype=torch.bfloat16).prefill(Sequence(PROMPT)), found)
    native = fastest()
    if native is not None and native.isa.startswith("avx512"):
        blocks = [one for one in read_gguf_tensors([file]) if isinstance(one, BlockCodes)]
        assert len(blocks) == 16 and sum(one.mapped_bytes for one in packed_weights(mapped)) == sum(
            one.nbytes for one in blocks
        )
        for weight in mapped_weights(mapped):
            weight.pack()
        assert mapped_weight_bytes(mapped) == 0
        assert torch.equal(Driver(mapped, dtype=torch.bfloat16).prefill(Sequence(PROMPT)), found)


@pytest.mark.parametrize("kind", LINES)
def test_lines_are_codes_counted_from_zeros(kind: str) -> None:
    """Random blocks, some of whose groups are one number; a weight moves by float16's part of its offset and scale."""
    size = {"Q4_1": 20, "Q4_K": 144}[kind]
    blocks = torch.randint(0, 256, (600, size), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    factors = torch.rand(600, 2, generator=torch.Generator().manual_seed(5)).mul(0.01).half()
    factors[:40, 0], factors[40:80, 1], factors[80:120] = 0, 0, factors[80:120] * 1e-3  # also what is hardly normal
    blocks[:, :4] = factors.view(torch.uint8)
    blocks[300:400, 4:8] = 0  # Q4_K's first scales
    codes, scales, offsets = LINES[kind](blocks)
    half_scales, zeros, is_constant = counted_from_zeros(scales, offsets)
    codes = codes.view(*scales.shape, 32).masked_fill(is_constant.unsqueeze(2), 1).float()
    found = (codes - zeros.float().unsqueeze(2)) * half_scales.float().unsqueeze(2)
    moved = (found.flatten(1) - DECODERS[kind](blocks)).view_as(codes).abs()
    sizes = (15 * scales.abs() + offsets.abs()).unsqueeze(2)
    assert is_constant.any() and (moved <= sizes / 1024).all()


def vocabulary(original: Any, kind: str, spelled: Callable[[str], str], **more: Any) -> bytes:
    """A file with nothing but a tokenizer, whose control tokens are the added ones."""
    count = original.get_vocab_size()
    added = original.get_added_tokens_decoder()
    tokens = [original.id_to_token(index) for index in range(count)]
    types = [3 if index in added else 6 if token.startswith("<0x") else 1 for index, token in enumerate(tokens)]
    ids = {f"tokenizer.ggml.{name}_token_id": original.token_to_id(token) for name, token in more.pop("named").items()}
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": [t if i in added else spelled(t) for i, t in enumerate(tokens)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [-float(index) for index in range(count)],
        **ids,
    }
    return container(metadata, {})


def test_other_tokenizers(tmp_path: Path) -> None:
    """SentencePiece's with all merges that its scores allow, as transformers makes them; WordPiece."""
    original = sentencepiece()
    stated = json.loads(original.to_str())
    normal = {t: i for t, i in original.get_vocab().items() if not t.startswith("<")}
    stated["model"]["merges"] = generate_merges(normal, {t: -float(i) for t, i in normal.items()})
    original = RawTokenizer.from_str(json.dumps(stated))
    named = {"unknown": "<unk>", "bos": "<s>", "eos": "</s>"}
    (tmp_path / "m.gguf").write_bytes(vocabulary(original, "llama", str, named=named))
    words = wordpiece()
    words.no_truncation()
    words.no_padding()
    named = {"cls": "[CLS]", "seperator": "[SEP]", "unknown": "[UNK]", "padding": "[PAD]"}

    def spelled(token: str) -> str:
        return token[2:] if token.startswith("##") else "\u2581" + token

    (tmp_path / "w.gguf").write_bytes(vocabulary(words, "bert", spelled, named=named))
    for name, expected in (("m", original), ("w", words)):
        own = RawTokenizer.from_str(tokenizer_of(read_gguf(tmp_path / f"{name}.gguf"))[0])
        for text in ("Hello there, 1234 cats!", "The  quick\n\tbrown", "\u4f60\u597d Привет 🙂 schönen Tag"):
            assert own.encode(text).ids == expected.encode(text).ids
            assert own.encode(text, text).ids == expected.encode(text, text).ids or name == "m"


def nothing() -> None:
    """Of memory that need not be read."""


@pytest.mark.parametrize(("kind", "bound"), [("Q4_0", 0.0), ("MXFP4", 0.0), ("Q4_1", 0.001), ("Q4_K", 0.001)])
def test_codes_where_there_are_no_blocks(kind: str, bound: float) -> None:
    """What a GPU's kernels take, put into the reference's layouts."""
    weights, nbytes = {one.name: (one.weights, one.nbytes) for one in BLOCK_TYPES.values()}[kind]
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 255, (40 * 512 // weights, nbytes), generator=generator, dtype=torch.uint8)
    if kind != "MXFP4":
        blocks[:, :4] = torch.rand(len(blocks), 2, generator=generator).half().view(torch.uint8)
    octets = blocks.view(40, -1)
    stored = StoredTensor(
        "a.weight", Path("m.gguf"), tuple(octets.shape), torch.uint8, lambda: octets, nothing, nothing
    )
    codes = BlockCodes("a.weight", stored, BlockType(kind, weights, nbytes))
    quantization = codes.quantization()
    assert quantization is not None and not quantization.blocks
    weight = reference.empty_quantized(40, 512, quantization, dtype=torch.float32, device=torch.device("cpu"))
    codes.put(weight, Span(0, 0, 40), quantization, with_zeros=not codes.is_symmetric())
    meant = torch.cat([rows for _, rows in codes.pieces()])
    found = weight.rows(torch.arange(40))
    assert (found - meant).norm() <= bound * meant.norm() if bound else torch.equal(found, meant)
