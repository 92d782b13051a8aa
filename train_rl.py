"""GRPO with verifiable rewards (Falcon-H1R, section 3): sample groups of answers, score them, learn from the better.

    python train_rl.py                                   the small CPU run: from runs/tiny/sft to runs/tiny/rl
    torchrun --nproc-per-node 2 train_rl.py --fresh      the same on two ranks

One step: sample G traces per prompt until enough groups carry signal (backfill); advantages within each group;
one update on exactly the tokens that were sampled, stop token included, at the temperature of sampling.

What is logged, by name
    reward, reward_std      mean and spread of known rewards, before groups are chosen; correct: its main part
    all_right, all_wrong    share of sampled groups without signal for that reason
    calls, cached, age      sampling calls of the step, groups taken from the cache, their mean age in steps
    entropy                 of the trainer's distribution, from the logits, nats per token
    clip_frac_low, clip_frac_high   share of tokens whose clipped term is active (0 at one update per batch)
    kl                      mean k3 estimate of KL(old || new), nats per token
    mismatch, mismatch_max  |p_trainer - p_sampler| of sampled tokens; capped: share of them that TIS caps
    length, length_right, length_wrong, truncated   tokens per trace, share that ran out of tokens
    well_formed, mixed      share in the format; mean share of letters in scripts that the prompt does not use
    unparsed, timeouts, killed, unknown   shares of the verdicts: no answer or code; the program's time was
                            up, or it broke another limit; nothing is known (no sandbox, a judge is down)
    t_sample, t_score, t_update   seconds; t_score: waiting for verdicts afterwards; t_verify: of all verdicts

A reply of unknown verdict counts nowhere: not in its group, in training, in means of rewards. More than 2% of
them in the whole run end it; the same command continues from the last checkpoint once the cause is gone.

Deviations from the paper: it gives neither the weight of the cross-entropy on positives (0.1) nor the cache's
size and age nor the penalties. Groups without signal are dropped altogether. Kept: G = 16, temperature 0.85,
clip (0.2, 0.28), TIS cap 2, beta = 0 and gamma = 0.

To copy this, also take all other scripts but eval.py.
"""

import os
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
import train_sft
from data import flag
from model import check, generate
from rewards import check_code, check_scorable, format_ok, mixed_scripts, open_judge, verify
from ssm_scan import to_device


@dataclass
class Args:
    out: str = flag("runs/tiny/rl", "folder of the run")
    init: str = flag("runs/tiny/sft", "checkpoint to start from")
    problems: str = flag("runs/tiny/data/rl.jsonl", "problems with answers or tests, disjoint from the SFT data")
    steps: int = flag(14, "batches of groups to learn from")
    prompts: int = flag(16, "groups per update, and prompts per sampling call")
    group: int = flag(16, "traces per prompt, the paper's G")
    temperature: float = flag(0.85, "of sampling and of the loss alike")
    max_new_tokens: int = flag(160, "longest answer, in tokens")
    lr: float = flag(7e-5, "learning rate after warm-up (the paper's 2e-6 is for 7B)")
    warmup_steps: int = flag(2, "steps with rising learning rate (the paper: 10)")
    updates: int = flag(1, "passes over a batch, one optimizer step each")
    clip_low: float = flag(0.2, "the gradient ends at ratios below 1 - this")
    clip_high: float = flag(0.28, "the gradient ends at ratios above 1 + this")
    tis_cap: float = flag(2.0, "cap of the importance weight between sampler and trainer")
    positive_weight: float = flag(0.1, "mu, weight of the cross-entropy on correct samples")
    normalise: str = flag("sequence", "sequence: mean per answer, then over answers (paper); token: mean over all "
                          "tokens (DAPO)")
    format_penalty: float = flag(0.1, "taken off an answer that is not <think>reasoning</think>answer")
    language_penalty: float = flag(0.1, "times the share of letters in scripts that the prompt does not use")
    code_tests: int = flag(0, "tests to run per program, another random sample in each step; 0: all")
    judge: str = flag("", "chat endpoint, http://host:8000/v1, of a model that compares answers in words; "
                      "key: OPENAI_API_KEY")
    judge_model: str = flag("judge", "its name there")
    judge_cache: str = flag("runs/judge.jsonl", "file of its verdicts")
    unsafe_local_execution: bool = flag(False, "run programs of the model even if they cannot be isolated")
    max_calls: int = flag(6, "sampling calls per step before it goes on with fewer groups")
    cache: int = flag(32, "surplus groups kept for later steps")
    cache_age: int = flag(2, "steps after which a kept group is dropped")
    weight_decay: float = flag(0.0, "AdamW decay of matrices")
    clip: float = flag(1.0, "largest norm of the whole gradient")
    pack_tokens: int = flag(4096, "longest row, in tokens: bounds memory, does not change the result")
    slots: int = flag(0, "traces decoded together; 0: as many as fit into free memory, at most 256")
    save_every: int = flag(5, "steps between checkpoints")
    eval_every: int = flag(5, "steps between printed samples, one right and one wrong")
    seed: int = flag(0, "of prompt order and sampling")
    limit: int = flag(0, "use the first problems only; 0: all")
    cp: int = flag(1, "context-parallel size in updates: ranks that share each row; divides ranks and heads")
    replicas: int = flag(1, "replicas of the sharded model (HSDP); one per node: only gradients leave it")
    checkpoint_activations: bool = flag(False, "recompute activations backward: saves memory, 1/3 more compute")
    compile: bool = flag(False, "torch.compile the per-token part of each block; takes a minute at the start")
    device: str = flag("", "cpu or cuda; empty: cuda if available")
    fresh: bool = flag(False, "start over, deleting an earlier run in --out")


# 1. The formulas --------------------------------------------------------------------------------------------
# Tensors of token terms are (t,), masked by weights that are 0 where nothing was sampled.

def advantages(rewards, gate=1e-4):
    """A_i = (R_i - mean) / (std + 1e-6) over the G rewards of one prompt, with the population std.

    Returns (G,) float64, or None if the rewards' range is below `gate`: rounding differences would otherwise
    be blown up to advantages of size one."""
    r = np.asarray(rewards, np.float64)
    if len(r) < 2 or r.max() - r.min() < gate:
        return None
    return (r - r.mean()) / (r.std() + 1e-6)


def clipped_policy_loss(new, old, advantage, clip_low, clip_high):
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) per token, rho = exp(new - old) (PPO; "clip-higher": DAPO)."""
    rho = torch.exp(new - old)
    return -torch.minimum(rho * advantage, rho.clamp(1 - clip_low, 1 + clip_high) * advantage)


def tis_weight(old, sampler, cap):
    """min(exp(old - sampler), cap): the trainer's probability over the sampler's, capped above, no gradient."""
    return torch.exp((old - sampler).detach()).clamp(max=cap)


def k3(new, old):
    """Schulman's k3 estimate of KL(old || new) at tokens drawn from old: e^d - 1 - d >= 0, d = new - old."""
    d = new - old
    return torch.expm1(d) - d


def token_weights(lengths, normalise):
    """Weight of each token of answers with these lengths, summing to 1 over the batch; one number per answer.

    "sequence" (the paper): 1 / (answers * length).  "token" (DAPO): 1 / (all tokens)."""
    check(normalise in ("sequence", "token"), f"--normalise {normalise}: expected sequence or token")
    if normalise == "token":
        return [1 / sum(lengths)] * len(lengths)
    return [1 / (len(lengths) * length) for length in lengths]


# 2. Rewards -------------------------------------------------------------------------------------------------

# The penalties add up to less (see check_args). So a right reply with all of them beats a wrong one without, and
# a group's rewards span this much exactly if some are right and some wrong: style alone is no signal.
SIGNAL = 0.5


def reward(verdict, text, ended, prompt, args):
    """Score of one trace and its parts; score and correct are None for an unknown verdict.

    text: without the token that ended it. well_formed: it ended, and is <think>reasoning</think>answer.
    mixed: share of its letters in scripts that the prompt does not use."""
    well_formed = ended and format_ok(text)
    mixed = mixed_scripts(text, prompt)
    score = correct = None
    if verdict.score is not None:
        correct = verdict.score == 1
        # score = verdict - format_penalty * (not well_formed) - language_penalty * mixed
        score = verdict.score - (args.format_penalty * (not well_formed) + args.language_penalty * mixed)
    return {"score": score, "correct": correct, "well_formed": well_formed, "mixed": mixed,
            "reason": verdict.reason, "t_verdict": verdict.seconds}


UNPARSED = ("no answer", "no code")
KILLED = ("memory limit", "output limit", "thread limit", "disk limit", "died")


def check_verifier():
    """Check the verifier on known pairs: one that always says no would train on noise."""
    known = [("<think>x</think>\\boxed{\\frac12}", "0.5", 1), ("<think>x</think>\\boxed{41}", "42", 0),
             ("no answer", "42", 0)]
    for text, gold, score in known:
        verdict = verify(text, data.Problem("canary", "math", "", gold))
        check(verdict.score == score, f"the verifier is broken: {text!r} against {gold!r}")


# 3. Rollouts ------------------------------------------------------------------------------------------------

@dataclass
class Rollout:
    """One scored trace, in the form that data.pack takes (ids, mask, weight), with what the loss needs."""
    ids: np.ndarray  # (prompt + n,) int32
    prompt: int  # tokens of the prompt
    sampler: list  # log-probabilities of the n sampled tokens under the sampler
    score: float
    correct: bool
    advantage: float = 0.0
    token_weight: float = 0.0
    weight: float = 1.0

    @property
    def mask(self):
        """(prompt + n,) bool, True on the sampled tokens: the stop token is one, the prompt's are not."""
        return np.arange(len(self.ids)) >= self.prompt


class Prompts:
    """Problems in an order that is shuffled anew each epoch; `position` is all its state."""

    def __init__(self, problems, tokenizer, seed, position=0):
        self.problems = problems
        self.seed = seed
        self.position = position
        chats = [[{"role": "user", "content": problem.prompt}] for problem in problems]
        self.ids = [data.render_chat(chat, tokenizer, generation_prompt=True)[0] for chat in chats]

    def take(self, count):
        """The next `count` prompts, as (problem, prompt ids)."""
        taken = []
        for _ in range(count):
            epoch, place = divmod(self.position, len(self.problems))
            i = np.random.default_rng([self.seed, epoch]).permutation(len(self.problems))[place]
            taken.append((self.problems[i], self.ids[i]))
            self.position += 1
        return taken


@dataclass
class Stats:
    """What a step gathers for the log, see step_metrics."""
    samples: list = field(default_factory=list)  # a dict per reply, from all ranks
    groups: int = 0  # sampled
    all_right: int = 0  # of these
    all_wrong: int = 0
    calls: int = 0
    cached: int = 0
    age: float = 0.0
    seconds: Counter = field(default_factory=Counter)  # by t_sample, t_score, t_update
    sums: Counter = field(default_factory=Counter)  # over this rank's tokens, by name; tensors on the device
    mismatch_max: list = field(default_factory=list)  # per row, on the device


def sample_groups(sampler, prompts, tokenizer, verifier, args, seed, ranks, stats):
    """Sample and score args.group traces for each of prompts, (problem, ids). verifier(text, problem) -> Verdict.

    Every rank samples its share of the prompts. Returns all groups on every rank, in the order of the prompts:
    lists of Rollout, without those of unknown verdict."""
    start = time.time()
    pool = ThreadPoolExecutor(2 * (os.cpu_count() or 1))

    def own(i, sample):
        return "go" if i % ranks.world == ranks.rank else "done"

    def judge(trace):  # in threads: programs and judges take their time while sampling goes on
        text = data.reply_text(trace.tokens, tokenizer)
        return text, verifier(text, prompts[trace.prompt_index][0])

    def on_trace(trace):
        trace.judged = pool.submit(judge, trace)

    try:
        traces = generate(sampler, [ids for _, ids in prompts], samples=args.group, temperature=args.temperature,
                          max_new_tokens=args.max_new_tokens, stop_ids=tokenizer.stop_ids, seed=seed,
                          slots=args.slots, admit=own, on_trace=on_trace)
        stats.seconds["t_sample"] += time.time() - start
        start = time.time()
        groups = [([], []) for _ in prompts]  # of each prompt: rollouts, and what is logged of its replies
        for trace in traces:
            rollout, sample = score_trace(trace, *prompts[trace.prompt_index], args)
            rollouts, samples = groups[trace.prompt_index]
            samples.append(sample)
            if sample["score"] is not None:
                rollouts.append(rollout)
    finally:
        pool.shutdown(cancel_futures=True)  # an error or Ctrl-C does not wait for hundreds of verdicts
    stats.seconds["t_score"] += time.time() - start
    groups = ranks.gather(groups[ranks.rank :: ranks.world])
    stats.samples += [sample for _, samples in groups for sample in samples]
    return [rollouts for rollouts, _ in groups]


def score_trace(trace, problem, prompt, args):
    """The Rollout of a trace, once its verdict is there, and what is logged of it."""
    text, verdict = trace.judged.result()
    score = reward(verdict, text, trace.stop == "stop", problem.prompt, args)
    sample = {**score, "length": len(trace.tokens), "truncated": trace.stop == "length", "text": text,
              "prompt": problem.prompt, "gold": problem.answer, "domain": problem.domain}
    ids = np.array([*prompt, *trace.tokens], np.int32)
    return Rollout(ids, len(prompt), trace.logprobs, score["score"], score["correct"]), sample


def collect(sampler, prompts, cache, step, tokenizer, verifier, args, ranks, stats):
    """Groups with signal for one update: from the cache, then from as many sampling calls as it takes (backfill).

    Surplus groups go into the cache, first in, first out, as (step sampled, group); their log-probabilities are
    the sampler's of that step."""
    cache[:] = [(sampled, group) for sampled, group in cache if step - sampled <= args.cache_age]
    chosen = [cache.pop(0) for _ in range(min(len(cache), args.prompts))]
    stats.cached = len(chosen)
    stats.age = float(np.mean([step - sampled for sampled, _ in chosen])) if chosen else 0.0
    while len(chosen) < args.prompts and stats.calls < args.max_calls:
        seed = args.seed * 1_000_003 + step * 1_009 + stats.calls  # another stream for every call of the run
        stats.calls += 1
        new = prompts.take(args.prompts)
        for group in sample_groups(sampler, new, tokenizer, verifier, args, seed, ranks, stats):
            values = advantages([r.score for r in group], SIGNAL)
            stats.groups += 1
            if values is None:
                stats.all_right += len(group) > 1 and all(r.correct for r in group)
                stats.all_wrong += len(group) > 1 and not any(r.correct for r in group)
                continue
            for r, value in zip(group, values):
                r.advantage = float(value)
            chosen.append((step, group))
    cache.extend(chosen[args.prompts :])
    del cache[: max(0, len(cache) - args.cache)]
    return [group for _, group in chosen[: args.prompts]]


# 4. The update ----------------------------------------------------------------------------------------------

class Tokens(NamedTuple):
    """What loss and statistics know of the tokens of a row that this rank computes, (t,) float32 each."""
    new: torch.Tensor  # log-probability under the trainer
    old: torch.Tensor  # before the first update on the batch
    entropy: torch.Tensor  # of the trainer's distribution
    sampler: torch.Tensor  # log-probability under the sampler
    advantage: torch.Tensor
    token_weight: torch.Tensor  # 0 where nothing was sampled
    correct: torch.Tensor  # 1 on tokens of correct answers


def pack_values(row, name):
    """(t,) float32: field `name` of a Pack's rollouts, at the positions that predict their sampled tokens."""
    out = np.zeros(len(row.input_ids), np.float32)
    for start, r in zip(row.cu_seqlens, row.members):
        if isinstance(r, Rollout):  # not one of the dummies that keep ranks in step
            out[start + np.flatnonzero(r.mask) - 1] = getattr(r, name)
    return out


def row_tokens(model, row, temperature, old=None):
    """Tokens of a Pack; old: None at the first update."""
    names = ("sampler", "advantage", "token_weight", "correct")
    values = [train_sft.local_tokens(model, pack_values(row, name)) for name in names]
    values = to_device(values, next(model.parameters()).device)
    new, entropy = train_sft.pack_logprobs(model, row, temperature)
    return Tokens(new, new.detach() if old is None else old, entropy, *values)


def grpo_loss(tokens, args, positives):
    """sum of weight * TIS * clipped policy loss   -   mu * sum over correct answers of log p / positives

    Both sums are over this rank's tokens; positives: tokens of correct answers in the whole batch."""
    t = tokens
    tis = tis_weight(t.old, t.sampler, args.tis_cap)
    policy = clipped_policy_loss(t.new, t.old, t.advantage, args.clip_low, args.clip_high)
    loss = (t.token_weight * tis * policy).sum()
    return loss - args.positive_weight * (t.correct * t.new).sum() / max(1, positives)


def add_token_stats(stats, tokens, args):
    """Add a row's part of the log's means over tokens. All stays on the device: the host does not wait."""
    t = tokens
    new = t.new.detach()
    sampled = t.token_weight > 0
    rho = torch.exp(new - t.old)
    off = (t.old.exp() - t.sampler.exp()).abs() * sampled
    terms = {
        "tokens": sampled,
        "entropy": t.entropy * sampled,
        "clip_frac_low": sampled & (rho < 1 - args.clip_low) & (t.advantage < 0),
        "clip_frac_high": sampled & (rho > 1 + args.clip_high) & (t.advantage > 0),
        "kl": k3(new, t.old) * sampled,
        "mismatch": off,
        "capped": sampled & (torch.exp(t.old - t.sampler) > args.tis_cap),
    }
    for name, values in terms.items():
        stats.sums[name] += values.sum(dtype=torch.float64)
    stats.mismatch_max.append(off.max())


def train_step(model, optimizer, groups, args, lr, ranks, stats):
    """args.updates passes over the groups. Returns loss and gradient norm of the last one."""
    rollouts = [r for group in groups for r in group]
    weights = token_weights([len(r.sampler) for r in rollouts], args.normalise)
    for r, weight in zip(rollouts, weights):
        r.token_weight = weight
    positives = sum(len(r.sampler) for r in rollouts if r.correct)
    packs = data.pack(rollouts, args.pack_tokens, ranks.dp_size)
    old = {}  # a row's log-probabilities before the first update

    def loss_of(row):
        tokens = row_tokens(model, row, args.temperature, old.get(id(row)))
        old[id(row)] = tokens.old
        add_token_stats(stats, tokens, args)
        return grpo_loss(tokens, args, positives)

    for _ in range(args.updates):
        loss = train_sft.accumulate_gradients(model, packs, ranks, loss_of)
        loss, norm = train_sft.optimizer_step(model, optimizer, ranks.all_sum(loss), lr, args.clip)
    return loss, norm


# 5. The log -------------------------------------------------------------------------------------------------

SHOWN = ("reward", "correct", "entropy", "mismatch", "length", "calls", "cached", "grad_norm", "t_sample",
         "t_update")


def mean(values):
    return float(np.mean(list(values) or [0]))


def step_metrics(stats, loss, norm, lr, ranks):
    """The log's fields, see the top, from what a step gathered."""
    samples = stats.samples
    known = [x for x in samples if x["correct"] is not None]
    rewards = [x["score"] for x in known]
    metrics = {"loss": loss, "grad_norm": norm, "lr": lr, "reward": mean(rewards),
               "reward_std": float(np.std(rewards or [0])), "correct": mean(x["correct"] for x in known)}
    domains = sorted({x["domain"] for x in samples})
    for domain in domains if len(domains) > 1 else ():
        metrics[f"reward_{domain}"] = mean(x["score"] for x in known if x["domain"] == domain)

    # Groups and calls.
    for name in ("all_right", "all_wrong"):
        metrics[name] = getattr(stats, name) / max(1, stats.groups)
    for name in ("calls", "cached", "age"):
        metrics[name] = getattr(stats, name)

    # Means over the tokens of the update, of all ranks.
    totals = ranks.all_sum(torch.stack(list(stats.sums.values()))).tolist()
    sums = dict(zip(stats.sums, totals))
    tokens = sums.pop("tokens")
    metrics |= {name: total / tokens for name, total in sums.items()}
    metrics["mismatch_max"] = max(ranks.all_values(float(torch.stack(stats.mismatch_max).max())))
    metrics |= {"tokens": int(tokens), "sampled": sum(x["length"] for x in samples)}

    # Replies and their verdicts.
    for name in ("well_formed", "mixed", "length", "truncated"):
        metrics[name] = mean(x[name] for x in samples)
    metrics["length_right"] = mean(x["length"] for x in known if x["correct"])
    metrics["length_wrong"] = mean(x["length"] for x in known if not x["correct"])
    metrics["unparsed"] = mean(x["reason"] in UNPARSED for x in samples)
    metrics["timeouts"] = mean(x["reason"] == "time limit" for x in samples)
    metrics["killed"] = mean(x["reason"].split(":")[0] in KILLED for x in samples)
    metrics["unknown"] = mean(x["correct"] is None for x in samples)
    metrics["t_verify"] = float(sum(x["t_verdict"] for x in samples))
    return metrics | {name: round(seconds, 3) for name, seconds in stats.seconds.items()}


def print_samples(samples):
    """One right and one wrong answer, to see what the reward sees."""
    for label, right in (("right", True), ("wrong", False)):
        for x in [x for x in samples if x["correct"] == right][:1]:
            about = f"{x['prompt']} (gold {x['gold']}, score {x['score']:g})"
            tqdm.write(f"{label}: {about} {x['text']!r}", file=sys.stdout)


def count_verdicts(verdicts, samples, last):
    """The run's {"all": count, "unknown": {reason: count}} after a step. ValueError if too many are unknown."""
    count = verdicts["all"] + len(samples)
    unknown = Counter(x["reason"] for x in samples if x["correct"] is None) + Counter(verdicts["unknown"])
    if last or count >= 100:  # 1 of the first 10 says little
        data.check_unknown("the run so far", unknown, count)
    return {"all": count, "unknown": unknown}


# 6. Training ------------------------------------------------------------------------------------------------

def check_args(args):
    train_sft.check_at_least(1, args, "steps", "prompts", "max_new_tokens", "updates", "max_calls",
                             "save_every", "eval_every")
    train_sft.check_at_least(0, args, "slots", "warmup_steps", "cache", "cache_age", "limit", "seed", "lr",
                             "weight_decay", "clip", "clip_low", "clip_high", "tis_cap", "positive_weight",
                             "format_penalty", "language_penalty", "code_tests")
    check(args.group >= 2, f"--group {args.group}: one answer has nothing to be compared with, give at least 2")
    check(args.temperature > 0, f"--temperature {args.temperature}: must be above 0, or all answers are the same")
    token_weights([1], args.normalise)
    check(args.format_penalty + args.language_penalty < SIGNAL,
          f"--format-penalty plus --language-penalty must be below {SIGNAL}, or style could beat being right")
    for path, default in ((args.init, Args.init), (args.problems, Args.problems)):
        hint = ": run python train_sft.py first" if path == default else ""
        check(Path(path).exists(), f"{path} is missing{hint}")


def to_json(cache):
    return [(step, [{**asdict(r), "ids": r.ids.tolist()} for r in group]) for step, group in cache]


def from_json(cache):
    return [(step, [Rollout(**{**r, "ids": np.array(r["ids"], np.int32)}) for r in group]) for step, group in cache]


def main():
    args = data.parse_args(Args, __doc__.partition("\n\n")[0])
    check_args(args)
    check_verifier()
    ranks = train_sft.start_ranks(args.device, args.cp, args.replicas)
    ranks.check_same_on_all("the arguments", asdict(args))

    # Read everything before Run() deletes what --fresh replaces. Every rank must see the same problems.
    tokenizer = data.load_tokenizer(args.init)
    problems = data.read_problems(args.problems, args.limit, partial(check_scorable, judge=args.judge))
    text = "".join(p.prompt + p.answer for p in problems)
    ranks.check_same_on_all("the problems' checksum", zlib.crc32(text.encode(errors="surrogatepass")))
    check_code(problems, args.problems, args.unsafe_local_execution, quiet=ranks.rank > 0)
    verifier = partial(verify, judge=open_judge(args), limit=args.code_tests, unsafe=args.unsafe_local_execution)
    model = train_sft.load_model(args.init)
    model = train_sft.shard(model, ranks, args.checkpoint_activations, args.compile)

    # Continue after the last checkpoint, if there is one.
    run = train_sft.Run(args, ranks, tokenizer, volatile=("judge", "judge_cache"))
    optimizer = train_sft.make_optimizer(model, args.lr, args.weight_decay)
    state = {"position": 0, "cache": [], "verdicts": {"all": 0, "unknown": {}}} | run.resume(model, optimizer)
    prompts = Prompts(problems, tokenizer, args.seed, state["position"])
    cache = from_json(state["cache"])
    verdicts = state["verdicts"]
    sampler = train_sft.unsharded_copy(model)

    with run:
        if run.last_logged < state["step"]:  # the run was killed between saving and logging
            run.write(state["step"], state["record"], SHOWN)

        for step in range(state["step"], args.steps):
            start = time.time()
            done = step + 1
            stats = Stats()
            first = prompts.position
            if step % args.eval_every == 0:
                check_verifier()

            # Sample until enough groups carry signal, then learn from them. An error names the prompts.
            lr = args.lr * min(1, done / max(1, args.warmup_steps))
            verify_step = partial(verifier, seed=args.seed * 1_000_003 + step)  # draws from --code-tests
            try:
                groups = collect(sampler, prompts, cache, step, tokenizer, verify_step, args, ranks, stats)
                verdicts = count_verdicts(verdicts, stats.samples, last=done == args.steps)
                check_signal(groups, stats, done, ranks)
                before = time.time()
                loss, norm = train_step(model, optimizer, groups, args, lr, ranks, stats)
            except ValueError as e:
                drawn = f"prompts {first} to {prompts.position - 1} of the stream"
                raise ValueError(f"step {done}, {drawn}: {e}; {run.earlier_steps}") from None

            # The next step samples from the new weights.
            sampler = train_sft.unsharded_copy(model, sampler)
            stats.seconds["t_update"] = time.time() - before

            # Save, then log.
            record = step_metrics(stats, loss, norm, lr, ranks)
            record["seconds"] = round(time.time() - start, 3)
            if done == args.steps or done % args.save_every == 0:
                saved = {"position": prompts.position, "cache": to_json(cache), "verdicts": verdicts}
                run.save(done, model, optimizer, {**saved, "record": record})
            if ranks.rank == 0 and done % args.eval_every == 0:
                print_samples(stats.samples)
            run.write(done, record, SHOWN)


def check_signal(groups, stats, step, ranks):
    """Say so if no answer of a step is right; ValueError if no group carries signal."""
    if ranks.rank == 0 and {x["correct"] for x in stats.samples} - {None} == {False}:
        tqdm.write(f"step {step}: none of {len(stats.samples)} answers is right; look at "
                   "them (--eval-every 1) and problems (eval.py --check FILE)", file=sys.stdout)
    check(groups, f"none of {stats.groups} groups carries any signal (all right {stats.all_right}, all wrong "
          f"{stats.all_wrong}, others unknown): the problems are too easy or too hard for this model, or the "
          "verifier cannot read its answers")


if __name__ == "__main__":
    sys.exit(train_sft.run_main(main))
