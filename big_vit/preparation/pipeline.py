"""The three pipelines of a preparation on Apache Beam: examine, compare, write.

Each of their steps writes whole files below OUT/.work, and what is there is not made again, so a
run that was killed goes on where it was. Pictures are never sent between workers: a worker reads
a shard, and what it learns of it, about a thousand bytes a picture, is grouped by what pictures
may have in common. What is written is a function of the input alone.
"""

import contextlib
import functools
import itertools
import json
import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.environments import SubprocessSDKEnvironment

from big_vit.data import files
from big_vit.data.decode import DecodeError
from big_vit.errors import UserError
from big_vit.preparation import (
    columns,
    duplicates,
    embeddings,
    examination,
    examples,
    manifest,
    shards,
    signatures,
    stored,
)
from big_vit.preparation.examples import Unit
from big_vit.preparation.settings import Given, Settings

# Units whose list of what was left out is one file.
_LISTED = 64
Keyed = tuple[int, bytes]


class Job(NamedTuple):
    """What every worker has to know.

    Attributes:
      out: the folder that is written.
      units: number of the units of the input; others are of evaluations.
      parts: in how many parts work is divided where examples meet.
      first: the place of the first unit.
    """

    settings: Settings
    out: str
    units: int
    parts: int
    first: str

    @property
    def sets(self) -> list[Given]:
        return [self.settings.given, *self.settings.evaluations]

    def file(self, *names: str) -> files.Place:
        place = files.place(self.out, '--out')
        for name in names:
            place /= name
        return place

    def work(self, *names: str) -> files.Place:
        return self.file('.work', *names)

    def examined(self, unit: int) -> files.Place:
        return self.work('examined', f'{unit:07d}.npz')

    def decided(self, unit: int) -> files.Place:
        return self.work('decided', f'{unit:07d}.npz')


Task = tuple[int, Unit]


@functools.lru_cache(maxsize=1)
def _tasks(job: Job) -> list[Task]:
    """Read which units there are, each with the number of its set."""
    lines = stored.lines(job.work('units.jsonl'))
    return [(number, Unit(*unit)) for number, unit in lines]


def _numbers(_: int, count: int) -> Iterator[int]:
    yield from range(count)


def _spread(pipeline: beam.Pipeline, name: str, count: int) -> Any:
    """Return the numbers below `count`, divided among workers; a graph has no room for more."""
    return (
        pipeline
        | name >> beam.Create([0])
        | f'numbers of {name}' >> beam.FlatMap(_numbers, count)
        | f'spread {name}' >> beam.Reshuffle()
    )


def _guarded(job: Job, name: str, work: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """Do a piece of work; what the user can mend is left in a file, for the command to tell."""
    try:
        yield from work()
    except (UserError, OSError, DecodeError) as error:
        text = ' '.join(str(error).split())
        stored.write_json(job.work('errors', f'{name}.json'), text)


# --- Examine ---------------------------------------------------------------------------


def _examine(number: int, job: Job) -> Iterator[None]:
    """Describe the examples of a unit in a file, unless it is there."""
    (of_set, unit), file = _tasks(job)[number], job.examined(number)

    def work() -> Iterator[None]:
        if not files.exists(file):
            given = job.sets[of_set]
            if of_set == 0 and given.source == job.settings.format == 'parquet':
                shard, first = (files.place(path, given.flag) for path in (unit.place, job.first))
                columns.check_fits(shard, first, given.image_column or 'image')
            arrays = examination.examine(given, unit, job.settings)
            stored.write(file, stored.packed(arrays))
        yield from ()

    yield from _guarded(job, f'examine-{number}', work)


# --- Compare ---------------------------------------------------------------------------


def _rows(unit: int, job: Job) -> Iterator[Any]:
    """Yield blocks of rows of a unit, tagged by how they are compared."""
    arrays = stored.unpacked(job.examined(unit))
    kept = np.flatnonzero(arrays['reason'] == 0)
    pixels = (arrays['height'].astype(np.uint64) * arrays['width']).clip(max=2**32 - 1)
    placed = duplicates.ids(unit, kept), pixels[kept].astype(np.uint32), arrays['bytes'][kept]
    if job.settings.exact != 'off':
        rows = duplicates.equal_rows(*placed, arrays['digest'][kept])
        for block in duplicates.blocks(rows, job.parts):
            yield beam.pvalue.TaggedOutput('equal', block)
    if job.settings.near is None:
        return
    if job.settings.embeddings:
        rows = duplicates.sought_rows(*placed, arrays['where'][kept])
        for block in duplicates.blocks(rows, job.parts):
            yield beam.pvalue.TaggedOutput('sought', block)
        return
    some = signatures.Signatures(*(a[kept] for a in examination.signatures_of(arrays)))
    for block in duplicates.blocks(duplicates.alike_rows(*placed, some), job.parts):
        yield beam.pvalue.TaggedOutput('alike', block)


def _by_unit(edges: np.ndarray) -> Iterator[Keyed]:
    units = duplicates.unit_of(edges['id'])
    for unit in np.unique(units):
        yield int(unit), edges[units == unit].tobytes()


def _joined(blocks: Iterable[bytes], dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(b''.join(blocks), dtype)


def _equal(group: tuple[int, Iterable[bytes]], job: Job) -> Iterator[Keyed]:
    rows = _joined(group[1], duplicates.EQUAL)
    yield from _by_unit(duplicates.equal(rows, job.units, job.settings.keep))


def _alike(group: tuple[int, Iterable[bytes]], job: Job) -> Iterator[Keyed]:
    assert job.settings.near is not None
    shares = job.settings.near, job.settings.near_evaluation
    most = int(shares[0] * signatures.BITS), int(shares[1] * signatures.BITS)
    rows = _joined(group[1], duplicates.ALIKE)
    yield from _by_unit(duplicates.alike(rows, most, job.units, job.settings.keep))


def _vectors(path: str, job: Job) -> Iterator[tuple[int, tuple[int, bytes]]]:
    """Yield blocks of the vectors of a file, with their width."""

    def work() -> Iterator[tuple[int, tuple[int, bytes]]]:
        for rows in embeddings.read(files.place(path, '--embeddings')):
            width = rows['vector'].shape[1]
            for part, block in duplicates.blocks(rows, job.parts):
                yield part, (width, block)

    yield from _guarded(job, 'embeddings', work)


def _found(group: tuple[int, dict[str, Iterable[Any]]], job: Job) -> Iterator[Any]:
    """Give rows that are sought by where they lie the signatures of their vectors."""
    yield from _guarded(job, 'vectors', lambda: _joined_by_place(group, job))


def _joined_by_place(group: tuple[int, dict[str, Iterable[Any]]], job: Job) -> Iterator[Any]:
    sought = np.sort(_joined(group[1]['sought'], duplicates.SOUGHT))
    given = list(group[1]['vectors'])
    widths = {width for width, _ in given}
    if len(widths) > 1:
        raise UserError(
            f'--embeddings: vectors of {sorted(widths)} numbers: embed all by one model'
        )
    dtype = embeddings.row_type(widths.pop() if widths else 1)
    vectors = np.sort(_joined((block for _, block in given), dtype), order='key')
    at = np.searchsorted(vectors['key'], sought['key'])
    there = at < len(vectors)
    there[there] = vectors['key'][at[there]] == sought['key'][there]
    rows, at = sought[there], at[there]
    made = signatures.of_vectors(vectors['vector'][at].astype(np.float64))
    alike = duplicates.alike_rows(rows['id'], rows['pixels'], rows['bytes'], made)
    for block in duplicates.blocks(alike, job.parts):
        yield beam.pvalue.TaggedOutput('alike', block)
    for edges in _by_unit(duplicates.unfound(sought['id'][~there])):
        yield beam.pvalue.TaggedOutput('edges', edges)


def _decide(group: tuple[int, Iterable[bytes]], job: Job) -> Iterator[Any]:
    """Write what becomes of the examples of a unit; yield (list, (unit, summary, left out))."""
    tasks = _tasks(job)
    of_set, unit = tasks[group[0]]
    arrays = stored.unpacked(job.examined(unit.number))
    about, reasons = examination.about(arrays), job.settings.reasons
    edges = np.unique(_joined(group[1], duplicates.EDGE))
    edges = edges[np.lexsort((edges['of'], edges['reason'], edges['id']))]
    without = int(np.sum(edges['reason'] == duplicates.WITHOUT))
    edges = edges[edges['reason'] != duplicates.WITHOUT]
    _, first = np.unique(edges['id'], return_index=True)
    edges = edges[first]
    reason, of = arrays['reason'].copy(), np.zeros(len(arrays['reason']), np.uint64)
    rows = duplicates.row_of(edges['id'])
    reason[rows] = len(reasons) - 3 + edges['reason']
    of[rows] = edges['of']
    stored.write(job.decided(unit.number), stored.packed({'reason': reason}))
    summary = {
        **unit._asdict(),
        'set': of_set,
        'examples': len(reason),
        'contents': about['contents'],
        'fields': about['fields'],
        'without_embedding': without,
        'counts': {
            name: int(count)
            for name, count in zip(
                reasons, np.bincount(reason, minlength=len(reasons)), strict=True
            )
            if count
        },
    }
    lines = []
    for row in np.flatnonzero(reason).tolist():
        line = {'shard': unit.place, 'row': unit.start + row, 'name': about['names'][row]}
        line['reason'] = reasons[reason[row]]
        if str(row) in about['why']:
            line['why'] = about['why'][str(row)]
        if reason[row] >= len(reasons) - 3:
            other_set, other = tasks[duplicates.unit_of(of[row])]
            line['of'] = examples.where(job.sets[other_set], other, int(duplicates.row_of(of[row])))
        lines.append(json.dumps(line, ensure_ascii=False))
    left_out = ''.join(f'{line}\n' for line in lines) if of_set == 0 else ''
    yield unit.number // _LISTED, (unit.number, json.dumps(summary), left_out)


def _list(group: tuple[int, Iterable[tuple[int, str, str]]], job: Job) -> tuple[int, str]:
    """Write what was left out of some units; return (their number, their summaries)."""
    found = sorted(group[1])
    text = ''.join(left_out for _, _, left_out in found)
    if text:
        name = f'part-{group[0]:05d}.jsonl'
        stored.write(job.file('left_out', name), text.encode('utf-8', 'surrogateescape'))
    return group[0], ''.join(f'{summary}\n' for _, summary, _ in found)


def _collect(group: tuple[None, Iterable[tuple[int, str]]], job: Job, name: str) -> None:
    """Write lines from all workers to one file, in order."""
    text = ''.join(lines for _, lines in sorted(group[1]))
    stored.write(job.work(name), text.encode('utf-8', 'surrogateescape'))


def _compare(pipeline: beam.Pipeline, job: Job) -> None:
    settings, count = job.settings, len(_tasks(job))
    units = _spread(pipeline, 'units', count)
    rows = units | beam.FlatMap(_rows, job).with_outputs('equal', 'alike', 'sought')
    every = units | 'every unit' >> beam.Map(lambda unit: (unit, b''))
    equal = rows.equal | 'equal' >> beam.GroupByKey() | beam.FlatMap(_equal, job)
    edges, alike = [every, equal], rows.alike
    if settings.embeddings:
        paths = [str(part) for path in settings.embeddings for part in embeddings.parts(path)]
        vectors = (
            pipeline
            | 'embeddings' >> beam.Create(paths)
            | 'spread embeddings' >> beam.Reshuffle()
            | 'vectors' >> beam.FlatMap(_vectors, job)
        )
        found = (
            {'sought': rows.sought, 'vectors': vectors}
            | 'by place' >> beam.CoGroupByKey()
            | 'found' >> beam.FlatMap(_found, job).with_outputs('alike', 'edges')
        )
        alike = found.alike
        edges.append(found.edges)
    edges.append(alike | 'alike' >> beam.GroupByKey() | beam.FlatMap(_alike, job))
    (
        edges
        | beam.Flatten()
        | 'by unit' >> beam.GroupByKey()
        | 'decide' >> beam.FlatMap(_decide, job)
        | 'by list' >> beam.GroupByKey()
        | 'list' >> beam.Map(_list, job)
        | 'one' >> beam.Map(lambda lines: (None, lines))
        | 'together' >> beam.GroupByKey()
        | 'summaries' >> beam.Map(_collect, job, 'summaries.jsonl')
    )


# --- Write -----------------------------------------------------------------------------

Share = tuple[int, int, int]


def _plan(kept: list[int], size: int) -> list[list[Share]]:
    """Divide what is kept of units into shards: for each, (unit, first, last) of what is kept."""
    plan: list[list[Share]] = []
    room = 0
    for unit, count in enumerate(kept):
        first = 0
        while first < count:
            if not room:
                plan.append([])
                room = size
            last = min(count, first + room)
            plan[-1].append((unit, first, last))
            room -= last - first
            first = last
    return plan


def _chosen(share: list[Share], job: Job) -> Iterator[examples.Example]:
    for number, first, last in share:
        reason = stored.unpacked(job.decided(number))['reason']
        rows = np.flatnonzero(reason == 0)[first:last].tolist()
        yield from examples.read(job.settings.given, _tasks(job)[number][1], rows)


@functools.lru_cache(maxsize=1)
def _shares(job: Job) -> tuple[list[list[Share]], list[str]]:
    """Return the shares of all shards, and the names of what comes with examples."""
    summaries = [s for s in stored.lines(job.work('summaries.jsonl')) if s['set'] == 0]
    kept = [summary['counts'].get('kept', 0) for summary in summaries]
    fields = sorted({field for summary in summaries for field in summary['fields']})
    return _plan(kept, job.settings.shard_samples), fields


def _write(number: int, job: Job) -> Iterator[tuple[None, tuple[int, str]]]:
    """Write a shard, unless it is there; yield what is said of it."""
    plan, fields = _shares(job)
    file = job.file(shards.shard_name(job.settings, number, len(plan)))
    note = job.work('written', f'{number:07d}.json')

    def work() -> Iterator[tuple[None, tuple[int, str]]]:
        if not files.exists(note) or not files.exists(file):
            chosen = _chosen(plan[number], job)
            written = shards.write(file, chosen, job.settings, fields, job.first)
            stored.write_json(note, written._asdict())
        yield None, (number, f'{json.dumps(stored.read_json(note))}\n')

    yield from _guarded(job, f'write-{number}', work)


# --- The command -----------------------------------------------------------------------


def _say(word: str, text: str) -> None:
    print(f'{word:8}{text}', flush=True)


def _pipeline(flags: list[str], work: int) -> beam.Pipeline:
    """Return a pipeline on the runner that the flags name, by default Beam's for one machine.

    That has as many processes as there are processors.
    """
    if any(flag.partition('=')[0] == '--runner' for flag in flags):
        return beam.Pipeline(options=PipelineOptions(flags))
    # Not by its name, `DirectRunner`, for which Beam looks for another runner in the network first.
    logging.getLogger('apache_beam').setLevel(logging.ERROR)
    environment = None
    if not any(flag.startswith('--direct_') for flag in flags):
        count = min(len(os.sched_getaffinity(0)), work)
        if count > 1:
            # What fails in a worker comes back from it; what it prints is of its own life alone.
            words = f'{shlex.quote(sys.executable)} -m apache_beam.runners.worker.sdk_worker_main'
            # Ctrl-C, which all processes of a terminal get, is for the command.
            words = f"trap '' INT; exec {words} 2>/dev/null"
            environment = SubprocessSDKEnvironment.from_command_string(words)
            flags = [*flags, f'--direct_num_workers={count}']
    runner = FnApiRunner(default_environment=environment)
    return beam.Pipeline(runner=runner, options=PipelineOptions(flags))


def _run(
    job: Job, flags: list[str], work: int, build: Callable[[beam.Pipeline], Any], makes: str
) -> None:
    """Run a pipeline to its end.

    Args:
      work: number of pieces that workers share.
      makes: what is not made if a piece fails.

    Raises:
      UserError: a worker met what the user can mend.
    """
    with contextlib.suppress(OSError):
        place = job.work('errors')
        if files.exists(place):
            place.system.rm(place.path, recursive=True)
    pipeline = _pipeline(flags, work)
    build(pipeline)
    try:
        pipeline.run().wait_until_finish()
    except KeyboardInterrupt:  # Then Beam's threads would tell how they ended.
        logging.disable(logging.CRITICAL)
        threading.excepthook = lambda _: None
        raise
    place = job.work('errors')
    names = [entry.name for entry in files.entries(place)] if files.exists(place) else []
    if names:
        if files.exists(job.work(makes)):
            job.work(makes).system.rm(job.work(makes).path)
        more = f' (and {len(names) - 1:,} more)' if len(names) > 1 else ''
        raise UserError(stored.read_json(place / names[0]) + more)


def _claim(job: Job, tasks: list[Task]) -> bool:
    """Say in the folder what is made there, or check it; return whether it is complete.

    Raises:
      UserError: it holds something else, or the input has changed since.
    """
    folder, settings = job.file(), json.loads(json.dumps(job.settings.as_dict()))
    about = {'settings': settings, 'versions': manifest.versions()}
    done = files.exists(job.file('manifest.json'))
    note = job.file('manifest.json') if done else job.work('about.json')
    if not files.exists(note):
        others = [e for e in files.entries(folder) if e.name != 'owner.json']
        if files.exists(folder) and others:
            raise UserError(
                f'--out: {folder} holds {others[0].name} and is none of ours: name another'
            )
        stored.write(
            job.work('units.jsonl'), ''.join(f'{json.dumps(task)}\n' for task in tasks).encode()
        )
        stored.write_json(note, about)
        return False
    there = stored.read_json(note)
    for name, value in about.items():
        for key in value:
            was, now = (_short(known.get(key)) for known in (there.get(name, {}), value))
            if was != now:
                raise UserError(
                    f'--out: {folder} was begun with {key} {was}, now it is {now}: name another '
                    'folder, or remove it'
                )
    if done:
        return True
    old = list(stored.lines(job.work('units.jsonl')))
    new = json.loads(json.dumps(tasks))
    if old != new:
        pairs = itertools.zip_longest(old, new)
        one = next((o or n)[1][1] for o, n in pairs if o != n)
        raise UserError(
            f'{one}: has changed, come or gone since {folder} was begun: name another --out, or '
            'remove it'
        )
    return False


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _check_columns(settings: Settings) -> None:
    """Raise UserError if a rule asks for what none of the first hundred examples has."""
    from big_vit.preparation import rules

    first = examples.units(settings.given, 0)[0]
    some = list(itertools.islice(examples.read(settings.given, first), 100))
    known = sorted({name for example in some for name in examples.columns_of(example)})
    has = f'(there are {", ".join(known)})' if known else '(there is nothing beside the pictures)'
    for line in settings.where:
        column = rules.parse_where(line).column
        if some and all(examples.value_of(example, column) is None for example in some):
            raise UserError(f'--where: no {column!r} in {first.place} {has}')
    texts = [examples.text_of(settings.given, example) for example in some]
    if examination.reads_text(settings) and some and all(text is None for text in texts):
        raise UserError(f'--caption_*: no captions in {first.place} {has}: set --text_column')


def run(settings: Settings, out: str, flags: list[str], command: str) -> dict[str, Any]:
    """Prepare a set of examples; return the manifest, which is also in OUT/manifest.json.

    Args:
      out: a folder; one where this command was killed is gone on with.
      flags: of Beam.
      command: the command line without them.

    Raises:
      UserError: input, output or settings are not as they should be.
    """
    tasks: list[Task] = []
    for number, given in enumerate([settings.given, *settings.evaluations]):
        tasks += [(number, unit) for unit in examples.units(given, len(tasks))]
    own = sum(number == 0 for number, _ in tasks)
    job = Job(settings, out, own, min(1 << 16, 4 * len(tasks)), tasks[0][1].place)
    _tasks.cache_clear()
    if _claim(job, tasks):
        _say('there', f'{job.file("manifest.json")}')
        _clean(job)
        return stored.read_json(job.file('manifest.json'))
    _check_columns(settings)
    more = f', {len(tasks) - own:,} of evaluations' if len(tasks) > own else ''
    _say('read', f'{settings.given.path}: {own:,} units{more}')
    began = time.monotonic()

    def spent() -> str:
        nonlocal began
        began, before = time.monotonic(), began
        return f'{began - before:.1f} s'

    def examine(pipeline: beam.Pipeline) -> Any:
        return _spread(pipeline, 'units', len(tasks)) | beam.FlatMap(_examine, job)

    def write(pipeline: beam.Pipeline) -> Any:
        lines = _spread(pipeline, 'shards', len(plan)) | beam.FlatMap(_write, job)
        return lines | beam.GroupByKey() | beam.Map(_collect, job, 'shards.jsonl')

    _run(job, flags, len(tasks), examine, 'nothing')
    _say('examine', spent())
    if not files.exists(job.work('summaries.jsonl')):
        _run(job, flags, len(tasks), lambda pipeline: _compare(pipeline, job), 'summaries.jsonl')
    summaries = list(stored.lines(job.work('summaries.jsonl')))
    _say('compare', spent())
    _shares.cache_clear()
    plan, _ = _shares(job)
    if plan:
        _run(job, flags, len(plan), write, 'shards.jsonl')
    _say('write', spent())
    written = list(stored.lines(job.work('shards.jsonl'))) if plan else []
    made = manifest.make(settings, command, summaries, written)
    stored.write_json(job.file('manifest.json'), made)
    _clean(job)
    return made


def _clean(job: Job) -> None:
    """Remove all that is not part of the result."""
    for folder in (job.file(), job.file('left_out')):
        stored.forget_partial(folder)
    if files.exists(job.work()):
        job.work().system.rm(job.work().path, recursive=True)


def tell(made: dict[str, Any], out: str) -> None:
    """Print what a manifest says, in short."""
    print(f'examples {made["examples"]:>12,}')
    for reason, count in made['left_out'].items():
        if count:
            print(f'  {reason:30}{count:>12,}  ({100 * count / made["examples"]:.2f} %)')
    print(f'  {"kept":30}{made["kept"]:>12,}')
    if made['without_embedding']:
        print(f'without an embedding: {made["without_embedding"]:,}, compared with none')
    size = sum(shard['bytes'] for shard in made['shards'])
    count = len(made['shards'])
    _say('wrote', f'{out}: {count:,} shard{"s" * (count != 1)}, {size / 1e9:.3f} GB')
    if not made['kept']:
        print('nothing is left: see left_out/ for why', file=sys.stderr)
