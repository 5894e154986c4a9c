"""Stand-in for pip: what a project's extras ask for is linked from the environment of the tests.

    python pip.py SITE_PACKAGES install [--editable] PATH[EXTRAS]

As from an index that has what is installed here: all that is needed, in versions that fit, and
nothing else; what is lacking is an error.
"""

import functools
import importlib.metadata as metadata
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(next(path for path in sys.path if path.endswith('site-packages')))


def fail(text: str):
    sys.exit(f'ERROR: {text}')


def applies(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({'extra': extra}) for extra in (extras or {''}))


def closure(requirements: list[str], extras: set[str]) -> set[str]:
    """Names of all distributions that these requirements lead to."""
    needed: dict[str, set[str]] = {}
    todo = [(line, {'', *extras}) for line in requirements]
    while todo:
        line, given = todo.pop()
        wanted = Requirement(line)
        if not applies(wanted, given):
            continue
        name = canonicalize_name(wanted.name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            fail(f'No matching distribution found for {wanted}')
        if not wanted.specifier.contains(found.version, prereleases=True):
            fail(f'{wanted} does not fit {name} {found.version}')
        new = {'', *wanted.extras} - needed.setdefault(name, set())
        if new:
            needed[name] |= new
            todo += [(line, needed[name]) for line in found.requires or ()]
    return set(needed)


@functools.cache
def owners() -> dict[str, set[str]]:
    """Distributions with files at or below each path of the site-packages."""
    result = defaultdict(set)
    for found in metadata.distributions(path=[str(HERE)]):
        name = canonicalize_name(found.metadata['Name'])
        for file in found.files or ():
            parts = file.parts
            if '..' not in parts:
                for end in range(1, len(parts) + 1):
                    result['/'.join(parts[:end])].add(name)
    return result


def link(names: set[str], site: Path, below: str = '') -> None:
    """Link what belongs to these distributions; folders that several share are made anew."""
    for path in sorted((HERE / below).iterdir()):
        relative = str(path.relative_to(HERE))
        who = owners().get(relative, set())
        target = site / relative
        if not who & names or target.is_symlink():
            continue
        if who <= names or not path.is_dir():
            target.symlink_to(path)
        else:
            target.mkdir(exist_ok=True)
            link(names, site, relative)


def main(site: Path, argv: list[str]) -> None:
    words = [word for word in argv[1:] if not word.startswith('-')]
    if argv[0] != 'install' or len(words) != 1:
        fail(f'this stand-in does not know: pip {" ".join(argv)}')
    path, extras = re.fullmatch(r'(.+?)(?:\[(.*)\])?', words[0]).groups()
    setup = [sys.executable, 'setup.py', '--quiet', 'egg_info', '--egg-base', str(site)]
    subprocess.run(setup, cwd=path, check=True, capture_output=True)
    about = metadata.PathDistribution(site / 'big_vit.egg-info')
    asked = set(filter(None, (extras or '').split(',')))
    for extra in asked - set(about.metadata.get_all('Provides-Extra')):
        print(f'WARNING: big_vit does not provide the extra {extra!r}', file=sys.stderr)
    names = closure(about.requires, asked)
    link(names, site)
    (site / 'installed.txt').write_text('\n'.join(sorted(names)))
    if any(word in ('-e', '--editable') for word in argv):
        (site / '__editable__.pth').write_text(f'{Path(path).resolve()}\n')
    else:
        build = ('setup.py', '--quiet', 'build', '--build-base', f'{site}/build')
        subprocess.run(
            [sys.executable, *build, '--build-lib', str(site)],
            cwd=path,
            check=True,
            capture_output=True,
            env={**os.environ, 'PYTHONDONTWRITEBYTECODE': '1'},
        )


if __name__ == '__main__':
    main(Path(sys.argv[1]), sys.argv[2:])
