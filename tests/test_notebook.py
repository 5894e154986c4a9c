"""The notebooks run: one on a checkpoint, which says what to do without, one from nothing."""

import json

import pytest
from commands import ROOT, script
from tiny import MODEL, RUN, overrides

from big_vit import config, train

PATH = ROOT / 'notebooks' / 'inspect_checkpoint.ipynb'
CELLS = json.loads(PATH.read_text())['cells']
CODE = [cell for cell in CELLS if cell['cell_type'] == 'code']

# In a process of its own: Jupyter's warnings are not ours, and its kernel is one more.
EXECUTE = """
import json, os, sys, warnings
warnings.simplefilter('ignore')
import nbclient, nbformat
path, os.environ['CHECKPOINT'] = sys.argv[1:3]
os.environ['WORKDIR'] = sys.argv[2]
os.chdir(os.path.dirname(path))
notebook = nbformat.read(path, as_version=4)
nbformat.validate(notebook)
client = nbclient.NotebookClient(notebook, timeout=200, kernel_name='python3')
try:
    client.execute()
except nbclient.exceptions.CellExecutionError:
    pass
print(json.dumps([cell.outputs for cell in notebook.cells if cell.cell_type == 'code']))
"""


def executed(checkpoint, path=PATH):
    for library in ('nbclient', 'nbformat', 'ipykernel'):
        pytest.importorskip(library)
    result = script(EXECUTE, path, checkpoint)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_it_is_committed_without_outputs_and_in_short_cells():
    for cell in CODE:
        assert cell['outputs'] == [] and cell['execution_count'] is None
        body = [line for line in cell['source'] if 'import' not in line]
        assert len(body) <= 12


@pytest.mark.slow
def test_it_runs_on_a_checkpoint(tmp_path):
    more = {'data.num_classes': '10', 'model.posemb': 'learned'}
    settings = config.load('configs/pretrain_fdsl.py', overrides(MODEL, RUN, more, evals=('test',)))
    train.run(settings, tmp_path / 'w')
    outputs = executed(tmp_path / 'w')
    kinds = [output['output_type'] for cell in outputs for output in cell]
    assert 'error' not in kinds, outputs
    shown = [any('image/png' in o.get('data', {}) for o in cell) for cell in outputs]
    drawing = [any('plots.' in line or 'explore.' in line for line in c['source']) for c in CODE]
    assert sum(shown) == sum(drawing) - 1  # All but the table of parameters.


@pytest.mark.slow
def test_without_a_checkpoint_it_stops_with_one_line(tmp_path):
    outputs = executed(tmp_path / 'nowhere')
    (error,) = [o for cell in outputs for o in cell if o['output_type'] == 'error']
    assert error['ename'] == 'SystemExit'
    assert 'no such folder' in error['evalue'] and 'Run `make demo` first' in error['evalue']
    assert not any(outputs[1:])


FIRST = ROOT / 'notebooks' / 'first_model.ipynb'


def test_the_first_notebook_is_committed_with_small_outputs_and_for_colab():
    code = [c for c in json.loads(FIRST.read_text())['cells'] if c['cell_type'] == 'code']
    assert FIRST.stat().st_size < 300_000
    assert 'git clone' in ''.join(code[0]['source'])
    for cell in code:
        assert len(cell['source']) <= 12
        assert not any('error' in output['output_type'] for output in cell['outputs'])
    shown = [any('image/png' in o.get('data', {}) for o in cell['outputs']) for cell in code]
    assert sum(shown) == 3 and 'letter 5' in json.dumps(code[-1]['outputs'])
    assert str(ROOT) not in FIRST.read_text() and '/tmp' not in FIRST.read_text()


@pytest.mark.slow
def test_the_first_notebook_goes_from_nothing_to_predictions(tmp_path, monkeypatch):
    monkeypatch.setenv('STEPS', '6')
    outputs = executed(tmp_path / 'w', FIRST)
    kinds = [output['output_type'] for cell in outputs for output in cell]
    assert 'error' not in kinds, outputs
    (text,) = (output['text'] for output in outputs[-1])
    assert len(text.splitlines()) == 6 and text.count('%') == 18
