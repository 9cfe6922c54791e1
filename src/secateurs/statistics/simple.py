"""Statistics that need no data: the weights themselves, and noise."""

from __future__ import annotations

from torch import Tensor, nn

from secateurs.statistics.collector import Collector, register_statistic
from secateurs.statistics.units import Parameters, noise
from secateurs.types import Target

__all__ = ["Noise", "Weight"]


class Weight(Collector):
    """The parameter itself."""

    def element(self, name: str) -> Tensor:
        """The parameter, as it is."""
        return self.setting.params[name].detach()


class Noise(Collector):
    """Uniform noise that depends on the seeds and the target's name, on nothing else."""

    @classmethod
    def obstacle(cls, model: nn.Module, params: Parameters, target: Target, members: str) -> str:
        """Nothing: noise can be had for everything."""
        return ""

    def unit(self, target: Target) -> Tensor:
        """(n_units,) noise in [0, 1)."""
        return noise(target, f"{self.setting.seed}/{self.request.options.get('seed', 0)}")


register_statistic("weight", Weight)
register_statistic("noise", Noise)
