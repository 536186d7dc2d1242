"""What every paged-attention kernel shares: the checks of a call, the oracle, and the form in XLA operations."""
