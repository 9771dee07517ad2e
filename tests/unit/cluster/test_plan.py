"""What Ray Serve is told of replicas, from the words of a command line. Ray itself is in tests/cluster."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sensorium.cli.main import deploy_plan, parser
from sensorium.cluster.command import _reason, status_lines
from sensorium.cluster.numbers import Sample
from sensorium.cluster.plan import ModelPlan, model_plans
from sensorium.errors import StartupError


def plans(*words: str, gpus: float = 0.0) -> tuple[ModelPlan, ...]:
    argv = ["deploy", "ray", *words]
    config, plan = deploy_plan(parser().read(argv), {}, argv)
    return model_plans(plan, config, gpus)


def settings(*words: str, gpus: float = 0.0) -> dict[str, Any]:
    return plans(*words, gpus=gpus)[0].settings


def test_flags_of_serve_go_with_those_of_replicas() -> None:
    (one,) = plans("demo/model", "--replicas", "2", "--max-model-len", "4k", "--quantization", "int8")
    assert one.deployment == "demo-model"
    assert one.names == ("demo/model",)
    assert one.options.engine.max_model_len == 4000
    assert one.options.engine.quantization == "int8"
    assert one.settings["num_replicas"] == 2
    assert "autoscaling_config" not in one.settings


def test_a_range_of_replicas_scales_by_the_requests_in_flight() -> None:
    scaling = settings("m", "--replicas", "1..8", "--max-num-seqs", "100")["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"], scaling["target_ongoing_requests"]) == (1, 8, 60)
    scaling = settings("m", "--replicas", "0..3", "--target-requests", "5", "--scale-down-s", "7")["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["initial_replicas"], scaling["target_ongoing_requests"]) == (0, 1, 5)
    assert scaling["downscale_delay_s"] == 7


@pytest.mark.parametrize("text", ["0", "3..1", "..4", "2..", "a", "1...4", "-1", "1,4"])
def test_what_is_no_number_of_replicas_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().read(["deploy", "ray", "m", f"--replicas={text}"])
    assert "write 2, or 1..8" in capsys.readouterr().err


def test_ray_holds_back_nothing_that_we_would_answer() -> None:
    """503 with a time to come back is ours: it comes before Ray's own queue."""
    assert settings("m", "--max-num-seqs", "10")["max_ongoing_requests"] > 10 + 4 * 10
    assert settings("m", "--max-num-seqs", "10", "--max-waiting", "1000")["max_ongoing_requests"] > 1010
    assert settings("m", "--drain-timeout-s", "90")["graceful_shutdown_timeout_s"] > 90


def test_gpus_go_where_there_are_some() -> None:
    assert settings("m")["ray_actor_options"]["num_gpus"] == 0
    assert settings("m", gpus=8)["ray_actor_options"]["num_gpus"] == 1
    assert settings("m", "--tensor-parallel-size", "4", gpus=8)["ray_actor_options"]["num_gpus"] == 4
    assert settings("m", "--device", "cpu", gpus=8)["ray_actor_options"]["num_gpus"] == 0
    assert settings("m", "--gpus-per-replica", "0.5", gpus=8)["ray_actor_options"]["num_gpus"] == 0.5
    assert plans("m", "--cpus-per-replica", "3")[0].options.engine.threads == 3
    assert plans("m", "--cpus-per-replica", "3", "--threads", "2")[0].options.engine.threads == 2
    assert plans("m", "--cpus-per-replica", "3", gpus=1)[0].options.engine.threads is None


def test_several_models_have_names_of_their_own() -> None:
    one, two = plans("a/b", "c", "--replicas", "1")
    assert {one.deployment, two.deployment} == {"a-b", "c"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["m", "--uds", "path"], "--uds"),
        (["--models-dir", "folder"], "--models-dir"),
        (["m", "--memory", "4GB"], "--memory"),
        (["m", "m"], "the model m is there twice, m: "),
        (["a b", "a-b"], "a b and a-b are too alike"),
        (["a", "--lora", "a=folder"], "the model a and the adapter folder have one name, a: "),
    ],
)
def test_what_makes_no_sense_with_replicas_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(StartupError, match=said):
        plans(*words)


def test_without_ray_the_command_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['ray'] = None; sys.argv = ['sensorium', 'deploy', 'ray'];"
        "from sensorium.__main__ import run; sys.exit(run())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "sensorium: Ray Serve is not installed: pip install 'sensorium[ray]'"


def test_status_has_a_line_for_every_replica() -> None:
    labels = {"application": "sensorium", "deployment": "demo"}
    samples = [
        Sample(name, {**labels, "replica": replica}, value)
        for replica, running in (("r1", 3.0), ("r2", 0.0))
        for name, value in (("vllm:num_requests_running", running), ("vllm:kv_cache_usage_perc", 0.25))
    ]
    deployment = SimpleNamespace(status="HEALTHY", replica_states={"RUNNING": 2}, message="")
    application = SimpleNamespace(status="RUNNING", message="", deployments={"demo": deployment})
    assert status_lines({"sensorium": application}, samples) == [
        "sensorium: running",
        "  demo: healthy, replicas: 2 running",
        "    r1: 3 running, 0 waiting, KV cache 25%",
        "    r2: 0 running, 0 waiting, KV cache 25%",
    ]
    assert status_lines({}, []) == ["Ray Serve runs nothing"]


def test_of_a_traceback_the_last_error_is_told() -> None:
    text = "Failed:\n  File x\nValueError: one\nDuring it:\nsensorium.errors.StartupError: there is no model m\n"
    assert _reason(text) == "there is no model m"
    assert _reason("It failed.\nmore") == "It failed."


def test_a_replica_has_no_metrics_port_of_its_own() -> None:
    (one,) = plans("m", "--metrics-port", "9400")
    assert one.options.server.metrics_port is None
    assert replace(one.options.server, metrics_port=9400).metrics_port == 9400
