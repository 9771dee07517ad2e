"""Encoders behind a real server: vectors and scores equal transformers', however many texts come at once."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from openai import OpenAI
from PIL import Image
from support import server
from support.bert import SHAPE, WORDS, save, write_tokenizer
from support.checkpoints import CHATML_SPECIALS, CHATML_TEMPLATE, read_weights, write_weights
from support.checkpoints import write_tokenizer as write_chat_tokenizer
from support.encoder_support import load, pooled, run
from support.image_families import noise
from tokenizers import Tokenizer, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    JinaEmbeddingsV3Config,
    JinaEmbeddingsV3Model,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

DOCUMENTS = ["Berlin lies on the Spree.", "Paris is the capital of France.", "Bread is made of flour.", "x " * 12]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[server.Server, Any, Any]]:
    """A sentence-transformers folder: the mean of all tokens, normalised."""
    folder = tmp_path_factory.mktemp("embedder")
    tokenizer = write_tokenizer(folder / "m")
    oracle = save(BertModel(BertConfig(vocab_size=len(tokenizer), **SHAPE)), folder / "m")
    (folder / "m" / "modules.json").write_text(
        json.dumps(
            [
                {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for index, (kind, path) in enumerate(
                    (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_N"))
                )
            ]
        )
    )
    (folder / "m" / "1_Pooling").mkdir()
    (folder / "m" / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "m" / "sentence_bert_config.json").write_text('{"max_seq_length": 40, "do_lower_case": false}')
    with server.running(folder, str(folder / "m"), "--task", "embed") as found:
        yield found, tokenizer, oracle
        assert "Traceback" not in found.text()


@torch.inference_mode()
def mean_of(oracle: Any, tokenizer: Any, text: str) -> torch.Tensor:
    states = oracle(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    return torch.nn.functional.normalize(states.mean(0), dim=-1)


def test_vectors_are_those_of_the_module_files(embedder: tuple[server.Server, Any, Any]) -> None:
    served, tokenizer, oracle = embedder
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, int(count))) for count in rng.integers(1, 38, 200)]
    client = OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0)
    found = client.embeddings.create(model=client.models.list().data[0].id, input=texts)
    assert found.usage.prompt_tokens == sum(len(tokenizer(text)["input_ids"]) for text in texts)
    for text, row in zip(texts, found.data, strict=True):
        np.testing.assert_allclose(row.embedding, mean_of(oracle, tokenizer, text), atol=1e-5)
    alone = client.embeddings.create(model="", input=texts[7], encoding_format="float").data[0].embedding
    np.testing.assert_allclose(alone, found.data[7].embedding, atol=1e-6)


def test_what_an_embedder_says_of_long_texts_and_chats(embedder: tuple[server.Server, Any, Any]) -> None:
    served, tokenizer, oracle = embedder
    long = "the cat " * 30

    def post(path: str, **body: Any) -> httpx.Response:
        return httpx.post(served.url + path, json=body, timeout=60)

    refused = post("/v1/embeddings", input=["a", long])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input[1]")
    cut = post("/v1/embeddings", input=long, truncate_prompt_tokens=-1).json()["data"][0]["embedding"]
    np.testing.assert_allclose(cut, mean_of(oracle, tokenizer, "the cat " * 19), atol=1e-5)  # 38 words and two marks
    chat = post("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}])
    assert (chat.status_code, chat.json()["error"]["code"]) == (400, "unsupported_task")
    tokens = post("/pooling", input="the cat", task="token_embed").json()["data"][0]["data"]
    assert np.array(tokens).shape == (4, SHAPE["hidden_size"])
    scores = post("/score", text_1="the cat", text_2=["the cat", "a dog"]).json()["data"]
    one, other = (mean_of(oracle, tokenizer, text) for text in ("the cat", "a dog"))
    assert [row["score"] for row in scores] == [pytest.approx(1, abs=1e-5), pytest.approx(float(one @ other), abs=1e-5)]


@torch.inference_mode()
def test_a_cross_encoder_reads_both_texts(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "m")
    config = BertConfig(vocab_size=len(tokenizer), num_labels=1, **SHAPE)
    oracle = save(BertForSequenceClassification(config), tmp_path / "m")
    query = "What is the capital of France?"
    expected = [
        oracle(**tokenizer(query, document, return_tensors="pt")).logits.sigmoid().item() for document in DOCUMENTS
    ]
    with server.running(tmp_path, str(tmp_path / "m")) as served:
        scores = httpx.post(f"{served.url}/v1/score", json={"text_1": query, "text_2": DOCUMENTS}).json()["data"]
        np.testing.assert_allclose([row["score"] for row in scores], expected, atol=1e-5)
        ranked = httpx.post(f"{served.url}/rerank", json={"query": query, "documents": DOCUMENTS, "top_n": 2}).json()
        assert [row["index"] for row in ranked["results"]] == np.argsort(expected)[::-1][:2].tolist()
        cut = tokenizer(query, "flour " * 100, truncation="only_second", max_length=32, return_tensors="pt")
        row = httpx.post(
            f"{served.url}/score", json={"text_1": query, "text_2": "flour " * 100, "truncate_prompt_tokens": 32}
        ).json()["data"][0]
        assert row["score"] == pytest.approx(oracle(**cut).logits.sigmoid().item(), abs=1e-5)
        plain = httpx.post(f"{served.url}/classify", json={"input": query}).json()["data"][0]
        single = oracle(**tokenizer(query, return_tensors="pt")).logits.sigmoid().item()
        assert plain["probs"] == [pytest.approx(single, abs=1e-5)]


@torch.inference_mode()
def test_the_task_chooses_the_adapter(tmp_path: Path) -> None:
    """jina-embeddings-v3: of the weights and of the text before the input; both sides of a score have theirs."""
    folder = tmp_path / "m"
    tokenizer = write_tokenizer(folder)
    save(JinaEmbeddingsV3Model(JinaEmbeddingsV3Config(vocab_size=len(tokenizer), **SHAPE)), folder)
    names, rank = ["retrieval.query", "retrieval.passage"], 4
    stored = {}
    for key, value in read_weights(folder).items():
        stem = key.rpartition(".")[0]
        if value.dim() < 2 or "embeddings" in key:
            stored[key] = value
            continue
        stored[f"{stem}.parametrizations.weight.original"] = value
        for letter, shape in (("A", (2, rank, value.shape[1])), ("B", (2, value.shape[0], rank))):
            stored[f"{stem}.parametrizations.weight.0.lora_{letter}"] = torch.randn(shape) * 0.3
    for table, size in (("word", len(tokenizer)), ("token_type", 1)):
        stem = f"embeddings.{table}_embeddings.parametrizations.weight"
        stored[f"{stem}.original"] = stored.pop(f"embeddings.{table}_embeddings.weight")
        stored |= {f"{stem}.0.lora_A": torch.randn(2, size, rank), f"{stem}.0.lora_B": torch.randn(2, rank, 32) * 0.1}
    write_weights(folder, stored)
    config = json.loads((folder / "config.json").read_text())
    texts = dict(zip(names, ("what is ", "this is "), strict=True))
    hub: dict[str, Any] = {
        "architectures": ["XLMRobertaModel"],
        "position_embedding_type": "rotary",
        "rope_parameters": None,
    }
    hub |= {"lora_adaptations": names, "lora_rank": rank, "lora_alpha": 1, "task_instructions": texts}
    (folder / "config.json").write_text(json.dumps({**config, **hub}))
    model = load(folder)

    def vector(text: str, adapter: int) -> np.ndarray:
        ids = torch.tensor(tokenizer(text)["input_ids"])
        states = run(model, [ids], [torch.full((len(ids),), adapter)])[0]
        return pooled(model, "embed", states, ids).numpy()

    with server.running(tmp_path, str(folder)) as served:

        def post(path: str, **body: Any) -> Any:
            return httpx.post(served.url + path, json=body, timeout=60).json()["data"]

        for adapter, name in enumerate((None, *names)):
            found = post("/v1/embeddings", input=["bread", "the cat"], **({"task": name} if name else {}))
            for row, text in zip(found, ("bread", "the cat"), strict=True):
                np.testing.assert_allclose(
                    row["embedding"], vector(texts.get(name or "", "") + text, adapter), atol=1e-5
                )
        score = post("/score", text_1="bread", text_2="flour")[0]["score"]
        assert score == pytest.approx(float(vector("what is bread", 1) @ vector("this is flour", 2)), abs=1e-5)


def image_part(pixels: np.ndarray) -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


@torch.inference_mode()
def test_texts_and_images_in_one_space(tmp_path: Path) -> None:
    """CLIP: each request is a text or an image; scores are the angles between them."""
    folder = tmp_path / "m"
    ids = write_chat_tokenizer(folder, "hub", ("<|startoftext|>", "<|endoftext|>"), "", eos="<|endoftext|>")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "model_max_length": 32}')
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    frame = "<|startoftext|> $A <|endoftext|>"
    raw.post_processor = processors.TemplateProcessing(single=frame, special_tokens=list(ids.items()))
    raw.save(str(folder / "tokenizer.json"))
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**shape, "vocab_size": 512, "max_position_embeddings": 32, "eos_token_id": ids["<|endoftext|>"]}
    vision = {**shape, "image_size": 28, "patch_size": 14}
    oracle = save(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)), folder)
    pixels = noise(40, 30).data
    image = image_part(pixels)
    prepared = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    tensor = torch.tensor(np.asarray(prepared(pixels, input_data_format="channels_last")["pixel_values"]))
    of_image = torch.nn.functional.normalize(oracle.get_image_features(tensor).pooler_output[0], dim=-1)
    words = "the cat sits <image>"  # the marker of images is text in a text
    encoded = torch.tensor([raw.encode(words).ids])
    of_text = torch.nn.functional.normalize(oracle.get_text_features(encoded).pooler_output[0], dim=-1)
    (folder / "preprocessor_config.json").write_text('{"size": 28, "crop_size": 28}')
    with server.running(tmp_path, str(folder)) as served:

        def post(path: str, **body: Any) -> httpx.Response:
            return httpx.post(served.url + path, json=body, timeout=60)

        def turn(*parts: dict[str, Any]) -> list[dict[str, Any]]:
            return [{"role": "user", "content": list(parts)}]

        found = post("/v1/embeddings", messages=turn(image)).json()
        assert "data" in found, found
        np.testing.assert_allclose(found["data"][0]["embedding"], of_image, atol=1e-5)
        assert found["usage"]["prompt_tokens"] == 1
        for body in ({"input": words}, {"messages": turn({"type": "text", "text": words})}):
            found = post("/v1/embeddings", **body).json()
            np.testing.assert_allclose(found["data"][0]["embedding"], of_text, atol=1e-5)
        score = post("/score", text_1=words, text_2={"content": [image]}).json()["data"][0]["score"]
        assert score == pytest.approx(float(of_image @ of_text), abs=1e-5)
        both = post("/v1/embeddings", messages=turn(image, {"type": "text", "text": "a cat"}))
        assert (both.status_code, both.json()["error"]["code"]) == (400, "one_input")


# Rerankers on decoders


PAIR_TEMPLATE = (
    "<|im_start|>system\nJudge.<|im_end|>\n<|im_start|>user\n"
    "<Query>: {{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}\n"
    "<Document>: {{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
QUERY = "What is shown in this image?"
ANIMALS = ["A cat and a dog sit under the table.", "The flag is red.", "the chef " * 60]


def write_reranker(folder: Path, template: str | None) -> Any:
    """A decoder with one label -> transformers' own."""
    ids = write_chat_tokenizer(folder, "hub", CHATML_SPECIALS, CHATML_TEMPLATE, eos="<|im_end|>")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 400,
    }
    return save(
        Qwen3ForSequenceClassification(Qwen3Config(vocab_size=max(ids.values()) + 9, num_labels=1, **shape)), folder
    )


@torch.inference_mode()
def scores_of(oracle: Any, tokenizer: Any, texts: list[str]) -> list[float]:
    return [
        oracle(torch.tensor([tokenizer.encode(text, add_special_tokens=False)])).logits[0, 0].sigmoid().item()
        for text in texts
    ]


def pair_text(query: str, document: str) -> str:
    chat = [{"role": "query", "content": query}, {"role": "document", "content": document}]
    return str(ImmutableSandboxedEnvironment().from_string(PAIR_TEMPLATE).render(messages=chat))


@pytest.mark.parametrize("own", [True, False])
def test_pairs_of_a_decoder_go_through_their_template(tmp_path: Path, own: bool) -> None:
    """The checkpoint's own, or the operator's in the place of one that was left behind by the chat model."""
    oracle = write_reranker(tmp_path / "m", PAIR_TEMPLATE if own else CHATML_TEMPLATE)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "m" / "tokenizer.json"))
    (tmp_path / "pairs.jinja").write_text(PAIR_TEMPLATE)
    flags = () if own else ("--chat-template", str(tmp_path / "pairs.jinja"))
    with server.running(tmp_path, str(tmp_path / "m"), *flags) as served:

        def post(**body: Any) -> Any:
            return httpx.post(f"{served.url}/score", json={"text_1": QUERY, **body}).json()

        found = post(text_2=ANIMALS)
        expected = scores_of(oracle, tokenizer, [pair_text(QUERY, document) for document in ANIMALS])
        np.testing.assert_allclose([row["score"] for row in found["data"]], expected, atol=1e-5)
        cut = post(text_2=ANIMALS[2], truncate_prompt_tokens=100)
        assert 90 < cut["usage"]["prompt_tokens"] <= 100
        ends = [pair_text(QUERY, ("the chef " * 60)[:length]) for length in range(540)]
        whole = [text for text in ends if len(tokenizer.encode(text, add_special_tokens=False)) <= 100][-9:]
        assert min(abs(score - cut["data"][0]["score"]) for score in scores_of(oracle, tokenizer, whole)) < 1e-5
        assert "leave no room" in post(text_2="a", truncate_prompt_tokens=9)["error"]["message"]
        assert "no template for pairs" not in served.text()


def test_without_a_template_a_pair_is_two_texts_and_the_log_says_so(tmp_path: Path) -> None:
    oracle = write_reranker(tmp_path / "m", CHATML_TEMPLATE)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "m" / "tokenizer.json"))
    with server.running(tmp_path, str(tmp_path / "m")) as served:
        found = httpx.post(f"{served.url}/score", json={"text_1": QUERY, "text_2": ANIMALS[0]}).json()
        ids = tokenizer(QUERY, ANIMALS[0])["input_ids"]
        with torch.inference_mode():
            expected = oracle(torch.tensor([ids])).logits[0, 0].sigmoid().item()
        assert found["data"][0]["score"] == pytest.approx(expected, abs=1e-5)
        assert "no template for pairs" in served.text()
