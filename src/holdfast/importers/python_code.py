"""A user's Python file: import it, call what it names, and point errors at the user's own line."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import UserError, type_of, unknown
from ..outputs import Model, out_of_memory

_HERE, _TORCH = str(Path(__file__).parent), str(Path(torch.__file__).parent)
_OWNER = "__holdfast_folder__"  # set on a module: the user's folder that it was imported from
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

    Args:
        folder: the user's folder. Modules imported from it are marked as its own. First they are forgotten, since their
            files may have changed, and so are those that another folder left under the name of one of its files.
    """
    siblings = {entry.stem for entry in folder.iterdir() if entry.suffix == ".py" or (entry / "__init__.py").exists()}
    for name, module in list(sys.modules.items()):
        owner = vars(module).get(_OWNER) if isinstance(module, ModuleType) else None
        if owner == str(folder) or (owner is not None and name.partition(".")[0] in siblings):
            del sys.modules[name]
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if _is_in(getattr(sys.modules[name], "__file__", None), folder):
                sys.modules[name].__dict__[_OWNER] = str(folder)


def _is_in(file: str | None, folder: Path) -> bool:
    """Whether a module's file is the user's: in their folder, and not in an environment of packages there."""
    return file is not None and Path(file).is_relative_to(folder) and not _INSTALLED & set(Path(file).parts)


def source_hash(path: Path) -> str:
    """Hash a Python file and every module of its folder that it imports: a changed network need not show in weights.

    What counts are the files that the import statements lead to, from file to file, and what the file imported by other
    means when it was executed. Modules outside of its folder do not count.

    Args:
        path: the file, absolute.

    Returns:
        16 hexadecimal digits; the same wherever the folder is.

    Raises:
        UserError: a file cannot be read.
    """
    folder, files = path.parent, {path}
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and vars(module).get(_OWNER) == str(folder) and module.__file__:
            files.add(Path(module.__file__))
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
    """The files of a folder that the import statements of a Python file name, wherever in it they stand."""
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
    spec = importlib.util.spec_from_file_location(name, path)
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
