"""What calls of ``certify`` computed and later ones need: the network as it was read, boxes of undecided samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

from .graph import Graph
from .linear import Forward, Region, take
from .steps import Box, Step

MOST = 2**30  # bytes of boxes that are kept, at most


@dataclass(frozen=True)
class Reading:
    """A network as it was read.

    Args:
        model: what the caller gave.
        network: it, or a copy on a device that has float64.
        shape: of an image.
        graph: of the network.
        steps: of the graph, in float64.
        weights: copies of the model's parameters and buffers at that time, by name.
    """

    model: nn.Module
    network: nn.Module
    shape: tuple[int, ...]
    graph: Graph
    steps: list[Step]
    weights: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", {name: each.detach().clone() for name, each in _weights(self.model)})

    def is_of(self, model: nn.Module, shape: tuple[int, ...], device: torch.device) -> bool:
        """Whether it is still what reading this model for images of this shape on this device would give."""
        if self.model is not model or self.shape != shape or self.graph.device != device:
            return False
        now = dict(_weights(model))
        return now.keys() == self.weights.keys() and all(_same(now[name], old) for name, old in self.weights.items())


def _weights(model: nn.Module) -> chain[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def _same(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)


@dataclass(frozen=True)
class Undecided:
    """What is known of n samples that are classified correctly and not proved.

    Args:
        y: (n,) int64 labels.
        low: (n, K - 1) float64, the lower bounds of their margins.
        level: (n,) int64, the place in METHODS of the last method that came to its end.
        found: their boxes.
        region: the images around them.
    """

    y: Tensor
    low: Tensor
    level: Tensor
    found: Forward
    region: Region

    @property
    def bytes(self) -> int:
        """Memory of the boxes."""
        sides = [side for box in self.found.boxes for side in box] + [e for e in self.found.errors if e is not None]
        return sum(side.numel() * side.element_size() for side in sides)

    def take(self, places: Tensor) -> Undecided:
        """Some of the samples, in this order."""
        found, region = take(self.found, self.region, places)
        there = places.to(self.level.device)
        return Undecided(self.y[places], self.low[places], self.level[there], found, region)


class ProofCache:
    """What calls of ``certify`` about one network computed, for the later ones: give the same cache to all of them.

    A stronger method then goes on where a weaker one ended: the network is read once, and no bound is computed twice.
    Give later calls what is left, since samples that are decided are not kept.
    Samples are known by ``Data.index``; the boxes of another image, label or threat are never taken. Where a parameter
    or a buffer of the model has changed, all is computed again; other state of the model must not change between the
    calls. Boxes are kept up to a number of bytes; those of the weakest methods are dropped first, and what was dropped
    is computed again.

    Args:
        most: bytes of boxes, at most.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self.reading: Reading | None = None
        self._places: dict[int, tuple[Undecided, int]] = {}

    def read(self, model: nn.Module, shape: tuple[int, ...], device: torch.device) -> Reading | None:
        """The network as it was read for images of this shape on this device; None, and nothing is kept, otherwise."""
        known = self.reading
        if known is not None and known.is_of(model, shape, device):
            return known
        self.reading = None
        self._places.clear()
        return None

    def get(self, index: Sequence[int], y: Tensor, region: Region) -> tuple[Tensor, Undecided | None]:
        """The places in ``index``, increasing, of samples that something is known of with these labels and regions; and
        what that is, in this order."""
        parts: dict[int, list[int]] = {}
        for place, number in enumerate(index):
            part = self._places[number][0] if number in self._places else None
            if part is not None and (part.region.threat, part.region.eps) == (region.threat, region.eps):
                parts.setdefault(id(part), []).append(place)
        order = [place for places in parts.values() for place in places]
        places = torch.tensor(order, dtype=torch.int64, device=y.device)
        if not order:
            return places, None
        known = joined([self._places[index[some[0]]][0].take(self._at(index, some, y)) for some in parts.values()])
        places, turns = places.sort()
        known = known.take(turns)
        same = known.y == y[places]
        for mine, theirs in zip(_corners(known.region), _corners(region), strict=True):
            same &= (mine == theirs[places]).flatten(1).all(1)
        good = same.nonzero()[:, 0]
        return places[good], known.take(good) if len(good) else None

    def _at(self, index: Sequence[int], places: Sequence[int], like: Tensor) -> Tensor:
        """Where these samples stand in the part that holds them."""
        return torch.tensor([self._places[index[place]][1] for place in places], device=like.device)

    def put(self, index: Sequence[int], places: Sequence[int], left: Undecided) -> None:
        """Forget these samples, and keep what is left of them: ``left`` is about those at these places."""
        for number in index:
            self._places.pop(number, None)
        if not places:
            return
        parts = {id(part): part for part, _ in self._places.values()}
        total, level = sum(part.bytes for part in parts.values()) + left.bytes, int(left.level.amin())
        for part in sorted(parts.values(), key=lambda part: int(part.level.amin())):
            if total <= self.most or int(part.level.amin()) >= level:
                break
            self._places = {number: held for number, held in self._places.items() if held[0] is not part}
            total -= part.bytes
        if total <= self.most:
            self._places |= {index[place]: (left, turn) for turn, place in enumerate(places)}


def _corners(region: Region) -> tuple[Tensor, ...]:
    return region.box.lo, region.box.hi, region.center


def joined(parts: Sequence[Undecided]) -> Undecided:
    """The samples of all parts, in order: of one threat."""
    first = parts[0]
    if len(parts) == 1:
        return first
    boxes = [
        Box(*(torch.cat(sides) for sides in zip(*boxes, strict=True)))
        for boxes in zip(*(part.found.boxes for part in parts), strict=True)
    ]
    errors = [
        None if each[0] is None else torch.cat([error for error in each if error is not None])
        for each in zip(*(part.found.errors for part in parts), strict=True)
    ]
    corners = [torch.cat(each) for each in zip(*(_corners(part.region) for part in parts), strict=True)]
    found = Forward(boxes, errors, torch.cat([part.found.unbounded for part in parts]))
    region = Region(Box(corners[0], corners[1]), corners[2], first.region.threat, first.region.eps)
    y, low, level = (torch.cat([getattr(part, name) for part in parts]) for name in ("y", "low", "level"))
    return Undecided(y, low, level, found, region)
