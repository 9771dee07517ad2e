"""An image, a video and an audio file in one message, for models that take all of them."""

from connection import arguments, connect, media_url

parser = arguments(__doc__)
parser.add_argument("--image")
parser.add_argument("--video")
parser.add_argument("--audio")
parser.add_argument("--question", default="What do these have in common?")
found = parser.parse_args()
client, model = connect(found)
content = []
for name, place, kind, fallback in (
    ("Image", found.image, "image_url", "image/jpeg"),
    ("Video", found.video, "video_url", "video/mp4"),
    ("Audio", found.audio, "audio_url", "audio/wav"),
):
    if place:
        content += [{"type": "text", "text": f"{name}:"}, {"type": kind, kind: {"url": media_url(place, fallback)}}]
content.append({"type": "text", "text": found.question})
completion = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": content}], max_completion_tokens=found.max_tokens
)
print(completion.choices[0].message.content)
