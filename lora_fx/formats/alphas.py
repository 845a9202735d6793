"""Between a scale and the alpha that a file stores."""

from __future__ import annotations

import math


def alpha_for(scale: float, divisor: float) -> float:
    """The alpha that a reader divides back into a scale, a whole number if one does.

    Exact for every scale that was made by the same division; another may move by its last bit,
    for a division does not reach every float.

    Args:
        scale: what the update is multiplied by.
        divisor: the rank, or its square root under rsLoRA.
    """
    alpha = scale * divisor
    near = (round(alpha), alpha, math.nextafter(alpha, -math.inf), math.nextafter(alpha, math.inf))
    return min(near, key=lambda candidate: abs(candidate / divisor - scale))
