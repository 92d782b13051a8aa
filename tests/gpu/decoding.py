"""Decoding at the 7B shape: a step against the bytes it must move, and its kernels; generate(); prefill;
transformers with the same weights. python tests/gpu/decode.py"""

from dataclasses import asdict

from stages import DEV, DRY, put, put_kernels, seconds, stage

import torch

from model import PRESETS, FalconH1, generate, prefill
from tests.measure import decoding_floor, decoding_step, floors, flops_per_token, milliseconds
from tests.peers import peers


def on_device(build):
    """build() in bfloat16 on the device."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEV):
            return build().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def one_step(model, batch, context, limits, detail):
    run = decoding_step(model, batch, context)
    first, second = seconds(run)[0], seconds(run)[0]  # compiles; is recorded
    took = milliseconds(run, DEV)
    floor = decoding_floor(model.config, batch, context, torch.bfloat16, *limits) * 1e3
    put("decode", batch=batch, context=context, ms=took, floor_ms=floor, share=floor / took,
        tokens_s=batch / took * 1e3, first_s=first, second_s=second)
    if detail:
        put_kernels("decode kernel", run, batch=batch, context=context)


def whole_generation(model, slots, new):
    """From short prompts, so that the cache grows."""
    prompts = [[1 + i, 2, 3] for i in range(slots)]
    took, _ = seconds(lambda: generate(model, prompts, max_new_tokens=new, temperature=0.85, slots=slots))
    put("generate", slots=slots, new=new, seconds=took, tokens_s=slots * new / took)


def reading(model, t, rate):
    prefill(model, [[1] * t])
    took, _ = seconds(lambda: prefill(model, [[1] * t]))
    put("prefill", tokens=t, seconds=took, share=t * flops_per_token(model.config, t)["blocks"] / rate / took)


def their_model(model):
    """transformers' with the same tensors, none of which is copied."""
    if not DRY:
        peers()  # makes mamba_ssm importable, whose kernels transformers then takes
    import transformers

    config = {name: [*v] if isinstance(v, tuple) else v for name, v in asdict(model.config).items()}
    del config["time_step_limit"]  # which they do not know
    theirs = on_device(lambda: transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**config)))
    theirs.load_state_dict(model.state_dict(), assign=True)
    theirs.eval().generation_config.eos_token_id = None  # no token ends a sequence
    return theirs


def beside_transformers(model, sizes):
    theirs = their_model(model)
    for batch, new in sizes:
        ids = torch.randint(model.config.vocab_size, (batch, 1), device=DEV)
        options = dict(attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0)
        prompts = ids.tolist()
        runs = {"theirs": lambda new: theirs.generate(ids, max_new_tokens=new, **options),
                "ours": lambda new: generate(model, prompts, max_new_tokens=new, temperature=0, slots=batch)}
        for run in runs.values():
            run(2)  # compiles
        rates = {f"{name}_tokens_s": batch * new / seconds(lambda: run(new))[0] for name, run in runs.items()}
        put("beside transformers", batch=batch, new=new, **rates)


def main():
    torch.manual_seed(0)
    limits, model = floors(DEV), on_device(lambda: FalconH1(PRESETS["tiny" if DRY else "7b"]))
    shapes = [(1, 512), (64, 512), (256, 512), (1, 16384), (16, 16384), (64, 16384)]
    for batch, context in [(2, 32)] if DRY else shapes:
        detail = DRY or (batch, context) in ((1, 512), (64, 512), (64, 16384))
        stage(f"decode {batch} x {context}", one_step, model, batch, context, limits, detail)
    for slots, new in [(1, 8)] if DRY else [(1, 300), (64, 300)]:
        stage(f"generate, {slots} slots", whole_generation, model, slots, new)
    for t in (64,) if DRY else (4096, 32768):
        stage(f"prefill {t}", reading, model, t, limits[1])
    stage("transformers", beside_transformers, model, [(1, 4)] if DRY else [(1, 12), (16, 8)])


if __name__ == "__main__":
    main()
