"""models.build("mymodel.py:backbone"): a user's own backbone under any head, and the errors that name what is wrong."""

import textwrap

import pytest
import torch

from holdfast import models
from holdfast.errors import UserError

SHAPE = (1, 4, 4)


def write(folder, body):
    path = folder / "mine.py"
    path.write_text("import torch\nfrom torch import nn\n" + textwrap.dedent(body))
    return path


def test_it_takes_any_head(tmp_path):
    path = write(
        tmp_path,
        """
        def backbone(shape):
            import sibling
            return nn.Sequential(nn.Flatten(), nn.Linear(16, sibling.WIDTH))
        """,
    )
    (tmp_path / "sibling.py").write_text("WIDTH = 6")
    for head in ("linear", "mmc"):
        out = models.build(f"{path}:backbone", SHAPE, 3, head=head)(torch.rand(2, *SHAPE))
        assert (out.logits.shape, out.features.shape) == ((2, 3), (2, 6))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("other = 1", r"unknown name in mine\.py 'backbone'"),
        ("backbone = 3", r"mine\.py:backbone must be a function or class that takes the shape .* got an int"),
        ("backbone = nn.Flatten()", r"must be a function or class that takes the shape .* got a Flatten"),
        ("def backbone(): return nn.Flatten()", r"takes the arguments \(\), but it is called with one, the shape"),
        ("def backbone(shape): return 1 / 0", r"raised ZeroDivisionError.*line 3"),
        ("def backbone(shape): return nn.Flatten", r"must return an nn\.Module .* it returned a type"),
        ("def backbone(shape): return nn.Linear(5, 2)", r"the backbone of mine\.py:backbone raised RuntimeError"),
        ("def backbone(shape): return nn.Identity()", r"\(N, D\) features, for two images it returned shape \(2, 1, 4"),
        (
            """
            class backbone(nn.Flatten):
                def __init__(self, shape):
                    super().__init__()
                    self.features = 3
            """,
            r"has features = 3, but returned 16",
        ),
    ],
)
def test_errors_name_what_is_wrong(body, message, tmp_path):
    with pytest.raises(UserError, match=message):
        models.build(f"{write(tmp_path, body)}:backbone", SHAPE, 3)


def test_a_file_needs_a_name(tmp_path):
    with pytest.raises(UserError, match=r"alone is not enough: name what makes the backbone"):
        models.build(str(write(tmp_path, "")), SHAPE, 3)
    with pytest.raises(UserError, match="there is no file at"):
        models.build(f"{tmp_path}/gone.py:backbone", SHAPE, 3)
