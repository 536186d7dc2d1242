"""An allocator's sequences and cached prefixes as numbers, strings and lists, and back: what a save keeps of them.

The form: {"num_sequences", "pages_per_sequence", "data", "context": the sizes; "rows": for each row None where it is
free, else [tokens, pages]; "known": for each page whose content is known [page, first, index, digest, parent,
namespace], see `PageContent`, bytes in hex; "cached": the cached pages, the least recently used first}.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Generator, Sequence
from typing import Any

from paged_dist._errors import bad_value, require, whole_number
from paged_dist.pages.ledger import PageLedger
from paged_dist.pages.page_content import DIGEST_BYTES, PageContent


def state_of(ledger: PageLedger) -> dict[str, Any]:
    """The state in the form above. Raises ValueError where copies are due: pages then lack content that is theirs."""
    ledger.copies.check_none_due()
    geometry, lengths = ledger.geometry, ledger.lengths
    held = zip(lengths.is_held, lengths.tokens, ledger.row_pages.pages, strict=True)
    return {
        "num_sequences": geometry.num_sequences,
        "pages_per_sequence": geometry.pages_per_sequence,
        "data": geometry.data,
        "context": geometry.context,
        "rows": [[length, list(pages)] if is_held else None for is_held, length, pages in held],
        "known": [
            [page, known.first, known.index, known.digest.hex(), known.parent.hex(), known.namespace.hex()]
            for page, known in ledger.pool.contents()
        ],
        "cached": ledger.pool.cached(),
    }


def state_sizes(state: dict[str, Any]) -> dict[str, int]:
    """The four sizes of the allocator that `state_of` told of. Raises ValueError where they are no sizes."""
    with _refusing_other_forms():
        sizes = {name: state[name] for name in ("data", "context", "num_sequences", "pages_per_sequence")}
        for name, value in sizes.items():
            _require_state(whole_number(name, value) >= 1, f"{name} {value!r}")
    return sizes


def load_state(ledger: PageLedger, state: dict[str, Any]) -> None:
    """Gives the empty `ledger`, of the state's sizes, the sequences and cached prefixes that `state_of` told of.

    Raises:
      ValueError: a state that no allocator can be in.
    """
    with _refusing_other_forms():
        index_of = _load_rows(ledger, state["rows"])
        _load_prefixes(ledger, index_of, state["known"], state["cached"])


@contextlib.contextmanager
def _refusing_other_forms() -> Generator[None]:
    """Turns what Python raises over a part that is missing or of another type into the ValueError of a bad state."""
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError) as e:
        raise bad_value("state", f"{type(e).__name__}: {e}", "is not what to_state() gives") from e


def _require_state(holds: bool, what: str) -> None:
    """Raises ValueError, for `what` a state says, unless an allocator can be in it."""
    require(holds, "state", what, "is not what to_state() gives")


def _load_rows(ledger: PageLedger, rows: Sequence[Any]) -> dict[int, int]:
    """Gives the empty `ledger` the sequences of a saved state. Returns which page of its rows each held page is.

    The pool learns of the pages' holders from `_load_prefixes`.
    """
    geometry = ledger.geometry
    _require_state(len(rows) == geometry.num_sequences, f"{len(rows)} rows")
    index_of: dict[int, int] = {}
    for row, held in enumerate(rows):
        if held is None:
            continue
        _require_state(len(held) == 2, f"row {row}: {held}")
        length, pages = held
        length, pages = whole_number("state", length), [whole_number("state", page) for page in pages]
        fits = 0 <= length <= geometry.max_tokens and len(pages) == geometry.pages_for(length)
        _require_state(fits, f"row {row}: {held}")
        told = f"row {row} with the pages {pages}"
        first = geometry.first_context_shard(pages)
        turn = geometry.shards_in_turn(geometry.data_shard_of_row(row), first, 0, len(pages))
        _require_state(list(map(geometry.shard_of_page, pages)) == turn, told)
        _require_state(len(set(pages)) == len(pages), f"{told}: one twice")
        for i, page in enumerate(pages):
            index = index_of.setdefault(page, i)
            _require_state(index == i, f"{told}: page {page} is number {index} of another row")
        ledger.lengths.hold(row, length)
        ledger.row_pages.append(row, pages)
    return index_of


def _load_prefixes(ledger: PageLedger, index_of: dict[int, int], known: Sequence[Any], cached: Sequence[Any]) -> None:
    """Gives `ledger`, whose sequences are there, the holders of its pages and what is known of their content."""
    geometry = ledger.geometry
    num_pages = geometry.data * geometry.context * geometry.pages_per_context_shard
    cached = [whole_number("state", page) for page in cached]
    is_cached = set(cached)
    _require_state(all(len(told) in (5, 6) for told in known), "a known page that is told in another form")
    contents = {whole_number("state", page): _read_content(*told) for page, *told in known}
    unknown = sorted(is_cached - contents.keys())
    _require_state(len(contents) == len(known), "a page that is known twice")
    _require_state(len(is_cached) == len(cached), "a page that is cached twice")
    _require_state(not unknown, f"cached pages that are not known, {unknown[:4]}")
    of_digest: dict[bytes, tuple] = {}
    twins = collections.Counter((geometry.data_shard_of_page(p), c.first, c.digest) for p, c in contents.items())
    for page, content in contents.items():
        told, (first, index, digest, *rest) = f"page {page}, known as {content}", content
        in_range = 0 <= first < geometry.context and 0 <= index < geometry.pages_per_sequence
        _require_state(0 <= page < num_pages and in_range, told)
        in_turn = geometry.context_shard_of_page(page) == (first + index) % geometry.context
        _require_state(in_turn and bool(content.parent) == (index > 0), told)
        is_one = of_digest.setdefault(digest, (index, *rest)) == (index, *rest)
        _require_state(is_one, f"{told}: two contents of one digest")
        if page in is_cached:
            alone = twins[geometry.data_shard_of_page(page), first, digest] == 1
            _require_state(page not in index_of and alone, f"{told}: cached, and held or held elsewhere")
        else:
            _require_state(index_of.get(page) == index, f"{told}: number {index_of.get(page)} of its rows")
    holders = collections.Counter(page for pages in ledger.row_pages.pages for page in pages)
    ledger.pool.load(holders, contents.items(), cached)


def _read_content(first: int, index: int, digest: str, parent: str, namespace: str = "") -> PageContent:
    """A page's content as `state_of` writes it; states from before there were namespaces have none."""
    try:
        content = PageContent(
            whole_number("state", first),
            whole_number("state", index),
            *(bytes.fromhex(told) for told in (digest, parent, namespace)),
        )
    except ValueError as e:
        raise bad_value("state", (first, index, digest, parent, namespace), "is not what to_state() gives") from e
    _require_state(len(content.digest) == DIGEST_BYTES and len(content.parent) in (0, DIGEST_BYTES), f"{content}")
    return content
