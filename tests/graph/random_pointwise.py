"""Families of random steps: elementwise operators, reductions, norms written by hand."""

from __future__ import annotations

from tests.graph.random_drawer import Drawer, Refused, family

ACTIVATIONS = (
    "F.relu({x})", "torch.sigmoid({x})", "torch.tanh({x})", "F.gelu({x})", "F.hardswish({x})",
    "F.softplus({x})", "F.elu({x})", "{x} + 1", "{x} * 0.5", "{x} / 3", "-{x}", "2 - {x}",
    "{x}.clamp(-1, 1)", "{x}.clamp(min=0.2)", "torch.where({x} > 0, {x}, 0.1 * {x})",
    "{x}.masked_fill({x} > 0.7321, 0.3)", "{x}.abs().sqrt()", "{x} / (1 + {x}.abs())",
    "torch.square({x})", "torch.exp(-{x}.abs())", "F.silu({x})", "F.leaky_relu({x}, 0.2)",
    "torch.cos({x})", "torch.sin({x})", "{x}.pow(2)", "F.mish({x})", "torch.erf({x})",
    "torch.maximum({x}, torch.tensor(0.3))", "F.dropout({x}, 0.1, False)", "{x}.clone().relu_()",
    "{x}.contiguous()", "torch.addcmul({x}, {x}, {x}, value=0.3)",
    "torch.lerp({x}, {x}.abs(), 0.5)",
    "{x} * torch.sigmoid({x})", "{x} - {x}.detach().tanh()", "torch.zeros_like({x}) + {x}",
    "torch.ones_like({x}) * {x}", "torch.full_like({x}, 0.4) - {x}", "{x}.to(torch.float64)",
    "torch.atan2({x}, {x}.abs() + 1)", "F.hardtanh({x})", "torch.relu({x}) ** 2", "F.softsign({x})",
)  # fmt: skip
BINARY = (
    "{x} + {y}", "{x} - {y}", "{x} * {y}", "{x} * torch.sigmoid({y})", "torch.maximum({x}, {y})",
    "{x} / (1 + {y}.abs())", "torch.where({y} > 0.0123, {x}, {y})", "torch.lerp({x}, {y}, 0.3)",
    "torch.addcmul({x}, {y}, {y}, value=0.5)", "{x} + 0.5 * {y}", "torch.add({x}, {y}, alpha=2)",
    "{x}.masked_fill({y} > 0.4321, 0.0)", "{x}.masked_fill({y} < 0.1234, -1.5)",
    "F.silu({x}) * {y}", "{x} + {y}.expand_as({x})", "{x} * {y}.view_as({x})",
    "torch.hypot({x}, {y} + 2)", "{x} + {y}.reshape({x}.shape)", "torch.stack([{x}, {y}]).sum(0)",
    "torch.stack([{x}, {y}], -1).amax(-1)", "torch.minimum({y}, {x})", "{x}.sub({y}).tanh()",
)  # fmt: skip


@family("activation", 2.5)
def activation(d: Drawer) -> None:
    d.let(d.one_of(*ACTIVATIONS).format(x=d.pick()))


@family("binary", 3.0)
def binary(d: Drawer) -> None:
    x = d.pick()
    d.let(d.one_of(*BINARY).format(x=x, y=d.like(x)))


@family("residual", 1.5, (2, 3))
def residual(d: Drawer) -> None:
    """A stream that several blocks add to."""
    x = d.pick(2, 3)
    n, w = d.shape(x)[-1], d.wide()
    act = d.one_of("F.relu", "F.gelu", "torch.tanh", "torch.sigmoid")
    norm = d.one_of("{}", "{}", "F.layer_norm({}, ({n},))", "F.rms_norm({}, ({n},))")
    for _ in range(d.one_of(1, 2)):
        up, down = d.part(f"nn.Linear({n}, {w})"), d.part(f"nn.Linear({w}, {n})")
        inner = norm.format(x, n=n)
        if d.chance(0.4):  # gated
            gate = d.part(f"nn.Linear({n}, {w}, bias=False)")
            x = d.let(f"{x} + {down}({act}({gate}({inner})) * {up}({inner}))")
        else:
            x = d.let(f"{x} + {down}({act}({up}({inner})))")


@family("broadcast", 1.5, (3, 4))
def broadcast(d: Drawer) -> None:
    """Joined with a value of fewer dims or of size 1, or pooled and given back."""
    x = d.pick(3, 4)
    rank = len(d.shape(x))
    dim = d.rng.randrange(1, rank)
    y = d.like(x)
    d.let(
        d.one_of(
            "{x} * torch.sigmoid({y}.mean({d}, keepdim=True))",
            "{x} - {y}.mean({d}, True)",
            "{x} + {y}.amax({d}, keepdim=True)",
            "{x} / (1 + {y}.abs().sum({d}, keepdim=True))",
            "{x} + {y}.select({d}, 0).unsqueeze({d})",
            "{x} + {y}.narrow({d}, 0, 1).expand_as({x})",
            "{x} * {y}.narrow({d}, 1, 1).expand(-1, *{x}.shape[1:])",
        ).format(x=x, y=y, d=dim - rank if d.chance(0.3) else dim)
    )


@family("reduce", 1.2, (3, 4))
def reduce(d: Drawer) -> None:
    x = d.pick(3, 4)
    rank = len(d.shape(x))
    dims = d.rng.sample(range(1, rank), d.one_of(1, 1, rank - 2))
    dim: object = dims[0] if len(dims) == 1 else tuple(dims)
    keep = d.chance(0.4)
    several = d.one_of("mean", "sum", "amax", "var", "std", "logsumexp", "norm", "mean", "sum")
    if several in ("var", "std"):
        d.let(f"({x} + 0.1).{several}({dim}, correction={d.one_of(0, 1)}, keepdim={keep})")
    elif several == "norm":
        p = d.one_of(1, 2)
        d.let(f"torch.linalg.vector_norm({x}, {p}, {dim}, {keep})")
    else:
        d.let(f"{x}.{several}({dim}, keepdim={keep})")


@family("reduce one", 1.5)
def reduce_one(d: Drawer) -> None:
    x = d.pick(2, 3, 4)
    dim = d.rng.randrange(1, len(d.shape(x)))
    d.let(
        d.one_of(
            "{x}.max({d}, keepdim=True)[0] + {x}", "{x}.min({d}).values", "{x}.cumsum({d})",
            "{x} * {x}.prod({d}, keepdim=True)", "{x}.softmax({d})", "F.log_softmax({x}, {d})",
            "F.normalize({x}, dim={d}, eps=0.1)", "{x}.median({d}).values.unsqueeze({d}) + {x}",
            "{x}.topk(2, {d}).values", "{x}.sort({d}).values", "F.glu({x}, {d})",
            "{x}.argmax({d}, keepdim=True) * 0.1 + {x}", "{x}.diff(dim={d})",
            "{x} - {x}.mean({d}, True)",
            "F.softmin({x}, {d})", "{x} * {x}.sum({d}, True).tanh()", "{x}.cumsum({d}).flip({d})",
            "{x}.any({d}, keepdim=True) * {x}", "F.softmax({x}, {d}) * {x}",
        ).format(x=x, d=dim)
    )  # fmt: skip


@family("norm by hand", 1.5)
def norm_by_hand(d: Drawer) -> None:
    """RMSNorm and LayerNorm as people write them, over one dim."""
    x = d.pick(2, 3, 4)
    dim = d.one_of(-1, -1, 1)
    n = d.shape(x)[dim]
    if n < 3:
        raise Refused
    shape = [1] * (len(d.shape(x)) - 1 - (dim % len(d.shape(x)))) if dim != -1 else []
    scale, shift = d.parameter(n, *shape), d.parameter(n, *shape)
    eps = d.one_of("1e-2", "1e-3")
    if d.chance(0.5):
        var = d.one_of(
            f"{x}.pow(2).mean({dim}, keepdim=True)", f"({x} * {x}).mean({dim}, True)",
            f"({x}.square().sum({dim}, keepdim=True) / {n})",
            f"({x}.norm(dim={dim}, keepdim=True) ** 2 / {x}.shape[{dim}])",
        )  # fmt: skip
        y = d.let(f"{x} * torch.rsqrt({var} + {eps})")
        d.let(d.one_of(f"{scale} * {y}", f"{y} * (1 + {scale})", y))
        return
    mean = d.let(f"{x}.mean({dim}, keepdim=True)")
    var = d.one_of(
        f"{x}.var({dim}, unbiased=False, keepdim=True)",
        f"({x} - {mean}).pow(2).mean({dim}, keepdim=True)",
        f"({x}.pow(2).mean({dim}, keepdim=True) - {mean} ** 2)",
    )
    y = d.let(f"({x} - {mean}) / torch.sqrt({var}.abs() + {eps})")
    d.let(d.one_of(f"{y} * {scale} + {shift}", f"{scale} * {y}", y))


@family("parameter", 2.0)
def parameter(d: Drawer) -> None:
    """A parameter or buffer of some of the value's dims is added or multiplied."""
    x = d.pick()
    shape = d.shape(x)
    start = d.rng.randrange(1, len(shape))
    own = [1 if d.chance(0.3) else n for n in shape[start:]]
    p = d.buffer(*own) if d.chance(0.25) else d.parameter(*own)
    d.let(
        d.one_of(
            "{x} * {p}", "{x} + {p}", "{p} - {x}", "{x} * torch.exp(-{p}.abs())", "{x} * (1 + {p})",
            "{x} + {p}.expand_as({x})", "torch.addcmul({p}, {x}, {p})", "{x} * {p} + {p}",
            "{x} / (1 + {p}.abs())", "torch.where({p} > 0.1, {x}, {p})", "{x} * torch.sigmoid({p})",
            "{x} * F.softmax({p}, -1)", "{x} + {p} * 0.5", "torch.maximum({x}, {p})",
            "{x} + {p}.clone()", "{x} * {p}.detach()",
        ).format(x=x, p=p)
    )  # fmt: skip


@family("table", 1.2, (3,))
def table(d: Drawer) -> None:
    """A position table longer than the sequence, an embedding by arange, a created tensor."""
    x = d.pick(3)
    _, t, f = d.shape(x)
    p = d.parameter(t + 3, f)
    e = d.part(f"nn.Embedding({t + 2}, {f})")
    d.let(
        d.one_of(
            f"{x} + {p}[:{t}]", f"{x} + {p}[: {x}.shape[1]]", f"{x} + {p}[None, 2 : {t} + 2]",
            f"{x} + {p}[torch.arange({t})]", f"{x} + {e}(torch.arange({x}.shape[1]))",
            f"{x} + {p}.narrow(0, 0, {t}).unsqueeze(0)", f"{x} * {p}.t()[:, :{t}].t()",
            f"{x} + F.embedding(torch.arange({t}), {p})",
            f"{x} + {p}.index_select(0, torch.arange({t}))",
            f"{x} + torch.arange({f}) * 0.1", f"{x} * torch.arange({f}).view(1, 1, -1).cos()",
            f"{x} + torch.full(({t}, {f}), 0.3)", f"{x} + torch.zeros({x}.shape[0], {t}, {f})",
            f"{x} * torch.linspace(0, 1, {f}, dtype=torch.float64)", f"{x} + {x}.new_zeros({f})",
            f"{x} + torch.arange({t})[:, None] * {p}[0]", f"{x} * torch.tril(torch.ones({t}, {f}))",
        )
    )  # fmt: skip


@family("region", 0.6, (2, 3))
def region(d: Drawer) -> None:
    """Code in regions: no gradients, automatic precision, checkpoints."""
    x = d.pick(2, 3)
    n, w = d.shape(x)[-1], d.wide()
    a, b = d.part(f"nn.Linear({n}, {w})"), d.part(f"nn.Linear({w}, {n})")
    name = d.fresh()
    way = d.one_of("grad", "cast", "checkpoint")
    if way == "checkpoint":
        d.let(f"checkpoint(lambda t: {b}(F.relu({a}(t))), {x}, use_reentrant=False)")
    else:
        manager = "torch.no_grad()" if way == "grad" else "torch.autocast('cpu', enabled=False)"
        d.do(f"with {manager}: {name} = F.relu({a}({x}))")
        d.let(f"{x} + {b}({name})")
