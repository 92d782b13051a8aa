"""GRPO with verifiable rewards (Falcon-H1R, section 3): sample groups of answers, score them, learn.

    python train_rl.py                                the small CPU run: from runs/tiny/sft to runs/tiny/rl
    torchrun --nproc-per-node 2 train_rl.py --fresh   the same on two ranks

One step: sample G traces per prompt until enough groups carry signal (backfill); advantages within a group;
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
clip (0.2, 0.28), TIS cap 2, beta = 0 and gamma = 0. To copy this, also take all other scripts but eval.py.
"""

import json
import os
import sys
import time
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial

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
class Args(train_sft.CommonArgs):
    out: str = flag("runs/tiny/rl", "folder of the run")
    init: str = flag("runs/tiny/sft", "checkpoint to start from")
    problems: str = flag("runs/tiny/data/rl.jsonl", "problems with answers or tests, not in the SFT data")
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
    normalise: str = flag("sequence", "mean per answer, then over answers (paper); token: over all tokens")
    format_penalty: float = flag(0.1, "taken off an answer that is not <think>reasoning</think>answer")
    language_penalty: float = flag(0.1, "times the share of letters in scripts that the prompt does not use")
    code_tests: int = flag(0, "tests to run per program, another random sample in each step; 0: all")
    judge: str = flag("", "http://host:8000/v1 of a model that compares answers; its key: OPENAI_API_KEY")
    judge_model: str = flag("judge", "its name there")
    judge_cache: str = flag("runs/judge.jsonl", "file of its verdicts")
    unsafe_local_execution: bool = flag(False, "run programs of the model even if they cannot be isolated")
    max_calls: int = flag(6, "sampling calls per step before it goes on with fewer groups")
    cache: int = flag(32, "surplus groups kept for later steps")
    cache_age: int = flag(2, "steps after which a kept group is dropped")
    weight_decay: float = flag(0.0, "AdamW decay of matrices")
    slots: int = flag(0, "traces decoded together; 0: as many as fit into free memory, at most 256")
    save_every: int = flag(5, "steps between checkpoints")
    eval_every: int = flag(5, "steps between printed samples, one right and one wrong")

# 1. The formulas --------------------------------------------------------------------------------------------

# The penalties of a reply add up to less (see check_args), so a right reply with all of them beats a wrong
# one without, and a group's rewards span this much if and only if some are right and some are wrong.
SIGNAL = 0.5

def advantages(rewards):
    """A_i = (R_i - mean) / (std + 1e-6) over the G rewards of one prompt, with the population std.
    Returns (G,) float64, or None if they span less than SIGNAL: differences of style, or of rounding, would
    be blown up to advantages of size one."""
    r = np.asarray(rewards, np.float64)
    if len(r) < 2 or r.max() - r.min() < SIGNAL:
        return None
    return (r - r.mean()) / (r.std() + 1e-6)

def clipped_policy_loss(new, old, advantage, clip_low, clip_high):
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) per token, rho = exp(new - old); two bounds as in DAPO."""
    rho = torch.exp(new - old)
    return -torch.minimum(rho * advantage, rho.clamp(1 - clip_low, 1 + clip_high) * advantage)

def tis_weight(old, sampler, cap):
    """min(exp(old - sampler), cap) without gradient: the trainer's probability over the sampler's."""
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
    """One scored trace, in the form that data.pack takes (ids, mask, weight), with what the loss needs."""
    ids: list  # of the prompt and of the n sampled tokens
    prompt: int  # tokens of the prompt
    sampler: list  # log-probabilities of the n sampled tokens under the sampler
    score: float  # None: unknown
    correct: bool
    logged: dict  # what step_metrics and print_samples want to know
    advantage: float = 0.0
    token_weight: float = 0.0
    weight: float = 1.0

    @property
    def mask(self):
        """(prompt + n,) bool, True on the sampled tokens, the stop token included."""
        return np.arange(len(self.ids)) >= self.prompt

def take_prompts(prompts, seed, position, count):
    """Prompts number position, position + 1, ... of an endless stream that is shuffled anew each epoch."""
    places = [divmod(n, len(prompts)) for n in range(position, position + count)]
    orders = {epoch: train_sft.permutation(len(prompts), seed, epoch) for epoch in {e for e, _ in places}}
    return [prompts[orders[epoch][i]] for epoch, i in places]

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
    Every rank samples its share of the prompts. Returns all groups on every rank, in the order of prompts:
    lists of Rollout, without those of unknown verdict."""
    start = time.time()
    pool = ThreadPoolExecutor(2 * (os.cpu_count() or 1))
    # Rank r samples prompts r, r + world, ... A trace depends on its own number, not on who samples it.
    def admit(i, sample):
        return "go" if i % ranks.world == ranks.rank else "done"
    # Programs and judges take their time, so finished traces are scored in threads while others are sampled.
    def on_trace(trace):
        problem, prompt = prompts[trace.prompt_index]
        trace.judged = pool.submit(new_rollout, trace, problem, prompt, tokenizer, verifier, args)
    try:
        traces = generate(sampler, [ids for _, ids in prompts], samples=args.group, seed=seed,
                          temperature=args.temperature, max_new_tokens=args.max_new_tokens,
                          stop_ids=tokenizer.stop_ids, slots=args.slots, admit=admit, on_trace=on_trace)
        stats["t_sample"] += time.time() - start
        # Wait for the verdicts that are still missing.
        start = time.time()
        groups = [[] for _ in prompts]
        for trace in traces:
            groups[trace.prompt_index].append(trace.judged.result())
    finally:
        pool.shutdown(cancel_futures=True)  # an error or Ctrl-C does not wait for hundreds of verdicts
    stats["t_score"] += time.time() - start
    # Now every rank learns the groups of all others: the update needs the whole batch.
    groups = ranks.gather(groups[ranks.rank :: ranks.world])
    stats["samples"] += [r.logged for group in groups for r in group]
    return [[r for r in group if r.score is not None] for group in groups]

def collect(sample, prompts, cache, step, position, args, stats):
    """Groups with signal for one update: from the cache, then from as many calls as it takes (backfill).
    sample(prompts, seed) -> groups. A call takes the next args.prompts of `prompts`, from `position` on.
    Surplus groups go into the cache, first in, first out, as (step, group); their log-probabilities stay."""
    # From the cache, unless the policy has moved on for too long.
    young = [(sampled, group) for sampled, group in cache if step - sampled <= args.cache_age]
    chosen = young[: args.prompts]
    stats["cached"] = len(chosen)
    stats["age"] = mean(step - sampled for sampled, _ in chosen)
    # Backfill: a group without signal gives no gradient, so sample further prompts instead.
    while len(chosen) < args.prompts and stats["calls"] < args.max_calls:
        seed = args.seed * 1_000_003 + step * 1_009 + stats["calls"]  # a stream for every call of the run
        taken = take_prompts(prompts, args.seed, position + stats["calls"] * args.prompts, args.prompts)
        stats["calls"] += 1
        for group in sample(taken, seed):
            values = advantages([r.score for r in group])
            stats["groups"] += 1
            if values is not None:
                chosen.append((step, group))
                for r, value in zip(group, values):
                    r.advantage = float(value)
            elif len(group) > 1:  # without signal, all are as the first one
                stats["all_right" if group[0].correct else "all_wrong"] += 1
    # What is left over waits for a later step; the oldest make room.
    surplus = young[args.prompts :] + chosen[args.prompts :]
    cache[:] = surplus[max(0, len(surplus) - args.cache) :]
    return [group for _, group in chosen[: args.prompts]]

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
    update, None then."""
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
        "capped": sampled & (torch.exp(old - sampler) > args.tis_cap),
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

SHOWN = "reward correct entropy mismatch length calls cached grad_norm t_sample t_update".split()

def new_stats():
    """What a step gathers: a dict per reply, sums over tokens, and counts and seconds, by name, from 0 on."""
    return defaultdict(int, samples=[], sums=defaultdict(int), mismatch_max=[])

def mean(values):
    """The mean of numbers, 0 if there are none."""
    return float(np.mean(list(values) or [0]))

def step_metrics(stats, loss, norm, lr, ranks):
    """The log's fields, see the top, from what a step gathered."""
    samples = stats["samples"]
    known = [x for x in samples if x["correct"] is not None]
    scores = [x["score"] for x in known]
    metrics = {"loss": loss, "grad_norm": norm, "lr": lr, "reward": mean(scores),
               "reward_std": float(np.std(scores or [0])), "correct": mean(x["correct"] for x in known)}
    domains = sorted({x["domain"] for x in samples})
    for domain in domains if len(domains) > 1 else ():
        metrics[f"reward_{domain}"] = mean(x["score"] for x in known if x["domain"] == domain)
    # Groups and calls, seconds.
    metrics |= {name: stats[name] / max(1, stats["groups"]) for name in ("all_right", "all_wrong")}
    metrics |= {name: round(stats[name], 3) for name in ("t_sample", "t_score", "t_update")}
    metrics |= {name: stats[name] for name in ("calls", "cached", "age")}
    # Means over the sampled tokens of the update, on all ranks: of entropy, clip_frac_low, clip_frac_high,
    # kl, mismatch and capped.
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
    train_sft.check_numbers(args, "steps", "prompts", "max_new_tokens", "updates", "max_calls", "save_every",
                            "eval_every")
    check(args.group >= 2, f"--group {args.group}: one answer has nothing to be compared with")
    check(args.temperature > 0, f"--temperature {args.temperature}: at 0 all answers are the same")
    token_weights([1], args.normalise)
    check(args.format_penalty + args.language_penalty < SIGNAL,
          f"--format-penalty plus --language-penalty must be below {SIGNAL}, or style could beat being right")

def open_prompts(args, tokenizer, ranks):
    """The prompts of --problems, a list of (problem, ids), the same on all ranks, and their checksum."""
    problems = data.read_problems(args.problems, args.limit, partial(check_scorable, judge=args.judge))
    checksum = zlib.crc32(json.dumps([problem.record() for problem in problems]).encode())
    ranks.check_same_on_all("the problems' checksum", checksum)
    check_code(problems, args.problems, args.unsafe_local_execution, quiet=ranks.rank > 0)
    prompts = []
    for problem in problems:
        chat = [{"role": "user", "content": problem.prompt}]
        prompts.append((problem, data.render_chat(chat, tokenizer, generation_prompt=True)[0]))
    return prompts, checksum

def main():
    args = data.parse_args(Args, __doc__.partition("\n\n")[0])
    check_args(args)
    check_verifier()
    ranks = train_sft.start_ranks(args.device, args.cp, args.replicas)
    ranks.check_same_on_all("the arguments", asdict(args))

    # Bad input must cost nothing: read everything before Run() deletes what --fresh replaces.
    tokenizer = data.load_tokenizer(args.init)
    prompts, checksum = open_prompts(args, tokenizer, ranks)
    verifier = partial(verify, judge=open_judge(args), limit=args.code_tests,
                       unsafe=args.unsafe_local_execution)
    model = train_sft.shard(train_sft.load_model(args.init), ranks, args.checkpoint_activations, args.compile)

    # Continue after the last checkpoint, if there is one.
    run = train_sft.Run(args, ranks, tokenizer, checksum, volatile=("judge", "judge_cache"))
    optimizer = train_sft.make_optimizer(model, args.lr, args.weight_decay)
    state = {"position": 0, "cache": [], "unknown": {}} | run.resume(model, optimizer)
    position = state["position"]
    cache = [(sampled, [Rollout(**r) for r in group]) for sampled, group in state["cache"]]
    unknown = Counter(state["unknown"])  # unknown verdicts of the run, by reason
    sampler = train_sft.unsharded_copy(model)
    with run:
        if not state["logged"]:  # the run was killed between saving and logging
            run.write(state["step"], state["record"], SHOWN)
        for step in range(state["step"], args.steps):
            start = time.time()
            done = step + 1
            stats = new_stats()
            # Sample until enough groups carry signal, then learn from them. Errors name the prompts.
            lr = args.lr * min(1, done / max(1, args.warmup_steps))
            verify_step = partial(verifier, seed=args.seed * 1_000_003 + step)  # picks the --code-tests
            try:
                sample = partial(sample_groups, sampler, tokenizer, verify_step, args, ranks, stats)
                groups = collect(sample, prompts, cache, step, position, args, stats)
                unknown = unknown + Counter(x["reason"] for x in stats["samples"] if x["unknown"])
                verdicts = (position + stats["calls"] * args.prompts) * args.group  # of the whole run
                check_signal(groups, stats, unknown, verdicts, done == args.steps, ranks)
                before = time.time()
                loss, norm = train_step(model, optimizer, groups, args, lr, ranks, stats)
            except ValueError as e:
                last = position + stats["calls"] * args.prompts - 1
                what = f"prompts {position} to {last} of the stream: {e}"
                raise ValueError(f"step {done}, {what}; {run.trainer} holds what was saved before") from None
            # The next step samples other prompts, from the new weights.
            position += stats["calls"] * args.prompts
            sampler = train_sft.unsharded_copy(model, sampler)
            stats["t_update"] = time.time() - before
            record = step_metrics(stats, loss, norm, lr, ranks)
            record["seconds"] = round(time.time() - start, 3)
            # What a resumed run continues from: the next prompt, the surplus groups, the verdicts so far.
            if done == args.steps or done % args.save_every == 0:
                kept = [(sampled, [asdict(r) for r in group]) for sampled, group in cache]
                saved = {"position": position, "cache": kept, "unknown": unknown, "record": record}
                run.save(done, model, optimizer, saved)
            if ranks.rank == 0 and done % args.eval_every == 0:
                print_samples(stats["samples"])
            run.write(done, record, SHOWN)

def check_signal(groups, stats, unknown, verdicts, last, ranks):
    """ValueError if too many of the run's verdicts are unknown, no group carries signal, or the verifier does
    not work any more. Prints a hint if no reply of the step is right."""
    check_verifier()
    if {x["correct"] for x in stats["samples"]} - {None} == {False} and ranks.rank == 0:
        tqdm.write(f"none of {len(stats['samples'])} replies is right; look at them (--eval-every 1) and at "
                   "the problems (eval.py --check FILE)", file=sys.stdout)
    if last or verdicts >= 100:  # 1 of the first 10 says little
        data.check_unknown("the run so far", unknown, verdicts)
    check(groups, f"none of {stats['groups']} groups carries any signal ({stats['all_right']} all right, "
          f"{stats['all_wrong']} all wrong): the problems are too easy or too hard for this model, or the "
          "verifier cannot read its answers; see --eval-every 1 and eval.py --check FILE")

if __name__ == "__main__":
    sys.exit(train_sft.run_main(main))
