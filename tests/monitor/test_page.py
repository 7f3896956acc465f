"""python -m gradsurg report: one page that loads nothing, with pictures and the verdict."""

import re
import warnings
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
import torch

import gradsurg
from gradsurg.__main__ import main
from gradsurg.monitor.page import page
from tests.networks import build, trained


@pytest.fixture
def history(tmp_path):
    model = build()
    optimizer = gradsurg.wrap(torch.optim.Adam(trained(model), lr=0.01), granularity="tensor")
    history = gradsurg.History(optimizer, every=1, model=model)
    for batch in range(6):
        losses = model.losses(batch)
        losses["<b>&bold"] = losses.pop("left")
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()
    history.save(tmp_path / "run.jsonl")
    return history


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.words.append(data)


def test_the_page(history, tmp_path, capsys):
    assert main(["report", str(tmp_path / "run.jsonl"), "-o", str(tmp_path / "out.html")]) == 0
    printed = capsys.readouterr().out
    assert "Which tasks fight" in printed
    assert "What to try" in printed
    text = (tmp_path / "out.html").read_text()
    page = Page(text)
    assert page.tags.count("svg") == 8
    assert not set(page.tags) & {"script", "link", "iframe", "img", "b"}
    # Self-contained: nothing is loaded, and every reference inside points to something on the page, once.
    assert not [value for name, value in page.attributes if name in ("src", "href") and not value.startswith("#")]
    assert not re.search(r"url\((?!#)|@import", text)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text))
    assert used <= set(ids)
    assert "<b>&bold" in "".join(page.words)


def test_what_is_no_history_is_refused(tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    for name, message in [("none.jsonl", "none.jsonl"), ("empty.jsonl", "nothing to judge"), ("a.csv", ".jsonl file")]:
        with pytest.raises(SystemExit) as stop:
            main(["report", str(tmp_path / name)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_refused(history, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path / "run.jsonl"), "-o", str(tmp_path / "nowhere" / "out.html")])
    assert stop.value.code == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["\x00\x07", "\ud800", "\ufffe", "<b>&--", "\x0b"])
def test_names_that_xml_forbids(name):
    """Every picture is XML, with the names in its comments."""
    w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1))
    history = gradsurg.History(optimizer, every=1)
    for _ in range(3):
        optimizer.backward({name: w[0] ** 2, "b": (w[0] - w[1] - 3) ** 2})
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib's fonts lack these characters
        text = page(history.reports, name, "test")
    text.encode("utf-8")
    pictures = re.findall("<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(pictures) > 3
    for picture in pictures:
        ET.fromstring(picture)
