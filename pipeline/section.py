"""What all sections of a job file, and of the price list, have in common."""

from __future__ import annotations

from typing import Annotated

import pydantic
from pydantic import Field

NAME = r"^[a-z0-9][a-z0-9_-]*$"
TIME_OF_DAY = r"^([01]\d|2[0-3]):[0-5]\d$"
TEXTFILE = r"\.prom$"
PATTERNS = {
    NAME: "lower case letters, digits, `-` and `_`, the first one no sign",
    TIME_OF_DAY: 'a time of day such as "07:00"',
    TEXTFILE: "a path that ends in .prom",
}
"""What text of each pattern is, in words."""

Share = Annotated[float, Field(ge=0, le=1)]


class Section(pydantic.BaseModel):
    """Base of all sections: immutable; unknown keys are refused, and numbers without end."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
