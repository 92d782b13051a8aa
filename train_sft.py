"""Supervised fine-tuning on long chains of thought (Falcon-H1R, section 2), and what both trainers share: ranks, sharding,
checkpoints, the log.

    python train_sft.py                                        the small CPU run: makes its data, trains, saves runs/tiny/sft
    python train_sft.py --data my.jsonl --out runs/my --init FOLDER --lr 1e-4 --steps 500
    torchrun --nproc-per-node 2 train_sft.py --fresh           the same losses and gradients on two ranks
    torchrun --nproc-per-node 8 train_sft.py --cp 2 --checkpoint-activations --init FOLDER ...     long rows, two ranks to a row

A step draws one global batch of samples, packs them into rows of at most --pack-tokens tokens, and deals the rows out to the
ranks. Every rank knows the whole batch, so the loss is divided by the weight of *all* its tokens before any gradient is
computed: each token weighs the same, on whichever rank and in whichever row it stands (the paper's "balanced data-parallel
token normalisation"), and ranks or --pack-tokens change the result by rounding only.

An interrupted run continues where it was when the same command is given again: on a CPU bit for bit. On a GPU
the backward pass of flash attention adds with atomics, so that any two runs differ in rounding. Nothing in
training draws from a random generator that has a state: data order, problems and samples are functions of
(seed, position), so a checkpoint is weights, optimiser, step and positions.

    OUT/run.json      arguments, versions, hardware, commit        OUT/trainer/step-N/   what a resumed run needs
    OUT/log.jsonl     one object a step                            OUT/model/            the model in the published format

Deviations from the paper: the samples of a batch are packed (the paper does not say); a sample's difficulty weight enters the
loss and its normalisation alike, so a batch of hard samples takes no larger step; the tiny run's learning rate and batch are its own.
To copy this file, also take model.py, decode.py, ssm_scan.py and data.py.
"""

import itertools
import json
import math
import os
import shutil
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import data
from data import flag
from model import PRESETS, FalconH1, check, generate
from ssm_scan import to_device

# ---------------------------------------------------------------------------------------------------------------------
# 1. Arguments


@dataclass
class Args:
    out: str = flag("runs/tiny/sft", "folder of the run")
    data: str = flag("runs/tiny/data/sft.jsonl", "SFT samples: files, separated by commas, * for any part of a name; of any size. "
                     "The default is made when it is not there")
    init: str = flag("", "checkpoint folder to start from; empty: --preset with random weights and byte tokens")
    preset: str = flag("tiny", "model size when --init is empty")
    steps: int = flag(2000, "optimiser steps")
    batch: int = flag(16, "samples of a global batch")
    pack_tokens: int = flag(4096, "longest row, in tokens: bounds memory, does not change the result")
    context: int = flag(1024, "longest sample, in tokens")
    trim: bool = flag(False, "cut longer samples on the right instead of refusing them, and log how many of a batch")
    lr: float = flag(4e-3, "peak learning rate (the paper's 1.024e-3 is for published multipliers)")
    warmup: float = flag(0.04, "share of steps with rising learning rate; it then falls linearly to 0")
    weight_decay: float = flag(0.01, "AdamW decay of matrices; vectors have none")
    clip: float = flag(1.0, "largest norm of the whole gradient")
    mixture: str = flag("", "weights of domains, as math=0.6,code=0.4; empty: as many as there are")
    held_out: int = flag(100, "samples kept from training for the held-out loss, evenly spread over the files")
    eval_every: int = flag(300, "steps between held-out losses and sample texts")
    save_every: int = flag(300, "steps between checkpoints")
    seed: int = flag(0, "of weights and data order")
    limit: int = flag(0, "use the first samples only; 0: all")
    cp: int = flag(1, "ranks that share each row's tokens (context parallelism); it must divide ranks and heads")
    replicas: int = flag(1, "copies of the sharded model; best one a node, so that only gradients travel between nodes")
    checkpoint_activations: bool = flag(False, "keep one activation a block and compute the others again: less memory, a third more work")
    compile: bool = flag(False, "torch.compile what blocks do to single tokens; takes a minute at the start")
    device: str = flag("", "cpu or cuda; empty: cuda where there is one")
    fresh: bool = flag(False, "start over, deleting what --out holds of an earlier run")


# ---------------------------------------------------------------------------------------------------------------------
# 2. Ranks and sharding


@dataclass
class Ranks:
    rank: int = 0
    world: int = 1
    device: str = "cpu"
    cp: int = 1  # so many neighbours work on the same rows
    replicas: int = 1

    @property
    def teams(self):
        """How many rows are worked on at a time: the cp ranks that share one are a team."""
        return self.world // self.cp

    def own(self, packs):
        """The rows of a batch that this rank works on."""
        return packs[self.rank // self.cp :: self.teams]

    def all_sum(self, values):
        """Sum of a tensor over the ranks, in place and where it lies: the host does not wait for a GPU."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, objects, group=None):
        """Rank r has made objects[r], objects[r + world], ...; returns the whole list on every rank."""
        if self.world == 1:
            return objects
        shares = [None] * self.world
        dist.all_gather_object(shares, objects[self.rank :: self.world], group)
        return [shares[i % self.world][i // self.world] for i in range(len(objects))]

    def each(self, function, items, group=None, desc=""):
        """[function(item) for item in items], every call made by one rank and its result known to all. desc: show a bar that says so."""
        bar = enumerate(tqdm(items, desc, disable=not desc or self.rank > 0, delay=2))  # seconds
        return self.gather([function(item) if i % self.world == self.rank else None for i, item in bar], group)

    def all_values(self, value, group=None):
        """The ranks' values, in their order."""
        return self.gather([value] * self.world, group)

    def agree(self, what, value):
        """ValueError if a rank has another value: nodes that were started differently, or see different files, must not train."""
        values = self.all_values(value)
        other = next((r for r, v in enumerate(values) if v != values[0]), None)
        check(other is None, f"ranks 0 and {other} disagree about {what}: {values[0]} and {values[other or 0]}")


MEET = 300  # seconds within which all ranks must have come
SILENCE = 30  # seconds without a sign of life after which a rank counts as dead


def start_ranks(device, cp=1, replicas=1):
    """Ranks of one process, or of what torchrun started. A GPU always gets a process group, so that FSDP2 shards and casts there.

    device: "cpu", "cuda" or "" for the better one there is. ValueError for flags that do not fit, OSError where the ranks do not meet."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check(device in ("cpu", "cuda"), f"--device {device}: expected cpu or cuda")
    check(device == "cpu" or torch.cuda.is_available(), f"--device {device}: there is no GPU here")
    world = int(os.environ.get("WORLD_SIZE", 1))
    for name, n in (("cp", cp), ("replicas", replicas)):
        check(n >= 1 and world % n == 0, f"--{name} {n}: it must divide the number of ranks, {world}")
    if device == "cpu" and "WORLD_SIZE" not in os.environ:
        return Ranks()
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"  # objects and numbers on the host travel by gloo
    if device != "cpu":
        local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        check(local < there, f"--nproc-per-node must be at most {there}, the number of GPUs here")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return Ranks(0, 1, device)
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=MEET)))
    except dist.DistError as e:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise OSError(f"not all of {world} ranks met at {where} within {MEET} s: {str(e).splitlines()[0]}") from None
    # A rank may wait hours for another that samples longer: what ends a run is not time but `watch`.
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(days=1))
    threading.Thread(target=watch, args=(store.clone(), rank, world), daemon=True).start()
    return Ranks(rank, world, device, cp, replicas)


def watch(store, rank, world):
    """Give signs of life and look for the next rank's, in a thread, for as long as the process lives. Where one falls silent, all
    ranks end: torchrun sees to that on its own node, but those on others would wait for the dead for ever."""
    after, last, heard, pause = (rank + 1) % world, None, time.monotonic(), SILENCE / 8  # some signs may be late, not all
    for beat in itertools.count():
        try:
            store.set(f"sign of {rank}", str(beat))
            sign = store.get(f"sign of {after}") if store.check([f"sign of {after}"]) else None
            if sign != last:
                last, heard = sign, time.monotonic()
            elif time.monotonic() - heard > SILENCE:
                store.set("dead", str(after))
            dead = int(store.get("dead")) if store.check(["dead"]) else None
        except RuntimeError:
            time.sleep(pause)  # the store is gone: rank 0 or its torchrun has ended. After a good end this process is gone by now
            dead = 0
        if dead is not None:
            if 0 in (rank, dead):
                print(f"error: rank {dead}{' or its torchrun' if dead == 0 else ''} gives no sign of life; what it printed may say why. "
                      "Give the same command again to go on from the last checkpoint", file=sys.stderr, flush=True)
            time.sleep(2 * pause if rank == 0 else 0)  # it may keep the rendezvous, where the others have to read this
            os._exit(1)
        time.sleep(pause)


def shard(model, ranks, recompute=False, compile=False):
    """FSDP2: each rank keeps a slice of every parameter, gathers a block's when it needs them, and averages gradients.
    On a GPU compute is bf16 over float32 master weights and float32 reductions; on a CPU it is float32 throughout."""
    model.model.checkpoint_activations = recompute
    for block in model.model.layers if compile else ():
        block.forward = torch.compile(block.forward, dynamic=True)  # the forward alone: FSDP's hooks stay outside
    if not dist.is_initialized():
        return model.to(ranks.device)
    if ranks.cp > 1:
        model.cp = ContextParallel(model.config, ranks)
    mesh = init_device_mesh(ranks.device.split(":")[0], (ranks.replicas, ranks.world // ranks.replicas),
                            mesh_dim_names=("replica", "shard")) if ranks.replicas > 1 else None
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if "cuda" in ranks.device else None, reduce_dtype=torch.float32)
    for block in model.model.layers:  # one at a time: from_pretrained(mapped=True) has left them in their file
        fully_shard(block.to(ranks.device, torch.float32), mesh=mesh, mp_policy=policy)
    return fully_shard(model.to(ranks.device, torch.float32), mesh=mesh, mp_policy=policy)


# Context parallelism as in DeepSpeed Ulysses (arXiv 2309.14509). N neighbouring ranks share every row. Norms, projections, MLP and
# head work on single tokens; attention, convolution and scan need whole sequences, but their heads know nothing of each other.
# So two all-to-alls a mixer change who holds what, here for N = 2, and everything between them is the block as it stands:
#
#                             rank 0                               rank 1
#     norms, projections      first half of tokens, all heads      second half of tokens, all heads
#       to_heads
#     attention, conv, scan   all tokens, first half of heads      all tokens, second half of heads
#       to_tokens
#     o_proj, MLP, head       first half of tokens, all heads      second half of tokens, all heads
#
# Heads share what they read: hq / hkv query heads a key and value head, h / g SSM heads a group's B and C. to_heads sends such a
# group to every rank that has heads of it. Each rank convolves with its own channels' weights, and with those of B and C that it
# got: where several ranks compute a gradient of the same weight, FSDP's reduction adds them up, as for any other.


def shares(heads, n, groups):
    """(own, read): for each of n ranks its heads, and the groups that these read (key and value heads, or B and C). All ranks list as
    many groups, and read each as often, so that shapes agree; where that cannot be, they list a group for every head."""
    own = [list(range(r * heads // n, (r + 1) * heads // n)) for r in range(n)]
    read = [[j * groups // heads for j in share] for share in own]
    few = [sorted(set(r)) for r in read]
    even = all(len(f) == len(few[0]) and r == [group for group in f for _ in range(len(r) // len(f))] for f, r in zip(few, read))
    return own, few if even else read  # if not even, every head gets a copy of its own


class _AllToAll(torch.autograd.Function):
    """x (n, ...): x[j] goes to rank j, and what comes to stand at j is from rank j. Its own inverse, and so its own gradient."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, x = group, x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad, ctx.group), None


class _AllGather(torch.autograd.Function):
    """x (s,) -> (n s,), all ranks' values. Each rank's loss sees them all, and gives a gradient to its own only."""

    @staticmethod
    def forward(ctx, x, cp):
        ctx.cp, shares = cp, [torch.empty_like(x) for _ in range(cp.size)]
        dist.all_gather(shares, x.contiguous(), group=cp.group)
        return torch.cat(shares)

    @staticmethod
    def backward(ctx, grad):
        return grad.chunk(ctx.cp.size)[ctx.cp.rank], None


class ContextParallel:
    """What FalconH1.forward and pack_logprobs need to know of the ranks that share a row."""

    def __init__(self, config, ranks):
        c, n = config, ranks.cp
        for name in ("num_attention_heads", "mamba_n_heads"):
            check(getattr(c, name) % n == 0, f"--cp {n}: {name} {getattr(c, name)} is not a multiple of it")
        self.rank, self.size, self.group = ranks.rank % n, n, dist.new_subgroups(n, timeout=timedelta(days=1))[0]

        def places(parts):  # (first place, places of an item, items of each rank) -> the places (n, wanted), how many of each part
            rows = [[[start + i * width + j for i in items[r] for j in range(width)] for start, width, items in parts] for r in range(n)]
            return torch.tensor([sum(row, []) for row in rows], device=ranks.device), [len(part) for part in rows[0]]

        own, read = shares(c.num_attention_heads, n, c.num_key_value_heads)
        k, v = c.num_attention_heads, c.num_attention_heads + c.num_key_value_heads
        self.attention = places([(0, 1, own), (k, 1, read), (v, 1, read)])
        own, read = shares(c.mamba_n_heads, n, c.mamba_n_groups)
        b, c_, dt = np.cumsum(c.mamba_widths[1:4]).tolist()  # where B, C and dt begin, behind x
        index, sizes = places([(0, c.mamba_d_head, own), (b, c.mamba_d_state, read), (c_, c.mamba_d_state, read), (dt, 1, own)])
        self.mamba = index, [sum(sizes[:3]), sizes[3]]
        self.channels, self.heads = index[self.rank, : -sizes[3]], index[self.rank, -sizes[3] :] - dt

    def to_heads(self, x, part):
        """x (1, s, places, ...), all of this rank's tokens -> this rank's places of all tokens, split into (1, n s, ..., ...)."""
        index, sizes = part
        wanted = x.squeeze(0).index_select(1, index.flatten()).unflatten(1, index.shape)
        wanted = wanted.movedim(1, 0)  # (n, s, own, ...)
        return _AllToAll.apply(wanted, self.group).flatten(0, 1)[None].split(sizes, 2)

    def to_tokens(self, y):
        """y (1, n s, own heads, ...) -> (1, s, heads, ...)."""
        y = y.squeeze(0).unflatten(0, (self.size, -1))  # a view, and so is its gradient
        return _AllToAll.apply(y, self.group).movedim(0, 1).flatten(1, 2)[None]

    def own_weights(self, weight, bias, A, D):
        """Convolution weights of this rank's channels, A and D of its heads."""
        return weight[self.channels], None if bias is None else bias[self.channels], A[self.heads], D[self.heads]

    def own_tokens(self, x, fill):
        """This rank's tokens of x (t,), whose end is filled up to a multiple of the ranks."""
        return F.pad(x, (0, -len(x) % self.size), value=fill).chunk(self.size)[self.rank]


@torch.no_grad()
def whole_copy(model, copy=None, keep=True):
    """A model to sample from: the model itself, or under FSDP an unsharded copy (refreshed in `copy` when that is given),
    gathered one parameter at a time. Every rank must call, for each holds a slice. A rank that does not
    sample calls with keep=False: it holds one whole parameter at a time, and gets None."""
    if not dist.is_initialized():
        return model
    if keep and copy is None:
        device = next(model.parameters()).device
        with torch.device("meta"):
            copy = FalconH1(model.config)
        copy = copy.to(torch.bfloat16 if device.type == "cuda" else torch.float32).to_empty(device=device)
    target = copy.state_dict() if keep else {}
    for name, p in model.state_dict().items():  # state_dict reshards what the last forward pass has gathered
        whole = p.full_tensor()
        if keep:
            target[name].copy_(whole)
        del whole  # before the next one is gathered
    return copy


# ---------------------------------------------------------------------------------------------------------------------
# 3. A run and its folder


class Run:
    """The folder of a run: its identity, its log, its checkpoints. Only rank 0 writes, except the shards of a checkpoint.

    Used in a `with`: however the block ends, a checkpoint that was begun is completed."""

    VOLATILE = ("out", "fresh", "device", "cp", "replicas", "checkpoint_activations", "compile", "save_every", "eval_every",
                "judge", "judge_cache")  # may differ between the parts of one run; the last two are train_rl's

    def __init__(self, args, ranks):
        self.out, self.ranks = Path(args.out), ranks
        self.identity = {k: v for k, v in asdict(args).items() if k not in self.VOLATILE}
        if ranks.rank == 0:
            self.lock = data.open_run(self.out, self.identity, ("log.jsonl", "trainer", "model"), fresh=args.fresh,
                                      device=ranks.device, ranks=ranks.world)
        if dist.is_initialized():
            dist.barrier()
        self.log = open(self.out / "log.jsonl", "a", encoding="utf-8") if ranks.rank == 0 else None
        self.started = None  # step and time of the first line
        self.logged = 0  # the last step that log.jsonl held when the run was resumed
        # Checkpoints are completed by a thread, one at a time. What it says to other ranks must not mix with training's collectives.
        self.thread, self.saving = ThreadPoolExecutor(1), None
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if dist.is_initialized() else None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.finish()

    def write(self, step, steps, record, shown=()):
        """All of record into log.jsonl, and one line with the time left: its fields, or those of `shown`."""
        if self.saving and self.saving.done():
            self.finish()  # a full disk ends the run now, not at the next checkpoint
        if self.ranks.rank != 0:
            return
        self.log.write(json.dumps({"step": step, **record}) + "\n")
        self.log.flush()
        first, since = self.started = self.started or (step, time.time())  # the first step's time is no guide: it compiles and warms up
        left = f"{(time.time() - since) / (step - first) * (steps - step):.0f}s" if step > first else "?"
        text = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()
                         if k in (shown or record))
        tqdm.write(f"step {step:5d}/{steps}  {text}  left {left}", file=sys.stdout)

    def save(self, step, model, optimizer, tokenizer, state):
        """Begin checkpoint `step`: copy to the host what it needs. Training goes on while the rest is done in the background.

        state, JSON-able, comes back from `resume`. Raises the OSError of the checkpoint before, if that could not be completed."""
        self.finish()
        temporary = self.out / "trainer" / f"step-{step:09d}.tmp"
        if self.ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        weights, moments = get_state_dict(model, optimizer)
        writing = dcp.async_save({"model": weights, "optimizer": moments}, checkpoint_id=temporary, process_group=self.group)
        self.saving = self.thread.submit(self._complete, writing, temporary, model.config, tokenizer, {"step": step, **state})

    def finish(self):
        """Wait for the checkpoint that was begun last, if any. OSError if it could not be completed."""
        saving, self.saving = self.saving, None
        if saving is not None:
            saving.result()

    def _complete(self, writing, temporary, config, tokenizer, state):
        """When all shards are there, state.json with every file's size and checksum; the rename, which makes the checkpoint count;
        then the model in the published format. The last two are kept: one may be broken without a run being lost."""
        try:
            writing.result()
            names = self.ranks.all_values(sorted(path.name for path in temporary.iterdir()), self.group)[0]
            files = dict(zip(names, self.ranks.each(lambda name: fingerprint(temporary / name), names, self.group)))
            if self.ranks.rank == 0:
                data.write_text(temporary / "state.json", json.dumps({"files": files, **state}))
                shutil.rmtree(final := temporary.with_suffix(""), ignore_errors=True)
                temporary.rename(final)
                for old in sorted(final.parent.glob("step-?????????"))[:-2]:
                    shutil.rmtree(old)
        except (OSError, RuntimeError, dcp.CheckpointException) as e:  # a full disk: torch's writer has a RuntimeError for it
            shutil.rmtree(temporary, ignore_errors=True)
            why = str(e).strip().splitlines()[-1]
            if "gloo" in why:  # not the disk: another rank has ended
                raise RuntimeError(why) from None
            raise OSError(f"{self.out}: step {state['step']} could not be saved ({why}); is the disk full? Earlier checkpoints are "
                          f"whole: make room and give the same command again") from None
        if self.ranks.rank == 0:
            export(config, tokenizer, final, self.out / "model")

    def resume(self, model, optimizer, tokenizer):
        """Load the newest whole checkpoint into model and optimizer; return its state, or None at the start of a run."""
        for folder in sorted((self.out / "trainer").glob("step-?????????"), reverse=True):
            try:
                state = json.loads((folder / "state.json").read_text())
                found = self.ranks.each(lambda name: fingerprint(folder / name), [*state["files"]], desc=f"checking {folder}")
                bad = [name for name, one in zip(state["files"], found) if one != state["files"][name]]
                check(not bad, f"{', '.join(bad)}: damaged")
            except (OSError, ValueError, KeyError, TypeError) as e:
                if self.ranks.rank == 0:
                    print(f"{folder}: not a whole checkpoint ({e}); trying the one before", file=sys.stderr)
                continue
            weights, moments = get_state_dict(model, optimizer)
            try:
                dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
            except dcp.CheckpointException as e:
                raise ValueError(f"{folder}: a checkpoint of another model: {str(e).strip().splitlines()[-1]}") from None
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
            log = self.out / "log.jsonl"
            lines = log.read_bytes().rpartition(b"\n")[0].splitlines()  # the last may be half a line: a full disk, a power cut
            kept = [r for r in (data.parse_json(line, str(log)) for line in lines) if r["step"] <= state["step"]]
            self.logged = max([r["step"] for r in kept], default=0)
            if dist.is_initialized():
                dist.barrier()
            if self.ranks.rank == 0:
                self.log.close()
                data.write_jsonl(log, kept)
                self.log = open(log, "a", encoding="utf-8")
                print(f"{folder}: continuing after step {state['step']}")
                # The export may be missing, if the run was killed after the rename.
                self.saving = self.thread.submit(export, model.config, tokenizer, folder, self.out / "model")
            return state
        if self.ranks.rank == 0:
            self.log.truncate(0)  # of a part that ended before its first checkpoint
        return None


def fingerprint(path):
    """[size, CRC-32] of a file, or None where it cannot be read: a rank that raised here would leave the others waiting."""
    size = crc = 0
    try:
        with open(path, "rb") as file:
            while piece := file.read(2**24):
                size, crc = size + len(piece), zlib.crc32(piece, crc)
        return [size, crc]
    except OSError:
        return None


def export(config, tokenizer, checkpoint, folder):
    """Write the model of a finished checkpoint to folder, in the published format. Weights are read a tensor at a time: nobody ever
    holds all of them, and no other rank is needed."""
    reader = dcp.FileSystemReader(checkpoint)
    metadata = reader.read_metadata()
    reader.read_metadata = lambda *args, **kwargs: metadata  # once; for hundreds of shards it takes seconds

    def read(name, like):
        v = torch.empty(like.shape)
        dcp.load({"model": {name: v}}, storage_reader=reader, no_dist=True)
        return v
    with torch.device("meta"):
        model = FalconH1(config)
    model.save_pretrained(folder, read)
    tokenizer.save(folder)


def run_main(body):
    """Run a script's body and return its exit status; what a user can put right ends in one line and 1, from whichever rank saw it."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what is meant here, not a mistake
    status = 0
    try:
        body()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(torch.zeros(1))  # nobody leaves before the others: rank 0 may keep the rendezvous
    except (ValueError, OSError) as e:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # seconds: where rank 0 fails alike, its line is enough, and torchrun ends this rank meanwhile
        print(f"error: {e}", file=sys.stderr, flush=True)
        status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        status = 130  # what shells call the end by Ctrl-C
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        time.sleep(2 * SILENCE)  # a rank this one talks to has ended: by now `watch` has said which, or torchrun has ended this one
        raise
    if dist.is_initialized():
        if dist.get_world_size() > 1:  # after an error other ranks may hang in a collective: torchrun ends them
            sys.stdout.flush()
            os._exit(status)  # not sys.exit: gloo's threads now and then abort a Python that winds up, and a good run seems to have failed
        dist.destroy_process_group()
    return status


# ---------------------------------------------------------------------------------------------------------------------
# 4. The optimiser


def learning_rate(step, steps, peak, warmup):
    """Linear up over the first `warmup` share of the steps, linear down to 0 at the end; step counts from 0."""
    rising = max(1, round(warmup * steps))
    return peak * min((step + 1) / rising, (steps - step) / max(1, steps - rising))


def make_optimizer(model, lr, weight_decay):
    """AdamW with default betas. Vectors (norms, biases, A_log, dt_bias, D) are scales, and decay would pull them to 0."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def update(model, optimizer, loss, lr, clip):
    """Clip, step, clear; returns the loss and the gradient's norm before clipping, over all ranks.

    Both are read here, at once: nowhere else in a step does the host wait for a GPU."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    loss, norm = torch.stack([loss, norm.double()]).tolist()
    check(math.isfinite(loss), f"the loss is {loss}")
    check(math.isfinite(norm), f"the gradient's norm is {norm}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm


def backward_all(model, packs, ranks, loss_of):
    """Accumulate the gradient of the sum of loss_of(pack); this rank takes its team's share, see Ranks.own.

    Returns this rank's part of the sum, float64, on the device; the parts add up. FSDP averages over ranks,
    so each loss is scaled by their number. Every pass reduces gradients to each rank's slice: kept whole
    until the last pass, they would take 4 bytes per parameter. Replicas exchange their slices in the last."""
    own, total = ranks.own(packs), 0
    for i, row in enumerate(own):
        if dist.is_initialized():
            model.set_requires_all_reduce(i == len(own) - 1)
        loss = loss_of(row)
        (loss * ranks.world).backward()
        total += loss.detach().double()
    return total / ranks.cp


# ---------------------------------------------------------------------------------------------------------------------
# 5. The loss


def pack_logprobs(model, row, temperature=1.0):
    """Log-probabilities and entropies (t,) of a Pack's targets; positions without a target give 0."""
    cp, cu, ids = model.cp, row.cu_seqlens.tolist(), torch.from_numpy(row.input_ids)
    targets = torch.from_numpy(np.where(row.weights != 0, row.targets, -1))
    if cp is not None:
        ids, targets, cu = cp.own_tokens(ids, 0), cp.own_tokens(targets, -1), [*cu[:-1], cu[-1] + -cu[-1] % cp.size]
    values = model(ids[None], targets=targets[None], cu_seqlens=cu, temperature=temperature)
    return tuple(v[0] if cp is None else _AllGather.apply(v[0], cp)[: len(row.input_ids)] for v in values)


def sft_loss(model, row, total_weight):
    """- sum_i w_i log p(target_i) / sum over the *global* batch of w; w is the loss mask times the sample's weight.

    The paper's L_r = R sum_i l_i m_i / (eps + sum over all ranks of sum_i m_i), its factor R being in `backward_all`."""
    weights, = to_device([torch.from_numpy(row.weights)], next(model.parameters()).device)
    logprobs, _ = pack_logprobs(model, row)
    return -(weights * logprobs).sum() / total_weight


def weight_of(packs):
    """What the loss of a global batch is divided by: the weights of all tokens that are to be predicted, on all ranks."""
    total = float(sum(row.weights.sum() for row in packs))
    check(total > 0, "no token to learn from in the batch: --context has cut them all off")
    return total


def train_step(model, optimizer, packs, lr, clip, ranks):
    """One update on a global batch of packs; returns its loss and the gradient's norm."""
    total = weight_of(packs)
    loss = backward_all(model, packs, ranks, lambda row: sft_loss(model, row, total))
    return update(model, optimizer, ranks.all_sum(loss), lr, clip)


@torch.no_grad()
def held_out_loss(model, samples, args, ranks):
    """Mean loss per token over samples that are not trained on, in nats, weighted as in training."""
    packs = data.pack(samples, args.pack_tokens, ranks.teams)
    total = weight_of(packs)
    loss = sum(sft_loss(model, row, total).double() for row in ranks.own(packs))
    return float(ranks.all_sum(loss / ranks.cp))


def sample_text(model, tokenizer, sample, max_new_tokens=200):
    """What the model answers to the first prompt of a sample, greedily."""
    if not sample.mask.any():
        return "(the prompt alone fills --context)"
    prompt = sample.ids[: int(sample.mask.argmax())].tolist()
    room = min(max_new_tokens, model.config.max_position_embeddings - len(prompt))
    trace = generate(model, [prompt], max_new_tokens=room, temperature=0, stop_ids=tokenizer.stop_ids)[0]
    return tokenizer.decode(prompt) + " >>> " + tokenizer.decode(trace.tokens)


# ---------------------------------------------------------------------------------------------------------------------
# 6. Training


def check_at_least(least, args, *names):
    for name in names:
        check(getattr(args, name) >= least, f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")


def load(args, ranks):
    """Tokenizer, model, SftFiles, a Loader of the samples that are trained on, and a list of the others, the held-out ones."""
    check(args.preset in PRESETS, f"--preset {args.preset}: not one of {', '.join(PRESETS)}")
    check_at_least(1, args, "steps", "batch", "context", "eval_every", "save_every")
    check_at_least(0, args, "held_out", "limit", "seed", "lr", "warmup", "weight_decay", "clip")
    check(args.pack_tokens >= args.context, f"--pack-tokens {args.pack_tokens} must hold a sample of --context {args.context}")
    if args.data == Args.data and not Path(args.data).exists() and ranks.rank == 0:
        check(data.main(["make", "--out", str(Path(args.data).parent)]) == 0, f"{args.data}: could not be made")
    if dist.is_initialized():
        dist.barrier()
    tokenizer = data.load_tokenizer(args.init) if args.init else data.Tokenizer.byte_level()
    ranks.agree("the data", data.sizes_of(args.data))
    samples = data.SftFiles(args.data, tokenizer, args.context, args.trim, args.limit, ranks.each)
    check(len(samples) > args.held_out, f"{args.data}: {len(samples)} samples, of which --held-out keeps {args.held_out}")
    torch.manual_seed(args.seed)
    model = load_model(args.init) if args.init else FalconH1(PRESETS[args.preset])
    check(args.context <= model.config.max_position_embeddings, f"--context {args.context} exceeds the model's "
          f"max_position_embeddings {model.config.max_position_embeddings}")
    model = shard(model, ranks, args.checkpoint_activations, args.compile)
    held = np.linspace(0, len(samples) - 1, args.held_out, dtype=int)
    rows = {domain: np.setdiff1d(numbers, held) for domain, numbers in samples.rows.items()}
    loader = data.Loader(rows, args.batch, args.seed, parse_mixture(args.mixture), samples.checksum)
    return tokenizer, model, samples, loader, ranks.each(samples.__getitem__, held)


def load_model(folder):
    """A checkpoint: the folder of a run (its model/ is meant) or a model folder; float32 master weights."""
    return FalconH1.from_pretrained(data.model_folder(folder), dtype=torch.float32, mapped=dist.is_initialized())


def parse_mixture(text):
    """ "math=0.6,code=0.4" -> {"math": 0.6, "code": 0.4}; "" -> None."""
    try:
        return {k.strip(): float(v) for k, v in (part.split("=") for part in text.split(","))} if text else None
    except ValueError:
        raise ValueError(f"--mixture {text!r}: expected domain=weight,domain=weight") from None


def main():
    args = data.parse_args(Args, __doc__.partition("\n\n")[0])
    ranks = start_ranks(args.device, args.cp, args.replicas)
    ranks.agree("the arguments", asdict(args))
    tokenizer, model, samples, loader, held_out = load(args, ranks)  # before --fresh deletes anything: bad data must cost nothing
    run = Run(args, ranks)
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    state = run.resume(model, optimizer, tokenizer)
    if state is not None:
        loader.load_state_dict(state["loader"])
    elif ranks.rank == 0:
        print("  ".join(f"{k}={v}" for k, v in asdict(args).items()))
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(samples):,} samples, {ranks.world} rank(s)")

    def report(step, record):
        """Evaluate where it is due, then log: after saving, since what happens here must not cost the run its last steps."""
        if step == args.steps or step % args.eval_every == 0:
            if held_out:
                record["held_out"] = held_out_loss(model, held_out, args, ranks)
            whole = whole_copy(model, keep=ranks.rank == 0)  # gone when this function returns
            if ranks.rank == 0:
                text = sample_text(whole, tokenizer, held_out[step % len(held_out)] if held_out else samples[0])
                tqdm.write("sample: " + " ".join(text.split()), file=sys.stdout)
        run.write(step, args.steps, record)

    with run:
        if state is not None and run.logged < state["step"]:  # it was killed between saving and logging
            report(state["step"], state["record"])
        for step in range(state["step"] if state else 0, args.steps):
            start, lr = time.time(), learning_rate(step, args.steps, args.lr, args.warmup)
            batch = ranks.each(samples.__getitem__, next(loader))
            packs = data.pack(batch, args.pack_tokens, ranks.teams)
            try:
                loss, norm = train_step(model, optimizer, packs, lr, args.clip, ranks)
            except ValueError as e:
                raise ValueError(f"step {step + 1}, samples {step * args.batch} to {(step + 1) * args.batch - 1} of the stream: {e}; "
                                 f"{run.out / 'trainer'} holds what was saved before") from None
            record = {"loss": loss, "grad_norm": norm, "lr": lr, "tokens": sum(len(row.input_ids) for row in packs),
                      "seconds": round(time.time() - start, 3)}
            if args.trim:
                record["trimmed"] = sum(sample.trimmed for sample in batch)
            if step + 1 == args.steps or (step + 1) % args.save_every == 0:
                run.save(step + 1, model, optimizer, tokenizer, {"loader": loader.state_dict(), "record": record})
            report(step + 1, record)
    if ranks.rank == 0:
        print(f"the model is in {run.out / 'model'}")


if __name__ == "__main__":
    sys.exit(run_main(main))
