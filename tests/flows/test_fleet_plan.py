"""`score plan --fleet`: which machines are looked at, at which rate and price, in which shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.planning import fleet as fleet_plan
from flows.planning.fleet import SPOT_INTERRUPTIONS_PER_H, FleetRequest, parse_rates
from flows.planning.simulate import Measured
from flows.shipped import shipped_config
from pipeline.cost import Market, find_price, load_prices, own_price
from pipeline.errors import ConfigError
from tests.pipeline.simulation_cases import RATES as ONE_LANE

PRICES = load_prices(Path(shipped_config("prices.yaml")))
OWN_PRICE = own_price("the-box", 0.5, as_of="2026-11-20")
RATES = replace(ONE_LANE, spread=0.4, lanes_per_machine=2, usd_per_hour=7.0)


def request(**changed: Any) -> FleetRequest:
    usual: dict[str, Any] = {
        "rows": (10**8,),
        "window_h": 4.0,
        "instances": (),
        "market": "spot",
        "rates": {},
        "shard_rows": None,
        "interruptions_per_h": None,
        "replacement_s": 180.0,
        "machine_spread": 0.05,
        "seeds": 3,
    }
    return FleetRequest(**usual | changed)


@pytest.fixture
def measured() -> Measured:
    return Measured(
        rates=RATES, price=OWN_PRICE, rows_at_risk=1_500, files_per_shard=0.1, build_s=0
    )


def machines(measured: Measured, **changed: Any) -> fleet_plan.Machines:
    return fleet_plan._machines({"c6i.large": measured}, measured, PRICES, request(**changed))


@pytest.mark.parametrize("market", ["spot", "on_demand"])
def test_a_machine_that_scored_a_night_has_its_rate_and_the_price_of_the_market(
    measured: Measured, market: Market
) -> None:
    ((name, (found, price)),) = machines(measured, market=market).items()
    assert name == "c6i.large"
    assert price == find_price(PRICES, name, market)
    assert found.rates.usd_per_hour == price.usd_per_hour
    assert (found.rates.rows_per_s, found.rates.lanes_per_machine) == (100, 2)


def test_a_machine_of_no_list_keeps_its_own_price(measured: Measured) -> None:
    found = fleet_plan._machines({"the-box": measured}, measured, PRICES, request())
    assert found["the-box"][1] == OWN_PRICE


def test_a_rate_that_is_given_is_that_of_a_whole_machine(measured: Measured) -> None:
    found, _ = machines(measured, rates={"g6.xlarge": 5_000.0})["g6.xlarge"]
    assert (found.rates.rows_per_s, found.rates.lanes_per_machine) == (5_000, 1)
    assert found.rates.warmup_s == 3, "all else is as that night"


def test_only_the_machines_that_are_asked_for_are_looked_at(measured: Measured) -> None:
    asked = {"rates": {"g6.xlarge": 5_000.0}, "instances": ("g6.xlarge",)}
    assert set(machines(measured, **asked)) == {"g6.xlarge"}


def test_a_machine_without_a_rate_is_refused_with_the_way_out(measured: Measured) -> None:
    with pytest.raises(ConfigError, match=r"no rate of g6\.xlarge .*--rate INSTANCE=ROWS_PER_S"):
        machines(measured, instances=("g6.xlarge",))


@pytest.mark.parametrize("changed", [{"instances": ("g6.big",)}, {"rates": {"g6.big": 5.0}}])
def test_a_machine_without_a_price_is_refused(measured: Measured, changed: Any) -> None:
    with pytest.raises(ConfigError, match=r"'g6\.big' has no price"):
        machines(measured, **changed)


def test_larger_shards_are_more_alike_and_more_is_lost_with_one(measured: Measured) -> None:
    found, _ = machines(measured, shard_rows=4_000)["c6i.large"]
    assert found.rates.spread == pytest.approx(0.2)
    assert found.rows_at_risk == 4_500
    assert found.files_per_shard == pytest.approx(0.4)
    assert found.work(10**6).shards == 250


def test_the_cheapest_fleet_comes_first_and_one_that_cannot_do_it_last(
    measured: Measured,
) -> None:
    known = machines(measured, rates={"g6.xlarge": 50_000.0, "m7i.large": 0.01}, shard_rows=10_000)
    night = fleet_plan._night(known, 10**8, request())
    names = [each["instance"] for each in night["fleets"]]
    costs = [each["forecast"]["usd"] for each in night["fleets"][:2]]
    assert names == ["g6.xlarge", "c6i.large", "m7i.large"]
    assert costs == sorted(costs)
    assert night["fleets"][2]["forecast"] is None
    assert night["ceilings"][0]["name"] == "planning", "a file a shard"


def test_spot_machines_are_taken_away_unless_it_is_said_how_often() -> None:
    assert request().fleet.interruptions_per_h == SPOT_INTERRUPTIONS_PER_H
    assert request(market="on_demand").fleet.interruptions_per_h == 0
    assert request(interruptions_per_h=0.0).fleet.interruptions_per_h == 0
    assert request(market="on_demand", interruptions_per_h=2.0).fleet.interruptions_per_h == 2


def test_rates_are_given_by_machine() -> None:
    assert parse_rates(["g6.xlarge=5200", "c6i.large=1e6"]) == {
        "g6.xlarge": 5_200,
        "c6i.large": 1_000_000,
    }


@pytest.mark.parametrize("text", ["g6.xlarge", "=5", "g6.xlarge=", "g6.xlarge=0", "x=nan", "x=inf"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected INSTANCE=ROWS_PER_S"):
        parse_rates([text])
