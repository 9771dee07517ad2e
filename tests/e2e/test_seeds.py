"""What tutorials for other servers do, against a real server with a tiny random checkpoint of the model they name.

One row per model: how its folder is made, the flags of its tutorial, and the examples that its users run. A new family
is a new row.
"""

from __future__ import annotations

import re
import runpy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from openai import OpenAI
from PIL import Image
from support import checkpoints, server
from support.clips import sound, tone, video
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from sensorium.prompt.tokenizer import Tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
KEY = "token-abc123"
OPEN = ("--allowed-media-domains", "127.0.0.1", "--trust-remote-code")
ELSEWHERE = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data/"}}
LONG: dict[str, Any] = {"text": {"max_position_embeddings": 2048}}


@dataclass(frozen=True)
class Row:
    """`name` is the folder's, as users know it. In `runs`, {web} is a web server with media and {files} its folder;
    words of the form <|…|> are token ids."""

    name: str
    make: Callable[[Path], Any]
    flags: tuple[str, ...]
    runs: tuple[tuple[str, ...], ...]
    prefix: str = "/v1"


def make_classifier(path: Path) -> None:
    """Qwen2 with a head of two classes, as jason9693/Qwen2.5-1.5B-apeach is."""
    ids = checkpoints.write_tokenizer(
        path, "hub", checkpoints.CHATML_SPECIALS, checkpoints.CHATML_TEMPLATE, eos="<|endoftext|>"
    )
    config = Qwen2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=512,
        max_position_embeddings=512,
        pad_token_id=ids["<|endoftext|>"],
        id2label={0: "Default", 1: "Spoiled"},
        label2id={"Default": 0, "Spoiled": 1},
    )
    Qwen2ForSequenceClassification(config).save_pretrained(path)


def make_dse(path: Path) -> None:
    checkpoints.make_qwen2_vl(path, pickled=True, **LONG)
    (path / "video_preprocessor_config.json").write_text('{"size": {"shortest_edge": 3136, "longest_edge": 3136}}')


PICTURE, PICTURES = ("one_image.py", "{web}/duck.jpg"), ("several_images.py", "{web}/duck.jpg", "{web}/lion.png")
ROWS = (
    Row(
        "llava-1.5-7b-hf",
        partial(checkpoints.make_llava, **LONG),
        ("--chat-template", "template_llava.jinja"),
        (("chat_text.py",), PICTURE, ("one_image.py", "{files}/duck.jpg")),
    ),
    Row(
        "llava-v1.6-34b-hf",
        partial(checkpoints.make_llava_next, **LONG),
        ("--served-model-name", "llava-v1.6-34b"),
        (("streaming.py", "--image", "{files}/lion.png", "--question", "Describe the image to me"),),
        prefix="/api/v1",
    ),
    Row(
        "VLM2Vec-Full",
        checkpoints.make_phi3_v,
        ("--limit-mm-per-prompt", "image=2", "--max-model-len", "1024"),
        (PICTURES, ("embeddings.py", "--kind", "vlm2vec", "--image", "{web}/duck.jpg")),
    ),
    Row(
        "dse-qwen2-2b-mrl-v1",
        make_dse,
        ("--matryoshka-dimensions", "0"),
        (
            ("one_video.py", "{web}/fun.mp4"),
            ("one_video.py", "{files}/fun.mp4"),
            ("embeddings.py", "--kind", "dse", "--image", "{web}/duck.jpg"),
        ),
    ),
    Row(
        "Minicpmv2_6",
        checkpoints.make_minicpmv,
        ("--dtype", "auto", "--max_model_len", "2048", "--api-key", KEY, "--gpu_memory_utilization", "1"),
        (
            (*PICTURE, "--question", "请描述这张图片", "--stop-token-ids", "<|im_end|>", "<|endoftext|>"),
            ("one_image.py", "{files}/lion.png", "--stop-token-ids", "<|im_end|>", "<|endoftext|>"),
        ),
    ),
    Row(
        "ultravox-v0_5-llama-3_2-1b",
        checkpoints.make_ultravox,
        ("--text-model", "{model}/language"),
        (
            ("one_audio.py", "{files}/call.wav"),
            ("one_audio.py", "{web}/call.ogg"),
            ("one_audio.py", "{files}/call.ogg", "--as-url"),
            ("transcribe.py", "{files}/call.wav"),
            ("transcribe.py", "{files}/call.ogg", "--translate"),
        ),
    ),
    Row("Qwen2.5-1.5B-apeach", make_classifier, ("--task", "classify"), (("pooling.py",),)),
)


@dataclass(frozen=True)
class Running:
    row: Row
    url: str
    model: Path

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {KEY}"}

    def post(self, path: str, **body: Any) -> Any:
        response = httpx.post(self.url + path, headers=self.headers, json=body, timeout=60)
        response.raise_for_status()
        return response.json()

    def token(self, word: str) -> str:
        return str(Tokenizer.from_folder(self.model).token_to_id(word)) if re.fullmatch(r"<\|.*\|>", word) else word


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    Image.effect_noise((120, 80), 90).convert("RGB").save(folder / "duck.jpg")
    Image.new("RGB", (90, 140), "orange").save(folder / "lion.png")
    (folder / "fun.mp4").write_bytes(video(frames=20, rate=10))
    (folder / "call.wav").write_bytes(sound(tone(0.6, 16_000)[None], 16_000))
    (folder / "call.ogg").write_bytes(sound(tone(0.6, 48_000)[None], 48_000, "libopus", "ogg", "flt"))
    return folder


@pytest.fixture(scope="module")
def web(files: Path) -> Iterator[str]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=files))
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@contextmanager
def running(row: Row, folder: Path) -> Iterator[Running]:
    model = folder / row.name
    row.make(model)
    with server.running(folder, str(model), *OPEN, *(flag.format(model=model) for flag in row.flags)) as found:
        yield Running(row, found.url, model)
        assert "Traceback" not in found.text(), found.text()


def run_example(
    served: Running,
    argv: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    **places: Any,
) -> str:
    """An example as its users start it, in this process."""
    words = [served.token(word.format(**places)) for word in argv]
    monkeypatch.setattr(
        sys, "argv", [*words, "--base-url", served.url + served.row.prefix, "--api-key", KEY, "--max-tokens", "8"]
    )
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / words[0]), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_examples_run_against_the_model_of_their_tutorial(
    row: Row, files: Path, web: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(row, tmp_path) as served:
        for argv in row.runs:
            said = run_example(served, argv, capsys, monkeypatch, files=files, web=web)
            assert said.strip(), argv
            if argv[0] == "embeddings.py":
                assert re.findall(r"of length (\S+):", said) == ["1.000", "1.000"]
        check = CHECKS.get(row.name)
        if check is not None:
            check(served, web)


# What more the answers must be.


def check_dse(served: Running, web: str) -> None:
    """The embedding is that of the template's last token; chats have another template; fewer dimensions on demand."""
    content = [
        {"type": "image_url", "image_url": {"url": f"{web}/lion.png"}},
        {"type": "text", "text": "What is shown in this image?"},
    ]
    messages = [{"role": "user", "content": content}]
    whole = served.post("/v1/embeddings", messages=messages)
    some = served.post("/v1/embeddings", messages=messages, dimensions=16)["data"][0]["embedding"]
    first = np.array(whole["data"][0]["embedding"])[:16]
    np.testing.assert_allclose(some, first / np.linalg.norm(first), atol=1e-5)
    chat = served.post("/tokenize", messages=messages)
    assert whole["usage"]["prompt_tokens"] == chat["count"] + 1  # <|endoftext|>
    texts = served.post("/v1/rerank", query="A lion", documents=["A cat", {"content": content}])
    assert {row["index"] for row in texts["results"]} == {0, 1}
    for path, body, param in (
        ("/v1/embeddings", {"messages": [{"role": "user", "content": [ELSEWHERE]}]}, "messages[0].content[0]"),
        ("/pooling", {"messages": [[{"role": "user", "content": [ELSEWHERE]}]]}, "messages[0][0].content[0]"),
        ("/score", {"text_1": "a", "text_2": [{"content": [ELSEWHERE]}]}, "text_2[0].content[0]"),
        ("/v2/rerank", {"query": {"content": [ELSEWHERE]}, "documents": ["a"]}, "query.content[0]"),
    ):
        refused = httpx.post(served.url + path, json=body)
        assert refused.json()["error"]["code"] == "invalid_image_url", refused.text
        assert refused.json()["error"]["param"] == f"{param}.image_url.url"
    several = served.post("/v1/embeddings", messages=[messages, messages])
    np.testing.assert_allclose(several["data"][1]["embedding"], whole["data"][0]["embedding"], atol=1e-5)


def check_classifier(served: Running, web: str) -> None:
    row = served.post("/classify", input="vLLM is great!")["data"][0]
    pooled = served.post("/pooling", input="vLLM is great!")["data"][0]["data"]
    np.testing.assert_allclose(row["probs"], pooled, atol=1e-6)
    assert sum(pooled) == pytest.approx(1, abs=1e-5)
    assert row["label"] == ("Default", "Spoiled")[int(np.argmax(pooled))]
    chat = httpx.post(f"{served.url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
    assert chat.status_code == 400
    assert "classify" in chat.json()["error"]["message"]


def check_minicpm(served: Running, web: str) -> None:
    client = OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(Exception, match="key"):
        client.models.list()
    assert httpx.get(f"{served.url}/v1/models", headers=served.headers).json()["data"][0]["id"] == str(served.model)


def check_vlm2vec(served: Running, web: str) -> None:
    """What is embedded is the text alone, without the turns of a chat."""
    messages = [{"role": "user", "content": "A cat and a dog"}]
    usage = served.post("/v1/embeddings", messages=messages)["usage"]
    assert usage["prompt_tokens"] == served.post("/tokenize", prompt="A cat and a dog")["count"]
    assert usage["prompt_tokens"] < served.post("/tokenize", messages=messages)["count"]


CHECKS: dict[str, Callable[[Running, str], None]] = {
    "VLM2Vec-Full": check_vlm2vec,
    "dse-qwen2-2b-mrl-v1": check_dse,
    "Qwen2.5-1.5B-apeach": check_classifier,
    "Minicpmv2_6": check_minicpm,
}
