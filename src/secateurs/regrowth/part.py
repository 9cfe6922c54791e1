"""`Regrowth`: a rule at work in a training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.errors import ConfigError, ScoringError
from secateurs.finetuning import Part, Training
from secateurs.masks import named_tensors
from secateurs.masks.erasing import is_sharded
from secateurs.masks.sets import plain_names
from secateurs.masks.states import parameters_of
from secateurs.regrowth.config import Regrow
from secateurs.regrowth.history import Update
from secateurs.regrowth.rules import RULES, How, Seen, centre

__all__ = ["Regrowth", "tensors_of"]

Masks = dict[str, Tensor]


class Regrowth(Part):
    """Moves the masks that are held by the rule of a `Regrow`: `finetune(parts=[Regrowth(...)])`.

    Masks of parameters that the optimizer trains move, entry by entry; give masks of single
    weights, since entries of a removed channel would come back one by one. They move after steps
    `every`, 2 x `every`, ... before until x (steps of the training); then they are frozen. What is
    grown starts at zero, in weight and optimizer state ("dns" and "dpf": where it stands).

    "rigl" uses the gradient of the whole step, and its update takes the place of that step, as in
    the paper: no weight is trained, gradients are None from there on. Put it last among the parts.
    "set" updates after a step. With "dns" and "dpf", until masks are frozen, removed weights live
    beside the model and get the gradient of the masked model; gradients and optimizer state are
    dense, so clipping sees the dense gradient, and the model itself is masked whenever a forward
    pass runs. Cuts made meanwhile (`HeldMasks.grow`, `finetune(recut=)`) are respected: the number
    kept is the one that is held.

    To go on after an interruption: `load` after `start`, then give the model and the optimizer back
    what they had.

    Args:
        config: the rule.
        seed: of random growth.
        dense: name -> weights from before the cut, for "dns" and "dpf": removed weights go on from
            there; None = from zero. Names that do not move are ignored.

    Raises:
        ConfigError: `dense` without a rule that uses it. From `start`: nothing can move, `dense`
            does not fit, or no update falls within the training.
        ScoringError: a gradient or weight that decides is not finite; names tensor and step.
        BudgetError: "dns" with `spread` would empty a tensor.

    Example:
        >>> from secateurs.finetuning import Finetune, finetune
        >>> _ = torch.manual_seed(0)
        >>> layer = torch.nn.Linear(4, 2)
        >>> data = [(torch.randn(8, 4), torch.randn(8, 2))]
        >>> mask = {"weight": torch.tensor([[True, False, False, True]] * 2)}
        >>> part = Regrowth(Regrow("set", every=5, fraction=0.5, curve="constant"))
        >>> loss = torch.nn.functional.mse_loss
        >>> _ = finetune(layer, data, loss, Finetune(epochs=20), masks=mask, parts=[part])
        >>> [(update.steps, update.n_kept) for update in part.history]
        [(5, 4), (10, 4)]
    """

    def __init__(
        self, config: Regrow, seed: int = 0, *, dense: Mapping[str, Tensor] | None = None
    ) -> None:
        self.config, self._rule = config, RULES[config.rule]
        if dense is not None and not self._rule.dense:
            raise ConfigError(f"dense= has no effect on rule={config.rule!r}: leave it away")
        self._given = dense
        self._generator = torch.Generator().manual_seed(seed)
        self._updates: list[Update] = []
        self._training: Training | None = None
        self._moving: dict[str, _Moving] = {}
        self._first: Masks = {}
        self._dense: Masks = {}
        self._centres: dict[str, float] = {}
        self._still: dict[str, str] = {}
        self._end = 0
        self._steps = 0

    @property
    def history(self) -> tuple[Update, ...]:
        """The updates so far."""
        return tuple(self._updates)

    @property
    def masks(self) -> Masks:
        """The masks that are held now, or were held last: copies."""
        return self._now.held.masks

    @property
    def still(self) -> dict[str, str]:
        """Name of a mask that does not move -> why."""
        return dict(self._still)

    @property
    def steps(self) -> int:
        """Optimizer steps seen so far."""
        return self._steps

    # -- the part ----------------------------------------------------------------------------------

    def start(self, training: Training) -> None:
        """Take up the masks that are held."""
        if self._training is not None:
            raise ConfigError("a Regrowth takes part in one training: make another for the next")
        self._training = training
        self._end = self._last_step(training.n_steps)
        self._moving, self._still = _movable(training)
        if not self._moving:
            why = "; ".join(f"{name}: {reason}" for name, reason in self._still.items())
            raise ConfigError(f"no mask can move ({why or 'there are no masks'})")
        self._first = self._held()
        if self._rule.dense:
            self._dense = self._start_dense()
            if self.config.spread is not None:
                spread = self.config.spread
                self._centres = {n: centre(w, spread) for n, w in self._dense.items()}
            training.held.pause()

    def begin(self, steps: int) -> None:
        """Let the gradients through that the rule needs."""
        self._steps = steps
        if self.config.rule == "rigl" and self._due(steps):
            self._now.held.pause()

    def gradients(self, steps: int) -> None:
        """The update of "rigl", in place of the step; dense weights for the step of the others."""
        if self._dense:
            for name, mask in self._held().items():
                with torch.no_grad():
                    tensor = self._moving[name].tensor
                    tensor.copy_(torch.where(mask, tensor, self._dense[name]))
        elif self.config.rule == "rigl" and self._due(steps):
            self._move(steps)
            self._now.held.resume()
            for group in self._now.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def stepped(self, steps: int) -> None:
        """The update of the other rules."""
        self._steps = steps
        for name, dense in self._dense.items():
            dense.copy_(self._moving[name].tensor.detach())
        if self._due(steps) and self.config.rule != "rigl":
            self._move(steps)
        if self._dense:
            self._write_masked()
            if steps >= self._end:
                self._freeze()

    def state(self) -> dict[str, Any]:
        """Masks, dense weights, thresholds, random state and history."""
        saved: dict[str, Any] = {
            "rule": self.config.rule,
            "steps": self._steps,
            "generator": self._generator.get_state(),
            "centres": dict(self._centres),
            "history": [update.plain() for update in self._updates],
        }
        for kind, tensors in (
            ("mask", self.masks),
            ("first", self._first),
            ("dense", self._dense),
        ):
            saved |= {f"{kind}/{name}": tensor.clone() for name, tensor in tensors.items()}
        return saved

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave; after `start`, before the optimizer takes back its own.

        State that an optimizer loads is masked at once, so the right masks must be there.

        Raises:
            ConfigError: the state belongs to another rule or to masks of other tensors.
        """
        kinds: dict[str, Masks] = {"mask": {}, "first": {}, "dense": {}}
        for key, value in state.items():
            kind, slash, name = key.partition("/")
            if slash:
                kinds[kind][name] = value.clone()
        if state["rule"] != self.config.rule:
            raise ConfigError(
                f"the state is of rule={state['rule']!r}, this is {self.config.rule!r}: go on with "
                "the rule that was begun"
            )
        for kind, names in (("mask", self.masks), ("first", self._moving)):
            if kinds[kind].keys() != names.keys():
                raise ConfigError(
                    f"the state has masks of {', '.join(sorted(kinds[kind]))}, here "
                    f"{'move' if kind == 'first' else 'are held'} those of "
                    f"{', '.join(sorted(names))}: start with the same model and masks"
                )
        self._steps = state["steps"]
        self._generator.set_state(state["generator"])
        self._centres = dict(state["centres"])
        self._updates = [Update(*row) for row in state["history"]]
        self._first = _like(kinds["first"], self._moving)
        self._dense = _like(kinds["dense"], self._moving)
        self._now.held.replace(kinds["mask"])
        if self._dense:
            self._now.held.pause()
        else:
            self._now.held.resume()
        self.begin(self._steps)

    # -- inside ------------------------------------------------------------------------------------

    @property
    def _now(self) -> Training:
        if self._training is None:
            raise ConfigError("Regrowth has not started: give it to finetune, or use regrow_masks")
        return self._training

    def _last_step(self, n_steps: int | None) -> int:
        """The step from which masks are frozen."""
        if n_steps is None:
            raise ConfigError(
                "Regrow(until=) is a part of the training, and nobody knows its number of steps: "
                "give steps= instead of epochs="
            )
        end = math.ceil(self.config.until * n_steps - 1e-9)
        if self.config.every >= end:
            raise ConfigError(
                f"Regrow(every={self.config.every}, until={self.config.until:g}): no update falls "
                f"within {n_steps} steps, masks move before step {end}. Give a smaller every"
            )
        return end

    def _due(self, steps: int) -> bool:
        return 0 < steps < self._end and steps % self.config.every == 0

    def _held(self) -> Masks:
        """The mask of each tensor that moves: what all of its names keep."""
        held = self._now.held.masks
        found = {}
        for name, moving in self._moving.items():
            masks = [held[other].to(moving.tensor.device) for other in moving.names]
            found[name] = torch.stack(masks).all(0) if len(masks) > 1 else masks[0]
        return found

    def _start_dense(self) -> Masks:
        """Dense weights: kept ones as they are, removed ones as given."""
        dense, problems = {}, []
        for name, mask in self._first.items():
            tensor = self._moving[name].tensor.detach()
            given = None if self._given is None else self._given.get(name)
            if self._given is None:
                given = torch.zeros_like(tensor)
            if given is None or given.shape != tensor.shape:
                got = "nothing" if given is None else f"{tuple(given.shape)}"
                problems.append(f"{name}: {tuple(tensor.shape)} is needed, got {got}")
                continue
            dense[name] = torch.where(mask, tensor, given.to(tensor))
        if problems:
            raise ConfigError("dense weights do not fit:\n  " + "\n  ".join(problems))
        self._given = None  # large, and not needed any more
        return dense

    def _seen(self, steps: int) -> dict[str, Seen]:
        """What the rule may look at. "rigl" leaves tensors alone that got no gradient."""
        seen = {}
        for name, mask in self._held().items():
            tensor, gradient = self._moving[name].tensor, None
            weight = self._dense.get(name, tensor.detach())
            _check_finite(name, weight, "weight", steps)
            if self.config.rule == "rigl":
                if tensor.grad is None:
                    continue
                gradient = tensor.grad.to_dense() if tensor.grad.is_sparse else tensor.grad
                _check_finite(name, gradient, "gradient", steps)
            seen[name] = Seen(weight, mask, gradient, self._centres.get(name))
        return seen

    def _move(self, steps: int) -> None:
        """Ask the rule, hold what it says, write it down."""
        c = self.config
        how = How(c.share(steps / self._end), c.margin, c.scope == "global", self._generator)
        moved = self._rule.move(self._seen(steps), how)
        before = self._held()
        after = {**before, **{n: m.to(before[n].device) for n, m in moved.items()}}
        held = self._now.held.masks
        for name, mask in after.items():
            held |= dict.fromkeys(self._moving[name].names, mask)
        self._now.held.replace(held)
        self._updates.append(Update.between(steps, self._first, before, after))

    def _write_masked(self) -> None:
        """The model as the masks leave it."""
        with torch.no_grad():
            for name, mask in self._held().items():
                self._moving[name].tensor.copy_(self._dense[name].masked_fill(~mask, 0))

    def _freeze(self) -> None:
        self._dense = {}
        self._now.held.resume()


@dataclass(frozen=True, eq=False)
class _Moving:
    """A tensor whose mask moves, and every name that holds a mask of it."""

    tensor: Tensor
    names: tuple[str, ...]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name that a mask may use, with wrappers (DDP) or without."""
    tensors = named_tensors(model)
    return {plain: tensors[name] for name, plain in plain_names(model).items()} | tensors


def _movable(training: Training) -> tuple[dict[str, _Moving], dict[str, str]]:
    """Tensors whose masks can move, by their first name, and the others with the reason."""
    tensors = tensors_of(training.model)
    trained = parameters_of(training.optimizer)
    moving: dict[int, tuple[str, _Moving]] = {}
    still = {}
    for name in training.held.masks:
        tensor = tensors[name]
        if not isinstance(tensor, nn.Parameter):
            still[name] = "a buffer"
        elif not tensor.requires_grad:
            still[name] = "frozen"
        elif id(tensor) not in trained:
            still[name] = "the optimizer does not train it"
        elif is_sharded(tensor):
            still[name] = "sharded over processes, which masks that move cannot be yet"
        elif id(tensor) in moving:
            first, known = moving[id(tensor)]
            moving[id(tensor)] = first, replace(known, names=(*known.names, name))
        else:
            moving[id(tensor)] = name, _Moving(tensor, (name,))
    return dict(moving.values()), still


def _check_finite(name: str, tensor: Tensor, what: str, steps: int) -> None:
    if not torch.isfinite(tensor).all():
        raise ScoringError(f"step {steps}: the {what} of {name} that moves its mask is not finite")


def _like(tensors: Masks, moving: Mapping[str, _Moving]) -> Masks:
    return {name: tensor.to(moving[name].tensor.device) for name, tensor in tensors.items()}
