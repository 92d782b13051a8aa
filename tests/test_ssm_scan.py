"""The chunked scan, the convolution and their steps against the definition, on every shape with an edge."""

import contextlib
import importlib
import itertools
import json
import os
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

import ssm_scan as s
from tests.bench import random_inputs, relative_errors, scan_results
from tests.compile_kernels import SHARED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
PER_TOKEN = ("x", "dt", "B", "C")
zeros = torch.zeros

def small(device="cpu", **changes):
    shape = {"b": 1, "t": 12, "h": 2, "p": 3, "g": 1, "n": 4} | changes
    return {k: v.detach().to(device) for k, v in random_inputs(**shape).items()}

def leaves_of(inputs):
    return {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}

def outputs_and_gradients(inputs, scan=s.ssd_scan, **options):
    """[y, final states, gradients ...] of sin(y) and sin(final states)."""
    leaves = leaves_of(inputs)
    y, S = scan(**leaves, **options)
    (y.sin().sum() + S.sin().sum()).backward()
    return [y, S, *(v.grad for v in leaves.values())]

# 1. The torch backend and the definition --------------------------------------------------------------------

@pytest.mark.parametrize("backend", ["recurrent", "torch"])
def test_two_tokens_by_hand(backend):
    # One head, p = n = 1, D = 10. S1 = 0.5 * 2 * 3 = 3, y1 = 3 + 20; S2 = e^-1 S1 + 4, y2 = 2 S2 + 40.
    x, B, C = (torch.tensor(v, dtype=torch.float64).view(1, 2, 1, 1) for v in ([2, 4], [3, 1], [1, 2]))
    dt = torch.tensor([[[0.5], [1.0]]]).double()
    y, S = s.ssd_scan(x, dt, torch.tensor([-1.0]), B, C, D=torch.tensor([10.0]), backend=backend)
    S2 = 3 * torch.exp(torch.tensor(-1.0)).item() + 4
    assert S.item() == pytest.approx(S2)
    assert y.flatten().tolist() == pytest.approx([23, 2 * S2 + 40])

@st.composite
def scans(draw):
    """Shapes with every kind of edge: ragged, packed, length 1, sizes that are no powers of two."""
    size, g = st.integers(1, 9), draw(st.integers(1, 3))
    shape = {"h": g * draw(st.integers(1, 3)), "p": draw(size), "g": g, "n": draw(size)}
    cu = b = None
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
        cu = [0, *itertools.accumulate(lengths)]
        shape |= {"b": 1, "t": cu[-1]}
    else:
        b = draw(st.integers(1, 3))
        shape |= {"b": b, "t": draw(st.integers(1, 40))}
    shape["states"] = (b or len(lengths)) if draw(st.booleans()) else None
    return shape, cu, draw(st.integers(1, 40)), draw(st.sampled_from([1.0, 100.0, 1e-3]))

@settings(max_examples=30, derandomize=True)
@given(scans())
def test_chunked_scan_is_the_recurrence(case):
    shape, cu, chunk, decay = case
    inputs = random_inputs(**shape)
    inputs["A"] = (inputs["A"] * decay).detach()
    errors = relative_errors(inputs, cu_seqlens=cu, chunk_size=chunk)
    # dA adds up tokens of both signs: where they cancel, down to one number here, few digits are left of it.
    assert all(e < (1e-4 if name == "dA" else 1e-5) for name, e in errors.items()), errors

def test_chunked_scan_in_float64():
    inputs = {k: v.double() for k, v in random_inputs(1, 33, 4, 3, 2, 5, states=3).items()}
    assert max(relative_errors(inputs, cu_seqlens=[0, 1, 20, 33], chunk_size=8).values()) < 1e-12

def test_steps_are_the_scan():
    inputs = {k: v.detach().requires_grad_() for k, v in small(b=2, t=7, h=4, g=2, states=2).items()}
    y, S = s.ssd_scan(**inputs, dt_softplus=True)
    state = inputs.pop("initial_states")
    tokens = {k: inputs.pop(k) for k in PER_TOKEN}
    leaves = [state, *tokens.values(), *inputs.values()]
    wanted = torch.autograd.grad(y.square().sum() + S.sum(), leaves)
    for grad in (False, True):  # in place in both
        with torch.set_grad_enabled(grad):
            now = state.clone()
            ys = [s.ssd_step(now, **{k: v[:, i] for k, v in tokens.items()}, **inputs, dt_softplus=True)[0]
                  for i in range(7)]
        torch.testing.assert_close([torch.stack(ys, 1), now], [y, S], rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(torch.stack(ys, 1).square().sum() + now.sum(), leaves)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize(("change", "named"), [
    ({"x": zeros(1, 0, 2, 3)}, "x"), ({"x": zeros(1, 2, 3)}, "x"), ({"D": zeros(3)}, "D"),
    ({"dt": -torch.ones(1, 12, 2), "dt_bias": None}, "dt"),
    ({"A": zeros(2)}, "A"), ({"A": zeros(2) / 0}, "A"), ({"A": -torch.ones(3)}, "A"),
    ({"A": -torch.ones(2, device="meta")}, "A"), ({"dt": zeros(1, 12, 3)}, "dt"),
    ({"B": zeros(1, 12, 2, 5)}, "C"), ({"B": zeros(1, 11, 1, 4)}, "B"), ({"C": zeros(1, 12, 1, 5)}, "C"),
    ({"B": zeros(1, 12, 1, 4).half()}, "dtype"), ({"B": zeros(1, 12, 3, 4), "C": zeros(1, 12, 3, 4)}, "B"),
    ({"x": zeros(0, 12, 2, 3)}, "x"), ({"x": zeros(1, 12, 2, 0)}, "x"), ({"B": zeros(4)}, "B"),
    ({"B": zeros(1, 12, 0, 4), "C": zeros(1, 12, 0, 4)}, "B"),
    ({"B": zeros(1, 12, 1, 0), "C": zeros(1, 12, 1, 0)}, "B"),
    ({"initial_states": zeros(2, 2, 3, 4)}, "initial_states"), ({"cu_seqlens": [1, 12]}, "cu_seqlens"),
    ({"cu_seqlens": [0, 11]}, "cu_seqlens"), ({"cu_seqlens": [0, 5, 5, 12]}, "cu_seqlens"),
    ({"cu_seqlens": [0, 7, 5, 12]}, "cu_seqlens"), ({"cu_seqlens": torch.tensor([0.0, 12.0])}, "cu_seqlens"),
    ({"cu_seqlens": np.array([0.0, 12.0])}, "cu_seqlens"), ({"cu_seqlens": np.array([0, 11])}, "cu_seqlens"),
    ({"cu_seqlens": []}, "cu_seqlens"), ({"backend": "cuda"}, "backend"), ({"chunk_size": 0}, "chunk_size")])
def test_bad_scan_input_is_named(change, named):
    with pytest.raises(ValueError, match=f"^{named}: got .* expected"):
        s.ssd_scan(**(small() | change))

@pytest.mark.parametrize("change", [
    {"weight": zeros(2, 4)}, {"bias": zeros(4)}, {"x": zeros(4, 3)}, {"x": zeros(0, 4, 3)},
    {"activation": "relu"}, {"backend": "cuda"}, {"cu_seqlens": [0, 4]}, {"initial_states": zeros(1, 3, 3)}])
def test_bad_convolution_input_is_named(change):
    with pytest.raises(ValueError, match=f"^{next(iter(change))}: got .* expected"):
        s.causal_conv1d(**({"x": zeros(2, 4, 3), "weight": zeros(3, 4)} | change))

def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    with pytest.raises(ValueError, match="^backend: got .*float64"):
        s.ssd_scan(**{k: v.double() for k, v in small().items()}, backend="triton")
    with pytest.raises(ValueError, match="^x: got 257 channels per head, expected at most 256"):
        s.ssd_scan(**small(DEVICE, p=257), dt_softplus=True, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="^backend: got .* expected .*GPU"):
        s.ssd_scan(**small(), backend="triton")

def test_chunk_tables_by_hand():
    table = s.chunk_table((0, 5, 6, 10), 4, torch.device("cpu"))
    assert [v.tolist() for v in table] == [[0, 4, 5, 6], [5, 1, 1, 4], [0, 2, 3, 4]]

def test_tables_go_to_a_device_together_each_at_a_multiple_of_16_bytes():
    tensors = [torch.arange(3), torch.arange(4).view(2, 2), torch.arange(17)]
    parts = s.to_device(tensors, torch.device("meta"))
    assert [part.shape for part in parts] == [v.shape for v in tensors]
    assert len({id(part._base) for part in parts}) == 1
    assert [part.storage_offset() * part.itemsize % 16 for part in parts] == [0, 0, 0]
    assert s.to_device(tensors, torch.device("cpu")) is tensors

# 2. The Triton kernels, in Triton's interpreter where there is no GPU (see conftest.py) ---------------------

def poisoned(*args, new_empty=torch.Tensor.new_empty, **options):
    """Tensor.new_empty, but new memory holds NaN, so that reading what no kernel has written shows."""
    v = new_empty(*args, **options)
    return v.fill_(torch.nan) if v.is_floating_point() else v

class Poisoned:
    """torch with such an `empty`, for the kernels of decode.py."""
    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *args, **kwargs):
        size = args if isinstance(args[0], int) else tuple(args[0])
        return torch.full(size, torch.nan, **kwargs)

@pytest.fixture
def interpreter(monkeypatch):
    """Memory full of NaN; and two corrections of Triton's interpreter, which keeps bfloat16 as its 16 bits:
    tl.dot multiplies those bits as integers, and the cast from float32 cuts instead of rounding."""
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    if DEVICE == "cuda":
        return
    from triton.runtime.interpreter import InterpreterBuilder as Builder, TensorHandle

    def widen(v):
        if v.dtype.scalar != tl.bfloat16:
            return v
        return TensorHandle((v.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast(self, source, target, original=Builder.cast_impl):
        if target.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(source.data, np.float32))
            return TensorHandle(values.bfloat16().view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        source = widen(source) if target.scalar != tl.bfloat16 else source
        return original(self, source, target) if source.dtype.scalar != target.scalar else source

    dot = Builder.create_dot
    monkeypatch.setattr(Builder, "create_dot", lambda self, a, b, *rest: dot(self, widen(a), widen(b), *rest))
    monkeypatch.setattr(Builder, "cast_impl", cast)

def triton_errors(shape, cu, chunk, *, decay=1.0, dtype=torch.float32):
    inputs = small(DEVICE, **shape)
    inputs["A"] *= decay
    inputs |= {k: inputs[k].to(dtype) for k in PER_TOKEN}
    return relative_errors(inputs, backend="triton", cu_seqlens=cu, chunk_size=chunk)

TILES = dict(b=1, t=100, h=2, p=40, g=1, n=72, states=1), None, 128  # more than one tile of every kind
PACKED = dict(b=1, t=125, h=4, p=16, g=2, n=32, states=5), [0, 1, 65, 66, 92, 125], 32
ODD = dict(b=2, t=37, h=3, p=24, g=1, n=40), None, 32
TINY = dict(b=1, t=3, h=3, p=1, g=3, n=1), [0, 1, 3], 1

@pytest.mark.parametrize(("case", "decay"), [
    (TILES, 1.0), (TILES, 100.0), (PACKED, 1.0), (ODD, 1.0), (TINY, 1e-3)])
def test_triton_scan_at_the_edges(interpreter, case, decay):
    errors = triton_errors(*case, decay=decay)
    assert all(e < 2e-6 for e in errors.values()), errors

def test_triton_cancels_sums_over_a_long_chunk(interpreter):
    """In float32, sums of rows and columns left 5e-5 in dA: they cancel but for what crosses a step."""
    errors = triton_errors(dict(b=1, t=512, h=2, p=16, g=1, n=16), None, 512)
    assert max(errors.values()) < 5e-6, errors

def test_triton_scan_in_bfloat16(interpreter):
    errors = triton_errors(*PACKED, dtype=torch.bfloat16)
    assert errors.pop("y") < 3e-3 and max(errors.values()) < 1e-2, errors

def test_triton_with_the_tiles_of_a_hopper(interpreter, monkeypatch):
    """128 x 128 with boundaries 64 apart, unlike the interpreter's own; float16 has the digits to tell."""
    monkeypatch.setattr(s, "_tiling", lambda *shape, tiling=s._tiling: tiling(*shape[:4], 227 * 1024))
    shape = dict(b=1, t=270, h=2, p=24, g=1, n=72, states=3)
    errors = triton_errors(shape, [0, 1, 70, 270], 512, dtype=torch.float16)
    assert all(e < (5e-3 if name == "dA" else 2e-3) for name, e in errors.items()), errors

def in_four_calls(initial_states, **inputs):
    """ssd_scan of 4 x 16 tokens, handing on the state."""
    state, ys = initial_states, []
    for cuts in zip(*(inputs.pop(k).split(16, 1) for k in PER_TOKEN)):
        y, state = s.ssd_scan(**dict(zip(PER_TOKEN, cuts)), **inputs, initial_states=state)
        ys.append(y)
    return torch.cat(ys, 1), state

def test_triton_in_four_calls_gives_the_bits_of_one_and_one_the_same_bits_twice(interpreter):
    inputs = small(DEVICE, t=64, p=16, n=24, states=1)
    scans = s.ssd_scan, s.ssd_scan, in_four_calls
    options = dict(dt_softplus=True, chunk_size=16, backend="triton")
    results = (outputs_and_gradients(inputs, scan, **options) for scan in scans)
    for name, whole, again, chained in zip(["y", "S", *inputs], *results):
        assert torch.equal(whole, again), name
        if name in ("A", "D", "dt_bias"):  # sums over the calls
            torch.testing.assert_close(whole, chained, rtol=1e-6, atol=1e-6 * float(whole.abs().max()))
        else:
            assert torch.equal(whole, chained), name

def far_apart(v):
    """v (1, t, ...) with its tokens 2^30 elements apart: only the pages with tokens exist."""
    t, width, stride = v.shape[1], v[0, 0].numel(), 2**30
    storage = torch.UntypedStorage(4 * ((t - 1) * stride + width), device=DEVICE)
    far = torch.tensor([], dtype=torch.float32, device=DEVICE)
    return far.set_(storage, 0, v.shape, (t * stride, stride, *v[0, 0].stride())).copy_(v)

def test_triton_reaches_beyond_32_bits(interpreter):
    inputs = small(DEVICE, t=4, p=16, n=16)
    leaves = {k: (far_apart(v) if k in ("x", "B", "C") else v).requires_grad_() for k, v in inputs.items()}
    assert (leaves["x"].stride(1) * 3).bit_length() > 31
    y, S = s.ssd_scan(**leaves, dt_softplus=True, backend="triton")
    (y.sin().sum() + S.sin().sum()).backward()
    expected = outputs_and_gradients(inputs, dt_softplus=True, backend="recurrent")
    torch.testing.assert_close([y, S, *(v.grad for v in leaves.values())], expected)
    x, weight = far_apart(inputs["x"].flatten(2)).requires_grad_(), torch.randn(32, 4, device=DEVICE)
    results = [s.causal_conv1d(x, weight, backend=backend)[0] for backend in ("triton", "torch")]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), x)[0] for y in results))

@BACKENDS
@pytest.mark.parametrize("poison", [torch.nan, 1e30])
def test_documents_do_not_leak(interpreter, backend, poison):
    inputs, keep = small(DEVICE, t=40), [i for i in range(40) if i != 17]
    options = dict(cu_seqlens=[0, 17, 18, 40], dt_softplus=True, backend=backend, chunk_size=16)
    before, S = s.ssd_scan(**inputs, **options)
    inputs["x"][:, 17] = poison
    after, S2 = s.ssd_scan(**inputs, **options)
    assert torch.equal(before[:, keep], after[:, keep]) and torch.equal(S[[0, 2]], S2[[0, 2]])

def test_triton_answers_nan_where_nothing_is_forgotten(interpreter):
    inputs = small(DEVICE)
    A, S = torch.tensor([-1.0, 0.0], device=DEVICE), torch.zeros(1, 2, 3, 4, device=DEVICE)
    y, _ = s._Scan.apply(S, (0, 12), 16, True, *(inputs[k][0] for k in PER_TOKEN), A, inputs["D"])
    assert y[:, 0].isfinite().all() and y[:, 1].isnan().all()

def test_triton_gives_a_step_of_nothing_its_gradient(interpreter):
    inputs = small(DEVICE, t=40)
    inputs["dt"] = inputs["dt"].exp()
    inputs["dt"][:, ::3] = 0
    del inputs["dt_bias"]
    results = (outputs_and_gradients(inputs, backend=backend) for backend in ("triton", "recurrent"))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)

def test_triton_sums_in_float32_whatever_the_default_dtype(interpreter, request):
    inputs = small(DEVICE, t=40)
    expected = s.ssd_scan(**inputs, dt_softplus=True, backend="triton")
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.bfloat16)
    result = s.ssd_scan(**inputs, dt_softplus=True, backend="triton")
    torch.testing.assert_close(result, expected, rtol=0, atol=0)

def test_triton_makes_states_only_where_they_are_wanted(interpreter, monkeypatch):
    inputs, shapes = small(DEVICE, t=40), []

    def new_empty(*args, **options):
        v = poisoned(*args, **options)
        shapes.append(v.shape)
        return v

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    options = dict(dt_softplus=True, cu_seqlens=(0, 10, 30, 40), chunk_size=16, backend="triton")
    gradients = []
    for wanted in (False, True):
        leaves = leaves_of(inputs)
        y, S = s.ssd_scan(**leaves, **options, return_final_states=wanted)
        gradients.append(torch.autograd.grad(y.sum(), list(leaves.values())))
        # 3 sequences in 4 chunks: states of the chunks, forward and backward; of sequences only if wanted.
        assert shapes.count((4, 2, 3, 4)) == 2 + 2 * wanted and shapes.count((3, 2, 3, 4)) == wanted
        assert S.shape == (3, 2, 3, 4) if wanted else S is None
    torch.testing.assert_close(*gradients, rtol=0, atol=0)

def test_triton_compiles_into_one_graph():
    inputs, weight = small(DEVICE, t=20), torch.randn(6, 4, device=DEVICE)
    options = dict(cu_seqlens=(0, 7, 20), backend="triton")

    def layer(x, **rest):
        x = s.causal_conv1d(x.flatten(2), weight, activation="silu", **options)[0].view(x.shape)
        return s.ssd_scan(x, **rest, dt_softplus=True, **options)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = (outputs_and_gradients(inputs, scan) for scan in (compiled, layer))
    torch.testing.assert_close(*results, rtol=0, atol=0)

# 3. The scan as mamba_ssm calls it --------------------------------------------------------------------------

def mamba_loop(x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
               dt_softplus=False, dt_limit=(0.0, torch.inf)):
    """The oracle, in float64: y and the state after every token, (b, t, h, p, n)."""
    x, dt, A, B, C, D, z, dt_bias, S = (
        v if v is None else v.double() for v in (x, dt, A, B, C, D, z, dt_bias, initial_states))
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    B, C = (v.repeat_interleave(x.shape[2] // v.shape[2], 2) for v in (B, C))
    S = 0 if S is None else S
    ys, states = [], []
    for i in range(x.shape[1]):
        if i and seq_idx is not None:
            S = S * (seq_idx[:, i] == seq_idx[:, i - 1])[:, None, None, None]
        written = torch.einsum("bh,bhp,bhn->bhpn", dt[:, i], x[:, i], B[:, i])
        S = torch.exp(dt[:, i] * A)[..., None, None] * S + written
        ys.append(torch.einsum("bhpn,bhn->bhp", S, C[:, i]))
        states.append(S)
    y = torch.stack(ys, 1)
    y = y if D is None else y + (D if D.dim() == 2 else D[:, None]) * x
    return (y if z is None else y * F.silu(z)), torch.stack(states, 1)

STARTS = [0, 9, 18]  # of the first row's documents; the second row is one

def mamba_inputs(without=(), rows=2, **changes):
    """Two rows of 20 tokens, and all tensors that may be left out."""
    inputs = small(DEVICE, b=rows, t=20, h=2, p=8, n=8, states=rows)
    inputs["z"] = inputs["x"].roll(1, 1)
    inputs["seq_idx"] = (torch.arange(20) // torch.tensor([[9], [20]]))[:rows].int().to(DEVICE)
    return {k: v for k, v in (inputs | changes).items() if k not in without}

def mamba_results(inputs, scan=s.mamba_chunk_scan_combined, **options):
    """[y, states ...] and, through the sines of both, {name: gradient}."""
    leaves = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
    out = [*scan(**leaves, return_final_states=True, **options)]
    if "cu_seqlens" not in inputs:  # mamba_ssm has no gradient then
        sum(v.sin().sum() for v in out).backward()
    return [v.detach() for v in out], {k: v.grad for k, v in leaves.items() if v.grad is not None}

def check_close(ours, theirs, output, gradient):
    """The largest difference, relative to the largest number."""
    (out, gradients), (their_out, their_gradients) = ours, theirs
    assert len(out) == len(their_out) and gradients.keys() == their_gradients.keys()
    rows = [(i, a, b, output) for i, (a, b) in enumerate(zip(out, their_out))]
    rows += [(name, gradients[name], b, gradient) for name, b in their_gradients.items()]
    for name, a, b, limit in rows:
        assert a.shape == b.shape and (a - b).abs().max() < limit * b.abs().max(), name

PER_CHANNEL = torch.linspace(-2, 2, 16, device=DEVICE).view(2, 8)
FORGETS_NOTHING = torch.tensor([-1.0, 0.0], device=DEVICE)
MAMBA_CASES = {  # what is left out, what differs, options
    "bare": (("D", "z", "dt_bias", "initial_states", "seq_idx"), {}, {}),
    "D": (("z", "dt_bias", "initial_states", "seq_idx"), {}, {}),
    "D per channel": (("z", "seq_idx"), {"D": PER_CHANNEL}, {}),
    "z": (("D", "seq_idx"), {}, {}),
    "no softplus": (("z", "seq_idx"), {"dt": torch.randn(2, 20, 2, device=DEVICE)}, {"dt_softplus": False}),
    "dt_limit": (("z", "seq_idx"), {}, {"dt_limit": [0.1, 0.2]}),
    "initial_states": (("D", "z", "seq_idx"), {}, {}),
    "seq_idx": (("D", "z", "initial_states"), {}, {}),
    "a head that forgets nothing": (("D", "z", "seq_idx"), {"A": FORGETS_NOTHING}, {}),
    "all": ((), {"A": FORGETS_NOTHING, "D": PER_CHANNEL}, {"dt_limit": (0.1, 0.4)})}

@pytest.mark.parametrize(("backend", "case"), [*itertools.product(["torch"], MAMBA_CASES), ("triton", "all")])
def test_mamba_scan_is_a_loop(interpreter, monkeypatch, backend, case):
    monkeypatch.setattr(s, "ssd_scan", partial(s.ssd_scan, backend=backend))
    without, changes, options = MAMBA_CASES[case]
    inputs, options = mamba_inputs(without, **changes), {"dt_softplus": True} | options

    def loop(return_final_states, **inputs):
        y, states = mamba_loop(**inputs)
        return y, states[:, -1]

    ours = mamba_results(inputs, chunk_size=8, **options)
    check_close(ours, mamba_results(inputs, loop, **options), 1e-6, 1e-5)
    assert [v.dtype for v in ours[0]] == [torch.float32] * 2
    assert torch.equal(s.mamba_chunk_scan_combined(**inputs, chunk_size=8, **options), ours[0][0])

@pytest.mark.parametrize("without", [(), ("seq_idx",)])
def test_mamba_scan_gives_the_state_at_the_end_of_every_document(without):
    """cu_seqlens says the same as seq_idx, which may be left out."""
    inputs = mamba_inputs(rows=1)
    _, states = mamba_loop(**inputs, dt_softplus=True)
    inputs = {k: v for k, v in inputs.items() if k not in without}
    cu = torch.tensor([*STARTS, 20], device=DEVICE)
    scan = partial(s.mamba_chunk_scan_combined, **inputs, cu_seqlens=cu, chunk_size=8, dt_softplus=True)
    y, final, varlen = scan(return_varlen_states=True, return_final_states=True)
    torch.testing.assert_close([final, varlen], [states[:, -1].float(), states[0, [8, 17, 19]].float()])
    torch.testing.assert_close(scan(return_varlen_states=True), (y, varlen), rtol=0, atol=0)

def test_mamba_scan_ignores_cu_seqlens_that_no_flag_asks_for():
    scan = partial(s.mamba_chunk_scan_combined, **mamba_inputs(), chunk_size=8)
    assert torch.equal(scan(), scan(cu_seqlens=[3]))

def test_mamba_scan_takes_its_arguments_by_position():
    names = ("x", "dt", "A", "B", "C", "chunk_size", "D", "z", "dt_bias", "initial_states", "seq_idx",
             "cu_seqlens", "dt_softplus", "dt_limit", "return_final_states", "return_varlen_states")
    values = mamba_inputs() | {
        "chunk_size": 8, "cu_seqlens": None, "dt_softplus": True, "dt_limit": (0.1, 0.3),
        "return_final_states": True, "return_varlen_states": False}
    results = s.mamba_chunk_scan_combined(*(values[k] for k in names)), s.mamba_chunk_scan_combined(**values)
    torch.testing.assert_close(*results, rtol=0, atol=0)

def test_mamba_scan_of_mixed_dtypes():
    """y in x's dtype, states in float32, every gradient in its input's dtype."""
    dtypes = dict.fromkeys(("x", "C", "D", "initial_states"), torch.bfloat16) | {"dt": torch.float16}
    inputs = {k: v.to(dtypes.get(k, v.dtype)) for k, v in mamba_inputs().items()}
    y, states = mamba_loop(**(inputs | {"B": inputs["B"].bfloat16()}), dt_softplus=True)
    (ours, final), gradients = mamba_results(inputs, chunk_size=8, dt_softplus=True)
    assert ours.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert all(gradients[k].dtype == v.dtype for k, v in inputs.items() if k != "seq_idx")
    assert (ours - y).norm() < 2**-7 * y.norm()
    assert (final - states[:, -1]).norm() < 1e-6 * final.norm()

VARLEN = {"return_varlen_states": True}

@pytest.mark.parametrize(("change", "named"), [
    ({"x": zeros(1, 20, 2)}, "x"), ({"x": zeros(1, 0, 2, 8)}, "x"), ({"B": zeros(2, 10, 1, 8)}, "B"),
    ({"x": zeros(0, 20, 2, 8)}, "x"), ({"B": zeros(8)}, "B"),
    ({"C": zeros(2, 10, 1, 8)}, "C"), ({"dt": zeros(1, 20, 1)}, "dt"), ({"dt_bias": zeros(1)}, "dt_bias"),
    ({"A": torch.ones(2)}, "A"), ({"D": zeros(2, 1)}, "D"), ({"D": zeros(3)}, "D"),
    ({"z": zeros(1, 20, 16)}, "z"), ({"initial_states": zeros(3, 2, 8, 8)}, "initial_states"),
    ({"seq_idx": zeros(20).int()}, "seq_idx"), ({"chunk_size": 0}, "chunk_size"),
    (VARLEN | {"cu_seqlens": None}, "seq_idx"), (VARLEN | {"cu_seqlens": [0, 20]}, "seq_idx"),
    (VARLEN | {"cu_seqlens": [0, 9, 18]}, "cu_seqlens"),
    (VARLEN | mamba_inputs() | {"cu_seqlens": [0, 20]}, "cu_seqlens")])
def test_bad_mamba_input_is_named(change, named):
    inputs = mamba_inputs(("z", "initial_states"), rows=1) | {"chunk_size": 8} | change
    with pytest.raises(ValueError, match=f"^{named}: got .* expected"):
        s.mamba_chunk_scan_combined(**{k: v.cpu() if torch.is_tensor(v) else v for k, v in inputs.items()})

@pytest.fixture
def mamba_ssm(monkeypatch):
    """mamba_ssm's own function in Triton's interpreter, with one configuration per kernel, and without its
    package's __init__, which imports the compiled extension."""
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None or DEVICE == "cuda":
        pytest.skip("mamba_ssm is not installed, or would multiply in TF32")
    package = types.ModuleType("mamba_ssm")
    package.__path__ = spec.submodule_search_locations
    monkeypatch.setitem(sys.modules, "mamba_ssm", package)
    monkeypatch.setenv("MAMBA_DETERMINISTIC", "1")
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    one = types.SimpleNamespace(multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: one)
    return importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined

@pytest.mark.parametrize("case", ["D", "all", "varlen"])
def test_mamba_scan_is_that_of_mamba_ssm(mamba_ssm, case):
    if case == "varlen":
        inputs = mamba_inputs(("initial_states",), 1, cu_seqlens=torch.tensor([*STARTS, 20]))
        options = VARLEN
    else:
        without, changes, options = MAMBA_CASES[case]
        inputs = mamba_inputs(without, **changes)
    options = options | {"chunk_size": 16, "dt_softplus": True}
    check_close(mamba_results(inputs, **options), mamba_results(inputs, mamba_ssm, **options), 1e-5, 1e-4)

TRANSFORMERS = """
import torch, ssm_scan
from transformers import FalconH1Config, FalconH1ForCausalLM
from transformers.models.falcon_h1 import modeling_falcon_h1 as module
torch.manual_seed(0)
model = FalconH1ForCausalLM(FalconH1Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16,
    mamba_chunk_size=16, mamba_rms_norm=False))
for p in model.parameters():
    p.data += 0.2 * torch.randn_like(p)
scan, calls, results = ssm_scan.ssd_scan, [], []
ssm_scan.ssd_scan = lambda *args, **options: calls.append(1) or scan(*args, **options)
for module.mamba2_chunk_scan in (module.mamba2_chunk_scan, module.mamba2_chunk_scan.__wrapped__):
    logits = model(torch.arange(60).view(2, 30)).logits
    results.append([logits, *torch.autograd.grad(logits.sin().sum(), list(model.parameters()))])
assert len(calls) == 2, calls  # one per layer, and none with transformers' own function
for ours, theirs in zip(*results):
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
"""

def test_transformers_takes_it_from_a_file_of_one_line(tmp_path):
    pytest.importorskip("transformers", minversion="5.15")
    (tmp_path / "mamba_ssm.py").write_text("from ssm_scan import mamba_chunk_scan_combined\n")
    path = os.pathsep.join([str(tmp_path), str(Path(s.__file__).parent), *sys.path])
    subprocess.run([sys.executable, "-c", TRANSFORMERS], env=os.environ | {"PYTHONPATH": path}, check=True)

# 4. The convolution -----------------------------------------------------------------------------------------

def conv_inputs(lengths, d, k, without=()):
    torch.manual_seed(0)
    cu = [0, *itertools.accumulate(lengths)]
    shapes = {"x": (1, cu[-1], d), "weight": (d, k), "bias": (d,), "initial_states": (len(lengths), d, k - 1)}
    return {name: torch.randn(shape).to(DEVICE) for name, shape in shapes.items() if name not in without}, cu

def conv_loop(x, weight, bias=None, initial_states=None, *, cu_seqlens, activation, backend):
    """The oracle: one token after another, with its k inputs side by side."""
    (d, k), ys, finals = weight.shape, [], []
    for i, (start, end) in enumerate(zip(cu_seqlens, cu_seqlens[1:])):
        window = x.new_zeros(d, k - 1) if initial_states is None else initial_states[i]
        for j in range(start, end):
            window = torch.cat([window, x[0, j, :, None]], 1)
            y = (window[:, -k:] * weight).sum(1) + (0 if bias is None else bias)
            ys.append(F.silu(y) if activation else y)
        finals.append(window[:, window.shape[1] - k + 1 :])
    return torch.stack(ys)[None], torch.stack(finals)

def conv_results(inputs, backend, dtype=torch.float32, conv=None, activation="silu", **options):
    """y, the final states, and every input's gradient through both, of gradients exact in bfloat16."""
    leaves = {k: v.detach().to(dtype).clone().requires_grad_() for k, v in inputs.items()}
    y, final = (conv or s.causal_conv1d)(**leaves, activation=activation, backend=backend, **options)
    torch.manual_seed(1)
    grads = [torch.randn(v.shape).bfloat16().to(v) for v in (y, final)]
    torch.autograd.backward([y, final], grads)
    return {"y": y, "final": final} | {k: v.grad for k, v in leaves.items() if v.grad is not None}

@settings(max_examples=25, derandomize=True)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 5),
       st.sampled_from([None, "silu"]), st.sets(st.sampled_from(["bias", "initial_states"])))
def test_convolution_is_a_loop(lengths, k, activation, without):
    inputs, cu = conv_inputs(lengths, 3, k, without)
    options = dict(dtype=torch.float64, activation=activation, cu_seqlens=cu)
    results = (conv_results(inputs, "torch", conv=conv, **options) for conv in (None, conv_loop))
    torch.testing.assert_close(*results)

@pytest.mark.parametrize(("lengths", "k", "d", "without"), [
    ([127, 128, 129, 1], 4, 5, ()),  # one token less than a block, a block, one token more
    ([130, 2], 5, 3, ("bias",)),  # the last block has fewer tokens than the previous one must look ahead
    ([5, 1, 9], 4, 300, ("initial_states",)),  # more than one tile of channels in both directions
    ([3, 13], 8, 16, ("bias", "initial_states")),  # more taps than tokens
    ([2, 1], 1, 3, ())])  # one tap has no history
def test_triton_convolution(interpreter, lengths, k, d, without):
    inputs, cu = conv_inputs(lengths, d, k, without)
    ours = conv_results(inputs, "triton", cu_seqlens=cu)
    oracle = conv_results(inputs, "torch", torch.float64, cu_seqlens=cu)
    torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-5, check_dtype=False)

def test_triton_convolution_in_bfloat16(interpreter):
    inputs, cu = conv_inputs([133, 1, 2], 24, 4)
    inputs = {k: v.bfloat16() for k, v in inputs.items()}
    ours = conv_results(inputs, "triton", torch.bfloat16, cu_seqlens=cu)
    for name, oracle in conv_results(inputs, "torch", torch.float64, cu_seqlens=cu).items():
        assert ours[name].dtype == torch.bfloat16
        assert (ours[name] - oracle).norm() < 2**-8 * oracle.norm(), name  # only results are rounded

@pytest.mark.parametrize("offset", [5, 8])  # elements: 10 bytes allow no wide load, 16 do
def test_triton_convolution_of_a_slice(interpreter, offset):
    inputs, cu = conv_inputs([9, 3], 16, 4)
    own, weight = inputs["x"].bfloat16(), inputs["weight"].bfloat16()
    row = torch.full((1, 12, 32), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    row[..., offset : offset + 16] = own
    results = []
    for x in (row[..., offset : offset + 16], own):
        leaf = x.detach().requires_grad_()
        y, final = s.causal_conv1d(leaf, weight, cu_seqlens=cu, backend="triton")
        y.backward(own)
        results.append((y, final, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))

def test_triton_convolution_in_four_calls_gives_the_bits_of_one(interpreter):
    inputs, _ = conv_inputs([150], 20, 4)
    x, weight, bias, state = (v.bfloat16() for v in inputs.values())
    options, lengths = dict(activation="silu", backend="triton"), [1, 130, 2, 17]
    y, final = s.causal_conv1d(x, weight, bias, initial_states=state, **options)
    for part, expected in zip(x.split(lengths, 1), y.split(lengths, 1)):
        ours, state = s.causal_conv1d(part, weight, bias, initial_states=state, **options)
        assert torch.equal(ours, expected)
    assert torch.equal(state, final)

@BACKENDS
def test_convolution_does_not_leak(interpreter, backend):
    inputs, cu = conv_inputs([5, 1, 20], 3, 4)
    before = conv_results(inputs, backend, cu_seqlens=cu)
    inputs["x"][:, 5], inputs["initial_states"][1] = torch.nan, torch.nan
    after = conv_results(inputs, backend, cu_seqlens=cu)
    others = [i for i in range(26) if i != 5]
    assert all(torch.equal(before[k][:, others], after[k][:, others]) for k in ("y", "x"))
    assert all(torch.equal(before[k][[0, 2]], after[k][[0, 2]]) for k in ("final", "initial_states"))

def test_triton_convolution_copies_its_input_only_for_a_history(interpreter, monkeypatch):
    inputs, cu = conv_inputs([5, 1], 3, 4)
    seen, launch = [], s._launch
    monkeypatch.setattr(s, "_launch", lambda *args, **sizes: (seen.append(args[2]), launch(*args, **sizes)))
    for case in (inputs, inputs | {"initial_states": None}):
        s.causal_conv1d(**case, cu_seqlens=cu, backend="triton")
    assert [v.data_ptr() == inputs["x"].data_ptr() for v in seen] == [False, True]

@BACKENDS
def test_convolution_of_bfloat16_with_weights_in_float32(interpreter, backend):
    """Everything that is handed on has x's dtype, and every gradient its input's."""
    inputs, cu = conv_inputs([5, 1], 3, 4)
    inputs["x"] = inputs["x"].bfloat16()
    leaves = leaves_of(inputs)
    y, final = s.causal_conv1d(**leaves, cu_seqlens=cu, activation="silu", backend=backend)
    y.float().sum().backward()
    step, _ = s.causal_conv1d_step(final.detach().clone(), inputs["x"][:, :2].view(2, 3), inputs["weight"])
    assert {v.dtype for v in (y, final, step)} == {torch.bfloat16}
    oracle = s.causal_conv1d(**{k: v.double() for k, v in inputs.items()}, cu_seqlens=cu, activation="silu",
                             backend="torch")[0]
    assert (y - oracle).norm() < 2**-8 * oracle.norm()
    assert all(v.grad.dtype == inputs[k].dtype for k, v in leaves.items())

@BACKENDS
def test_convolution_without_final_states(interpreter, backend):
    inputs, cu = conv_inputs([5, 1], 3, 4)
    options = dict(cu_seqlens=cu, activation="silu", backend=backend)
    y, _ = s.causal_conv1d(**inputs, **options)
    alone, final = s.causal_conv1d(**inputs, **options, return_final_states=False)
    assert torch.equal(alone, y) and final is None

@BACKENDS
def test_convolution_steps(interpreter, backend):
    x, w, state = (torch.randn(shape, device=DEVICE) for shape in ((2, 6, 3), (3, 4), (2, 3, 3)))
    y, last = s.causal_conv1d(x, w, initial_states=state, activation="silu", backend=backend)
    for grad in (True, False):
        now, w = state.clone(), w.requires_grad_(grad)
        steps = [s.causal_conv1d_step(now, x[:, i], w, activation="silu")[0] for i in range(6)]
        torch.testing.assert_close(torch.stack(steps, 1), y)
        assert torch.equal(now, last)

@pytest.mark.parametrize("function", ["scan", "convolution"])
@BACKENDS
def test_no_second_derivative_goes_missing(interpreter, backend, function):
    """The incoming gradient is constant: torch's once_differentiable would return that of the cubes alone."""
    v = torch.rand(1, 5, 1, device=DEVICE, requires_grad=True)
    four = v[..., None]
    if function == "scan":
        y, _ = s.ssd_scan(four, v, torch.tensor([-1.0], device=DEVICE), four, four, backend=backend)
    else:
        y, _ = s.causal_conv1d(v, v[0, :2].T, activation="silu", backend=backend)
    with pytest.raises(ValueError, match="create_graph: got True"):
        torch.autograd.grad(y.sum() + v.pow(3).sum(), v, create_graph=True)

# 5. What a GPU will make of the kernels ---------------------------------------------------------------------

@pytest.mark.parametrize("path", [None, *filter(None, [os.environ.get("TRITON_3_6")])])
@pytest.mark.parametrize("capability", list(SHARED) if "TRITON_3_6" in os.environ else [90])
def test_triton_compiles_ahead_of_time(capability, path):
    """All kernels at the 7B model's shape. Where CI names a folder with Triton 3.6, with both versions, and
    for older and newer GPUs."""
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run([sys.executable, script, str(capability)], stdout=subprocess.PIPE, check=True,
                         env=os.environ | ({"PYTHONPATH": path} if path else {}))
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) == 22
    for row in rows:
        assert row["tensor_core"] >= row["dots"] and row["scalar_products"] == 0, row
        assert row["stack"] <= 32 and row["shared"] <= SHARED[capability] * 1024, row
        assert row["unfinished"] == 0, row
        assert row["narrow_loads"] == 0 or row["kernel"].split()[0] not in ("scan", "dcb", "dbc"), row

def on_a_gpu(t, **more):
    """Inputs of the 7B's mixer in bfloat16."""
    inputs = random_inputs(1, t, 24, 128, 1, 256, device="cuda", **more)
    return {k: v.detach().to(torch.bfloat16 if k in PER_TOKEN else torch.float32) for k, v in inputs.items()}

@pytest.mark.gpu
def test_triton_on_a_gpu_gives_the_same_bits_twice():
    inputs, options = on_a_gpu(3000, states=3), dict(backend=None, cu_seqlens=(0, 1, 2000, 3000))
    first, second = scan_results(inputs, **options), scan_results(inputs, **options)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert max(relative_errors(inputs, oracle="torch", **options).values()) < 1e-2

@pytest.mark.gpu
@pytest.mark.parametrize("t", [1, 20, 40, 100, 200])
def test_short_rows_have_short_tiles(t):
    """8 warps for a tile of 32 rows: Triton 3.6 read 8 bytes at an address that is a multiple of 4."""
    assert max(relative_errors(on_a_gpu(t), backend=None, oracle="torch").values()) < 1e-2
