"""infra/scaling.md says what infra/scaling.py prints, and what that prints is reckoned rightly."""

import importlib.util
import re
from types import ModuleType

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "infra" / "scaling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_tables_that_the_script_prints(scaling: ModuleType) -> None:
    page = scaling.PAGE.read_text()
    between = page.partition(scaling.BEGIN)[2].partition(scaling.END)[0]
    assert between == scaling.tables(scaling.Assumed()), "run python infra/scaling.py --write"
    assert "| 35,751,939 |" in between, "the parameters that cifar10 has with classes"


def test_a_ring_sums_gradients_in_the_time_that_its_slowest_link_takes(scaling: ModuleType) -> None:
    """Against a ring that is walked step by step, each sending its next part at once."""
    n, size, assumed = 7, 7 * 6e6, scaling.Assumed(network_gbit=0.008, hop_us=500.0)
    clock = 0.0
    for _ in ("scatter", "gather"):
        for _ in range(n - 1):
            clock += (size / n) / 1e6 + 500e-6
    assert scaling.all_reduce(size, n, assumed) == pytest.approx(clock)
    assert scaling.all_reduce(size, 1, assumed) == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.2, "200 ms"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (10**6, "11.6 d")],
)
def test_seconds_are_shown_in_a_unit_that_fits(
    scaling: ModuleType, value: float, text: str
) -> None:
    assert scaling.seconds(value) == text


def test_every_section_that_the_page_cites_is_in_the_results(scaling: ModuleType) -> None:
    results = scaling.RESULTS.read_text()
    cited = re.findall(r"\[(\w+)\]\(\.\./tests/benchmarks/RESULTS\.md\)", scaling.PAGE.read_text())
    assert cited
    for name in cited:
        assert f"\n## {name}, {scaling.MEASURED_ON}\n" in results


def test_a_checkpoint_has_weights_their_average_and_two_moments(scaling: ModuleType) -> None:
    """As is reckoned for networks of which none was written: four float32 of each parameter."""
    measured = scaling.measured()
    for name in ("digits", "fashion_mnist", "cifar10"):
        weights = list(scaling.networks()[name].make_network().parameters())
        numbers = 16 * sum(weight.numel() for weight in weights)
        # each has its name, type, shape and place beside it, in some 100 to 150 bytes
        assert numbers < measured[name] < numbers + 4 * len(weights) * 200


def test_tasks_that_are_handed_out_too_slowly_leave_cores_idle(scaling: ModuleType) -> None:
    text = scaling.preprocess(scaling.measured(), scaling.Assumed())
    busy = re.search(r"cores that it keeps busy \| (.*) \|", text)[1].split(" | ")  # type: ignore[index]
    assert busy[0] == "100.0%" and float(busy[-1].rstrip("%")) < 1
    slower = scaling.measured() | {"tasks": 1.0}
    assert "| cores that it keeps busy | 0." in scaling.preprocess(slower, scaling.Assumed())
