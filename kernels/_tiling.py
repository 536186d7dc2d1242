"""The shape of a TPU register, which decides what an array's minor axes may be without padding."""

LANES = 128  # minor axis: a stored row is a multiple of it, or XLA pads or relayouts the pool
SUBLANES = 8  # rows, at 4 bytes an element; of the smallest tile that a DMA can address, at any dtype
