"""Loss and whole gradient of one batch on the ranks that torchrun started, against those of one process; for test_train_sft.py.

    torchrun --nproc-per-node 4 tests/sharded_gradient.py CHECKPOINT SFT_FILE CP,REPLICAS,PACK_TOKENS ...
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

import data  # noqa: E402
import train_sft as t  # noqa: E402
from model import check  # noqa: E402


def gradient(model, packs, ranks):
    total, begun = t.weight_of(packs), []

    def loss_of(row):
        if begun and ranks.world > 1 and ranks.replicas == 1:  # replicas show theirs after the last row
            for p in model.parameters():
                sliced = p.grad is not None and p.grad.to_local().numel() < p.numel()
                check(sliced, "after a row, a rank holds more than its slice of the gradient")
        begun.append(row)
        return t.sft_loss(model, row, total)

    loss = float(ranks.all_sum(t.backward_all(model, packs, ranks, loss_of)))
    whole = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    return loss, {name: g for (name, _), g in zip(model.named_parameters(), whole)}


def main(checkpoint, file, *settings):
    samples = [*data.SftFiles(file, data.Tokenizer.byte_level(), 512, limit=9)]
    one, expected = gradient(t.load_model(checkpoint).float(), data.pack(samples, 4096), t.Ranks())
    ranks = t.start_ranks("cpu")
    for setting in settings:
        cp, replicas, pack_tokens = map(int, setting.split(","))
        ranks = replace(ranks, cp=cp, replicas=replicas)
        packs = data.pack(samples, pack_tokens, ranks.teams)
        loss, grads = gradient(t.shard(t.load_model(checkpoint), ranks, recompute=pack_tokens < 512), packs, ranks)
        off = torch.cat([(grads[n] - g).flatten() for n, g in expected.items()]).norm() / torch.cat([g.flatten() for g in expected.values()]).norm()
        worst = max(float((grads[n] - g).norm() / g.norm()) for n, g in expected.items())
        if ranks.rank == 0:
            print(f"{ranks.world} ranks, cp {cp}, replicas {replicas}, {len(packs)} rows: loss off by {abs(loss / one - 1):.1e}, gradient by "
                  f"{off:.1e}, at most {worst:.1e} in a tensor")
        check(abs(loss / one - 1) < 1e-6 and off < 1e-6, "the ranks together do not compute what one process does")


if __name__ == "__main__":
    sys.exit(t.run_main(lambda: main(*sys.argv[1:])))
