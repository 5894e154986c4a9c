"""Where in a file the encoder is: below which dictionary, and behind which prefix of names.

Trainers wrap a model in others (`module.`, `_orig_mod.`, `backbone.`), and save several of them: an
average of the parameters, a student and its teacher. Each format has an array by which its encoder
is known, and what is in front of its name is the place.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from big_vit.errors import UserError
from big_vit.interop import huggingface, openclip, timm_vit
from big_vit.interop.layout import matches, shown

_TRUNK = re.escape(openclip.TRUNK)
# By the formats that have it: the array, as a regex of its name, and another that is beside it.
_SIGNS = (
    (openclip.FORMATS, rf'{_TRUNK}patch_embed\.proj\.weight', None),
    (openclip.FORMATS, r'(?P<tower>(visual\.)?)class_embedding', '{tower}conv1.weight'),
    (timm_vit.FORMATS, rf'(?<!{_TRUNK})patch_embed\.proj\.weight', None),
    (
        huggingface.FORMATS,
        rf'({"|".join(map(re.escape, huggingface.PREFIXES))}|)embeddings\.'
        r'(patch_embeddings(\.projection)?|patch_embedding)\.weight',
        None,
    ),
    (('hf_detr',), r'(model\.)?input_projection\.weight', None),
    (('hf_yolos',), r'(vit\.)?embeddings\.detection_tokens', None),
)
# Keys and names of moving averages of the parameters, which codebases evaluate where they have one.
_AVERAGE = re.compile(r'(?!.*(no|non|not|without)_ema)(.*_)?ema(_.*)?|teacher|target_encoder')


class Part(NamedTuple):
    """An encoder in a file: its section, the prefix of its names, and formats that it may have."""

    section: str
    prefix: str
    formats: tuple[str, ...]

    @property
    def place(self) -> str:
        """What a user writes behind the colon of `FILE:PLACE`."""
        return (self.section + self.prefix).rstrip('.')


def of(sections: Mapping[str, Iterable[str]]) -> list[Part]:
    """Find the encoders among the names of each section."""
    parts: dict[Part, None] = {}
    for section, listed in sections.items():
        names = set(listed)
        for formats, sign, beside in _SIGNS:
            pattern = re.compile(rf'(?P<prefix>(?:.*?\.)??){sign}', re.DOTALL)
            for match in filter(None, map(pattern.fullmatch, names)):
                prefix = match['prefix']
                if beside is None or prefix + beside.format(**match.groupdict()) in names:
                    parts[Part(section, prefix, formats)] = None
    return sorted(parts)


def choose(parts: Sequence[Part], wanted: str, where: str) -> tuple[Part, list[Part]]:
    """Choose the encoder to read, an average of the parameters before what it is the average of.

    Args:
      wanted: keys or prefixes on the way to it; '' if the user said nothing.

    Returns:
      The encoder, and the others that could have been meant.

    Raises:
      UserError: there is none, or there are several.
    """
    fitting = [part for part in parts if not wanted or f'.{wanted}.' in f'.{part.place}.']
    if not fitting:
        places = shown([part.place or 'the file itself' for part in parts])
        raise UserError(
            f'{where}: there is no {wanted!r} with an encoder in it; there are {places}'
        )
    averages = [p for p in fitting if any(map(_AVERAGE.fullmatch, p.place.split('.')))]
    chosen = averages if len(averages) == 1 and len(fitting) == 2 else fitting
    if len(chosen) > 1:
        raise UserError(
            f'{where}: holds several encoders; say which one: '
            + ' or '.join(f'{where}:{shown([part.place])}' for part in chosen[:8])
        )
    return chosen[0], [part for part in fitting if part not in chosen]


def inside(
    part: Part, names: Iterable[str], wanted: str, drop: Sequence[str], where: str
) -> tuple[dict[str, str], list[str]]:
    """Find the names of an encoder's arrays, without its prefix.

    Args:
      wanted: as for `choose`; whoever names the whole prefix wants nothing beside it.
      drop: regexes of what may be left out beside it.

    Returns:
      Names in the section by those without the prefix, and the dropped names beside the prefix.

    Raises:
      UserError: arrays beside the prefix are left over.
    """
    listed = list(names)
    found = {n.removeprefix(part.prefix): n for n in listed if n.startswith(part.prefix)}
    beside = [name for name in listed if not name.startswith(part.prefix)]
    if wanted and f'.{part.place}'.endswith(f'.{wanted}'):
        return found, []
    left = [name for name in beside if not any(matches(regex, name) for regex in drop)]
    if left:
        raise UserError(
            f'{where}: beside the encoder behind {shown([part.prefix])} there are {shown(left)}; '
            f'to read the encoder alone: {where}:{shown([part.place])}'
        )
    return found, beside


def about(part: Part, others: Sequence[Part]) -> Any:
    """Text that says which encoder was read; None if there was nothing to choose."""
    if not part.place:
        return None
    return part.place + ''.join(f', not {other.place}' for other in others)
