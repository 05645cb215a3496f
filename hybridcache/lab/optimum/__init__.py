"""Offline optimum over KV segments, checkpoints and their placement: a bound for every policy."""

from hybridcache.lab.optimum.plan import LowerBudget, MemoryBudget, Plan
from hybridcache.lab.optimum.price import lower_budgets
from hybridcache.lab.optimum.solve import Method, Optimum, best_plan

__all__ = ["LowerBudget", "MemoryBudget", "Method", "Optimum", "Plan", "best_plan", "lower_budgets"]
