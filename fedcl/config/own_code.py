"""Modules of a user's own, which the current directory and the folders beside ``--config-dir`` hold."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedcl.config.instantiate import TRUSTED


def plugin_packages(targets: Iterable[str], directories: Sequence[Path]) -> list[str]:
    """Return the top packages of `targets` that lie directly in one of `directories`, importing nothing.

    Only a direct child counts: a virtual environment below the current directory must not make torch a plugin. And it
    must be what ``import`` would really take, so an installed package of the same name is never shadowed.
    """
    homes = {directory.resolve() for directory in directories}
    found = set()
    for top in {target.split(".")[0] for target in targets} - TRUSTED:
        if not top.isidentifier():
            continue
        try:
            spec = importlib.util.find_spec(top)
        except ValueError:  # a module without an origin, such as __main__
            continue
        spec = spec or importlib.machinery.PathFinder.find_spec(top, [str(home) for home in homes])
        if spec is None or spec.origin is None or not Path(spec.origin).is_file():
            continue
        file = Path(spec.origin).resolve()
        if (file.parent.parent if spec.submodule_search_locations else file.parent) in homes:
            found.add(top)
    return sorted(found)


def plugin_directories(config_dirs: Iterable[Path | str] = (), *, outside: Iterable[Path] = ()) -> list[Path]:
    """Return where a user's modules may be: the current directory, each ``--config-dir`` and the folder around it.

    The current directory is left out if it is within a folder of ``outside``: its code may be somebody else's.
    """
    here = Path(os.getcwd()).resolve()
    folders = [] if any(here.is_relative_to(Path(one).resolve()) for one in outside) else [Path(os.getcwd())]
    for directory in config_dirs:
        folders += [Path(directory).resolve(), Path(directory).resolve().parent]
    return list(dict.fromkeys(folders))


def add_plugin_paths(config_dirs: Iterable[Path | str] = (), *, outside: Iterable[Path] = ()) -> None:
    """Let the user's own modules be imported; appended, so that none of them shadows an installed one."""
    for folder in plugin_directories(config_dirs, outside=outside):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
