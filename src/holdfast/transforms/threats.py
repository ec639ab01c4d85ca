"""Threats that are no balls: corruptions, rotations with translations, and patches; how they are written."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, type_of, unknown
from ..user_input import number, read_number, text, whole
from .corruptions import CORRUPTIONS, LEAST_SIDE, SEVERITIES

WRITTEN = "corruptions, corruptions:3, fog:3, rotation:30, translation:3, rotation:30,translation:3 or patch:5x5"
MOST_PIXELS = 10_000  # of a translation or a patch


@dataclass(frozen=True)
class Corrupted:
    """Corruptions at one severity.

    Args:
        severity: 1 to 5.
        kinds: keys of CORRUPTIONS; empty for all of them.

    Raises:
        UserError: no such kind or severity.

    >>> str(Corrupted(3)), str(Corrupted(3, ("fog",)))
    ('corruptions 3', 'fog 3')
    """

    severity: int
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        whole("severity", self.severity, 1, 5)
        for kind in self.kinds:
            if kind not in CORRUPTIONS:
                raise unknown("corruption", kind, CORRUPTIONS)
        object.__setattr__(self, "kinds", tuple(self.kinds) or tuple(CORRUPTIONS))

    def __str__(self) -> str:
        every = len(self.kinds) == len(CORRUPTIONS)
        return f"{'corruptions' if every else '+'.join(self.kinds)} {self.severity}"

    def describe(self) -> dict[str, Any]:
        """The threat as a dict for JSON."""
        return {"norm": "corruptions", "eps": self.severity, "lo": 0.0, "hi": 1.0, "text": str(self)}

    def why_not(self, shape: tuple[int, int, int]) -> str:
        """Why images of shape (C, H, W) cannot be transformed so; "" where they can."""
        small = min(shape[1:]) < LEAST_SIDE
        return f"corruptions need images of at least {LEAST_SIDE}x{LEAST_SIDE} pixels" if small else ""


@dataclass(frozen=True)
class Spatial:
    """All images rotated and moved by up to so much, bilinearly; what comes from beyond the edge is 0.

    Args:
        rotation: in degrees, 0 to 180, either way about the centre.
        translation: in pixels, >= 0, up or down and left or right.

    Raises:
        UserError: a value outside its range, or both 0.

    Source: Engstrom et al. 2019.

    >>> str(Spatial(30, 3)), str(Spatial(translation=2.5))
    ('rotation 30, translation 3', 'translation 2.5')
    """

    rotation: float = 0.0
    translation: float = 0.0

    def __post_init__(self) -> None:
        number("rotation, in degrees,", self.rotation, 0, 180)
        number("translation, in pixels,", self.translation, 0, MOST_PIXELS)
        if not self.rotation and not self.translation:
            raise UserError("rotation and translation are both 0: the threat is the image itself. Give one of them.")

    def __str__(self) -> str:
        parts = {"rotation": self.rotation, "translation": self.translation}
        return ", ".join(f"{name} {value:g}" for name, value in parts.items() if value)

    def describe(self) -> dict[str, Any]:
        """The threat as a dict for JSON."""
        name, eps = ("rotation", self.rotation) if self.rotation else ("translation", self.translation)
        return {"norm": name, "eps": eps, "translation": self.translation, "lo": 0.0, "hi": 1.0, "text": str(self)}

    def why_not(self, shape: tuple[int, int, int]) -> str:
        """Why images of shape (C, H, W) cannot be transformed so; "" where they can."""
        side = min(shape[1:])
        return (
            f"a translation by {self.translation:g} pixels can move all of it out" if self.translation >= side else ""
        )


@dataclass(frozen=True)
class Patch:
    """All images that differ in one rectangle of pixels, anywhere, with any values there.

    Args:
        height: in pixels, >= 1.
        width: in pixels, >= 1.

    Raises:
        UserError: a value outside its range.

    >>> str(Patch(5, 5))
    'patch 5x5'
    """

    height: int
    width: int

    def __post_init__(self) -> None:
        whole("the height of a patch", self.height, 1, MOST_PIXELS)
        whole("the width of a patch", self.width, 1, MOST_PIXELS)

    def __str__(self) -> str:
        return f"patch {self.height}x{self.width}"

    def describe(self) -> dict[str, Any]:
        """The threat as a dict for JSON."""
        return {"norm": "patch", "eps": self.height * self.width, "lo": 0.0, "hi": 1.0, "text": str(self)}

    def why_not(self, shape: tuple[int, int, int]) -> str:
        """Why images of shape (C, H, W) cannot be transformed so; "" where they can."""
        covers = self.height >= shape[1] and self.width >= shape[2]
        wide = self.height > shape[1] or self.width > shape[2]
        return "the patch covers the image" if covers else "the patch does not fit into the image" if wide else ""


Transform = Corrupted | Spatial | Patch


def is_transform(written: str) -> bool:
    """Whether a text names a threat of this package: by its first word.

    >>> is_transform("patch:5x5"), is_transform("linf:0.1")
    (True, False)
    """
    first = re.split(r"[:,]", text("threat", written), maxsplit=1)[0].strip().lower()
    return first in ("corruptions", "rotation", "translation", "patch", *CORRUPTIONS)


def parse(written: str) -> tuple[Transform, ...]:
    """Threats from a text: five for ``corruptions``, one for each severity; else one.

    Args:
        written: corruptions, corruptions:SEVERITY, KIND or KIND:SEVERITY with a key of CORRUPTIONS;
            rotation:DEGREES, translation:PIXELS, or both with a comma between; patch:HEIGHTxWIDTH or patch:SIDE.

    Returns:
        The threats, of one kind.

    Raises:
        UserError: a text that cannot be read, or a value outside its range.

    >>> parse("rotation:30,translation:3")
    (Spatial(rotation=30, translation=3),)
    >>> [str(one) for one in parse("fog")]
    ['fog 1', 'fog 2', 'fog 3', 'fog 4', 'fog 5']
    """
    parts = [part.strip().lower().partition(":") for part in text("threat", written).split(",")]
    names = [name.strip() for name, _, _ in parts]
    values = [value.strip() for _, _, value in parts]
    if len(parts) == 1 and names[0] in ("corruptions", *CORRUPTIONS):
        kinds = () if names[0] == "corruptions" else (names[0],)
        return tuple(Corrupted(severity, kinds) for severity in _severities(values[0], written))
    if len(parts) == 1 and names[0] == "patch":
        sides = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", values[0])
        if sides:
            return (Patch(int(sides[1]), int(sides[2] or sides[1])),)
    if set(names) <= {"rotation", "translation"} and len(set(names)) == len(names):
        numbers = [read_number(value) for value in values]
        if None not in numbers:
            return (Spatial(**{name: value for name, value in zip(names, numbers, strict=True) if value is not None}),)
    raise UserError(f"cannot read the threat '{written}': expected {WRITTEN}.")


def _severities(value: str, written: str) -> tuple[int, ...]:
    """The severities that a text names; all of them for an empty one."""
    if not value:
        return SEVERITIES
    severity = read_number(value)
    if severity is None:
        raise UserError(f"cannot read the threat '{written}': expected {WRITTEN}.")
    return (whole("severity", severity, 1, 5),)


def as_transforms(threat: Any) -> tuple[Transform, ...]:
    """The threats that an argument is: one as it is, several of one kind, or a text as ``parse`` reads it.

    Raises:
        UserError: anything else, and as ``parse`` does.
    """
    if isinstance(threat, str):
        return parse(threat)
    every = tuple(threat) if isinstance(threat, list | tuple) else (threat,)
    if not every or not all(isinstance(one, Transform) for one in every):
        raise UserError(
            f"the threat must be a text such as {WRITTEN}, or one of holdfast.transforms, got {type_of(threat)}."
        )
    return every


def is_inside(threat: Spatial | Patch, found: Any, x: Any) -> bool:
    """Whether the parameters (angle, down, right) or the place (top, left) of each transform lie in the threat.

    Args:
        threat: the threat.
        found: (N, 3) or (N, 2).
        x: (N, C, H, W).

    Returns:
        True where all do.
    """
    if isinstance(threat, Patch):
        most = found.new_tensor([x.shape[-2] - threat.height, x.shape[-1] - threat.width])
        return bool(((found >= 0) & (found <= most)).all())
    most = found.new_tensor([threat.rotation, threat.translation, threat.translation])
    return bool((found.abs() <= most * (1 + 1e-6)).all()) and math.isfinite(float(found.abs().sum()))
