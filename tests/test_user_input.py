"""What a user writes: numbers, texts, paths, and messages about them. Each case was once accepted, or a traceback."""

from __future__ import annotations

import math
import os
import pickle
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from holdfast.errors import UserError, plain, printable, unknown
from holdfast.user_input import LONGEST_TEXT, flag, number, path, read_number, text, whole

# -- messages


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07x", "x"),
        ("\x1b]8;;http://a\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b2Jx", "x"),
        ("a\rb\x08c\x00", "a\ufffdb\ufffdc\ufffd"),
        ("abc\u202etxt.exe", "abc\ufffdtxt.exe"),
        ("two\r\nlines\tand a tab", "two\nlines\tand a tab"),
        ("caf\xe9 \u6f22\u5b57 \U0001f600", "caf\xe9 \u6f22\u5b57 \U0001f600"),
        ("\udcff", "\ufffd"),
    ],
)
def test_text_is_plain(written, shown):
    assert plain(written) == shown
    assert plain(shown) == shown
    plain(written).encode()  # what is printed can be printed


@pytest.mark.parametrize("name", ["x" * 10**6, "word " * 10**6, "\x1b[31m" * 10**5 + "x", "1" * 5000])
def test_a_message_is_a_few_lines(name):
    began = time.perf_counter()
    for error in (UserError(f"there is no file at {name}."), unknown("loss", name, ["sce", "isce"])):
        assert len(str(error)) <= 1200
        assert "\x1b" not in str(error)
    assert time.perf_counter() - began < 5


def test_an_error_is_one_line_whatever_it_quotes():
    assert str(UserError("it cannot be read (first\n  second\n).\n")) == "it cannot be read (first second )."


def test_a_list_of_known_names_is_short():
    assert "and 99940 more" in str(unknown("class", "cat", map(str, range(100_000))))


def test_an_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(UserError("x" * 5000)))
    assert str(error) == str(UserError("x" * 5000))
    assert printable(str(error)) == str(error)


# -- numbers


@pytest.mark.parametrize(
    "value", [True, False, "1", None, math.nan, math.inf, -math.inf, 1j, [1], np.array([1.0, 2.0])]
)
def test_what_is_no_number(value):
    with pytest.raises(UserError, match=r"x must be a finite number, got"):
        number("x", value)


def test_numbers_and_their_ranges():
    assert number("x", 3) == 3
    assert isinstance(number("x", 3), int)
    assert type(number("x", np.float32(0.5))) is float
    assert number("x", 1, 0, 1, above=True) == 1
    with pytest.raises(UserError, match=r"x must be a finite number >= 0 and <= 1, got 2"):
        number("x", 2, 0, 1)
    with pytest.raises(UserError, match=r"x must be a positive finite number, got 0"):
        number("x", 0, 0, above=True)


@pytest.mark.parametrize("value", [True, 1.5, 2.0, "0", None, -1, 10**400, np.float64(1)])
def test_what_is_no_whole_number(value):
    with pytest.raises(
        UserError, match=r"^seed must be a whole number >= 0(, got| and <= 9,007,199,254,740,992, got) .{1,85}$"
    ):
        whole("seed", value)


def test_whole_numbers_and_flags():
    assert type(whole("x", np.int32(7))) is int
    assert flag("x", True) is True
    for value in (1, 0, "true", None):
        with pytest.raises(UserError, match="x must be True or False"):
            flag("x", value)


@pytest.mark.parametrize(
    ("written", "value"),
    [("10", 10), ("-3", -3), ("0.1", 0.1), (".5", 0.5), ("1e-3", 1e-3), ("8/255", 8 / 255), ("8.0 / 255", 8 / 255)],
)
def test_texts_that_are_numbers(written, value):
    assert read_number(written) == value


@pytest.mark.parametrize(
    "written",
    [
        "",
        "1_000",
        "1e999",
        "nan",
        "inf",
        "0x10",
        "1/0",
        "1/2/3",
        "\u0661",
        "1e9999999999",
        "1" * 100,
        "one",
        "1 2",
        "/3",
    ],
)
def test_texts_that_are_no_numbers(written):
    assert read_number(written) is None


# -- texts and paths


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (5, "must be a text, got an int"),
        (None, "must be a text"),
        ("x" * (LONGEST_TEXT + 1), "characters long"),
        ("a\x1b[2J", "control characters"),
        ("a\nb", "control characters"),
    ],
)
def test_texts_are_bounded(value, why):
    with pytest.raises(UserError, match=why):
        text("the name", value)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("/", "the root of the file system"),
        ("/../..", "the root of the file system"),
        ("a\0b", "control characters"),
        ("a\x1b[31m", "control characters"),
        ("~nobody-of-this-name/x", "home folder that does not exist"),
        ("x" * 300, "too long for a file system"),
        ("/".join(["abcd"] * 2000), "too long for a file system"),
        ("/dev/null", "device, a pipe or a socket"),
        (5, "must be a path, got an int"),
        (None, "must be a path"),
        (b"bytes", "must be a path as text"),
    ],
)
def test_what_is_no_path(value, why):
    if value == "/../.." and os.path.realpath(value) != "/":
        pytest.skip("another file system")
    with pytest.raises(UserError, match=why):
        path("--out", value)


def test_pipes_and_sockets_are_not_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        for name in ("pipe", "socket"):
            with pytest.raises(UserError, match="device, a pipe or a socket"):
                path("data", name)


def test_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path("out", "~/runs") == tmp_path / "runs"
    assert path("out", tmp_path) == tmp_path
    assert path("out", "new/folder") == Path("new/folder")
