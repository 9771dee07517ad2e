"""A whole HTTP side over a scripted engine: real sockets, real tokenizer and template, tokens that a test decides."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from sensorium.api.transport.server import HttpServer, build_app, listen
from sensorium.checkpoint.adapters import adapter_bytes
from sensorium.checkpoint.configs import Checkpoint
from sensorium.config import EngineConfig, Limits, ServerConfig
from sensorium.errors import StartupError, UnavailableError
from sensorium.media.loader import MediaLoader
from sensorium.processors.base import Processor
from sensorium.prompt.local import LocalRenderer, LocalTemplate
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.serving.catalog import Catalog
from sensorium.serving.model import ServedModel
from sensorium.serving.templates import OwnTemplates
from sensorium.types import EngineOutput, EngineReady, EngineRequest, EngineStats, FinishReason, TokenLogprob

SPECIAL = ("<|end|>", "<|start|>", "<|stop|>")
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}{% if flavour %}{{ flavour }}{% endif %}"
)
TOOL_TEMPLATE = (
    "{% if tools %}<|start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|end|>\n{% endif %}"
    "{% for message in messages %}<|start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ message.content }}"
    "{% for call in message.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}"
    "<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
"""As Hermes and Qwen write: calls between tags, thoughts before the answer."""
CONTEXT = 512
ANSWER = "Grüße, world! 🙂 ok"
# What an answer to a client must never contain (docs: safety).
LEAKS = re.compile(r"0x[0-9a-f]{6,}|/usr|/home|/work|site-packages|Traceback|File \"|<[\w.]+ object at|pydantic")


def make_tokenizer() -> Tokenizer:
    """Every byte is a token; the specials come after them."""
    vocab = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = RawTokenizer(models.BPE(vocab, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return Tokenizer(raw, {"eos_token": "<|end|>"})


TOKENIZER = make_tokenizer()
EOS, START, STOP = (TOKENIZER.token_to_id(text) or 0 for text in SPECIAL)
VOCAB_SIZE = TOKENIZER.vocab_size

Script = Callable[[EngineRequest], AsyncIterator[EngineOutput]]


def logprobs_of(token: int, count: int | None) -> TokenLogprob | None:
    """Made-up but recognisable: token t has log-probability -t / 100."""
    if count is None:
        return None
    return TokenLogprob(token, -token / 100, tuple((other, -other / 100) for other in range(count)))


async def speak(
    request: EngineRequest, text: str = ANSWER, *, delay_s: float = 0.0, chunk: int = 1, ends: bool = True
) -> AsyncIterator[EngineOutput]:
    """Say `text` byte by byte, then end like a model does: by an end token, or by length."""
    sampling = request.sampling
    assert sampling is not None
    tokens = TOKENIZER.encode(text) + ([EOS] if ends else [])
    if not ends:
        tokens = list(itertools.islice(itertools.cycle(tokens), sampling.max_tokens))
    prompt = tuple(
        None if place == 0 else logprobs_of(int(token), sampling.prompt_logprobs)
        for place, token in enumerate(request.prompt.token_ids)
    )
    sent = 0
    while sent < len(tokens):
        now: list[int] = []
        reason: FinishReason | None = None
        stop: int | None = None
        for token in tokens[sent : sent + chunk]:
            now.append(token)
            if token in sampling.stop_token_ids and sent + len(now) > sampling.min_tokens:
                reason, stop = "stop", token
            elif sent + len(now) >= sampling.max_tokens:
                reason = "length"
            if reason:
                break
        if delay_s:
            await asyncio.sleep(delay_s)
        yield EngineOutput(
            request.id,
            tuple(now),
            finish_reason=reason,
            stop_token_id=stop,
            logprobs=tuple(entry for token in now if (entry := logprobs_of(token, sampling.logprobs))),
            prompt_logprobs=prompt if sent == 0 and sampling.prompt_logprobs is not None else (),
            cached_tokens=3 if sent == 0 else 0,
        )
        if reason:
            return
        sent += len(now)


READY = EngineReady(
    max_model_len=CONTEXT,
    kv_tokens=4 * CONTEXT,
    block_size=16,
    weight_bytes=1,
    kv_bytes=1,
    load_seconds=0.1,
    device="cpu",
    dtype="float32",
)


class FakeStream:
    """As engine.client's: outputs of one request, aborted at most once."""

    def __init__(self, engine: FakeEngine, request: EngineRequest, script: Script) -> None:
        self._engine = engine
        self._request = request
        self._outputs = script(request)
        self.ended = False

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> EngineOutput:
        try:
            output = await anext(self._outputs)
        except StopAsyncIteration:
            self._end()
            raise
        if output.finish_reason is not None:
            self._end()
        return output

    def _end(self) -> None:
        self.ended = True
        self._engine.active.discard(self._request.id)

    def abort(self) -> None:
        if not self.ended:
            self._end()
            self._engine.aborted.append(self._request.id)


@dataclass
class FakeEngine:
    """As engine.client.EngineClient. `script` says what is answered; `requests` keeps what was asked."""

    script: Script = speak
    config: EngineConfig = field(default_factory=lambda: EngineConfig(model="", max_num_seqs=4))
    state: str = "ready"
    stats: EngineStats = field(default_factory=lambda: EngineStats(running=1, kv_blocks=10, kv_blocks_free=4))
    ready: EngineReady | None = READY
    requests: list[EngineRequest] = field(default_factory=list)
    active: set[int] = field(default_factory=set)
    aborted: list[int] = field(default_factory=list)
    loaded: asyncio.Event = field(default_factory=asyncio.Event)
    adapters: dict[int, str] = field(default_factory=dict)  # folders; one that is called "broken" is refused

    async def load_adapter(self, number: int, folder: str) -> int:
        """One takes twice the memory of its file."""
        if Path(folder).name == "broken":
            raise StartupError("it is broken")
        self.adapters[number] = folder
        return 2 * adapter_bytes(Path(folder))

    def unload_adapter(self, number: int) -> None:
        self.adapters.pop(number, None)

    def next_id(self) -> int:
        return len(self.requests)

    def submit(self, request: EngineRequest) -> FakeStream:
        if self.state != "ready":
            raise UnavailableError("The engine is being restarted.")
        self.requests.append(request)
        self.active.add(request.id)
        return FakeStream(self, request, self.script)

    async def wait_ready(self) -> EngineReady:
        if self.ready is None:
            await self.loaded.wait()
        assert self.ready is not None
        return self.ready


def make_model(
    engine: FakeEngine,
    server: ServerConfig,
    limits: Limits,
    *,
    names: Iterable[str] = ("tiny",),
    generation: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer = TOKENIZER,
    processor: type[Processor] = Processor,
    task: str = "auto",
    folder: Path = Path("tiny"),
    pooling: str = "last",
    source: str = TEMPLATE,
    context: int = CONTEXT,
    architecture: str = "LlamaForCausalLM",
) -> ServedModel:
    """`source` is the chat template, `context` the longest prompt and completion together, in tokens."""
    checkpoint = Checkpoint(
        folder=folder,
        architecture=architecture,
        config=dict(config or {}),
        preprocessor={},
        generation=dict(generation or {}),
        tokenizer_config={},
        chat_template=source,
        text=None,
        dtype="float32",
        max_model_len=context,
        vocab_size=tokenizer.vocab_size,
        stop_token_ids=(EOS,),
        weight_files=(),
        pooling=pooling,
    )
    made = processor(checkpoint, tokenizer)
    template = LocalTemplate(
        source, tokenizer.with_literals(made.literals), modalities=made.modalities, placeholder=made.placeholder
    )
    return ServedModel(
        names=tuple(names),
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        templates=OwnTemplates(template),
        processor=made,
        client=engine,  # type: ignore[arg-type]
        loader=MediaLoader(limits, workers=1),
        renderer=LocalRenderer(),
        server=server,
        limits=limits,
        task=task,
    )


@dataclass
class Served:
    """A running server. `url` has no path."""

    http: HttpServer
    engine: FakeEngine
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def serving(
    engine: FakeEngine | None = None,
    *,
    limits: Limits | None = None,
    names: Iterable[str] = ("tiny",),
    generation: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    **server: Any,
) -> AsyncIterator[Served]:
    """`model` has more options of `make_model`; the rest is the server's configuration."""
    engine = engine or FakeEngine()
    config = ServerConfig(port=0, **server)
    limits = limits or Limits()
    made = make_model(engine, config, limits, names=names, generation=generation, **(model or {}))
    http = HttpServer(build_app(Catalog.of(dict.fromkeys(made.names, made)), config, limits), limits, listen(config))
    await http.start()
    try:
        yield Served(http, engine, http.address[1])
    finally:
        await http.close()
        await made.aclose()


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, with its form checked."""
        found = self.json
        assert set(found) == {"error"}
        assert set(found["error"]) == {"message", "type", "param", "code"}
        assert not LEAKS.search(self.body.decode()), self.body
        return dict(found["error"])


async def raw(port: int, data: bytes, *, timeout_s: float = 120.0, eof: bool = False) -> Reply:
    """Send bytes as they are and read one answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**26)
    try:
        writer.write(data)
        if eof:
            writer.write_eof()
        return await asyncio.wait_for(read_reply(reader), timeout_s)
    finally:
        writer.close()


async def read_reply(reader: asyncio.StreamReader, *, head: bool = False) -> Reply:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    status = int(lines[0].split()[1])
    if status == 100:
        return await read_reply(reader, head=head)
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
    if head or status == 204:
        return Reply(status, headers, b"")
    if "content-length" in headers:
        return Reply(status, headers, await reader.readexactly(int(headers["content-length"])))
    body = b""
    while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)
    return Reply(status, headers, body)


def request(
    method: str, path: str, body: bytes = b"", *, headers: Mapping[str, str] | None = None, host: str = "127.0.0.1"
) -> bytes:
    """The bytes of one HTTP request."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}"]
    own = {name.lower() for name in headers or {}}
    if method == "POST" and "content-type" not in own:
        lines.append("Content-Type: application/json")
    if (body or method == "POST") and "content-length" not in own and "transfer-encoding" not in own:
        lines.append(f"Content-Length: {len(body)}")
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


async def get(port: int, path: str, **options: Any) -> Reply:
    return await raw(port, request("GET", path, **options))


async def post(port: int, path: str, body: Any, **options: Any) -> Reply:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await raw(port, request("POST", path, data, **options))


async def chat(port: int, **fields: Any) -> Reply:
    return await post(port, "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], **fields})


async def complete(port: int, **fields: Any) -> Reply:
    return await post(port, "/v1/completions", {"prompt": "hi", **fields})


def events(body: bytes) -> list[Any]:
    """The events of a stream, parsed; the last one must be the end marker, which is left out."""
    found = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line.startswith("data: ")]
    assert found[-1] == "[DONE]"
    return [json.loads(line) for line in found[:-1]]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


async def until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    """Wait for something that must become true soon."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)
