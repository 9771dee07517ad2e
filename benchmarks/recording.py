"""What long recordings take: memory of the server's processes while /v1/audio/transcriptions streams them.

    python benchmarks/recording.py [--minutes 1 10 60] [--shape tiny] [--tokens 8] [--threads 2]

A recording after the other, each in a server of its own: WAV, 16 kHz, 16 bits. The checkpoint is that of
`transcription.py`. Resident memory (RSS, ten times a second) is that of each process at its most, less what it was
before the recording came. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import threading
from pathlib import Path

import httpx
from compare import lists_models, running, until
from transcription import SHAPES, WINDOW_S, make_checkpoint, make_recording

from sensorium.system.processes import family, rss_bytes

SERVE = (
    f"{shlex.quote(sys.executable)} -m sensorium serve {{model}} --port {{port}} --threads {{threads}} "
    "--dtype float32 --max-audio-bytes 256MiB --max-upload-bytes 256MiB"
)
EVERY_S = 0.1
MB = 1e6


class Watch:
    """The most memory that each process of a family has had."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._ended = threading.Event()
        self.before = {one: rss_bytes(one) for one in family(pid)}
        self.most = dict(self.before)
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(EVERY_S):
            for one in family(self._pid):
                self.most[one] = max(self.most.get(one, 0), rss_bytes(one))

    def stop(self) -> dict[str, tuple[int, int]]:
        """(bytes before, bytes at most) of the HTTP process, the engine, and all that came and went together."""
        self._ended.set()
        self._thread.join()
        http, *others = sorted(self.most)
        engine = max((one for one in others if one in self.before), key=lambda one: self.before[one])
        rest = [one for one in others if one != engine]
        return {
            "HTTP process": (self.before[http], self.most[http]),
            "engine": (self.before[engine], self.most[engine]),
            "workers": (sum(self.before.get(one, 0) for one in rest), sum(self.most[one] for one in rest)),
        }


def transcribe(address: str, model: Path, file: Path) -> int:
    """Streams a recording to its end; returns how many events brought text: one of each window that is done."""
    fields = {"model": str(model), "language": "en", "temperature": "0", "stream": "true"}
    kinds: list[str] = []
    with (
        file.open("rb") as opened,
        httpx.stream(
            "POST", f"{address}/v1/audio/transcriptions", data=fields, files={"file": opened}, timeout=7200
        ) as reply,
    ):
        if reply.status_code != 200:
            sys.exit(reply.read().decode()[:2000])
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    sys.exit(line[:2000])
                kinds.append(event.get("type", ""))
    if kinds[-1] != "transcript.text.done":
        sys.exit("the stream ended before the recording")
    return kinds.count("transcript.text.delta")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", nargs="+", type=int, default=[1, 10, 60])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--tokens", type=int, default=8, help="that are said in a window of 30 s")
    parser.add_argument("--threads", type=int, default=2)
    found = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        model, file, log = temporary / "model", temporary / "long.wav", temporary / "log"
        make_checkpoint(model, found.shape, found.tokens)
        command = SERVE.replace("{threads}", str(found.threads))
        print("| minutes | events of text | process | MB before | MB more |\n|---|---|---|---|---|")
        for minutes in found.minutes:
            make_recording(file, WINDOW_S)
            with running(command, model, log) as (pid, address):
                until(lambda address=address: lists_models(address), pid, log)
                transcribe(address, model, file)  # what a first one loads is not a recording's
                make_recording(file, 60 * minutes)
                watch = Watch(pid)
                events = transcribe(address, model, file)
                for process, (before, most) in watch.stop().items():
                    print(
                        f"| {minutes} | {events} | {process} | {before / MB:.0f} | {(most - before) / MB:.0f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
