"""GRPO with verifiable rewards (Falcon-H1R, section 3): sample groups of answers, score them, learn.
The defaults shown are the small run's; real models start from the paper's, see PAPER.

    python train_rl.py                                the small CPU run: from runs/tiny/sft to runs/tiny/rl
    torchrun --nproc-per-node 2 train_rl.py --fresh   the same on two ranks
    train_rl.py --init FOLDER --problems rl.jsonl --out runs/my-rl --mixture 'math=1; 100: math=1,code=2'

One step: sample G traces per prompt until enough groups carry signal (backfill); advantages within a group;
one update on exactly the tokens that were sampled, stop token included, at the temperature of sampling.

What is logged, by name
    reward, reward_std      mean and spread of known rewards, before groups are chosen; correct: its main part
    all_right, all_wrong    share of sampled groups without signal for that reason
    calls, cached, age      sampling calls of the step, groups taken from the cache, their mean age in steps
    learned                 groups of the update, each counted once
    entropy                 of the trainer's distribution, from the logits, nats per token
    clip_frac_low, clip_frac_high   share of tokens whose clipped term is active (0 at one update per batch)
    kl                      mean k3 estimate of KL(old || new), nats per token
    mismatch, mismatch_max  |p_trainer - p_sampler| of sampled tokens; capped: share of them that TIS caps
    length, length_right, length_wrong, truncated   tokens per trace, share that ran out of tokens
    held_out                accuracy on the --held-out problems, one reply to each; of known verdicts
    well_formed, mixed      share in the format; mean share of letters in scripts that the prompt does not use
    unparsed, timeouts, killed, unknown   shares of the verdicts: no answer or code; the program's time was
                            up, or it broke another limit; nothing is known (no sandbox, a judge is down)
    t_sample, t_score, t_update   seconds; t_score: waiting for verdicts afterwards; t_verify: of all verdicts
    idle                    share of t_sample for which the rank that finished first waited for the last

A reply of unknown verdict counts nowhere: not in its group, in training, in means of rewards. More than 2% of
them in the whole run end it; the same command continues from the last checkpoint once the cause is gone.

Deviations from the paper: it gives neither the weight of the cross-entropy on positives (0.1) nor the cache's
size and age nor the penalties nor the number of steps. Groups without signal are dropped altogether. Kept:
G = 16, temperature 0.85, clip (0.2, 0.28), TIS cap 2, beta = 0 and gamma = 0. To copy this, also take all
other scripts but eval.py, deepconf.py and curate.py.
"""

import json
import math
import os
import sys
import time
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle, islice

import numpy as np
import torch
from tqdm import tqdm

import data
import train_sft
from data import flag
from model import TINY, check, generate, set_threads
from rewards import check_code, check_scorable, format_ok, mixed_scripts, open_judge, verify
from ssm_scan import to_device

@dataclass
class Args(train_sft.CommonArgs):
    out: str = flag("runs/tiny/rl", "folder of the run")
    init: str = flag("runs/tiny/sft", "checkpoint to start from")
    problems: str = flag("runs/tiny/data/rl.jsonl", "problems with answers or tests, not in the SFT data")
    mixture: str = flag("", "domain weights, e.g. math=2,code=1; in stages: math=1; 100: code=1 (after 100 "
                        "steps); empty: by size")
    held_out: int = flag(0, "problems kept out of training, spread over the file, to measure accuracy on")
    steps: int = flag(16, "batches of groups to learn from; a finished run goes on with more")
    prompts: int = flag(16, "groups per update, and prompts per sampling call")
    group: int = flag(16, "traces per prompt, the paper's G")
    temperature: float = flag(0.85, "of sampling and of the loss alike")
    max_new_tokens: int = flag(160, "longest answer in tokens; 0: the paper's 49152, or all positions left")
    lr: float = flag(1e-4, "learning rate after warm-up")
    warmup_steps: int = flag(2, "steps with rising learning rate")
    updates: int = flag(1, "passes over a batch, one optimizer step each")
    clip_low: float = flag(0.2, "the gradient ends at ratios below 1 - this")
    clip_high: float = flag(0.28, "the gradient ends at ratios above 1 + this")
    tis_cap: float = flag(2.0, "cap of the importance weight between sampler and trainer; 0: no such weight")
    advantage: str = flag("std", "(reward - mean) / std in a group (paper); mean: reward - mean (Dr. GRPO)")
    positive_weight: float = flag(0.1, "mu, weight of the cross-entropy on correct samples")
    normalise: str = flag("sequence", "mean per answer, then over answers (paper); token: over all tokens")
    format_penalty: float = flag(0.1, "taken off an answer that is not <think>reasoning</think>answer")
    language_penalty: float = flag(0.1, "times the share of letters in scripts that the prompt does not use")
    code_tests: int = flag(0, "tests to run per program, another random sample in each step; 0: all")
    system: str = flag("", "system prompt: a text or the name of a file")
    suffix: str = flag("", "instruction to add to every prompt, on a line of its own")
    judge: str = flag("", "http://host:8000/v1 of a model that compares answers, or several, separated by "
                      "commas; the key: OPENAI_API_KEY")
    judge_model: str = flag("judge", "its name there")
    judge_cache: str = flag("runs/judge.jsonl", "file of its verdicts")
    unsafe_local_execution: bool = flag(False, "run programs of the model even if they cannot be isolated")
    backfill: str = flag("sample", "fill the batch by more calls (paper); after one call, reject: go on with "
                         "fewer groups, duplicate: repeat them")
    max_calls: int = flag(6, "sampling calls per step before it goes on with fewer groups")
    cache: int = flag(32, "surplus groups kept for later steps")
    cache_age: int = flag(2, "steps after which a kept group is dropped")
    weight_decay: float = flag(0.0, "AdamW decay of matrices")
    slots: int = flag(0, "traces decoded together; 0: as many as fit into free memory, at most 256")
    save_every: int = flag(5, "steps between checkpoints")
    eval_every: int = flag(5, "steps between held-out accuracies and printed samples, one right, one wrong")

# Any model but the tiny ones starts from the paper's values (Table 2), before the flags that are given. The
# paper does not say how many steps it took.
PAPER = ("--lr 2e-6 --warmup-steps 10 --steps 200 --prompts 128 --max-new-tokens 0 --pack-tokens 0 "
         "--held-out 100").split()

# 1. The formulas --------------------------------------------------------------------------------------------

# The penalties of a reply add up to less (see check_args), so a right reply with all of them beats a wrong
# one without, and a group's rewards span this much if and only if some are right and some are wrong.
SIGNAL = 0.5

def advantages(rewards, kind="std"):
    """A_i = (R_i - mean) / (std + 1e-6) over the G rewards of one prompt, with the population std.
    "mean": R_i - mean, as in Dr. GRPO: dividing by the std favours prompts that are very hard or very easy.
    Returns (G,) float64, or None if they span less than SIGNAL: differences of style, or of rounding, would
    be blown up to advantages of size one."""
    r = np.asarray(rewards, np.float64)
    if len(r) < 2 or r.max() - r.min() < SIGNAL:
        return None
    centred = r - r.mean()
    return centred if kind == "mean" else centred / (r.std() + 1e-6)

def clipped_policy_loss(new, old, advantage, clip_low, clip_high):
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) per token, rho = exp(new - old); two bounds as in DAPO."""
    rho = torch.exp(new - old)
    return -torch.minimum(rho * advantage, rho.clamp(1 - clip_low, 1 + clip_high) * advantage)

def tis_weight(old, sampler, cap):
    """min(exp(old - sampler), cap) without gradient: the trainer's probability over the sampler's.
    cap 0: always 1, as if the trainer itself had sampled."""
    if cap == 0:
        return torch.ones_like(old)
    return torch.exp((old - sampler).detach()).clamp(max=cap)

def k3(new, old):
    """Schulman's k3 estimate of KL(old || new) at tokens drawn from old: e^d - 1 - d >= 0, d = new - old."""
    d = new - old
    return torch.expm1(d) - d

def token_weights(lengths, normalise):
    """Weight of each token of answers with these lengths, summing to 1 over the batch; one number per answer.
    "sequence" (the paper): 1 / (answers * length).  "token" (DAPO): 1 / (all tokens)."""
    if normalise == "token":
        return [1 / sum(lengths)] * len(lengths)
    return [1 / (len(lengths) * length) for length in lengths]

# 2. Rewards -------------------------------------------------------------------------------------------------

# Reasons of a Verdict that are counted together in the log.
UNPARSED = ("no answer", "no code")
KILLED = ("memory limit", "output limit", "thread limit", "disk limit", "died")

def reward(verdict, text, ended, prompt, args):
    """Score of one reply and its parts; score and correct are None for an unknown verdict.
    text: without the token that ended it. well_formed: it ended, and is <think>reasoning</think>answer.
    mixed: share of its letters in scripts that the prompt does not use."""
    well_formed = ended and format_ok(text)
    mixed = mixed_scripts(text, prompt)
    penalty = args.format_penalty * (not well_formed) + args.language_penalty * mixed
    parts = {"score": None, "correct": None, "well_formed": well_formed, "mixed": mixed}
    if verdict.score is not None:
        parts |= {"score": verdict.score - penalty, "correct": verdict.score == 1}
    return parts

def check_verifier():
    """Check the verifier on known pairs: one that always says no would train on noise."""
    for text, gold, score in ((r"\boxed{\frac12}", "0.5", 1), (r"\boxed{41}", "42", 0), ("42", "42", 0)):
        right = verify(text, data.Problem("canary", "math", "", gold)).score == score
        check(right, f"the verifier is broken: {text!r} against {gold!r}")

# 3. Rollouts ------------------------------------------------------------------------------------------------

@dataclass
class Rollout:
    """One scored trace, in the form that data.pack takes (ids, mask, weight), with what the loss needs.
    Every rank holds those of the whole batch, so tokens are arrays: at 128 prompts, 16 traces and 20,000
    tokens 0.3 GB per rank, where lists take 3."""
    ids: np.ndarray  # int32, of the prompt and of the n sampled tokens; lists become arrays
    prompt: int  # tokens of the prompt
    sampler: np.ndarray  # (n,) float32: log-probabilities of the sampled tokens under the sampler
    score: float  # None: unknown
    correct: bool
    logged: dict  # what step_metrics and print_samples want to know
    advantage: float = 0.0
    token_weight: float = 0.0
    weight: float = 1.0

    def __post_init__(self):
        self.ids = np.asarray(self.ids, np.int32)
        self.sampler = np.asarray(self.sampler, np.float32)

    @property
    def mask(self):
        """(prompt + n,) bool, True on the sampled tokens, the stop token included."""
        return np.arange(len(self.ids)) >= self.prompt

def parse_stages(text, domains):
    """The stages of --mixture, a list of (first step, domain weights): for the domains math and code
    "math=1; 100: math=1,code=2" is [(0, {"math": 1.0, "code": 0}), (100, {"math": 1.0, "code": 2.0})].
    Empty: one stage with weights None, by size. ValueError unless the stages name just these domains."""
    if not text:
        return [(0, None)]
    stages = []
    for part in f"0:{text}".split(";"):  # the first stage starts at step 0
        start, _, weights = part.rpartition(":")
        right = start.strip().isdecimal() and weights.strip()
        check(right, f"--mixture {text!r}: expected WEIGHTS; STEP: WEIGHTS; ...")
        stages.append((int(start), train_sft.parse_mixture(weights)))
    starts = [start for start, _ in stages]
    check(starts == sorted(set(starts)), f"--mixture {text!r}: its steps do not rise")
    named = {domain for _, weights in stages for domain in weights}
    check(named == set(domains), f"--mixture {text!r}: the problems have the domains {', '.join(domains)}")
    return [(start, {domain: weights.get(domain, 0) for domain in domains}) for start, weights in stages]

def open_stages(args, prompts):
    """([(first step, Loader of numbers of prompts)], the held-out prompts, spread over the file)."""
    held_out = np.linspace(0, len(prompts) - 1, args.held_out, dtype=int)
    rows = {domain: [] for domain in sorted({problem.domain for problem, _ in prompts})}
    for i in np.setdiff1d(np.arange(len(prompts)), held_out):
        rows[prompts[i][0].domain].append(i)
    stages = parse_stages(args.mixture, rows)
    last = stages[-1][0]
    check(last < args.steps, f"--mixture: its stage from step {last} on is beyond --steps {args.steps}")
    loaders = [(start, train_sft.Loader(rows, args.prompts, args.seed + i, weights))  # each shuffles anew
               for i, (start, weights) in enumerate(stages)]
    return loaders, [prompts[i] for i in held_out]

def next_prompts(prompts, stages, step):
    """The next batch of prompts, in the proportions of the stage that `step` belongs to."""
    loader = [loader for start, loader in stages if start <= step][-1]
    return [prompts[i] for i in next(loader)]

def drawn_so_far(stages):
    """Prompts that the run has drawn, in all stages."""
    return sum(sum(loader.drawn.values()) for _, loader in stages)

def new_rollout(trace, problem, prompt, tokenizer, verifier, args):
    """Score a Trace -> its Rollout. prompt: the ids before it."""
    text = data.reply_text(trace.tokens, tokenizer)
    verdict = verifier(text, problem)
    scored = reward(verdict, text, trace.stop == "stop", problem.prompt, args)
    logged = scored | {
        "domain": problem.domain, "prompt": problem.prompt, "gold": problem.answer, "text": text,
        "length": len(trace.tokens), "truncated": trace.stop == "length", "reason": verdict.reason,
        "unparsed": verdict.reason in UNPARSED, "timeouts": verdict.reason == "time limit",
        "killed": verdict.reason.split(":")[0] in KILLED, "unknown": verdict.score is None,
        "t_verify": verdict.seconds}
    ids = [*prompt, *trace.tokens]
    return Rollout(ids, len(prompt), trace.logprobs, scored["score"], scored["correct"], logged)

def sample_groups(sampler, tokenizer, verifier, args, ranks, stats, prompts, seed):
    """Sample and score args.group traces per prompt, a (problem, ids); verifier(text, problem) -> Verdict.
    Every rank samples its share of each prompt's traces. Returns all groups on every rank, in the order of
    prompts: lists of Rollout, without those of unknown verdict."""
    start = time.time()
    pool = ThreadPoolExecutor(2 * (os.cpu_count() or 1))
    # Trace k goes to rank k % world. The traces of one prompt are about equally long, other prompts' are not:
    # sharing out each prompt keeps all ranks busy. A trace depends on its number, not on who samples it.
    def admit(i, sample):
        return "go" if (i * args.group + sample) % ranks.world == ranks.rank else "skip"
    # Programs and judges take their time, so finished traces are scored in threads while others are sampled.
    def on_trace(trace):
        problem, prompt = prompts[trace.prompt_index]
        trace.judged = pool.submit(new_rollout, trace, problem, prompt, tokenizer, verifier, args)
    try:
        traces = generate(sampler, [ids for _, ids in prompts], samples=args.group, seed=seed,
                          temperature=args.temperature, max_new_tokens=args.max_new_tokens,
                          stop_ids=tokenizer.stop_ids, vocab_size=tokenizer.vocab_size,
                          slots=args.slots, admit=admit, on_trace=on_trace)
        seconds = ranks.all_values(time.time() - start)
        stats["t_sample"] += max(seconds)
        stats["t_idle"] += max(seconds) - min(seconds)
        # Wait for the verdicts that are still missing.
        start = time.time()
        rollouts = [trace.judged.result() for trace in traces]
    finally:
        pool.shutdown(cancel_futures=True)  # an error or Ctrl-C does not wait for hundreds of verdicts
    stats["t_score"] += time.time() - start
    # Now every rank learns the rollouts of all others: the update needs the whole batch.
    rollouts = ranks.gather(rollouts)
    stats["samples"] += [r.logged for r in rollouts]
    groups = [rollouts[i : i + args.group] for i in range(0, len(rollouts), args.group)]
    return [[r for r in group if r.score is not None] for group in groups]

def collect(sample, draw, cache, step, args, stats):
    """Groups with signal for one update: from the cache, then from as many calls as it takes (backfill).
    sample(prompts, seed) -> groups. draw() -> the next args.prompts prompts.
    Surplus groups, fewer than a batch, go into the cache as (step, group), and the next step takes them all;
    their log-probabilities stay.
    The alternatives that the paper tried make one call, which leaves no surplus. --backfill reject learns
    from the groups with signal, however few. duplicate repeats them, in order, up to args.prompts; means over
    the batch change only if this repeats some groups more often than others."""
    # From the cache, unless the policy has moved on for too long.
    chosen = [(sampled, group) for sampled, group in cache if step - sampled <= args.cache_age]
    stats["cached"] = len(chosen)
    stats["age"] = mean(step - sampled for sampled, _ in chosen)
    # Backfill: a group without signal gives no gradient, so sample further prompts instead.
    max_calls = args.max_calls if args.backfill == "sample" else 1
    while len(chosen) < args.prompts and stats["calls"] < max_calls:
        seed = args.seed * 1_000_003 + step * 1_009 + stats["calls"]  # a stream for every call of the run
        stats["calls"] += 1
        for group in sample(draw(), seed):
            values = advantages([r.score for r in group], args.advantage)
            stats["groups"] += 1
            if values is not None:
                chosen.append((step, group))
                for r, value in zip(group, values):
                    r.advantage = float(value)
            elif len(group) > 1:  # without signal, all are as the first one
                stats["all_right" if group[0].correct else "all_wrong"] += 1
    surplus = chosen[args.prompts :]
    cache[:] = surplus[max(0, len(surplus) - args.cache) :]
    groups = [group for _, group in chosen[: args.prompts]]
    stats["learned"] = len(groups)
    # A repeated group is the same object again; it counts again in all means over the batch.
    return list(islice(cycle(groups), args.prompts)) if args.backfill == "duplicate" else groups

# 4. The update ----------------------------------------------------------------------------------------------

# Tensors of token terms are (t,), masked by weights that are 0 where nothing was sampled.

def pack_values(row, name):
    """(t,) float32: field `name` of a Pack's rollouts, at the positions that predict their sampled tokens."""
    out = np.zeros(len(row.input_ids), np.float32)
    for start, r in zip(row.cu_seqlens, row.members):
        if isinstance(r, Rollout):  # and not a dummy that keeps ranks in step
            out[start + np.flatnonzero(r.mask) - 1] = getattr(r, name)
    return out

def grpo_loss(model, row, args, positives, old=None):
    """Loss of this rank's tokens of a Pack, their log-probabilities (t,), and their token_stats.

        sum of token_weight * TIS * clipped_policy_loss - mu * sum over correct answers of log p / positives

    positives: tokens of all correct answers of the batch. old (t,): the log-probabilities before the first
    update, None then. Both terms are at the sampler's temperature T: with T = 1 the cross-entropy would have
    to compute the head, the largest product, twice, and it would fit another distribution than the policy
    term. The difference is small: the gradient in the logits is (onehot - p_T) / T in place of onehot - p."""
    names = ("sampler", "advantage", "token_weight", "correct")
    values = [train_sft.local_tokens(model, pack_values(row, name)) for name in names]
    sampler, advantage, weight, correct = to_device(values, next(model.parameters()).device)
    # Scored as it was sampled: at the sampler's temperature, over the full distribution.
    new, entropy = train_sft.pack_logprobs(model, row, args.temperature)
    old = new.detach() if old is None else old
    tis = tis_weight(old, sampler, args.tis_cap)
    loss = (weight * tis * clipped_policy_loss(new, old, advantage, args.clip_low, args.clip_high)).sum()
    loss = loss - args.positive_weight * (correct * new).sum() / max(1, positives)
    new = new.detach()
    return loss, new, token_stats(args, new, old, entropy, sampler, advantage, weight > 0)

def token_stats(args, new, old, entropy, sampler, advantage, sampled):
    """What the log averages over sampled tokens, by name, (t,) each; `tokens` counts them."""
    rho = torch.exp(new - old)
    # A token is clipped if rho has left the interval on the side to which its advantage pushes it.
    return {
        "tokens": sampled,
        "entropy": entropy * sampled,
        "clip_frac_low": sampled & (rho < 1 - args.clip_low) & (advantage < 0),
        "clip_frac_high": sampled & (rho > 1 + args.clip_high) & (advantage > 0),
        "kl": k3(new, old) * sampled,
        "mismatch": (old.exp() - sampler.exp()).abs() * sampled,
        "capped": sampled & (torch.exp(old - sampler) > (args.tis_cap or math.inf)),
    }

def train_step(model, optimizer, groups, args, lr, ranks, stats):
    """args.updates passes over the groups. Returns loss and gradient norm of the last one."""
    # Normalise over the whole batch, on all ranks, before it is split into rows.
    rollouts = [r for group in groups for r in group]
    for r, weight in zip(rollouts, token_weights([len(r.sampler) for r in rollouts], args.normalise)):
        r.token_weight = weight
    positives = sum(len(r.sampler) for r in rollouts if r.correct)
    packs = data.pack(rollouts, args.pack_tokens, ranks.dp_size)
    old = {}  # a row's log-probabilities in the first pass, from which later ones move away
    def loss_of(row):
        loss, new, values = grpo_loss(model, row, args, positives, old.get(id(row)))
        old.setdefault(id(row), new)
        for name, value in values.items():  # the sums stay on the device: the host does not wait for them
            stats["sums"][name] += value.sum(dtype=torch.float64)
        stats["mismatch_max"].append(values["mismatch"].max())
        return loss
    for _ in range(args.updates):
        loss = train_sft.accumulate_gradients(model, packs, ranks, loss_of)
        loss, norm = train_sft.optimizer_step(model, optimizer, ranks.all_sum(loss), lr, args.clip)
    return loss, norm

# 5. The log -------------------------------------------------------------------------------------------------

SHOWN = "reward correct held_out entropy mismatch length calls cached grad_norm t_sample t_update".split()

def new_stats():
    """What a step gathers: a dict per reply, sums over tokens, and counts and seconds, by name, from 0 on."""
    return defaultdict(int, samples=[], sums=defaultdict(int), mismatch_max=[])

def mean(values):
    """The mean of numbers, 0 if there are none."""
    return float(np.mean(list(values) or [0]))

def domain_means(name, samples, field):
    """{name_DOMAIN: mean of the samples' field}, by domain; {} if there is only one."""
    values = defaultdict(list)
    for x in samples:
        values[x["domain"]].append(x[field])
    return {f"{name}_{domain}": mean(values[domain]) for domain in sorted(values)} if len(values) > 1 else {}

def evaluate(sampler, tokenizer, verifier, held_out, args, ranks, step):
    """Every --eval-every steps and at the end {"held_out": accuracy}, and by domain; {} in other steps.
    The seed stays the same, so that differences between steps come from the policy."""
    if not held_out or (step < args.steps and step % args.eval_every):
        return {}
    stats = new_stats()
    sample_groups(sampler, tokenizer, verifier, replace(args, group=1), ranks, stats, held_out, args.seed)
    known = [x for x in stats["samples"] if x["correct"] is not None]
    accuracy = {"held_out": mean(x["correct"] for x in known)} if known else {}
    return accuracy | domain_means("held_out", known, "correct")

def step_metrics(stats, loss, norm, lr, ranks):
    """The log's fields, see the top, from what a step gathered."""
    samples = stats["samples"]
    known = [x for x in samples if x["correct"] is not None]
    scores = [x["score"] for x in known]
    metrics = {"loss": loss, "grad_norm": norm, "lr": lr, "reward": mean(scores),
               "reward_std": float(np.std(scores or [0])), "correct": mean(x["correct"] for x in known)}
    metrics |= domain_means("reward", known, "score")
    # Groups and calls, seconds.
    metrics |= {name: stats[name] / max(1, stats["groups"]) for name in ("all_right", "all_wrong")}
    metrics |= {name: round(stats[name], 3) for name in ("t_sample", "t_score", "t_update")}
    metrics |= {name: stats[name] for name in ("calls", "cached", "age", "learned")}
    metrics["idle"] = stats["t_idle"] / max(1e-9, stats["t_sample"])
    # Means of token_stats over the sampled tokens of the update, on all ranks.
    totals = ranks.all_sum(torch.stack(list(stats["sums"].values())))
    sums = dict(zip(stats["sums"], totals.tolist()))
    metrics["tokens"] = int(sums["tokens"])
    metrics |= {name: total / sums["tokens"] for name, total in sums.items() if name != "tokens"}
    metrics["mismatch_max"] = max(ranks.all_values(float(torch.stack(stats["mismatch_max"]).max())))
    # Means over replies.
    for name in ("well_formed", "mixed", "length", "truncated", "unparsed", "timeouts", "killed", "unknown"):
        metrics[name] = mean(x[name] for x in samples)
    metrics["length_right"] = mean(x["length"] for x in known if x["correct"])
    metrics["length_wrong"] = mean(x["length"] for x in known if not x["correct"])
    metrics["sampled"] = sum(x["length"] for x in samples)
    metrics["t_verify"] = float(sum(x["t_verify"] for x in samples))
    return metrics

def print_samples(samples):
    """One right and one wrong answer, to see what the reward sees."""
    for label, right in (("right", True), ("wrong", False)):
        x = next((x for x in samples if x["correct"] == right), None)
        if x is not None:
            about = f"{x['prompt']} (gold {x['gold']}, score {x['score']:g})"
            tqdm.write(f"{label}: {about} {x['text']!r}", file=sys.stdout)

# 6. Training ------------------------------------------------------------------------------------------------

def check_args(args):
    """ValueError for flags that make no sense."""
    train_sft.check_numbers(args, "steps", "prompts", "updates", "max_calls", "save_every", "eval_every")
    check(args.group >= 2, f"--group {args.group}: one answer has nothing to be compared with")
    # Close to 0 all answers are the same, and logits over it overflow; far above 1 they are noise.
    check(0.01 <= args.temperature <= 100, f"--temperature {args.temperature}: must be between 0.01 and 100")
    check(args.warmup_steps <= args.steps,
          f"--warmup-steps {args.warmup_steps}: --steps {args.steps} would end before --lr is reached")
    train_sft.check_choice(args, "normalise", "sequence", "token")
    train_sft.check_choice(args, "advantage", "std", "mean")
    train_sft.check_choice(args, "backfill", "sample", "duplicate", "reject")
    args.system = data.text_or_file(args.system)  # run.json holds the text
    check(args.format_penalty + args.language_penalty < SIGNAL,
          f"--format-penalty plus --language-penalty must be below {SIGNAL}, or style could beat being right")

def check_lengths(args, prompts, config):
    """Replace zeros of --max-new-tokens and --pack-tokens, by what no prompt makes too long. ValueError if a
    trace could not be sampled or learned from."""
    prompt = max(len(ids) for _, ids in prompts)
    room = config.max_position_embeddings
    check(prompt < room, f"{args.problems}: a prompt of {prompt} tokens fills max_position_embeddings {room}")
    args.max_new_tokens = args.max_new_tokens or min(49152, room - prompt)
    longest = prompt + args.max_new_tokens
    what = f"--max-new-tokens {args.max_new_tokens}: with the longest prompt, {prompt} tokens, it exceeds"
    check(longest <= room, f"{what} max_position_embeddings {room}")
    args.pack_tokens = args.pack_tokens or max(4096, longest)
    check(longest <= args.pack_tokens, f"{what} --pack-tokens {args.pack_tokens}")

def open_prompts(args, tokenizer, ranks):
    """The prompts of --problems, a list of (problem, ids), the same on all ranks, and their checksum."""
    problems = data.read_problems(args.problems, args.limit, partial(check_scorable, judge=args.judge))
    checksum = zlib.crc32(json.dumps([problem.record() for problem in problems]).encode())
    ranks.check_same_on_all("the problems' checksum", checksum)
    train_sft.check_enough(args.problems, len(problems), args.held_out, args.prompts, quiet=ranks.rank > 0)
    check_code(problems, args.problems, args.unsafe_local_execution, quiet=ranks.rank > 0)
    return list(zip(problems, data.prompts_of(problems, args, tokenizer))), checksum

def read_args():
    """The flags, checked, and the configuration of the model in --init."""
    args = data.parse_args(Args, __doc__.partition("\n\n")[0])
    config = train_sft.load_config(args.init)
    if config not in TINY:
        args = data.parse_args(Args, "", [*PAPER, *sys.argv[1:]])
    check_args(args)
    return args, config

def main():
    args, config = read_args()
    set_threads(config)
    check_verifier()
    ranks = train_sft.start_ranks(args.device, args.cp, args.replicas)
    ranks.check_same_on_all("the arguments", asdict(args))

    # Bad input must cost nothing: read everything before Run() deletes what --fresh replaces.
    tokenizer = data.load_tokenizer(args.init)
    prompts, checksum = open_prompts(args, tokenizer, ranks)
    check_lengths(args, prompts, config)
    stages, held_out = open_stages(args, prompts)
    verifier = partial(verify, judge=open_judge(args), limit=args.code_tests,
                       unsafe=args.unsafe_local_execution)
    model = train_sft.shard(train_sft.load_model(args.init), ranks, args.checkpoint_activations, args.compile)

    # Continue after the last checkpoint, if there is one.
    run = train_sft.Run(args, ranks, tokenizer, checksum, volatile=("judge", "judge_cache", "steps"))
    optimizer = train_sft.make_optimizer(model, args.lr, args.weight_decay)
    state = {"drawn": [], "cache": [], "unknown": {}} | run.resume(model, optimizer)
    for (_, loader), drawn in zip(stages, state["drawn"]):
        loader.drawn = drawn
    cache = [(sampled, [Rollout(**r) for r in group]) for sampled, group in state["cache"]]
    unknown = Counter(state["unknown"])  # unknown verdicts of the run, by reason
    sampler = train_sft.unsharded_copy(model)
    evaluation = partial(evaluate, sampler, tokenizer, verifier, held_out, args, ranks)
    with run:
        if not state["logged"]:  # the run was killed between saving and logging
            run.write(state["step"], state["record"] | evaluation(state["step"]), SHOWN)
        for step in range(state["step"], args.steps):
            start = time.time()
            done = step + 1
            lr = args.lr * min(1, done / max(1, args.warmup_steps))
            stats = new_stats()
            # Sample until enough groups carry signal, then learn from them. Errors name the prompts.
            verify_step = partial(verifier, seed=args.seed * 1_000_003 + step)  # picks the --code-tests
            sample = partial(sample_groups, sampler, tokenizer, verify_step, args, ranks, stats)
            position = drawn_so_far(stages)
            try:
                draw = partial(next_prompts, prompts, stages, step)
                groups = collect(sample, draw, cache, step, args, stats)
                unknown = unknown + Counter(x["reason"] for x in stats["samples"] if x["unknown"])
                verdicts = drawn_so_far(stages) * args.group  # of the whole run
                check_signal(groups, stats, unknown, verdicts, done == args.steps, ranks)
                before = time.time()
                loss, norm = train_step(model, optimizer, groups, args, lr, ranks, stats)
            except ValueError as e:
                what = f"prompts {position} to {drawn_so_far(stages) - 1} of the stream: {e}"
                raise ValueError(f"step {done}, {what}; {run.trainer} holds what was saved before") from None
            train_sft.unsharded_copy(model, sampler)  # the next step samples from the new weights
            stats["t_update"] = time.time() - before
            record = step_metrics(stats, loss, norm, lr, ranks)
            record["seconds"] = round(time.time() - start, 3)

            # Save before evaluating: what happens there must not cost the run its last steps.
            if done == args.steps or done % args.save_every == 0:
                run.save(done, model, optimizer, run_state(stages, cache, unknown, record))
            if ranks.rank == 0 and done % args.eval_every == 0:
                print_samples(stats["samples"])
            run.write(done, record | evaluation(done), SHOWN)

def run_state(stages, cache, unknown, record):
    """What a resumed run continues from: copies, as a thread writes them while training goes on."""
    # Numbers of float32 keep their bits as JSON.
    kept = [(sampled, [vars(r) | {"ids": r.ids.tolist(), "sampler": r.sampler.tolist()} for r in group])
            for sampled, group in cache]
    drawn = [dict(loader.drawn) for _, loader in stages]
    return {"drawn": drawn, "cache": kept, "unknown": unknown, "record": record}

def check_signal(groups, stats, unknown, verdicts, last, ranks):
    """ValueError if too many of the run's verdicts are unknown, no group carries signal, or the verifier does
    not work any more. Prints a warning for a domain without a right reply in this step."""
    check_verifier()
    replies = Counter(x["domain"] for x in stats["samples"] if x["correct"] is not None)
    right = Counter(x["domain"] for x in stats["samples"] if x["correct"])
    for domain in sorted(replies.keys() - right.keys()) if ranks.rank == 0 else ():
        tqdm.write(f"warning: none of {replies[domain]} replies in {domain} is right; look at them "
                   "(--eval-every 1) and at the problems (eval.py --check FILE)", file=sys.stdout)
    if last or verdicts >= 100:  # 1 of the first 10 says little
        data.check_unknown("the run so far", unknown, verdicts)
    check(groups, f"none of {stats['groups']} groups carries any signal ({stats['all_right']} all right, "
          f"{stats['all_wrong']} all wrong): the problems are too easy or too hard for this model, or the "
          "verifier cannot read its answers; see --eval-every 1 and eval.py --check FILE")

if __name__ == "__main__":
    sys.exit(train_sft.run_main(main))
