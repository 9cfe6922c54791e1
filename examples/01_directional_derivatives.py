"""What is a neuron worth, and which cheap number says so?

Removing a neuron moves its weights from theta to theta + v, where v is minus its own weights. The
change of the loss, L(theta + v) - L(theta), is the exact answer, and costs one forward pass for
each neuron. Its cheap relative is the directional derivative <dL/dtheta, v>: how fast the loss
changes when the neuron only starts to go. One backward pass gives it for all neurons.

You will see, for every hidden neuron of a network that reads handwritten digits:

1. the difference quotient (L(theta + t v) - L(theta)) / t run into the derivative as t shrinks, and
   forward-mode differentiation (`torch.func.jvp`) give the same number without any t;
2. how well each cheap measure ranks the neurons as the exact removal does, on samples that the
   network was trained on and on samples that it has not seen;
3. the version that needs no labels: how much the *output* moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import functional_call, jvp

import secateurs as sc
from secateurs.criteria import Criterion, get_criterion
from secateurs.scoring import score
from secateurs.tasks import dense_checkpoint, get_task
from secateurs.types import Batch, Graph, Scores

STEPS = (1.0, 0.1, 0.01, 0.001)
CHEAP = ("directional", "taylor", "gradient", "magnitude", "l2_norm", "random")
DERIVATIVE = "directional(finish=none)"  # with its sign: below zero, removal would help
NEEDS = {
    DERIVATIVE: "one backward pass",
    "directional": "one backward pass, its size only",
    "taylor": "one backward pass, squared per sample",
    "gradient": "one backward pass, sum of |dL/dw|",
    "magnitude": "the weights only: sum of |w|",
    "l2_norm": "the weights only: their norm",
    "directional(of=output)": "a forward-mode pass per neuron, no labels",
    "finite_difference(of=output)": "one forward pass per neuron, no labels",
    "random": "nothing: the control",
}


def all_neurons(scores: Scores) -> Tensor:
    """(n,) the scores of all hidden neurons, layer after layer."""
    return torch.cat(list(scores.values.values())).double()


def forward_mode(model: nn.Module, graph: Graph, batch: Batch) -> Tensor:
    """(n,) the derivative of the loss along v for each neuron, without a backward pass."""
    inputs, labels = batch
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(point: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, point, (inputs,)), labels)

    found = []
    for target in graph.groups("neuron"):
        for unit in range(target.n_units):
            v = {name: torch.zeros_like(w) for name, w in weights.items()}
            for member in target.members:
                if member.role == "producer":  # the neuron's row of weights, and its bias
                    row = torch.from_numpy(member.index[member.unit == unit])
                    v[member.tensor][row] = -weights[member.tensor][row]
            found.append(jvp(loss, (weights,), (v,))[1])
    return torch.stack(found)


def measured(
    model: nn.Module, graph: Graph, batch: Batch, criteria: Sequence[Criterion]
) -> dict[str, Tensor]:
    """(n,) values of every criterion, all from one call."""
    loss_fn = nn.functional.cross_entropy
    scores = score(model, [batch], loss_fn, criterion=criteria, graph=graph)
    return {label: all_neurons(s) for label, s in scores.items()}


def as_one_batch(batches: Iterable[Batch]) -> Batch:
    """All samples in double precision, so that a small t is not lost in rounding."""
    inputs, labels = zip(*batches, strict=True)
    return torch.cat(inputs).double(), torch.cat(labels)


def main() -> None:
    torch.set_num_threads(1)
    model, data, _ = dense_checkpoint(get_task("digits-mlp"), seed=0)
    model.double()
    parts = {"training": as_one_batch(data.calibration), "unseen": as_one_batch(data.validation)}
    graph = sc.trace(model, data.example_inputs.double())

    criteria = [get_criterion("finite_difference", step=t) for t in STEPS]
    criteria += [get_criterion("directional", finish="none")]
    criteria += [get_criterion(name) for name in CHEAP]
    criteria += [get_criterion(n, of="output") for n in ("directional", "finite_difference")]
    values = {part: measured(model, graph, batch, criteria) for part, batch in parts.items()}
    exact = {part: found["finite_difference"] for part, found in values.items()}
    slope = values["unseen"][DERIVATIVE]
    console = Console(width=100)
    print(f"digits-mlp, {len(slope)} hidden neurons, one network\n")

    table = Table("1. slope of the loss, unseen samples", "largest distance from it", box=None)
    for t, label in zip(STEPS, values["unseen"], strict=False):
        error = (values["unseen"][label] - slope).abs().max().item()
        table.add_row(f"difference quotient, t = {t:g}{' (removal)' * (t == 1)}", f"{error:.1e}")
    by_jvp = (forward_mode(model, graph, parts["unseen"]) - slope).abs().max().item()
    table.add_row("torch.func.jvp", f"{by_jvp:.1e}")
    console.print(table)
    print(f"The slope itself is {slope.abs().median().item():.1e} for the median neuron.\n")

    table = Table("2. rank correlation with removal", *parts, "needs", box=None)
    found = {
        label: [float(spearmanr(values[p][label], exact[p]).statistic) for p in parts]
        for label in NEEDS
    }
    for label, (seen, unseen) in found.items():
        table.add_row(label, f"{seen:+.2f}", f"{unseen:+.2f}", NEEDS[label])
    console.print(table)
    for i, part in enumerate(parts):
        best = max(found, key=lambda label: found[label][i])
        helps = int((exact[part] < 0).sum())
        print(f"Best on {part} samples: {best}, {found[best][i]:+.2f}. There, removing the neuron")
        print(f"lowers the loss for {helps} of the {len(slope)}.")
    without_labels = [values["unseen"][name] for name in NEEDS if name.endswith("(of=output)")]
    agree = float(spearmanr(*without_labels).statistic)
    print(f"3. Derivative and exact change of the output, no labels, rank alike: {agree:+.3f}.")


if __name__ == "__main__":
    main()
