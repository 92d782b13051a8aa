"""The kernels for one token against torch's and the forward pass, on caches full of NaN; how many; their limits."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import decode
import model as m
import ssm_scan as s
from tests import test_ssm_scan
from tests.test_model import SMALL, build

DEVICE = test_ssm_scan.DEVICE
interpreter = test_ssm_scan.interpreter


@pytest.fixture
def kernels(interpreter, monkeypatch):
    """A CPU, too, takes one token through the kernels; what they allocate holds NaN."""
    monkeypatch.setattr(decode, "torch", test_ssm_scan.Poisoned())
    monkeypatch.setattr(m, "kernels_serve", lambda x: not torch.is_grad_enabled())


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


# --- Attention


def attention_inputs(lengths, length, hq, hkv, hd, dtype=torch.float32):
    """Arguments of attend_step; what no slot has written yet is NaN."""
    slots = len(lengths)
    torch.manual_seed(0)
    angle = random(slots, 1, 1, hd // 2)
    cos = torch.cat([angle.cos(), angle.cos()], -1).to(dtype)
    sin = torch.cat([-angle.sin(), angle.sin()], -1).to(dtype)
    q = random(slots, 1, hq, hd, dtype=dtype)
    k, v = (random(slots, 1, hkv, hd, dtype=dtype) for _ in range(2))
    keys, values = (random(slots, hkv, length, hd, dtype=dtype) for _ in range(2))
    for slot, held in enumerate(lengths):
        keys[slot, :, held:] = values[slot, :, held:] = torch.nan
    return [q, k, v, cos, sin, torch.tensor(lengths, device=DEVICE), keys, values]


def attention_oracle(q, k, v, cos, sin, lengths, keys, values, key_multiplier):
    """One slot after the other in float64, softmax spelled out."""
    cos, sin, shared, ys = cos.double(), sin.double(), q.shape[2] // k.shape[2], []
    for slot, held in enumerate(lengths.tolist()):
        turned = m.rotate(q.double(), cos, sin)[slot, 0]  # (hq, hd)
        new = m.rotate(k.double() * key_multiplier, cos, sin)[slot, 0, :, None]  # (hkv, 1, hd)
        K = torch.cat([keys[slot, :, :held].double(), new], 1).repeat_interleave(shared, 0)
        V = torch.cat([values[slot, :, :held].double(), v[slot, 0, :, None].double()], 1)
        weight = (torch.einsum("hd,hjd->hj", turned, K) / q.shape[3] ** 0.5).softmax(-1)
        ys.append(torch.einsum("hj,hjd->hd", weight, V.repeat_interleave(shared, 0)))
    return torch.stack(ys)[:, None]


@pytest.mark.parametrize(("hq", "hkv", "hd", "dtype"), [
    (2, 2, 6, torch.float32), (4, 2, 64, torch.float32), (12, 2, 128, torch.float32), (6, 1, 96, torch.float32),
    (12, 2, 128, torch.bfloat16), (3, 3, 16, torch.float16)])
def test_attention_is_the_softmax(kernels, hq, hkv, hd, dtype):
    lengths = [0, 1, 127, 128, 129, 255, 256, 299]  # splits of 128 keys
    inputs = attention_inputs(lengths, 300, hq, hkv, hd, dtype)
    expected = attention_oracle(*inputs, 0.7)
    y = decode.attend_step(*inputs, key_multiplier=0.7)
    assert (y.double() - expected).norm() / expected.norm() < (1e-6 if dtype == torch.float32 else 1e-2)
    q, k, v, cos, sin, _, keys, values = inputs
    new = m.rotate(k.float() * 0.7, cos.float(), sin.float())[:, 0].to(dtype)
    for slot, held in enumerate(lengths):  # appended where the slot ends, and nothing else written
        torch.testing.assert_close(keys[slot, :, held], new[slot])
        assert torch.equal(values[slot, :, held], v[slot, 0])
        assert keys[slot, :, held + 1 :].isnan().all() and values[slot, :, held + 1 :].isnan().all()


def test_a_slot_does_not_depend_on_others(kernels):
    def run(others):
        inputs = attention_inputs([200, 130, 5], 300, 4, 2, 64)
        for i in (0, 1, 2, 6, 7):
            inputs[i][[0, 2]] *= others
        inputs[5][[0, 2]] += 40 * int(others != 1)
        return decode.attend_step(*inputs)[1]
    first = run(1)
    assert first.isfinite().all() and torch.equal(first, run(1))
    assert torch.equal(first, run(torch.nan)) and torch.equal(first, run(3.0))


@pytest.mark.parametrize("length", [256, 300])  # a whole number of splits, and not
def test_a_full_slot_writes_nothing(kernels, length):
    inputs = attention_inputs([length, length + 7, 3], length, 4, 2, 16)
    before = [v.clone() for v in inputs[6:]]
    y = decode.attend_step(*inputs)
    for now, then in zip(inputs[6:], before):
        assert torch.equal(now[:2], then[:2])
    expected = attention_oracle(*(v[2:] for v in inputs[:6]), *(v[2:] for v in before), 1.0)
    torch.testing.assert_close(y[2:].double(), expected, rtol=1e-5, atol=1e-6)


def test_attention_reaches_beyond_32_bits(kernels, monkeypatch):
    monkeypatch.setattr(decode, "span_of", lambda length, heads: length)  # one split: the interpreter visits each
    small = attention_inputs([3, 5], 8, 2, 1, 64)
    large = [torch.empty(2, 1, 2**25 + 8, 64, device=DEVICE) for _ in range(2)]  # pages nobody touches are free
    assert large[0].stride(0) > 2**31
    for far, near in zip(large, small[6:]):
        far[:, :, :8] = near
    torch.testing.assert_close(decode.attend_step(*small[:6], *large), decode.attend_step(*small))
    torch.testing.assert_close(large[0][:, :, :8], small[6], equal_nan=True)


@pytest.mark.parametrize(("length", "heads", "span"), [
    (1, 1, 128), (16384, 2, 128), (262144, 2, 1024), (16384, 512, 1024), (32768, 8, 512), (131072, 1, 256)])
def test_spans(length, heads, span):
    assert decode.span_of(length, heads) == span


# --- The mixer


@torch.no_grad()
@pytest.mark.parametrize(("g", "k", "bias", "limit", "dtype"), [
    (1, 4, True, (0.0, float("inf")), torch.float32), (2, 4, False, (0.3, 0.6), torch.float32),
    (2, 1, True, (0.0, 1.0), torch.float32), (1, 2, True, (0.0, float("inf")), torch.bfloat16)])
def test_mixer_is_torchs(kernels, g, k, bias, limit, dtype):
    b, h, p, n = 3, 4, 20, 9
    torch.manual_seed(0)
    d = h * p + 2 * g * n
    conv, state = random(b, k - 1, d, dtype=dtype).mT, random(b, h, p, n)
    wide = random(b, d + h, dtype=dtype)  # xBC and dt are slices of what in_proj gives
    weight, bias = random(d, k, dtype=dtype), random(d, dtype=dtype) if bias else None
    dt_bias, A_log, D = random(h, dtype=dtype) * 3 - 2, random(h, dtype=dtype), random(h, dtype=dtype)
    conv2, state2 = conv.clone(), state.clone()
    y = decode.mamba_step(conv, state, wide[:, :d], wide[:, d:], weight, bias, dt_bias, A_log, D, limit)

    xBC, _ = s.causal_conv1d_step(conv2, wide[:, :d], weight, bias, activation="silu")
    x, B, C = xBC.split([h * p, g * n, g * n], 1)
    dt = torch.nn.functional.softplus(wide[:, d:] + dt_bias).clamp(*limit)
    B, C = B.view(b, g, n), C.view(b, g, n)
    expected, _ = s.ssd_step(state2, x.view(b, h, p), dt, -A_log.float().exp(), B, C, D=D)
    for ours, theirs in ((y.float(), expected.float()), (state, state2)):
        assert (ours - theirs).norm() / theirs.norm() < (1e-6 if dtype == torch.float32 else 1e-2)
    assert torch.equal(conv, conv2)


@torch.no_grad()
def test_small_steps_keep_their_digits(kernels):
    """dt near the 0.001 that Mamba-2 starts from, and far below, where softplus(v) = e^v. B = C = x = 1."""
    dt = torch.tensor([[-6.9, -15.0, -30.0, 25.0]], device=DEVICE)
    zero = torch.zeros(4, device=DEVICE)
    one = torch.ones(1, 4, 1, device=DEVICE)
    state = torch.zeros(1, 4, 1, 1, device=DEVICE)
    y = decode._step_triton(state, one, dt, zero, one[:, :1], one[:, :1], zero, zero)
    expected = torch.nn.functional.softplus(dt[0].double())
    torch.testing.assert_close(y[0, :, 0].double(), expected, rtol=1e-6, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
def test_norms(kernels, groups, dtype):
    torch.manual_seed(0)
    wide, weight = random(3, 1, 100, dtype=dtype), random(40, dtype=dtype)
    y, z = wide[..., :40], wide[..., 40:80]
    for before in (False, True):
        expected = m.gated_norm(y, z, weight, groups, 1e-5, before).to(dtype)
        ours = decode.norm_step(y, weight, 1e-5, z=z, groups=groups, norm_before_gate=before)
        torch.testing.assert_close(ours, expected)
    gate_alone = (y.float() * torch.nn.functional.silu(z.float())).to(dtype)
    torch.testing.assert_close(decode.norm_step(y, None, 1e-5, z=z, groups=groups), gate_alone)
    norm = torch.nn.functional.rms_norm(y.float(), (40,), eps=1e-5).to(dtype)
    torch.testing.assert_close(decode.norm_step(y, weight, 1e-5), weight * norm)


# --- The whole step


def decoded(model, ids, lengths, room, steps):
    """Logits of `steps` tokens for each row of ids (slots, t), the first lengths[slot] of them read before."""
    c, p = model.config, next(model.parameters())
    cache = m.Cache(c, len(ids), room, dtype=p.dtype, device=p.device)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    for slot, held in enumerate(lengths):
        if held:
            cache.load(slot, m.prefill(model, [ids[slot, : held + 1].tolist()]), 0)
    out = []
    for i in range(steps):
        cache.used = -(2**40)  # what a step must not care for
        out.append(model(torch.stack([row[held + i] for row, held in zip(ids, lengths)])[:, None], cache=cache))
    assert cache.fused and cache.lengths.tolist() == [held + steps for held in lengths]
    return torch.cat(out, 1)


LENGTHS = [0, 130, 1, 127]  # a new slot, one in its second split of 128 keys, one that enters it in the second step


def forward_pass(model, ids, steps=2):
    rows = [model(row[None, : held + steps])[0, -steps:] for row, held in zip(ids, LENGTHS)]
    return torch.stack(rows).float()


@torch.no_grad()
@pytest.mark.parametrize("change", [
    {"num_hidden_layers": 2}, {"mamba_rms_norm": False}, {"mamba_norm_before_gate": True},
    {"mamba_n_groups": 1, "time_step_limit": (0.2, 1.5)}, {"num_key_value_heads": 4},
    {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 128},
    {"mamba_conv_bias": False, "mamba_proj_bias": True, "projectors_bias": True, "attention_bias": True,
     "mlp_bias": True}])
def test_steps_are_the_forward_pass(kernels, change):
    model = build(replace(SMALL, **{"num_hidden_layers": 1} | change)).to(DEVICE)
    ids = torch.randint(37, (4, 140), device=DEVICE)
    y, expected = decoded(model, ids, LENGTHS, 140, 2), forward_pass(model, ids)
    assert ((y - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2)) < 1e-5).all()


@torch.no_grad()
def test_steps_in_half_precision(kernels):
    """Rounding to bf16 moves the forward pass itself by 1 to 2% of these logits, and torch's steps, too: the kernels
    may be no farther from float32 than it is. (On their own, see above, they are within 1e-2.)"""
    model, ids = build().to(DEVICE, torch.bfloat16), torch.randint(37, (4, 140), device=DEVICE)
    y, rounded = decoded(model, ids, LENGTHS, 140, 2).float(), forward_pass(model, ids)
    exact = forward_pass(model.float(), ids)
    assert (y - exact).norm() < 1.1 * (rounded - exact).norm() < 0.03 * exact.norm()


class Launches(TorchDispatchMode):
    """Counts what would launch a kernel on a GPU, and refuses what would wait for one."""

    SILENT = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty"}
    WAIT = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out, name = f(*args, **(kwargs or {})), f._schema.name.split("::")[1]
        assert name not in self.WAIT, f"{name} waits for the GPU"
        devices = {v.device.type for v in (*args, out) if isinstance(v, torch.Tensor)}
        assert len(devices) < 2 or name not in ("copy_", "_to_copy"), f"{name} between {devices}"
        self.count += not (f.is_view or f.namespace == "prim" or name in self.SILENT)
        return out


def launches(monkeypatch, layers, device, dtype):
    """In one step of a model of so many blocks. On "cuda" torch computes nothing, but says what it would launch."""
    fake = device == "cuda"
    torch.set_default_dtype(dtype)  # what the model is created in: fake parameters cannot be converted
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
        with torch.device(device):
            model = m.FalconH1(replace(SMALL, num_hidden_layers=layers))
        torch.set_default_dtype(torch.float32)
        cache = m.Cache(model.config, 2, 20, dtype=dtype, device=device)
        ids = torch.zeros(2, 1, dtype=torch.long, device=device)
        m.ssm_multipliers(model.config, dtype, ids.device)  # made once, then kept
        with monkeypatch.context() as patched, torch.no_grad(), Launches() as counted:
            def launch(*args, original=s._launch, **sizes):
                counted.count += 1
                with _disable_current_modes() if not fake else nullcontext():
                    return fake or original(*args, **sizes)
            patched.setattr(decode, "_launch", launch)
            patched.setattr(s, "_launch", launch)
            model.lm_head(model.model(ids, cache=cache))  # model() looks at a CPU's ids
        assert cache.fused
    return counted.count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="a torch built without CUDA cannot say"))])
def test_launches_of_a_block(monkeypatch, device, dtype):
    if device == "cpu":
        monkeypatch.setattr(m, "kernels_serve", lambda x: not torch.is_grad_enabled())
    try:
        two, three = (launches(monkeypatch, layers, device, dtype) for layers in (2, 3))
    finally:
        torch.set_default_dtype(torch.float32)
    assert three - two <= 28  # per block; with torch's own operations 65, and 80 in bf16


@pytest.mark.parametrize(("call", "message"), [
    (lambda: decode.attend_step(*attention_inputs([1], 4, 1, 1, 258)), "head_dim: got 258, expected at most 256"),
    (lambda: decode.attend_step(*attention_inputs([1], 4, 17, 1, 128)), "query heads of .*: got 17, expected at most 16"),
    (lambda: decode.norm_step(random(1, 1, 16385), random(16385), 0.0), "16385 channels .* at most 16384"),
    (lambda: decode._step_triton(None, random(1, 1, 1), None, None, random(1, 1, 513), None, None, None),
     "a state of 513, .* at most 512")])
@torch.no_grad()
def test_what_is_too_large_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
@torch.no_grad()
def test_a_recorded_step_serves_a_whole_generation():
    model = build().cuda()
    plain, recorded = (m.Cache(model.config, 3, 200, device="cuda") for _ in range(2))
    tokens = torch.zeros(3, 1, dtype=torch.long, device="cuda")
    warm = m.Cache(model.config, 3, 200, device="cuda")
    model(tokens, cache=warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(tokens, cache=recorded)
    for i in range(150):
        tokens.copy_(torch.tensor([[i], [2 * i], [3 * i]], device="cuda") % model.config.vocab_size)
        graph.replay()
        assert torch.equal(logits, model(tokens, cache=plain))
