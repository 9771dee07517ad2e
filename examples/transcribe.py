"""Write down what is said in a recording, or translate it, with a model that hears."""

from pathlib import Path

from connection import arguments, connect

parser = arguments(__doc__)
parser.add_argument("audio", type=Path)
parser.add_argument("--language", default="en", help="what is spoken")
parser.add_argument("--translate", action="store_true", help="into English")
found = parser.parse_args()
client, model = connect(found)
if found.translate:
    print(client.audio.translations.create(model=model, file=found.audio).text)
else:
    stream = client.audio.transcriptions.create(
        model=model,
        file=found.audio,
        language=found.language,
        stream=True,
        extra_body={"max_completion_tokens": found.max_tokens},
    )
    for chunk in stream:
        print(chunk.choices[0]["delta"]["content"], end="", flush=True)
    print()
