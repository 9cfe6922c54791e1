"""What the processes of a pruning run tell each other; one alone tells nobody.

Scores are those of all data, trainings follow all samples. What has no sum over processes (a
repair, a search by Fisher information, ...) is made by rank 0 and told to the others.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from secateurs.batches import check_batches, check_iterable, iterate
from secateurs.checkpoints import plain, same_data
from secateurs.criteria import get_combination
from secateurs.distributed import Group, Ranks, assert_same, is_sharded
from secateurs.distributed import plain as unwrapped
from secateurs.errors import ConfigError, DataError
from secateurs.finetuning import counted, has_unused, wrapped
from secateurs.masks import named_tensors
from secateurs.pipeline.stage import Stage
from secateurs.report.assemble import metrics_of
from secateurs.statistics.collector import COLLECTORS
from secateurs.statistics.together import shared_batches
from secateurs.types import Batch, Batches, Evaluate, Graph, LossFn, Plan

__all__ = ["ALONE", "Peers"]

T = TypeVar("T")


class Peers:
    """The processes of a run.

    Attributes:
        ranks: all of them.
        unused: whether parameters of the model get no gradient; known after `check`.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.unused = False

    @property
    def many(self) -> bool:
        """Whether there are others."""
        return self.ranks.size > 1

    @property
    def first(self) -> bool:
        """Whether this process draws, logs and writes."""
        return self.ranks.rank == 0

    @property
    def group(self) -> Group:
        """For `score` and `finetune`."""
        return self.ranks.group

    # --- before anything expensive ---------------------------------------------------------------

    def check(self, model: nn.Module, stages: Sequence[Stage]) -> None:
        """Refuse what several processes cannot do.

        Raises:
            ConfigError: so it is; names the way out.
        """
        if self.ranks.group is not None and isinstance(model, nn.Module):
            with self.ranks.agreed("prune"):
                self._refuse(model, stages)

    def _refuse(self, model: nn.Module, stages: Sequence[Stage]) -> None:
        if is_sharded(model) or unwrapped(model) is not model:
            raise ConfigError(
                "prune: give every process the plain model: it is wrapped for the training, and "
                "each process holds all weights. (For weights that do not fit into one process: "
                "score_shards and select_shards)"
            )
        if not self.many:
            return
        for stage in stages:
            if stage.ticket is not None:
                raise ConfigError(
                    "ticket= is looked for by one process: leave group= away; or use find_ticket "
                    "in one process and train the ticket by finetune(masks=ticket.masks, group=)"
                )
            if not stage.unscored:
                _check_criterion(stage)
            layers = [n for n, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm)]
            if layers and (what := _of_first(stage)):
                raise ConfigError(
                    f"{what}= is made by one process, and {layers[0]} (SyncBatchNorm) would wait "
                    "for the others: leave it away, or make the layers BatchNorm"
                )

    def same_start(self, model: nn.Module, asked: Mapping[str, Any]) -> None:
        """Make sure that all ranks begin with the same.

        Raises:
            RankError: names the first setting or weight that differs.
        """
        if self.many:
            assert_same(plain(asked), self.group, what="the settings of prune")
            assert_same(named_tensors(model), self.group, what="the weights")
            trained = {name: p.requires_grad for name, p in model.named_parameters()}
            assert_same(trained, self.group, what="requires_grad")

    def check_apart(self, batches: Batches) -> None:
        """Make sure that each rank has data of its own.

        Raises:
            ConfigError: all have the same.
        """
        if same_data(batches, self.ranks):
            raise ConfigError(
                f"all {self.ranks.size} processes have the same training data, so that every "
                "sample would count several times: give each its part, such as batches[rank::size]"
            )

    def shown(
        self, model: nn.Module, batches: Batches, loss_fn: LossFn, stages: Sequence[Stage] = ()
    ) -> Batches:
        """What all ranks check alike in place of their own batches, which are checked here.

        Args:
            stages: that read these batches for what rank 0 does for all.

        Raises:
            DataError, CaptureError, ScoringError: as `check_batches`; no rank has any; or rank 0
                has none, and a stage needs them.
        """
        if not self.many:
            return batches
        with self.ranks.agreed("reading the first batch"):
            check_iterable(batches)
        shared = shared_batches(model, batches, self.ranks)
        assert shared is not None
        with self.ranks.agreed("prune"):
            some = _any(batches)
            if some:
                check_batches(model, batches, loss_fn)
            needs = next(filter(None, map(_of_first, stages)), "")
            if needs and self.first and not some:
                raise DataError(f"{needs}= is made by the calibration data of rank 0: give it some")
        n, persistent = counted(batches, self.ranks), getattr(batches, "persistent_workers", False)
        kind = _Counted if hasattr(n, "__len__") else _Shown
        return kind(next(iter(shared)), n, persistent=self.ranks.either(persistent)[0])

    def probe(
        self, model: nn.Module, shown: Batches, loss_fn: LossFn, stages: Sequence[Stage]
    ) -> None:
        """Find out whether parameters get no gradient, if anything is to be trained."""
        trains = any(stage.finetune or stage.prepare for stage in stages)
        if self.many and trains and any(p.requires_grad for p in model.parameters()):
            self.unused = has_unused(model, shown, loss_fn, self.ranks)

    # --- on the way ------------------------------------------------------------------------------

    def to_look_at(self, model: nn.Module, batches: Batches) -> Batches:
        """Batches to describe a model by: those of this rank; if it has none, one of another."""
        shared = shared_batches(model, batches, self.ranks)
        assert shared is not None
        return batches if not self.many or _any(batches) else shared

    def metrics(self, model: nn.Module, evaluate: Evaluate | None) -> dict[str, float]:
        """The metrics of a model: measured by every rank, what rank 0 finds counts."""
        if not self.many or evaluate is None:
            return metrics_of(model, evaluate)
        with self.ranks.agreed("evaluate"):
            found = metrics_of(model, evaluate)
        return self.ranks.first(found)

    def trained(self, model: nn.Module) -> nn.Module:
        """The model as `finetune` takes it from several processes."""
        return wrapped(model, self.ranks, unused=self.unused)

    def same(self, found: Plan | nn.Module) -> None:
        """Make sure that all ranks have made the same cut, or the same smaller model.

        Raises:
            RankError: names the first mask or weight that differs.
        """
        if self.many and isinstance(found, nn.Module):
            assert_same(named_tensors(found), self.group, what="the smaller model")
        elif self.many:
            assert_same(found, self.group, what="the cut")

    def once(
        self, what: str, work: Callable[[], T], graph: Graph, model: nn.Module | None = None
    ) -> T:
        """What a function finds on rank 0, on all ranks.

        Args:
            what: is done, for an error, which is raised on all.
            work: must not wait for other ranks.
            graph: that all have: what is found may name it.
            model: whose weights and buffers it changes, for all.
        """
        if not self.many:
            return work()
        told = None
        with self.ranks.agreed(what):
            if self.first:
                told = _packed(work(), graph)
        for tensor in {} if model is None else named_tensors(model).values():
            self.ranks.copy_first_(tensor)
        found: T = _unpacked(*self.ranks.first(told or (b"", [])), graph)
        return found


ALONE = Peers(Ranks(None))
"""One process."""


def _of_first(stage: Stage) -> str:
    """What of a stage is made by rank 0 for all, from calibration data."""
    if stage.repair:
        return "repair"
    if stage.layerwise is not None:
        return "layerwise"
    if stage.allocation == "sensitivity":
        return "allocation"
    return stage.decided_by or ""


def _check_criterion(stage: Stage) -> None:
    """Refuse criteria that cannot be added up over processes, before a training comes first."""
    for part in get_combination(stage.criterion).parts:
        for need in part.needs:
            collector = COLLECTORS.get(need)
            if collector is not None and collector.not_shared:
                raise ConfigError(
                    f"{part.label} cannot be scored by a group of processes: "
                    f"{collector.not_shared}. Take another criterion, or leave group= away"
                )


def _any(batches: Batches) -> bool:
    """Whether this rank has a batch."""
    with torch.random.fork_rng():
        return next(iterate(batches, torch.device("cpu"), 1, may_be_empty=True), None) is not None


class _Shown:
    """A batch that stands for those of all ranks."""

    def __init__(self, batch: Batch, n: Any, *, persistent: bool) -> None:
        self.batch, self.n, self.persistent_workers = batch, n, persistent

    def __iter__(self) -> Iterator[Batch]:
        yield self.batch


class _Counted(_Shown):
    """One whose number is known."""

    def __len__(self) -> int:
        return len(self.n)


class _Pickler(pickle.Pickler):
    """Leaves out what all ranks have, and takes tensors aside."""

    def __init__(self, file: io.BytesIO, graph: Graph) -> None:
        super().__init__(file)
        self.known = {id(graph): "graph", id(graph.detail): "detail"}
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> Any:
        if id(obj) in self.known and obj is not None:
            return self.known[id(obj)]
        if isinstance(obj, Tensor):
            self.tensors.append(obj.detach().cpu())
            return len(self.tensors) - 1, obj.device.type
        return None


class _Unpickler(pickle.Unpickler):
    """Puts them back."""

    def __init__(self, file: io.BytesIO, graph: Graph, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self.graph, self.tensors = graph, tensors

    def persistent_load(self, pid: Any) -> Any:
        if pid == "graph":
            return self.graph
        if pid == "detail":
            return self.graph.detail
        number, device = pid
        return self.tensors[number].to(device)


def _packed(value: Any, graph: Graph) -> tuple[bytes, list[Tensor]]:
    file = io.BytesIO()
    pickler = _Pickler(file, graph)
    pickler.dump(value)
    return file.getvalue(), pickler.tensors


def _unpacked(text: bytes, tensors: Sequence[Tensor], graph: Graph) -> Any:
    return _Unpickler(io.BytesIO(text), graph, tensors).load()
