"""Prices are read with care, and a run's cost adds up."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from pipeline.cost import InstancePrice, Market, cost_of, find_price, load_prices, own_price
from pipeline.errors import ConfigError
from pipeline.report import Price

SHIPPED = Path(__file__).parents[2] / "configs" / "prices.yaml"
LIST = """
- provider: Example
  region: here
  currency: USD
  source: https://example.com/prices
  as_of: 2025-07-01
  instances:
    small: {hardware: "2 vCPU", usd_per_hour: {on_demand: 3.6, spot: 1.8}}
"""


@pytest.fixture
def prices() -> dict[str, InstancePrice]:
    return load_prices(SHIPPED)


def a_price(usd_per_hour: float = 3.6) -> Price:
    return own_price("box", usd_per_hour, as_of="2026-11-20")


@pytest.mark.parametrize(
    "instance",
    ["g5.xlarge", "g6.xlarge", "p5.48xlarge", "c6i.large", "a2-highgpu-1g", "c3-standard-4"],
)
def test_the_shipped_list_has_the_usual_machines(
    prices: dict[str, InstancePrice], instance: str
) -> None:
    assert find_price(prices, instance, "on_demand").usd_per_hour > 0


def test_every_shipped_price_is_plausible_and_names_its_source(
    prices: dict[str, InstancePrice],
) -> None:
    for price in prices.values():
        assert 0 < price.spot_usd_per_hour < price.on_demand_usd_per_hour < 100, price
        assert price.source.startswith("https://"), price
        assert datetime.date.fromisoformat(price.as_of) < datetime.date.today(), price


def test_the_market_chooses_the_price(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(LIST)
    prices = load_prices(path)
    assert find_price(prices, "small", "on_demand").usd_per_hour == 3.6
    assert find_price(prices, "small", "spot") == Price(
        instance="small",
        market="spot",
        usd_per_hour=1.8,
        source="https://example.com/prices (Example, here)",
        as_of="2025-07-01",
    )


def test_an_entry_may_have_a_source_and_a_date_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    more = "    large: {hardware: x, usd_per_hour: {on_demand: 7, spot: 4}, as_of: 2026-10-01, "
    path.write_text(f"{LIST}{more}source: https://example.com/offer}}\n")
    prices = load_prices(path)
    assert (prices["small"].as_of, prices["large"].as_of) == ("2025-07-01", "2026-10-01")
    assert prices["large"].source == "https://example.com/offer (Example, here)"


@pytest.mark.parametrize("market", ["on_demand", "spot"])
@pytest.mark.parametrize("provider", ["AWS", "Google Cloud", "Azure"])
@pytest.mark.parametrize("is_gpu", [True, False])
def test_each_provider_has_machines_with_and_without_a_gpu(
    prices: dict[str, InstancePrice], provider: str, market: Market, is_gpu: bool
) -> None:
    found = [
        find_price(prices, each.instance, market).usd_per_hour
        for each in prices.values()
        if f"({provider}, " in each.source and (" x " in each.hardware) == is_gpu
    ]
    assert len(found) >= 4
    assert len(set(found)) > 1


def test_an_unknown_machine_is_refused_with_close_names_and_the_way_out(
    prices: dict[str, InstancePrice],
) -> None:
    with pytest.raises(ConfigError, match=r"'g5\.xlrge'.*Did you mean g5\.xlarge.*usd_per_hour"):
        find_price(prices, "g5.xlrge", "spot")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("region: here", "region: here\n  zone: x", r"0\.zone: unknown key"),
        ("  region: here\n", "", r"0\.region: missing"),
        ("  currency: USD\n", "", r"0\.currency: missing"),
        ("currency: USD", "currency: EUR", r"0\.currency: 'EUR'; input should be 'USD'"),
        ("spot: 1.8", "spot: -1", r"usd_per_hour\.spot: -1; input should be greater than 0"),
        ("spot: 1.8", "spot: .inf", r"usd_per_hour\.spot: inf"),
        ("2025-07-01", "yesterday", r"as_of: 'yesterday'"),
        ('{hardware: "2 vCPU"', '["2 vCPU"', r"cannot be parsed"),
        (LIST, "prices: none", r"the whole file: no list"),
        (LIST, LIST + LIST, r"small is listed twice"),
    ],
)
def test_a_wrong_price_list_is_refused_in_one_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(LIST.replace(old, new))
    with pytest.raises(ConfigError, match=message) as caught:
        load_prices(path)
    assert "\n" not in str(caught.value)


def test_a_missing_price_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        load_prices(tmp_path / "none.yaml")


def test_an_own_price_is_as_old_as_the_run() -> None:
    price = own_price("rack 7", 0.31, as_of="2026-11-20")
    assert (price.market, price.usd_per_hour, price.as_of) == ("own", 0.31, "2026-11-20")


def test_cost_is_split_by_what_the_time_went_into() -> None:
    cost = cost_of(a_price(), wall_s=1_000, score_s=700, build_s=200, rows=50_000)
    assert cost.usd == pytest.approx(1.0)
    assert cost.usd_per_100k == pytest.approx(2.0)
    shares = [cost.scoring_usd, cost.building_usd, cost.other_usd]
    assert shares == pytest.approx([0.7, 0.2, 0.1])


def test_replay_is_paid_for_with_scoring() -> None:
    cost = cost_of(a_price(), wall_s=1_000, score_s=700, build_s=200, rows=1, replay_s=70)
    shares = [cost.scoring_usd, cost.replay_usd, cost.building_usd, cost.other_usd]
    assert shares == pytest.approx([0.63, 0.07, 0.2, 0.1])
    cut = cost_of(a_price(), wall_s=100, score_s=70, build_s=0, rows=1, replay_s=71)
    assert (cut.scoring_usd, cut.replay_usd) == (0, pytest.approx(0.07))


@pytest.mark.parametrize(
    ("score_s", "build_s"), [(0, 0), (900, 99.9), (1_001, 0), (0, 1_001), (600, 600)]
)
def test_the_shares_add_up_even_when_clocks_disagree(score_s: float, build_s: float) -> None:
    cost = cost_of(a_price(), wall_s=1_000, score_s=score_s, build_s=build_s, rows=10)
    shares = (cost.scoring_usd, cost.building_usd, cost.other_usd)
    assert min(shares) >= 0
    assert sum(shares) == pytest.approx(cost.usd)


def test_a_run_without_rows_costs_nothing_per_row() -> None:
    cost = cost_of(a_price(), wall_s=10, score_s=0, build_s=0, rows=0)
    assert cost.usd_per_100k == 0
    assert cost.usd > 0
