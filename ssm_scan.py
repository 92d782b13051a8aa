"""The state-space half of Falcon-H1: the SSD scan of Mamba-2 and the short causal convolution in front of it.

Every function exists for three readers. `backend="recurrent"` is the definition, one token after another, and the oracle of
the tests (run it in float64). `backend="torch"` cuts each sequence into chunks and turns the scan into matrix products; it is
what CPUs run. `backend="triton"` is the place of the GPU kernels; it is not built yet and says so.

    python ssm_scan.py          parity of the chunked scan with the definition, outputs and every gradient, and its speed

To copy this file into another project, take nothing else: it needs torch alone. Argument names follow mamba_ssm and
causal_conv1d, so that either can take the other's place.

Glossary (Mamba-2 is arXiv 2405.21060)
    b, t, h, p   batch, tokens, heads, channels of one head (the paper's P, "head dim")
    g, n         groups that share B and C; head j reads group j // (h / g); size of the state (the paper's N)
    s            sequences: the batch rows, or the documents packed one after another in a single row
    x            (b, t, h, p)   what is written into the state
    dt           (b, t, h)      step size Delta; positive, here after softplus(dt + dt_bias) where asked for
    A            (h,)           negative; one step forgets all but exp(dt A) of the state ("scalar-identity A", section 3)
    B, C         (b, t, g, n)   where in the state to write, and what to read from it (SSM's keys and queries)
    D            (h,)           skip connection from x to y
    S            (s, h, p, n)   the state, one p x n matrix for each head, always float32 or wider
    cu_seqlens   (s + 1,)       where the packed documents start, and the end: [0, 7, 19] is one of 7 and one of 12 tokens

Deviations from Mamba-2: none in the function. Decays are differences of cumulative sums taken in float64 (a sum over a
strongly decaying chunk reaches -10^4, where float32 has only three digits left behind the point), and packed sequences
never share a chunk, so no mask inside a chunk is needed and nothing can leak from one document into the next.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# 1. Checks. A scan that is called with the wrong shapes may well run and answer nonsense, so everything is named here.


def _expect(ok, name, got, want):
    if not ok:
        raise ValueError(f"{name}: got {got}, expected {want}")


def check_cu_seqlens(cu_seqlens, b, t):
    """Return the boundaries (s + 1,) as a tuple of ints, or raise ValueError. Keep them on the CPU: they steer the host."""
    _expect(b == 1, "cu_seqlens", f"a batch of {b}", "packed sequences in a batch of 1")
    cu = tuple(cu_seqlens.tolist() if isinstance(cu_seqlens, torch.Tensor) else cu_seqlens)
    _expect(len(cu) >= 2 and all(type(i) is int for i in cu), "cu_seqlens", cu, "integers (s + 1,), s >= 1")
    _expect(cu[0] == 0 and cu[-1] == t, "cu_seqlens", f"{cu[0]} ... {cu[-1]}", f"0 ... {t}, the number of tokens")
    _expect(all(i < j for i, j in zip(cu, cu[1:])), "cu_seqlens", cu, "strictly increasing boundaries")
    return cu


def _check_scan(x, dt, A, B, C, D, dt_bias, states, s):
    """Shapes of the scan, for one token (no t) and for many. A is checked by value only where that needs no GPU sync."""
    *lead, h, p = x.shape
    _expect(tuple(dt.shape) == (*lead, h), "dt", tuple(dt.shape), (*lead, h))
    _expect(B.dim() == x.dim() and B.shape[:-2] == x.shape[:-2], "B", tuple(B.shape), f"{(*lead, 'g', 'n')}")
    _expect(B.shape == C.shape, "C", tuple(C.shape), f"the shape of B, {tuple(B.shape)}")
    _expect(h % B.shape[-2] == 0, "B", f"{B.shape[-2]} groups", f"a number that divides the {h} heads of x")
    _expect(x.dtype == B.dtype == C.dtype, "dtype", f"x {x.dtype}, B {B.dtype}, C {C.dtype}", "the same for x, B and C")
    for name, v in (("A", A), ("D", D), ("dt_bias", dt_bias)):
        _expect(v is None or tuple(v.shape) == (h,), name, None if v is None else tuple(v.shape), (h,))
    want = (s, h, p, B.shape[-1])
    _expect(states is None or tuple(states.shape) == want, "initial_states", states is not None and tuple(states.shape), want)
    _expect(A.device.type != "cpu" or bool((A < 0).all()), "A", "a value that is not negative", "A < 0 in every head")


# ---------------------------------------------------------------------------------------------------------------------
# 2. Where tokens go. Sequences of many lengths become a dense array of rows (chunks here, whole documents in attention).


class _GatherRows(torch.autograd.Function):
    """x[index] whose gradient is a gather as well: each token stands exactly once among the rows that are no padding, so
    the sum that index_select's backward would scatter has one term. Faster, and the same bits on every run."""

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(inverse, index)
        return x[index]

    @staticmethod
    def backward(ctx, dout):
        inverse, index = ctx.saved_tensors
        return dout.flatten(0, index.dim() - 1)[inverse], None, None


def gather_rows(x, index, inverse):
    """x (tokens, ...), index (rows, width) of tokens, inverse (tokens,) of each token's place in index.flatten() -> x[index].

    Padding may repeat any token of its own sequence. Its gradient is dropped, so nothing downstream may read padding."""
    return _GatherRows.apply(x, index, inverse)


class _TakeRows(torch.autograd.Function):
    """x[index] for an index without repetition, whose gradient is then a plain store, not a sum."""

    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x[index]

    @staticmethod
    def backward(ctx, dout):
        dx = dout.new_zeros(ctx.shape)
        dx[ctx.saved_tensors[0]] = dout
        return dx, None


def take_rows(x, index):
    """x (rows, ...), index (m,) of different rows -> (m, ...)."""
    return _TakeRows.apply(x, index)


@lru_cache(maxsize=16)  # once for a batch, then shared by all layers and by the backward pass
def chunk_table(cu, chunk_size, device):
    """Cut sequences with boundaries `cu` (a tuple) into chunks; a chunk holds tokens of one sequence only.

    Returns index (k, l): the token at place l of chunk k, padding repeats the sequence's last token; valid (k, l); inverse
    (tokens,), each token's place; by_length (s,), the sequences with the longest first; and order (k,), the first chunks of all
    sequences, then their second ones, ..., steps long in turn, with the inverse permutation back (k,).
    """
    length = torch.tensor([end - start for start, end in zip(cu, cu[1:])])
    chunks = (length + chunk_size - 1) // chunk_size  # (s,)
    first = F.pad(chunks.cumsum(0), (1, 0))  # (s + 1,) number of each sequence's first chunk
    seq = torch.repeat_interleave(torch.arange(len(length)), chunks)  # (k,)
    offset = (torch.arange(len(seq)) - first[seq])[:, None] * chunk_size + torch.arange(chunk_size)  # (k, l) in the sequence
    valid = offset < length[seq, None]
    index = torch.tensor(cu)[seq, None] + torch.minimum(offset, length[seq, None] - 1)
    inverse = valid.flatten().nonzero()[:, 0]
    # Long sequences first: those that still have a c-th chunk are then a prefix, as in torch's PackedSequence.
    by_length = torch.sort(chunks, descending=True, stable=True).indices
    order = [first[by_length[: int((chunks > c).sum())]] + c for c in range(int(chunks.max()))]
    steps, order = [len(o) for o in order], torch.cat(order)
    index, valid, inverse, by_length, order, back = (
        v.to(device) for v in (index, valid, inverse, by_length, order, torch.argsort(order)))
    return index, valid, inverse, by_length, steps, order, back


# ---------------------------------------------------------------------------------------------------------------------
# 3. The scan


def _step_size(dt, dt_bias, dt_softplus, dtype):
    """Delta = softplus(dt + bias), in the dtype of the state: a bf16 step would lose the decay's digits."""
    dt = dt.to(dtype)
    dt = dt if dt_bias is None else dt + dt_bias.to(dtype)
    return F.softplus(dt) if dt_softplus else dt


def ssd_scan(x, dt, A, B, C, *, D=None, dt_bias=None, dt_softplus=False, initial_states=None, cu_seqlens=None,
             chunk_size=256, backend=None):
    """The SSD scan (Mamba-2, equation 1 discretised as in its section 2.1):

        S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T          y_t = S_t C_t + D x_t

    x (b, t, h, p), dt (b, t, h), A (h,) negative, B and C (b, t, g, n), D and dt_bias (h,), initial_states (s, h, p, n) with
    s = b, or the number of sequences when cu_seqlens (s + 1,) packs them along t and b = 1. Any t >= 1.
    Returns y (b, t, h, p) in x's dtype and the final states (s, h, p, n) in float32 (float64 for float64 inputs).
    Differentiable in every tensor. backend: "recurrent", "torch", or None for the best there is on x's device.
    Raises ValueError, naming the argument, for shapes that do not fit, A >= 0, unsorted cu_seqlens, an unknown backend.
    """
    backends = {"recurrent": _scan_recurrent, "torch": _scan_chunked}
    _expect(backend is None or backend in backends, "backend", repr(backend),
            '"recurrent" or "torch" (the "triton" kernels are not part of this version)')
    _expect(x.dim() == 4 and x.shape[1] >= 1, "x", tuple(x.shape), "(b, t, h, p) with t >= 1")
    _expect(isinstance(chunk_size, int) and chunk_size >= 1, "chunk_size", chunk_size, "an integer >= 1")
    b, t = x.shape[:2]
    cu = tuple(range(0, b * t + 1, t)) if cu_seqlens is None else check_cu_seqlens(cu_seqlens, b, t)
    _check_scan(x, dt, A, B, C, D, dt_bias, initial_states, len(cu) - 1)

    dtype = torch.promote_types(x.dtype, torch.float32)  # of the state and of all sums
    delta = _step_size(dt, dt_bias, dt_softplus, dtype)
    S = x.new_zeros(len(cu) - 1, *x.shape[2:], B.shape[3], dtype=dtype) if initial_states is None else initial_states.to(dtype)
    flat = [v.flatten(0, 1).to(dtype) for v in (x, delta, B, C)]  # tokens of all sequences in one row, (tokens, ...)
    y, S = backends[backend or "torch"](*flat, A.to(dtype), S, cu, chunk_size)
    y = y.view(x.shape)
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    return y.to(x.dtype), S


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


def _scan_chunked(x, dt, B, C, A, S, cu, chunk_size):
    """The same in matrix products (Mamba-2, section 6). With c_i = sum_{j<=i} dt_j A inside one chunk of l tokens,

        y_i = sum_{j<=i} exp(c_i - c_j) (C_i . B_j) dt_j x_j      attention-like, within the chunk      (step 1)
            + exp(c_i) S C_i                                      what the entering state adds          (step 4)
        S'  = exp(c_l) S + sum_j exp(c_l - c_j) dt_j x_j B_j^T    the state handed on                   (steps 2, 3)

    Padding has dt = 0: it neither writes nor decays, so c_l is right for chunks that are not full, too.
    """
    h, g = x.shape[1], B.shape[1]
    chunk_size = min(chunk_size, max(end - start for start, end in zip(cu, cu[1:])))
    index, valid, inverse, by_length, steps, order, back = chunk_table(cu, chunk_size, x.device)
    x, dt, B, C = (gather_rows(v, index, inverse) for v in (x, dt, B, C))  # (k, l, h, p), (k, l, h), (k, l, g, n)
    dt = torch.where(valid[..., None], dt, 0).transpose(1, 2)  # (k, h, l)
    c = (dt * A[:, None]).cumsum(2, dtype=torch.float64)  # (k, h, l)
    # Time stands last from here on: the heads of a group are then rows of one matrix, and B and C need no copy for each.
    dtx = x.permute(0, 2, 3, 1) * dt[:, :, None]  # (k, h, p, l)
    B, C = B.transpose(1, 2), C.permute(0, 2, 3, 1)  # (k, g, l, n), (k, g, n, l)

    def by_group(v):  # (k, h, p, .) -> (k, g, p h / g, .)
        return v.reshape(len(v), g, -1, v.shape[-1])

    # Step 1, within the chunk. The mask stands inside the exponent: exp of a positive difference could overflow.
    later = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).triu()  # column i is not before row j
    decay = (c[..., None, :] - c[..., :, None]).to(x.dtype).masked_fill(~later, -torch.inf).exp()  # (k, h, l, l)
    y = dtx @ ((B @ C).unsqueeze(2) * decay.unflatten(1, (g, -1))).flatten(1, 2)  # (k, h, p, l)

    # Step 2, what each chunk adds to the state: one (p h / g x l)(l x n) product per group.
    written = dtx * (c[..., -1:] - c).to(x.dtype).exp()[:, :, None]  # (k, h, p, l)
    local = (by_group(written) @ B).view(len(x), h, -1, B.shape[-1])  # (k, h, p, n)

    # Step 3, along the chunks of every sequence at once. Only this loop is sequential: t / l short steps.
    keep = c[..., -1].to(x.dtype).exp()[..., None, None]  # (k, h, 1, 1)
    entering, final = [], S[by_length]
    for kept, added in zip(gather_rows(keep, order, back).split(steps), gather_rows(local, order, back).split(steps)):
        entering.append(final[: len(kept)])  # of the sequences that have one more chunk, a prefix of by_length
        now = kept * entering[-1] + added
        final = torch.cat([now, final[len(now) :]]) if len(now) < len(final) else now
    entering = gather_rows(torch.cat(entering), back, order)  # (k, h, p, n)

    # Step 4, what the entering state adds to each token's output.
    y = y + (by_group(entering) @ C).view(y.shape) * c.to(x.dtype).exp()[:, :, None]
    return take_rows(y.permute(0, 3, 1, 2).flatten(0, 1), inverse), final[torch.argsort(by_length)]


def ssd_step(state, x, dt, A, B, C, *, D=None, dt_bias=None, dt_softplus=False):
    """One token of `ssd_scan`. state (b, h, p, n), x (b, h, p), dt (b, h), B and C (b, g, n) -> y (b, h, p), new state.

    Without gradients the state is updated in place (and returned): decoding then allocates no second one, and the state is
    what decoding at large batch spends its memory bandwidth on."""
    _expect(x.dim() == 3, "x", tuple(x.shape), "(b, h, p)")
    _check_scan(x, dt, A, B, C, D, dt_bias, state, x.shape[0])
    delta = _step_size(dt, dt_bias, dt_softplus, state.dtype)
    B, C = (v.to(state.dtype).repeat_interleave(x.shape[1] // v.shape[1], 1) for v in (B, C))  # (b, h, n)
    keep = torch.exp(delta * A.to(state.dtype))[..., None, None]
    write = (delta[..., None] * x).unsqueeze(-1), B.unsqueeze(-2)  # (b, h, p, 1), (b, h, 1, n)
    state = torch.addcmul(state * keep, *write) if torch.is_grad_enabled() else state.mul_(keep).addcmul_(*write)
    y = (state @ C.unsqueeze(-1)).squeeze(-1)
    y = y if D is None else y + D.to(state.dtype)[:, None] * x
    return y.to(x.dtype), state


# ---------------------------------------------------------------------------------------------------------------------
# 4. The causal convolution. Depthwise, k taps (4 in Falcon-H1): each channel sees itself now and k - 1 tokens ago.


def _check_conv(x, weight, bias, activation, states, s):
    d, k = weight.shape if weight.dim() == 2 else (None, None)
    _expect(x.shape[-1] == d, "weight", tuple(weight.shape), f"(d, k) with d = {x.shape[-1]}, the channels of x")
    _expect(bias is None or tuple(bias.shape) == (d,), "bias", bias is not None and tuple(bias.shape), (d,))
    _expect(activation in (None, "silu"), "activation", repr(activation), 'None or "silu"')
    _expect(states is None or tuple(states.shape) == (s, d, k - 1), "initial_states",
            states is not None and tuple(states.shape), f"{(s, d, k - 1)}, newest input last")


@lru_cache(maxsize=16)
def _conv_table(cu, history, device):
    """Rows of the buffer [history of sequence 0 | its tokens | history of sequence 1 | ...], as places in [tokens | histories];
    which rows of the convolved buffer belong to tokens; and the rows (s, history) that are left as final states."""
    rows, outputs, final = [], [], []
    for i, (start, end) in enumerate(zip(cu, cu[1:])):
        outputs += range(len(rows), len(rows) + end - start)
        rows += [*range(cu[-1] + i * history, cu[-1] + (i + 1) * history), *range(start, end)]
        final.append(range(len(rows) - history, len(rows)))
    table = rows, outputs, [list(f) for f in final]
    return tuple(torch.tensor(v, dtype=torch.long, device=device) for v in table)


def causal_conv1d(x, weight, bias=None, *, initial_states=None, cu_seqlens=None, activation=None):
    """y_i = act(bias + sum_j weight[:, j] x_{i - k + 1 + j}): weight[:, k - 1] meets the current token.

    x (b, t, d), weight (d, k), bias (d,), initial_states (s, d, k - 1): the inputs before the first token, newest last, zeros
    when None; s = b, or the sequences packed by cu_seqlens. Returns y (b, t, d) and the final states (s, d, k - 1).
    """
    _expect(x.dim() == 3 and x.shape[1] >= 1, "x", tuple(x.shape), "(b, t, d) with t >= 1")
    b, t, d = x.shape
    cu = None if cu_seqlens is None else check_cu_seqlens(cu_seqlens, b, t)
    s, history = (b if cu is None else len(cu) - 1), weight.shape[-1] - 1
    _check_conv(x, weight, bias, activation, initial_states, s)
    before = x.new_zeros(s, history, d) if initial_states is None else initial_states.mT.to(x.dtype)
    if cu is None:
        buffer = torch.cat([before, x], 1)  # (b, k - 1 + t, d)
    else:
        rows, outputs, final = _conv_table(cu, history, x.device)
        buffer = take_rows(torch.cat([x[0], before.flatten(0, 1)]), rows)[None]  # (1, t + s (k - 1), d)
    width = buffer.shape[1] - history
    y = sum(buffer[:, j : j + width] * weight[:, j] for j in range(history + 1))  # k shifted multiply-adds
    y = y if bias is None else y + bias
    y = y if cu is None else take_rows(y[0], outputs)[None]
    last = buffer[:, t:] if cu is None else buffer[0][final]  # (s, k - 1, d)
    return (F.silu(y) if activation else y), last.mT


def causal_conv1d_step(state, x, weight, bias=None, *, activation=None):
    """One token of `causal_conv1d`. state (b, d, k - 1), x (b, d) -> y (b, d), new state (in place without gradients)."""
    _expect(x.dim() == 2, "x", tuple(x.shape), "(b, d)")
    _check_conv(x, weight, bias, activation, state, x.shape[0])
    window = torch.cat([state, x.unsqueeze(-1)], -1)  # (b, d, k)
    y = (window * weight).sum(-1)
    y = y if bias is None else y + bias
    state = window[..., 1:] if torch.is_grad_enabled() else state.copy_(window[..., 1:])
    return (F.silu(y) if activation else y), state


# ---------------------------------------------------------------------------------------------------------------------
# 5. python ssm_scan.py


def random_inputs(b, t, h, p, g, n, *, states=None, dtype=torch.float32, seed=0):
    """Tensors of a plausible layer, for tests and benchmarks: dt around 0.1 after softplus, A between -1 and -16."""
    r = torch.Generator().manual_seed(seed)
    def normal(*shape):
        return torch.randn(*shape, generator=r)
    inputs = dict(x=normal(b, t, h, p), dt=normal(b, t, h) - 2, A=-1 - 15 * torch.rand(h, generator=r),
                  B=normal(b, t, g, n) * n**-0.5, C=normal(b, t, g, n), D=normal(h), dt_bias=normal(h) * 0.3)
    if states is not None:
        inputs["initial_states"] = normal(states, h, p, n)
    return {name: v.to(dtype).requires_grad_() for name, v in inputs.items()}


def relative_errors(inputs, *, cu_seqlens=None, chunk_size=256, backend="torch"):
    """|ours - oracle| / |oracle| of y, the final states and every gradient; the oracle is the float64 recurrence."""
    def run(backend, inputs):
        leaves = {name: v.detach().requires_grad_() for name, v in inputs.items()}
        y, S = ssd_scan(**leaves, dt_softplus=True, cu_seqlens=cu_seqlens, chunk_size=chunk_size, backend=backend)
        r = torch.Generator().manual_seed(1)  # the same cotangents for both
        dy, dS = (torch.randn(v.shape, generator=r).to(v) for v in (y, S))
        torch.autograd.backward([y, S], [dy, dS])
        return {"y": y.detach(), "S": S.detach(), **{"d" + name: v.grad for name, v in leaves.items()}}
    ours, oracle = run(backend, inputs), run("recurrent", {name: v.double() for name, v in inputs.items()})
    return {name: float((ours[name] - v).norm() / v.norm().clamp(min=1e-30)) for name, v in oracle.items()}


def main():
    import time

    cases = {
        "ragged end": (dict(b=2, t=70, h=4, p=16, g=2, n=32), None),
        "packed, with states": (dict(b=1, t=105, h=4, p=16, g=2, n=32, states=4), [0, 40, 41, 57, 105]),
        "odd sizes": (dict(b=1, t=45, h=6, p=24, g=1, n=40, states=1), None),
    }
    print("relative error against the float64 recurrence, chunks of 32, float32")
    for name, (shape, cu) in cases.items():
        errors = relative_errors(random_inputs(**shape), cu_seqlens=cu, chunk_size=32)
        print(f"  {name:20s}", "  ".join(f"{k} {v:.0e}" for k, v in errors.items()))

    b, t, h, p, n = 8, 512, 8, 64, 64
    print(f"forward and backward, b={b} t={t} h={h} p={p} n={n}, float32, {torch.get_num_threads()} CPU threads")
    inputs = random_inputs(b, t, h, p, 1, n)
    for backend, chunk in (("recurrent", 0), ("torch", 32), ("torch", 64), ("torch", 128), ("torch", 256)):
        seconds = []
        for _ in range(1 if backend == "recurrent" else 5):
            start = time.perf_counter()
            y, S = ssd_scan(**inputs, dt_softplus=True, chunk_size=max(chunk, 1), backend=backend)
            (y.sum() + S.sum()).backward()
            seconds.append(time.perf_counter() - start)
        print(f"  {backend:9s} chunk {chunk or '-':>3}   {sorted(seconds)[len(seconds) // 2] * 1e3:8.1f} ms")
    print("rows for the triton kernels need a GPU and are not part of this version")


if __name__ == "__main__":
    main()
