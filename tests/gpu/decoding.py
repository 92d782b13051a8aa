"""Decoding at the 7B shape: a step against the bytes it must move and against transformers', its kernels;
generate(); prefill; then steps of each mixer alone. python tests/gpu/decoding.py"""

import gc
import itertools

from stages import DEV, DRY, error, put, put_kernels, seconds, stage

import torch

from kernels import step_kernel_bytes
from model import PRESETS, FalconH1, generate, prefill
from tests.bench import (
    BATCHES, CONTEXTS, decoding_floor, decoding_step, floors, flops_per_token, medians, milliseconds,
    modelled_speed, three_forms)
from tests.peers import their_model

def one_step(model, batch, context, limits, detail):
    run = decoding_step(model, batch, context)
    first, second = seconds(run)[0], seconds(run)[0]  # compiles; is recorded
    took = milliseconds(run, DEV)
    floor = decoding_floor(model.config, batch, context, torch.bfloat16, *limits) * 1e3
    put("decode", mixers=model.config.mixers, batch=batch, context=context, ms=took, floor_ms=floor,
        share=floor / took, tokens_s=batch / took * 1e3, first_s=first, second_s=second)
    if detail:
        sizes = step_kernel_bytes(model.config, batch, context, torch.bfloat16)
        put_kernels("decode kernel", run, limits[0], sizes, batch=batch, context=context)

@torch.no_grad()
def their_step(theirs, batch, context):
    """decoding_step of transformers' model, in torch: its cache, too, holds noise, and grows by each step."""
    one = torch.ones(1, 1, dtype=torch.long, device=DEV)
    cache = theirs(one, use_cache=True).past_key_values
    def noise(v, *shape):
        return torch.randn(batch, *shape, dtype=v.dtype, device=DEV)

    for layer in cache.layers:
        heads, size = layer.keys.shape[1::2]
        layer.keys, layer.values = (noise(layer.keys, heads, context, size) for _ in "kv")
        for states in (layer.conv_states, layer.recurrent_states):
            states[0] = noise(states[0], *states[0].shape[1:])
    tokens = torch.randint(theirs.config.vocab_size, (batch, 1), device=DEV)
    return torch.no_grad()(lambda: theirs(tokens, past_key_values=cache, use_cache=True).logits)

def their_decoding(theirs, batch, context):
    run = their_step(theirs, batch, context)
    run()
    put("their decode", batch=batch, context=context, ms=medians([run], DEV)[0])

def same_logits(model, theirs, t):
    ids = torch.randint(model.config.vocab_size, (1, t), device=DEV)
    with torch.no_grad():
        put("logits against theirs", tokens=t, error=error(model(ids), theirs(ids).logits))

def whole_generation(model, slots, new):
    prompts = [[1 + i, 2, 3] for i in range(slots)]
    took, _ = seconds(lambda: generate(model, prompts, max_new_tokens=new, temperature=0.85, slots=slots))
    put("generate", slots=slots, new=new, seconds=took, tokens_s=slots * new / took)

def reading(model, t, rate):
    prefill(model, [[1] * t])
    took, _ = seconds(lambda: prefill(model, [[1] * t]))
    put("prefill", tokens=t, seconds=took, share=t * flops_per_token(model.config, t)["blocks"] / rate / took)

def build(c):
    with torch.device(DEV):
        return FalconH1(c).to(torch.bfloat16)

def one_form(c, shapes, limits):
    """Steps of the hybrid or of one mixer alone. The model goes when this ends: memory holds one."""
    model = build(c)
    for batch, context in shapes:
        stage(f"{c.mixers} {batch} x {context}", one_step, model, batch, context, limits, False)

def three_mixers(c, limits):
    """What `python -m tests.bench mixers` models, where it fits into memory."""
    for form in three_forms(c).values():
        gc.collect()  # the model before may be part of a cycle
        cells = itertools.product(BATCHES, CONTEXTS)
        fit = [cell for cell in cells if modelled_speed(form, "H100", *cell)[1] == cell[0]]
        stage(f"mixers {form.mixers}", one_form, form, [(2, 32)] if DRY else fit, limits)

def hybrid(c, limits):
    """The published model, alone and next to transformers'."""
    model = build(c)
    shapes = [(1, 512), (64, 512), (256, 512), (1, 16384), (16, 16384), (64, 16384)]
    for batch, context in [(2, 32)] if DRY else shapes:
        detail = DRY or (batch, context) in ((1, 512), (1, 16384), (64, 16384))
        stage(f"decode {batch} x {context}", one_step, model, batch, context, limits, detail)
    theirs = their_model(model)
    if theirs is not None:
        stage("logits against transformers'", same_logits, model, theirs, 32 if DRY else 300)
        for batch, context in [(2, 32)] if DRY else [(1, 512), (64, 16384)]:
            stage(f"transformers {batch} x {context}", their_decoding, theirs, batch, context)
    for slots, new in [(1, 8)] if DRY else [(1, 300), (64, 300)]:  # the cache grows once
        stage(f"generate, {slots} slots", whole_generation, model, slots, new)
    for t in (64,) if DRY else (4096, 32768):
        stage(f"prefill {t}", reading, model, t, limits[1])

def main():
    torch.manual_seed(0)
    c = PRESETS["tiny" if DRY else "7b"]
    limits = floors(DEV)
    hybrid(c, limits)
    three_mixers(c, limits)  # last, as gpu_day.sh may stop this script here

if __name__ == "__main__":
    main()
