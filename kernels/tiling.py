"""The shape of a TPU register, which decides what an array's minor axes may be without padding."""

LANES = 128  # minor axis: a stored row is a multiple of it, or XLA pads or relayouts the pool
SUBLANES = 8  # rows, at 4 bytes an element; of the smallest tile that a DMA can address, at any dtype


def stored_head_dim(head_dim: int) -> int:
    """Lanes that one head's token takes in a stored page: 64, of which two fill a row, or whole rows of 128."""
    half = LANES // 2
    return half if head_dim <= half else -(-head_dim // LANES) * LANES
