"""Vectors of a text and an image, and how alike they are. Each kind of models wants its own words."""

import math

import httpx
from connection import arguments, connect, image_url

# 56 x 56 black pixels: DSE models see an image beside every text.
NOTHING = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAADgAAAA4AQAAAACA/QazAAAADklEQVR42mNgGAVDGQAAAcAAAb8Xq8EAAAAA"
    "SUVORK5CYII="
)


def image(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def document(kind: str, url: str) -> list[dict]:
    """What is said beside an image that is to be found."""
    return [image(url), text("What is shown in this image?" if kind == "dse" else "Represent the given image.")]


def query(kind: str, words: str) -> list[dict]:
    return [image(NOTHING), text(f"Query: {words}")] if kind == "dse" else [text(words)]


def embed(content: list[dict]) -> list[float]:
    """OpenAI's request, with `messages` in place of `input`."""
    response = httpx.post(
        f"{found.base_url}/embeddings",
        headers={"Authorization": f"Bearer {found.api_key}"},
        json={"model": model, "messages": [{"role": "user", "content": content}], "encoding_format": "float"},
        timeout=600,
    )
    response.raise_for_status()
    return response.json()["data"][0]["embedding"]


parser = arguments(__doc__)
parser.add_argument("--kind", choices=["text", "dse", "vlm2vec"], default="text", help="what the model knows")
parser.add_argument("--image")
parser.add_argument("--query", default="What is the weather like today?")
found = parser.parse_args()
client, model = connect(found)
if found.kind == "text":
    vectors = [client.embeddings.create(model=model, input=found.query).data[0].embedding]
else:
    vectors = [embed(query(found.kind, found.query))]
if found.image:
    vectors.append(embed(document(found.kind, image_url(found.image))))
for vector in vectors:
    print(f"{len(vector)} numbers of length {math.hypot(*vector):.3f}:", *(f"{number:.4f}" for number in vector[:4]))
if len(vectors) == 2:
    print(f"alike: {sum(a * b for a, b in zip(*vectors, strict=True)):.3f}")
