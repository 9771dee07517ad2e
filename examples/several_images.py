"""Compare images: each stands where the text speaks of it."""

from connection import arguments, connect, image_url

parser = arguments(__doc__)
parser.add_argument("images", nargs="+")
found = parser.parse_args()
client, model = connect(found)
content = []
for number, place in enumerate(found.images, 1):
    content += [
        {"type": "text", "text": f"Image {number}:"},
        {"type": "image_url", "image_url": {"url": image_url(place)}},
    ]
content.append({"type": "text", "text": "Which animals do these images show?"})
completion = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": content}], max_completion_tokens=found.max_tokens
)
print(completion.choices[0].message.content)
