"""Ranks as processes, for test_train_sft.py and test_train_rl.py, forked from a server that has imported
torch, which takes seconds. What they run is defined here, where they find it by name."""

import gc
import importlib
import multiprocessing
import os
import resource
import signal
import socket
import sys
import tempfile
import traceback
import weakref
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch._dynamo  # noqa: F401  (seconds, too)
import torch.distributed as dist

import data
import tokenizer
import train_rl  # noqa: F401  (the server imports it for its children)
import train_sft
from model import check

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.ranks"])

class Result(NamedTuple):
    status: int  # negative: the signal that ended the process
    out: str
    err: str

def launch(body, *args, ranks=1, status=0):
    """Run body() in processes, args being the command line -> a Result per rank, or that of the only one.
    All must end with this status; None: with any."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        given = [(body, [str(a) for a in args], rank, ranks, port, folder) for rank in range(ranks)]
        processes = [SERVER.Process(target=_rank, args=a) for a in given]
        for process in processes:
            process.start()
        results = []
        for rank, process in enumerate(processes):
            process.join(100)
            out, err = (Path(folder, f"{rank}.{name}").read_text() for name in ("out", "err"))
            results.append(Result(process.exitcode, out, err))
            process.kill()
    assert status is None or {result.status for result in results} == {status}, results
    return results if ranks > 1 else results[0]

def _rank(body, args, rank, ranks, port, folder):
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{rank}.{name}", os.O_CREAT | os.O_WRONLY), fd)
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port)}
    sys.argv = ["script", *args]
    status = 70
    try:
        status = train_sft.run_main(body)
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)

def die_at(script, moment, rank=0):
    """A script whose rank kills itself before it logs ("log of step 3") or writes a file (end of path)."""
    def dying(function, name):
        def inner(*args):
            if name(*args).endswith(moment) and int(os.environ.get("RANK", 0)) == rank:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)
        return inner

    train_sft.Run.write = dying(train_sft.Run.write, lambda run, step, *rest: f"log of step {step}")
    data.write_text = tokenizer.write_text = dying(data.write_text, lambda path, text: str(path))
    importlib.import_module(script).main()

def altered(how):
    """train_sft.py with a disk that holds files of 2 MB at most; with a --compile that does all but generate
    code, which takes most of the time; on ranks that see other files, or are started with other seeds."""
    crc32 = zlib.crc32
    if how == "full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
    elif how == "traced":
        torch.compile = partial(torch.compile, backend="eager")
    elif how == "files":
        train_sft.zlib.crc32 = lambda raw, before=0: crc32(raw, before) ^ dist.get_rank()
    else:
        sys.argv += ["--seed", os.environ["RANK"]]
    train_sft.main()

def count_copies(script, expected):
    """A script that checks how many unsharded copies are alive when it trains, and that they are current."""
    gc.disable()  # a copy is to go when its last user has gone, not some time later
    module = importlib.import_module(script)
    unsharded_copy, train_step, made = train_sft.unsharded_copy, module.train_step, []

    def copied(model, *args):
        copy = unsharded_copy(model, *args)
        if not any(copy is known() for known in made):
            made.append(weakref.ref(copy))
        held = copy.state_dict()
        for name, p in model.state_dict().items():
            check(torch.equal(held[name], p.full_tensor()), f"the copy's {name} is out of date")
        return copy

    def counted(*args):
        alive = sum(known() is not None for known in made)
        check(alive == expected, f"{alive} copies are held while training, expected {expected}")
        return train_step(*args)

    train_sft.unsharded_copy, module.train_step = copied, counted
    module.main()
    print(f"made {len(made)} copies")

def compare_gradients(folders, file, settings):
    """Loss and gradient of a batch on all ranks and one process; settings: (cp, replicas, pack_tokens)."""
    samples = [*train_sft.SftFiles(file, data.Tokenizer.byte_level(), 512, limit=9)]
    packs = data.pack(samples, 4096)
    whole = [_gradient(train_sft.load_model(folder), packs, train_sft.Ranks()) for folder in folders]
    start = train_sft.start_ranks("cpu")
    for folder, (one, expected) in zip(folders, whole):
        for cp, replicas, pack_tokens in settings:
            if folder.name == "uneven" and cp < start.world:
                continue
            ranks = replace(start, cp=cp, replicas=replicas)
            model = train_sft.shard(train_sft.load_model(folder), ranks, pack_tokens < 512)
            loss, grad = _gradient(model, data.pack(samples, pack_tokens, ranks.dp_size), ranks)
            off = abs(loss / one - 1), float((grad - expected).norm() / expected.norm())
            print(f"cp {cp}, replicas {replicas}: loss off by {off[0]:.1e}, gradient by {off[1]:.1e}")
            check(max(off) < 1e-6, "the ranks do not compute what one process does")

def compare_normalisations(folder, file):
    """--normalise rank on two ranks, against shares of the batch's gradient that one process computes."""
    samples = [*train_sft.SftFiles(file, data.Tokenizer.byte_level(), 512, limit=7)]
    ranks = train_sft.start_ranks("cpu")
    for some, capacity in ((samples, 250), (samples[:1], 512)):  # uneven rows; one row and a dummy
        packs = data.pack(some, capacity, 2)
        weights = [float(sum(row.weights.sum() for row in packs[r::2])) for r in range(2)]
        model = train_sft.load_model(folder)
        whole = expected = expected_loss = 0
        for r in range(2):
            model.zero_grad()
            share = sum(train_sft.sft_loss(model, row, sum(weights)) for row in packs[r::2])
            share.backward()
            grad = torch.cat([p.grad.flatten() for p in model.parameters()])
            whole = whole + grad
            if weights[r]:
                factor = sum(weights) / (2 * weights[r])
                expected = expected + factor * grad
                expected_loss += factor * float(share.detach())
        loss, grad = _gradient(train_sft.shard(model, ranks), packs, ranks, "rank")
        check(abs(loss / expected_loss - 1) < 1e-6, f"the loss is {loss}, expected {expected_loss}")
        check((grad - expected).norm() / expected.norm() < 1e-6, "not the known factors")
        differs = float((grad - whole).norm() / whole.norm())
        check(differs > 0.05, "the rows are too even to tell")
        print(f"a mean per rank: {weights}, off the batch's gradient by {differs:.2f}")

def _gradient(model, packs, ranks, normalise="batch"):
    total = train_sft.loss_divisor(packs, ranks, normalise)
    begun = []

    def loss_of(row):
        if begun and ranks.world > 1 and ranks.replicas == 1:  # replicas show theirs after the last row
            for p in model.parameters():
                sliced = p.grad is not None and p.grad.to_local().numel() < p.numel()
                check(sliced, "after a row, a rank holds more than its slice of the gradient")
        begun.append(row)
        return train_sft.sft_loss(model, row, total)

    loss = float(ranks.all_sum(train_sft.accumulate_gradients(model, packs, ranks, loss_of)))
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    return loss, torch.cat([g.flatten() for g in grads])
