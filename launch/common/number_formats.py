"""Numbers as the programs print them: bytes and rates with a prefix."""

from __future__ import annotations


def quantity(value: float, unit: str) -> str:
    """`value` with a decimal prefix, such as '1.50 GB' or '120.00 MB/s'."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.2f} {prefix}{unit}"
    return f"{value:.2f} {unit}"


def gigabytes(size: float) -> str:
    """`size` bytes in decimal gigabytes, '1.2 GB': a rough size in an error."""
    return f"{size / 1e9:.1f} GB"


def gib(size: float) -> str:
    """`size` bytes in GiB, '31.25 GiB', as a chip's HBM is counted."""
    return f"{size / 2**30:.2f} GiB"


def kib(size: float) -> str:
    """`size` bytes in KiB, '512 KiB', as a kernel's scalar and vector memory is counted."""
    return f"{size / 1024:.0f} KiB"
