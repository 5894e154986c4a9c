"""List the commands, or run one: `big-vit train ...`, or `python -m big_vit train ...`."""

import difflib
import runpy
import sys
from pathlib import Path
from typing import NoReturn

import big_vit
from big_vit import command_line, completion

USAGE = """usage: {program} COMMAND [-h] ...
       {program} --version
       {program} completion {shells}

"""


def page(program: str) -> str:
    """Return the list of commands, with a line for each."""
    lines = [
        f'  {name:12}{str(make().description).partition(":")[0].rstrip(".")}\n'
        for name, make in command_line.COMMANDS.items()
    ]
    usage = USAGE.format(program=program, shells='|'.join(completion.SCRIPTS))
    return f'{usage}{str(big_vit.__doc__).splitlines()[0]}\n\n{"".join(lines)}'


def fail(message: str) -> NoReturn:
    print(f'error: {message}', file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Run the command that the first argument names; imports nothing before it is known."""
    program = Path(sys.argv[0]).name
    program = 'python -m big_vit' if program == '__main__.py' else program
    word, *rest = sys.argv[1:] or ['--help']
    name = word.replace('-', '_')
    if word in ('-h', '--help', 'help'):
        print(page(program), end='')
    elif word == '--version':
        print(f'big_vit {big_vit.__version__}')
    elif word == 'completion':
        if len(rest) != 1 or rest[0] not in completion.SCRIPTS:
            fail(f'completion: name a shell, {" or ".join(completion.SCRIPTS)}')
        print(completion.SCRIPTS[rest[0]], end='')
    elif word == '--complete':
        print('\n'.join(completion.candidates(*rest)))
    elif name in command_line.COMMANDS:
        command_line.program = f'{program} '
        sys.argv = [sys.argv[0], *rest]
        runpy.run_module(f'big_vit.{name}', run_name='__main__', alter_sys=True)
    else:
        near = difflib.get_close_matches(name, command_line.COMMANDS, n=1)
        known = ', '.join(command_line.COMMANDS)
        hint = f'did you mean {near[0]}?' if near else f'there are {known}'
        fail(f'there is no command {word!r}; {hint}')


if __name__ == '__main__':
    main()
