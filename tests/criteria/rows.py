"""What is special about each criterion: one row each. A criterion without a row fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["LAWS", "Law"]


@dataclass(frozen=True)
class Law:
    """What is special about a criterion.

    Attributes:
        rescaling: power p such that scaling a relu unit's producers by a and its consumers by 1/a
            scales its score by a^p; None: no such law.
        partition: whether scores are independent of the cut into batches.
        signed: whether scores may be negative.
        permutes: whether shuffling the units of a layer shuffles their scores and nothing else.
        tokens: whether models that take tokens can be scored.
        half: relative error allowed in bfloat16, of the largest score; None: not comparable.
    """

    rescaling: float | None
    partition: bool = True
    signed: bool = False
    permutes: bool = True
    tokens: bool = True
    half: float | None = 0.2


LAWS: Mapping[str, Law] = {
    "magnitude": Law(1.0),
    "l2_norm": Law(1.0),
    "gradient": Law(-1.0),
    "taylor": Law(0.0),
    "taylor_batch": Law(0.0, partition=False),
    "taylor_element": Law(0.0, partition=False),
    "directional": Law(0.0),
    "directional(of=output)": Law(0.0),
    "finite_difference": Law(0.0, signed=True),
    "finite_difference(of=output)": Law(0.0),
    "activation_mean": Law(1.0),
    "random": Law(None, permutes=False),
    "taylor_abs": Law(0.0),
    "snip": Law(0.0),
    "directional(order=2)": Law(0.0, signed=True),
    "path_integral": Law(0.0, signed=True),
    "path_integral(path=unit)": Law(0.0, signed=True),
    "path_integral(path=all)": Law(0.0, signed=True),
    "smoothed": Law(0.0, permutes=False),
    "movement": Law(None, partition=False, signed=True),
    "gradient_window": Law(None, partition=False),
    "gradient_ema": Law(None, partition=False),
    "gradient_ema(of=movement)": Law(None, partition=False, signed=True),
    "entropy": Law(0.0, half=None),  # bins have edges
    "entropy(estimator=gaussian)": Law(None, signed=True),
    "mutual_information": Law(0.0, half=None),
    "information_next": Law(0.0),
    "redundancy": Law(0.0),
    "conditional_entropy": Law(None, signed=True),
    "conductance": Law(0.0, tokens=False),
    "shapley": Law(0.0, signed=True, permutes=False),
    "fisher": Law(0.0),
    "fisher_batch": Law(0.0, partition=False),
    "obd": Law(0.0, signed=True, permutes=False, half=None),
    "taylor_second": Law(0.0, signed=True, permutes=False, half=None),
    "kfac": Law(0.0),
    "kfac(compensate=others)": Law(None),
    "obs": Law(None),
    "obs(gradients=batch)": Law(None, partition=False),
    "gauss_newton": Law(0.0, signed=True),
    "grasp": Law(None, signed=True),
    "grasp_abs": Law(None),
    "norm_scale": Law(1.0),
    "geometric_median": Law(1.0),
    "lamp": Law(None),
    "apoz": Law(0.0),
    "activation_variance": Law(2.0),
    "wanda": Law(1.0),
    "wanda(members=consumers)": Law(0.0),
    "hrank": Law(0.0, half=None),  # the threshold follows the type
    "chip": Law(1.0),
    "block_influence": Law(None),
    "synflow": Law(0.0),
    "path_norm": Law(0.0),
}
