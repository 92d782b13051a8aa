"""The state-space half of Falcon-H1: the SSD scan of Mamba-2 and the short causal convolution in front of it.

Three backends compute the same function and all of its gradients:

    "recurrent"   the definition, one token after another; in float64 the oracle of the tests
    "torch"       for CPUs: sequences are cut into chunks, and the scan becomes matrix products (section 2)
    "triton"      for GPUs: the same in hand-written kernels, forward and backward (section 3)

    python tests/compile_kernels.py 90          registers, spills and shared memory of the kernels, without a GPU
    TRITON_INTERPRET=1 python your_script.py    backend="triton" on a CPU, slowly, in Triton's interpreter

The file stands alone: it needs torch, and triton on GPUs. Argument names follow mamba_ssm and causal_conv1d.

Glossary (Mamba-2 is arXiv 2405.21060)
    b, t, h, p   batch, tokens, heads, channels per head (the paper's P, "head dim")
    g, n         groups that share B and C: head j reads group j // (h / g); size of the state (the paper's N)
    s            sequences: the batch rows, or the documents packed one after another in a single row
    k, l         chunks, tokens per chunk
    x            (b, t, h, p)   what is written into the state
    dt           (b, t, h)      step size Delta, positive, after softplus(dt + dt_bias) if that is asked for
    A            (h,)           negative; one step keeps exp(dt A) of the state ("scalar-identity A", section 3)
    B, C         (b, t, g, n)   where in the state to write, and what to read from it (the SSM's keys and queries)
    D            (h,)           skip connection from x to y
    S            (s, h, p, n)   the state, one p x n matrix per head, always float32 or wider
    cu_seqlens   (s + 1,)       where packed documents start, and the end: [0, 7, 19] is 7 tokens and 12 tokens

Deviations from Mamba-2: none in the function. Decays are differences of cumulative sums taken in float64: over a
strongly decaying chunk a sum reaches -10^4, which leaves float32 three digits behind the point. (The kernels
store pairs of float32.) No chunk holds tokens of two documents, so nothing needs a mask and nothing can leak.
"""

import math
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl

    _jit, constexpr = triton.jit, tl.constexpr
except ImportError:  # macOS and Windows have no Triton: kernels are defined as plain functions and never run
    triton, tl, constexpr = None, None, int

    def _jit(kernel):
        return kernel


# 1. The scan and its definition -----------------------------------------------------------------------------


def ssd_scan(x, dt, A, B, C, *, D=None, dt_bias=None, dt_softplus=False, initial_states=None, cu_seqlens=None,
             chunk_size=256, backend=None, return_final_states=True):
    """The SSD scan (Mamba-2, equation 1, discretised as in its section 2.1):

        S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T          y_t = S_t C_t + D x_t

    Args:
        x: (b, t, h, p), any t >= 1. x, B and C share one dtype.
        dt: (b, t, h), positive, or with dt_softplus raw: the step size is then softplus(dt + dt_bias).
        A: (h,), negative.
        B, C: (b, t, g, n), where g divides h.
        D, dt_bias: (h,).
        initial_states: (s, h, p, n), zeros if None; s = b, or the number of packed sequences.
        cu_seqlens: (s + 1,), packs s sequences along t; then b = 1. A tuple under torch.compile.
        chunk_size: the most tokens per chunk; changes speed only.
        backend: "recurrent", "torch" or "triton"; None picks "triton" on a GPU and "torch" elsewhere.
        return_final_states: False returns None for them and saves their memory, 3 MB per sequence at 7B.

    Returns:
        y (b, t, h, p) in x's dtype and the final states (s, h, p, n), float32 (float64 for float64 inputs).
        Both are differentiable in every tensor.

    Raises:
        ValueError: names the argument; wrong shapes, bad cu_seqlens, a backend that is not available, A >= 0
            (on a GPU y is NaN instead: looking at A would make the host wait).
    """
    backend = _backend(backend, x)
    _expect(x.dim() == 4 and x.shape[1] >= 1, "x", tuple(x.shape), "(b, t, h, p) with t >= 1")
    _expect(isinstance(chunk_size, int) and chunk_size >= 1, "chunk_size", chunk_size, "an integer >= 1")
    cu = check_cu_seqlens(cu_seqlens, *x.shape[:2])
    _check_scan(x, dt, A, B, C, D, dt_bias, initial_states, len(cu) - 1)

    shape = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)  # of the state and of all sums
    dt = _step_size(dt, dt_bias, dt_softplus, dtype)
    A, D, S = (v if v is None else v.to(dtype) for v in (A, D, initial_states))
    x, dt, B, C = (v.flatten(0, 1) for v in (x, dt, B, C))  # all sequences in one row, (tokens, ...)
    if backend == "triton":
        y, S = _scan_triton(x, dt, B, C, A, D, S, cu, chunk_size, return_final_states)
    else:
        if S is None:
            S = x.new_zeros(len(cu) - 1, *x.shape[1:], B.shape[2], dtype=dtype)
        scan = _scan_chunked if backend == "torch" else _scan_recurrent
        y, S = scan(x.to(dtype), dt, B.to(dtype), C.to(dtype), A, S, cu, chunk_size)
        y = y if D is None else torch.addcmul(y, D[:, None], x)
    return y.to(x.dtype).view(shape), S if return_final_states else None


def _step_size(dt, dt_bias, dt_softplus, dtype):
    """softplus(dt + bias), in the dtype of the state: a bfloat16 step would lose the decay's digits."""
    dt = dt.to(dtype)
    dt = dt if dt_bias is None else dt + dt_bias.to(dtype)
    return F.softplus(dt) if dt_softplus else dt


def _scan_recurrent(x, dt, B, C, A, S, cu, chunk_size):
    """The definition. x (tokens, h, p), dt (tokens, h), B and C (tokens, g, n), S (s, h, p, n)."""
    B, C = (v.repeat_interleave(x.shape[1] // v.shape[1], 1) for v in (B, C))  # (tokens, h, n)
    ys, finals = [], []
    for state, start, end in zip(S, cu, cu[1:]):
        for i in range(start, end):
            decay = torch.exp(dt[i] * A)[:, None, None]
            state = decay * state + torch.einsum("h,hp,hn->hpn", dt[i], x[i], B[i])
            ys.append(torch.einsum("hpn,hn->hp", state, C[i]))
        finals.append(state)
    return torch.stack(ys), torch.stack(finals)


# 2. The scan in matrix products -----------------------------------------------------------------------------


def _scan_chunked(x, dt, B, C, A, S, cu, chunk_size):
    """The same in matrix products (Mamba-2, section 6). With c_i = sum_{j<=i} dt_j A inside one chunk of l tokens,

        y_i = sum_{j<=i} exp(c_i - c_j) (C_i . B_j) dt_j x_j      attention-like, within the chunk      (step 1)
            + exp(c_i) S C_i                                      what the entering state adds          (step 4)
        S'  = exp(c_l) S + sum_j exp(c_l - c_j) dt_j x_j B_j^T    the state handed on                   (steps 2, 3)

    Padding has dt = 0: it neither writes nor decays, so c_l is right for chunks that are not full, too.
    """
    (h, p), (g, n) = x.shape[1:], B.shape[1:]
    l = min(chunk_size, chunk_of(p, n), max(end - start for start, end in zip(cu, cu[1:])))
    index, inverse = _chunk_rows(cu, l, x.device)
    x, dt, B, C = (gather_rows(v, index, inverse) for v in (x, dt, B, C))  # (k, l, h, p), (k, l, h), (k, l, g, n)
    valid = index == index[:, :1] + torch.arange(l, device=x.device)
    dt = torch.where(valid[..., None], dt, 0).transpose(1, 2)  # (k, h, l)
    a = (dt * A[:, None]).double()
    c = a.cumsum(2)
    # From here on time is the last dimension: the heads of a group, rows of one matrix, share B and C uncopied.
    dtx = x.permute(0, 2, 3, 1) * dt[:, :, None]  # (k, h, p, l)
    B, C = B.transpose(1, 2), C.permute(0, 2, 3, 1)  # (k, g, l, n), (k, g, n, l)

    def by_group(v):  # (k, h, p, .) -> (k, g, p h / g, .)
        return v.reshape(len(v), g, -1, v.shape[-1])

    # Step 1, within the chunk.
    y = dtx @ _DecayedScores.apply(B @ C, c)  # (k, h, p, l)

    # Step 2, what each chunk adds to the state: one (p h / g x l)(l x n) product per group. c_l - c_j is a sum
    # over the tokens after j, not a difference.
    rest = F.pad(a[..., 1:].flip(2).cumsum(2).flip(2), (0, 1)).to(x.dtype)  # (k, h, l)
    written = dtx * _bounded_exp(rest)[:, :, None]  # (k, h, p, l)
    added = (by_group(written) @ B).view(len(x), h, p, n)

    # Step 3, from chunk to chunk, the only sequential loop: t / l short steps.
    keep = _bounded_exp(c[..., -1].to(x.dtype))[..., None, None]  # (k, h, 1, 1)
    chunks = [-(-(end - start) // l) for start, end in zip(cu, cu[1:])]  # of each sequence
    entering, finals = [], []
    for state, *own in zip(S, keep.split(chunks), added.split(chunks)):
        for kept, new in zip(*own):
            entering.append(state)
            state = torch.addcmul(new, kept, state)
        finals.append(state)

    # Step 4, what the entering state adds to each token's output.
    read = by_group(torch.stack(entering)) @ C  # (k, g, p h / g, l)
    y = torch.addcmul(y, read.view(y.shape), _bounded_exp(c.to(x.dtype))[:, :, None])
    return gather_rows(y.permute(0, 3, 1, 2).flatten(0, 1), inverse), torch.stack(finals)


class _DecayedScores(torch.autograd.Function):
    """(B C^T)_ji exp(c_i - c_j) at row j, column i >= j, else 0: bc (k, g, l, l), c (k, h, l) -> (k, h, l, l).

    dc_i = sum of column i - sum of row i, without the diagonal: there the two terms cancel exactly, and
    subtracting them would cost the digits that strong decays leave over."""

    @staticmethod
    def forward(ctx, bc, c):
        bc = bc.triu()
        decay = _bounded_exp((c[..., None, :] - c[..., :, None]).to(bc.dtype))
        ctx.save_for_backward(bc, decay)
        return (bc.unsqueeze(2) * decay.unflatten(1, (bc.shape[1], -1))).flatten(1, 2)

    @staticmethod
    def backward(ctx, grad):
        bc, decay = ctx.saved_tensors
        q = (grad * decay).unflatten(1, (bc.shape[1], -1))  # (k, g, h / g, l, l)
        dbc = q.sum(2).triu_()
        q = q.mul_(bc.unsqueeze(2)).flatten(1, 2)
        q.diagonal(dim1=-2, dim2=-1).zero_()
        return dbc, q.sum(-2, dtype=torch.float64) - q.sum(-1, dtype=torch.float64)


def _bounded_exp(c):
    """exp(c), c <= 0, clamped at e^-60 = 9e-27: denormals are 100x slower on a CPU."""
    return c.clamp(-60, 0).exp_()


def chunk_of(p, n):
    """The fastest chunk on a CPU. Per token: l decays and p n / l of a state; fewest at l = sqrt(p n)."""
    return 1 << max(4, (p * n).bit_length() // 2)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _chunk_rows(cu, l, device):
    """index (k, l), the token at each place of each chunk, where padding repeats the last one; and inverse
    (tokens,), the place of each token."""
    start, left, _ = chunk_table(cu, l, torch.device("cpu"))
    place = torch.arange(l)
    index = start[:, None] + place.minimum(left[:, None] - 1)
    inverse = (place < left[:, None]).flatten().nonzero()[:, 0]
    return to_device([index, inverse], device)


# 3. The scan in Triton: kernels -----------------------------------------------------------------------------
#
# The same four steps, in kernels that keep the two large things out of memory: the (l, l) matrix of a chunk's
# decays, and copies of B and C for the heads of a group. One program, the unit that Triton runs in parallel,
# computes one tile of an output:
#
#                source j ->                      one chunk (k), one head (h), 2 x 2 tiles of l / 2 tokens.
#              +-------+-------+   value (l, p)   The program of the marked tile of y walks over the tiles of
#     output i | W 0 0 |       |    +-------+     its row up to the diagonal and multiplies W with the values:
#         |    | W W 0 |       |    |   x   |
#         v    | W W W |       |    |       |         W_ij = (C_i . B_j) 2^(c_i - c_j) dt_j   if j <= i, else 0
#              +-------+-------+ @  +-------+
#              | W W W | W 0 0 |    |   x   |     C B^T is the same for all heads of a group: its own kernel
#           ** | W W W | W W 0 | ** |       |     stores it, on and below the diagonal. W exists in registers
#              | W W W | W W W |    |       |     only.
#              +-------+-------+    +-------+
#
# Decays are 2^(c_i - c_j) <= 1 with c = log2(e) cumsum(dt A), never quotients of exponentials, which overflow.
# Below the diagonal they are a product, with c_r taken at a boundary between a tile's sources j and outputs i:
#
#     2^(c_i - c_j) dt_j  =  after[r, i] before[r, j]         after = 2^(c_i - c_r)    before = 2^(c_r - c_j) dt_j
#
# Boundary 0 is the chunk's start, the last one its end. Tiles on the diagonal take c itself, as a pair of float32:
# the rounded sum and what rounding lost. Neighbours late in a strongly decaying chunk differ by less than the
# sum's last digit.
#
# Backward. With R_t = dL/dS_t, everything the loss sees of the state, the definition differentiates to
#
#     R_t = dy_t C_t^T + a_{t+1} R_{t+1}      dx_t = dt_t R_t B_t + D dy_t    d(dt_t) = x_t . R_t B_t  (+ a_t's share)
#     a_t = exp(dt_t A)                       dB_t = dt_t R_t^T x_t           dC_t = S_t^T dy_t
#
# R is a scan like S, run from the last token to the first. So one kernel each serves both states, both outputs
# and both of dB and dC. REVERSED turns the triangle around, and the arguments are:
#
#     kernel     argument           forward                            REVERSED
#     _states    value, key         x, B                               dy, C
#                states             S before each chunk                R after each chunk
#                initial, final     S at the sequences' start, end     R at their end, start
#     _scan      value, query       x, C                               dy, B
#                states, out        S, y                               R, dx
#     _dbc       value, own, other  dy, C, B                           x, B, C
#                states, out, flow  S, dC, F                           R, dB, E
#
# The gradient of log a_t sums over every path from a source to an output that crosses step t. With q_ij the share
# of source j in the loss through output i, F_i that of the entering state, E_j that of source j through the
# state that leaves:
#
#     sum_{j < t <= i} q_ij  +  sum_{i >= t} F_i  +  sum_{j < t} E_j  +  2^(c_l) <R that leaves, S that enters>
#
# The first sum is sum_{i >= t} (row_i - col_i), where row and col add up the same numbers q, without the diagonal:
# it is what is large, and crosses no step. (The common y . dy - x . dx is shorter, but has the diagonal in both
# terms and loses all digits where decays are strong.) And d(dt_j) = (col_j + q_jj + E_j) / dt_j, which is why a
# step of 0 counts as 1e-30.
#
# There are no atomics: programs that share a sum store their parts, the last kernel adds them, and two runs give
# the same bits. There is no autotuning: it stalls at every new shape, and other tiles round differently. Chunk
# and token numbers are int64, because t h p passes 2^31 at 700,000 tokens of the 7B model.
#
# Arguments are pointers: start, left, first, see chunk_table; x, B, ... (tokens, h or g, p or n); cb, dcb
# (k, g, l, l); states (k, h, p, n); decays (k, h, 2 r + 3, l), see _rows. s_v is the number of elements from one
# token of value to the next, and so on: tokens may be slices of wider rows. Capitals are known when a kernel is
# compiled: the sizes above; R boundaries, EDGE tokens apart; BL, BP, BN, BK, the sides of tiles. A tile of cb is
# loaded whole, in wide loads, and selected from afterwards: a mask would make it fetch element by element.


@_jit
def _program(tiles, heads):
    """Programs are numbered by tile, then head or group (neighbours share cb in the L2 cache), then chunk."""
    pid = tl.program_id(0)
    return pid % tiles, pid // tiles % heads, (pid // (tiles * heads)).to(tl.int64)


@_jit
def _chunk_program(tiles, heads, start, left, L: constexpr):
    """As _program, and the chunk's first token and number of tokens."""
    tile, h, k = _program(tiles, heads)
    return tile, h, k, tl.load(start + k), tl.minimum(tl.load(left + k), L).to(tl.int32)


@_jit
def _rows(decays, head, L: constexpr, R: constexpr):
    """Rows of l float32 that hold one head's decays in a chunk: after and before at R boundaries, dt, c, what
    c lost in rounding. Returns where after, before and dt start."""
    after = decays + head * (2 * R + 3) * L
    return after, after + R * L, after + 2 * R * L


@_jit
def _decay(dt, i, j, L: constexpr):
    """2^(c_i - c_j) dt_j, at most dt_j. c and its low part follow dt."""
    c = dt + L
    low = c + L
    rise = (tl.load(c + i) - tl.load(c + j)) + (tl.load(low + i) - tl.load(low + j))
    return tl.exp2(tl.minimum(rise, 0.0)) * tl.load(dt + j)


@_jit
def _inside(i, size: constexpr, tile: constexpr):
    """i < size, for tiles that may stick out; known to hold, and free, if they divide the size."""
    return (i < size) | (size % tile == 0)


@_jit
def _load(base, token, stride, column, mask):
    """A tile of tokens' vectors: element `column` of each `token`, counted from base; 0 outside the mask."""
    return tl.load(base + token.to(tl.int64) * stride + column, mask=mask, other=0.0)


@_jit
def _decays_kernel(step, A, start, left, decays,
                   H: constexpr, L: constexpr, R: constexpr, EDGE: constexpr, BH: constexpr):
    """The decays of BH heads in one chunk, from step (tokens, h). c is summed in float64."""
    tile, _, k, token, num = _chunk_program((H + BH - 1) // BH, 1, start, left, L)
    h = tile * BH + tl.arange(0, BH)[:, None]
    j = tl.arange(0, L)[None, :]
    in_h = h < H
    dt = tl.load(step + (token + j) * H + h, mask=in_h & (j < num), other=0.0)  # (BH, L)
    # Padding has dt = 0 and so constant c: the last entry is the chunk's end in any case.
    A = tl.load(A + h, mask=in_h, other=-1.0).to(tl.float64)
    c = tl.cumsum(dt.to(tl.float64) * (A * 1.4426950408889634), 1)  # 1 / ln 2
    high = c.to(tl.float32)
    dt = tl.where(dt < 1e-30, 1e-30, dt)
    after, before, row = _rows(decays, k * H + h, L, R)
    tl.store(row + j, dt, mask=in_h)
    tl.store(row + L + j, high, mask=in_h)
    tl.store(row + 2 * L + j, (c - high).to(tl.float32), mask=in_h)
    for r in tl.static_range(R):
        boundary = tl.sum(tl.where(j == r * EDGE - 1, c, 0.0), 1)[:, None]  # 0 before the first token
        rise = (c - boundary).to(tl.float32)
        # `where` and not `minimum`, which would drop a NaN.
        tl.store(after + r * L + j, tl.exp2(tl.where(rise > 0, 0.0, rise)), mask=in_h)
        tl.store(before + r * L + j, tl.exp2(tl.where(rise < 0, 0.0, -rise)) * dt, mask=in_h)


@_jit
def _cb_kernel(B, C, start, left, cb, s_b, s_c,
               G: constexpr, N: constexpr, L: constexpr, BL: constexpr, BK: constexpr):
    """cb = C B^T, one tile on or below the diagonal per program, whole, 0 in the padding."""
    SIDE: constexpr = L // BL
    tile, g, k, token, num = _chunk_program(SIDE * SIDE, G, start, left, L)
    i0 = tile // SIDE * BL
    j0 = tile % SIDE * BL
    if (j0 <= i0) & (i0 < num):
        i = i0 + tl.arange(0, BL)[:, None]
        j = j0 + tl.arange(0, BL)[None, :]
        B += token * s_b + g * N
        C += token * s_c + g * N
        acc = tl.zeros((BL, BL), tl.float32)
        for n0 in range(0, N, BK):
            n = n0 + tl.arange(0, BK)
            in_n = _inside(n, N, BK)
            q = _load(C, i, s_c, n[None, :], (i < num) & in_n[None, :])  # (BL, BK)
            v = _load(B, j, s_b, n[:, None], (j < num) & in_n[:, None])  # (BK, BL)
            acc = tl.dot(q, v, acc, input_precision="ieee")
        tl.store(cb + ((k * G + g) * L + i) * L + j, acc)


@_jit
def _states_kernel(value, key, decays, start, left, first, initial, states, final, entering, crossing, s_v, s_k,
                   H: constexpr, G: constexpr, P: constexpr, N: constexpr, L: constexpr, R: constexpr,
                   BP: constexpr, BN: constexpr, BK: constexpr, REVERSED: constexpr):
    """Steps 2 and 3. One program carries a BP x BN tile of one head's state through one sequence, BK tokens at
    a time, in float32 registers: states[k] = S, then S <- 2^(c_l) S + sum_j 2^(c_l - c_j) dt_j value_j key_j^T.

    REVERSED: states[k] = R, then R <- 2^(c_l) R + sum_i 2^(c_i) dy_i C_i^T. And with S = entering[k],
    crossing[k, h, tile] = 2^(c_l) <R, S>, the tile's share in the gradient of the chunk's whole decay."""
    ACROSS: constexpr = (N + BN - 1) // BN
    TILES: constexpr = (P + BP - 1) // BP * ACROSS
    PER_CHUNK: constexpr = L // BK
    ROWS: constexpr = (2 * R + 3) * L
    tile, h, s = _program(TILES, H)
    p = tile // ACROSS * BP + tl.arange(0, BP)[:, None]
    n = tile % ACROSS * BN + tl.arange(0, BN)[None, :]
    j = tl.arange(0, BK)
    in_p = _inside(p, P, BP)
    in_n = _inside(n, N, BN)
    inside = in_p & in_n
    place = p * N + n
    if initial is None:
        S = tl.zeros((BP, BN), tl.float32)
    else:
        S = tl.load(initial + (s * H + h) * P * N + place, mask=inside, other=0.0)

    # All chunks but the last are full: one loop over all tokens, whose loads run ahead across chunks. What is
    # needed once per chunk, its decay 2^(c_l) and the state before it, is loaded a chunk ahead by hand.
    begin = tl.load(first + s)
    token = tl.load(start + begin)
    tokens = tl.load(left + begin).to(tl.int32)
    parts = (tokens + BK - 1) // BK
    ahead = -H if REVERSED else H
    head = (tl.load(first + s + 1) - 1 if REVERSED else begin) * H + h
    if REVERSED:
        S_before = tl.load(entering + head * P * N + place, mask=inside, other=0.0)
    keep = tl.load(decays + head * ROWS + L - 1)
    for count in range(0, parts):
        part = parts - 1 - count if REVERSED else count
        head = (begin + part // PER_CHUNK) * H + h
        if (count == 0) | (part % PER_CHUNK == (PER_CHUNK - 1 if REVERSED else 0)):  # a chunk begins
            tl.store(states + head * P * N + place, S, mask=inside)
            S *= keep
            coming = tl.where(parts - count > PER_CHUNK, head + ahead, head)
            keep = tl.load(decays + coming * ROWS + L - 1)
            if REVERSED:
                tl.store(crossing + head * TILES + tile, tl.sum(S * S_before.to(tl.float32)))
                S_before = tl.load(entering + coming * P * N + place, mask=inside, other=0.0)
        after, _, dt = _rows(decays, head, L, R)
        weights = after if REVERSED else dt - L  # before, at the last boundary
        weight = tl.load(weights + part % PER_CHUNK * BK + j)
        at = token + part * BK
        real = j < tokens - part * BK
        v = _load(value + at * s_v + h * P, j[None, :], s_v, p, real[None, :] & in_p)  # (BP, BK)
        q = _load(key + at * s_k + h // (H // G) * N, j[:, None], s_k, n, real[:, None] & in_n)  # (BK, BN)
        S = tl.dot((v.to(tl.float32) * weight[None, :]).to(v.dtype), q, S, input_precision="ieee")
    if final is not None:
        tl.store(final + (s * H + h) * P * N + place, S, mask=inside)


@_jit
def _scan_kernel(value, query, cb, states, decays, D, start, left, out, s_v, s_q,
                 H: constexpr, G: constexpr, P: constexpr, N: constexpr, L: constexpr, R: constexpr,
                 EDGE: constexpr, BL: constexpr, BP: constexpr, BK: constexpr, REVERSED: constexpr):
    """Steps 1 and 4, BL rows of one chunk and head per program (the picture above):
    y_i = 2^(c_i) S C_i + sum_{j <= i} W_ij x_j + D x_i.

    REVERSED: dx_j = dt_j 2^(c_l - c_j) R B_j + sum_{i >= j} W_ij dy_i + D dy_j."""
    tile, h, k, token, num = _chunk_program(L // BL, H, start, left, L)
    if tile * BL < num:
        head = k * H + h
        group = h // (H // G)
        l = tl.arange(0, BL)
        p = tl.arange(0, BP)[None, :]
        i = tile * BL + l
        row = (i < num)[:, None]
        in_p = _inside(p, P, BP)
        value += token * s_v + h * P
        query += token * s_q + group * N
        cb += (k * G + group) * L * L
        after, before, dt = _rows(decays, head, L, R)
        edge = (tile + REVERSED) * (BL // EDGE) * L  # the boundary next to this tile

        # Step 4, the state that enters (leaves) the chunk, decayed only up to that boundary.
        acc = tl.zeros((BL, BP), tl.float32)
        for n0 in range(0, N, BK):
            n = n0 + tl.arange(0, BK)
            in_n = _inside(n, N, BK)
            q = _load(query, i[:, None], s_q, n[None, :], row & in_n[None, :])  # (BL, BK)
            S = tl.load(states + head * P * N + p * N + n[:, None], mask=in_n[:, None] & in_p, other=0.0)
            acc = tl.dot(q, S, acc, input_precision="ieee")
        if REVERSED:
            acc *= tl.load(after + edge + L - 1)
        else:
            acc *= tl.load(after + tile * BL - 1, mask=tile > 0, other=1.0)

        # Step 1 below the diagonal: cb, weighted by column before the product and by row after the last one.
        begin, end = ((tile + 1) * BL, num) if REVERSED else (0, tile * BL)
        by_row, by_column = (before, after) if REVERSED else (after, before)
        for l0 in range(begin, end, BL):
            j = l0 + l
            later, sooner = (j[None, :], i[:, None]) if REVERSED else (i[:, None], j[None, :])
            W = tl.load(cb + later * L + sooner).to(tl.float32) * tl.load(by_column + edge + j)[None, :]
            v = _load(value, j[:, None], s_v, p, (j < num)[:, None] & in_p)  # (BL, BP)
            acc = tl.dot(W.to(v.dtype), v, acc, input_precision="ieee")
        acc *= tl.load(by_row + edge + i)[:, None]

        # Step 1 on the diagonal, where every entry has its own decay.
        later, sooner = (i[None, :], i[:, None]) if REVERSED else (i[:, None], i[None, :])
        W = tl.load(cb + later * L + sooner).to(tl.float32) * _decay(dt, later, sooner, L)
        W = tl.where(later >= sooner, W, 0.0)
        v = _load(value, i[:, None], s_v, p, row & in_p)  # (BL, BP)
        acc = tl.dot(W.to(v.dtype), v, acc, input_precision="ieee") + tl.load(D + h) * v.to(tl.float32)
        tl.store(out + (token + i)[:, None] * H * P + h * P + p, acc, mask=row & in_p)


@_jit
def _dcb_kernel(x, dy, cb, decays, start, left, dcb, row, col, diagonal, s_x,
                H: constexpr, G: constexpr, P: constexpr, L: constexpr, R: constexpr,
                BL: constexpr, BP: constexpr, BLANK: constexpr, DIAGONAL: constexpr):
    """d(cb)_ij = sum over the group's heads of 2^(c_i - c_j) dt_j (dy_i . x_j), one tile per program; tiles on
    the DIAGONAL have a launch of their own. Boundaries stand between tiles.

    Per head also diagonal_j = dy_j . x_j and, with q = d(cb) cb below the diagonal, the sums of the tile's
    q: row[k, h, tile's column, i] and col[k, h, tile's row, j]."""
    SIDE: constexpr = L // BL
    tile, g, k, token, num = _chunk_program(SIDE if DIAGONAL else SIDE * SIDE, G, start, left, L)
    down = tile if DIAGONAL else tile // SIDE
    across = tile if DIAGONAL else tile % SIDE
    i = down * BL + tl.arange(0, BL)
    j = across * BL + tl.arange(0, BL)
    place = ((k * G + g) * L + i[:, None]) * L + j[None, :]
    if (across <= down) & (down * BL < num) & (DIAGONAL | (across < down)):
        x += token * s_x
        dy += token * H * P
        below = tl.load(cb + place).to(tl.float32)
        if DIAGONAL:
            below = tl.where(i[:, None] > j[None, :], below, 0.0)
        acc = tl.zeros((BL, BL), tl.float32)
        for h in range(g * (H // G), (g + 1) * (H // G)):
            head = k * H + h
            after, before, dt = _rows(decays, head, L, R)
            q = tl.zeros((BL, BL), tl.float32)
            for p0 in range(0, P, BP):
                p = p0 + tl.arange(0, BP)
                in_p = _inside(p, P, BP)
                d = _load(dy + h * P, i[:, None], H * P, p[None, :], (i < num)[:, None] & in_p[None, :])
                v = _load(x + h * P, j[None, :], s_x, p[:, None], (j < num)[None, :] & in_p[:, None])
                q = tl.dot(d, v, q, input_precision="ieee")  # (BL, BP) (BP, BL)
            if DIAGONAL:
                tl.store(diagonal + head * L + i, tl.sum(tl.where(i[:, None] == j[None, :], q, 0.0), 1))
                q = tl.where(i[:, None] >= j[None, :], q * _decay(dt, i[:, None], j[None, :], L), 0.0)
            else:
                q *= tl.load(after + down * L + i)[:, None]
                q *= tl.load(before + down * L + j)[None, :]
            acc += q
            q *= below
            tl.store(row + (head * SIDE + across) * L + i, tl.sum(q, 1))
            tl.store(col + (head * SIDE + down) * L + j, tl.sum(q, 0))
        tl.store(dcb + place, acc)
    elif (across > down) & (across // BLANK == down // BLANK):  # above the diagonal, in a tile that _dbc reads
        tl.store(dcb + place, tl.zeros((BL, BL), tl.float32))


@_jit
def _dbc_kernel(value, own, other, dcb, states, decays, start, left, out, flow, s_v, s_own, s_other,
                H: constexpr, G: constexpr, P: constexpr, N: constexpr, L: constexpr, R: constexpr,
                BL: constexpr, BN: constexpr, BP: constexpr, BK: constexpr, REVERSED: constexpr):
    """dC_i = sum_h 2^(c_i) S^T dy_i + sum_{j <= i} d(cb)_ij B_j, BL x BN per program, and per head
    flow[k, h, tile of n, i] = C_i . (the first term), which is F_i.

    REVERSED: dB_j = sum_h dt_j 2^(c_l - c_j) R^T x_j + sum_{i >= j} d(cb)_ij C_i, and flow is E_j."""
    SPLIT: constexpr = (N + BN - 1) // BN
    tile, g, k, token, num = _chunk_program((L // BL) * SPLIT, G, start, left, L)
    i0 = tile // SPLIT * BL
    part = tile % SPLIT
    if i0 < num:
        i = i0 + tl.arange(0, BL)
        n = part * BN + tl.arange(0, BN)[None, :]
        p = tl.arange(0, BP)
        row = (i < num)[:, None]
        in_n = _inside(n, N, BN)
        in_p = _inside(p, P, BP)
        value += token * s_v
        own += token * s_own + g * N
        other += token * s_other + g * N
        mine = _load(own, i[:, None], s_own, n, row & in_n).to(tl.float32)  # (BL, BN)
        acc = tl.zeros((BL, BN), tl.float32)

        # Through the state, for every head of the group.
        for h in range(g * (H // G), (g + 1) * (H // G)):
            head = k * H + h
            after, _, dt = _rows(decays, head, L, R)
            v = _load(value + h * P, i[:, None], s_v, p[None, :], row & in_p[None, :])  # (BL, BP)
            S = tl.load(states + head * P * N + p[:, None] * N + n, mask=in_p[:, None] & in_n, other=0.0)
            term = tl.dot(v, S, input_precision="ieee")
            term *= tl.load((dt - L if REVERSED else after) + i)[:, None]  # before at the end, after at the start
            tl.store(flow + (head * SPLIT + part) * L + i, tl.sum(term * mine, 1))
            acc += term

        # Within the chunk, for all heads at once. Rows of dcb are the later tokens.
        begin, end = (i0, num) if REVERSED else (0, tl.minimum(i0 + BL, num))
        for l0 in range(begin, end, BK):
            j = l0 + tl.arange(0, BK)
            later, sooner = (j[None, :], i[:, None]) if REVERSED else (i[:, None], j[None, :])
            d = tl.load(dcb + (k * G + g) * L * L + later * L + sooner)
            o = _load(other, j[:, None], s_other, n, (j < num)[:, None] & in_n)  # (BK, BN)
            acc = tl.dot(d.to(o.dtype), o, acc, input_precision="ieee")
        tl.store(out + (token + i)[:, None] * G * N + g * N + n, acc, mask=row & in_n)


@_jit
def _ddt_kernel(row, col, diagonal, F, E, crossing, cb, decays, A, start, left, ddt, dA, dD, H: constexpr,
                G: constexpr, L: constexpr, R: constexpr, SIDE: constexpr, SPLIT: constexpr, PARTS: constexpr):
    """The gradient of log a_t by the formula above, for one chunk and head, summed in float64. From it ddt
    (tokens, h), and the chunk's share in dA and dD (k, h)."""
    _, h, k, token, num = _chunk_program(1, H, start, left, L)
    head = k * H + h
    j = tl.arange(0, L)
    inside = j < num
    own_tile = j // (L // SIDE)
    rows = tl.zeros((L,), tl.float32)
    cols = tl.zeros((L,), tl.float32)
    for part in tl.static_range(SIDE):  # of the tiles that were computed
        place = (head * SIDE + part) * L + j
        rows += tl.load(row + place, mask=inside & (part <= own_tile), other=0.0)
        computed = inside & (part >= own_tile) & (part * (L // SIDE) < num)
        cols += tl.load(col + place, mask=computed, other=0.0)
    Fs = tl.zeros((L,), tl.float32)
    Es = tl.zeros((L,), tl.float32)
    for part in tl.static_range(SPLIT):
        Fs += tl.load(F + (head * SPLIT + part) * L + j, mask=inside, other=0.0)
        Es += tl.load(E + (head * SPLIT + part) * L + j, mask=inside, other=0.0)
    across = 0.0
    for part in tl.static_range(PARTS):
        across += tl.load(crossing + head * PARTS + part)
    dy_x = tl.load(diagonal + head * L + j, mask=inside, other=0.0)
    cb_jj = tl.load(cb + ((k * G + h // (H // G)) * L + j) * L + j, mask=inside, other=0.0).to(tl.float32)

    sources = Es.to(tl.float64)
    later = tl.cumsum((rows - cols + Fs).to(tl.float64), 0, reverse=True)
    da = tl.where(inside, later + (tl.cumsum(sources, 0) - sources) + across, 0.0)
    _, _, dt_row = _rows(decays, head, L, R)
    dt = tl.load(dt_row + j)
    through_y = (cols + Es) / dt + cb_jj * dy_x  # q_jj / dt_j = cb_jj dy_j . x_j
    tl.store(ddt + (token + j) * H + h, through_y + (tl.load(A + h) * da).to(tl.float32), mask=inside)
    tl.store(dA + head, tl.sum(dt * da))
    tl.store(dD + head, tl.sum(dy_x.to(tl.float64)))


# 4. The scan in Triton: launches ----------------------------------------------------------------------------


def _power(size):
    return max(16, 1 << (size - 1).bit_length())  # tl.dot needs at least 16, tl.arange a power of two


def _shared_memory(x):
    return torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin if x.is_cuda else 0


def _empty(like, *shape, dtype=None):
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def _dense(v):
    """v, copied only if the elements of a token are not contiguous: tokens may be slices of wider rows."""
    return v if v[0].is_contiguous() else v.contiguous()


def _launch(kernel, programs, *args, **options):
    tensors = (v for v in (*args, *options.values()) if isinstance(v, torch.Tensor))
    with torch.cuda.device_of(next(tensors)):  # Triton launches on the current GPU, wherever the tensors are
        kernel[(programs,)](*args, **options)


def _tiling(l, p, n, dtype, shared_memory):
    """Tile sizes and launch options of every kernel, for chunks of l tokens. With 16 bits, Hopper and its 227 KB
    of shared memory per block take tiles of 128; Ampere, Ada and consumer Blackwell, from 99 KB, take 64. float32
    takes 32: its products run on no tensor core and need their registers for themselves."""
    full = dtype.itemsize == 4
    wide = not full and shared_memory >= 200_000 and p <= 128
    edge = min(32 if full else 64, l)  # tokens between boundaries
    side = min(128, l) if wide else edge
    inner = min(64 if wide else 32, l)
    bp, bn = _power(p), _power(n)
    small = dict(num_warps=4, num_stages=2)
    large = dict(num_warps=8, num_stages=3) if wide else small
    return {
        "decays": dict(BH=4, num_warps=4),
        "cb": dict(BL=side, BK=min(64, bn), **large),
        "states": dict(BP=min(32 if full else 64, bp), BN=min(64, bn), BK=min(256 if wide else 32, l), **small),
        "scan": dict(BL=side, BP=bp, BK=min(inner, bn), **large | dict(num_stages=2)),
        "dcb": dict(BL=edge, BP=min(32, bp) if full else bp, BLANK=side // edge, **small),
        "dbc": dict(BL=side, BN=min(128 if wide else 64, bn), BP=bp, BK=inner, **large),
        "ddt": dict(num_warps=4),
    }


class _Plan(NamedTuple):
    """What the kernels of one scan share."""
    k: int  # chunks
    s: int  # sequences
    tiles: dict  # see _tiling
    given: dict  # arguments that mean the same in every kernel, by name

    def count(self, name, sides):
        """Tiles of a kernel along `sides`, such as "PN"."""
        return math.prod(triton.cdiv(self.given[side], self.tiles[name]["B" + side]) for side in sides)

    def launch(self, kernel, name, programs, **arguments):
        given = {key: v for key, v in self.given.items() if key in kernel.arg_names}
        _launch(kernel, programs, **given, **self.tiles[name], **arguments)


def _plan(x, dt, B, C, A, D, cu, l):
    """The plan of a scan over x (tokens, h, p), dt (tokens, h), B (tokens, g, n); computes its decays."""
    (h, p), (g, n) = x.shape[1:], B.shape[1:]
    start, left, first = chunk_table(tuple(cu), l, x.device)
    k, tiles = len(start), _tiling(l, p, n, x.dtype, _shared_memory(x))
    edge = tiles["dcb"]["BL"]
    r = l // edge + 1
    decays = _empty(A, k, h, 2 * r + 3, l)
    plan = _Plan(k, len(cu) - 1, tiles, dict(
        x=x, step=dt, B=B, C=C, A=A, D=D, s_x=x.stride(0), s_b=B.stride(0), s_c=C.stride(0),
        start=start, left=left, first=first, decays=decays, H=h, G=g, P=p, N=n, L=l, R=r, EDGE=edge))
    plan.launch(_decays_kernel, "decays", plan.count("decays", "H") * k)
    return plan


@torch.library.custom_op("falcon_h1r::ssd", mutates_args=())  # opaque, so no graph break under torch.compile
def _ssd(x: torch.Tensor, dt: torch.Tensor, B: torch.Tensor, C: torch.Tensor, A: torch.Tensor, D: torch.Tensor,
         S: torch.Tensor | None, cu: Sequence[int], l: int, want_final: bool) -> list[torch.Tensor]:
    """x (tokens, h, p), dt (tokens, h), B and C (tokens, g, n), A and D (h,), S (s, h, p, n) or None for zeros.
    Returns y; the final states (of no sequence unless wanted); and for the backward pass the states (k, h, p, n)
    that enter each chunk and cb (k, g, l, l)."""
    (h, p), (g, n) = x.shape[1:], B.shape[1:]
    plan = _plan(x, dt, B, C, A, D, cu, l)
    y = _empty(x, *x.shape)
    final = _empty(A, plan.s if want_final else 0, h, p, n)
    states = _empty(x, plan.k, h, p, n)
    cb = plan.given["cb"] = _empty(x, plan.k, g, l, l)
    plan.launch(_cb_kernel, "cb", plan.count("cb", "LL") * g * plan.k)
    plan.launch(_states_kernel, "states", plan.count("states", "PN") * h * plan.s, value=x, key=B,
                s_v=x.stride(0), s_k=B.stride(0), initial=S, states=states, final=final if want_final else None,
                entering=None, crossing=None, REVERSED=False)
    plan.launch(_scan_kernel, "scan", plan.count("scan", "L") * h * plan.k, value=x, query=C,
                s_v=x.stride(0), s_q=C.stride(0), states=states, out=y, REVERSED=False)
    return [y, final, states, cb]


@_ssd.register_fake
def _(x, dt, B, C, A, D, S, cu, l, want_final):
    (h, p), (g, n) = x.shape[1:], B.shape[1:]
    k = sum(-(-(end - start) // l) for start, end in zip(cu, cu[1:]))
    final = A.new_empty(len(cu) - 1 if want_final else 0, h, p, n)
    return [x.new_empty(x.shape), final, x.new_empty(k, h, p, n), x.new_empty(k, g, l, l)]


@torch.library.custom_op("falcon_h1r::ssd_backward", mutates_args=())
def _ssd_backward(dy: torch.Tensor, dfinal: torch.Tensor | None, x: torch.Tensor, dt: torch.Tensor,
                  B: torch.Tensor, C: torch.Tensor, A: torch.Tensor, D: torch.Tensor, states: torch.Tensor,
                  cb: torch.Tensor, cu: Sequence[int], l: int, want_initial: bool) -> list[torch.Tensor]:
    """Gradients of x, dt, B, C, A, D and the initial states (of no sequence unless wanted). dfinal None: zeros."""
    (h, p), (g, n) = x.shape[1:], B.shape[1:]
    plan = _plan(x, dt, B, C, A, D, cu, l)
    k = plan.k
    side, split, parts = plan.count("dcb", "L"), plan.count("dbc", "N"), plan.count("states", "PN")
    dx, ddt, dB, dC = (_empty(v, *v.shape) for v in (x, dt, B, C))
    dA, dD = (_empty(x, k, h, dtype=torch.float64) for _ in "AD")
    R, dcb = _empty(x, *states.shape), _empty(x, *cb.shape)
    dinitial = _empty(A, plan.s if want_initial else 0, h, p, n)
    shapes = dict(crossing=(parts,), diagonal=(l,), row=(side, l), col=(side, l), F=(split, l), E=(split, l))
    sums = {name: _empty(A, k, h, *shape) for name, shape in shapes.items()}
    plan.given.update(sums, dy=dy, cb=cb, dcb=dcb, ddt=ddt, dA=dA, dD=dD, SIDE=side, SPLIT=split, PARTS=parts)
    s_x, s_dy, s_b, s_c = (v.stride(0) for v in (x, dy, B, C))

    plan.launch(_states_kernel, "states", parts * h * plan.s, value=dy, key=C, s_v=s_dy, s_k=s_c, initial=dfinal,
                states=R, final=dinitial if want_initial else None, entering=states, REVERSED=True)
    plan.launch(_scan_kernel, "scan", plan.count("scan", "L") * h * k, value=dy, query=B, s_v=s_dy, s_q=s_b,
                states=R, out=dx, REVERSED=True)
    plan.launch(_dcb_kernel, "dcb", side * side * g * k, DIAGONAL=False)
    plan.launch(_dcb_kernel, "dcb", side * g * k, DIAGONAL=True)
    programs = plan.count("dbc", "LN") * g * k
    plan.launch(_dbc_kernel, "dbc", programs, value=dy, own=C, other=B, s_v=s_dy, s_own=s_c, s_other=s_b,
                states=states, out=dC, flow=sums["F"], REVERSED=False)
    plan.launch(_dbc_kernel, "dbc", programs, value=x, own=B, other=C, s_v=s_x, s_own=s_b, s_other=s_c,
                states=R, out=dB, flow=sums["E"], REVERSED=True)
    plan.launch(_ddt_kernel, "ddt", h * k)
    return [dx, ddt, dB, dC, dA.sum(0).float(), dD.sum(0).float(), dinitial]


@_ssd_backward.register_fake
def _(dy, dfinal, x, dt, B, C, A, D, states, cb, cu, l, want_initial):
    dinitial = A.new_empty(len(cu) - 1 if want_initial else 0, *states.shape[1:])
    return [*(v.new_empty(v.shape) for v in (x, dt, B, C, A, D)), dinitial]


def _ssd_setup(ctx, inputs, output):
    *tensors, S, ctx.cu, ctx.l, _ = inputs
    ctx.want_initial = S is not None
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)  # None for final states that nobody used, instead of as many zeros


def _ssd_gradients(ctx, grads):
    dy, dfinal, *_ = grads
    x, *tensors = ctx.saved_tensors
    dy = x.new_zeros(x.shape) if dy is None else dy.contiguous()
    dfinal = None if dfinal is None or not len(dfinal) else dfinal.contiguous()
    *gradients, dinitial = _ssd_backward(dy, dfinal, x, *tensors, ctx.cu, ctx.l, ctx.want_initial)
    return *gradients, dinitial if ctx.want_initial else None, None, None, None


_ssd.register_autograd(_ssd_gradients, setup_context=_ssd_setup)


def _scan_triton(x, dt, B, C, A, D, S, cu, chunk_size, want_final):
    """x (tokens, h, p) in its own dtype, dt (tokens, h) float32 -> y with D x in it, final states."""
    p, n, shared = x.shape[2], B.shape[2], _shared_memory(x)
    _expect(p <= 256 and n <= 1024, "x, B", f"p = {p}, n = {n}", 'at most 256 and 1024, or backend="torch"')
    _expect(not shared or shared >= 99 * 1024, "backend",
            f'"triton" on a GPU with {shared // 1024} KB of shared memory per block',
            'at least 99 KB (Ampere and newer), or backend="torch"')
    longest = max(end - start for start, end in zip(cu, cu[1:]))
    l = _power(min(chunk_size, 1024, longest))  # a program of _decays_kernel holds a chunk
    x, B, C = (_dense(v) for v in (x, B, C))
    D = torch.zeros_like(A) if D is None else D
    A = torch.where(A < 0, A, torch.nan)  # A >= 0 is an error that the host must not wait for: y becomes NaN
    S = None if S is None else S.contiguous()
    y, final, *_ = _ssd(x, dt.contiguous(), B, C, A, D, S, cu, l, want_final)
    return y, final if want_final else None


# 5. One token -----------------------------------------------------------------------------------------------


def ssd_step(state, x, dt, A, B, C, *, D=None, dt_bias=None, dt_softplus=False, backend=None):
    """One token of `ssd_scan`. Without gradients the state is updated in place, which saves memory bandwidth.

    Args:
        state: (b, h, p, n); the kernel ("triton") takes float32 with contiguous (h, p, n), and has no gradient.
        x, dt, B, C: (b, h, p), (b, h), (b, g, n), (b, g, n). Others as for ssd_scan.

    Returns:
        y (b, h, p) in x's dtype, and the new state.
    """
    _expect(x.dim() == 3, "x", tuple(x.shape), "(b, h, p)")
    backend = _backend(backend, x)
    _check_scan(x, dt, A, B, C, D, dt_bias, state, x.shape[0])
    dtype, in_place = state.dtype, not torch.is_grad_enabled()
    dt = _step_size(dt, dt_bias, dt_softplus, dtype)
    A, D = (v if v is None else v.to(dtype) for v in (A, D))
    if backend == "triton" and dtype == torch.float32 and state[0].is_contiguous() and in_place:
        return _step_triton(state, x, dt, A, B, C, D), state

    def by_group(v):  # (b, h, ...) -> (b, g, h / g, ...): the heads of a group share B and C
        return v.unflatten(1, (B.shape[1], -1))

    keep = torch.exp(dt * A)[..., None, None]
    state = state.mul_(keep) if in_place else state * keep
    written = by_group(dt[..., None] * x)[..., None]  # (b, g, h / g, p, 1)
    by_group(state).addcmul_(written, B.to(dtype)[:, :, None, None])
    y = C.to(dtype)[:, :, None] @ by_group(state).flatten(2, 3).mT  # (b, g, 1, n) (b, g, n, p h / g)
    y = y.view(x.shape) if D is None else torch.addcmul(y.view(x.shape), D[:, None], x)
    return y.to(x.dtype), state


@_jit
def _rounded(v, like):
    """v in float32, with no more digits than what `like` points at has."""
    return v.to(like.dtype.element_ty).to(tl.float32)


@_jit
def _step_kernel(state, x, dt, A, B, C, D, dt_bias, y, low, high, s_state, s_x, s_dt, s_b, s_c,
                 H: constexpr, G: constexpr, P: constexpr, N: constexpr, BP: constexpr, BN: constexpr,
                 RAW: constexpr):
    """S <- exp(dt A) S + dt x B^T in place and y = S C + D x, BP rows of one state per program.

    RAW: A holds log(-A), and the step size is softplus(dt + dt_bias), clamped to [low, high] and rounded to
    dt's dtype where torch rounds: a sampler with other step sizes than its trainer would drift away from it."""
    tile, h, b = _program((P + BP - 1) // BP, H)
    p = tile * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    in_p = p < P
    in_n = n < N
    group = h // (H // G) * N + n
    place = state + b * s_state + h * P * N + p[:, None] * N + n[None, :]
    S = tl.load(place, mask=in_p[:, None] & in_n[None, :], other=0.0)
    xp = tl.load(x + b * s_x + h * P + p, mask=in_p, other=0.0).to(tl.float32)
    Bn = tl.load(B + b * s_b + group, mask=in_n, other=0.0).to(tl.float32)
    Cn = tl.load(C + b * s_c + group, mask=in_n, other=0.0).to(tl.float32)
    delta = tl.load(dt + b * s_dt + h).to(tl.float32)
    a = tl.load(A + h).to(tl.float32)
    if RAW:
        delta = _rounded(delta + tl.load(dt_bias + h).to(tl.float32), dt)
        # softplus(v) = max(v, 0) + log(1 + u), u = exp(-|v|). 1 + u rounds away digits of a small u, and
        # log(w) u / (w - 1) restores them.
        u = tl.exp(-tl.abs(delta))
        log1p = tl.where(1 + u == 1, u, tl.log(1 + u) * u / tl.where(1 + u == 1, 1.0, (1 + u) - 1))
        delta = tl.minimum(tl.maximum(_rounded(tl.maximum(delta, 0.0) + log1p, dt), low), high)
        a = -tl.exp(a)
    S = S * tl.exp(delta * a) + (delta * xp)[:, None] * Bn[None, :]
    tl.store(place, S, mask=in_p[:, None] & in_n[None, :])
    skip = tl.load(D + h).to(tl.float32) * xp
    tl.store(y + (b * H + h) * P + p, tl.sum(S * Cn[None, :], 1) + skip, mask=in_p)


def _step_triton(state, x, dt, A, B, C, D, dt_bias=None, limit=(0.0, float("inf"))):
    """y (b, h, p). With dt_bias the arguments are RAW, see the kernel."""
    (b, h, p), (g, n) = x.shape, B.shape[1:]
    _expect(n <= 512, "B", f"a state of {n}", "at most 512, what the registers of one program hold")
    y = _empty(x, b, h, p)
    x, dt, B, C = (_dense(v) for v in (x, dt, B, C))
    D = torch.zeros_like(A) if D is None else D
    strides = (v.stride(0) for v in (state, x, dt, B, C))
    _launch(_step_kernel, triton.cdiv(p, 16) * h * b, state, x, dt, A, B, C, D, dt_bias, y, *limit, *strides,
            H=h, G=g, P=p, N=n, BP=16, BN=_power(n), RAW=dt_bias is not None, num_warps=4)
    return y


# 6. The causal convolution ----------------------------------------------------------------------------------


def causal_conv1d(x, weight, bias=None, *, initial_states=None, cu_seqlens=None, activation=None, backend=None):
    """Depthwise: every channel sees only itself, now and k - 1 tokens back (k = 4 in Falcon-H1).

        y_i = act(bias + sum_j weight[:, j] x_{i - k + 1 + j})        weight[:, k - 1] meets the current token

    Args:
        x: (b, t, d), any t >= 1.
        weight, bias: (d, k), (d,).
        initial_states: (s, d, k - 1), the inputs before the first token, newest last; zeros if None.
        cu_seqlens, backend: as for ssd_scan. activation: None or "silu".

    Returns:
        y (b, t, d) and final states (s, d, k - 1). Differentiable in every tensor.
    """
    _expect(x.dim() == 3 and x.shape[1] >= 1, "x", tuple(x.shape), "(b, t, d) with t >= 1")
    (b, t, d), k = x.shape, weight.shape[-1]
    backend = _backend(backend, x)
    cu = check_cu_seqlens(cu_seqlens, b, t)
    _check_conv(x, weight, bias, activation, initial_states, len(cu) - 1)
    # The windows of more taps do not fit into the 255 registers of a thread.
    _expect(backend != "triton" or k <= 8, "weight", f"{k} taps", 'at most 8, or backend="torch"')
    row = x.flatten(0, 1)  # (tokens, d)
    weight = torch.cat([weight.T, weight.new_zeros(1, d) if bias is None else bias[None]])  # (k + 1, d)
    bare = backend == "triton" and initial_states is None  # the kernel knows where sequences start
    if not bare:  # a history is k - 1 more tokens: [history 0 | tokens 0 | history 1 | tokens 1 | ...]
        if initial_states is None:
            initial_states = x.new_zeros(len(cu) - 1, d, k - 1)
        lengths = [end - start for start, end in zip(cu, cu[1:])]
        parts = zip(initial_states.to(x.dtype).mT, row.split(lengths))
        row = torch.cat([part for pair in parts for part in pair])
        sizes = [size for length in lengths for size in (k - 1, length)]
        cu = tuple(start + i * (k - 1) for i, start in enumerate(cu))
    if backend == "triton":
        y, = _conv_triton(row if row.stride(1) == 1 else row.contiguous(), weight, None, cu, activation is not None)
    else:
        y = _ConvTorch.apply(row, weight)
    y = y if bare else torch.cat(y.split(sizes)[1::2])
    y = F.silu(y) if activation and backend != "triton" else y  # of tokens alone: 0 * a neighbour's NaN is NaN
    token = _last_tokens(cu, k - 1, x.device)
    final = torch.where((token < 0)[..., None], 0, row[token])  # (s, k - 1, d)
    return y.view(x.shape), final.mT


def causal_conv1d_step(state, x, weight, bias=None, *, activation=None):
    """One token of `causal_conv1d`: state (b, d, k - 1), x (b, d) -> y, new state (in place without gradients)."""
    _expect(x.dim() == 2, "x", tuple(x.shape), "(b, d)")
    _check_conv(x, weight, bias, activation, state, x.shape[0])
    window = torch.cat([state.mT, x.unsqueeze(1)], 1)  # (b, k, d): channels last, so a CPU sums without striding
    y = (window * weight.T).sum(1)
    y = y if bias is None else y + bias
    state = window[:, 1:].mT if torch.is_grad_enabled() else state.copy_(window[:, 1:].mT)
    return (F.silu(y) if activation else y), state


class _ConvTorch(torch.autograd.Function):
    """One sequence: x (tokens, d), weight (k + 1, d), the bias last -> as x. In autograd each slice of x would
    have a gradient as large as x, filled with zeros and added up."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        *past, now, bias = weight
        y = torch.addcmul(bias, x, now)
        for back, w in enumerate(reversed(past), 1):
            y[back:].addcmul_(x[:-back], w)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        *past, now, _ = weight
        dx = dy * now
        dweight = [(dy * x).sum(0), dy.sum(0)]
        for back, w in enumerate(reversed(past), 1):
            dx[:-back].addcmul_(dy[back:], w)
            dweight.insert(0, (dy[back:] * x[:-back]).sum(0))
        return dx, torch.stack(dweight)


# In Triton one program is one warp that walks over a block, up to BT tokens of one sequence. Each thread keeps the
# last k inputs of a few neighbouring channels in registers: it loads each input once, ROWS tokens at a time to
# hide the latency of memory. The backward pass recomputes z, the value before the activation:
#
#     z_i = bias + sum_j w_j x_{i-k+1+j}      dz_i = act'(z_i) dy_i      dx_i = sum_j w_j dz_{i+k-1-j}
#     dw_j = sum_i dz_i x_{i-k+1+j}           dbias = sum_i dz_i
#
# A second window, of the last k values of dz, completes dx_i at token i + k - 1. So a block walks k - 1 tokens past
# its own, with dz = 0 past the sequence, and leaves their share of dw and dbias to the next block.
#
# BD: 32 threads with 8 channels, 16 bytes of bfloat16. Backward 4: 8 take 242 registers, which leave room for 8
# warps per SM instead of 19.
_CONV_FORWARD = dict(BT=128, BD=256, ROWS=8, num_warps=1)
_CONV_BACKWARD = dict(BT=128, BD=128, ROWS=4, num_warps=1)


@_jit
def _conv_kernel(x, weight, dy, out, dweight, start, left, s_x, CHANNELS: constexpr, K: constexpr,
                 SILU: constexpr, BT: constexpr, BD: constexpr, ROWS: constexpr):
    """out = y. Given dy, out = dx, and dweight[block] (k + 1, d) is the block's part of the sum."""
    EXTRA: constexpr = 0 if dy is None else K - 1
    tile, _, block = _program((CHANNELS + BD - 1) // BD, 1)
    d = tile * BD + tl.arange(0, BD)
    in_d = _inside(d, CHANNELS, BD)
    token = tl.load(start + block)
    rest = tl.load(left + block)  # tokens from here to the end of the sequence
    num = tl.minimum(rest, BT)
    first = tl.load(left + block - 1, mask=block > 0, other=0) <= BT  # the block before ends its sequence
    w, window = (), ()
    for j in tl.static_range(K + 1):
        w += (_load(weight, token - token + j, CHANNELS, d, in_d).to(tl.float32),)
    for j in tl.static_range(K - 1):
        window += (_load(x, token - (K - 1) + j, s_x, d, in_d & (first == 0)).to(tl.float32),)
    zero = tl.zeros((BD,), tl.float32)
    dw, dzs = (zero,) * (K + 1), (zero,) * (K - 1)
    for i in range(0, num + EXTRA, ROWS):
        # All loads come before the first store, which the compiler cannot move them over.
        xs, dys = (), ()
        for r in tl.static_range(ROWS):
            inside = in_d & (i + r < rest)
            xs += (_load(x, token + i + r, s_x, d, inside).to(tl.float32),)
            if dy is not None:
                dys += (_load(dy, token + i + r, CHANNELS, d, inside).to(tl.float32),)
        for r in tl.static_range(ROWS):
            window += (xs[r],)
            z = w[K]
            for j in tl.static_range(K):
                z += w[j] * window[j]
            gate = tl.sigmoid(z) if SILU else 1.0
            value = z * gate
            if dy is not None:
                dz = dys[r] * gate * (1 + z * (1 - gate)) if SILU else dys[r]
                own = tl.where(i + r < num, dz, 0.0)
                dzs += (dz,)
                value = zero
                for j in tl.static_range(K):
                    value += w[j] * dzs[K - 1 - j]
                    dw += (dw[j] + own * window[j],)
                dw, dzs = dw[K + 1:] + (dw[K] + own,), dzs[1:]
            done = i + r - EXTRA  # the token in the block that `value` is the y or dx of
            tl.store(out + (token + done) * CHANNELS + d, value, mask=in_d & (done >= 0) & (done < num))
            window = window[1:]
    if dy is not None:
        for j in tl.static_range(K + 1):
            tl.store(dweight + (block * (K + 1) + j) * CHANNELS + d, dw[j], mask=in_d)


@torch.library.custom_op("falcon_h1r::conv", mutates_args=())
def _conv_triton(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor | None, cu: Sequence[int],
                 silu: bool) -> list[torch.Tensor]:
    """x (tokens, d), weight (k + 1, d) with the bias last -> [y]; given dy, the gradients of x and weight."""
    sizes = _CONV_FORWARD if dy is None else _CONV_BACKWARD
    start, left, _ = chunk_table(tuple(cu), sizes["BT"], x.device)
    out = _empty(x, *x.shape)
    parts = None if dy is None else _empty(x, len(start), *weight.shape, dtype=torch.float32)
    _launch(_conv_kernel, len(start) * triton.cdiv(x.shape[1], sizes["BD"]), x, weight=weight, dy=dy, out=out,
            dweight=parts, start=start, left=left, s_x=x.stride(0), CHANNELS=x.shape[1], K=len(weight) - 1,
            SILU=silu, **sizes)
    return [out] if dy is None else [out, parts.sum(0).to(weight.dtype)]


@_conv_triton.register_fake
def _(x, weight, dy, cu, silu):
    return [v.new_empty(v.shape) for v in ([x] if dy is None else [x, weight])]


def _conv_setup(ctx, inputs, output):
    x, weight, _, ctx.cu, ctx.silu = inputs
    ctx.save_for_backward(x, weight)


def _conv_gradients(ctx, dy):
    return *_conv_triton(*ctx.saved_tensors, dy[0].contiguous(), ctx.cu, ctx.silu), None, None, None


_conv_triton.register_autograd(_conv_gradients, setup_context=_conv_setup)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _last_tokens(cu, num, device):
    """The last `num` tokens of each sequence (s, num); -1 where a sequence has fewer."""
    begin, end = torch.tensor([cu[:-1], cu[1:]])[:, :, None]  # (s, 1)
    token = end - num + torch.arange(num)
    return to_device([token.where(token >= begin, -1)], device)[0]


# 7. Checks, and where tokens go -----------------------------------------------------------------------------


def _expect(ok, name, got, want):
    """Wrong shapes can broadcast into plausible nonsense: check every argument by name."""
    if not ok:
        raise ValueError(f"{name}: got {got}, expected {want}")


def _expect_tensors(x, **expected):
    """Check every name=(tensor or None, shape): its shape, and that it is on the device of x."""
    for name, (v, shape) in expected.items():
        if v is not None and (tuple(v.shape) != tuple(shape) or v.device != x.device):
            _expect(False, name, f"{tuple(v.shape)} on {v.device}", f"{tuple(shape)} on {x.device}")


def check_cu_seqlens(cu_seqlens, b, t):
    """Boundaries (s + 1,) as a tuple of ints; None: of the batch rows. Keep them on the CPU: they steer the host."""
    if cu_seqlens is None:
        return tuple(range(0, b * t + 1, t))
    _expect(b == 1, "cu_seqlens", f"a batch of {b}", "packed sequences in a batch of 1")
    cu = tuple(cu_seqlens.tolist() if isinstance(cu_seqlens, torch.Tensor) else cu_seqlens)
    integers = len(cu) >= 2 and all(type(i) is int for i in cu)
    _expect(integers, "cu_seqlens", cu, "integers (s + 1,), s >= 1")
    _expect(cu[0] == 0 and cu[-1] == t, "cu_seqlens", f"{cu[0]} ... {cu[-1]}", f"0 ... {t}, the number of tokens")
    _expect(all(i < j for i, j in zip(cu, cu[1:])), "cu_seqlens", cu, "strictly increasing boundaries")
    return cu


def _check_scan(x, dt, A, B, C, D, dt_bias, states, s):
    """For one token (no t) and for many. The sign of A is checked only where that does not wait for a GPU."""
    *lead, h, p = x.shape
    *_, g, n = B.shape
    _expect_tensors(x, dt=(dt, (*lead, h)), A=(A, (h,)), B=(B, (*lead, g, n)), C=(C, B.shape), D=(D, (h,)),
                    dt_bias=(dt_bias, (h,)), initial_states=(states, (s, h, p, n)))
    _expect(h % g == 0, "B", f"{g} groups", f"a number that divides the {h} heads of x")
    same = x.dtype == B.dtype == C.dtype
    _expect(same, "dtype", f"x {x.dtype}, B {B.dtype}, C {C.dtype}", "the same for x, B and C")
    if A.device.type == "cpu" and not torch.compiler.is_compiling():
        _expect(bool((A < 0).all()), "A", "a value that is not negative", "A < 0 in every head")


def _check_conv(x, weight, bias, activation, states, s):
    d, k = x.shape[-1], weight.shape[-1]
    _expect_tensors(x, weight=(weight, (d, k)), bias=(bias, (d,)), initial_states=(states, (s, d, k - 1)))
    _expect(activation in (None, "silu"), "activation", repr(activation), 'None or "silu"')


def _backend(name, x):
    """The backend's name; None picks the fastest one where x is. The kernels have no float64."""
    runs = triton is not None and (x.is_cuda or "TRITON_INTERPRET" in os.environ) and x.dtype != torch.float64
    known = name in (None, "recurrent", "torch", "triton")
    _expect(known, "backend", repr(name), "recurrent, torch, triton or None")
    _expect(name != "triton" or runs, "backend", f'"triton" for {x.dtype} on {x.device.type}',
            "float32, bfloat16 or float16 on a GPU with triton installed")
    return name or ("triton" if runs and x.is_cuda else "torch")


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(index, inverse)
        ctx.shape = x.shape
        return x.index_select(0, index.flatten()).unflatten(0, index.shape)  # on a CPU much faster than x[index]

    @staticmethod
    def backward(ctx, dout):
        index, inverse = ctx.saved_tensors
        dout = dout.flatten(0, index.dim() - 1)
        if inverse is not None:
            return dout.index_select(0, inverse), None, None
        return dout.new_zeros(ctx.shape).index_copy_(0, index.flatten(), dout), None, None


def gather_rows(x, index, inverse=None):
    """x[index], but its backward is a gather or a store instead of a scatter-add: faster and deterministic.

    x (tokens, ...); index (rows,) or (rows, width). inverse (tokens,) is where each token sits in index.flatten().
    It is needed if index repeats tokens as padding, whose gradients are dropped: nothing may read padding."""
    return _GatherRows.apply(x, index, inverse)


def to_device(tensors, device):
    """Copy CPU tensors of one dtype to `device`, in one copy from pinned memory that does not stop the host.
    One `.to` each would make it wait, every time, until the GPU has caught up."""
    if device.type == "cpu":
        return tensors
    # Each starts at a multiple of 16 bytes, as if allocated alone: other addresses make Triton recompile.
    padded = [F.pad(v.flatten(), (0, -v.numel() % 16)) for v in tensors]
    together = torch.cat(padded)
    if device.type == "cuda" and not torch.compiler.is_compiling():
        together = together.pin_memory()
    parts = together.to(device, non_blocking=True).split([len(v) for v in padded])
    return [part[: v.numel()].view(v.shape) for part, v in zip(parts, tensors)]


@lru_cache(maxsize=16)  # built once per batch, then shared by all layers and by the backward pass
@torch.inference_mode(False)  # what is cached may meet autograd later
def chunk_table(cu, size, device):
    """Cut the sequences with boundaries `cu` (a tuple) into chunks of at most `size` tokens, in token order.

    Returns:
        start (k,): the first token of each chunk.
        left (k,): how many tokens its sequence has from there on; the chunk holds min(left, size) of them.
        first (s + 1,): the first chunk of each sequence, and at the end the number of chunks.
    """
    chunks, first = [], [0]
    for begin, end in zip(cu, cu[1:]):
        chunks += [(start, end - start) for start in range(begin, end, size)]
        first.append(len(chunks))
    return to_device([*torch.tensor([*zip(*chunks)]), torch.tensor(first)], device)
