"""Writes docs/reference.md, from the signatures and docstrings of what people call in Python.

    python docs/make_reference.py

Read from the source: nothing is imported, so the page is the same on every machine.
"""

import ast
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What a notebook or a script of one's own needs; commands are told by --help.
MODULES = (
    'checkpoint', 'inspection.loaded_model', 'explore', 'inspection.attention_maps',
    'inspection.patch_components', 'inspection.weight_statistics', 'inspection.plots',
    'metrics.writer', 'metrics.console',
    'inspection.history', 'inspection.examples', 'config.config', 'trees', 'interop',
    'interop.weights', 'interop.reader', 'interop.locations', 'interop.writer',
    'pretrained.load', 'models.vit', 'models.encoder', 'models.flops', 'models.variants', 'ledger',
    'errors',
)  # fmt: skip
HEAD = """# Reference

Made by `make reference` from the docstrings: what is called from Python. Commands tell of
themselves with `--help`, and [config.md](config.md) has the keys of a config.
"""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_public(node: ast.AST) -> bool:
    named = isinstance(node, Function | ast.ClassDef)
    return named and not node.name.startswith('_') and node.name != 'main'


def escaped(text: str) -> str:
    """Words that Markdown would take for tags or links."""
    return text.replace('<', '&lt;').replace('[', r'\[')


def prose(node: ast.AST) -> list[str]:
    """A docstring as Markdown: its sections in bold, their entries as a list."""
    lines, listed = [], False
    for line in (ast.get_docstring(node) or '').splitlines():
        if re.fullmatch(r'(Args|Attributes|Returns|Raises|Yields):', line):
            lines += ['', f'**{line[:-1]}**', '']
            listed = True
        elif listed and (entry := re.fullmatch(r'  (\S[^:]*): (.*)', line)):
            lines.append(f'- `{entry[1]}`: {escaped(entry[2])}')
        elif listed and line.startswith('  '):
            # A line that goes on with an entry, or a section without names.
            lines.append(f'  {escaped(line.strip())}')
        elif not listed and line.startswith('    '):
            lines.append(line)
        else:
            listed = False
            lines.append(escaped(line))
    return ['', *lines]


def signature(node: Function, inside: bool) -> str:
    """As one writes the call, with types; `self` is left out."""
    args = node.args
    if inside and args.args and args.args[0].arg in ('self', 'cls'):
        args.args = args.args[1:]
    result = f' -> {ast.unparse(node.returns)}' if node.returns else ''
    one = f'{node.name}({ast.unparse(args)}){result}'
    if len(one) <= 96:
        return one
    parts = re.split(r', (?=(?:\*{0,2}\w+(?:: |=|, |$))|\*$|\*, )', ast.unparse(args))
    return f'{node.name}(\n' + ''.join(f'    {part},\n' for part in parts) + f'){result}'


def block(text: str) -> list[str]:
    return ['', '```python', text, '```']


def fields(node: ast.ClassDef) -> str:
    """The class with what its attributes are."""
    bases = ', '.join(map(ast.unparse, node.bases))
    lines = [f'class {node.name}' + (f'({bases})' if bases else '')]
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and not ast.unparse(item.target).startswith('_'):
            lines.append(f'    {ast.unparse(item)}')
    return '\n'.join(lines)


def described(node: ast.AST, inside: str = '') -> list[str]:
    name = f'{inside}.{node.name}' if inside else node.name
    level = '####' if inside else '###'
    if isinstance(node, ast.ClassDef):
        made = [item for item in node.body if getattr(item, 'name', '') == '__init__']
        shown = signature(made[0], True).replace('__init__', node.name, 1) if made else fields(node)
        lines = ['', f'{level} {name}', *block(shown.removesuffix(' -> None')), *prose(node)]
        for item in node.body:
            if is_public(item) and ast.get_docstring(item):
                lines += described(item, name)
        return lines
    decorators = {ast.unparse(each) for each in node.decorator_list}
    if decorators & {'property', 'functools.cached_property'}:
        result = f': {ast.unparse(node.returns)}' if node.returns else ''
        shown = f'{node.name}{result}'
    else:
        shown = signature(node, bool(inside))
    return ['', f'{level} {name}', *block(shown), *prose(node)]


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for name in MODULES:
        path = ROOT / 'big_vit' / name.replace('.', '/')
        path = path / '__init__.py' if path.is_dir() else path.with_suffix('.py')
        module = ast.parse(path.read_text(), str(path))
        lines += ['', f'## big_vit.{name}', *prose(module)]
        for node in module.body:
            if is_public(node) and ast.get_docstring(node):
                lines += described(node)
    text = '\n'.join(line.rstrip() for line in lines)
    return inspect.cleandoc(re.sub(r'\n{3,}', '\n\n', text)) + '\n'


if __name__ == '__main__':
    target = ROOT / 'docs' / 'reference.md'
    target.write_text(page())
    print(f'wrote   {target.relative_to(ROOT)}', file=sys.stderr)
