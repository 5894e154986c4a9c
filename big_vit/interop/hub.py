"""Weights on the Hugging Face hub, by name, through the cache that its own library keeps.

Files are fetched and nothing of them is run. What is in the cache is used without a network.
"""

import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote

from big_vit import storage
from big_vit.errors import UserError

# Of the owner timm the prefix may be left out, as timm's users write its models.
_NAME = re.compile(
    r'(?:(?:hf://|hf-hub:)(?P<owner>[\w.-]+)|timm)/(?P<model>[\w.-]+)'
    r'(?:@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[^/:]+))?'
    r'(?:/(?P<file>[^:]+))?(?::(?P<part>.+))?'
)
_PREFIXES = ('hf://', 'hf-hub:')


class Name(NamedTuple):
    """A model on the hub: repository, revision, a file in it if one is named, a part of that."""

    repository: str
    revision: str | None
    file: str | None
    part: str

    def __str__(self) -> str:
        at = f'@{self.revision}' if self.revision else ''
        return f'hf://{self.repository}{at}' + (f'/{self.file}' if self.file else '')


def parse(spec: str) -> Name | None:
    """Read `timm/NAME`, `hf://OWNER/NAME[@REVISION][/FILE][:PART]` or `hf-hub:OWNER/NAME`.

    Returns:
      None for what is no name.

    Raises:
      UserError: it begins as one and goes on otherwise.
    """
    match = _NAME.fullmatch(spec)
    if match:
        repository = f'{match["owner"] or "timm"}/{match["model"]}'
        revision = match['revision'] and unquote(match['revision'])
        return Name(repository, revision, match['file'], match['part'] or '')
    if spec.startswith(_PREFIXES):
        raise UserError(f'{spec}: a model of the hub is named hf://OWNER/NAME[@REVISION][/FILE]')
    return None


def fetch(
    name: Name, files: Sequence[str], beside: Callable[[str], Sequence[str]]
) -> tuple[Path, Name]:
    """Get the weights of a model and the configs beside them, from the cache or the hub.

    Args:
      files: of weights, the most wanted first, for a name without a file.
      beside: gives the configs of a file of weights, which the repository may have or not.

    Returns:
      The path of the weights, and their name with its commit and file.

    Raises:
      UserError: the hub cannot be reached and the cache has nothing, or the model is not there,
        not public, or has no weights; the message says what to do.
    """
    repository = _Repository(name)
    for file in [name.file] if name.file else files:
        path = repository.get(file)
        if path is not None:
            break
    else:
        raise UserError(repository.why_nothing(name.file or files[0]))
    # A snapshot is named after its commit, from which all else is read, too.
    commit = path.parents[len(PurePosixPath(file).parts) - 1].name
    repository.revision = commit
    folder = PurePosixPath(file).parent
    for other in [*beside(file), *(_parts(path) if file.endswith('.index.json') else ())]:
        repository.get(str(folder / other))
    return path, name._replace(revision=commit, file=file)


def _parts(index: Path) -> Iterator[str]:
    """Yield the files that an index of weights lists; the reader says what is wrong with it."""
    try:
        names = set(json.loads(index.read_text())['weight_map'].values())
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return
    yield from sorted(name for name in names if isinstance(name, str) and '/' not in name)


class _Repository:
    """What gets files of one repository, without a network from the cache alone."""

    def __init__(self, name: Name):
        self.name, self.revision = name, name.revision
        try:
            import huggingface_hub
            from huggingface_hub import constants, errors
        except ImportError:
            raise UserError(
                f'{name}: models of the hub need `pip install huggingface_hub`'
            ) from None
        self._hub, self._errors, self._constants = huggingface_hub, errors, constants
        self._page = f'{constants.ENDPOINT}/{name.repository}'

    @functools.cached_property
    def _unreachable(self) -> str:
        """Why the hub cannot be asked, '' if it can; its library would try for half a minute."""
        if self._constants.HF_HUB_OFFLINE:
            return 'HF_HUB_OFFLINE is set'
        url = self._hub.hf_hub_url(self.name.repository, 'config.json', revision=self.revision)
        why = ''
        for pause in (*storage.PAUSES_S[:2], 0):
            try:
                self._hub.get_hf_file_metadata(url)
            except self._errors.HfHubHTTPError as error:
                if error.response.status_code < 500:
                    return ''
                why = _line(error)
            except Exception as error:  # Of several HTTP libraries, by version.
                why = _line(error)
            else:
                return ''
            time.sleep(pause)
        return why

    def get(self, file: str) -> Path | None:
        """Return the path of a file in the cache, None if it is neither there nor on the hub."""
        name, errors, log_in = self.name, self._errors, 'log in (`hf auth login`, or HF_TOKEN)'
        try:
            if re.fullmatch('[0-9a-f]{40}', self.revision or ''):  # A commit never changes.
                known = self._hub.try_to_load_from_cache(
                    name.repository, file, revision=self.revision
                )
                if known is not None:
                    return Path(known) if isinstance(known, str) else None
            path = self._hub.hf_hub_download(
                name.repository,
                file,
                revision=self.revision,
                local_files_only=bool(self._unreachable),
            )
        except errors.EntryNotFoundError:
            return None
        except errors.GatedRepoError:
            why = f'is gated: accept its terms at {self._page} and {log_in}'
        except errors.RepositoryNotFoundError:
            why = f'there is no such model, or it is private: look at {self._page}, or {log_in}'
        except errors.RevisionNotFoundError:
            why = f'has no revision {self.revision!r}: see {self._page}/commits/main'
        except errors.HFValidationError as error:
            why = f'no name of the hub: {_line(error)}'
        except Exception as error:  # Of several HTTP libraries, by version.
            why = f'{file} cannot be fetched: {_line(error)}'
        else:
            return Path(path)
        raise UserError(f'{name}: {why}')

    def why_nothing(self, file: str) -> str:
        """Say why no weights were found, and what to do."""
        if not self._unreachable:
            return (
                f'{self.name}: there is no {file} in it: name a file of {self._page}/tree/'
                f'{self.revision or "main"}, as in {self.name}/FILE'
            )
        cache = Path(self._constants.HF_HUB_CACHE)
        folder = f'models--{self.name.repository.replace("/", "--")}'
        return (
            f'{self.name}: {file} is not in the cache, and the hub cannot be asked '
            f'({self._unreachable}). Where '
            f'there is a network, download it and config.json from {self._page} into a folder, and '
            f'name that folder here; or copy {folder} of another cache to {cache}'
        )


def _line(error: BaseException) -> str:
    return ' '.join(str(error).split())[:200] or type(error).__name__
