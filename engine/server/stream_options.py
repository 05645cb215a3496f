"""What a body may ask of how its answer arrives."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from engine.server.strict import Strict


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    """Usage so far with every event."""
    include_obfuscation: bool = False


class Streamed(Strict):
    """The part of a request that says whether its answer comes in events, and how."""

    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _streams_with_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError(
                "'stream_options' is for streamed answers: set 'stream' to true, or leave it out."
            )
        return self

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def repeats_usage(self) -> bool:
        """Every event has the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats
