"""What all sections of a job file, and of the price list, have in common."""

from __future__ import annotations

from typing import Annotated

import pydantic
from pydantic import Field

Share = Annotated[float, Field(ge=0, le=1)]


class Section(pydantic.BaseModel):
    """Base of all sections: immutable; unknown keys are refused, and numbers without end."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
