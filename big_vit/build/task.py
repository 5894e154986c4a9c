"""The `task` section as a `Task`."""

from big_vit.config import Config, registries
from big_vit.errors import UserError
from big_vit.tasks.registry import TASKS
from big_vit.tasks.task import Task


def build_task(section: Config) -> Task:
    """The task of the config, with its own defaults for keys that are not set.

    Raises:
      UserError: a key is set that another task reads.
    """
    name, table = section.name, registries.TASKS
    defaults = table.keys(name)
    for key in (key for other in TASKS for key in table.keys(other)):
        if key not in defaults and section.peek(key) is not None:
            readers = ' or '.join(map(repr, table.readers(key)))
            raise UserError(
                f'config: task.{key} is read by task {readers}, but task.name is {name!r}: remove '
                'it, or set that task'
            )
    given = {key: section[key] for key in defaults}
    return TASKS[name](
        **{key: defaults[key] if value is None else value for key, value in given.items()}
    )
