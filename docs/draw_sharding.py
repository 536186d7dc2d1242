"""Draws docs/sharding.svg: which rows, pages and heads lie on which of 8 chips, data 2 x context 2 x model 2.

    python docs/draw_sharding.py

writes the file beside this one. Plain Python. The tests check that the file is up to date, and that the page ids are
those that `PageAllocator` gives.
"""

from __future__ import annotations

import pathlib

DATA, CONTEXT, MODEL = 2, 2, 2
NUM_KV_HEADS, NUM_PAGES = 4, 32
# Of each row the ids of its pages in order, as `PageAllocator` gives them: its block table.
BLOCK_TABLES = ((0, 8, 1), (9, 2, 10, 3), (16, 24), (25, 17, 26))

WIDTH, HEIGHT = 1004, 540
CHIP_WIDTH, CHIP_HEIGHT, GAP = 200, 136, 14
LEFT, TOP = 100, 124  # of the first chip
BETWEEN = 40  # from one context shard to the next
GROUP_WIDTH = MODEL * CHIP_WIDTH + (MODEL - 1) * GAP + 24

LEGEND = (
    "data: rows and their pages. No communication.",
    "context: the pages of a row, in turn from the shard of its first page. "
    "Partial outputs are merged in each attention call.",
    "model: kv heads, each with its query heads. The same pages, of other heads. No communication in attention.",
)

STYLE = """
  text { font-family: sans-serif; font-size: 13px; fill: #1f2328 }
  .title { font-size: 16px; font-weight: bold }
  .head { font-weight: bold }
  .small { font-size: 11px; fill: #59636e }
  .page-text { font-size: 11px; fill: #1f2328 }
  .back { fill: #ffffff } .group { fill: #f6f8fa; stroke: #d0d7de } .chip { fill: #ffffff; stroke: #8c959f }
  .row0 { fill: #b6d7ff } .row1 { fill: #ffd8a8 } .row2 { fill: #b7ebc0 } .row3 { fill: #e3c8ff }
  .arrow { stroke: #59636e; stroke-width: 1.5; fill: none }
  .tip { fill: #59636e }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9198a1 } .page-text { fill: #ffffff }
    .back { fill: #0d1117 } .group { fill: #151b23; stroke: #3d444d } .chip { fill: #0d1117; stroke: #656c76 }
    .row0 { fill: #1f4f8f } .row1 { fill: #7d4e11 } .row2 { fill: #1f6132 } .row3 { fill: #5b3a8c }
    .arrow { stroke: #9198a1 } .tip { fill: #9198a1 }
  }
"""


def rows_of(data: int) -> range:
    """The rows of the batch on a data shard: row b lies on shard b // (B / data)."""
    each = len(BLOCK_TABLES) // DATA
    return range(data * each, (data + 1) * each)


def pages_of(row: int, data: int, context: int) -> list[tuple[int, int]]:
    """(place in its sequence, id) of the row's pages on a context shard, which owns N / (data * context) ids."""
    owned = NUM_PAGES // (DATA * CONTEXT)
    shard = data * CONTEXT + context
    return [(i, page) for i, page in enumerate(BLOCK_TABLES[row]) if page // owned == shard]


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" class="{kind}"/>'


def arrow(x: float, top: float, bottom: float) -> list[str]:
    """An arrow with two heads, from top to bottom."""
    head = lambda base, tip: f'<path class="tip" d="M{x - 4:g} {base:g} L{x:g} {tip:g} L{x + 4:g} {base:g} Z"/>'
    line = f'<path class="arrow" d="M{x:g} {top + 6:g} V{bottom - 6:g}"/>'
    return [line, head(top + 7, top), head(bottom - 7, bottom)]


def chip(x: float, y: float, data: int, context: int, model: int) -> list[str]:
    """One chip: its kv heads, the page ids that it owns, and the pages of each row that lie on it."""
    heads, ids = NUM_KV_HEADS // MODEL, NUM_PAGES // (DATA * CONTEXT)
    shard = data * CONTEXT + context
    parts = [
        box(x, y, CHIP_WIDTH, CHIP_HEIGHT, "chip"),
        text(x + 10, y + 20, f"kv heads {', '.join(str(model * heads + h) for h in range(heads))}", "head"),
        text(x + CHIP_WIDTH - 10, y + 20, f"ids {shard * ids} to {(shard + 1) * ids - 1}", "small", "end"),
    ]
    for line, row in enumerate(rows_of(data)):
        top = y + 32 + 50 * line
        parts.append(text(x + 10, top + 24, f"row {row}"))
        for k, (place, page) in enumerate(pages_of(row, data, context)):
            left = x + 60 + 62 * k
            parts += [
                box(left, top, 56, 40, f"row{row}"),
                text(left + 28, top + 17, f"page {place}", "page-text", "middle"),
                text(left + 28, top + 32, f"id {page}", "page-text", "middle"),
            ]
    return parts


def group(data: int) -> list[str]:
    """A data shard: its chips, context down and model across, and the merges between them."""
    left, down = LEFT + data * (GROUP_WIDTH + 20), CHIP_HEIGHT + BETWEEN
    parts = [
        box(left - 12, TOP - 50, GROUP_WIDTH, CONTEXT * down - BETWEEN + 62, "group"),
        text(left, TOP - 28, f"data {data}: rows {', '.join(map(str, rows_of(data)))}", "head"),
    ]
    for model in range(MODEL):
        x = left + model * (CHIP_WIDTH + GAP)
        parts.append(text(x + CHIP_WIDTH / 2, TOP - 8, f"model {model}", "small", "middle"))
        for context in range(CONTEXT):
            y = TOP + context * down
            parts += chip(x, y, data, context, model)
            if context + 1 < CONTEXT:
                parts += arrow(x + CHIP_WIDTH / 2, y + CHIP_HEIGHT + 4, y + down - 4)
                parts.append(text(x + CHIP_WIDTH / 2 + 10, y + CHIP_HEIGHT + BETWEEN / 2 + 4, "merge", "small"))
    return parts


def svg() -> str:
    """The whole file."""
    what = f"{len(BLOCK_TABLES)} rows (sequences), {NUM_KV_HEADS} kv heads, a pool of {NUM_PAGES} pages"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-labelledby="title">',
        '<title id="title">Rows, pages and heads on 8 chips: data 2 x context 2 x model 2</title>',
        f"<style>{STYLE}</style>",
        box(0, 0, WIDTH, HEIGHT, "back"),
        text(24, 30, f"8 chips: data {DATA} x context {CONTEXT} x model {MODEL}", "title"),
        text(24, 52, what, "small"),
    ]
    for data in range(DATA):
        parts += group(data)
    for context in range(CONTEXT):
        y = TOP + context * (CHIP_HEIGHT + BETWEEN) + CHIP_HEIGHT / 2
        parts.append(text(14, y, f"context {context}", "head"))
    below = TOP + CONTEXT * (CHIP_HEIGHT + BETWEEN) - BETWEEN + 42
    parts += [text(24, below + 21 * line, words) for line, words in enumerate(LEGEND)]
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    file = pathlib.Path(__file__).with_name("sharding.svg")
    file.write_text(svg())
    print(f"written: {file.name}")
