"""What a preparation did, counted: examples in and out by reason, what was read, what was written.

It holds nothing that differs between two runs of one command on the same files.
"""

import importlib.metadata
import platform
from collections.abc import Iterable, Sequence
from typing import Any

import big_vit
from big_vit.preparation.settings import Settings

FORMAT = 1
# What decides which pixels, and so which hashes, a file has.
_PACKAGES = ('numpy', 'opencv-python-headless', 'pillow', 'simplejpeg', 'pyarrow', 'apache-beam')


def versions() -> dict[str, str]:
    """Return the versions of what the result depends on."""
    found = {'big_vit': big_vit.__version__, 'python': platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in _PACKAGES}


def count(summaries: Iterable[dict[str, Any]], settings: Settings) -> dict[str, int]:
    """Add up the counts of units by what became of the examples, in the order of the reasons."""
    totals = dict.fromkeys(settings.reasons, 0)
    for summary in summaries:
        for reason, number in summary['counts'].items():
            totals[reason] += number
    return totals


def make(
    settings: Settings,
    command: str,
    summaries: Sequence[dict[str, Any]],
    shards: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Return the manifest of a preparation that is done.

    Args:
      command: the command line, without the flags of Beam.
      summaries: of the units, in order; those of evaluations have a `set` above 0.
      shards: those that were written, in order.

    Raises:
      RuntimeError: counts do not add up, which is a fault of this program.
    """
    own = [summary for summary in summaries if summary['set'] == 0]
    counts = count(own, settings)
    examples = sum(summary['examples'] for summary in own)
    written = sum(shard['examples'] for shard in shards)
    if sum(counts.values()) != examples or counts['kept'] != written:
        raise RuntimeError(f'{examples} examples in, {counts}, {written} written: do not add up')
    return {
        'format': FORMAT,
        'command': command,
        'settings': settings.as_dict(),
        'versions': versions(),
        'examples': examples,
        'kept': written,
        'left_out': {name: number for name, number in counts.items() if name != 'kept'},
        'without_embedding': sum(summary['without_embedding'] for summary in summaries),
        'rewritten': sum(shard['rewritten'] for shard in shards),
        'inputs': [_input(summary) for summary in own],
        'evaluations': [
            {'path': given.path, 'inputs': [_input(s) for s in summaries if s['set'] == number]}
            for number, given in enumerate(settings.evaluations, 1)
        ],
        'shards': list(shards),
    }


def _input(summary: dict[str, Any]) -> dict[str, Any]:
    names = ('place', 'start', 'stop', 'mark', 'examples', 'contents', 'counts')
    return {name: summary[name] for name in names if name in summary}
