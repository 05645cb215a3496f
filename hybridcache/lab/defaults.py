"""Defaults that functions and command lines share, each said once. Those of a sweep stand in
``Sweep``."""

MODEL = "qwen3-next"
GIB_SPEC = "2:200:15"
"""Sizes of a sweep: 15 from 2 to 200 GiB, logarithmically spaced."""
LIMIT_S = 60.0
"""Seconds for one plan of the optimum."""
RELATIVE_GAP = 0.005
"""Between plan and bound, at which the optimum is near enough."""
CLOSED_LOOP_GIB = 16.0
"""Memory of a closed-loop run."""
RATES = "0.5:4:5"
"""Sessions a second in closed loop."""
