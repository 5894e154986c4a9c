"""The files of a study as somebody may have left them."""

import json

import pytest
from etils import epath

from big_vit.errors import UserError
from big_vit.sweeps import study

TRIAL = {
    'start': 'control', 'setting': {'lr': 0.1}, 'lr': 0.1, 'seed': 0, 'config': 'abc',
    'workdir': 'trials/a', 'val/top1': 0.5, 'val/loss': None,
}  # fmt: skip
RESULT = {'setting': {}, 'trials': ['trials/a'], 'tests': [0.5], 'mean': 0.5, 'error': None}
ODD = ['[]', 'null', '"x"', '3', '{', '[' * 100_000, '{"a": {}}', '\x00']


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path)


def test_what_is_sound_is_read(folder):
    study.write(folder, [TRIAL])
    assert study.read(folder) == [TRIAL]
    (folder / study.TEST).write_text(json.dumps({'control': RESULT}))
    assert study.tested(folder) == {'control': RESULT | {'metric': 'top1'}}  # As before it.


@pytest.mark.parametrize(
    'line',
    [*ODD, '{}', *(json.dumps({**TRIAL, key: [None]}) for key in TRIAL if key != 'val/loss')],
    ids=lambda line: line[:20],
)
def test_a_row_of_another_kind_is_named(folder, line):
    (folder / study.ROWS).write_text(json.dumps(TRIAL) + '\n' + line + '\n')
    with pytest.raises(
        UserError, match=r'line 2:? .*delete it, and its trial runs again'
    ) as caught:
        study.read(folder)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('text', [*ODD, '{"control": []}'], ids=lambda text: text[:20])
def test_a_result_of_another_kind_is_named(folder, text):
    (folder / study.TEST).write_text(text)
    with pytest.raises(UserError, match=r'test\.json: .*the test is scored again'):
        study.tested(folder)


def test_bytes_that_are_no_text_are_named(folder):
    (folder / study.TEST).write_bytes(b'\xff\xfe')
    with pytest.raises(UserError, match='not JSON'):
        study.tested(folder)
