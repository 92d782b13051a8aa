"""Scripts that can be copied elsewhere run there alone, imports run one way, README names what exists."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Files that are copied together, and a use of them.
SETS = [
    ("ssm_scan.py", """
import torch, ssm_scan
x, B = torch.randn(1, 5, 2, 4), torch.randn(1, 5, 1, 3)
y, state = ssm_scan.ssd_scan(x, torch.rand(1, 5, 2), -torch.ones(2), B, B)
assert y.shape == x.shape and state.shape == (1, 2, 4, 3)
"""),
    ("model.py ssm_scan.py decode.py", """
from model import PRESETS, FalconH1, generate
model = FalconH1(PRESETS["tiny"]).eval()
model.save_pretrained("folder")
traces = [generate(m, [[1, 2, 3]], max_new_tokens=4)[0] for m in (model, FalconH1.from_pretrained("folder"))]
assert len(traces[0].tokens) == 4 and traces[0].tokens == traces[1].tokens
"""),
    ("data.py tokenizer.py", """
import data
assert data.main(["make", "--sft", "3", "--rl", "3", "--heldout", "3", "--out", "made"]) == 0
assert len(data.read_problems("made/rl.jsonl")) == 3 and data.Tokenizer.byte_level().vocab_size == 272
"""),
    ("curate.py data.py tokenizer.py", """
import data
data.write_jsonl("a.jsonl", [{"prompt": "What is $1$?"}])
assert data.main(["overlap", "a.jsonl", "a.jsonl", "--out", "kept.jsonl"]) == 0
assert open("kept.jsonl").read() == ""
"""),
    ("tokenizer.py", """
from tokenizer import Tokenizer, ask, render_chat
ids, mask = render_chat(ask("1+1?"), Tokenizer.byte_level(), generation_prompt=True)
assert len(ids) == len(mask) and not any(mask)
"""),
    ("deepconf.py", """
import deepconf, types
traces = [types.SimpleNamespace(answer=a, confidences=[c] * 4) for a, c in [("7", 2.0), ("8", 1.0)] * 9]
assert deepconf.offline(traces, window=2) == deepconf.replay(traces, window=2).result() == ("7", 1.0)
"""),
    ("sandbox.py", """
import sandbox
walls = sandbox.sandbox_walls()
unsafe = any(state != "on" for state in walls.values())
verdict = sandbox.run_code("print(2 * int(input()))", [{"input": "2", "output": "4"}], unsafe=unsafe)
assert verdict.score == 1, verdict
"""),
    ("rewards.py sandbox.py", r"""
import rewards, types
problem = types.SimpleNamespace(prompt="q", answer="0.5", domain="math", extra={})
assert rewards.verify(r"so \boxed{\frac12}", problem).score == 1
assert rewards.verify(r"so \boxed{2}", problem).score == 0
"""),
]

@pytest.mark.parametrize(("files", "use"), SETS, ids=[files for files, _ in SETS])
def test_a_set_of_files_works_alone(files, use, tmp_path):
    for file in files.split():
        shutil.copy(ROOT / file, tmp_path)
    (tmp_path / "use.py").write_text(use)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

# What each script imports of the others, at most; a main() may import more, but never a test.
ALLOWED = {
    "ssm_scan": "", "tokenizer": "", "deepconf": "", "sandbox": "", "data": "tokenizer", "decode": "ssm_scan",
    "model": "ssm_scan decode", "rewards": "sandbox", "curate": "data tokenizer",
    "train_sft": "ssm_scan model data", "train_rl": "ssm_scan model data rewards train_sft",
    "eval": "model data tokenizer deepconf rewards sandbox",
}

def imported(nodes):
    """The modules that these syntax nodes import, functions called main left out."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
        elif getattr(node, "name", "") != "main":
            yield from imported(ast.iter_child_nodes(node))

@pytest.mark.parametrize("script", ALLOWED)
def test_imports_run_one_way(script):
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    assert set(imported(tree.body)) & {*ALLOWED, "tests"} <= set(ALLOWED[script].split())
    everywhere = imported(node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
    assert not [name for name in everywhere if name.split(".")[0] == "tests"]

def closure(name, graph):
    """Itself, what it names in the graph, what these name, and so on."""
    found = {name}
    while (more := found.union(*(graph[known] for known in found))) != found:
        found = more
    return found

@pytest.mark.parametrize("script", ALLOWED)
def test_docstring_and_readme_name_what_to_copy(script):
    trees = {name: ast.parse((ROOT / f"{name}.py").read_text()) for name in ALLOWED}
    needed = closure(script, {name: ALLOWED.keys() & imported(tree.body) for name, tree in trees.items()})
    # README's last column names what to take besides; these name the rest.
    rows = re.findall(r"^\| `(\w+)\.py` \|.*\| (.*)\|$", (ROOT / "README.md").read_text("utf-8"), re.M)
    assert needed == closure(script, {name: set(re.findall(r"\w+", column)) for name, column in rows})
    # The docstring names all files, or those to leave out.
    text = " ".join(ast.get_docstring(trees[script]).split())
    text = re.search(r"(?:to copy|can be copied)(.*?)(?:;|\.(?!py))", text, re.I)[1]
    named = {*re.findall(r"(\w+)\.py", text), *["train_sft", "train_rl"] * ("the two trainers" in text)}
    assert needed - {script} == (ALLOWED.keys() - named - {script} if "all other" in text else named)

def test_the_map_from_the_papers_to_the_code_names_what_exists():
    text = (ROOT / "README.md").read_text("utf-8")
    text = text.partition("## From the paper to the code")[2].partition("## Results")[0]
    files = {path.name: path.read_text("utf-8") for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]}
    missing = set(re.findall(r"\b\w+\.py\b", text)) - files.keys()
    # Tests by their names alone; what stands in a script as script.name.
    tests = "".join(files.values())
    missing |= {name for name in re.findall(r"\btest_\w+\b(?!\.py)", text) if f"def {name}(" not in tests}
    for script, name in re.findall(r"`(\w+)\.(?!py\b)(\w+)", text):
        source = files.get(f"{script}.py", "")
        if source and not re.search(rf"^ *(?:def|class) {name}\b|^(?: {{4}})?{name}:? .*=", source, re.M):
            missing.add(f"{script}.{name}")
    assert not missing and text.count("`test_") > 60
