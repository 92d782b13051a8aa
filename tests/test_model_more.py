"""model.py: log-probabilities without all logits, model(ids, targets=...); the memory of sampling at 7B."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import (PRESETS, Cache, FalconH1, Running, Sampler, Trace, add_product, token_logprobs,
                   tokens_of_chunk)

@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_token_logprobs(chunk):
    torch.manual_seed(0)
    h, w, g = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True), torch.randn(7)
    targets = torch.tensor([0, 1, 7, 3, 10, 5, 2])
    logprobs, entropy = token_logprobs(h, w, targets, 0.7, chunk)
    logp = (h @ w.T * 0.7).log_softmax(-1)
    plain = logp.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs, plain)
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1))
    ours, theirs = (torch.autograd.grad(v, (h, w), g) for v in (logprobs, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

def test_tokens_of_chunk_by_hand():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert tokens_of_chunk(130048, cpu) == 258  # 2^25 / 130,048 = 258.02
    assert tokens_of_chunk(2**26, cpu) == 1
    on_gpu = {130048: 2048, 261120: 1024, 65536: 4096, 272: 4096, 2**28: 128}  # of 128, from 2^28 logits
    assert {words: tokens_of_chunk(words, gpu) for words in on_gpu} == on_gpu

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_nothing(device, dtype):
    torch.manual_seed(0)
    h, w, g = torch.randn(700, 32), 0.2 * torch.randn(512, 32), torch.randn(700, device=device)
    h, w = (v.to(device, dtype).requires_grad_() for v in (h, w))
    targets, results = torch.randint(512, (700,), device=device), []
    for chunk in (700, 256, 128, 1):
        logprobs, entropy = token_logprobs(h, w, targets, 0.7, chunk)
        results.append([logprobs, entropy, *torch.autograd.grad(logprobs, (h, w), g)])
    for other in results[1:]:
        for ours, whole in zip(other, results[0]):
            error = (ours.double() - whole.double()).norm() / whole.double().norm()
            assert error < (1e-6 if dtype == torch.float32 else 1e-3)  # sums may round to either of two bf16

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_product_adds_in_float32(device, dtype):
    """512 + 2^-10 * 2^-4 is 512 in bf16, which has 8 bits: a product rounded before it is added loses it."""
    a, b = torch.tensor([[16.0, 2**-10], [1.0, 0.0]]), torch.tensor([[32.0, 1.0], [2**-4, 0.0]])
    total = torch.ones(2, 2, device=device)
    add_product(total, a.to(device, dtype), b.to(device, dtype))
    assert total.tolist() == [[513 + 2**-14, 17], [33, 2]]

@pytest.mark.parametrize("targets", [[3, -1, 5, -7], [-1, -1, -1, -1]])
def test_negative_targets_give_zero_and_no_gradient(targets):
    torch.manual_seed(0)
    model, ids, targets = FalconH1(PRESETS["tiny"]), torch.tensor([[1, 2, 3, 4]]), torch.tensor([targets])
    logprobs, entropy = model(ids, targets=targets, temperature=2.0)
    logp = (model(ids) / 2.0).log_softmax(-1)
    want = torch.where(targets < 0, 0, logp.gather(2, targets.clamp(min=0)[..., None])[..., 0])
    torch.testing.assert_close(logprobs, want)
    torch.testing.assert_close(entropy, torch.where(targets < 0, 0, -(logp.exp() * logp).sum(-1)))
    ours, theirs = (torch.autograd.grad(v.sum(), list(model.parameters())) for v in (logprobs, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

class Held(TorchDispatchMode):
    """The bytes of all tensors on "meta" that are alive; they may be at most `room`."""

    def __init__(self, room):
        super().__init__()
        self.now, self.room = 0, room

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        given = {v.untyped_storage()._cdata for v in given}
        for v in tree_leaves(out):
            if isinstance(v, torch.Tensor) and v.is_meta and v.untyped_storage()._cdata not in given:
                self.change(v.untyped_storage().nbytes())
                weakref.finalize(v.untyped_storage(), self.change, -v.untyped_storage().nbytes())
        return out

    def change(self, nbytes):
        self.now += nbytes
        assert self.now <= self.room

def test_sampling_at_7b_stays_inside_80_gb(monkeypatch):
    """The README's command for GRPO on eight GPUs of 80 GB: 16 of 128 prompts a rank, 16 traces of each. All
    grow to 49,152 tokens. Beside them lie the copy in bf16, and an eighth of weights and moments."""
    c = PRESETS["7b"]
    with torch.device("meta"):
        model = FalconH1(c).to(torch.bfloat16)
        one = Cache(c, 1, 512, dtype=torch.bfloat16, device="meta")
    per_slot = sum(v.nbytes for v in vars(one).values() if isinstance(v, torch.Tensor))
    n = sum(p.numel() for p in model.parameters())
    held = Held(80 * 10**9 - 2 * n - 12 * n // 8)
    monkeypatch.setattr("decode.free_bytes", lambda device: held.room - held.now)
    with held:
        sampler = Sampler(model, [[1] * 300] * 16, 16, 0, 300 + 49152 - 1, 0, None, None)
        slots, sizes = len(sampler.slots), []
        assert slots * per_slot < held.room / 2 < (slots + 1) * per_slot
        sampler.waiting, sampler.slots = {}, [Running(Trace(0, i), [], None) for i in range(slots)]
        while (length := sampler.cache.k.shape[3]) < sampler.longest:
            sizes.append((len(sampler.slots), length))
            for running in sampler.slots:
                running.ids = [1] * (length + 1)
            sampler.fit()
    assert (slots, sizes[0]) == (164, (164, 512)) and sizes[2] == (164, 2048)  # then some are set aside
    assert sampler.cache.k.shape[3] == 49451 and len(sampler.slots) == 12
    assert len(sampler.slots) + len(sampler.aside) == slots
