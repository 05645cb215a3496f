"""Best plan with hindsight over KV segments and checkpoints, and the bound of an infinite cache."""

from hybridcache.lab.optimum.plan import MemoryBudget, Plan
from hybridcache.lab.optimum.solve import Optimum, best_plan

__all__ = ["MemoryBudget", "Optimum", "Plan", "best_plan"]
