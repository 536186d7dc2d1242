"""What `Watchdog.agree` compares, and how it says on which key two processes differ."""

from __future__ import annotations

from paged_dist.cluster.exit_codes import DISAGREE

_SHOWN = 200  # characters of a value in an error


class Disagreement(RuntimeError):
    """Two processes of a run hold different values. The text names them, the key, and both values.

    Attributes:
      exit_code: with which each process should end, 4.

    Example:
      >>> with pd.Watchdog() as watch:
      ...     try:
      ...         watch.agree({"batch": 64, "page_size": 128})
      ...     except pd.Disagreement as e:  # on all processes, or on none
      ...         raise SystemExit(e.exit_code)
      >>> pd.Disagreement.exit_code
      4
    """

    exit_code = DISAGREE


def first_difference(everyone: list[tuple[str, dict[str, str]]]) -> str | None:
    """The first key on which a process differs from process 0, in words; None where all hold the same.

    Args:
      everyone: the processes by number, each as (host and pid, its values by key).
    """
    (first_name, first), *_ = everyone
    for key in dict.fromkeys(key for _, values in everyone for key in values):
        odd = [i for i, (_, values) in enumerate(everyone) if values.get(key) != first.get(key)]
        if odd:
            name, values = everyone[odd[0]]
            more = f"; {len(odd) - 1} more differ from process 0" if len(odd) > 1 else ""
            return (
                f"the processes disagree on {key}: {_shortened(first.get(key))} on process 0 ({first_name}), "
                f"{_shortened(values.get(key))} on process {odd[0]} ({name}){more}"
            )
    return None


def _shortened(text: str | None) -> str:
    if text is None:
        return "nothing"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
