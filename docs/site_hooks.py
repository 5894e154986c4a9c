"""What mkdocs does beside building docs/: the README is the first page, and files elsewhere in the
repository that a page links to are part of the site."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r'(?<=\]\()(?!https?:|#|mailto:)([^)\s#]+)')


def on_files(files: Files, config: Any) -> Files:
    """Add the README, and what pages link to outside of docs/."""
    readme = (ROOT / 'README.md').read_text()
    pages = {'index.md': re.sub(r'\]\(docs/', '](', readme)}
    files.append(File.generated(config, 'index.md', content=pages['index.md']))
    pages |= {file.src_uri: file.content_string for file in files.documentation_pages()}
    for page, text in pages.items():
        for link in LINK.findall(text):
            target = elsewhere(page, link)
            if target and files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def elsewhere(page: str, link: str) -> str | None:
    """Return the path in the repository of a link's target that is a file outside of docs/."""
    path = posixpath.normpath(posixpath.join('docs', posixpath.dirname(page), link))
    if page == 'index.md' and not path.startswith('..'):
        path = path.removeprefix('docs/') if not (ROOT / path).exists() else path
    return path if not path.startswith(('docs/', '..')) and (ROOT / path).is_file() else None


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links that leave docs/ to the copies in the site."""
    source = page.file.src_uri
    up = '../' * source.count('/')
    return LINK.sub(lambda m: f'{up}{t}' if (t := elsewhere(source, m[1])) else m[1], markdown)
