"""What a shell offers when Tab is pressed after `big-vit`: commands, flags, config keys, recipes.

`big-vit completion bash` prints what a shell has to read once; it asks `big-vit --complete` each
time, so that it never lags behind the installed version.
"""

import re

from big_vit import command_line
from big_vit.config import recipes
from big_vit.config.schema import SCHEMA

# Shells offer files by themselves where nothing is offered here.
SCRIPTS = {
    'bash': """\
# In ~/.bashrc: source <(big-vit completion bash)
_big_vit() {
  local IFS=$'\\n'
  COMPREPLY=($(big-vit --complete bash "${COMP_LINE:0:COMP_POINT}" 2>/dev/null))
  [[ ${COMPREPLY[0]} == *[=:.] ]] && compopt -o nospace
}
complete -o bashdefault -o default -F _big_vit big-vit
""",
    'zsh': """\
# In ~/.zshrc, after compinit: source <(big-vit completion zsh)
_big_vit() {
  local -a offered open
  offered=(${(f)"$(big-vit --complete zsh "${LBUFFER}" 2>/dev/null)"})
  open=(${(M)offered:#*[=:.]})
  offered=(${offered:#*[=:.]})
  (( $#open )) && compadd -S '' -- $open
  (( $#offered )) && compadd -- $offered
  (( $#open + $#offered )) || _files
}
compdef _big_vit big-vit
""",
    'fish': """\
# In ~/.config/fish/completions/big-vit.fish
complete -c big-vit -a '(big-vit --complete fish (commandline -cp) 2>/dev/null)'
""",
}
# Words of bash end at these, too: it wants the rest of a word after the last of them.
_BASH_BREAKS = re.compile(r'.*[=:]')


def candidates(shell: str, line: str) -> list[str]:
    """List what may stand where a command line ends.

    Args:
      shell: one of SCRIPTS.
      line: the command line up to the cursor, from the name of the program on.
    """
    words = line.split()[1:]
    if line[-1:].isspace() or not words:
        words.append('')
    offered = sorted(word for word in _offered(words) if word.startswith(words[-1]))
    if shell != 'bash':
        return offered
    typed = _BASH_BREAKS.match(words[-1])
    return [word[typed.end() if typed else 0 :] for word in offered]


def _offered(words: list[str]) -> list[str]:
    if len(words) == 1:
        return [*command_line.COMMANDS, 'completion', '--help', '--version']
    if words[0] == 'completion':
        return list(SCRIPTS) if len(words) == 2 else []
    name = words[0].replace('-', '_')
    if name not in command_line.COMMANDS:
        return []
    parser = command_line.COMMANDS[name]()
    flags = {flag: action for action in parser._actions for flag in action.option_strings}
    before = flags.get(words[-2])
    if before is not None and before.nargs != 0:
        if words[-2] == '--config':
            return [f'{recipes.PREFIX}{recipe}' for recipe in recipes.names()]
        return [] if before.choices is None else [*map(str, before.choices)]
    if not words[-1].startswith('-'):
        return []
    # Entries of sections have names that only the user knows.
    takes_keys = '--config.' in str(parser.epilog)
    keys = [f'--config.{key}=' for key in SCHEMA if '*' not in key] if takes_keys else []
    return [*flags, *keys]
