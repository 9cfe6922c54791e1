"""Forward-mode derivatives of layers whose weights do not move: one product, not two.

The forward rule of a linear layer is dx W + x dW. If W does not move, torch still multiplies x by
a matrix of zeros: a derivative then costs three products per layer instead of two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.overrides import TorchFunctionMode

__all__ = ["StillWeights"]

LINEAR = frozenset(
    {
        F.linear, F.conv1d, F.conv2d, F.conv3d,
        F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    }
)  # fmt: skip
"""f(x, weight, bias, ...), linear in x but for the bias."""


class StillWeights(TorchFunctionMode):
    """Inside, tangents pass linear layers whose weight and bias have none by one product."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation."""
        named = dict(kwargs or {})
        if func not in LINEAR or len(args) < 2:
            return func(*args, **named)
        x, weight, *rest = args
        bias = rest[0] if rest else named.get("bias")
        still = all(_parts(t)[1] is None for t in (weight, bias) if t is not None)
        primal, tangent = _parts(x)
        if tangent is None or not still:
            return func(*args, **named)
        others = (None, *rest[1:]) if rest else ()
        moved: Tensor = func(
            tangent, weight, *others, **(named | dict.fromkeys({"bias"} & {*named}))
        )
        dual: Tensor = make_dual(  # type: ignore[no-untyped-call]
            func(primal, weight, *rest, **named), moved
        )
        return dual


def _parts(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A tensor and its tangent."""
    found = unpack_dual(x)  # type: ignore[no-untyped-call]
    return found.primal, found.tangent
