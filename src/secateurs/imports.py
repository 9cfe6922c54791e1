"""The user's own functions by import path: `package.module:function` or `path/to/file.py:function`.

Files are looked for beside the recipe first, then in the current directory.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from difflib import get_close_matches
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from secateurs.errors import ConfigError

__all__ = ["find_file", "import_function", "near_file"]


def import_function(path: str, what: str, base: Path | None = None) -> Callable[..., Any]:
    """The function at `package.module:function` or `path/to/file.py:function`.

    Args:
        path: import path; a file path may be relative to `base` or to the current directory.
        what: for messages ("model", "data").
        base: the directory of the recipe.

    Raises:
        ConfigError: the module or the function does not exist, or importing it fails.
    """
    place, colon, name = path.rpartition(":")
    if not colon or not place or not name:
        raise ConfigError(f"{what}: {path!r}: write package.module:function or file.py:function")
    folders = [folder for folder in (base, Path.cwd()) if folder is not None]
    try:
        if place.endswith(".py"):
            module = _load_file(find_file(place, what, base))
        else:
            _add_to_path(*folders)
            module = importlib.import_module(place)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # importing the user's module can raise anything
        missing = isinstance(error, ModuleNotFoundError) and place.startswith(str(error.name))
        hint = _near_module(place, folders) if missing else ""
        raise ConfigError(
            f"{what}: importing {place} fails: {type(error).__name__}: {error}{hint}"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        near = get_close_matches(name, [n for n in dir(module) if n[:1] != "_"], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{what}: {place} has no function {name!r}.{hint}")
    function: Callable[..., Any] = found
    return function


def _add_to_path(*folders: Path) -> None:
    for folder in map(str, folders):
        if folder not in sys.path:
            sys.path.append(folder)


def _near_module(name: str, folders: list[Path]) -> str:
    """The nearest module that exists, as a hint; empty if none is near."""
    parent, _, last = name.rpartition(".")
    try:
        places = list(importlib.import_module(parent).__path__) if parent else map(str, folders)
    except (ImportError, AttributeError):
        return ""
    near = get_close_matches(last, [m.name for m in iter_modules(places)], n=1)
    return f". Did you mean {'.'.join(filter(None, [parent, near[0]]))!r}?" if near else ""


def find_file(place: str, what: str, base: Path | None) -> Path:
    """The absolute path of a user's file, relative to the recipe or to the current directory.

    Raises:
        ConfigError: it is in neither place.
    """
    given = Path(place).expanduser()
    tried = [given] if given.is_absolute() else [*([base / given] if base else []), given]
    file = next((p for p in tried if p.is_file()), None)
    if file is None:
        hint = next(filter(None, map(near_file, tried)), "")
        looked = ", ".join(dict.fromkeys(map(str, tried)))
        raise ConfigError(f"{what}: file {place} does not exist (looked at {looked}){hint}")
    return file.resolve()


def near_file(file: Path) -> str:
    names = [p.name for p in file.parent.glob(f"*{file.suffix}")] if file.parent.is_dir() else []
    near = get_close_matches(file.name, names, n=1)
    return f". Did you mean {near[0]!r}?" if near else ""


def _load_file(file: Path) -> Any:
    name = f"secateurs_user_{file.stem}_{abs(hash(file))}"
    if name in sys.modules:
        return sys.modules[name]
    _add_to_path(file.parent)  # as `python file.py` would: it may import its neighbours
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
