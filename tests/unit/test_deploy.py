"""Files under deploy/ would rot: what they name exists, ports and paths agree, flags are flags. Needs no cluster."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sensorium.api.app import METRICS_PATHS
from sensorium.api.guards.auth import PUBLIC_PATHS
from sensorium.api.metrics import EngineNumbers, Metrics
from sensorium.cli.main import read_serve
from sensorium.config import ServeOptions
from sensorium.types import EngineReady, EngineStats

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = sorted(path.parent for path in KUBERNETES.rglob("kustomization.yaml"))
POD_KINDS = {"Deployment", "ServingRuntime"}
SECURE = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
# The part of the published schema of InferencePool (v1) that has our fields; nothing else may stand there.
POOL = {"selector": {"matchLabels"}, "targetPorts": None, "endpointPickerRef": {"name", "port", "failureMode"}}


def load(file: Path) -> list[dict[str, Any]]:
    return [found for found in yaml.safe_load_all(file.read_text()) if found]


def kustomization(folder: Path) -> dict[str, Any]:
    (found,) = load(folder / "kustomization.yaml")
    return found


def resources(folder: Path) -> list[dict[str, Any]]:
    """What a folder makes, with what it is built upon; patches left out."""
    found = []
    for name in kustomization(folder).get("resources", []):
        path = (folder / name).resolve()
        found += resources(path) if path.is_dir() else load(path)
    return found


def of_kind(found: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    return [one for one in found if one["kind"] in kinds]


def pod_of(resource: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = resource["spec"]
    return spec["template"]["spec"] if resource["kind"] == "Deployment" else spec


def ours(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any], ServeOptions]]:
    """(resource, container, its options) of every container that runs our server."""
    for resource in of_kind(resources(folder), *POD_KINDS):
        for container in pod_of(resource)["containers"]:
            if container["image"] == "sensorium":
                words = [word.replace("{{.Name}}", "name") for word in container["args"]]
                yield resource, container, read_serve(words, folder.name)


@pytest.fixture(scope="module")
def names() -> set[str]:
    """Of everything on our metrics page."""
    ready = EngineReady(128, 4096, 16, 1, 1, 1.0, "cpu", "float32")
    families = Metrics(["m"]).families({"m": EngineNumbers(EngineStats(), ready, "ready", 0, 0)})
    return {sample.name for family in families for sample in family.samples}


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda path: path.name)
def test_what_a_kustomization_names_exists(folder: Path) -> None:
    made = kustomization(folder)
    assert made["kind"] in ("Kustomization", "Component")
    files = [*made.get("resources", []), *made.get("components", [])]
    files += [name for one in made.get("configMapGenerator", []) for name in one.get("files", [])]
    for name in files:
        target = folder / name
        assert target.exists(), name
        assert target.is_file() or (target / "kustomization.yaml").exists(), name
    base = resources(folder) or resources(KUBERNETES / "base")
    for patch in made.get("patches", []):
        target = patch["target"]
        assert [one for one in of_kind(base, target["kind"]) if one["metadata"]["name"] == target["name"]]
        assert yaml.safe_load(patch["patch"])
    listed = {(folder / name).resolve() for name in files} | {(folder / "kustomization.yaml").resolve()}
    unlisted = {file for file in folder.glob("*.yaml") if file.resolve() not in listed}
    assert {file.name for file in unlisted} <= {"adapter-rule.yaml"}  # which is for another program


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda path: path.name)
def test_our_containers_agree_with_our_flags(folder: Path) -> None:
    for resource, container, options in ours(folder):
        named = {port.get("name"): port["containerPort"] for port in container["ports"]}
        assert options.server.port in named.values()
        assert options.server.metrics_port == named.get("metrics", options.server.metrics_port) == 9400
        assert options.server.host == options.server.metrics_host == "0.0.0.0"
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            get = container[kind]["httpGet"]
            assert get["path"] in PUBLIC_PATHS & METRICS_PATHS
            assert named.get(get["port"], get["port"]) == options.server.port
        for path in ("/cache", "/tmp"):
            assert path in [mount["mountPath"] for mount in container["volumeMounts"]]
        notes = resource["spec"].get("annotations") or resource["spec"]["template"]["metadata"]["annotations"]
        assert {value for key, value in notes.items() if key.endswith("port")} == {"9400"}
        assert {value for key, value in notes.items() if key.endswith("path")} == {"/metrics"}


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda path: path.name)
def test_containers_have_no_rights_that_they_do_not_need(folder: Path) -> None:
    for resource in of_kind(resources(folder), *POD_KINDS):
        pod = pod_of(resource)
        mounted = {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            found = {**pod.get("securityContext", {}), **container["securityContext"]}
            assert {key: found[key] for key in SECURE} == SECURE
            assert found["runAsNonRoot"] and found["runAsUser"] > 1000
            assert container["resources"]["limits"]["memory"]
            assert {mount["name"] for mount in container["volumeMounts"]} <= mounted


def test_a_pod_may_finish_what_it_is_at() -> None:
    ((deployment, container, options),) = ours(KUBERNETES / "base")
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod_of(deployment)["terminationGracePeriodSeconds"] > pause + options.limits.drain_timeout_s


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda path: path.name)
def test_selectors_and_references_lead_to_something(folder: Path) -> None:
    found = resources(folder)
    pods = [one["spec"]["template"]["metadata"]["labels"] for one in of_kind(found, "Deployment")]
    by_kind = {(one["kind"], one["metadata"]["name"]) for one in found}
    for one in of_kind(found, "Deployment", "PodDisruptionBudget", "InferencePool"):
        assert one["spec"]["selector"]["matchLabels"] in pods
    for one in of_kind(found, "Service"):
        assert one["spec"]["selector"] in pods
        (owner,) = [
            own
            for own in of_kind(found, "Deployment")
            if own["spec"]["template"]["metadata"]["labels"] == one["spec"]["selector"]
        ]
        ports = {port["name"] for port in pod_of(owner)["containers"][0]["ports"]}
        assert {port["targetPort"] for port in one["spec"]["ports"]} <= ports
    for one in of_kind(found, "HorizontalPodAutoscaler"):
        target = one["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in by_kind
    for one in of_kind(found, "RoleBinding"):
        for target in (one["roleRef"], *one["subjects"]):
            assert (target["kind"], target["name"]) in by_kind
    for one in of_kind(found, "HTTPRoute"):
        for target in one["spec"]["rules"][0]["backendRefs"]:
            assert (target["kind"], target["name"]) in by_kind
    for one in of_kind(found, "InferenceService"):
        assert ("ServingRuntime", one["spec"]["predictor"]["model"]["runtime"]) in by_kind


def test_the_picker_reads_the_port_that_needs_no_key() -> None:
    folder = KUBERNETES / "overlays" / "inference-pool"
    found = resources(folder)
    (pool,) = of_kind(found, "InferencePool")
    assert pool["spec"].keys() == POOL.keys()
    assert all(pool["spec"][key].keys() == keys for key, keys in POOL.items() if keys)
    ((_, _, options),) = ours(folder)
    assert pool["spec"]["targetPorts"] == [{"number": options.server.port}]
    (picker,) = [one for one in of_kind(found, "Deployment") if one["metadata"]["name"] == "endpoint-picker"]
    flags = dict(word.removeprefix("--").split("=", 1) for word in pod_of(picker)["containers"][0]["args"])
    assert flags["model-server-metrics-port"] == str(options.server.metrics_port)
    assert flags["pool-name"] == pool["metadata"]["name"]
    assert flags["grpc-port"] == str(pool["spec"]["endpointPickerRef"]["port"]["number"])
    (service,) = [one for one in of_kind(found, "Service") if one["metadata"]["name"] == "endpoint-picker"]
    assert pool["spec"]["endpointPickerRef"]["name"] == service["metadata"]["name"]
    (config,) = load(folder / "config.yaml")
    used = {one["pluginRef"] for profile in config["schedulingProfiles"] for one in profile["plugins"]}
    assert used <= {one["type"] for one in config["plugins"]}


def test_pods_are_scaled_by_a_figure_that_we_have(names: set[str]) -> None:
    folder = KUBERNETES / "overlays" / "autoscaling"
    (scaler,) = of_kind(resources(folder), "HorizontalPodAutoscaler")
    rule = yaml.safe_load((folder / "adapter-rule.yaml").read_text())[0]
    assert rule["seriesQuery"].partition("{")[0] in names
    assert scaler["spec"]["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]


def dockerfile() -> list[tuple[str, str]]:
    """Its instructions, continued lines joined."""
    text = (DEPLOY / "docker" / "Dockerfile").read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ").splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in lines if line.strip()]


def test_images_run_our_server_without_rights() -> None:
    made = dockerfile()
    stages = [value.rpartition(" ")[2] for word, value in made if word == "FROM"]
    assert stages == ["build", "cpu", "cuda"]
    users = [value for word, value in made if word == "USER"]
    assert users[0] == users[-1] == "10001:10001"
    (command,) = [yaml.safe_load(value) for word, value in made if word == "CMD"]
    options = read_serve(command, "Dockerfile")
    (exposed,) = [value.split() for word, value in made if word == "EXPOSE"]
    assert exposed == [str(options.server.port), str(options.server.metrics_port)]
    (health,) = [value for word, value in made if word == "HEALTHCHECK"]
    port, path = re.findall(r"127\.0\.0\.1:(\d+)(/\w+)", health)[0]
    assert (port, path in METRICS_PATHS) == (str(options.server.metrics_port), True)
    root = DEPLOY.parent
    copied = [
        name for word, value in made if word == "COPY" and "--from" not in value for name in shlex.split(value)[:-1]
    ]
    assert copied and all((root / name).exists() for name in copied)
    kept = (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in copied} <= set(kept)


def test_the_kernels_are_part_of_the_image() -> None:
    runs = " ".join(value for word, value in dockerfile() if word == "RUN")
    assert "g++" in runs
    assert "kernels/cpu/_native*.so" in runs  # the build fails without them
    (module,) = re.findall(r"python -m (sensorium\S+) --arch", runs)
    assert (DEPLOY.parent / "src" / f"{module.replace('.', '/')}.py").exists()
    start = (DEPLOY / "docker" / "start.sh").read_text()
    assert set(re.findall(r"TRITON_CACHE_DIR=(\S+)", " ".join(value for _, value in dockerfile()))) == {
        "/opt/triton",
        "/cache/triton",
    }
    assert "cp -r /opt/triton /cache/triton" in start
    assert start.rstrip().endswith('exec sensorium "$@"')


def test_compose_agrees_with_the_images() -> None:
    (made,) = load(DEPLOY / "docker" / "compose.yaml")
    stages = [value.rpartition(" ")[2] for word, value in dockerfile() if word == "FROM"]
    for service in made["services"].values():
        assert service["build"]["target"] in stages
        assert (DEPLOY / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).exists()
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and "/tmp" in service["tmpfs"]
        words = [re.sub(r"\$\{MODEL:-(.*)\}", r"\1", word) for word in service["command"]]
        options = read_serve(words, "compose")
        published = [port.rpartition(":")[2] for port in service["ports"]]
        assert published == [str(options.server.port), str(options.server.metrics_port)]
        assert float(service["stop_grace_period"].removesuffix("s")) > options.limits.drain_timeout_s
