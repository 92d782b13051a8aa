"""The chunked scan, the convolution and their steps against the definition, on every shape that has an edge."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import decode
import ssm_scan as s
from tests.compile_kernels import executed
from tests.bench import random_inputs, relative_errors

SLOW = settings(deadline=None, max_examples=50, derandomize=True)


def small(**changes):
    shape = {"b": 1, "t": 12, "h": 2, "p": 3, "g": 1, "n": 4} | changes
    return {k: v.detach() for k, v in random_inputs(**shape).items()}


def test_two_tokens_by_hand():
    # One head, p = n = 1, D = 10. S1 = 0.5 * 2 * 3 = 3, y1 = 3 * 1 + 20; S2 = e^-1 S1 + 1 * 4 * 1, y2 = 2 S2 + 40.
    def column(*values):
        return torch.tensor(values, dtype=torch.float64).view(1, 2, 1, 1)
    for backend in ("recurrent", "torch"):
        y, S = s.ssd_scan(column(2, 4), torch.tensor([[[0.5], [1.0]]]).double(), torch.tensor([-1.0]), column(3, 1), column(1, 2),
                          D=torch.tensor([10.0]), backend=backend)
        S2 = 3 * torch.exp(torch.tensor(-1.0)).item() + 4
        assert S.item() == pytest.approx(S2)
        assert y.flatten().tolist() == pytest.approx([23, 2 * S2 + 40])


@st.composite
def scans(draw):
    """Shapes with every kind of edge: ragged, packed, length 1, sizes that are no powers of two."""
    g = draw(st.integers(1, 3))
    shape = {"h": g * draw(st.integers(1, 3)), "p": draw(st.integers(1, 9)), "g": g, "n": draw(st.integers(1, 9))}
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=5))
        cu = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        shape |= {"b": 1, "t": cu[-1], "states": len(lengths) if draw(st.booleans()) else None}
    else:
        cu, b = None, draw(st.integers(1, 3))
        shape |= {"b": b, "t": draw(st.integers(1, 40)), "states": b if draw(st.booleans()) else None}
    return shape, cu, draw(st.integers(1, 40)), draw(st.sampled_from([1.0, 100.0, 1e-3]))


@SLOW
@given(scans())
def test_chunked_scan_is_the_recurrence(case):
    shape, cu, chunk, decay = case
    inputs = random_inputs(**shape)
    inputs["A"] = (inputs["A"] * decay).detach()
    errors = relative_errors(inputs, cu_seqlens=cu, chunk_size=chunk)
    # dA adds up tokens of both signs: where they cancel, down to a single number here, it has fewer digits of its own size.
    assert all(e < (1e-4 if name == "dA" else 1e-5) for name, e in errors.items()), errors


def test_chunked_scan_in_float64():
    inputs = {k: v.double() for k, v in random_inputs(1, 33, 4, 3, 2, 5, states=3).items()}
    assert max(relative_errors(inputs, cu_seqlens=[0, 1, 20, 33], chunk_size=8).values()) < 1e-12


@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_documents_do_not_leak(poison):
    inputs, cu = small(t=12), [0, 5, 6, 12]
    before, S = s.ssd_scan(**inputs, cu_seqlens=cu, chunk_size=4)
    inputs["x"][:, 5] = poison
    after, S2 = s.ssd_scan(**inputs, cu_seqlens=cu, chunk_size=4)
    keep = [i for i in range(12) if i != 5]
    assert torch.equal(before[:, keep], after[:, keep]) and torch.equal(S[[0, 2]], S2[[0, 2]])
    x, w = torch.randn(1, 12, 3), torch.randn(3, 4)
    y, last = s.causal_conv1d(x, w, cu_seqlens=cu)
    x[:, 5] = poison
    y2, last2 = s.causal_conv1d(x, w, cu_seqlens=cu)
    assert torch.equal(y[:, keep], y2[:, keep]) and torch.equal(last[[0, 2]], last2[[0, 2]])


def test_steps_are_the_scan():
    inputs = small(b=2, t=7, states=2)
    y, S = s.ssd_scan(**inputs, dt_softplus=True)
    state = inputs.pop("initial_states")
    per_token = {k: inputs.pop(k) for k in ("x", "dt", "B", "C")}
    with torch.no_grad():
        steps = [s.ssd_step(state, **{k: v[:, i] for k, v in per_token.items()}, **inputs, dt_softplus=True)[0] for i in range(7)]
    torch.testing.assert_close(torch.stack(steps, 1), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, S, rtol=1e-5, atol=1e-5)  # in place


def test_step_has_gradients():
    state, x = torch.randn(1, 1, 2, 2, requires_grad=True), torch.ones(1, 1, 2)
    y, new = s.ssd_step(state, x, torch.ones(1, 1), torch.tensor([-1.0]), torch.ones(1, 1, 2), torch.ones(1, 1, 2))
    y.sum().backward()
    torch.testing.assert_close(state.grad, torch.full((1, 1, 2, 2), -1.0).exp())  # dy / dS = exp(dt A) C
    assert new is not state


@SLOW
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 5), st.booleans(), st.booleans())
def test_convolution_is_a_loop(lengths, k, with_states, silu):
    d, cu = 3, [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    torch.manual_seed(0)
    x, w, bias = torch.randn(1, cu[-1], d).double(), torch.randn(d, k).double(), torch.randn(d).double()
    states = torch.randn(len(lengths), d, k - 1).double() if with_states else torch.zeros(len(lengths), d, k - 1).double()
    leaves = [v.clone().requires_grad_() for v in (x, w, bias, states)]
    twins = [v.clone().requires_grad_() for v in (x, w, bias, states)]
    y, final = s.causal_conv1d(*leaves[:3], initial_states=leaves[3], cu_seqlens=cu, activation="silu" if silu else None)
    rows, finals = [], []
    for i, (start, end) in enumerate(zip(cu, cu[1:])):
        window = twins[3][i]
        for j in range(start, end):
            window = torch.cat([window, twins[0][0, j, :, None]], 1)
            out = (window[:, -k:] * twins[1]).sum(1) + twins[2]
            rows.append(torch.nn.functional.silu(out) if silu else out)
        finals.append(window[:, window.shape[1] - k + 1 :])
    expected, last = torch.stack(rows)[None], torch.stack(finals)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(final, last)
    (y.square().sum() + final.sin().sum()).backward()
    (expected.square().sum() + last.sin().sum()).backward()
    for a, b in zip(leaves, twins):
        torch.testing.assert_close(a.grad if a.grad is not None else torch.zeros_like(a), b.grad if b.grad is not None else
                                   torch.zeros_like(b))


def test_convolution_steps():
    x, w, state = torch.randn(2, 6, 3), torch.randn(3, 4), torch.zeros(2, 3, 3)
    y, last = s.causal_conv1d(x, w, activation="silu")
    with torch.no_grad():
        steps = [s.causal_conv1d_step(state, x[:, i], w, activation="silu")[0] for i in range(6)]
    torch.testing.assert_close(torch.stack(steps, 1), y)
    assert torch.equal(state, last)


@pytest.mark.parametrize(("change", "named"), [
    ({"x": torch.zeros(1, 0, 2, 3)}, "x"), ({"x": torch.zeros(1, 2, 3)}, "x"), ({"dt": torch.zeros(1, 12, 3)}, "dt"),
    ({"A": -torch.ones(3)}, "A"), ({"A": torch.zeros(2)}, "A"), ({"A": torch.full((2,), float("nan"))}, "A"),
    ({"B": torch.zeros(1, 12, 2, 5)}, "C"), ({"B": torch.zeros(1, 11, 1, 4)}, "B"), ({"C": torch.zeros(1, 12, 1, 5)}, "C"),
    ({"B": torch.zeros(1, 12, 3, 4), "C": torch.zeros(1, 12, 3, 4)}, "B"), ({"D": torch.zeros(3)}, "D"),
    ({"B": torch.zeros(1, 12, 1, 4).bfloat16()}, "dtype"), ({"initial_states": torch.zeros(2, 2, 3, 4)}, "initial_states"),
    ({"cu_seqlens": [1, 12]}, "cu_seqlens"), ({"cu_seqlens": [0, 11]}, "cu_seqlens"), ({"cu_seqlens": [0, 5, 5, 12]}, "cu_seqlens"),
    ({"cu_seqlens": [0, 7, 5, 12]}, "cu_seqlens"), ({"cu_seqlens": torch.tensor([0.0, 12.0])}, "cu_seqlens"),
    ({"backend": "nonsense"}, "backend"), ({"chunk_size": 0}, "chunk_size"),
])
def test_bad_input_is_named(change, named):
    with pytest.raises(ValueError, match=f"^{named}: got .* expected"):
        s.ssd_scan(**(small() | change))


def test_packed_batches_are_refused():
    with pytest.raises(ValueError, match="cu_seqlens: got a batch of 2"):
        s.ssd_scan(**small(b=2), cu_seqlens=[0, 12])
    with pytest.raises(ValueError, match="weight"):
        s.causal_conv1d(torch.zeros(1, 4, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="activation"):
        s.causal_conv1d(torch.zeros(1, 4, 3), torch.zeros(3, 4), activation="relu")
    with pytest.raises(ValueError, match="^backend"):
        s.causal_conv1d(torch.zeros(1, 4, 3), torch.zeros(3, 4), backend="cuda")
    with pytest.raises(ValueError, match=r"^A: got \(2,\) on meta, expected \(2,\) on cpu"):
        s.ssd_scan(**small() | {"A": -torch.ones(2, device="meta")})


# --- The Triton kernels: compiled where there is a GPU, else in Triton's interpreter (conftest.py switches it on)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Poisoned:
    """torch, but new memory holds NaN, so that reading what no kernel has written shows."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *args, **kwargs):
        return torch.full(args[0] if isinstance(args[0], torch.Size) else args, torch.nan, **kwargs)

    def empty_like(self, v):
        return torch.full_like(v, torch.nan)


@pytest.fixture
def interpreter(monkeypatch):
    """Memory full of NaN; and two corrections of Triton's interpreter, which keeps bfloat16 as its 16 bits: its tl.dot multiplies
    those bits as integers, and its cast from float32 cuts instead of rounding."""
    monkeypatch.setattr(s, "torch", Poisoned())
    if DEVICE == "cuda":
        return
    from triton.runtime.interpreter import InterpreterBuilder as Builder, TensorHandle

    def widen(v):
        return TensorHandle((v.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if v.dtype.scalar == tl.bfloat16 else v

    def cast(self, source, target, original=Builder.cast_impl):
        if target.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            bits = torch.from_numpy(np.ascontiguousarray(source.data, np.float32)).bfloat16().view(torch.int16).numpy()
            return TensorHandle(bits.view(np.uint16), tl.bfloat16)
        source = widen(source) if target.scalar != tl.bfloat16 else source
        return original(self, source, target) if source.dtype.scalar != target.scalar else source

    dot = Builder.create_dot
    monkeypatch.setattr(Builder, "create_dot", lambda self, a, b, *rest: dot(self, widen(a), widen(b), *rest))
    monkeypatch.setattr(Builder, "cast_impl", cast)


def triton_errors(shape, *, decay=1.0, dtype=torch.float32, **settings):
    inputs = {k: v.detach().to(DEVICE) for k, v in random_inputs(**shape).items()}
    inputs["A"] *= decay
    inputs |= {k: inputs[k].to(dtype) for k in ("x", "dt", "B", "C")}
    return relative_errors(inputs, backend="triton", **settings)


@settings(max_examples=4, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scans())
def test_triton_scan_is_the_recurrence(interpreter, case):
    shape, cu, chunk, decay = case
    errors = triton_errors(shape, cu_seqlens=cu, chunk_size=chunk, decay=decay)
    assert all(e < 1e-5 for e in errors.values()), errors


EDGES = {
    "more than one tile of every kind": (dict(b=1, t=150, h=2, p=72, g=1, n=80, states=1), None, 128),
    "packed, 1 to 64 tokens": (dict(b=1, t=125, h=4, p=16, g=2, n=32, states=5), [0, 1, 65, 66, 92, 125], 32),
    "no power of two": (dict(b=2, t=37, h=6, p=24, g=2, n=40), None, 32),
}


@pytest.mark.parametrize(("case", "decay"), [*((case, 1.0) for case in EDGES), (next(iter(EDGES)), 100.0), (next(iter(EDGES)), 1e-3)])
def test_triton_scan_at_the_edges(interpreter, case, decay):
    shape, cu, chunk = EDGES[case]
    errors = triton_errors(shape, cu_seqlens=cu, chunk_size=chunk, decay=decay)
    assert all(e < 1e-5 for e in errors.values()), errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_scan_in_half_precision(interpreter, dtype):
    shape, cu, chunk = EDGES["packed, 1 to 64 tokens"]
    errors = triton_errors(shape, cu_seqlens=cu, chunk_size=chunk, dtype=dtype)
    assert errors.pop("y") < 5e-3 and all(e < 1e-2 for e in errors.values()), errors


def far_apart(v):
    """v (1, t, ...) with its tokens 2^30 elements apart: address space of which only the pages with tokens exist."""
    t, width, stride = v.shape[1], v[0, 0].numel(), 2**30
    storage = torch.UntypedStorage(4 * ((t - 1) * stride + width), device=DEVICE)
    far = torch.tensor([], dtype=torch.float32, device=DEVICE).set_(storage, 0, v.shape, (t * stride, stride, *v[0, 0].stride()))
    return far.copy_(v)


def test_triton_reaches_beyond_32_bits(interpreter):
    inputs = {k: v.detach().to(DEVICE) for k, v in random_inputs(b=1, t=4, h=2, p=16, g=1, n=16).items()}
    leaves = {k: (far_apart(v) if k in ("x", "B", "C") else v).requires_grad_() for k, v in inputs.items()}
    assert (leaves["x"].stride(1) * 3).bit_length() > 31
    y, S = s.ssd_scan(**leaves, dt_softplus=True, backend="triton")
    twins = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    expected, final = s.ssd_scan(**twins, dt_softplus=True, backend="recurrent")
    (y.sin().sum() + S.sin().sum()).backward()
    (expected.sin().sum() + final.sin().sum()).backward()
    torch.testing.assert_close(y, expected)
    for k in ("x", "B", "C", "A"):
        torch.testing.assert_close(leaves[k].grad, twins[k].grad)
    x, weight = far_apart(inputs["x"].flatten(2)).requires_grad_(), torch.randn(32, 4, device=DEVICE)
    results = [s.causal_conv1d(x, weight, backend=backend)[0] for backend in ("triton", "torch")]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), x)[0] for y in results))


def test_triton_documents_do_not_leak(interpreter):
    inputs, cu = {k: v.to(DEVICE) for k, v in small(t=40).items()} | {"dt_softplus": True}, [0, 17, 18, 40]
    keep = [i for i in range(40) if i != 17]
    before, S = s.ssd_scan(**inputs, cu_seqlens=cu, backend="triton")
    inputs["x"][:, 17] = torch.nan
    after, S2 = s.ssd_scan(**inputs, cu_seqlens=cu, backend="triton")
    assert torch.equal(before[:, keep], after[:, keep]) and torch.equal(S[[0, 2]], S2[[0, 2]])


def test_triton_answers_nan_where_nothing_is_forgotten(interpreter):
    inputs = {k: v.to(DEVICE) for k, v in small().items()}
    y, _ = s._scan_triton(*(inputs[k][0] for k in ("x", "dt", "B", "C")), torch.tensor([-1.0, 0.0], device=DEVICE), None,
                          torch.zeros(1, 2, 3, 4, device=DEVICE), (0, 12), 16)
    assert y[:, 0].isfinite().all() and y[:, 1].isnan().all()


def conv_inputs(lengths, d, k):
    torch.manual_seed(0)
    cu = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    shapes = {"x": (1, cu[-1], d), "weight": (d, k), "bias": (d,), "initial_states": (len(lengths), d, k - 1)}
    return {name: torch.randn(shape).to(DEVICE) for name, shape in shapes.items()}, cu


def conv_results(inputs, backend, dtype, **settings):
    """y, the final states, and every input's gradient through both, of gradients exact in bfloat16."""
    leaves = {k: v.detach().to(dtype).clone().requires_grad_() for k, v in inputs.items()}
    y, final = s.causal_conv1d(**leaves, backend=backend, **settings)
    torch.manual_seed(1)
    grads = [torch.randn(v.shape).bfloat16().to(v) for v in (y, final)]
    torch.autograd.backward([y, final], grads)
    return {"y": y, "final": final} | {k: v.grad for k, v in leaves.items()}


def assert_is_convolution(inputs, **settings):
    ours = conv_results(inputs, "triton", torch.float32, **settings)
    for name, oracle in conv_results(inputs, "torch", torch.float64, **settings).items():
        message = f"{name}: {{}}".format
        torch.testing.assert_close(ours[name].double(), oracle, rtol=1e-5, atol=1e-5, msg=message)


@settings(max_examples=6, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 5), st.integers(1, 70),
       st.booleans(), st.sampled_from([None, "silu"]), st.sets(st.sampled_from(["bias", "initial_states"])))
def test_triton_convolution(interpreter, lengths, k, d, packed, activation, without):
    inputs, cu = conv_inputs(lengths if packed else [lengths[0]] * 2, d, k)
    if not packed:
        inputs["x"], cu = inputs["x"].view(2, -1, d), None
    inputs = {name: v for name, v in inputs.items() if name not in without}
    assert_is_convolution(inputs, cu_seqlens=cu, activation=activation)


@pytest.mark.parametrize(("lengths", "k", "d"), [
    ([127, 128, 129, 1], 4, 70),  # one token less than a block, a block, one token more
    ([130, 2], 5, 3),  # the last block has fewer tokens than the previous one must look ahead
    ([131], 4, 300),  # more than one tile of channels in both directions, the last one not full
    ([3, 135], 8, 16),  # the most taps, and more of them than tokens
])
def test_triton_convolution_of_several_blocks(interpreter, lengths, k, d):
    inputs, cu = conv_inputs(lengths, d, k)
    assert_is_convolution(inputs, cu_seqlens=cu, activation="silu")


def test_triton_convolution_in_bfloat16(interpreter):
    inputs, cu = conv_inputs([140, 1, 2], 24, 4)
    inputs, options = {k: v.bfloat16() for k, v in inputs.items()}, dict(cu_seqlens=cu, activation="silu")
    ours = conv_results(inputs, "triton", torch.bfloat16, **options)
    for name, oracle in conv_results(inputs, "torch", torch.float64, **options).items():
        assert ours[name].dtype == torch.bfloat16
        assert (ours[name] - oracle).norm() < 2**-8 * oracle.norm(), name  # only results are rounded


@pytest.mark.parametrize("offset", [5, 8])  # elements: 10 bytes allow no wide load, 16 do
def test_triton_convolution_of_a_slice(interpreter, offset):
    inputs, cu = conv_inputs([9, 3], 16, 4)
    inputs = {k: v.bfloat16() for k, v in inputs.items()}
    row = torch.full((1, 12, 32), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    row[..., offset : offset + 16] = inputs["x"]
    row.requires_grad_()
    x, weight = row[..., offset : offset + 16], inputs["weight"]
    y, final = s.causal_conv1d(x, weight, cu_seqlens=cu, backend="triton")
    y.backward(inputs["x"])
    twin = inputs["x"].requires_grad_()
    y2, final2 = s.causal_conv1d(twin, weight, cu_seqlens=cu, backend="triton")
    y2.backward(inputs["x"].detach())
    assert torch.equal(y, y2) and torch.equal(final, final2)
    assert torch.equal(row.grad[..., offset : offset + 16], twin.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_convolution_in_four_calls_gives_the_bits_of_one(interpreter, dtype):
    inputs, _ = conv_inputs([280], 20, 4)
    x, weight, bias, state = (v.to(dtype) for v in inputs.values())
    options, lengths = dict(activation="silu", backend="triton"), [1, 130, 2, 147]
    y, final = s.causal_conv1d(x, weight, bias, initial_states=state, **options)
    for part, expected in zip(x.split(lengths, 1), y.split(lengths, 1)):
        ours, state = s.causal_conv1d(part, weight, bias, initial_states=state, **options)
        assert torch.equal(ours, expected)
    assert torch.equal(state, final)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_convolution_does_not_leak(interpreter, backend):
    inputs, cu = conv_inputs([5, 1, 20], 3, 4)
    before = conv_results(inputs, backend, torch.float32, cu_seqlens=cu, activation="silu")
    inputs["x"][:, 5], inputs["initial_states"][1] = torch.nan, torch.nan
    after = conv_results(inputs, backend, torch.float32, cu_seqlens=cu, activation="silu")
    others = [i for i in range(26) if i != 5]
    assert all(torch.equal(before[k][:, others], after[k][:, others]) for k in ("y", "x"))
    assert all(torch.equal(before[k][[0, 2]], after[k][[0, 2]]) for k in ("final", "initial_states"))


def test_triton_convolution_copies_its_input_only_for_a_history(interpreter, monkeypatch):
    inputs, cu = conv_inputs([5, 1], 3, 4)
    seen, launch = [], s._launch
    monkeypatch.setattr(s, "_launch", lambda *args, **sizes: (seen.append(args[2]), launch(*args, **sizes)))
    s.causal_conv1d(**inputs, cu_seqlens=cu, backend="triton")
    del inputs["initial_states"]
    s.causal_conv1d(**inputs, cu_seqlens=cu, backend="triton")
    assert [v.data_ptr() == inputs["x"].data_ptr() for v in seen] == [False, True]
    assert [len(v) for v in seen] == [6 + 2 * 3, 6]


def test_tables_go_to_a_device_together_each_at_a_multiple_of_16_bytes():
    tensors = [torch.arange(3), torch.arange(4).view(2, 2), torch.arange(17)]
    parts = s.to_device(tensors, torch.device("meta"))
    assert [part.shape for part in parts] == [v.shape for v in tensors]
    assert len({id(part._base) for part in parts}) == 1
    assert [part.storage_offset() * part.itemsize % 16 for part in parts] == [0, 0, 0]
    assert s.to_device(tensors, torch.device("cpu")) is tensors


def test_chunk_tables_by_hand():
    table = s.chunk_table((0, 5, 6, 10), 4, torch.device("cpu"))
    assert [v.tolist() for v in table] == [[0, 4, 5, 6], [4, 1, 1, 4], [0, 0, 1, 2], [0, 2, 3, 4], [0, 5, 6, 10]]
    index, valid, inverse, order, rank, alive = s._chunk_rows((0, 1, 6, 10), 3, torch.device("cpu"))
    assert index.tolist() == [[1, 2, 3], [6, 7, 8], [0, 0, 0], [4, 5, 5], [9, 9, 9]]  # sequences 1, 2, 0, then 1, 2
    assert valid.sum(1).tolist() == [3, 3, 1, 2, 1] and valid[:, 0].all()
    assert index.flatten()[inverse].tolist() == list(range(10)) and valid.flatten()[inverse].all()
    assert (order.tolist(), rank.tolist(), alive) == ([1, 2, 0], [2, 0, 1], [3, 2])


def test_triton_convolution_names_its_limit():
    x, weight = torch.zeros(1, 4, 3, device=DEVICE), torch.zeros(3, 9, device=DEVICE)
    with pytest.raises(ValueError, match='^weight: got 9 taps, expected at most 8, or backend="torch"'):
        s.causal_conv1d(x, weight, backend="triton")
    assert s.causal_conv1d(x, weight, backend="torch")[0].shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_step(interpreter, dtype):
    inputs = {k: v.to(DEVICE) for k, v in small(b=3, t=1, h=6, p=20, g=2, n=9, states=3).items()}
    state, per_token = inputs.pop("initial_states"), {k: inputs.pop(k)[:, 0].to(dtype) for k in ("x", "dt", "B", "C")}
    twin = state.clone()
    with torch.no_grad():
        y, new = s.ssd_step(state, **per_token, **inputs, dt_softplus=True, backend="triton")
        expected, _ = s.ssd_step(twin, **per_token, **inputs, dt_softplus=True, backend="torch")
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state, twin, rtol=1e-6, atol=1e-6)
    assert new is state


def test_triton_compiles_into_one_graph():
    inputs = {k: v.to(DEVICE) for k, v in small(t=20).items()}
    weight = torch.randn(6, 4, device=DEVICE)

    def layer(x, **rest):
        x = s.causal_conv1d(x.flatten(2), weight, cu_seqlens=(0, 7, 20), activation="silu", backend="triton")[0].view(x.shape)
        return s.ssd_scan(x, **rest, dt_softplus=True, cu_seqlens=(0, 7, 20), backend="triton")

    def gradients(layer):
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
        y, S = layer(**leaves)
        (y.square().sum() + S.sum()).backward()
        return [y, S, *(v.grad for v in leaves.values())]

    for ours, expected in zip(gradients(torch.compile(layer, fullgraph=True, backend="aot_eager")), gradients(layer)):
        assert torch.equal(ours, expected)


def test_triton_needs_what_it_needs(monkeypatch):
    with pytest.raises(ValueError, match="^backend: got .*float64"):
        s.ssd_scan(**{k: v.double() for k, v in small().items()}, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="^backend: got .* expected .*GPU"):
        s.ssd_scan(**small(), backend="triton")


def test_triton_with_the_tiles_of_a_hopper(interpreter, monkeypatch):
    """Tiles of 128 with boundaries 64 apart, as the interpreter's tiles never are; float16 has the digits to tell errors from rounding."""
    monkeypatch.setattr(s, "_shared_memory", lambda x: 227 * 1024)
    for shape, cu in ((dict(b=1, t=700, h=2, p=32, g=1, n=64, states=1), None),
                      (dict(b=1, t=700, h=2, p=24, g=2, n=72, states=4), [0, 1, 130, 600, 700])):
        errors = triton_errors(shape, cu_seqlens=cu, chunk_size=512, dtype=torch.float16)
        assert all(e < (5e-3 if name == "dA" else 2e-3) for name, e in errors.items()), errors


def test_triton_chained_pieces_give_the_bits_of_a_whole_row(interpreter):
    """4 x 64 tokens, handing on the state and, backwards, its gradient; and a second run gives the same bits."""
    inputs = {k: v.detach().to(DEVICE) for k, v in random_inputs(1, 256, 4, 16, 2, 24, states=1).items()}
    r = torch.Generator().manual_seed(1)
    dy, dS = (torch.randn(shape, generator=r).to(DEVICE) for shape in ((1, 256, 4, 16), (1, 4, 16, 24)))

    def run(pieces):
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
        per_token, rest = {k: leaves[k] for k in ("x", "dt", "B", "C")}, {k: leaves[k] for k in ("A", "D", "dt_bias")}
        state, ys = leaves["initial_states"], []
        for cuts in zip(*(v.split(256 // pieces, 1) for v in per_token.values())):
            y, state = s.ssd_scan(**dict(zip(per_token, cuts)), **rest, initial_states=state, dt_softplus=True, chunk_size=32,
                                  backend="triton")
            ys.append(y)
        torch.autograd.backward([torch.cat(ys, 1), state], [dy, dS])
        return {"y": torch.cat(ys, 1), "S": state, **{"d" + k: v.grad for k, v in leaves.items()}}

    whole, again, chained = run(1), run(1), run(4)
    for name, v in whole.items():
        assert torch.equal(v, again[name]), name
        if name in ("dA", "dD", "ddt_bias"):  # sums over the pieces
            torch.testing.assert_close(v, chained[name], rtol=1e-6, atol=1e-6 * float(v.abs().max()))
        else:
            assert torch.equal(v, chained[name]), name


def test_triton_gives_a_step_of_nothing_its_gradient(interpreter):
    inputs = {k: v.to(DEVICE) for k, v in small(t=40).items()}
    inputs.pop("dt_bias")
    inputs["dt"] = inputs["dt"].exp()
    inputs["dt"][:, ::3] = 0
    ours, oracle = ({k: v.clone().requires_grad_() for k, v in inputs.items()} for _ in range(2))
    for backend, leaves in (("triton", ours), ("recurrent", oracle)):
        y, S = s.ssd_scan(**leaves, backend=backend)
        (y.sin().sum() + S.sin().sum()).backward()
    torch.testing.assert_close(ours["dt"].grad, oracle["dt"].grad, rtol=1e-5, atol=1e-5)


def test_triton_sums_in_float32_whatever_the_default_dtype(interpreter):
    inputs = {k: v.to(DEVICE) for k, v in small(t=40).items()}
    expected = s.ssd_scan(**inputs, dt_softplus=True, backend="triton")
    torch.set_default_dtype(torch.bfloat16)
    try:
        y, S = s.ssd_scan(**inputs, dt_softplus=True, backend="triton")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(y, expected[0]) and torch.equal(S, expected[1])


def test_triton_makes_states_only_where_they_are_wanted(interpreter, monkeypatch):
    inputs, shapes = {k: v.to(DEVICE).requires_grad_() for k, v in small(t=40).items()}, []

    def empty(self, *args, original=Poisoned.empty, **options):
        v = original(self, *args, **options)
        shapes.append(tuple(v.shape))
        return v
    monkeypatch.setattr(Poisoned, "empty", empty)
    y, S = s.ssd_scan(**inputs, dt_softplus=True, cu_seqlens=(0, 10, 30, 40), chunk_size=16, backend="triton", return_final_states=False)
    y.sum().backward()
    assert S is None and shapes.count((0, 2, 3, 4)) == 2  # neither final states nor their gradient
    assert (3, 2, 3, 4) not in shapes  # 3 sequences; of the 4 chunks there are states
    wanted = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    y2, S = s.ssd_scan(**wanted, dt_softplus=True, cu_seqlens=(0, 10, 30, 40), chunk_size=16, backend="triton")
    y2.sum().backward()
    assert S.shape == (3, 2, 3, 4)
    for k, v in inputs.items():
        assert torch.equal(v.grad, wanted[k].grad), k


@pytest.mark.parametrize(("change", "shared", "message"), [
    (dict(p=257), 0, "x, B: got p = 257, n = 4, expected at most 256 and 1024"),
    (dict(n=1025), 0, "x, B: got p = 3, n = 1025, expected at most 256 and 1024"),
    ({}, 64 * 1024, "backend: got .*64 KB of shared memory for a block, expected at least 99 KB")])
def test_triton_refuses_what_does_not_fit(monkeypatch, change, shared, message):
    monkeypatch.setattr(s, "_shared_memory", lambda x: shared)
    with pytest.raises(ValueError, match=message):
        s.ssd_scan(**{k: v.to(DEVICE) for k, v in small(**change).items()}, backend="triton")


def test_instructions_of_loops_are_weighted():
    # Two loops, of 4 instructions run 10 times and of 2 run 3 times; in the first, two of them half of the times; two outside.
    listing = [(0x00, "MOV R1, R2"), (0x10, "ISETP P0, R1"), (0x20, "@P0 BRA 0x50"), (0x30, "FADD R1, R1"), (0x40, "FADD R1, R1"),
               (0x50, "@P1 BRA 0x10"), (0x60, "FMUL R1, R1"), (0x70, "@P2 BRA 0x60"), (0x80, "EXIT")]
    assert executed(listing, [10, 3], branch=0.5) == 2 + 10 * 3 + 10 * 0.5 * 2 + 3 * 2
    with pytest.raises(ValueError, match="2 loops in the listing, expected 1"):
        executed(listing, [10])


def test_kernels_use_what_triton_3_6_has():
    """3.7 is pinned and hides what 3.6 lacks: a size computed by a function of tl is no constant there."""
    known = set("""abs arange cdiv constexpr cumsum dot exp exp2 float32 float64 full int32 int64 load log log2 max maximum minimum program_id
        rsqrt sigmoid static_range store sum where zeros""".split())
    for module in (s, decode):
        text = Path(module.__file__).read_text()
        assert set(re.findall(r"\btl\.(\w+)", text)) <= known
        assert not re.findall(r": constexpr = .*\btl\.", text)


CAPABILITIES = {80: 163, 90: 227, 120: 99}  # KB of shared memory that a block may take


@pytest.mark.parametrize("tritons", ["pinned", pytest.param("3.6", marks=pytest.mark.skipif(
    "TRITON_3_6" not in os.environ, reason="TRITON_3_6 names no folder with Triton 3.6"))])
def test_triton_compiles_ahead_of_time(tritons):
    """All kernels at 7B's shape; and their modelled time for 32,768 tokens, see compile_kernels.py."""
    script, path = Path(__file__).with_name("compile_kernels.py"), {} if tritons == "pinned" else {"PYTHONPATH": os.environ.get("TRITON_3_6")}

    def start(*arguments):
        return subprocess.Popen([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True, env={**os.environ, **path})
    jobs, model = {c: start(str(c)) for c in CAPABILITIES}, start("90", "--model")
    for capability, job in jobs.items():
        rows = [json.loads(line) for line in job.communicate()[0].splitlines()]
        assert job.returncode == 0 and len(rows) == 23
        for row in rows:
            assert row["spilled"] <= 32 and row["tensor_core"] >= row["dots"] and row["scalar_products"] == 0, row
            assert row["shared"] <= CAPABILITIES[capability] * 1024, row
            assert row["narrow_loads"] == 0 or row["kernel"].split()[0] not in ("scan", "dcb", "dbc"), row
    sums = json.loads(model.communicate()[0].splitlines()[-1])
    assert sums["forward"] <= 0.35 and sums["backward"] <= 0.75 and sums["convolution"] <= 0.6, sums


@pytest.mark.gpu
def test_triton_on_a_gpu_gives_the_same_bits_twice():
    inputs = {k: v.detach().to("cuda") for k, v in random_inputs(b=1, t=3000, h=24, p=128, g=1, n=256, states=3).items()}
    inputs |= {k: inputs[k].bfloat16() for k in ("x", "dt", "B", "C")}

    def run(backend, dtype):
        leaves = {k: v.to(dtype if k in ("x", "dt", "B", "C") else torch.float32).requires_grad_() for k, v in inputs.items()}
        y, S = s.ssd_scan(**leaves, cu_seqlens=(0, 1, 2000, 3000), dt_softplus=True, backend=backend)
        torch.autograd.backward([y, S], [torch.ones_like(y), torch.ones_like(S)])
        return [y, S, *(v.grad for v in leaves.values())]

    first, second, oracle = run(None, torch.bfloat16), run(None, torch.bfloat16), run("torch", torch.float32)
    for a, b, c in zip(first, second, oracle):
        assert torch.equal(a, b) and (a.float() - c).norm() / c.norm() < 1e-2
