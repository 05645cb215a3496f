"""Hypothesis profiles: `ci` is bounded and deterministic, `dev` the default, `thorough` for long
local runs; `mutate` is `ci` that asks whether a test fails and seeks no smaller example.

And where there is no GPU, Triton interprets: it decides when it is first imported, which may be by
transformers. Where `KERNELS_ON_DEVICE` is set, as `make gpu` does, nothing may be interpreted: what
passes there must have run on the device.

Threads of OpenMP that wait for each other sleep: two workers with two threads each on two cores
would spend most of their time spinning (a test of exactness 19 s in place of 1.4).
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

if os.environ.get("KERNELS_ON_DEVICE") == "1":
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError(
            "KERNELS_ON_DEVICE forbids what TRITON_INTERPRET asks for: unset one of the two."
        )
elif not any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ["TRITON_INTERPRET"] = "1"

# Read once, when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

QUIET = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
settings.register_profile(
    "dev", deadline=None, max_examples=50, stateful_step_count=40, suppress_health_check=QUIET
)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, print_blob=True)
settings.register_profile(
    "mutate", settings.get_profile("ci"), phases=(Phase.explicit, Phase.generate)
)
settings.register_profile(
    "thorough", settings.get_profile("dev"), max_examples=2000, stateful_step_count=100
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))
