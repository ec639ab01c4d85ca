"""A user's Python file: import it, call what it names, and point errors at the user's own line."""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib.util
import inspect
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import UserError, type_of, unknown
from ..outputs import Model, out_of_memory

_HERE, _TORCH = str(Path(__file__).parent), str(Path(torch.__file__).parent)
_OWNER = "__holdfast_folder__"  # set on a module: the user's folder that it was imported from
_MODULE = re.compile(r"[^\W\d]\w{0,99}(\.[^\W\d]\w{0,99}){0,9}")  # a module's name
_INSTALLED = {"site-packages", "dist-packages"}


def split_reference(text: str) -> tuple[str, str]:
    """Split path.py:name into (path, name); the name of anything else is "".

    >>> split_reference("a/b.py:net"), split_reference("c.onnx")
    (('a/b.py', 'net'), ('c.onnx', ''))
    """
    match = re.fullmatch(r"(.+\.py):(\w*)", text)
    return (match[1], match[2]) if match else (text, "")


@contextmanager
def user_code_errors(what: str, path: Path | None = None) -> Iterator[None]:
    """Turn errors of the user's code into UserErrors that name a line.

    That line is the innermost one in the user's folder, else the innermost one outside torch. Running out of memory is
    passed on as it is, since evaluations then try a smaller batch.

    Args:
        what: the code that runs, for the message.
        path: the user's file, where it is known.

    Raises:
        UserError: the code raised, or called ``sys.exit``.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_HERE)]
        in_folder = [frame for frame in frames if path is not None and frame.filename.startswith(str(path.parent))]
        outside_torch = [frame for frame in frames if not frame.filename.startswith(_TORCH)]
        frames = in_folder or outside_torch or frames
        where = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else "in compiled code"
        if isinstance(error, SyntaxError) and error.filename:
            where = f"{error.filename}, line {error.lineno}"
        raise UserError(f"{what} raised {type(error).__name__}: {error} ({where}).") from error


@contextmanager
def importing_from(folder: Path) -> Iterator[None]:
    """Put a folder first on the import path, and keep its modules apart from another folder's of the same name.

    Code of that folder finds its modules later too, such as by an import statement inside of ``forward``.

    Args:
        folder: the user's folder. Modules imported from it are marked as its own. First they are forgotten, since their
            files may have changed.
    """
    with _lock:
        for name in _modules.pop(folder, {}):
            if _owner(sys.modules.get(name)) == str(folder):
                del sys.modules[name]
        _current[:] = []
        with _on_path(folder):
            yield


_lock = threading.RLock()  # sys.path and sys.modules belong to all threads
_modules: dict[Path, dict[str, ModuleType]] = {}  # what was imported from each folder of a user
_current: list[Path] = []  # the folder whose modules stand in sys.modules where two folders have one of the same name


def _owner(module: object) -> str | None:
    """The user's folder that a module was imported from."""
    return vars(module).get(_OWNER) if isinstance(module, ModuleType) else None


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """A folder first on the import path, its modules in sys.modules instead of other folders' of the same names."""
    if _current != [folder]:
        siblings = {file.stem for file in folder.iterdir() if file.suffix == ".py" or file.is_dir()}
        for name, module in list(sys.modules.items()):
            if _owner(module) not in (None, str(folder)) and name.partition(".")[0] in siblings:
                del sys.modules[name]
        sys.modules.update(_modules.setdefault(folder, {}))
        _current[:] = [folder]
        importlib.invalidate_caches()
    before, finder = set(sys.modules), _Finder(folder)
    sys.path.insert(0, str(folder))
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            module = sys.modules[name]
            place = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
            if _is_in(place, folder):
                module.__dict__[_OWNER] = str(folder)
                _modules.setdefault(folder, {})[name] = module


class _Finder(MetaPathFinder):
    """Finds the Python files of one folder, before any other module of the same name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of a module in the folder; None for any other module."""
        spec = PathFinder.find_spec(name, [str(self.folder)] if path is None else path, target)
        if spec is None or not isinstance(spec.loader, SourceFileLoader) or not _is_in(spec.origin, self.folder):
            return None
        spec.loader = _Loader(spec.loader.name, spec.loader.path, self.folder)
        return spec


class _Loader(SourceFileLoader):
    """Executes a Python file of a user's folder so that its import statements look there whenever they run."""

    def __init__(self, name: str, path: str, folder: Path) -> None:
        super().__init__(name, path)
        self.folder = folder

    def exec_module(self, module: ModuleType) -> None:
        """Execute the file with an ``__import__`` of its own."""
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": partial(_import, self.folder)}
        super().exec_module(module)


def _import(
    folder: Path,
    name: str,
    globals: Mapping[str, object] | None = None,
    locals: Mapping[str, object] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    """``__import__`` for the code of a folder."""
    with _lock:
        known = sys.modules.get(name) if _current == [folder] and level == 0 else None
        if known is not None and all(hasattr(known, part) for part in fromlist or ()):
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        with _on_path(folder):
            return builtins.__import__(name, globals, locals, fromlist or (), level)


def _is_in(file: str | None, folder: Path) -> bool:
    """Whether a module's file is the user's: in their folder, and not in an environment of packages there."""
    return file is not None and Path(file).is_relative_to(folder) and not _INSTALLED & set(Path(file).parts)


def source_hash(path: Path) -> str:
    """Hash a Python file and every module of its folder that it imports: a changed network need not show in weights.

    What counts are the files that the import statements lead to, from file to file and wherever they stand, those whose
    module is written out as a text (for ``importlib.import_module``), and what the file imported by other means when it
    was executed. Modules outside of its folder do not count, nor do data files, nor modules whose name is computed when
    the network runs.

    Args:
        path: the file, absolute.

    Returns:
        16 hexadecimal digits; the same wherever the folder is.

    Raises:
        UserError: a file cannot be read.
    """
    folder, files = path.parent, {path}
    places = (getattr(module, "__file__", None) for module in _modules.get(folder, {}).values())
    files |= {Path(place) for place in places if place}
    todo = list(files)
    while todo:
        found = _imported_files(todo.pop(), folder) - files
        files |= found
        todo += found
    mark = hashlib.blake2b(digest_size=8)
    try:
        for file in sorted(files):
            content = file.read_bytes()
            mark.update(f"{file.relative_to(folder)} {len(content)} ".encode() + content)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}).") from None
    return mark.hexdigest()


def _imported_files(path: Path, folder: Path) -> set[Path]:
    """The files of a folder that the import statements and texts of a Python file name, wherever in it they stand."""
    try:
        tree = ast.parse(path.read_bytes()) if path.suffix == ".py" else ast.Module([], [])
    except (OSError, SyntaxError, ValueError, RecursionError):
        return set()  # importing it fails too, with a message
    found: set[Path] = set()
    for node in ast.walk(tree):
        start, names = folder, []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = path.parents[node.level - 1] if 0 < node.level <= len(path.parents) else folder
            base = f"{node.module}." if node.module else ""
            names = [base + alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _MODULE.fullmatch(node.value):
            names = [node.value]
        for name in names:
            parts = name.split(".")
            stems = [start.joinpath(*parts[:k]) for k in range(1, len(parts) + 1)]
            found |= {file for stem in stems for file in (stem.with_suffix(".py"), stem / "__init__.py")}
    return {file for file in found if file.is_file() and _is_in(str(file), folder)}


def load_name(path: Path, name: str) -> Any:
    """Execute a Python file and return what a name in it refers to. Call it inside ``importing_from``.

    Args:
        path: the file.
        name: a name that the file defines.

    Returns:
        The object of that name.

    Raises:
        UserError: the file raises (the message names the line), or does not define the name.
    """
    with user_code_errors(f"importing {path.name}", path):
        module = _execute(path)
    if not hasattr(module, name):
        public = [key for key, value in vars(module).items() if not key.startswith("_") and callable(value)]
        raise unknown(f"name in {path.name}", name, public)
    return getattr(module, name)


def call_factory(factory: Any, what: str, path: Path, *arguments: Any, expected: str, hint: str) -> Any:
    """Call the user's function, after a check that it is one and takes these arguments.

    Args:
        factory: what the user named.
        what: how the user named it, for the message.
        path: the user's file.
        arguments: what to call it with.
        expected: what ``factory`` must be.
        hint: how it is called and what to write instead, for a function that takes other arguments.

    Returns:
        What it returns.

    Raises:
        UserError: it cannot be called, takes other arguments, or raises (the message names the line).
    """
    if isinstance(factory, nn.Module) or not callable(factory):
        raise UserError(f"{what} must be {expected}, got {type_of(factory)}.")
    try:
        inspect.signature(factory).bind(*arguments)
    except TypeError:
        raise UserError(f"{what} takes the arguments {inspect.signature(factory)}, but {hint}") from None
    except ValueError:  # a builtin without a signature
        pass
    with user_code_errors(what, path):
        return factory(*arguments)


def build_model(path: Path, name: str) -> Model:
    """Build the network that a Python file names.

    Args:
        path: the file; it is executed.
        name: a module in it, or a function or class to call without arguments.

    Returns:
        A torch module, or a function from images to logits.

    Raises:
        UserError: the name is empty or unknown, needs arguments, returns no network, or the code raises.
    """
    if not name:
        raise UserError(f"{path.name} alone is not enough: name what makes the network, such as {path.name}:build.")
    what = f"{path.name}:{name}"
    with importing_from(path.parent):
        made = load_name(path, name)
        if not isinstance(made, nn.Module):
            made = call_factory(
                made,
                what,
                path,
                expected="a module, or a function or class that returns the network",
                hint="it is called without any: give them defaults, or write a function around it. A function from "
                "images to logits must be returned by build(), not named here.",
            )
    if isinstance(made, type) or not callable(made):
        raise UserError(f"{what} must return a torch module or a function, it returned {type_of(made)}.")
    model: Model = made
    return model


def _execute(path: Path) -> ModuleType:
    """Import a file as a module of its own, registered so that pickle and dataclasses find its classes."""
    name = f"_holdfast_{path.stem}_{abs(hash(path)):x}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_Loader(name, str(path), path.parent))
    if spec is None or spec.loader is None:
        raise UserError(f"{path} cannot be imported as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module
