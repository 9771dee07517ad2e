"""A recording through /v1/audio/transcriptions and through faster-whisper, in turn: how much faster than it was spoken.

    python benchmarks/transcription.py --peer PYTHON [--seconds 600] [--rounds 3] [--dtype float32] [--threads 2]

The checkpoint is made first: Whisper's shape, random weights, but for the decoder's positions, which say a fixed text
of `--tokens` tokens in every window and then end it. So both sides do the same work, but for two words a window that
CTranslate2 says more: it takes the checkpoint for an English one, whose prompt is that much shorter. Both are up at the
same time and idle but for the one whose turn it is. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import TypeAlias

import httpx
import numpy as np
import torch
from compare import lists_models, running, until
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.models.whisper.tokenization_whisper import LANGUAGES

OURS = f"{shlex.quote(sys.executable)} -m sensorium serve {{model}} --port {{port}} --threads {{threads}} {{dtype}}"
FLAGS = {
    "float32": "--dtype float32",
    "int8": "--dtype bfloat16 --quantization int8 --quantize-towers",  # beside float32, torch alone multiplies int8
}
PEER = Path(__file__).with_name("transcription_peer.py")
SHAPES = {
    "nano": (64, 1, 1),
    "tiny": (384, 4, 6),
    "base": (512, 6, 8),
    "small": (768, 12, 12),
    "medium": (1024, 24, 16),
}
TEXT_TOKENS, RATE, WINDOW_S = 50257, 16_000, 30
FIRST = 3  # position whose state says a window's first token: behind start, language, task and notimestamps
LOUDNESS = 400.0  # of positions, beside everything that the random layers add

Side: TypeAlias = Callable[[Path], tuple[float, str]]  # a file -> seconds, text


# The checkpoint and the recording


def vocabulary() -> tuple[list[str], list[str]]:
    """(text tokens, control tokens), as multilingual Whisper numbers them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġw{number}" for number in range(TEXT_TOKENS - len(letters))]
    languages = [f"<|{code}|>" for code in list(LANGUAGES)[:99]]
    tasks = [
        f"<|{name}|>" for name in ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")
    ]
    times = [f"<|{number * 0.02:.2f}|>" for number in range(1501)]
    return letters + words, ["<|endoftext|>", "<|startoftranscript|>", *languages, *tasks, *times]


def write_tokenizer(folder: Path) -> dict[str, int]:
    text, controls = vocabulary()
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(text)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "WhisperTokenizerFast", **names}))
    return {token: TEXT_TOKENS + index for index, token in enumerate(controls)}


def make_checkpoint(folder: Path, shape: str, tokens: int) -> None:
    folder.mkdir()
    ids = write_tokenizer(folder)
    size, layers, heads = SHAPES[shape]
    ends = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), ids["<|endoftext|>"])
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", layers), ("attention_heads", heads), ("ffn_dim", 4 * size))
    }
    start = ids["<|startoftranscript|>"]
    vocab_size = TEXT_TOKENS + len(ids)
    config = WhisperConfig(vocab_size=vocab_size, d_model=size, decoder_start_token_id=start, **sides, **ends)
    torch.manual_seed(1)
    model = WhisperForConditionalGeneration(config).eval().requires_grad_(False)
    decoder = model.model.decoder
    decoder.embed_tokens.weight[ids["<|endoftext|>"]].normal_(std=0.02)  # zeros, as it is the padding, too
    said = [*torch.randint(1000, TEXT_TOKENS, (tokens,)).tolist(), ids["<|endoftext|>"]]
    decoder.embed_positions.weight[FIRST : FIRST + len(said)] = LOUDNESS * decoder.embed_tokens.weight[said]
    languages = {token: index for token, index in ids.items() if token[2:-2] in LANGUAGES}
    model.generation_config = GenerationConfig(
        **{"decoder_start_token_id": start, "lang_to_id": languages, "is_multilingual": True, **ends},
        task_to_id={task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        max_initial_timestamp_index=50,
        alignment_heads=[[layers - 1, 0]],
        suppress_tokens=[],
        begin_suppress_tokens=[220, ids["<|endoftext|>"]],
        max_length=448,
        **dict.fromkeys(("logprob_threshold", "compression_ratio_threshold", "no_speech_threshold")),
    )
    model.save_pretrained(folder)
    kept = json.loads((folder / "generation_config.json").read_text())
    off = dict.fromkeys(("logprob_threshold", "compression_ratio_threshold", "no_speech_threshold"))
    (folder / "generation_config.json").write_text(json.dumps({**kept, **off}))
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)


def make_recording(file: Path, seconds: int) -> None:
    """Tones that come and go, in noise."""
    rng, times = np.random.default_rng(0), np.arange(seconds * RATE) / RATE
    sound = np.sin(2 * np.pi * (200 + 100 * np.sin(times / 3)) * times) * (np.sin(times * 2) > 0) + rng.normal(
        0, 0.05, len(times)
    )
    with wave.open(str(file), "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(RATE)
        written.writeframes((sound * 12_000).astype("<i2").tobytes())


# The sides


@contextmanager
def served(command: str, model: Path, log: Path) -> Iterator[Side]:
    with running(command, model, log) as (pid, address):
        until(lambda: lists_models(address), pid, log)

        def ask(file: Path) -> tuple[float, str]:
            start_s = time.perf_counter()
            fields = {"model": str(model), "language": "en", "temperature": "0"}
            reply = httpx.post(
                f"{address}/v1/audio/transcriptions", data=fields, files={"file": file.read_bytes()}, timeout=3600
            )
            seconds = time.perf_counter() - start_s
            if reply.status_code != 200:
                sys.exit(reply.text[:2000])
            return seconds, reply.json()["text"]

        yield ask


@contextmanager
def peer(words: list[str], log: Path) -> Iterator[Callable[[Path, int], tuple[float, str]]]:
    """faster-whisper in its own process: (file, windows at a time) -> seconds, text."""
    with (
        log.open("ab") as output,
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True) as process,
    ):

        def ask(file: Path, batch: int) -> tuple[float, str]:
            assert process.stdin is not None and process.stdout is not None
            with wave.open(str(file)) as opened:
                job = {"file": str(file), "batch": batch, "seconds": opened.getnframes() / RATE}
            print(json.dumps(job), file=process.stdin, flush=True)
            answer = process.stdout.readline()
            if not answer:
                sys.exit(f"faster-whisper ended:\n{log.read_text(errors='replace')[-2000:]}")
            found = json.loads(answer)
            return found["seconds"], found["text"]

        yield ask
        if process.stdin is not None:
            process.stdin.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", default=OURS, help="start command of this server")
    parser.add_argument("--peer", metavar="PYTHON", help="a Python that has faster-whisper")
    parser.add_argument("--batches", nargs="+", type=int, default=[0, 8], help="windows at a time; 0: one by one")
    parser.add_argument("--dtype", choices=FLAGS, default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--tokens", type=int, default=100, help="that are said in a window of 30 s")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    found = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        temporary = Path(name)
        model, recording, warm = temporary / "model", temporary / "long.wav", temporary / "short.wav"
        make_checkpoint(model, found.shape, found.tokens)
        make_recording(recording, found.seconds)
        make_recording(warm, WINDOW_S)
        command = found.ours.replace("{threads}", str(found.threads)).replace("{dtype}", FLAGS[found.dtype])
        sides: dict[str, Side] = {"Sensorium": stack.enter_context(served(command, model, temporary / "ours.log"))}
        if found.peer:
            words = [
                found.peer,
                "-P",
                str(PEER),
                str(model),
                str(temporary / "converted"),
                found.dtype,
                str(found.threads),
            ]
            ask = stack.enter_context(peer(words, temporary / "peer.log"))
            for batch in found.batches:
                title = f"faster-whisper, {batch} at a time" if batch else "faster-whisper"
                sides[title] = lambda file, batch=batch: ask(file, batch)
        measure(sides, recording, warm, found)


def measure(sides: dict[str, Side], recording: Path, warm: Path, found: argparse.Namespace) -> None:
    texts: dict[str, str] = {}
    for side in list(sides.values()):
        side(warm)
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(found.rounds):
        for name, side in sides.items():
            seconds, texts[name] = side(recording)
            speeds[name].append(found.seconds / seconds)
            print(f"    {name}: {seconds:.1f} s, {len(texts[name].split())} words", flush=True)
    windows = -(-found.seconds // WINDOW_S)
    ours = median(speeds["Sensorium"])
    print(f"\n| {found.dtype}, {windows} windows | times real time | words | Sensorium's to this |\n|---|---|---|---|")
    for name, all_speeds in speeds.items():
        print(
            f"| {name} | {median(all_speeds):.2f} ({min(all_speeds):.2f} to {max(all_speeds):.2f}) "
            f"| {len(texts[name].split())} | {ours / median(all_speeds):.2f}x |"
        )


if __name__ == "__main__":
    main()
