"""Where config files are: at a path, or, as `big_vit:NAME`, among the recipes in this package."""

import difflib
from pathlib import Path

from big_vit.errors import UserError

PREFIX = 'big_vit:'
# In a repository it is a link to configs/.
FOLDER = Path(__file__).resolve().parent.parent / 'recipes'


def names() -> list[str]:
    """List the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob('*.py'))


def locate(spec: str) -> tuple[Path, str]:
    """Split `FILE:ARGUMENTS` or `big_vit:NAME:ARGUMENTS` into a path and the arguments.

    Raises:
      UserError: there is no such file or recipe.
    """
    if spec.startswith(PREFIX):
        name, _, arguments = spec.removeprefix(PREFIX).partition(':')
        if name in names():
            return FOLDER / f'{name}.py', arguments
        raise UserError(f'--config: there is no recipe {PREFIX}{name}; {_nearest(name)}')
    name, _, arguments = spec.partition(':')
    path = Path(name)
    if path.is_file():
        return path, arguments
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob('*.py')], n=1)
    hint = ''
    if near:
        hint = f'; did you mean {path.parent / near[0]}?'
    elif path.parent.name in ('', 'configs'):  # As in the documentation, elsewhere than it says.
        hint = f'; {_nearest(path.stem)}'
    raise UserError(f'--config: there is no file {path}{hint}')


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
    if near:
        return f'did you mean {" or ".join(f"{PREFIX}{one}" for one in near)}?'
    return f'the recipes are {", ".join(f"{PREFIX}{one}" for one in names())}'
