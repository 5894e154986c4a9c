"""Where a mesh touches a model: functions that modules call and that change no number."""

import dataclasses
from typing import Any, TypeVar

import flax.linen as nn

from big_vit.models.encoder import identity
from big_vit.models.layers import ungathered

Model = TypeVar('Model', bound=nn.Module)


def placed(model: Model, **functions: Any) -> Model:
    """A copy with other `constrain`, `gather`, `collect` or `by_device`, where a part has one."""
    return _replaced(model, functions)


def unplaced(model: Model) -> Model:
    """A copy that knows of no mesh."""
    return placed(
        model, constrain=identity, gather=ungathered, collect=identity, by_device=identity
    )


def _replaced(node: Any, functions: dict[str, Any]) -> Any:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(node):
        if field.name in ('parent', 'name'):  # Flax's own.
            continue
        value = getattr(node, field.name)
        if field.name in functions:
            changes[field.name] = functions[field.name]
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            changes[field.name] = _replaced(value, functions)
    if not changes:
        return node
    return (
        node.clone(**changes)
        if isinstance(node, nn.Module)
        else dataclasses.replace(node, **changes)
    )
