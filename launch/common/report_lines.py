"""Lines of a program's report: a name and a text in 80 columns, and how several programs put a setting in words."""

from __future__ import annotations

import textwrap

from paged_dist.kernels.tiling import stored_head_dim


def report_line(name: str, text: str, width: int = 80) -> str:
    """'name       text', its further lines indented as far as the first one's text."""
    return textwrap.fill(text, width, initial_indent=f"{name:<11}", subsequent_indent=" " * 11, break_on_hyphens=False)


def head_dim_words(head_dim: int) -> str:
    """'head_dim 128', or 'head_dim 96 (stored as 128)' where pages are padded: their bytes count the padding."""
    stored = stored_head_dim(head_dim)
    return f"head_dim {head_dim}" + (f" (stored as {stored})" if stored > head_dim else "")


def attention_options(settings: dict) -> str:
    """What attention does that it need not, from a record's settings: ', soft cap 30, window 512', or nothing."""
    cap, window = settings["soft_cap"], settings["sliding_window"]
    return ("" if cap is None else f", soft cap {cap:g}") + ("" if window is None else f", window {window}")
