"""GRPO's formulas by hand; the loss does not depend on rows or ranks; the loop's traps; resuming."""

import copy
import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests import ranks as processes
from tests.ranks import launch
from tests.test_train_sft import assert_same_run, model_of_a_gpu, read_log, refused, traffic_of

import data
from tokenizer import ask, render_chat
import decode
import rewards
import sandbox
import train_rl as r
import train_sft
from model import PRESETS, FalconH1, Trace, generate

RIGHT, WRONG = rewards.Verdict(1.0, "right"), rewards.Verdict(0.0, "wrong")
UNKNOWN = rewards.Verdict(None, "unknown: down")

# 1. Formulas ------------------------------------------------------------------------------------------------

ONE_RIGHT = [math.sqrt(3)] + [-1 / math.sqrt(3)] * 3

def test_advantages_by_hand():
    assert r.advantages([1, 0, 0, 1]) == pytest.approx([1, -1, -1, 1], abs=1e-5)
    assert r.advantages([1, 0, 0, 0]) == pytest.approx(ONE_RIGHT, abs=1e-5)
    assert r.advantages([1, 0, 0, 0], "mean") == pytest.approx([0.75, -0.25, -0.25, -0.25])
    for scores in ([1, 1, 1], [0.3, 0.3 + 1e-9], [0.5], [1.0], []):  # rounding; too few
        assert r.advantages(scores) is r.advantages(scores, "mean") is None

def test_style_alone_is_no_signal_and_one_right_answer_is():
    # Penalties of 0.3 and 0.15: below 0.5 together. All right, from none of them to both: 1, 0.7, 0.55.
    for scores in ([1, 1, 0.7, 0.55], [0, 0, -0.3, -0.45], [0.499, 0, 0]):
        assert r.advantages(scores) is None
    # One right with both penalties among wrong ones without: 0.55 against 0, mean 0.1375, std 0.238.
    assert r.advantages([0.55, 0, 0, 0]) == pytest.approx(ONE_RIGHT, abs=1e-4)
    assert r.advantages([0.501, 0, 0]) is not None

def test_clipped_policy_loss_by_hand():
    old = torch.zeros(6)
    rho, A = torch.tensor([1.0, 2.0, 0.5, 2.0, 0.5, 1.1]), torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, 2.0])
    new = rho.log().requires_grad_()
    loss = r.clipped_policy_loss(new, old, A, 0.2, 0.28)
    assert loss.tolist() == pytest.approx([-1, -1.28, -0.5, 2, 0.8, -2.2])
    loss.sum().backward()
    assert new.grad.tolist() == pytest.approx([-1, 0, -0.5, 2, 0, -2.2])  # none where the clip is active

def test_other_formulas_by_hand():
    w = r.tis_weight(torch.tensor([0.0, -1.0, 3.0], requires_grad=True), torch.zeros(3), 2)
    assert w.tolist() == pytest.approx([1, math.exp(-1), 2]) and not w.requires_grad
    assert r.tis_weight(torch.tensor([0.0, -1.0, 3.0]), torch.zeros(3), 0).tolist() == [1, 1, 1]
    k3 = r.k3(torch.tensor([0.0, 1.0, -1.0]), torch.zeros(3))
    assert k3.tolist() == pytest.approx([0, math.e - 2, 1 / math.e])
    assert r.token_weights([1, 4], "sequence") == [0.5, 0.125]
    assert r.token_weights([1, 4], "token") == [0.2, 0.2]
    for normalise in ("sequence", "token"):
        weights = r.token_weights([3, 5, 9], normalise)
        assert sum(n * w for n, w in zip([3, 5, 9], weights)) == pytest.approx(1)

def test_token_stats_by_hand():
    """Four tokens: below the clip with A < 0, above it with A > 0, with A < 0 (not clipped), not sampled."""
    rho = torch.tensor([0.5, 2.0, 2.0, 2.0])
    old, sampler = torch.full((4,), 0.5).log(), torch.tensor([0.5, 0.2, 0.25, 0.1]).log()
    advantage, sampled = torch.tensor([-1.0, 1, -1, 1]), torch.tensor([True, True, True, False])
    def sums_of(args):
        stats = r.token_stats(args, old + rho.log(), old, torch.ones(4), sampler, advantage, sampled)
        return {name: float(v.sum()) for name, v in stats.items()}
    sums = sums_of(r.Args())
    k3 = math.log(2) - 0.5 + 2 * (1 - math.log(2))  # rho - 1 - log rho
    assert sums == pytest.approx({
        "tokens": 3, "entropy": 3, "clip_frac_low": 1, "clip_frac_high": 1, "kl": k3, "mismatch": 0.55,
        "capped": 1}, rel=1e-5)  # 0.5 / 0.2 is above 2
    assert sums_of(r.Args(tis_cap=0)) == sums | {"capped": 0}

@pytest.mark.parametrize(("text", "ended", "correct", "well_formed"), [
    ("<think>x</think>\\boxed{42}", True, True, True),
    ("<think>x</think>\\boxed{41}", True, False, True),
    ("<think>x</think>\\boxed{42}", False, True, False),
    ("\\boxed{42}", True, True, False),
    ("<think></think>\\boxed{42}", True, True, False),
    ("<think>x</think><think>y</think>\\boxed{42}", True, True, False),
    ("<think>x\\boxed{42}", True, False, False),
    ("<think>x</think>\\boxed{41 = 42}", True, False, True),
])
def test_reward(text, ended, correct, well_formed):
    verdict = r.verify(text, data.Problem("1", "math", "q?", "42"))
    score = r.reward(verdict, text, ended, "How much?", r.Args())
    assert (score["correct"], score["well_formed"]) == (correct, well_formed)
    assert score["score"] == pytest.approx(correct - 0.1 * (not well_formed))
    score = r.reward(UNKNOWN, text, ended, "How much?", r.Args())
    assert (score["score"], score["correct"], score["well_formed"]) == (None, None, well_formed)

def test_reward_of_mixed_scripts():
    text = "<think>так надо</think>\\boxed{42}"  # all letters outside of commands
    score = r.reward(RIGHT, text, True, "How much?", r.Args(language_penalty=0.5))
    assert score["mixed"] == 1 and score["score"] == pytest.approx(0.5)
    assert r.reward(RIGHT, text, True, "Сколько?", r.Args())["score"] == 1

def test_a_broken_verifier_is_noticed(monkeypatch):
    r.check_verifier()
    for answer in (True, False):
        monkeypatch.setattr("rewards.is_equivalent", lambda a, b, answer=answer: answer)
        with pytest.raises(ValueError, match="verifier is broken"):
            r.check_verifier()

# 2. The gradient --------------------------------------------------------------------------------------------

def rollout(ids, prompt, sampler, score, **fields):
    return r.Rollout(ids, prompt, sampler, score, score >= 0.5, {}, **fields)

def collected(groups, **settings):
    """collect() from one call that gives these groups: the groups chosen, and the stats."""
    stats, args = r.new_stats(), r.Args(prompts=len(groups), max_calls=1, **settings)
    return r.collect(lambda *_: groups, lambda: None, [], 0, args, stats), stats

@pytest.fixture(scope="module")
def setting():
    """A random model, and two groups of its own rollouts with scores made up so that there is signal."""
    torch.manual_seed(0)
    # The published initialiser: wider matrices (0.1) saturate the softmaxes; rounding then reaches 1e-6.
    model, tokenizer = FalconH1(replace(PRESETS["tiny"], initializer_range=0.02)), data.Tokenizer.byte_level()
    prompts = [tokenizer.encode("12*3=?"), tokenizer.encode("4+5=?")]
    stop_ids = list(range(0, 272, 9))
    traces = generate(model, prompts, max_new_tokens=12, samples=4, temperature=0.85, stop_ids=stop_ids)
    rollouts = []
    for i, trace in enumerate(traces):
        prompt = prompts[trace.prompt_index]
        rollouts.append(rollout([*prompt, *trace.tokens], len(prompt), trace.logprobs, float(i % 3 == 0)))
    return model, collected([rollouts[:4], rollouts[4:]])[0]

# An optimizer that leaves the gradient to be looked at.
NO_STEP = SimpleNamespace(param_groups=(), step=lambda: None, zero_grad=lambda: None)

def gradient(model, groups, **changes):
    model.zero_grad()
    stats = r.new_stats()
    loss, _ = r.train_step(model, NO_STEP, groups, r.Args(clip=1e9, **changes), 0, train_sft.Ranks(), stats)
    return loss, torch.cat([p.grad.flatten() for p in model.parameters()]), stats

@pytest.mark.parametrize("normalise", ["sequence", "token"])
def test_the_gradient_is_the_formula(setting, normalise):
    model, groups = setting
    loss, grad, stats = gradient(model, groups, normalise=normalise)
    model.zero_grad()
    rollouts = [x for g in groups for x in g]
    tokens = sum(len(x.sampler) for x in rollouts)
    positives = sum(len(x.sampler) for x in rollouts if x.correct)
    expected = 0
    for x in rollouts:  # at one update per batch the policy loss's gradient is that of -A log p
        ids = torch.tensor(x.ids[None])
        logp = (model(ids)[0, :-1] / 0.85).log_softmax(-1).gather(1, ids[0, 1:, None])[x.mask[1:], 0]
        tis = torch.exp(logp.detach() - torch.tensor(x.sampler)).clamp(max=2)
        per_token = 1 / (len(rollouts) * len(x.sampler)) if normalise == "sequence" else 1 / tokens
        expected = expected - (tis * x.advantage * torch.exp(logp - logp.detach())).sum() * per_token
        expected = expected - 0.1 * x.correct * logp.sum() / positives
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    theirs = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (grad - theirs).norm() / theirs.norm() < 1e-5
    sums = stats["sums"]
    assert sums["tokens"] == tokens and sums["clip_frac_low"] == sums["clip_frac_high"] == 0  # rho is 1
    assert max(stats["mismatch_max"]) < 1e-5  # the recurrent sampler and the chunked trainer are one model
    _, split, _ = gradient(model, groups, normalise=normalise, pack_tokens=25)
    assert (grad - split).norm() / grad.norm() < 1e-6  # rows change nothing

def test_without_importance_weights_the_samplers_probabilities_do_not_matter(setting):
    model, groups = setting
    other = [[replace(x, sampler=x.sampler - 0.5) for x in group] for group in groups]
    plain, shifted = (gradient(model, some, tis_cap=0)[1] for some in (groups, other))
    assert torch.equal(plain, shifted)
    weighted, scaled = (gradient(model, some, positive_weight=0.0)[1] for some in (groups, other))
    assert torch.allclose(scaled, weighted * math.exp(0.5), rtol=1e-3, atol=1e-7)
    assert not torch.allclose(plain, gradient(model, other)[1], rtol=1e-2)

@pytest.mark.parametrize("normalise", ["sequence", "token"])
def test_a_repeated_group_counts_again(setting, normalise):
    """As copies of it would, in one update and in the second of two."""
    model, (first, second) = setting
    repeated, copies = [first, second, first], [first, second, copy.deepcopy(first)]
    for pack_tokens in (4096, 25):
        changes = {"normalise": normalise, "pack_tokens": pack_tokens}
        (loss, grad, stats), theirs = (gradient(model, some, **changes) for some in (repeated, copies))
        assert loss == theirs[0] and torch.equal(grad, theirs[1])
        assert stats["sums"]["tokens"] == sum(len(x.sampler) for group in repeated for x in group)
    once, twice = (gradient(model, some, normalise=normalise)[1] for some in ([first], [first] * 2))
    assert (once - twice).norm() / once.norm() < 1e-6  # means do not change
    ends = []
    for groups in (repeated, copies):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.SGD(trained.parameters())
        r.train_step(trained, optimizer, groups, r.Args(updates=2), 1.0, train_sft.Ranks(), r.new_stats())
        ends.append(torch.cat([p.flatten() for p in trained.parameters()]))
    assert torch.equal(*ends)

def test_a_second_update_has_a_ratio(setting):
    model, stats = copy.deepcopy(setting[0]), r.new_stats()
    optimizer = torch.optim.SGD(model.parameters())
    r.train_step(model, optimizer, setting[1], r.Args(updates=2), 1.0, train_sft.Ranks(), stats)
    assert stats["sums"]["kl"] > 0 and len(stats["mismatch_max"]) == 2

@pytest.mark.parametrize("rows", [1, 4])
def test_a_step_waits_for_the_gpu_once(rows, monkeypatch):
    model, args, stats = model_of_a_gpu(), r.Args(pack_tokens=200), r.new_stats()
    groups = [[rollout([7] * 100, 10, [-1.0] * 90, score) for score in (1.0, 0.0)] for _ in range(rows)]
    step = partial(r.train_step, model, NO_STEP, groups, args, 0, train_sft.Ranks(), stats)
    traffic = traffic_of(step, monkeypatch)
    assert traffic.reads == 1  # loss and norm; the statistics are read when they are logged
    assert traffic.copies == 2 * rows  # ids and targets; what the loss knows of its tokens

def test_the_stop_token_is_learned_and_the_prompt_is_not(setting):
    x = setting[1][0][0]
    assert x.mask.sum() == len(x.sampler) and x.mask[-1] and not x.mask[0]
    values = r.pack_values(data.pack([x], 100)[0], "sampler")
    assert values[x.prompt - 1 : -1].tolist() == pytest.approx(x.sampler) and values[-1] == 0
    assert (values[: x.prompt - 1] == 0).all()

def test_the_cache_is_saved_bit_for_bit_in_few_bytes_a_token(setting):
    (x, *_), _ = groups = setting[1]
    assert x.ids.dtype == np.int32 and x.sampler.dtype == np.float32
    saved = json.loads(json.dumps(r.run_state([], [(3, group) for group in groups], Counter(), {})))["cache"]
    assert [sampled for sampled, _ in saved] == [3, 3]
    again = r.Rollout(**saved[0][1][0])
    for name, value in vars(x).items():
        assert np.array_equal(getattr(again, name), value), name

# 3. Groups --------------------------------------------------------------------------------------------------

def scored(monkeypatch, replies, problems, verifier, **settings):
    """sample_groups() on scripted replies, a list of texts per problem: its groups, and the stats."""
    tokenizer, stats = data.Tokenizer.byte_level(), r.new_stats()
    traces = [Trace(i, j, [*tokenizer.encode(text), tokenizer.stop_ids[0]], [], stop="stop")
              for i, texts in enumerate(replies) for j, text in enumerate(texts)]
    monkeypatch.setattr(r, "generate", lambda *_, on_trace, **__: [on_trace(x) for x in traces] and traces)
    args, prompts = r.Args(group=len(replies[0]), **settings), [(problem, [1, 2]) for problem in problems]
    return r.sample_groups(None, tokenizer, verifier, args, train_sft.Ranks(), stats, prompts, 0), stats

def sampled(monkeypatch, *replies):
    """The same for groups of one-letter replies, which are r(ight), w(rong) or unknown: ½, of two bytes."""
    verdicts = {"r": RIGHT, "w": WRONG, "½": UNKNOWN}
    problems = [data.Problem("1", "math", "1?", "1")] * len(replies)
    return scored(monkeypatch, replies, problems, lambda text, _: verdicts[text], format_penalty=0.0)

def test_unknown_verdicts_are_in_no_group_and_in_no_mean(monkeypatch):
    groups, stats = sampled(monkeypatch, "r½ww", "½½½r", "½½½½")
    assert [[x.score for x in group] for group in groups] == [[1, 0, 0], [1], []]
    stats["sums"]["tokens"] = torch.tensor(1)
    stats["mismatch_max"].append(torch.tensor(0))
    record = r.step_metrics(stats, 0.0, 0.0, 0.0, train_sft.Ranks())
    assert record["reward"] == record["correct"] == 0.5 and record["reward_std"] == 0.5  # 1, 0, 0, 1
    assert record["unknown"] == 8 / 12
    assert record["length"] == pytest.approx((4 * 2 + 8 * 3) / 12)  # of all, the stop tokens included
    assert record["length_right"] == record["length_wrong"] == 2

def test_groups_with_fewer_than_two_known_verdicts_have_no_signal(monkeypatch):
    chosen, stats = collected(sampled(monkeypatch, "½½r", "½½½", "r½w", "rr½", "ww½")[0])
    assert [[x.advantage for x in group] for group in chosen] == [pytest.approx([1, -1], abs=1e-5)]
    assert (stats["groups"], stats["all_right"], stats["all_wrong"]) == (5, 1, 1)

def test_groups_that_differ_in_style_alone_are_dropped():
    scores = [(1, 0.8), (0, -0.2), (0.8, 0)]  # all right, all wrong, one right with both penalties
    chosen, stats = collected([[rollout([1, 2], 1, [0.0], score) for score in group] for group in scores])
    assert [[x.score for x in group] for group in chosen] == [[0.8, 0]]
    assert (stats["groups"], stats["all_right"], stats["all_wrong"]) == (3, 1, 1)

def test_many_unknown_verdicts_end_the_run():
    def after(verdicts, last=False, **unknown):
        reasons = Counter({f"unknown: {reason}": n for reason, n in unknown.items()})
        r.check_signal([1], r.new_stats(), reasons, verdicts, last, train_sft.Ranks())

    after(10, down=1)  # too few to tell
    with pytest.raises(ValueError, match="so far: 1 of 10 verdicts are unknown, more than 2%: 1 x down"):
        after(10, last=True, down=1)
    after(100, down=2)  # 2% are not more
    with pytest.raises(ValueError, match="5 of 201 verdicts are unknown, more than 2%: 3 x down; 2 x full"):
        after(201, down=3, full=2)

@pytest.mark.parametrize(
    ("correct", "told"), [([False, False, None], True), ([False, True], False), ([None], False)])
def test_a_step_without_a_right_reply_warns(correct, told, capsys):
    stats = r.new_stats()
    stats["samples"] += [{"correct": verdict, "domain": "code"} for verdict in correct]
    stats["samples"].append({"correct": True, "domain": "math"})  # which code must not hide behind
    r.check_signal([1], stats, Counter(), 2, False, train_sft.Ranks())
    assert ("warning: none of 2 replies in code is right; " in capsys.readouterr().out) == told

def problems_of(**sizes):
    """Pairs as from open_prompts: so many problems per domain, one domain after the other."""
    numbers = [(domain, i) for domain, n in sizes.items() for i in range(n)]
    return [(data.Problem(f"{domain}{i}", domain, "q", "1"), [1]) for domain, i in numbers]

def test_system_prompt_and_suffix_come_with_every_prompt(tmp_path):
    data.write_jsonl(tmp_path / "p.jsonl", [{"id": "1", "domain": "math", "prompt": "1+1?", "answer": "2"}])
    (tmp_path / "system.txt").write_text("Be brief.\n")
    args = r.Args(problems=str(tmp_path / "p.jsonl"), system=str(tmp_path / "system.txt"), suffix="Box it.")
    r.check_args(args)
    assert args.system == "Be brief."  # what run.json will hold
    ranks = SimpleNamespace(rank=0, check_same_on_all=lambda what, value: None)
    tokenizer = data.Tokenizer.byte_level()
    ((_, ids),), _ = r.open_prompts(args, tokenizer, ranks)
    chat = ask("1+1?", "Be brief.", "Box it.")
    assert ids == render_chat(chat, tokenizer, generation_prompt=True)[0]

def test_domains_have_their_weights_in_every_stage():
    prompts = problems_of(code=30, math=60, science=30)
    args = r.Args(prompts=12, steps=9, held_out=12, mixture="math=1; 2:math=2, code=1 ;4: science=0.5")
    stages, held_out = r.open_stages(args, prompts)
    assert len({problem.id for problem, _ in held_out}) == 12
    assert {problem.domain for problem, _ in held_out} == {"code", "math", "science"}
    drawn = [r.next_prompts(prompts, stages, step) for step in range(6)]
    counts = [Counter(problem.domain for problem, _ in batch) for batch in drawn]
    assert counts == 2 * [{"math": 12}] + 2 * [{"math": 8, "code": 4}] + 2 * [{"science": 12}]
    assert not any(pair in held_out for batch in drawn for pair in batch)
    assert r.drawn_so_far(stages) == 72
    # As a resumed run goes on: from the counts alone.
    again, _ = r.open_stages(args, prompts)
    for (_, loader), (_, before) in zip(again, stages):
        loader.drawn = json.loads(json.dumps(before.drawn))
    assert r.next_prompts(prompts, again, 3) == r.next_prompts(prompts, stages, 3)

def test_prompts_of_one_domain_are_shuffled_anew_each_epoch():
    """In the order that the tiny run's figures depend on."""
    prompts = problems_of(math=5)
    stages, held_out = r.open_stages(r.Args(prompts=5, seed=3), prompts)
    for epoch in range(3):
        order = train_sft.permutation(5, 3, epoch)
        assert r.next_prompts(prompts, stages, 9) == [prompts[i] for i in order] and held_out == []

@pytest.mark.parametrize(("mixture", "error"), [
    ("math=1", "the problems have the domains code, math"), ("math=1,maths=1", "have the domains code, math"),
    ("math=1,code=1; 20: math=1", "its stage from step 20 on is beyond --steps 16"),
    ("math=1; 3: code=1; 3: math=1", "its steps do not rise"), ("math=1; 0: code=1", "its steps do not rise"),
    ("math=1; code=1", "expected WEIGHTS; STEP: WEIGHTS"), ("1: math=1,code=1", "expected WEIGHTS; STEP"),
    ("math=1,code=1;", "expected WEIGHTS; STEP"), ("math=1; x: code=1", "expected WEIGHTS; STEP"),
    ("math=1,code=1; 2:", "expected WEIGHTS; STEP"), ("math=1,code=1,code=2", "it names a domain twice"),
    ("math=0,code=0", "weights must be 0 or more, and not all 0")])
def test_stages_that_make_no_sense(mixture, error):
    with pytest.raises(ValueError, match=error):
        r.open_stages(r.Args(mixture=mixture), problems_of(code=2, math=2))

@pytest.mark.parametrize("lengths", [
    lambda i, j: (40, 80, 160)[i], lambda i, j: 40 + 120 * ((i * 16 + j) * 37 % 48) // 47])
@pytest.mark.parametrize("slots", [4, 24])
def test_traces_are_dealt_so_that_no_rank_idles(lengths, slots, monkeypatch):
    """Three prompts, 16 traces each, lengths 1 : 4 by prompt or at random; steps of the real sampler. Either
    rank waits for less than 10% of the steps; dealt by prompt, one would wait for half."""
    model, tokenizer = FalconH1(PRESETS["tiny"]), data.Tokenizer.byte_level()
    prompts, held = [(data.Problem("1", "math", "q", "1"), [1, 2])] * 3, {}

    def sampled_by(rank):
        steps, step = [], decode.Sampler.step
        def counted(self):
            steps.append(step(self))
            return steps[-1]
        def finish(self, *_):
            for slot, running in enumerate(self.slots):
                if running and len(running.trace.tokens) == lengths(*index(running.trace)):
                    running.trace.stop, self.slots[slot] = "stop", None
                    yield running.trace
        def index(trace):
            return trace.prompt_index, trace.sample_index
        monkeypatch.setattr(decode.Sampler, "step", counted)
        monkeypatch.setattr(decode.Sampler, "finish", finish)
        ranks = SimpleNamespace(rank=rank, world=2, all_values=lambda x: [x, x], gather=lambda items: items)
        args, stats = r.Args(group=16, max_new_tokens=160, slots=slots), r.new_stats()
        r.sample_groups(model, tokenizer, lambda *_: RIGHT, args, ranks, stats, prompts, 0)
        monkeypatch.undo()
        held[rank] = sorted(x["length"] for x in stats["samples"])
        return len(steps)

    steps = [sampled_by(rank) for rank in range(2)]
    assert sorted(held[0] + held[1]) == sorted(lengths(i, j) for i in range(3) for j in range(16))
    assert min(steps) > 0.9 * max(steps), steps

def test_backfill_and_the_bounded_cache():
    """Every third group has signal: three calls of 5 prompts give 5 groups. Then some are from the cache."""
    def sample(taken, seed):
        return [[rollout([1, 2], 1, [0.0], float(i % 3 == 0 and j)) for j in range(2)] for i in taken]
    calls = count()
    def draw():
        first = next(calls) * 5
        return range(first, first + args.prompts)
    args, cache, stats = r.Args(prompts=5, group=2, cache=3, cache_age=1), [], r.new_stats()
    chosen = r.collect(sample, draw, cache, 0, args, stats)
    assert len(chosen) == stats["learned"] == 5 and stats["calls"] == 3
    assert stats["groups"] == 15 and stats["all_wrong"] == 10
    assert not cache
    args.prompts, stats = 4, r.new_stats()
    cache.extend((step, chosen[0]) for step in (0, 1, 1))
    assert len(r.collect(sample, draw, cache, 2, args, stats)) == 4
    assert stats["cached"] == 2 and stats["age"] == 1  # the one of step 0 is too old
    assert len(cache) <= 3

@pytest.mark.parametrize(("backfill", "signal", "numbers"), [
    ("reject", [0, 2, 3], [0, 2, 3]), ("duplicate", [0, 2, 3], [0, 2, 3, 0, 2]),
    ("duplicate", [4], [4] * 5), ("duplicate", range(5), range(5)),
    ("reject", [], []), ("duplicate", [], [])])
def test_one_call_is_all_that_rejection_and_duplication_make(backfill, signal, numbers):
    """Numbers: of the prompts whose groups are learned from. Nothing is left for later steps."""
    groups = [[rollout([i], 0, [0.0], float(i in signal and j)) for j in range(2)] for i in range(5)]
    args, stats, cache = r.Args(prompts=5, group=2, backfill=backfill, advantage="mean"), r.new_stats(), []
    chosen = r.collect(lambda *_: groups, lambda: None, cache, 0, args, stats)
    assert [int(group[0].ids[0]) for group in chosen] == list(numbers) and not cache
    assert [x.advantage for group in chosen for x in group] == [-0.5, 0.5] * len(chosen)
    assert (stats["calls"], stats["cached"], stats["learned"]) == (1, 0, len(signal))
    assert (stats["groups"], stats["all_wrong"]) == (5, 5 - len(signal))

MISSING = [f"{name}: {why}" for name, why in sandbox.sandbox_walls().items() if why != "on"]

@pytest.mark.skipif(bool(MISSING), reason=f"no isolation here: {MISSING}")
def test_training_rewards_code_and_answers_side_by_side(monkeypatch):
    tests = {"tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "10 20", "output": "30"}]}
    problems = [data.Problem("1", "code", "Add.", "", tests), data.Problem("2", "math", "1+1?", "2")]
    reply = "<think>Hm.</think>Here it is.\n```python\nprint({})\n```"
    add, three = reply.format("sum(map(int, input().split()))"), reply.format(3)
    replies = [[three, add, "no"], ["<think>x</think>\\boxed{2}", add, "no"]]
    groups, stats = scored(monkeypatch, replies, problems, rewards.verify)
    assert [[x.score for x in group] for group in groups] == [[0, 1, -0.1], [1, 0, -0.1]]
    assert [x["correct"] for x in stats["samples"]] == [False, True, False, True, False, False]
    assert stats["samples"][2]["reason"] == "no code" and stats["samples"][2]["unparsed"]

# 4. Runs ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint that has just learned to answer at all; problems so easy that some answers are right."""
    folder = tmp_path_factory.mktemp("rl")
    problems = [data.Problem(str(i), "math", f"{i}?", str(i % 2)) for i in range(10)]
    replies = [f"<think>{p.id}</think>\\boxed{{{p.answer}}}" for p in problems]
    rows = [data.sft_record(*pair, 1) for pair in zip(problems, replies)] * 6
    data.write_jsonl(folder / "sft.jsonl", rows)
    data.write_jsonl(folder / "rl.jsonl", [p.record() for p in problems])
    launch(train_sft.main, "--data", folder / "sft.jsonl", "--out", folder / "sft", "--steps", 60,
           "--batch", 10, "--held-out", 0, "--lr", 0.01)
    return folder

def rl_args(start):
    return ("--init", start / "sft", "--problems", start / "rl.jsonl", "--steps", 4, "--prompts", 4,
            "--group", 6, "--max-new-tokens", 24, "--save-every", 2, "--eval-every", 1, "--cache", 4,
            "--temperature", 1.5, "--held-out", 2)

@pytest.fixture(scope="module")
def whole_run(start):
    assert "wrong: " in launch(r.main, *rl_args(start), "--out", start / "whole").out
    return start / "whole"

@pytest.mark.parametrize("moment", ["log of step 3", "step-000000004.tmp/state.json", "log of step 4"])
def test_a_killed_run_ends_like_one_that_was_not(start, tmp_path, whole_run, moment):
    args = (*rl_args(start), "--out", tmp_path / "run")
    launch(partial(processes.die_at, "train_rl", moment), *args, status=-9)
    launch(r.main, *args)
    assert_same_run(whole_run, tmp_path / "run")

def test_a_finished_run_goes_on_with_more_steps(start, tmp_path, whole_run):
    args = (*rl_args(start), "--out", tmp_path / "run")
    launch(r.main, *args, "--steps", 3)
    assert "continuing after step 3" in launch(r.main, *args).out
    assert_same_run(whole_run, tmp_path / "run")

def test_held_out_accuracy_by_domain(monkeypatch):
    """Of known verdicts, one reply to each problem, with the same seed each time; at its steps only."""
    verdicts, calls = {"a": RIGHT, "b": WRONG, "c": UNKNOWN, "d": RIGHT}, []
    domains = ["math"] * 3 + ["code"]
    held_out = [(data.Problem(text, domain, text, ""), [1]) for text, domain in zip("abcd", domains)]
    def generate(model, prompts, *, samples, seed, on_trace, **_):
        calls.append((samples, seed))
        tokenizer = data.Tokenizer.byte_level()
        traces = [Trace(i, 0, tokenizer.encode("abcd"[i]), [], stop="length") for i in range(4)]
        return [on_trace(x) for x in traces] and traces
    monkeypatch.setattr(r, "generate", generate)
    args, ranks = r.Args(steps=7, eval_every=3, seed=5), train_sft.Ranks()
    evaluation = partial(r.evaluate, None, data.Tokenizer.byte_level(), lambda text, _: verdicts[text])
    logged = [evaluation(held_out, args, ranks, step) for step in range(1, 8)]
    assert logged[2] == {"held_out": pytest.approx(2 / 3), "held_out_math": 0.5, "held_out_code": 1}
    assert [bool(x) for x in logged] == [False, False, True, False, False, True, True]
    assert calls == [(1, 5)] * 3 and evaluation([], args, ranks, 3) == {}

def test_other_shapes_start_from_the_papers_values(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["script", "--help"])
    with pytest.raises(SystemExit):
        r.read_args()
    assert "real models start from the paper's" in " ".join(capsys.readouterr().out.split())
    FalconH1(replace(PRESETS["tiny"], vocab_size=300)).save_pretrained(tmp_path)
    monkeypatch.setattr("sys.argv", ["script", "--init", str(tmp_path), "--prompts", "5"])
    args, _ = r.read_args()
    assert (args.lr, args.warmup_steps, args.max_new_tokens, args.prompts) == (2e-6, 10, 0, 5)
    for name in ("tiny", "tiny-mamba"):
        FalconH1(PRESETS[name]).save_pretrained(tmp_path / name)
        monkeypatch.setattr("sys.argv", ["script", "--init", str(tmp_path / name)])
        assert r.read_args()[0] == r.Args(init=str(tmp_path / name))
    prompts = [(None, [1] * 7), (None, [1] * 9)]
    for model, longest, row in (("7b", 49152, 49161), ("0.5b", 16384 - 9, 16384)):
        filled = replace(args)
        r.check_lengths(filled, prompts, PRESETS[model])
        assert (filled.max_new_tokens, filled.pack_tokens) == (longest, row)
    with pytest.raises(ValueError, match="--max-new-tokens 49152: .* max_position_embeddings 16384"):
        r.check_lengths(replace(args, max_new_tokens=49152), prompts, PRESETS["0.5b"])
    with pytest.raises(ValueError, match="a prompt of 16384 tokens fills max_position_embeddings 16384"):
        r.check_lengths(args, [(None, [1] * 16384)], PRESETS["0.5b"])

def test_the_log_has_what_it_promises(whole_run):
    records = [json.loads(line) for line in open(whole_run / "log.jsonl")]
    glossary = r.__doc__.split("by name")[1].split("Deviations")[0].splitlines()
    names = [line.split("   ")[1].replace(" ", "") for line in glossary if line.startswith("    ")]
    promised = {name for line in names for name in line.split(",") if name.isidentifier()}
    promised |= {"correct", "capped", "t_update", "loss", "grad_norm", "lr", "seconds", "tokens"}
    assert len(records) == 4 and not promised - set(records[0])
    for record in records:
        assert record["clip_frac_low"] == record["clip_frac_high"] == 0 and record["entropy"] > 0
        assert (record["mismatch_max"] < 1e-4) == (record["cached"] == 0)  # cached: of another policy
        assert record["calls"] + record["cached"] > 0 and 0 <= record["reward"] <= 1

def test_ranks_sample_and_reward_like_one(start, tmp_path, whole_run):
    """Two ranks, and three to a row, which hold one copy each to sample from. A run can be continued."""
    one = read_log(whole_run)
    for ranks, flags in ((2, ()), (3, ("--cp", 3, "--checkpoint-activations", "--steps", 2))):
        body = partial(processes.count_copies, "train_rl", 1)
        results = launch(body, *rl_args(start), "--out", tmp_path / str(ranks), *flags, ranks=ranks)
        assert all("made 1 copies" in x.out for x in results)  # refreshed in place after each step
        log = read_log(tmp_path / str(ranks))
        for name in ("reward", "correct", "held_out", "all_right", "all_wrong", "length", "calls", "tokens"):
            assert log[0][name] == one[0][name], name
        for name in ("loss", "grad_norm", "entropy", "mismatch"):
            assert log[0][name] == pytest.approx(one[0][name], rel=1e-4, abs=1e-6), name

    shutil.rmtree(tmp_path / "2" / "trainer" / "step-000000004")
    results = launch(r.main, *rl_args(start), "--out", tmp_path / "2", ranks=2)
    assert "continuing after step 2" in results[0].out
    again = read_log(tmp_path / "2")
    assert [x["step"] for x in again] == [1, 2, 3, 4]
    assert [x["reward"] for x in again] == pytest.approx([x["reward"] for x in one], abs=0.1)

def test_what_the_paper_compared_resumes_too(start, tmp_path):
    """On two ranks: one that is killed when step 3 is to be logged ends like one that was not."""
    killed = partial(processes.die_at, "train_rl", "log of step 3")
    flags = ("--backfill", "duplicate", "--advantage", "mean", "--tis-cap", 0, "--group", 4, "--steps", 3,
             "--held-out", 0)
    for out, body, status in (("whole", r.main, 0), ("run", killed, None), ("run", r.main, 0)):
        launch(body, *rl_args(start), *flags, "--out", tmp_path / out, ranks=2, status=status)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    log = read_log(tmp_path / "run")
    assert {(x["calls"], x["cached"], x["capped"]) for x in log} == {(1, 0, 0)}
    assert any(x["learned"] < 4 for x in log)  # so that groups were repeated

def test_counts_of_verdicts_and_samples_of_tests_survive_a_resume(start, tmp_path, monkeypatch, capsys):
    """One verdict of step 1 is unknown, then all of step 3: the run stops. Resumed, it knows of the one, and
    takes step 3's tests again."""
    seeds, down = [], [2]

    def verify(text, problem, **settings):
        if problem.id == "canary":
            return rewards.verify(text, problem)
        assert settings["limit"] == 7
        first, step = not seeds, settings["seed"] - 5 * 1_000_003
        seeds.append(step)
        return UNKNOWN if first or step in down else rewards.verify(text, problem)

    def state(step):
        found = json.loads((tmp_path / f"run/trainer/step-00000000{step}/state.json").read_text())
        return found | {"position": sum(found["drawn"][0].values())}

    monkeypatch.setattr(r, "verify", verify)
    args = (*rl_args(start), "--seed", 5, "--code-tests", 7, "--max-calls", 12, "--held-out", 0,
            "--out", tmp_path / "run")
    error = refused(r.main, args, monkeypatch, capsys)
    for part in ("step 3, prompts", "the run so far: ", "holds what was saved before"):
        assert part in error
    before = len(seeds) - seeds.count(2)
    assert set(seeds) == {0, 1, 2} and state(2)["unknown"] == {"unknown: down": 1}
    assert state(2)["position"] * 6 == before
    down.clear()
    seeds[:] = [-1]
    monkeypatch.setattr("sys.argv", ["script", *map(str, args)])
    assert train_sft.run_main(r.main) == 0 and "continuing after step 2" in capsys.readouterr().out
    assert set(seeds) == {-1, 2, 3} and state(4)["unknown"] == {"unknown: down": 1}
    assert state(4)["position"] * 6 == before + len(seeds) - 1
    assert [record["unknown"] > 0 for record in read_log(tmp_path / "run")] == [True, False, False, False]

@pytest.mark.parametrize(("args", "message"), [
    (("--group", 1), "--group 1"), (("--temperature", 0), "--temperature 0"),
    (("--temperature", "1e-40"), "--temperature 1e-40: must be between 0.01 and 100"),
    (("--temperature", "1e40"), "must be between 0.01 and 100"),
    (("--lr", "inf"), "--lr inf: must be at least 0, and finite"),
    (("--tis-cap", -1), "--tis-cap -1.0: must be at least 0"),
    (("--warmup-steps", 200), "--warmup-steps 200: --steps 4 would end"),
    (("--mixture", "math=1,math=2"), "it names a domain twice"), (("--mixture", "maths=1"), "domains math"),
    (("--held-out", 10), "has 10 rows, --held-out 10 keeps them all"),
    (("--max-new-tokens", 9000), "it exceeds max_position_embeddings 8192"),
    (("--max-new-tokens", 5000), "it exceeds --pack-tokens 4096"),
    (("--normalise", "x"), "--normalise x: expected sequence or token"),
    (("--advantage", "none"), "--advantage none: expected std or mean"),
    (("--backfill", "cache"), "--backfill cache: expected sample or duplicate or reject"),
    (("--slots", -1), "--slots -1: must be at least 0"),
    (("--init", "nowhere", "--problems", "nowhere.jsonl"), "error: nowhere is missing\n"),
    (("--problems", "nowhere.jsonl"), "nowhere.jsonl is missing\n"),
    (("--init", "runs/tiny/sft"), "error: runs/tiny/sft is missing: run python train_sft.py first\n"),
    (("--problems", "runs/tiny/data/rl.jsonl"), "rl.jsonl is missing: run python train_sft.py first\n"),
    (("--problems", "{bad}"), "field answer"),
    (("--problems", "{hard}"), "carries any signal (0 all right, 4 all wrong)"),
    (("--format-penalty", 0.3, "--language-penalty", 0.2), "plus --language-penalty must be below 0.5"),
    (("--lr", 1e30, "--max-calls", 6), "step 2, prompts "),
    (("--init", "{small}"), "--warmup-steps 10: --steps 4 would end before"),  # the paper's 10
    (("--init", "{small}", "--warmup-steps", 0), "the model room for 271 only")])
def test_bad_input_is_one_line(start, tmp_path, args, message, monkeypatch, capsys):
    problem = {"id": "1", "domain": "math", "prompt": "1?"}
    data.write_jsonl(tmp_path / "bad.jsonl", [problem | {"answer": ""}])
    data.write_jsonl(tmp_path / "hard.jsonl", [problem | {"answer": "123456789"}])
    FalconH1(replace(PRESETS["tiny"], vocab_size=271)).save_pretrained(tmp_path / "small")
    data.Tokenizer.byte_level().save(tmp_path / "small")
    paths = {path.stem: path for path in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    given = [str(a).format(**paths) for a in args]
    args = (*rl_args(start), "--format-penalty", 0, "--max-calls", 1, "--held-out", 0, *given,
            "--out", tmp_path / "run")
    assert message in refused(r.main, args, monkeypatch, capsys)
