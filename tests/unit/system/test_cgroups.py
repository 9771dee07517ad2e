"""Limits of nested control groups, in trees of files as systemd, Slurm, Docker and Kubernetes lay them out."""

from __future__ import annotations

from pathlib import Path

import pytest

from sensorium.system import cgroups

MIB = 1024 * 1024
UNLIMITED = "9223372036854771712"  # what version 1 says


def tree(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": cgroup, **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


MEMORY = {
    "systemd unit": (
        "0::/system.slice/llm.service",
        {
            "system.slice/llm.service/memory.max": str(700 * MIB),
            "system.slice/llm.service/memory.high": "max",
            "system.slice/llm.service/memory.current": str(100 * MIB),
        },
        600,
    ),
    "only the slice above it": (
        "0::/system.slice/llm.service",
        {
            "system.slice/llm.service/memory.max": "max",
            "system.slice/llm.service/memory.current": str(90 * MIB),
            "system.slice/memory.max": str(500 * MIB),
            "system.slice/memory.current": str(200 * MIB),
        },
        300,
    ),
    "the tighter of two": (
        "0::/a/b",
        {
            "a/b/memory.max": str(400 * MIB),
            "a/b/memory.current": "0",
            "a/memory.max": str(900 * MIB),
            "a/memory.current": str(600 * MIB),
        },
        300,
    ),
    "memory.high": (
        "0::/a",
        {"a/memory.max": str(900 * MIB), "a/memory.high": str(300 * MIB), "a/memory.current": str(100 * MIB)},
        200,
    ),
    "unused files are free": (
        "0::/a",
        {
            "a/memory.max": str(900 * MIB),
            "a/memory.current": str(800 * MIB),
            "a/memory.stat": f"anon {MIB}\ninactive_file {500 * MIB}",
        },
        600,
    ),
    "more is used than allowed": ("0::/a", {"a/memory.high": "10", "a/memory.current": "20"}, 0),
    "Slurm, version 1": (
        "4:memory:/slurm/uid_1/job_2\n3:cpuset:/slurm/uid_1\n0::/",
        {
            "memory/memory.limit_in_bytes": UNLIMITED,
            "memory/memory.usage_in_bytes": str(900 * MIB),
            "memory/slurm/uid_1/job_2/memory.limit_in_bytes": UNLIMITED,
            "memory/slurm/uid_1/job_2/memory.usage_in_bytes": "5",
            "memory/slurm/uid_1/memory.limit_in_bytes": str(700 * MIB),
            "memory/slurm/uid_1/memory.usage_in_bytes": str(300 * MIB),
            "memory/slurm/uid_1/memory.stat": f"inactive_file 1\ntotal_inactive_file {100 * MIB}",
        },
        500,
    ),
    "a container sees its group as the top": (
        "4:memory:/docker/0123",
        {"memory/memory.limit_in_bytes": str(700 * MIB), "memory/memory.usage_in_bytes": "0"},
        700,
    ),
    "the same, version 2": ("0::/", {"memory.max": str(700 * MIB), "memory.current": "0"}, 700),
    "both versions": (
        "4:memory:/a\n0::/b",
        {
            "memory/a/memory.limit_in_bytes": str(700 * MIB),
            "memory/a/memory.usage_in_bytes": "0",
            "unified/b/memory.max": str(600 * MIB),
            "unified/b/memory.current": "0",
        },
        600,
    ),
    "no limit": ("0::/a", {"a/memory.max": "max", "a/memory.high": "max", "a/memory.current": "5"}, None),
    "nothing there": ("0::/a", {}, None),
    "another group's limit": ("0::/a/b", {"a/c/memory.max": "5", "a/c/memory.current": "1"}, None),
    "noise": (":::\n\n4\n0::/../../x", {"memory.max": "many", "memory.current": ""}, None),
}


@pytest.mark.parametrize("name", MEMORY)
def test_the_tightest_group_says_what_is_free(tmp_path: Path, name: str) -> None:
    cgroup, files, expected = MEMORY[name]
    found = cgroups.free_memory_bytes(tree(tmp_path, cgroup, files))
    assert found == (None if expected is None else expected * MIB)


CORES = {
    "of a unit": ("0::/s/u", {"s/u/cpu.max": "100000 100000"}, 1),
    "of the slice above": ("0::/s/u", {"s/u/cpu.max": "max 100000", "s/cpu.max": "250000 100000"}, 2),
    "less than one": ("0::/s", {"s/cpu.max": "20000 100000"}, 1),
    "pinned": ("0::/s/u", {"s/u/cpu.max": "800000 100000", "s/cpuset.cpus.effective": "0-2,7"}, 4),
    "version 1": (
        "2:cpu,cpuacct:/a/b\n3:cpuset:/c",
        {
            "cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1",
            "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000",
            "cpu,cpuacct/a/cpu.cfs_quota_us": "300000",
            "cpu,cpuacct/a/cpu.cfs_period_us": "100000",
        },
        3,
    ),
    "version 1, pinned": ("3:cpuset:/c/d", {"cpuset/c/d/cpuset.cpus": "", "cpuset/c/cpuset.cpus": "3"}, 1),
    "version 1, a container's top": (
        "2:cpu:/docker/0",
        {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"},
        2,
    ),
    "none": ("0::/s", {"s/cpu.max": "max 100000"}, None),
    "noise": ("0::/s", {"s/cpu.max": "1 0", "s/cpuset.cpus": "a-b"}, None),
}


@pytest.mark.parametrize("name", CORES)
def test_quotas_and_sets_of_every_group_hold(tmp_path: Path, name: str) -> None:
    cgroup, files, expected = CORES[name]
    assert cgroups.cores(tree(tmp_path, cgroup, files)) == expected


def test_the_limits_of_this_machine_can_be_read() -> None:
    assert cgroups.cores() is None or cgroups.cores() >= 1  # type: ignore[operator]
    assert cgroups.free_memory_bytes() is None or cgroups.free_memory_bytes() > MIB  # type: ignore[operator]
