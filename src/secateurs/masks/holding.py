"""Keep removed entries zero while a model trains, in everything that could bring them back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from secateurs.errors import ConfigError, SoundnessError
from secateurs.masks.entries import Entry, find_tensors, prepare, removed_by_id
from secateurs.masks.erasing import is_sharded, local
from secateurs.masks.gradients import (
    GradientMask,
    collect,
    collect_sharded,
    hook_after_accumulation,
)
from secateurs.masks.sets import Masks, named_tensors, validate
from secateurs.masks.states import by_entry, flat_histories, followed, parameters_of

__all__ = ["HeldMasks", "hold_masks"]


@contextmanager
def hold_masks(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    masks: Masks,
    *,
    averaged: nn.Module | Sequence[nn.Module] = (),
    check_every: int | None = None,
) -> Iterator[HeldMasks]:
    """Keep removed entries exactly zero while the model trains.

    On entry: masks are applied, gradients that exist are masked, and optimizer state of the
    parameter's shape (momentum, Adam moments, ...) is zeroed where removed. Inside: a gradient is
    masked as soon as it is accumulated, so clipping sees only what is kept; after each optimizer
    step weights, buffers and state are zeroed again, so weight decay and momentum cannot move them.
    At exit, also after an exception: masks are applied once more and every hook is removed.

    To cut more while training, call `grow` of the value of the `with` statement; `replace` also
    gives entries back: see `HeldMasks`.

    Removed entries are overwritten, never multiplied: a NaN in them does not survive. Inside the
    context `state_dict` keys, `copy.deepcopy(model)`, `torch.save` and `torch.compile` work as
    without it; a deep copy is a plain model whose masks nobody holds. It costs one integer copy of
    what is masked.

    State that is loaded inside is masked: an optimizer's at once, the model's after the next step
    at the latest, and `check_every` names what was not zero. A gradient that is written by hand is
    not masked, only its effect on removed entries is.

    Args:
        model: trained in place. Frozen parameters may be masked too. Of a wrapped model (DDP,
            torch.compile) give the names of the plain one; shard it (FSDP2) before.
        optimizer: one or several whose steps are followed; None when a caller updates the weights
            otherwise, then gradients are masked and weights only at entry and exit. Parameters
            that they do not hold are fine. State shaped unlike its parameter (factored moments) is
            left alone; L-BFGS starts its history anew if that knows entries that are removed.
        masks: tensor name -> bool tensor of the same shape, True = keep. Copied: later changes to
            these tensors have no effect.
        averaged: models of the same names that follow this one (EMA, SWA; an `AveragedModel`).
            Zeroed with it. Update them after the step, or anywhere between two steps: an average of
            zeros is zero.
        check_every: look at the start and the end of the first and then of every n-th step whether
            removed entries of parameters, optimizer state and averages are still zero. In between,
            parameters that were written to in place are looked at too (autograd counts such writes,
            but not those to `.data`).

    Raises:
        ConfigError: masks do not fit (as `apply_masks_`), an optimizer holds no parameter of the
            model or differentiates through its steps, an average lacks a masked tensor.
        SoundnessError: at a step, or at exit: a masked parameter is no longer the tensor that was
            there on entry; or the check found a leak. The first parameter is named.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        >>> with hold_masks(layer, sgd, {"weight": torch.tensor([[True, False]])}):
        ...     layer(torch.ones(3, 2)).sum().backward()
        ...     sgd.step()
        >>> layer.weight[0, 1].item()
        0.0
    """
    if check_every is not None and check_every < 1:
        raise ConfigError(f"check_every counts steps, at least 1; got {check_every}")
    optimizers = followed(model, optimizer)
    averages = (averaged,) if isinstance(averaged, nn.Module) else tuple(averaged)
    held = HeldMasks(model, optimizers, averages, check_every)
    entries = held._prepared(masks)
    with ExitStack() as hooks:
        hooks.callback(held._release)
        for one in optimizers:
            for handle in (
                one.register_step_pre_hook(held._before_step),
                one.register_step_post_hook(held._after_step),
                one.register_load_state_dict_post_hook(held._after_load),
            ):
                hooks.callback(handle.remove)
        held._hold(entries, masks)
        try:
            yield held
        finally:
            held._paused = False
            held._erase([entry for entry in held._entries if entry.tensor.shape == entry.shape])
        find_tensors(model, held._entries)


class HeldMasks:
    """What `hold_masks` yields: the masks that are held now.

    Example:
        >>> import torch
        >>> layer = nn.Linear(3, 1, bias=False)
        >>> with hold_masks(layer, None, {"weight": torch.tensor([[True, True, False]])}) as held:
        ...     held.grow({"weight": torch.tensor([[True, False, False]])})
        >>> (layer.weight != 0).tolist()
        [[True, False, False]]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: tuple[Optimizer, ...],
        averages: tuple[nn.Module, ...],
        check_every: int | None,
    ) -> None:
        self._model, self._optimizers, self._averages = model, optimizers, averages
        self._histories = flat_histories(optimizers)
        self._check_every = check_every
        self._steps = {id(one): 0 for one in optimizers}
        self._entries: list[Entry] = []
        self._masks: dict[str, Tensor] = {}
        self._paused = False
        self._hooks = ExitStack()

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks that are held now, True = keep: copies, under the names that were given."""
        return {name: mask.clone() for name, mask in self._masks.items()}

    def grow(self, masks: Masks) -> None:
        """Hold masks that remove more, from now on.

        Newly removed entries of weights, buffers, averages and optimizer state are zero at once;
        the rest of the state stays as it is. Best called between two optimizer steps.

        Raises:
            ConfigError: masks do not fit, or keep an entry that is removed already. Nothing is
                changed then.
        """
        entries = self._prepared(masks)
        now = removed_by_id(entries)
        for old in self._entries:
            removed = now.get(id(old.tensor))
            back = old.eraser.removed if removed is None else old.eraser.removed & ~removed
            if back.any():
                raise ConfigError(
                    f"masks may only grow: {old.name} {tuple(old.shape)} would get "
                    f"{int(back.sum())} removed entries back. `replace` gives entries back"
                )
        self._hold(entries, masks)

    def replace(self, masks: Masks) -> None:
        """Hold other masks from now on; they may give entries back.

        What is given back starts at zero in weight, average and optimizer state, where it is
        already, and receives gradients from the next backward pass on. What is newly removed is
        zero at once, as in `grow`. L-BFGS starts its history anew. Best called between two
        optimizer steps, with gradients cleared.

        Raises:
            ConfigError: masks do not fit. Nothing is changed then.

        Example:
            >>> import torch
            >>> layer = nn.Linear(2, 1, bias=False)
            >>> with hold_masks(layer, None, {"weight": torch.tensor([[True, False]])}) as held:
            ...     held.replace({"weight": torch.tensor([[False, True]])})
            ...     layer(torch.ones(1, 2)).sum().backward()
            >>> layer.weight.tolist(), layer.weight.grad.tolist()
            ([[0.0, 0.0]], [[0.0, 1.0]])
        """
        entries = self._prepared(masks)
        for history in self._histories:
            history.forget()
        self._hold(entries, masks)

    @contextmanager
    def dense_gradients(self) -> Iterator[Mapping[str, Tensor]]:
        """Collect the whole gradient of masked parameters, removed entries included.

        The value is a mapping from the names of the masks to gradients of the parameter's shape,
        filled by each backward pass inside and summed over them. `.grad` stays masked, and clearing
        it does not clear the sum. Parameters that no gradient has reached are not in it.

        Gradients are those that arrive: under a gradient scaler they are scaled, and under DDP they
        are those of this process. To undo that is up to the caller. Of sharded parameters (FSDP2)
        the mean over processes arrives; there kept entries are those of `.grad` after the last
        backward pass.

        Example:
            >>> import torch
            >>> layer = nn.Linear(2, 1, bias=False)
            >>> with hold_masks(layer, None, {"weight": torch.tensor([[True, False]])}) as held:
            ...     with held.dense_gradients() as dense:
            ...         layer(torch.ones(1, 2)).sum().backward()
            >>> dense["weight"].tolist(), layer.weight.grad.tolist()
            ([[1.0, 1.0]], [[1.0, 0.0]])
        """
        tensors, names = named_tensors(self._model), dict[int, list[str]]()
        full = validate(self._model, self._masks)
        for name in self._masks:
            if tensors[full[name]].requires_grad:
                names.setdefault(id(tensors[full[name]]), []).append(name)
        sums: dict[str, Tensor] = {}
        removed = removed_by_id(self._entries)
        with ExitStack() as hooks:
            self._release()  # to mask after what is collected here
            for group in names.values():
                tensor = tensors[full[group[0]]]
                if is_sharded(tensor):
                    late = collect_sharded(sums, group, removed.get(id(tensor)))
                    hooks.callback(hook_after_accumulation(tensor, late))
                else:
                    register = tensor.register_hook
                    handle = register(collect(sums, group))  # type: ignore[no-untyped-call]
                    hooks.callback(handle.remove)
            self._mask_gradients()
            yield sums

    def pause(self) -> None:
        """Let gradients and optimizer steps through to removed entries, until `resume`.

        For rules that need the gradient as the optimizer would get it (`.grad` is dense then, after
        all that accumulation, scalers and DDP do to it), or that train removed weights beside the
        model: what a step moves meanwhile is the caller's business. Masks can be replaced: weights
        and averages are then zeroed, optimizer state is not. Leaving `hold_masks` resumes.

        Example:
            >>> import torch
            >>> layer = nn.Linear(2, 1, bias=False)
            >>> with hold_masks(layer, None, {"weight": torch.tensor([[True, False]])}) as held:
            ...     held.pause()
            ...     layer(torch.ones(1, 2)).sum().backward()
            >>> layer.weight.grad.tolist()
            [[1.0, 1.0]]
        """
        self._paused = True
        self._release()

    def resume(self) -> None:
        """Hold again after `pause`: gradients, weights and state are zero at once where removed."""
        if self._paused:
            self._paused = False
            self._hold(self._entries, self._masks)

    def check(self) -> None:
        """Raise unless every removed entry is exactly zero: of the model, its averages, its state.

        Raises:
            SoundnessError: names the first that leaked, as `check_masks`; or a parameter that is no
                longer the tensor that is held.
        """
        find_tensors(self._model, self._entries)
        self._check(self._entries)

    def _prepared(self, masks: Masks) -> list[Entry]:
        return prepare(self._model, masks, self._averages, self._entries)

    def _hold(self, entries: list[Entry], masks: Masks) -> None:
        """Hold these entries from now on."""
        self._release()
        self._entries = entries
        self._masks = {name: mask.clone() for name, mask in masks.items()}
        self._mask_gradients()
        self._renew_histories()
        self._erase(entries)

    def _mask_gradients(self) -> None:
        """Mask the gradients that exist, and those to come."""
        if self._paused:
            return
        for entry in self._entries:
            mask = GradientMask(entry.tensor, entry.eraser)
            if isinstance(entry.tensor, nn.Parameter) or entry.tensor.requires_grad:
                self._hooks.callback(hook_after_accumulation(entry.tensor, mask))

    def _release(self) -> None:
        """Remove the gradient hooks."""
        self._hooks.close()

    def _renew_histories(self) -> None:
        """Let L-BFGS forget what knows removed entries."""
        removed = removed_by_id(self._entries)
        for history in self._histories:
            if history.leak(removed):
                history.forget()

    def _tensors(self, entry: Entry) -> Iterator[tuple[str, Tensor]]:
        """Everything in which the removed entries of one mask must be zero, with a name for it."""
        yield entry.name, entry.tensor
        for optimizer in () if self._paused else self._optimizers:
            for key, state in by_entry(optimizer, entry.tensor):
                yield f"optimizer state {key!r} of {entry.name}", state
        for copy in entry.averages:
            yield f"the average of {entry.name}", copy

    def _erase(self, entries: list[Entry]) -> None:
        for entry in entries:
            for _, tensor in self._tensors(entry):
                entry.eraser.erase(tensor)
            if self._check_every is not None:
                entry.version = local(entry.tensor)._version

    def _check(self, entries: list[Entry]) -> None:
        for entry in entries:
            for what, tensor in self._tensors(entry):
                leaked = entry.eraser.n_leaks(tensor)
                if leaked:
                    raise SoundnessError(
                        f"removed entries must stay zero: {what} {tuple(entry.shape)} has {leaked} "
                        f"of {int(entry.eraser.removed.sum())} removed entries that are not zero. "
                        "Something else than the optimizers given to hold_masks wrote there "
                        "(another optimizer, load_state_dict, a write to .data): give it all "
                        "optimizers, and apply_masks_ to what you load"
                    )
        removed = removed_by_id(entries)
        for history in self._histories:
            key = history.leak(removed)
            if key:
                raise SoundnessError(
                    f"removed entries must stay zero: optimizer state {key!r} of L-BFGS is not "
                    "zero where entries are removed. Something else wrote there since the last step"
                )

    def _due(self, optimizer: Optimizer) -> bool:
        every = self._check_every
        return every is not None and self._steps[id(optimizer)] % every == 0

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        find_tensors(self._model, self._entries)
        if self._check_every is None or self._paused:
            return
        looked_at = [entry for entry in self._entries if isinstance(entry.tensor, nn.Parameter)]
        if not self._due(optimizer):
            looked_at = [e for e in looked_at if local(e.tensor)._version != e.version]
        self._check(looked_at)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._paused:
            self._steps[id(optimizer)] += 1
            return
        mine = parameters_of(optimizer)
        others = {i for one in self._optimizers if one is not optimizer for i in parameters_of(one)}
        # Each optimizer moves its own; what nobody steps is cheap to erase each time.
        moved = [e for e in self._entries if id(e.tensor) in mine or id(e.tensor) not in others]
        self._erase(moved)
        if self._due(optimizer):
            self._check(moved)
        self._steps[id(optimizer)] += 1

    def _after_load(self, optimizer: Optimizer) -> None:
        """State that was loaded may be of a time before the cut."""
        if self._paused:
            return
        self._renew_histories()
        for entry in self._entries:
            for _, state in by_entry(optimizer, entry.tensor):
                entry.eraser.erase(state)
