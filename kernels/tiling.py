"""The shape of a TPU register: an array whose two minor axes do not fill it is padded or laid out anew."""

from paged_dist.kernels.arithmetic import round_up

LANES = 128  # of the minor axis: a stored row is a multiple of it, or XLA pads or copies the pool
SUBLANES = 8  # rows of a register at 4 bytes an element; rows of the smallest tile that a DMA takes, at any dtype


def stored_head_dim(head_dim: int) -> int:
    """Lanes that a token of one head takes in a stored page: 64, two tokens to a row, or a multiple of 128."""
    half = LANES // 2
    return half if head_dim <= half else round_up(head_dim, LANES)
