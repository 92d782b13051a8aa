"""The chunked scan, the convolution and their steps against the definition, on every shape that has an edge."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ssm_scan as s

SLOW = settings(deadline=None, max_examples=25, derandomize=True)


def small(**changes):
    shape = {"b": 1, "t": 12, "h": 2, "p": 3, "g": 1, "n": 4} | changes
    return {k: v.detach() for k, v in s.random_inputs(**shape).items()}


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
    inputs = s.random_inputs(**shape)
    inputs["A"] = (inputs["A"] * decay).detach()
    errors = s.relative_errors(inputs, cu_seqlens=cu, chunk_size=chunk)
    # A gradient that almost cancels to 0 (dA over many tokens, under decays x100) has few digits of its own size.
    assert all(e < (1e-5 if name not in ("dA", "ddt", "ddt_bias") or decay == 1 else 1e-4) for name, e in errors.items()), errors


def test_chunked_scan_in_float64():
    inputs = {k: v.double() for k, v in s.random_inputs(1, 33, 4, 3, 2, 5, states=3).items()}
    assert max(s.relative_errors(inputs, cu_seqlens=[0, 1, 20, 33], chunk_size=8).values()) < 1e-12


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
    ({"backend": "triton"}, "backend"), ({"backend": "nonsense"}, "backend"), ({"chunk_size": 0}, "chunk_size"),
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
