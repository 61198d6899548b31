"""What a run cost: the price of its machine's hour, and the seconds that it took."""

from __future__ import annotations

import datetime
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import yaml
from pydantic import Field

from pipeline.errors import ConfigError
from pipeline.report import Cost, Price
from pipeline.section import Section

UsdPerHour = Annotated[float, Field(gt=0)]
Market = Literal["on_demand", "spot"]


@dataclass(frozen=True, kw_only=True, slots=True)
class InstancePrice:
    """One machine of the price list."""

    instance: str
    hardware: str
    on_demand_usd_per_hour: float
    spot_usd_per_hour: float
    """A rough average: spot prices move by the hour."""
    source: str
    """The provider's price page, with the region."""
    as_of: str
    """ISO date on which the price was written down."""


class _UsdPerHour(Section):
    on_demand: UsdPerHour
    spot: UsdPerHour


class _Instance(Section):
    hardware: str
    usd_per_hour: _UsdPerHour
    source: str | None = None
    """Null: the list's."""
    as_of: datetime.date | None = None
    """Null: the list's."""


class _PriceList(Section):
    """The prices of one provider in one region, as read on one day but for exceptions."""

    provider: str
    region: str
    currency: Literal["USD"]
    """Stated, so that nobody adds prices of another one: reports are in US dollars."""
    source: str
    as_of: datetime.date
    instances: dict[str, _Instance]


_PRICE_LISTS = pydantic.TypeAdapter(list[_PriceList])
_SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's parser, if PyYAML has it: 2 ms for our list instead of 15, in every start of a run."""


def load_prices(path: Path) -> dict[str, InstancePrice]:
    """Read the price list (configs/prices.yaml), by instance.

    Raises:
        ConfigError: The file is missing, is not YAML, has unknown keys or names a machine twice.
    """
    try:
        listed = _SafeLoader(path.read_text(encoding="utf-8")).get_single_data()
        lists = _PRICE_LISTS.validate_python(listed)
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; expected the price list. "
            "Restore configs/prices.yaml, or set `cost.usd_per_hour` in the job file."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(
            f"{path}: cannot be parsed ({first_line}); expected YAML. "
            "Mend it, or set `cost.usd_per_hour` in the job file."
        ) from None
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path}: {_first_problem(error)}") from None
    prices: dict[str, InstancePrice] = {}
    for price_list in lists:
        for name, instance in price_list.instances.items():
            if name in prices:
                raise ConfigError(
                    f"{path}: {name} is listed twice; expected one price a machine. "
                    "Remove one of the entries."
                )
            prices[name] = _instance_price(name, instance, price_list)
    return prices


def find_price(prices: dict[str, InstancePrice], instance: str, market: Market) -> Price:
    """The price of one machine, as the report states it.

    Raises:
        ConfigError: The machine is not in the list.
    """
    found = prices.get(instance)
    if found is None:
        close = difflib.get_close_matches(instance, prices, n=3, cutoff=0.5)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise ConfigError(
            f"cost.instance: {instance!r} has no price; expected a machine of "
            f"configs/prices.yaml.{hint} For any other machine set `cost.usd_per_hour`."
        )
    return Price(
        instance=instance,
        market=market,
        usd_per_hour=found.spot_usd_per_hour if market == "spot" else found.on_demand_usd_per_hour,
        source=found.source,
        as_of=found.as_of,
    )


def own_price(instance: str, usd_per_hour: float, *, as_of: str) -> Price:
    """The price that the job file itself gives; `as_of` is the run's date."""
    return Price(
        instance=instance,
        market="own",
        usd_per_hour=usd_per_hour,
        source="job file",
        as_of=as_of,
    )


def cost_of(
    price: Price,
    *,
    wall_s: float,
    score_s: float,
    build_s: float,
    rows: int,
    replay_s: float = 0.0,
) -> Cost:
    """Split the price of `wall_s` seconds into scoring, replay, building and the rest.

    The shares add up to the whole: clocks that disagree by a little (scoring longer than the run
    that contains it) are cut to fit. `replay_s` is a part of `score_s`.
    """
    scoring_s = min(score_s, wall_s)
    replay_s = min(replay_s, scoring_s)
    building_s = min(build_s, wall_s - scoring_s)
    usd_per_s = price.usd_per_hour / 3600
    usd = wall_s * usd_per_s
    return Cost(
        price=price,
        usd=usd,
        usd_per_100k=usd / rows * 100_000 if rows else 0.0,
        scoring_usd=(scoring_s - replay_s) * usd_per_s,
        replay_usd=replay_s * usd_per_s,
        building_usd=building_s * usd_per_s,
        other_usd=(wall_s - scoring_s - building_s) * usd_per_s,
    )


def _instance_price(name: str, instance: _Instance, price_list: _PriceList) -> InstancePrice:
    return InstancePrice(
        instance=name,
        hardware=instance.hardware,
        on_demand_usd_per_hour=instance.usd_per_hour.on_demand,
        spot_usd_per_hour=instance.usd_per_hour.spot,
        source=f"{instance.source or price_list.source} "
        f"({price_list.provider}, {price_list.region})",
        as_of=(instance.as_of or price_list.as_of).isoformat(),
    )


def _first_problem(error: pydantic.ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(key) for key in problem["loc"]) or "the whole file"
    match problem["type"]:
        case "extra_forbidden":
            return f"{where}: unknown key; expected only known ones. Remove it."
        case "missing":
            return f"{where}: missing; expected a value. Add it."
        case "model_type" | "dict_type":
            return f"{where}: {problem['input']!r}; expected a mapping. Correct it."
        case "list_type":
            return f"{where}: no list; expected `- provider: ...`. Correct it."
    message = problem["msg"]
    return f"{where}: {problem['input']!r}; {message[0].lower()}{message[1:]}. Correct it."
