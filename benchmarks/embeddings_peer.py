"""sentence-transformers as a process of its own, run by `embeddings.py` with the Python that has it installed.

    PYTHON benchmarks/embeddings_peer.py CHECKPOINT DTYPE

One JSON object per line in: {"texts": [..], "batch_size": n, "into": FILE}; one out: {"seconds": s}. The vectors go to
FILE as a float32 .npy. Batch size 0 is no batch and no sentence-transformers: transformers' own class with plain
attention, text by text, in float32, which is what everybody's vectors are compared with.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer


def plain(folder: Path, texts: list[str]) -> np.ndarray[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    place = -1 if pooling.get("pooling_mode_lasttoken") else 0
    rows = []
    with torch.inference_mode():
        for text in texts:
            state = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, place]
            rows.append(torch.nn.functional.normalize(state, dim=0).numpy())
    return np.stack(rows)


def main() -> None:
    folder, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
    answers, sys.stdout = sys.stdout, sys.stderr
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": dtype})
    for line in sys.stdin:
        job = json.loads(line)
        start_s = time.perf_counter()
        if job["batch_size"]:
            vectors = model.encode(job["texts"], batch_size=job["batch_size"], convert_to_tensor=True).float().numpy()
        else:
            vectors = plain(folder, job["texts"])
        seconds = time.perf_counter() - start_s
        np.save(job["into"], vectors)
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
