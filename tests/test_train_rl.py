"""GRPO's formulas by hand; the loss does not depend on rows or ranks; the loop's traps; resuming."""

import json
import math
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.bench import cache_bytes, parameters
from tests.test_train_sft import dying, killed_and_resumed, model_of_a_gpu, refused, run, traffic_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import eval as ev
import rewards
import sandbox
import train_rl as r
import train_sft
from model import PRESETS, FalconH1, Running, Sampler, Trace, generate


def test_advantages_by_hand():
    assert r.advantages([1, 0, 0, 1]) == pytest.approx([1, -1, -1, 1], abs=1e-5)
    assert r.advantages([1, 0, 0, 0]) == pytest.approx([math.sqrt(3)] + [-1 / math.sqrt(3)] * 3, abs=1e-5)
    assert r.advantages([1, 1, 1]) is None and r.advantages([0.5]) is None
    assert r.advantages([0.3, 0.3 + 1e-9]) is None  # rounding is no signal


def test_style_alone_is_no_signal_and_one_right_answer_is():
    # Penalties of 0.3 and 0.15: below 0.5 together. All right, from none of them to both: 1, 0.7, 0.55.
    assert r.advantages([1, 1, 0.7, 0.55], r.SIGNAL) is None
    assert r.advantages([0, 0, -0.3, -0.45], r.SIGNAL) is None  # all wrong
    # One right with both penalties among wrong ones without: 0.55 against 0, mean 0.1375, std 0.238.
    expected = [math.sqrt(3)] + [-1 / math.sqrt(3)] * 3
    assert r.advantages([0.55, 0, 0, 0], r.SIGNAL) == pytest.approx(expected, abs=1e-4)
    assert r.advantages([0.501, 0, 0], r.SIGNAL) is not None and r.advantages([0.499, 0, 0], r.SIGNAL) is None
    assert r.advantages([1.0], r.SIGNAL) is None and r.advantages([], r.SIGNAL) is None  # too little is known


def test_policy_term_by_hand():
    old = torch.zeros(6)
    rho, A = torch.tensor([1.0, 2.0, 0.5, 2.0, 0.5, 1.1]), torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, 2.0])
    expected = [-1, -1.28, -0.5, 2, 0.8, -2.2]
    assert r.policy_term(rho.log(), old, A, 0.2, 0.28).tolist() == pytest.approx(expected)
    new = rho.log().requires_grad_()
    r.policy_term(new, old, A, 0.2, 0.28).sum().backward()
    assert new.grad.tolist() == pytest.approx([-1, 0, -0.5, 2, 0, -2.2])  # no gradient where the clip is active


def test_other_formulas_by_hand():
    w = r.tis_weight(torch.tensor([0.0, -1.0, 3.0], requires_grad=True), torch.zeros(3), 2)
    assert w.tolist() == pytest.approx([1, math.exp(-1), 2]) and not w.requires_grad
    assert r.k3(torch.tensor([0.0, 1.0, -1.0]), torch.zeros(3)).tolist() == pytest.approx([0, math.e - 2, 1 / math.e])
    assert r.token_weights([1, 4], "sequence") == [0.5, 0.125] and r.token_weights([1, 4], "token") == [0.2, 0.2]
    for normalise in ("sequence", "token"):
        assert sum(n * w for n, w in zip([3, 5, 9], r.token_weights([3, 5, 9], normalise))) == pytest.approx(1)
    with pytest.raises(ValueError, match="sequence or token"):
        r.token_weights([1], "mean")


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
    score = r.reward(r.verify(text, data.Problem("1", "math", "q?", "42")), text, ended, "How much?", r.Args())
    assert (score["correct"], score["well_formed"]) == (correct, well_formed)
    assert score["score"] == pytest.approx(correct - 0.1 * (not well_formed))


def test_reward_of_an_unknown_verdict():
    verdict = rewards.Verdict(None, "unknown: no sandbox")
    score = r.reward(verdict, "<think>x</think>\\boxed{42}", True, "How much?", r.Args())
    assert (score["score"], score["correct"], score["well_formed"]) == (None, None, True)


def test_reward_of_mixed_scripts():
    text = "<think>так надо</think>\\boxed{42}"  # seven letters of Cyrillic, none else outside of commands
    score = r.reward(r.verify(text, data.Problem("1", "math", "q?", "42")), text, True, "How much?", r.Args(language_penalty=0.5))
    assert score["mixed"] == 1 and score["score"] == pytest.approx(0.5) and score["reason"] == "right"
    assert r.reward(r.verify(text, data.Problem("1", "math", "q?", "42")), text, True, "Сколько?", r.Args())["score"] == 1


def test_a_broken_verifier_is_noticed(monkeypatch):
    r.check_verifier()
    for answer in (True, False):
        monkeypatch.setattr("rewards.is_equivalent", lambda a, b, answer=answer: answer)
        with pytest.raises(ValueError, match="verifier is broken"):
            r.check_verifier()


@pytest.fixture(scope="module")
def setting():
    """A random model, and two groups of its own rollouts with scores made up so that there is signal."""
    torch.manual_seed(0)
    # The published initialiser: wider matrices (0.1) saturate the softmaxes, and rounding alone then reaches 1e-6 of the gradient.
    model, tokenizer = FalconH1(replace(PRESETS["tiny"], initializer_range=0.02)), data.Tokenizer.byte_level()
    prompts = [tokenizer.encode("12*3=?"), tokenizer.encode("4+5=?")]
    traces = generate(model, prompts, max_new_tokens=12, samples=4, temperature=0.85, stop_ids=list(range(0, 272, 9)))
    groups = [[], []]
    for i, trace in enumerate(traces):
        right = i % 3 == 0
        groups[trace.prompt_index].append(r.new_rollout(prompts[trace.prompt_index], trace, {"score": float(right), "correct": right}))
    for group in groups:
        for rollout, a in zip(group, r.advantages([x.score for x in group])):
            rollout.advantage = float(a)
    return model, groups


class NoStep:
    """An optimiser that leaves the gradient to be looked at."""
    param_groups = ()
    def step(self):
        pass
    def zero_grad(self):
        pass


def gradient(model, groups, **changes):
    model.zero_grad()
    stats = r.new_stats()
    loss, _ = r.train_step(model, NoStep(), groups, r.Args(clip=1e9, **changes), 0, train_sft.Ranks(), stats)
    return loss, torch.cat([p.grad.flatten() for p in model.parameters()]), stats


@pytest.mark.parametrize("normalise", ["sequence", "token"])
def test_the_gradient_is_the_formula(setting, normalise):
    model, groups = setting
    loss, grad, stats = gradient(model, groups, normalise=normalise)
    model.zero_grad()
    rollouts = [x for g in groups for x in g]
    tokens, positives, expected = sum(len(x.sampler) for x in rollouts), sum(len(x.sampler) for x in rollouts if x.correct), 0
    for x in rollouts:  # at one update per batch the policy term's gradient is that of -A log p
        ids = torch.tensor(x.ids[None].astype(np.int64))
        logp = (model(ids)[0, :-1] / 0.85).log_softmax(-1).gather(1, ids[0, 1:, None])[x.mask[1:], 0]
        tis = torch.exp(logp.detach() - torch.tensor(x.sampler)).clamp(max=2)
        per_token = 1 / (len(rollouts) * len(x.sampler)) if normalise == "sequence" else 1 / tokens
        expected = expected - (tis * x.advantage * torch.exp(logp - logp.detach())).sum() * per_token
        expected = expected - 0.1 * x.correct * logp.sum() / positives
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    theirs = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (grad - theirs).norm() / theirs.norm() < 1e-5
    assert stats["sums"][0] == tokens and stats["sums"][2] == stats["sums"][3] == 0  # rho is 1: nothing is clipped
    assert stats["mismatch_max"] < 1e-5  # the recurrent sampler and the chunked trainer are the same model


@pytest.mark.parametrize("normalise", ["sequence", "token"])
def test_rows_do_not_change_the_gradient(setting, normalise):
    model, groups = setting
    _, whole, _ = gradient(model, groups, normalise=normalise)
    _, split, _ = gradient(model, groups, normalise=normalise, pack_tokens=25)
    assert (whole - split).norm() / whole.norm() < 1e-6


@pytest.mark.parametrize("rows", [1, 4])
def test_a_step_waits_for_the_gpu_once(rows, monkeypatch):
    model, args, stats = model_of_a_gpu(), r.Args(pack_tokens=200), r.new_stats("meta")
    ids = np.arange(100, dtype=np.int32)
    right, wrong = (r.Rollout(ids, ids >= 10, [-1.0] * 90, float(score), score) for score in (True, False))
    groups = [[replace(right), replace(wrong)] for _ in range(rows)]
    step = partial(r.train_step, model, NoStep(), groups, args, 0, train_sft.Ranks(), stats)
    traffic = traffic_of(step, monkeypatch)
    assert traffic.reads == 1  # loss and norm; the statistics are read when they are logged
    assert traffic.copies == 2 * rows  # ids and targets; what the loss knows of its tokens


def test_the_stop_token_is_learned_and_the_prompt_is_not(setting):
    rollout = setting[1][0][0]
    assert rollout.mask.sum() == len(rollout.sampler) and rollout.mask[-1] and not rollout.mask[0]
    row = data.pack([rollout], 100)[0]
    values = r.pack_values(row, lambda x: x.sampler)
    assert values[rollout.mask.argmax() - 1 : -1].tolist() == pytest.approx(rollout.sampler) and values[-1] == 0
    assert (values[: rollout.mask.argmax() - 1] == 0).all()


def test_cache_survives_json(setting):
    cache = [(3, setting[1][0])]
    (made, group), = r.from_json(json.loads(json.dumps(r.to_json(cache))))
    assert made == 3
    for a, b in zip(group, setting[1][0]):
        assert a.ids.tolist() == b.ids.tolist() and a.mask.tolist() == b.mask.tolist() and a.sampler == b.sampler
        assert (a.advantage, a.score, a.correct) == (b.advantage, b.score, b.correct)


def sampled(monkeypatch, *groups, **settings):
    """sample_groups() on scripted verdicts, a list of them for each prompt: its groups, and the stats."""
    tokenizer, traces, flat = data.Tokenizer.byte_level(), [], []
    for i, group in enumerate(groups):
        for j, verdict in enumerate(group):  # a reply's text is the place of its verdict
            traces.append(Trace(i, j, tokenizer.encode(str(len(flat))), [0.0], stop="stop"))
            flat.append(verdict)
    monkeypatch.setattr(r, "generate", lambda *_, on_trace, **__: [on_trace(trace) for trace in traces] and traces)
    pairs = [(data.Problem(str(i), "math", "1?", "1"), [1, 2]) for i in range(len(groups))]
    stats = r.new_stats()
    args = r.Args(group=len(groups[0]), format_penalty=0.0, **settings)
    ranks = train_sft.Ranks()

    def verifier(text, problem):
        return flat[int(text)]

    return r.sample_groups(None, pairs, tokenizer, verifier, args, 0, ranks, stats), stats


RIGHT, WRONG = rewards.Verdict(1.0, "right"), rewards.Verdict(0.0, "wrong")
UNKNOWN = rewards.Verdict(None, "unknown: down")


def test_unknown_verdicts_are_in_no_group_and_in_no_mean(monkeypatch):
    scripted = [[RIGHT, UNKNOWN, WRONG, WRONG], [UNKNOWN, UNKNOWN, UNKNOWN, RIGHT], [UNKNOWN] * 4]
    groups, stats = sampled(monkeypatch, *scripted)
    assert [[x.score for x in group] for group in groups] == [[1, 0, 0], [1], []]
    stats["sums"][0] = 1
    record = r.record_of(stats, 0.0, 0.0, 0.0, train_sft.Ranks())
    assert record["reward"] == record["correct"] == 0.5 and record["reward_std"] == 0.5  # 1, 0, 0, 1
    assert record["unknown"] == 8 / 12
    assert record["length"] == pytest.approx(14 / 12)  # of all: the texts are 0 to 11
    assert record["length_right"] == record["length_wrong"] == 1


def test_groups_with_fewer_than_two_known_verdicts_have_no_signal(monkeypatch):
    unknown = [[UNKNOWN, UNKNOWN, RIGHT], [UNKNOWN] * 3]
    known = [[RIGHT, UNKNOWN, WRONG], [RIGHT, RIGHT, UNKNOWN], [WRONG, WRONG, UNKNOWN]]
    groups, _ = sampled(monkeypatch, *unknown, *known)
    monkeypatch.setattr(r, "sample_groups", lambda *_: groups)
    stats, args = r.new_stats(), r.Args(prompts=5, group=3, max_calls=1)
    prompts = r.Prompts([data.Problem("1", "math", "1?", "1")], data.Tokenizer.byte_level(), 0)
    chosen = r.collect(None, prompts, [], 0, None, None, args, train_sft.Ranks(), stats)
    assert [[x.advantage for x in group] for group in chosen] == [pytest.approx([1, -1], abs=1e-5)]
    assert (stats["groups"], stats["all_right"], stats["all_wrong"]) == (5, 1, 1)


def test_groups_that_differ_in_style_alone_are_dropped(monkeypatch):
    def group(*scores):
        ids, mask = np.zeros(2, np.int32), np.array([False, True])
        return [r.Rollout(ids, mask, [0.0], score, score >= 0.5) for score in scores]
    groups = [group(1, 0.8), group(0, -0.2), group(0.8, 0)]  # all right, all wrong, one right with both penalties
    monkeypatch.setattr(r, "sample_groups", lambda *_: groups)
    stats, args = r.new_stats(), r.Args(prompts=3, group=2, max_calls=1)
    prompts = r.Prompts([data.Problem("1", "math", "1?", "1")], data.Tokenizer.byte_level(), 0)
    chosen = r.collect(None, prompts, [], 0, None, None, args, train_sft.Ranks(), stats)
    assert [[x.score for x in some] for some in chosen] == [[0.8, 0]]
    assert (stats["groups"], stats["all_right"], stats["all_wrong"]) == (3, 1, 1)


def test_many_unknown_verdicts_end_the_run():
    def samples(known, unknown, reason="unknown: down"):
        right, lost = {"correct": True, "reason": "right"}, {"correct": None, "reason": reason}
        return [right] * known + [lost] * unknown
    start = {"all": 0, "unknown": {}}
    counted = r.count_verdicts(start, samples(9, 1), last=False)  # too few to tell
    assert counted == {"all": 10, "unknown": {"unknown: down": 1}}
    with pytest.raises(ValueError, match="so far: 1 of 10 verdicts are unknown, more than 2%: 1 x down"):
        r.count_verdicts(start, samples(9, 1), last=True)
    counted = r.count_verdicts(start, samples(98, 2), last=False)  # 2% are not more than 2%
    counted = r.count_verdicts(json.loads(json.dumps(counted)), samples(98, 1), last=False)  # 3 of 199
    with pytest.raises(ValueError, match="5 of 201 verdicts are unknown, more than 2%: 3 x down; 2 x full"):
        r.count_verdicts(counted, samples(0, 2, "unknown: full"), last=False)
    assert start == {"all": 0, "unknown": {}} and counted["all"] == 199  # what is being saved does not change


def test_backfill_and_the_bounded_cache(monkeypatch):
    """Every third group has signal; 4 are wanted, 6 prompts a call: two calls, nothing over; then from the cache."""
    class Source:
        made = 0
        def take(self, count):
            return [None] * count
    def groups(sampler, pairs, tokenizer, verifier, args, seed, ranks, stats):
        source.made += len(pairs)
        return [[r.Rollout(np.zeros(2, np.int32), np.array([False, True]), [0.0], float(i % 3 == 0 and j), i % 3 == 0 and j > 0)
                 for j in range(2)] for i in range(source.made - len(pairs), source.made)]
    source, args, cache = Source(), r.Args(prompts=5, group=2, cache=3, cache_age=1), []
    monkeypatch.setattr(r, "sample_groups", groups)
    stats = r.new_stats()
    chosen = r.collect(None, source, cache, 0, None, None, args, train_sft.Ranks(), stats)
    assert len(chosen) == 5 and stats["calls"] == 3 and stats["groups"] == 15 and stats["all_wrong"] == 10 and not cache
    args.prompts, stats = 4, r.new_stats()
    cache.extend((made, chosen[0]) for made in (0, 1, 1))
    assert len(r.collect(None, source, cache, 2, None, None, args, train_sft.Ranks(), stats)) == 4
    assert stats["cached"] == 2 and stats["age"] == 1  # the one of step 0 is too old
    assert len(cache) <= 3


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint that has just learned to answer at all, and problems so easy that some answers are right."""
    folder = tmp_path_factory.mktemp("rl")
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"<think>{i}</think>\\boxed{{{i % 2}}}"}],
             "domain": "math", "weight": 1} for i in range(10)] * 6
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rl.jsonl").write_text("".join(json.dumps({"id": str(i), "domain": "math", "prompt": f"{i}?", "answer": str(i % 2)}) + "\n"
                                             for i in range(10)))
    status, _, err = run("train_sft.py", "--data", folder / "sft.jsonl", "--out", folder / "sft", "--steps", 60, "--batch", 10, "--held-out",
                         0, "--lr", 0.01)
    assert status == 0, err
    return folder


def rl_args(start):
    return ("--init", start / "sft", "--problems", start / "rl.jsonl", "--steps", 4, "--prompts", 4, "--group", 6, "--max-new-tokens", 24,
            "--save-every", 2, "--eval-every", 1, "--cache", 4, "--temperature", 1.5)


@pytest.fixture(scope="module")
def whole_run(start):
    status, out, err = run("train_rl.py", *rl_args(start), "--out", start / "whole")
    assert status == 0, err
    assert "wrong: " in out
    return start / "whole"


@pytest.mark.parametrize("moment", ["log of step 3", "step-000000004.tmp/state.json"])
def test_a_killed_run_ends_like_one_that_was_not(start, tmp_path, whole_run, moment):
    killed_and_resumed("train_rl.py", rl_args(start), whole_run, tmp_path / "run", moment)


def test_the_log_has_what_it_promises(whole_run):
    records = [json.loads(line) for line in open(whole_run / "log.jsonl")]
    promised = {name for line in r.__doc__.split("by name")[1].split("Deviations")[0].splitlines() if line.startswith("    ")
                for name in line.split("   ")[1].replace(" ", "").split(",") if name}
    promised |= {"correct", "well_formed", "capped", "t_score", "t_update", "loss", "grad_norm", "lr", "seconds", "tokens"}
    assert len(records) == 4 and not {name for name in promised if name.isidentifier()} - set(records[0])
    for record in records:
        assert record["clip_low"] == record["clip_high"] == 0 and record["entropy"] > 0
        assert (record["mismatch_max"] < 1e-4) == (record["cached"] == 0)  # groups of an earlier step are of another policy
        assert record["calls"] + record["cached"] > 0 and 0 <= record["reward"] <= 1


def test_evaluation_samples_in_the_dtype_of_rl(tmp_path, monkeypatch):
    FalconH1(PRESETS["tiny"]).save_pretrained(tmp_path)
    data.Tokenizer.byte_level().save(tmp_path)
    for dtype, expected in (("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        assert {p.dtype for p in ev.load(tmp_path, "cpu", dtype)[0].parameters()} == {expected}
    monkeypatch.setattr(ev.FalconH1, "from_pretrained", lambda folder, dtype, device: (dtype, device))
    assert ev.load(tmp_path, "cuda:1", "auto")[0] == (torch.bfloat16, "cuda:1")
    assert ev.load(tmp_path, "cuda", "float32")[0] == (torch.float32, "cuda")
    with pytest.raises(ValueError, match="--dtype float16: not one of auto, float32, bfloat16"):
        ev.check_args(ev.Args(dtype="float16"))


MISSING = [f"{name}: {why}" for name, why in sandbox.sandbox_walls().items() if why != "on"]
needs_sandbox = pytest.mark.skipif(bool(MISSING), reason=f"no isolation here: {MISSING}")
ADD = [{"input": "1 2\n", "output": "3\n"}, {"input": "10 20", "output": "30"}]


def reply(code):
    return f"<think>Hm.</think>Here it is.\n```python\n{code}\n```\n"


@needs_sandbox
def test_reward_of_code():
    problem = data.Problem("1", "code", "Add.", "", {"tests": ADD})
    for code, correct in (("print(sum(map(int, input().split())))", True), ("print(3)", False)):
        text = reply(code).strip() + "<|im_end|>"
        verdict = rewards.verify_code(text.removesuffix("<|im_end|>"), problem)
        score = r.reward(verdict, text.removesuffix("<|im_end|>"), True, "Add.", r.Args())
        assert (score["score"], score["correct"], score["well_formed"]) == (float(correct), correct, True)
    score = r.reward(rewards.verify("no", problem), "no", True, "Add.", r.Args())
    assert (score["score"], score["correct"], score["reason"]) == (-0.1, False, "no code")


@needs_sandbox
def test_training_rewards_code_and_answers_side_by_side(monkeypatch):
    tokenizer = data.Tokenizer.byte_level()
    problems = [data.Problem("1", "code", "Add.", "", {"tests": ADD}), data.Problem("2", "math", "1+1?", "2")]
    right, wrong = reply("print(sum(map(int, input().split())))").strip(), reply("print(3)").strip()
    texts = [[wrong, right], ["<think>x</think>\\boxed{2}", right]]
    traces = [
        SimpleNamespace(prompt_index=i, sample_index=j, stop="stop", tokens=[*tokenizer.encode(text), tokenizer.stop_ids[0]], logprobs=[])
        for i, some in enumerate(texts)
        for j, text in enumerate(some)
    ]
    monkeypatch.setattr(r, "generate", lambda *_, on_trace, **__: [on_trace(trace) for trace in traces] and traces)
    args = r.Args(group=2, format_penalty=0.0)
    pairs = [(problem, tokenizer.encode(problem.prompt)) for problem in problems]
    ranks, stats = train_sft.Ranks(), r.new_stats()
    groups = r.sample_groups(None, pairs, tokenizer, rewards.verify, args, 0, ranks, stats)
    assert [[rollout.score for rollout in group] for group in groups] == [[0, 1], [1, 0]]
    assert [sample["correct"] for sample in stats["samples"]] == [False, True, True, False]


class Held(TorchDispatchMode):
    """The bytes of all tensors on "meta" that are alive; they may be at most `room`."""

    def __init__(self, room):
        super().__init__()
        self.now, self.room = 0, room

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        given = {v.untyped_storage()._cdata for v in given}
        for v in tree_leaves(out):
            if isinstance(v, torch.Tensor) and v.is_meta and v.untyped_storage()._cdata not in given:
                self.change(v.untyped_storage().nbytes())
                weakref.finalize(v.untyped_storage(), self.change, -v.untyped_storage().nbytes())
        return out

    def change(self, nbytes):
        self.now += nbytes
        assert self.now <= self.room


def test_sampling_at_7b_stays_inside_80_gb(monkeypatch):
    """The README's command for GRPO on eight GPUs of 80 GB: 16 of 128 prompts a rank, 16 traces of each, all
    of which grow to 49,152 tokens. Beside them lie the copy in bf16, and in float32 an eighth of weights and
    moments."""
    c = PRESETS["7b"]
    n = sum(parameters(c).values())
    held = Held(80 * 10**9 - 2 * n - 12 * n // 8)
    monkeypatch.setattr("model.free_bytes", lambda device: held.room - held.now)
    with torch.device("meta"):
        model = FalconH1(c).to(torch.bfloat16)
    with held:
        sampler = Sampler(model, [[1] * 300] * 16, 16, 0, 300 + 49152 - 1, 0, None, None)
        slots, sizes = len(sampler.slots), []
        assert sum(cache_bytes(c, slots, 512, torch.bfloat16).values()) < held.room / 2
        assert sum(cache_bytes(c, slots + 1, 512, torch.bfloat16).values()) > held.room / 2
        sampler.waiting, sampler.slots = {}, [Running(Trace(0, i), [], None) for i in range(slots)]
        while (length := sampler.cache.k.shape[3]) < sampler.longest:
            sizes.append((len(sampler.slots), length))
            for running in sampler.slots:
                running.ids = [1] * (length + 1)
            sampler.fit()
    assert (slots, sizes[0]) == (164, (164, 512)) and sizes[2] == (164, 2048)  # then some are set aside
    assert sampler.cache.k.shape[3] == 49451 and len(sampler.slots) == 12
    assert len(sampler.slots) + len(sampler.aside) == slots


def test_counts_of_verdicts_and_samples_of_tests_survive_a_resume(start, tmp_path, monkeypatch, capsys):
    """One verdict of step 1 is unknown, then all of step 3: the run stops. Resumed, it knows of the one, and
    takes step 3's tests again."""
    seeds, down = [], []

    def verify(text, problem, **settings):
        if problem.id == "canary":
            return rewards.verify(text, problem)
        assert settings["limit"] == 7
        first, step = not seeds, settings["seed"] - 5 * 1_000_003
        seeds.append(step)
        return UNKNOWN if first or step in down else rewards.verify(text, problem)

    monkeypatch.setattr(r, "verify", verify)
    args = (*rl_args(start), "--seed", 5, "--code-tests", 7, "--max-calls", 12, "--out", tmp_path / "run")

    def state(step):
        return json.loads((tmp_path / f"run/trainer/step-00000000{step}/state.json").read_text())["verdicts"]

    down.append(2)
    error = refused(r.main, args, monkeypatch, capsys)
    for part in ("step 3, prompts", "the run so far: ", "holds what was saved before"):
        assert part in error
    before = len(seeds) - seeds.count(2)
    assert set(seeds) == {0, 1, 2} and state(2) == {"all": before, "unknown": {"unknown: down": 1}}
    down.clear()
    seeds[:] = [-1]
    monkeypatch.setattr("sys.argv", ["script", *map(str, args)])
    assert train_sft.run_main(r.main) == 0 and "continuing after step 2" in capsys.readouterr().out
    assert set(seeds) == {-1, 2, 3}
    assert state(4) == {"all": before + len(seeds) - 1, "unknown": {"unknown: down": 1}}
    log = [json.loads(line) for line in open(tmp_path / "run/log.jsonl")]
    assert [record["unknown"] > 0 for record in log] == [True, False, False, False]


@pytest.mark.parametrize(("ranks", "flags"), [(2, ()), (3, ("--cp", 3, "--checkpoint-activations"))])
def test_ranks_sample_and_reward_like_one(start, tmp_path, whole_run, ranks, flags):
    status, _, err = run("train_rl.py", *rl_args(start), "--out", tmp_path / "run", *flags, ranks=ranks)
    assert status == 0, err
    one, two = ([json.loads(line) for line in open(folder / "log.jsonl")][0] for folder in (whole_run, tmp_path / "run"))
    for name in ("reward", "correct", "all_right", "all_wrong", "length", "calls", "tokens"):
        assert two[name] == one[name], name
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4, abs=1e-6) and two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_each_rank_holds_one_copy_to_sample_from(start, tmp_path):
    args = (*rl_args(start), "--steps", 2, "--out", tmp_path / "run")
    status, out, err = run("tests/copies_held.py", "train_rl", 1, *args, ranks=2)
    assert status == 0, err
    assert out.count("made 1 copies") == 2  # refreshed in place after each step


def test_a_killed_rank_leaves_a_run_that_goes_on(start, tmp_path, whole_run):
    out, program = tmp_path / "run", tmp_path / "program.py"
    program.write_text(dying("train_rl.py", rl_args(start), out, "log of step 3", rank=1))
    status, _, err = run(program, ranks=2)
    assert status == 1 and "rank      : 1" in err and "SIGKILL" in err
    status, stdout, err = run("train_rl.py", *rl_args(start), "--out", out, ranks=2)
    assert status == 0 and "continuing after step 2" in stdout, err
    one, two = ([json.loads(line) for line in open(folder / "log.jsonl")] for folder in (whole_run, out))
    assert [r["step"] for r in two] == [1, 2, 3, 4]
    assert [r["reward"] for r in two] == pytest.approx([r["reward"] for r in one], abs=0.1) and two[0]["reward"] == one[0]["reward"]


@pytest.mark.parametrize(("args", "message"), [
    (("--group", 1), "--group 1"), (("--temperature", 0), "--temperature 0"), (("--normalise", "x"), "sequence or token"),
    (("--slots", -1), "--slots -1: must be at least 0"),
    (("--init", "nowhere"), "nowhere"), (("--problems", "{bad}"), "field answer"), (("--problems", "{hard}"), "carries any signal"),
    (("--format-penalty", 0.3, "--language-penalty", 0.2), "plus --language-penalty must be below 0.5"),
    (("--code-tests", -1), "--code-tests -1: must be at least 0"),
    (("--lr", 1e30, "--max-calls", 6), "step 2, prompts "), (("--init", "{small}"), "the model room for 271 only")])
def test_bad_input_is_one_line(start, tmp_path, args, message, monkeypatch, capsys):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"id": "1", "domain": "math", "prompt": "p", "answer": ""}) + "\n")
    (tmp_path / "hard.jsonl").write_text(json.dumps({"id": "1", "domain": "math", "prompt": "1?", "answer": "123456789"}) + "\n")
    FalconH1(replace(PRESETS["tiny"], vocab_size=271)).save_pretrained(tmp_path / "small")
    data.Tokenizer.byte_level().save(tmp_path / "small")
    args = [str(a).format(bad=tmp_path / "bad.jsonl", hard=tmp_path / "hard.jsonl", small=tmp_path / "small") for a in args]
    args = (*rl_args(start), "--format-penalty", 0, "--max-calls", 1, *args, "--out", tmp_path / "run")
    assert message in refused(r.main, args, monkeypatch, capsys)


def test_a_step_without_a_right_answer_says_so_once(start, tmp_path, monkeypatch, capsys):
    hard = {"id": "1", "domain": "math", "prompt": "1?", "answer": "123456789"}
    data.write_jsonl(tmp_path / "hard.jsonl", [hard])
    args = (*rl_args(start), "--max-calls", 2, "--problems", tmp_path / "hard.jsonl", "--out", tmp_path / "run")
    monkeypatch.setattr("sys.argv", ["script", *map(str, args)])
    assert train_sft.run_main(r.main) == 1
    out, err = capsys.readouterr()
    assert out.count("step 1: none of 48 answers is right; look at") == 1
    assert "none of 8 groups carries any signal (all right 0, all wrong 8, others unknown)" in err
