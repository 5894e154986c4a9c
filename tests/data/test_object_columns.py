"""Boxes in features of TFDS and in columns of Parquet."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scenes
from PIL import Image
from scenes import SCENES

from big_vit.data.sources.base import Request
from big_vit.data.sources.parquet import parquet
from big_vit.data.sources.prepared import tfds
from big_vit.errors import UserError

REQUEST = Request('train', labelled=False)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv('BIG_VIT_CACHE', str(tmp_path_factory.mktemp('cache')))


def png(scene):
    file = io.BytesIO()
    Image.fromarray(scene.pixels()).save(file, 'PNG')
    return file.getvalue()


def check(source, crowds=()):
    """The examples are the scenes, in any order."""
    columns, said = source.load(np.arange(3)), source.annotations(np.arange(3))
    shapes = {scene.size: scene for scene in SCENES}
    assert source.class_names == scenes.NAMES and columns['label'].tolist() == [0, 0, 0]
    for row, own in enumerate(said):
        scene = shapes.pop((own.height, own.width))
        boxes = np.array([t.box for t in scene.things], float).reshape(-1, 4)
        np.testing.assert_allclose(columns['boxes'][row], boxes, atol=1e-4)
        np.testing.assert_allclose(own.boxes, boxes, atol=1e-4)
        labels = [t.label for t in scene.things]
        assert columns['box_label'][row].tolist() == own.labels.tolist() == labels
        wanted = [k == 1 and scene.name == 'c.png' for k in range(len(labels))]
        assert own.crowd.tolist() == columns['box_crowd'][row].tolist() == wanted
    assert not shapes


@pytest.mark.parametrize('difficult', [True, False])
def test_objects_of_tfds(tmp_path, difficult):
    import tensorflow_datasets

    core, features = tensorflow_datasets.core, tensorflow_datasets.features
    crowd = 'is_difficult' if difficult else 'is_crowd'
    parts = {
        'bbox': features.BBoxFeature(),
        'label': features.ClassLabel(names=scenes.NAMES),
        crowd: features.Tensor(shape=(), dtype=np.bool_),
    }

    class Boxed(core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = core.Version('1.0.0')

        def _info(self):
            picture = features.Image(shape=(None, None, 3), encoding_format='png')
            more = {'image/id': features.Tensor(shape=(), dtype=np.int64)}
            every = {'image': picture, 'objects': features.Sequence(parts), **more}
            return core.DatasetInfo(builder=self, features=features.FeaturesDict(every))

        def _split_generators(self, _):
            return {'train': self._generate_examples()}

        def _generate_examples(self):
            for number, scene in enumerate(SCENES):
                (height, width), things = scene.size, []
                for k, thing in enumerate(scene.things):
                    x0, y0, x1, y1 = thing.box
                    box = features.BBox(y0 / height, x0 / width, y1 / height, x1 / width)
                    marked = k == 1 and scene.name == 'c.png'
                    things.append({'bbox': box, 'label': thing.label, crowd: marked})
                yield (
                    number,
                    {'image': io.BytesIO(png(scene)), 'objects': things, 'image/id': 70 + number},
                )

    Boxed(data_dir=tmp_path, file_format='array_record').download_and_prepare()
    source = tfds(REQUEST, tfds_name='boxed', path=str(tmp_path))
    check(source)
    assert {own.image_id for own in source.annotations(np.arange(3))} == {70, 71, 72}


def rows_of(form):
    """The scenes as rows: objects as a struct of lists, or as a list of structs."""
    rows = []
    for scene in SCENES:
        objects = []
        for k, thing in enumerate(scene.things):
            x0, y0, x1, y1 = thing.box
            box = [x0, y0, x1, y1] if form == 'corners' else [x0, y0, x1 - x0, y1 - y0]
            marked = k == 1 and scene.name == 'c.png'
            category = scenes.NAMES[thing.label] if form == 'names' else thing.label
            entry = {'bbox': list(map(float, box)), 'category': category, 'iscrowd': marked}
            objects.append({**entry, 'area': 5.0} if form == 'structs' else entry)
        if form != 'structs':
            objects = {
                name: [own[name] for own in objects] for name in ('bbox', 'category', 'iscrowd')
            }
        rows.append({'image': {'bytes': png(scene), 'path': scene.name}, 'objects': objects})
    return rows


def write(folder, form):
    rows = rows_of(form)
    struct = isinstance(rows[0]['objects'], dict)
    category = pa.string() if form == 'names' else pa.int64()
    fields = {'bbox': pa.list_(pa.float64()), 'category': category, 'iscrowd': pa.bool_()}
    if form == 'structs':
        kind = pa.list_(pa.struct([*fields.items(), ('area', pa.float64())]))
    else:
        kind = pa.struct([(name, pa.list_(own)) for name, own in fields.items()])
    assert struct == (form != 'structs')
    picture = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
    names = {'names': list(scenes.NAMES), '_type': 'ClassLabel'}
    recorded = {'objects': {'feature': {'bbox': {}, 'category': names}, '_type': 'Sequence'}}
    metadata = (
        {} if form == 'names' else {'huggingface': json.dumps({'info': {'features': recorded}})}
    )
    schema = pa.schema([('image', picture), ('objects', kind)], metadata=metadata)
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / 'train-00000-of-00001.parquet')


@pytest.mark.parametrize('form', ['lists', 'structs', 'names', 'corners'])
def test_objects_of_parquet(tmp_path, form):
    write(tmp_path, form)
    more = {'box_format': 'xyxy'} if form == 'corners' else {}
    source = parquet(REQUEST, path=str(tmp_path), **more)
    check(source)
    areas = source.annotations(np.array([0]))[0].area.tolist()
    assert areas == ([5, 5] if form == 'structs' else [800, 400])


def test_columns_of_objects_that_are_wrong(tmp_path):
    write(tmp_path, 'corners')
    source = parquet(REQUEST, path=str(tmp_path))  # Corners, read as sides.
    assert source.load(np.array([0]))['boxes'][0].max() == 80
    with pytest.raises(UserError, match=r'data\.boxes_column'):
        parquet(REQUEST, path=str(tmp_path), boxes_column='things')
    with pytest.raises(UserError, match="box_format: takes 'xywh' or 'xyxy'"):
        parquet(REQUEST, path=str(tmp_path), box_format='cxcywh')
    rows = [{'image': {'bytes': png(SCENES[0])}, 'objects': {'bbox': [[0.0] * 3], 'category': [1]}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / 'train-00000-of-00001.parquet')
    with pytest.raises(UserError, match='not of four numbers'):
        parquet(REQUEST, path=str(tmp_path))
    rows[0]['objects'] = {'bbox': [[1.0, 2.0, 0.0, 4.0]], 'category': [1]}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / 'train-00000-of-00001.parquet')
    with pytest.raises(ValueError, match='has no area'):
        parquet(REQUEST, path=str(tmp_path)).load(np.array([0]))
