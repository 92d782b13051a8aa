"""Check the table that `python eval.py` wrote, and the time and the calibration of the run: python check_report.py REPORT SECONDS"""

import json
import sys

METHODS = {"pass@1", "majority@32", "majority@equal-tokens", "deepconf-offline@32", "deepconf-low@32", "deepconf-high@32"}

report, seconds = json.load(open(sys.argv[1])), float(sys.argv[2])
rows = {(r["checkpoint"], r["method"]): r for r in report["rows"]}
accuracy = {name: 100 * r["accuracy"] for name, r in rows.items()}
rl = {method for checkpoint, method in rows if checkpoint == "rl"}
majority, low = rows["rl", "majority@32"], rows["rl", "deepconf-low@32"]
gain = accuracy["rl", "pass@1"] - accuracy["sft", "pass@1"]
required = {
    "every method is in the table": METHODS == rl and ("sft", "pass@1") in rows,
    "at least 200 held-out problems": all(r["problems"] >= 200 for r in rows.values()),
    f"main job in 600 s: {seconds:.0f}": seconds <= 600,
    f"RL gains 15 points of pass@1: {gain:.1f}": gain >= 15,
    f"LOW takes 0.6 of majority's tokens: {low['tokens'] / majority['tokens']:.2f}": low["tokens"] <= 0.6 * majority["tokens"],
    f"LOW is at most 2 points below majority: {accuracy['rl', 'deepconf-low@32'] - accuracy['rl', 'majority@32']:+.1f}":
        low["accuracy"] >= majority["accuracy"] - 0.02 - 1e-9,
}
# Goals beyond the bars, shown on every run: problems that majority does not saturate, and LOW ahead of it at equal cost.
equal = rows["rl", "majority@equal-tokens"]
goals = {
    f"majority@32 stays under 97%: {accuracy['rl', 'majority@32']:.1f}": majority["accuracy"] < 0.97,
    f"LOW beats majority at equal tokens: {100 * (low['accuracy'] - equal['accuracy']):+.1f}": low["accuracy"] > equal["accuracy"],
}
for bar, met in {**required, **goals}.items():
    print("met    " if met else "NOT MET", bar)
sys.exit(0 if all(required.values()) else 1)
