"""For those who add criteria: the laws that ours obey, on small networks of every kind.

    check_criterion(criterion) -> Checked     or BrokenLaw, which names the law and the network

`secateurs.testing.nets` holds the networks; each is a few lines and runs in milliseconds.
"""

from secateurs.testing.laws import LAWS, BrokenLaw, Checked, check_criterion
from secateurs.testing.nets import NETS, Case, case

__all__ = ["LAWS", "NETS", "BrokenLaw", "Case", "Checked", "case", "check_criterion"]
