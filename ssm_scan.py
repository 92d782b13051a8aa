"""The state-space half of Falcon-H1: the SSD scan of Mamba-2 and the short causal convolution in front of it.
Argument names follow mamba_ssm and causal_conv1d. To copy this file, take nothing else.

Three backends compute the same function and all of its gradients:

    "recurrent"   the definition, one token after another; in float64 the oracle of the tests
    "torch"       for CPUs: sequences are cut into chunks, and the scan becomes matrix products (section 2)
    "triton"      for GPUs: the same in kernels, forward and backward (sections 3 and 4). With the environment
                  variable TRITON_INTERPRET=1 they run on a CPU, slowly, in Triton's interpreter.

Glossary (Mamba-2 is arXiv 2405.21060)
    b, t, h, p   batch, tokens, heads, channels per head (the paper's P, "head dim")
    g, n         groups that share B and C: head j reads group j // (h / g); state size (the paper's N)
    s, k, l      sequences: batch rows, or documents packed into one row; chunks; tokens per chunk
    x            (b, t, h, p)   what is written into the state
    dt           (b, t, h)      step size Delta, positive, after softplus(dt + dt_bias) if that is asked for
    A            (h,)           negative; one step keeps exp(dt A) of the state ("scalar-identity A")
    B, C         (b, t, g, n)   where to write in the state, what to read from it (the SSM's keys, queries)
    D            (h,)           skip connection from x to y
    S            (s, h, p, n)   the state, one p x n matrix per head, always float32 or wider
    cu_seqlens   (s + 1,)       where packed documents start, and the end: [0, 7, 19] is 7 and 12 tokens

Deviations from Mamba-2: none in the function. Decays are differences of cumulative sums in float64 or, in the
kernels, in pairs of float32: over a strongly decaying chunk a sum reaches -10^4, where float32 has three
digits after the point. No chunk has tokens of two documents, so nothing needs a mask and nothing can leak.
"""

import math
import os
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    _jit, constexpr = triton.jit, tl.constexpr
except ImportError:  # macOS and Windows: the kernels below are plain functions that nobody calls
    triton, tl, _jit, constexpr = None, None, lambda kernel: kernel, int

# 1. The scan, one step of it, and the definition ------------------------------------------------------------

def ssd_scan(x, dt, A, B, C, *, D=None, dt_bias=None, dt_softplus=False, initial_states=None, cu_seqlens=None,
             chunk_size=256, backend=None, return_final_states=True):
    """The SSD scan (Mamba-2, equation 1, discretised as in its section 2.1):

        S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T          y_t = S_t C_t + D x_t

    Args:
        x, dt, A, B, C, D: see the glossary; any t >= 1, g divides h; x, B and C share one dtype.
        dt_bias, dt_softplus: (h,), bool. The step size is dt + dt_bias, or its softplus.
        initial_states: (s, h, p, n), zeros if None.
        cu_seqlens: (s + 1,) packs s sequences along t, and b = 1; None: s = b. A tuple under torch.compile.
        chunk_size: the most tokens per chunk; changes speed only.
        backend: "recurrent", "torch", "triton"; None picks "triton" on a GPU and "torch" elsewhere.
        return_final_states: False returns None instead, and saves 3 MB per sequence at 7B.
    Returns:
        y (b, t, h, p) in x's dtype, final states (s, h, p, n) in float32 or float64; both differentiable.
    Raises:
        ValueError, naming the argument. On a GPU looking would make the host wait: there A >= 0 gives NaN,
        and a negative step, which the chunks do not allow for, goes unseen."""
    backend = _backend(backend, x)
    check(x.dim() == 4 and x.numel() > 0, f"x: got {tuple(x.shape)}, expected (b, t, h, p), none of them 0")
    check(type(chunk_size) is int and chunk_size >= 1, f"chunk_size: got {chunk_size}, expected an int >= 1")
    cu = check_cu_seqlens(cu_seqlens, *x.shape[:2])
    _check_scan(x, dt, A, B, C, D, dt_bias, initial_states, len(cu) - 1)
    shape = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)  # of the state and of all sums
    dt = _step_size(dt, dt_bias, dt_softplus, dtype)
    if not dt_softplus and dt.device.type == "cpu" and not torch.compiler.is_compiling():  # as for A
        check(not (dt < 0).any(), "dt: got a negative step size, expected dt >= 0 or dt_softplus=True")
    A, D, S = (v if v is None else v.to(dtype).contiguous() for v in (A, D, initial_states))
    x, dt, B, C = (v.flatten(0, 1) for v in (x, dt, B, C))  # all sequences in one row, (tokens, ...)
    if backend == "triton":
        D = torch.zeros_like(A) if D is None else D
        y, S = _Scan.apply(S, cu, chunk_size, return_final_states, x, dt, B, C, A, D)
    else:
        S = x.new_zeros(len(cu) - 1, *x.shape[1:], B.shape[2], dtype=dtype) if S is None else S
        scan = _scan_chunked if backend == "torch" else _scan_recurrent
        y, S = scan(x.to(dtype), dt, B.to(dtype), C.to(dtype), A, S, cu, chunk_size)
        y = y if D is None else torch.addcmul(y, D[:, None], x)
    return y.to(x.dtype).view(shape), S if return_final_states else None

def ssd_step(state, x, dt, A, B, C, *, D=None, dt_bias=None, dt_softplus=False):
    """One token of `ssd_scan`, in torch; decode.py has a kernel for it.

    Args:
        state, x, dt: (b, h, p, n), (b, h, p), (b, h). B, C: (b, g, n). The others are as for ssd_scan.
    Returns:
        y (b, h, p) in x's dtype, and state, updated in place (so not a leaf); both differentiable."""
    check(x.dim() == 3, f"x: got {tuple(x.shape)}, expected (b, h, p)")
    _check_scan(x, dt, A, B, C, D, dt_bias, state, x.shape[0])
    dtype = state.dtype
    heads = (B.shape[1], -1)  # (g, h / g): the heads of a group share B and C
    dt = _step_size(dt, dt_bias, dt_softplus, dtype)
    keep = torch.exp(dt * A.to(dtype))[..., None, None]
    # Large batches spend the memory bandwidth on the state: copy it only where backward needs the old one.
    new = state.clone() * keep if torch.is_grad_enabled() else state.mul_(keep)
    grouped = new.unflatten(1, heads)  # a view
    written = (dt[..., None] * x).unflatten(1, heads)[..., None]  # (b, g, h / g, p, 1)
    grouped.addcmul_(written, B.to(dtype)[:, :, None, None])
    y = C.to(dtype)[:, :, None] @ grouped.flatten(2, 3).mT  # (b, g, 1, n) (b, g, n, p h / g)
    y = y.view(x.shape) if D is None else torch.addcmul(y.view(x.shape), D.to(dtype)[:, None], x)
    return y.to(x.dtype), state.copy_(new)

def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
                              seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, math.inf),
                              return_final_states=False, return_varlen_states=False):
    """`ssd_scan` as mamba_ssm calls it. z gates: y silu(z). dt_limit clamps the step size. D may be (h, p).
    seq_idx (b, t) changes where a row's next document starts (the host waits for a GPU to read it);
    initial_states (b, h, p, n) enter each row's first document. Returns y, or a tuple of y, each row's final
    state, and the states at the ends of cu_seqlens ("varlen", b = 1), as the two flags ask for them."""
    check(x.dim() == 4 and x.numel() > 0, f"x: got {tuple(x.shape)}, expected (b, t, h, p), none of them 0")
    b, t, h, p = x.shape
    skip, D = (D, None) if D is not None and D.dim() == 2 else (None, D)  # ssd_scan takes a number per head
    check_tensors(x, dt=(dt, (b, t, h)), B=(B, (b, t, *B.shape[2:])), C=(C, B.shape), z=(z, x.shape),
                  D=(skip, (h, p)), dt_bias=(dt_bias, (h,)), seq_idx=(seq_idx, (b, t)),
                  initial_states=(initial_states, (b, h, p, *B.shape[-1:])))
    dt = _step_size(dt, dt_bias, dt_softplus, torch.promote_types(x.dtype, torch.float32)).clamp(*dt_limit)
    A = A.to(dt.dtype) - 1e-30 * (A == 0)  # mamba_ssm allows 0, a head that forgets nothing
    cu = check_cu_seqlens(cu_seqlens if return_varlen_states else None, b, t)
    if seq_idx is not None:
        starts = F.pad(seq_idx.diff(), (1, 0), value=1).flatten().nonzero()[:, 0].tolist()
        check(not return_varlen_states or [*cu[:-1]] == starts, f"seq_idx: got {starts}, expected {cu}")
        cu = (*starts, b * t)
    if initial_states is not None and len(cu) > b + 1:  # documents inside a row start with one more, of zeros
        initial_states = F.pad(initial_states, (0,) * 7 + (1,))[[b if i % t else i // t for i in cu[:-1]]]
    row, dt, B, C = (v.flatten(0, 1)[None] for v in (x, dt, B.to(x.dtype), C.to(x.dtype)))
    y, S = ssd_scan(row, dt, A, B, C, D=D, initial_states=initial_states, cu_seqlens=cu,
                    chunk_size=chunk_size, return_final_states=return_final_states or return_varlen_states)
    y = y.view_as(x) if skip is None else y.view_as(x) + skip.to(dt.dtype) * x
    y = y if z is None else y * F.silu(z.to(dt.dtype))
    final = S if S is None or len(cu) == b + 1 else S[[cu.index(end) - 1 for end in range(t, b * t + 1, t)]]
    result = y.to(x.dtype), *[final] * return_final_states, *[S] * return_varlen_states
    return result if len(result) > 1 else result[0]

def _step_size(dt, dt_bias, dt_softplus, dtype):
    """Delta in the dtype of the state: a bfloat16 step would lose the decay's digits."""
    dt = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    return F.softplus(dt) if dt_softplus else dt

def _scan_recurrent(x, dt, B, C, A, S, cu, chunk_size):
    """The definition. x (tokens, h, p), dt (tokens, h), B and C (tokens, g, n), S (s, h, p, n)."""
    B, C = (v.repeat_interleave(x.shape[1] // v.shape[1], 1) for v in (B, C))  # (tokens, h, n)
    ys, finals = [], []
    for state, start, end in zip(S, cu, cu[1:]):
        for i in range(start, end):
            decayed = torch.exp(dt[i] * A)[:, None, None] * state
            state = decayed + torch.einsum("h,hp,hn->hpn", dt[i], x[i], B[i])
            ys.append(torch.einsum("hpn,hn->hp", state, C[i]))
        finals.append(state)
    return torch.stack(ys), torch.stack(finals)

# 2. The scan in matrix products -----------------------------------------------------------------------------

def _scan_chunked(x, dt, B, C, A, S, cu, chunk_size):
    """The same in matrix products (Mamba-2, section 6). With c_i = sum_{j<=i} dt_j A in a chunk of l tokens,

        y_i = sum_{j<=i} exp(c_i - c_j) (C_i . B_j) dt_j x_j      attention-like, within the chunk    (step 1)
            + exp(c_i) S C_i                                      what the entering state adds        (step 4)
        S'  = exp(c_l) S + sum_j exp(c_l - c_j) dt_j x_j B_j^T    the state handed on             (steps 2, 3)

    Padding has dt = 0: it neither writes nor decays, so c_l is right for partly filled chunks too."""
    (h, p), (g, n) = x.shape[1:], B.shape[1:]
    lengths = [end - start for start, end in zip(cu, cu[1:])]
    # The fastest chunk on a CPU. Per token: l decays and p n / l of a state; fewest at l = sqrt(p n).
    l = min(chunk_size, 1 << max(4, (p * n).bit_length() // 2), max(lengths))
    sizes = [size for length in lengths for size in (length, -length % l)]  # tokens, padding, tokens, ...

    def cut(v):  # (tokens, ...) -> (k, l, ...)
        padding = v.new_zeros(sum(sizes[1::2]), *v.shape[1:]).split(sizes[1::2])
        parts = [part for pair in zip(v.split(lengths), padding) for part in pair]
        return torch.cat(parts).unflatten(0, (-1, l))

    # From here on time is the last dimension: heads of a group, rows of one matrix, share B and C uncopied.
    dt = cut(dt).transpose(1, 2)  # (k, h, l)
    dtx = cut(x).permute(0, 2, 3, 1) * dt[:, :, None]  # (k, h, p, l)
    B = cut(B).transpose(1, 2)  # (k, g, l, n)
    C = cut(C).permute(0, 2, 3, 1)  # (k, g, n, l)
    a = (dt * A[:, None]).double()
    c = a.cumsum(2)

    # Step 1, within the chunk.
    y = dtx @ _DecayedScores.apply(B @ C, c)  # (k, h, p, l)

    # Step 2, what each chunk adds to the state. c_l - c_j is a sum over the tokens after j, not a difference.
    rest = F.pad(a[..., 1:].flip(2).cumsum(2).flip(2), (0, 1)).to(x.dtype)
    written = dtx * _bounded_exp(rest)[:, :, None]  # (k, h, p, l)
    added = (written.reshape(-1, g, p * h // g, l) @ B).view(-1, h, p, n)

    # Step 3, from chunk to chunk, the only sequential loop: t / l short steps per sequence.
    keep = _bounded_exp(c[..., -1].to(x.dtype))[..., None, None]  # (k, h, 1, 1)
    chunks = zip(keep.unbind(), added.unbind())  # added[i] would have a gradient as large as added
    entering, finals = [], []
    for state, length in zip(S, lengths):
        for factor, own in islice(chunks, math.ceil(length / l)):
            entering.append(state)
            state = torch.addcmul(own, factor, state)
        finals.append(state)

    # Step 4, what the entering state adds to each token's output.
    read = (torch.stack(entering).view(-1, g, p * h // g, n) @ C).view(y.shape)
    y = torch.addcmul(y, read, _bounded_exp(c.to(x.dtype))[:, :, None])
    y = y.permute(0, 3, 1, 2).flatten(0, 1)  # (k l, h, p)
    return torch.cat(y.split(sizes)[::2]), torch.stack(finals)

class _DecayedScores(torch.autograd.Function):
    """(B C^T)_ji exp(c_i - c_j) at row j, column i >= j, else 0. bc (k, g, l, l), c (k, h, l) -> (k, h, l, l)
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
        check_first_order()
        bc, decay = ctx.saved_tensors
        q = (grad * decay).unflatten(1, (bc.shape[1], -1))  # (k, g, h / g, l, l)
        dbc = q.sum(2).triu_()
        q = q.mul_(bc.unsqueeze(2)).flatten(1, 2)
        q.diagonal(dim1=-2, dim2=-1).zero_()
        return dbc, q.sum(-2, dtype=torch.float64) - q.sum(-1, dtype=torch.float64)

def _bounded_exp(c):
    """exp(c), c <= 0, clamped at e^-60 = 9e-27: denormals are 100x slower on a CPU."""
    return c.clamp(-60, 0).exp_()

# 3. The scan in Triton: kernels -----------------------------------------------------------------------------
#
# The same four steps in kernels that never store the two large things: a chunk's (l, l) matrix of decays, and
# copies of B and C for the heads of a group. A program, Triton's unit of parallel work, computes one tile:
#
#                source j ->                      one chunk (k), one head (h), 2 x 2 tiles of l / 2 tokens.
#              +-------+-------+   value (l, p)   The program of the marked tile of y walks over the tiles of
#     output i | W 0 0 |       |    +-------+     its row up to the diagonal and multiplies W with the values:
#         |    | W W 0 |       |    |   x   |
#         v    | W W W |       |    |       |         W_ij = (C_i . B_j) 2^(c_i - c_j) dt_j,   0 where j > i
#              +-------+-------+ @  +-------+
#              | W W W | W 0 0 |    |   x   |     C B^T is the same for all heads of a group: its own kernel
#           ** | W W W | W W 0 | ** |       |     stores it, on and below the diagonal. W exists in registers
#              | W W W | W W W |    |       |     only.
#              +-------+-------+    +-------+
#
# Decays are 2^(c_i - c_j) <= 1, c = log2(e) cumsum(dt A), never quotients of exponentials, which overflow.
# Below the diagonal they are a product, with c_r at a boundary between a tile's sources j and outputs i:
#
#     2^(c_i - c_j) dt_j = after[r, i] before[r, j]      after = 2^(c_i - c_r)    before = 2^(c_r - c_j) dt_j
#
# Boundary 0 is the chunk's start, the last one its end. The diagonal takes c itself, as a pair of float32:
# the rounded sum and what rounding lost, because neighbours may differ by less than the sum's last digit.
#
# Backward. With R_t = dL/dS_t, everything the loss sees of the state, the definition differentiates to
#
#     R_t = dy_t C_t^T + a_{t+1} R_{t+1}   dx_t = dt_t R_t B_t + D dy_t   d(dt_t) = x_t . R_t B_t + ...
#     a_t = exp(dt_t A)                    dB_t = dt_t R_t^T x_t          dC_t = S_t^T dy_t
#
# R is a scan like S, run from the last token to the first. So states, outputs, and dB and dC have one kernel
# each for both directions: REVERSED turns the triangle around, and section 4 gives it other arguments.
#
# The gradient of log a_t sums over every path from a source to an output that crosses step t. With q_ij the
# share of source j in the loss through output i, F_i that of the entering state through output i, E_j that of
# source j through the leaving state:
#
#     sum_{j < t <= i} q_ij  +  sum_{i >= t} F_i  +  sum_{j < t} E_j  +  2^(c_l) <leaving R, entering S>
#
# The first sum is sum_{i >= t} (row_i - col_i), where row and col add up the same numbers q, but not the
# diagonal, which is large and crosses no step. (y . dy - x . dx, shorter and common, has it in both terms and
# loses all digits where decays are strong.) d(dt_j) = (col_j + q_jj + E_j) / dt_j: steps of 0 count as 1e-30.
#
# No atomics: programs that share a sum store their parts, the last kernel adds them, and two runs give equal
# bits. No autotuning: it stalls at every new shape, and different tiles round differently. Chunk and token
# numbers are int64, because t h p passes 2^31 at 700,000 tokens of the 7B model.
#
# Arguments are pointers: start, left, first as in chunk_table; x, B, ... (tokens, h or g, p or n); cb, dcb
# (k, g, l, l); states (k, h, p, n); decays as in _rows. s_value is the stride from one token of value to the
# next. Capitals are known at compile time: the sizes above, boundaries every EDGE tokens, the sides BL, BP,
# BN, BK of tiles. A tile of cb is loaded whole and selected from afterwards: a mask would make loads narrow.

@_jit
def _program(tiles, heads):
    """This program's tile, head or group, and chunk. They count up in this order, as neighbours then share cb
    in the L2 cache."""
    pid = tl.program_id(0)
    return pid % tiles, pid // tiles % heads, (pid // (tiles * heads)).to(tl.int64)

@_jit
def _chunk_program(tiles, heads, start, left, L: constexpr):
    """As _program, with the chunk's first token and its number of tokens."""
    tile, h, k = _program(tiles, heads)
    return tile, h, k, tl.load(start + k), tl.minimum(tl.load(left + k), L).to(tl.int32)

@_jit
def _rows(decays, head, L: constexpr, EDGE: constexpr):
    """One head's decays in a chunk, 2 r + 3 rows of l float32: after and before at r boundaries, dt, c, and
    what rounding took from c. Returns where after, before and dt start."""
    R: constexpr = L // EDGE + 1
    after = decays + head * (2 * R + 3) * L
    return after, after + R * L, after + 2 * R * L

@_jit
def _decay(dt, i, j, L: constexpr):
    """2^(c_i - c_j) dt_j, at most dt_j."""
    c, low = dt + L, dt + 2 * L
    rise = (tl.load(c + i) - tl.load(c + j)) + (tl.load(low + i) - tl.load(low + j))
    return tl.exp2(tl.minimum(rise, 0.0)) * tl.load(dt + j)

@_jit
def _range(start, tile: constexpr, size: constexpr):
    """`tile` indices from start, and which are below size: known at compile time if tiles divide it."""
    i = start + tl.arange(0, tile)
    return i, (i < size) | (size % tile == 0)

@_jit
def _load(base, token, stride, column, mask):
    """Element `column` of every `token`'s vector, counted from base; 0 outside the mask."""
    return tl.load(base + token.to(tl.int64) * stride + column, mask=mask, other=0.0)

@_jit
def _products(a, b, i, j, num, s_a, s_b, SIZE: constexpr, BL: constexpr, BK: constexpr):
    """a_i . b_j of BL tokens i and BL tokens j, vectors of SIZE elements; 0 in the padding."""
    acc = tl.zeros((BL, BL), tl.float32)
    for k0 in range(0, SIZE, BK):
        k, inside = _range(k0, BK, SIZE)
        ai = _load(a, i[:, None], s_a, k[None, :], (i < num)[:, None] & inside[None, :])  # (BL, BK)
        bj = _load(b, j[None, :], s_b, k[:, None], (j < num)[None, :] & inside[:, None])  # (BK, BL)
        acc = tl.dot(ai, bj, acc, input_precision="ieee")
    return acc

@_jit
def _finished(acc, num):
    """acc, unchanged, for num > 0. A product's left factor that a loop computes is in registers. A Hopper
    tensor core may still read them when the next iteration overwrites them: Triton 3.6 does not wait (its
    issue 9433). It does wait for acc where the loop uses it, as here."""
    return tl.where(num > 0, acc, 0.0)

@_jit
def _decays_kernel(step, A, start, left, decays, H: constexpr, L: constexpr, EDGE: constexpr, BH: constexpr):
    """The decays of BH heads in one chunk, from step (tokens, h). c is summed in float64."""
    tile, _, k, token, num = _chunk_program((H + BH - 1) // BH, 1, start, left, L)
    h = tile * BH + tl.arange(0, BH)[:, None]
    j = tl.arange(0, L)[None, :]
    in_h = h < H
    dt = tl.load(step + (token + j) * H + h, mask=in_h & (j < num), other=0.0)  # (BH, L)
    # Padding has dt = 0 and so constant c: the last entry is the chunk's end in any case.
    a = tl.load(A + h, mask=in_h, other=-1.0).to(tl.float64) * 1.4426950408889634  # 1 / ln 2
    a = tl.where(a < 0, a, float("nan"))  # A >= 0 is an error, but the host must not wait to see it
    c = tl.cumsum(dt.to(tl.float64) * a, 1)
    high = c.to(tl.float32)
    dt = tl.where(dt < 1e-30, 1e-30, dt)
    after, before, dt_row = _rows(decays, k * H + h, L, EDGE)
    tl.store(dt_row + j, dt, mask=in_h)
    tl.store(dt_row + L + j, high, mask=in_h)
    tl.store(dt_row + 2 * L + j, (c - high).to(tl.float32), mask=in_h)
    for r in tl.static_range(L // EDGE + 1):
        boundary = tl.sum(tl.where(j == r * EDGE - 1, c, 0.0), 1)[:, None]  # 0 before the first token
        rise = (c - boundary).to(tl.float32)
        # `where` and not `minimum`, which would drop a NaN.
        tl.store(after + r * L + j, tl.exp2(tl.where(rise > 0, 0.0, rise)), mask=in_h)
        tl.store(before + r * L + j, tl.exp2(tl.where(rise < 0, 0.0, -rise)) * dt, mask=in_h)

@_jit
def _cb_kernel(B, C, start, left, cb, s_B, s_C, G: constexpr, N: constexpr, L: constexpr,
               BL: constexpr, BK: constexpr):
    """cb = C B^T, one tile on or below the diagonal per program, whole, 0 in the padding."""
    SIDE: constexpr = L // BL
    tile, g, k, token, num = _chunk_program(SIDE * SIDE, G, start, left, L)
    i0 = tile // SIDE * BL
    j0 = tile % SIDE * BL
    if (j0 <= i0) & (i0 < num):
        i, j = i0 + tl.arange(0, BL), j0 + tl.arange(0, BL)
        acc = _products(C + token * s_C + g * N, B + token * s_B + g * N, i, j, num, s_C, s_B, N, BL, BK)
        tl.store(cb + ((k * G + g) * L + i[:, None]) * L + j[None, :], acc)

@_jit
def _states_kernel(value, key, decays, start, left, first, initial, states, final, entering, crossing,
                   s_value, s_key, H: constexpr, G: constexpr, P: constexpr, N: constexpr, L: constexpr,
                   EDGE: constexpr, BP: constexpr, BN: constexpr, BK: constexpr, REVERSED: constexpr):
    """Steps 2 and 3. A program carries a BP x BN tile of a head's state through one sequence, BK tokens at a
    time, in float32 registers: states[k] = S, then S <- 2^(c_l) S + sum_j 2^(c_l - c_j) dt_j value_j key_j^T.
    REVERSED: states[k] = R, then R <- 2^(c_l) R + sum_i 2^(c_i) dy_i C_i^T. And with S = entering[k],
    crossing[k, h, tile] = 2^(c_l) <R, S>, the tile's share in the gradient of the chunk's whole decay."""
    ACROSS: constexpr = (N + BN - 1) // BN
    TILES: constexpr = (P + BP - 1) // BP * ACROSS
    PER_CHUNK: constexpr = L // BK
    tile, h, s = _program(TILES, H)
    p, in_p = _range(tile // ACROSS * BP, BP, P)
    n, in_n = _range(tile % ACROSS * BN, BN, N)
    place = p[:, None] * N + n[None, :]
    inside = in_p[:, None] & in_n[None, :]
    S = tl.zeros((BP, BN), tl.float32)
    if initial is not None:
        S += tl.load(initial + (s * H + h) * P * N + place, mask=inside, other=0.0)

    # All chunks but the last are full: one loop over all tokens, whose loads run ahead across chunks. What a
    # chunk needs once, its decay 2^(c_l) and the state before it, is loaded a chunk ahead by hand.
    begin = tl.load(first + s)
    token = tl.load(start + begin)
    tokens = tl.load(left + begin).to(tl.int32)
    parts = (tokens + BK - 1) // BK
    head = (tl.load(first + s + 1) - 1 if REVERSED else begin) * H + h
    keep = tl.load(_rows(decays, head, L, EDGE)[0] + L - 1)
    if REVERSED:
        S_before = tl.load(entering + head * P * N + place, mask=inside, other=0.0)
    for count in range(0, parts):
        part = parts - 1 - count if REVERSED else count
        head = (begin + part // PER_CHUNK) * H + h
        if (count == 0) | (part % PER_CHUNK == (PER_CHUNK - 1 if REVERSED else 0)):  # a chunk begins
            tl.store(states + head * P * N + place, S, mask=inside)
            S *= keep
            coming = tl.where(parts - count > PER_CHUNK, head + (-H if REVERSED else H), head)
            keep = tl.load(_rows(decays, coming, L, EDGE)[0] + L - 1)
            if REVERSED:
                tl.store(crossing + head * TILES + tile, tl.sum(S * S_before.to(tl.float32)))
                S_before = tl.load(entering + coming * P * N + place, mask=inside, other=0.0)
        after, _, dt = _rows(decays, head, L, EDGE)
        j = tl.arange(0, BK)
        at = token + part * BK
        real = j < tokens - part * BK
        weight = tl.load((after if REVERSED else dt - L) + part % PER_CHUNK * BK + j)  # dt - L: last before
        head_value = value + at * s_value + h * P
        group_key = key + at * s_key + h // (H // G) * N
        v = _load(head_value, j[None, :], s_value, p[:, None], real[None, :] & in_p[:, None])  # (BP, BK)
        q = _load(group_key, j[:, None], s_key, n[None, :], real[:, None] & in_n[None, :])  # (BK, BN)
        S = S if PER_CHUNK == 1 else _finished(S, parts)  # storing S has waited for it
        S = tl.dot((v.to(tl.float32) * weight[None, :]).to(v.dtype), q, S, input_precision="ieee")
    if final is not None:
        tl.store(final + (s * H + h) * P * N + place, S, mask=inside)

@_jit
def _scan_kernel(value, query, cb, states, decays, D, start, left, out, s_value, s_query,
                 H: constexpr, G: constexpr, P: constexpr, N: constexpr, L: constexpr, EDGE: constexpr,
                 BL: constexpr, BJ: constexpr, BP: constexpr, BK: constexpr, REVERSED: constexpr):
    """Steps 1 and 4, BL rows of one chunk and head per program (the picture above):
    y_i = 2^(c_i) S C_i + sum_{j <= i} W_ij x_j + D x_i.
    REVERSED: dx_j = dt_j 2^(c_l - c_j) R B_j + sum_{i >= j} W_ij dy_i + D dy_j."""
    tile, h, k, token, num = _chunk_program(L // BL, H, start, left, L)
    if tile * BL >= num:
        return
    head = k * H + h
    group = h // (H // G)
    i = tile * BL + tl.arange(0, BL)
    row = (i < num)[:, None]
    p, in_p = _range(0, BP, P)
    p, in_p = p[None, :], in_p[None, :]
    value += token * s_value + h * P
    query += token * s_query + group * N
    cb += (k * G + group) * L * L
    after, before, dt = _rows(decays, head, L, EDGE)
    edge = (tile + REVERSED) * (BL // EDGE) * L  # the boundary next to this tile

    # Step 4, the state that enters (leaves) the chunk, decayed only up to that boundary.
    acc = tl.zeros((BL, BP), tl.float32)
    for n0 in range(0, N, BK):
        n, in_n = _range(n0, BK, N)
        q = _load(query, i[:, None], s_query, n[None, :], row & in_n[None, :])  # (BL, BK)
        S = tl.load(states + head * P * N + p * N + n[:, None], mask=in_n[:, None] & in_p, other=0.0)
        acc = tl.dot(q, S, acc, input_precision="ieee")
    last = edge + L - 1 if REVERSED else tile * BL - 1
    acc *= tl.load(after + last, mask=last >= 0, other=1.0)

    # Step 1 below the diagonal: cb, weighted by column before the product and by row after the last one.
    begin, end = ((tile + 1) * BL, num) if REVERSED else (0, tile * BL)
    by_row, by_column = (before, after) if REVERSED else (after, before)
    for l0 in range(begin, end, BJ):
        j = l0 + tl.arange(0, BJ)
        later, sooner = (j[None, :], i[:, None]) if REVERSED else (i[:, None], j[None, :])
        W = tl.load(cb + later * L + sooner).to(tl.float32) * tl.load(by_column + edge + j)[None, :]
        v = _load(value, j[:, None], s_value, p, (j < num)[:, None] & in_p)  # (BJ, BP)
        acc = tl.dot(W.to(v.dtype), v, _finished(acc, num), input_precision="ieee")
    acc *= tl.load(by_row + edge + i)[:, None]

    # Step 1 on the diagonal, where every entry has its own decay.
    for l0 in range(tile * BL, tile * BL + BL, BJ):
        j = l0 + tl.arange(0, BJ)
        later, sooner = (j[None, :], i[:, None]) if REVERSED else (i[:, None], j[None, :])
        W = tl.load(cb + later * L + sooner).to(tl.float32) * _decay(dt, later, sooner, L)
        v = _load(value, j[:, None], s_value, p, (j < num)[:, None] & in_p)
        W = tl.where(later >= sooner, W, 0.0)
        acc = tl.dot(W.to(v.dtype), v, _finished(acc, num), input_precision="ieee")
    acc += tl.load(D + h) * _load(value, i[:, None], s_value, p, row & in_p).to(tl.float32)
    tl.store(out + (token + i)[:, None] * H * P + h * P + p, acc, mask=row & in_p)

@_jit
def _dcb_kernel(x, dy, cb, decays, start, left, dcb, row, col, diagonal, s_x, H: constexpr, G: constexpr,
                P: constexpr, L: constexpr, BL: constexpr, BP: constexpr, DIAGONAL: constexpr):
    """d(cb)_ij = sum over the group's heads of 2^(c_i - c_j) dt_j (dy_i . x_j), a tile per program. Those on
    the DIAGONAL have their own launch. Boundaries are where tiles meet: EDGE is BL.
    Per head also diagonal_j = dy_j . x_j and, with q = d(cb) cb below the diagonal, the sums of the tile's q:
    row[k, h, tile's column, i] and col[k, h, tile's row, j]."""
    SIDE: constexpr = L // BL
    tile, g, k, token, num = _chunk_program(SIDE if DIAGONAL else SIDE * SIDE, G, start, left, L)
    down, across = (tile, tile) if DIAGONAL else (tile // SIDE, tile % SIDE)
    if (down * BL >= num) | (across > down) | ((across == down) & (not DIAGONAL)):
        return
    i, j = down * BL + tl.arange(0, BL), across * BL + tl.arange(0, BL)
    place = ((k * G + g) * L + i[:, None]) * L + j[None, :]
    below = tl.load(cb + place).to(tl.float32)
    if DIAGONAL:
        below = tl.where(i[:, None] > j[None, :], below, 0.0)
    acc = tl.zeros((BL, BL), tl.float32)
    for h in range(g * (H // G), (g + 1) * (H // G)):
        head = k * H + h
        after, before, dt = _rows(decays, head, L, BL)
        q = _products(dy + (token * H + h) * P, x + token * s_x + h * P, i, j, num, H * P, s_x, P, BL, BP)
        if DIAGONAL:
            tl.store(diagonal + head * L + i, tl.sum(tl.where(i[:, None] == j[None, :], q, 0.0), 1))
            q = tl.where(i[:, None] >= j[None, :], q * _decay(dt, i[:, None], j[None, :], L), 0.0)
        else:
            q *= tl.load(after + down * L + i)[:, None]
            q *= tl.load(before + down * L + j)[None, :]
        acc += q
        q *= below
        sums = q.to(row.dtype.element_ty)
        tl.store(row + (head * SIDE + across) * L + i, tl.sum(sums, 1))
        tl.store(col + (head * SIDE + down) * L + j, tl.sum(sums, 0))
    tl.store(dcb + place, acc)

@_jit
def _dbc_kernel(value, own, other, dcb, states, decays, start, left, out, flow, s_value, s_own, s_other,
                H: constexpr, G: constexpr, P: constexpr, N: constexpr, L: constexpr, EDGE: constexpr,
                BL: constexpr, BN: constexpr, BP: constexpr, BK: constexpr, REVERSED: constexpr):
    """dC_i = sum_h 2^(c_i) S^T dy_i + sum_{j <= i} d(cb)_ij B_j, BL x BN per program, and per head
    flow[k, h, tile of n, i] = C_i . (the first term), which is F_i.
    REVERSED: dB_j = sum_h dt_j 2^(c_l - c_j) R^T x_j + sum_{i >= j} d(cb)_ij C_i, and flow is E_j."""
    SPLIT: constexpr = (N + BN - 1) // BN
    tile, g, k, token, num = _chunk_program((L // BL) * SPLIT, G, start, left, L)
    i0 = tile // SPLIT * BL
    part = tile % SPLIT
    if i0 >= num:
        return
    i = i0 + tl.arange(0, BL)
    row = (i < num)[:, None]
    p, in_p = _range(0, BP, P)
    n, in_n = _range(part * BN, BN, N)
    n, in_n = n[None, :], in_n[None, :]
    mine = _load(own + token * s_own + g * N, i[:, None], s_own, n, row & in_n).to(tl.float32)  # (BL, BN)
    acc = tl.zeros((BL, BN), tl.float32)

    # Through the state, for every head of the group. dt - L: before, at the chunk's end.
    for h in range(g * (H // G), (g + 1) * (H // G)):
        head = k * H + h
        after, _, dt = _rows(decays, head, L, EDGE)
        v = _load(value + token * s_value + h * P, i[:, None], s_value, p[None, :], row & in_p[None, :])
        S = tl.load(states + head * P * N + p[:, None] * N + n, mask=in_p[:, None] & in_n, other=0.0)
        term = tl.dot(v, S, input_precision="ieee") * tl.load((dt - L if REVERSED else after) + i)[:, None]
        tl.store(flow + (head * SPLIT + part) * L + i, tl.sum(term * mine, 1))
        acc += term

    # Within the chunk, for all heads at once. Tiles of d(cb) above the diagonal are never written.
    begin, end = (i0, num) if REVERSED else (0, tl.minimum(i0 + BL, num))
    for l0 in range(begin, end, BK):
        j = l0 + tl.arange(0, BK)
        later, sooner = (j[None, :], i[:, None]) if REVERSED else (i[:, None], j[None, :])
        d = tl.load(dcb + (k * G + g) * L * L + later * L + sooner)
        o = _load(other + token * s_other + g * N, j[:, None], s_other, n, (j < num)[:, None] & in_n)
        d = tl.where(later >= sooner, d, 0.0)
        acc = tl.dot(d.to(o.dtype), o, _finished(acc, num), input_precision="ieee")
    tl.store(out + (token + i)[:, None] * G * N + g * N + n, acc, mask=row & in_n)

@_jit
def _ddt_kernel(row, col, diagonal, F, E, crossing, cb, decays, A, start, left, ddt, dA, dD, H: constexpr,
                G: constexpr, L: constexpr, EDGE: constexpr, SPLIT: constexpr, PARTS: constexpr):
    """The gradient of log a_t by the formula above, for one chunk and head, summed in float64. From it ddt
    (tokens, h), and the chunk's share in dA and dD (k, h)."""
    SIDE: constexpr = L // EDGE
    _, h, k, token, num = _chunk_program(1, H, start, left, L)
    head = k * H + h
    j = tl.arange(0, L)
    inside = j < num
    own_tile = j // EDGE
    rows, cols, Fs, Es = (tl.zeros((L,), tl.float64),) * 4
    across = 0.0
    for part in tl.static_range(SIDE):  # of the tiles that were computed
        place = (head * SIDE + part) * L + j
        computed = part * EDGE < num
        rows += tl.load(row + place, mask=inside & (part <= own_tile), other=0.0)
        cols += tl.load(col + place, mask=inside & (part >= own_tile) & computed, other=0.0)
    for part in tl.static_range(SPLIT):
        place = (head * SPLIT + part) * L + j
        Fs += tl.load(F + place, mask=inside, other=0.0)
        Es += tl.load(E + place, mask=inside, other=0.0)
    for part in tl.static_range(PARTS):
        across += tl.load(crossing + head * PARTS + part)
    dy_x = tl.load(diagonal + head * L + j, mask=inside, other=0.0)
    cb_jj = tl.load(cb + ((k * G + h // (H // G)) * L + j) * L + j, mask=inside, other=0.0).to(tl.float32)

    paths = tl.cumsum(rows - cols + Fs, 0, reverse=True) + (tl.cumsum(Es, 0) - Es)
    da = tl.where(inside, paths + across, 0.0)
    dt = tl.load(_rows(decays, head, L, EDGE)[2] + j)
    written = (cols + Es).to(tl.float32) / dt + cb_jj * dy_x  # q_jj / dt_j = cb_jj dy_j . x_j
    tl.store(ddt + (token + j) * H + h, written + (tl.load(A + h) * da).to(tl.float32), mask=inside)
    tl.store(dA + head, tl.sum(dt * da))
    tl.store(dD + head, tl.sum(dy_x.to(tl.float64)))

# 4. The scan in Triton: launches ----------------------------------------------------------------------------

def _power(size):
    return max(16, 1 << (size - 1).bit_length())  # tl.dot needs at least 16, tl.arange a power of two

def _dense(v):
    """v, copied unless the elements of a token are contiguous: tokens may be slices of wider rows."""
    return v if v[0].is_contiguous() else v.contiguous()

def _launch(kernel, programs, *args, **options):
    tensors = [v for v in (*args, *options.values()) if isinstance(v, Tensor)]
    needed = torch.is_grad_enabled() and any(v.requires_grad for v in tensors)  # inside autograd it is off
    check(not needed, "this kernel has no gradient: call it under torch.no_grad()")
    with torch.cuda.device_of(tensors[0]):  # Triton launches on the current GPU, wherever the tensors are
        kernel[(programs,)](*args, **options)

@lru_cache(maxsize=16)
def _tiling(l, p, n, dtype, shared_memory):
    """Tile sizes and launch options of every kernel, for chunks of l tokens. With 16 bits, Hopper (227 KB of
    shared memory per block) was measured on an H200 (NOTES.md): tiles of 64 rows, and no more registers than
    let two or three blocks share a multiprocessor, so that one works while another waits; 128 rows where a
    tile's neighbours would be read too often. Ampere, Ada and consumer Blackwell (from 99 KB) take 64.
    float32 takes 32: its products run on no tensor core and need their registers for themselves."""
    full = dtype.itemsize == 4
    wide = not full and shared_memory >= 200_000 and p <= 128
    small_side = 32 if full else 64
    edge = min(small_side, l)
    side = min(128, l) if wide else edge
    inner = min(64 if wide else 32, l)
    bp, bn = _power(p), _power(n)
    small = dict(num_warps=4, num_stages=3 if wide else 2)
    # 8 warps need 64 rows: with 32, Triton 3.6 loads 8 bytes at addresses that are multiples of 4.
    large = dict(num_warps=8, num_stages=3) if side == 128 else small
    sums = dict(num_warps=8, num_stages=3, maxnreg=128) if wide and edge == 64 else dict(num_stages=1)
    return dict(
        decays=dict(BH=4, num_warps=4), ddt=dict(num_warps=4),
        cb=dict(BL=side, BK=min(64, bn), **large),
        states=dict(BP=min(small_side, bp), BN=min(64, bn), BK=min(256 if wide else 32, l), num_stages=2),
        scan=dict(BL=edge, BJ=min(32, l), BP=bp, BK=min(inner, bn), maxnreg=168 if wide else None, **small),
        dcb=dict(BL=edge, BP=min(32, bp) if full else bp, **sums),
        dbc=dict(BL=side, BN=min(128 if wide else 64, bn), BP=bp, BK=inner, **large))

class _Plan:
    """Launches the kernels of one scan, that of the decays at once. inputs: x (tokens, h, p), dt (tokens, h),
    B, C (tokens, g, n), A, D (h,). given: what else kernels may take, by name."""
    def __init__(self, inputs, cu, cb, **given):
        x, dt, B, C, A, D = inputs
        (h, p), (g, n) = x.shape[1:], B.shape[1:]
        l = cb.shape[-1]
        shared = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin if x.is_cuda else 0
        self.tiles = _tiling(l, p, n, x.dtype, shared)
        start, left, first = chunk_table(tuple(cu), l, x.device)
        edge = self.tiles["dcb"]["BL"]
        decays = A.new_empty(len(start), h, 2 * (l // edge + 1) + 3, l)
        self.given = given | dict(
            x=x, step=dt, B=B, C=C, A=A, D=D, cb=cb, start=start, left=left, first=first, decays=decays,
            H=h, G=g, P=p, N=n, L=l, EDGE=edge, k=len(start), s=len(cu) - 1)
        self.launch(_decays_kernel, "decays", "Hk")

    def count(self, name, grid):
        """Programs along a grid such as "PNHs": tiles of P and of N, heads, sequences (k are the chunks)."""
        tiles = self.tiles[name]
        return math.prod(triton.cdiv(self.given[side], tiles.get("B" + side, 1)) for side in grid)

    def launch(self, kernel, name, grid, **given):
        """With the stride between tokens of a tensor as s_value, for value, and so on."""
        tiles = self.tiles[name]
        given = self.given | tiles | given
        args = {key: given[key] if key in given else given[key[2:]].stride(0) for key in kernel.arg_names}
        options = {key: v for key, v in tiles.items() if key not in args}  # num_warps, num_stages, maxnreg
        _launch(kernel, self.count(name, grid), **args, **options)

def _operator(name, *changed):
    """Decorator. torch.compile gets a custom operator: opaque to it, so that no graph breaks. Otherwise the
    function is called as it is, because the way through torch's dispatcher takes as long as two launches."""
    def decorate(function):
        operator = torch.library.custom_op(f"falcon_h1r::{name}", function, mutates_args=changed)
        return lambda *args: (operator if torch.compiler.is_compiling() else function)(*args)
    return decorate

@_operator("ssd", "y", "final", "states", "cb")
def _ssd(inputs: Sequence[Tensor], initial: Tensor | None, y: Tensor, cb: Tensor, states: Tensor,
         final: Tensor | None, cu: Sequence[int]) -> None:
    x, _, B, C, _, _ = inputs
    plan = _Plan(inputs, cu, cb, states=states, entering=None, crossing=None, REVERSED=False)
    plan.launch(_cb_kernel, "cb", "LLGk")
    plan.launch(_states_kernel, "states", "PNHs", value=x, key=B, initial=initial, final=final)
    plan.launch(_scan_kernel, "scan", "LHk", value=x, query=C, out=y)

@_operator("ssd_backward", "gradients", "dinitial")
def _ssd_backward(dy: Tensor, dfinal: Tensor | None, inputs: Sequence[Tensor], states: Tensor, cb: Tensor,
                  gradients: Sequence[Tensor], dinitial: Tensor | None, cu: Sequence[int]) -> None:
    """gradients: of x, dt, B and C, and (k, h) the parts of those of A and D."""
    x, _, B, C, A, _ = inputs
    dx, ddt, dB, dC, dA, dD = gradients
    R = states.new_empty(states.shape)
    plan = _Plan(inputs, cu, cb, states=R, entering=states, dcb=cb.new_empty(cb.shape), dy=dy, ddt=ddt,
                 dA=dA, dD=dD, REVERSED=True)
    # Programs that share a sum: SIDE tiles of a row or column of dcb, SPLIT of dB and dC, PARTS of a state.
    l = cb.shape[-1]
    side = plan.count("dcb", "L")
    split = plan.count("dbc", "N")
    parts = plan.count("states", "PN")
    shapes = dict(crossing=(parts,), diagonal=(l,), F=(split, l), E=(split, l))
    sums = {name: A.new_empty(*dA.shape, *shape) for name, shape in shapes.items()}
    # row and col cancel over a chunk: what rounding leaves adds up, and float32 would show it in dA.
    exact = torch.float64 if x.dtype == torch.float32 else torch.float32
    sums |= {name: A.new_empty(*dA.shape, side, l, dtype=exact) for name in ("row", "col")}
    plan.given.update(sums, SPLIT=split, PARTS=parts)

    plan.launch(_states_kernel, "states", "PNHs", value=dy, key=C, initial=dfinal, final=dinitial)
    plan.launch(_scan_kernel, "scan", "LHk", value=dy, query=B, out=dx)
    plan.launch(_dcb_kernel, "dcb", "LLGk", DIAGONAL=False)
    plan.launch(_dcb_kernel, "dcb", "LGk", DIAGONAL=True)
    plan.launch(_dbc_kernel, "dbc", "LNGk", value=x, own=B, other=C, out=dB, flow=sums["E"])
    plan.given.update(states=states, REVERSED=False)  # dC walks as the forward pass does
    plan.launch(_dbc_kernel, "dbc", "LNGk", value=dy, own=C, other=B, out=dC, flow=sums["F"])
    plan.launch(_ddt_kernel, "ddt", "Hk")

class _Scan(torch.autograd.Function):
    """x (tokens, h, p) in its own dtype, dt (tokens, h) float32 -> y with D x in it, final states or None."""
    @staticmethod
    def forward(ctx, S, cu, chunk_size, want_final, x, dt, B, C, A, D):
        (h, p), (g, n) = x.shape[1:], B.shape[1:]
        check(p <= 256, f"x: got {p} channels per head, expected at most 256, or backend=torch")
        lengths = [end - start for start, end in zip(cu, cu[1:])]
        l = _power(min(chunk_size, 1024, max(lengths)))  # a program of _decays_kernel holds a chunk
        k = sum(math.ceil(length / l) for length in lengths)
        inputs = _dense(x), dt.contiguous(), _dense(B), _dense(C), A, D
        y = x.new_empty(x.shape)
        final = A.new_empty(len(cu) - 1, h, p, n) if want_final else None
        states = x.new_empty(k, h, p, n)  # that enter each chunk
        cb = x.new_empty(k, g, l, l)
        _ssd(inputs, S, y, cb, states, final, cu)
        ctx.save_for_backward(*inputs, states, cb)
        ctx.cu = cu
        ctx.set_materialize_grads(False)  # None for final states that nobody used, instead of as many zeros
        return y, final

    @staticmethod
    def backward(ctx, dy, dfinal):
        check_first_order()
        *inputs, states, cb = ctx.saved_tensors
        k, h, p, n = states.shape
        x, A = inputs[0], inputs[4]
        dy = x.new_zeros(x.shape) if dy is None else dy.contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()
        dinitial = A.new_empty(len(ctx.cu) - 1, h, p, n) if ctx.needs_input_grad[0] else None
        gradients = [v.new_empty(v.shape) for v in inputs[:4]]
        parts = A.new_empty(2, k, h, dtype=torch.float64)  # every chunk's share in those of A and D
        gradients += parts.unbind()
        _ssd_backward(dy, dfinal, inputs, states, cb, gradients, dinitial, ctx.cu)
        return dinitial, None, None, None, *gradients[:4], *parts.sum(1).float()

# 5. The causal convolution ----------------------------------------------------------------------------------

def causal_conv1d(x, weight, bias=None, *, initial_states=None, cu_seqlens=None, activation=None,
                  backend=None, return_final_states=True):
    """Depthwise: a channel sees only itself, now and k - 1 tokens back (k = 4 in Falcon-H1).

        y_i = act(bias + sum_j weight[:, j] x_{i - k + 1 + j})        weight[:, k - 1] meets the current token

    Args:
        x, weight, bias: (b, t, d) with any t >= 1, (d, k), (d,).
        initial_states: (s, d, k - 1), the inputs before the first token, newest last; zeros if None.
        activation: None or "silu". cu_seqlens, backend and return_final_states are as for ssd_scan.
    Returns:
        y (b, t, d) and the final states (s, d, k - 1), in x's dtype; both differentiable."""
    check(x.dim() == 3 and x.numel() > 0, f"x: got {tuple(x.shape)}, expected (b, t, d), none of them 0")
    (b, t, d), k = x.shape, weight.shape[-1]
    backend = _backend(backend, x)
    cu = check_cu_seqlens(cu_seqlens, b, t)
    _check_conv(x, weight, bias, activation, initial_states, len(cu) - 1)
    taps = torch.cat([weight.T, weight.new_zeros(1, d) if bias is None else bias[None]])  # (k + 1, d)
    row = x.flatten(0, 1)  # (tokens, d)
    bare = backend == "triton" and initial_states is None  # the kernel knows where sequences start
    if not bare:  # a history is k - 1 more tokens of its sequence: [history 0 | tokens 0 | history 1 | ...]
        lengths = [end - start for start, end in zip(cu, cu[1:])]
        states = x.new_zeros(len(lengths), d, k - 1) if initial_states is None else initial_states.to(x.dtype)
        row = torch.cat([part for pair in zip(states.mT, row.split(lengths)) for part in pair])
        cu = tuple(start + i * (k - 1) for i, start in enumerate(cu))
    y = (_ConvTriton.apply(_dense(row), taps, cu, activation == "silu") if backend == "triton"
         else _ConvTorch.apply(row, taps))
    if not bare:
        y = torch.cat(y.split([size for length in lengths for size in (k - 1, length)])[1::2])
    y = F.silu(y) if activation and backend != "triton" else y  # now without histories, which may be NaN
    y = y.to(x.dtype).view(x.shape)
    if not return_final_states:
        return y, None
    start, left, _ = chunk_table(cu, cu[-1], x.device)  # one chunk per sequence
    token = (start + left)[:, None] + torch.arange(1 - k, 0, device=x.device)  # (s, k - 1)
    final = torch.where((token >= start[:, None])[..., None], row[token.clamp(min=0)], 0)
    return y, final.mT

def causal_conv1d_step(state, x, weight, bias=None, *, activation=None):
    """One token: state (b, d, k - 1), x (b, d) -> y, state, updated in place; both differentiable."""
    check(x.dim() == 2, f"x: got {tuple(x.shape)}, expected (b, d)")
    _check_conv(x, weight, bias, activation, state, x.shape[0])
    window = torch.cat([state.mT, x.unsqueeze(1)], 1)  # (b, k, d), channels last: a CPU sums without striding
    y = (window * weight.T).sum(1)
    y = y if bias is None else y + bias
    return (F.silu(y) if activation else y).to(x.dtype), state.copy_(window[:, 1:].mT)

class _ConvTorch(torch.autograd.Function):
    """x (tokens, d) of one sequence, taps (k + 1, d) with the bias last -> as x. In autograd each slice of x
    would get a gradient as large as x, filled with zeros and added up."""
    @staticmethod
    def forward(ctx, x, taps):
        ctx.save_for_backward(x, taps)
        *past, now, bias = taps
        y = torch.addcmul(bias, x, now)
        for back, w in enumerate(reversed(past), 1):
            y[back:].addcmul_(x[:-back], w)
        return y

    @staticmethod
    def backward(ctx, dy):
        check_first_order()
        x, taps = ctx.saved_tensors
        *past, now, _ = taps
        dx = dy * now
        dtaps = [dy.sum(0), (dy * x).sum(0)]  # from the last to the first
        for back, w in enumerate(reversed(past), 1):
            dx[:-back].addcmul_(dy[back:], w)
            dtaps.append((dy[back:] * x[:-back]).sum(0))
        return dx, torch.stack(dtaps[::-1])

# In Triton a program is one warp that walks over a block, up to BT tokens of one sequence. A thread keeps the
# last k inputs of a few channels in registers, so it loads each input once, ROWS tokens at a time to hide the
# latency of memory. The backward pass recomputes z, the value before the activation:
#
#     z_i = bias + sum_j w_j x_{i-k+1+j}      dz_i = act'(z_i) dy_i      dx_i = sum_j w_j dz_{i+k-1-j}
#     dw_j = sum_i dz_i x_{i-k+1+j}           dbias = sum_i dz_i
#
# A second window, the last k values of dz, completes dx_i at token i + k - 1. So a block walks k - 1 tokens
# past its own, with dz = 0 past the sequence, and leaves their share of dw and dbias to the next block.
# BD: 32 threads with 8 channels, 16 bytes of bfloat16; backward 4, because 8 take 242 registers.
_CONV_FORWARD = dict(BT=128, BD=256, ROWS=8, num_warps=1)
_CONV_BACKWARD = dict(BT=128, BD=128, ROWS=4, num_warps=1)

@_jit
def _conv_kernel(x, taps, dy, out, dtaps, start, left, s_x, CHANNELS: constexpr, K: constexpr,
                 SILU: constexpr, BT: constexpr, BD: constexpr, ROWS: constexpr):
    """out = y. Given dy, out = dx, and dtaps[block] (k + 1, d) is the block's part of the sum."""
    EXTRA: constexpr = 0 if dy is None else K - 1
    tile, _, block = _program((CHANNELS + BD - 1) // BD, 1)
    d, in_d = _range(tile * BD, BD, CHANNELS)
    token = tl.load(start + block)
    rest = tl.load(left + block)  # tokens from here to the end of the sequence
    num = tl.minimum(rest, BT)
    first = tl.load(left + block - 1, mask=block > 0, other=0) <= BT  # the block before ends its sequence
    zero = tl.zeros((BD,), tl.float32)
    w = ()
    for j in tl.static_range(K + 1):
        w += (tl.load(taps + j * CHANNELS + d, mask=in_d, other=0.0).to(tl.float32),)
    window = ()
    for j in tl.static_range(K - 1):
        window += (_load(x, token - (K - 1) + j, s_x, d, in_d & (first == 0)).to(tl.float32),)
    dw = (zero,) * (K + 1)
    dzs = (zero,) * (K - 1)
    for i in range(0, num + EXTRA, ROWS):
        # All loads come before the first store, because the compiler cannot move them over it.
        dys = ()
        for r in tl.static_range(ROWS):
            inside = in_d & (i + r < rest)
            window += (_load(x, token + i + r, s_x, d, inside).to(tl.float32),)
            if dy is not None:
                dys += (_load(dy, token + i + r, CHANNELS, d, inside).to(tl.float32),)
        for r in tl.static_range(ROWS):
            z = w[K]
            for j in tl.static_range(K):
                z += w[j] * window[r + j]
            gate = tl.sigmoid(z) if SILU else 1.0
            value = z * gate
            if dy is not None:
                dzs += (dys[r] * gate * (1 + z * (1 - gate)) if SILU else dys[r],)
                own = tl.where(i + r < num, dzs[K - 1], 0.0)  # past its own tokens a block only completes dx
                value = zero
                for j in tl.static_range(K):
                    value += w[j] * dzs[K - 1 - j]
                    dw += (dw[j] + own * window[r + j],)
                dzs = dzs[1:]
                dw = dw[K + 1:] + (dw[K] + own,)
            done = i + r - EXTRA  # the token that `value` is the y or dx of, counted in the block
            tl.store(out + (token + done) * CHANNELS + d, value, mask=in_d & (done >= 0) & (done < num))
        window = window[ROWS:]
    if dy is not None:
        for j in tl.static_range(K + 1):
            tl.store(dtaps + (block * (K + 1) + j) * CHANNELS + d, dw[j], mask=in_d)

@_operator("conv", "out", "dtaps")
def _conv(x: Tensor, taps: Tensor, dy: Tensor | None, out: Tensor, dtaps: Tensor | None, cu: Sequence[int],
          silu: bool) -> None:
    sizes = _CONV_FORWARD if dy is None else _CONV_BACKWARD
    start, left, _ = chunk_table(tuple(cu), sizes["BT"], x.device)
    programs = len(start) * triton.cdiv(x.shape[1], sizes["BD"])
    _launch(_conv_kernel, programs, x, taps, dy, out, dtaps, start, left, x.stride(0),
            CHANNELS=x.shape[1], K=len(taps) - 1, SILU=silu, **sizes)

class _ConvTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, taps, cu, silu):
        ctx.save_for_backward(x, taps)
        ctx.cu, ctx.silu = cu, silu
        y = x.new_empty(x.shape)
        _conv(x, taps, None, y, None, cu, silu)
        return y

    @staticmethod
    def backward(ctx, dy):
        check_first_order()
        x, taps = ctx.saved_tensors
        dx = x.new_empty(x.shape)
        lengths = [end - start for start, end in zip(ctx.cu, ctx.cu[1:])]
        blocks = sum(math.ceil(length / _CONV_BACKWARD["BT"]) for length in lengths)
        dtaps = x.new_empty(blocks, *taps.shape, dtype=torch.float32)
        _conv(x, taps, dy.contiguous(), dx, dtaps, ctx.cu, ctx.silu)
        return dx, dtaps.sum(0).to(taps.dtype), None, None

# 6. Checks, and where tokens go -----------------------------------------------------------------------------

def check(ok, message):
    """Wrong shapes can broadcast into plausible nonsense: check every argument, by name."""
    if not ok:
        raise ValueError(message)

def check_first_order():
    """Refuse second derivatives; every `backward` calls this, where gradients are on only under create_graph.
    torch's once_differentiable silently drops a term if the incoming gradient is a constant."""
    check(not torch.is_grad_enabled() or torch.compiler.is_compiling(),
          "create_graph: got True, but this function has no second derivative")

def check_tensors(x, **expected):
    """Check every name=(tensor or None, shape): its shape, and that it is on the device of x."""
    for name, (v, shape) in expected.items():
        if v is not None:
            check(v.shape == tuple(shape) and v.device == x.device,
                  f"{name}: got {tuple(v.shape)} on {v.device}, expected {tuple(shape)} on {x.device}")

def check_cu_seqlens(cu_seqlens, b, t):
    """Boundaries (s + 1,) as a tuple of ints, those of the batch rows if None. Keep them on the host."""
    if cu_seqlens is None:
        return tuple(range(0, b * t + 1, t))
    check(b == 1, f"cu_seqlens: got a batch of {b}, expected packed sequences in a batch of 1")
    cu = cu_seqlens.tolist() if hasattr(cu_seqlens, "tolist") else cu_seqlens  # of torch or NumPy, as below
    cu = tuple(i.item() if hasattr(i, "item") else i for i in cu)
    whole = cu[:1] == (0,) and cu[-1:] == (t,) and all(type(i) is int for i in cu)
    check(whole and all(i < j for i, j in zip(cu, cu[1:])),
          f"cu_seqlens: got {cu}, expected strictly increasing integers from 0 to {t}, the number of tokens")
    return cu

def _check_scan(x, dt, A, B, C, D, dt_bias, states, s):
    """For one token (no t) and for many."""
    *lead, h, p = x.shape
    *_, g, n = 0, 0, *B.shape  # with zeros in front, a B of too few dimensions is named below
    check_tensors(x, dt=(dt, (*lead, h)), A=(A, (h,)), B=(B, (*lead, g, n)), C=(C, B.shape), D=(D, (h,)),
                  dt_bias=(dt_bias, (h,)), initial_states=(states, (s, h, p, n)))
    check(n > 0 and g > 0 and h % g == 0,
          f"B: got {g} groups of size {n}, expected sizes >= 1 and groups that divide the {h} heads of x")
    check(x.dtype == B.dtype == C.dtype, f"dtype: got {x.dtype}, {B.dtype}, {C.dtype}, expected one dtype")
    if A.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere the host would wait
        check(bool((A < 0).all()), "A: got a value that is not negative, expected A < 0 in every head")

def _check_conv(x, weight, bias, activation, states, s):
    d, k = x.shape[-1], weight.shape[-1]
    check_tensors(x, weight=(weight, (d, k)), bias=(bias, (d,)), initial_states=(states, (s, d, k - 1)))
    check(activation in (None, "silu"), f'activation: got {activation!r}, expected None or "silu"')

def _backend(name, x):
    """The backend's name; None picks the fastest one where x is. The kernels have no float64."""
    runs = triton is not None and (x.is_cuda or "TRITON_INTERPRET" in os.environ) and x.dtype != torch.float64
    check(name in (None, "recurrent", "torch") or (name == "triton" and runs),
          f'backend: got {name!r} for {x.dtype} on {x.device.type}, expected None, "recurrent", "torch", or '
          '"triton" for 32 and 16 bits on a GPU with triton installed')
    return name or ("triton" if runs and x.is_cuda else "torch")

def to_device(tensors, device):
    """Copy CPU tensors of one dtype to `device`, by one copy from pinned memory: no waiting."""
    if device.type == "cpu":
        return tensors
    # Each starts at a multiple of 16 bytes: for other addresses Triton compiles again.
    padded = [F.pad(v.flatten(), (0, -v.numel() % 16)) for v in tensors]
    row = torch.cat(padded)
    row = row.pin_memory() if device.type == "cuda" and not torch.compiler.is_compiling() else row
    parts = row.to(device, non_blocking=True).split([len(v) for v in padded])
    return [part[: v.numel()].view(v.shape) for part, v in zip(parts, tensors)]

@lru_cache(maxsize=16)  # once per batch, then shared by all layers and by the backward pass
@torch.inference_mode(False)  # what is cached may meet autograd later
def chunk_table(cu, size, device):
    """Cut sequences with boundaries `cu` (a tuple) into chunks of at most `size` tokens, in token order.
    Returns start (k,), the first token of each chunk; left (k,), how many tokens its sequence has from there
    on, min(left, size) of them in the chunk; first (s + 1,), each sequence's first chunk, and k."""
    chunks, first = [], [0]
    for begin, end in zip(cu, cu[1:]):
        chunks += [(start, end - start) for start in range(begin, end, size)]
        first.append(len(chunks))
    return to_device([*torch.tensor([*zip(*chunks)]), torch.tensor(first)], device)
