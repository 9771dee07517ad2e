"""Sort documents by how well they answer a question, with a cross-encoder or an embedder."""

import httpx
from connection import arguments, connect

parser = arguments(__doc__)
parser.add_argument("--query", default="What is the capital of France?")
parser.add_argument(
    "documents",
    nargs="*",
    default=["Berlin lies on the Spree.", "Paris is the capital of France.", "Bread is made of flour."],
)
found = parser.parse_args()
_, model = connect(found)
response = httpx.post(
    f"{found.base_url}/rerank",
    headers={"Authorization": f"Bearer {found.api_key}"},
    json={"model": model, "query": found.query, "documents": found.documents, "top_n": 2},
)
response.raise_for_status()
for row in response.json()["results"]:
    print(f"{row['relevance_score']:.4f}  {row['document']['text']}")
