"""The best anyone could do: the offline optimum over KV segments, checkpoints and placement."""

from hybridcache.lab.optimum.plan import Budget, Plan
from hybridcache.lab.optimum.solve import Method, Optimum, optimum

__all__ = ["Budget", "Method", "Optimum", "Plan", "optimum"]
