"""What every test shares. Without a GPU the kernels run in Triton's interpreter."""

from __future__ import annotations

import os
from collections import Counter

import torch

GPU = torch.cuda.is_available()
if not GPU:  # Triton reads it when a kernel is defined, so before anything imports one.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import aot  # noqa: E402
import interpreter  # noqa: E402
import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

if not GPU:
    interpreter.hasten()

# The workers of pytest-xdist share the cores.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, (os.cpu_count() or 1) // _WORKERS))

# Most examples compile kernels or interpret them. `pytest --hypothesis-profile long` looks longer.
settings.register_profile(
    "triflash",
    deadline=None,
    print_blob=True,  # how to repeat the failing example
    max_examples=40 if GPU else 12,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("long", settings.get_profile("triflash"), max_examples=1000)
settings.load_profile("triflash")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough", action="store_true", help="without a GPU too, run every test of every row"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU, one in three of the shared tests for each row that "auto" never picks, and
    one in `every` of what a function marks as `sampled(every)`; of what is `slow`, nothing.

    Of the first so many the first runs, of the next the second, and so on: what varies fastest is
    then met everywhere, whatever it varies with. Each row gets others.
    """
    from triflash import registry

    named = any("::" in argument for argument in config.args)
    if GPU or named or config.getoption("--thorough"):
        return
    rows = [row.name for row in registry.IMPLEMENTATIONS if not row.auto]
    seen: Counter[tuple[object, ...]] = Counter()
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="takes most of a minute; --thorough runs it"))
            continue
        row = getattr(item, "callspec", None) and item.callspec.params.get("implementation")
        if row in rows and item.path.stem != "test_ladder":
            kind, every, first, what = (row,), 3, rows.index(row), "the ladder's tests"
        elif marker := item.get_closest_marker("sampled"):
            every, first, what = *marker.args, 0, "these"
            kind = (item.path.stem, item.originalname, row, every)
        else:
            continue
        turn, place = divmod(seen[kind], every)
        seen[kind] += 1
        if place != (turn + first) % every:
            reason = f"without a GPU one in {every} of {what}; --thorough runs all"
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu(count=1): needs that many GPUs")
    config.addinivalue_line("markers", "slow: without a GPU only with --thorough")
    config.addinivalue_line("markers", "sampled(every): without a GPU one in so many will do")
    for ours in (  # of Triton's interpreter, one for every program of every kernel
        "ignore:Conversion of an array with ndim:DeprecationWarning:triton",
        "ignore:.* encountered in (log2|exp2|multiply):RuntimeWarning:triton",
    ):
        config.addinivalue_line("filterwarnings", ours)


def pytest_report_header(config: pytest.Config) -> str:
    if not GPU:
        return "triflash: no GPU, so kernels run in Triton's interpreter"
    return f"triflash: kernels run on {torch.cuda.get_device_name()}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("gpu"):
        wanted = marker.args[0] if marker.args else 1
        present = torch.cuda.device_count() if GPU else 0
        if present < wanted:
            pytest.skip(f"needs {wanted} GPU{'s' * (wanted > 1)}, PyTorch can use {present} here")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(scope="session")
def compiling():
    """An `aot.Compiler`, one for all tests of a worker."""
    compiler = aot.Compiler()
    yield compiler
    compiler.close()


@pytest.fixture
def tuned(monkeypatch):
    """A `helpers.Tuning`."""
    import helpers

    yield helpers.Tuning(monkeypatch)
    monkeypatch.undo()
    helpers.forget_prepared_launches()


@pytest.fixture(autouse=True)
def _device_memory():
    """A test that holds much memory must not starve the next one's worker."""
    yield
    if GPU:
        torch.cuda.empty_cache()
