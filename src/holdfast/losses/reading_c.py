"""Reading C of I-SCE: the loss of the only public code that we know under the paper's name.

It is not a function of the negative log odds u: it changes the logits by a head of its own and takes SCE of the result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, at_least, unknown
from ..outputs import Outputs, logits_of
from .softmax import sce

MASKS = ("predicted", "true")


def reading_c_logits(z: Tensor, raised: Tensor, *, m: float = 0.1, s: float = 1.0, clip: bool = True) -> Tensor:
    """The head of reading C: logits of unit norm, one of them raised.

        t = z / ||z||_2,   out_j = t_j,   out_r = clip(s (t_r + m), -1, 1) at the raised class r

    With s = 1, m >= 0 and r = argmax z, argmax out = argmax z: the head changes no decision.

    Args:
        z: (N, K) logits.
        raised: (N,) int64, the class r of each sample.
        m: >= 0, added to its entry.
        s: > 0, factor on its entry alone.
        clip: whether that entry is clipped to [-1, 1].

    Returns:
        (N, K).

    >>> z = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    >>> reading_c_logits(z, torch.tensor([1])), reading_c_logits(z, torch.tensor([1]), m=0.5)
    (tensor([[0.6000, 0.9000]], dtype=torch.float64), tensor([[0.6000, 1.0000]], dtype=torch.float64))
    """
    t = F.normalize(z, dim=1)
    entry = s * (t.gather(1, raised[:, None]) + m)
    return t.scatter(1, raised[:, None], entry.clamp(-1.0, 1.0) if clip else entry)


def isce_c(
    out: Outputs | Tensor,
    y: Tensor,
    *,
    m: float = 0.1,
    s: float = 1.0,
    clip: bool = True,
    mask: str | bool = "predicted",
) -> Tensor:
    """Inference-softmax cross-entropy, reading C: SCE of logits of unit norm, raised at the predicted class.

        SCE(reading_c_logits(z, r), y),   r = argmax z (mask "predicted") or y (mask "true")

    For a sample that is classified correctly, and without the clip, it is reading A with s = -m on logits of unit norm:
    m lowers the loss there. For a misclassified sample it raises the winner's logit, and the loss. It is bounded: with
    K = 10, m = 0.1 and the clip, between 1.3515 and about 3.3.

    Where it fails: the loss has no gradient through the winner's entry where that is clipped (t > 1 - m). It depends on
    the direction of z alone, so a network cannot lower it by growing its logits.

    Args:
        out: Outputs or (N, K) logits.
        y: (N,) int64 labels.
        m: "inference value", >= 0.
        s: factor on the raised entry, > 0.
        clip: whether the raised entry is clipped to [-1, 1].
        mask: "predicted", as in that code: the network's own prediction is raised; or "true": the label.

    Returns:
        (N,), > 0.

    Raises:
        UserError: m or s lies outside its range, or another mask.

    Source: the public code (TensorFlow) that names the paper; we do not know that it is the authors', nor the paper's
        equation.

    >>> z, y = torch.tensor([[0.9, 0.1, 0.0]], dtype=torch.float64), torch.tensor([0])
    >>> print(f"{isce_c(z, y).item():.6f} {isce_c(z, y, m=0.0).item():.6f} {isce_c(z, y, s=2.0).item():.6f}")
    0.575890 0.578572 0.575890
    """
    mask = "true" if mask is True else mask  # as a spec is read: isce_c:mask=true
    at_least("m", m)
    at_least("s", s, above=True)
    if mask not in MASKS:
        raise unknown("mask", str(mask), MASKS)
    if not isinstance(clip, bool):
        raise UserError(f"clip must be True or False, got {clip!r}.")
    z = logits_of(out)
    z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    raised = z.argmax(1) if mask == "predicted" else y
    return sce(reading_c_logits(z, raised, m=m, s=s, clip=clip), y)
