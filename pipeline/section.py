"""What all sections of a job file, and of the price list, have in common."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic
from pydantic import Field
from pydantic_core import PydanticKnownError
from pydantic_core.core_schema import ErrorType

from pipeline.paths import is_plain

NAME = r"^[a-z0-9][a-z0-9_-]*$"
TIME_OF_DAY = r"^([01]\d|2[0-3]):[0-5]\d$"
TEXTFILE = r"\.prom$"
NOT_BLANK = r"\S"
PATTERNS = {
    NAME: "lower case letters, digits, `-` and `_`, the first one no sign",
    TIME_OF_DAY: 'a time of day such as "07:00"',
    TEXTFILE: "a path that ends in .prom",
    NOT_BLANK: "a folder or `s3://bucket/prefix`",
}
"""What text of each pattern is, in words."""

Share = Annotated[float, Field(ge=0, le=1)]
Address = Annotated[str, Field(pattern=NOT_BLANK)]


def plain_address(value: Any) -> Any:
    """An address of a bucket that means what it seems to; ValueError for others."""
    if isinstance(value, str) and not is_plain(value):
        raise ValueError("expected `s3://bucket/prefix` with names only: no `//`, `.` or `..`")
    return value


_WRONG_KIND: dict[type, ErrorType] = {bool: "bool_type", int: "int_type", float: "float_type"}


class Section(pydantic.BaseModel):
    """Base of all sections: immutable; unknown keys are refused, and numbers without end."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @pydantic.field_validator("*", mode="wrap")
    @classmethod
    def _switches_are_no_numbers(
        cls, value: Any, handler: pydantic.ValidatorFunctionWrapHandler
    ) -> Any:
        """Pydantic takes true for 1 and 0 for false, and YAML takes `off` and `no` for false."""
        result = handler(value)
        pairs = zip(value, result, strict=True) if isinstance(result, tuple) else [(value, result)]
        for given, taken in pairs:
            is_number = isinstance(given, int | float)
            if is_number and isinstance(given, bool) != isinstance(taken, bool):
                raise PydanticKnownError(_WRONG_KIND[type(taken)])
        return result
