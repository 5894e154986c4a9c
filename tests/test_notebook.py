"""The notebook runs on a checkpoint, and says what to do where there is none."""

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
notebook = nbformat.read(path, as_version=4)
nbformat.validate(notebook)
client = nbclient.NotebookClient(notebook, timeout=200, kernel_name='python3')
try:
    client.execute()
except nbclient.exceptions.CellExecutionError:
    pass
print(json.dumps([cell.outputs for cell in notebook.cells if cell.cell_type == 'code']))
"""


def executed(checkpoint):
    for library in ('nbclient', 'nbformat', 'ipykernel'):
        pytest.importorskip(library)
    result = script(EXECUTE, PATH, checkpoint)
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
