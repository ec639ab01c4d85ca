"""``holdfast smooth``: certify and attack the smoothed classifier of a network."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ..user_input import read_number
from . import options as o
from .app import app, exits
from .common import best_device, print_json, say_files
from .display import Display, aside, screen
from .evaluate import default_folder, subject_of
from .options import NETWORK, option
from .output_files import own_folder
from .own_model import OwnModel, takes_own_model


@app.command(rich_help_panel="Look", epilog=exits())
@takes_own_model
def smooth(
    model: Annotated[str, typer.Argument(help=NETWORK)],
    own_model: OwnModel,
    sigma: Annotated[
        str, option("Standard deviation of the Gaussian noise, for pixels in [0, 1]. Examples: 0.25, 64/255.")
    ] = "0.25",
    radius: Annotated[
        str, option("l2 radii at which it is attacked, for pixels in [0, 1], comma-separated: 0.25,0.5.")
    ] = "0.25,0.5",
    n: Annotated[int, option("Noisy votes per sample that bound the probability of its class.", "--n")] = 10_000,
    n0: Annotated[int, option("Noisy votes per sample that select its class.", "--n0")] = 100,
    alpha: Annotated[float, option("Probability that the certificate of a sample is wrong.")] = 0.001,
    steps: Annotated[int, option("Steps of the attack.")] = 20,
    copies: Annotated[int, option("Noisy copies whose mean the attack climbs.")] = 32,
    limit: Annotated[int, option("Maximum number of test images; 0: all.")] = 100,
    seed: Annotated[int, option("Random seed of the noise. Choose it before you see a result.")] = 0,
    batch_size: Annotated[
        int | None, option("Noisy images per query. Default: by image size; halved when memory runs out.")
    ] = None,
    device: o.Device = "auto",
    out: Annotated[
        Path | None,
        option(
            "Output folder. Default: smoothing-sigmaSIGMA-RADIUS in the run folder, or out/NAME-smoothing-... for your "
            "own model.",
            "--out",
            "-o",
        ),
    ] = None,
    run_code: o.RunCode = False,
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
) -> None:
    """Randomised smoothing: certified and attacked accuracy, under l2, of the smoothed classifier of any network.

    **holdfast smooth mymodel.py:build --weights w.safetensors --data FOLDER --sigma 0.25 --radius 0.25,0.5 --out DIR**

    The smoothed classifier answers with the class that the network predicts most often under Gaussian noise, and
    abstains where no class has a majority for sure. Certified is that classifier and not the network, for each sample
    with probability 1 - alpha. Train with noise for it: `holdfast train --augment noise:0.25`.

    Attacked is what SmoothAdv (PGD on the mean over noisy copies) leaves; a sample is broken if, by the votes at its
    adversarial example, another class is more probable than the label, with the same probability.

    Writes smoothing.json, .svg and .png. An interrupted command resumes when it is rerun.
    """
    from ..smoothing import radii_of, sentence, smooth_subject, table

    value = read_number(sigma.strip())
    if value is None:
        raise UserError(f"cannot read --sigma '{sigma}': expected a number such as 0.25 or 64/255.")
    radii = radii_of(radius)
    open_subject = subject_of(model, own_model, limit=limit, seed=seed, quiet=quiet, run_code=run_code)
    folder = out or default_folder(model, "smoothing-THREAT", f"sigma{value:g}-{radius}")
    own_folder(folder)
    with aside(as_json), Display(quiet) as display:
        subject = open_subject(device=best_device(device))
        found, files = smooth_subject(
            subject, value, radii, folder, n=n, n0=n0, alpha=alpha, steps=steps, copies=copies, limit=limit, seed=seed,
            batch_size=batch_size, progress=partial(display.progress, subject.name),
        )  # fmt: skip
    if as_json:
        print_json(files[0].read_text())
    else:
        screen.print(table(found, subject.name))
        screen.sentence(sentence(found))
        say_files([*files], quiet, as_json)
