"""Make the object that a configuration mapping describes, from trusted packages only.

A component is a mapping with ``_target_``, the dotted path of a class or function, and its keyword parameters. Nothing
is imported before `build` is called, and nothing outside the trusted packages ever is: a configuration file is data
that people pass around, so it must not be able to name ``torch.load`` or ``os.system``.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

from fedcl.config.value_rules import ConfigError

TARGET_KEY = "_target_"
_PLACEHOLDER = object()
TRUSTED = frozenset({"fedcl", "strategies", "clients", "flwr"})


def build(node: Mapping[str, Any], *, at: str = "", trusted: Collection[str] = (), **runtime: Any) -> Any:
    """Call the ``_target_`` of `node` with its parameters and the objects that only the run knows.

    Parameters
    ----------
    node
        A component's mapping. Mappings inside it are passed on as plain dicts, also those with a ``_target_``, but for
        the parameters that the target itself names in a class attribute ``components``: these are built too, under the
        same trust, and so is everything inside those that it also names in ``nested``.
    at
        The dotted place of `node` in the configuration, for messages.
    trusted
        Top packages that may be used besides `TRUSTED`: the run's ``trusted_packages``.
    **runtime
        Further keyword arguments.

    Returns
    -------
    object
        The instance if the target is a class; a `functools.partial` with every parameter bound if it is a function.

    Raises
    ------
    ConfigError
        If the target is missing, not trusted or not found, if it has no such parameter or lacks one, or if its
        constructor refuses a value with a ValueError.
    """
    target = node.get(TARGET_KEY)
    if not isinstance(target, str):
        raise ConfigError(f"{at or 'component'}: has no {TARGET_KEY}: 'package.module.Name'")
    place = at or target
    found = locate(target, trusted, at)
    params = {key: value for key, value in node.items() if key != TARGET_KEY}
    both = params.keys() & runtime.keys()
    if both:
        raise ConfigError(f"{place}.{min(both)}: set by the run itself; remove it from the YAML")
    _check_parameters(found, target, params, runtime, place)
    if inspect.isclass(found):
        if inspect.isabstract(found):
            raise ConfigError(f"{place}: {target} lacks {', '.join(sorted(getattr(found, '__abstractmethods__', ())))}")
        _check_call(found, (), {**params, **runtime}, place)
        if is_own(node):
            _check_methods(found, place)
    for name in _declared(found, "components") & params.keys():
        if not isinstance(params[name], Mapping):
            raise ConfigError(f"{place}.{name}={params[name]}: must be a mapping with a {TARGET_KEY}")
        inner = params[name]
        if name in _declared(found, "nested"):
            inner = {key: _nested(value, f"{place}.{name}.{key}", trusted) for key, value in inner.items()}
        params[name] = build(inner, at=f"{place}.{name}", trusted=trusted)
    if not inspect.isclass(found):
        return functools.partial(found, **params, **runtime)
    try:
        return found(**params, **runtime)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def call(function: Callable[..., Any], *args: Any, at: str, **runtime: Any) -> Any:
    """Call what `build` made of a function with what only the run knows.

    Raises
    ------
    ConfigError
        If the function does not take these arguments: it was written for another version, or lacks a parameter.
    """
    inner = function.func if isinstance(function, functools.partial) else function
    set_already = function.keywords if isinstance(function, functools.partial) else {}
    _check_call(inner, args, {**set_already, **runtime}, at)
    return function(*args, **runtime)


def is_own(node: Mapping[str, Any]) -> bool:
    """Whether a component's code is a user's own."""
    return str(node.get(TARGET_KEY, "")).split(".")[0] not in TRUSTED


def builder(node: Mapping[str, Any], *, at: str = "", trusted: Collection[str] = ()) -> Callable[[], Any]:
    """Return what builds the component of ``node`` again and again: as `build`, with its checks made once."""
    params = {name: value for name, value in node.items() if name != TARGET_KEY}
    first = build(node, at=at, trusted=trusted)
    found = locate(node[TARGET_KEY], trusted, at)
    if type(first) is not found or any(isinstance(value, Mapping) for value in params.values()):
        return functools.partial(build, node, at=at, trusted=trusted)
    if all(value is None or isinstance(value, (bool, int, float, str)) for value in params.values()):
        return lambda: found(**params)
    return lambda: found(**copy.deepcopy(params))


def locate(target: str, trusted: Collection[str] = (), at: str = "") -> Callable[..., Any]:
    """Import the class or function at a dotted path; arguments and errors as in `build`."""
    place = f"{at}.{TARGET_KEY}={target}" if at else f"{TARGET_KEY}={target}"
    allowed = TRUSTED | set(trusted)
    _check_trust(target.split(".")[0], allowed, place)
    module_name, rest = _import_longest(target, place)
    found: Any = importlib.import_module(module_name)
    for name in rest:
        if not hasattr(found, name):
            raise ConfigError(f"{place}: {module_name} has no {'.'.join(rest)}")
        found = getattr(found, name)
    if not (inspect.isclass(found) or inspect.isfunction(found) or _is_class_method(found)):
        raise ConfigError(f"{place}: must be a class, a function or a class method")
    # `fedcl.cli.os.system` starts with a trusted name and is not one: what was found must be at home there too.
    _check_trust(found.__module__.split(".")[0], allowed, place)
    return cast(Callable[..., Any], found)


def _is_class_method(found: Any) -> bool:
    return inspect.ismethod(found) and inspect.isclass(found.__self__)


def targets_in(node: Any) -> list[str]:
    """Return every ``_target_`` of a configuration tree."""
    if isinstance(node, Mapping):
        own = [node[TARGET_KEY]] if isinstance(node.get(TARGET_KEY), str) else []
        return own + [target for value in node.values() for target in targets_in(value)]
    if isinstance(node, list):
        return [target for value in node for target in targets_in(value)]
    return []


def _nested(value: Any, at: str, trusted: Collection[str]) -> Any:
    """Return ``value`` with every component inside it built, from the inside out."""
    if isinstance(value, list):
        return [_nested(item, f"{at}[{place}]", trusted) for place, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    inner = {key: _nested(item, f"{at}.{key}", trusted) for key, item in value.items()}
    if TARGET_KEY not in inner:
        return inner
    made = build(inner, at=at, trusted=trusted)
    return made() if isinstance(made, functools.partial) else made


def _declared(found: Callable[..., Any], attribute: str) -> frozenset[str]:
    """Return the parameters that a class wants built: the code opts in, never the configuration."""
    declared = getattr(found, attribute, ()) if inspect.isclass(found) else ()
    return frozenset(declared) if isinstance(declared, (tuple, frozenset)) else frozenset()


def _check_trust(top: str, allowed: Collection[str], place: str) -> None:
    if top not in allowed:
        raise ConfigError(
            f"{place}: package '{top}' is not trusted; allowed: {', '.join(sorted(allowed))}, a module in the current "
            f"directory or beside the --config-dir, or one named in trusted_packages"
        )


def _import_longest(target: str, place: str) -> tuple[str, list[str]]:
    parts = target.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{place}: must be a dotted path, package.module.Name")
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            # A library that the module itself lacks is another matter than a module that is not there.
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise ConfigError(
                    f"{place}: {name} needs the package '{error.name}', which is not installed"
                ) from error
            continue
        return name, parts[cut:]
    raise ConfigError(f"{place}: no module '{parts[0]}' found")


def _check_parameters(
    found: Callable[..., Any], target: str, params: Mapping[str, Any], runtime: Mapping[str, Any], place: str
) -> None:
    signature = inspect.signature(found)
    accepted = [p for p in signature.parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [p.name for p in accepted if p.name not in runtime]
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        for key in [*params, *runtime]:
            if key not in {p.name for p in accepted}:
                raise ConfigError(f"{place}.{key}: no such parameter; {target} takes {', '.join(names) or 'none'}")
    if inspect.isclass(found):
        missing = [p.name for p in accepted if p.default is p.empty and p.name not in {*params, *runtime}]
        if missing:
            raise ConfigError(f"{place}.{missing[0]}: {target} needs this parameter; it takes {', '.join(names)}")


def _check_call(found: Callable[..., Any], args: Sequence[Any], keywords: Mapping[str, Any], place: str) -> None:
    """Refuse a call that the signature does not admit; what goes wrong inside keeps its traceback."""
    try:
        inspect.signature(found).bind(*args, **keywords)
    except TypeError as error:
        given = ", ".join([*(f"{len(args)} by position" for _ in args[:1]), *keywords])
        raise ConfigError(
            f"{place}: {_name(found)}{_signature(found)} cannot be called as fedcl does: {error}; it is given {given}"
        ) from error


def _check_methods(found: type, place: str) -> None:
    """Refuse a class one of whose methods takes other arguments than the one of fedcl's that it stands in for."""
    for name in dir(found):
        method = inspect.getattr_static(found, name)
        contract = next(
            (
                base.__dict__[name]
                for base in found.__mro__
                if name in base.__dict__ and base.__module__.split(".")[0] in TRUSTED
            ),
            None,
        )
        if (
            name.startswith("_")
            or method is contract
            or not inspect.isfunction(method)
            or not inspect.isfunction(contract)
        ):
            continue
        wanted = inspect.signature(contract).parameters.values()
        positional = [p for p in wanted if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        named = {p.name: _PLACEHOLDER for p in wanted if p.kind is p.KEYWORD_ONLY}
        try:
            inspect.signature(method).bind(*positional, **named)
        except TypeError as error:
            raise ConfigError(
                f"{place}: {_name(found)}.{name}{_signature(method)}: {error}; fedcl calls it as {name}"
                f"{_signature(contract)}"
            ) from error


def _name(found: Callable[..., Any]) -> str:
    return f"{found.__module__}.{found.__qualname__}"


def _signature(found: Callable[..., Any]) -> str:
    """Return a signature without its annotations."""
    whole = inspect.signature(found)
    bare = [p.replace(annotation=p.empty) for p in whole.parameters.values()]
    return str(whole.replace(parameters=bare, return_annotation=whole.empty))
