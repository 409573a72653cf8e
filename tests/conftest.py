"""Fixtures and Hypothesis profiles of every test."""

import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator

import emulated
import pytest
import torch
from backends import BACKENDS
from hypothesis import HealthCheck, settings

from tome import backend, use_backend

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background jobs have it, and what tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Workers share the cores, and so does what they start.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    torch.set_num_threads(threads)
    os.environ.update(OMP_NUM_THREADS=str(threads), TORCHINDUCTOR_COMPILE_THREADS=str(threads))

# The examples are derandomised, so that a red run is red again; HYPOTHESIS_PROFILE=thorough draws new ones.
common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("quick", max_examples=60, derandomize=True, **common)
settings.register_profile("thorough", max_examples=2000, print_blob=True, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(params=BACKENDS, scope="module")
def device(request: pytest.FixtureRequest) -> torch.device:
    """A device; the backend under test is chosen for the time of the test."""
    return torch.device(request.param[1])


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on busy cores take most of the time of small models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def reference_without_gradients() -> Iterator[None]:
    """The reference backend, and no gradients but where a test turns them on."""
    with use_backend("reference"), torch.no_grad():
        yield


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let patched models think that there are kernels, which are the reference's."""
    monkeypatch.setattr(backend, "takes_kernels", lambda x: backend.get_backend() != "reference")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Choose the backend of the ``device`` fixture, and for nothing but the test: the fixture outlives it."""
    chosen = getattr(item, "callspec", None) and item.callspec.params.get("device")
    name = chosen[0] if isinstance(chosen, tuple) else None
    with emulated.chosen() if name == "emulated" else use_backend(name):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    """Forget the module that several tests write, each another one of that name."""
    yield
    sys.modules.pop("my_models", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "of the selected tests every K-th from the I-th on: compute-sanitizer takes its time"
    parser.addoption("--share", default="0/1", metavar="I/K", help=told)


@pytest.hookimpl(trylast=True)  # when all others have selected theirs
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first, step = map(int, config.getoption("--share").split("/"))
    items[:] = items[first::step]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each reason to skip, so that no skip goes unseen and none floods the report."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.getreports("skipped"))
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} {reason}", yellow=True)
