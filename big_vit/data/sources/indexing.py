"""Writing of the indices beside shards: `python -m big_vit.prepare index PATH`; see `sidecars`."""

import concurrent.futures
import functools
import multiprocessing
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from big_vit.data import files
from big_vit.data.sources import sidecars, tar_index, tar_shards, tfrecord
from big_vit.data.sources.sidecars import Row
from big_vit.errors import UserError, failure_at

KEY = 'PATH'
_OWN_INDEX = ('.parquet', '.arrow', '.array_record')
# Shards that one process reads at a time: most of it is waiting for the store.
_THREADS = 8
# From so many shards on processes are worth their start.
_PER_PROCESS = 32
_REPORT_SECONDS = 10.0


class Task(NamedTuple):
    """What is indexed, and where the indices go.

    Attributes:
      folder: of the shards.
      target: folder of the indices.
      kind: 'tar' or 'tfrecord'.
    """

    folder: files.Place
    target: files.Place
    kind: str
    label_column: str


class Indexed(NamedTuple):
    """A shard whose index is written: its row, its facts, and whether it was there already."""

    row: Row
    facts: dict[str, Any]
    is_kept: bool


def index(
    path: str,
    *,
    to: str | None = None,
    label_column: str = 'cls',
    share: tuple[int, int] = (0, 1),
    workers: int | None = None,
    say: Callable[[str], None] = print,
) -> bool:
    """Index the shards of a path.

    Args:
      path: of tar or TFRecord shards, as `data.path`.
      to: folder of the indices; beside the shards if None.
      label_column: of the labels in tar shards.
      share: (which, of how many): several hosts each index a part, and the last one to end joins
        them.
      workers: processes; as many as there are processors if None.
      say: is called with lines for the user.

    Returns:
      Whether the index is complete.

    Raises:
      UserError: there are no shards, one is damaged, or the indices cannot be written.
    """
    kind, shards = _find(path)
    folder = shards[0].place._replace(path=shards[0].place.path.rpartition('/')[0])
    strangers = [s for s in shards if s.place.path.rpartition('/')[0] != folder.path]
    if strangers:
        raise UserError(f'{path}: names shards in {folder} and elsewhere: index each folder alone')
    target = folder if to is None else files.place(to, '--to')
    task = Task(folder, target, kind, label_column if kind == 'tar' else '')
    which, of = share
    try:
        written = _write(shards[which::of], task, workers, say)
        return _join(shards, written, task, share, say)
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise failure_at(target, error)(
            f'{target}: cannot be written ({reason}): choose another place by --to PLACE, and set '
            'data.index to it'
        ) from error


def _find(path: str) -> tuple[str, list[files.Stored]]:
    """Return the kind of the shards of a path, and all of them, sorted."""
    place = files.place(path, KEY)
    if not any(sign in path for sign in '*?[{') and files.is_folder(place):
        entries = [e for e in files.entries(place) if not e.is_folder]
        records = [e for e in entries if tfrecord.is_shard(e.name)]
        kept = next((e.name for e in entries if e.name.endswith(_OWN_INDEX)), None)
        if kept is not None and not records:
            raise UserError(
                f'{path}: {kept} needs no index: the end of the file says what is in it'
            )
        if records and not any(e.name.endswith('.tar') for e in entries):
            return 'tfrecord', [files.Stored(place / e.name, e.size, e.stamp) for e in records]
    shards = tar_shards.find_shards(path, KEY)
    return 'tar', sorted(shards, key=lambda shard: shard.place.name)


# --- The index of each shard -----------------------------------------------------------


def _write(
    shards: list[files.Stored], task: Task, workers: int | None, say: Callable[[str], None]
) -> list[Indexed]:
    """Write the index of each shard, unless it is there."""
    there = {entry.name: entry.size for entry in _entries(task.target)}
    one = functools.partial(_index, task=task)
    jobs = [(shard, shard.place.name + sidecars.ENDING in there) for shard in shards]
    count = workers or min(multiprocessing.cpu_count(), len(shards) // _PER_PROCESS)
    done: list[Indexed] = []
    last = began = time.monotonic()
    for indexed in _mapped(one, jobs, count):
        done.append(indexed)
        if time.monotonic() - last > _REPORT_SECONDS:
            last = time.monotonic()
            read = sum(each.row.size for each in done if not each.is_kept)
            say(
                f'indexed {len(done):,} of {len(shards):,} shards, '
                f'{read / 1e6 / (last - began):,.0f} MB/s'
            )
    return done


def _entries(folder: files.Place) -> list[files.Entry]:
    try:
        return files.entries(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _mapped(
    one: Callable[[tuple[files.Stored, bool]], Indexed],
    jobs: list[tuple[files.Stored, bool]],
    processes: int,
) -> Iterator[Indexed]:
    """Apply a function in threads, or in processes with threads each, in no certain order."""
    if processes <= 1:
        yield from _in_threads(one, jobs)
        return
    # Processes of file systems that know no fork.
    context = multiprocessing.get_context('spawn')
    size = max(1, min(256, -(-len(jobs) // (4 * processes))))
    chunks = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [pool.submit(_all_of, one, chunk) for chunk in chunks]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield from future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _in_threads(
    one: Callable[[tuple[files.Stored, bool]], Indexed], jobs: list[tuple[files.Stored, bool]]
) -> Iterator[Indexed]:
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        futures = [pool.submit(one, job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _all_of(
    one: Callable[[tuple[files.Stored, bool]], Indexed], jobs: list[tuple[files.Stored, bool]]
) -> list[Indexed]:
    return list(_in_threads(one, jobs))


def _index(job: tuple[files.Stored, bool], task: Task) -> Indexed:
    """Write the index of a shard, or read what is there and of this shard as it is now."""
    shard, is_there = job
    name = shard.place.name
    file = task.target / (name + sidecars.ENDING)
    if is_there:
        kept = _kept(file, shard, task)
        if kept is not None:
            return kept
    make = tar_index.sidecar if task.kind == 'tar' else tfrecord.sidecar
    facts, arrays = make(shard.place, task.label_column)
    about = {
        **facts,
        'kind': task.kind,
        'label_column': task.label_column,
        'shard': [name, shard.size, sidecars.stamp_number(shard.stamp)],
    }
    data = sidecars.pack(about, arrays)
    files.write(file, data)
    return Indexed(_row(about, data), facts, is_kept=False)


def _kept(file: files.Place, shard: files.Stored, task: Task) -> Indexed | None:
    """Return the index of a shard that is there already; None if it is another's, or damaged."""
    try:
        data = files.read(file)
        about, _ = sidecars.unpack(data, file, task.folder)
    except UserError:
        return None
    ours = [shard.place.name, shard.size, sidecars.stamp_number(shard.stamp)]
    if [about['shard'], about['kind'], about['label_column']] != [
        ours,
        task.kind,
        task.label_column,
    ]:
        return None
    return Indexed(_row(about, data), about, is_kept=True)


def _row(about: dict[str, Any], data: bytes) -> Row:
    name, size, stamp = about['shard']
    return Row(
        name,
        size,
        stamp,
        tuple(about['counts']),
        tuple(about['unlabelled']),
        len(data),
        zlib.crc32(data),
        tar_shards.split_word(name),
    )


# --- The index of the folder -----------------------------------------------------------


def _join(
    shards: list[files.Stored],
    written: list[Indexed],
    task: Task,
    share: tuple[int, int],
    say: Callable[[str], None],
) -> bool:
    """Write the index of the folder, or that of a share, until the last share is there."""
    which, of = share
    file = task.target / sidecars.MANIFEST
    kept = sum(indexed.is_kept for indexed in written)
    examples = sum(sum(indexed.row.counts) for indexed in written)
    say(
        f'indexed {len(written):,} shard{"s" * (len(written) != 1)} with {examples:,} examples'
        + (f'; {kept:,} of them were there' if kept else '')
    )
    rows, facts = _joined(written)
    parts = [task.target / f'{sidecars.MANIFEST}.{number}-of-{of}' for number in range(of)]
    if of > 1:
        files.write(parts[which], _packed(rows, facts, task))
        others = [_part(part, shards, task) for part in parts]
        if any(other is None for other in others):
            waiting = [str(n) for n, other in enumerate(others) if other is None]
            say(f'waits   for --share {", ".join(f"{n}/{of}" for n in waiting)}')
            return False
        rows = [row for other in others if other for row in sidecars.rows_of(other)]
        facts = _joined_groups(other.groups for other in others if other)
    rows, facts = _with_earlier(rows, facts, file, task)
    missing = {shard.place.name for shard in shards} - {row.name for row in rows}
    if missing:
        raise UserError(
            f'{task.target}: the shares say nothing of {len(missing):,} shards, such as '
            f'{min(missing)}: shards were added meanwhile: run each share again'
        )
    files.write(file, _packed(rows, facts, task))
    for part in parts if of > 1 else ():
        files.remove(part)
    say(f'wrote   {file}: {len(rows):,} shards')
    empty = sum(not any(row.counts) for row in rows)
    if empty:
        say(f'note    {empty:,} shards hold no examples')
    return True


def _part(file: files.Place, shards: list[files.Stored], task: Task) -> sidecars.Manifest | None:
    """Read what a share wrote; None if it did not yet, or its shards are others now."""
    part = sidecars.read_manifest(file, task.folder)
    now = {s.place.name: (s.size, sidecars.stamp_number(s.stamp)) for s in shards}
    rows = [] if part is None else sidecars.rows_of(part)
    return part if all(now.get(row.name) == (row.size, row.stamp) for row in rows) else None


def _joined(written: list[Indexed]) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for indexed in written:
        groups.setdefault(indexed.row.group, []).append(indexed.facts)
    facts = {group: sidecars.joined_facts(each) for group, each in groups.items()}
    return [indexed.row for indexed in written], facts


def _joined_groups(parts: Iterable[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    every = list(parts)
    return {
        group: sidecars.joined_facts(part[group] for part in every if group in part)
        for group in sorted({group for part in every for group in part})
    }


def _packed(rows: list[Row], facts: dict[str, dict[str, Any]], task: Task) -> bytes:
    return sidecars.pack_manifest(rows, facts, str(task.folder), task.kind, task.label_column)


def _with_earlier(
    rows: list[Row], facts: dict[str, dict[str, Any]], file: files.Place, task: Task
) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """Add shards of the folder that an earlier call indexed, if they are as they were."""
    try:
        earlier = sidecars.read_manifest(file, task.folder)
    except UserError:
        return rows, facts
    ours = {row.name for row in rows}
    if earlier is None or (earlier.kind, earlier.label_column) != (task.kind, task.label_column):
        return rows, facts
    rest = [row for row in sidecars.rows_of(earlier) if row.name not in ours]
    if rest:
        there = {entry.name: entry for entry in _entries(task.folder)}
        rest = [row for row in rest if _is_as_it_was(row, there.get(row.name))]
    groups = {group: earlier.groups[group] for group in {row.group for row in rest}}
    return rows + rest, _joined_groups([facts, groups])


def _is_as_it_was(row: Row, entry: files.Entry | None) -> bool:
    now = None if entry is None else (entry.size, sidecars.stamp_number(entry.stamp))
    return now == (row.size, row.stamp)
