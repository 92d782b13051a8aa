"""One token on a GPU: what a block of Falcon-H1 does to it besides matrix products, in seven launches of Triton kernels.

    norm_step      RMSNorm, and the mixer's gated norm                    one launch each
    mamba_step     convolution, step size and state of the mixer          two launches
    attend_step    RoPE, the new key and value, attention over the cache  two launches

A decoding step is a long row of short kernels. Each costs a microsecond or two, however little it does, so what torch would do
in ten launches stands in one here. And a step is recorded once, as a CUDA graph, and then replayed for every token: so nothing in
it may depend on a number that the host knows. How many tokens each sequence has is read on the device, from `lengths`.

The kernels round to the model's dtype where the forward pass does and a difference would add up, and sum in float32. They have
no gradient. None uses atomics: a step gives the same bits every time, and a slot's do not depend on what other slots hold.
To copy this file, also take ssm_scan.py, whose glossary holds here, too. slots are the sequences that decode together.
"""

import torch

from ssm_scan import _backend, _check_conv, _expect, _jit, _launch, _power, _program, _step_triton, constexpr, tl, triton


def kernels_serve(x):
    """Whether one token goes through these kernels where x lies."""
    return x.is_cuda and not torch.is_grad_enabled() and _backend(None, x) == "triton"


# ---------------------------------------------------------------------------------------------------------------------
# 1. Norms


@_jit
def _norm_kernel(y, z, weight, out, eps, s_y, s_z,
                 G: constexpr, WIDTH: constexpr, BLOCK: constexpr, NORM: constexpr, BEFORE: constexpr):
    """One group of one row a program: w RMS(y silu(z)); BEFORE the gate: w RMS(y) silu(z); without NORM: y silu(z);
    with z None: w RMS(y), where the cast stands before the weight, as in the published model."""
    _, g, row = _program(1, G)
    d = g * WIDTH + tl.arange(0, BLOCK)
    inside = d < (g + 1) * WIDTH
    v = tl.load(y + row * s_y + d, mask=inside, other=0.0).to(tl.float32)
    if z is not None:
        gate = tl.load(z + row * s_z + d, mask=inside, other=0.0).to(tl.float32)
        gate *= tl.sigmoid(gate)
        if not BEFORE:
            v *= gate
    if NORM:
        v *= tl.rsqrt(tl.sum(v * v, 0) / WIDTH + eps)
        if z is None:
            v = v.to(out.dtype.element_ty).to(tl.float32)
        v *= tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    if z is not None and BEFORE:
        v *= gate
    tl.store(out + (row * G + g) * WIDTH + d - g * WIDTH, v, mask=inside)


def norm_step(y, weight, eps, *, z=None, groups=1, norm_before_gate=False):
    """model.RMSNorm, or with z model.gated_norm. y and z (b, t, I), weight (I,) or None: only gate -> (b, t, I) in y's dtype."""
    width = y.shape[-1] // groups
    _expect(width <= 16384, "norm", f"{width} channels of a group", "at most 16384, what the registers of one program hold")
    y, out = y.flatten(0, -2), torch.empty(y.shape, dtype=y.dtype, device=y.device)
    z = z if z is None else z.flatten(0, -2)
    _launch(_norm_kernel, len(y) * groups, y, z, weight, out, eps, y.stride(0), 0 if z is None else z.stride(0),
            G=groups, WIDTH=width, BLOCK=_power(width), NORM=weight is not None, BEFORE=norm_before_gate,
            num_warps=4 if width <= 2048 else 16)  # at most 32 channels a thread
    return out


# ---------------------------------------------------------------------------------------------------------------------
# 2. The mixer. The convolution has a kernel of its own: heads of a group share B and C, so some would still read the inputs of
# the last tokens while another moves them on.


@_jit
def _conv_step_kernel(state, x, weight, bias, y, s_slot, s_channel, s_place, s_x,
                      CHANNELS: constexpr, K: constexpr, BD: constexpr):
    """y = silu(bias + sum_j w_j place_j), the newest input last; the places then move up by one, in the same thread."""
    tile, _, b = _program((CHANNELS + BD - 1) // BD, 1)
    d = tile * BD + tl.arange(0, BD)
    in_d, place = d < CHANNELS, state + b * s_slot + d * s_channel
    new = tl.load(x + b * s_x + d, mask=in_d, other=0.0)
    z = tl.zeros((BD,), tl.float32)
    if bias is not None:
        z += tl.load(bias + d, mask=in_d, other=0.0).to(tl.float32)
    for j in tl.static_range(K - 1):
        old = tl.load(place + j * s_place, mask=in_d, other=0.0)
        z += tl.load(weight + d * K + j, mask=in_d, other=0.0).to(tl.float32) * old.to(tl.float32)
        if j > 0:
            tl.store(place + (j - 1) * s_place, old, mask=in_d)
    z += tl.load(weight + d * K + K - 1, mask=in_d, other=0.0).to(tl.float32) * new.to(tl.float32)
    if K > 1:
        tl.store(place + (K - 2) * s_place, new, mask=in_d)
    tl.store(y + b * CHANNELS + d, z * tl.sigmoid(z), mask=in_d)


def mamba_step(conv, state, xBC, dt, weight, bias, dt_bias, A_log, D, limit):
    """One token of the mixer: `causal_conv1d_step` with silu, then `ssd_step`. Both states change in place.

    conv (b, d, k - 1) and state (b, h, p, n) float32, xBC (b, d) the channels of x, B and C, dt (b, h); weight (d, k), bias (d,)
    or None; dt_bias, A_log and D (h,); the step size is softplus(dt + dt_bias), clamped to limit. Returns y (b, h, p)."""
    (b, h, p, n), d, k = state.shape, xBC.shape[1], weight.shape[1]
    g = (d - h * p) // (2 * n)
    _expect(d == h * p + 2 * g * n and g >= 1 and h % g == 0, "xBC", f"{d} channels", f"h p + 2 g n with h, p, n = {h, p, n}")
    _expect(tuple(dt.shape) == (b, h), "dt", tuple(dt.shape), (b, h))
    _expect(state.dtype == torch.float32 and state[0].is_contiguous(), "state", state.dtype, "float32, each slot contiguous")
    _check_conv(xBC, weight, bias, "silu", conv, b)
    y = torch.empty(b, d, dtype=xBC.dtype, device=xBC.device)
    # A thread for each of a program's 128 channels: no other can have overwritten the places that it reads.
    _launch(_conv_step_kernel, triton.cdiv(d, 128) * b, conv, xBC, weight, bias, y, *conv.stride(), xBC.stride(0),
            CHANNELS=d, K=k, BD=128, num_warps=4)
    x, B, C = y.split([h * p, g * n, g * n], 1)
    return _step_triton(state, x.view(b, h, p), dt, A_log, B.view(b, g, n), C.view(b, g, n), D, dt_bias, limit)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Attention. One query a slot reads all keys of the slot: a matter of memory bandwidth, which takes programs on every
# multiprocessor, and one slot has too few heads for that. So the keys are split ("flash-decoding"). A program takes the keys
# [i span, (i + 1) span) of one slot and one key head, and the query heads that share it, with a running maximum m as in
# FlashAttention; a second kernel weighs the parts of a head with what each has seen of the sum:
#
#     part_i = sum_j e^(s_j) v_j / e^(lse_i)      lse_i = log sum_j e^(s_j)      over the keys j of split i, s_j = q . k_j / sqrt(hd)
#     y = sum_i e^(lse_i) part_i / sum_i e^(lse_i)                               (in powers of 2, which the hardware has)
#
# The grid has a program for every key there is room for; those beyond a slot's length return at once. It changes only when the
# cache grows.


@_jit
def _rotated(x, cos, sin, d, mask, HD: constexpr):
    """RoPE, as model.rotate: channel d turns together with the one that is half a head away."""
    own, other = tl.load(x + d, mask=mask, other=0.0), tl.load(x + (d + HD // 2) % HD, mask=mask, other=0.0)
    return own.to(tl.float32) * cos + other.to(tl.float32) * sin


@_jit
def _attend_kernel(q, k, v, cos, sin, lengths, keys, values, part, lse, multiplier, scale, room, splits, span,
                   HKV: constexpr, ROWS: constexpr, HD: constexpr, BR: constexpr, BD: constexpr, BN: constexpr):
    """One split of the keys of one slot and key head, for its ROWS query heads. The split in which the new key falls starts from
    that one, and appends it: no program reads what another writes."""
    split, head, slot = _program(splits, HKV)
    held = tl.minimum(tl.load(lengths + slot), room).to(tl.int32)  # tokens in the cache, without the new one
    if split * span > held:
        return
    r, d, n = tl.arange(0, BR), tl.arange(0, BD), tl.arange(0, BN)
    in_d, in_q, first = d < HD, (r < ROWS)[:, None] & (d < HD)[None, :], (slot * HKV + head) * room
    c = tl.load(cos + slot * HD + d, mask=in_d, other=0.0).to(tl.float32)
    s = tl.load(sin + slot * HD + d, mask=in_d, other=0.0).to(tl.float32)
    queries = q + (slot * HKV + head) * ROWS * HD + r[:, None] * HD  # query heads that share a key head lie together
    Q = _rotated(queries, c[None, :], s[None, :], d[None, :], in_q, HD).to(keys.dtype.element_ty)  # (BR, BD)
    new_k = (_rotated(k + (slot * HKV + head) * HD, c, s, d, in_d, HD) * multiplier).to(keys.dtype.element_ty)  # (BD,)
    new_v = tl.load(v + (slot * HKV + head) * HD + d, mask=in_d, other=0.0).to(values.dtype.element_ty)
    own = held // span == split
    append = in_d & own & (held < room)  # a slot that is full keeps what it has: nobody reads its answer
    tl.store(keys + (first + held) * HD + d, new_k, mask=append)
    tl.store(values + (first + held) * HD + d, new_v, mask=append)
    score = tl.sum(Q.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * scale
    m, total = tl.where(own, score, float("-inf")), tl.where(own, 1.0, 0.0) + tl.zeros((BR,), tl.float32)
    acc = tl.where(own, new_v.to(tl.float32), 0.0)[None, :] + tl.zeros((BR, BD), tl.float32)
    for n0 in range(split * span, tl.minimum(split * span + span, held), BN):
        inside, place = n0 + n < held, (first + n0 + n) * HD
        K = tl.load(keys + place[None, :] + d[:, None], mask=inside[None, :] & in_d[:, None], other=0.0)  # (BD, BN)
        V = tl.load(values + place[:, None] + d[None, :], mask=inside[:, None] & in_d[None, :], other=0.0)  # (BN, BD)
        S = tl.where(inside[None, :], tl.dot(Q, K, input_precision="ieee") * scale, float("-inf"))
        top = tl.maximum(m, tl.max(S, 1))
        P, fade = tl.exp2(S - top[:, None]), tl.exp2(m - top)
        acc = tl.dot(P.to(V.dtype), V, acc * fade[:, None], input_precision="ieee")
        m, total = top, total * fade + tl.sum(P, 1)
    row = ((slot * HKV + head) * ROWS + r) * splits + split  # (BR,)
    tl.store(lse + row, m + tl.log2(total), mask=r < ROWS)
    tl.store(part + row[:, None] * HD + d[None, :], acc / total[:, None], mask=in_q)


@_jit
def _combine_kernel(part, lse, lengths, y, room, splits, span, HQ: constexpr, HD: constexpr, BS: constexpr, BD: constexpr):
    """The splits of one slot and query head that hold something."""
    _, head, slot = _program(1, HQ)
    used = tl.minimum(tl.minimum(tl.load(lengths + slot), room).to(tl.int32) // span + 1, splits)
    i, d, row = tl.arange(0, BS), tl.arange(0, BD), (slot * HQ + head) * splits
    m, total, acc = tl.full((1,), float("-inf"), tl.float32), tl.zeros((1,), tl.float32), tl.zeros((BD,), tl.float32)
    for i0 in range(0, used, BS):
        inside = i0 + i < used
        e = tl.load(lse + row + i0 + i, mask=inside, other=float("-inf"))
        v = tl.load(part + (row + i0 + i)[:, None] * HD + d[None, :], mask=inside[:, None] & (d < HD)[None, :], other=0.0)
        top = tl.maximum(m, tl.max(e, 0))
        weight, fade = tl.exp2(e - top), tl.exp2(m - top)
        acc, total, m = acc * fade + tl.sum(weight[:, None] * v, 0), total * fade + tl.sum(weight, 0), top
    tl.store(y + (slot * HQ + head) * HD + d, acc / total, mask=d < HD)


def span_of(length, rows):
    """How many keys a split takes, for `rows` pairs of slot and key head and a cache of `length`: a power of two that makes about
    512 programs, four for each of an H100's 132 multiprocessors. At least 128: at the 7B's 6 queries a key, the parts that are
    written and read again are then 9% of the keys' traffic. At most 1024, 1%: a few long slots among many short ones would be
    waited for. One slot of 16k tokens and 2 key heads makes 256 programs; 256 slots make 8,192, which hold 1,024 keys each."""
    return 1 << max(7, min(10, (length * rows // 512).bit_length() - 1))


def attend_step(q, k, v, cos, sin, lengths, keys, values, *, key_multiplier=1.0):
    """Append one token to every slot and attend to all it holds: q (slots, 1, hq, hd), k and v (slots, 1, hkv, hd) before RoPE, cos and
    sin (slots, 1, 1, hd) of model.rope_table, lengths (slots,) int64 tokens held so far, keys and values (slots, hkv, length, hd)
    in the model's dtype, changed in place -> y (slots, 1, hq, hd). lengths stay as they are."""
    (slots, _, hq, hd), (hkv, length) = q.shape, keys.shape[1:3]
    _expect(hd <= 256, "head_dim", hd, "at most 256, what the registers of one program hold")
    _expect(hq // hkv <= 16, "query heads of a key head", hq // hkv, "at most 16, the rows of a tensor core's tile")
    _expect(keys.is_contiguous() and values.is_contiguous(), "cache", "keys or values with gaps", "contiguous ones")
    q, k, v, cos, sin = (x.contiguous() for x in (q, k, v, cos, sin))
    span, bd = span_of(length, slots * hkv), _power(hd)
    splits = triton.cdiv(length, span)
    part, y = torch.empty(slots, hq, splits, hd, device=q.device), torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(slots, hq, splits, device=q.device)
    # A tile has 16 KB of keys and 16 KB of values: five programs fit into an H100's multiprocessor, and all five load at once.
    bn = min(64, max(16, 16384 // (bd * q.element_size())))
    _launch(_attend_kernel, slots * hkv * splits, q, k, v, cos, sin, lengths, keys, values, part, lse, key_multiplier,
            hd**-0.5 * 1.4426950408889634, length, splits, span,  # 1 / ln 2
            HKV=hkv, ROWS=hq // hkv, HD=hd, BR=16, BD=bd, BN=bn, num_warps=4, num_stages=2)
    _launch(_combine_kernel, slots * hq, part, lse, lengths, y, length, splits, span, HQ=hq, HD=hd, BS=32, BD=bd, num_warps=4)
    return y
