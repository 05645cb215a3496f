"""Model families, one flat file each, by the architecture that config.json names."""

from __future__ import annotations

from engine.run.models.decoder import Decoder
from engine.run.models.qwen3 import Qwen3
from engine.run.models.qwen3_5 import Qwen3_5
from engine.run.models.qwen3_5_moe import Qwen3_5Moe
from engine.run.models.qwen3_next import Qwen3Next

MODELS: dict[str, type[Decoder]] = {
    "qwen3_next": Qwen3Next,
    "qwen3_5": Qwen3_5,
    "qwen3_5_moe": Qwen3_5Moe,
    "qwen3": Qwen3,
}
"""Architecture (``ModelConfig.architecture``) to the class that serves it."""
