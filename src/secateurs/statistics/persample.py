"""Per-sample gradients of single weights from one backward pass of a whole batch.

The gradient of one sample is a product of what enters a layer and of the gradient of what leaves
it. Hooks keep the first during the forward pass and meet the second during the backward pass; no
weight gradient is computed by autograd, so that a pass costs the forward, the input gradients and
one product per layer. With `each`, what a layer kept is gone as soon as it has been used.

What hooks cannot see exactly is found by a probe that compares two single samples with autograd;
`vmapped` gives the same gradients for these, a few samples at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from secateurs.batches import batch_size, checked_loss, model_device, preserve
from secateurs.errors import ConfigError, ScoringError, choose
from secateurs.statistics.persample_calls import Run, forward_hook, join, never_used, plainly
from secateurs.statistics.persample_layers import Layer, layer_of, obstacle, squares_of
from secateurs.statistics.persample_probe import (
    Layout,
    difference,
    find_layouts,
    mixes,
    only,
    plain_gradients,
)
from secateurs.statistics.units import one_sample
from secateurs.types import Batch, LossFn

__all__ = ["PerSample"]

CHUNK_BYTES = 2**26


class PerSample:
    """Per-sample gradients of parameters from one backward pass of a whole batch.

    g_i is the gradient of the loss of sample i alone; the loss of a batch is the mean over its
    samples. Call `probe` on a real batch first: only `covered` names have results.

    Args:
        model: never changed; hooks are there only inside `running`.
        names: parameters, as in `model.named_parameters(remove_duplicate=False)`.

    Raises:
        ConfigError: the model has no such parameter.

    Example:
        >>> model = nn.Linear(2, 1, bias=False).requires_grad_(False)
        >>> batch = torch.tensor([[1.0, 0.0], [3.0, 1.0]]), torch.zeros(2)
        >>> def total(outputs, _):
        ...     return outputs.sum(1).mean()  # each g_i is the input of the sample
        >>> samples = PerSample(model, ["weight"])
        >>> samples.probe(batch, total)
        {}
        >>> with samples.running(2):
        ...     loss = total(model(batch[0]), batch[1])
        ...     _ = torch.autograd.grad(loss, samples.leaves, allow_unused=True)
        >>> samples.squares("weight")
        tensor([[10.,  1.]])
        >>> torch.cat(list(samples.chunks("weight"))).tolist()
        [[[1.0, 0.0]], [[3.0, 1.0]]]
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._model = model
        self._params = dict(model.named_parameters(remove_duplicate=False))
        for name in names:
            choose(name, self._params, "parameter")
        self._names = tuple(dict.fromkeys(names))
        self._modules = dict(model.named_modules())
        self._owners: dict[int, list[tuple[str, str]]] = {}
        for path, module in self._modules.items():
            for own, parameter in module._parameters.items():
                if parameter is not None:
                    self._owners.setdefault(id(parameter), []).append((path, own))
        self.covered: tuple[str, ...] = ()
        self._layouts: dict[str, list[Layout]] = {}
        self._probed = 0
        self._run = Run(0)

    # --- the probe -------------------------------------------------------------------------------

    def probe(self, batch: Batch, loss_fn: LossFn) -> dict[str, str]:
        """Why parameters are not covered by hooks, by name; the others are covered from now on.

        The first and the last sample alone, differentiated by autograd, are compared with what the
        hooks see in the whole batch. Where the samples are in each layer's tensors (first, in
        another dimension of a linear layer, or one after the other in a flattened first
        dimension) is found from the shapes of both, and proven by that comparison.

        Args:
            batch: of more than one sample, unless all batches have one.
            loss_fn: mean over the samples.

        Raises:
            CaptureError, DataError, ScoringError: model or loss refuse the batch or a sample.
        """
        n = batch_size(batch[0])
        reasons = {name: self._static(name) for name in self._names}
        singles = {i: one_sample(batch, i, n) for i in sorted({0, n - 1})}
        rows = {
            path: self._layer(path).rows
            for name in self._names
            if not reasons[name]
            for path, _ in self._owned(name)
        }
        with preserve(self._model):
            self._layouts, refused = find_layouts(
                self._model, rows, batch, list(singles.values()), n
            )
            for name in self._names:
                found = (refused[path] for path, _ in self._owned(name) if path in refused)
                reasons[name] = reasons[name] or next(found, "")
            tried = [name for name in self._names if not reasons[name]]
            wanted = {id(self._params[name]): self._params[name] for name in tried}
            expected = {
                i: plain_gradients(self._model, single, loss_fn, wanted)
                for i, single in singles.items()
            }
            self._probed = n
            reasons |= self._compare(batch, loss_fn, tried, expected)
            if any(reasons[name] for name in tried):
                mixed = mixes(self._model, batch, loss_fn, n)
                reasons |= {name: mixed for name in tried if reasons[name] and mixed}
        self.covered = tuple(name for name in self._names if not reasons[name])
        return {name: reason for name, reason in reasons.items() if reason}

    def _owned(self, name: str) -> list[tuple[str, str]]:
        """(module path, name there) of every module that holds this parameter."""
        return self._owners[id(self._params[name])]

    def _layer(self, path: str) -> Layer:
        layer = layer_of(self._modules[path])
        assert layer is not None, path
        return layer

    def _static(self, name: str) -> str:
        """Why the kinds of its modules exclude a parameter, or an empty text."""
        found = [obstacle(self._modules[path], own) for path, own in self._owned(name)]
        return next((reason for reason in found if reason), "")

    def _compare(
        self,
        batch: Batch,
        loss_fn: LossFn,
        names: Sequence[str],
        expected: Mapping[int, Mapping[int, Tensor]],
    ) -> dict[str, str]:
        """Name -> how the hooks differ from autograd, or an empty text."""
        reasons: dict[str, str] = {}

        def each(name: str) -> None:
            key = id(self._params[name])
            flat = any(call.layout.flat for call in self._run.calls.get(key, []))
            if flat and not any(grads[key].any() for grads in expected.values()):
                reasons[name] = "no gradient reaches it, which could prove where its samples are"
            for i, grads in expected.items():
                reasons[name] = reasons.get(name) or self._differs(name, i, grads)

        self.covered = tuple(names)
        while names:
            try:
                self._once(batch, loss_fn, each)
            except Exception as error:  # the model ran without hooks, so they are the cause
                shared = [p for p, calls in self._layouts.items() if any(c.shared for c in calls)]
                reasons = {k: why for k, why in reasons.items() if k not in names}
                if not shared:
                    reasons |= dict.fromkeys(names, f"the model fails under hooks: {error}")
                    break
                for path in shared:  # its output, repeated for each sample, does not fit
                    del self._layouts[path]
                owners = {name: {p for p, _ in self._owned(name)} for name in names}
                lost = [name for name in names if owners[name] & set(shared)]
                reasons |= dict.fromkeys(lost, "its layer is called once for all samples")
                names = [name for name in names if name not in lost]
                self.covered = tuple(names)
                continue
            for name in names:
                spoiled = [path for path, _ in self._owned(name) if path in self._run.spoiled]
                if spoiled:
                    reasons[name] = f"the input of {spoiled[0]} is changed in place afterwards"
            break
        self._run = Run(0)
        return reasons

    def _once(self, batch: Batch, loss_fn: LossFn, each: Callable[[str], None]) -> None:
        n = batch_size(batch[0])
        with only(self._model, {}), torch.enable_grad(), self._hooked(n, each, probing=True):
            loss = checked_loss(self._model, batch, loss_fn, "probe")
            if loss.requires_grad:
                torch.autograd.grad(loss, self.leaves, allow_unused=True)

    def _differs(self, name: str, i: int, expected: Mapping[int, Tensor]) -> str:
        """How far sample `i` is from autograd, if that is too far."""
        key = id(self._params[name])
        want = expected[key]
        try:
            got = self._rows(key, i, i + 1)[0]
        except (RuntimeError, TypeError, IndexError) as error:
            return f"its rule fails: {error}"
        calls = self._run.known(key)
        dtypes = {want.dtype, *(call.g.dtype for call in calls if call.g is not None)}
        gap = difference(got, want, dtypes, sum(call.largest(self._run.n, i) for call in calls))
        return gap and (
            f"its gradient seen by hooks differs from autograd for sample {i}: {gap} (used outside "
            "the forward of its module, or samples mixed)"
        )

    # --- the pass --------------------------------------------------------------------------------

    @contextmanager
    def running(self, n: int, each: Callable[[str], None] | None = None) -> Iterator[None]:
        """Hook the model during the forward and the backward pass of `n` samples.

        Call `torch.autograd.grad(loss, [*leaves, ...])` or `loss.backward()` inside. Parameters
        that require gradients must be among what is differentiated.

        Args:
            n: samples of this batch; the loss is their mean.
            each: called once with each covered name when all of its gradients have arrived, in
                the backward pass; `squares` and `chunks` work for this name inside the call, and
                what its layer kept is released after it. Without it, everything is kept until
                the next run: one more copy of the activations.

        Raises:
            ConfigError: there was no probe, or only of one sample.
            ScoringError: a layer sees other shapes than in the probe; its input was changed in
                place; there was no backward pass.
        """
        if not self._probed or (self._probed == 1 < n):
            raise ConfigError(
                f"probe a batch of more than one sample before running {n} samples, got "
                f"{self._probed or 'no probe'}"
            )
        with self._hooked(n, each):
            yield

    @property
    def leaves(self) -> list[Tensor]:
        """What `torch.autograd.grad` must get, so that it reaches every layer (allow_unused)."""
        return [] if self._run.anchor is None else [self._run.anchor, *self._run.unused]

    @contextmanager
    def _hooked(
        self, n: int, each: Callable[[str], None] | None, *, probing: bool = False
    ) -> Iterator[None]:
        anchor = torch.zeros((), requires_grad=True, device=model_device(self._model))
        run = self._run = Run(n, each, anchor, open=True, probing=probing)
        keys = {id(self._params[name]) for name in self.covered}
        with ExitStack() as stack:
            stack.callback(setattr, run, "open", False)
            for name in self.covered:
                used = any(self._layouts.get(path) for path, _ in self._owned(name))
                if not used and not probing:
                    stack.enter_context(never_used(run, name, self._params[name]))
            for path, module in self._modules.items():
                mine = [
                    id(p) for p in module._parameters.values() if p is not None and id(p) in keys
                ]
                if mine:
                    layouts = self._layouts[path]
                    hook = forward_hook(run, path, self._layer(path), layouts, mine, self._deliver)
                    handle = module.register_forward_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
            yield
            self._finish(run)

    def _deliver(self, run: Run, key: int) -> None:
        """Hand a parameter over, then release what only it needed."""
        if run.each is None:
            return
        for name in self.covered:
            if id(self._params[name]) == key:
                run.each(name)
        run.done.add(key)
        for call in run.calls.get(key, []):
            call.left -= 1
            if not call.left:
                call.x = call.g = None

    def _finish(self, run: Run) -> None:
        """Parameters that no gradient reached count as zero, if there was a backward pass."""
        calls = [call for found in run.calls.values() for call in found]
        lost = next((c for c in calls if c.g is None and c.left), None)
        unused = {id(p) for p in run.unused}
        loose = [n for n, p in self._params.items() if p.requires_grad and id(p) not in unused]
        if calls and not run.arrived and self.covered:
            raise ScoringError("no gradient arrived: run the backward pass inside running()")
        if lost is not None and loose:
            raise ScoringError(
                f"{lost.path}: no gradient arrived. Freeze {loose[0]}, or differentiate with "
                "respect to every parameter that requires gradients"
            )
        for key in dict.fromkeys(id(self._params[name]) for name in self.covered):
            if key not in run.done:
                self._deliver(run, key)

    # --- results ---------------------------------------------------------------------------------

    def squares(self, name: str) -> Tensor:
        """sum_i g_i^2 over the samples of the run: shape of the parameter, float32 or float64."""
        key, run = self._ready(name), self._run
        calls = run.known(key)
        with plainly(model_device(self._model)):
            joined = join(calls, run.n)
            if joined is not None:
                own = self._own(key, calls[0].path)
                total = squares_of(calls[0].layer, calls[0].module, own, *joined, run.n)
                return total.mul_(run.n**2)
            total = self._zeros(key, 1)[0]
            for rows in self.chunks(name):
                total += rows.square_().sum(0)
            return total

    def chunks(self, name: str, max_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
        """g_i of the samples in order: (m, *shape) each, float32 or float64.

        Args:
            name: a covered parameter.
            max_bytes: largest chunk; one sample at least.
        """
        key, n = self._ready(name), self._run.n
        one = self._zeros(key, 1)
        step = max(1, min(n, max_bytes // max(one.numel() * one.element_size(), 1)))
        for low in range(0, n, step):
            yield self._rows(key, low, min(n, low + step))

    def _ready(self, name: str) -> int:
        choose(name, self.covered, "covered parameter")
        key = id(self._params[name])
        if key in self._run.done:
            raise ConfigError(f"{name}: its gradients were handed over to `each` and released")
        return key

    def _own(self, key: int, path: str) -> str:
        return next(own for p, own in self._owners[key] if p == path)

    def _zeros(self, key: int, n: int) -> Tensor:
        parameter = next(p for p in self._params.values() if id(p) == key)
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        return torch.zeros(n, *parameter.shape, dtype=wide, device=parameter.device)

    def _rows(self, key: int, low: int, high: int) -> Tensor:
        """g_i of samples [low, high), summed over the calls."""
        total: Tensor | None = None
        with plainly(model_device(self._model)):
            for call in self._run.known(key):
                x, g = call.samples(self._run.n, low, high)
                own = self._own(key, call.path)
                rows = call.layer.grads(call.module, own, x, g, high - low)
                total = rows if total is None else total + rows
            return self._zeros(key, high - low) if total is None else total * self._run.n
