"""What a classifier takes for what, as a part of a page: confusions, classes, the worst errors."""

import dataclasses

import numpy as np

from big_vit.build.data import Data
from big_vit.data import pipeline
from big_vit.evaluators import confusion
from big_vit.evaluators.confusion import Judged
from big_vit.inspection import html_pages, plots

# A matrix of more classes cannot be read; then pairs stand for it, and the worst classes for all.
MOST_IN_MATRIX, MOST_ROWS, MOST_PICTURES = 20, 20, 24


def section(judged: Judged, data: Data) -> str:
    """Return the part of a page for one evaluation.

    Args:
      data: whose examples were judged.
    """
    if not len(judged.labels):
        return html_pages.paragraph('No example has a class.', 'soft')
    wrong = int((judged.labels != judged.predicted).sum())
    some = ''
    if judged.seen < data.source.length:
        some = f' (drawn from {data.source.length:,}, as many as a minute allowed)'
    words = f'{wrong:,} of {len(judged.labels):,} examples{some} are mistaken: '
    words += f'{judged.accuracy:.2%} are right.'
    body = html_pages.paragraph(words)
    rows = confusion.figures(judged)
    if len(rows) <= MOST_IN_MATRIX:
        body += _matrix(judged)
    else:
        body += _pairs(judged)
    return body + _classes(rows) + _pictures(judged, data)


def _matrix(judged: Judged) -> str:
    counts = confusion.matrix(judged)
    kept = np.flatnonzero(counts.sum(0) + counts.sum(1))
    names = [judged.names[k] for k in kept.tolist()]
    return (
        html_pages.heading('Confusion matrix')
        + html_pages.paragraph(
            'Rows are the true classes, columns what they were taken for; the colour is the share '
            'of the row.',
            'soft',
        )
        + html_pages.matrix('Confusion matrix', names, counts[np.ix_(kept, kept)].tolist())
    )


def _pairs(judged: Judged) -> str:
    pairs = confusion.confused(judged)
    if not pairs:
        return ''
    rows = [[p.true, p.predicted, f'{p.times:,}', f'{p.share:.0%}'] for p in pairs[:MOST_ROWS]]
    more = f' of {len(pairs):,}' if len(pairs) > MOST_ROWS else ''
    return html_pages.heading(f'Most confused: {len(rows)}{more} pairs') + html_pages.table(
        'Most confused', ['class', 'taken for', 'times', 'share'], rows
    )


def _classes(rows: list[confusion.ClassFigures]) -> str:
    shown = rows[:MOST_ROWS]
    lines = [
        [
            row.name,
            f'{row.f1:.3f}',
            f'{row.precision:.3f}',
            f'{row.recall:.3f}',
            f'{row.support:,}',
            f'{row.taken_for} ({row.times:,})' if row.times else '–',
        ]
        for row in shown
    ]
    title = 'Classes, the worst first'
    if len(rows) > len(shown):
        title = f'The {len(shown)} worst of {len(rows):,} classes'
    heads = ['class', 'F1', 'precision', 'recall', 'examples', 'mostly taken for']
    return html_pages.heading(title) + html_pages.table(title, heads, lines)


def _pictures(judged: Judged, data: Data) -> str:
    """Show the misclassified examples of the highest loss, if they are pictures."""
    places = confusion.worst(judged, MOST_PICTURES)
    if not places or data.reads != ('image',):
        return ''
    host = dataclasses.replace(data.transform, device=())
    rows = judged.rows[places].astype(np.int64)
    columns = pipeline.load(data.source, host, rows, 0, 0, data.skip_bad)
    if columns['image'].shape[-1] not in (1, 3):
        return ''
    items = []
    for place, image in zip(places, plots.as_bytes(list(columns['image'])), strict=True):
        true, other = (judged.names[int(k[place])] for k in (judged.labels, judged.predicted))
        items.append(
            (
                image,
                f'{true}\n→ {other} {judged.likely[place]:.0%}',
                f'{true}, taken for {other}: {data.source.place(int(judged.rows[place]))}',
            )
        )
    return (
        html_pages.heading('Worst errors')
        + html_pages.paragraph(
            'Of the highest loss: the true class, and what the model says with its probability.',
            'soft',
        )
        + html_pages.pictures(items, 'wide-captions')
    )
