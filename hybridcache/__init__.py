"""Prefix caching for hybrid LLMs: one radix tree over KV rows and state checkpoints. Integers only, no torch.

Start with ``build_prefix_cache(CacheConfig(...))``; ``interface`` says what the verbs do and who owns which index.
"""

from hybridcache.build import CacheConfig, build_prefix_cache
from hybridcache.hybrid import HybridRadixCache
from hybridcache.interface import Losses, PrefixCache, PrefixMatch
from hybridcache.kv_only import RadixCache
from hybridcache.null import NullCache

__all__ = [
    "CacheConfig",
    "HybridRadixCache",
    "Losses",
    "NullCache",
    "PrefixCache",
    "PrefixMatch",
    "RadixCache",
    "build_prefix_cache",
]
