"""Print an answer while it is written. Uses /api/v1, which is the same as /v1."""

from connection import arguments, connect, image_url

parser = arguments(__doc__, path="/api/v1")
parser.add_argument("--image")
parser.add_argument("--question", default="Describe this to me.")
found = parser.parse_args()
client, model = connect(found)
content = [{"type": "text", "text": found.question}]
if found.image:
    content.append({"type": "image_url", "image_url": {"url": image_url(found.image)}})
stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": content}],
    max_tokens=found.max_tokens,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    if chunk.choices and chunk.choices[0].delta.content:
        print(chunk.choices[0].delta.content, end="", flush=True)
    if chunk.usage:
        print(f"\n{chunk.usage.completion_tokens} tokens")
