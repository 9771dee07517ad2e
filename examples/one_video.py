"""Ask about a video, given as a URL or as a file: mp4, mov, webm, mkv, avi, in common codecs."""

from connection import arguments, connect, media_url

parser = arguments(__doc__)
parser.add_argument("video")
parser.add_argument("--question", default="What happens in this video?")
parser.add_argument("--fps", type=float, help="frames to look at per second; needs --allow-request-mm-kwargs there")
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
                {"type": "video_url", "video_url": {"url": media_url(found.video, "video/mp4")}},
            ],
        }
    ],
    extra_body={"mm_processor_kwargs": {"fps": found.fps}} if found.fps else None,
)
print(completion.choices[0].message.content)
