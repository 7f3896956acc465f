"""The cache survives what may happen to it: other processes, a cut line, a process that dies with a claim."""

import json
import subprocess
import sys

from benchmarks.quality.cache import Cache, key_of

WRITER = """
import sys
from pathlib import Path
from benchmarks.quality.cache import Cache
cache = Cache(Path(sys.argv[1]))
for k in range(40):
    cache.append({"writer": sys.argv[2], "k": k}, {"text": "x" * 500})
"""
HOLDER = """
import sys
from pathlib import Path
from benchmarks.quality.cache import Cache
with Cache(Path(sys.argv[1])).claim({"k": 1}) as mine:
    print(mine, flush=True)
    sys.stdin.readline()
"""


def test_the_key_depends_on_content_alone():
    assert key_of({"a": 1, "b": [2.5]}) == key_of({"b": [2.5], "a": 1}) != key_of({"a": 1, "b": [2]})


def test_appended_runs_are_there_after_a_restart(tmp_path):
    path = tmp_path / "deep" / "runs.jsonl"
    cache = Cache(path)
    cache.append({"k": 1}, {"test": [[1.0]]})
    assert cache.get({"k": 1})["test"] == [[1.0]]
    again = Cache(path)
    assert again.get({"k": 1}) is None  # not read yet
    again.refresh()
    assert again.get({"k": 1}) == cache.get({"k": 1})
    cache.append({"k": 2}, {})
    again.refresh()
    assert len(again) == 2


def test_a_line_that_was_cut_off_is_dropped_and_the_rest_kept(tmp_path):
    path = tmp_path / "runs.jsonl"
    Cache(path).append({"k": 1}, {"a": 1})
    with path.open("a") as file:
        file.write('{"config":{"k":2},"a"')
    cache = Cache(path)
    cache.refresh()
    assert len(cache) == 1
    cache.append({"k": 3}, {"a": 3})
    cache.refresh()
    assert [json.loads(line)["config"]["k"] for line in path.read_text().splitlines()] == [1, 3]
    fresh = Cache(path)
    fresh.refresh()
    assert len(fresh) == len(cache) == 2


def test_two_processes_write_whole_lines(tmp_path):
    path = tmp_path / "runs.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    cache = Cache(path)
    cache.refresh()
    assert len(cache) == 80


def test_a_claim_keeps_others_out_until_its_process_ends(tmp_path):
    path = tmp_path / "runs.jsonl"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline().strip() == b"True"
        with Cache(path).claim({"k": 1}) as mine:
            assert not mine
        with Cache(path).claim({"k": 2}) as mine:
            assert mine
    finally:
        holder.kill()
        holder.communicate(timeout=60)
    with Cache(path).claim({"k": 1}) as mine:
        assert mine
