"""Families of random steps: attention in its many spellings, and products of activations."""

from __future__ import annotations

from tests.graph.random_drawer import Drawer, Refused, family


def _qkv(d: Drawer, x: str, heads: int, groups: int, size: int) -> tuple[str, str, str]:
    """Queries (B, H, T, D), keys and values (B, G, T, D) from one or from three layers."""
    _, t, f = d.shape(x)
    bias = d.one_of("", ", bias=False")
    batch = d.one_of("-1", f"{x}.shape[0]", f"{x}.size(0)")
    time = t if batch == "-1" else d.one_of(t, f"{x}.shape[1]", "-1")
    free = batch != "-1" and time != "-1" and d.chance(0.5)
    fused = d.chance(0.5)
    if fused and groups == heads and d.chance(0.7):
        w = d.part(f"nn.Linear({f}, {3 * heads * size}{bias})")
        names = (d.fresh(), d.fresh(), d.fresh())
        left, y = ", ".join(names), f"{w}({x})"
        shape = f"{batch}, {time}"
        d.do(
            d.one_of(
                f"{left} = {y}.reshape({shape}, 3, {heads}, {size}).permute(2, 0, 3, 1, 4)",
                f"{left} = {y}.view({shape}, 3, {heads}, {size}).permute(2, 0, 3, 1, 4).unbind(0)",
                f"{left} = {y}.view({shape}, {heads}, {3 * size}).transpose(1, 2).chunk(3, -1)",
                f"{left} = [t.view({shape}, {heads}, {size}).transpose(1, 2)"
                f" for t in {y}.chunk(3, -1)]",
                f"{left} = {y}.view({shape}, {heads}, 3, {size}).transpose(1, 2).unbind(-2)",
                f"{left} = [t.unflatten(-1, ({heads}, -1)).transpose(1, 2)"
                f" for t in {y}.split({heads * size}, 2)]",
            )
        )  # fmt: skip
        return names
    if fused:
        w = d.part(f"nn.Linear({f}, {(heads + 2 * groups) * size}{bias})")
        names = (d.fresh(), d.fresh(), d.fresh())
        cuts = [heads * size, groups * size, groups * size]
        d.do(f"{', '.join(names)} = {w}({x}).split({cuts}, -1)")
    else:
        y = d.like(x) if d.chance(0.2) else x
        names = (
            d.let(f"{d.part(f'nn.Linear({f}, {heads * size}{bias})')}({x})"),
            d.let(f"{d.part(f'nn.Linear({f}, {groups * size}{bias})')}({y})"),
            d.let(f"{d.part(f'nn.Linear({f}, {groups * size}{bias})')}({y})"),
        )
    made = []
    for name, n in zip(names, (heads, groups, groups), strict=True):
        sizes = f"-1, {size}" if free else d.one_of(f"{n}, {size}", f"{n}, {size}", f"{n}, -1")
        if time == "-1":
            sizes = f"{n}, {size}"
        made.append(d.let(f"{name}.view({batch}, {time}, {sizes}).transpose(1, 2)"))
    return made[0], made[1], made[2]


def _rotate(d: Drawer, x: str) -> str:
    """A rotary embedding, tables as buffers or computed."""
    t, n = d.shape(x)[-2:]
    if n % 2:
        return x
    if d.chance(0.4):
        c, s = d.buffer(t, n), d.buffer(t, n)
    else:
        inverse = d.buffer(n // 2)
        angle = d.let(f"torch.cat([torch.outer(torch.arange({t}), {inverse})] * 2, -1)")
        c, s = d.let(f"{angle}.cos()"), d.let(f"{angle}.sin()")
    half = n // 2
    turned = f"torch.cat([-{x}[..., {half}:], {x}[..., :{half}]], -1)"
    return d.let(f"{x} * {c} + {turned} * {s}")


@family("attention", 4.5, (3,))
def attention(d: Drawer) -> None:
    x = d.pick(3)
    _, t, f = d.shape(x)
    heads, size = d.one_of(2, 3, 4, 4), d.one_of(2, 3, 4)
    groups = d.divisor(heads, 1) if d.chance(0.4) else heads
    if d.chance(0.4):
        norm = d.one_of("F.layer_norm({}, ({},))", "F.rms_norm({}, ({},))")
        made = d.part(f"nn.LayerNorm({f})") + f"({x})"
        inner = d.let(made if d.chance(0.5) else norm.format(x, f))
    else:
        inner = x
    q, k, v = _qkv(d, inner, heads, groups, size)
    if d.chance(0.25):  # qk-norm
        kind = d.one_of(f"nn.LayerNorm({size})", f"nn.RMSNorm({size})")
        q, k = d.let(f"{d.part(kind)}({q})"), d.let(f"{d.part(kind)}({k})")
    elif d.chance(0.15):
        q, k = (d.let(f"F.normalize({n}, dim=-1, eps=0.1)") for n in (q, k))
    if d.chance(0.25):
        q, k = _rotate(d, q), _rotate(d, k)
    mask = "None"
    if d.chance(0.3):
        mask = d.one_of(
            f"torch.tril(torch.ones({t}, {t}, dtype=torch.bool))",
            f"torch.zeros({t}, {t}, dtype=torch.float64)"
            f".masked_fill(torch.ones({t}, {t}).triu(1).bool(), -1e9)",
            d.parameter(heads, t, t), d.parameter(1, t, t),
            f"{d.parameter(7, heads)}[(torch.arange({t})"
            f"[:, None] - torch.arange({t})[None]).clamp(-3, 3) + 3].permute(2, 0, 1)",
        )  # fmt: skip
    out = _attend(d, q, k, v, mask, heads, groups)
    if d.shape(out)[-1] != size:
        raise Refused
    merged = d.let(
        d.one_of(
            f"{out}.transpose(1, 2).reshape({x}.shape[0], {t}, {heads * size})",
            f"{out}.transpose(1, 2).flatten(2)",
            f"{out}.permute(0, 2, 1, 3).reshape(-1, {t}, {heads * size})",
            f"{out}.transpose(1, 2).contiguous().view({x}.shape[0], {t}, -1)",
            f"{out}.transpose(1, 2).reshape(*{x}.shape[:-1], -1)",
        )
    )  # fmt: skip
    if d.chance(0.15):
        merged = d.let(
            f"{merged} * torch.sigmoid({d.part(f'nn.Linear({f}, {heads * size})')}({x}))"
        )
    y = d.let(f"{d.part(f'nn.Linear({heads * size}, {f})')}({merged})")
    if d.chance(0.6):
        d.let(d.one_of(f"{x} + {y}", f"{x} + {d.parameter(f)} * {y}"))


def _attend(d: Drawer, q: str, k: str, v: str, mask: str, heads: int, groups: int) -> str:
    """The kernel: fused, or by hand with products or einsum."""
    bool_mask = mask.endswith("bool))") and "masked_fill" not in mask
    fused = d.chance(0.5)
    grouped = groups != heads and not (fused and d.chance(0.5))
    n = heads // groups
    if grouped:
        if d.chance(0.3) and not fused and mask == "None":  # queries in groups instead
            q5 = d.let(f"{q}.unflatten(1, ({groups}, {n}))")
            w = d.let(f"({q5} @ {k}.unsqueeze(2).transpose(-1, -2)).softmax(-1)")
            return d.let(f"({w} @ {v}.unsqueeze(2)).flatten(1, 2)")
        way = d.one_of(
            f"{{}}.repeat_interleave({n}, 1)",
            f"{{}}[:, :, None].expand(-1, -1, {n}, -1, -1).flatten(1, 2)",
            f"{{}}[:, :, None].expand(-1, {groups}, {n}, -1, -1)"
            f".reshape(-1, {heads}, *{{}}.shape[2:])",
        )  # fmt: skip
        k, v = d.let(way.format(k, k)), d.let(way.format(v, v))
    if fused:
        extra = "" if mask == "None" else f", attn_mask={mask}"
        if not extra and d.chance(0.2):
            extra = ", is_causal=True"
        if d.chance(0.2):
            extra += ", scale=0.6"
        if groups != heads and not grouped:
            extra += ", enable_gqa=True"
        return d.let(f"F.scaled_dot_product_attention({q}, {k}, {v}{extra})")
    size = d.shape(q)[-1]
    scale = d.one_of(f" / math.sqrt({size})", f" * {q}.size(-1) ** -0.5", " * 0.4", "")
    if groups != heads and not grouped:
        raise Refused
    w = d.let(
        d.one_of(
            f"{q} @ {k}.transpose(-2, -1){scale}", f"torch.matmul({q}{scale}, {k}.transpose(2, 3))",
            f"torch.einsum('bhid,bhjd->bhij', {q}, {k}){scale}",
            f"torch.einsum('...id,...jd->...ij', {q}, {k}){scale}",
            f"torch.bmm({q}.flatten(0, 1), {k}.flatten(0, 1).mT).view({q}.shape[0], {heads}, "
            f"{q}.shape[2], {k}.shape[2]){scale}", f"-torch.cdist({q}, {k})",
        )
    )  # fmt: skip
    if bool_mask:
        w = d.let(d.one_of(f"{w}.masked_fill(~{mask}, -1e1)", f"torch.where({mask}, {w}, -1e1)"))
    elif mask != "None":
        w = d.let(f"({w} + {mask}).clamp(min=-20)")
    kind = d.rng.randrange(6)
    if kind < 4:
        w = d.let(d.one_of(f"{w}.softmax(-1)", f"F.softmax({w}, dim=-1)", f"torch.softmax({w}, 3)"))
    elif kind == 4:
        w = d.let(f"F.relu({w})")
    return d.let(
        d.one_of(
            f"{w} @ {v}", f"torch.einsum('bhij,bhjd->bhid', {w}, {v})", f"torch.matmul({w}, {v})"
        )
    )


@family("attention module", 0.6, (3,))
def attention_module(d: Drawer) -> None:
    x = d.pick(3, test=lambda v: v.shape[-1] % 2 == 0)
    f = d.shape(x)[-1]
    heads = d.divisor(f)
    if d.chance(0.6):
        m = d.part(
            f"nn.MultiheadAttention({f}, {heads}, batch_first=True{d.one_of('', ', bias=False')})"
        )
        d.let(f"{m}({x}, {x}, {x}, need_weights={d.chance(0.3)})[0]")
    else:
        first = d.one_of(True, False)
        m = d.part(
            f"nn.TransformerEncoderLayer({f}, {heads}, {d.wide()}, 0.0, batch_first=True,"
            f" norm_first={first})"
        )
        d.let(f"{m}({x})")


@family("product", 2.0, (3,))
def product(d: Drawer) -> None:
    """Activations multiplied with each other, along whatever dims match."""
    x = d.pick(3)
    _, t, f = d.shape(x)
    y = d.like(x)
    z = d.like(x, but=1)
    d.let(
        d.one_of(
            f"{x} @ {y}.transpose(1, 2) @ {y} / {f}", f"{x}.transpose(1, 2) @ {y}",
            f"torch.bmm({x}, {z}.mT)",
            f"({x} @ {z}.transpose(1, 2)).softmax(-1) @ {z}",
            f"torch.einsum('btf,bsf->bts', {x}, {z})",
            f"torch.einsum('btf,btg->bfg', {x}, {y})", f"torch.einsum('btf,btf->bf', {x}, {y})",
            f"torch.einsum('btf,btf->bt', {x}, {y})[:, None] * {x}.mT",
            f"({x} * {y}).sum(-1, keepdim=True) * {x}",
            f"torch.matmul({x}, {y}.mean(1)[:, :, None]).squeeze(-1)",
            f"torch.einsum('btf,bf->bt', {x}, {y}.amax(1))",
            f"torch.baddbmm({x}, {x} @ {y}.mT, {y}, alpha=0.1)",
            f"torch.einsum('btf,bsg->btsfg', {x}[:, :2], {y}[:, :2])"
            ".flatten(3)", f"{x} @ F.softmax({y}, 1).transpose(1, 2) @ {x}",
            f"torch.cdist({x}, {z})",
            f"F.elu({x}) @ (F.elu({y}).transpose(1, 2) @ {y}) / {t * f}",
            f"F.cosine_similarity({x}, {y}, dim=-1)",
            f"torch.einsum('btf,btf->btf', {x}, {y})", f"torch.einsum('btf->bt', {x})",
            f"torch.tensordot({x}, {y}, ([2], [2]))"
            f".mean(2)",
        )
    )  # fmt: skip


@family("product of vectors", 1.2, (2,))
def product_of_vectors(d: Drawer) -> None:
    x = d.pick(2)
    y, z = d.like(x), d.like(x, but=1)
    n = d.shape(x)[1]
    p = d.parameter(n, d.wide(), d.shape(z)[1])
    d.let(
        d.one_of(
            f"torch.einsum('bi,bj->bij', {x}, {z})", f"({x}[:, :, None] * {z}[:, None]).flatten(1)",
            f"{x} * ({x} * {y}).sum(1, keepdim=True)", f"({x} @ {z}.new_ones({n}, 4))",
            f"({x} @ {y}.t()) @ {y} / {n}", f"torch.einsum('bi,ioj,bj->bo', {x}, {p}, {z})",
            f"F.bilinear({x}, {z}, {p}.transpose(0, 1).contiguous())",
            f"torch.outer({x}[0], {z}[0])[:, :2].T + 0 * {x}[:2]",
            f"torch.einsum('bi,ioj->boj', {x}, {p})",
            f"{x}[:, None] @ {y}[:, :, None] * {x}[:, None]",
        )
    )  # fmt: skip
