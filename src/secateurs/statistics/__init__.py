"""Statistics that criteria need, streamed over the batches so that one pass feeds many criteria.

    collector    what a collector is; `register_statistic` adds one
    sums         what it leaves behind: sums over samples, which merge exactly
    units        which members of a unit count, and sums from elements to units
    hooks        activations at sites of the model
    gates        gates on units: per-sample derivatives from one backward pass
    gradients    gradients of single weights
    activations  moments of activations: mean |a|, how often it is on, variance
    feature_maps rank and independence of feature maps
    inputs       norms of the input features of layers
    influence    how much a residual branch turns its stream
    geometry     weights compared with each other
    synaptic     the flow through weights, without data
    samples      one number for each sample and unit
    information  entropy and mutual information of these numbers, by `estimators`
    ablation     removing units in runs of the model, many in one run
    attribution  what goes through a unit or is owed to it, by Captum
    curvature    products with the Hessian: the curvature of units
    gradient_flow  how a removal changes the size of the gradient
    gauss_newton curvature of units from the outputs, by `output_roots`
    kronecker    the Fisher of a layer as a product of two small matrices
    blocks       the Fisher in blocks of weights, and the update that belongs to it
    removals     what removing each unit does: differences
    slopes       derivatives towards the removal: of outputs, and of second order
    paths        derivatives along a removal, and around a point
    window       what a window of training steps tells
    jobs         from statistics to scores
    stream       the pass itself

What is made here lives for one pass; nothing here changes the model.
"""

from __future__ import annotations

# Importing a module registers its statistics.
from secateurs.statistics import (
    activations,
    attribution,
    blocks,
    curvature,
    feature_maps,
    gauss_newton,
    geometry,
    gradient_flow,
    gradients,
    influence,
    information,
    inputs,
    kronecker,
    paths,
    removals,
    samples,
    simple,
    slopes,
    synaptic,
    window,
)
from secateurs.statistics.collector import (
    COLLECTORS,
    Collector,
    Request,
    Run,
    Setting,
    register_statistic,
)
from secateurs.statistics.jobs import Job, make_job
from secateurs.statistics.stream import Pass
from secateurs.statistics.sums import Sums
from secateurs.statistics.units import Parameters, check_fits, members_of, removal_role

__all__ = [
    "COLLECTORS",
    "Collector",
    "Job",
    "Parameters",
    "Pass",
    "Request",
    "Run",
    "Setting",
    "Sums",
    "activations",
    "attribution",
    "blocks",
    "check_fits",
    "curvature",
    "gauss_newton",
    "gradient_flow",
    "feature_maps",
    "geometry",
    "gradients",
    "influence",
    "information",
    "inputs",
    "kronecker",
    "make_job",
    "members_of",
    "paths",
    "register_statistic",
    "removal_role",
    "removals",
    "samples",
    "simple",
    "slopes",
    "synaptic",
    "window",
]
