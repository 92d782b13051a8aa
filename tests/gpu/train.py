"""Steps of train_sft.py (FSDP2 on one GPU, bf16 over float32, AdamW, blocks recomputed) at the 7B shape with
fewer layers: 16 and 32,768 tokens need about 68 GB: train.py LAYERS TOKENS [compile] [packed]"""

import sys
from dataclasses import replace

from stages import DEV, DRY, put, put_kernels, seconds, stage

import numpy as np
import torch

import train_sft
from data import Pack
from model import PRESETS, FalconH1
from tests.bench import floors, flops_per_token, parameters

DATA_SHEET = 989e12  # bfloat16 FLOPs per second of an H100 and an H200

def row(t, vocab, seed, packed):
    """Random tokens; packed, documents of lognormal lengths, others in every step, as real data has them."""
    r = np.random.default_rng(seed)
    cu = [0]
    while cu[-1] < t:
        cu.append(min(t, cu[-1] + int(np.clip(r.lognormal(8, 1), 64, t))) if packed else t)
    ids = r.integers(0, vocab, t)
    return Pack(ids, np.roll(ids, -1), np.ones(t, np.float32), np.array(cu, np.int32), [])

def train(layers, t, compile, packed, steps):
    c = replace(PRESETS["tiny" if DRY else "7b"], num_hidden_layers=layers)
    ranks = train_sft.start_ranks(DEV)
    _, rate = floors(DEV)
    torch.manual_seed(0)
    with torch.device(DEV):
        model = FalconH1(c)
    model = train_sft.shard(model, ranks, True, compile=compile)  # activations recomputed
    optimizer = train_sft.make_optimizer(model, 1e-5, 0.01)

    def step(seed):
        return train_sft.train_step(model, optimizer, [row(t, c.vocab_size, seed, packed)], 1e-5, 1.0, ranks)
    times, results = zip(*(seconds(lambda: step(i)) for i in range(steps)))
    median = sorted(times[2:])[len(times[2:]) // 2]  # without the steps that compile
    flops = 3 * t * sum(flops_per_token(c, t).values())  # the model's: what is recomputed does not count
    put("train", layers=layers, tokens=t, compile=compile, packed=packed,
        parameters=sum(parameters(c).values()), loss=results[-1][0], tokens_s=t / median,
        seconds=[round(took, 3) for took in times],
        mfu_of_data_sheet=flops / median / DATA_SHEET, mfu_of_measured=flops / median / rate,
        peak_gb=0 if DRY else torch.cuda.max_memory_allocated() / 1e9)
    if not packed:
        put_kernels("train kernel", lambda: step(steps), top=40, compile=compile)

if __name__ == "__main__":
    options = dict(compile="compile" in sys.argv, packed="packed" in sys.argv, steps=3 if DRY else 6)
    stage(" ".join(["train", *sys.argv[1:]]), train, int(sys.argv[1]), int(sys.argv[2]), **options)
