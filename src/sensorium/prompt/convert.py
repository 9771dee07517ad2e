"""Makes a tokenizer.json for repositories that have none, through transformers in a process of its own. Mistral's
tekken.json needs no transformers.

The result is kept in a cache folder under a hash of the files it came from, or in a temporary one where there is no
home or nothing can be written to it. transformers is an optional extra and is
never imported into the server.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from sensorium.checkpoint.own_cache import own_cache, writable
from sensorium.errors import CheckpointError, StartupError
from sensorium.prompt import tekken

_SOURCES = (
    "*.model",
    "*.tiktoken",
    "vocab*",
    "merges.txt",
    "tokenizer*",
    "tekken.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "config.json",
)
_TIMEOUT_S = 180


def converted_tokenizer(folder: Path, cache: Path | None = None) -> Path:
    """The folder's tokenizer as a tokenizer.json somewhere else."""
    sources = _sources(folder)
    if not any(file.name not in ("config.json", "tokenizer_config.json") for file in sources):
        raise CheckpointError(f"{folder} has no tokenizer: neither tokenizer.json nor a vocabulary to make it of.")
    cache = cache or own_cache("tokenizers")
    name = f"{_digest(sources)}.json"
    if cache is not None and (cache / name).is_file():
        return cache / name
    if not (folder / tekken.FILE).is_file() and importlib.util.find_spec("transformers") is None:
        raise StartupError(
            "The model has no tokenizer.json. Its tokenizer can be converted once the extra is "
            "installed: pip install 'sensorium[convert]'"
        )
    try:
        cache = writable(cache, "the converted tokenizer")
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / "tokenizer.json"
            _convert(folder, made)
            made.replace(cache / name)
    except OSError as error:
        raise StartupError(f"The converted tokenizer cannot be written: {error.strerror}") from None
    return cache / name


def _sources(folder: Path) -> list[Path]:
    return sorted({file for pattern in _SOURCES for file in folder.glob(pattern) if file.is_file()})


def _digest(sources: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in sources:
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _convert(folder: Path, target: Path) -> None:
    command = [sys.executable, "-m", "sensorium.prompt.convert", str(folder), str(target)]
    try:
        # What transformers or torch want to keep goes where this process may write, home or none.
        environment = os.environ | dict.fromkeys(("HOME", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR"), str(target.parent))
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=environment)
    except subprocess.TimeoutExpired:
        raise StartupError(f"Converting the tokenizer took longer than {_TIMEOUT_S} s.") from None
    if done.returncode != 0 or not target.is_file():
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CheckpointError(f"The model has no tokenizer.json and its tokenizer cannot be converted: {reason[:500]}")


def main(folder: str, target: str) -> None:
    """The child's part."""
    own = Path(folder) / tekken.FILE
    if own.is_file():
        tekken.tekken_tokenizer(own).save(target)
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    tokenizer.backend_tokenizer.save(target)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
