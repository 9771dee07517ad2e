"""Vectors of a text and a picture, and how alike they are. Each kind of models wants its own words."""

import math

import httpx
from connection import arguments, connect, picture_url

# 56 x 56 black pixels: DSE models see a picture beside every text.
NOTHING = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAADgAAAA4AQAAAACA/QazAAAADklEQVR42mNgGAVDGQAAAcAAAb8Xq8EAAAAA"
    "SUVORK5CYII="
)


def picture(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def document(kind: str, url: str) -> list[dict]:
    """What is said beside a picture that is to be found."""
    return [picture(url), text("What is shown in this image?" if kind == "dse" else "Represent the given image.")]


def query(kind: str, words: str) -> list[dict]:
    return [picture(NOTHING), text(f"Query: {words}")] if kind == "dse" else [text(words)]


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
parser.add_argument("--picture")
parser.add_argument("--query", default="What is the weather like today?")
found = parser.parse_args()
client, model = connect(found)
if found.kind == "text":
    vectors = [client.embeddings.create(model=model, input=found.query).data[0].embedding]
else:
    vectors = [embed(query(found.kind, found.query))]
if found.picture:
    vectors.append(embed(document(found.kind, picture_url(found.picture))))
for vector in vectors:
    print(f"{len(vector)} numbers of length {math.hypot(*vector):.3f}:", *(f"{number:.4f}" for number in vector[:4]))
if len(vectors) == 2:
    print(f"alike: {sum(a * b for a, b in zip(*vectors, strict=True)):.3f}")
