"""What every paged-attention kernel shares: a call's sizes and their checks, the NumPy oracle, the XLA form."""
