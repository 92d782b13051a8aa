"""What each technique of the paper buys on the small task, one change at a time, and what it costs.

    python -m tests.ablate                      every row for seeds 0, 1 and 2; about an hour on two cores
    python -m tests.ablate --only rl            one section, and the rows that it starts from
    python -m tests.ablate --figures figures    also draws accuracy.png and rl.png there
    python -m tests.ablate --quick              a toy version of every row, one seed: do all of them run?

A row is a chain of commands of this project's scripts, printed so that you can paste them. As many rows run
side by side as there are cores, each process with one thread and no GPU, so seconds are those beside another
row. After an interruption the same command goes on: rows with a report are skipped, and the scripts resume
their own runs. A row that fails is reported, its output is in log.txt of its folder, and the others go on;
the exit status is 1 then.

    OUT/seed-S/SECTION/NAME/    the runs of a row        OUT/table.md, table.json    the table

Sections: sft, rl (from sft/base), mixers (attention, Mamba-2 or both; SFT, then RL), deepconf (votes on the
traces that mixers/both records, without a model). Every seed has its own data, weights and samples.

How to read the table
    57.8 ± 3.0        mean and standard deviation over the seeds
    +1.2 ± 0.9        difference to the row in brackets, seed by seed, and its standard error
    no effect seen    the difference is below two standard errors; in brackets how many seeds would show it if
                      it were real
With three seeds, noise alone exceeds two standard errors in 18% of the cells (Student's t, two degrees of
freedom).
"""

import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import data
import deepconf
import eval
import train_rl
import train_sft
from data import flag
from model import PRESETS
from tests import bench

@dataclass
class Args:
    seeds: str = flag("0,1,2", "seeds of data, weights and samples")
    only: str = flag("", "one section: sft, rl, mixers or deepconf; empty: all")
    figures: str = flag("", "folder for accuracy.png and rl.png, which need matplotlib; empty: no figures")
    out: str = flag("", "folder of the runs; empty: runs/ablate, or runs/ablate-quick")
    quick: bool = flag(False, "a toy version of every row, for the first seed; its figures mean nothing")
    fresh: bool = flag(False, "delete the runs in --out and start over")

# 1. The rows ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Row:
    """A line of the table, and the run behind it."""
    section: str
    name: str
    changes: str  # what is different from its base
    flags: str = ""  # of the script that the section is about
    base: str = "base"  # name of the row to compare with, in the same section; "": none
    chain: str = ""  # its entry of CHAINS; "": that of the section
    method: str = ""  # deepconf: its line of the report
    run: str = ""  # deepconf: the row whose report has that line; this row then runs nothing

    @property
    def key(self):
        return f"{self.section}/{self.name}"

    @property
    def needs(self):
        """The key of the row whose files this one reads; "": none. One is enough: what that row reads itself
        is then there as well. mixers/both evaluates the model of rl/base again, with more replies."""
        start = {"data": "", "rl": "sft/base", "deepconf": "mixers/both"}.get(self.section, "data/made")
        return "rl/base" if self.key == "mixers/both" else start

def votes(name, changes, method, base="majority"):
    """A row of deepconf that is another line of majority's report."""
    return Row("deepconf", name, changes, base=base, method=method, run="majority")

def low(name, changes, flags):
    """A row of deepconf: LOW with other flags."""
    flags = f"--methods online --eta 10 {flags}"
    return Row("deepconf", name, changes, flags, base="low", method="deepconf-low@32")

def alone(mixer, changes):
    """A row of mixers: the small run of another preset."""
    return Row("mixers", mixer, changes, f"--preset tiny-{mixer}", base="both")

# Samples have 55 tokens on average. A batch is packed into two rows, the first of which takes some 70% of the
# tokens: a mean over each rank's own tokens weighs those of the second rank 2.4 times as much.
# Two ranks on two cores take longer than one process: a third of the steps.
SHORT_ROW = 42 * train_sft.Args.batch
UNEVEN = f"--context {SHORT_ROW} --pack-tokens {SHORT_ROW} --steps {train_sft.Args.steps // 3}"
DIGITS = "digits-5=%d,digits-6=%d,digits-7=%d"  # the made problems have 1, 2, 3
# A third to a half of the groups come from the cache, one step old. At the usual learning rate the policy
# hardly moves in a step, so importance weights have nothing to do.
FAST = f"--lr {4 * train_rl.Args.lr:g}"
ROWS = [
    Row("data", "made", "the data of the small run, and two copies for rows of sft", base=""),
    Row("sft", "base", "", base=""),
    Row("sft", "equal-weights", "no difficulty weights: 1 in place of 0.5, 1 and 1.75", chain="equal"),
    Row("sft", "mixture-short", "3, not 1 of 6 samples have 5 digits", f"--mixture {DIGITS % (3, 2, 1)}",
        chain="levels"),
    Row("sft", "mixture-long", "9 of 12, not 6 have 7 digits", f"--mixture {DIGITS % (1, 2, 9)}",
        chain="levels"),
    Row("sft", "ranks-batch", "two ranks, uneven rows, a third of the steps", f"{UNEVEN} --normalise batch",
        "", "ranks"),
    Row("sft", "ranks-rank", "the same, mean per rank", f"{UNEVEN} --normalise rank", "ranks-batch", "ranks"),

    Row("rl", "base", "", base=""),
    Row("rl", "fast", "four times the learning rate", FAST),
    Row("rl", "fast-no-tis", "the same without importance weights", f"{FAST} --tis-cap 0", "fast"),
    Row("rl", "no-positives", "no cross-entropy on right answers", "--positive-weight 0"),
    Row("rl", "updates-4", "four updates per batch, so that clipping acts", "--updates 4"),
    Row("rl", "updates-4-clip", "clip 0.2, not 0.28", "--updates 4 --clip-high 0.2", "updates-4"),
    Row("rl", "reject", "no backfill: smaller batches", "--backfill reject"),
    Row("rl", "duplicate", "backfill by copies of groups", "--backfill duplicate"),
    Row("rl", "no-cache", "backfill without a cache", "--cache 0"),
    Row("rl", "token", "mean over tokens, not over answers", "--normalise token"),
    Row("rl", "advantage-mean", "advantage not divided by the spread", "--advantage mean"),

    Row("mixers", "both", "the base of sft and rl", "--preset tiny", base="", chain="both"),
    alone("attention", "attention alone, as many parameters"),
    alone("mamba", "Mamba-2 alone, as many parameters"),

    Row("deepconf", "majority", "", "--eta 10,50,90 --methods majority,weighted,offline,offline-bottom,"
        "offline-tail,offline-mean,online", base="", method="majority@32"),
    votes("equal-tokens", "as many as LOW's tokens pay for", "majority@equal-tokens"),
    votes("weighted", "all vote, weighted by confidence", "weighted@32"),
    votes("offline-lowest", "top 10% by the lowest group", "deepconf-offline@32"),
    votes("offline-bottom", "top 10% by the bottom 10% of groups", "deepconf-offline-bottom@32"),
    votes("offline-tail", "top 10% by the last group", "deepconf-offline-tail@32"),
    votes("offline-mean", "top 10% by the mean", "deepconf-offline-mean@32"),
    votes("low", "online, eta 10", "deepconf-low@32", base="equal-tokens"),
    votes("eta-50", "online, eta 50", "deepconf-eta50@32"),
    votes("high", "online, eta 90", "deepconf-high@32"),
    low("tau-0.8", "consensus at 0.8, not 0.95", "--tau 0.8"),
    low("tau-none", "no consensus stop", "--tau 0"),
    low("window-8", "groups of 8 tokens, not 16", "--window 8"),
    low("window-32", "groups of 32 tokens", "--window 32"),
    low("window-64", "groups of 64 tokens", "--window 64"),
    low("warm-up-4", "4 warm-up traces, not 16", "--warm-up 4"),
    low("warm-up-8", "8 warm-up traces", "--warm-up 8"),
]
ROW = {row.key: row for row in ROWS}

# 2. Commands ------------------------------------------------------------------------------------------------

# A chain is a list of shell commands. Each goes on where it was interrupted, or writes a file whole or not at
# all, and the last one writes the row's report: so a chain may always be run again from its beginning.
# {here}: the folder of the row. {seed}: its seed. {at}: the folder of the seed. {flags}: those of the row.
MADE = "{at}/data/made"
SFT = f"train_sft.py --seed {{seed}} --out {{here}}/sft {{flags}} --data {MADE}"
RL = f"python train_rl.py --seed {{seed}} --problems {MADE}/rl.jsonl --out {{here}}/rl"
EVAL = f"python eval.py --seed {{seed}} --problems {MADE}/heldout.jsonl --limit 200 --methods pass@1,majority"
EVAL_SFT = EVAL + " --samples 8 --model {here}/sft --out {here}/eval"
EVAL_LOW = EVAL + ",online --eta 10 --samples 32 --out {here}/eval"
TWO_RANKS = "python -m torch.distributed.run --standalone --nproc-per-node 2"
COPY = f"sed -E '%s' {MADE}/%s.jsonl > {MADE}/tmp && mv {MADE}/tmp {MADE}/%s.jsonl"  # whole or not at all
CHAINS = {
    "data": [f"python data.py make --seed {{seed}} --out {MADE}",
             COPY % ('s/"weight": [0-9.]+/"weight": 1.0/', "sft", "equal"),
             COPY % (r's/"domain": "math"(.*"level": ([0-9]))/"domain": "digits-\2"\1/', "sft", "levels")],
    **{file: [f"python {SFT}/{file}.jsonl", EVAL_SFT] for file in ("sft", "equal", "levels")},
    "ranks": [f"{TWO_RANKS} {SFT}/sft.jsonl", EVAL_SFT],
    "rl": [RL + " --init {at}/sft/base/sft {flags}",
           EVAL + " --samples 8 --model {here}/rl --out {here}/eval"],
    "both": [EVAL_LOW + " --model {at}/rl/base/rl"],
    "mixers": [f"python {SFT}/sft.jsonl", EVAL_SFT + "-sft",
               RL + " --init {here}/sft", EVAL_LOW + " --model {here}/rl"],
    "deepconf": ["python eval.py --traces {at}/mixers/both/eval/traces.jsonl {flags} > {here}/tmp "
                 "&& mv {here}/tmp {here}/report.txt"],
}
# The toy version: replies so short that some are right after seconds of training. One guess in seven is
# right, so nearly half of the groups of 4 carry signal. The probability that none of 16 does is below 0.0001,
# which matters where there is no backfill.
QUICK = {"data.py": "--sft 2000 --rl 400 --heldout 60",
         "train_sft.py": "--steps 60 --batch 16 --held-out 2",
         "train_rl.py": "--steps 2 --prompts 16 --group 4 --warmup-steps 1 --max-new-tokens 32",
         "eval.py --seed": "--limit 10 --max-new-tokens 32"}
QUICK_DATA = [COPY % ("s#<think>.*</think>#<think>;</think>#", "sft", "sft")]

def folder(args, seed, key):
    """The folder of a row; of the seed for the key ""."""
    return Path(args.out, f"seed-{seed}", key)

def commands(row, seed, args):
    """The commands of a row, in order; none if it is a line of another row's report."""
    chain = [] if row.run else CHAINS[row.chain or row.section]
    if args.quick and row.section == "data":
        chain = [chain[0], *QUICK_DATA, *chain[1:]]
    if args.quick:  # behind the other flags, as the last one of a name counts
        toy = [" ".join(flags for part, flags in QUICK.items() if part in line) for line in chain]
        chain = [f"{line} {flags}" for line, flags in zip(chain, toy)]
    # Quoted where --out has blanks; the templates' own blanks collapse before the names come in.
    paths = {"here": folder(args, seed, row.key), "at": folder(args, seed, "")}
    names = {name: shlex.quote(str(path)) for name, path in paths.items()}
    lines = [line.replace("{flags}", row.flags) for line in chain]
    return [" ".join(line.split()).format(seed=seed, **names) for line in lines]

def report_of(row, seed, args):
    """The file that the row's run writes last."""
    key = f"{row.section}/{row.run or row.name}"
    name = {"data": "levels.jsonl", "deepconf": "report.txt"}.get(row.section, "eval/report.json")
    return folder(args, seed, key) / name

# 3. Running them --------------------------------------------------------------------------------------------

# A GPU would be shared by all rows, and run.json would not name it.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

def execute(command, log):
    """Run a command with one thread; its output goes to the end of `log`. Returns "", or why it failed.

    A command outlives this process if that is killed. It then keeps the folder locked (see main), so that no
    second one writes to the same files."""
    print(command, flush=True)
    if command.startswith("python "):
        command = shlex.quote(sys.executable) + command.removeprefix("python")
    begin = log.stat().st_size if log.exists() else 0  # behind what earlier commands have written
    with open(log, "a", encoding="utf-8") as file:
        status = subprocess.run(command, shell=True, stdout=file, stderr=file, close_fds=False,
                                env=os.environ | ENVIRONMENT).returncode
    if status == 0:
        return ""
    lines = log.read_bytes()[begin:].decode("utf-8", "replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]  # torchrun prints more behind it
    return [f"exit status {status}", *lines[-1:], *errors[-1:]][-1]

# About how many seconds a command takes one core: the first entry that is part of it, else 5.
SECONDS = {"--nproc-per-node": 400, "train_sft.py": 140, "--updates 4": 115, "train_rl.py": 40,
           "--samples 32": 45, "--samples 8": 14}

def minutes(items, args):
    """How long it takes to run these rows of these seeds, (row, seed), side by side."""
    lines = [line for row, seed in items for line in commands(row, seed, args)]
    seconds = sum(next((s for part, s in SECONDS.items() if part in line), 5) for line in lines)
    return seconds / 60 / len(os.sched_getaffinity(0))

def run_row(row, seed, args, needed, run):
    """Run the commands of a row, after the future of what it needs. Returns "", or why it failed."""
    if needed and needed.result():
        return f"not run, because {row.needs} failed"
    here = folder(args, seed, row.key)
    here.mkdir(parents=True, exist_ok=True)
    for command in commands(row, seed, args):
        if why := run(command, here / "log.txt"):
            return why
    return ""

def run_all(rows, seeds, args, run=execute):
    """Run what has no report yet, side by side. Returns the failures, {"SECTION/NAME, seed S": why}."""
    todo = [(row, seed) for row in rows for seed in seeds
            if not row.run and not report_of(row, seed, args).exists()]
    print(f"{len(todo)} rows to run", flush=True)
    left = dict.fromkeys(todo)  # those that have not ended, in order

    def work(row, seed, needed):
        why = run_row(row, seed, args, needed, run)
        del left[row, seed]
        time_left = "" if args.quick else f"; about {minutes([*left], args):.0f} minutes left"
        print(f"[{len(todo) - len(left)}/{len(todo)}] {row.key}, seed {seed}: {why or 'done'}{time_left}",
              flush=True)
        return why

    # A row stands behind what it needs, so a worker only waits for rows that are running.
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    futures = {}
    try:
        for row, seed in todo:
            futures[row.key, seed] = pool.submit(work, row, seed, futures.get((row.needs, seed)))
        return {f"{key}, seed {seed}": why for (key, seed), f in futures.items() if (why := f.result())}
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C reaches the commands as well: they end, no other begins

# 4. What a row shows ----------------------------------------------------------------------------------------

# Columns of each section: shares, which are compared with the base; prices; and what they are of. Prices are
# means over the seeds without a spread: counts and bytes hardly have one, and seconds depend on the machine.
COLUMNS = {
    "sft": (["pass@1", "majority", "5 digits", "6 digits", "7 digits"], ["tokens, M", "seconds"],
            "8 replies to each of 200 held-out problems; digits: pass@1 of these problems"),
    "rl": (["pass@1", "majority"], ["calls", "groups", "tokens, M", "seconds", "entropy"],
           "8 replies to each of 200 held-out problems; sampling calls, groups learned from, sampled tokens, "
           "seconds of all steps; entropy of the last one, nats per token"),
    "mixers": (["SFT pass@1", "pass@1", "majority", "LOW"], ["bytes per token", "bytes per trace"],
               "32 replies to each of 200 held-out problems, after SFT 8; caches in float32"),
    "deepconf": (["accuracy"], ["tokens"], "the 32 replies of mixers/both; tokens: share of majority's")}

def records(path):
    """The dicts of a file of JSON lines."""
    return [record for _, record in data.read_records(path)]

def accuracies(path):
    """{method: accuracy} of an evaluation, its names without the number of replies; and pass@1 by level."""
    rows = json.loads((path / "report.json").read_text("utf-8"))["rows"]
    out = {r["method"].removesuffix("@8").removesuffix("@32"): r["accuracy"] for r in rows}
    levels = {}
    for trace in records(path / "traces.jsonl"):
        digits = len(trace["problem"].partition("%")[0])
        levels.setdefault(f"{digits} digits", []).append(trace["correct"])
    return out | {level: statistics.fmean(right) for level, right in levels.items()}

def read_replay(path):
    """{method: (accuracy, tokens)} of the table that `eval.py --traces` prints."""
    cells = [[cell.strip() for cell in line.split("|")] for line in path.read_text("utf-8").splitlines()]
    return {c[2]: (float(c[3]) / 100, int(c[5].replace(",", ""))) for c in cells if c[1:2] == ["traces"]}

def measure(row, seed, args):
    """{column: value} of a row and a seed; {} if it has not been run. Shares are from 0 to 1."""
    report = report_of(row, seed, args)
    if not report.exists():
        return {}
    if row.section == "deepconf":
        accuracy, tokens = read_replay(report)[row.method]
        whole = report_of(ROW["deepconf/majority"], seed, args)
        return {"accuracy": accuracy, "tokens": tokens / read_replay(whole)["majority@32"][1]}
    out = accuracies(report.parent)
    here = folder(args, seed, row.key)
    if row.section == "mixers":
        sft = folder(args, seed, "sft/base/eval") if row.chain == "both" else here / "eval-sft"
        size = bench.cache_bytes(PRESETS[row.flags.split()[1]], 1, 1, bench.DTYPE["cpu"])
        return out | {"SFT pass@1": accuracies(sft)["pass@1"], "LOW": out["deepconf-low"],
                      "bytes per token": size["kv"], "bytes per trace": size["conv"] + size["ssm"]}
    # The trainer's log has a line per step; a resumed run has removed those of steps that it repeated.
    log = records(here / row.section / "log.jsonl")
    sums = {"tokens, M": "tokens", "seconds": "seconds"}
    if row.section == "rl":
        sums |= {"tokens, M": "sampled", "calls": "calls", "groups": "learned"}
        out["entropy"] = log[-1]["entropy"]
    out |= {column: sum(record[name] for record in log) for column, name in sums.items()}
    return out | {"tokens, M": out["tokens, M"] / 1e6}

# 5. Statistics ----------------------------------------------------------------------------------------------

def mean_and_deviation(values):
    """Mean and sample standard deviation; None for what takes more values."""
    values = [*values]
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None

def paired_difference(values, base):
    """Mean difference over the seeds that both have, its standard error, and with how many seeds such a
    difference would be two standard errors; None for what is not known. Arguments: {seed: value}.

    Seeds are paired because a row and its base share data and samples: what makes a seed easy cancels."""
    # Rounded: 0.56 - 0.545 and 0.235 - 0.22 differ in the last bit, and such a rest would count as an effect.
    differences = [round(value - base[seed], 9) for seed, value in values.items() if seed in base]
    mean, error = deepconf.mean_and_stderr(differences)
    if error is None:
        return {"difference": mean, "error": None, "seeds needed": None}
    mean = round(mean, 9)
    # The error shrinks with the root of the number of seeds, and is to be half of the difference.
    needed = math.ceil(len(differences) * (2 * error / mean) ** 2 - 1e-9) if mean else None
    return {"difference": mean, "error": error, "seeds needed": needed}

# 6. The table -----------------------------------------------------------------------------------------------

def summarise(rows, seeds, args):
    """The rows of table.json: values by seed, mean, deviation, and difference to the base, by column."""
    # Files are read once per row and seed; a seed whose run failed has no values.
    measured = {row.key: {seed: measure(row, seed, args) for seed in seeds} for row in rows}
    def by_seed(key, column):
        return {seed: values[column] for seed, values in measured[key].items() if column in values}

    out = []
    for row in rows:
        compared, prices, _ = COLUMNS[row.section]
        columns = {}
        for name in [*compared, *prices]:
            values = by_seed(row.key, name)
            mean, deviation = mean_and_deviation(values.values())
            columns[name] = {"values": values, "mean": mean, "deviation": deviation}
            if row.base and name in compared:  # select() brings the base: it is in the same section
                columns[name] |= paired_difference(values, by_seed(f"{row.section}/{row.base}", name))
        about = {"section": row.section, "name": row.name, "changes": row.changes, "base": row.base}
        out.append(about | {"columns": columns})
    return out

def plus_minus(center, spread, sign=""):
    """Shares as "57.8 ± 3.0", in percent; "-" for None."""
    center, spread = (None if x is None else 100 * x for x in (center, spread))
    return "-" if center is None else f"{center:{sign}.1f} ± " + ("-" if spread is None else f"{spread:.1f}")

def effect(column):
    """A difference as "+1.2 ± 0.9", with a remark if that may be noise."""
    difference, error, needed = (column[name] for name in ("difference", "error", "seeds needed"))
    text = plus_minus(difference, error, "+")
    if error is None or difference and abs(difference) >= 2 * error:
        return text
    return f"{text}, no effect seen" + (f" ({needed:,})" if needed else "")

def price(mean):
    """A price with three digits or more."""
    if mean is None:
        return "-"
    return f"{mean:,.0f}" if mean >= 100 else f"{mean:.3g}"

def markdown(summary, section):
    """The table of a section; a blank difference: nothing to compare with."""
    compared, prices, what = COLUMNS[section]
    head = ["row", "changes", *(cell for name in compared for cell in (f"{name}, %", "difference")), *prices]
    lines = [head]
    for row in summary:
        if row["section"] != section:
            continue
        cells = [row["name"], row["changes"] + (f" (to {row['base']})" if row["base"] else "")]
        for column in map(row["columns"].get, compared):
            cells += [plus_minus(column["mean"], column["deviation"]), effect(column) if row["base"] else ""]
        cells += [price(row["columns"][name]["mean"]) for name in prices]
        lines.append(cells)
    return f"## {section}\n\n{what}.\n\n{eval.markdown('| {} ' * len(head) + '|', lines)}\n\n"

def write_table(rows, seeds, args, failures):
    """Print the table, and write it to --out with what is needed to make it again."""
    listing = "\n".join(line for row in rows for line in commands(row, seeds[0], args))
    rows = [row for row in rows if row.section in COLUMNS]  # not the data
    summary = summarise(rows, seeds, args)
    about = json.loads(Path(args.out, "run.json").read_text("utf-8"))
    text = "".join(markdown(summary, section) for section in COLUMNS if section in {r.section for r in rows})
    text += f"Seeds {', '.join(map(str, seeds))}: mean ± standard deviation, difference ± standard error. "
    text += f"Commit {about['commit'][:10]}, torch {about['torch']}, {about['hardware']}.\n"
    text += "A toy version of the runs: these figures mean nothing.\n" if args.quick else ""
    text += "".join(f"Failed: {label}: {why}\n" for label, why in failures.items())
    print(f"\n{text}")
    text += f"\n## The commands of seed {seeds[0]}\n\n```\n{listing}\n```\n"
    data.write_text(Path(args.out, "table.md"), text)
    data.write_text(Path(args.out, "table.json"), json.dumps({"rows": summary, **about}, indent=1) + "\n")

# 7. Figures -------------------------------------------------------------------------------------------------

# Label, colour, line and marker of what the figures show. Markers and brightness tell them apart in grey.
POINT = {"linestyle": "", "capsize": 3}
STYLES = bench.STYLES | {
    "curve": dict(label="majority of 1, 2, 4, ... 32", color="#000000", linestyle="-", marker="P", capsize=3),
    "offline-lowest": dict(label="DeepConf offline, top 10%", color="#e7298a", marker="D", **POINT),
    "low": dict(label="DeepConf LOW", color="#7570b3", marker="*", markersize=10, **POINT),
    "eta-50": dict(label="online, eta 50", color="#999999", marker="v", **POINT),
    "high": dict(label="DeepConf HIGH", color="#56b4e9", marker="X", **POINT)}

def accuracy_figure(axes, seeds, args):
    """Accuracy against tokens, of majority votes and of DeepConf; mean and deviation over the seeds."""
    points = {"curve": []}  # name: (share of the tokens, accuracy), one of every seed
    for seed in seeds:
        path = folder(args, seed, "mixers/both/eval/traces.jsonl")
        samples, _ = eval.replay(path, eval.Args(methods=["majority"], eta=[10.0]))
        curve = eval.majority_curve(samples)  # of 1, 2, 4, ... replies; the last point is all of them
        points["curve"].append([(tokens / curve[-1][0], accuracy) for tokens, accuracy in curve])
        for name in ("offline-lowest", "low", "eta-50", "high"):
            measured = measure(ROW[f"deepconf/{name}"], seed, args)
            points.setdefault(name, []).append([(measured["tokens"], measured["accuracy"])])
    # A point of the figure is the mean over the seeds, of tokens as of accuracy.
    for name, of_seeds in points.items():
        x = [statistics.fmean(tokens for tokens, _ in point) for point in zip(*of_seeds)]
        y = [mean_and_deviation(100 * accuracy for _, accuracy in point) for point in zip(*of_seeds)]
        axes.errorbar(x, [m for m, _ in y], [d or 0 for _, d in y], **STYLES[name])
    axes.set(xlabel="generated tokens, share of those of 32 replies", ylabel="accuracy, %")
    axes.legend()

CURVES = {"reward": "mean reward", "entropy": "entropy, nats per token", "length": "tokens per reply",
          "held_out": "held-out accuracy"}
RUNS = {"both": "rl/base", "attention": "mixers/attention", "mamba": "mixers/mamba"}

def rl_figure(axes, seeds, args, field):
    """A field of RL's log by step: the mean over the seeds, and the standard deviation as a band."""
    for name, key in RUNS.items():
        # Only runs that have ended: a mean over others would change its seeds on the way.
        logs = [folder(args, seed, key) / "rl/log.jsonl" for seed in ended(key, seeds, args)]
        if not logs:
            continue
        steps = zip(*map(records, logs))
        steps = [step for step in steps if field in step[0]]  # held_out is not in all
        x = [step[0]["step"] for step in steps]
        y = [mean_and_deviation(record[field] for record in step) for step in steps]
        axes.plot(x, [m for m, _ in y], markevery=2, **STYLES[name])
        axes.fill_between(x, [m - (d or 0) for m, d in y], [m + (d or 0) for m, d in y],
                          color=STYLES[name]["color"], alpha=0.2, linewidth=0)
    axes.set(xlabel="RL step", ylabel=CURVES[field])

def ended(key, seeds, args):
    """The seeds whose row has a report: after --only, or a failure, some may be missing."""
    return [seed for seed in seeds if report_of(ROW[key], seed, args).exists()]

def draw_figures(seeds, args):
    """accuracy.png and rl.png, of the seeds that have what is to be drawn."""
    if eval.new_figure(1, 1) is None:  # it has said why
        return
    figures = {}
    if has_votes := ended("deepconf/majority", seeds, args):
        figures["accuracy.png"] = eval.new_figure(6, 4)
        accuracy_figure(figures["accuracy.png"].subplots(), has_votes, args)
    if has_rl := ended("rl/base", seeds, args):
        last = records(folder(args, has_rl[0], "rl/base") / "rl/log.jsonl")[-1]
        fields = [field for field in CURVES if field in last]
        figures["rl.png"] = eval.new_figure(3.2 * len(fields), 3)
        panels = figures["rl.png"].subplots(1, len(fields))
        for axes, field in zip(panels, fields):
            rl_figure(axes, has_rl, args, field)
        panels[0].legend()
    Path(args.figures).mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        path = Path(args.figures, name)
        bench.save_figure(figure, path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")

# 8. The command line ----------------------------------------------------------------------------------------

def select(only):
    """The rows of a section, or all for "", and those that they need, in the order of ROWS."""
    if only not in ("", *COLUMNS):
        raise ValueError(f"--only {only}: expected one of {', '.join(COLUMNS)}")
    keys = {row.key for row in ROWS if only in ("", row.section)}
    for row in reversed(ROWS):  # what a row needs stands before it
        if row.key in keys:
            keys.add(row.needs)
    return [row for row in ROWS if row.key in keys]

def parse_seeds(text):
    """ "0,1,2" -> [0, 1, 2]"""
    seeds = [int(part) if part.strip().isdecimal() else -1 for part in text.split(",")]
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {text!r}: expected different numbers, separated by commas, such as 0,1,2")
    return seeds

def main():
    args = data.parse_args(Args, __doc__.partition("\n")[0])
    seeds = parse_seeds(args.seeds)[: 1 if args.quick else None]
    rows = select(args.only)
    args.out = args.out or ("runs/ablate-quick" if args.quick else "runs/ablate")
    # A folder takes the runs of one list of commands, so that a later version of it does not mix in others.
    listing = "\n".join(line for row in ROWS for line in commands(row, 0, args))
    identity = {"a checksum of the commands of": zlib.crc32(listing.encode())}
    with data.open_run(args.out, identity, ("seed-*", "table.*"), fresh=args.fresh, device="cpu") as lock:
        os.set_inheritable(lock.fileno(), True)  # the commands hold it as well, see execute
        failures = run_all(rows, seeds, args)
        write_table(rows, seeds, args, failures)
        if args.figures:
            draw_figures(seeds, args)
    if failures:
        raise ValueError(f"{len(failures)} rows failed; log.txt in their folders holds their output")

if __name__ == "__main__":
    sys.exit(data.run_main(main))
