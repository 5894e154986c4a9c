"""Where config files are: at a path, or, as `big_vit:NAME`, among the recipes in this package."""

import difflib
from pathlib import Path

from big_vit.errors import UserError, nearest

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
        if path.suffix != '.py':
            raise UserError(f'--config: {path}: the name of a config file ends in .py')
        return path, arguments
    # Meant may be a recipe by its bare name, or a misspelt name of a file or a folder.
    files = {file.name: file for at in ('configs', path.parent) for file in Path(at).glob('*.py')}
    meant = nearest(f'{path.stem}.py', files)
    hint = ''
    if meant:
        hint = f'; did you mean {files[meant]}?'
    elif path.parent.name in ('', 'configs'):  # As in the documentation, elsewhere than it says.
        hint = f'; {_nearest(path.stem)}'
    raise UserError(f'--config: there is no file {path}{hint}')


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
    if near:
        return f'did you mean {" or ".join(f"{PREFIX}{one}" for one in near)}?'
    return f'the recipes are {", ".join(f"{PREFIX}{one}" for one in names())}'
