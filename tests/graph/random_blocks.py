"""Families of random steps: blocks as papers have them, and shapes that are easily confused."""

from __future__ import annotations

from tests.graph.random_drawer import Drawer, Refused, family


@family("square", 1.2, (3,))
def square(d: Drawer) -> None:
    """Rows and columns of the same size, and of the same units."""
    x = d.pick(3)
    _, t, f = d.shape(x)
    if t != f:
        y = d.like(x)
        x = d.let(d.one_of(f"{x}.mT @ {x}", f"{x}.mT @ {y}", f"{x} @ {y}.mT"))
    d.let(
        d.one_of(
            f"{x} + {x}.mT", f"{x} * {x}.transpose(1, 2)", f"{x} @ {x} / {t}",
            f"{x}.diagonal(0, 1, 2)",
            f"torch.einsum('bii->bi', {x})", f"{x}.tril()",
            f"torch.einsum('bij,bji->bi', {x}, {x})",
            f"{x} @ {x}.mT", f"({x} - {x}.mT).mean(2)", f"{x}.softmax(-1) @ {x}",
            f"torch.triu({x}, 1) + {x}",
            f"torch.einsum('bii->b', {x})[:, None] * {x}.sum(1)", f"{x} + torch.eye({x}.shape[1])",
            f"torch.linalg.inv({x}.tanh() * 0.1 + torch.eye({x}.shape[1], dtype=torch.float64))",
            f"torch.matrix_exp(0.1 * {x}.tanh())", f"{x}.diag_embed().sum(1)",
        )
    )  # fmt: skip


@family("over the batch", 0.8)
def over_the_batch(d: Drawer) -> None:
    """The first dimension takes part, whatever it stands for."""
    x = d.pick(2, 3, 4)
    d.let(
        d.one_of(
            f"{x} - {x}.mean(0)", f"{x} - {x}.mean(0, keepdim=True)", f"{x} + {x}[0]",
            f"{x} * {x}[:1]",
            f"({x} - {x}.mean(0)) / ({x}.var(0, correction=0) + 0.1).sqrt()",
            f"{x} + {x}.sum(0).tanh()",
            f"{x}.flip(0)", f"{x}.roll(1, 0) + {x}", f"torch.cat([{x}, {x}], 0)[: {x}.shape[0]]",
            f"torch.stack(list({x})).tanh()", f"{x}.softmax(0)", f"{x} + {x}.amax(0)",
            f"{x}.cumsum(0)",
            f"torch.stack([F.relu(r) for r in {x}])", f"{x}.repeat_interleave(2, 0)[::2]",
            f"{x}.mT.mT",
            f"F.batch_norm({x}, None, None, training=True, eps=0.1)",
            f"{x}.transpose(0, 1).contiguous().transpose(0, 1)",
        )
    )  # fmt: skip


@family("steps of values", 1.0)
def steps_of_values(d: Drawer) -> None:
    """Whole numbers and conditions made of values; numbers made of sizes."""
    x = d.pick(2, 3)
    y = d.like(x)
    n = d.shape(x)[-1]
    d.let(
        d.one_of(
            f"({x} * 3).long() * torch.tensor(0.1).double()", f"({x} > 0.0123).double()",
            f"{x} * ({y} < 0.4321)",
            f"{x}.sign() + {x}",
            f"({x} > 0.1).double() @ torch.ones({n}, 3, dtype=torch.float64)",
            f"{x}.floor() * 0.3 + {x}",
            f"sum({x}[..., i] * (i + 1) for i in range({x}.shape[-1]))", f"{x} / {x}.shape[-1]",
            f"torch.stack([{x}[..., i] for i in range({x}.shape[-1] - 1)], -1)",
            f"{x} * {x}.size(-1) ** -0.5",
            f"{x} + torch.arange({x}.shape[-1]) * torch.tensor(0.1).double()",
            f"{x} * torch.ones({x}.shape[-1]) * 0.5",
            f"torch.fft.rfft({x}, dim=-1).real",
            f"{x}.masked_fill(({x} > 0.4321).any(-1, keepdim=True), 0.2)",
            f"{x}.heaviside({y})",
            f"torch.bucketize({x}.contiguous(), {x}.new_tensor([-0.5, 0.123])).double() * 0.2",
            f"F.one_hot(({x}.sum(-1) > 0.0123).long(), 4).double()",
            f"{x}.logsumexp(-1, keepdim=True) + {x}",
            f"torch.nan_to_num({x}.log(), 0.0, 0.0, 0.0)", f"{x} * ({x}.shape[-1] > 3)",
            f"{x}.view(torch.int64).view(torch.float64)",
        )
    )  # fmt: skip


@family("made weights", 1.2, (2, 3))
def made_weights(d: Drawer) -> None:
    """Weights that are computed: adapters, factors, networks that make weights."""
    x = d.pick(2, 3)
    n, w, r = d.shape(x)[-1], d.wide(), d.one_of(2, 3)
    m, a, b = d.part(f"nn.Linear({n}, {w})"), d.parameter(r, n), d.parameter(w, r)
    h = d.part(f"nn.Linear({n}, {3 * n})")
    s = d.parameter(n)
    k = d.parameter(w)
    d.let(
        d.one_of(
            f"{m}({x}) + F.linear(F.linear({x}, {a}), {b}) * 0.5",
            f"F.linear({x}, {m}.weight + {b} @ {a}, {m}.bias)",
            f"F.linear({x}, {b} @ {a})", f"{m}({x} * {s}) * {k}",
            f"F.linear({x} * {s}, {m}.weight / {s}.abs().add(0.5))",
            f"({h}({x}).unflatten(-1, (3, {n})) @ {x}.unsqueeze(-1)).squeeze(-1)",
            f"F.linear({x}, {m}.weight * {k}[:, None] * {s})",
            f"torch.einsum('...i,...oi->...o', {x}, torch.tanh({h}({x})).unflatten(-1, (3, {n})))",
            f"F.linear({x}, torch.outer({k}, {s}))",
            f"{x} @ torch.kron({a}.t(), {b}[:2].t())[:{n}]",
            f"F.linear({x}, {m}.weight.abs().sqrt())",
            f"F.linear({x}, {m}.weight - {m}.weight.mean(0, keepdim=True))",
            f"F.linear({x}, {m}.weight.cumsum(0))",
            f"F.linear({x}, torch.stack([{m}.weight, {m}.weight * 2]).mean(0))",
            f"F.linear({x}, {m}.weight.roll(1, 0), {m}.bias)",
            f"F.linear({x}, {m}.weight[{k}.argsort()])",
            f"F.linear({x}, {m}.weight / {m}.weight.norm())",
            f"F.bilinear({x}, {x}, {d.parameter(3, n, n)})",
            f"F.linear({x}, {m}.weight.masked_fill({m}.weight < -0.2, 0.0))",
            f"F.linear({x}, {m}.weight / {m}.weight.std())",
        )
    )  # fmt: skip


@family("windows", 1.2, (4,))
def windows(d: Drawer) -> None:
    """Patches and windows by hand, over images with the channels first or last."""
    x = d.pick(4, test=lambda v: v.shape[2] % 2 == 0 and v.shape[3] % 2 == 0)
    _, c, h, w = d.shape(x)
    six = f"{x}.view(-1, {c}, {h // 2}, 2, {w // 2}, 2)"
    last = f"{x}.permute(0, 2, 3, 1)"
    parts = f"{last}.reshape({x}.shape[0], {h // 2}, 2, {w // 2}, 2, {c})"
    d.let(
        d.one_of(
            f"{six}.permute(0, 1, 3, 5, 2, 4).reshape(-1, {c * 4}, {h // 2}, {w // 2})",
            f"{six}.mean((3, 5))",
            f"{parts}.permute(0, 1, 3, 2, 4, 5).reshape(-1, {h * w // 4}, {4 * c})",
            f"{six}.amax(5).amax(3)",
            f"{parts}.permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, {c}).tanh()"
            f".view({x}.shape[0], {h * w}, {c})",
            f"torch.cat([{x}[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)",
            f"{parts}.mean((2, 4))",
            f"torch.cat([{last}[:, 0::2, 0::2], {last}[:, 1::2, 0::2]], -1)",
            f"{six}.flatten(3).sum(2).flatten(2)",
            f"{x}.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))",
            f"{x}.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).amax(4)",
        )
    )  # fmt: skip


@family("channels last", 1.0, (4,))
def channels_last(d: Drawer) -> None:
    """A block in the manner of ConvNeXt."""
    x = d.pick(4)
    c, w = d.shape(x)[1], d.wide()
    conv = d.part(f"nn.Conv2d({c}, {c}, 3, padding=1, groups={d.one_of(c, c, 1)})")
    up, down = d.part(f"nn.Linear({c}, {w})"), d.part(f"nn.Linear({w}, {c})")
    y = d.let(f"{conv}({x}).permute(0, 2, 3, 1)")
    if d.chance(0.6):
        y = d.let(f"{d.part(f'nn.LayerNorm({c}, eps=0.01)')}({y})")
    y = d.let(f"{down}(F.gelu({up}({y})))")
    if d.chance(0.5):
        y = d.let(f"{d.parameter(c)} * {y}")
    y = d.let(f"{y}.permute(0, 3, 1, 2)")
    d.let(f"{x} + {y}")


@family("scan", 0.8, (3,))
def scan(d: Drawer) -> None:
    """A selective state-space layer, unrolled: a state of (batch, inner, size)."""
    x = d.pick(3)
    _, t, f = d.shape(x)
    w, n = d.one_of(4, 6), d.one_of(2, 3)
    into = d.part(f"nn.Linear({f}, {2 * w}, bias=False)")
    more = d.part(f"nn.Linear({w}, {2 * n + 1})")
    decay, skip = d.parameter(w, n), d.parameter(w)
    u, g = d.fresh(), d.fresh()
    d.do(f"{u}, {g} = {into}({x}).chunk(2, -1)")
    if d.chance(0.5):
        conv = d.part(f"nn.Conv1d({w}, {w}, 3, padding=2, groups={w})")
        d.do(f"{u} = F.silu({conv}({u}.mT)[..., :{t}].mT)")
    step, b, c = d.fresh(), d.fresh(), d.fresh()
    d.do(f"{step}, {b}, {c} = {more}({u}).split([1, {n}, {n}], -1)")
    state, outs = d.fresh(), []
    d.do(f"{state} = torch.zeros({x}.shape[0], {w}, {n}, dtype=torch.float64)")
    for i in range(min(t, 3)):
        gate = f"torch.exp(-F.softplus({step}[:, {i}, :, None]) * {decay}.abs())"
        d.do(f"{state} = {state} * {gate} + {u}[:, {i}, :, None] * {b}[:, {i}, None]")
        read = d.one_of(
            f"({state} * {c}[:, {i}, None]).sum(-1)",
            f"torch.einsum('bdn,bn->bd', {state}, {c}[:, {i}])",
        )
        outs.append(d.let(f"{read} + {skip} * {u}[:, {i}]"))
    y = d.let(f"torch.stack([{', '.join(outs)}], 1) * F.silu({g}[:, : {len(outs)}])")
    d.let(f"{d.part(f'nn.Linear({w}, {f}, bias=False)')}({y})")


@family("chosen experts", 0.6, (2, 3))
def chosen_experts(d: Drawer) -> None:
    """Routing by the largest gates: loops over experts, products with chosen weights."""
    x = d.pick(2, 3)
    n, w = d.shape(x)[-1], d.one_of(4, 6)
    gate = d.part(f"nn.Linear({n}, 3)")
    weights = d.let(f"{gate}({x}).softmax(-1)")
    way = d.rng.randrange(3)
    if way == 0:
        ups = [d.part(f"nn.Linear({n}, {w})") for _ in range(3)]
        downs = [d.part(f"nn.Linear({w}, {n})") for _ in range(3)]
        terms = [
            f"{weights}[..., {i}, None] * {down}(F.relu({up}({x})))"
            for i, (up, down) in enumerate(zip(ups, downs, strict=True))
        ]
        d.let(" + ".join(terms))
    elif way == 1:
        up, down = d.parameter(3, n, w), d.parameter(3, w, n)
        best = f"{weights}.argmax(-1)"
        h = d.let(f"F.gelu({x}.unsqueeze(-2) @ {up}[{best}])")
        d.let(f"({h} @ {down}[{best}]).squeeze(-2)")
    else:
        top = d.fresh()
        d.do(f"{top} = {weights}.topk(2, -1)")
        if len(d.shape(x)) != 2:
            raise Refused
        up = d.parameter(3, w, n)
        h = d.let(f"torch.einsum('bkoi,bi->bko', {up}[{top}.indices], {x})")
        d.let(f"({h} * {top}.values[..., None]).sum(1)")
