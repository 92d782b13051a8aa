"""GRPO with verifiable rewards (Falcon-H1R, section 3): sample groups of answers, score them, push towards the better ones.

    python train_rl.py                                   the small CPU run: starts from runs/tiny/sft, saves runs/tiny/rl
    torchrun --nproc-per-node 2 train_rl.py --fresh      the same on two ranks

One step: sample G traces of each prompt until enough groups carry signal (backfill); advantages within each group; one update
on exactly the tokens that were sampled, stop token included, at the temperature they were sampled with.

What is logged, by name
    reward, reward_std      mean and spread over everything sampled, before groups are chosen; correct, well_formed: its parts
    all_right, all_wrong    share of sampled groups without signal for that reason
    calls, cached, age      sampling calls of the step, groups taken from the cache, their mean age in steps
    entropy                 of the trainer's distribution, from the logits, nats per token
    clip_low, clip_high     share of tokens where the clipped term is the active one (0 at one update per batch)
    kl                      mean k3 estimate of KL(old || new), nats per token
    mismatch, mismatch_max  |p_trainer - p_sampler| of the sampled tokens; capped: share of tokens that TIS caps
    length, length_right, length_wrong, truncated   tokens a trace, share that ran out of tokens
    mixed                   mean share of letters in scripts that the prompt does not use
    unparsed, timeouts, killed, unknown   shares of the verdicts: no answer or code; its program's time was up, or it broke
                            another limit; the judge gave no clear verdict
    t_sample, t_score, t_update   seconds; t_score: waiting for verdicts after sampling; t_verify: of all verdicts, many at once

Deviations from the paper: the weight of the cross-entropy on positives (0.1), the cache's size and age and the format penalty
are not given there, nor is the language penalty's; groups without signal are dropped altogether. The paper's
G = 16, temperature 0.85, clip (0.2, 0.28), TIS cap 2, beta = 0 and gamma = 0 are kept.
To copy this file, also take train_sft.py, model.py, decode.py, ssm_scan.py, data.py, deepconf.py and eval.py.
"""

import os
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import data
import train_sft
from data import flag
from eval import open_judge, reply_text
from model import check, generate
from rewards import check_code, check_gold, format_ok, mixed_scripts, verify
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


# ---------------------------------------------------------------------------------------------------------------------
# 1. The formulas. Tensors of token terms are (t,), masked by weights that are 0 where nothing was sampled.


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


# ---------------------------------------------------------------------------------------------------------------------
# 2. Rewards

def reward(verdict, text, ended, prompt, args):
    """Score of one trace and its parts: the verdict's 1 or 0, less args.format_penalty for leaving the format
    <think>reasoning</think>answer or for not ending, less args.language_penalty times the share of letters in scripts that the
    prompt does not use. text: without the token that ended it."""
    well_formed, mixed = ended and format_ok(text), mixed_scripts(text, prompt)
    return {"score": verdict.score - args.format_penalty * (not well_formed) - args.language_penalty * mixed, "correct": verdict.score == 1,
            "well_formed": well_formed, "mixed": mixed, "reason": verdict.reason, "t_verdict": verdict.seconds}


UNPARSED, KILLED = ("no answer", "no code"), ("memory limit", "output limit", "died")


def check_verifier():
    """A verifier that silently says no would train on noise: known pairs must come out right, at the start and while it goes on."""
    for text, gold, right in (("<think>x</think>\\boxed{\\frac12}", "0.5", True), ("<think>x</think>\\boxed{41}", "42", False),
                              ("no answer", "42", False)):
        check(verify(text, data.Problem("canary", "math", "", gold)).score == right, f"the verifier is broken: {text!r} against {gold!r}")


# ---------------------------------------------------------------------------------------------------------------------
# 3. Rollouts


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
    hold all groups, in the order of the prompts: a list of lists of Rollout. verifier(text, problem) -> Verdict."""
    start = time.time()
    def own(i, sample):
        return "go" if i % ranks.world == ranks.rank else "done"
    def judged(trace):  # in threads: programs and judges take their time while sampling goes on
        problem, text = pairs[trace.prompt_index][0], reply_text(trace, tokenizer)
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
            values = advantages([r.score for r in group])
            stats["groups"] += 1
            if values is None:
                stats["all_right"] += all(r.correct for r in group)
                stats["all_wrong"] += not any(r.correct for r in group)
                continue
            for r, value in zip(group, values):
                r.advantage = float(value)
            chosen.append((step, group))
    cache.extend(chosen[args.prompts :])
    del cache[: max(0, len(cache) - args.cache)]
    return [group for _, group in chosen[: args.prompts]]


# ---------------------------------------------------------------------------------------------------------------------
# 4. The update


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


# ---------------------------------------------------------------------------------------------------------------------
# 5. The loop


def new_stats(device="cpu"):
    """What a step gathers. Rows add to sums and mismatch_max on the device; record_of reads them."""
    return {"samples": [], "groups": 0, "all_right": 0, "all_wrong": 0, "calls": 0, "cached": 0, "age": 0.0, "t_sample": 0.0,
            "t_score": 0.0, "t_update": 0.0, "sums": torch.zeros(7, dtype=torch.float64, device=device),
            "mismatch_max": torch.zeros((), device=device)}


def record_of(stats, loss, norm, lr, ranks):
    """The log's fields (see the top) from what a step gathered."""
    def mean(values):
        values = list(values)
        return float(np.mean(values)) if values else 0.0
    s, n = stats["samples"], max(1, stats["groups"])
    tokens, entropy, low, high, kl, off, capped = ranks.all_sum(stats["sums"] / ranks.cp).tolist()
    domains = sorted({x["domain"] for x in s})
    return {
        "loss": loss, "reward": mean(x["score"] for x in s), "reward_std": float(np.std([x["score"] for x in s] or [0])),
        "correct": mean(x["correct"] for x in s), "well_formed": mean(x["well_formed"] for x in s),
        **{f"reward_{d}": mean(x["score"] for x in s if x["domain"] == d) for d in domains if len(domains) > 1},
        "all_right": stats["all_right"] / n, "all_wrong": stats["all_wrong"] / n,
        "calls": stats["calls"], "cached": stats["cached"], "age": stats["age"],
        "entropy": entropy / tokens, "clip_low": low / tokens, "clip_high": high / tokens, "kl": kl / tokens,
        "mismatch": off / tokens, "mismatch_max": max(ranks.all_values(float(stats["mismatch_max"]))),
        "capped": capped / tokens,
        "length": mean(x["length"] for x in s), "length_right": mean(x["length"] for x in s if x["correct"]),
        "length_wrong": mean(x["length"] for x in s if not x["correct"]), "truncated": mean(x["truncated"] for x in s),
        "mixed": mean(x["mixed"] for x in s), "unparsed": mean(x["reason"] in UNPARSED for x in s),
        "timeouts": mean(x["reason"] == "time limit" for x in s), "killed": mean(x["reason"].split(":")[0] in KILLED for x in s),
        "unknown": mean(x["reason"].startswith("unknown") for x in s), "t_verify": float(sum(x["t_verdict"] for x in s)),
        "grad_norm": norm, "lr": lr, "tokens": int(tokens),
        "sampled": sum(x["length"] for x in s), **{k: round(stats[k], 3) for k in ("t_sample", "t_score", "t_update")},
    }


def print_samples(samples):
    """One good and one bad answer, to see what the reward sees."""
    for label, right in (("right", True), ("wrong", False)):
        if shown := next((x for x in samples if x["correct"] == right), None):
            tqdm.write(f"{label}: {shown['prompt']} (gold {shown['gold']}, score {shown['score']:g}) {shown['text']!r}", file=sys.stdout)


SHOWN = ("reward", "correct", "entropy", "mismatch", "length", "calls", "cached", "grad_norm", "t_sample", "t_update")


def load(args, ranks):
    train_sft.check_at_least(1, args, "steps", "prompts", "max_new_tokens", "updates", "max_calls", "save_every", "eval_every")
    train_sft.check_at_least(0, args, "slots", "warmup_steps", "cache", "cache_age", "limit", "seed", "lr", "weight_decay", "clip", "clip_low",
                             "clip_high", "tis_cap", "positive_weight", "format_penalty", "language_penalty")
    check(args.group >= 2, f"--group {args.group}: one answer has nothing to be compared with, give at least 2")
    check(args.temperature > 0, f"--temperature {args.temperature}: must be above 0, or all answers are the same")
    token_weights([1], args.normalise)
    check_verifier()
    problems = data.read_problems(args.problems, args.limit, None if args.judge else check_gold)
    check_code(problems, args.problems, args.unsafe_local_execution, quiet=ranks.rank > 0)
    verifier = partial(verify, judge=open_judge(args), unsafe=args.unsafe_local_execution)
    tokenizer = train_sft.load_tokenizer(args.init)
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
            try:
                groups = collect(sampler, prompts, cache, step, tokenizer, verifier, args, ranks, stats)
                check(groups, f"none of {stats['groups']} groups carries any signal (all right {stats['all_right']}, all wrong "
                      f"{stats['all_wrong']}): the problems are too easy or too hard for this model, or the verifier cannot read its answers")
                before = time.time()
                loss, norm = train_step(model, optimizer, groups, args, lr, ranks, stats)
            except ValueError as e:
                raise ValueError(f"step {step + 1}, prompts {first} to {prompts.position - 1} of the stream: {e}; "
                                 f"{run.out / 'trainer'} holds what was saved before") from None
            sampler = train_sft.whole_copy(model, sampler)
            stats["t_update"] = time.time() - before
            record = {**record_of(stats, loss, norm, lr, ranks), "seconds": round(time.time() - start, 3)}
            if step + 1 == args.steps or (step + 1) % args.save_every == 0:
                run.save(step + 1, model, optimizer, tokenizer, {"position": prompts.position, "cache": to_json(cache), "record": record})
            if ranks.rank == 0 and (step + 1) % args.eval_every == 0:
                print_samples(stats["samples"])
            run.write(step + 1, args.steps, record, SHOWN)
    if ranks.rank == 0:
        print(f"the model is in {run.out / 'model'}")


if __name__ == "__main__":
    sys.exit(train_sft.run_main(main))
