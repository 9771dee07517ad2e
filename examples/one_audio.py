"""Ask about an audio file: as OpenAI's `input_audio`, or as a URL. Any format that ffmpeg reads."""

import base64
from pathlib import Path

from connection import arguments, connect, media_url

parser = arguments(__doc__)
parser.add_argument("audio")
parser.add_argument("--question", default="What do you hear?")
parser.add_argument("--as-url", action="store_true", help="also a file, which then is in the URL")
found = parser.parse_args()
client, model = connect(found)
if found.as_url or "://" in found.audio:
    part = {"type": "audio_url", "audio_url": {"url": media_url(found.audio, "audio/wav")}}
else:
    data = base64.b64encode(Path(found.audio).read_bytes()).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": Path(found.audio).suffix[1:] or "wav"}}
completion = client.chat.completions.create(
    model=model,
    max_completion_tokens=found.max_tokens,
    messages=[{"role": "user", "content": [{"type": "text", "text": found.question}, part]}],
)
print(completion.choices[0].message.content)
