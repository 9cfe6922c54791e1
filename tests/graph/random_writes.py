"""Families of random steps: writing in place, through views, into created tensors; loops."""

from __future__ import annotations

from tests.graph.random_drawer import Drawer, Refused, family


def _owned(d: Drawer, *ranks: int) -> str:
    """A value that may be written into: a copy, or one that others may have read already."""
    x = d.pick(*ranks)
    if d.chance(0.4) or not d.own(x):
        return d.let(d.one_of(f"{x}.clone()", f"F.relu({x})", f"{x} * 1"))
    return x


@family("write", 2.0)
def write(d: Drawer) -> None:
    x = _owned(d, 2, 3, 4)
    shape = d.shape(x)
    n = shape[1]
    k = d.rng.randrange(1, n) if n > 1 else 1
    y = d.like(x)
    last = shape[-1]
    j = d.rng.randrange(1, last) if last > 1 else 1
    d.do(
        d.one_of(
            f"{x}[:, {k - 1}] = {y}[:, 0]", f"{x}[:, :{k}] += {y}[:, :{k}]",
            f"{x}[..., :{j}] = 0.0",
            f"{x}[..., {j - 1}:] *= {y}[..., {j - 1}:]", f"{x}[:, {k - 1}] = 1.0",
            f"{x}[..., ::2] *= 2",
            f"{x}[..., :{j}] = {y}[..., -{j}:]", f"{x}[:, {k - 1}:].relu_()", f"{x}.add_({y})",
            f"{x}.mul_(0.5)",
            f"{x}.mul_({y}).tanh_()", f"{x}.sub_({x}.mean(-1, keepdim=True))", f"{x}.clamp_(-1, 1)",
            f"{x}.add_({y}, alpha=0.5)", f"{x}.masked_fill_({y} > 0.5, 0.2)",
            f"{x}[..., [0]] += 1.0",
            f"{x}.narrow(1, 0, {k}).copy_({y}.narrow(1, 0, {k}))",
            f"{x}.select(-1, {j - 1}).zero_()",
            f"{x}.transpose(0, 1)[{k - 1}].mul_(3)", f"{x}.flatten(1)[:, :2] = 0.3",
            f"{x}.fill_(0.2)",
            f"{x}.index_add_(1, torch.tensor([{k - 1}]), {y}[:, :1])", f"{x}.copy_({y})",
            f"{x}.zero_()",
            f"{x}.index_fill_(1, torch.tensor([{k - 1}]), 0.7)", f"{x}[{y} > 0.9] = 0.0",
            f"{x}.exp_().neg_()",
            f"{x}.chunk(2, -1)[0].mul_(2)", f"{x}[:, torch.tensor([{k - 1}])] = {y}[:, :1]",
            f"{x}[0] = {y}[-1]",
            f"{x}.scatter_(1, torch.zeros_like({x}[:, :1], dtype=torch.long), 0.4)",
            f"{x}[:, ::{k}] -= 0.5",
        )
    )  # fmt: skip
    if not d.own(x):
        raise Refused


@family("view and base", 1.0, (2, 3))
def view_and_base(d: Drawer) -> None:
    """A view is kept while its base changes, or the other way round."""
    x = _owned(d, 2, 3)
    n = d.shape(x)[-1]
    if n < 3:
        raise Refused
    k = d.rng.randrange(1, n)
    g = d.divisor(n)
    view = d.let(
        d.one_of(
            f"{x}[..., :{k}]", f"{x}.view(*{x}.shape[:-1], {g}, -1)", f"{x}[..., {k}:]",
            f"{x}.transpose(0, 1)",
            f"{x}.unsqueeze(1)", f"{x}[..., ::2]", f"{x}.view_as({x})", f"{x}.expand_as({x})",
            f"{x}.detach()",
            f"{x}.contiguous()", f"{x}.reshape({x}.shape)", f"{x}.to(torch.float64)",
            f"{x}.flatten(1)",
        )
    )  # fmt: skip
    target = d.one_of(x, view)
    d.do(
        d.one_of(
            f"{target}.add_(1)", f"{target}.relu_()", f"{target} *= 0.5", f"{target}[:, :1] = 0.1",
            f"{target} += 0.3 * {target}.sum(-1, keepdim=True)", f"{target}.sigmoid_()",
            f"{target}.zero_()",
            f"F.leaky_relu({target}, 0.1, inplace=True)", f"{target}[..., 0] += 1",
        )
    )  # fmt: skip
    if d.chance(0.5):
        d.let(d.one_of(f"{view} * 1", f"{x} + 0", f"{x}[..., {k}:] * 2"))


@family("filled", 1.2, (2, 3))
def filled(d: Drawer) -> None:
    """A tensor made by its size and then written into."""
    x = d.pick(2, 3)
    shape = d.shape(x)
    n = shape[-1]
    extra = d.one_of(0, 1, 3)
    make = d.one_of("zeros", "zeros", "ones", "full")
    sizes = f"{x}.shape[0], " + "".join(f"{s}, " for s in shape[1:-1])
    kind = ", dtype=torch.float64"
    size = f"({sizes}{n + extra})" if make == "full" else f"{sizes}{n + extra}"
    if d.chance(0.25):
        size, kind = f"({sizes}{n + extra})", ""
        make = d.one_of("new_zeros", "new_ones")
        text = f"{x}.{make}({size})"
    else:
        text = f"torch.{make}({size}{', 0.4' if make == 'full' else ''}{kind})"
    y = d.let(d.one_of(text, f"torch.zeros_like({x})") if extra == 0 else text)
    start = d.rng.randrange(0, extra + 1)
    d.do(
        d.one_of(
            f"{y}[..., {start}:{start + n}] = {x}", f"{y}[..., {start}:{start + n}] += {x}",
            f"{y}[..., :{n}].copy_({x})", f"{y}[..., -{n}:] = {x}", f"{y}[..., :2] = {x}[..., :2]",
            f"{y}.narrow(-1, {start}, {n}).add_({x})", f"{y}[:, 0] = {x}.mean()",
        )
    )  # fmt: skip


@family("gathered list", 0.8, (3,))
def gathered_list(d: Drawer) -> None:
    """A loop over positions that collects its results."""
    x = d.pick(3)
    _, t, f = d.shape(x)
    w = d.part(f"nn.Linear({f}, {f})")
    y, h = d.fresh(), d.fresh()
    start = d.one_of(
        f"{x}[:, 0]",
        f"{x}.new_zeros({x}.shape[0], {f})",
        f"torch.zeros({x}.shape[0], {f}, dtype=torch.float64)",
        f"{d.parameter(1, f)}.expand({x}.shape[0], -1)",
        f"torch.zeros_like({x}[:, 0])",
    )
    d.do(f"{h}, {y} = {start}, []")
    act = d.one_of("torch.tanh", "torch.sigmoid", "F.relu")
    for i in range(min(t, 3)):
        d.do(f"{h} = {act}({x}[:, {i}] + {w}({h}))")
        if d.chance(0.3):
            d.do(f"{h} = {h} * 0.5 + {x}[:, {i}] * (1 - 0.5)")
        d.do(f"{y} = {y} + [{h}]")
    d.let(
        d.one_of(
            f"torch.stack({y}, 1)",
            f"torch.cat({y}, -1)",
            f"sum({y})",
            f"{y}[-1]",
            f"torch.stack({y}, -1)",
        )
    )


@family("cell", 1.0, (3,))
def cell(d: Drawer) -> None:
    """LSTM, GRU or simple cells stepped by hand."""
    x = d.pick(3)
    _, t, f = d.shape(x)
    w = d.wide()
    kind = d.one_of("LSTMCell", "GRUCell", "RNNCell")
    m = d.part(f"nn.{kind}({f}, {w}{d.one_of('', ', bias=False')})")
    h, c = d.fresh(), d.fresh()
    zero = d.one_of(
        f"{x}.new_zeros({x}.shape[0], {w})",
        f"torch.zeros({x}.size(0), {w}, dtype=torch.float64)",
        f"{d.parameter(w)}.expand({x}.shape[0], {w})",
    )
    own = d.chance(0.6)
    d.do(f"{h} = {c} = {zero}" if own else f"{h} = {c} = None")
    outs = []
    for i in range(min(t, 3)):
        if kind == "LSTMCell":
            state = "" if not own and i == 0 else f", ({h}, {c})"
            d.do(f"{h}, {c} = {m}({x}[:, {i}]{state})")
        else:
            state = "" if not own and i == 0 else f", {h}"
            d.do(f"{h} = {m}({x}[:, {i}]{state})")
        outs.append(d.let(f"{h} * 1"))
    d.let(
        d.one_of(
            f"torch.stack([{', '.join(outs)}], 1)", outs[-1], f"torch.cat([{', '.join(outs)}], 1)"
        )
    )
