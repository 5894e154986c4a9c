"""The documentation as a site: every page of docs/ is in it, and a broken link is refused."""

import json
import os
import subprocess
import sys

import pytest
from commands import ROOT

pytest.importorskip('material', reason='mkdocs-material is not installed')


def build(config, site):
    return subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', '-f', config, '-d', site],
        env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_the_site_is_whole(tmp_path):
    result = build(ROOT / 'mkdocs.yml', tmp_path)
    assert result.returncode == 0, result.stderr
    for page in (ROOT / 'docs').rglob('*.md'):
        name = page.relative_to(ROOT / 'docs').with_suffix('')
        name = name.parent if name.name == 'README' else name
        assert (tmp_path / name / 'index.html').is_file(), page
    assert 'Plan before renting' in (tmp_path / 'index.html').read_text()
    assert (tmp_path / 'images' / 'demo.png').is_file()
    assert (tmp_path / 'benchmarks' / 'results' / 'emoji.png').is_file()
    found = json.loads((tmp_path / 'search' / 'search_index.json').read_text())['docs']
    assert any('optim.name' in entry['text'] for entry in found)


@pytest.mark.slow
@pytest.mark.parametrize('link', ['[x](nowhere.md)', '[x](data.md#nowhere)', '[x](../nowhere.py)'])
def test_a_broken_link_is_refused(link, tmp_path):
    docs = tmp_path / 'docs'
    docs.mkdir()
    for path in ROOT.joinpath('docs').iterdir():
        (docs / path.name).symlink_to(path)
    (docs / 'guides.md').unlink()
    (docs / 'guides.md').write_text(f'# Guides\n\n## Write a task\n\n{link}\n')
    text = (ROOT / 'mkdocs.yml').read_text().replace('docs_dir: docs', f'docs_dir: {docs}')
    text = text.replace('docs/site_hooks.py', str(ROOT / 'docs' / 'site_hooks.py'))
    (tmp_path / 'mkdocs.yml').write_text(text)
    result = build(tmp_path / 'mkdocs.yml', tmp_path / 'site')
    assert result.returncode != 0 and 'nowhere' in result.stderr
