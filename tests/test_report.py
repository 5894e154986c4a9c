"""The report of a run: whole, escaped, on its own, and written also where its data is gone."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import cv2
import pytest
from commands import error_line, run
from tiny import MODEL, RUN, overrides, write_folder

from big_vit import checkpoint, config, explore, report, train
from big_vit.errors import UserError
from big_vit.inspection import comparison, history, html_pages

VOID = {'meta', 'img', 'line', 'circle', 'polyline', 'br', 'input'}
NAME = '<script>alert(1)</script>&"\''.replace('/', '')


class Page(HTMLParser):
    """Checks that tags are closed in order; keeps attributes by tag, headings and all text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.headings = [], {}, [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), f'{tag} has an attribute twice'
        self.tags.setdefault(tag, []).append(attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not {'style', 'script'} & set(self.open):
            self.words.append(data)
        if self.open[-1:] == ['h2']:
            self.headings.append(data)

    @property
    def text(self):
        return ' '.join(' '.join(self.words).split())


def check_alone(page, text):
    """Nothing comes from elsewhere, one script runs, and everything has words."""
    assert page.tags['script'] == [{}] and 'link' not in page.tags and 'iframe' not in page.tags
    script = text.split('<script>')[1].split('</script>')[0].encode()
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    policies = [m['content'] for m in page.tags['meta'] if 'http-equiv' in m]
    assert len(policies) == 1 and f"default-src 'none'; script-src 'sha256-{digest}'" in policies[0]
    assert not re.search(r'https?:|url\(|@import|\bon\w+="', text)
    assert page.tags['html'] == [{'lang': 'en'}]
    assert all(json.loads(svg['data-chart']) for svg in page.tags['svg'] if 'data-chart' in svg)
    assert all(a['href'].startswith('#') for a in page.tags['a'])
    anchors = {attributes['id'] for attributes in page.tags['h2']}
    assert {a['href'][1:] for a in page.tags['a']} == anchors
    for image in page.tags.get('img', []):
        assert image['src'].startswith('data:image/') and image['alt']
    for svg in page.tags['svg']:
        assert svg.get('aria-label') or svg.get('aria-hidden') == 'true'


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('report')
    photos = write_folder(folder / 'photos')
    (photos / 'class0').rename(photos / NAME)
    settings = config.load(
        f'configs/own_images.py:path={photos}',
        overrides(
            MODEL,
            RUN,
            {'image_size': '16', 'model.variant': 'mu/8', 'evals.test.split': 'train[:20]'},
            {'model.posemb': 'learned', 'mixup': '0.0', 'cutmix': '0.0'},
        ),
    )
    train.run(settings, folder / 'w')
    return folder / 'w'


def test_a_run_has_all_of_its_story(workdir):
    text = report.document(str(workdir))
    page = Page(text)
    check_alone(page, text)
    assert page.headings == [
        'Curves', 'Evaluations', 'Mistakes', 'Warnings', 'Training data', 'Attention', 'Patches',
        'Weights', 'Memory and operations', 'Time', 'Config', 'Versions',
    ]  # fmt: skip
    for words in (
        '3 of 3',
        'top-1',
        '20 examples are mistaken',
        'Confusion matrix',
        'optimizer: first moment',
        'examples_per_s',
        'GFLOP forward',
    ):
        assert words in page.text, words
    assert NAME in page.text and NAME not in text
    labels = [s['aria-label'] for s in page.tags['svg'] if 'aria-label' in s]
    for title in ('Loss', 'Accuracy', 'Learning rate', 'Stable rank of kernels'):
        assert any(label.startswith(title) for label in labels), title
    alts = [image['alt'] for image in page.tags['img']]
    assert f'Training example of class {NAME}' in alts
    assert 'Training image 1: rollout, map of attention' in alts
    assert 'Training image 8, components of its patches' in alts


def test_the_command_writes_where_it_is_told(workdir, tmp_path, capsys):
    report.main([str(workdir), '--out', str(tmp_path / 'a.html')])
    assert f'wrote   {tmp_path}/a.html' in capsys.readouterr().out
    report.main([str(workdir / 'checkpoints' / '3'), '--out', str(tmp_path / 'b.html')])
    one, two = ((tmp_path / n).read_text() for n in ('a.html', 'b.html'))
    assert one.replace('<title>w ', '<title>3 ') == two


def test_two_runs_of_a_transfer_are_side_by_side(workdir, tmp_path):
    for name in ('pretrained', 'control'):
        shutil.copytree(workdir, tmp_path / 't' / name)
    text = report.document(str(tmp_path / 't'))
    assert 'transfer.json is not there' in text
    (tmp_path / 't' / 'transfer.json').write_text('{}')
    text = report.document(str(tmp_path / 't'))
    page = Page(text)
    check_alone(page, text)
    assert page.headings[0] == 'Transfer' and 'transfer.json is not there' not in text
    assert 'from the checkpoint' in page.text and 'from random' in page.text
    assert re.search(r'\+0\.00% ± \d', page.text)
    assert 'pretrained test' in page.text and 'control has the same' in page.text


def test_without_its_data_the_rest_is_written(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / 'w')
    for path in (tmp_path / 'w').rglob('metadata'):
        sidecar = json.loads(path.read_text())
        sidecar['config']['data']['path'] = str(tmp_path / 'gone')
        sidecar['sidecar_hash'] = checkpoint._sidecar_hash(sidecar)
        path.write_text(json.dumps(sidecar))
    page = Page(report.document(str(tmp_path / 'w')))
    assert re.search('The training data cannot be read here: .*/gone', page.text), page.text
    assert 'Attention cannot be shown' in page.text
    assert 'Weights' in page.headings and 'GFLOP forward' in page.text


def test_what_went_wrong_is_told(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / 'w')
    file = tmp_path / 'w' / 'metrics.jsonl'
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    entropies = {'train/teacher_entropy': 1.0, 'train/teacher_entropy_of_mean': 2.0}
    rows[0] |= {**entropies, 'x/alpha': 1.5, 'x/rankme': 9.0, 'x/lidar': 8.0}
    rows[0] |= {'train/skipped': 1.0, 'time/resumed_from': 2.0, 'train/loss': None}
    file.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (tmp_path / 'w' / 'damaged' / '2-0').mkdir(parents=True)
    page = Page(report.document(str(tmp_path / 'w')))
    text, charts = page.text, {s['aria-label'] for s in page.tags['svg'] if 'aria-label' in s}
    ranks = next(chart for chart in charts if chart.startswith('Ranks of the features'))
    assert 'x rankme from 9 to 9' in ranks and 'x lidar from 8 to 8' in ranks
    assert any(c.startswith('Entropy of the targets') and 'of_mean from 2' in c for c in charts)
    assert re.search(r'alpha 1\.5 1 – –', text)
    assert 'resumed 1 time(s), from step 2' in text
    assert 'train/loss is not a finite number at 1 step(s), first 1' in text
    assert 'damaged checkpoints were set aside: 2-0' in text
    file.write_text('no json\n' + file.read_text())
    with pytest.raises(UserError, match=r'metrics\.jsonl, line 1: .* delete that line'):
        report.document(str(tmp_path / 'w'))


def test_where_there_is_no_run_one_line_says_so(tmp_path):
    line = error_line(run('report', tmp_path / 'nowhere'))
    assert 'no such folder; give the --workdir of a training run' in line


def variant(workdir, place, lr, losses):
    """A copy of a run with another rate, and these losses of its evaluation."""
    shutil.copytree(workdir, place)
    for path in place.rglob('metadata'):
        sidecar = json.loads(path.read_text())
        sidecar['config']['lr'] = lr
        sidecar['sidecar_hash'] = checkpoint._sidecar_hash(sidecar)
        path.write_text(json.dumps(sidecar))
    rows = [{'step': i + 1, 'test/loss': x, 'test/top1': 1 - x} for i, x in enumerate(losses)]
    (place / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(place)


def table_of(text, name):
    body = text.split(f'aria-label="{name}"')[1].split('</table>')[0]
    rows = [re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', row) for row in body.split('<tr>')[1:]]
    return [[html.unescape(re.sub('<[^>]*>', '', cell)) for cell in row] for row in rows]


def test_any_runs_are_compared_by_scores_configs_and_curves(workdir, tmp_path, capsys):
    paths = [
        variant(workdir, tmp_path / 'a' / 'run', 0.1, [0.5, 0.2, 0.4]),
        variant(workdir, tmp_path / 'b' / 'run', 0.2, [0.6, 0.5, 0.3]),
        variant(workdir, tmp_path / 'b' / NAME, 0.2, [0.9]),
    ]
    report.main(paths)
    text = (tmp_path / 'report.html').read_text()
    assert f'wrote   {tmp_path}/report.html' in capsys.readouterr().out
    page = Page(text)
    check_alone(page, text)
    assert page.headings == ['Results', 'Config differences', 'Curves', 'Places']
    assert 'Transfer' not in text and NAME not in text
    header, *rows = table_of(text, 'Results')
    assert header[:3] == ['run', 'step', 'parameters'] and header[4] == 'test/top1'
    assert [row[0] for row in rows] == ['a/run', 'b/run', NAME]
    # Last, best, and the step of the best: the best top-1 is where the loss was least.
    assert [row[4:7] for row in rows] == [
        ['60.00%', '80.00%', '2'], ['70.00%', '70.00%', '3'], ['10.00%', '10.00%', '1'],
    ]  # fmt: skip
    assert table_of(text, 'Config differences') == [
        ['run', 'lr'], ['a/run', '0.1'], ['b/run', '0.2'], [NAME, '0.2'],
    ]  # fmt: skip
    charts = [json.loads(svg['data-chart']) for svg in page.tags['svg'] if 'data-chart' in svg]
    assert charts[0]['lines'][1] == {'name': 'b/run', 'points': [[1, 0.4], [2, 0.5], [3, 0.7]]}
    # A run has one colour and dash, in tables, legend and charts, whatever the order of the runs.
    looks = {}
    for one in (text, comparison.page(comparison.open_runs(paths[::-1]))):
        swatches = re.findall(r'class="line (l\d+ d\d+)" x1[^>]*></svg>([^<]+)<', one)
        lines = re.findall(r'<polyline class="line (l\d+ d\d+)" data-line="([^"]+)"', one)
        assert len(swatches) == 9 and len(lines) == 4
        for style, name in [*swatches, *lines]:
            looks.setdefault(html.unescape(name), set()).add(style)
    assert len(looks) == 3 and all(len(styles) == 1 for styles in looks.values())
    assert len(set.union(*looks.values())) == 3
    explore.main(paths)
    shown = capsys.readouterr().out
    assert 'a/run' in shown and '80.00%' in shown and 'lr' in shown and 'parameters\n' not in shown
    explore.main([*paths, '--html', str(tmp_path / 'c.html')])
    assert (tmp_path / 'c.html').read_text() == text


def test_two_ordinary_runs_in_a_folder_are_no_transfer(workdir, tmp_path):
    for name in ('one', 'two'):
        shutil.copytree(workdir, tmp_path / 'runs' / name)
    assert not report.is_one_story(str(tmp_path / 'runs')) and report.is_one_story(str(workdir))
    report.main([str(tmp_path / 'runs')])
    page = Page((tmp_path / 'runs' / 'report.html').read_text())
    assert 'Transfer' not in page.headings and 'Their configs are the same.' in page.text
    shutil.rmtree(tmp_path / 'runs' / 'two')
    report.main([str(tmp_path / 'runs')])
    assert 'Attention' in Page((tmp_path / 'runs' / 'report.html').read_text()).headings


def test_a_report_of_a_checkpoint_is_not_written_into_it(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / 'w')
    report.main([str(tmp_path / 'w' / 'checkpoints' / '3')])
    assert (tmp_path / 'w' / 'report.html').exists()
    with pytest.raises(UserError, match='--out is missing'):
        report.place_of(['/a', '/b'])


def test_scores_are_the_last_and_the_best_of_what_was_evaluated():
    rows = [
        {'step': 10, 'train/loss': 3.0, 'time/mfu': 0.5},
        {'step': 10, 'test/loss': 2.0, 'test/top1': 0.5, 'test/count': 100},
        {'step': 20, 'test/loss': 2.5, 'test/top1': 0.75, 'test/count': 100, 'knn/near/top1': 0.1},
    ]
    found = history.scores(rows)
    assert list(found) == ['test', 'knn/near']
    loss, top1 = found['test']
    assert (loss.last, loss.best, loss.best_step, loss.last_step) == (2.5, 2.0, 10, 20)
    assert (top1.last, top1.best, top1.best_step) == (0.75, 0.75, 20)
    assert history.standard_error(top1) == pytest.approx((0.75 * 0.25 / 100) ** 0.5)
    assert history.standard_error(loss) is None
    assert history.warnings(rows) == []


@pytest.mark.parametrize(
    ('low', 'high', 'expected'),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.13, 0.37, [0.15, 0.2, 0.25, 0.3, 0.35]), (5, 5, [5])],
)
def test_ticks_are_round(low, high, expected):
    assert html_pages.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ('value', 'shown'),
    [
        (0, '0'),
        (1500, '1,500'),
        (0.00025, '2.5e-4'),
        (0.5, '0.5'),
        (123456, '123,456'),
        (2e9, '2e9'),
    ],
)
def test_numbers_are_short(value, shown):
    assert html_pages.number(value) == shown


def test_a_chart_of_one_point_or_none():
    assert (
        html_pages.chart('t', [html_pages.Line('a', []), html_pages.Line('b', [(1, float('nan'))])])
        == ''
    )
    one = Page(html_pages.chart('a < b', [html_pages.Line('a', [(3, 2.0)])]))
    assert len(one.tags['circle']) == 1 and 'polyline' not in one.tags


@pytest.mark.slow
@pytest.mark.parametrize('width', [1200, 420])
def test_a_browser_shows_it_within_its_width(width, workdir, tmp_path):
    browser = next(
        filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'chrome'))), None
    )
    if browser is None:
        pytest.skip('there is no Chromium')
    page, picture = tmp_path / 'report.html', tmp_path / 'report.png'
    report.main([str(workdir), '--out', str(page)])
    # The page writes into its title how wide it would like to be, which --dump-dom then prints.
    probe = re.sub('<meta http-equiv[^>]*>', '', page.read_text()).replace(
        '</body>', '<script>document.title = document.documentElement.scrollWidth</script></body>'
    )
    (tmp_path / 'probe.html').write_text(probe)
    flags = [
        '--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars',
        f'--user-data-dir={tmp_path / "profile"}', f'--window-size={width},3000',
    ]  # fmt: skip
    more = dict(capture_output=True, text=True, timeout=120, check=True)
    subprocess.run([browser, *flags, f'--screenshot={picture}', page.as_uri()], **more)
    shown = cv2.imread(str(picture))
    assert shown.shape[1] >= width and shown.std() > 10
    dump = subprocess.run(
        [browser, *flags, '--dump-dom', (tmp_path / 'probe.html').as_uri()], **more
    ).stdout
    wide = int(re.search(r'<title>(\d+)</title>', dump)[1])
    assert wide <= max(width, 500)  # Chromium's windows are at least 500 pixels wide.


@pytest.mark.slow
def test_a_model_of_words_has_all_but_pictures(tmp_path):
    settings = config.load('configs/sequences.py:task=phrases', overrides(RUN, evals=('test',)))
    train.run(settings, tmp_path / 'w')
    page = Page(report.document(str(tmp_path / 'w')))
    assert 'Examples are no pictures' in page.text
    assert 'An example is 64 tokens' in page.text and 'its model reads tokens' in page.text


def test_a_study_whose_rows_are_lost_shows_its_test(tmp_path):
    scores = {'setting': {'lr': 0.01}, 'trials': [], 'tests': [0.5], 'mean': 0.5, 'error': None}
    scores |= {'sampling_error': 0.1, 'loss': 1.0, 'count': 25.0}
    (tmp_path / 'test.json').write_text(json.dumps({'control': scores}))
    page = report.swept(str(tmp_path))
    assert '50.00%' in page and 'Validation, * is what it chose' not in page


@pytest.mark.slow
def test_a_run_without_labels_has_no_classes_and_no_accuracy(tmp_path, capsys):
    photos = write_folder(tmp_path / 'photos', examples=24)
    for picture in photos.glob('*/*.jpg'):
        picture.rename(photos / picture.name)
    (photos / '0003.jpg').write_bytes(b'\xff\xd8\xffbroken')
    settings = config.resolve(
        {
            'total_steps': 3, 'batch_size': 16, 'image_size': 16, 'lr': 1e-3, 'log.every_steps': 1,
            'model.variant': 'mu/8', 'model.width': 32, 'model.depth': 1, 'model.mlp_dim': 64,
            'model.num_heads': 2, 'task.name': 'masked', 'task.decoder_width': 8,
            'task.decoder_depth': 1, 'task.decoder_heads': 2, 'data.name': 'folder',
            'data.path': str(photos), 'data.split': 'train', 'data.on_error': 'skip',
            'data.max_error_rate': 1.0, 'data.transform': 'inception_crop(size) | flip_lr',
            'evals.seen.type': 'representation', 'evals.seen.lidar': (5, 2),
        }
    )  # fmt: skip
    train.run(settings, tmp_path / 'w')
    told = capsys.readouterr().out
    assert '24 examples, without labels, 16x16x3' in told
    assert re.search(
        r'data    \d of 48 examples were damaged, and replaced by the next ones \(1 different', told
    )
    assert f'such as {photos}/0003.jpg' in told
    text = report.document(str(tmp_path / 'w'))
    page = Page(text)
    check_alone(page, text)
    labels = [svg['aria-label'] for svg in page.tags['svg'] if 'aria-label' in svg]
    for title in ('Loss', 'Ranks of the features', 'Spread of the features'):
        assert any(label.startswith(title) for label in labels), title
    assert not any(label.startswith('Accuracy') for label in labels)
    assert 'Patches' in page.headings and 'Mistakes' not in page.headings
    assert '24 examples, learned without labels' in page.text and 'class ' not in ' '.join(
        image['alt'] for image in page.tags['img']
    )
    explore.main([str(tmp_path / 'w'), '--png', str(tmp_path / 'png'), '--foreground'])
    drawn = {file.stem for file in (tmp_path / 'png').iterdir()}
    assert {'curves', 'images', 'attention', 'patches'} <= drawn
