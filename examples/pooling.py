"""What a classifier, reward model or embedder makes of a prompt, given as a text and as a chat."""

import json

import httpx
from connection import arguments, connect

parser = arguments(__doc__)
parser.add_argument("--text", default="Dogs are great!")
found = parser.parse_args()
_, model = connect(found)
url = f"{found.base_url.removesuffix('/v1')}/pooling"  # it stands beside OpenAI's endpoints, not among them
for form in (
    {"input": found.text},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": found.text}]}]},
):
    response = httpx.post(url, headers={"Authorization": f"Bearer {found.api_key}"}, json={"model": model, **form})
    response.raise_for_status()
    print(json.dumps(response.json(), indent=2))
