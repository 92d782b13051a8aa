"""GRPO with verifiable rewards (Falcon-H1R, section 3): sample groups of answers, score them, push towards the better ones.

    python train_rl.py                                   the small CPU run: starts from runs/tiny/sft, saves runs/tiny/rl
    torchrun --nproc-per-node 2 train_rl.py --fresh      the same on two ranks

One step: sample G traces of each prompt until enough groups carry signal (backfill); advantages within each group; one update
on exactly the tokens that were sampled, stop token included, at the temperature they were sampled with.

What is logged, by name
    reward, reward_std      mean and spread of known rewards, before groups are chosen; correct: its main part
    all_right, all_wrong    share of sampled groups without signal for that reason
    calls, cached, age      sampling calls of the step, groups taken from the cache, their mean age in steps
    entropy                 of the trainer's distribution, from the logits, nats per token
    clip_low, clip_high     share of tokens whose clipped term is the active one (0 at one update per batch)
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
class Args:
    out: str = flag("runs/tiny/rl", "folder of the run")
    init: str = flag("runs/tiny/sft", "checkpoint to start from")
    problems: str = flag("runs/tiny/data/rl.jsonl", "problems with answers or tests, disjoint from the SFT data")
    steps: int = flag(14, "updates")
    prompts: int = flag(16, "groups in an update, and prompts in a sampling call")
    group: int = flag(16, "traces of a prompt, the paper's G")
    temperature: float = flag(0.85, "of sampling and of the loss alike")
    max_new_tokens: int = flag(160, "longest answer, in tokens")
    lr: float = flag(7e-5, "learning rate after warm-up (the paper's 2e-6 is for 7B)")
    warmup_steps: int = flag(2, "steps with rising learning rate (the paper: 10)")
    updates: int = flag(1, "passes over a batch, an optimiser step each")
    clip_low: float = flag(0.2, "ratio below 1 at which the gradient ends")
    clip_high: float = flag(0.28, "ratio above 1 at which the gradient ends")
    tis_cap: float = flag(2.0, "cap of the importance weight between sampler and trainer")
    positive_weight: float = flag(0.1, "mu, weight of the cross-entropy on correct samples")
    normalise: str = flag("sequence", "sequence: mean over each answer, then over answers (paper); token: over all tokens (DAPO)")
    format_penalty: float = flag(0.1, "taken off an answer that is not <think>reasoning</think>answer")
    language_penalty: float = flag(0.1, "taken off an answer whose letters are all in scripts that its prompt does not use; of fewer a share")
    code_tests: int = flag(0, "tests of a code problem to run, a random sample, another in each step; 0: all")
    judge: str = flag("", "chat endpoint, http://host:8000/v1, of a model that compares answers in words; key: OPENAI_API_KEY")
    judge_model: str = flag("judge", "its name there")
    judge_cache: str = flag("runs/judge.jsonl", "file of its verdicts")
    unsafe_local_execution: bool = flag(False, "run programs of the model even where they cannot be isolated")
    max_calls: int = flag(6, "sampling calls a step may make before it goes on with fewer groups")
    cache: int = flag(32, "surplus groups kept for later steps")
    cache_age: int = flag(2, "steps after which a kept group is dropped")
    weight_decay: float = flag(0.0, "AdamW decay of matrices")
    clip: float = flag(1.0, "largest norm of the whole gradient")
    pack_tokens: int = flag(4096, "longest row, in tokens: bounds memory, does not change the result")
    slots: int = flag(0, "traces decoded together; 0: as many as fit into free memory, at most 256")
    save_every: int = flag(5, "steps between checkpoints")
    eval_every: int = flag(5, "steps between printed samples, one good and one bad")
    seed: int = flag(0, "of prompt order and sampling")
    limit: int = flag(0, "use the first problems of the file only; 0: all")
    cp: int = flag(1, "ranks that share each row's tokens in updates (context parallelism); it must divide ranks and heads")
    replicas: int = flag(1, "copies of the sharded model; best one a node, so that only gradients travel between nodes")
    checkpoint_activations: bool = flag(False, "keep one activation a block and compute the others again: less memory, a third more work")
    compile: bool = flag(False, "torch.compile what blocks do to single tokens in updates; takes a minute at the start")
    device: str = flag("", "cpu or cuda; empty: cuda where there is one")
    fresh: bool = flag(False, "start over, deleting what --out holds of an earlier run")


# 1. The formulas --------------------------------------------------------------------------------------------
# Tensors of token terms are (t,), masked by weights that are 0 where nothing was sampled.

def advantages(rewards, gate=1e-4):
    """A_i = (R_i - mean) / (std + 1e-6) over the G rewards of one prompt (population std). Returns (G,) float64, or None when
    the rewards' range is below `gate`: rounding differences would otherwise be blown up to advantages of size one."""
    r = np.asarray(rewards, np.float64)
    if len(r) < 2 or r.max() - r.min() < gate:
        return None
    return (r - r.mean()) / (r.std() + 1e-6)


def policy_term(new, old, advantage, clip_low, clip_high):
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) with rho = exp(new - old), per token (PPO; "clip-higher" is DAPO's)."""
    rho = torch.exp(new - old)
    return -torch.minimum(rho * advantage, rho.clamp(1 - clip_low, 1 + clip_high) * advantage)


def tis_weight(old, sampler, cap):
    """min(exp(old - sampler), cap): the trainer's probability over the sampler's, truncated above only; no gradient."""
    return torch.exp((old - sampler).detach()).clamp(max=cap)


def k3(new, old):
    """Schulman's k3 estimate of KL(old || new) at tokens drawn from old: e^d - 1 - d, d = new - old. Never negative."""
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

# The penalties add up to less (see load). So a right reply with all of them beats a wrong one without, and a
# group's rewards span this much exactly if some are right and some wrong: style alone is no signal.
SIGNAL = 0.5


def reward(verdict, text, ended, prompt, args):
    """Score of one trace and its parts; None for an unknown verdict. text: without the token that ended it.

        score = verdict - format_penalty * (not well_formed) - language_penalty * mixed

    well_formed: it ended, and is <think>reasoning</think>answer. mixed: share of letters in scripts that the
    prompt does not use."""
    well_formed, mixed = ended and format_ok(text), mixed_scripts(text, prompt)
    penalty = args.format_penalty * (not well_formed) + args.language_penalty * mixed
    score, correct = (None, None) if verdict.score is None else (verdict.score - penalty, verdict.score == 1)
    return {"score": score, "correct": correct, "well_formed": well_formed, "mixed": mixed,
            "reason": verdict.reason, "t_verdict": verdict.seconds}


UNPARSED = ("no answer", "no code")
KILLED = ("memory limit", "output limit", "thread limit", "disk limit", "died")


def check_verifier():
    """A verifier that silently says no would train on noise: known pairs must come out right, at the start and while it goes on."""
    for text, gold, right in (("<think>x</think>\\boxed{\\frac12}", "0.5", True), ("<think>x</think>\\boxed{41}", "42", False),
                              ("no answer", "42", False)):
        check(verify(text, data.Problem("canary", "math", "", gold)).score == right, f"the verifier is broken: {text!r} against {gold!r}")


# 3. Rollouts ------------------------------------------------------------------------------------------------

@dataclass
class Rollout:
    """One scored trace, in the form that data.pack takes (ids, mask, weight), with what the loss needs."""
    ids: np.ndarray  # (prompt + n,) int32
    mask: np.ndarray  # (prompt + n,) bool, True on the n sampled tokens
    sampler: list  # n log-probabilities under the sampler
    score: float
    correct: bool
    advantage: float = 0.0
    token_weight: float = 0.0
    weight: float = 1.0


def new_rollout(prompt, trace, score):
    ids = np.array([*prompt, *trace.tokens], np.int32)
    return Rollout(ids, np.arange(len(ids)) >= len(prompt), trace.logprobs, score["score"], score["correct"])


class Prompts:
    """Problems in an order that is shuffled anew each epoch; `position` is all its state."""

    def __init__(self, problems, tokenizer, seed, position=0):
        self.problems, self.seed, self.position = problems, seed, position
        self.ids = [data.render_chat([{"role": "user", "content": p.prompt}], tokenizer, generation_prompt=True)[0]
                    for p in problems]

    def take(self, count):
        """The next `count` pairs of a problem and its prompt's ids."""
        taken = []
        for _ in range(count):
            epoch, place = divmod(self.position, len(self.problems))
            i = np.random.default_rng([self.seed, epoch]).permutation(len(self.problems))[place]
            taken.append((self.problems[i], self.ids[i]))
            self.position += 1
        return taken


def sample_groups(sampler, pairs, tokenizer, verifier, args, seed, ranks, stats):
    """Sample and score args.group traces for each (problem, prompt). Every rank samples its share of the prompts, then all
    hold all groups, in the order of the prompts: lists of Rollout, without those of unknown verdict.
    verifier(text, problem) -> Verdict."""
    start = time.time()
    def own(i, sample):
        return "go" if i % ranks.world == ranks.rank else "done"
    def judged(trace):  # in threads: programs and judges take their time while sampling goes on
        problem, text = pairs[trace.prompt_index][0], data.reply_text(trace.tokens, tokenizer)
        return text, verifier(text, problem)
    pool, verdicts = ThreadPoolExecutor(2 * (os.cpu_count() or 1)), {}
    try:
        def on_trace(trace):
            verdicts[trace.prompt_index, trace.sample_index] = pool.submit(judged, trace)
        traces = generate(sampler, [ids for _, ids in pairs], samples=args.group, max_new_tokens=args.max_new_tokens,
                          temperature=args.temperature, seed=seed, stop_ids=tokenizer.stop_ids, slots=args.slots, admit=own,
                          on_trace=on_trace)
        stats["t_sample"] += time.time() - start
        start, made = time.time(), [([], []) for _ in pairs]  # of each prompt: its group, and what is logged of it
        for trace in traces:
            problem, prompt = pairs[trace.prompt_index]
            text, verdict = verdicts[trace.prompt_index, trace.sample_index].result()
            score = reward(verdict, text, trace.stop == "stop", problem.prompt, args)
            group, samples = made[trace.prompt_index]
            if score["score"] is not None:
                group.append(new_rollout(prompt, trace, score))
            samples.append({**score, "length": len(trace.tokens), "truncated": trace.stop == "length", "text": text,
                            "prompt": problem.prompt, "gold": problem.answer, "domain": problem.domain})
    finally:
        pool.shutdown(cancel_futures=True)  # an error or Ctrl-C does not wait for hundreds
    stats["t_score"] += time.time() - start
    made = ranks.gather(made)
    stats["samples"] += [s for _, samples in made for s in samples]
    return [group for group, _ in made]


def collect(sampler, prompts, cache, step, tokenizer, verifier, args, ranks, stats):
    """Groups with signal for one update: first from the cache, then from as many sampling calls as it takes (backfill).
    Surplus groups go into the cache, first in, first out, with the sampler's log-probabilities and the step they are of."""
    cache[:] = [(made, group) for made, group in cache if step - made <= args.cache_age]
    chosen = [cache.pop(0) for _ in range(min(len(cache), args.prompts))]
    stats["cached"], stats["age"] = len(chosen), float(np.mean([step - made for made, _ in chosen])) if chosen else 0.0
    while len(chosen) < args.prompts and stats["calls"] < args.max_calls:
        seed = args.seed * 1_000_003 + step * 1_009 + stats["calls"]  # another stream for every call of the run
        stats["calls"] += 1
        for group in sample_groups(sampler, prompts.take(args.prompts), tokenizer, verifier, args, seed, ranks, stats):
            values = advantages([r.score for r in group], SIGNAL)
            stats["groups"] += 1
            if values is None:
                stats["all_right"] += len(group) > 1 and all(r.correct for r in group)
                stats["all_wrong"] += len(group) > 1 and not any(r.correct for r in group)
                continue
            for r, value in zip(group, values):
                r.advantage = float(value)
            chosen.append((step, group))
    cache.extend(chosen[args.prompts :])
    del cache[: max(0, len(cache) - args.cache)]
    return [group for _, group in chosen[: args.prompts]]


# 4. The update ----------------------------------------------------------------------------------------------

def pack_values(row, value):
    """(t,) float32 of a Pack: value(rollout) -> one number, or one per sampled token, at the positions that predict them."""
    out = np.zeros(len(row.input_ids), np.float32)
    for start, r in zip(row.cu_seqlens, row.members):
        out[start + np.flatnonzero(r.mask) - 1] = value(r)
    return torch.from_numpy(out)


def grpo_loss(model, row, args, positives, old=None, stats=None):
    """Loss of one Pack, and its log-probabilities (t,); old (t,) are the trainer's before the first update, None then.

        sum over tokens of weight * TIS * policy_term   -   mu * sum over tokens of correct answers of log p / their number"""
    values = [pack_values(row, v) for v in (
        lambda r: r.sampler, lambda r: r.advantage, lambda r: r.token_weight, lambda r: r.correct)]
    sampler, advantage, weight, correct = to_device(values, next(model.parameters()).device)
    new, entropy = train_sft.pack_logprobs(model, row, args.temperature)
    old = new.detach() if old is None else old
    tis = tis_weight(old, sampler, args.tis_cap)
    loss = (weight * tis * policy_term(new, old, advantage, args.clip_low, args.clip_high)).sum()
    loss = loss - args.positive_weight * (correct * new).sum() / max(1, positives)
    if stats is not None:
        real, rho, off = weight > 0, torch.exp(new.detach() - old), (old.exp() - sampler.exp()).abs()
        sums = (real, entropy * real, real & (rho < 1 - args.clip_low) & (advantage < 0),
                real & (rho > 1 + args.clip_high) & (advantage > 0), k3(new.detach(), old) * real, off * real,
                real & (torch.exp(old - sampler) > args.tis_cap))
        stats["sums"] += torch.stack(sums).sum(1, dtype=torch.float64)
        stats["mismatch_max"] = torch.maximum(stats["mismatch_max"], (off * real).max())
    return loss, new.detach()


def train_step(model, optimizer, groups, args, lr, ranks, stats):
    """args.updates passes over the groups; returns loss and gradient norm of the last one."""
    rollouts = [r for group in groups for r in group]
    for r, weight in zip(rollouts, token_weights([int(r.mask.sum()) for r in rollouts], args.normalise)):
        r.token_weight = weight
    positives = sum(int(r.mask.sum()) for r in rollouts if r.correct)
    packs, old = data.pack(rollouts, args.pack_tokens, ranks.teams), {}
    for _ in range(args.updates):
        def loss_of(row):
            if not any(isinstance(r, Rollout) for r in row.members):  # a dummy that keeps ranks in step
                return train_sft.pack_logprobs(model, row)[0].sum() * 0
            loss, new = grpo_loss(model, row, args, positives, old.get(id(row)), stats)
            old.setdefault(id(row), new)
            return loss
        loss = train_sft.backward_all(model, packs, ranks, loss_of)
        loss, norm = train_sft.update(model, optimizer, ranks.all_sum(loss), lr, args.clip)
    return loss, norm


# 5. The loop ------------------------------------------------------------------------------------------------

def new_stats(device="cpu"):
    """What a step gathers. Rows add to sums and mismatch_max on the device; record_of reads them."""
    return {"samples": [], "groups": 0, "all_right": 0, "all_wrong": 0, "calls": 0, "cached": 0, "age": 0.0, "t_sample": 0.0,
            "t_score": 0.0, "t_update": 0.0, "sums": torch.zeros(7, dtype=torch.float64, device=device),
            "mismatch_max": torch.zeros((), device=device)}


def record_of(stats, loss, norm, lr, ranks):
    """The log's fields (see the top) from what a step gathered."""
    def mean(values):
        return float(np.mean(list(values) or [0]))
    s, n = stats["samples"], max(1, stats["groups"])
    known = [x for x in s if x["correct"] is not None]
    rewards = [x["score"] for x in known]
    domains = sorted({x["domain"] for x in s})
    by_domain = {f"reward_{d}": mean(x["score"] for x in known if x["domain"] == d) for d in domains}
    tokens, *sums = ranks.all_sum(stats["sums"] / ranks.cp).tolist()
    names = ("entropy", "clip_low", "clip_high", "kl", "mismatch", "capped")  # in grpo_loss's order
    return {
        "loss": loss, "reward": mean(rewards), "reward_std": float(np.std(rewards or [0])),
        "correct": mean(x["correct"] for x in known), **(by_domain if len(domains) > 1 else {}),
        "all_right": stats["all_right"] / n, "all_wrong": stats["all_wrong"] / n,
        "calls": stats["calls"], "cached": stats["cached"], "age": stats["age"],
        **{name: total / tokens for name, total in zip(names, sums)},
        "mismatch_max": max(ranks.all_values(float(stats["mismatch_max"]))),
        **{name: mean(x[name] for x in s) for name in ("well_formed", "mixed", "length", "truncated")},
        "length_right": mean(x["length"] for x in known if x["correct"]),
        "length_wrong": mean(x["length"] for x in known if not x["correct"]),
        "unparsed": mean(x["reason"] in UNPARSED for x in s),
        "timeouts": mean(x["reason"] == "time limit" for x in s),
        "killed": mean(x["reason"].split(":")[0] in KILLED for x in s),
        "unknown": mean(x["correct"] is None for x in s), "t_verify": float(sum(x["t_verdict"] for x in s)),
        "grad_norm": norm, "lr": lr, "tokens": int(tokens), "sampled": sum(x["length"] for x in s),
        **{k: round(stats[k], 3) for k in ("t_sample", "t_score", "t_update")},
    }


def print_samples(samples):
    """One good and one bad answer, to see what the reward sees."""
    for label, right in (("right", True), ("wrong", False)):
        if shown := next((x for x in samples if x["correct"] == right), None):
            tqdm.write(f"{label}: {shown['prompt']} (gold {shown['gold']}, score {shown['score']:g}) {shown['text']!r}", file=sys.stdout)


def count_verdicts(verdicts, samples, last):
    """The run's {"all": count, "unknown": {reason: count}} after a step. ValueError at too many unknown."""
    count = verdicts["all"] + len(samples)
    unknown = Counter(verdicts["unknown"]) + Counter(x["reason"] for x in samples if x["correct"] is None)
    if last or count >= 100:  # 1 of the first 10 says little
        data.check_unknown("the run so far", unknown, count)
    return {"all": count, "unknown": unknown}


SHOWN = ("reward", "correct", "entropy", "mismatch", "length", "calls", "cached", "grad_norm", "t_sample", "t_update")


def load(args, ranks):
    train_sft.check_at_least(1, args, "steps", "prompts", "max_new_tokens", "updates", "max_calls", "save_every", "eval_every")
    train_sft.check_at_least(0, args, "slots", "warmup_steps", "cache", "cache_age", "limit", "seed", "lr",
                             "weight_decay", "clip", "clip_low", "clip_high", "tis_cap", "positive_weight",
                             "format_penalty", "language_penalty", "code_tests")
    check(args.group >= 2, f"--group {args.group}: one answer has nothing to be compared with, give at least 2")
    check(args.temperature > 0, f"--temperature {args.temperature}: must be above 0, or all answers are the same")
    token_weights([1], args.normalise)
    check(args.format_penalty + args.language_penalty < SIGNAL,
          f"--format-penalty plus --language-penalty must be below {SIGNAL}, or style could beat being right")
    check_verifier()
    problems = data.read_problems(args.problems, args.limit, partial(check_scorable, judge=args.judge))
    check_code(problems, args.problems, args.unsafe_local_execution, quiet=ranks.rank > 0)
    settings = {"limit": args.code_tests, "unsafe": args.unsafe_local_execution}
    verifier = partial(verify, judge=open_judge(args), **settings)
    tokenizer = data.load_tokenizer(args.init)
    return tokenizer, train_sft.shard(train_sft.load_model(args.init), ranks, args.checkpoint_activations, args.compile), problems, verifier


def to_json(cache):
    return [[made, [{**asdict(r), "ids": r.ids.tolist(), "mask": int(r.mask.sum())} for r in group]] for made, group in cache]


def from_json(cache):
    def rollout(r):
        ids = np.array(r["ids"], np.int32)
        return Rollout(**{**r, "ids": ids, "mask": np.arange(len(ids)) >= len(ids) - r["mask"]})
    return [(made, [rollout(r) for r in group]) for made, group in cache]


def main():
    args = data.parse_args(Args, __doc__.partition("\n\n")[0])
    ranks = train_sft.start_ranks(args.device, args.cp, args.replicas)
    tokenizer, model, problems, verifier = load(args, ranks)
    ranks.agree("the arguments", asdict(args))
    ranks.agree("the checksum of the problems", zlib.crc32("".join(p.prompt + p.answer for p in problems).encode(errors="surrogatepass")))
    run = train_sft.Run(args, ranks)
    optimizer = train_sft.make_optimizer(model, args.lr, args.weight_decay)
    state = run.resume(model, optimizer, tokenizer)
    prompts = Prompts(problems, tokenizer, args.seed, state["position"] if state else 0)
    cache = from_json(state["cache"]) if state else []
    verdicts = state["verdicts"] if state else {"all": 0, "unknown": {}}
    sampler = train_sft.whole_copy(model)
    if ranks.rank == 0 and state is None:
        print("  ".join(f"{k}={v}" for k, v in asdict(args).items()))

    with run:
        if state is not None and run.logged < state["step"]:  # it was killed between saving and logging
            run.write(state["step"], args.steps, state["record"], SHOWN)
        for step in range(state["step"] if state else 0, args.steps):
            start, stats, first = time.time(), new_stats(ranks.device), prompts.position
            if step % args.eval_every == 0:
                check_verifier()
            lr = args.lr * min(1, (step + 1) / max(1, args.warmup_steps))
            verify_step = partial(verifier, seed=args.seed * 1_000_003 + step)  # of --code-tests
            try:
                groups = collect(sampler, prompts, cache, step, tokenizer, verify_step, args, ranks, stats)
                if ranks.rank == 0 and {x["correct"] for x in stats["samples"]} - {None} == {False}:
                    tqdm.write(f"step {step + 1}: none of {len(stats['samples'])} answers is right; look at "
                               "them (--eval-every 1) and problems (eval.py --check FILE)", file=sys.stdout)
                verdicts = count_verdicts(verdicts, stats["samples"], last=step + 1 == args.steps)
                check(groups, f"none of {stats['groups']} groups carries any signal (all right "
                      f"{stats['all_right']}, all wrong {stats['all_wrong']}, others unknown): the problems "
                      "are too easy or too hard for this model, or the verifier cannot read its answers")
                before = time.time()
                loss, norm = train_step(model, optimizer, groups, args, lr, ranks, stats)
            except ValueError as e:
                raise ValueError(f"step {step + 1}, prompts {first} to {prompts.position - 1} of the stream: {e}; "
                                 f"{run.out / 'trainer'} holds what was saved before") from None
            sampler = train_sft.whole_copy(model, sampler)
            stats["t_update"] = time.time() - before
            record = {**record_of(stats, loss, norm, lr, ranks), "seconds": round(time.time() - start, 3)}
            if step + 1 == args.steps or (step + 1) % args.save_every == 0:
                saved = {"position": prompts.position, "cache": to_json(cache), "verdicts": verdicts}
                run.save(step + 1, model, optimizer, tokenizer, {**saved, "record": record})
            if ranks.rank == 0 and (step + 1) % args.eval_every == 0:
                print_samples(stats["samples"])
            run.write(step + 1, args.steps, record, SHOWN)
    if ranks.rank == 0:
        print(f"the model is in {run.out / 'model'}")


if __name__ == "__main__":
    sys.exit(train_sft.run_main(main))
