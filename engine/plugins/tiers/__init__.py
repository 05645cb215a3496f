"""Host and disk tiers for KV and states."""
