"""Where a prefill saves checkpoints: rules, and what composes them."""
