"""Families of random steps: layers with weights, their tricks, norms and recurrent layers."""

from __future__ import annotations

from tests.graph.random_drawer import Drawer, Refused, family


@family("linear", 2.0)
def linear(d: Drawer) -> None:
    x = d.pick(2, 3, 4)
    n, w = d.shape(x)[-1], d.wide()
    wrap = d.one_of(
        "{}",
        "{}",
        "{}",
        "{}",
        "{}",
        "weight_norm({})",
        "spectral_norm({})",
        "weight_norm({}, dim=1)",
    )
    m = d.part(wrap.format(f"nn.Linear({n}, {w}, bias={d.chance(0.7)})"))
    d.let(d.one_of("{}", "F.relu({})", "torch.tanh({})").format(f"{m}({x})"))


@family("tied", 1.5)
def tied(d: Drawer) -> None:
    """One layer used more than once, or its weight in other ways."""
    x = d.pick(2, 3)
    n, w = d.shape(x)[-1], d.wide()
    m = d.part(f"nn.Linear({n}, {w})")
    s = d.part(f"nn.Linear({n}, {n})")
    e = d.part(f"nn.Embedding({w}, {n})")
    k = d.rng.randrange(1, n)
    d.let(
        d.one_of(
            f"F.linear(F.relu({m}({x})), {m}.weight.t())", f"{s}(F.relu({s}({x})))",
            f"{x} + {s}(torch.tanh({s}({x})))",
            f"F.linear({x}, {s}.weight + {s}.weight.t())", f"F.linear({x}, {e}.weight)",
            f"{m}({x}) @ {m}.weight",
            f"torch.tanh({m}({x})) + {m}({x}.flip(-1))", f"{m}({x}) + {m}({x} * 2)",
            f"F.linear({x}, {s}.weight, {s}.bias) * {s}.bias",
            f"{m}({x}) @ {e}.weight", f"F.linear(F.linear({x}, {m}.weight), {e}.weight.t())",
            f"F.linear({x}[..., :{k}], {m}.weight[:, :{k}])",
            f"F.linear({x}, {m}.weight.softmax(0))",
            f"F.linear({x}, F.normalize({m}.weight, dim=1, eps=0.1))", f"{x} + {s}.weight.mean(0)",
        )
    )  # fmt: skip


@family("weights by hand", 2.5)
def weights_by_hand(d: Drawer) -> None:
    """Parameters in products: sliced, viewed, transposed, scaled, standardised."""
    x = d.pick(2, 3)
    n, w = d.shape(x)[-1], d.wide()
    p = d.parameter(w, n)
    q = d.parameter(n, w)
    r = d.parameter(n * w)
    b = d.parameter(w)
    k = d.rng.randrange(1, w)
    g = d.divisor(w)
    d.let(
        d.one_of(
            f"F.linear({x}, {p})", f"{x} @ {q}", f"F.linear({x}, {p}, {b})",
            f"F.linear({x}, {p}[:{k}])", f"{x} @ {q}[:, {k}:]",
            f"torch.matmul({x}, {p}.t())", f"{x} @ {r}.view({n}, {w})",
            f"F.linear({x}, {q}.t().contiguous())",
            f"torch.einsum('...i,io->...o', {x}, {q})",
            f"torch.einsum('...i,oi->...o', {x}, {p}) + {b}",
            f"F.linear({x}, {p} * {b}[:, None])", f"F.linear({x}, {p} - {p}.mean(1, keepdim=True))",
            f"F.linear({x}, {p} - {p}.mean(0))",
            f"F.linear({x}, torch.cat([{p}, {q}.t()]))",
            f"F.linear({x}, {p}.view({g}, -1, {n}).sum(0))",
            f"F.linear({x}, {p} / (0.1 + {p}.norm(dim=1, keepdim=True)))",
            f"F.linear({x}, {p}.flip(0), {b})",
            f"{x} @ {q}.view({n}, {g}, -1).transpose(1, 2).reshape({n}, {w})",
            f"F.linear({x}, {p}[[0, 2, 1]])",
            f"{x} @ ({q} @ {q}.t()) / {w}", f"{x} @ ({q} @ {p}) / {w}", f"F.linear({x}, {p} + 0.1)",
            f"F.linear({x}, F.relu({p}), {b}.relu())",
            f"torch.einsum('...i,ghi->...gh', {x}, {p}.view({g}, -1, {n})).flatten(-2)",
            f"F.linear({x}, torch.sigmoid({p}))",
            f"F.linear({x}, {p}.repeat(2, 1))",
            f"F.linear({x}, {p} * torch.tril(torch.ones({w}, {n})))",
            f"{x} @ torch.diag({d.parameter(n)})",
            f"torch.addmm({b}, {x}.flatten(0, -2), {q})[:{x}.shape[0]]",
            f"F.linear({x}, {p}.expand({w}, {n})) + {b}.expand({w})",
            f"F.linear({x}, *torch.cat([{p}, {b}[:, None]], 1).split([{n}, 1], 1)[:1])",
            f"torch.stack([{x} @ {q}, {x} @ {p}.T]).sum(0)",
        )
    )  # fmt: skip


@family("experts", 0.8)
def experts(d: Drawer) -> None:
    """Several small layers side by side: products with stacked weights, soft mixtures."""
    x = d.pick(2, 3)
    n, w, k = d.shape(x)[-1], d.wide(), d.one_of(2, 3)
    up, down = d.parameter(k, n, w, scale=0.5), d.parameter(k, w, n, scale=0.5)
    gate = d.part(f"nn.Linear({n}, {k})")
    h = d.let(
        d.one_of(
            f"torch.einsum('...i,kio->...ko', {x}, {up})",
            f"torch.stack([{x} @ w for w in {up}], -2)",
        )
    )
    y = d.let(
        f"torch.einsum('...ko,koi->...ki', {d.one_of('F.relu', 'torch.sigmoid')}({h}), {down})"
    )
    d.let(
        d.one_of(
            f"({y} * {gate}({x}).softmax(-1)[..., None]).sum(-2)",
            f"{y}.mean(-2)",
            f"{y}.flatten(-2)",
        )
    )


@family("token", 1.0, (3,))
def token(d: Drawer) -> None:
    """A class token or a prompt, joined in front."""
    x = d.pick(3)
    f = d.shape(x)[-1]
    c = d.parameter(1, d.one_of(1, 2), f)
    d.let(
        d.one_of(
            f"torch.cat([{c}.expand({x}.shape[0], -1, -1), {x}], 1)",
            f"torch.cat([{x}, {c}.repeat({x}.shape[0], 1, 1)], 1)",
            f"torch.cat([{c}.expand({x}.shape[0], -1, -1) + {x}.mean(1, True), {x}], 1)[:, 1:]",
            f"torch.cat([{c}.expand({x}.shape[0], -1, -1), {x}], 1)[:, 0]",
            f"torch.cat([{x}, {x}.new_zeros({x}.shape[0], 2, {f})], 1)",
        )
    )  # fmt: skip


@family("norm", 3.0)
def norm(d: Drawer) -> None:
    x = d.pick(2, 3, 4)
    shape = d.shape(x)
    n, c = shape[-1], shape[1]
    affine = d.chance(0.7)
    two = tuple(shape[-2:])
    eps = d.one_of(1e-3, 1e-2)
    kinds = [
        f"nn.LayerNorm({n}, eps={eps}, elementwise_affine={affine})",
        f"nn.RMSNorm({n}, eps={eps}, elementwise_affine={affine})",
        f"nn.LayerNorm({n}, eps={eps}, bias=False)",
        f"nn.GroupNorm({d.divisor(c, 1)}, {c}, eps={eps}, affine={affine})",
        f"nn.GroupNorm(1, {c}, eps={eps})", f"nn.GroupNorm({c}, {c}, eps={eps}, affine={affine})",
    ]  # fmt: skip
    rank = len(shape)
    kinds.append(
        f"nn.BatchNorm{max(rank - 2, 1)}d({c}, affine={affine},"
        f" track_running_stats={d.chance(0.8)})"
    )
    if rank > 2:
        kinds += [
            f"nn.LayerNorm({two}, eps={eps}, elementwise_affine={affine})",
            f"nn.RMSNorm({two}, eps={eps})",
            f"nn.InstanceNorm{rank - 2}d({c}, eps={eps}, affine={affine})",
            f"nn.InstanceNorm{rank - 2}d({c}, eps={eps}, track_running_stats=True)",
        ]  # fmt: skip
    kind = d.one_of(*kinds)
    m = d.part(kind)
    moved = d.chance(0.25) and rank > 2 and "LayerNorm" in kind and shape[1] == n
    d.let(f"{m}({x}.transpose(1, -1)).transpose(1, -1)" if moved else f"{m}({x})")


@family("convolution", 4.0, (4,))
def convolution(d: Drawer) -> None:
    x = d.pick(4)
    _, c, h, _ = d.shape(x)
    w = d.wide()
    wrap = d.one_of(*["{}"] * 6, "weight_norm({})", "spectral_norm({})")
    bias = f"bias={d.chance(0.6)}"
    g = d.divisor(c) if c > 1 else 1
    size = d.one_of(1, 3)
    options = f"padding={size // 2}, {bias}"
    mode = d.one_of("reflect", "circular", "zeros")
    text = d.one_of(
        f"nn.Conv2d({c}, {w}, {size}, {options})", f"nn.Conv2d({c}, {w}, {size}, {options})",
        f"nn.Conv2d({c}, {w}, 3, stride=2, padding=1, {bias})",
        f"nn.Conv2d({c}, {w}, 3, padding=2, dilation=2, {bias})",
        f"nn.Conv2d({c}, {c}, 3, groups={c}, padding=1, {bias})",
        f"nn.Conv2d({c}, {2 * c}, {size}, groups={c}, {options})",
        f"nn.Conv2d({c}, {g * d.one_of(1, 2, 3)}, {size}, groups={g}, {options})",
        f"nn.Conv2d({c}, {c}, {size}, groups={g}, {options})",
        f"nn.ConvTranspose2d({c}, {w}, 2, stride=2, {bias})",
        f"nn.ConvTranspose2d({c}, {w}, 3, padding=1, {bias})",
        f"nn.ConvTranspose2d({c}, {g * d.one_of(1, 2)}, 3, padding=1, groups={g}, {bias})",
        f"nn.ConvTranspose2d({c}, {c}, 2, stride=2, groups={c}, {bias})",
        f"nn.Conv2d({c}, {w}, {h}, {bias})",
        f"nn.Conv2d({c}, {w}, 3, padding='same', padding_mode='{mode}')",
    )  # fmt: skip
    y = d.let(f"{d.part(wrap.format(text))}({x})")
    after = d.rng.randrange(5)
    if after == 0:
        d.let(f"{d.part(f'nn.BatchNorm2d({d.shape(y)[1]})')}({y})")
    elif after == 1:
        d.let(f"F.relu({y})")
    elif after == 2:
        d.let(f"{d.part(f'nn.PReLU({d.one_of(1, d.shape(y)[1])})')}({y})")


@family("convolution by hand", 1.5, (4,))
def convolution_by_hand(d: Drawer) -> None:
    """With a parameter as weight: scaled, standardised, sliced."""
    x = d.pick(4)
    c, w = d.shape(x)[1], d.wide()
    p = d.parameter(w, c, 3, 3, scale=0.3)
    s = d.parameter(w, 1, 1, 1)
    d.let(
        d.one_of(
            f"F.conv2d({x}, {p}, padding=1)",
            f"F.conv2d({x}, {p} * {s}, {d.parameter(w)}, padding=1)", f"F.conv2d({x}, {p}[:3])",
            f"F.conv2d({x}, ({p} - {p}.mean((1, 2, 3), True))"
            f" / ({p}.var((1, 2, 3), correction=0, keepdim=True) + 0.01).sqrt())",
            f"F.conv_transpose2d({x}, {p}.transpose(0, 1))",
            f"F.conv2d({x}, {p}.mean((2, 3), True))", f"F.conv2d({x}, {p}.flip(2), padding=1)",
            f"F.conv2d({x}.flatten(0, 1)[:, None], {p}[:, :1], padding=1)"
            f".view(-1, {c}, {w}, *{x}.shape[2:]).sum(1)",
        )
    )  # fmt: skip


@family("squeeze and excite", 1.5, (4,))
def squeeze(d: Drawer) -> None:
    x = d.pick(4)
    c = d.shape(x)[1]
    a, b = d.part(f"nn.Linear({c}, 4)"), d.part(f"nn.Linear(4, {c})")
    wide = d.one_of("[:, :, None, None]", f".view(-1, {c}, 1, 1)", ".unsqueeze(-1).unsqueeze(-1)")
    pooled = d.one_of(
        f"{x}.mean((2, 3))", f"F.adaptive_avg_pool2d({x}, 1).flatten(1)", f"{x}.amax((-1, -2))"
    )
    gate = d.let(
        f"{d.one_of('torch.sigmoid', 'F.hardsigmoid', 'torch.tanh')}({b}(F.relu({a}({pooled}))))"
    )
    d.let(f"{x} * {gate}" + wide)


@family("over time", 1.5, (3,))
def over_time(d: Drawer) -> None:
    """Convolutions over a sequence, mixing over tokens."""
    x = d.pick(3)
    _, t, f = d.shape(x)
    w = d.wide()
    g = d.divisor(f)
    wrap = d.one_of("{}", "{}", "weight_norm({})")
    conv = d.one_of(
        f"nn.Conv1d({f}, {w}, 1)",
        f"nn.Conv1d({f}, {w}, 3, padding=1)",
        f"nn.Conv1d({f}, {f}, 3, padding=1, groups={f})",
        f"nn.Conv1d({f}, {f}, 3, padding=2, groups={g})",
        f"nn.ConvTranspose1d({f}, {w}, 2)",
    )
    if d.chance(0.3):
        d.let(f"{d.part(f'nn.Linear({t}, {t})')}({x}.transpose(1, 2)).transpose(1, 2)")
    elif d.chance(0.2):
        d.let(f"{d.part(f'nn.Conv1d({t}, {w}, 3, padding=1)')}({x})")
    else:
        cut = d.one_of("", f"[..., :{t}]")
        d.let(f"{d.part(wrap.format(conv))}({x}.transpose(1, 2)){cut}.transpose(1, 2)")


@family("recurrent", 1.2, (3,))
def recurrent(d: Drawer) -> None:
    x = d.pick(3)
    _, t, f = d.shape(x)
    if t > 8:
        raise Refused
    w, layers, both = d.one_of(4, 6), d.one_of(1, 1, 2), d.chance(0.35)
    kind = d.one_of("LSTM", "GRU", "RNN")
    extra = d.one_of("", "", ", bias=False")
    if kind == "LSTM" and d.chance(0.15):
        extra = ", proj_size=3"
    first = d.chance(0.8)
    m = d.part(f"nn.{kind}({f}, {w}, {layers}, batch_first={first}, bidirectional={both}{extra})")
    y, state = d.fresh(), d.fresh()
    given = x if first else f"{x}.transpose(0, 1)"
    if kind != "LSTM" and d.chance(0.3):
        n = layers * (2 if both else 1)
        batch = f"{x}.shape[0]"
        h0 = d.one_of(
            f"torch.zeros({n}, {batch}, {w}, dtype=torch.float64)",
            f"{d.parameter(n, 1, w)}.expand(-1, {batch}, -1).contiguous()",
        )
        given += f", {h0}"
    d.do(f"{y}, {state} = {m}({given})")
    if not first:
        d.let(f"{y}.transpose(0, 1)")
    if d.chance(0.4):
        last = f"{state}[0]" if kind == "LSTM" else state
        d.let(d.one_of(f"{last}[-1]", f"{last}.transpose(0, 1).flatten(1)", f"{last}.mean(0)"))
