"""What the tests of holding train: one small net, every optimizer, and the textbook beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Masks = dict[str, Tensor]
Build = Callable[["Net"], list[Optimizer]]


class Net(nn.Module):
    """Table, hidden layer, output: 54 numbers in double precision."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3, sparse=sparse)
        self.hidden = nn.Linear(3, 4)
        self.out = nn.Linear(4, 3)
        self.double()

    def forward(self, rows: Tensor) -> Tensor:
        scores: Tensor = self.out(torch.tanh(self.hidden(self.table(rows))))
        return scores


def loss_of(model: nn.Module, seed: int) -> Tensor:
    """On eight samples that depend on the seed only."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.cat([torch.arange(5), torch.randint(0, 5, (3,), generator=generator)])
    labels = torch.randint(0, 3, (8,), generator=generator)
    return nn.functional.cross_entropy(model(rows), labels)


def _one(kind: Callable[..., Optimizer], **options: Any) -> Build:
    """Two groups of parameters, the second slower."""

    def build(net: Net) -> list[Optimizer]:
        slow = list(net.out.parameters())
        fast = [*net.table.parameters(), *net.hidden.parameters()]
        groups = [{"params": fast}, {"params": slow, "lr": options.get("lr", 0.01) / 2}]
        return [kind(groups, **options)]

    return build


def _lbfgs(**options: Any) -> Build:
    return lambda net: [optim.LBFGS(net.parameters(), lr=0.3, max_iter=3, **options)]


def _muon(net: Net) -> list[Optimizer]:
    matrices = [p for p in net.parameters() if p.dim() == 2]
    rest = [p for p in net.parameters() if p.dim() != 2]
    return [
        optim.Muon(matrices, lr=0.02, weight_decay=0.1),
        optim.AdamW(rest, lr=0.02, weight_decay=0.1),
    ]


def _sparse_adam(net: Net) -> list[Optimizer]:
    rest = [*net.hidden.parameters(), *net.out.parameters()]
    return [
        optim.SparseAdam(list(net.table.parameters()), lr=0.02),
        optim.SGD(rest, lr=0.1, momentum=0.9),
    ]


OPTIMIZERS: dict[str, Build] = {
    "adadelta": _one(optim.Adadelta, lr=0.5, weight_decay=0.1),
    "adadelta foreach": _one(optim.Adadelta, lr=0.5, foreach=True),
    "adafactor": _one(optim.Adafactor, lr=0.05, weight_decay=0.1),
    "adagrad": _one(optim.Adagrad, lr=0.1, initial_accumulator_value=0.1),
    "adagrad fused": _one(optim.Adagrad, lr=0.1, fused=True),
    "adam amsgrad": _one(optim.Adam, lr=0.02, amsgrad=True, weight_decay=0.1),
    "adam foreach": _one(optim.Adam, lr=0.02, foreach=True, amsgrad=True),
    "adam fused": _one(optim.Adam, lr=0.02, fused=True, maximize=True),
    "adamax": _one(optim.Adamax, lr=0.02, weight_decay=0.1),
    "adamw": _one(optim.AdamW, lr=0.02, weight_decay=0.1),
    "adamw fused": _one(optim.AdamW, lr=0.02, fused=True, amsgrad=True),
    "asgd": _one(optim.ASGD, lr=0.05, t0=2, weight_decay=0.1),
    "lbfgs": _lbfgs(),
    "lbfgs strong wolfe": _lbfgs(line_search_fn="strong_wolfe", history_size=2),
    "muon": _muon,
    "nadam": _one(optim.NAdam, lr=0.02, decoupled_weight_decay=True, weight_decay=0.1),
    "radam": _one(optim.RAdam, lr=0.02, weight_decay=0.1),
    "radam foreach": _one(optim.RAdam, lr=0.02, foreach=True),
    "rmsprop": _one(optim.RMSprop, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "rmsprop foreach": _one(optim.RMSprop, lr=0.01, momentum=0.9, foreach=True, maximize=True),
    "rprop": _one(optim.Rprop, lr=0.01),
    "sgd": _one(optim.SGD, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "sgd nesterov foreach": _one(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd fused": _one(optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "sparse adam": _sparse_adam,
}


def step_of(optimizer: Optimizer, backward: Callable[[], Tensor]) -> None:
    """One step; L-BFGS computes loss and gradients as often as it likes."""
    if not isinstance(optimizer, optim.LBFGS):
        optimizer.step()
        return

    def again() -> float:
        optimizer.zero_grad()
        return backward().item()

    optimizer.step(again)  # type: ignore[no-untyped-call]


def averages_of(model: nn.Module) -> list[AveragedModel]:
    """An exponential and an equal average."""
    decay = get_ema_multi_avg_fn(0.9)  # type: ignore[no-untyped-call]
    return [AveragedModel(model, multi_avg_fn=decay), AveragedModel(model)]


def where_kept(mask: Tensor, tensor: Tensor) -> Tensor:
    """The tensor, zero where the mask removes."""
    if tensor.is_sparse:
        tensor = tensor.coalesce()
        values = torch.where(mask[tensor.indices()[0]], tensor.values(), 0.0)
        return torch.sparse_coo_tensor(
            tensor.indices(), values, tensor.shape, check_invariants=True
        ).coalesce()
    return torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype))


def states_of(
    model: nn.Module, optimizers: list[Optimizer]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(parameter name, state key, the dict that holds the state): state shaped as its parameter."""
    for name, parameter in model.named_parameters():
        for optimizer in optimizers:
            if isinstance(optimizer, optim.LBFGS):
                continue
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    yield name, key, state


def flat_states(model: nn.Module, optimizer: Optimizer, masks: Mapping[str, Tensor]) -> Tensor:
    """What L-BFGS remembers about removed entries, all vectors in one."""
    removed = torch.cat(
        [
            ~masks.get(name, torch.ones_like(p, dtype=torch.bool)).reshape(-1)
            for name, p in model.named_parameters()
        ]
    )
    state = optimizer.state[next(model.parameters())]
    vectors = [state[k] for k in ("d", "prev_flat_grad") if isinstance(state.get(k), Tensor)]
    vectors += [*(state.get("old_dirs") or []), *(state.get("old_stps") or [])]
    return torch.cat([v[removed] for v in vectors]) if vectors else torch.zeros(0)


class Textbook:
    """Dense training in which everything is masked by hand after it happens."""

    def __init__(self, model: Net, build: Build, optimizers: list[Optimizer], masks: Masks) -> None:
        self.model, self.optimizers = copy.deepcopy((model, optimizers))
        self.build = build
        for i, other in enumerate(optimizers):
            if isinstance(other, optim.LBFGS):  # does not survive a deep copy
                self.optimizers[i] = build(self.model)[i]
                self.optimizers[i].load_state_dict(copy.deepcopy(other.state_dict()))
        self.averages = averages_of(self.model)
        self.hold(masks, anew=False)

    def hold(self, masks: Masks, anew: bool) -> None:
        """Other masks from now on; L-BFGS starts anew if asked, or if it knows what is cut."""
        self.masks = masks
        for i, optimizer in enumerate(self.optimizers):
            if isinstance(optimizer, optim.LBFGS) and (
                anew or flat_states(self.model, optimizer, masks).count_nonzero()
            ):
                lr = optimizer.param_groups[0]["lr"]
                self.optimizers[i] = self.build(self.model)[i]
                self.optimizers[i].param_groups[0]["lr"] = lr
        self._mask_gradients()
        self._mask_rest()

    def backward(self, seed: int) -> Tensor:
        loss = loss_of(self.model, seed)
        torch.autograd.backward(loss)
        self._mask_gradients()
        return loss

    def step(self, seed: int) -> None:
        for optimizer in self.optimizers:
            step_of(optimizer, lambda: self.backward(seed))
            self._mask_rest()

    def average(self) -> None:
        for average in self.averages:
            average.update_parameters(self.model)

    def _mask_gradients(self) -> None:
        for name, mask in self.masks.items():
            parameter = self.model.get_parameter(name)
            if parameter.grad is not None:
                parameter.grad = where_kept(mask, parameter.grad)

    @torch.no_grad()
    def _mask_rest(self) -> None:
        for name, mask in self.masks.items():
            for model in (self.model, *(a.module for a in self.averages)):
                parameter = model.get_parameter(name)
                parameter.copy_(where_kept(mask, parameter))
        for name, key, state in states_of(self.model, self.optimizers):
            if name in self.masks:
                state[key] = where_kept(self.masks[name], state[key])


def assert_removed_are_zero(
    model: nn.Module, optimizers: list[Optimizer], averages: list[AveragedModel], masks: Masks
) -> None:
    """In weight, gradient, state and averages; the message says where not."""
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        gradient = torch.zeros(1) if parameter.grad is None else parameter.grad.to_dense()
        assert (parameter[~mask] == 0).all(), f"weight {name}"
        assert parameter.grad is None or (gradient[~mask] == 0).all(), f"gradient {name}"
        for i, average in enumerate(averages):
            assert (average.module.get_parameter(name)[~mask] == 0).all(), f"average {i} {name}"
    for name, key, state in states_of(model, optimizers):
        if name in masks:
            assert (state[key].to_dense()[~masks[name]] == 0).all(), f"state {key} {name}"
    for optimizer in optimizers:
        if isinstance(optimizer, optim.LBFGS):
            assert not flat_states(model, optimizer, masks).count_nonzero(), "history of L-BFGS"


def assert_same(
    model: nn.Module, optimizers: list[Optimizer], averages: list[AveragedModel], book: Textbook
) -> None:
    """Weights, gradients, state and averages equal the textbook's."""
    for name, parameter in model.named_parameters():
        other = book.model.get_parameter(name)
        _assert_close(parameter, other, f"weight {name}")
        if parameter.grad is not None and other.grad is not None:
            _assert_close(parameter.grad.to_dense(), other.grad.to_dense(), f"gradient {name}")
        for mine, its in zip(averages, book.averages, strict=True):
            pair = mine.module.get_parameter(name), its.module.get_parameter(name)
            _assert_close(*pair, f"average {name}")
    states = [
        {(n, k): s[k] for n, k, s in states_of(m, o)}
        for m, o in ((model, optimizers), (book.model, book.optimizers))
    ]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        _assert_close(value.to_dense(), states[1][key].to_dense(), f"state {key}")


def _assert_close(a: Tensor, b: Tensor, what: str) -> None:
    assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), what
