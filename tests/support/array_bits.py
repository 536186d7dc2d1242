"""Arrays compared by their bytes, so that NaN equals itself."""

import numpy as np


def array_bits(x) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(x)).view(np.uint8)
