"""faster-whisper as a process of its own, run by `transcription.py` with the Python that has it installed.

    PYTHON -P benchmarks/transcription_peer.py CHECKPOINT FOLDER COMPUTE_TYPE THREADS

The checkpoint is converted into FOLDER by CTranslate2's own converter first. One JSON object per line in:
{"file": path, "seconds": its length, "batch": windows at a time, 0 for one after the other}; one out:
{"seconds": s, "text": text}.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from pathlib import Path

from ctranslate2.converters import TransformersConverter
from faster_whisper import BatchedInferencePipeline, WhisperModel

WINDOW_S = 30
AS_OURS = {
    "language": "en",
    "beam_size": 1,
    "temperature": 0.0,
    "without_timestamps": True,
    "vad_filter": False,
    "log_prob_threshold": None,
    "compression_ratio_threshold": None,
    "no_speech_threshold": None,
}


def main() -> None:
    checkpoint, folder, compute_type, threads = sys.argv[1:]
    answers, sys.stdout = sys.stdout, sys.stderr
    if not Path(folder).exists():
        TransformersConverter(checkpoint).convert(folder)
        for name in ("tokenizer.json", "preprocessor_config.json"):
            shutil.copy(Path(checkpoint) / name, folder)
    model = WhisperModel(folder, device="cpu", compute_type=compute_type, cpu_threads=int(threads))
    batched = BatchedInferencePipeline(model)
    for line in sys.stdin:
        job = json.loads(line)
        start_s = time.perf_counter()
        if job["batch"]:
            starts = range(0, math.ceil(job["seconds"]), WINDOW_S)
            clips = [{"start": at, "end": min(at + WINDOW_S, job["seconds"])} for at in starts]
            found, _ = batched.transcribe(job["file"], batch_size=job["batch"], clip_timestamps=clips, **AS_OURS)
        else:
            found, _ = model.transcribe(job["file"], condition_on_previous_text=False, **AS_OURS)
        text = "".join(segment.text for segment in found)
        print(json.dumps({"seconds": time.perf_counter() - start_s, "text": text}), file=answers, flush=True)


if __name__ == "__main__":
    main()
