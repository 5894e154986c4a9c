"""The table of sources: the values of `data.name`.

The keyword-only arguments of a source are the config keys that it reads beside those that all
sources share.
"""

from collections.abc import Callable

from big_vit.data.sources import (
    arrays,
    captions,
    coco,
    digits,
    fdsl,
    folder,
    glyphs,
    idx,
    orbit,
    parquet,
    phrases,
    prepared,
    questions,
    records,
    segmentation,
    table,
    tar,
    tones,
    voc,
    yolo,
)
from big_vit.data.sources.base import Source

SOURCES: dict[str, Callable[..., Source]] = {
    'fdsl': fdsl.fdsl,
    'glyphs': glyphs.glyphs,
    'orbit': orbit.orbit,
    'tones': tones.tones,
    'phrases': phrases.phrases,
    'pairs': questions.pairs,
    'quiz': questions.quiz,
    'captions': captions.captions,
    'digits': digits.digits,
    'idx': idx.idx,
    'arrays': arrays.arrays,
    'folder': folder.folder,
    'table': table.table,
    'tar': tar.tar,
    'parquet': parquet.parquet,
    'tfds': prepared.tfds,
    'records': records.records,
    'coco': coco.coco,
    'voc': voc.voc,
    'yolo': yolo.yolo,
    'segmentation': segmentation.segmentation,
}
