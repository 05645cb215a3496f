"""The best anyone could do: the offline optimum over KV segments, checkpoints and placement."""

from hybridcache.optimum.plan import Budget, Plan
from hybridcache.optimum.solve import Method, Optimum, optimum

__all__ = ["Budget", "Method", "Optimum", "Plan", "optimum"]
