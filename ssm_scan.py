"""The state-space half of Falcon-H1: the SSD scan of Mamba-2 and the short causal convolution in front of it.

`backend="recurrent"` is the definition, one token after another, and the oracle of the tests (run it in float64).
`backend="torch"`, for CPUs, cuts sequences into chunks and turns the scan into matrix products. `backend="triton"` is
the same in hand-written kernels, forward and backward, for GPUs; section 4 derives them.

    python ssm_scan.py                          parity with the definition, outputs and gradients, then speeds
    python tests/compile_kernels.py 90          registers, spills and shared memory of the kernels, without a GPU
    TRITON_INTERPRET=1 python your_script.py    backend="triton" on a CPU, slowly, in Triton's interpreter

The file stands alone: it needs torch, and for GPUs triton. Argument names follow mamba_ssm and causal_conv1d.

Glossary (Mamba-2 is arXiv 2405.21060)
    b, t, h, p   batch, tokens, heads, channels per head (the paper's P, "head dim")
    g, n         groups that share B and C; head j reads group j // (h / g); size of the state (the paper's N)
    s            sequences: the batch rows, or the documents packed one after another in a single row
    x            (b, t, h, p)   what is written into the state
    dt           (b, t, h)      step size Delta; positive, here after softplus(dt + dt_bias) where asked for
    A            (h,)           negative; a step forgets all but exp(dt A) of the state ("scalar-identity A", section 3)
    B, C         (b, t, g, n)   where in the state to write, and what to read from it (SSM's keys and queries)
    D            (h,)           skip connection from x to y
    S            (s, h, p, n)   the state, one p x n matrix per head, always float32 or wider
    cu_seqlens   (s + 1,)       where the packed documents start, and the end: [0, 7, 19] is 7 tokens and 12 tokens

Deviations from Mamba-2: none in the function. Decays are differences of cumulative sums taken in float64: a sum over a
strongly decaying chunk reaches -10^4, where float32 has only three digits left behind the point (the kernels use pairs
of float32). No chunk holds tokens of two packed sequences: none needs a mask, and nothing can leak between sequences.
"""

import math
import os
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# 1. Checks. Wrong shapes can broadcast into plausible nonsense: check every argument by name.


def _expect(ok, name, got, want):
    if not ok:
        raise ValueError(f"{name}: got {got}, expected {want}")


def _expect_tensors(x, **expected):
    """Check every name=(tensor or None, shape): its shape, and that it lies where x does."""
    for name, (v, shape) in expected.items():
        if v is not None and (tuple(v.shape) != tuple(shape) or v.device != x.device):
            _expect(False, name, f"{tuple(v.shape)} on {v.device}", f"{tuple(shape)} on {x.device}")


def check_cu_seqlens(cu_seqlens, b, t):
    """Boundaries (s + 1,) as a tuple of ints; None: of the batch rows. Keep them on the CPU: they steer the host."""
    if cu_seqlens is None:
        return tuple(range(0, b * t + 1, t))
    _expect(b == 1, "cu_seqlens", f"a batch of {b}", "packed sequences in a batch of 1")
    cu = tuple(cu_seqlens.tolist() if isinstance(cu_seqlens, torch.Tensor) else cu_seqlens)
    _expect(len(cu) >= 2 and all(type(i) is int for i in cu), "cu_seqlens", cu, "integers (s + 1,), s >= 1")
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
    look = A.device.type == "cpu" and not torch.compiler.is_compiling()
    _expect(not look or bool((A < 0).all()), "A", "a value that is not negative", "A < 0 in every head")


def _backend(name, x):
    """The backend's name; None becomes the fastest one where x lies. Kernels have no float64, which is for oracles."""
    there = triton is not None and (x.is_cuda or "TRITON_INTERPRET" in os.environ) and x.dtype != torch.float64
    _expect(name in (None, "recurrent", "torch", "triton"), "backend", repr(name), "recurrent, torch, triton or None")
    _expect(name != "triton" or there, "backend", f'"triton" for {x.dtype} on {x.device.type}',
            "float32, bfloat16 or float16 on a GPU with triton installed")
    return name or ("triton" if there and x.is_cuda else "torch")


# ---------------------------------------------------------------------------------------------------------------------
# 2. Where tokens go. Sequences of many lengths become a dense array of rows (chunks here, documents in attention).


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
    """x (tokens, ...)[index], index (rows, width) or (rows,). The backward pass is a gather or a store, where torch's
    is a scatter-add: faster, and deterministic. inverse (tokens,): each token's place in index.flatten(), needed if
    index repeats tokens as padding, which gets no gradient: nothing downstream may read it."""
    return _GatherRows.apply(x, index, inverse)


def to_device(tensors, device):
    """CPU tensors of one dtype -> the same on `device`, by one copy from pinned memory, which does not stop the host.
    With a `.to` for each, it would wait every time until the GPU has caught up."""
    if device.type == "cpu":
        return tensors
    # Each starts at a multiple of 16 bytes, as if allocated alone: for other addresses Triton compiles kernels again.
    padded = [F.pad(v.flatten(), (0, -v.numel() % 16)) for v in tensors]
    together = torch.cat(padded)
    if device.type == "cuda" and not torch.compiler.is_compiling():
        together = together.pin_memory()
    parts = together.to(device, non_blocking=True).split([len(v) for v in padded])
    return [part[: v.numel()].view(v.shape) for part, v in zip(parts, tensors)]


class ChunkTable(NamedTuple):
    start: torch.Tensor  # (k,) first token of each chunk
    length: torch.Tensor  # (k,) number of its tokens
    seq: torch.Tensor  # (k,) its sequence
    first: torch.Tensor  # (s + 1,) first chunk of each sequence, and the number of chunks
    cu: torch.Tensor  # (s + 1,) first token of each sequence, and the number of tokens


@lru_cache(maxsize=16)  # once per batch, then shared by all layers and by the backward pass
@torch.inference_mode(False)  # what is cached may meet autograd later
def chunk_table(cu, chunk_size, device):
    """Cut sequences with boundaries `cu` (a tuple) into chunks of at most chunk_size tokens, in token order. Each holds
    tokens of one sequence only."""
    chunks = []
    for seq, (begin, end) in enumerate(zip(cu, cu[1:])):
        chunks += [(start, min(chunk_size, end - start), seq) for start in range(begin, end, chunk_size)]
    start, length, seq = torch.tensor([*zip(*chunks)])
    cu = torch.tensor(cu)
    return ChunkTable(*to_device([start, length, seq, torch.searchsorted(start, cu), cu], device))


# ---------------------------------------------------------------------------------------------------------------------
# 3. The scan


def _step_size(dt, dt_bias, dt_softplus, dtype):
    """Delta = softplus(dt + bias), in the dtype of the state: a bf16 step would lose the decay's digits."""
    dt = dt.to(dtype)
    dt = dt if dt_bias is None else dt + dt_bias.to(dtype)
    return F.softplus(dt) if dt_softplus else dt


def ssd_scan(x, dt, A, B, C, *, D=None, dt_bias=None, dt_softplus=False, initial_states=None, cu_seqlens=None,
             chunk_size=256, backend=None, return_final_states=True):
    """The SSD scan (Mamba-2, equation 1 discretised as in its section 2.1):

        S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T          y_t = S_t C_t + D x_t

    x (b, t, h, p), dt (b, t, h), A (h,) negative, B and C (b, t, g, n), D and dt_bias (h,), initial_states (s, h, p, n)
    with s = b, or the number of sequences when cu_seqlens (s + 1,) packs them along t and b = 1. Any t >= 1.
    Returns y (b, t, h, p) in x's dtype and the final states (s, h, p, n) in float32 (float64 for float64 inputs).
    Differentiable in every tensor. dt is positive, after softplus(dt + dt_bias) where asked for. chunk_size, the most
    tokens per chunk, changes speed alone. backend None: "triton" on a GPU, "torch" elsewhere. return_final_states False
    gives None for them, and no memory: at 7B they take 3 MB a sequence. Raises ValueError, naming the argument, for
    wrong shapes, A >= 0 (on a GPU, where looking would stop the host, y is NaN), unsorted cu_seqlens, a missing backend.
    Under torch.compile give cu_seqlens as a tuple."""
    backend = _backend(backend, x)
    _expect(x.dim() == 4 and x.shape[1] >= 1, "x", tuple(x.shape), "(b, t, h, p) with t >= 1")
    _expect(isinstance(chunk_size, int) and chunk_size >= 1, "chunk_size", chunk_size, "an integer >= 1")
    cu = check_cu_seqlens(cu_seqlens, *x.shape[:2])
    _check_scan(x, dt, A, B, C, D, dt_bias, initial_states, len(cu) - 1)

    shape, dtype = x.shape, torch.promote_types(x.dtype, torch.float32)  # dtype of the state and of all sums
    delta = _step_size(dt, dt_bias, dt_softplus, dtype)
    A, D, S = (v if v is None else v.to(dtype) for v in (A, D, initial_states))
    x, delta, B, C = (v.flatten(0, 1) for v in (x, delta, B, C))  # all sequences in one row, (tokens, ...)
    if backend == "triton":
        y, S = _scan_triton(x, delta, B, C, A, D, S, cu, chunk_size, return_final_states)
    else:
        S = x.new_zeros(len(cu) - 1, *x.shape[1:], B.shape[2], dtype=dtype) if S is None else S
        scan = _scan_chunked if backend == "torch" else _scan_recurrent
        y, S = scan(x.to(dtype), delta, B.to(dtype), C.to(dtype), A, S, cu, chunk_size)
        y = y if D is None else torch.addcmul(y, D[:, None], x)
    return y.to(x.dtype).view(shape), S if return_final_states else None


def _scan_recurrent(x, dt, B, C, A, S, cu, chunk_size):
    """The definition. x (tokens, h, p), dt (tokens, h), B and C (tokens, g, n), S (s, h, p, n)."""
    B, C = (v.repeat_interleave(x.shape[1] // v.shape[1], 1) for v in (B, C))  # (tokens, h, n)
    ys, finals = [], []
    for state, start, end in zip(S, cu, cu[1:]):
        for i in range(start, end):
            state = torch.exp(dt[i] * A)[:, None, None] * state + torch.einsum("h,hp,hn->hpn", dt[i], x[i], B[i])
            ys.append(torch.einsum("hpn,hn->hp", state, C[i]))
        finals.append(state)
    return torch.stack(ys), torch.stack(finals)


def chunk_of(p, n):
    """The fastest chunk here: per token, l decays and p n / l numbers of a state, fewest at l = sqrt(p n)."""
    return 1 << max(4, (p * n).bit_length() // 2)


def _bounded_exp(c):
    """exp(c) for c <= 0, at least e^-60 = 9e-27: a CPU is a hundred times slower with numbers below 1e-38."""
    return c.clamp(-60, 0).exp_()


class _DecayedScores(torch.autograd.Function):
    """(B C^T)_ji exp(c_i - c_j) at row j, column i >= j, else 0: bc (k, g, l, l), float64 c (k, h, l) -> (k, h, l, l).

    dc_i = sum of column i - sum of row i, without the diagonal: there both terms are large and cancel exactly, and
    subtracting them would cost the digits of what strong decays leave over."""

    @staticmethod
    def forward(ctx, bc, c):
        decay = _bounded_exp((c[..., None, :] - c[..., :, None]).to(bc.dtype))
        ctx.save_for_backward(bc := bc.triu(), decay)
        return (bc.unsqueeze(2) * decay.unflatten(1, (bc.shape[1], -1))).flatten(1, 2)

    @staticmethod
    def backward(ctx, grad):
        bc, decay = ctx.saved_tensors
        by_group = (grad * decay).unflatten(1, (bc.shape[1], -1))  # (k, g, h / g, l, l)
        dbc = by_group.sum(2).triu_()
        q = by_group.mul_(bc.unsqueeze(2)).flatten(1, 2)
        q.diagonal(dim1=-2, dim2=-1).zero_()
        return dbc, q.sum(-2, dtype=torch.float64) - q.sum(-1, dtype=torch.float64)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _chunk_rows(cu, l, device):
    """Chunk 0 of every sequence, the longest sequence first, then chunk 1 of all that have one, ...: the token at each
    place, index (k, l), where padding repeats the last one; valid (k, l), False in padding; each token's place, inverse
    (tokens,); the order of the sequences and each one's rank in it (s,); how many have a chunk 0, a chunk 1, ..."""
    order = sorted(range(len(cu) - 1), key=lambda s: cu[s] - cu[s + 1])
    left = [(cu[s], cu[s + 1]) for s in order]  # of every sequence
    chunks, alive = [], []
    while left:
        chunks += left
        alive.append(len(left))
        left = [(start + l, end) for start, end in left if start + l < end]
    start, end = torch.tensor(chunks).T[:, :, None]  # (k, 1)
    token = start + torch.arange(l)
    valid = token < end
    inverse = valid.flatten().nonzero()[token[valid].argsort(), 0]
    order = torch.tensor(order)
    index, inverse, order, rank = to_device([token.minimum(end - 1), inverse, order, order.argsort()], device)
    return index, index == index[:, :1] + torch.arange(l, device=device), inverse, order, rank, alive


def _scan_chunked(x, dt, B, C, A, S, cu, chunk_size):
    """The same in matrix products (Mamba-2, section 6). With c_i = sum_{j<=i} dt_j A inside one chunk of l tokens,

        y_i = sum_{j<=i} exp(c_i - c_j) (C_i . B_j) dt_j x_j      attention-like, within the chunk      (step 1)
            + exp(c_i) S C_i                                      what the entering state adds          (step 4)
        S'  = exp(c_l) S + sum_j exp(c_l - c_j) dt_j x_j B_j^T    the state handed on                   (steps 2, 3)

    Padding has dt = 0: it neither writes nor decays, so c_l is right for chunks that are not full, too.
    """
    (h, p), (g, n) = x.shape[1:], B.shape[1:]
    l = min(chunk_size, chunk_of(p, n), max(end - start for start, end in zip(cu, cu[1:])))
    index, valid, inverse, order, rank, alive = _chunk_rows(cu, l, x.device)
    x, dt, B, C = (gather_rows(v, index, inverse) for v in (x, dt, B, C))  # (k, l, h, p), (k, l, h), (k, l, g, n)
    dt = torch.where(valid[..., None], dt, 0).transpose(1, 2)  # (k, h, l)
    a = (dt * A[:, None]).double()  # (k, h, l)
    c = a.cumsum(2)
    # Time is the last dimension from here on: the heads of a group are rows of one matrix and share B and C uncopied.
    dtx = x.permute(0, 2, 3, 1) * dt[:, :, None]  # (k, h, p, l)
    B, C = B.transpose(1, 2), C.permute(0, 2, 3, 1)  # (k, g, l, n), (k, g, n, l)

    def by_group(v):  # (k, h, p, .) -> (k, g, p h / g, .)
        return v.reshape(len(v), g, -1, v.shape[-1])

    # Step 1, within the chunk.
    y = dtx @ _DecayedScores.apply(B @ C, c)  # (k, h, p, l)

    # Step 2, what each chunk adds to the state: one (p h / g x l)(l x n) product per group.
    left = F.pad(a[..., 1:].flip(2).cumsum(2).flip(2), (0, 1)).to(x.dtype)  # (k, h, l), c_l - c_j without a difference
    written = dtx * _bounded_exp(left)[:, :, None]  # (k, h, p, l)
    local = (by_group(written) @ B).view(len(x), h, p, n)  # (k, h, p, n)

    # Step 3, from chunk to chunk, all sequences at once: the only sequential loop, t / l short steps. Those that have
    # one more chunk are the first ones, as the longest stand first.
    keep = _bounded_exp(c[..., -1].to(x.dtype))[..., None, None]  # (k, h, 1, 1)
    S, entering = S[order], []
    for kept, added in zip(keep.split(alive), local.split(alive)):
        entering.append(S[: len(added)])
        handed_on = torch.addcmul(added, kept, entering[-1])
        S = torch.cat([handed_on, S[len(added) :]]) if len(added) < len(S) else handed_on
    entering = torch.cat(entering)  # (k, h, p, n)

    # Step 4, what the entering state adds to each token's output.
    y = torch.addcmul(y, (by_group(entering) @ C).view(y.shape), _bounded_exp(c.to(x.dtype))[:, :, None])
    return gather_rows(y.permute(0, 3, 1, 2).flatten(0, 1), inverse), S[rank]


# ---------------------------------------------------------------------------------------------------------------------
# 4. The scan in Triton
#
# The same four steps as `_scan_chunked`, in kernels that keep the two large things out of memory: the (l, l) matrix of a
# chunk's decays, and all copies of B and C for the heads of a group. A chunk holds tokens of one sequence, so packed batches
# need no mask. One program, the unit that Triton runs in parallel, computes one tile of an output:
#
#                source j ->                      of one chunk (k), head (h), 2 x 2 tiles of l / 2 tokens. The program of the
#              +-------+-------+   value (l, p)   marked tile of y walks over the tiles of its row up to the diagonal, and
#     output i | W 0 0 |       |    +-------+     multiplies W with the values it meets:
#         |    | W W 0 |       |    |   x   |
#         v    | W W W |       |    |       |         W_ij = (C_i . B_j) 2^(c_i - c_j) dt_j   where j <= i, else 0
#              +-------+-------+ @  +-------+
#              | W W W | W 0 0 |    |   x   |     C B^T is the same for all heads of a group: a kernel of its own stores it,
#           ** | W W W | W W 0 | ** |       |     on and below the diagonal. W lives in registers only.
#              | W W W | W W W |    |       |
#              +-------+-------+    +-------+
#
# Decays are 2^(c_i - c_j) <= 1 with c = log2(e) cumsum(dt A), never quotients of exponentials, which overflow. Below the
# diagonal they are a product, with c_r taken at a boundary between the tile's sources j and its outputs i:
#
#     2^(c_i - c_j) dt_j  =  after[r, i] before[r, j]         after = 2^(c_i - c_r)    before = 2^(c_r - c_j) dt_j
#
# Boundary 0 is the chunk's start, the last one its end. Tiles on the diagonal take c itself, as a pair of float32, the rounded
# sum and what rounding lost: neighbours late in a strongly decaying chunk differ by less than the sum's last digit.
#
# Backward. With R_t = dL/dS_t, everything the loss sees of the state, the definition differentiates to
#
#     R_t = dy_t C_t^T + a_{t+1} R_{t+1}      dx_t = dt_t R_t B_t + D dy_t    d(dt_t) = x_t . R_t B_t   (but for a_t's share)
#     a_t = exp(dt_t A)                       dB_t = dt_t R_t^T x_t           dC_t = S_t^T dy_t
#
# R is a scan as S is, run from the last token to the first. So the kernels for states, outputs and dB, dC exist once; REVERSED
# turns the triangle around, and their arguments are:
#
#     kernel        argument                  forward                          REVERSED
#     _states       value, key                x, B                             dy, C
#                   states                    S before each chunk              R after each chunk
#                   initial, final            S of the sequences' start, end   R of their end, start
#     _scan         value, query, states      x, C, S                          dy, B, R
#                   out                       y                                dx
#     _dbc          value, own, other         dy, C, B                         x, B, C
#                   states, out, through      S, dC, F                         R, dB, E
#
# The gradient of log a_t sums over every path from a source to an output that crosses step t. With q_ij the share of source
# j in the loss through output i, F_i that of the entering state, E_j that of source j through the leaving state:
#
#     sum_{j < t <= i} q_ij  +  sum_{i >= t} F_i  +  sum_{j < t} E_j  +  <entering state, leaving state's gradient> 2^(c_l)
#
# and the first sum is sum_{i >= t} (row_i - col_i), where row and col add up the same numbers q without their diagonal. The
# diagonal is what is large there and crosses no step. (y . dy - x . dx, shorter and common, has it in both terms, and loses
# all digits where decays are strong.) And d(dt_j) = (col_j + q_jj + E_j) / dt_j, for which kernels take a step of 0 as 1e-30.
#
# Nothing is added up by atomics: programs that share a sum store their parts, the last kernel adds them, and two runs give
# the same bits. Chunk and token numbers are int64, because t h p passes 2^31 at 700,000 tokens of the 7B model. Tile sizes
# are chosen by the size of shared memory alone: autotuning stalls at every new shape, and different tiles round differently.
#
# Arguments, each a pointer: start, length (k,) first token and number of tokens of a chunk; x, B, ... (tokens, h or g, p or n);
# c (2, k, h, l), its second half at c + low; dt (k, h, l); before, after (k, h, r, l); cb, dcb (k, g, l, l); states (k, h, p, n).
# s_v is the number of elements from one token of value to the next, and so on: tokens may be slices of a wider row. In capitals
# what is known when a kernel is compiled: the sizes above, R boundaries, EDGE places apart, and BM, BK, ... those of tiles. A tile
# of cb is loaded whole, in wide loads, and selected from afterwards: a mask would make it fetch element by element.

try:
    import triton
    import triton.language as tl

    _jit, constexpr = triton.jit, tl.constexpr
except ImportError:  # macOS and Windows: `backend="torch"` needs no Triton
    triton, tl, constexpr = None, None, int

    def _jit(kernel):
        return kernel


@_jit
def _program(tiles, heads):
    """Programs are numbered with the tile fastest, then the head or group, whose neighbours share cb in the L2 cache."""
    pid = tl.program_id(0)
    return pid % tiles, pid // tiles % heads, (pid // (tiles * heads)).to(tl.int64)


@_jit
def _pair(c, low, i):
    """c at places i: its float32 and what that lost."""
    return tl.load(c + i), tl.load(c + low + i)


@_jit
def _decay(later, later_low, sooner, sooner_low):
    """2^(c_i - c_j), at most 1, of two pairs that broadcast against each other."""
    return tl.exp2(tl.minimum((later - sooner) + (later_low - sooner_low), 0.0))


@_jit
def _load(base, columns, token, stride, row_mask, column_mask):
    """A tile of tokens' vectors: the elements `columns` of each `token`, counted from base; 0 outside of the masks."""
    return tl.load(base + token.to(tl.int64) * stride + columns, mask=row_mask & column_mask, other=0.0)


@_jit
def _inside(i, size: constexpr, tile: constexpr):
    """i < size, where tiles may stick out; known to hold, and free, where they divide the size."""
    return (i < size) | (size % tile == 0)


@_jit
def _decays_kernel(step, A, start, length, dt, c, low, before, after, s_dt,
                   H: constexpr, L: constexpr, R: constexpr, EDGE: constexpr, BH: constexpr):
    """dt, c, before and after of BH heads of a chunk, from step (tokens, h); c is summed up in float64."""
    tile, _, k = _program((H + BH - 1) // BH, 1)
    h, j = tile * BH + tl.arange(0, BH)[:, None], tl.arange(0, L)[None, :]
    num, token = tl.load(length + k).to(tl.int32), tl.load(start + k)
    delta = tl.load(step + (token + j) * s_dt + h, mask=(h < H) & (j < num), other=0.0)  # (BH, L)
    # In the padding delta is 0 and c stays constant, so that its last entry is the chunk's end in any case.
    total = tl.cumsum(delta.to(tl.float64) * (tl.load(A + h, mask=h < H, other=-1.0).to(tl.float64) * 1.4426950408889634), 1)  # / ln 2
    delta = tl.where(delta < 1e-30, 1e-30, delta)
    place = (k * H + h) * L + j
    high = total.to(tl.float32)
    tl.store(dt + place, delta, mask=h < H)
    tl.store(c + place, high, mask=h < H)
    tl.store(c + low + place, (total - high).to(tl.float32), mask=h < H)
    for r in tl.static_range(R):
        boundary = tl.sum(tl.where(j == r * EDGE - 1, total, 0.0), 1)[:, None]  # 0 before the first token
        place = ((k * H + h) * R + r) * L + j
        rise = (total - boundary).to(tl.float32)
        tl.store(after + place, tl.exp2(tl.where(rise > 0, 0.0, rise)), mask=h < H)  # where, not minimum: a NaN stays one
        tl.store(before + place, tl.exp2(tl.where(rise < 0, 0.0, -rise)) * delta, mask=h < H)


@_jit
def _cb_kernel(query, key, start, length, cb, s_q, s_k, G: constexpr, N: constexpr, L: constexpr,
               BM: constexpr, BK: constexpr):
    """cb = C B^T, a tile on or below the diagonal a program, whole, 0 in the padding."""
    SIDE: constexpr = L // BM
    tile, g, k = _program(SIDE * SIDE, G)
    num, token = tl.load(length + k).to(tl.int32), tl.load(start + k)
    i0, j0 = tile // SIDE * BM, tile % SIDE * BM
    if (j0 <= i0) & (i0 < num):
        i, j, n = i0 + tl.arange(0, BM), j0 + tl.arange(0, BM), tl.arange(0, BK)
        query += token * s_q + g * N
        key += token * s_k + g * N
        acc = tl.zeros((BM, BM), tl.float32)
        for n0 in range(0, N, BK):
            nn = n0 + n
            in_n = _inside(nn, N, BK)
            q = _load(query, nn[None, :], i[:, None], s_q, (i < num)[:, None], in_n[None, :])  # (BM, BK)
            v = _load(key, nn[:, None], j[None, :], s_k, (j < num)[None, :], in_n[:, None])  # (BK, BM)
            acc = tl.dot(q, v, acc, input_precision="ieee")
        tl.store(cb + ((k * G + g) * L + i[:, None]) * L + j[None, :], acc)


@_jit
def _states_kernel(value, key, before, after, start, length, first, initial, states, final, entering, crossing, s_v, s_k,
                   H: constexpr, G: constexpr, P: constexpr, N: constexpr, L: constexpr, R: constexpr,
                   BP: constexpr, BN: constexpr, BL: constexpr, REVERSED: constexpr):
    """Steps 2 and 3. One program carries a BP x BN tile of one head's state through all tokens of one sequence, BL at a time, in
    float32 registers: states[k] = S before chunk k, then S <- 2^(c_l) S + sum_j 2^(c_l - c_j) dt_j value_j key_j^T.

    REVERSED: states[k] = R after chunk k, then R <- 2^(c_l) R + sum_i 2^(c_i) dy_i C_i^T; and
    crossing[k, h, tile] = 2^(c_l) <R after, S before>, the tile's share in the gradient of the chunk's whole decay."""
    ACROSS: constexpr = (N + BN - 1) // BN
    TILES: constexpr = (P + BP - 1) // BP * ACROSS
    PER_CHUNK: constexpr = L // BL
    tile, h, s = _program(TILES, H)
    p, n, j = tile // ACROSS * BP + tl.arange(0, BP), tile % ACROSS * BN + tl.arange(0, BN), tl.arange(0, BL)
    in_p, in_n, place = _inside(p, P, BP)[:, None], _inside(n, N, BN)[None, :], p[:, None] * N + n[None, :]
    inside = in_p & in_n
    if initial is None:
        S = tl.zeros((BP, BN), tl.float32)
    else:
        S = tl.load(initial + (s * H + h) * P * N + place, mask=inside, other=0.0)
    begin, end = tl.load(first + s), tl.load(first + s + 1)
    token = tl.load(start + begin)
    tokens = (tl.load(start + end - 1) + tl.load(length + end - 1) - token).to(tl.int32)
    # All chunks but a sequence's last one are full: one loop over its tokens, whose loads run ahead across chunks. What a chunk
    # needs once, its decay and the state before it, is loaded a chunk ahead by hand.
    parts, ahead = (tokens + BL - 1) // BL, -H if REVERSED else H
    head = (end - 1 if REVERSED else begin) * H + h
    if REVERSED:
        S_before = tl.load(entering + head * P * N + place, mask=inside, other=0.0)
    keep = tl.load(after + head * R * L + L - 1)  # 2^(c_l)
    for count in range(0, parts):
        part = parts - 1 - count if REVERSED else count
        head = (begin + part // PER_CHUNK) * H + h
        if (count == 0) | (part % PER_CHUNK == (PER_CHUNK - 1 if REVERSED else 0)):  # a chunk begins
            tl.store(states + head * P * N + place, S, mask=inside)
            S *= keep
            coming = tl.where(parts - count > PER_CHUNK, head + ahead, head)
            keep = tl.load(after + coming * R * L + L - 1)
            if REVERSED:
                tl.store(crossing + head * TILES + tile, tl.sum(S * S_before.to(tl.float32)))
                S_before = tl.load(entering + coming * P * N + place, mask=inside, other=0.0)
        within, at, real = part % PER_CHUNK * BL + j, token + part * BL, j < tokens - part * BL
        weight = tl.load(after + head * R * L + within) if REVERSED else tl.load(before + (head * R + R - 1) * L + within)
        v = _load(value + at * s_v + h * P, p[:, None], j[None, :], s_v, real[None, :], in_p)  # (BP, BL)
        q = _load(key + at * s_k + h // (H // G) * N, n[None, :], j[:, None], s_k, real[:, None], in_n)  # (BL, BN)
        S = tl.dot((v.to(tl.float32) * weight[None, :]).to(v.dtype), q, S, input_precision="ieee")
    if final is not None:
        tl.store(final + (s * H + h) * P * N + place, S, mask=inside)


@_jit
def _scan_kernel(value, query, cb, states, dt, c, low, before, after, D, start, length, out, s_v, s_q, s_out,
                 H: constexpr, G: constexpr, P: constexpr, N: constexpr, L: constexpr, R: constexpr, EDGE: constexpr,
                 BM: constexpr, BP: constexpr, BK: constexpr, REVERSED: constexpr):
    """Steps 1 and 4, BM rows of one chunk and head a program (the picture above):
    y_i = 2^(c_i) S C_i + sum_{j <= i} W_ij x_j + D x_i.

    REVERSED: dx_j = dt_j 2^(c_l - c_j) R B_j + sum_{i >= j} W_ij dy_i + D dy_j."""
    tile, h, k = _program(L // BM, H)
    num, token, head = tl.load(length + k).to(tl.int32), tl.load(start + k), k * H + h
    if tile * BM < num:
        l, p, n = tl.arange(0, BM), tl.arange(0, BP), tl.arange(0, BK)
        i = tile * BM + l
        group, row, in_p = h // (H // G), (i < num)[:, None], _inside(p, P, BP)[None, :]
        value += h * P
        query += group * N
        cb += (k * G + group) * L * L

        # Step 4, the chunk's entering (leaving) state, decayed only up to the boundary next to this tile.
        acc = tl.zeros((BM, BP), tl.float32)
        for n0 in range(0, N, BK):
            nn = n0 + n
            in_n = _inside(nn, N, BK)
            q = _load(query + token * s_q, nn[None, :], i[:, None], s_q, row, in_n[None, :])  # (BM, BK)
            S = tl.load(states + head * P * N + p[None, :] * N + nn[:, None], mask=in_p & in_n[:, None], other=0.0)
            acc = tl.dot(q, S, acc, input_precision="ieee")
        edge = (head * R + (tile + REVERSED) * (BM // EDGE)) * L  # where this boundary's decays are
        if REVERSED:
            acc *= tl.load(after + edge + L - 1)
        else:
            acc *= tl.load(after + head * R * L + tile * BM - 1, mask=tile > 0, other=1.0)

        # Step 1 below the diagonal: tiles of cb, weighted by column before the product and by row after the last one.
        begin, end = ((tile + 1) * BM, num) if REVERSED else (0, tile * BM)
        for l0 in range(begin, end, BM):
            j = l0 + l
            if REVERSED:  # rows of cb are the later tokens
                W, weight = tl.load(cb + j[None, :] * L + i[:, None]), tl.load(after + edge + j)
            else:
                W, weight = tl.load(cb + i[:, None] * L + j[None, :]), tl.load(before + edge + j)
            v = _load(value + (token + l0) * s_v, p[None, :], l[:, None], s_v, (j < num)[:, None], in_p)  # (BM, BP)
            acc = tl.dot((W.to(tl.float32) * weight[None, :]).to(v.dtype), v, acc, input_precision="ieee")
        acc *= tl.load((before if REVERSED else after) + edge + i)[:, None]

        # Step 1 on the diagonal, where every entry has its own decay.
        ci, ci_low = _pair(c + head * L, low, i)
        step = tl.load(dt + head * L + i)
        if REVERSED:
            W = tl.load(cb + i[None, :] * L + i[:, None]).to(tl.float32) * step[:, None]
            W *= _decay(ci[None, :], ci_low[None, :], ci[:, None], ci_low[:, None])
            W = tl.where(l[:, None] <= l[None, :], W, 0.0)
        else:
            W = tl.load(cb + i[:, None] * L + i[None, :]).to(tl.float32) * step[None, :]
            W *= _decay(ci[:, None], ci_low[:, None], ci[None, :], ci_low[None, :])
            W = tl.where(l[:, None] >= l[None, :], W, 0.0)
        v = _load(value + token * s_v, p[None, :], i[:, None], s_v, row, in_p)  # (BM, BP)
        acc = tl.dot(W.to(v.dtype), v, acc, input_precision="ieee") + tl.load(D + h) * v.to(tl.float32)
        tl.store(out + (token + i)[:, None] * s_out + h * P + p[None, :], acc, mask=row & in_p)


@_jit
def _dcb_kernel(x, dy, cb, dt, c, low, before, after, start, length, dcb, row, col, diagonal, s_x, s_dy,
                H: constexpr, G: constexpr, P: constexpr, L: constexpr, R: constexpr, EDGE: constexpr,
                BM: constexpr, BP: constexpr, BLANK: constexpr, DIAGONAL: constexpr):
    """d(cb)_ij = sum over the group's heads of 2^(c_i - c_j) dt_j (dy_i . x_j), a tile a program, those on the DIAGONAL in a launch of
    their own; and of every head dy_j . x_j in `diagonal`, and with q = d(cb) cb the sums of q below the diagonal: row[k, h, tile's
    column, i], col[k, h, tile's row, j]."""
    SIDE: constexpr = L // BM
    tile, g, k = _program(SIDE if DIAGONAL else SIDE * SIDE, G)
    num, token = tl.load(length + k).to(tl.int32), tl.load(start + k)
    across, down = (tile, tile) if DIAGONAL else (tile % SIDE, tile // SIDE)
    i, j, p = down * BM + tl.arange(0, BM), across * BM + tl.arange(0, BM), tl.arange(0, BP)
    place = ((k * G + g) * L + i[:, None]) * L + j[None, :]
    if (across <= down) & (down * BM < num) & (DIAGONAL | (across < down)):
        x += token * s_x
        dy += token * s_dy
        below = tl.load(cb + place).to(tl.float32)
        if DIAGONAL:
            below = tl.where(i[:, None] > j[None, :], below, 0.0)
        acc = tl.zeros((BM, BM), tl.float32)
        for h in range(g * (H // G), (g + 1) * (H // G)):
            head = k * H + h
            q = tl.zeros((BM, BM), tl.float32)
            for p0 in range(0, P, BP):
                pp = p0 + p
                in_p = _inside(pp, P, BP)
                d = _load(dy + h * P, pp[None, :], i[:, None], s_dy, (i < num)[:, None], in_p[None, :])  # (BM, BP)
                v = _load(x + h * P, pp[:, None], j[None, :], s_x, (j < num)[None, :], in_p[:, None])  # (BP, BM)
                q = tl.dot(d, v, q, input_precision="ieee")
            if DIAGONAL:
                tl.store(diagonal + head * L + i, tl.sum(tl.where(i[:, None] == j[None, :], q, 0.0), 1))
                ci, ci_low = _pair(c + head * L, low, i)
                q *= _decay(ci[:, None], ci_low[:, None], ci[None, :], ci_low[None, :])
                q *= tl.load(dt + head * L + i)[None, :]
                q = tl.where(i[:, None] >= j[None, :], q, 0.0)
            else:
                edge = (head * R + down * (BM // EDGE)) * L
                q *= tl.load(after + edge + i)[:, None]
                q *= tl.load(before + edge + j)[None, :]
            acc += q
            q *= below
            tl.store(row + (head * SIDE + across) * L + i, tl.sum(q, 1))
            tl.store(col + (head * SIDE + down) * L + j, tl.sum(q, 0))
        tl.store(dcb + place, acc)
    elif (across > down) & (across // BLANK == down // BLANK):  # above the diagonal, but in the same tile of _dbc_kernel
        tl.store(dcb + place, tl.zeros((BM, BM), tl.float32))


@_jit
def _dbc_kernel(value, own, other, dcb, states, before, after, start, length, out, through, s_v, s_own, s_other, s_out,
                H: constexpr, G: constexpr, P: constexpr, N: constexpr, L: constexpr, R: constexpr,
                BM: constexpr, BN: constexpr, BP: constexpr, BL: constexpr, REVERSED: constexpr):
    """dC_i = sum_h 2^(c_i) S^T dy_i + sum_{j <= i} d(cb)_ij B_j, BM x BN a program, and of every head
    through[k, h, tile of n, i] = C_i . (its first term), which is F_i.

    REVERSED: dB_j = sum_h dt_j 2^(c_l - c_j) R^T x_j + sum_{i >= j} d(cb)_ij C_i, and through = E_j."""
    SPLIT: constexpr = (N + BN - 1) // BN
    tile, g, k = _program((L // BM) * SPLIT, G)
    num, token = tl.load(length + k).to(tl.int32), tl.load(start + k)
    i0, half = tile // SPLIT * BM, tile % SPLIT
    if i0 < num:
        i, l, n, p = i0 + tl.arange(0, BM), tl.arange(0, BL), half * BN + tl.arange(0, BN), tl.arange(0, BP)
        row, in_n, in_p = (i < num)[:, None], _inside(n, N, BN)[None, :], _inside(p, P, BP)
        value += token * s_v
        other += g * N
        mine = _load(own + token * s_own + g * N, n[None, :], i[:, None], s_own, row, in_n).to(tl.float32)  # (BM, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        for h in range(g * (H // G), (g + 1) * (H // G)):
            head = k * H + h
            v = _load(value + h * P, p[None, :], i[:, None], s_v, row, in_p[None, :])  # (BM, BP)
            S = tl.load(states + head * P * N + p[:, None] * N + n[None, :], mask=in_p[:, None] & in_n, other=0.0)
            term = tl.dot(v, S, input_precision="ieee")
            term *= (tl.load(before + (head * R + R - 1) * L + i) if REVERSED else tl.load(after + head * R * L + i))[:, None]
            tl.store(through + (head * SPLIT + half) * L + i, tl.sum(term * mine, 1))
            acc += term
        begin, end = (i0, num) if REVERSED else (0, tl.minimum(i0 + BM, num))
        for l0 in range(begin, end, BL):
            j = l0 + l
            rows, columns = (j[None, :], i[:, None]) if REVERSED else (i[:, None], j[None, :])  # rows are the later tokens
            d = tl.load(dcb + (k * G + g) * L * L + rows * L + columns)
            o = _load(other + (token + l0) * s_other, n[None, :], l[:, None], s_other, (j < num)[:, None], in_n)  # (BL, BN)
            acc = tl.dot(d.to(o.dtype), o, acc, input_precision="ieee")
        tl.store(out + (token + i)[:, None] * s_out + g * N + n[None, :], acc, mask=row & in_n)


@_jit
def _ddt_kernel(row, col, diagonal, F, E, crossing, cb, dt, A, start, length, ddt, dA, dD,
                H: constexpr, G: constexpr, L: constexpr, SIDE: constexpr, SPLIT: constexpr, PARTS: constexpr):
    """The gradient of log a_t by the formula on top, of one chunk and head, its sums in float64; from it ddt (tokens, h), and the
    chunk's share in dA and dD (k, h)."""
    _, h, k = _program(1, H)
    num, token, head, j = tl.load(length + k).to(tl.int32), tl.load(start + k), k * H + h, tl.arange(0, L)
    inside, own_tile = j < num, j // (L // SIDE)
    zero = tl.zeros((L,), tl.float32)
    rows, cols, Fs, Es = zero, zero, zero, zero
    for part in tl.static_range(SIDE):  # of the tiles that were computed
        rows += tl.load(row + (head * SIDE + part) * L + j, mask=inside & (part <= own_tile), other=0.0)
        computed = inside & (part >= own_tile) & (part * (L // SIDE) < num)
        cols += tl.load(col + (head * SIDE + part) * L + j, mask=computed, other=0.0)
    for part in tl.static_range(SPLIT):
        Fs += tl.load(F + (head * SPLIT + part) * L + j, mask=inside, other=0.0)
        Es += tl.load(E + (head * SPLIT + part) * L + j, mask=inside, other=0.0)
    across = 0.0
    for part in tl.static_range(PARTS):
        across += tl.load(crossing + head * PARTS + part)
    dy_x = tl.load(diagonal + head * L + j, mask=inside, other=0.0)
    own = tl.load(cb + ((k * G + h // (H // G)) * L + j) * L + j, mask=inside, other=0.0).to(tl.float32) * dy_x  # q_jj / dt_j

    sources = Es.to(tl.float64)
    da = tl.cumsum((rows - cols + Fs).to(tl.float64), 0, reverse=True) + (tl.cumsum(sources, 0) - sources) + across
    da = tl.where(inside, da, 0.0)
    step = tl.load(dt + head * L + j)
    tl.store(ddt + (token + j) * H + h, (cols + Es) / step + own + (tl.load(A + h) * da).to(tl.float32), mask=inside)
    tl.store(dA + head, tl.sum(step * da))
    tl.store(dD + head, tl.sum(dy_x.to(tl.float64)))


def _power(size):
    return max(16, 1 << (size - 1).bit_length())  # tl.dot wants at least 16, tl.arange a power of two


def _tiling(l, p, n, dtype, shared_memory):
    """Tile sizes and launch options of every kernel, for chunks of l tokens. In 16 bits, Hopper with its 227 KB of shared
    memory for a block takes tiles of 128; Ampere, Ada and consumer Blackwell, from 99 KB, take 64, and float32 takes 32."""
    big = shared_memory >= 200_000 and dtype.itemsize == 2 and p <= 128
    full = dtype.itemsize == 4  # products of float32 run on no tensor core, and need their registers for themselves
    options = dict(num_warps=8, num_stages=3) if big else dict(num_warps=4, num_stages=2)
    edge = min(32 if full else 64, l)  # from one boundary of before and after to the next
    side = min(128, l) if big else edge  # of a tile of the chunk's triangle
    bp, bn, step = _power(p), _power(n), min(64 if big else 32, l)
    return {
        "decays": dict(EDGE=edge, BH=4, num_warps=4),
        "cb": dict(BM=side, BK=min(64, bn), **options),
        "states": dict(BP=min(32 if full else 64, bp), BN=min(64, bn), BL=min(256 if big else 32, l), num_warps=4, num_stages=2),
        "scan": dict(BM=side, BP=bp, BK=min(step, bn), num_warps=options["num_warps"], num_stages=2),
        "dcb": dict(BM=edge, BP=min(32, bp) if full else bp, BLANK=side // edge, num_warps=4, num_stages=2),
        "dbc": dict(BM=side, BN=min(128 if big else 64, bn), BP=bp, BL=step, **options),
        "ddt": dict(num_warps=4),
    }


def _shared_memory(x):
    return torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin if x.is_cuda else 0


def _launch(kernel, programs, *args, **sizes):
    tensors = (v for v in (*args, *sizes.values()) if isinstance(v, torch.Tensor))
    with torch.cuda.device_of(next(tensors)):  # Triton launches on the current GPU, wherever the tensors lie
        kernel[(programs,)](*args, **sizes)


class _Plan(NamedTuple):
    """What the kernels of one scan share."""
    k: int  # chunks
    s: int  # sequences
    tiles: dict  # see _tiling
    given: dict  # arguments by name: chunk table, decays, sizes

    def launch(self, kernel, name, programs, **arguments):
        given = {key: v for key, v in self.given.items() if key in kernel.arg_names and key not in self.tiles[name]}
        _launch(kernel, programs, **given, **self.tiles[name], **arguments)

    def count(self, name, *sides):
        """Tiles of a kernel along some pairs of a size and the tile's part of it."""
        return math.prod(triton.cdiv(self.given[size], self.tiles[name][part]) for size, part in sides)


def _plan(x, dt, B, A, cu, l):
    """The plan of a scan over x (tokens, h, p), dt (tokens, h), B (tokens, g, n); computes its decays."""
    (h, p), (g, n), table = x.shape[1:], B.shape[1:], chunk_table(tuple(cu), l, x.device)
    k, tiles = len(table.start), _tiling(l, p, n, x.dtype, _shared_memory(x))
    edge = tiles["decays"]["EDGE"]
    r = l // edge + 1
    shapes = dict(c=(2, k, h, l), dt=(k, h, l), before=(k, h, r, l), after=(k, h, r, l))
    decays = {name: torch.empty(*shape, dtype=torch.float32, device=x.device) for name, shape in shapes.items()}
    sizes = dict(H=h, G=g, P=p, N=n, L=l, R=r, EDGE=edge)
    given = dict(start=table.start, length=table.length, first=table.first, A=A, low=k * h * l, **decays, **sizes)
    plan = _Plan(k, len(cu) - 1, tiles, given)
    plan.launch(_decays_kernel, "decays", plan.count("decays", ("H", "BH")) * k, step=dt, s_dt=dt.stride(0))
    return plan


@torch.library.custom_op("falcon_h1r::ssd", mutates_args=())  # opaque to torch.compile, which therefore has no graph break
def _ssd(x: torch.Tensor, dt: torch.Tensor, B: torch.Tensor, C: torch.Tensor, A: torch.Tensor, D: torch.Tensor,
         S: torch.Tensor | None, cu: Sequence[int], l: int,
         want_final: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (tokens, h, p), dt (tokens, h), B and C (tokens, g, n), A and D (h,), S (s, h, p, n) or None for zeros -> y, the final states
    (of no sequence unless wanted), and for the backward pass the states (k, h, p, n) that enter each chunk, and cb (k, g, l, l)."""
    (h, p), (g, n), plan = x.shape[1:], B.shape[1:], _plan(x, dt, B, A, cu, l)
    y, states = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(plan.k, h, p, n, dtype=x.dtype, device=x.device)
    cb = torch.empty(plan.k, g, l, l, dtype=x.dtype, device=x.device)
    final = torch.empty(plan.s if want_final else 0, h, p, n, dtype=torch.float32, device=x.device)
    s_x, s_b, s_c = x.stride(0), B.stride(0), C.stride(0)
    plan.launch(_cb_kernel, "cb", plan.count("cb", ("L", "BM"), ("L", "BM")) * g * plan.k, query=C, key=B, cb=cb, s_q=s_c, s_k=s_b)
    plan.launch(_states_kernel, "states", plan.count("states", ("P", "BP"), ("N", "BN")) * h * plan.s, value=x, key=B, initial=S,
                states=states, final=final if want_final else None, entering=None, crossing=None, s_v=s_x, s_k=s_b, REVERSED=False)
    plan.launch(_scan_kernel, "scan", plan.count("scan", ("L", "BM")) * h * plan.k, value=x, query=C, cb=cb, states=states, D=D,
                out=y, s_v=s_x, s_q=s_c, s_out=y.stride(0), REVERSED=False)
    return y, final, states, cb


@_ssd.register_fake
def _(x, dt, B, C, A, D, S, cu, l, want_final):
    (h, p), (g, n) = x.shape[1:], B.shape[1:]
    k = sum((end - start + l - 1) // l for start, end in zip(cu, cu[1:]))
    final = x.new_empty(len(cu) - 1 if want_final else 0, h, p, n, dtype=torch.float32)
    return x.new_empty(x.shape), final, x.new_empty(k, h, p, n), x.new_empty(k, g, l, l)


@torch.library.custom_op("falcon_h1r::ssd_backward", mutates_args=())
def _ssd_backward(dy: torch.Tensor, dfinal: torch.Tensor | None, x: torch.Tensor, dt: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
                  A: torch.Tensor, D: torch.Tensor, states: torch.Tensor, cb: torch.Tensor, cu: Sequence[int], l: int,
                  want_initial: bool) -> list[torch.Tensor]:
    """Gradients of x, dt, B, C, A, D and the initial states (of no sequence unless wanted); dfinal None stands for zeros."""
    (h, p), (g, n), plan = x.shape[1:], B.shape[1:], _plan(x, dt, B, A, cu, l)
    side, split, parts = plan.count("dcb", ("L", "BM")), plan.count("dbc", ("N", "BN")), plan.count("states", ("P", "BP"), ("N", "BN"))
    dx, ddt, dB, dC = (torch.empty(v.shape, dtype=v.dtype, device=x.device) for v in (x, dt, B, C))
    R, dcb = torch.empty_like(states), torch.empty_like(cb)
    dinitial = torch.empty(plan.s if want_initial else 0, h, p, n, dtype=torch.float32, device=x.device)
    shapes = dict(crossing=(parts,), diagonal=(l,), row=(side, l), col=(side, l), F=(split, l), E=(split, l))
    sums = {name: torch.empty(plan.k, h, *shape, dtype=torch.float32, device=x.device) for name, shape in shapes.items()}
    dA, dD = (torch.empty(plan.k, h, dtype=torch.float64, device=x.device) for _ in "AD")
    s_x, s_dy, s_b, s_c = x.stride(0), dy.stride(0), B.stride(0), C.stride(0)
    plan.launch(_states_kernel, "states", parts * h * plan.s, value=dy, key=C, initial=dfinal, states=R, entering=states,
                final=dinitial if want_initial else None, crossing=sums["crossing"], s_v=s_dy, s_k=s_c, REVERSED=True)
    plan.launch(_scan_kernel, "scan", plan.count("scan", ("L", "BM")) * h * plan.k, value=dy, query=B, cb=cb, states=R, D=D,
                out=dx, s_v=s_dy, s_q=s_b, s_out=dx.stride(0), REVERSED=True)
    for on_diagonal, tiles in ((False, side * side), (True, side)):
        plan.launch(_dcb_kernel, "dcb", tiles * g * plan.k, x=x, dy=dy, cb=cb, dcb=dcb, row=sums["row"], col=sums["col"],
                    diagonal=sums["diagonal"], s_x=s_x, s_dy=s_dy, DIAGONAL=on_diagonal)
    programs = plan.count("dbc", ("L", "BM"), ("N", "BN")) * g * plan.k
    plan.launch(_dbc_kernel, "dbc", programs, value=dy, own=C, other=B, dcb=dcb, states=states, out=dC, through=sums["F"],
                s_v=s_dy, s_own=s_c, s_other=s_b, s_out=dC.stride(0), REVERSED=False)
    plan.launch(_dbc_kernel, "dbc", programs, value=x, own=B, other=C, dcb=dcb, states=R, out=dB, through=sums["E"],
                s_v=s_x, s_own=s_b, s_other=s_c, s_out=dB.stride(0), REVERSED=True)
    plan.launch(_ddt_kernel, "ddt", h * plan.k, cb=cb, ddt=ddt, dA=dA, dD=dD, **sums, SIDE=side, SPLIT=split, PARTS=parts)
    return [dx, ddt, dB, dC, dA.sum(0).float(), dD.sum(0).float(), dinitial]


@_ssd_backward.register_fake
def _(dy, dfinal, x, dt, B, C, A, D, states, cb, cu, l, want_initial):
    dinitial = x.new_empty(len(cu) - 1 if want_initial else 0, *states.shape[1:], dtype=torch.float32)
    return [*(v.new_empty(v.shape) for v in (x, dt, B, C, A, D)), dinitial]


def _ssd_setup(ctx, inputs, output):
    *tensors, S, ctx.cu, ctx.l, _ = inputs
    ctx.want_initial = S is not None
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)  # None where nobody used the final states, instead of zeros as large as they are


def _ssd_gradients(ctx, dy, dfinal, dstates, dcb):
    x, *tensors = ctx.saved_tensors
    dy = x.new_zeros(x.shape) if dy is None else dy.contiguous()
    dfinal = None if dfinal is None or not len(dfinal) else dfinal.contiguous()
    *gradients, dinitial = _ssd_backward(dy, dfinal, x, *tensors, ctx.cu, ctx.l, ctx.want_initial)
    return *gradients, dinitial if ctx.want_initial else None, None, None, None


_ssd.register_autograd(_ssd_gradients, setup_context=_ssd_setup)


def _scan_triton(x, dt, B, C, A, D, S, cu, chunk_size, want_final=True):
    """x (tokens, h, p) in its own dtype, dt (tokens, h) float32 -> y with D x in it, final states."""
    shared, (p, n) = _shared_memory(x), (x.shape[2], B.shape[2])
    _expect(p <= 256 and n <= 1024, "x, B", f"p = {p}, n = {n}", 'at most 256 and 1024, or backend="torch"')
    _expect(not shared or shared >= 99 * 1024, "backend", f'"triton" on a GPU with {shared // 1024} KB of shared memory for a block',
            'at least 99 KB (Ampere and newer), or backend="torch"')
    longest = min(chunk_size, 1024, max(end - start for start, end in zip(cu, cu[1:])))  # a program of _decays_kernel holds a chunk
    l = max(16, 1 << (longest - 1).bit_length())
    x, B, C = (v if v[0].is_contiguous() else v.contiguous() for v in (x, B, C))
    D = torch.zeros_like(A) if D is None else D
    # A step that does not forget (A >= 0) is an error; looking for it would stop the host at every layer, NaN does not.
    A = torch.where(A < 0, A, torch.nan)
    y, final, *_ = _ssd(x, dt.contiguous(), B, C, A, D, None if S is None else S.contiguous(), cu, l, want_final)
    return y, final if want_final else None


# ---------------------------------------------------------------------------------------------------------------------
# 5. One token


@_jit
def _rounded(v, like):
    """v in float32, with no more digits than what `like` points at has."""
    return v.to(like.dtype.element_ty).to(tl.float32)


@_jit
def _step_kernel(state, x, dt, A, B, C, D, dt_bias, y, low, high, s_state, s_x, s_dt, s_b, s_c,
                 H: constexpr, G: constexpr, P: constexpr, N: constexpr, BP: constexpr, BN: constexpr, RAW: constexpr):
    """S <- exp(dt A) S + dt x B^T in place and y = S C + D x, BP rows of one state a program: read once, written once.

    RAW: A holds log(-A), and the step size is softplus(dt + dt_bias), clamped to [low, high] and rounded to dt's dtype
    where torch rounds: a sampler with other step sizes than its trainer would drift away from it."""
    tile, h, b = _program((P + BP - 1) // BP, H)
    p, n = tile * BP + tl.arange(0, BP), tl.arange(0, BN)
    place = state + b * s_state + h * P * N + p[:, None] * N + n[None, :]
    S = tl.load(place, mask=(p < P)[:, None] & (n < N)[None, :], other=0.0)
    xp = tl.load(x + b * s_x + h * P + p, mask=p < P, other=0.0).to(tl.float32)
    Bn = tl.load(B + b * s_b + h // (H // G) * N + n, mask=n < N, other=0.0).to(tl.float32)
    Cn = tl.load(C + b * s_c + h // (H // G) * N + n, mask=n < N, other=0.0).to(tl.float32)
    delta, a = tl.load(dt + b * s_dt + h).to(tl.float32), tl.load(A + h).to(tl.float32)
    if RAW:
        delta = _rounded(delta + tl.load(dt_bias + h).to(tl.float32), dt)
        # softplus(v) = max(v, 0) + log(1 + u), u = exp(-|v|). 1 + u rounds away digits of a small u; log(w) u / (w - 1)
        # restores them.
        u = tl.exp(-tl.abs(delta))
        log1p = tl.where(1 + u == 1, u, tl.log(1 + u) * u / tl.where(1 + u == 1, 1.0, (1 + u) - 1))
        delta = tl.minimum(tl.maximum(_rounded(tl.maximum(delta, 0.0) + log1p, dt), low), high)
        a = -tl.exp(a)
    S = S * tl.exp(delta * a) + (delta * xp)[:, None] * Bn[None, :]
    tl.store(place, S, mask=(p < P)[:, None] & (n < N)[None, :])
    skip = tl.load(D + h).to(tl.float32) * xp
    tl.store(y + (b * H + h) * P + p, tl.sum(S * Cn[None, :], 1) + skip, mask=p < P)


def _step_triton(state, x, dt, A, B, C, D, dt_bias=None, limit=(0.0, float("inf"))):
    """y (b, h, p). With dt_bias the arguments are RAW, see the kernel."""
    (b, h, p), (g, n) = x.shape, B.shape[1:]
    _expect(n <= 512, "B", f"a state of {n}", "at most 512, what the registers of one program hold")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, dt, B, C = (v if v[0].is_contiguous() else v.contiguous() for v in (x, dt, B, C))
    D = torch.zeros_like(A) if D is None else D
    _launch(_step_kernel, triton.cdiv(p, 16) * h * b, state, x, dt, A, B, C, D, dt_bias, y, *limit,
            state.stride(0), x.stride(0), dt.stride(0), B.stride(0), C.stride(0),
            H=h, G=g, P=p, N=n, BP=16, BN=_power(n), RAW=dt_bias is not None, num_warps=4)
    return y


def ssd_step(state, x, dt, A, B, C, *, D=None, dt_bias=None, dt_softplus=False, backend=None):
    """One token of `ssd_scan`. state (b, h, p, n), x (b, h, p), dt (b, h), B and C (b, g, n) -> y (b, h, p), new state.

    Without gradients the state is updated in place (and returned), as large batches spend the memory bandwidth on it.
    backend as for `ssd_scan`; the kernel needs a float32 state with contiguous (h, p, n), and has no gradient."""
    _expect(x.dim() == 3, "x", tuple(x.shape), "(b, h, p)")
    backend, dtype, in_place = _backend(backend, x), state.dtype, not torch.is_grad_enabled()
    _check_scan(x, dt, A, B, C, D, dt_bias, state, x.shape[0])
    delta = _step_size(dt, dt_bias, dt_softplus, dtype)
    A, D = (v if v is None else v.to(dtype) for v in (A, D))
    if backend == "triton" and dtype == torch.float32 and state[0].is_contiguous() and in_place:
        return _step_triton(state, x, delta, A, B, C, D), state

    def by_group(v):  # (b, h, ...) -> (b, g, h / g, ...): heads of a group share B and C
        return v.unflatten(1, (B.shape[1], -1))

    Bn, Cn = (v.to(dtype)[:, :, None, None] for v in (B, C))  # (b, g, 1, 1, n)
    keep = torch.exp(delta * A)[..., None, None]
    state = state.mul_(keep) if in_place else state * keep
    by_group(state).addcmul_(by_group(delta[..., None] * x).unsqueeze(-1), Bn)
    y = (Cn[:, :, 0] @ by_group(state).flatten(2, 3).mT).view(x.shape)  # (b, g, 1, n) (b, g, n, p h / g)
    y = y if D is None else y + D[:, None] * x
    return y.to(x.dtype), state


# ---------------------------------------------------------------------------------------------------------------------
# 6. The causal convolution. Depthwise, k taps (4 in Falcon-H1): a channel sees only itself, now and k - 1 tokens back.


def _check_conv(x, weight, bias, activation, states, s):
    d, k = x.shape[-1], weight.shape[-1]
    _expect_tensors(x, weight=(weight, (d, k)), bias=(bias, (d,)), initial_states=(states, (s, d, k - 1)))
    _expect(activation in (None, "silu"), "activation", repr(activation), 'None or "silu"')


class _ConvTorch(torch.autograd.Function):
    """y_i = bias + sum_j w_j x_{i-k+1+j} of one sequence: x (tokens, d), weight (k + 1, d), the bias last -> as x. Left
    to autograd, each slice would have a gradient as large as x, filled with zeros and added up."""

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
        dx, dweight = dy * now, [(dy * x).sum(0), dy.sum(0)]
        for back, w in enumerate(reversed(past), 1):
            dx[:-back].addcmul_(dy[back:], w)
            dweight.insert(0, (dy[back:] * x[:-back]).sum(0))
        return dx, torch.stack(dweight)


# In Triton, a program is one warp that walks over a block, up to BT tokens of one sequence. Each thread keeps the last
# k inputs of a few neighbouring channels in registers, so it loads each input once, ROWS tokens at a time to hide the
# latency of memory. The backward pass recomputes z, the value before the activation:
#
#     z_i = bias + sum_j w_j x_{i-k+1+j}      dz_i = act'(z_i) dy_i      dx_i = sum_j w_j dz_{i+k-1-j}
#     dw_j = sum_i dz_i x_{i-k+1+j}           dbias = sum_i dz_i
#
# A second window, of the last k values of dz, completes dx_i at token i + k - 1. So a block walks k - 1 tokens past its
# own, with dz = 0 past the sequence, and leaves their share of dw and dbias to the next block.
#
# BT: 3 tokens of 128 read twice are 2% of the bytes, the parts of dw and dbias 3%. BD: 32 threads with 8 channels, 16
# bytes of bfloat16; backward with 4, since 8 take 242 registers: 8 warps per SM, where 4 leave room for 19.
_CONV_FORWARD = dict(BT=128, BD=256, ROWS=8, num_warps=1)
_CONV_BACKWARD = dict(BT=128, BD=128, ROWS=4, num_warps=1)


@_jit
def _row(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@_jit
def _conv_kernel(x, weight, dy, out, dweight, start, seq, cu, s_x, CHANNELS: constexpr,
                 K: constexpr, SILU: constexpr, BT: constexpr, BD: constexpr, ROWS: constexpr):
    """out = y; given dy, out = dx and dweight[block] (k + 1, d) is the block's part of the sum. weight (k + 1, d) has
    the bias last. start, seq: of each block."""
    EXTRA: constexpr = 0 if dy is None else K - 1
    tile, _, block = _program(tl.cdiv(CHANNELS, BD), 1)
    d = tile * BD + tl.arange(0, BD)
    in_d = _inside(d, CHANNELS, BD)
    token, s = tl.load(start + block), tl.load(seq + block)
    first = token == tl.load(cu + s)
    left = tl.load(cu + s + 1) - token  # tokens from here to the end of the sequence
    num = tl.minimum(left, BT)
    w, window = (), ()
    for j in tl.static_range(K + 1):
        w += (_row(weight + j * CHANNELS + d, in_d),)
    for j in tl.static_range(K - 1):
        window += (_row(x + (token - (K - 1) + j) * s_x + d, in_d & (first == 0)),)
    zero = tl.zeros((BD,), tl.float32)
    dw, dzs = (zero,) * (K + 1), (zero,) * (K - 1)
    for i in range(0, num + EXTRA, ROWS):
        # All loads stand before the first store, which the compiler cannot move them over.
        xs, dys = (), ()
        for r in tl.static_range(ROWS):
            xs += (_row(x + (token + i + r) * s_x + d, in_d & (i + r < left)),)
            if dy is not None:
                dys += (_row(dy + (token + i + r) * CHANNELS + d, in_d & (i + r < left)),)
        for r in tl.static_range(ROWS):
            window += (xs[r],)
            z = w[K]
            for j in tl.static_range(K):
                z += w[j] * window[j]
            gate = tl.sigmoid(z) if SILU else 1.0
            done, value = i + r - EXTRA, z * gate  # number of a token in the block, its y or dx
            if dy is not None:
                dz = dys[r] * gate * (1 + z * (1 - gate)) if SILU else dys[r]
                own = tl.where(i + r < num, dz, 0.0)
                dzs += (dz,)
                value = zero
                for j in tl.static_range(K):
                    value += w[j] * dzs[K - 1 - j]
                    dw += (dw[j] + own * window[j],)
                dw, dzs = dw[K + 1:] + (dw[K] + own,), dzs[1:]
            tl.store(out + (token + done) * CHANNELS + d, value, mask=in_d & (done >= 0) & (done < num))
            window = window[1:]
    if dy is not None:
        for j in tl.static_range(K + 1):
            tl.store(dweight + (block * (K + 1) + j) * CHANNELS + d, dw[j], mask=in_d)


@torch.library.custom_op("falcon_h1r::conv", mutates_args=())
def _conv_triton(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor | None, cu: Sequence[int],
                 silu: bool) -> list[torch.Tensor]:
    """x (tokens, d), weight (k + 1, d) -> [y], or given dy (tokens, d) the gradients of x and weight."""
    sizes = _CONV_FORWARD if dy is None else _CONV_BACKWARD
    (_, d), blocks = x.shape, chunk_table(tuple(cu), sizes["BT"], x.device)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = None if dy is None else torch.empty(len(blocks.start), *weight.shape, dtype=torch.float32, device=x.device)
    _launch(_conv_kernel, len(blocks.start) * triton.cdiv(d, sizes["BD"]), x, weight=weight, dy=dy, out=out,
            dweight=parts, start=blocks.start, seq=blocks.seq, cu=blocks.cu, s_x=x.stride(0), CHANNELS=d,
            K=len(weight) - 1, SILU=silu, **sizes)
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


def causal_conv1d(x, weight, bias=None, *, initial_states=None, cu_seqlens=None, activation=None, backend=None):
    """y_i = act(bias + sum_j weight[:, j] x_{i - k + 1 + j}): weight[:, k - 1] meets the current token.

    x (b, t, d), weight (d, k), bias (d,), initial_states (s, d, k - 1): the inputs before the first token, newest last,
    zeros when None; s = b, or the sequences packed by cu_seqlens. Returns y (b, t, d), final states (s, d, k - 1).
    activation: None or "silu"; backend: "torch", "triton" or None as for `ssd_scan`. Differentiable in every tensor."""
    _expect(x.dim() == 3 and x.shape[1] >= 1, "x", tuple(x.shape), "(b, t, d) with t >= 1")
    (b, t, d), k, backend = x.shape, weight.shape[-1], _backend(backend, x)
    cu = check_cu_seqlens(cu_seqlens, b, t)
    _check_conv(x, weight, bias, activation, initial_states, len(cu) - 1)
    # The windows of more taps do not fit into the 255 registers of a thread.
    _expect(backend != "triton" or k <= 8, "weight", f"{k} taps", 'at most 8, or backend="torch"')
    row = x.flatten(0, 1)  # (tokens, d)
    weight = torch.cat([weight.T, weight.new_zeros(1, d) if bias is None else bias[None]])  # (k + 1, d)
    bare = backend == "triton" and initial_states is None  # the kernel knows where sequences start
    if not bare:  # a history is k - 1 more tokens of its sequence: [history 0 | tokens 0 | history 1 | tokens 1 | ...]
        history = x.new_zeros(len(cu) - 1, k - 1, d) if initial_states is None else initial_states.to(x.dtype).mT
        sizes = [n for start, end in zip(cu, cu[1:]) for n in (k - 1, end - start)]
        row = torch.cat([part for pair in zip(history, row.split(sizes[1::2])) for part in pair])
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
    """One token of `causal_conv1d`. state (b, d, k - 1), x (b, d) -> y, new state (in place without gradients)."""
    _expect(x.dim() == 2, "x", tuple(x.shape), "(b, d)")
    _check_conv(x, weight, bias, activation, state, x.shape[0])
    window = torch.cat([state.mT, x.unsqueeze(1)], 1)  # (b, k, d), channels last: a CPU sums over taps without striding
    y = (window * weight.T).sum(1)
    y = y if bias is None else y + bias
    state = window[:, 1:].mT if torch.is_grad_enabled() else state.copy_(window[:, 1:].mT)
    return (F.silu(y) if activation else y), state


def main():
    sys.modules["ssm_scan"] = sys.modules["__main__"]  # for measure.py's import: this file, not a second copy of it
    from tests import measure

    measure.scan_parity()
    measure.scan_speed()


if __name__ == "__main__":
    main()
