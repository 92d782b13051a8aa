"""Tests of train_sft.py's stream of samples: reading files of samples, and the order of their draws."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import train_sft as t

TOKENIZER = data.Tokenizer.byte_level()


def turns(*contents):
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]


def write(path, *records):
    data.write_jsonl(path, records)
    return path


def sft_files(path, max_tokens=999, **options):
    return t.SftFiles(str(path), TOKENIZER, max_tokens, **options)


# 1. Files of samples ----------------------------------------------------------------------------------------

SFT = {"messages": turns("q", "<think>r</think>a"), "domain": "math", "weight": 1.5}
LONG = SFT | {"messages": turns("q" * 50, "<think>r</think>a")}


def test_sft_files(tmp_path):
    samples = sft_files(write(tmp_path / "s.jsonl", SFT, SFT | {"domain": "code", "weight": 1}))
    ids, mask = data.render_chat(SFT["messages"], TOKENIZER)
    assert samples[0].ids.tolist() == ids and samples[0].mask.tolist() == mask
    assert samples[0].ids.dtype == np.int32 and samples[0].mask.dtype == bool
    found = [(sample.weight, sample.domain, sample.trimmed) for sample in samples]
    assert found == [(1.5, "math", False), (1.0, "code", False)]
    assert {name: rows.tolist() for name, rows in samples.rows.items()} == {"code": [1], "math": [0]}


def test_long_samples_are_refused_or_trimmed_and_marked(tmp_path):
    path = write(tmp_path / "s.jsonl", SFT, LONG)
    ids, mask = data.render_chat(SFT["messages"], TOKENIZER)
    size = len(ids)
    with pytest.raises(ValueError, match=rf"s\.jsonl, line 2: .*{size + 49} tokens, the limit is {size}"):
        sft_files(path, size)
    one, two = sft_files(path, size, trim=True)
    assert one.ids.tolist() == ids and not one.trimmed
    assert len(two.ids) == len(two.mask) == size and two.trimmed and not two.mask.any()
    one, _ = sft_files(path, size - 2, trim=True)
    assert one.ids.tolist() == ids[:-2] and one.mask.tolist() == mask[:-2] and one.trimmed


@pytest.mark.parametrize(("line", "error"), [
    (SFT | {"messages": None}, "field messages: must be a list"), (SFT | {"domain": ""}, "field domain"),
    (SFT | {"weight": 0}, "field weight"), (SFT | {"messages": turns("q")}, "field messages: holds no"),
    (b"{}", "{} is not a JSON object with fields"), (b"[1]", r"\[1\] is not"),
    (b'{"a": \xff}', "malformed .*0xff"), (b"[", "malformed")])
def test_sft_files_name_file_line_and_field(tmp_path, line, error):
    path = write(tmp_path / "s.jsonl", SFT)
    line = json.dumps(line).encode() if isinstance(line, dict) else line
    path.write_bytes(path.read_bytes() + b"\n" + line)
    with pytest.raises(ValueError, match=rf"s\.jsonl, line 3: {error}"):
        sft_files(path)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_missing_and_empty_files_are_named(tmp_path, content):
    write(tmp_path / "a.jsonl", SFT)
    (tmp_path / "b.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"b\.jsonl: empty"):
        sft_files(tmp_path / "*.jsonl")
    with pytest.raises(ValueError, match=r"c\.jsonl is missing"):
        sft_files(f"{tmp_path}/a.jsonl, {tmp_path}/c.jsonl")


def test_a_line_that_changes_later_is_named(tmp_path):
    path = write(tmp_path / "s.jsonl", SFT, SFT)
    samples = sft_files(path)
    text = path.read_text()
    path.write_text(text[:-3])
    with pytest.raises(ValueError, match=r"s\.jsonl, line 2: malformed"):
        samples[1]
    path.write_text(text.replace("math", "code"))
    assert sft_files(path).checksum != samples.checksum


sizes_of_files = st.lists(st.lists(st.integers(0, 60), max_size=8), min_size=1, max_size=3).filter(all)


@given(sizes_of_files)
@settings(max_examples=25)
def test_what_is_read(tmp_path_factory, sizes):
    """Blank lines, a byte order mark, characters of several bytes, a last line without an end."""
    folder, expected = tmp_path_factory.mktemp("files"), []
    for i, some in enumerate(sizes):
        text = "\ufeff" if i else ""
        for n in some:
            messages = turns(f"{n}é" * (n % 7), "<think>r</think>" + "x" * n)
            record = SFT | {"domain": "ab"[n % 2], "messages": messages}
            where = f"{folder / str(i)}.jsonl, line {1 + text.count(chr(10))}"
            text += json.dumps(record, ensure_ascii=False) + "\n" * (1 + n % 3)
            expected.append((data.parse_sft(record, TOKENIZER, where), where))
        (folder / f"{i}.jsonl").write_text(text.removesuffix("\n"), "utf-8")

    samples = sft_files(",".join(f"{folder}/{i}.jsonl" for i in range(len(sizes))))
    assert sft_files(f"{folder}/*.jsonl").checksum == samples.checksum
    assert [(s.ids.tolist(), s.domain) for s in samples] == [(s.ids.tolist(), s.domain) for s, _ in expected]
    lines = [f"{path}, line {number}" for path, number in zip(samples.paths, samples.numbers)]
    assert lines == [where for _, where in expected]
    for name, rows in samples.rows.items():
        assert rows.tolist() == [i for i, (sample, _) in enumerate(expected) if sample.domain == name]
    assert sorted(samples.rows) == [*samples.rows] == sorted({sample.domain for sample, _ in expected})
    few = sft_files(f"{folder}/*.jsonl", limit=2)
    assert len(few) == min(2, len(expected)) and few.checksum == samples.checksum
    assert sorted(np.concatenate([*few.rows.values()])) == [*range(len(few))]


def test_files_larger_than_memory(tmp_path):
    """1,000 samples of 50 kB, 50 MB, in a process that may have 30 MB more than it needs for itself."""
    with open(tmp_path / "s.jsonl", "w") as file:
        for i in range(1000):
            record = SFT | {"domain": "ab"[i % 2], "messages": turns(str(i), "x" * 50_000)}
            file.write(json.dumps(record) + "\n")
    program = f"""
import resource, sys
sys.path[:0] = [{str(Path(data.__file__).parent)!r}, {str(Path(t.__file__).parent)!r}]
import data
import {t.__name__} as t
tokenizer = data.Tokenizer.byte_level()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 30_000_000,) * 2)
samples = t.SftFiles({str(tmp_path / "s.jsonl")!r}, tokenizer, 1000, trim=True, quiet=True)
loader = t.Loader(samples.rows, 8, 0, {{"a": 3, "b": 1}}, samples.checksum)
for _ in range(5):
    batch = [samples[i] for i in next(loader)]
    assert [sample.domain for sample in batch].count("a") == 6 and all(sample.trimmed for sample in batch)
print(len(samples))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "1000\n", done.stderr


# 2. Loader --------------------------------------------------------------------------------------------------


def make_rows(**sizes):
    """Numbers of samples by domain, all different."""
    ends = np.cumsum([0, *sizes.values()])
    return {name: np.arange(start, end) for name, start, end in zip(sizes, ends, ends[1:]) if end > start}


def stream(loader, batches):
    return [next(loader) for _ in range(batches)]


def test_draws_stay_the_same():
    """The small run's figures, and runs that are resumed, depend on this order."""
    loader = t.Loader(make_rows(a=4, b=3), 5, 7, {"a": 2, "b": 1})
    assert stream(loader, 3) == [[0, 2, 4, 1, 3], [6, 2, 0, 5, 3], [1, 6, 3, 2, 4]]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.integers(0, 99))
@settings(max_examples=30)
def test_default_mixture_takes_every_sample_once_an_epoch(a, b, c, seed):
    loader = t.Loader(make_rows(a=a, b=b, c=c), a + b + c, seed)
    assert [sorted(batch) for batch in stream(loader, 3)] == [[*range(a + b + c)]] * 3


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any), st.integers(0, 9))
@settings(max_examples=30)
def test_no_domain_is_ever_a_whole_sample_away_from_its_share(weights, seed):
    names = "abcdef"[: len(weights)]
    rows = make_rows(**dict.fromkeys(names, 5))
    loader, drawn = t.Loader(rows, 1, seed, dict(zip(names, weights))), Counter()
    for step in range(1, 101):
        [number] = next(loader)
        drawn[names[number // 5]] += 1
        shares = {name: step * weight / sum(weights) for name, weight in zip(names, weights)}
        assert all(abs(drawn[name] - share) < 1 for name, share in shares.items())


def test_epochs_are_shuffled_anew_and_by_seed():
    first, second = stream(t.Loader(make_rows(a=50), 50, 0), 2)
    [other] = stream(t.Loader(make_rows(a=50), 50, 1), 1)
    assert first != second and first != other and sorted(first) == sorted(second)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 7), st.integers(0, 9), st.booleans())
@settings(max_examples=30)
def test_resumed_stream_equals_the_uninterrupted_one(a, b, batch, taken, mixed):
    rows, mixture = make_rows(a=a, b=b), {"a": 0.9, "b": 0.3} if mixed else None
    loader = t.Loader(rows, batch, 3, mixture)
    stream(loader, taken)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = t.Loader(rows, batch, 3, mixture)
    stream(resumed, 2)  # a used loader forgets its own position
    resumed.load_state_dict(state)
    assert stream(resumed, 5) == stream(loader, 5)
    assert len(json.dumps(state)) < 300


@pytest.mark.parametrize(("changes", "name"), [
    ({"rows": make_rows(a=4, b=3)}, "samples"), ({"checksum": 2}, "checksum"), ({"seed": 1}, "seed"),
    ({"mixture": {"a": 1, "b": 2}}, "mixture")])
def test_state_of_something_else_is_refused(changes, name):
    settings = {"rows": make_rows(a=4, b=4), "batch_size": 2, "seed": 0, "checksum": 1}
    state = t.Loader(**settings).state_dict()
    with pytest.raises(ValueError, match=f"data position: {name} was"):
        t.Loader(**settings | changes).load_state_dict(state)


@pytest.mark.parametrize(("sizes", "batch", "mixture", "error"), [
    ({}, 1, None, "0 samples"), ({"a": 3}, 0, None, "batches of 0"), ({"a": 3}, 1, {"b": 1}, r"has \['b'\]"),
    *[({"a": 3}, 1, {"a": weight}, "weights") for weight in (-1, 0, float("nan"), float("inf"))],
    ({"a": 3, "b": 0}, 1, {"a": 1, "b": 1}, "no sample of b is left to draw from")])
def test_loader_refuses(sizes, batch, mixture, error):
    rows = {name: np.arange(size) for name, size in sizes.items()}
    with pytest.raises(ValueError, match=error):
        t.Loader(rows, batch, 0, mixture)
