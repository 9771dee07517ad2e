"""Frozen configuration. Command-line flags are generated from these fields: the metadata is the help text.

A field's flag is its name with dashes; `parse` in the metadata names a parser of `cli/flags.py` where the type alone
does not say how to read the flag, `min` and `max` bound it (numbers are never negative). "auto" values are resolved
before a config is built, never afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sensorium.units import GiB, MiB, size_text

MAX_SPECULATIVE_TOKENS = 64
DRAFT_FLAG = "--draft-model"
_BASE_URL = (
    "Address of the server, with or without /v1. Default: the only one that runs here, else http://127.0.0.1:8000."
)
ENCODER_CACHE_BYTES = 256 * MiB  # unless the operator says otherwise
WINDOWS_TOGETHER = 8
"""Windows of a recording that are decoded at a time, where none depends on the one before: weights are read once."""
PROMPT_MEMORY_BYTES = 5 * GiB  # of workers that render templates and compile grammars, where there is enough


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field that becomes a command-line flag. Mutable defaults are given as a callable."""
    metadata = {"help": help, **metadata}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything the engine process needs beside the checkpoint's own files."""

    model: str  # resolved local folder
    text_model: str = ""  # resolved folder of the language model, where the checkpoint has none of its own
    draft_model: str = ""  # resolved folder of the model that guesses tokens, if there is one
    dtype: str = flag(
        "auto",
        "Weights' and computation's type. auto: as the checkpoint says, bfloat16 on a CPU for "
        "float16 or quantised weights.",
        choices=("auto", "bfloat16", "float16", "float32"),
        synonyms={
            "half": "float16",
            "fp16": "float16",
            "f16": "float16",
            "float": "float32",
            "fp32": "float32",
            "f32": "float32",
            "bf16": "bfloat16",
        },
    )
    device: str = flag(
        "auto",
        "Where to compute. auto: cuda if there is one, else cpu.",
        choices=("auto", "cpu", "cuda"),
        synonyms={"gpu": "cuda"},
    )
    quantization: str = flag(
        "auto",
        "Weights of linear layers and embeddings. auto: as the checkpoint has them; int8, "
        "int4 and, on a GPU, fp8: quantised while loading, the head and embeddings to int8 in any case; a "
        "method's name: the checkpoint must be stored so.",
        choices=(
            *("auto", "int8", "int4", "awq", "gptq", "compressed-tensors", "mxfp4", "gguf"),
            *("fp8", "modelopt", "bitsandbytes", "mlx", "hqq"),
        ),
        synonyms={"none": "auto", "awq_marlin": "awq", "gptq_marlin": "gptq", "fbgemm_fp8": "fp8"},
    )
    quantization_group_size: int = flag(
        64, "Weights that share a scale with --quantization int4; a multiple of 8.", min=32, max=128
    )
    map_weights: bool = flag(
        True,
        "Start a large bfloat16 model with its weights where the page cache has them "
        "(AVX-512); the copy that is fastest, 12 bits a weight without loss, is made a "
        "layer at a time, between steps.",
    )
    quantized_cache: str = flag(
        "~/.cache/sensorium/quantized",
        "Folder that keeps what --quantization made of a large "
        "checkpoint, for a faster next start; empty: nothing is kept.",
    )
    quantize_towers: bool = flag(False, "Let --quantization have the vision and audio towers and projectors too.")
    pooling: str = flag(
        "auto",
        "Which token states an embedding is made of. auto: as the checkpoint's files say; "
        "without them the last token's, of an encoder the first's.",
        choices=("auto", "cls", "mean", "last", "max", "mean_sqrt_len", "weighted_mean"),
        synonyms={"last-token": "last", "lasttoken": "last"},
    )
    kv_cache_dtype: str = flag(
        "auto",
        "Type of cached keys and values. auto: the computation's; int8: a byte each, with a scale per token and head; "
        "fp8: e4m3 numbers without scales, on a GPU.",
        choices=("auto", "int8", "fp8"),
        synonyms={"fp8_e4m3": "fp8", "fp8_e4m3fn": "fp8"},
    )
    max_model_len: int | None = flag(
        None,
        "Longest prompt plus completion, such as 32768 or 32K. Default (also auto, -1): "
        "the checkpoint's, reduced to what the KV cache holds.",
        min=1,
        parse="tokens_or_auto",
    )
    hf_overrides: dict[str, Any] = flag(
        dict, 'JSON of values in the place of config.json\'s, such as {"rope_theta": 1000000}.', parse="json"
    )
    max_num_seqs: int = flag(64, "Most sequences computed in one step. More wait in the queue.", min=1)
    max_num_batched_tokens: int | None = flag(
        None,
        "Most tokens computed in one step; longer prompts come in chunks. "
        "Default: 2048; 512 on a CPU for a model from 64 MiB that "
        "generates.",
        min=1,
        parse="tokens",
    )
    gpu_memory_utilization: float = flag(
        0.9, "Part of the GPU's memory that weights, activations and KV cache may take.", min=0.01, max=1
    )
    kv_cache_memory: int | None = flag(
        None,
        "Bytes of KV cache, such as 4GB or 512MiB; of a split model, each rank's. Default on a CPU: a quarter of "
        "free memory.",
        parse="size",
    )
    block_size: int = flag(16, "Tokens in a KV-cache block; the unit of prefix reuse.", min=1, max=256)
    enable_prefix_caching: bool = flag(True, "Reuse the KV cache of equal beginnings of prompts (media included).")
    encoder_cache_memory: int | None = flag(
        None,
        f"Bytes of tower outputs: what is in use, and what is kept for media that come again. Default: "
        f"{size_text(ENCODER_CACHE_BYTES)}, of models that transcribe room for {WINDOWS_TOGETHER} windows. On a CPU at "
        "most an eighth of free memory.",
        parse="size",
    )
    speculative_tokens: int = flag(
        16,
        "Most tokens of a step that are guessed of one answer, where its last ones stood in its prompt, or in itself, "
        "before, or by --draft-model. Changes no token; guesses as long as it is faster. 0: never.",
        max=MAX_SPECULATIVE_TOKENS,
    )
    seed: int = flag(0, "Seed of requests that bring none.")
    hang_after_s: float = flag(
        10.0,
        "Seconds without a sign of life after which the engine process is replaced, and "
        "least seconds of a step that counts as hung (or 20 times what like steps take).",
        min=0.1,
    )
    threads: int | None = flag(
        None,
        "CPU threads of the engine, or of each rank. Default: all cores, shared out; one for a model under 64 MiB.",
        min=1,
    )
    tensor_parallel_size: int = flag(
        1, "Devices that one model is split over, each computed by a process, a rank (docs: scaling).", min=1, max=64
    )


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may ask for. Every field is a flag; each has a test (docs: safety)."""

    max_header_bytes: int = flag(32 * 1024, "Bytes of all request headers; more is 431.", parse="size")
    max_headers: int = flag(100, "Number of request headers; more is 431.")
    max_request_line_bytes: int = flag(8 * 1024, "Bytes of the request line; more is 414.", parse="size")
    header_timeout_s: float = flag(10.0, "Seconds until a connection's headers must be complete.")
    body_timeout_s: float = flag(60.0, "Seconds until a request's body must be complete; later is 408.")
    max_body_bytes: int = flag(64 * MiB, "Bytes of a JSON body; more is 413.", parse="size")
    max_json_nodes: int = flag(2**16, "Arrays, objects and keys of a JSON body; more is 400.", min=1)
    max_json_values: int = flag(
        2**20, "Values of a JSON body, such as token ids; more is 400. At least twice max-embedding-tokens.", min=1
    )
    max_upload_bytes: int = flag(32 * MiB, "Bytes of a multipart body; more is 413.", parse="size")
    max_body_messages: int = flag(20_000, "Pieces in which a body may arrive; more is 413.")
    max_pending_bytes: int = flag(
        384 * MiB,
        "Bytes of all bodies that are being received or made into prompts, and as many of media fetched for them; more "
        "is 503. At most eight hundredths of what the machine or a control group leaves beside the model.",
        parse="size",
    )
    max_messages: int = flag(1024, "Messages of one chat.", max=8192)
    max_parts: int = flag(256, "Content parts of one message.", max=4096)
    max_images: int = flag(16, "Images in one request.")
    max_videos: int = flag(2, "Videos of one request.")
    max_audios: int = flag(2, "Audio items in one request.")
    max_image_bytes: int = flag(20 * MiB, "Bytes of one image file.", parse="size")
    max_image_pixels: int = flag(40_000_000, "Pixels of one image.")
    min_image_side: int = flag(4, "Shortest side of an image, in pixels.")
    max_image_side: int = flag(16384, "Longest side of an image, in pixels.")
    max_image_aspect: float = flag(200.0, "Largest ratio of an image's longest side to its shortest.")
    max_video_bytes: int = flag(64 * MiB, "Bytes of one video's file.", parse="size")
    max_video_frames: int = flag(128, "Frames decoded from one video.")
    max_video_seconds: float = flag(600.0, "Duration of one video.")
    max_video_pixels: int = flag(
        128_000_000, "Pixels of all frames taken from one video together; larger ones are scaled down."
    )
    max_video_side: int = flag(4096, "Longest side of a video, in pixels.")
    max_audio_bytes: int = flag(25 * MiB, "Bytes of one audio file.", parse="size")
    max_audio_seconds: float = flag(600.0, "Duration of one audio item.")
    max_recording_seconds: float = flag(
        7200.0, "The same of models that transcribe: Whisper window by window, others as far as the context reaches."
    )
    max_url_length: int = flag(2048, "Characters of an http(s) URL.")
    max_redirects: int = flag(3, "Redirects followed when fetching media, each checked anew.")
    fetch_timeout_s: float = flag(10.0, "Seconds for one media download, redirects included.")
    media_memory: int = flag(
        4 * GiB,
        "Bytes that media may take while they are decoded and processed, all together; an item that needs more is "
        "refused. At most three tenths of what the machine or a control group leaves beside the model.",
        parse="size",
    )
    prompt_memory: int = flag(
        PROMPT_MEMORY_BYTES,
        "Bytes that the processes which render chat templates and compile grammars may take for their jobs, all "
        "together: where it is less each gets less, or fewer of them run. At most eight hundredths of what the machine "
        "or a control group leaves beside the model, but enough for two of each kind.",
        parse="size",
    )
    decode_timeout_s: float = flag(20.0, "Longest time to decode one media item, in seconds.")
    max_n: int = flag(16, "Choices per prompt (`n`).")
    max_stop: int = flag(4, "Stop strings of one request.", max=64)
    max_stop_bytes: int = flag(256, "Bytes of one stop string.", max=4096)
    max_logit_bias: int = flag(300, "Entries of `logit_bias`.", max=4096)
    max_logprobs: int = flag(20, "Alternatives reported per token.")
    max_embedding_inputs: int = flag(2048, "Inputs of one embeddings request.")
    max_embedding_tokens: int = flag(300_000, "Tokens of one embeddings request.")
    max_embedding_media: int = flag(64, "Media of one embeddings or rerank request with several inputs.")
    max_waiting: int | None = flag(
        None, "Requests that may wait; more are refused with 503. Default: 4 x max-num-seqs."
    )
    max_concurrency_per_key: int = flag(256, "Requests of one API key in flight; more are refused with 429.")
    request_timeout_s: float = flag(
        600.0,
        "Seconds one request may take in all; of a recording that a model transcribes window by window, seconds since "
        "the last window was done.",
    )
    write_timeout_s: float = flag(
        45.0, "Seconds for which a client may read nothing of what it is sent; then it is disconnected.", min=1
    )
    keep_alive_comment_s: float = flag(15.0, "Seconds of silence on a stream after which a comment is sent.")
    drain_timeout_s: float = flag(30.0, "Seconds that running requests have after SIGTERM.")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The HTTP process: where it listens, whom it lets in, what media it fetches."""

    host: str = flag("127.0.0.1", "Address to listen on; 0.0.0.0 for every interface.")
    port: int = flag(8000, "Port to listen on; 0 for any free one.", max=65535)
    metrics_port: int | None = flag(
        None,
        "Port of its own for /metrics and the health paths, where they need no key and nothing else answers; 0 for any "
        "free one. For scrapers that send no key.",
        max=65535,
    )
    metrics_host: str = flag(
        "127.0.0.1", "Address of --metrics-port. Whoever reaches it reads figures and the names of models."
    )
    uds: str | None = flag(
        None,
        "Listen on a Unix socket of this path instead of host and port. The umask says who "
        "may connect besides the owner.",
    )
    api_key: tuple[str, ...] = flag(
        (),
        "Key that clients must send as `Authorization: Bearer`. Repeatable; also "
        "from SENSORIUM_API_KEY (comma-separated).",
        repeat=True,
    )
    operator_key: tuple[str, ...] = flag(
        (),
        "Key of those who may change what is served (/v1/models/load and /unload); good for everything else, too. "
        "Repeatable; also from SENSORIUM_OPERATOR_KEY (comma-separated). Without any key: whoever is on this machine.",
        repeat=True,
    )
    models_dir: str | None = flag(
        None,
        "Folder whose checkpoints are served as well, each by its path in there (of Ollama's store by its name:tag), "
        "loaded at its first request.",
    )
    memory: int | None = flag(
        None,
        "Bytes that the engines of all models may take together; the model that was used longest ago makes room. "
        "Default with several models: what is free when the server starts; on a GPU --gpu-memory-utilization of it.",
        parse="size",
    )
    load_wait_s: float = flag(300.0, "Seconds that a request waits for its model to be loaded; later is 503.")
    allowed_origins: tuple[str, ...] = flag(
        (),
        "Origins of web pages that may call this server from a browser, such as https://chat.example; * for any. "
        "Default: none but its own.",
        nargs="+",
        parse="origins",
    )
    root_path: str = flag("", "Path under which a reverse proxy serves this server.")
    served_model_name: tuple[str, ...] = flag(
        (), "Name(s) clients call the model by. Default: MODEL as given.", nargs="+"
    )
    allowed_local_media_path: str | None = flag(None, "Folder from which `file:` URLs may be read. Default: none.")
    allowed_media_domains: tuple[str, ...] = flag(
        (),
        "Hosts that media may be fetched from, also private or loopback ones named here. Default: any public host.",
        nargs="+",
    )
    limit_mm_per_prompt: dict[str, int] = flag(dict, "Media per request: image=2,video=1 or JSON.", parse="counts")
    mm_processor_kwargs: dict[str, Any] = flag(
        dict, 'JSON of processor settings, such as {"max_pixels": 1003520}.', parse="json"
    )
    media_io_kwargs: dict[str, Any] = flag(
        dict, 'JSON of how media are read: {"video": {"num_frames": 40}} or {"video": {"fps": 1}}.', parse="json"
    )
    allow_request_mm_kwargs: bool = flag(False, "Let requests bring `mm_processor_kwargs`.")
    allow_request_chat_template: bool = flag(False, "Let requests bring `chat_template`.")
    chat_template: str | None = flag(
        None,
        "Chat template: a file, the template itself or a name (llava, "
        "vlm2vec_phi3v, dse_qwen2_vl). Default: the checkpoint's.",
    )
    tool_call_parser: str = flag(
        "auto",
        "How the model writes tool calls, in our words or vLLM's, such as hermes, llama3_json or qwen3_coder (docs: "
        "tools). auto: as its chat template and vocabulary show; none: tools are refused.",
    )
    reasoning_parser: str = flag(
        "auto",
        "How the model writes its reasoning, such as think, mistral or harmony, or in vLLM's words. auto: as its chat "
        "template and vocabulary show; none: reasoning is text.",
    )
    generation_config: str = flag(
        "auto",
        "Where sampling defaults come from. auto: the checkpoint's "
        "generation_config.json; vllm: nowhere; else a folder with such a file.",
    )
    override_generation_config: dict[str, Any] = flag(
        dict, 'JSON of sampling defaults in its place, such as {"temperature": 0.6}.', parse="json"
    )
    matryoshka_dimensions: tuple[int, ...] = flag(
        (),
        "Sizes to which requests may cut embeddings (`dimensions`); 0 for any. Default: what config.json says.",
        nargs="+",
    )
    embed_in_chunks: bool = flag(
        False, "Embed texts that are longer than the context, too: the mean of the vectors of their parts, by length."
    )
    max_embed_len: int | None = flag(
        None, "Longest text that is embedded in chunks. Default: --max-embedding-tokens.", min=1, parse="tokens"
    )
    shared_prefix_cache: bool = flag(
        False, "Share cached prefixes between API keys (faster, but timing tells who asked what)."
    )
    enable_tokenizer_info_endpoint: bool = flag(False, "Show the tokenizer's settings at /tokenizer_info.")
    disable_log_requests: bool = flag(False, "Do not log a line per request.")
    media_workers: int = flag(2, "Threads that fetch, decode and process media.", min=1)


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """Where the checkpoint comes from."""

    lazy: bool = flag(False, "Load the model at its first request, not when the server starts.")
    idle_unload_s: float | None = flag(
        None, "Seconds without a request after which the model's memory is given back. Default: it stays."
    )
    pinned: bool = flag(False, "Never unload the model, not even where another one needs its memory.")
    revision: str | None = flag(None, "Branch, tag or commit of a hub repository.")
    download_dir: str | None = flag(None, "Where hub files are kept. Default: the hub's cache.")
    text_model: str | None = flag(
        None,
        "Language model of a checkpoint that has none of its own (Ultravox): a folder "
        "or a hub id. Default: the one that the checkpoint names.",
    )
    draft_model: str | None = flag(
        None,
        "Smaller model with the same vocabulary that guesses tokens where nothing stood before: a folder, a GGUF file "
        "or a hub id (docs: speculation). CPU only. Default: none.",
    )
    mmproj: str | None = flag(
        None,
        "GGUF file with the model's tower (a projector of llama.cpp). Default: the only mmproj*.gguf beside the "
        "model's file.",
    )
    trust_remote_code: bool = flag(False, "Accepted for compatibility. Remote code is never run and never needed.")
    task: str = flag(
        "auto",
        "Narrow what is served. auto: everything the model can do; pooling: all but generate.",
        choices=("auto", "generate", "pooling", "embed", "classify", "reward", "score"),
        synonyms={"embedding": "embed", "transcription": "generate", "classification": "classify"},
    )
    runner: str = flag(
        "auto", "The same in vLLM's words: generate or pooling.", choices=("auto", "generate", "pooling")
    )
    convert: str = flag(
        "auto",
        "The same in vLLM's words: what a pooling model does.",
        choices=("auto", "none", "embed", "classify", "reward"),
    )
    pooler_config: dict[str, Any] = flag(
        dict,
        "JSON of vLLM's settings of a pooling model: `pooling_type` and `task` are those of --pooling and --task.",
        parse="json",
    )
    lora: tuple[str, ...] = flag(
        (),
        "LoRA adapter(s) of the model as PEFT saves them, NAME=PATH, a folder or a hub id. Requests ask for NAME as "
        "their model.",
        nargs="+",
        parse="adapter",
    )
    speculative_config: dict[str, Any] = flag(
        dict,
        "JSON of vLLM's settings of guessed tokens: `num_speculative_tokens` is --speculative-tokens, `model` is "
        "--draft-model; the methods are ngram and draft_model.",
        parse="json",
    )


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """A parsed `sensorium serve`. `engine.model` is still empty: the folder is known once `model` is resolved."""

    model: str | None  # folder or hub id; None is the built-in model
    load: LoadConfig
    engine: EngineConfig
    server: ServerConfig
    limits: Limits
    notes: tuple[str, ...] = ()  # of flags that were accepted and change nothing


@dataclass(frozen=True, slots=True)
class ServePlan:
    """What one server serves. `common` has what is the server's: where it listens, limits, memory."""

    common: ServeOptions
    models: tuple[ServeOptions, ...]  # those that are named; `common.server.models_dir` may have more


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """A file of requests to answer."""

    input_file: str = flag("", "File or http(s) URL of requests, an object {custom_id, method, url, body} a line.")
    output_file: str = flag(
        "", "File for the answers, in the order of the requests. FILE.journal beside it has those that are there."
    )
    url: str | None = flag(
        None, "Address of a server that answers, such as http://127.0.0.1:8000. Default: MODEL is loaded for it."
    )
    concurrency: int | None = flag(
        None, "Most requests under way. Default: twice what the engines compute at a time; 64 of a server.", min=1
    )
    overwrite: bool = flag(False, "Replace an output file that is there.")


@dataclass(frozen=True, slots=True)
class ChatConfig:
    """A terminal chat with a running server."""

    base_url: str = flag("", _BASE_URL)
    model: str | None = flag(None, "Model to talk to. Default: the first that the server lists.")
    api_key: str | None = flag(None, "The server's key; also from SENSORIUM_API_KEY.")
    system: str | None = flag(None, "System prompt.")
    max_tokens: int = flag(512, "Longest completion, in tokens.", min=1)
    temperature: float | None = flag(None, "Sampling temperature. Default: the model's.")


@dataclass(frozen=True, slots=True)
class ListConfig:
    """Models on this machine."""

    download_dir: str | None = flag(None, "Where hub files are kept. Default: the hub's cache.")
    models_dir: str | None = flag(
        None, "List the checkpoints of this folder instead, as serve --models-dir finds them."
    )


@dataclass(frozen=True, slots=True)
class PullConfig:
    """A model that is fetched."""

    revision: str | None = flag(None, "Branch, tag or commit of a hub repository.")
    download_dir: str | None = flag(None, "Where hub files are kept. Default: the hub's cache.")


@dataclass(frozen=True, slots=True)
class PsConfig:
    """What runs on this machine."""

    api_key: str | None = flag(None, "The servers' key, to be told of their models; also from SENSORIUM_API_KEY.")


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many replicas there may be."""

    least: int
    most: int

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}..{self.most}"


RAY_ADDRESS = "Address of the Ray cluster, HOST:6379. auto: the one that RAY_ADDRESS names, else this machine's."


@dataclass(frozen=True, slots=True)
class DeployConfig:
    """Replicas of a server, on the machines of a Ray cluster."""

    replicas: Replicas = flag(
        lambda: Replicas(1, 1),
        "Replicas of each model: 2, or 1..8 to start and end them by the requests in flight.",
        parse="replicas",
    )
    target_requests: int | None = flag(
        None,
        "Requests in flight of each replica that are aimed at: with more of them another replica is started. Default: "
        "six tenths of --max-num-seqs.",
        min=1,
    )
    gpus_per_replica: float | None = flag(
        None,
        "GPUs that Ray gives a replica. Default: --tensor-parallel-size where there are some, unless --device is cpu.",
    )
    cpus_per_replica: float = flag(
        1.0, "CPU cores that Ray keeps for a replica, and threads of an engine that has no GPU.", min=0.1
    )
    scale_up_s: float = flag(10.0, "Seconds of too many requests until a replica is started.")
    scale_down_s: float = flag(300.0, "Seconds of too few requests until a replica is ended.")
    proxies: str = flag(
        "every",
        "Machines on which Ray listens at --host and --port: every one that has replicas, or the head node alone.",
        choices=("every", "head"),
    )
    app: str = flag("sensorium", "Name of the application at Ray Serve. One of that name is replaced.")
    delete: bool = flag(False, "End the application --app instead; its replicas finish their requests.")
    ray_address: str = flag("auto", RAY_ADDRESS)


@dataclass(frozen=True, slots=True)
class StatusConfig(PsConfig):
    """What runs on this machine, and on the machines of a Ray cluster."""

    ray_address: str = flag("auto", RAY_ADDRESS)


@dataclass(frozen=True, slots=True)
class StopConfig:
    """Servers that are to end."""

    all: bool = flag(False, "Stop all servers of this user.")
    timeout_s: float = flag(60.0, "Seconds to wait for each, which finishes requests first.")


@dataclass(frozen=True, slots=True)
class RequestShape:
    """What the requests of a load look like."""

    kind: str = flag(
        "text",
        "What a request is: a chat of text, or with images, a recording or a clip; a chat that must call a tool or "
        "answer in JSON; texts to embed; documents to rank.",
        choices=("text", "image", "audio", "video", "tools", "json", "embeddings", "rerank"),
    )
    input_tokens: int = flag(128, "Text tokens of a prompt, about; image tokens are extra.", min=1)
    output_tokens: int = flag(64, "Tokens of a completion, exactly where the server knows `ignore_eos`.", min=1)
    image_size: tuple[int, int] = flag(
        (448, 448), "Width and height of images and clips, in pixels, such as 448x448.", parse="extent"
    )
    images: int = flag(1, "Images in a request of kind image.", min=1)
    audio_seconds: float = flag(5.0, "Duration of the recording of kind audio.", min=0.1)
    frames: int = flag(8, "Frames of the clip of kind video.", min=1)
    inputs: int = flag(16, "Texts of kind embeddings, or documents of kind rerank, in a request.", min=1)


@dataclass(frozen=True, slots=True)
class BenchConfig(RequestShape):
    """One load on one server."""

    base_url: str = flag("", _BASE_URL)
    model: str | None = flag(None, "Model to ask for. Default: the first that the server lists.")
    requests: int = flag(64, "Requests to send.", min=1)
    concurrency: int = flag(8, "Closed loop: requests in flight at any time.", min=1)
    rate: float | None = flag(
        None,
        "Open loop: requests a second, arriving at random (Poisson), however many are in "
        "flight. Replaces --concurrency.",
        min=0.001,
    )
    warmup: int = flag(2, "Requests sent before the clock starts.")
    api_key: str | None = flag(None, "The server's key; also from SENSORIUM_API_KEY.")
    seed: int = flag(0, "Seed of prompts, images and arrivals. Use another one for every run on one server.")
    timeout_s: float = flag(1200.0, "Seconds after which a request counts as failed.")
    json: str | None = flag(None, "File to write the figures to.")


@dataclass(frozen=True, slots=True)
class ModelBenchConfig(RequestShape):
    """One measurement of a model without a server."""

    requests: int = flag(256, "throughput: requests, all at once.", min=1)
    together: int = flag(1, "latency: requests that are sent together.", min=1)
    iterations: int = flag(10, "latency, startup: how often it is done.", min=1)
    json: str | None = flag(None, "File to write the figures to.")
