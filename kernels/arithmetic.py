"""Rounding of sizes to multiples and to powers of two, on the host."""


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least n."""
    return -(-n // multiple) * multiple


def power_of_two_at_most(n: int) -> int:
    """The largest power of two not above n, at least 1."""
    return 1 << max(0, n.bit_length() - 1)


def power_of_two_at_least(n: int) -> int:
    """The smallest power of two not below n >= 1."""
    return 1 << (n - 1).bit_length()
