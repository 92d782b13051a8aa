"""The ablations: commands of rows, statistics by hand, what is run and what is skipped, the table."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

import data
import eval
import train_rl
import train_sft
from tests import ablate
from tests.ablate import ROW, ROWS, Args

SMALL = ["sft/base", "rl/base", "rl/token"]

def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)

def write_reports(args, seed, accuracy):
    """What the runs of SMALL leave behind; accuracy: {key: pass@1}."""
    log = {"tokens": 500_000, "seconds": 3, "sampled": 250_000, "calls": 2, "learned": 16, "entropy": 0.5}
    for key, value in accuracy.items():
        here = ablate.folder(args, seed, key)
        rows = [{"method": "pass@1", "accuracy": value}, {"method": "majority@8", "accuracy": 0.75}]
        write(here / "eval/report.json", json.dumps({"rows": rows}))
        traces = [{"problem": f"{n}%7", "correct": n > 99999} for n in (12345, 123456, 1234567)]
        write(here / "eval/traces.jsonl", "\n".join(map(json.dumps, traces)))
        write(here / here.parent.name / "log.jsonl", 2 * f"{json.dumps(log)}\n")

def test_commands_of_a_row(tmp_path):
    args = Args(out="o")
    train, evaluate = ablate.commands(ROW["rl/fast-no-tis"], 2, args)
    assert train == ("python train_rl.py --seed 2 --problems o/seed-2/data/made/rl.jsonl --out "
                     "o/seed-2/rl/fast-no-tis/rl --init o/seed-2/sft/base/sft --lr 0.0004 "
                     "--tis-cap 0")
    assert evaluate.endswith("--model o/seed-2/rl/fast-no-tis/rl --out o/seed-2/rl/fast-no-tis/eval")
    assert ablate.commands(ROW["deepconf/low"], 2, args) == []
    assert "--nproc-per-node 2 train_sft.py" in ablate.commands(ROW["sft/ranks-rank"], 0, args)[0]
    # Folders with blanks are quoted.
    assert "--out 'a b/seed-0/sft/base'/sft" in ablate.commands(ROW["sft/base"], 0, Args(out="a b"))[0]
    toy = ablate.commands(ROW["mixers/mamba"], 0, Args(out="o", quick=True))
    assert toy[0].endswith(ablate.QUICK["train_sft.py"])  # the last flag of a name counts

@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_rows_are_in_order_and_their_flags_exist(row):
    assert not row.needs or ROWS.index(ROW[row.needs]) < ROWS.index(row)
    assert not row.base or f"{row.section}/{row.base}" in ROW
    known = {"train_sft.py": train_sft.Args, "train_rl.py": train_rl.Args, "eval.py": eval.Args}
    for command in ablate.commands(row, 0, Args(out="o", quick=True)):
        script, _, flags = command.partition(".py ")
        cls = known.get(script.split()[-1] + ".py")
        for name in re.findall("--([a-z-]+)", flags) if cls else ():
            assert name.replace("-", "_") in cls.__dataclass_fields__

def test_a_section_brings_what_it_needs():
    assert [row.key for row in ablate.select("sft")][:2] == ["data/made", "sft/base"]
    assert {row.key for row in ablate.select("deepconf") if row.section != "deepconf"} == {
        "data/made", "sft/base", "rl/base", "mixers/both"}
    assert ablate.select("") == ROWS

def test_statistics_by_hand():
    assert ablate.mean_and_deviation([1, 2, 3]) == (2, 1)
    assert ablate.mean_and_deviation([4]) == (4, None)
    assert ablate.mean_and_deviation([]) == (None, None)
    # Differences 1, 2, 3: mean 2, deviation 1, error 1 / sqrt(3). Seed 3 has no partner.
    result = ablate.paired_difference({0: 2, 1: 4, 2: 6, 3: 99}, {0: 1, 1: 2, 2: 3})
    assert result == {"difference": 2, "error": pytest.approx(3**-0.5), "seeds needed": 1}
    # Deviation 2 and mean 1: 16 seeds would have the error 1/2.
    result = ablate.paired_difference({0: 3, 1: 1, 2: -1}, {0: 0, 1: 0, 2: 0})
    assert result == {"difference": 1, "error": pytest.approx(2 * 3**-0.5), "seeds needed": 16}
    assert ablate.paired_difference({0: 3}, {0: 1, 1: 1}) == {
        "difference": 2, "error": None, "seeds needed": None}
    # +0.015, 0, -0.015, but for rounding: no difference, which no number of seeds would show.
    result = ablate.paired_difference({0: 0.56, 1: 0.85, 2: 0.22}, {0: 0.545, 1: 0.85, 2: 0.235})
    assert result == {"difference": 0, "error": pytest.approx(0.015 * 3**-0.5), "seeds needed": None}

def test_cells():
    assert ablate.plus_minus(0.578, 0.03) == "57.8 ± 3.0"
    assert ablate.plus_minus(0.578, None) == "57.8 ± -" and ablate.plus_minus(None, None) == "-"
    column = {"difference": 0.012, "error": 0.012, "seeds needed": 12}
    assert ablate.effect(column) == "+1.2 ± 1.2, no effect seen (12)"
    assert ablate.effect(column | {"error": 0.005}) == "+1.2 ± 0.5"
    assert ablate.effect(column | {"error": None}) == "+1.2 ± -"
    none = {"difference": 0, "error": 0.0, "seeds needed": None}
    assert ablate.effect(none) == "+0.0 ± 0.0, no effect seen"
    assert [*map(ablate.price, (1234567, 0.52, None))] == ["1,234,567", "0.52", "-"]

def test_finished_rows_are_not_run_again(tmp_path):
    args = Args(out=str(tmp_path))
    rows = [ROW[key] for key in SMALL]
    write_reports(args, 0, {"rl/token": 0.5})
    run = []
    assert ablate.run_all(rows, [0, 1], args, lambda command, log: run.append(command) or "") == {}
    trained = [re.search("--out (.*?)/(sft|rl) ", line + " ")[1] for line in run if "train_" in line]
    assert sorted(trained) == sorted(str(tmp_path / name) for name in (
        "seed-0/sft/base", "seed-1/sft/base", "seed-0/rl/base", "seed-1/rl/base", "seed-1/rl/token"))

def test_a_failure_is_reported_and_the_rest_goes_on(tmp_path, capsys):
    args = Args(out=str(tmp_path))
    run = []
    def fake(command, log):
        run.append(command)
        return "exit status 1: error: broken" if "seed-0/sft/base/sft" in command else ""
    failures = ablate.run_all([ROW[key] for key in SMALL], [0, 1], args, fake)
    assert failures == {"sft/base, seed 0": "exit status 1: error: broken",
                        "rl/base, seed 0": "not run, because sft/base failed",
                        "rl/token, seed 0": "not run, because sft/base failed"}
    assert len(run) == 1 + 3 * 2  # of seed 0 the first command; of seed 1 two for each row
    assert "[6/6]" in capsys.readouterr().out

def test_the_reason_of_a_failing_command(tmp_path):
    log = tmp_path / "log.txt"
    assert ablate.execute("true", log) == ""
    assert ablate.execute("echo some; echo last; exit 3", log) == "last"
    assert ablate.execute("echo error: why; echo ====; exit 1", log) == "error: why"
    threads = "import os, sys; sys.exit(os.environ['OMP_NUM_THREADS'])"
    assert ablate.execute(f'python -c "{threads}"', log) == "1"  # not the errors of earlier commands

def test_the_table(tmp_path, capsys):
    args = Args(out=str(tmp_path))
    write(tmp_path / "run.json", json.dumps({"commit": "c0ffee", "torch": "2", "hardware": "two cores"}))
    for seed, values in enumerate(((0.30, 0.50, 0.60), (0.32, 0.54, 0.66), (0.34, 0.52, 0.63))):
        write_reports(args, seed, dict(zip(SMALL, values)))
    rows = [ROW[key] for key in ("data/made", *SMALL)]
    ablate.write_table(rows, [0, 1, 2], args, {"rl/fast, seed 0": "broken"})
    text = (tmp_path / "table.md").read_text()
    assert text.startswith(capsys.readouterr().out[1:].rstrip("\n"))
    assert ("| base |  | 32.0 ± 2.0 |  | 75.0 ± 0.0 |  | 0.0 ± 0.0 |  | 100.0 ± 0.0 |  | 100.0 ± 0.0 |  "
            "| 1 | 6 |") in text
    assert ("| token | mean over tokens, not over answers (to base) | 63.0 ± 3.0 | +11.0 ± 0.6 | 75.0 ± 0.0 "
            "| +0.0 ± 0.0, no effect seen | 4 | 32 | 0.5 | 6 | 0.5 |") in text
    assert "Failed: rl/fast, seed 0: broken" in text and "c0ffee" in text
    assert ablate.commands(ROW["rl/token"], 0, args)[0] in text
    assert ablate.commands(ROW["data/made"], 0, args)[0] in text  # all read its files
    row = json.loads((tmp_path / "table.json").read_text())["rows"][2]
    assert row["columns"]["pass@1"]["values"] == {"0": 0.6, "1": 0.66, "2": 0.63}

def test_votes_are_read_from_the_printed_report(tmp_path):
    args = Args(out=str(tmp_path))
    reports = {"majority": ["majority@32 | 96.5 | 1.3 | 358,000", "deepconf-low@32 | 98.0 | 1.0 | 179,000"],
               "tau-0.8": ["deepconf-low@32 | 97.0 | 1.0 | 89,500"]}
    for name, lines in reports.items():
        text = "\n".join(f"| traces | {line} | 0.0 | 200 | 0 |" for line in lines)
        write(ablate.folder(args, 0, f"deepconf/{name}") / "report.txt", text)
    assert ablate.measure(ROW["deepconf/low"], 0, args) == {"accuracy": 0.98, "tokens": 0.5}
    assert ablate.measure(ROW["deepconf/tau-0.8"], 0, args) == {"accuracy": 0.97, "tokens": 0.25}
    assert ablate.measure(ROW["deepconf/tau-none"], 0, args) == {}

def test_a_command_that_outlives_a_killed_process_keeps_the_folder(tmp_path):
    with data.open_run(tmp_path, {}, (), fresh=False, device="cpu") as lock:
        os.set_inheritable(lock.fileno(), True)
        assert ablate.execute("sleep 60 & echo $!", tmp_path / "log.txt") == ""
    child = int((tmp_path / "log.txt").read_text())
    try:
        with pytest.raises(ValueError, match="another process is working here"):
            data.open_run(tmp_path, {}, (), fresh=False, device="cpu")
    finally:
        os.kill(child, signal.SIGTERM)

@pytest.mark.parametrize("flags, error", [
    ("--only votes", "--only votes: expected one of sft, rl, mixers, deepconf"),
    ("--seeds 0,0", "--seeds '0,0': expected different numbers"), ("--seeds a", "--seeds 'a': expected"),
    ("--seeds -1", "--seeds '-1': expected"), ("--seed 1", "unrecognized arguments")])
def test_bad_flags(flags, error, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ablate", *flags.split()])
    with pytest.raises(ValueError, match=re.escape(error)):
        ablate.main()

def test_a_folder_takes_one_list_of_commands(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "run_all", lambda *_: {})
    for flags, error in (("", None), ("--only rl", None), ("--quick", "commands")):
        monkeypatch.setattr("sys.argv", ["ablate", "--out", str(tmp_path), *flags.split()])
        if error is None:
            ablate.main()
        else:
            with pytest.raises(ValueError, match=error):
                ablate.main()

def test_rl_curves_show_what_has_been_run(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    args = Args(out=str(tmp_path))
    write_reports(args, 0, {"rl/base": 0.5})
    log = [{"step": step, "reward": step / 2} for step in (1, 2)]
    write(ablate.folder(args, 0, "rl/base") / "rl/log.jsonl", "\n".join(map(json.dumps, log)))
    axes = figure.subplots()
    ablate.rl_figure(axes, [0, 1], args, "reward")
    assert [(line.get_label(), [*line.get_ydata()]) for line in axes.lines] == [("hybrid", [0.5, 1])]

def test_figures(tmp_path):
    pytest.importorskip("matplotlib")
    args = Args(out=str(tmp_path), figures=str(tmp_path / "figures"))
    for seed in (0, 1):
        write_reports(args, seed, {"rl/base": 0.5})
        log = [{"step": s, "reward": s + seed, "entropy": 1, "length": 60, "learned": 1, "calls": 1,
                "sampled": 9, "seconds": 1} for s in (1, 2)]
        write(ablate.folder(args, seed, "rl/base") / "rl/log.jsonl", "\n".join(map(json.dumps, log)))
        methods = {"majority@32": 96, "deepconf-offline@32": 97, "deepconf-low@32": 98,
                   "deepconf-eta50@32": 98, "deepconf-high@32": 97}
        lines = [f"| traces | {method} | {accuracy} | 1.3 | 100 |" for method, accuracy in methods.items()]
        write(ablate.folder(args, seed, "deepconf/majority") / "report.txt", "\n".join(lines))
        trace = {"problem": "1", "domain": "math", "gold": "1", "seed": 0, "text": "", "tokens": 2,
                 "answer": "1", "correct": True, "stop": "stop", "confidences": [1.0, 2.0]}
        traces = [trace | {"sample": i} for i in range(4)]
        path = ablate.folder(args, seed, "mixers/both") / "eval/traces.jsonl"
        write(path, "\n".join(map(json.dumps, traces)))
    ablate.draw_figures([0, 1], args)
    sizes = {path.name: path.stat().st_size for path in Path(args.figures).iterdir()}
    assert sizes.keys() == {"accuracy.png", "rl.png"} and max(sizes.values()) < 60_000
