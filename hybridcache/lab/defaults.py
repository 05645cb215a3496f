"""Defaults that functions and command lines share, each said once. Those of a sweep stand in
``Sweep``."""

MODEL = "qwen3-next"
GIB_SPEC = "2:200:15"
"""Sizes of a sweep: 15 from 2 to 200 GiB, logarithmically spaced."""
CLOSED_LOOP_GIB = 16.0
"""Memory of a closed-loop run."""
RATES = "0.5:4:5"
"""Sessions a second in closed loop."""
