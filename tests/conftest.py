"""Fixtures over backends and threads, and the rule that nothing is skipped in CI."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from types import ModuleType

import hypothesis
import pytest

import fastbn

CI = os.environ.get("CI") == "true"
BACKENDS = ("numba", "cython", "numpy")
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

hypothesis.settings.register_profile("fastbn", deadline=None, max_examples=60, derandomize=CI, print_blob=True)
hypothesis.settings.load_profile("fastbn")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite in two processes or more; chosen tests are done before those would be up."""
    options = config.option
    if (
        "PYTEST_XDIST_WORKER" in os.environ  # one of those processes
        or config.args_source is not pytest.Config.ArgsSource.TESTPATHS
        or getattr(options, "numprocesses", 0) is not None  # the number is given, or pytest-xdist is not there
        or options.usepdb
        or options.collectonly
    ):
        return
    options.numprocesses, options.dist = min(max(2, CPUS // 2), 8), "worksteal"
    # OpenMP's threads wait busily, each process's for its own, on the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(params=BACKENDS, scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn, chosen for the test."""
    if request.param not in fastbn.available_backends():
        pytest.skip(f"backend {request.param!r} is not installed")
    with fastbn.use_backend(request.param):
        yield request.param


@pytest.fixture
def keep_threads() -> Iterator[None]:
    """Leave the number of threads as it was."""
    threads = fastbn.get_num_threads()
    yield
    fastbn.set_num_threads(threads)


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """PyTorch, the peer that results are compared with."""
    module = pytest.importorskip("torch")
    module.set_num_threads(1)  # two idle thread pools that spin on the same cores hold each other up
    return module


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    if CI and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_skipped(report)
    return report
