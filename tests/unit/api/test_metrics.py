"""What /metrics shows: every name that dashboards of vLLM and ours ask for, with its meaning."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.api_support import FakeEngine, chat, complete, get, post, serving, speak
from support.pooling_engine import ALL, engine_of

from sensorium.api.app import App
from sensorium.api.metrics import EngineNumbers, Metrics
from sensorium.api.transport.server import HttpServer, listen
from sensorium.config import ServerConfig
from sensorium.serving.adapters import ServedAdapter
from sensorium.serving.catalog import ModelState
from sensorium.types import STEP_TOKENS, EngineOutput, EngineRequest, EngineStats

DASHBOARD = Path(__file__).parents[3] / "deploy" / "grafana-dashboard.json"
NAME = re.compile(r"\b(?:vllm|sensorium):\w+|\bhttp_\w+")
# What the dashboards in vLLM's examples query.
VLLM = """
    vllm:e2e_request_latency_seconds_bucket vllm:e2e_request_latency_seconds_count vllm:e2e_request_latency_seconds_sum
    vllm:generation_tokens_total vllm:inter_token_latency_seconds_bucket vllm:inter_token_latency_seconds_count
    vllm:inter_token_latency_seconds_sum vllm:iteration_tokens_total_bucket vllm:iteration_tokens_total_count
    vllm:iteration_tokens_total_sum vllm:kv_cache_usage_perc vllm:num_preemptions_total vllm:num_requests_running
    vllm:num_requests_waiting vllm:num_requests_waiting_by_reason vllm:prefix_cache_hits_total
    vllm:prefix_cache_queries_total vllm:prompt_tokens_total vllm:prompt_tokens_cached_total
    vllm:prompt_tokens_by_source_total vllm:request_decode_time_seconds_sum vllm:request_decode_time_seconds_bucket
    vllm:request_generation_tokens_bucket vllm:request_generation_tokens_sum vllm:request_generation_tokens_count
    vllm:request_inference_time_seconds_sum vllm:request_max_num_generation_tokens_bucket
    vllm:request_max_num_generation_tokens_sum vllm:request_params_max_tokens_bucket vllm:request_params_n_sum
    vllm:request_prefill_time_seconds_sum vllm:request_prefill_time_seconds_bucket vllm:request_prompt_tokens_bucket
    vllm:request_prompt_tokens_sum vllm:request_queue_time_seconds_sum vllm:request_queue_time_seconds_bucket
    vllm:request_success_total vllm:request_time_per_output_token_seconds_bucket
    vllm:time_to_first_token_seconds_bucket vllm:time_to_first_token_seconds_sum vllm:time_to_first_token_seconds_count
    vllm:cache_config_info vllm:mm_cache_hits_total vllm:mm_cache_queries_total vllm:admission_rejections_total
    vllm:request_num_preemptions_bucket vllm:request_prefill_kv_computed_tokens_bucket
    vllm:spec_decode_num_drafts_total vllm:spec_decode_num_draft_tokens_total vllm:spec_decode_num_accepted_tokens_total
    vllm:engine_sleep_state http_requests_total http_request_duration_seconds_sum http_request_duration_seconds_count
""".split()
# The goals that they offer: each is looked up as a bucket of that name.
GOALS = {
    "vllm:time_to_first_token_seconds_bucket": "0.1 0.25 0.5 0.75 1.0 2.5 5.0 10.0",
    "vllm:request_time_per_output_token_seconds_bucket": "0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.5",
}


async def samples(port: int) -> dict[str, dict[str, float]]:
    """Of each name, the value by its labels other than the model's, such as "reason=stop"."""
    found: dict[str, dict[str, float]] = {}
    page = (await get(port, "/metrics")).body.decode()
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            own = {name: value for name, value in sample.labels.items() if name not in ("model_name", "engine")}
            key = ",".join(f"{name}={value}" for name, value in own.items())
            found.setdefault(sample.name, {})[key] = sample.value
    return found


async def test_every_name_is_there_before_the_first_request() -> None:
    queries = [
        target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel.get("targets", ())
    ]
    asked = {name for query in queries for name in NAME.findall(query)}
    assert len(asked) > 30
    async with serving() as served:
        await get(served.port, "/version")  # http_requests_total counts what was answered
        found = await samples(served.port)
    assert not (asked | set(VLLM)) - set(found)
    for name, goals in GOALS.items():
        assert {f"le={goal}" for goal in goals.split()} <= set(found[name])


async def test_responses_are_counted_by_class_and_timed_but_not_probes() -> None:
    async with serving() as served:
        await chat(served.port)
        await chat(served.port, n=0)
        await chat(served.port, stream=True)
        for path in ("/livez", "/health", "/metrics"):
            await get(served.port, path)
        found = await samples(served.port)
    of = "handler=/v1/chat/completions,method=POST"
    classes = {"code=200": "2xx", "code=400": "4xx"}
    assert found["http_requests_total"] == {
        f"{code},{of},status={classes[code]}": count for code, count in (("code=200", 2), ("code=400", 1))
    }
    assert found["http_request_duration_seconds_count"] == {of: 3}
    assert found["http_request_duration_seconds_sum"][of] > 0


def test_a_model_s_state_in_vllm_s_words() -> None:
    def awake(state: ModelState) -> dict[str, float]:
        numbers = EngineNumbers(EngineStats(), None, state, 0, 0)
        families = {family.name: family for family in Metrics(["m"]).families({"m": numbers})}
        found = families.get("vllm:engine_sleep_state")
        return {one.labels["sleep_state"]: float(one.value) for one in found.samples} if found else {}

    assert awake("ready") == awake("draining") == {"awake": 1, "weights_offloaded": 0, "discard_all": 0}
    assert awake("unloaded") == {"awake": 0, "weights_offloaded": 0, "discard_all": 1}
    assert awake("failed") == awake("loading") == awake("restarting") == {}


def test_the_dashboard_can_be_imported() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert panel["type"] == "row" or panel["targets"]


async def timed(request: EngineRequest) -> AsyncIterator[EngineOutput]:
    """The engine's times with the first output, the preemptions with the last."""
    async for output in speak(request, "abc", ends=False):
        is_first, is_last = output.cached_tokens > 0, output.finish_reason is not None
        yield EngineOutput(
            output.id,
            output.token_ids,
            output.finish_reason,
            cached_tokens=output.cached_tokens,
            queue_s=0.2 if is_first else 0.0,
            prefill_s=0.5 if is_first else 0.0,
            preemptions=2 if is_last else 0,
        )


async def test_times_and_lengths_are_counted_once() -> None:
    async with serving(FakeEngine(script=timed)) as served:
        await chat(served.port, n=2, max_tokens=3)
        await complete(served.port, prompt=["a", "bcdefgh"], max_tokens=2)
        found = await samples(served.port)

    def histogram(name: str) -> tuple[float, float]:
        return found[f"vllm:{name}_count"][""], found[f"vllm:{name}_sum"][""]

    assert histogram("request_queue_time_seconds") == (4, pytest.approx(0.8))
    assert histogram("request_prefill_time_seconds") == (4, pytest.approx(2.0))
    count, inference = histogram("request_inference_time_seconds")
    decode = histogram("request_decode_time_seconds")[1]
    assert (count, inference) == (4, pytest.approx(2.0 + decode))
    assert histogram("request_max_num_generation_tokens") == (3, 3 + 2 + 2)
    assert histogram("request_num_preemptions") == (4, 8)
    prompts = histogram("request_prompt_tokens")[1]
    cached = found["vllm:prompt_tokens_cached_total"][""]
    assert cached == 9
    assert found["vllm:prompt_tokens_by_source_total"] == {
        "source=local_compute": prompts - cached,
        "source=local_cache_hit": cached,
    }
    assert histogram("request_prefill_kv_computed_tokens")[0] == 2


async def test_the_engine_s_counts_are_shown() -> None:
    steps = (0, 2, 3, *[0] * (len(STEP_TOKENS) - 3), 1)
    stats = EngineStats(waiting=5, deferred=2, step_tokens=99, steps_by_tokens=steps, preemptions=7, accepted_tokens=5)
    stats = replace(stats, accepted_by_place=(3, 2))
    async with serving(FakeEngine(stats=stats)) as served:
        found = await samples(served.port)
    assert found["vllm:num_requests_waiting"][""] == 5
    assert found["vllm:num_requests_waiting_by_reason"] == {"reason=capacity": 3, "reason=deferred": 2}
    assert found["vllm:iteration_tokens_total_sum"][""] == 99
    buckets = found["vllm:iteration_tokens_total_bucket"]
    assert [
        buckets[f"le={bound}.0"] if f"le={bound}.0" in buckets else buckets[f"le={bound}"] for bound in (1, 8, 16)
    ] == [0, 2, 5]
    assert found["vllm:num_preemptions_total"][""] == 7
    assert found["vllm:spec_decode_num_accepted_tokens_total"][""] == 5
    assert found["vllm:spec_decode_num_accepted_tokens_per_pos_total"] == {"position=0": 3, "position=1": 2}


async def test_pooling_is_timed_too() -> None:
    async with serving(engine_of(*ALL)) as served:
        await post(served.port, "/v1/embeddings", {"input": ["a", "b"]})
        found = await samples(served.port)
    assert found["vllm:request_queue_time_seconds_count"][""] == 2
    assert found["vllm:request_success_total"]["finished_reason=stop"] == 2


# What the endpoint picker of Kubernetes' Gateway API reads of a pod (model server protocol, proposal 003 of the
# inference extension): by signal the metric, and the label that has it where it is not the value.
PICKER = {
    "queued": ("vllm:num_requests_waiting", None),
    "running": ("vllm:num_requests_running", None),
    "kv_cache": ("vllm:kv_cache_usage_perc", None),
    "block_size": ("vllm:cache_config_info", "block_size"),
    "blocks": ("vllm:cache_config_info", "num_gpu_blocks"),
    "max_adapters": ("vllm:lora_requests_info", "max_lora"),
    "running_adapters": ("vllm:lora_requests_info", "running_lora_adapters"),
    "waiting_adapters": ("vllm:lora_requests_info", "waiting_lora_adapters"),
}


def picked(page: str) -> dict[str, str]:
    """The picker's view: of each metric the sample with the largest value, as of lora_requests_info the newest."""
    best = {
        family.name: max(family.samples, key=lambda sample: sample.value)
        for family in text_string_to_metric_families(page)
        if family.name in {name for name, _ in PICKER.values()} and family.type == "gauge"
    }
    return {
        signal: str(best[name].value) if label is None else best[name].labels[label]
        for signal, (name, label) in PICKER.items()
    }


async def test_an_endpoint_picker_reads_every_signal_while_a_key_is_set() -> None:
    async with serving(api_key=("secret",)) as served:
        served.engine.stats = replace(served.engine.stats, waiting=2)
        context = served.http._app.context
        adapters = context.catalog.entries[0].adapters
        adapters._by_name = {name: ServedAdapter(name, name) for name in ("law", "tales", "verse")}
        app = App.of_metrics(context)
        metrics = HttpServer(app, context.limits, listen(ServerConfig(port=0)))
        await metrics.start()
        with ExitStack() as stack:
            for name in ("law", "verse"):
                stack.enter_context(adapters.use(adapters._by_name[name], lambda: None))
            reply = await get(metrics.address[1], "/metrics")
        await metrics.close()
        assert (await get(served.port, "/metrics")).status == 401
    assert reply.status == 200
    ready = served.engine.ready
    assert ready is not None
    assert picked(reply.body.decode()) == {
        "queued": "2.0",
        "running": "1.0",
        "kv_cache": "0.6",
        "block_size": str(ready.block_size),
        "blocks": str(ready.kv_tokens // ready.block_size),
        "max_adapters": "3",
        "running_adapters": "law,verse",
        "waiting_adapters": "",
    }
