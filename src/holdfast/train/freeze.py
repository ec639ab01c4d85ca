"""Parts of a network that training leaves as they are, chosen by the names of their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError
from ..user_input import typed


@typed
def frozen_names(model: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """The names of the parameters that patterns choose.

    Args:
        model: the network.
        patterns: globs of names, in which * stands for any text, dots too: "backbone.*".

    Returns:
        The names, in the network's order.

    Raises:
        UserError: a pattern chooses no parameter, or all of them are chosen.

    >>> frozen_names(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["0.*"])
    ('0.weight', '0.bias')
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(names[:3] + ["..."] * (len(names) > 4) + names[-1:] * (len(names) > 3))
            raise UserError(
                f"freeze '{pattern}' chooses no parameter of the network. It has {shown}; * stands for any text, as in "
                "'backbone.*'."
            )
    chosen = tuple(name for name in names if _matches(name, patterns))
    if chosen and len(chosen) == len(names):
        raise UserError(f"freeze '{'|'.join(patterns)}' leaves no parameter to train: choose fewer.")
    return chosen


@contextmanager
def frozen_parts(model: nn.Module, patterns: Sequence[str]) -> Iterator[None]:
    """Parameters of these names without gradient, and their batch norms in eval mode; both are restored afterwards.

    The statistics of a batch norm are fixed where its running mean has a name that a pattern chooses.

    Args:
        model: changed in place.
        patterns: as for ``frozen_names``.

    Raises:
        UserError: as ``frozen_names`` does.
    """
    names = frozenset(frozen_names(model, patterns))
    parameters = [p for name, p in model.named_parameters() if name in names and p.requires_grad]
    norms = [
        module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.training
        if _matches(f"{name}.running_mean".lstrip("."), patterns)
    ]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for norm in norms:
            norm.training = False
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for norm in norms:
            norm.training = True


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
