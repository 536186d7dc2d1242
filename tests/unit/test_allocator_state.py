"""PageAllocator.from_state: what no allocator can be in is refused, whatever was done to the saved state."""

from __future__ import annotations

import copy
import json

import pytest
from jax.sharding import AbstractMesh

import paged_dist as pd
from paged_dist.cache import CacheSpec
from paged_dist.pages import PageAllocator

P = 8
DIGEST = "00" * 16


@pytest.fixture(scope="module")
def saved():
    """data 2, context 2, 4 rows, 4 pages a shard: rows 0 and 1 share a page, page 12 is cached, row 2 is empty."""
    mesh = AbstractMesh((2, 2, 1), ("data", "context", "model"))
    a = PageAllocator(CacheSpec(1, 128, 16, P), mesh, 4, 4)
    a.allocate(0, 2 * P + 5)
    a.cache_prefix(0, range(2 * P))
    a.allocate(1, P + 1, a.prefix_match(range(P)))
    a.allocate(2, 0)
    a.allocate(3, P)
    a.cache_prefix(3, range(P), b"adapter")
    a.free(3)
    state = json.loads(json.dumps(a.to_state()))
    assert state["rows"] == [[21, [0, 4, 1]], [9, [0, 5]], [0, []], None]
    assert [known[:3] for known in state["known"]] == [[0, 0, 0], [4, 0, 1], [8, 0, 0]] and state["cached"] == [8]
    assert PageAllocator.from_state(copy.deepcopy(state), a.spec).digest() == a.digest()
    return state, a.spec


def put(value, *path):
    def change(state):
        *before, last = path
        for step in before:
            state = state[step]
        state[last] = value

    return change


def add(value, *path):
    def change(state):
        for step in path:
            state = state[step]
        state.append(value)

    return change


WRONG = {
    "a page twice in one row": put([17, [0, 4, 0]], "rows", 0),
    "a page of another data shard": put([8, [8]], "rows", 0),
    "a page of two data shards' rows": put([8, [0]], "rows", 3),
    "pages out of turn": put([16, [0, 1]], "rows", 1),
    "a shared page that is page 0 of one row and 2 of another": put([3, [1]], "rows", 1),
    "more pages than the tokens take": put([8, [0, 5]], "rows", 1),
    "fewer": put([17, [0, 5]], "rows", 1),
    "pages of an empty row": put([0, [0]], "rows", 2),
    "more tokens than a table holds": put([33, [0, 4, 1, 5, 2]], "rows", 0),
    "a negative length": put([-1, []], "rows", 2),
    "a length that is no whole number": put([9.0, [0, 5]], "rows", 1),
    "a length that is a bool": put([True, [0]], "rows", 1),
    "a page that is a string": put([9, ["0", 5]], "rows", 1),
    "a page that is a float": put([9, [0.0, 5]], "rows", 1),
    "a page that is a bool": put([9, [False, 5]], "rows", 1),
    "a negative page": put([8, [-4]], "rows", 1),
    "a page past the pool": put([8, [16]], "rows", 3),
    "a row of three": put([8, [0], 1], "rows", 1),
    "a row that is a number": put(8, "rows", 1),
    "a row too many": add(None, "rows"),
    "no rows": put(None, "rows"),
    "known, and nobody's": add([2, 0, 0, DIGEST, "", ""], "known"),
    "known twice": add([0, 0, 0, DIGEST, "", ""], "known"),
    "known as another page than the rows hold it as": put([0, 0, 2, DIGEST, DIGEST, ""], "known", 0),
    "known on another turn": put([0, 1, 0, DIGEST, "", ""], "known", 0),
    "known to begin on a context shard that there is not": put([0, 2, 0, DIGEST, "", ""], "known", 0),
    "known as a page before the first": put([0, 0, -2, DIGEST, "", ""], "known", 0),
    "a digest too short": put("00", "known", 0, 3),
    "a digest that is no hex": put("zz" * 16, "known", 0, 3),
    "a digest that is a number": put(7, "known", 0, 3),
    "page 0 with one before it": put(DIGEST, "known", 0, 4),
    "page 1 with none before it": put("", "known", 1, 4),
    "a namespace that is no hex": put("adapter", "known", 2, 5),
    "an entry too short": put([0, 0, 0], "known", 0),
    "a known page past the pool": add([16, 0, 0, DIGEST, "", ""], "known"),
    "cached and held": add(0, "cached"),
    "cached and not known": add(9, "cached"),
    "cached twice": add(8, "cached"),
    "a cached page that is a float": put(8.0, "cached", 0),
    "nobody's, known and not cached": put([], "cached"),
    "a held row's page that is cached": put([8, [8]], "rows", 3),
    "two data shards where there is none": put(0, "data"),
    "a context size that is a float": put(2.0, "context"),
    "sizes that are a bool": put(True, "num_sequences"),
    "no columns": put(0, "pages_per_sequence"),
    "another number of shards": put(4, "context"),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_state_that_no_allocator_can_be_in_is_refused(saved, change):
    state, spec = copy.deepcopy(saved[0]), saved[1]
    change(state)
    with pytest.raises(ValueError, match=r"^(state|data|context|num_sequences|pages_per_sequence)="):
        PageAllocator.from_state(state, spec)


@pytest.mark.parametrize("part", ["data", "context", "num_sequences", "pages_per_sequence", "rows", "known", "cached"])
def test_a_state_without_a_part_is_refused(saved, part):
    state = {name: value for name, value in saved[0].items() if name != part}
    with pytest.raises(ValueError, match=f"state=.*{part}.*: is not what to_state"):
        PageAllocator.from_state(state, saved[1])
    with pytest.raises(ValueError, match="is not what to_state"):
        PageAllocator.from_state(part, saved[1])


def test_a_cached_page_has_no_twin(saved):
    """Twins that rows hold are allowed, of one digest and one content."""
    state, spec = copy.deepcopy(saved[0]), saved[1]
    state["rows"][1] = [P, [2]]
    twin = [2, *state["known"][0][1:]]
    state["known"].append(twin)
    assert PageAllocator.from_state(state, spec).prefix_match(range(P)).pages == (0,)
    state["known"][-1] = [*twin[:5], b"other".hex()]
    with pytest.raises(ValueError, match="two contents of one digest"):
        PageAllocator.from_state(state, spec)
    state["known"][-1], state["rows"][1], state["cached"] = twin, None, [8, 2]
    with pytest.raises(ValueError, match="cached, and held or held elsewhere"):
        PageAllocator.from_state(state, spec)


def test_a_state_of_before_there_were_namespaces_is_read(saved):
    state, spec = copy.deepcopy(saved[0]), saved[1]
    state["known"] = [known[:5] for known in state["known"] if known[0] != 8]
    state["cached"] = []
    assert PageAllocator.from_state(state, spec).prefix_match(range(2 * P)).pages == (0, 4)


def test_a_save_keeps_the_namespaces(tmp_path):
    mesh = pd.make_pod_mesh(data=2, context=1, model=4)
    spec = CacheSpec(4, 128, 8, 64, "float32")
    cache, a = pd.PagedKVCache.create(spec, mesh), PageAllocator(spec, mesh, 2, 4)
    a.allocate(0, 64)
    a.cache_prefix(0, range(64), b"adapter")
    pd.save(tmp_path / "a", cache, a)
    _, there = pd.restore(tmp_path / "a", mesh)
    assert there.digest() == a.digest()
    assert there.prefix_match(range(64), namespace=b"adapter").num_tokens == 64
    assert there.prefix_match(range(64)).num_tokens == 0
    assert there.forget_prefixes(b"adapter") == 1
