"""Check the table of `python eval.py`, and the time of the run: python check_report.py REPORT SECONDS

Prints a line for each bar, which must be met, and each goal beyond them; exit status 1 if a bar is missed.
"""

import json
import sys

METHODS = {"pass@1", "majority@32", "majority@equal-tokens", "deepconf-offline@32", "deepconf-low@32",
           "deepconf-high@32"}

with open(sys.argv[1]) as file:
    rows = {(row["checkpoint"], row["method"]): row for row in json.load(file)["rows"]}
seconds = float(sys.argv[2])

# Without these rows nothing below can be computed.
expected = {("sft", "pass@1"), *(("rl", method) for method in METHODS)}
if rows.keys() != expected:
    sys.exit(f"NOT MET every method is in the table: missing or not expected: {rows.keys() ^ expected}")

# Accuracies in percent; a gain or a distance is in points.
percent = {name: 100 * row["accuracy"] for name, row in rows.items()}
majority = percent["rl", "majority@32"]
low = percent["rl", "deepconf-low@32"]
gain = percent["rl", "pass@1"] - percent["sft", "pass@1"]
tokens = rows["rl", "deepconf-low@32"]["tokens"] / rows["rl", "majority@32"]["tokens"]
equal = low - percent["rl", "majority@equal-tokens"]

# Differences of accuracies are rounded: 1e-9 keeps an exact tie on the right side.
required = {
    "at least 200 held-out problems": all(row["problems"] >= 200 for row in rows.values()),
    f"main job in 600 s: {seconds:.0f}": seconds <= 600,
    f"RL gains 15 points of pass@1: {gain:.1f}": gain >= 15 - 1e-9,
    f"LOW takes 0.6 of majority's tokens: {tokens:.2f}": tokens <= 0.6,
    f"LOW is at most 2 points below majority: {low - majority:+.1f}": low - majority >= -2 - 1e-9,
    f"LOW is not below majority at equal tokens: {equal:+.1f}": equal >= -1e-9,
}
# Shown on every run: the job takes minutes, majority does not saturate, LOW is ahead at equal cost.
goals = {
    f"main job in 240 s on a quiet machine: {seconds:.0f}": seconds <= 240,
    f"majority@32 stays under 97%: {majority:.1f}": majority < 97 - 1e-9,
    f"LOW beats majority at equal tokens by 3 points: {equal:+.1f}": equal >= 3 - 1e-9,
}
print("met     every method is in the table")  # or the end was above
for bar, met in {**required, **goals}.items():
    print("met    " if met else "NOT MET", bar)
sys.exit(0 if all(required.values()) else 1)
