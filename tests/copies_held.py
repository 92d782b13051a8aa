"""A short run of train_sft or train_rl on the ranks that torchrun started. Before each update every rank
counts the whole copies of the model that it holds. For test_train_sft.py and test_train_rl.py.

    torchrun --nproc-per-node 2 tests/copies_held.py train_sft 0 --out FOLDER ...
"""

import gc
import importlib
import sys
import weakref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch.distributed as dist  # noqa: E402

import train_sft  # noqa: E402
from model import check  # noqa: E402

whole_copy, made = train_sft.whole_copy, []


def counted_copy(model, *args, **kwargs):
    """Notes a copy that was not there before; checks that it holds the model's weights as they are now."""
    copy = whole_copy(model, *args, **kwargs)
    if copy is not None:
        held = {name: v.clone() for name, v in copy.state_dict().items()}
        if not any(copy is known() for known in made):
            made.append(weakref.ref(copy))
    for name, p in model.state_dict().items():
        whole = p.full_tensor()  # every rank must take part
        check(copy is None or bool((held[name] == whole).all()), f"the copy's {name} is out of date")
    return copy


def main(script, expected):
    gc.disable()  # a copy is to go when its last user has gone, not some time later
    module = importlib.import_module(script)
    train_step = module.train_step

    def counted_step(*args):
        alive = sum(known() is not None for known in made)
        check(alive == int(expected), f"{alive} copies are held while training, expected {expected}")
        return train_step(*args)

    train_sft.whole_copy, module.train_step = counted_copy, counted_step
    module.main()
    print(f"rank {dist.get_rank()} made {len(made)} copies")


if __name__ == "__main__":
    script, expected, *sys.argv[1:] = sys.argv[1:]
    sys.exit(train_sft.run_main(lambda: main(script, expected)))
