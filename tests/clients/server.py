"""The server that other people's clients are driven against: the whole HTTP side over a scripted engine.

Runs in the server's own environment (`.venv`), prints its port, ends when its standard input is closed. What the model
says follows from what it reads: a tool it has not used yet is called, a form is filled in, all else is answered.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.api_support import READY, TOKENIZER, TOOL_TEMPLATE, VOCAB_SIZE, FakeEngine, serving, speak

from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import EngineOutput, EngineRequest

CONTEXT = 32768
CALL = '<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
PERSON = json.dumps({"name": "Ann", "age": 30})


async def script(request: EngineRequest) -> AsyncIterator[EngineOutput]:
    async for output in speak(request, answer_of(request), chunk=3):
        yield output


def answer_of(request: EngineRequest) -> str:
    prompt = TOKENIZER.decode(request.prompt.token_ids.tolist(), skip_special_tokens=False)
    tools, _, chat = prompt.partition("<|end|>")
    names = [
        json.loads(line)["function"]["name"]
        for line in tools.splitlines()
        if line.startswith('{"type"') or line.startswith('{"function"')
    ]
    said = chat.rpartition("<|start|>tool\n")[2].partition("<|end|>")[0] if "<|start|>tool\n" in chat else ""
    if said:
        return f"The tool says: {said}"
    if "get_weather" in names:
        return "<think>\nParis\n</think>\n\n" + CALL.format(name="get_weather", arguments='{"city": "Paris"}')
    if names:  # a form that the client wants filled in, as a tool
        return CALL.format(name=names[0], arguments=PERSON)
    sampling = request.sampling
    if (sampling is not None and sampling.grammar is not None) or "JSON" in prompt or "json" in prompt:
        return PERSON
    return "Grüße, world! 🙂 ok"


def tokenizer_in(folder: Path) -> Tokenizer:
    """The tests' tokenizer as files: grammars are compiled for a tokenizer.json."""
    TOKENIZER.raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return Tokenizer.from_folder(folder, vocab_size=VOCAB_SIZE)


async def main() -> None:
    with TemporaryDirectory() as folder:
        model = {"source": TOOL_TEMPLATE, "tokenizer": tokenizer_in(Path(folder)), "context": CONTEXT}
        engine = FakeEngine(script, ready=replace(READY, max_model_len=CONTEXT, kv_tokens=8 * CONTEXT))
        async with serving(engine, names=("tiny", "gpt-4o-mini"), model=model) as served:
            print(served.port, flush=True)
            await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
