"""Ask about one image, given as a URL or as a file."""

from connection import arguments, connect, image_url

parser = arguments(__doc__)
parser.add_argument("image")
parser.add_argument("--question", default="What is in this image?")
parser.add_argument("--stop-token-ids", type=int, nargs="*", help="tokens that end the answer")
found = parser.parse_args()
client, model = connect(found)
completion = client.chat.completions.create(
    model=model,
    max_completion_tokens=found.max_tokens,
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "text", "text": found.question},
                {"type": "image_url", "image_url": {"url": image_url(found.image)}},
            ],
        }
    ],
    extra_body={"stop_token_ids": found.stop_token_ids} if found.stop_token_ids else None,
)
print(completion.choices[0].message.content)
