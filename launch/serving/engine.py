"""The loop of the decode benchmark: runs the scheduled steps on the devices, times them, checks a sample of outputs."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from paged_dist import CacheSpec, PagedKVCache, Watchdog
from paged_dist._compat import lowering_for
from paged_dist.launch.serving.output_checks import ERROR_BOUNDS, oracle_output, relative_error
from paged_dist.launch.serving.programs import Model, benchmark_step, prefill_chunks, shardings
from paged_dist.launch.serving.row_schedule import RowSchedule, ScheduledStep

CHUNKS = 8  # chunks of prompts in one call, a fixed shape: shorter calls are padded with row -1
DIGEST_STEPS = 64  # steps between two comparisons of the processes' allocators
_PROMPT_CHUNK_TOKENS = 256  # about how many tokens of a prompt one chunk writes


@dataclasses.dataclass
class Measured:
    """What one process measured. Times are in seconds; a list has one entry a step."""

    step_seconds: list[float] = dataclasses.field(default_factory=list)
    live_tokens: list[int] = dataclasses.field(default_factory=list)  # read by attention, each layer, all rows
    live_rows: list[int] = dataclasses.field(default_factory=list)
    pages: list[int] = dataclasses.field(default_factory=list)
    compile_seconds: float = 0.0
    warmup_seconds: float = 0.0  # one call of each program that serves nobody
    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    check_seconds: float = 0.0
    profile_seconds: float = 0.0  # starting and writing the profile
    loop_seconds: float = 0.0  # the whole loop
    checked: int = 0
    worst_error: float = 0.0
    tally: tuple[int, int] = (0, 0)  # of this process's shards
    stopped: bool = False  # before the schedule was done, because a process was asked to
    profile_error: str | None = None  # why there is no profile, where one was asked for

    @property
    def host_seconds(self) -> float:
        """Time that the host took between steps: the loop's, less steps, prompts, oracle checks and profile."""
        others = self.prefill_seconds + self.check_seconds + self.profile_seconds
        return self.loop_seconds - sum(self.step_seconds) - others


class StepProfile:
    """A JAX profile of steps 1 to 10, counted from 0. The time that it takes itself goes to `profile_seconds`.

    Where the profiler fails, as on a full disk, `measured.profile_error` says why, and the run goes on without it.
    """

    def __init__(self, folder: str | None, measured: Measured):
        self._folder, self._measured, self._running = folder, measured, False

    def before_step(self, step: int) -> None:
        """Starts the profile before step 1 and ends it before step 11."""
        start = time.perf_counter()
        if self._folder and step == 1:
            self._try(jax.profiler.start_trace, self._folder)
            self._running = self._measured.profile_error is None
        elif step == 11:
            self.stop()
        self._measured.profile_seconds += time.perf_counter() - start

    def stop(self) -> None:
        """Ends the profile, where one runs, and writes it."""
        if self._running:
            self._running = False
            self._try(jax.profiler.stop_trace)

    def _try(self, call: Callable, *arguments) -> None:
        try:
            call(*arguments)
        except Exception as e:  # the profiler raises RuntimeError, OSError and errors of XLA's own
            self._measured.profile_error = " ".join(f"{type(e).__name__}: {e}".split())[:300]


class Engine:
    """One process's part of a run: its compiled programs, its cache, and what it measures.

    `Engine(...)` lowers both programs, and the ops refuse here what they do not serve; `compile()` compiles them and
    allocates the cache; `run()` decodes.

    Args:
      spec: the cache, with num_layers=model.num_layers.
      batch: B rows.
      pages_per_sequence: S, the columns of the block tables.
      implementation: as `sharded_paged_attention` takes it.
    """

    def __init__(
        self,
        model: Model,
        spec: CacheSpec,
        mesh: Mesh,
        batch: int,
        pages_per_sequence: int,
        implementation: str | None = None,
    ):
        self.model, self.spec, self.mesh = model, spec, mesh
        self._batch, self._columns = batch, pages_per_sequence
        self._at = shardings(mesh)
        # Whole pages: two chunks of one prompt may come in one call, and must not write one page.
        self.chunk_tokens = max(1, _PROMPT_CHUNK_TOKENS // spec.page_size) * spec.page_size
        self.measured = Measured()
        data, shards = mesh.shape["data"], mesh.shape["model"]
        int32 = lambda name, *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._at[name])
        self._tally_shape = data, shards
        tally = jax.ShapeDtypeStruct((data, shards, 2), jnp.uint32, sharding=self._at["tally"])
        tables = int32("rows", batch, pages_per_sequence)
        cache = PagedKVCache.abstract(spec, mesh)
        start = time.perf_counter()
        with lowering_for(mesh):
            self.lowered = (
                jax.jit(benchmark_step(model, mesh, implementation), donate_argnums=(0, 1)).lower(
                    cache, tally, int32("rows", batch, 3), tables, int32("rows", data, 2)
                ),
                jax.jit(prefill_chunks(model, mesh, self.chunk_tokens, implementation), donate_argnums=0).lower(
                    cache, int32("chunks", CHUNKS, 4), tables
                ),
            )
        self.measured.compile_seconds = time.perf_counter() - start

    def compile(self) -> None:
        """Compiles both programs, and allocates the cache straight into its shards."""
        start = time.perf_counter()
        self._step, self._fill = (lowered.compile() for lowered in self.lowered)
        self._cache = PagedKVCache.create(self.spec, self.mesh)
        self._tally = self._put("tally", np.zeros((*self._tally_shape, 2), np.uint32))
        jax.block_until_ready((self._cache, self._tally))
        self.measured.compile_seconds += time.perf_counter() - start

    def warm_up(self) -> None:
        """Runs each program once, with idle rows, which write and count nothing: no later call is a first one."""
        start = time.perf_counter()
        data = self.mesh.shape["data"]
        rows = np.tile(np.array([0, -1, 0], np.int32), (self._batch, 1))
        tables = self._put("rows", np.full((self._batch, self._columns), -1, np.int32))
        chunks = np.tile(np.array([-1, -1, 0, 0], np.int32), (CHUNKS, 1))
        self._cache = self._fill(self._cache, self._put("chunks", chunks), tables)
        self._cache, self._tally, sample = self._step(
            self._cache,
            self._tally,
            self._put("rows", rows),
            tables,
            self._put("rows", np.zeros((data, 2), np.int32)),
        )
        jax.block_until_ready((self._cache, self._tally, sample))
        self.measured.warmup_seconds = time.perf_counter() - start

    def _put(self, name: str, array: np.ndarray) -> jax.Array:
        """A global array, sharded as `shardings` says for `name`. Each process takes its shards from its own copy."""
        return jax.make_array_from_callback(array.shape, self._at[name], lambda index: array[index])

    def run(
        self,
        schedule: RowSchedule,
        progress: Callable[[str], None] | None = None,
        profile_dir: str | None = None,
        watch: Watchdog | None = None,
        *,
        first_step: int = 0,
        stops: bool = True,
    ) -> Measured:
        """Decodes until the schedule is done, or a process was asked to stop.

        Args:
          progress: called with a line of text about every 10 seconds.
          profile_dir: folder for a profile of steps 1 to 10, counted from 0, or of those of them that a short run has.
          watch: is told of each step, and every DIGEST_STEPS steps the hash of the pages that were given out.
          first_step: the number of the first step, as the watch is told it.
          stops: whether SIGTERM ends the run.
        """
        m = self.measured
        begin = said = time.perf_counter()
        done = tokens = 0
        scheduled = next(schedule, None)
        profile = StepProfile(profile_dir, m)
        tables: jax.Array | None = None
        while scheduled is not None:
            number = len(m.step_seconds)
            if watch is not None:
                if stops and watch.stops(first_step + number):
                    m.stopped = True
                    break
                if profile_dir:  # which may take longer to write than a step may take
                    watch.phase("profile")
            profile.before_step(number)
            if watch is not None:
                watch.step(first_step + number, None if number % DIGEST_STEPS else schedule.fingerprint)
            if scheduled.block_tables is not None:
                tables = self._put("rows", scheduled.block_tables)
            assert tables is not None  # a schedule's first step has them
            self._prefill(scheduled, tables)
            start = time.perf_counter()
            sample = self.dispatch(scheduled, tables)
            if watch is not None:
                watch.dispatched()
            following = next(schedule, None)  # scheduled while the devices work
            jax.block_until_ready((self._tally, sample))
            m.step_seconds.append(time.perf_counter() - start)
            self._count(scheduled)
            if scheduled.checks:
                self._check(scheduled, sample)
            done, tokens = done + scheduled.finished, tokens + scheduled.live_rows
            if progress and (now := time.perf_counter()) - said >= 10:
                said = now
                progress(
                    f"step {len(m.step_seconds)}: {done} requests done, {scheduled.live_rows} live, {tokens} tokens, "
                    f"{1e3 * m.step_seconds[-1]:.1f} ms the last step, {now - begin:.0f} s"
                )
            scheduled = following
        m.loop_seconds = time.perf_counter() - begin
        if watch is not None:
            watch.phase("report")
        profile.stop()
        shards = [np.asarray(s.data) for s in self._tally.addressable_shards if s.replica_id == 0]
        sums = np.sum([s.reshape(-1, 2).astype(np.uint64).sum(axis=0) for s in shards], axis=0)
        m.tally = (int(sums[0]) & 0xFFFFFFFF, int(sums[1]) & 0xFFFFFFFF) if shards else (0, 0)
        return m

    def dispatch(self, scheduled: ScheduledStep, tables: jax.Array) -> jax.Array:
        """Starts a step on the devices; returns the outputs that it shows, [data, Hq, D], which are not ready yet."""
        self._cache, self._tally, sample = self._step(
            self._cache, self._tally, self._put("rows", scheduled.rows), tables, self._put("rows", scheduled.pick)
        )
        return sample

    def _prefill(self, scheduled: ScheduledStep, tables: jax.Array) -> None:
        """Writes the prompts of the requests that enter before this step, CHUNKS chunks a call."""
        if not len(scheduled.chunks):
            return
        start = time.perf_counter()
        for i in range(0, len(scheduled.chunks), CHUNKS):
            chunks = np.full((CHUNKS, 4), -1, np.int32)
            some = scheduled.chunks[i : i + CHUNKS]
            chunks[: len(some)] = some
            chunks[len(some) :, 2:] = 0  # nothing: an empty range of a negative row
            self._cache = self._fill(self._cache, self._put("chunks", chunks), tables)
        jax.block_until_ready(self._cache)
        self.measured.prefill_seconds += time.perf_counter() - start
        self.measured.prefill_tokens += int((scheduled.chunks[:, 3] - scheduled.chunks[:, 2]).sum())

    def _count(self, scheduled: ScheduledStep) -> None:
        """Counts the tokens that attention read in this step, the rows that decoded and the pages in use."""
        m, lengths, window = self.measured, scheduled.rows[:, 2], self.model.sliding_window
        m.live_tokens.append(int((lengths if window is None else np.minimum(lengths, window)).sum(dtype=np.int64)))
        m.live_rows.append(scheduled.live_rows)
        m.pages.append(scheduled.pages)

    def _check(self, scheduled: ScheduledStep, sample: jax.Array) -> None:
        """Checks the shown outputs on this process's rows and heads. The process with head 0 counts the check."""
        start = time.perf_counter()
        for shard in sample.addressable_shards:
            if shard.replica_id != 0:
                continue
            for check in scheduled.checks:
                rows, heads = range(sample.shape[0])[shard.index[0]], shard.index[1]
                if check.data_shard not in rows:
                    continue
                output = np.asarray(shard.data)[check.data_shard - rows.start]
                want = oracle_output(self.model, check, heads, self.spec.page_size)
                error = relative_error(output, want)
                if not error <= ERROR_BOUNDS[self.model.dtype]:
                    print(
                        f"wrong output: {check}, query heads {range(self.model.num_q_heads)[heads]}, "
                        f"off by {error:.2e} of its scale",
                        file=sys.stderr,
                        flush=True,
                    )
                self.measured.worst_error = max(self.measured.worst_error, error)
                self.measured.checked += range(self.model.num_q_heads)[heads].start == 0
        self.measured.check_seconds += time.perf_counter() - start
