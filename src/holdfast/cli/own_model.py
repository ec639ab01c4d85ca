"""A network of the user's own: its options, declared once for the commands that take one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import wraps
from typing import Annotated, Any, get_type_hints

from . import options as o
from .options import option

READING = ("image_column", "label_column", "convert", "resize", "skip_corrupt")


@dataclass(frozen=True)
class OwnModel:
    """What the options of a user's own network and data say, in the order of --help. Each is empty where not given."""

    data: Annotated[
        str,
        option(
            "Its data set: a name, a parquet file or folder, or an image folder. Without a test split, all of it is "
            "evaluated.",
            rich_help_panel=o.OWN_MODEL,
        ),
    ] = ""
    weights: Annotated[
        str, option("A .safetensors file, or a .pt file (only its tensors are read).", rich_help_panel=o.OWN_MODEL)
    ] = ""
    input_range: Annotated[
        str,
        option("Range of the pixels that it expects: 0,1 or 0,255 or -1,1. Default: 0,1.", rich_help_panel=o.OWN_MODEL),
    ] = ""
    mean: Annotated[
        str,
        option(
            "Mean to subtract after rescaling to --input-range: one number, or one per channel. Default: 0.",
            rich_help_panel=o.OWN_MODEL,
        ),
    ] = ""
    std: Annotated[
        str,
        option(
            "Standard deviation to divide by after subtracting --mean: one number, or one per channel. Default: 1.",
            rich_help_panel=o.OWN_MODEL,
        ),
    ] = ""
    input_layout: Annotated[
        str,
        option(
            "Layout of its images: nchw, nhwc, flat (channel by channel) or flat-nhwc (pixel by pixel). Default: what "
            "the input shape of a .onnx or .pt2 file leaves, else nchw.",
            rich_help_panel=o.OWN_MODEL,
        ),
    ] = ""
    loss: Annotated[
        str,
        option(
            "The loss it was trained with. It decides which score the attacks maximise. Default: sce.",
            rich_help_panel=o.OWN_MODEL,
        ),
    ] = ""
    output: Annotated[
        str,
        option(
            "Which of several outputs are the logits: a name, or a number from 0. Default: .logits, or the only "
            "possible one.",
            rich_help_panel=o.OWN_MODEL,
        ),
    ] = ""
    classes: Annotated[
        str,
        option(
            "Its class names in the order of its logits, comma-separated or one a line in a text file, where they are "
            "not the data's classes in alphabetical order.",
            rich_help_panel=o.OWN_MODEL,
        ),
    ] = ""
    image_column: o.ImageColumn = ""
    label_column: o.LabelColumn = ""
    convert: o.Convert = ""
    resize: o.Resize = 0
    skip_corrupt: o.SkipCorrupt = False

    def given(self) -> dict[str, Any]:
        """The options that are not empty."""
        return {name: value for name, value in asdict(self).items() if value}

    def reading(self) -> dict[str, Any]:
        """Those of them that say how files are read, as for ``data.load``."""
        return {name: value for name, value in self.given().items() if name in READING}


def takes_own_model(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the fields of OwnModel as options, in the place of its parameter ``own_model``.

    typer reads names, types and defaults from the signature. So the signature of what is returned has the options, and
    the command gets them as one OwnModel.
    """
    hints = get_type_hints(OwnModel, include_extras=True)
    options = [
        inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=hints[one.name])
        for one in fields(OwnModel)
    ]
    signature = inspect.signature(command, eval_str=True)
    named = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in signature.parameters.values()]
    place = [one.name for one in named].index("own_model")
    parameters = [*named[:place], *options, *named[place + 1 :]]

    @wraps(command)
    def with_options(**given: Any) -> None:
        own_model = OwnModel(**{one.name: given.pop(one.name) for one in options})
        command(own_model=own_model, **given)

    with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {one.name: one.annotation for one in parameters}
    return with_options
