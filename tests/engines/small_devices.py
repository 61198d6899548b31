"""A GPU to name where there is none: values only, nothing asks a driver."""

from __future__ import annotations

from engines.devices import Gpu

H200 = Gpu(
    uuid="GPU-1",
    name="NVIDIA H200",
    compute_capability=(9, 0),
    num_sms=132,
    memory_bytes=150 << 30,
    mig_profile=None,
    driver="580.95.05",
    cuda=(13, 0),
    architecture="Linux-x86_64",
    num_threads=8,
)
