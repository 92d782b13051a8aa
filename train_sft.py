"""Supervised fine-tuning on long chains of thought (Falcon-H1R, section 2).
The defaults shown are the small run's; real models start from the paper's, see PAPER_LR, PAPER_SIZES.

    python train_sft.py                                the small CPU run: makes its data, saves runs/tiny/sft
    python train_sft.py --data my.jsonl --out runs/my --init FOLDER --lr 1e-4 --steps 500
    torchrun --nproc-per-node 2 train_sft.py --fresh   the same losses and gradients on two ranks
    torchrun --nproc-per-node 8 train_sft.py --cp 2 --checkpoint-activations --init FOLDER ...     long rows

A step draws one global batch of samples, packs them into rows of at most --pack-tokens tokens, and deals the
rows out to the ranks. Every rank knows the whole batch, so the loss is divided by the weight of *all* its
tokens before any gradient is computed: each token weighs the same, whatever its rank and row (the paper's
"balanced data-parallel token normalisation", --normalise batch). Ranks and rows then change rounding only.

An interrupted run continues when the same command is given again, on a CPU bit for bit. (On a GPU flash
attention's backward pass adds with atomics, so any two runs differ in rounding.) No random generator keeps a
state: data order and samples are functions of (seed, position), so a checkpoint is weights, optimizer, step
and positions.

    OUT/run.json      arguments, versions, hardware, commit        OUT/trainer/step-N/   to resume from
    OUT/log.jsonl     one object per step                          OUT/model/            the published format

Deviations from the paper: the samples of a batch are packed (the paper does not say); a sample's difficulty
weight enters the loss and its normalisation alike, so a batch of hard samples takes no larger step. To copy
this, also take model.py, decode.py, ssm_scan.py, data.py and tokenizer.py. Sections 1 to 5 are the method;
train_rl.py uses the rest.
"""

import glob
import hashlib
import json
import math
import os
import shutil
import sys
import time
import warnings
import zlib
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import data
from data import flag
from model import PRESETS, TINY, FalconH1, FalconH1Config, check, generate, set_threads
from ssm_scan import to_device

# 1. Arguments -----------------------------------------------------------------------------------------------

@dataclass
class CommonArgs:
    """The flags of both trainers."""
    pack_tokens: int = flag(4096, "longest row, in tokens: bounds memory only; 0: fits any sample")
    clip: float = flag(1.0, "largest norm of the whole gradient; 0: no clipping")
    seed: int = flag(0, "of weights, data order and sampling")
    limit: int = flag(0, "use the first samples or problems only; 0: all")
    cp: int = flag(1, "context-parallel size: ranks that share each row's tokens; divides ranks and heads")
    replicas: int = flag(1, "replicas of the sharded model (HSDP); one per node: only gradients leave it")
    checkpoint_activations: bool = flag(False, "recompute activations backward: less memory, more compute")
    compile: bool = flag(False, "torch.compile what blocks and loss do per token; takes minutes at the start")
    device: str = flag("", "cpu or cuda; empty: cuda if available")
    fresh: bool = flag(False, "start over, deleting an earlier run in --out")

@dataclass
class Args(CommonArgs):
    out: str = flag("runs/tiny/sft", "folder of the run")
    data: str = flag("runs/tiny/data/sft.jsonl", "files of samples: a, b or *.jsonl; the default one is made")
    init: str = flag("", "checkpoint folder to start from; empty: --preset, random weights and byte tokens")
    preset: str = flag("tiny", "model size if --init is empty")
    steps: int = flag(3400, "optimizer steps; 0: three epochs, as in the paper")
    batch: int = flag(6, "samples per global batch")
    context: int = flag(1024, "longest sample, in tokens; 0: the paper's 36864, or all the model's positions")
    trim: bool = flag(False, "cut longer samples on the right instead of refusing them; logs how many")
    lr: float = flag(2.5e-3, "peak learning rate")
    warmup: float = flag(0.04, "share of steps with rising learning rate; it then falls linearly to 0")
    weight_decay: float = flag(0.01, "AdamW decay of matrices; vectors have none")
    normalise: str = flag("batch", "mean over the batch's tokens (paper); rank: per rank, then over ranks")
    mixture: str = flag("", "domain weights, e.g. math=0.6,code=0.4; empty: by size")
    held_out: int = flag(100, "samples kept out of training, spread over the files; 0: no evaluation")
    eval_every: int = flag(850, "steps between evaluations: held-out loss and a sample text")
    save_every: int = flag(400, "steps between checkpoints")

# The defaults above are those of the tiny run, from random weights. Its learning rate harms trained weights
# (4e-3 took a similar model from 37 to 28% pass@1 in 50 steps), and its sizes fit no larger model. So the
# paper's values (Table 1) come first on the command line, where flags that are given replace them.
PAPER_LR = "--lr 1.024e-3".split()  # for trained weights and other shapes
PAPER_SIZES = "--batch 512 --steps 0 --context 0 --pack-tokens 0".split()  # for other shapes

def check_numbers(args, *counts):
    """Check that no number is negative or infinite, and that those named in `counts` are at least 1."""
    for name, value in asdict(args).items():
        least = int(name in counts)
        valid = isinstance(value, str) or least <= value < math.inf
        check(valid, f"--{name.replace('_', '-')} {value}: must be at least {least}, and finite")

def check_choice(args, name, *choices):
    """Check that a flag has one of these values."""
    value = getattr(args, name)
    check(value in choices, f"--{name} {value}: expected {' or '.join(choices)}")

# 2. The loss ------------------------------------------------------------------------------------------------

def local_tokens(model, values, fill=0):
    """The part of a row that this rank computes: values (t,), NumPy -> tensor; under --cp a share, padded."""
    if model.cp is not None:
        padded = np.pad(values, (0, -len(values) % model.cp.size), constant_values=fill)
        values = np.split(padded, model.cp.size)[model.cp.rank]
    return torch.from_numpy(values)

def pack_logprobs(model, row, temperature=1.0):
    """Log-probability and entropy, in nats, of a Pack's targets, those of this rank's local_tokens.
    Targets without weight give 0 and cost no logits."""
    ids = local_tokens(model, row.input_ids)
    targets = local_tokens(model, np.where(row.weights != 0, row.targets, -1), fill=-1)
    cu_seqlens = row.cu_seqlens.tolist()
    if model.cp is not None:
        cu_seqlens[-1] += -cu_seqlens[-1] % model.cp.size  # the padding belongs to the last document
    values = model(ids[None], targets=targets[None], cu_seqlens=cu_seqlens, temperature=temperature)
    return tuple(v[0] for v in values)

def sft_loss(model, row, total_weight):
    """-sum_i w_i log p(target_i) / total_weight over this rank's tokens of a Pack.
    w_i: the loss mask times the sample's weight. total_weight: what loss_divisor returns."""
    weights, = to_device([local_tokens(model, row.weights)], next(model.parameters()).device)
    return -(weights * pack_logprobs(model, row)[0]).sum() / total_weight

def total_loss_weight(packs):
    """The summed weights of all tokens that a global batch predicts, on all ranks."""
    total = float(sum(row.weights.sum() for row in packs))
    check(total > 0, "no token to learn from in the batch: --context has cut them all off")
    return total

def loss_divisor(packs, ranks, normalise="batch"):
    """What sft_loss divides by on this rank, so that the sum of all ranks' losses is the global batch's loss.
    W_r: the sum of w_i over the rows of rank r, one of R. Ranks that share rows (--cp) count as one.
        "batch"  W_1 + ... + W_R: every token weighs the same. This is the paper's
                 L_r = R * sum_i(l_i m_i) / (eps + sum over all ranks of sum_i m_i)
                 without its factor R, which accumulate_gradients applies.
        "rank"   R W_r: the mean over each rank's tokens, then over ranks. A token of rank r weighs
                 (W_1 + ... + W_R) / (R W_r) times as much as above: more if its rank has few tokens."""
    total = total_loss_weight(packs)
    if normalise == "batch":
        return total
    own = float(sum(row.weights.sum() for row in ranks.local_rows(packs)))
    return ranks.dp_size * own or 1.0  # a rank that has dummy rows only adds 0 / 1, not 0 / 0

# 3. One step ------------------------------------------------------------------------------------------------

def learning_rate(step, steps, peak, warmup):
    """Linear up over the first `warmup` share of the steps, then linear down to 0; step counts from 0."""
    rising = max(1, round(warmup * steps))
    return peak * min((step + 1) / rising, (steps - step) / max(1, steps - rising))

def accumulate_gradients(model, packs, ranks, loss_of):
    """Add up the gradient of the sum of loss_of(pack) over a global batch; this rank computes its local_rows.
    Returns this rank's part of the loss, float64, on the device; the parts of all ranks add up to it."""
    rows = ranks.local_rows(packs)
    total = 0
    for i, row in enumerate(rows):
        # Every pass reduces gradients to each rank's slice. Kept whole until the last pass, they would take
        # 4 bytes per parameter. Replicas exchange their slices in the last pass only.
        if dist.is_initialized():
            model.set_requires_all_reduce(i == len(rows) - 1)
        loss = loss_of(row)
        (loss * ranks.world).backward()  # FSDP averages over the ranks: this is the R of L_r
        total += loss.detach().double()
    return total

def train_step(model, optimizer, packs, lr, clip, ranks, normalise="batch"):
    """One update on a global batch of packs. Returns its loss and the gradient norm before clipping."""
    total = loss_divisor(packs, ranks, normalise)
    loss = accumulate_gradients(model, packs, ranks, lambda row: sft_loss(model, row, total))
    return optimizer_step(model, optimizer, ranks.all_sum(loss), lr, clip)

# 4. Training ------------------------------------------------------------------------------------------------

def main():
    args, config = read_args()
    set_threads(config)
    ranks = start_ranks(args.device, args.cp, args.replicas)
    ranks.check_same_on_all("the arguments", asdict(args))

    # Bad input must cost nothing: read everything before Run() deletes what --fresh replaces.
    tokenizer = data.load_tokenizer(args.init) if args.init else data.Tokenizer.byte_level()
    samples, loader, held_out = open_samples(args, tokenizer, ranks)
    args.steps = args.steps or math.ceil(3 * (len(samples) - args.held_out) / args.batch)
    torch.manual_seed(args.seed)
    model = load_model(args.init) if args.init else FalconH1(config)
    model = shard(model, ranks, args.checkpoint_activations, args.compile)

    # Continue after the last checkpoint, if there is one.
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    run = Run(args, ranks, tokenizer, samples.checksum)
    evaluation = partial(evaluate, model, tokenizer, held_out, args, ranks)
    state = {"drawn": loader.drawn} | run.resume(model, optimizer)
    loader.drawn = state["drawn"]
    with run:
        if not state["logged"]:  # of the checkpoint's own step
            run.write(state["step"], state["record"] | evaluation(state["step"]))
        for step in range(state["step"], args.steps):
            start = time.time()
            done = step + 1
            # All ranks draw the same batch, each reads its share of the samples, all pack all of them.
            batch = ranks.share_out(samples.__getitem__, next(loader))
            packs = data.pack(batch, args.pack_tokens, ranks.dp_size)
            # One update. An error, such as a loss that is not finite, names the samples.
            try:
                lr = learning_rate(step, args.steps, args.lr, args.warmup)
                loss, norm = train_step(model, optimizer, packs, lr, args.clip, ranks, args.normalise)
            except ValueError as e:
                what = f"samples {step * args.batch} to {done * args.batch - 1} of the stream: {e}"
                raise ValueError(f"step {done}, {what}; {run.trainer} holds what was saved before") from None
            record = {"loss": loss, "grad_norm": norm, "lr": lr}
            record["tokens"] = sum(len(row.input_ids) for row in packs)
            record["seconds"] = round(time.time() - start, 3)
            if args.trim:
                record["trimmed"] = sum(sample.trimmed for sample in batch)

            # Save before evaluating: what happens there must not cost the run its last steps.
            if done == args.steps or done % args.save_every == 0:
                run.save(done, model, optimizer, {"drawn": dict(loader.drawn), "record": record})
            run.write(done, record | evaluation(done))

def read_args():
    """The flags, checked, and the model's configuration; --context 0 and --pack-tokens 0 are replaced."""
    args = data.parse_args(Args, __doc__.partition("\n\n")[0])
    check_choice(args, "preset", *PRESETS)
    config = load_config(args.init) if args.init else PRESETS[args.preset]
    other = config not in TINY
    paper = PAPER_LR * bool(args.init or other) + PAPER_SIZES * other
    args = data.parse_args(Args, "", [*paper, *sys.argv[1:]])
    check_numbers(args, "batch", "eval_every", "save_every")
    check_choice(args, "normalise", "batch", "rank")
    check(args.warmup <= 1, f"--warmup {args.warmup:g}: it is a share of the steps, at most 1")
    longest = config.max_position_embeddings
    args.context = args.context or min(36864, longest)
    args.pack_tokens = args.pack_tokens or max(4096, args.context)
    check(args.context <= longest, f"--context {args.context} exceeds max_position_embeddings {longest}")
    check(args.pack_tokens >= args.context, f"--pack-tokens must be at least --context, {args.context}")
    return args, config

def open_samples(args, tokenizer, ranks):
    """SftFiles, a Loader of the samples to train on, and the list of held-out ones, spread over the files."""
    if args.data == Args.data and not Path(args.data).exists() and ranks.rank == 0:
        data.make(out=Path(args.data).parent)
    ranks.all_values(None)  # wait for rank 0
    samples = SftFiles(args.data, tokenizer, args.context, args.trim, args.limit, quiet=ranks.rank > 0)
    ranks.check_same_on_all("the data", samples.checksum)
    check_enough(args.data, len(samples), args.held_out, args.batch, quiet=ranks.rank > 0)
    held_out = np.linspace(0, len(samples) - 1, args.held_out, dtype=int)
    rows = {domain: np.setdiff1d(numbers, held_out) for domain, numbers in samples.rows.items()}
    loader = Loader(rows, args.batch, args.seed, parse_mixture(args.mixture))
    return samples, loader, ranks.share_out(samples.__getitem__, held_out)

def check_enough(path, rows, held_out, batch, quiet):
    """ValueError if --held-out leaves no row of a file to learn from; a warning if fewer than a batch."""
    left = rows - held_out
    check(left > 0, f"{path}: has {rows} rows, --held-out {held_out} keeps them all; hold out fewer")
    if left < batch and not quiet:
        print(f"warning: {path}: {left} rows to learn from; a batch of {batch} draws them more than once")

def parse_mixture(text):
    """ "math=0.6,code=0.4" -> {"math": 0.6, "code": 0.4}; "" -> None."""
    try:
        pairs = [part.split("=") for part in text.split(",")] if text else []
        mixture = {domain.strip(): float(weight) for domain, weight in pairs}
    except ValueError:
        raise ValueError(f"--mixture {text!r}: expected domain=weight,domain=weight") from None
    check(len(mixture) == len(pairs), f"--mixture {text!r}: it names a domain twice")
    return mixture or None

def load_config(folder):
    """The configuration of a checkpoint's model; it takes no time, whatever the size of the model."""
    data.check_exists(data.model_folder(folder))
    return FalconH1Config.from_json(data.model_folder(folder) / "config.json")

def load_model(folder):
    """A checkpoint's model, float32. With several ranks its tensors stay in their file until shard()."""
    mapped = dist.is_initialized()
    return FalconH1.from_pretrained(data.model_folder(folder), dtype=torch.float32, mapped=mapped)

@torch.no_grad()
def evaluate(model, tokenizer, held_out, args, ranks, step):
    """Every --eval-every steps and at the end {"held_out": mean loss per token, weighted as in training}, and
    {} in other steps. Rank 0 also prints the greedy answer to one of the held-out prompts."""
    if not held_out or (step < args.steps and step % args.eval_every):
        return {}
    packs = data.pack(held_out, args.pack_tokens, ranks.dp_size)
    total = total_loss_weight(packs)
    loss = sum(sft_loss(model, row, total).double() for row in ranks.local_rows(packs))

    sampler = unsharded_copy(model)  # every rank takes part; freed when this function returns
    sample = held_out[step % len(held_out)]
    if ranks.rank == 0:
        prompt = sample.ids[: int(sample.mask.argmax())].tolist()
        room = min(200, model.config.max_position_embeddings - len(prompt))
        trace, = generate(sampler, [prompt], max_new_tokens=room, temperature=0, stop_ids=tokenizer.stop_ids,
                          vocab_size=tokenizer.vocab_size)
        text = tokenizer.decode(prompt) + " >>> " + tokenizer.decode(trace.tokens)
        tqdm.write("sample: " + " ".join(text.split()), file=sys.stdout)
    return {"held_out": float(ranks.all_sum(loss))}

# 5. The stream of samples -----------------------------------------------------------------------------------

SMALL = 2**24  # bytes of files whose samples are kept in memory, where they take some five times as many

class SftFiles:
    """The samples of JSONL files, by number. Files may be larger than memory, which then holds only an index.

    Every line is read and checked once at the start, so that no bad line can end a run after days. A sample
    is tokenized when it is asked for, and its line read again; or at the start, if all files together have at
    most SMALL bytes. One of more than max_tokens is an error, as its answer would silently never be learned;
    or with `trim` it is cut on the right and marked, as the paper does above 36K tokens, and skipped if
    nothing to learn is left. pattern: names and globs, separated by commas. limit: samples to take, 0 for
    all; the lines beyond are checked, too. quiet: print nothing.
    Attributes: rows (domain -> array of sample numbers), checksum (of all lines), skipped (a count)."""

    def __init__(self, pattern, tokenizer, max_tokens, trim=False, limit=0, quiet=False):
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.trim = trim
        self.checksum = 0
        self.skipped = 0
        self.paths = files_of(pattern)
        self.index = array("q")  # of each sample: the numbers of its file and line, first byte, bytes
        rows = {}
        size = sum(map(os.path.getsize, self.paths))
        self.small = size <= SMALL
        self.kept = []  # the samples of small files
        with tqdm(None, f"reading {pattern}", size, unit="B", unit_scale=True, delay=2, disable=quiet) as bar:
            for i, path in enumerate(self.paths):
                check(not path.endswith(".gz"), f"{path}: unpack it, as samples are read in random order")
                for where, offset, raw in data.read_rows(path):
                    self.checksum = zlib.crc32(raw, self.checksum)
                    domain, sample = self._check(raw, where)
                    self.skipped += domain is None
                    if domain and (not limit or len(self) < limit):
                        rows.setdefault(domain, array("q")).append(len(self))
                        self.index.extend((i, int(where.rpartition(" ")[2]), offset, len(raw)))
                        if self.small:
                            self.kept.append(sample)
                    bar.update(len(raw))
        self.rows = {domain: np.array(numbers) for domain, numbers in sorted(rows.items())}
        why = f"--trim to {max_tokens} tokens leaves nothing to learn"
        check(len(self), f"{pattern}: {why} of {self.skipped} samples")
        if self.skipped and not quiet:
            print(f"{pattern}: skipped {self.skipped} samples: {why}")

    def _check(self, raw, where):
        """(domain, Sample) of a line; domain None if trimming leaves nothing to learn, Sample None if neither
        the check nor `kept` needs it. ValueError if the line holds no sample, or one that is too long."""
        record = data.parse_json(raw, where)
        row, rendered = data.check_sft(record, self.tokenizer, where)
        text, _, spans = rendered
        # A text has at most as many tokens as bytes: only a long one needs the tokenizer. If it may be cut,
        # only one with a long prompt: what is to be learned begins with a token within the limit otherwise.
        bytes_needed = len(text[: spans[0][0]].encode()) + 1 if self.trim else len(text.encode())
        if bytes_needed <= self.max_tokens and not self.small:
            return row["domain"], None
        sample = data.to_sample(row, rendered, self.tokenizer, where, self.max_tokens, self.trim)
        return row["domain"] if sample.mask[1:].any() else None, sample

    def __len__(self):
        return len(self.index) // 4

    def __getitem__(self, i):
        """Sample number i. ValueError if its file has changed and the line holds no sample any more."""
        if self.small:
            return self.kept[i]
        file, number, offset, size = (self.index[4 * i + k] for k in range(4))
        where = f"{self.paths[file]}, line {number}"
        with open(self.paths[file], "rb") as lines:
            lines.seek(offset)
            record = data.parse_json(lines.read(size), where)
        return data.parse_sft(record, self.tokenizer, where, self.max_tokens, self.trim)

def files_of(pattern):
    """The files of a pattern, each once. ValueError for a name that is missing."""
    files = {}
    for part in map(str.strip, pattern.split(",")):
        files |= dict.fromkeys([part] if os.path.exists(part) else sorted(glob.glob(part)) or [part])
    for path in files:
        data.check_exists(path)
    return [*files]

class Loader:
    """next(loader): the next global batch, a list of sample numbers, in the proportions of a mixture.

    Each domain has its own epochs, every one shuffled anew. With share_d = weight_d / sum of weights,

        after n draws, domain d has been drawn floor(n share_d) or ceil(n share_d) times,

    so every batch has the proportions and not only the average one (paper, section 2). The rule: sample k + 1
    of d may be drawn once n share_d > k and is due when n share_d = k + 1; of those that may, draw the one
    due first (Pfair scheduling). There is no random state: the order follows from (seed, domain, epoch), the
    position from `drawn`, the counts by domain. So all ranks draw the same batches, and another number of
    ranks can continue them. rows: as in SftFiles. mixture: dict from domain to weight, of any sum. None: the
    sizes of the domains; as many draws as there are samples then take each of them once."""

    def __init__(self, rows, batch_size, seed, mixture=None):
        sizes = {domain: len(numbers) for domain, numbers in rows.items()}
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.mixture = mixture or sizes
        weights = self.mixture.values()
        check(self.mixture.keys() == sizes.keys(),
              f"mixture: has {sorted(self.mixture)}, the data have the domains {sorted(sizes)}")
        check(all(0 <= weight < math.inf for weight in weights) and any(weights),
              f"mixture: weights must be 0 or more, and not all 0, not {self.mixture}")
        for name, size in sizes.items():
            check(size > 0 or self.mixture[name] == 0,
                  f"mixture: no sample of {name} is left to draw from; hold out fewer")
        self.drawn = dict.fromkeys(sorted(rows), 0)
        # Each domain walks through one order at a time, so as many orders as domains are kept.
        self.permutation = lru_cache(len(rows))(permutation)

    def __next__(self):
        return [self.draw() for _ in range(self.batch_size)]

    def draw(self):
        """The number of the next sample."""
        # The domain, by the rule above with both sides multiplied by the sum of weights.
        total = sum(self.mixture.values())
        n = sum(self.drawn.values()) + 1
        may = [name for name, k in self.drawn.items() if k * total < self.mixture[name] * n]
        domain = min(may, key=lambda name: (self.drawn[name] + 1) / self.mixture[name])
        # Its next sample, in the order of the epoch.
        rows = self.rows[domain]
        epoch, position = divmod(self.drawn[domain], len(rows))
        order = self.permutation(len(rows), self.seed, epoch, list(self.drawn).index(domain))
        self.drawn[domain] += 1
        return int(rows[order[position]])

def permutation(n, *seed):
    """The order of n items in one epoch, an array, from integers that name the epoch."""
    return np.random.default_rng(seed).permutation(n)

# 6. Ranks ---------------------------------------------------------------------------------------------------

# A rank that dies ends the run: torchrun stops the others on its node within a second; elsewhere the next
# collective fails, as the dead process's connections are closed. The time-out is for hosts that vanish. It is
# long because in RL a rank may sample for hours: 49,152 tokens at 20 per second take 41 minutes per round.
LONGEST_WAIT = timedelta(hours=6)

@dataclass
class Ranks:
    """This process among those that train together; cp neighbours share each row."""
    rank: int = 0
    world: int = 1
    device: str = "cpu"
    cp: int = 1
    replicas: int = 1

    @property
    def dp_size(self):
        """Data-parallel size: how many rows are computed at the same time."""
        return self.world // self.cp

    def local_rows(self, packs):
        """The rows of a batch that this rank computes."""
        return packs[self.rank // self.cp :: self.dp_size]

    def all_sum(self, values):
        """Sum a tensor over the ranks, in place and on its device: the host does not wait for a GPU."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def all_values(self, value):
        """Every rank's value (any picklable object), a list in the order of the ranks."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def gather(self, items):
        """The whole list on every rank, from parts: rank r holds the items r, r + world, r + 2 world, ..."""
        parts = self.all_values(items)
        return [parts[i % self.world][i // self.world] for i in range(sum(map(len, parts)))]

    def share_out(self, function, items):
        """[function(item) for item in items] on every rank, each call made by one of them."""
        return self.gather([function(item) for item in items[self.rank :: self.world]])

    def check_same_on_all(self, what, value):
        """ValueError if a rank has another value: it was started differently, or sees different files."""
        values = self.all_values(value)
        for r, other in enumerate(values):
            check(other == values[0], f"ranks 0 and {r} disagree about {what}: {values[0]} and {other}")

def start_ranks(device, cp=1, replicas=1):
    """Ranks of this process, alone or started by torchrun. device: "cpu", "cuda", or "" for the better one.
    ValueError for flags that do not fit the machine or the number of ranks."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = device or ("cuda" if gpus else "cpu")
    check(device in ("cpu", "cuda"), f"--device {device}: expected cpu or cuda")
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ["RANK"]) if world > 1 else 0
    for name, n in (("cp", cp), ("replicas", replicas)):
        check(n >= 1 and world % n == 0, f"--{name} {n}: it must divide the number of ranks, {world}")
    backend = "gloo"
    if device == "cuda":
        backend = "cpu:gloo,cuda:nccl"  # Python objects and host tensors travel by gloo
        local = int(os.environ.get("LOCAL_RANK", 0))
        check(gpus, "--device cuda: there is no GPU here")
        check(local < gpus, f"--nproc-per-node must be at most {gpus}, the number of GPUs here")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    # A single GPU needs a group, too: FSDP2 keeps its float32 weights and computes in bf16.
    if world > 1 or device != "cpu":
        store = dist.HashStore() if world == 1 else None
        dist.init_process_group(backend, timeout=LONGEST_WAIT, rank=rank, world_size=world, store=store)
    return Ranks(rank, world, device, cp, replicas)

def check_ranks(error):
    """ValueError if this is gloo's error because another rank has ended, which has told or shown why."""
    check("gloo/transport" not in str(error), "another rank has ended, and so does this one")

def run_main(body):
    """data.run_main for every rank; too little memory is a user error as well. Returns the exit status."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is not a mistake
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nobody writes into it
    def in_memory():
        try:
            body()
        except torch.OutOfMemoryError as error:
            what = ". ".join(str(error).split(". ")[:2])
            raise ValueError(f"{what}: take --checkpoint-activations, more GPUs, --cp or a smaller "
                             "--pack-tokens; `python -m tests.bench sizes` tells what models need") from None
        except RuntimeError as error:
            check_ranks(error)
            raise
    status = data.run_main(in_memory)
    if dist.is_initialized() and dist.get_world_size() > 1:
        if status == 0:
            dist.barrier()  # rank 0 may host the rendezvous, so nobody leaves before the others
        sys.stdout.flush()
        os._exit(status)  # not sys.exit: gloo's threads may abort at shutdown, a good run would look failed
    if dist.is_initialized():
        dist.destroy_process_group()
    return status

# 7. Sharding ------------------------------------------------------------------------------------------------

def shard(model, ranks, checkpoint_activations=False, compile=False):
    """FSDP2: each rank keeps a slice of every parameter, gathers a block to compute it, averages gradients.
    A GPU computes in bf16 over float32 master weights and float32 reductions; a CPU in float32 throughout."""
    model.model.checkpoint_activations = checkpoint_activations
    model.compile_loss = compile
    for block in model.model.layers if compile else ():
        # Backward needs no output of a block's last product. Outside of compiled graphs it is not recomputed.
        last = block.feed_forward.down_proj
        last.forward = torch.compiler.disable(last.forward)
        # FSDP's hooks stay outside. At the second length torch compiles again, for any number of tokens. With
        # dynamic=True all sizes, also the model's, would be variables, and the kernels would divide by them.
        block.forward = torch.compile(block.forward)
    if not dist.is_initialized():
        return model.to(ranks.device)
    if ranks.cp > 1:
        model.cp = ContextParallel(model.config, ranks)
    kind = ranks.device.partition(":")[0]
    mesh = None
    if ranks.replicas > 1:
        shape = (ranks.replicas, ranks.world // ranks.replicas)
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("replica", "shard"))
    dtype = torch.bfloat16 if kind == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    # Blocks move to the device one at a time: no rank ever holds the whole model there.
    for part in (*model.model.layers, model):
        fully_shard(part.to(ranks.device, torch.float32), mesh=mesh, mp_policy=policy)
    return model

@torch.no_grad()
def unsharded_copy(model, copy=None):
    """A model to sample from: the model itself, or under FSDP a whole copy of it (bf16 on a GPU).
    copy: an earlier one, to be refreshed in place. Every rank must call: each holds a slice."""
    if not dist.is_initialized():
        return model
    if copy is None:
        device = next(model.parameters()).device
        with torch.device("meta"):
            copy = FalconH1(model.config)
        copy = copy.to(torch.bfloat16 if device.type == "cuda" else torch.float32).to_empty(device=device)
    target = copy.state_dict()
    for name, p in model.state_dict().items():  # state_dict reshards what the last forward pass has gathered
        target[name].copy_(p.full_tensor())
    return copy

# 8. Context parallelism -------------------------------------------------------------------------------------

# As in DeepSpeed Ulysses (arXiv 2309.14509), n neighbouring ranks share every row. Norms, projections, MLP
# and head work per token. Attention, convolution and scan need whole sequences, but heads are independent. So
# two all-to-alls per mixer change who holds what, here for n = 2; in between, the block is unchanged:
#
#                             rank 0                               rank 1
#     norms, projections      first half of tokens, all heads      second half of tokens, all heads
#       to_heads
#     attention, conv, scan   all tokens, first half of heads      all tokens, second half of heads
#       to_tokens
#     o_proj, MLP, head       first half of tokens, all heads      second half of tokens, all heads
#
# Heads share what they read: several query heads a key and value head, several SSM heads a group's B and C.
# to_heads sends such a group to every rank that has heads of it. Each rank convolves with the weights of the
# channels it got; where several ranks compute a gradient of one weight, FSDP adds them up.

def split_heads(heads, n, groups):
    """Heads of each of n ranks, and groups (key and value heads, or B and C) that these read.
    Returns own (n, heads / n) and read (n, k): a rank's j-th group serves its j-th heads / n / k heads."""
    own = torch.arange(heads).view(n, heads // n)
    # All-to-all needs equal shapes, so each group that is sent serves equally many heads: as many as divide
    # both the heads of a rank and those of a group. At worst it is one.
    served = math.gcd(heads // n, heads // groups)
    return own, own[:, ::served] * groups // heads

def gather_index(parts):
    """The columns of a projection that each of n ranks wants.
    parts: (number of items, columns per item, items (n, k) of each rank), in the projection's order.
    Returns index (n, columns), and the number of columns of each part."""
    sizes = [count * width for count, width, _ in parts]
    columns = torch.arange(sum(sizes)).split(sizes)
    # Of each part the columns of its items, (n, k * width).
    wanted = [c.view(-1, width)[items].flatten(1) for c, (_, width, items) in zip(columns, parts)]
    return torch.cat(wanted, 1), [w.shape[1] for w in wanted]

class ContextParallel:
    """What FalconH1 and local_tokens need to know about the ranks that share a row."""

    def __init__(self, config, ranks):
        n = ranks.cp
        for name in ("num_attention_heads", "mamba_n_heads"):
            heads = getattr(config, name)
            check(heads % n == 0, f"--cp {n}: {name} {heads} is not a multiple of it")
        self.size = n
        self.rank = ranks.rank % n
        self.group = dist.new_subgroups(n, timeout=LONGEST_WAIT)[0]
        # Attention projects to one list of heads: those of q, then k, then v.
        heads = config.num_attention_heads
        groups = config.num_key_value_heads
        own, read = split_heads(heads, n, groups)
        index, sizes = gather_index([(heads, 1, own), (groups, 1, read), (groups, 1, read)])
        self.attention = index.to(ranks.device), sizes
        # Mamba projects to channels: those of x, then B, C and dt. The mixer takes x, B and C as one, and dt.
        heads = config.mamba_n_heads
        own, read = split_heads(heads, n, config.mamba_n_groups)
        B = C = config.mamba_n_groups, config.mamba_d_state, read
        index, sizes = gather_index([(heads, config.mamba_d_head, own), B, C, (heads, 1, own)])
        index = index.to(ranks.device)
        xBC = sum(sizes[:3])
        self.mamba = index, [xBC, sizes[3]]
        self.channels = index[self.rank, :xBC]
        self.heads = own[self.rank].to(ranks.device)

    def to_heads(self, x, part):
        """x (1, s, columns, ...), this rank's tokens -> its columns of all tokens, (1, n s, size, ...) per
        size in `part`, which is self.attention or self.mamba."""
        index, sizes = part
        wanted = x.squeeze(0).index_select(1, index.flatten())  # (s, n * own, ...)
        wanted = wanted.unflatten(1, index.shape).movedim(1, 0)  # (n, s, own, ...)
        return _AllToAll.apply(wanted, self.group).flatten(0, 1)[None].split(sizes, 2)

    def to_tokens(self, y):
        """y (1, n s, own heads, ...), all tokens -> (1, s, heads, ...), this rank's tokens."""
        y = y.squeeze(0).unflatten(0, (self.size, -1))  # a view, and so is its gradient
        return _AllToAll.apply(y, self.group).movedim(0, 1).flatten(1, 2)[None]

    def own_weights(self, weight, bias, A, D):
        """Convolution weights of this rank's channels, A and D of its heads."""
        bias = None if bias is None else bias[self.channels]
        return weight[self.channels], bias, A[self.heads], D[self.heads]

class _AllToAll(torch.autograd.Function):
    """Send x[j] to rank j, receive out[j] from it. Its own inverse, and so its own gradient."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad, ctx.group), None

# 9. The optimizer -------------------------------------------------------------------------------------------

def make_optimizer(model, lr, weight_decay):
    """AdamW with default betas. Vectors (norms, biases, A_log, dt_bias, D) are scales and do not decay."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=True)

def optimizer_step(model, optimizer, loss, lr, clip):
    """Clip (0: not at all), step, clear. Returns the loss and the gradient norm before it, over all ranks.
    Both are read here at once: nowhere else in a step does the host wait for a GPU."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    loss, norm = torch.stack([loss, norm.double()]).tolist()
    check(math.isfinite(loss + norm), f"the loss is {loss}, the gradient's norm {norm}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm

# 10. The run's folder ---------------------------------------------------------------------------------------

# Arguments that a resumed run may change.
VOLATILE = "out fresh device cp replicas checkpoint_activations compile save_every eval_every".split()

class Run:
    """The folder of a run: its arguments, its log, its checkpoints.
    Only rank 0 writes, except the shards of a checkpoint. Used in a `with`: however the block ends, a
    checkpoint that was begun is completed. A run is resumed with the same arguments, but for VOLATILE ones
    and `volatile`, and on data with the same checksum, or not at all."""

    def __init__(self, args, ranks, tokenizer, checksum, volatile=()):
        self.args = args
        self.ranks = ranks
        self.tokenizer = tokenizer
        self.out = Path(args.out)
        self.log = self.out / "log.jsonl"
        self.trainer = self.out / "trainer"
        # --fresh would delete the model to start from, and checkpoints would take its name.
        own = args.init and data.model_folder(args.init).resolve().is_relative_to(self.out.resolve())
        check(not own, f"--out {args.out} holds the model of --init {args.init}: choose another --out")
        if ranks.rank == 0:
            identity = asdict(args) | {"data of checksum": checksum}
            identity = {k: v for k, v in identity.items() if k not in (*VOLATILE, *volatile)}
            self.lock = data.open_run(self.out, identity, ("log.jsonl", "trainer", "model"), fresh=args.fresh,
                                      device=ranks.device, ranks=ranks.world)
        ranks.all_values(None)  # wait for rank 0
        # A thread completes checkpoints. Its messages to other ranks must not mix with those of training.
        self.group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT) if dist.is_initialized() else None
        self.thread = ThreadPoolExecutor(1)
        self.saving = self.thread.submit(int)  # the checkpoint begun last; none yet

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.saving.result()
        if self.ranks.rank == 0 and error[0] is None:
            print(f"the model is in {self.out / 'model'}")

    def write(self, step, record, shown=()):
        """Append record to log.jsonl; print it with the time left, or the fields `shown` of it."""
        if self.saving.done():
            self.saving.result()  # a full disk ends the run now, not at the next checkpoint
        if self.ranks.rank > 0:
            return
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(json.dumps({"step": step, **record}) + "\n")
        fields = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in record.items()}
        text = "  ".join(f"{k} {fields[k]}" for k in fields if k in (shown or fields))
        left = record["seconds"] * (self.args.steps - step)
        tqdm.write(f"step {step:5d}/{self.args.steps}  {text}  left {left:.0f}s", file=sys.stdout)

    def save(self, step, model, optimizer, state):
        """Begin checkpoint `step`: copy what it needs to the host; training goes on while files are written.
        state: a JSON-able dict that `resume` returns. OSError if the checkpoint before could not be saved."""
        self.saving.result()
        temporary = self.trainer / f"step-{step:09d}.tmp"
        weights, moments = get_state_dict(model, optimizer)
        writing = dcp.async_save({"model": weights, "optimizer": moments}, checkpoint_id=temporary,
                                 process_group=self.group)
        self.saving = self.thread.submit(self._complete, step, writing, temporary, model.config, state)

    def _complete(self, step, writing, temporary, config, state):
        """When all shards are written: checksums, the rename that makes the checkpoint count, the export.
        The last two checkpoints are kept, so that a damaged one does not lose the run."""
        final = temporary.with_suffix("")
        try:
            writing.result()
            if self.ranks.rank > 0:
                return
            files = {path.name: sha256(path) for path in temporary.iterdir()}
            data.write_text(temporary / "state.json", json.dumps({"step": step, "files": files, **state}))
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            # Later ones are damaged, and the run was resumed before them.
            earlier = [old for old in sorted(self.trainer.glob("step-?????????")) if old < final]
            for old in earlier[:-1]:
                shutil.rmtree(old)
        except (OSError, RuntimeError, dcp.CheckpointException) as e:  # all three may mean a full disk
            shutil.rmtree(temporary, ignore_errors=True)
            check_ranks(e)
            why = str(e).strip().splitlines()[-1]
            advice = "Make room and give the same command again" + ", without --fresh" * self.args.fresh
            raise OSError(f"{self.out}: step {step} could not be saved ({why}); {self.trainer} holds what "
                          f"was saved before. {advice}") from None
        export(config, self.tokenizer, final, self.out / "model")

    def resume(self, model, optimizer):
        """Load the newest whole checkpoint. Returns what `save` was given, with "step" (0: there is none) and
        "logged": whether the log ends with that step's line. The log loses later lines."""
        found = None
        if self.ranks.rank == 0:
            for unfinished in self.trainer.glob("step-*.tmp"):
                shutil.rmtree(unfinished)
            state, folder = self._newest()
            # A full disk may have left half a line at the end.
            lines = self.log.read_bytes().split(b"\n")[:-1] if self.log.exists() else []
            records = [data.parse_json(line, f"{self.log}, line {i}") for i, line in enumerate(lines, 1)]
            records = [record for record in records if record["step"] <= state["step"]]
            data.write_jsonl(self.log, records)
            # Its own line is missing if the run was killed between saving and logging.
            last = records[-1]["step"] if records else 0
            state["logged"] = last == state["step"]
            found = state, folder
        state, folder = self.ranks.all_values(found)[0]
        if folder is not None:
            weights, moments = get_state_dict(model, optimizer)
            try:
                dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
            except dcp.CheckpointException as e:
                why = str(e).strip().splitlines()[-1]
                raise ValueError(f"{folder}: a checkpoint of another model: {why}") from None
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        if self.ranks.rank > 0:
            return state
        if folder is None:
            print("  ".join(f"{k}={v}" for k, v in asdict(self.args).items()))
        else:
            print(f"{folder}: continuing after step {state['step']}")
            # The export is missing if the run was killed right after the rename.
            self.saving = self.thread.submit(export, model.config, self.tokenizer, folder, self.out / "model")
        return state

    def _newest(self):
        """(state, folder) of the newest checkpoint that has all its files unchanged, or (step 0, None)."""
        for folder in sorted(self.trainer.glob("step-?????????"), reverse=True):
            try:
                state = json.loads((folder / "state.json").read_text())
                for name, was in state["files"].items():
                    check(sha256(folder / name) == was, f"{name}: damaged")
                return state, folder
            except (OSError, ValueError) as e:
                print(f"{folder}: not a whole checkpoint ({e}); trying the one before", file=sys.stderr)
        return {"step": 0}, None

def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

def export(config, tokenizer, checkpoint, folder):
    """Write the model of a finished checkpoint to folder, in the published format.
    Reads one tensor at a time: nobody holds the whole model, and no other rank is needed."""
    # dcp.load parses the checkpoint's index in every call: at 7B in 8 shards that takes 0.5 s, so cache it.
    reader = dcp.FileSystemReader(checkpoint)
    reader.read_metadata = lru_cache(reader.read_metadata)
    def read(name, like):
        value = torch.empty(like.shape)
        dcp.load({"model": {name: value}}, storage_reader=reader, no_dist=True)
        return value
    ids = {name: id for name, id in tokenizer.token_ids().items() if getattr(config, name) is None}
    with torch.device("meta"):
        model = FalconH1(replace(config, **ids))  # a folder's own ids come first
    model.save_pretrained(folder, read)
    tokenizer.save(folder)

if __name__ == "__main__":
    sys.exit(run_main(main))
