"""sCM's continuous-time consistency loss (Lu & Song 2024, arXiv 2410.11081, sections 3 and 4).

In TrigFlow's coordinates, theta = atan(t / s), x' = cos(theta) x_t, with s = sigma_data: EDM's
preconditioning is f = cos(theta) x' - s sin(theta) G(x' / s, theta) with G = -F and its boundary
at theta = 0. The probability-flow ODE is dx'/dtheta = cos(theta) z' - sin(theta) D^ with
z' = (x' - cos(theta) D^) / sin(theta) the noise that D^ implies: with D^ = x that is sCT, with a
teacher's D^ sCD, and this is the only difference. The tangent is

    g = -cos^2(theta) (s G^- - dx'/dtheta) - w cos(theta) sin(theta) (x' + s dG^-/dtheta),

dG^-/dtheta the derivative along the ODE, by forward differentiation in float32 and without
gradient; w grows from 0 to 1. The loss is |G - G^- - g / (|g| + c)|^2 / d. The paper's learned
weight over t is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from study.consistency import along
from study.factors import Continuous, Sigma


def tangent(
    net: nn.Module,
    x_t: Tensor,
    t: Tensor,
    D: Tensor,
    sigma: Sigma,
    key: Tensor | None,
    warm: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """G^- and g (B, ...), without gradient, for an estimate D (B, ...) of E[x | x_t]."""
    s, theta = sigma.data, torch.atan(t / sigma.data)
    cos, sin = along(theta.cos(), x_t), along(theta.sin(), x_t)
    x = cos * x_t
    slope = cos * (x - cos * D) / sin - sin * D  # dx'/dtheta

    def G(y: Tensor, label: Tensor) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            return -net.body(y, label, key).float().view_as(y)

    # ln(t) / 4 = ln(s tan theta) / 4 has the derivative 1 / (4 sin cos): times cos sin it is 1 / 4
    where, label = x / s, t.log() / 4
    step = cos * sin * slope / s, torch.full_like(label, 0.25)
    # of torch's attention kernels only the plain one has a forward derivative
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        target, rise = torch.func.jvp(G, (where, label), step)
    g = -cos.square() * (s * target - slope) - warm * (cos * sin * x + s * rise)
    return target, g


def losses(
    objective: Continuous,
    net: nn.Module,
    F: Tensor,
    x_t: Tensor,
    t: Tensor,
    D: Tensor,
    sigma: Sigma,
    key: Tensor | None,
    progress: Tensor | float,
) -> Tensor:
    """The loss of each row (B,); F (B, ...) is the student's output at (x_t, t), with gradient."""
    share = objective.warm_up
    warm = torch.as_tensor(progress / share).clamp(max=1).to(x_t) if share else 1.0
    _, g = tangent(net, x_t, t, D, sigma, key, warm)
    norm = g.flatten(1).norm(dim=1)
    g = g / along(norm + objective.c, g)
    # G^- is this very output: with the tangent's, what half precision rounds would be learned away
    return (F.detach() - F - g).square().flatten(1).mean(1)
