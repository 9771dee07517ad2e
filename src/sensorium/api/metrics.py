"""What the server counts, kept as plain numbers so that counting costs nothing per token, shown in Prometheus' format.

Names are vLLM's where the meaning is the same, so that dashboards keep working; `sensorium:` marks our own.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from sensorium.serving.catalog import ModelState
from sensorium.types import STEP_TOKENS, EngineReady, EngineStats, Modality

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from sensorium.serving.media import MediaTiming

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

_LATENCY_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
    2560.0,
)
_TOKEN_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_REQUEST_S = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
    1920.0,
    7680.0,
)
_RESPONSE_S = (0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 300.0)
_TOKENS = (
    1,
    2,
    5,
    10,
    20,
    50,
    100,
    200,
    500,
    1000,
    2000,
    5000,
    10_000,
    20_000,
    50_000,
    100_000,
    200_000,
    500_000,
    1_000_000,
)
_STAGES = ("fetch", "decode", "process")
_PREEMPTIONS = (0, 1, 2, 5, 10, 20)
_REFUSALS = ("queue_full", "queue_full_tokens")
_SERVER_REFUSALS = ("memory", "key_concurrency")  # before the model's name is read
_CHOICES = (1, 2, 5, 10, 20)
_SLEEP: Mapping[ModelState, str] = {"ready": "awake", "draining": "awake", "unloaded": "discard_all"}
"""vLLM's word for a model's state. Others have none: to its dashboards, a model without any is down."""


class Histogram:
    """Counts per bucket; made cumulative only when shown."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        rows: list[tuple[str, float]] = []
        seen = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            seen += count
            rows.append((bound, seen))
        return rows


class ModelMetrics:
    """One model's numbers as the HTTP process sees them."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.finished: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.first_token_s = Histogram(_LATENCY_S)
        self.inter_token_s = Histogram(_TOKEN_S)
        self.time_per_token_s = Histogram(_TOKEN_S)
        self.request_s = Histogram(_REQUEST_S)
        self.prompt_s = Histogram(_LATENCY_S)
        self.request_prompt_tokens = Histogram(_TOKENS)
        self.request_generation_tokens = Histogram(_TOKENS)
        self.queue_s = Histogram(_LATENCY_S)
        self.prefill_s = Histogram(_LATENCY_S)
        self.decode_s = Histogram(_REQUEST_S)
        self.inference_s = Histogram(_REQUEST_S)
        self.request_longest = Histogram(_TOKENS)
        self.request_computed_tokens = Histogram(_TOKENS)
        self.request_preemptions = Histogram(_PREEMPTIONS)
        self.request_n = Histogram(_CHOICES)
        self.request_max_tokens = Histogram(_TOKENS)
        self.media_s = {(stage, kind): Histogram(_LATENCY_S) for stage in _STAGES for kind in get_args(Modality)}

    def refuse(self, reason: str) -> None:
        self.refused[reason] += 1

    def asked(self, choices: int, max_tokens: int) -> None:
        self.request_n.observe(choices)
        self.request_max_tokens.observe(max_tokens)

    def first_output(self, wait_s: float, queue_s: float, prefill_s: float) -> None:
        self.first_token_s.observe(wait_s)
        self.queue_s.observe(queue_s)
        self.prefill_s.observe(prefill_s)

    def generated(self, tokens: int, since_s: float) -> None:
        self.generation_tokens += tokens  # as they come, so that a throughput over seconds means something
        if tokens and since_s:
            self.inter_token_s.observe(since_s / tokens)

    def choice_ended(self, reason: str, tokens: int, *, prefill_s: float, decode_s: float, preemptions: int) -> None:
        self.finished[reason] += 1
        self.request_generation_tokens.observe(tokens)
        self.request_preemptions.observe(preemptions)
        if tokens:
            self.decode_s.observe(decode_s)
            self.inference_s.observe(prefill_s + decode_s)
        if tokens > 1:
            self.time_per_token_s.observe(decode_s / (tokens - 1))

    def request_ended(
        self, prompt_tokens: Sequence[int], cached_tokens: int, seconds: float, longest: Iterable[int]
    ) -> None:
        self.request_computed_tokens.observe(sum(prompt_tokens) - cached_tokens)
        for tokens in longest:
            self.request_longest.observe(tokens)
        for tokens in prompt_tokens:
            self.prompt_tokens += tokens
            self.request_prompt_tokens.observe(tokens)
        self.cached_tokens += cached_tokens
        self.request_s.observe(seconds)

    def pooled(self, cached_tokens: int, queue_s: float, prefill_s: float) -> None:
        self.cached_tokens += cached_tokens
        self.queue_s.observe(queue_s)
        self.prefill_s.observe(prefill_s)

    def pooling_ended(self, prompt_tokens: Sequence[int], done: int, failure: str, seconds: float) -> None:
        self.request_s.observe(seconds)
        self.finished["stop"] += done
        self.finished[failure] += len(prompt_tokens) - done
        for tokens in prompt_tokens:
            self.prompt_tokens += tokens
            self.request_prompt_tokens.observe(tokens)

    def observe_prompt(self, text_s: float, media: Iterable[MediaTiming] = ()) -> None:
        """What making a prompt took; a media item that was cached was only fetched."""
        self.prompt_s.observe(text_s)
        for timing in media:
            spent = (timing.fetch_s, timing.decode_s, timing.process_s)
            for stage, seconds in list(zip(_STAGES, spent, strict=True))[: 1 if timing.cached else None]:
                self.media_s[stage, timing.kind].observe(seconds)


@dataclass(frozen=True, slots=True)
class EngineNumbers:
    """One model's latest gauges."""

    stats: EngineStats
    ready: EngineReady | None
    state: ModelState
    users: int
    resident_bytes: int
    adapters: tuple[str, ...] = ()  # in use
    loaded_adapters: int = 0


class Metrics:
    """All models' numbers and the HTTP edge's."""

    def __init__(self, names: Iterable[str]) -> None:
        self.models = {name: ModelMetrics() for name in names}
        self.responses: Counter[tuple[str, str, int]] = Counter()  # (method, route, status)
        self.response_s: dict[tuple[str, str], Histogram] = {}  # (method, route)
        self.refused: Counter[str] = Counter()  # whatever model was meant

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request was answered after so long, streams to their end; status 0: the client left before."""
        self.responses[method, route, status] += 1
        self.response_s.setdefault((method, route), Histogram(_RESPONSE_S)).observe(seconds)

    def refuse(self, reason: str) -> None:
        self.refused[reason] += 1

    def render(self, engines: Mapping[str, EngineNumbers]) -> bytes:
        """The page that Prometheus reads. `engines` are the latest gauges, by model name."""
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.registry import Collector

        metrics = self

        class Page(Collector):
            def collect(self) -> Iterator[Metric]:
                return metrics.families(engines)

        registry = CollectorRegistry(auto_describe=False)
        registry.register(Page())
        return generate_latest(registry)

    def families(self, engines: Mapping[str, EngineNumbers]) -> Iterator[Metric]:
        page = _Page()
        for name, model in self.models.items():
            page.model(name, model)
        for name, numbers in engines.items():
            page.engine(name, numbers.stats, numbers.ready)
            page.entry(name, numbers)
        page.refusals({**dict.fromkeys(_SERVER_REFUSALS, 0), **self.refused}, {})
        for (method, route, status), count in self.responses.items():
            page.counter(
                "http_requests",
                "Responses by route and status, but of health and metrics.",
                count,
                handler=route,
                method=method,
                status=f"{status // 100}xx" if status else "none",  # as vLLM's dashboards ask for it
                code=str(status),
            )
        for (method, route), histogram in self.response_s.items():
            page.histogram(
                "http_request_duration_seconds",
                "From a request's arrival to the end of its response.",
                histogram,
                handler=route,
                method=method,
            )
        yield from page.metrics.values()


class _Page:
    """Collects samples into metric families, one family per name."""

    def __init__(self) -> None:
        self.metrics: dict[str, Metric] = {}

    def _family(self, kind: str, name: str, help_text: str) -> Metric:
        from prometheus_client.core import Metric

        if name not in self.metrics:
            self.metrics[name] = Metric(name, help_text, kind)
        return self.metrics[name]

    def gauge(self, name: str, help_text: str, value: float, **labels: str) -> None:
        self._family("gauge", name, help_text).add_sample(name, labels, value)

    def counter(self, name: str, help_text: str, value: float, **labels: str) -> None:
        self._family("counter", name, help_text).add_sample(name + "_total", labels, value)

    def histogram(self, name: str, help_text: str, histogram: Histogram, **labels: str) -> None:
        family = self._family("histogram", name, help_text)
        rows = histogram.cumulative()
        for bound, count in rows:
            family.add_sample(name + "_bucket", {**labels, "le": bound}, count)
        family.add_sample(name + "_count", labels, rows[-1][1])
        family.add_sample(name + "_sum", labels, histogram.total)

    def model(self, name: str, model: ModelMetrics) -> None:
        labels = {"model_name": name, "engine": "0"}
        self.counter("vllm:prompt_tokens", "Prompt tokens of answered requests.", model.prompt_tokens, **labels)
        for source, count in (
            ("local_compute", model.prompt_tokens - model.cached_tokens),
            ("local_cache_hit", model.cached_tokens),
        ):
            self.counter("vllm:prompt_tokens_by_source", "The same, by origin.", count, source=source, **labels)
        self.counter("vllm:prompt_tokens_cached", "Prompt tokens found in the cache.", model.cached_tokens, **labels)
        self.counter("vllm:generation_tokens", "Generated tokens.", model.generation_tokens, **labels)
        for reason in ("stop", "length", "abort", "error"):
            self.counter(
                "vllm:request_success",
                "Ended requests by reason.",
                model.finished[reason],
                finished_reason=reason,
                **labels,
            )
        self.refusals({**dict.fromkeys(_REFUSALS, 0), **model.refused}, labels)
        self._histograms(model, labels)

    def refusals(self, counts: Mapping[str, int], labels: dict[str, str]) -> None:
        for reason, count in counts.items():
            self.counter("vllm:admission_rejections", "Requests refused unseen.", count, reason=reason, **labels)

    def entry(self, name: str, numbers: EngineNumbers) -> None:
        labels = {"model_name": name, "engine": "0"}
        for state in get_args(ModelState):
            self.gauge(
                "sensorium:model_state", "1 for the state it is in.", state == numbers.state, state=state, **labels
            )
        if now := _SLEEP.get(numbers.state):
            for sleep in ("awake", "weights_offloaded", "discard_all"):
                self.gauge("vllm:engine_sleep_state", "The same in vLLM's.", sleep == now, sleep_state=sleep, **labels)
        self.gauge(
            "vllm:lora_requests_info",
            "When this was read; the labels say which adapters are in use.",
            time.time(),
            running_lora_adapters=",".join(numbers.adapters),
            waiting_lora_adapters="",
            max_lora=str(numbers.loaded_adapters),  # all of them may run in one step
            **labels,
        )
        self.gauge("sensorium:model_users", "Requests that work with the model.", numbers.users, **labels)
        self.gauge("sensorium:model_resident_bytes", "Memory of its process.", numbers.resident_bytes, **labels)

    def _histograms(self, model: ModelMetrics, labels: dict[str, str]) -> None:
        for metric, help_text, histogram in (
            ("vllm:time_to_first_token_seconds", "From a request's arrival to its first token.", model.first_token_s),
            ("vllm:inter_token_latency_seconds", "Between two tokens of one answer.", model.inter_token_s),
            (
                "vllm:request_time_per_output_token_seconds",
                "Mean time per token after the first.",
                model.time_per_token_s,
            ),
            ("vllm:e2e_request_latency_seconds", "From the request's arrival to its end.", model.request_s),
            ("vllm:request_prompt_tokens", "Prompt tokens per request.", model.request_prompt_tokens),
            ("vllm:request_generation_tokens", "Generated tokens per request.", model.request_generation_tokens),
            ("vllm:request_queue_time_seconds", "Waiting in the engine before the first step.", model.queue_s),
            ("vllm:request_prefill_time_seconds", "From the first step to the first token.", model.prefill_s),
            ("vllm:request_decode_time_seconds", "From the first token to the last.", model.decode_s),
            ("vllm:request_inference_time_seconds", "From the first step to the last token.", model.inference_s),
            (
                "vllm:request_max_num_generation_tokens",
                "Generated tokens of a prompt's longest choice.",
                model.request_longest,
            ),
            (
                "vllm:request_prefill_kv_computed_tokens",
                "Prompt tokens per request that no cache had.",
                model.request_computed_tokens,
            ),
            ("vllm:request_num_preemptions", "How often a choice was put back.", model.request_preemptions),
            ("vllm:request_params_n", "The n of requests.", model.request_n),
            ("vllm:request_params_max_tokens", "The max_tokens of requests.", model.request_max_tokens),
            ("sensorium:prompt_text_seconds", "Template and tokenizer, per request.", model.prompt_s),
        ):
            self.histogram(metric, help_text, histogram, **labels)
        for (stage, kind), histogram in model.media_s.items():
            self.histogram(
                f"sensorium:media_{stage}_seconds", f"Time to {stage} one media item.", histogram, kind=kind, **labels
            )

    def engine(self, name: str, stats: EngineStats, ready: EngineReady | None) -> None:
        labels = {"model_name": name, "engine": "0"}
        used = 1 - stats.kv_blocks_free / stats.kv_blocks if stats.kv_blocks else 0.0
        for metric, help_text, gauge in (
            ("vllm:num_requests_running", "Sequences being computed.", stats.running),
            ("vllm:num_requests_waiting", "Sequences waiting.", stats.waiting),
            ("vllm:kv_cache_usage_perc", "Part of the KV cache in use, 0 to 1.", used),
            ("sensorium:encoder_cache_bytes", "Bytes of tower outputs kept.", stats.encoder_bytes),
            ("sensorium:engine_step_seconds", "Duration of the latest step.", stats.step_seconds),
        ):
            self.gauge(metric, help_text, gauge, **labels)
        self._steps(stats, labels)
        self._counters(stats, labels)
        if ready is not None:
            self._ready(ready, labels)

    def _steps(self, stats: EngineStats, labels: dict[str, str]) -> None:
        for reason, waiting in (("capacity", stats.waiting - stats.deferred), ("deferred", stats.deferred)):
            self.gauge("vllm:num_requests_waiting_by_reason", "The same, by reason.", waiting, reason=reason, **labels)
        steps = Histogram(STEP_TOKENS)
        steps.counts, steps.total = list(stats.steps_by_tokens) or steps.counts, stats.step_tokens
        self.histogram("vllm:iteration_tokens_total", "Tokens computed per step.", steps, **labels)

    def _counters(self, stats: EngineStats, labels: dict[str, str]) -> None:
        for metric, help_text, count in (
            ("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.prefix_queries),
            ("vllm:prefix_cache_hits", "Tokens found in the prefix cache.", stats.prefix_hits),
            ("vllm:mm_cache_queries", "Media looked up in the encoder cache.", stats.encoder_queries),
            ("vllm:mm_cache_hits", "Media found in the encoder cache.", stats.encoder_hits),
            ("vllm:spec_decode_num_drafts", "Guesses at a sequence's next tokens.", stats.drafts),
            ("vllm:spec_decode_num_draft_tokens", "Tokens of the guesses.", stats.draft_tokens),
            ("vllm:spec_decode_num_accepted_tokens", "Guessed tokens that were right.", stats.accepted_tokens),
            ("vllm:num_preemptions", "Sequences put back to be computed again.", stats.preemptions),
            ("sensorium:engine_steps", "Steps of the engine.", stats.steps),
            ("sensorium:encoder_seconds", "Time spent in towers.", stats.encoder_seconds),
        ):
            self.counter(metric, help_text, count, **labels)
        for place, count in enumerate(stats.accepted_by_place):
            name = "vllm:spec_decode_num_accepted_tokens_per_pos"
            self.counter(name, "The same, by their place in a guess.", count, position=str(place), **labels)

    def _ready(self, ready: EngineReady, labels: dict[str, str]) -> None:
        self.gauge(
            "vllm:cache_config_info",
            "The KV cache's configuration.",
            1,
            block_size=str(ready.block_size),
            num_gpu_blocks=str(ready.kv_tokens // max(1, ready.block_size)),
            **labels,
        )
        self.gauge("sensorium:weight_bytes", "Bytes of weights.", ready.weight_bytes, **labels)
        for rank, weights in enumerate(ready.rank_weight_bytes):
            self.gauge("sensorium:rank_weight_bytes", "Bytes of weights, by rank.", weights, rank=str(rank), **labels)
        self.gauge("sensorium:kv_cache_bytes", "Bytes of KV cache.", ready.kv_bytes, **labels)
        self.gauge("sensorium:load_seconds", "Time to load the model.", ready.load_seconds, **labels)
