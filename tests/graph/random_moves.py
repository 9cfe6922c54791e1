"""Families of random steps: views, splits, joins, permutations, indexing and regrouping."""

from __future__ import annotations

from tests.graph.random_drawer import Drawer, Refused, family


def _dim(d: Drawer, x: str) -> int:
    rank = len(d.shape(x))
    return d.one_of(*range(1, rank), -1) if rank > 1 else 0


@family("join", 2.0)
def join(d: Drawer) -> None:
    x = d.pick(2, 3, 4)
    dim = _dim(d, x)
    y = d.like(x, but=dim % len(d.shape(x)))
    if d.shape(x)[dim] + d.shape(y)[dim] > 28:
        raise Refused
    z = d.like(x)
    low = dim - 1 if dim < 0 else dim
    d.let(
        d.one_of(
            f"torch.cat([{x}, {y}], {dim})", f"torch.cat([{y}, F.relu({x}), {x}], {dim})",
            f"torch.cat([{x}[..., :2], {x}], -1)",
            f"torch.cat([{x}, torch.zeros_like({x})], {dim})",
            f"torch.stack([{x}, {z}], {dim}).flatten({low}, {low + 1})",
            f"torch.stack([{x}, {z}], 1).mean(1)", f"torch.stack([{z}, {x}], 1).flatten(1, 2)",
            f"torch.stack([{x}, {z}], -1)[..., 0]", f"torch.stack([{x}, {z}], 1).unbind(1)[1]",
            f"torch.concat(({x}, {z}), dim={dim}).chunk(2, {dim})[0]", f"torch.hstack([{x}, {z}])",
        )
    )  # fmt: skip


@family("split", 2.5)
def split(d: Drawer) -> None:
    x = d.pick(2, 3, 4)
    dim = _dim(d, x)
    n = d.shape(x)[dim]
    if n < 4:
        raise Refused
    cut = d.rng.randrange(1, n)
    half = n // 2
    d.let(
        d.one_of(
            f"torch.cat({x}.chunk(2, {dim})[::-1], {dim})", f"{x}.chunk(3, {dim})[1]",
            f"torch.cat([{x}.narrow({dim}, {cut}, {n - cut}), {x}.narrow({dim}, 0, {cut})], {dim})",
            f"torch.cat(torch.split({x}, [1, {n - 2}, 1], {dim}), {dim})",
            f"torch.split({x}, [{cut}, {n - cut}], {dim})[0]", f"torch.split({x}, 2, {dim})[-1]",
            f"{x}.chunk(2, {dim})[0] * torch.tanh({x}.chunk(2, {dim})[-1].mean({dim}, True))",
            f"{x}.narrow({dim}, 0, {half}) * torch.tanh({x}.narrow({dim}, {n - half}, {half}))",
            f"{x}.narrow({dim}, 0, {half}) + {x}.narrow({dim}, {half}, {half})",
            f"torch.stack({x}.unbind({dim})[:3], {dim})", f"sum({x}.unbind({dim}))",
            f"torch.tensor_split({x}, [{cut}], {dim})[0]",
            f"{x}.select({dim}, {cut}).unsqueeze({dim}) + {x}",
            f"{x}[..., :{d.shape(x)[-1] - 1}]", f"{x}[..., ::2]", f"{x}[..., 1::2]",
            f"{x}[..., -3:]",
            f"torch.cat([{x}[..., ::2], {x}[..., 1::2]], -1)", f"{x}[:, 1:] - {x}[:, :-1]",
            f"torch.cat([-{x}[..., {d.shape(x)[-1] // 2}:], {x}[..., :{d.shape(x)[-1] // 2}]], -1)",
            f"{x}[:, ::{cut}]", f"{x}[:, -1:].expand_as({x}) + {x}", f"{x}.select(1, -1)",
        )
    )  # fmt: skip


@family("permute", 1.5, (3, 4))
def permute(d: Drawer) -> None:
    x = d.pick(3, 4)
    rank = len(d.shape(x))
    order = list(range(1, rank))
    d.rng.shuffle(order)
    a, b = d.rng.sample(range(1, rank), 2)
    d.let(
        d.one_of(
            f"{x}.permute(0, {', '.join(map(str, order))})", f"{x}.transpose({a}, {b})",
            f"{x}.swapaxes({a}, {b}).contiguous()", f"{x}.movedim({a}, {b})",
            f"torch.einsum('bi...->b...i', {x})", f"{x}.mT", f"{x}.unsqueeze(1).squeeze(1)",
            f"{x}.transpose(0, {a}).transpose(0, {a})",
            f"{x}.transpose(0, 1).tanh().transpose(0, 1)",
            f"{x}[:, None].squeeze()", f"{x}.transpose({a}, {b}).reshape({x}.shape)",
        )
    )  # fmt: skip


@family("regroup", 2.5)
def regroup(d: Drawer) -> None:
    """Views that merge and part dims, with sizes written in or left open."""
    x = d.pick(2, 3, 4)
    shape = d.shape(x)
    rank = len(shape)
    dim = _dim(d, x) % rank
    n = shape[dim]
    g = d.divisor(n)
    before, after = shape[1:dim], shape[dim + 1 :]
    b = d.one_of("-1", f"{x}.shape[0]", f"{x}.size(0)")

    def text(*sizes: object) -> str:
        return ", ".join(str(s) for s in sizes)

    two = text(b, *before, g, n // g, *after)
    back = text(b, *before, n, *after)
    inner = d.one_of("", "", ".tanh()", " * 2", f".softmax({dim})", f".softmax({dim + 1})")
    swapped = text(b, *before, n // g, g, *after)
    last = text(d.one_of(b, f"{x}.shape[0]"), *shape[1:])
    reduced = d.one_of("mean", "sum", "amax")
    crossed = text(0, *range(1, dim), dim + 1, dim, *range(dim + 2, rank + 1))
    d.let(
        d.one_of(
            f"({x}.reshape({two}){inner}).transpose({dim}, {dim + 1}).reshape({back})",
            f"{x}.unflatten({dim}, ({g}, {n // g})).transpose({dim}, {dim + 1})"
            f".flatten({dim}, {dim + 1})",
            f"({x}.reshape({two}){inner}).reshape({back})", f"{x}.reshape({two}).{reduced}({dim})",
            f"{x}.reshape({two}).{reduced}({dim + 1})",
            f"({x}.reshape({swapped}) * 1).reshape({back})",
            f"{x}.reshape({two}).unbind({dim})[0]", f"{x}.reshape({two}).select({dim + 1}, 1)",
            f"{x}.flatten(1).view({last})", f"{x}.reshape({two}).flip({dim}).reshape({back})",
            f"{x}.reshape({two}).permute({crossed})"
            f".reshape({back})", f"{x}.unflatten({dim}, (-1, {g})).sum({dim})",
            f"({x}.reshape({two}) + {x}.reshape({two}).mean({dim}, True)).view({back})",
            f"{x}.reshape({two}).sum({dim}).repeat_interleave({g}, {dim})",
        )
    )  # fmt: skip


@family("view", 1.0)
def view(d: Drawer) -> None:
    """From one rank to another, for what comes next."""
    x = d.pick(2, 3, 4)
    shape = d.shape(x)
    if len(shape) == 2:
        g = d.divisor(shape[1])
        d.let(
            d.one_of(
                f"{x}.view(-1, {g}, {shape[1] // g})",
                f"{x}[:, None]",
                f"{x}.unflatten(1, ({g}, -1))",
            )
        )
    elif len(shape) == 3:
        g = d.divisor(shape[2])
        d.let(
            d.one_of(
                f"{x}.flatten(1)", f"{x}.reshape({x}.shape[0], -1)", f"{x}[:, -1]", f"{x}.mean(1)",
                f"{x}.reshape(-1, {shape[1]}, {g}, {shape[2] // g})", f"{x}[:, :, :, None]",
                f"{x}.view({x}.shape[0], {shape[1]}, {g}, -1).transpose(1, 2)", f"{x}[:, 0]",
                f"{x}.unsqueeze(-1).expand(-1, -1, -1, 3)",
            )
        )  # fmt: skip
    else:
        d.let(
            d.one_of(
                f"{x}.flatten(2).transpose(1, 2)", f"{x}.flatten(1)", f"{x}.mean((2, 3))",
                f"{x}.transpose(1, 2).flatten(2)", f"{x}.flatten(2)", f"{x}.mean(3)",
                f"{x}[:, :, 0]",
                f"{x}.reshape(-1, {shape[1] * shape[2]}, {shape[3]})", f"{x}.flatten(1, 2)",
                f"{x}.amax(1)",
            )
        )  # fmt: skip


@family("turn", 2.0)
def turn(d: Drawer) -> None:
    """Flips, rolls, repeats, windows."""
    x = d.pick(2, 3, 4)
    rank = len(d.shape(x))
    dim = _dim(d, x)
    n = d.shape(x)[dim]
    ones = ", ".join("2" if i == dim % rank else "1" for i in range(rank))
    shift = d.rng.randrange(1, n) if n > 1 else 0
    pads = [0] * (2 * rank)
    at = 2 * (rank - 1 - dim % rank)
    pads[at : at + 2] = d.one_of([1, 2], [0, 3], [-1, 0], [-1, 2], [-1, -1], [2, -1])
    pad = tuple(pads[: at + 2])
    value = d.one_of("", ", value=0.5")
    d.let(
        d.one_of(
            f"{x}.flip({dim})", f"{x} + {x}.flip({dim})", f"{x}.roll({shift}, {dim})",
            f"torch.roll({x}, -1, {dim}) * {x}", f"{x}.repeat({ones})",
            f"torch.tile({x}, ({ones},))",
            f"{x}.repeat_interleave(2, {dim})", f"{x}.unfold({dim}, 2, {d.one_of(1, 2)}).sum(-1)",
            f"{x}.unfold({dim}, 3, 1)[..., 1]", f"F.pad({x}, {pad}{value})", f"F.pad({x}, {pad})",
            f"{x}.expand(2, *{x}.shape)[0]",
            f"{x}.unsqueeze({dim % rank}).repeat_interleave(2, {dim % rank})"
            f".flatten({dim % rank}, {dim % rank + 1})",
            f"torch.cat([{x}, {x}.flip({dim})], {dim})",
            f"{x}.unsqueeze({dim % rank + 1}).expand({', '.join(['-1'] * (dim % rank + 1))}, 2"
            f"{', -1' * (rank - dim % rank - 1)}).flatten({dim % rank}, {dim % rank + 1})",
            f"torch.rot90({x}, 2, ({rank - 2}, {rank - 1})) + {x}", f"{x}.roll((1, 1), (1, {dim}))",
            f"{x}.unfold({dim}, 2, 2).flatten(-2)",
        )
    )  # fmt: skip


@family("index", 2.0)
def index(d: Drawer) -> None:
    """Picking by tensors and lists of numbers."""
    x = d.pick(2, 3, 4)
    rank = len(d.shape(x))
    dim = _dim(d, x) % rank
    n = d.shape(x)[dim]
    wanted = [d.rng.randrange(n) for _ in range(d.one_of(n, n, 3))]
    if d.chance(0.5):
        wanted = d.rng.sample(range(n), n)
    at = "[" + ":, " * dim
    flat = "[" + ", ".join("None" if i != dim else ":" for i in range(rank)) + "]"
    gathered = f"{x}[..., {[0]}]" if dim == rank - 1 else f"{x}[:, [0]] + {x}"
    if len(wanted) == n:
        gathered = f"{x}.gather({dim}, torch.tensor({wanted}){flat}.expand_as({x}))"
    d.let(
        d.one_of(
            f"{x}{at}{wanted}]", f"{x}{at}torch.tensor({wanted})]",
            f"{x}{at}torch.arange({n - 1}, -1, -1)]",
            f"{x}.index_select({dim}, torch.tensor({wanted}))",
            f"torch.take_along_dim({x}, {x}.argsort({dim}), {dim})",
            gathered,
            f"{x}[:, 0][:, None] + {x}", f"{x}{at}{wanted[0]}]", f"{x}[..., {[0, 1]}]",
            f"{x}[..., None, :]",
            f"{x}{at}torch.tensor({[bool(i % 2) for i in range(n)]})]", f"{x}[[1, 0]]",
            f"{x}[torch.arange({x}.shape[0]), 1]",
            f"{x}[:, [0, 1], ..., [1, 0]]",
        )
    )  # fmt: skip


@family("pixels", 4.0, (4,))
def pixels(d: Drawer) -> None:
    x = d.pick(4)
    _, c, h, w = d.shape(x)
    g = d.divisor(c)
    d.let(
        d.one_of(
            f"F.pixel_shuffle({x}, 2)", f"F.pixel_unshuffle({x}, 2)",
            f"F.channel_shuffle({x}, {g})",
            f"F.interpolate({x}, scale_factor=2.0)",
            f"F.interpolate({x}, size=(4, 4), mode='bilinear')",
            f"F.max_pool2d({x}, 2)", f"F.avg_pool2d({x}, 2)", f"F.adaptive_avg_pool2d({x}, 1)",
            f"F.adaptive_avg_pool2d({x}, 2)", f"F.unfold({x}, 2).transpose(1, 2)",
            f"F.lp_pool2d({x}, 2, 2)",
            f"F.unfold({x}, 2, stride=2)", f"F.fold(F.unfold({x}, 2), ({h}, {w}), 2)",
            f"F.max_pool2d({x}, 3, 1, 1)",
            f"F.pad({x}, (1, 1, 1, 1), mode='{d.one_of('reflect', 'replicate', 'circular')}')",
            f"{x}.view(-1, {g}, {c // g}, {h}, {w}).transpose(1, 2).reshape(-1, {c}, {h}, {w})",
            f"F.adaptive_max_pool2d({x}, 2)", f"F.local_response_norm({x}, 3)",
            f"F.avg_pool2d({x}, 3, 1, 1, count_include_pad=False)",
            f"F.grid_sample({x}, {x}[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False)",
        )
    )  # fmt: skip
