"""Kernels of hybrid models: functions of tensors, independent of the engine.

Each folder has a plain PyTorch ``reference`` next to its Triton kernel.
"""

from kernels.library import settle_products

settle_products()  # At the import, because MKL reads its settings at the first product.
