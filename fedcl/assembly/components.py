"""Building one component of a configuration, so that what does not fit is an error of the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fedcl.config.compose import Config
from fedcl.config.instantiate import TARGET_KEY, build
from fedcl.config.value_rules import ConfigError

T = TypeVar("T")


def node_at(cfg: Config, place: str) -> Any:
    """Return the node at a dotted place."""
    node: Any = cfg
    for name in place.split("."):
        node = node[name]
    return node


def component(cfg: Config, place: str, kind: type[T], **runtime: Any) -> T:
    """Build the component at a dotted place; ConfigError if it is not a ``kind``.

    ``runtime`` are the arguments that only the run knows.
    """
    node = node_at(cfg, place)
    return of_kind(kind, build(node, at=place, trusted=cfg["trusted_packages"], **runtime), place, node)


def of_kind(kind: type[T], made: Any, place: str, node: Mapping[str, Any]) -> T:
    """Return what the code of a component has made; ConfigError if it is not a ``kind``."""
    if not isinstance(made, kind):
        raise ConfigError(
            f"{place}.{TARGET_KEY}={node[TARGET_KEY]}: gives a {type(made).__name__}, must be a {kind.__name__}"
        )
    return made


def checked(fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call ``fn``; a ValueError becomes a ConfigError, since the user can correct it."""
    try:
        return fn(*args, **kwargs)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
