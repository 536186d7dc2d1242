"""Saved caches: what comes back, on which meshes, and that an interrupted or damaged save never restores wrong."""

from __future__ import annotations

import json
import os

import pytest
from context_cases import pod
from test_distributed import free_port, run_processes
from test_move import SPECS, check, contents, fill

import paged_dist as pd
from paged_dist.transfer import files
from paged_dist.transfer import manifest as manifests


def small(tmp_path, *, shape=(2, 2, 2), name="int8", **options):
    """(folder, cache, allocator) of a save."""
    spec = pd.CacheSpec(**dict(num_kv_heads=4, head_dim=128, num_pages=512) | SPECS[name])
    cache, pages = fill(spec, pod(*shape), 8, 4)
    folder = tmp_path / "saved"
    pd.save(folder, cache, pages, **options)
    return folder, cache, pages


@pytest.mark.filterwarnings("ignore:.*page_size=")
@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("int8", (2, 2, 2), (2, 2, 2)),
        ("layers", (2, 1, 4), (4, 1, 2)),
        ("bf16", (1, 4, 2), (1, 1, 4)),
        ("packed", (1, 1, 1), (2, 2, 2)),
        ("fp8_page_64", (2, 2, 1), (1, 8, 1)),
        *(pytest.param(name, (4, 2, 1), (2, 1, 4), marks=pytest.mark.slow) for name in SPECS),
    ],
)
def test_what_was_saved_comes_back_on_another_mesh(tmp_path, name, old, new):
    a_chunk = 3 * 4 * 128 * 128  # a few pages
    folder, cache, pages = small(tmp_path, shape=old, name=name, chunk_bytes=a_chunk)
    assert sorted(os.listdir(tmp_path)) == ["saved"]
    before, digest = contents(cache, pages), pages.digest()
    made, there = pd.restore(folder, pod(*new), num_pages=768, chunk_bytes=a_chunk)
    check(cache, pages, made, there, before)
    if old == new:
        made, there = pd.restore(folder, pod(*new))
        assert there.digest() == digest
        check(cache, pages, made, there, before)
    there.free(0)
    there.allocate(0, 5)


def test_only_live_pages_are_written(tmp_path):
    folder, cache, pages = small(tmp_path)
    data = sum(p.stat().st_size for p in folder.rglob("pages-*.bin"))
    assert data == len(pages.live_pages) * cache.spec.bytes_per_token * cache.spec.page_size
    assert len(list(folder.rglob("pages-*.bin"))) == 8


def test_cached_prefixes_come_back(tmp_path):
    spec, mesh = pd.CacheSpec(2, 128, 32, 128, "float32"), pod(1, 2, 2)
    cache, pages = pd.PagedKVCache.create(spec, mesh), pd.PageAllocator(spec, mesh, 2, 8)
    pages.allocate(1, 400)
    pages.cache_prefix(1, range(400))
    pages.free(1)
    pd.save(tmp_path / "saved", cache, pages)
    _, there = pd.restore(tmp_path / "saved", pod(2, 1, 2))
    assert there.prefix_match(range(400)).num_tokens == 384


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path):
    folder, cache, pages = small(tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"folder='.*saved': exists; pass overwrite=True"):
        pd.save(folder, cache, pages)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    pages.free(2)
    pd.save(folder, cache, pages, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["saved"] and len(os.listdir(folder)) == 2
    _, there = pd.restore(folder, pod(2, 2, 2))
    assert there.lengths.tolist() == pages.lengths.tolist() and not there.is_held(2)


def test_a_killed_save_is_no_save_and_the_next_one_clears_it_away(tmp_path):
    folder, cache, pages = small(tmp_path, shape=(1, 2, 1), name="layers")
    next(folder.glob("manifest-*")).unlink()
    with pytest.raises(ValueError, match=r"holds no finished save: there is no manifest in it"):
        pd.restore(folder, pod(1, 2, 1))
    pd.save(folder, cache, pages)
    assert len(os.listdir(folder)) == 2
    pages.free(2)
    pd.save(folder, cache, pages, overwrite=True)
    (manifest,) = folder.glob("manifest-*")
    (folder / "manifest-000009-0123456789abcdef.json").write_bytes(manifest.read_bytes()[:-9])  # was being written
    assert not pd.restore(folder, pod(1, 2, 1))[1].is_held(2)


def as_format_1(folder) -> None:
    """Makes of a save what was written before format 2: manifest.json, and the files that it names beside it."""
    data, manifest = manifests.read_newest(os.fspath(folder))
    for name in os.listdir(data):
        os.rename(os.path.join(data, name), os.path.join(folder, name))
    os.rmdir(data)
    next(folder.glob("manifest-*")).unlink()
    text = json.dumps(manifest | {"format": "paged-dist cache 1"}, sort_keys=True)
    outer = {"digest": files.digest(text.encode()), "manifest": text}
    (folder / "manifest.json").write_text(json.dumps(outer))


def test_a_save_of_format_1_comes_back_and_is_replaced_whole(tmp_path):
    folder, cache, pages = small(tmp_path, shape=(1, 2, 1))
    as_format_1(folder)
    assert sorted(os.listdir(folder))[:2] == ["key_smoothing.bin", "manifest.json"]
    made, there = pd.restore(folder, pod(1, 2, 1))
    assert there.digest() == pages.digest()
    check(cache, pages, made, there, contents(cache, pages))
    with pytest.raises(ValueError, match="exists; pass overwrite=True"):
        pd.save(folder, cache, pages)
    pd.save(folder, cache, pages, overwrite=True)
    assert len(os.listdir(folder)) == 2
    made, there = pd.restore(folder, pod(1, 2, 1))
    check(cache, pages, made, there, contents(cache, pages))


def test_of_an_interrupted_save_of_format_1_the_one_before_is_named(tmp_path):
    folder, *_ = small(tmp_path, shape=(1, 2, 1), name="layers")
    as_format_1(folder)
    os.rename(folder, tmp_path / "saved.replaced")
    with pytest.raises(ValueError, match=r"no finished save.*saved\.replaced is the save before, rename it back"):
        pd.restore(folder, pod(1, 2, 1))


def one(folder, name):
    """The only file of a save whose name matches."""
    (path,) = folder.rglob(name)
    return path


def flip(path, at=100):
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit of a page": (
        lambda f: flip(one(f, "pages-00001-00000.bin")),
        r"pages-00001-00000\.bin is damaged: the rec",
    ),
    "the last bit": (
        lambda f: flip(one(f, "pages-00000-00000.bin"), -1),
        r"pages-00000-00000\.bin is damaged: the record of",
    ),
    "a short file": (
        lambda f: os.truncate(one(f, "pages-00000-00000.bin"), 1000),
        r"pages-00000-00000\.bin is damaged: 1000 bytes, not \d+",
    ),
    "a missing file": (lambda f: one(f, "pages-00001-00000.bin").unlink(), r"pages-00001-00000\.bin is missing"),
    "an index": (
        lambda f: flip(one(f, "pages-00000-00000.bin.json")),
        r"bin\.json is damaged: it is not what was written",
    ),
    "the manifest": (lambda f: flip(one(f, "manifest-*"), 200), r"manifest-\S+\.json is damaged"),
    "half a manifest": (
        lambda f: os.truncate(one(f, "manifest-*"), 300),
        r"manifest-\S+\.json is damaged: it cannot be read",
    ),
    "an empty manifest": (lambda f: os.truncate(one(f, "manifest-*"), 0), r"manifest-\S+\.json is damaged"),
    "a list for a manifest": (lambda f: one(f, "manifest-*").write_text("[1]"), r"manifest-\S+\.json is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_is_named(tmp_path, name):
    folder, *_ = small(tmp_path, shape=(1, 2, 1), name="layers")
    damage, says = DAMAGE[name]
    damage(folder)
    with pytest.raises(ValueError, match=says):
        pd.restore(folder, pod(1, 2, 1))


def test_another_format_and_states_that_contradict_themselves_are_refused(tmp_path):
    folder, *_ = small(tmp_path, shape=(1, 2, 1), name="layers")
    path = one(folder, "manifest-*")
    manifest = json.loads(json.loads(path.read_text())["manifest"])

    def write(**changes):
        text = json.dumps(manifest | changes, sort_keys=True)
        path.write_text(json.dumps({"manifest": text, "digest": files.digest(text.encode())}))

    state = manifest["allocator"]
    rows = [list(row) if row else row for row in state["rows"]]
    row = next(i for i, r in enumerate(rows) if r and len(r[1]) > 1)
    twice = [rows[row][0], [rows[row][1][0]] * len(rows[row][1])]
    for changes, says in (
        (dict(format="paged-dist cache 9"), "is of format 'paged-dist cache 9'"),
        (dict(allocator=state | dict(rows=rows[:-1])), "state='7 rows': is not what"),
        (dict(allocator=state | dict(rows=[*rows[:row], [1, rows[row][1]], *rows[row + 1 :]])), f"state='row {row}: "),
        (dict(allocator=state | dict(rows=[*rows[:row], twice, *rows[row + 1 :]])), f"state='row {row} with the pages"),
        (dict(allocator={k: v for k, v in state.items() if k != "rows"}), "state=\"KeyError: 'rows'\""),
        (dict(allocator=state | dict(cached=[5])), "state="),
    ):
        write(**changes)
        with pytest.raises(ValueError, match=says):
            pd.restore(folder, pod(1, 2, 1))
    write()
    pd.restore(folder, pod(1, 2, 1))


def test_what_does_not_fit_is_refused(tmp_path):
    folder, *_ = small(tmp_path, name="layers")
    with pytest.raises(pd.OutOfPages, match="row 0 on data shard 0"):
        pd.restore(folder, pod(2, 2, 2), num_pages=4)
    with pytest.raises(ValueError, match="num_kv_heads=4: must be a multiple of the mesh's model size 8"):
        pd.restore(folder, pod(1, 1, 8))
    with pytest.raises(ValueError, match=r"folder='.*/none': holds no finished save"):
        pd.restore(tmp_path / "none", pod(2, 2, 2))
    spec = pd.CacheSpec(2, 128, 8, 128, "float32")
    mesh = pod(1, 1, 1)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        pd.save(tmp_path / "nowhere" / "x", pd.PagedKVCache.create(spec, mesh), pd.PageAllocator(spec, mesh, 1, 1))


# Several processes


def run_pod(tmp_path, processes: int, steps: str, ends: bool = True):
    """What the processes of a pod of 8 devices printed of `steps`, in `store_process.py`; each has a hard end."""
    script = os.path.join(os.path.dirname(__file__), "..", "support", "store_process.py")
    address = f"127.0.0.1:{free_port()}"
    code = "import runpy, sys; sys.argv = [{0!r}, {1!r}, {2!r}, '{3}', '{4}', {5!r}]; runpy.run_path({0!r})"
    scripts = [code.format(script, str(tmp_path), address, processes, i, steps) for i in range(processes)]
    devices = f"--xla_force_host_platform_device_count={8 // processes}"
    results = run_processes(scripts, 120, XLA_FLAGS=devices, PYTHONPATH=os.path.dirname(script))
    for code, out, err in results:
        assert code == 0 or not ends, out + err
    return ["\n".join(line for line in out.splitlines() if line.startswith("TOLD")) for _, out, _ in results]


@pytest.mark.parametrize("there", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_two_processes_save_and_others_restore(tmp_path, there):
    first, second = run_pod(tmp_path, 2, "save,reshard")
    assert first == second and first.count("TOLD") == 2 and len({line.split()[-1] for line in first.splitlines()}) == 1
    assert len(list((tmp_path / "saved").rglob("pages-*.bin"))) == 8
    for restored in run_pod(tmp_path, there, "restore"):
        assert restored.split()[-1] == first.split()[-1]


def test_where_one_process_cannot_write_all_are_told_and_nothing_is_left(tmp_path):
    first, second = run_pod(tmp_path, 2, "fail")
    assert "No space left on device" in second
    assert "process 1 could not go on" in first
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(("process", "fsync"), [(0, 3), (0, 11), (0, 12), (1, 2)])
def test_where_a_process_is_killed_the_old_save_is_left_or_the_new(tmp_path, process, fsync):
    """Process 0 syncs 4 files of pages and their indices, the smoothing, 3 folders, the manifest (12: written)."""
    said = run_pod(tmp_path, 2, f"save,die-{process}-{fsync}", ends=False)
    old, new = (line.split()[-1] for line in said[1 - process].splitlines())
    (restored,) = run_pod(tmp_path, 1, "restore")
    assert old != new and restored.split()[-1] == (new if (process, fsync) == (0, 12) else old)
