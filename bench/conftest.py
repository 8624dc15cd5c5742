"""What is stored of a measurement: the machine as far as it matters, and no raw samples."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest

import fastbn
from fastbn._engine import cache_bytes

PACKAGES = ("numpy", "numba", "torch", "jax", "onednn-cpu-gomp")
KEPT = ("min", "median", "iqr", "rounds")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    versions = {"fastbn": fastbn.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    cpu = machine_info["cpu"].get("brand_raw") or platform.processor() or platform.machine()
    machine_info.clear()
    machine_info.update(
        cpu=cpu,
        threads=fastbn.get_num_threads(),
        l2_kib=cache_bytes(2) >> 10,
        l3_kib=cache_bytes(3) >> 10,
        system=f"{platform.system()} {platform.machine()}",
        versions=versions,
    )


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: object, output_json: dict[str, Any]) -> None:
    output_json["commit_info"] = {"id": output_json["commit_info"].get("id")}
    output_json["benchmarks"] = [
        {
            "group": entry["group"],
            "name": entry["name"],
            "stats": {key: float(f"{entry['stats'][key]:.4g}") for key in KEPT},
            "extra_info": entry["extra_info"],
        }
        for entry in output_json["benchmarks"]
    ]
