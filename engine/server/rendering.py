"""How a chat becomes a prompt, as far as a body says."""

from __future__ import annotations

from typing import Any

from engine.server.strict import Strict


class Rendering(Strict):
    """The part of a request that is the chat template's."""

    add_generation_prompt: bool | None = None
    """None: but for ``continue_final_message``."""
    continue_final_message: bool = False
    """The answer goes on in the last message."""
    chat_template_kwargs: dict[str, Any] | None = None
    """The template's own switches, such as ``enable_thinking``."""

    @property
    def begins_answer(self) -> bool:
        """The prompt ends with the beginning of an answer."""
        return self.add_generation_prompt is not False and not self.continue_final_message
