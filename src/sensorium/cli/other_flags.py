"""Flags of vLLM, SGLang, TEI and llama.cpp that people paste into a start command: what becomes of each.

`RENAMED` are ours under another name. `ACCEPTED` change no answer here, which is said in one line. `REFUSED` would
change answers, open or close something, or promise what is not there; the sentence says what to do instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

RENAMED: Mapping[str, tuple[str, ...]] = {
    # vLLM
    "--kv-cache-memory-bytes": ("--kv-cache-memory",),
    "--trust-request-mm-kwargs": ("--allow-request-mm-kwargs",),
    "--trust-request-chat-template": ("--allow-request-chat-template",),
    "--no-enable-log-requests": ("--disable-log-requests",),
    "--enable-log-requests": ("--no-disable-log-requests",),
    "--disable-uvicorn-access-log": ("--disable-log-requests",),
    "--override-pooler-config": ("--pooler-config",),
    "--num-speculative-tokens": ("--speculative-tokens",),
    "--lora-modules": ("--lora",),
    "-tp": ("--tensor-parallel-size",),
    "-q": ("--quantization",),
    # SGLang
    "--tp": ("--tensor-parallel-size",),
    "--tp-size": ("--tensor-parallel-size",),
    "--model-path": ("--model",),
    "--lora-paths": ("--lora",),
    "--speculative-num-draft-tokens": ("--speculative-tokens",),
    "--speculative-draft-model-path": ("--draft-model",),
    "--speculative-draft": ("--draft-model",),
    "--context-length": ("--max-model-len",),
    "--mem-fraction-static": ("--gpu-memory-utilization",),
    "--max-running-requests": ("--max-num-seqs",),
    "--disable-radix-cache": ("--no-enable-prefix-caching",),
    "--random-seed": ("--seed",),
    "--is-embedding": ("--task", "embed"),
    "--json-model-override-args": ("--hf-overrides",),
    "--limit-mm-data-per-request": ("--limit-mm-per-prompt",),
    # text-embeddings-inference
    "--model-id": ("--model",),
    "--hostname": ("--host",),
    "--cors-allow-origin": ("--allowed-origins",),
    "--uds-path": ("--uds",),
    "--huggingface-hub-cache": ("--download-dir",),
    "--max-client-batch-size": ("--max-embedding-inputs",),
    # llama.cpp
    "-m": ("--model",),
    "-hf": ("--model",),
    "--hf-repo": ("--model",),
    "-c": ("--max-model-len",),
    "--ctx-size": ("--max-model-len",),
    "-t": ("--threads",),
    "-np": ("--max-num-seqs",),
    "--parallel": ("--max-num-seqs",),
    "-s": ("--seed",),
    "--draft": ("--speculative-tokens",),
    "--draft-n": ("--speculative-tokens",),
    "--draft-max": ("--speculative-tokens",),
    "--model-draft": ("--draft-model",),
    "-md": ("--draft-model",),
    "-hfd": ("--draft-model",),
    "--hf-repo-draft": ("--draft-model",),
    "-a": ("--served-model-name",),
    "--alias": ("--served-model-name",),
    "--chat-template-file": ("--chat-template",),
    "--embedding": ("--task", "embed"),
    "--embeddings": ("--task", "embed"),
    "--rerank": ("--task", "score"),
    "--reranking": ("--task", "score"),
}
"""Another's flag -> our flag, and its value if the flag itself says it."""

Arity = Literal["switch", "value", "values", "optional"]


@dataclass(frozen=True, slots=True)
class Accepted:
    """`why` completes a line. Of a flag that takes a value, only `values` are accepted; None is any."""

    why: str
    takes: Arity = "value"
    values: tuple[str, ...] | None = None


def _all(names: str, why: str, takes: Arity = "value", values: str | None = None) -> dict[str, Accepted]:
    return dict.fromkeys(names.split(), Accepted(why, takes, None if values is None else tuple(values.split())))


_ONE_DEVICE = (
    "a model is split over the devices of one machine by --tensor-parallel-size alone; for more, start several servers "
    "behind a proxy"
)
_NOTHING_COMPILED = "nothing is compiled or captured at start"
_KERNELS = "kernels are chosen by what the processor has"
_CHUNKED = "prefill is always chunked; --max-num-batched-tokens sets the size"
_CACHE = "what does not fit the KV cache is computed again, not moved"
_MEDIA = "media are cached within the memory that --encoder-cache-memory says"
_LOADING = "weights are mapped and read as they come"
_SCHEDULE = "requests are scheduled by priority and arrival, within --max-num-seqs and --max-num-batched-tokens"
_GUESSES = "tokens are guessed from the prompt, and by --draft-model; answers are the same"
_LOG = "the log is on stderr; --disable-log-requests quietens it, /metrics has the figures"

ACCEPTED: Mapping[str, Accepted] = {
    **_all(
        """--pipeline-parallel-size -pp --pp --pp-size --data-parallel-size -dp --dp --dp-size
        --decode-context-parallel-size -dcp --prefill-context-parallel-size -pcp --ep-size --nnodes
        --api-server-count -asc""",
        _ONE_DEVICE,
        values="1",
    ),
    **_all("--node-rank -r --base-gpu-id --main-gpu -mg --data-parallel-rank", _ONE_DEVICE, values="0"),
    **_all(
        """--distributed-executor-backend --data-parallel-backend --max-parallel-loading-workers
        --mm-encoder-tp-mode --dist-timeout --split-mode -sm --tensor-split -ts""",
        _ONE_DEVICE,
    ),
    **_all(
        """--disable-custom-all-reduce --enable-expert-parallel --enable-p2p-check --enable-dp-attention
        --ray-workers-use-nsight""",
        _ONE_DEVICE,
        "switch",
    ),
    **_all(
        """--enforce-eager --disable-cuda-graph --enable-torch-compile --disable-cuda-graph-padding --no-warmup
        --skip-server-warmup --skip-mm-profiling""",
        _NOTHING_COMPILED,
        "switch",
    ),
    **_all(
        """--compilation-config -cc -O --optimization-level --performance-mode --max-seq-len-to-capture
        --max-cudagraph-capture-size --cuda-graph-max-bs --torch-compile-max-bs --warmups""",
        _NOTHING_COMPILED,
    ),
    **_all("--cudagraph-capture-sizes --cuda-graph-sizes --cuda-graph-bs", _NOTHING_COMPILED, "values"),
    **_all(
        """--attention-backend --mm-encoder-attn-backend --mm-attention-backend --prefill-attention-backend
        --decode-attention-backend --sampling-backend --kernel-config --attention-config --moe-backend
        --n-gpu-layers --gpu-layers -ngl --threads-batch -tb""",
        _KERNELS,
    ),
    **_all("--flash-attn -fa", _KERNELS, "optional"),
    **_all("--model-impl", _KERNELS, values="auto vllm transformers"),
    **_all("--disable-cascade-attn --use-v2-block-manager --disable-flashinfer", _KERNELS, "switch"),
    **_all(
        "--enable-chunked-prefill --no-enable-chunked-prefill --enable-mixed-chunk --disable-chunked-mm-input",
        _CHUNKED,
        "switch",
    ),
    **_all(
        """--chunked-prefill-size --max-prefill-tokens --batch-size -b --ubatch-size -ub
        --long-prefill-token-threshold --max-num-partial-prefills --max-long-partial-prefills --max-batch-tokens
        --max-batch-requests""",
        _CHUNKED,
    ),
    **_all(
        """--swap-space --cpu-offload-gb --kv-offloading-size --kv-offloading-backend --preemption-mode
        --num-gpu-blocks-override --max-total-tokens --page-size --cache-type-k -ctk --cache-type-v -ctv
        --prefix-caching-hash-algo --mamba-cache-dtype --mamba-ssm-cache-dtype""",
        _CACHE,
    ),
    **_all(
        """--disable-hybrid-kv-cache-manager --calculate-kv-scales --kv-sharing-fast-prefill --enable-sleep-mode
        --mlock""",
        _CACHE,
        "switch",
    ),
    **_all("--mm-processor-cache-gb --mm-processor-cache-type --mm-shm-cache-max-object-size-mb", _MEDIA),
    **_all(
        "--disable-mm-preprocessor-cache --keep-mm-feature-on-device --interleave-mm-strings --enable-multimodal",
        _MEDIA,
        "switch",
    ),
    **_all(
        "--load-format",
        "safetensors, pytorch_model.bin and GGUF are told apart by the files; others are not read",
        values="auto safetensors pt hf npcache fastsafetensors runai_streamer gguf",
    ),
    **_all("--config-format", "config.json is what is read", values="auto hf"),
    **_all(
        "--tokenizer-mode", "the checkpoint's own tokenizer is used, always the fast one", values="auto hf slow fast"
    ),
    **_all(
        """--model-loader-extra-config --ignore-patterns --safetensors-load-strategy --pt-load-map-location
        --code-revision""",
        _LOADING,
    ),
    **_all("--use-tqdm-on-load --no-mmap --allow-deprecated-quantization", _LOADING, "switch"),
    **_all(
        "--scheduling-policy --schedule-policy --schedule-conservativeness --scheduler-delay-factor "
        "--num-scheduler-steps --num-lookahead-slots --stream-interval --max-concurrent-requests --watchdog-timeout",
        _SCHEDULE,
    ),
    **_all(
        """--async-scheduling --no-async-scheduling --disable-async-output-proc --disable-overlap-schedule
        --multi-step-stream-outputs --cont-batching -cb --disable-frontend-multiprocessing""",
        _SCHEDULE,
        "switch",
    ),
    **_all(
        "--tokenization-workers --renderer-num-workers --tokenizer-pool-size --tokenizer-pool-type "
        "--tokenizer-worker-num",
        "--media-workers is the number of threads that make prompts",
    ),
    **_all(
        """--disable-log-stats --enable-request-id-headers --enable-prompt-tokens-details --enable-metrics
        --metrics --json-output --disable-spans --log-disable --enable-log-outputs --enable-log-deltas
        --show-time-cost --log-requests --no-webui --slots --props --disable-fastapi-docs --jinja""",
        _LOG,
        "switch",
    ),
    **_all(
        """--uvicorn-log-level --max-log-len --log-level --log-level-http --log-config-file --otlp-traces-endpoint
        --otlp-endpoint --otlp-service-name --collect-detailed-traces --show-hidden-metrics-for-version
        --prometheus-port --h11-max-incomplete-event-size --h11-max-header-count""",
        _LOG,
    ),
    **_all(
        """--structured-outputs-config --guided-decoding-backend --grammar-backend""",
        "there is one backend, and every request may ask for a form (docs/structured-output.md)",
    ),
    **_all("--speculative-algorithm", _GUESSES, values="ngram standalone"),
    **_all("--speculative-model", _GUESSES, values="[ngram] ngram"),
    **_all(
        "--ngram-prompt-lookup-max --ngram-prompt-lookup-min --speculative-disable-by-batch-size",
        "how guesses are found and when they pay is measured",
    ),
    **_all("--enable-lora", "adapters need no preparation", "switch"),
    **_all(
        """--max-loras --max-lora-rank --max-cpu-loras --lora-dtype --max-loras-per-batch --max-loaded-loras
        --lora-extra-vocab-size --lora-backend --lora-eviction-policy""",
        "any number of adapters of any rank is loaded and computed together",
    ),
    **_all("--lora-target-modules", "an adapter's files say which layers it adapts", "values"),
    **_all("--enable-auto-tool-choice", "tools work whenever the model's template shows them", "switch"),
    **_all("--enable-reasoning", "reasoning is told apart whenever the model's template shows it", "switch"),
    **_all("--chat-template-content-format", "what a template takes is told from the template", values="auto"),
    **_all("--logprobs-mode", "log-probabilities are those of the model", values="raw_logprobs"),
    **_all("--response-role", "answers are the assistant's", values="assistant"),
    **_all("--sampling-defaults", "use --generation-config vllm to leave the checkpoint's own out", values="model"),
    **_all("--allowed-methods --allowed-headers", "pages of --allowed-origins may use every method and header"),
    **_all("--allow-credentials", "keys come in a header; cookies are never read", "switch"),
    **_all("--enable-server-load-tracking", "/load always answers", "switch"),
    **_all("--payload-limit", "--max-body-bytes bounds a JSON body"),
    **_all("--auto-truncate", "requests say it: `truncate_prompt_tokens`", "switch"),
    **_all("--video-pruning-rate", "every frame that is taken is seen", values="0 0.0"),
}

_OWN_TOKENIZER = "the checkpoint's own tokenizer is used; leave it out"
_PROXY = "put a reverse proxy in front for TLS"
_SAMPLING = "use --override-generation-config, such as '{\"temperature\": 0.6}'"

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        ("--tool-parser-plugin", "--reasoning-parser-plugin"),
        "formats are built in: --tool-call-parser and --reasoning-parser name one",
    ),
    "--tool-server": "the server runs no tools: it tells the client of the calls",
    "--reasoning-config": "the chat template and --reasoning-parser say how reasoning is marked",
    "--default-mm-loras": "requests name their adapter as their model",
    "--lora-scaled": "lora_alpha in adapter_config.json says how much an adapter counts",
    "--fully-sharded-loras": "a model is not split over devices or machines",
    **dict.fromkeys(
        ("--tokenizer", "--tokenizer-path", "--tokenizer-revision", "--skip-tokenizer-init"), _OWN_TOKENIZER
    ),
    **dict.fromkeys(
        ("--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs", "--ssl-cert-reqs", "--ssl-key-file", "--ssl-cert-file"),
        _PROXY,
    ),
    **dict.fromkeys(("--temp", "--top-k", "--top-p", "--min-p", "--repeat-penalty"), _SAMPLING),
    **dict.fromkeys(("-n", "--predict", "--n-predict"), "requests say it: `max_tokens`"),
    **dict.fromkeys(
        ("--rope-scaling", "--rope-theta", "--rope-scale", "--rope-freq-base", "--rope-freq-scale", "--yarn-orig-ctx"),
        "use --hf-overrides, such as '{\"rope_theta\": 1000000}'",
    ),
    **dict.fromkeys(("--hf-token", "--hf-api-token"), "set HF_TOKEN in the environment: others can read command lines"),
    **dict.fromkeys(("--logits-processors", "--logits-processor-pattern"), "code of others is never run"),
    **dict.fromkeys(
        (
            "--middleware",
            "--scheduler-cls",
            "--worker-cls",
            "--worker-extension-cls",
            "--io-processor-plugin",
            "--additional-config",
        ),
        "code of others is never run",
    ),
    **dict.fromkeys(
        ("--kv-transfer-config", "--ec-transfer-config", "--kv-events-config", "--disaggregation-mode"),
        "one server computes a request from beginning to end",
    ),
    "--disable-sliding-window": "a window is part of the model; use --hf-overrides '{\"sliding_window\": null}'",
    "--enable-prompt-embeds": "requests bring text, token ids or media",
    "--enable-mm-embeds": "requests bring text, token ids or media",
    "--enable-force-include-usage": "requests say it: `stream_options`",
    "--return-tokens-as-token-ids": "tokens are shown as text; leave it out",
    "--completion-template": "a completion's prompt is taken as it is",
    "--hf-config-path": "config.json is the checkpoint's own; use --hf-overrides",
    "--headless": "start several servers behind a proxy instead",
}


def in_our_words(argv: Sequence[str]) -> list[str]:
    """The same command line with our names for `RENAMED` flags; values stay as they are. vLLM's `--flag.key value`
    become one flag with an object."""
    words: list[str] = []
    for word in _joined(argv):
        name, equals, value = word.partition("=")
        ours = RENAMED.get(name)
        words += [word] if ours is None else [*ours[:-1], ours[-1] + equals + value]
    return words


def _joined(argv: Sequence[str]) -> list[str]:
    words: list[str] = []
    objects: dict[str, dict[str, Any]] = {}
    rest = iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        flag, *path = name.split(".")
        if not (flag.startswith("--") and all(path) and path):
            words.append(word)
            continue
        place = objects.setdefault(flag, {})
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = _value(value if equals else next(rest, ""))
    return [*words, *(word for flag, found in objects.items() for word in (flag, json.dumps(found)))]


def _value(text: str) -> Any:
    """JSON, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
