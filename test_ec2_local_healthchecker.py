# /// script
# requires-python = ">=3.8"
# dependencies = [
#     "boto3", "moto", "flask", "flask-cors", "pytest", "pytest-xdist", "hypothesis", "pyyaml", "trustme",
# ]
# ///
"""Every test of ec2_local_healthchecker, in the order of its rooms.

Where time can be passed in, no test sleeps; where the real thing is the point, the real thing is used:
nginx and memcached from Debian, boto3 against moto's server, PyYAML, network and mount namespaces (root).
A test that waits, waits for a condition, with a limit that only a broken program reaches.
"""

import collections
import contextlib
import dataclasses
import datetime
import hashlib
import http.server
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import textwrap
import threading
import time

import hypothesis
import pytest
import trustme
import yaml
from hypothesis import stateful
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

import ec2_local_healthchecker as hc

HERE = pathlib.Path(hc.__file__).resolve().parent
PROGRAM = HERE / "ec2_local_healthchecker.py"
PATIENCE = 60  # seconds: more than any machine needs
PROMPTLY = pytest.approx(0, abs=15)  # seconds: less than anything that it must not wait for, and more than a starved machine needs
EXAMPLE = """\
graceperiod: 10s
frequency: 10s
checks:
  memcached:
    type: tcp
    timeout: 1s
    endpoint: localhost:11211
    threshold: 4
    frequency: 10s
  nginx:
    type: http
    timeout: 1s
    endpoint: http://localhost:80/ping.html
    threashold: 10
    frequency: 1s
"""

EXAMPLES = int(os.environ.get("EXAMPLES", "2000"))  # for each law
hypothesis.settings.register_profile(
    "all", max_examples=EXAMPLES, deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("all")


def wait_until(condition, what="the condition"):
    """Return condition()'s first true value."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"waited {PATIENCE}s in vain for {what}")


WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
PORTS = itertools.cycle(range(10000 + 1000 * WORKER, 11000 + 1000 * WORKER))  # where the kernel takes none for others


def free_port():
    """A port that stays free until it is used."""
    for port in PORTS:
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
            return port


# ---- Deciding ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "threshold, results, states",
    [
        (1, "f", "F"),
        (1, "pfp", "HFH"),
        (3, "fff", "uuF"),
        (3, "ffpfff", "uuuuuF"),
        (3, "ppp", "uuH"),
        (3, "pppffpffpfff", "uuHHHHHHHHHF"),
        (3, "fffppfppp", "uuFFFFFFH"),
        (2, "pfpfpf", "uuuuuu"),
        (4, "ffffpppfpppp", "uuuFFFFFFFFH"),
    ],
)
def test_only_threshold_equal_results_in_a_row_change_the_state_of_a_check(threshold, results, states):
    health, seen = hc.Health(), ""
    for result in results:
        health = health.after(result == "p", threshold)
        seen += {"unknown": "u", "healthy": "H", "failing": "F"}[health.state]
    assert seen == states


@pytest.mark.parametrize(
    "states, verdict",
    [
        ("H", "healthy"), ("HH", "healthy"), ("F", "unhealthy"), ("HF", "unhealthy"), ("uF", "unhealthy"),
        ("u", "undecided"), ("uH", "undecided"), ("uuu", "undecided"), ("uHF", "unhealthy"),
    ],
)  # fmt: skip
def test_the_verdict_is_a_function_of_the_states(states, verdict):
    names = {"u": "unknown", "H": "healthy", "F": "failing"}
    assert hc.verdict_of(names[state] for state in states) == verdict


@pytest.mark.parametrize(
    "verdict, marked, recovery, wanted",
    [
        ("unhealthy", False, True, "Unhealthy"),
        ("unhealthy", True, False, "Unhealthy"),
        ("healthy", True, True, "Healthy"),
        ("healthy", True, False, None),
        ("healthy", False, True, None),
        ("undecided", True, True, None),
        ("undecided", False, True, None),
    ],
)
def test_what_is_wanted_of_the_group(verdict, marked, recovery, wanted):
    assert hc.wanted_mark(verdict, marked, recovery) == wanted


def test_calls_back_off_from_one_frequency_to_five_minutes_each_jittered_by_a_fifth():
    middle = [hc.call_backoff(calls, 10.0, 0.5) for calls in range(1, 9)]
    assert middle == [10, 20, 40, 80, 160, 300, 300, 300]
    assert [hc.call_backoff(1, 10.0, dice) for dice in (0.0, 1.0)] == pytest.approx([8.0, 12.0])
    assert hc.call_backoff(10**6, 10.0, 0.5) == 300
    assert hc.call_backoff(1, 3600.0, 0.5) == hc.call_backoff(9, 3600.0, 0.5) == 3600


@pytest.mark.parametrize(
    "age, left",
    [(None, 300), (0, 300), (100, 200), (299.5, 0.5), (300, 300), (10**9, 300), (-100, 300), (-(10**9), 300)],
)
def test_grace_counts_from_the_launch_and_never_exceeds_the_graceperiod_from_now(age, left):
    assert hc.grace_left(300.0, age) == left


def test_probes_keep_their_grid_and_missed_periods_are_skipped():
    assert hc.next_due(10.0, 2.0, 10.1) == 12.0
    assert hc.next_due(10.0, 2.0, 12.0) == 12.0
    assert hc.next_due(10.0, 2.0, 12.1) == 14.0
    assert hc.next_due(10.0, 2.0, 1000.5) == 1002.0
    assert hc.next_due(10.0, 2.0, 9.0) == 12.0


@pytest.mark.parametrize("state", ["Standby", "Detached", "Terminated", "Warmed:Stopped", "Warmed:Running", ""])
def test_no_lifecycle_state_but_in_service_permits_a_call(state):
    assert not hc.lifecycle_permits(state)
    assert hc.lifecycle_permits("InService") and hc.lifecycle_permits(None)


# The other instances of a group, as "9H 2U3": nine of weight 1 that serve, two of weight 3 marked Unhealthy.
INSTANCE_STATES = {
    "H": ("InService", "Healthy"), "h": ("InService", "healthy"), "Y": ("InService", "HEALTHY"),
    "U": ("InService", "Unhealthy"), "u": ("InService", "UNHEALTHY"), "P": ("Pending", "Healthy"),
    "p": ("Pending:Wait", "Healthy"), "T": ("Terminating", "Unhealthy"), "t": ("Terminating:Wait", "Healthy"),
    "S": ("Standby", "Healthy"), "D": ("Detaching", "Healthy"), "R": ("Replacing", "Healthy"), "E": ("EnteringStandby", "Healthy"),
}  # fmt: skip


def spares(percent, desired, weight, others):
    return hc.chance_to_go(percent, desired, weight, others) > 0


def instances(text):
    rows = re.findall(r"(\d+)([A-Za-z])(\d*)", text)
    return [(int(weight or 1), *INSTANCE_STATES[letter]) for count, letter, weight in rows for _ in range(int(count))]


@pytest.mark.parametrize(
    "percent, desired, weight, others, spared",
    [
        # at least this instance, however small the share
        (1, 1, 1, "", True), (1, 2, 1, "1H", True), (1, 3, 1, "2H", True), (1, 3, 1, "1H 1U", False), (1, 99, 1, "98H", True),
        # a share of desired capacity, rounded down; this instance is in it
        (40, 10, 1, "9H", True), (40, 10, 1, "6H 3U", True), (40, 10, 1, "5H 4U", False),
        (49, 10, 1, "6H 3U", True), (49, 10, 1, "5H 4U", False), (50, 10, 1, "5H 4U", True), (39, 10, 1, "6H 3U", False),
        (100, 10, 1, "9U", True), (99, 10, 1, "9U", False), (33, 3, 1, "1H 1U", False), (66, 3, 1, "1H 1U", False), (67, 3, 1, "1H 1U", True),
        # InService and Healthy, both, in any case of letters; whatever else an instance is, it is out
        (20, 10, 1, "4H 3h 1Y 1U", True), (20, 10, 1, "4H 2h 1Y 2u", False),
        (20, 10, 1, "8H 1P", True), (20, 10, 1, "7H 2P", False), (20, 10, 1, "7H 1P 1p", False),
        (20, 10, 1, "7H 2T", False), (20, 10, 1, "7H 2t", False), (20, 10, 1, "7H 2S", False), (20, 10, 1, "7H 2D", False),
        (20, 10, 1, "7H 1R 1E", False), (20, 10, 1, "8H 9T 9P", True),
        # replaced: what is gone is out until what came for it is in service
        (20, 10, 1, "8H", True), (20, 10, 1, "7H", False), (20, 10, 1, "7H 2P 2T", False), (20, 10, 1, "9H 2T", True),
        # desired above the actual size (a launch that fails, a scale-out under way) and below it (a scale-in)
        (20, 20, 1, "9H", False), (20, 12, 1, "9H", False), (20, 11, 1, "9H", True), (50, 20, 1, "9H", False), (55, 20, 1, "9H", True),
        (20, 5, 1, "9H", True), (20, 5, 1, "4H 5U", True), (20, 5, 1, "3H 6U", False), (20, 0, 1, "3H", True), (20, 0, 1, "3U", True),
        # weighted: capacity counts, not instances
        (20, 30, 3, "9H3", True), (20, 30, 3, "8H3 1U3", True), (20, 30, 3, "7H3 2U3", False),
        (20, 30, 6, "8H3", True), (20, 30, 7, "7H3 2H1", True), (20, 30, 7, "7H3 1H1 1U1", False),
        (20, 30, 1, "7H3 2H4", True), (20, 30, 1, "7H3 1U8", False), (10, 8, 3, "2H3", True), (10, 9, 3, "2H3", True), (10, 10, 3, "2H3", False),
    ],
)  # fmt: skip
def test_the_group_spares_an_instance_only_within_the_limit(percent, desired, weight, others, spared):
    assert spares(percent, desired, weight, instances(others)) is spared


@pytest.mark.parametrize("percent", [1, 20, 33, 99, 100])
def test_a_lone_sick_instance_is_within_the_limit_of_a_group_of_any_size_and_weight(percent):
    for size in range(1, 120):
        for weight in (1, 2, 7):
            others = instances(f"{size - 1}H{weight}")
            assert hc.chance_to_go(percent, size * weight, weight, others) == 1
            assert hc.chance_to_go(percent, size * weight - weight + 1, weight, others) == 1  # rounded up to whole instances


@pytest.mark.parametrize(
    "percent, size, weight, most",
    [(20, 50, 1, 10), (20, 9, 1, 1), (1, 50, 1, 1), (40, 10, 1, 4), (100, 10, 1, 10), (20, 10, 3, 2), (25, 10, 3, 2), (1, 10, 3, 1)],
)  # fmt: skip
def test_a_group_that_fails_one_after_another_loses_no_more_than_the_limit(percent, size, weight, most):
    marked = 0
    for _ in range(size):
        others = instances(f"{size - marked - 1}H{weight} {marked}U{weight}")
        marked += spares(percent, size * weight, weight, others)
    assert marked == most


@pytest.mark.parametrize(
    "percent, others, chance",
    [
        (1, "99H", 1), (5, "98H 1U", 0.3), (5, "97H 2U", 0.225), (5, "95H 4U", 0.075), (5, "94H 5U", 0),
        (40, "60H 39U", 0.075), (40, "99H", 1), (40, "74H 25U", 1),
    ],
)  # fmt: skip
def test_a_lone_sick_instance_goes_at_once_and_many_fill_the_room_by_chance(percent, others, chance):
    assert hc.chance_to_go(percent, 100, 1, instances(others)) == pytest.approx(chance)


# ---- Durations and YAML ------------------------------------------------------------------------

H = 3600.0


@pytest.mark.parametrize(
    "text, seconds",
    [
        # the documented cases of Go's time.ParseDuration, and its limits
        ("0", 0), ("5s", 5), ("30s", 30), ("1478s", 1478), ("-5s", -5), ("+5s", 5), ("-0", 0), ("+0", 0),
        ("5.0s", 5), ("5.6s", 5.6), ("5.s", 5), (".5s", 0.5), ("1.0s", 1), ("1.00s", 1), ("1.004s", 1.004),
        ("1.0040s", 1.004), ("100.00100s", 100.001), ("10ns", 1e-8), ("11us", 1.1e-5), ("12µs", 1.2e-5),
        ("12μs", 1.2e-5), ("13ms", 0.013), ("14s", 14), ("15m", 900), ("16h", 16 * H), ("3h30m", 3.5 * H),
        ("10.5s4m", 250.5), ("-2m3.4s", -123.4), ("1h2m3s4ms5us6ns", H + 123.004005006),
        ("39h9m14.425s", 39 * H + 554.425), ("52763797000ns", 52.763797), ("0.3333333333333333333h", 1200),
        ("9007199254740993ns", 9007199.254740993), ("9223372036854775807ns", 9223372036.854775807),
        ("9223372036854775.807us", 9223372036.854775807), ("9223372036s854ms775us807ns", 9223372036.854775807),
        ("-9223372036854775808ns", -9223372036.854775808), ("-9223372036s854ms775us808ns", -9223372036.854775808),
        ("0.100000000000000000000h", 360), ("0.830103483285477580700h", 2988.372539827719),
        ("1s1s", 2), ("00001s", 1), ("1h0.0000000000000000000000000000000000001ns", H),
    ],
)  # fmt: skip
def test_durations_have_the_values_of_go(text, seconds):
    assert hc.parse_duration(text) == pytest.approx(seconds, rel=1e-15, abs=1e-9)


@pytest.mark.parametrize(
    "text",
    [
        "", "3", "-", "s", ".", "-.", ".s", "+.s", "1d", "1w", "1S", "10", "1 s", " 1s", "1s ", "1s\n", "1e3s", "0x1s",
        "--1s", "+-1s", "1,5s", "1..5s", "1.5.5s", "١s", "1٠s", "one", "1sm", "NaN", "inf", "\x85\x85", "\xffff",
        "9223372036854775808ns", "9223372036854775.808us", "9223372036854ms775us808ns", "-9223372036854775809ns",
        "9223372036s854ms775us808ns", "3000000h", "9" * 10000 + "s", "9" * 10000, "1" * 5000 + "." + "1" * 5000 + "h",
    ],
)  # fmt: skip
def test_what_go_refuses_is_refused(text):
    with pytest.raises(hc.ConfigError):
        hc.parse_duration(text)


@hypothesis.given(st.text(st.sampled_from("0123456789.+-nuµmsh \n٣"), max_size=12))
def test_any_text_is_a_duration_of_go_or_a_configerror(text):
    grammar = re.fullmatch(r"[+-]?(0|(([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h))+)", text)
    try:
        value = hc.parse_duration(text)
    except hc.ConfigError:
        assert not grammar or "too long" in str(pytest.raises(hc.ConfigError, hc.parse_duration, text).value)
    else:
        assert grammar and abs(value) <= 2**63 / 1e9


def holds_the_law(text):
    """For this text, parse_yaml returns what PyYAML's BaseLoader returns, or raises ConfigError."""
    try:
        data, lines = hc.parse_yaml(text)
    except hc.ConfigError as error:
        assert error.line >= 1 and "\n" not in str(error)
        return False
    assert data == yaml.load(text, Loader=yaml.BaseLoader)
    for path, line in lines.items():
        row = re.split("\r\n|\r|\n", text)[line - 1]
        assert row.count(":") >= 1 and len(path) >= 1
    return True


FRAGMENTS = [
    "a", "b", "key", "x: y", "- ", "? ", ": ", ":", "#", " #", "'", '"', "''", "\\n", "\\x41", "\\u263a", "\\", "{", "}",
    "[", "]", ",", "&a", "*a", "!t", "|", ">", "%", "@", "`", "<<", "---", "...", "\n", "\n", "\n  ", "\n    ", "\r\n",
    "\r", "\t", " ", "  ", "é", "\xa0", "\ufeff", "\u2028", "\x85", "\x07", "1", "~", "-", "?", "=", "a: b", "\n  a: b",
    "\nc: 'd'", '\ne: "f"', "\n# c", "\ufffe", "😀", "\n--- ", "\n...\n", " : ", "a:\n", "\ud800", "\0",
]  # fmt: skip
DOCUMENTS = [
    EXAMPLE,
    "a: b\n",
    "checks:\n  n:\n    e: 'x'\n    t: \"y\\n\"\n  m:\n    q: 1 # c\nz: -1\n",
    "---\n'a b': c\n\"k\\\"\" : ?x\n...\n",
    "\ufeff  a: ''\r\n  b:\r\n      c: :d\r\n  e: -\r\n",
]


@hypothesis.given(st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join))
def test_the_law_of_the_parser_for_fragments(text):
    holds_the_law(text)


@hypothesis.given(st.text(max_size=40))
def test_the_law_of_the_parser_for_raw_text(text):
    holds_the_law(text)


@hypothesis.given(
    st.sampled_from(DOCUMENTS),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.sampled_from(FRAGMENTS)), min_size=1, max_size=4),
)
def test_the_law_of_the_parser_for_mutations_of_documents(text, changes):
    for place, cut, fragment in changes:
        at = int(place * len(text))
        text = text[:at] + fragment + text[at + cut :]
    holds_the_law(text)


scalars = st.text(st.characters(blacklist_categories=("Cs",)), max_size=12) | st.sampled_from(FRAGMENTS)
mappings = st.recursive(scalars, lambda inner: st.dictionaries(scalars, inner, min_size=1, max_size=3), max_leaves=8)


@hypothesis.given(
    st.dictionaries(scalars, mappings, min_size=1, max_size=3),
    st.sampled_from([None, "'", '"']),
    st.booleans(),
    st.integers(2, 8),
)
def test_the_law_of_the_parser_for_generated_documents(data, style, unicode, indent):
    text = yaml.dump(
        data, default_flow_style=False, default_style=style, allow_unicode=unicode, indent=indent, width=10**6
    )
    accepted = holds_the_law(text)
    # It may refuse what it names: what PyYAML writes on several lines, as a complex key, or with a tag.
    named = re.search(r"^ *(\?|!!)|[|>][-+0-9]*$|\t|\\u?d[89a-f]|[\x85\u2028\u2029\ufeff]|: !!|'\n|\n\n|\\$", text, re.M | re.I)
    assert accepted or named or re.search(r"(\"[^\"\n]*|'[^'\n]*)$", text, re.M), text


def dumped(**options):
    data = {
        "graceperiod": "10s", "frequency": "1m", "recovery": "true", "max_unhealthy": "40%",
        "checks": {
            "memcached": {"type": "tcp", "endpoint": "[::1]:11211", "threshold": "4"},
            "it's: odd": {"endpoint": "http://localhost/a?b=c&d#e", "headers": {"Host": "*.example", "X-A": " x: # '\" "}},
            "ключ": {"endpoint": "http://localhost/", "status": "200,204"},
        },
    }  # fmt: skip
    return data, yaml.dump(data, default_flow_style=False, **options)


@pytest.mark.parametrize("style", [None, "'", '"'])
@pytest.mark.parametrize("options", [{}, {"indent": 4}, {"explicit_start": True, "explicit_end": True}, {"allow_unicode": True},
                                     {"line_break": "\r\n"}, {"sort_keys": False}])  # fmt: skip
def test_block_style_yaml_dump_is_accepted(style, options):
    data, text = dumped(default_style=style, **options)
    if style and "'" in style:
        text = text.replace("? '", "'")
    assert hc.parse_yaml(text)[0] == data == yaml.load(text, Loader=yaml.BaseLoader)


ANSIBLE = """\
checks:
    memcached:
        endpoint: localhost:11211
        frequency: 10s
        threshold: 4
        type: tcp
    nginx:
        endpoint: http://localhost:80/ping.html
        headers:
            Host: www.example.com
        tls_verify: true
frequency: 10s
graceperiod: 5m
"""
TERRAFORM = """\
"checks":
  "memcached":
    "endpoint": "localhost:11211"
    "threshold": 4
    "type": "tcp"
  "nginx":
    "endpoint": "http://localhost:80/ping.html?a=\\"b\\"\\u0026c=\\u003cd\\u003e"
    "headers":
      "Host": "www.example.com"
    "timeout": "1s"
    "tls_verify": true
"frequency": "10s"
"graceperiod": "10s"
"""


@pytest.mark.parametrize("text", [EXAMPLE, ANSIBLE, TERRAFORM, TERRAFORM.replace("\n", "\r\n"), "\ufeff" + ANSIBLE])
def test_what_peoples_tools_write_is_accepted(text):
    assert holds_the_law(text)


def test_the_lines_of_the_key_paths_are_those_of_the_text():
    _, lines = hc.parse_yaml("# a comment\n\n---\na: 1\r\nb:\r  c:\n\n    d: x # y\n  e: 'z'\n")
    assert lines == {("a",): 4, ("b",): 5, ("b", "c"): 6, ("b", "c", "d"): 8, ("b", "e"): 9}


@pytest.mark.parametrize(
    "text, line, name",
    [
        ("a:\n  - b\n", 2, "a sequence"), ("- a\n", 1, "a sequence"), ("a: - b\n", 1, "a sequence"), ("a: -\n", 1, "a sequence"),
        ("a: [1, 2]\n", 1, "a flow sequence"), ("a: {b: c}\n", 1, "a flow mapping"), ("{a: b}\n", 1, "a flow mapping"),
        ("a: &x b\n", 1, "an anchor"), ("&x a: b\n", 1, "an anchor"), ("a: *x\n", 1, "an alias"), ("a: !!str b\n", 1, "a tag"),
        ("a: |\n  b\n", 1, "a block scalar"), ("a: >-\n  b\n", 1, "a block scalar"), ("? a\n: b\n", 1, "a complex key"),
        ("a: b\n<<: c\n", 2, "a merge key"), ("%YAML 1.1\n---\na: b\n", 1, "a directive"), ("a: @b\n", 1, "a reserved character"),
        ("a: `b\n", 1, "a reserved character"), ("a: b\n---\nc: d\n", 2, "a second document"), ("---\n---\na: b\n", 2, "a second document"),
        ("a: b\n...\nc: d\n", 3, "a second document"), ("a:\n\tb: c\n", 2, "a tab"), ("a:\tb\n", 1, "a tab"), ("a: 'b\tc'\n", 1, "a tab"),
        ("a: b\x07\n", 1, "U+0007"), ("a: b\nc: \x85\n", 2, "U+0085"), ("a: \u2028b\n", 1, "U+2028"), ("a: b\ufeff\n", 1, "U+FEFF"),
        ("\ufeff\ufeffa: b\n", 1, "U+FEFF"),
        ("a: \ud800\n", 1, "U+D800"), ("# \0\n", 1, "U+0000"), ("a: 'b\n  c'\n", 1, "a quoted value that does not end on its line"),
        ('a: "b\n', 1, "a quoted value that does not end on its line"), ("a: b\n  c\n", 2, "a value of several lines"), ("--- !!map\na: b\n", 1, "a tag"), ("a:\n  b: c\n   d\n", 3, "a value of several lines"),
        ("a: b\n  c: d\n", 2, "indentation"), ("a:\n    b: c\n  d: e\n", 3, "indentation"), ("  a: b\nc: d\n", 2, "indentation"),
        ("a: 'b' c\n", 1, "text after a quote"), ("'a' b: c\n", 1, "text after a quote"), ("a: b: c\n", 1, "': ' in a value"),
        ("a: b:\n", 1, "': ' in a value"), ("a: b\nc: d\na: e\n", 3, "already"), ("a\n", 1, "no key and value"), (": a\n", 1, "no key and value"),
        ('a: "\\q"\n', 1, "is no escape"), ('a: "\\ud800"\n', 1, "is no escape"), ('a: "\\U00110000"\n', 1, "is no escape"),
        ("", 1, "empty"), ("# nothing\n", 1, "empty"), ("---\n...\n", 1, "empty"), ("\n".join(" " * i + "a:" for i in range(30)), 21, "too deep"),
        ("k" * 1025 + ": v\n", 1, "too long"),
    ],
)  # fmt: skip
def test_what_is_outside_of_the_subset_is_refused_by_name(text, line, name):
    error = pytest.raises(hc.ConfigError, hc.parse_yaml, text).value
    assert name in error.problem and error.line == line
    assert not holds_the_law(text)


def test_a_key_may_be_as_long_as_in_yaml():
    assert holds_the_law("k" * 1024 + ": v\n")


def test_json_comes_as_the_text_that_was_written():
    data, lines = hc.parse_json('{"a": 1.50,\n "b": {"c": true,\n\n "d": "x:y", "e": -0}, "f": "{\\"a\\": [1"}')
    assert data == {"a": "1.50", "b": {"c": True, "d": "x:y", "e": "-0"}, "f": '{"a": [1'}
    assert lines == {("a",): 1, ("b",): 2, ("b", "c"): 2, ("b", "d"): 4, ("b", "e"): 4, ("f",): 4}


@pytest.mark.parametrize(
    "text, line, name",
    [
        ('{"a": 1,\n "a": 2}', 2, "already"), ('{"a": {"b": 1,\n\n"b": 2}}', 3, "already"), ('{"a": 1', 1, "no JSON"),
        ('{"a":\n 1,}', 2, "no JSON"), ('{"checks":\n [1]}', 2, "a list"), ("{" + '"a":{' * 100000, 1, "nested too deep"),
        ('{"a": 1}\n{"b": 2}', 2, "no JSON"), ('{"a": "\t"}', 1, "no JSON"),
    ],
)  # fmt: skip
def test_bad_json_is_refused_with_its_line(text, line, name):
    error = pytest.raises(hc.ConfigError, hc.parse_json, text).value
    assert name in error.problem and error.line == line


# ---- Configuration -----------------------------------------------------------------------------


def configured(text, source="f.yml"):
    return hc.Config.from_text(textwrap.dedent(text), source)


def check_of(text):
    """The one check of a configuration with these lines below its name."""
    return configured("checks:\n  web:\n" + textwrap.indent(textwrap.dedent(text), "    ")).checks[0]


def test_the_originals_example_loads_as_it_stands():
    config = configured(EXAMPLE)
    memcached, nginx = config.checks
    assert (config.graceperiod, config.frequency, config.recovery, config.max_unhealthy) == (10, 10, True, None)
    assert (memcached.type, memcached.timeout, memcached.threshold, memcached.frequency) == ("tcp", 1, 4, 10)
    assert (nginx.type, nginx.timeout, nginx.threshold, nginx.frequency) == ("http", 1, 10, 1)
    assert (str(memcached.endpoint), str(nginx.endpoint)) == ("localhost:11211", "http://localhost:80/ping.html")
    assert nginx.status == ((200, 200),) and nginx.headers == () and nginx.tls_verify is True
    assert config.warnings == ("f.yml:14: 'threashold' is read as 'threshold': correct the spelling",)


def test_what_is_left_out_has_the_defaults_of_the_contract():
    config = configured("checks:\n  web:\n    endpoint: http://localhost/\n")
    check = config.checks[0]
    assert (config.graceperiod, config.frequency, config.recovery, config.max_unhealthy) == (300, 10, True, None)
    assert (check.type, check.timeout, check.threshold, check.frequency) == ("http", 1, 3, 10)
    assert configured("frequency: 7s\nchecks:\n  web:\n    endpoint: http://localhost/\n").checks[0].frequency == 7


@pytest.mark.parametrize(
    "text, endpoint",
    [
        ("http://localhost", "http://localhost:80/"),
        ("HTTPS://Example.COM?a=b#c", "https://example.com:443/?a=b"),
        ("http://[::1]:8080/a%20b?c=d/e?f", "http://[::1]:8080/a%20b?c=d/e?f"),
        ("http://127.0.0.1:8080/ping.html", "http://127.0.0.1:8080/ping.html"),
        ("http://a_b.c-d.:1/", "http://a_b.c-d.:1/"),
    ],
)
def test_http_endpoints(text, endpoint):
    assert str(check_of(f"endpoint: '{text}'").endpoint) == endpoint


@pytest.mark.parametrize(
    "text, host, port",
    [
        ("localhost:11211", "localhost", 11211), ("[::1]:80", "::1", 80), (":80", "localhost", 80), ("db:ssh", "db", 22),
        ("10.0.0.1:1", "10.0.0.1", 1), ("[::FFFF:1.2.3.4]:65535", "::ffff:1.2.3.4", 65535),
    ],
)  # fmt: skip
def test_tcp_endpoints(text, host, port):
    endpoint = check_of(f"type: TCP\nendpoint: '{text}'").endpoint
    assert (endpoint.scheme, endpoint.host, endpoint.port) == ("tcp", host, port)


@pytest.mark.parametrize("text", ["http", "HTTP", "Https", "https"])
def test_the_type_is_http_in_any_case(text):
    assert check_of(f"type: {text}\nendpoint: https://localhost/").type == "http"


@pytest.mark.parametrize(
    "text, ranges",
    [("200", ((200, 200),)), ("200,204", ((200, 200), (204, 204))), ("200-299, 404", ((200, 299), (404, 404))), ("101", ((101, 101),))],
)
def test_status_ranges(text, ranges):
    assert check_of(f"endpoint: http://localhost/\nstatus: {text}").status == ranges


@pytest.mark.parametrize("text, value", [("true", True), ("Yes", True), ("off", False), ("FALSE", False)])
def test_booleans(text, value):
    assert check_of(f"endpoint: http://localhost/\ntls_verify: {text}").tls_verify is value


MISTAKES = [  # (the mistake, its line, what is said of it)
    ("", 1, "empty"),
    ("frequency: 10s\n", 1, "no checks: write at least one"),
    ("checks:\n", 1, "checks takes keys and values"),
    ("checks: web\n", 1, "checks takes keys and values"),
    ("checks:\n  web:\n", 2, "at least an endpoint"),
    ("checks:\n  web: x\n", 2, "at least an endpoint"),
    ("checks:\n  web:\n    type: tcp\n", 2, "check 'web' has no endpoint"),
    ("checks:\n  '':\n    endpoint: http://localhost/\n", 2, "printable name"),
    ('checks:\n  "a\\nb":\n    endpoint: http://localhost/\n', 2, "printable name"),
    ("frequence: 10s\n", 1, "unknown key 'frequence': did you mean frequency?"),
    ("zzz: 10s\n", 1, "write one of graceperiod, frequency"),
    ("threashold: 3\n", 1, "unknown key 'threashold'"),
    ("a: b\nchecks:\n- c\n", 3, "a sequence"),
    ("graceperiod: 10\n", 1, "graceperiod: '10' is no duration: write numbers with units"),
    ("graceperiod: -1s\n", 1, "graceperiod: '-1s' will not do"),
    ("graceperiod: 25h\n", 1, "graceperiod: '25h' will not do"),
    ("graceperiod: ''\n", 1, "graceperiod takes one value"),
    ("graceperiod:\n  a: b\n", 1, "graceperiod takes one value"),
    ("frequency: 0\n", 1, "more than 0 and at most 24h"),
    ("frequency: 24h1ns\n", 1, "more than 0 and at most 24h"),
    ("recovery: maybe\n", 1, "write true or false"),
    ("max_unhealthy: 40\n", 1, "write a percentage"),
    ("max_unhealthy: 0%\n", 1, "write a percentage"),
    ("max_unhealthy: 101%\n", 1, "write a percentage"),
    ("max_unhealthy: 4%0\n", 1, "write a percentage"),
    ("max_unhealthy: 40% of the group\n", 1, "write a percentage"),
    ("checks:\n  " + "n" * 101 + ":\n    endpoint: http://localhost/\n", 2, "at most 100 characters"),
]
CHECK_MISTAKES = [  # below a check, whose first line is 3
    ("endpoint: http://localhost/\nthreshold: 0\n", 4, "threshold: '0' will not do: write a whole number"),
    ("endpoint: http://localhost/\nthreshold: 03\n", 4, "whole number"),
    ("endpoint: http://localhost/\nthreshold: 3.0\n", 4, "whole number"),
    ("endpoint: http://localhost/\nthreshold: 1_0\n", 4, "whole number"),
    ("endpoint: http://localhost/\nthreshold: ٣\n", 4, "whole number"),
    ("endpoint: http://localhost/\nthreshold: 1000000\n", 4, "whole number"),
    ("endpoint: http://localhost/\nthreshold: 3\nthreashold: 4\n", 5, "threshold is written twice"),
    ("endpoint: http://localhost/\ntimeout: 0s\n", 4, "timeout: '0s'"),
    ("endpoint: http://localhost/\nport: 80\n", 4, "unknown key 'port'"),
    ("endpoint: http://localhost/\nHeaders: x\n", 4, "did you mean headers?"),
    ("endpoint: http://localhost/\ntype: udp\n", 4, "write tcp or http"),
    ("endpoint: localhost:80\n", 3, "'localhost:80' is not a URL"),
    ("endpoint: ftp://localhost/\n", 3, "is not a URL"),
    ("endpoint: http:///\n", 3, "is not a URL with a valid host and port"),
    ("endpoint: http://localhost:0/\n", 3, "is not a URL with a valid host and port"),
    ("endpoint: http://localhost:65536/\n", 3, "is not a URL with a valid host and port"),
    ("endpoint: http://localhost:x-y-z/\n", 3, "is not a URL with a valid host and port"),
    ("endpoint: http://[::g]/\n", 3, "is not a URL"),
    ("endpoint: http://[1:2]/\n", 3, "is not a URL with a valid host and port"),
    ("endpoint: http://a..b/\n", 3, "is not a URL"),
    ("endpoint: http://user@localhost/\n", 3, "write an Authorization header"),
    ("endpoint: http://user:pass@localhost/\n", 3, "write an Authorization header"),
    ("endpoint: 'http://localhost/a b'\n", 3, "is not a URL"),
    ('endpoint: "http://localhost/a\\r\\nX: y"\n', 3, "is not a URL"),
    ("endpoint: http://localhost/é\n", 3, "is not a URL"),
    ("endpoint: http://" + "a" * 64 + "/\n", 3, "is not a URL"),
    ("type: tcp\nendpoint: localhost\n", 4, "is not host:port"),
    ("type: tcp\nendpoint: localhost:80/a\n", 4, "is not host:port"),
    ("type: tcp\nendpoint: tcp://localhost:80\n", 4, "is not host:port"),
    ("type: tcp\nendpoint: http://localhost:80\n", 4, "is not host:port"),
    ("type: tcp\nendpoint: ::1:80\n", 4, "is not host:port"),
    ("type: tcp\nendpoint: localhost:no-such-service\n", 4, "is not host:port with a valid host and port"),
    ("type: tcp\nendpoint: localhost:0\n", 4, "is not host:port with a valid host and port"),
    ("type: tcp\nendpoint: localhost:80\nstatus: 200\n", 5, "status is for http checks"),
    ("type: tcp\nendpoint: localhost:80\ntls_verify: true\n", 5, "tls_verify is for http checks"),
    ("type: tcp\nheaders:\n  Host: a\nendpoint: localhost:80\n", 4, "headers is for http checks"),
    ("endpoint: http://localhost/\nstatus: 2xx\n", 4, "write codes of 200 to 599"),
    ("endpoint: http://localhost/\nstatus: 103\n", 4, "write codes"),
    ("endpoint: http://localhost/\nstatus: 299-200\n", 4, "write codes"),
    ("endpoint: http://localhost/\nstatus: 200,\n", 4, "write codes"),
    ("endpoint: http://localhost/\nstatus: 600\n", 4, "write codes"),
    ("endpoint: http://localhost/\nheaders: x\n", 4, "headers takes keys and values"),
    ("endpoint: http://localhost/\nheaders:\n  a b: c\n", 5, "no header name"),
    ("endpoint: http://localhost/\nheaders:\n  a: b\n  A: c\n", 6, "twice"),
    ("endpoint: http://localhost/\nheaders:\n  Content-Length: 5\n", 5, "remove it"),
    ('endpoint: http://localhost/\nheaders:\n  a: "b\\r\\nc: d"\n', 5, "printable ASCII"),
    ('endpoint: http://localhost/\nheaders:\n  a: "b\\n"\n', 5, "printable ASCII"),
    ("endpoint: http://localhost/\nheaders:\n  a: é\n", 5, "printable ASCII"),
    ("endpoint: http://localhost/\nheaders:\n  a:\n    b: c\n", 5, "printable ASCII"),
    ("endpoint: http://localhost/\nheaders:\n  Authorization:\n", 5, "printable ASCII"),
    ("endpoint: http://localhost/\nheaders:\n  X: ''\n", 5, "printable ASCII"),
    ("endpoint: http://localhost/\nheaders:\n  X: null\n", 5, "printable ASCII"),
    ("endpoint: http://localhost/\nheaders:\n  X: y\n  Host: a b\n", 6, "is no host"),
    ("endpoint: http://localhost/\nheaders:\n  Host: http://www.example.com\n", 5, "is no host"),
    ("endpoint: http://localhost/\nheaders:\n  host: www.example.com/ping\n", 5, "is no host"),
    ("endpoint: http://localhost/\nheaders: 'Authorization: s3cret'\n", 4, "headers takes keys and values"),
    ("endpoint: http://localhost:" + "1" * 5000 + "/\n", 3, "is not a URL"),
    ("endpoint: http://10.0.0.300/\n", 3, "is not a URL with a valid host and port"),
    ("endpoint: http://127.1/\n", 3, "is not a URL with a valid host and port"),
    ("endpoint: http://./\n", 3, "is not a URL"),
    ("endpoint: http://a../\n", 3, "is not a URL"),
    ("endpoint: http://user:s3cr/et@host/\n", 3, "write an Authorization header"),
    ("endpoint: http://localhost/100%\n", 3, "is not a URL"),
    ("endpoint: http://localhost/%zz\n", 3, "is not a URL"),
    ("type: tcp\nendpoint: localhost:80#8080\n", 4, "is not host:port"),
]
MISTAKES += [("checks:\n  web:\n" + textwrap.indent(text, "    "), line, said) for text, line, said in CHECK_MISTAKES]


@pytest.mark.parametrize("text, line, said", MISTAKES)
def test_every_mistake_is_one_line_that_says_where_and_what(text, line, said):
    error = str(pytest.raises(hc.ConfigError, hc.Config.from_text, text, "f.yml").value)
    assert error.startswith(f"f.yml:{line}: ") and said in error
    assert error.isprintable() and len(error) < 300 and "s3cr" not in error


def test_json_is_validated_as_yaml_is():
    config = configured(
        '{"graceperiod": 0, "recovery": false, "checks":\n {"web": {"endpoint": "http://localhost/", "threshold": 4,'
        ' "status": 204, "headers": {"X": "y"}}}}'
    )
    check = config.checks[0]
    assert (config.graceperiod, config.recovery, check.threshold, check.status) == (0, False, 4, ((204, 204),))
    for text, said in [
        ('{"graceperiod": 10}', "f:1: graceperiod: '10' is no duration"),
        ('{"checks":\n {"web":\n {"endpoint": null}}}', "f:3: endpoint takes one value"),
        ('{"checks":\n {"web":\n {"endpoint": "http://a/",\n"thresh": 1}}}', "f:4: unknown key 'thresh'"),
        ('{"checks": {"w": {"endpoint": "http://a/", "headers": {"X": 5}}}}', None),
        ('{"checks": {"\\ud800": {"endpoint": "http://a/"}}}', "printable name"),
        ('{"recovery": 1}', "write true or false"),
    ]:
        if said:
            assert said in str(pytest.raises(hc.ConfigError, hc.Config.from_text, text, "f").value)
        else:
            assert hc.Config.from_text(text, "f").checks[0].headers == (("X", "5"),)


@hypothesis.given(
    st.sampled_from([EXAMPLE, ANSIBLE, TERRAFORM, '{"checks": {"w": {"endpoint": "http://a/", "headers": {"X": "y"}}}}']),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 6), st.text(max_size=3)), min_size=1, max_size=3),
)
def test_any_text_is_a_configuration_or_one_line_about_it(text, changes):
    for place, cut, insert in changes:
        at = int(place * len(text))
        text = text[:at] + insert + text[at + cut :]
    try:
        config = hc.Config.from_text(text, "f")
    except hc.ConfigError as error:
        assert re.match(r"f:\d+: .", str(error)) and str(error).isprintable()
    else:
        assert json.dumps(config.as_dict()) and config.checks


# ---- Probes ------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(talk, host="127.0.0.1"):
    """A server on loopback that has `talk(connection)` with each client; yields its port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen(64)

        def converse(connection):
            with connection, contextlib.suppress(OSError):
                talk(connection)

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=converse, args=[listener.accept()[0]], daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def read_head(connection):
    head = b""
    while b"\r\n\r\n" not in head:
        data = connection.recv(4096)
        if not data:
            break
        head += data
    return head.decode("latin-1")


def answering(*answers, heads=None):
    """A talk that reads a request and sends the next of these answers, the last one again and again."""
    remaining = collections.deque(answers)

    def talk(connection):
        head = read_head(connection)
        if heads is not None:
            heads.append(head)
        connection.sendall((remaining.popleft() if len(remaining) > 1 else remaining[0]).encode("latin-1"))

    return talk


OK = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def redirect(location, status=302):
    return f"HTTP/1.1 {status} Moved\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n"


def http_check(port, lines="", host="127.0.0.1", path="/", scheme="http", timeout="5s"):
    return check_of(f"endpoint: '{scheme}://{host}:{port}{path}'\ntimeout: {timeout}\n" + lines)


def failure_of(check):
    """Why a probe of this check fails."""
    probe = hc.probe_tcp if check.type == "tcp" else hc.probe_http
    reason = pytest.raises(hc.ProbeFailure, probe, check).value.reason
    assert reason.isprintable() and 0 < len(reason) <= 200
    return reason


def test_a_request_says_what_the_contract_says():
    heads = []
    with serving(answering(OK, heads=heads)) as port:
        hc.probe_http(http_check(port, path="/a?b=c"))
        hc.probe_http(http_check(port, lines="headers:\n  host: www.example.com\n  user-agent: mine\n  X-A: b\n"))
    lines = heads[0].split("\r\n")
    assert lines[0] == "GET /a?b=c HTTP/1.1"
    assert f"Host: 127.0.0.1:{port}" in lines and "Connection: close" in lines
    assert f"User-Agent: ec2-local-healthchecker/{hc.__version__}" in lines
    lines = heads[1].split("\r\n")
    assert "host: www.example.com" in lines and "user-agent: mine" in lines and "X-A: b" in lines
    assert len(re.findall("(?im)^(host|user-agent):", heads[1])) == 2


def test_the_default_port_is_left_out_of_host():
    class Stream:
        sent = b""

        def sendall(self, data):
            self.sent += data

    import http.client

    for host, port, expected in (("localhost", 80, "localhost"), ("::1", 80, "[::1]"), ("localhost", 81, "localhost:81")):
        connection = http.client.HTTPConnection(host, port)
        connection.default_port, connection.sock = 80, Stream()
        connection.request("GET", "/")
        assert f"\r\nHost: {expected}\r\n".encode() in connection.sock.sent


@pytest.mark.parametrize("status, passes", [(200, True), (204, True), (299, True), (300, False), (404, True), (503, False)])
def test_a_probe_passes_when_the_final_code_is_listed(status, passes):
    with serving(answering(f"HTTP/1.1 {status} Some Text\r\n\r\n")) as port:
        check = http_check(port, lines="status: 200-299,404\n")
        if passes:
            hc.probe_http(check)
        else:
            assert failure_of(check) == f"HTTP status {status} Some Text"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_with_the_headers_to_the_same_origin(status):
    heads = []
    with serving(answering(redirect("/there?x", status), OK, heads=heads)) as port:
        hc.probe_http(http_check(port, lines="headers:\n  Authorization: secret\n"))
    assert heads[1].startswith("GET /there?x HTTP/1.1\r\n") and "Authorization: secret" in heads[1]


def test_a_redirect_whose_code_is_listed_is_the_final_answer():
    heads = []
    with serving(answering(redirect("/there"), OK, heads=heads)) as port:
        hc.probe_http(http_check(port, lines="status: 302\n"))
    assert len(heads) == 1


def test_another_origin_does_not_get_the_configured_headers():
    heads, others = [], []
    with serving(answering(OK, heads=others)) as other:
        with serving(answering(redirect(f"http://127.0.0.1:{other}/x"), heads=heads)) as port:
            hc.probe_http(http_check(port, lines="headers:\n  Authorization: secret\n  Host: www.example.com\n"))
    assert "secret" in heads[0] and "secret" not in others[0] and f"Host: 127.0.0.1:{other}\r\n" in others[0]


def test_ten_redirects_are_followed_and_no_more():
    heads = []
    with serving(answering(*[redirect("/")] * 10, OK, heads=heads)) as port:
        hc.probe_http(http_check(port))
    assert len(heads) == 11
    heads.clear()
    with serving(answering(redirect("/"), heads=heads)) as port:
        assert failure_of(http_check(port)) == "more than 10 redirects"
    assert len(heads) == 11


@pytest.mark.parametrize(
    "location",
    [
        "ftp://localhost/", "javascript:alert(1)", "http://[::1", "http://a..b/", "http://u:p@localhost/", "file:///etc/passwd",
        "http://localhost:99999/", "http://localhost:x/", "https:///a", "http://\xe9\xff/", "http://a b/", "mailto:x@y",
    ],
)  # fmt: skip
def test_a_redirect_to_nonsense_is_a_failure_of_the_service(location):
    with serving(answering(redirect(location))) as port:
        assert "redirected to" in failure_of(http_check(port))


def test_a_redirect_may_need_encoding():
    heads = []
    with serving(answering(redirect("/a b\xe9?c#d"), OK, heads=heads)) as port:
        hc.probe_http(http_check(port))
    assert heads[1].startswith("GET /a%20b%E9?c HTTP/1.1\r\n")


@pytest.mark.parametrize("location", ["/there \t", "/there\r\nLocation: /there", "/there\r\nLocation: /elsewhere"])
def test_the_first_location_is_followed_without_its_white_space(location):
    heads = []
    with serving(answering(redirect(location), OK, heads=heads)) as port:
        hc.probe_http(http_check(port))
    assert heads[1].startswith("GET /there HTTP/1.1\r\n")


def test_a_redirect_without_location_fails_by_its_code():
    with serving(answering("HTTP/1.1 302 Found\r\n\r\n")) as port:
        assert failure_of(http_check(port)) == "HTTP status 302 Found"


@pytest.mark.parametrize("interim", ["100 Continue", "102 Processing", "103 Early Hints"])
def test_interim_responses_are_skipped(interim):
    head = f"HTTP/1.1 {interim}\r\nLink: </a>\r\n\r\n"
    with serving(answering(head * 3 + OK)) as port:
        hc.probe_http(http_check(port))


def test_switching_protocols_is_a_final_response():
    with serving(answering("HTTP/1.1 101 Switching Protocols\r\n\r\n" + OK)) as port:
        hc.probe_http(http_check(port, lines="status: 101\n"))
        assert failure_of(http_check(port)) == "HTTP status 101 Switching Protocols"


@pytest.mark.parametrize(
    "answer, reason",
    [
        ("", "RemoteDisconnected"), ("SSH-2.0-OpenSSH_9.2\r\n", "BadStatusLine"), ("HTTP/1.1 abc\r\n\r\n", "BadStatusLine"),
        ("HTTP/3 200 OK\r\n\r\n", "UnknownProtocol"), ("HTTP/1.1 99999 OK\r\n\r\n", "BadStatusLine"),
        ("HTTP/1.1 200 " + "a" * 70000, "LineTooLong"), ("HTTP/1.1 200 OK\r\n" + "a: b\r\n" * 101, "more than 100 headers"),
        ("HTTP/1.1 200 OK\r\na: " + "b" * 70000 + "\r\n\r\n", "LineTooLong"),
        ("HTTP/1.1 200 OK\r\nFoo: ba", "the connection ended within the head"), ("HTTP/1.1 200", "the connection ended within the head"),
        ("HTTP/1.1 200 OK\r\nContent-Type: multipart/mixed; boundary*=a; boundary*0=b\r\n\r\n", "unreadable headers, TypeError"),
        ("HTTP/1.1 200 OK\r\n" + "Content-Type: message/rfc822\r\r" * 2000 + "\r\n\r\n", "unreadable headers, RecursionError"),
        ("\x00\x1b[31m\r\n\r\n", "BadStatusLine"), ("HTTP/1.1 500 \x1b[31mred\x07\x9b\r\n\r\n", r"HTTP status 500 \x1b[31mred\x07\x9b"),
        ("HTTP/1.1 500 " + "x" * 1000 + "\r\n\r\n", "HTTP status 500 x"),
    ],
)  # fmt: skip
def test_a_server_that_lies_fails_with_a_printable_reason(answer, reason):
    with serving(answering(answer)) as port:
        assert reason in failure_of(http_check(port))


def test_a_server_that_resets_the_connection_fails():
    def talk(connection):
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with serving(talk) as port:
        assert "reset" in failure_of(http_check(port))


def endless(unit, pause):
    def talk(connection):
        read_head(connection)
        for data in itertools.cycle([unit]):
            connection.sendall(data)
            time.sleep(pause)

    return talk


@pytest.mark.parametrize(
    "talk",
    [
        lambda connection: time.sleep(PATIENCE),
        lambda connection: [read_head(connection), time.sleep(PATIENCE)],
        endless(b"H", 0.02),
        endless(b"HTTP/1.1 100 Continue\r\n\r\n", 0),
        endless(b"HTTP/1.1 103 Early Hints\r\n\r\n", 0),
        lambda connection: [connection.sendall(b"HTTP/1.1 200 OK\r\n"), endless(b"a", 0.02)(connection)],
        lambda connection: [answering(OK[:-6])(connection), time.sleep(PATIENCE)],
        lambda connection: [time.sleep(0.15), answering(redirect("/"))(connection)],
    ],
    ids=["silent", "stalls", "drips", "endless-100", "endless-103", "drips-a-header", "half-a-head", "slow-redirects"],
)
def test_no_server_gets_more_time_than_the_timeout(talk):
    with serving(talk) as port:
        start = time.monotonic()
        reason = failure_of(http_check(port, timeout="400ms"))
        # The load of a noisy machine may add to it, but a dripping server must not: it would for ever.
        assert 0.39 < time.monotonic() - start < 5
    assert "timed out after 0.4s" in reason


def test_the_body_is_not_read():
    with serving(lambda connection: [answering(OK[:-2])(connection), time.sleep(PATIENCE)]) as port:
        hc.probe_http(http_check(port))


def test_tcp_passes_when_something_listens_and_fails_when_nothing_does():
    with serving(lambda connection: None) as port:
        hc.probe_tcp(check_of(f"type: tcp\nendpoint: 127.0.0.1:{port}"))
    reason = failure_of(check_of(f"type: tcp\nendpoint: 127.0.0.1:{port}"))
    assert reason == f"127.0.0.1 port {port}: Connection refused"


def test_ipv6_endpoints_are_probed():
    heads = []
    with serving(answering(OK, heads=heads), "::1") as port:
        hc.probe_tcp(check_of(f"type: tcp\nendpoint: '[::1]:{port}'"))
        hc.probe_http(http_check(port, host="[::1]"))
    assert [head for head in heads if f"Host: [::1]:{port}\r\n" in head]


def test_an_unknown_host_is_a_failure_of_the_service():
    assert "cannot resolve no.such.host.invalid" in failure_of(check_of("type: tcp\nendpoint: no.such.host.invalid:80\ntimeout: 50s"))


def deaf_listener(address):
    """A listener whose queue is full: it answers no further connection, as a dead machine would not."""
    listener = socket.socket()
    listener.bind(address)
    listener.listen(0)
    crowd = []
    for _ in range(3):
        crowd.append(socket.socket())
        crowd[-1].setblocking(False)
        crowd[-1].connect_ex(listener.getsockname())
    return listener, crowd


def test_a_service_that_no_longer_accepts_fails_at_the_deadline():
    listener, crowd = deaf_listener(("127.0.0.1", 0))
    with listener:
        reason = failure_of(check_of(f"type: tcp\nendpoint: 127.0.0.1:{listener.getsockname()[1]}\ntimeout: 3s"))
        assert reason == f"timed out after 3s connecting to 127.0.0.1 port {listener.getsockname()[1]}"
    for sock in crowd:
        sock.close()


@pytest.mark.parametrize("dead", [1, 20])
def test_dead_first_addresses_do_not_keep_the_others_from_being_tried_in_time(monkeypatch, dead):
    with serving(lambda connection: None) as port, contextlib.ExitStack() as stack:
        addresses = [f"127.0.0.{number}" for number in range(2, 2 + dead)]
        for address in addresses:
            listener, crowd = deaf_listener((address, port))
            for sock in [listener, *crowd]:
                stack.enter_context(sock)
        rows = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in [*addresses, "127.0.0.1"]]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: rows)
        before = len(os.listdir("/proc/self/fd"))
        start = time.monotonic()
        hc.probe_tcp(check_of(f"type: tcp\nendpoint: many:{port}\ntimeout: 8s"))  # or it fails
        assert min(0.25, 0.9 * 4 / (dead + 1)) * dead < time.monotonic() - start
        wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before, "the losers of the race to be closed")


def test_when_every_address_fails_every_reason_is_told(monkeypatch):
    rows = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 1)) for address in ("127.0.0.1", "127.0.0.2")]
    rows.insert(0, (999, socket.SOCK_STREAM, 6, "", ("::1", 1)))  # as ::1 is where IPv6 is disabled
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: rows)
    reason = failure_of(check_of("type: tcp\nendpoint: many:1"))
    assert reason == "; ".join(
        ["::1 port 1: Address family not supported by protocol"]
        + [f"{address} port 1: Connection refused" for address in ("127.0.0.1", "127.0.0.2")]
    )


def in_namespace(*commands, **options):
    """Run shell commands in a network and a mount namespace of their own, with loopback up."""
    script = "\n".join(["set -e", "ip link set lo up", *commands])
    run = ["unshare", "--net", "--mount", "bash", "-c", script]
    return subprocess.run(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, timeout=PATIENCE, **options)


def test_a_service_that_resets_what_it_accepted_has_accepted_it():
    reset = struct.pack("ii", 1, 0)
    with serving(lambda connection: connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)) as port:
        for _ in range(200):
            hc.probe_tcp(check_of(f"type: tcp\nendpoint: 127.0.0.1:{port}\ntimeout: 1m"))


def test_a_port_that_nothing_listens_on_fails_even_where_the_kernel_would_connect_a_socket_to_itself():
    probe = (
        "import ec2_local_healthchecker as hc, socket\n"
        "for host in ('127.0.0.1', '0.0.0.0', '[::]', '[::1]'):\n"
        "    text = f'checks:\\n  a:\\n    type: tcp\\n    endpoint: \"{host}:40000\"\\n'\n"
        "    try: print(hc.probe_tcp(hc.Config.from_text(text, '').checks[0]))\n"
        "    except hc.ProbeFailure as failure: print(failure)\n"
        "service = socket.socket()\n"
        "service.bind(('127.0.0.1', 40000))\n"  # the probes have not taken the port of the service
    )
    done = in_namespace(
        "sysctl -q net.ipv4.ip_local_port_range='40000 40000'", f"exec {sys.executable} -c \"$PROBE\"",
        env={**os.environ, "PROBE": probe, "PYTHONPATH": str(HERE)},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all(line.endswith("port 40000: Connection refused") for line in lines), done.stdout


SCARCE = """
import os, resource, sys
import ec2_local_healthchecker as hc
port, spare = map(int, sys.argv[1:])
lines = "checks:\\n  a:\\n    type: %s\\n    endpoint: '%s'\\n    timeout: 30s\\n"
checks = [hc.Config.from_text(lines % form, "").checks[0] for form in
          (("tcp", f"localhost:{port}"), ("http", f"http://localhost:{port}/"), ("https", f"https://localhost:{port}/"))]
probes = [hc.probe_tcp, hc.probe_http, hc.probe_http]
for check, probe in list(zip(checks, probes))[:2]:
    probe(check)  # with everything at hand, and whatever is imported late
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
hog = []
try:
    while True:
        hog.append(os.dup(0))
except OSError:
    for descriptor in hog[:spare]:
        os.close(descriptor)
for check, probe in zip(checks, probes):
    try:
        print(probe(check) or "passed")
    except BaseException as error:
        print(type(error).__name__, getattr(error, "errno", ""))
"""


@pytest.mark.parametrize("spare", range(8))
def test_own_lack_of_descriptors_is_no_evidence(spare):
    def talk(connection):
        if connection.recv(1, socket.MSG_PEEK) == b"G":
            answering(OK)(connection)

    with serving(talk) as port:
        run = [sys.executable, "-c", SCARCE, str(port), str(spare)]
        done = subprocess.run(run, stdout=subprocess.PIPE, universal_newlines=True, timeout=PATIENCE, cwd=HERE)
    results = done.stdout.splitlines()
    assert len(results) == 3 and {"passed", "OSError 24"} >= set(results[:2])
    assert results == ["OSError 24"] * 3 if spare == 0 else results[2] != "passed"


@pytest.fixture(scope="session")
def authority():
    return trustme.CA()


def tls_serving(authority, *names, talk=None, **options):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names, **options).configure_cert(context)

    def secure(connection):
        with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as secured:
            (talk or answering(OK))(secured)

    return serving(secure)


@pytest.fixture
def trusted(authority, tmp_path, monkeypatch):
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    yield authority


def test_a_trusted_certificate_passes(trusted):
    with tls_serving(trusted, "localhost", "127.0.0.1") as port:
        hc.probe_http(http_check(port, scheme="https"))
        hc.probe_http(http_check(port, scheme="https", host="localhost"))


def test_a_bad_certificate_fails_unless_verification_is_off(trusted):
    yesterday = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=1)
    for authority, names, options, reason in (
        (trustme.CA(), ["127.0.0.1"], {}, "certificate"),
        (trusted, ["www.example.com"], {}, "IP address mismatch"),
        (trusted, ["127.0.0.1"], {"not_after": yesterday}, "certificate has expired"),
    ):
        with tls_serving(authority, *names, **options) as port:
            assert reason in failure_of(http_check(port, scheme="https"))
            hc.probe_http(http_check(port, lines="tls_verify: false\n", scheme="https"))


def test_a_host_with_a_final_dot_is_verified_without_it(trusted, monkeypatch):
    with tls_serving(trusted, "localhost") as port:
        rows = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: rows)
        hc.probe_http(http_check(port, scheme="https", host="localhost."))


def test_authorities_that_could_not_be_read_are_read_again(authority, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))  # not there yet
    with tls_serving(authority, "127.0.0.1") as port:
        check = http_check(port, scheme="https")
        tls = hc.Tls(check)
        assert "certificate" in pytest.raises(hc.ProbeFailure, hc.probe_http, check, tls).value.reason
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        hc.probe_http(check, tls)
        context = tls.context
        hc.probe_http(check, tls)
        assert tls.context is context  # one for all attempts, while nothing is refused


def test_a_certificate_that_only_the_default_of_python_3_13_refuses_passes(tmp_path, monkeypatch):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime(2020, 1, 1)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now.replace(year=2099))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
        .add_extension(x509.BasicConstraints(True, None), False)  # not critical: RFC 5280 wants it so
        .sign(key, hashes.SHA256())
    )
    pem, key_pem = tmp_path / "cert.pem", tmp_path / "key.pem"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    formats = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    key_pem.write_bytes(key.private_bytes(*formats))
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, key_pem)

    def secure(connection):
        with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as secured:
            answering(OK)(secured)

    with serving(secure) as port:
        hc.probe_http(http_check(port, scheme="https", host="localhost"))


def test_a_redirect_to_https_is_verified(trusted):
    with tls_serving(trustme.CA(), "127.0.0.1") as secure, serving(answering(redirect(f"https://127.0.0.1:{secure}/"))) as port:
        assert "certificate" in failure_of(http_check(port))
        hc.probe_http(http_check(port, lines="tls_verify: false\n"))


def test_plain_http_where_tls_is_expected_fails():
    with serving(lambda connection: connection.sendall(connection.recv(9) and OK.encode())) as port:
        assert "SSL" in failure_of(http_check(port, scheme="https"))


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x03"])
def test_a_tls_handshake_that_stalls_or_drips_ends_at_the_deadline(sent):
    def talk(connection):
        for _ in range(PATIENCE * 20):
            connection.sendall(sent)
            time.sleep(0.05)

    with serving(talk) as port:
        start = time.monotonic()
        reason = failure_of(http_check(port, scheme="https", timeout="3s"))
        assert "TLS handshake" in reason or "SSL" in reason
        assert time.monotonic() - start < 40


def test_no_proxy_is_ever_used(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with serving(answering(OK)) as port:
        hc.probe_http(http_check(port))


# ---- EC2 and Auto Scaling ----------------------------------------------------------------------


class Metadata:
    """A double of instance metadata (IMDSv2) on loopback. `items` may be changed at any time; `fault` is
    called with each request first, and may answer it, delay it, or break it."""

    def __init__(self, instance="i-0123456789abcdef0", region="eu-west-1"):
        expiry = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=6)
        self.items = {
            "instance-id": instance,
            "placement/region": region,
            "autoscaling/target-lifecycle-state": "InService",
            "iam/security-credentials/": "role",
            "iam/security-credentials/role": json.dumps(
                {"Code": "Success", "AccessKeyId": "A", "SecretAccessKey": "S", "Token": "T", "Expiration": expiry.strftime("%Y-%m-%dT%H:%M:%SZ")}
            ),
        }  # fmt: skip
        self.requests = []
        self.fault = None
        double = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def answer(self, text, status=200):
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def do_PUT(self):
                self.do_GET()

            def do_GET(self):
                double.requests.append((self.command, self.path))
                if double.fault and double.fault(self):
                    return
                if self.command == "PUT" and self.path == "/latest/api/token":
                    ttl = int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"])
                    self.answer("TOKEN==" if 1 <= ttl <= 21600 else "", 200 if 1 <= ttl <= 21600 else 400)
                elif self.headers.get("X-aws-ec2-metadata-token") != "TOKEN==":
                    self.answer("", 401)
                else:
                    text = double.items.get(self.path.replace("/latest/meta-data/", "", 1))
                    self.answer(text or "Not Found", 404 if text is None else 200)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def metadata(monkeypatch):
    for name in ("INSTANCE_ID", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    double = Metadata()
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", double.url + "/")
    yield double
    double.stop()


def test_metadata_is_read_with_a_token(metadata):
    assert hc.read_metadata(hc.Seen()) == (hc.Seen("i-0123456789abcdef0", "eu-west-1", "InService"), "")
    assert metadata.requests[0] == ("PUT", "/latest/api/token")


def test_an_instance_without_a_target_lifecycle_state_has_none(metadata):
    del metadata.items["autoscaling/target-lifecycle-state"]
    assert hc.read_metadata(hc.Seen(lifecycle="Standby"))[0].lifecycle is None


def test_the_environment_replaces_what_metadata_says(metadata, monkeypatch):
    monkeypatch.setenv("INSTANCE_ID", "i-mine")
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    seen, _ = hc.read_metadata(hc.Seen())
    assert (seen.instance, seen.region, seen.id) == ("i-mine", "us-west-2", "i-0123456789abcdef0")


def test_metadata_gets_three_attempts(metadata):
    failing = iter([True, True, False])
    metadata.fault = lambda request: next(failing, False) and (request.answer("", 503) or True)
    before, reason = hc.read_metadata(hc.Seen())
    assert before.instance == "i-0123456789abcdef0" and not reason
    metadata.fault = lambda request: request.answer("", 503) or True
    metadata.requests.clear()
    assert hc.read_metadata(before) == (before, "HTTP status 503 for api/token, 0 characters")
    assert len(metadata.requests) == 3


def test_metadata_that_hangs_gets_a_second_for_each_attempt(metadata):
    metadata.fault = lambda request: time.sleep(PATIENCE) or True
    start = time.monotonic()
    assert "timed out after 1s" in hc.read_metadata(hc.Seen())[1]
    assert 2.9 < time.monotonic() - start < 20


def test_metadata_that_answers_with_a_web_page_is_not_believed(metadata):
    before = hc.Seen("i-1", "eu-west-1", "Standby")
    for page in ("<html> <body>\nlogin</body></html>", "<html></html>", "x" * 5000, ""):
        metadata.items = dict.fromkeys(metadata.items, page)
        seen, reason = hc.read_metadata(before)
        assert seen == before and "characters" in reason


def test_each_item_of_metadata_that_cannot_be_read_is_as_it_was(metadata):
    before = hc.Seen("i-old", "old-1", "Standby")
    for path, expected in (
        ("instance-id", hc.Seen("i-old", "eu-west-1", "InService")),
        ("placement/region", hc.Seen("i-0123456789abcdef0", "old-1", "InService")),
        ("autoscaling/target-lifecycle-state", hc.Seen("i-0123456789abcdef0", "eu-west-1", "Standby")),
    ):
        metadata.fault = lambda request: request.path.endswith(path) and (request.answer("", 500) or True)
        seen, reason = hc.read_metadata(before)
        assert seen == expected and path in reason


def test_a_truncated_answer_of_metadata_is_not_believed(metadata):
    def cut(request):
        if request.path.endswith("lifecycle-state"):
            request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\nInServ")
            request.close_connection = True
            return True

    metadata.fault = cut
    assert hc.read_metadata(hc.Seen())[0].lifecycle is None


@pytest.mark.parametrize("listed", ["", "internal.example", "*"])
def test_botocore_does_not_ask_metadata_through_a_proxy(metadata, monkeypatch, listed):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, listed)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    hc.bypass_proxy_for_metadata()
    from botocore.utils import get_environ_proxies

    for url in (metadata.url, "http://169.254.169.254/", "http://[fd00:ec2::254]/"):
        assert get_environ_proxies(url) == {}
    assert bool(get_environ_proxies("http://example.com/")) == (listed != "*")
    assert "internal.example" in os.environ["no_proxy"] or listed != "internal.example"


@pytest.fixture(scope="session")
def moto(tmp_path_factory):
    """moto's server as Auto Scaling, with a group of two instances."""
    import boto3

    port = free_port()
    log = tmp_path_factory.mktemp("moto") / "log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with open(log, "w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_until(lambda: server.poll() is not None or not socket.socket().connect_ex(("127.0.0.1", port)), "moto")
        options = {"region_name": "eu-west-1", "endpoint_url": f"http://127.0.0.1:{port}"}
        options.update(aws_access_key_id="A", aws_secret_access_key="S")
        api, ec2 = boto3.client("autoscaling", **options), boto3.client("ec2", **options)
        image = ec2.describe_images()["Images"][0]["ImageId"]
        api.create_launch_configuration(LaunchConfigurationName="config", ImageId=image, InstanceType="t3.nano")
        api.create_auto_scaling_group(
            AutoScalingGroupName="group", LaunchConfigurationName="config", MinSize=0, MaxSize=9, DesiredCapacity=2,
            AvailabilityZones=["eu-west-1a"],
        )  # fmt: skip
        yield Moto(api, options["endpoint_url"], log)
    finally:
        server.terminate()
        server.wait()


class Moto:
    def __init__(self, api, url, log):
        self.api, self.url, self.log = api, url, log

    def instances(self):
        return self.api.describe_auto_scaling_groups()["AutoScalingGroups"][0]["Instances"]

    def health(self, instance):
        return {row["InstanceId"]: row["HealthStatus"] for row in self.instances()}[instance]


class Answer(Exception):
    """An error as botocore raises it."""

    def __init__(self, code, text, status=400, retries=0):
        super().__init__(f"An error occurred ({code}) when calling the SetInstanceHealth operation: {text}")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status, "RetryAttempts": retries}}


def named(name, text=""):
    return type(name, (Exception,), {})(text)


@pytest.mark.parametrize(
    "error, advice",
    [
        (Answer("AccessDenied", "User: arn is not authorized to perform: autoscaling:SetInstanceHealth"), "allow autoscaling:SetInstanceHealth"),
        (Answer("ValidationError", "The age of the instance (986 seconds) is less than the configured grace period of 1500 seconds"), "grace period"),
        (Answer("ValidationError", "Instance Id not found - No managed instance found for instance ID: i-0"), "attach the instance to a group"),
        (Answer("ExpiredToken", "The security token included in the request is expired"), "clock"),
        (Answer("Throttling", "Rate exceeded"), "nothing to do here"),
        (Answer("ResourceContention", "x"), "the group is being changed"),
        (Answer("InternalFailure", "x", 500), "AWS has a fault"),
        (Answer("503", "Service Unavailable", 503), "AWS has a fault"),
        (named("NoCredentialsError", "Unable to locate credentials"), "whose role allows autoscaling:SetInstanceHealth"),
        (named("EndpointConnectionError", 'Could not connect to the endpoint URL: "https://x/"'), "routes"),
        (named("ReadTimeoutError", "Read timeout on endpoint URL"), "routes"),
        (named("ProxyConnectionError", "Failed to connect to proxy URL"), "proxy"),
        (ModuleNotFoundError("No module named 'boto3'"), "install the package python3-boto3"),
        (ImportError("SyntaxError: x"), "boto3 is missing or broken: install the package python3-boto3"),
        (named("DataNotFoundError", "Unable to load data for: autoscaling"), "install the package python3-boto3"),
        (ValueError("several\nlines\x1b"), ""),
    ],
)  # fmt: skip
def test_every_aws_error_becomes_one_line_that_says_what_to_do(error, advice):
    text = hc.explain(error, "SetInstanceHealth")
    assert advice in text and text.isprintable() and len(text) < 400
    assert (" -- " in text) == bool(advice)


@pytest.mark.parametrize(
    "error, refused",
    [
        (Answer("AccessDenied", "x", 403), True), (Answer("ValidationError", "x", 400), True), (Answer("X", "x", 500), False),
        (Answer("Throttling", "x", 400, retries=2), False), (named("ReadTimeoutError"), False), (MemoryError(), False),
    ],
)  # fmt: skip
def test_a_call_that_was_sent_may_have_acted_unless_the_only_answer_is_a_refusal(error, refused):
    assert hc.was_refused(error) is refused


@contextlib.contextmanager
def group_in(moto, name, size):
    """Another group of so many instances; yields their ids."""
    moto.api.create_auto_scaling_group(
        AutoScalingGroupName=name, LaunchConfigurationName="config", MinSize=0, MaxSize=size, DesiredCapacity=size,
        AvailabilityZones=["eu-west-1a"],
    )  # fmt: skip
    try:
        group = moto.api.describe_auto_scaling_groups(AutoScalingGroupNames=[name])["AutoScalingGroups"][0]
        yield [row["InstanceId"] for row in group["Instances"]]
    finally:
        moto.api.delete_auto_scaling_group(AutoScalingGroupName=name, ForceDelete=True)


def test_a_group_of_many_is_described_whole_and_without_this_instance(moto):
    with group_in(moto, "large", 120) as ids:
        moto.api.set_instance_health(InstanceId=ids[7], HealthStatus="Unhealthy")
        desired, weight, others = hc.describe_group(moto.api, ids[60])
        assert (desired, weight, len(others)) == (120, 1, 119)
        assert collections.Counter(others) == {(1, "InService", "Healthy"): 118, (1, "InService", "Unhealthy"): 1}
        assert hc.describe_group(moto.api, ids[7])[2] == [(1, "InService", "Healthy")] * 119


def test_the_group_described_is_the_instances_own_among_many(moto):
    with contextlib.ExitStack() as groups:
        for number in range(60):  # the API's page has 50 groups
            ids = groups.enter_context(group_in(moto, f"many-{number}", number % 3))
        assert hc.describe_group(moto.api, ids[0]) == (2, 1, [(1, "InService", "Healthy")])


def test_an_instance_in_no_group_is_described_as_such_and_no_other_group_is_asked_for(cloud):
    client = gateway_client(cloud)
    with pytest.raises(hc.NotInGroup, match="i-0 is in no Auto Scaling group"):
        hc.describe_group(client, "i-0")
    assert [action for _, action, _ in cloud.gateway.calls] == ["DescribeAutoScalingInstances"]


# ---- Daemon and gate, with a clock of their own ------------------------------------------------


class FakeLoop:
    ident = 1  # it has begun

    def __init__(self, check, due):
        self.check, self.due, self.probing, self.alive, self.number = check, due, None, True, 0

    def is_alive(self):
        return self.alive

    def cancel(self):
        self.alive = False


class FakeMarker:
    ident = 1  # it has begun
    dry_run = False

    def __init__(self):
        self.orders, self.alive, self.wanted = self, True, None
        self.order = None

    def put(self, order):
        assert self.order is None, "more than one order at a time"
        self.order = order

    def is_alive(self):
        return self.alive


class FakeSystemd:
    watchdog = 60.0

    def __init__(self, keeps_mark=False):
        self.said = []
        self.keeps_mark = keeps_mark

    def notify(self, *lines):
        self.said += lines

    def keep_mark(self, marked):
        self.keeps_mark = marked


@pytest.fixture
def logged():
    """What the main thread logs: (level name, line)."""
    lines = []

    class Handler(hc.logging.Handler):
        def emit(self, record):
            lines.append((record.levelname, record.getMessage()))

    handler = Handler()
    hc.log.addHandler(handler)
    hc.log.setLevel("INFO")
    hc.log.propagate = False
    yield lines
    hc.log.removeHandler(handler)


SIMPLE = """\
graceperiod: 0
frequency: 10s
checks:
  web:
    endpoint: http://localhost/
    frequency: 1s
    threshold: 3
"""


class Rig:
    """A daemon (or a gate), its threads played by the test, with a clock that only the test moves."""

    def __init__(self, text=SIMPLE, grace=None, gate=None, **options):
        self.now = 1000.0
        self.config = configured(text)
        self.loops = {}
        self.markers = []
        self.systemd = options.pop("systemd", None) or FakeSystemd()
        self.inbox = hc.Inbox()
        grace = self.config.graceperiod if grace is None else grace
        if gate is None:
            options.setdefault("read_config", lambda: self.config)
            self.daemon = hc.Daemon(
                self.config, self.inbox, self.now, grace, self.start_loop, self.start_marker, systemd=self.systemd, **options
            )
            self.inbox.put(hc.Rehearsed("", (), hc.Seen("i-1", "eu-west-1", "InService")))
        else:
            self.daemon = hc.Gate(self.config, self.inbox, self.now, grace, self.start_loop, gate == "early")
        self.step()

    def start_loop(self, check, due):
        self.loops[check.name] = FakeLoop(check, due)
        return self.loops[check.name]

    def start_marker(self):
        self.markers.append(FakeMarker())
        return self.markers[-1]

    @property
    def marker(self):
        return self.markers[-1]

    def step(self, seconds=0.0):
        """Let time pass, with every step that the main thread would take on the way."""
        end = self.now + seconds
        self.wake = self.daemon.step(self.now)
        while self.now < end:
            self.now = min(end, max(self.wake, self.now + 1e-6))
            for loop in self.loops.values():
                if not loop.probing:
                    loop.due = max(loop.due, self.now)  # an idle loop is never late here
            self.wake = self.daemon.step(self.now)

    def probe(self, results, name="web", seconds=1.0):
        """One result after another (p passes, f fails, x is spoiled), a second apart."""
        for result in results:
            loop = self.loops[name]
            loop.number += 1
            passed = {"p": True, "f": False, "x": None}[result]
            self.inbox.put(hc.Result(loop, loop.number, passed, "" if passed else "refused", 0.01))
            self.step(seconds)

    def outcome(self, kind, text="", **fields):
        """Answer the order under way."""
        order, self.marker.order = self.marker.order, None
        assert order, "there is no order to answer"
        seen = fields.pop("seen", order.seen)
        fields.setdefault("acted", kind == hc.CALLED)
        self.inbox.put(hc.Outcome(order, kind, text, seen, **fields))
        self.step()

    def until_order(self, limit=1000.0):
        """Let time pass until there is an order; returns the seconds that took."""
        start = self.now
        while not self.marker.order and self.now - start < limit:
            self.step(0.25)
        return self.now - start


def test_threshold_failures_then_the_verdict_then_the_order(logged):
    rig = Rig()
    rig.probe("ff")
    rig.step(20)
    assert rig.daemon.verdict == "undecided" and not rig.marker.order
    rig.probe("f")
    assert rig.daemon.verdict == "undecided"  # it is taken every frequency
    rig.step(10)
    assert rig.daemon.verdict == "unhealthy"
    assert rig.marker.order.status == "Unhealthy" and rig.marker.wanted == "Unhealthy"
    lines = [line for _, line in logged]
    assert "Check web failed (1 of 3): refused" in lines
    assert "Check web failing (failed 3 in a row, threshold 3): refused" in lines
    assert "Verdict unhealthy (was undecided): web failing (failed 3 in a row, threshold 3): refused" in lines


def test_the_line_of_a_mark_names_every_failing_check_its_count_and_its_last_reason(logged):
    rig = Rig(SIMPLE + "  db:\n    type: tcp\n    endpoint: localhost:1\n    threshold: 1\n  fine:\n    endpoint: http://localhost/\n    threshold: 1\n")
    rig.probe("fff")
    rig.probe("f", "db")
    rig.probe("p", "fine")
    rig.step(10)
    rig.outcome(hc.CALLED)
    assert logged[-1] == (
        "WARNING",
        "Marked Instance as Unhealthy: i-1: web failing (failed 3 in a row, threshold 3): refused; db failing (failed 1 in a row, threshold 1): refused",
    )


def test_a_check_that_is_failing_still_is_named_with_its_last_failure(logged):
    rig = Rig()
    rig.probe("fffp")
    rig.step(10)
    rig.outcome(hc.CALLED)
    assert logged[-1][1].endswith(": i-1: web failing (passed 1 in a row, threshold 3), last failure: refused")


def test_nothing_is_probed_before_the_grace_period_is_over():
    rig = Rig(SIMPLE.replace("graceperiod: 0", "graceperiod: 5m"))
    assert rig.loops["web"].due == 1300.0
    assert any("grace period, probing starts in 300s" in line for line in rig.systemd.said)


def test_calls_are_made_again_after_successes_and_errors_at_the_pace_of_the_backoff(logged):
    rig = Rig()
    rig.probe("fff")
    rig.step(10)
    waits = []
    for kind in [hc.CALLED, hc.FAILED] * 5:
        rig.outcome(kind, "an error -- advice" if kind == hc.FAILED else "")
        waits.append(rig.until_order())
    for wait, middle in zip(waits, [10, 20, 40, 80, 160, 300, 300, 300, 300, 300]):
        assert 0.8 * middle <= wait <= 1.2 * middle + 0.5
    assert len([1 for level, line in logged if level == "ERROR" and re.match(r"Could not mark i-1 as Unhealthy, again in \d+s: an error -- advice", line)]) == 5


def test_no_order_is_given_while_one_is_under_way():
    rig = Rig()
    rig.probe("fff")
    rig.step(10)
    rig.step(5000)  # FakeMarker would object
    assert rig.marker.order


def test_a_mark_of_our_own_is_taken_back_after_a_recovery_until_one_call_succeeds(logged):
    rig = Rig()
    rig.probe("fff")
    rig.step(10)
    rig.outcome(hc.CALLED)
    rig.probe("pp")
    rig.step(8)
    assert rig.marker.wanted == "Unhealthy"
    rig.probe("p")
    rig.until_order()
    while rig.marker.order.status == "Unhealthy":
        rig.outcome(hc.CALLED)
        rig.until_order()
    assert rig.marker.order.status == "Healthy" and rig.daemon.verdict == "healthy"
    rig.outcome(hc.FAILED, "throttled")
    assert 8 <= rig.until_order() <= 13
    assert rig.marker.order.status == "Healthy"
    rig.outcome(hc.CALLED)
    assert ("INFO", "Marked Instance as Healthy: i-1: web healthy (passed 3 in a row, threshold 3)") in logged
    assert rig.marker.wanted is None and rig.until_order(2000) >= 2000


def test_recovery_false_leaves_the_mark():
    rig = Rig("recovery: false\n" + SIMPLE)
    rig.probe("fff")
    rig.step(10)
    rig.outcome(hc.CALLED)
    rig.probe("ppp", seconds=0.1)
    rig.step(10)
    assert rig.daemon.verdict == "healthy" and rig.marker.wanted is None


def test_nothing_is_taken_back_that_was_refused():
    rig = Rig()
    rig.probe("fff")
    rig.step(10)
    rig.outcome(hc.FAILED, "AccessDenied")
    rig.probe("ppp", seconds=0.1)
    rig.step(10)
    assert rig.daemon.verdict == "healthy" and rig.marker.wanted is None


def test_a_call_whose_answer_was_lost_is_taken_back():
    rig = Rig()
    rig.probe("fff")
    rig.step(10)
    rig.outcome(hc.FAILED, "ReadTimeoutError", acted=True)
    rig.probe("ppp", seconds=0.1)
    rig.step(10)
    assert rig.marker.wanted == "Healthy"


def test_a_recovery_while_a_call_is_under_way_withdraws_it_and_takes_back_what_it_did():
    rig = Rig()
    rig.probe("fff")
    rig.step(10)
    assert rig.marker.order
    rig.probe("ppp")
    rig.step(10)
    assert rig.marker.wanted is None  # what the marker looks at right before the call
    rig.outcome(hc.CALLED)  # ... but the call was made before that
    assert rig.marker.wanted == "Healthy" and rig.marker.order.status == "Healthy"
    rig.outcome(hc.WITHDRAWN, acted=False)
    assert rig.marker.order.status == "Healthy"


def test_faults_of_this_program_are_logged_once_and_counted_neither_way(logged):
    rig = Rig()
    rig.probe("ffxxxx")
    rig.step(10)
    assert rig.daemon.watches["web"].health.streak == 2
    rig.probe("f")
    assert rig.daemon.watches["web"].health.state == "failing"
    rig.probe("x")
    assert [line for level, line in logged if level == "ERROR"] == [
        "A fault of this program, not counted, spoils the probes of web: refused"
    ] * 2


def test_a_probe_that_hangs_counts_once_at_its_deadline_and_once_each_period_after():
    rig = Rig()
    loop = rig.loops["web"]
    loop.number, loop.probing = 1, (1, rig.now)
    failures = []
    for _ in range(300):
        rig.step(0.01)
        failures.append(rig.daemon.watches["web"].results)
    # deadline 1 s, then every second (frequency and timeout are both 1 s)
    assert [failures.count(n) for n in range(3)] == pytest.approx([125, 100, 75], abs=3)
    loop.probing = None
    rig.inbox.put(hc.Result(loop, 1, True, "", 3.0))  # its late result
    rig.step()
    assert rig.daemon.watches["web"].health == hc.Health("unknown", False, 2)
    rig.inbox.put(hc.Result(loop, 2, True, "", 0.1))
    rig.step()
    assert rig.daemon.watches["web"].health == hc.Health("unknown", True, 1)


def test_a_success_is_awaited_only_where_it_would_be_news():
    rig = Rig()
    loop = rig.loops["web"]
    seen = []
    for result in "pppfppp":
        rig.probe(result)
        seen.append(loop.awaited)
    assert seen == [True, True, False, True, False, False, False]
    loop.probing = (99, rig.now)
    rig.step(2)
    assert rig.daemon.watches["web"].health.streak == 1 and loop.awaited  # it hangs: whoever comes after it is news


def test_a_pause_of_the_whole_process_adds_at_most_one_failure():
    rig = Rig()
    loop = rig.loops["web"]
    for number in range(1, 6):
        loop.number, loop.probing = number, (number, rig.now)
        rig.now += 3600.0  # nobody looked in that time
        rig.daemon.step(rig.now)
        assert rig.daemon.watches["web"].health.streak == 1
        loop.probing = None
        rig.inbox.put(hc.Result(loop, number, False, "timed out", 3600.0))
        rig.daemon.step(rig.now)
        assert rig.daemon.watches["web"].health.streak == 1
        rig.probe("p")
        loop.number = number
    assert rig.daemon.verdict == "undecided" and not rig.marker.order


def test_a_loop_that_is_gone_is_started_again_and_its_last_words_are_dropped(logged):
    rig = Rig()
    old = rig.loops["web"]
    old.alive = False
    rig.step(10)
    assert rig.loops["web"] is not old and ("ERROR", "The loop of check web is gone: starting it again") in logged
    rig.inbox.put(hc.Result(old, 1, False, "refused", 0.1))
    rig.step()
    assert rig.daemon.watches["web"].results == 0


def test_loops_that_cannot_be_started_are_tried_again_at_each_verdict(logged):
    attempts = []

    class Scarce(Rig):
        def start_loop(self, check, due):
            attempts.append(check.name)
            if len(attempts) < 4:
                raise RuntimeError("can't start new thread")
            return super().start_loop(check, due)

    rig = Scarce()
    rig.step(20)
    assert "WATCHDOG=1" not in rig.systemd.said
    rig.step(20)
    assert len(attempts) == 4 and "WATCHDOG=1" in rig.systemd.said
    assert [line for level, line in logged if level == "ERROR"] == ["Threads cannot be started, trying at each verdict: can't start new thread"]


def test_the_rehearsal_decides_whether_the_daemon_starts(logged):
    rig = Rig()
    assert "READY=1" in rig.systemd.said and ("INFO", "Ready to mark i-1 in eu-west-1") in logged
    rig.inbox.put(hc.Rehearsed("No module named 'boto3' -- install the package python3-boto3", (), hc.Seen()))
    rig.step()
    assert rig.daemon.status == 1
    assert logged[-1] == ("ERROR", "This daemon could never mark: No module named 'boto3' -- install the package python3-boto3")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_daemon_with_nothing_marked(number):
    rig = Rig()
    rig.probe("fff", seconds=0)
    rig.inbox.put(number)
    rig.step()
    assert rig.daemon.status == 0 and "STOPPING=1" in rig.systemd.said and not rig.marker.order


@pytest.mark.parametrize("gate, status", [(None, 0), ("early", 1)])
def test_a_signal_ends_it_even_where_there_is_no_memory_to_say_so(gate, status, monkeypatch):
    def out_of_memory(*_):
        raise MemoryError

    rig = Rig(gate=gate)
    monkeypatch.setattr(hc.log, "info", out_of_memory)
    monkeypatch.setattr(hc.log, "error", out_of_memory)
    rig.inbox.put(signal.SIGTERM)
    with pytest.raises(MemoryError):
        rig.step()
    assert rig.daemon.status == status


def test_the_gate_exits_early_as_soon_as_every_check_is_healthy(logged):
    rig = Rig(SIMPLE.replace("graceperiod: 0", "graceperiod: 5m"), gate="early")
    assert rig.loops["web"].due == rig.now  # probing starts at once
    rig.probe("fpp", seconds=0.1)
    assert rig.daemon.status is None
    rig.probe("p", seconds=0.1)
    assert rig.daemon.status == 0


@pytest.mark.parametrize("results, status", [("ppp", 0), ("fff", 1), ("pfp", 1), ("fffppp", 0), ("pppf", 0), ("pppfff", 1)])
def test_the_gate_decides_when_grace_is_over_and_every_check_has_threshold_results(results, status, logged):
    rig = Rig(SIMPLE.replace("graceperiod: 0", "graceperiod: 30s"), gate="late")
    rig.probe(results)
    assert rig.daemon.status is None
    rig.step(29.9 - len(results))
    assert rig.daemon.status is None
    rig.step(0.2)
    assert rig.daemon.status == status
    lines = [line for _, line in logged]
    assert [line for line in lines if line.startswith("10s of grace left: web ")]


def test_the_gate_waits_for_threshold_results_after_the_grace_period():
    rig = Rig(gate="late")
    rig.probe("pp")
    rig.step(100)
    assert rig.daemon.status is None
    rig.probe("p")
    assert rig.daemon.status == 0


def test_a_gate_that_is_stopped_has_not_found_the_instance_healthy(logged):
    rig = Rig(gate="early")
    rig.inbox.put(signal.SIGTERM)
    rig.step()
    assert rig.daemon.status == 1


def test_no_order_outlives_the_failure_that_it_is_for():
    rig = Rig()
    rig.probe("fff")
    rig.step(7)
    rig.outcome(hc.CALLED)
    rig.probe("ppp", seconds=0.1)  # healthy again, but the verdict is taken only in some seconds
    assert rig.daemon.verdict == "unhealthy" and rig.marker.wanted is None
    rig.step(20)
    assert not rig.marker.order or rig.marker.order.status == "Healthy"


def test_what_is_wanted_is_taken_back_as_soon_as_a_check_recovers():
    rig = Rig()
    rig.probe("fff")
    rig.step(10)
    assert rig.marker.order and rig.marker.wanted == "Unhealthy"
    rig.probe("ppp", seconds=0.1)
    assert rig.marker.wanted is None  # the marker looks at this as it sends


def test_nothing_is_marked_on_the_way_out():
    rig = Rig()
    rig.probe("fff")
    rig.step(10)
    assert rig.marker.order and rig.marker.wanted == "Unhealthy"
    rig.inbox.put(signal.SIGTERM)
    rig.inbox.put(signal.SIGHUP)  # too late for this
    rig.step()
    assert rig.marker.wanted is None and "RELOADING=1" not in rig.systemd.said and rig.daemon.status == 0


LIMITED = "max_unhealthy: 40%\n" + SIMPLE


def test_with_a_limit_the_first_look_comes_after_a_random_wait():
    waits = set()
    for _ in range(20):
        rig = Rig(LIMITED)
        rig.probe("fff")
        rig.step(7)
        assert rig.daemon.verdict == "unhealthy"
        waits.add(round(rig.until_order(), 2))
        assert rig.marker.order.max_unhealthy == 40
    assert max(waits) <= 30.5 and len(waits) > 5 and max(waits) - min(waits) > 5


def test_over_the_limit_it_holds_says_why_once_and_looks_again(logged):
    rig = Rig(LIMITED)
    rig.probe("fff")
    for _ in range(5):
        rig.until_order()
        rig.outcome(hc.CROWDED, "max_unhealthy: more than 40% of the group is out")
        assert rig.until_order() <= 30.5
    lines = [line for _, line in logged if "Not marking" in line]
    assert len(lines) == 1 and re.search("looking again in \\d+s: max_unhealthy: more than 40%", lines[0])
    assert "not marking now (max_unhealthy: more than 40% of the group is out)" in [line for line in rig.systemd.said if "STATUS" in line][-1]
    rig.outcome(hc.CALLED)
    assert 8 <= rig.until_order() <= 12.5  # from now on at the pace of the calls


def test_a_withdrawn_order_does_not_shorten_the_wait():
    rig = Rig(LIMITED)
    rig.probe("fff")
    rig.until_order()
    rig.probe("ppp")
    rig.step(10)
    rig.probe("fff")
    rig.step(10)
    due = rig.daemon.call_at
    rig.outcome(hc.WITHDRAWN, acted=False)
    assert rig.daemon.call_at == pytest.approx(max(due, rig.now))


STANDBY = hc.Seen("i-1", "eu-west-1", "Standby")
IN_SERVICE = hc.Seen("i-1", "eu-west-1", "InService")
GRACEFUL = SIMPLE.replace("graceperiod: 0", "graceperiod: 5m")


def failing_rig(text=GRACEFUL):
    rig = Rig(text, grace=0)
    rig.probe("fff")
    rig.step(7)
    assert rig.marker.order.status == "Unhealthy"
    return rig


def test_a_hold_looks_again_at_each_verdict_and_says_why_once(logged):
    rig = failing_rig()
    for _ in range(6):
        rig.outcome(hc.HELD, "target lifecycle state Standby", seen=STANDBY)
        assert not rig.marker.order
        assert rig.until_order() == pytest.approx(10, abs=0.3)
        assert rig.marker.order.look
    assert len([line for _, line in logged if "target lifecycle state Standby" in line]) == 1


def test_after_a_hold_a_new_grace_period_passes_before_the_first_call():
    rig = failing_rig()
    rig.outcome(hc.HELD, "target lifecycle state Standby", seen=STANDBY)
    rig.until_order()
    rig.outcome(hc.LOOKED, "target lifecycle state InService", seen=IN_SERVICE)
    back = rig.now
    while True:
        rig.until_order()
        if not rig.marker.order.look:
            break
        rig.outcome(hc.LOOKED, "target lifecycle state InService", seen=IN_SERVICE)
    assert rig.now - back == pytest.approx(300, abs=0.5)


def test_a_second_hold_within_that_grace_period_is_noticed():
    rig = failing_rig()
    for seen in (STANDBY, IN_SERVICE, STANDBY, STANDBY):
        rig.outcome(hc.HELD if seen is STANDBY else hc.LOOKED, seen.lifecycle, seen=seen)
        rig.until_order()
        rig.step(60)
    rig.outcome(hc.LOOKED, "InService", seen=IN_SERVICE)
    back = rig.now
    while rig.until_order() <= 1000 and rig.marker.order.look:
        rig.outcome(hc.LOOKED, "InService", seen=IN_SERVICE)
    assert rig.now - back == pytest.approx(300, abs=0.5)


def test_a_hold_ends_with_the_recovery_that_makes_it_pointless():
    rig = failing_rig()
    rig.outcome(hc.HELD, "target lifecycle state Standby", seen=STANDBY)
    rig.probe("ppp")
    rig.step(10)
    rig.probe("fff")
    rig.until_order()
    assert not rig.marker.order.look


def test_a_mark_is_taken_back_after_a_hold_without_a_new_grace_period():
    rig = failing_rig()
    rig.outcome(hc.CALLED)
    rig.probe("ppp")
    rig.until_order()
    while rig.marker.order.status != "Healthy":
        rig.outcome(hc.CALLED)
        rig.until_order()
    rig.outcome(hc.HELD, "target lifecycle state Standby", seen=STANDBY)
    rig.until_order()
    assert rig.marker.order.status == "Healthy" and not rig.marker.order.look
    rig.outcome(hc.CALLED, seen=IN_SERVICE)
    rig.probe("fff")
    rig.until_order()
    assert rig.marker.order.look  # but before the next mark, there is one: it was held until then


def test_a_marker_that_dies_or_hangs_is_replaced_and_what_it_may_have_done_is_taken_back(logged):
    for fate in ("is gone", "hangs"):
        rig = failing_rig()
        first = rig.marker
        first.alive = fate == "hangs"
        order = first.order
        assert rig.until_order(1.0) == 0 and rig.daemon.order is order
        rig.step(hc.ORDER_TIME + 10 if fate == "hangs" else 10)
        assert rig.marker is not first and first.wanted is None
        assert f"The thread that talks to AWS {fate}: starting another" in [line for _, line in logged]
        assert rig.marker.order and rig.daemon.marked  # the new one goes on with it
        rig.inbox.put(hc.Outcome(order, hc.CALLED, "", IN_SERVICE, True))  # the old one's last words
        rig.step()
        assert rig.daemon.order is rig.marker.order


def test_a_look_is_no_mark_whatever_becomes_of_it():
    rig = failing_rig()
    rig.outcome(hc.HELD, "target lifecycle state Standby", seen=STANDBY)
    assert rig.until_order() and rig.marker.order.look and not rig.systemd.keeps_mark
    rig.marker.alive = False
    rig.step(10)
    assert not rig.daemon.marked and not rig.systemd.keeps_mark


def test_a_mark_of_an_earlier_run_is_taken_back_too():
    rig = Rig()
    rig.probe("fff")
    rig.step(10)
    assert rig.systemd.keeps_mark  # as soon as the call may be on its way
    later = FakeSystemd(keeps_mark=True)
    rig = Rig(systemd=later)
    rig.probe("ppp")
    rig.step(10)
    assert rig.marker.order.status == "Healthy" and later.keeps_mark
    rig.outcome(hc.CALLED)
    assert not later.keeps_mark


def reloading(rig, text):
    rig.config = configured(text)
    rig.inbox.put(signal.SIGHUP)
    rig.step()


def test_a_reload_keeps_the_state_of_equal_checks_and_starts_the_others_unknown(logged):
    text = SIMPLE + "  db:\n    type: tcp\n    endpoint: localhost:1\n"
    rig = Rig(text)
    rig.probe("fff", seconds=0.1)
    rig.probe("ppp", "db", seconds=0.1)
    loops = dict(rig.loops)
    # equal after defaults, changed, new, gone
    reloading(rig, text.replace("threshold: 3", "timeout: 1000ms").replace("localhost:1\n", "localhost:2\n") + "  new:\n    endpoint: http://localhost/\n")
    states = {name: watch.health.state for name, watch in rig.daemon.watches.items()}
    assert states == {"web": "failing", "db": "unknown", "new": "unknown"}
    assert rig.loops["web"] is loops["web"] and not loops["db"].alive and rig.loops["db"].due == rig.now
    assert ("INFO", "Configuration reloaded: web, db, new") in logged
    reloading(rig, SIMPLE.replace("web:", "other:"))
    assert set(rig.daemon.watches) == {"other"} and not loops["web"].alive
    rig.inbox.put(hc.Result(loops["web"], 9, False, "late", 0.1))
    rig.step()
    assert rig.daemon.verdict == "undecided" and rig.marker.wanted is None


def test_a_reload_of_a_bad_file_changes_nothing_and_is_told(logged):
    rig = Rig()
    rig.probe("fff", seconds=0.1)
    before = rig.daemon.watches["web"]

    def bad():
        raise hc.ConfigError("no checks: write at least one", 1, "f.yml")

    rig.daemon.read_config = bad
    rig.systemd.said.clear()
    rig.inbox.put(signal.SIGHUP)
    rig.step()
    assert rig.daemon.watches["web"] is before and rig.daemon.config is rig.config
    assert ("ERROR", "Configuration not reloaded, the old one stays: f.yml:1: no checks: write at least one") in logged
    said = [line.partition("=")[0] for line in rig.systemd.said]
    assert said[:2] == ["RELOADING", "MONOTONIC_USEC"] and "READY" in said[2:]


def test_a_reload_that_fails_for_another_reason_says_so_too(logged):
    def out_of_memory():
        raise MemoryError

    rig = Rig(read_config=out_of_memory)
    rig.inbox.put(signal.SIGHUP)
    rig.step()
    assert ("ERROR", "Configuration not reloaded, the old one stays: MemoryError()") in logged


def test_a_reload_from_standard_input_is_ignored(logged):
    rig = Rig(read_config=None)
    rig.inbox.put(signal.SIGHUP)
    rig.step()
    assert ("WARNING", "SIGHUP ignored: the configuration came from standard input") in logged


def test_a_reload_brings_no_new_grace_period():
    rig = Rig(GRACEFUL)
    rig.step(100)
    reloading(rig, GRACEFUL.replace("frequency: 1s", "frequency: 2s"))
    assert rig.loops["web"].due == 1300.0


def test_a_reload_tells_the_warnings_of_the_new_file(logged):
    rig = Rig()
    reloading(rig, SIMPLE.replace("threshold", "threashold"))
    assert [line for level, line in logged if level == "WARNING" and "threashold" in line]


@pytest.fixture
def strict_umask():
    before = os.umask(0o77)
    yield
    os.umask(before)


def test_status_json_says_how_things_stand(tmp_path, strict_umask):
    rig = Rig(directory=str(tmp_path))
    rig.probe("pff")
    rig.step(10)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (tmp_path / "status.json").stat().st_mode & 0o777 == 0o644
    assert (status["version"], status["instance"], status["phase"], status["verdict"]) == (hc.__version__, "i-1", "watching", "undecided")
    assert status["wanted"] is None and status["last_call"] is None and status["marked"] is False
    assert status["checks"]["web"] == {"state": "unknown", "passed": False, "streak": 2, "threshold": 3, "reason": "refused", "failed_at": rig.now - 11}
    rig.probe("f")
    rig.step(10)
    rig.outcome(hc.FAILED, "throttled")
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["wanted"] == "Unhealthy" and status["last_call"]["result"] == "failed" and status["last_call"]["text"] == "throttled"
    rig.until_order()
    rig.outcome(hc.HELD, "target lifecycle state Standby", seen=STANDBY)
    status = json.loads((tmp_path / "status.json").read_text())
    assert "not marking now (target lifecycle state Standby)" in status["summary"] and status["last_call"]["result"] == "failed"


def test_a_status_file_that_cannot_be_written_is_told_once_and_stops_nothing(tmp_path, logged):
    rig = Rig(directory=str(tmp_path / "gone"))
    rig.probe("fff")
    rig.step(100)
    assert rig.marker.order and len([line for _, line in logged if "status.json cannot be written" in line]) == 1


def test_the_status_line_says_what_is_going_on():
    rig = Rig(GRACEFUL)
    assert "STATUS=grace period, probing starts in 300s: web" in rig.systemd.said
    rig = failing_rig()
    assert "STATUS=unhealthy, marking the instance as Unhealthy (calls so far: 0): web failing (failed 3 in a row, threshold 3): refused" in rig.systemd.said


def test_the_watchdog_is_fed_while_all_is_well_and_withheld_while_a_loop_is_stuck():
    rig = Rig()
    rig.step(120)
    fed = rig.systemd.said.count("WATCHDOG=1")
    assert 8 <= fed <= 10  # each 15 s
    loop = rig.loops["web"]
    rig.loops = {}  # the rig lets its time stand still
    loop.due = rig.now
    rig.step(120)
    assert rig.systemd.said.count("WATCHDOG=1") - fed <= 1
    loop.due = rig.now + 10
    rig.step(2)
    assert rig.systemd.said.count("WATCHDOG=1") - fed >= 1  # as soon as it is back


def test_a_dead_loop_is_no_evidence_against_its_service():
    rig = Rig(SIMPLE.replace("frequency: 10s", "frequency: 100s"))
    loop = rig.loops["web"]
    loop.probing, loop.alive = (1, rig.now), False
    rig.step(90)
    assert rig.daemon.watches["web"].results == 0


def test_notify_speaks_the_protocol_and_no_message_is_too_long(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify@1"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify@1"))
        monkeypatch.setenv("WATCHDOG_USEC", "60000000")
        systemd = hc.Systemd()
        assert systemd.watchdog == 60 and "NOTIFY_SOCKET" not in os.environ
        systemd.notify("RELOADING=1", "MONOTONIC_USEC=5")
        assert manager.recv(9999) == b"RELOADING=1\nMONOTONIC_USEC=5"
        systemd.notify("STATUS=" + "x" * 100000)
        assert len(manager.recv(99999)) <= 4096
        for _ in range(2000):
            systemd.notify("WATCHDOG=1")  # nobody takes them, and nobody waits
    systemd.notify("WATCHDOG=1")  # nobody is there any more
    monkeypatch.setenv("WATCHDOG_PID", "1")
    monkeypatch.setenv("NOTIFY_SOCKET", "@abstract")
    other = hc.Systemd()
    assert other.watchdog == float("inf") and other.address == "\0abstract"
    hc.Systemd().notify("READY=1")  # where there is no service manager


def test_ready_is_a_message_of_its_own_and_is_repeated():
    rig = Rig()
    rig.step(30)
    assert rig.systemd.said.count("READY=1") >= 3

    class Recorder(FakeSystemd):
        def notify(self, *lines):
            self.said.append(lines)

    rig.daemon.systemd = Recorder()
    rig.step(30)
    assert ("READY=1",) in rig.daemon.systemd.said


def test_a_gate_that_is_stopped_stays_stopped(logged):
    rig = Rig(gate="early")
    rig.probe("pp")
    rig.inbox.put(signal.SIGTERM)
    rig.probe("p")
    assert rig.daemon.status == 1


# ---- The daemon against a model ----------------------------------------------------------------

GRAIN = 1 / 64  # seconds: the model's clock moves by these, so that its sums are exact
SOON = 1e-6  # seconds that rounding may take


class Contract:
    """What sections 6 and 7 of the design ask of the daemon, on plain lists; no line of the program is in it."""

    def __init__(self, config, now, marked):
        self.config, self.marked = config, marked
        self.results = {check.name: [] for check in config.checks}  # that count, since the check is known
        self.loops = {check.name: None for check in config.checks}
        self.hung = {}  # (loop, number) of each probe that was counted as failed: when it is once more
        self.verdict, self.next_verdict = "undecided", now + config.frequency
        self.wanted, self.calls, self.due = None, 0, (now, now)  # due: the earliest and latest time of the next order
        self.marker = self.order = None
        self.order_at = 0.0
        self.held, self.grace_end = False, (0.0, 0.0)  # by the lifecycle state; when the grace period after that ends

    def state(self, check):
        """What the last `threshold` results in a row that agree say, however long ago they were."""
        results = self.results[check.name]
        for end in range(len(results), check.threshold - 1, -1):
            if len(set(results[end - check.threshold : end])) == 1:
                return "healthy" if results[end - 1] else "failing"
        return "unknown"

    def current(self):
        states = {self.state(check) for check in self.config.checks}
        return "unhealthy" if "failing" in states else "healthy" if states == {"healthy"} else "undecided"

    def may_act(self):
        """Whether the order under way may come to a mark."""
        return bool(self.order and self.order.status == "Unhealthy" and not self.order.look)

    def mark_for(self, verdict):
        take_back = "Healthy" if self.marked and self.config.recovery else None
        return {"unhealthy": "Unhealthy", "healthy": take_back, "undecided": None}[verdict]

    def agreed(self):
        """What the marker is to bring about: what the last verdict wants, while the checks say so still."""
        return self.wanted if self.wanted == self.mark_for(self.current()) else None

    def must_only_look(self, now):
        """... and not call; None: it may do either."""
        if self.wanted != "Unhealthy" or not self.held and now >= self.grace_end[1]:
            return False
        return True if self.held or now < self.grace_end[0] else None

    def missing(self):
        """The threads that the watchdog must not be fed without."""
        return not self.marker or not self.marker.alive or not all(loop and loop.alive for loop in self.loops.values())

    def step(self, now, mail, rig):
        for item in mail:
            {hc.Result: self.result, hc.Outcome: self.outcome}.get(type(item), self.reload)(item, now, rig)
        self.overdue = math.inf
        for check in self.config.checks:
            loop = self.loops[check.name]
            if loop and loop.alive and loop.probing:
                number, start = loop.probing
                end = self.hung.get((loop, number), start + check.timeout + hc.HANG_SLACK)
                if now >= end:
                    self.results[check.name].append(False)
                    end = self.hung[loop, number] = now + max(check.frequency, check.timeout)
                self.overdue = min(self.overdue, end)
        if now >= self.next_verdict:
            self.next_verdict += self.config.frequency
            while self.next_verdict < now:
                self.next_verdict += self.config.frequency
            self.replace_threads(now, rig)
            self.verdict = self.current()
            self.want(now)
            if self.verdict == "healthy" and not self.wanted:
                self.held = False  # there is nothing to hold back any more

    def result(self, result, now, rig):
        loop, name = result.loop, result.loop.check.name
        if self.loops.get(name) is loop and (loop, result.number) not in self.hung and result.passed is not None:
            self.results[name].append(result.passed)

    def reload(self, item, now, rig):
        if rig.file:
            old = {check.name: check for check in self.config.checks}
            same = {check.name: check == old.get(check.name) for check in rig.file.checks}
            self.results = {name: self.results[name] if same[name] else [] for name in same}
            self.loops = {name: self.loops[name] if same[name] else None for name in same}
            self.config, self.next_verdict = rig.file, now
            latest = now + 1.2 * self.pace(max(self.calls, 1))
            self.due = (min(self.due[0], latest), min(self.due[1], latest))

    def replace_threads(self, now, rig):
        if self.marker and (not self.marker.alive or self.order and now > self.order_at + hc.ORDER_TIME):
            self.marked = self.marked or self.may_act()
            self.marker = self.order = None
        if not rig.scarce:
            self.marker = rig.marker
            self.loops = {name: loop if loop and loop.alive else rig.loops[name] for name, loop in self.loops.items()}
            assert not self.missing() and self.marker.alive, "a thread is not replaced"

    def first_wait(self):
        return max(self.config.frequency, 30) if self.config.max_unhealthy else 0

    def want(self, now):
        wanted = self.mark_for(self.verdict)
        if wanted != self.wanted:
            self.wanted, self.calls, self.due = wanted, 0, (now, now + self.first_wait() * (wanted == "Unhealthy"))

    def pace(self, calls):
        return min(self.config.frequency * 2.0 ** (calls - 1), max(300.0, self.config.frequency))

    def outcome(self, outcome, now, rig):
        if outcome.order is not self.order:
            return  # of a marker that was given up
        order, self.order, frequency = self.order, None, self.config.frequency
        if outcome.acted:
            self.marked = (order.status, outcome.kind) != ("Healthy", hc.CALLED)
        serves = outcome.seen.lifecycle in (None, "InService")
        if self.held and serves:
            grace_end = now + self.config.graceperiod
            self.grace_end = (grace_end, grace_end + self.first_wait())
        self.held = not serves
        if order.status == self.wanted:
            self.calls += outcome.kind in (hc.CALLED, hc.FAILED)
            pace = self.pace(self.calls)
            look = tuple(min(self.next_verdict, max(end, now)) for end in self.grace_end)
            self.due = {
                hc.CALLED: (now + 0.8 * pace, now + 1.2 * pace),
                hc.FAILED: (now + 0.8 * pace, now + 1.2 * pace),
                hc.CROWDED: (now, now + max(frequency, 30)),
                hc.HELD: (self.next_verdict, self.next_verdict),
                hc.LOOKED: look,
                hc.WITHDRAWN: self.due,
            }[outcome.kind]
        self.want(now)


class ModelRig(Rig):
    """A Rig that remembers all its loops, and on which threads may be scarce."""

    def __init__(self, text, marked, scarce):
        self.file, self.scarce, self.started, self.dues = None, scarce, [], []
        super().__init__(text, read_config=self.read, systemd=FakeSystemd(keeps_mark=marked))

    def read(self):
        if not self.file:
            raise hc.ConfigError("no checks: write at least one", 1, "f.yml")
        return self.file

    def start_loop(self, check, due):
        self.may_start()
        self.started.append(super().start_loop(check, due))
        self.dues.append((due, self.now))
        return self.started[-1]

    def start_marker(self):
        self.may_start()
        return super().start_marker()

    def may_start(self):
        if self.scarce:
            raise RuntimeError("can't start new thread")


def text_of(top, checks):
    """A configuration from lines at its top and lines for each check."""
    lines = [*top, "checks:"]
    for name, keys in checks.items():
        lines += [f"  {name}:", "    endpoint: http://localhost/", *(f"    {key}" for key in keys)]
    return "\n".join(lines)


def one_of(*values):
    return st.sampled_from(values)


CONFIGS = st.builds(
    text_of,
    st.tuples(
        one_of("graceperiod: 0", "graceperiod: 90s"), one_of("frequency: 5s", "frequency: 20s"),
        one_of("recovery: true", "recovery: true", "recovery: false"), one_of("", "max_unhealthy: 40%"),
    ),
    st.dictionaries(
        one_of("a", "b"),
        st.tuples(
            one_of("", "threshold: 2", "threshold: 1"), one_of("", "timeout: 1s", "timeout: 3s"),
            one_of("frequency: 2s", ""),
        ),
        min_size=1, max_size=2,
    ),
)  # fmt: skip
SECONDS = one_of(0, 1, 6, 25, 25, 100, None)  # after an event; None: the main thread is busy

# What comes of a call; slow: nothing, until the_marker_works.
FATES = one_of("called", "called", "lost", "refused", "crowded", "crowded", "stranger", "unreadable", "slow")
RESULTS = {"p": True, "f": False, "x": None}  # passed, failed, spoiled by a fault of the program


class DaemonMachine(stateful.RuleBasedStateMachine):
    """Drives a Daemon through whatever may happen to it, and holds it against the contract:

    - A mark is wanted, and sent, only while some check's last `threshold` results in a row that agree are
      failures; and while the last verdict says so too, it is wanted, without a gap.
    - Healthy is wanted only where a mark of our own may stand, recovery is true and all checks are healthy;
      then until one call succeeds. A mark that stands is never forgotten.
    - One order at a time, none earlier than the backoff allows, none later; the main thread wakes in time.
    - No call outside of InService, nor for a grace period after a hold: only looks; looks at no other time.
    - No loop probes before the grace period is over. There is one for each check, and none for another.
    - A late result of a probe that hung counts for nothing, and a pause for at most one failure of a check.
    - A reload keeps the results of equal checks, and nothing of others; a bad file changes nothing.
    - A thread that is gone is replaced at the next verdict, if it can be; without it, no watchdog is fed.
    - After SIGTERM nothing is wanted or ordered.
    """

    @initialize(text=CONFIGS, marked=one_of(False, False, True), scarce=one_of(False, False, False, False, False, True))
    def start(self, text, marked, scarce):
        self.rig = ModelRig(text, marked, scarce)
        self.model = Contract(self.rig.config, self.rig.now, marked)
        self.rig.file = self.rig.config
        self.probing_from = self.fed = self.rig.now + self.rig.config.graceperiod
        self.model.replace_threads(self.rig.now, self.rig)
        self.lifecycle, self.fate = "InService", "slow"
        self.group = "Unhealthy" if marked else "Healthy"  # how it sees this instance
        self.open, self.answers, self.mail = [], [], []  # orders not carried out; answers on their way; the inbox
        self.step()

    def put(self, item):
        self.mail.append(item)
        self.rig.inbox.put(item)

    def step(self):
        """One step of the main thread, what it had to do in that, and by when it must come again."""
        rig, model, now = self.rig, self.model, self.rig.now
        for loop in rig.started:
            if not loop.probing:
                loop.due = max(loop.due, now)  # an idle loop is never late here
        rig.systemd.said.clear()
        rig.wake = rig.daemon.step(now)
        model.step(now, self.mail, rig)
        self.mail.clear()
        due = model.due[1] if model.marker and model.agreed() and not model.order else math.inf
        if model.marker and model.marker.order is not model.order:
            self.check_new_order(model.marker.order, now)
        else:
            assert now < due + SOON, "an order is late"
            overdue = max(model.overdue, now + 0.1)  # it comes ten times a second at most
            assert rig.wake <= min(due, model.next_verdict, overdue) + SOON, "the main thread would sleep for too long"
        if "WATCHDOG=1" in rig.systemd.said:
            assert not model.missing(), "the watchdog is fed while a thread is missing"
            self.fed = now
        assert model.missing() or now < self.fed + rig.systemd.watchdog / 2, "the watchdog is not fed"

    def check_new_order(self, order, now):
        model = self.model
        assert not model.order, "an order while another is under way"
        assert order.status == model.agreed(), "an order for what is not wanted"
        assert now > model.due[0] - SOON, "an order before its time"
        assert model.must_only_look(now) in (None, order.look), "a call in a hold or its grace period, or a look without one"
        assert order.max_unhealthy == model.config.max_unhealthy
        model.order, model.order_at = order, now
        self.open.append((model.marker, order))

    def let_pass(self, seconds):
        """Let time pass, with every step that the main thread would take on the way."""
        end = self.rig.now + (-1 if seconds is None else seconds)
        while self.rig.now <= end:
            self.step()
            if self.fate != "slow" and self.can_work():
                self.answer(*self.work(self.fate))
                self.step()
            if self.rig.now == end:
                break
            woken = math.ceil(self.rig.wake / GRAIN) * GRAIN
            self.rig.now = min(end, max(woken, self.rig.now + GRAIN))

    def idle(self):
        loops = [loop for loop in self.model.loops.values() if loop and loop.alive and not loop.probing]
        return [loop for loop in loops if loop.due <= self.rig.now]

    @rule(names=one_of("ab", "a", "b"), results=one_of("pp", "ff", "p", "f", "x", "fp", "ffxf"), seconds=SECONDS)
    def probes_end(self, names, results, seconds):
        for loop in self.idle():
            for result in results if loop.check.name in names else "":
                loop.number += 1
                self.put(hc.Result(loop, loop.number, RESULTS[result], "reason", 0.1))
        self.let_pass(seconds)

    @rule(results=one_of("fff", "ppp"), seconds=SECONDS)
    def all_services_are_down_or_up(self, results, seconds):
        self.begun_probes_end(None, None)
        self.probes_end("ab", results, seconds)

    @rule(seconds=SECONDS)
    def probes_begin(self, seconds):
        """... and hang, if they do not end soon."""
        for loop in self.idle():
            loop.number += 1
            loop.probing = (loop.number, self.rig.now)
        self.step()
        self.let_pass(seconds)

    def under_way(self):
        """The loops that probe, but those that are gone without a word, as far as the daemon could know."""
        known = self.model.loops.values()
        return [loop for loop in self.rig.started if loop.probing and (loop.alive or loop not in known)]

    @rule(passed=one_of(True, False, None), seconds=SECONDS)
    def begun_probes_end(self, passed, seconds):
        for loop in self.under_way():
            self.put(hc.Result(loop, loop.probing[0], passed, "late", 5.0))
            loop.probing = None
        self.let_pass(seconds)

    @rule(seconds=one_of(3.0, 45.0, 400.0, 86400.0), words=one_of("before", "after"))
    def the_whole_process_is_paused(self, seconds, words):
        self.step()
        before = {name: watch.results for name, watch in self.rig.daemon.watches.items()}
        self.rig.now += seconds
        if words == "after":
            self.let_pass(0.5)
        self.begun_probes_end(False, 0)
        for name, results in before.items():
            assert self.rig.daemon.watches[name].results <= results + 1, "a pause counts for more than one failure"

    @rule(text=CONFIGS | st.none(), seconds=SECONDS)
    def the_configuration_is_reloaded(self, text, seconds):
        """... from a bad file, if that is None."""
        self.rig.file = text and configured(text)
        self.put(signal.SIGHUP)
        self.let_pass(seconds)

    @rule(state=one_of("InService", "InService", "InService", None, "Standby", "Warmed:Stopped"), seconds=SECONDS)
    def the_lifecycle_state_changes(self, state, seconds):
        self.lifecycle = state
        self.let_pass(seconds)

    def can_work(self):
        return [(marker, order) for marker, order in self.open if marker.alive]

    @rule(fate=FATES, seconds=one_of(0, 25, 400, 700))
    def calls_have_this_fate_from_now_on(self, fate, seconds):
        self.fate = fate
        self.let_pass(seconds)

    @precondition(can_work)
    @rule(fate=one_of("called", "lost", "lost", "refused"), results=one_of("fff", "ppp", "ppp"), comes=st.booleans())
    def the_marker_works_but_its_answer_takes_time(self, fate, results, comes):
        self.answers.append(self.work(fate))
        self.all_services_are_down_or_up(results, 25)
        if comes:
            self.an_answer_comes(0)

    def work(self, fate):
        """The last marker that has an order carries it out; returns that marker and what came of it."""
        marker, order = self.can_work()[-1]
        self.open.remove((marker, order))
        seen = order.seen if fate == "unreadable" else dataclasses.replace(order.seen, lifecycle=self.lifecycle)
        kind, acted = self.carry_out(marker, order, fate, seen.lifecycle)
        return marker, hc.Outcome(order, kind, fate, seen, acted)

    def carry_out(self, marker, order, fate, lifecycle):
        """What comes of an order, as of the real marker: (kind, acted)."""
        if fate == "stranger" or lifecycle not in (None, "InService"):
            return hc.HELD, False
        if order.look:
            return hc.LOOKED, False
        if fate == "crowded" and order.status == "Unhealthy" and order.max_unhealthy:
            return hc.CROWDED, False
        if marker.wanted != order.status:
            return hc.WITHDRAWN, False
        if fate == "refused":
            return hc.FAILED, False
        if order.status == "Unhealthy":
            assert self.model.current() == "unhealthy", "a healthy instance is marked"
            assert self.rig.now > self.model.grace_end[0] - SOON, "an instance is marked in the grace period after a hold"
        self.group = order.status
        return hc.FAILED if fate == "lost" else hc.CALLED, True

    @precondition(lambda self: self.answers)
    @rule(seconds=SECONDS)
    def an_answer_comes(self, seconds):
        self.answer(*self.answers.pop())
        self.let_pass(seconds)

    def answer(self, marker, outcome):
        if outcome.kind == hc.FAILED and outcome.acted and marker.wanted != outcome.order.status:
            outcome = dataclasses.replace(outcome, kind=hc.WITHDRAWN)  # as a retry was about to be sent
        if marker.alive:
            marker.order = None
            self.put(outcome)

    @rule(seconds=SECONDS, victim=one_of("loop", "marker"))
    def a_thread_dies(self, seconds, victim):
        for thread in [*self.model.loops.values()][:1] if victim == "loop" else [self.model.marker]:
            if thread:
                thread.alive = False
        self.let_pass(seconds)

    @rule(scarce=one_of(False, False, True))
    def threads_can_be_started_or_not(self, scarce):
        self.rig.scarce = scarce

    @invariant()
    def the_marker_knows_what_is_wanted(self):
        for marker in self.rig.markers:
            assert marker.wanted == (self.model.agreed() if marker is self.model.marker else None)

    @invariant()
    def a_mark_that_stands_is_not_forgotten(self):
        assert self.group == "Healthy" or self.rig.daemon.may_be_marked()
        assert self.rig.systemd.keeps_mark == self.rig.daemon.may_be_marked() == (self.model.marked or self.model.may_act())

    @invariant()
    def every_check_has_its_loop_and_no_other_has(self):
        assert all(due == max(now, self.probing_from) for due, now in self.rig.dues)
        checks, loops = self.model.config.checks, [loop for loop in self.model.loops.values() if loop and loop.alive]
        assert all(loop.check in checks for loop in loops)
        assert {id(loop) for loop in loops} == {id(loop) for loop in self.rig.started if loop.alive}

    @invariant()
    def every_check_stands_as_its_results_say(self):
        for check in self.model.config.checks:
            assert self.rig.daemon.watches[check.name].health.state == self.model.state(check)

    def teardown(self):
        if not hasattr(self, "rig"):
            return  # it was not started
        self.put(signal.SIGTERM)
        orders = [marker.order for marker in self.rig.markers]
        self.rig.now += 1000.0
        self.rig.daemon.step(self.rig.now)
        for end in (self.rig.inbox._wake, self.rig.inbox._waker):
            end.close()
        assert self.rig.daemon.status == 0 and not any(marker.wanted for marker in self.rig.markers)
        assert orders == [marker.order for marker in self.rig.markers], "an order on the way out"


def test_the_daemon_keeps_the_contract_whatever_happens_to_it(logged):
    stateful.run_state_machine_as_test(DaemonMachine, settings=hypothesis.settings(max_examples=EXAMPLES // 10, stateful_step_count=60))


# ---- The program, as a process -----------------------------------------------------------------


class Program:
    """The program running, with what it wrote so far."""

    def __init__(self, *arguments, stdin=None, env=None, prefix=(), flags=(), **options):
        environment = {name: os.environ[name] for name in ("PATH", "LANG", "HOME") if name in os.environ}
        environment.update(env or {})
        command = [*prefix, sys.executable, *flags, str(PROGRAM), *arguments]
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
            env=environment, start_new_session=True, **options,
        )  # fmt: skip
        self.process.stdin.write(stdin or "")
        self.process.stdin.close()
        self.out, self.err, self.times = [], [], {}
        self.readers = [
            threading.Thread(target=self.read, args=pair, daemon=True)
            for pair in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for reader in self.readers:
            reader.start()

    def read(self, stream, lines):
        for line in stream:
            self.times.setdefault(line, time.monotonic())
            lines.append(line.rstrip("\n"))

    @property
    def lines(self):
        return self.out + self.err

    def wait_for(self, pattern, count=1):
        """The `count`th line that contains `pattern`, as soon as it is there."""

        def found():
            matches = [line for line in list(self.out) + list(self.err) if re.search(pattern, line)]
            assert len(matches) >= count or self.process.poll() is None, self.lines
            return len(matches) >= count and matches[count - 1]

        try:
            return wait_until(found, pattern)
        except AssertionError as error:
            raise AssertionError(f"{error}\n" + "\n".join(self.lines)) from None

    def wait(self):
        status = self.process.wait(PATIENCE)
        for reader in self.readers:
            reader.join(PATIENCE)
        return status

    def stop(self, number=signal.SIGTERM):
        """End it by a signal; returns the exit status and the seconds that it took."""
        start = time.monotonic()
        self.process.send_signal(number)
        status = self.wait()
        return status, time.monotonic() - start

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        # (The interpreter speaks for itself when it dies of a lack of memory.)
        assert "Traceback" not in "\n".join(self.lines) or self.process.returncode in (-signal.SIGSEGV, -signal.SIGABRT)


def run(*arguments, **options):
    with Program(*arguments, **options) as program:
        program.wait()
    return program


@pytest.mark.parametrize("dashes", ["-", "--"])
def test_version_and_help(dashes):
    assert run(dashes + "version").out == [f"ec2-local-healthchecker {hc.__version__}"]
    for name in ("h", "help"):
        program = run(dashes + name)
        assert program.process.returncode == 0 and not program.err
        assert all(f"-{option}" in "\n".join(program.out) for option in hc.OPTIONS)
        assert all(len(line) <= 80 for line in program.out)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["-nonsense"], "unknown option '-nonsense'"), (["-healthcheckfil", "x"], "did you mean healthcheckfile?"),
        (["-test"], "unknown option"), (["-testconfig=maybe"], "write -testconfig=true or -testconfig=false"),
        (["-foreground", "true"], "unexpected 'true'"), (["-healthcheckfile"], "takes a value"), (["-launchtime", "soon"], "seconds since 1970"),
        (["-launchtime=1.5"], "seconds since 1970"), (["---foreground"], "unexpected"), (["-"], "unexpected"), (["--", "x"], "unexpected"),
        (["-=x"], "unexpected"), (["-launchtime", "010"], "seconds since 1970"), (["-healthcheckfile="], "takes a value"),
    ],
)  # fmt: skip
def test_usage_errors_are_one_line_and_status_2(arguments, said):
    program = run(*arguments)
    assert program.process.returncode == 2 and not program.out
    assert len(program.err) == 1 and said in program.err[0]


def test_nonsense_in_the_environment_of_systemd_does_not_hide_a_configuration_error():
    program = run("-healthcheckfile", "/nonexistent", env={"NOTIFY_SOCKET": "x", "WATCHDOG_USEC": "soon"})
    assert program.process.returncode == 2 and not program.out
    assert len(program.err) == 1 and program.err[0].startswith("/nonexistent: cannot be read (No such file or directory)")


def test_testconfig_prints_the_effective_configuration():
    program = run("-testconfig", "--healthcheckfile=-", stdin=EXAMPLE + "    headers:\n      Authorization: secret\n")
    assert program.process.returncode == 0
    assert program.err == ["<stdin>:14: 'threashold' is read as 'threshold': correct the spelling"]
    assert json.loads("\n".join(program.out)) == {
        "graceperiod": 10, "frequency": 10, "recovery": True, "max_unhealthy": None,
        "checks": {
            "memcached": {"type": "tcp", "endpoint": "localhost:11211", "timeout": 1, "threshold": 4, "frequency": 10},
            "nginx": {
                "type": "http", "endpoint": "http://localhost:80/ping.html", "timeout": 1, "threshold": 10, "frequency": 1,
                "status": "200", "headers": {"Authorization": "***"}, "tls_verify": True,
            },
        },
    }  # fmt: skip


def test_testconfig_needs_no_boto3_and_no_network(tmp_path):
    (tmp_path / "f.yml").write_text(EXAMPLE)
    done = in_namespace(f"ip link set lo down; exec {sys.executable} -I -S {PROGRAM} -testconfig -healthcheckfile {tmp_path}/f.yml")
    assert done.returncode == 0 and '"nginx"' in done.stdout


@pytest.mark.parametrize("option", [["-testconfig"], ["-foreground"], ["-dry-run"], []])
@pytest.mark.parametrize(
    "content, said",
    [
        (b"frequency: 10\n", "f.yml:1: frequency: '10' is no duration"), (b"a: b\n\xff\xfe\n", "f.yml:2: not UTF-8"),
        (b"# \n" * 600000, "f.yml:1: larger than 1 MiB"), (None, "f.yml: cannot be read (No such file or directory)"),
    ],
)  # fmt: skip
def test_a_bad_configuration_is_one_line_and_status_2(tmp_path, option, content, said):
    if content is not None:
        (tmp_path / "f.yml").write_bytes(content)
    program = run("-healthcheckfile", str(tmp_path / "f.yml"), *option)
    assert program.process.returncode == 2 and not program.out
    assert len(program.err) == 1 and program.err[0].startswith(f"{tmp_path}/{said}")


def test_output_that_cannot_be_written_is_no_traceback():
    for target in ("/dev/full", "closed"):
        done = subprocess.run(
            f"exec {sys.executable} {PROGRAM} -help " + (">&-" if target == "closed" else f"> {target}"),
            shell=True, stderr=subprocess.PIPE, universal_newlines=True,
        )  # fmt: skip
        assert "Traceback" not in done.stderr and done.returncode in (0, 1)


def yaml_of(checks, **top):
    rows = [f"{key}: {value}" for key, value in top.items()] + ["checks:"]
    for name, keys in checks.items():
        rows += [f"  {name}:"] + [f"    {key}: '{value}'" for key, value in keys.items()]
    return "\n".join(rows) + "\n"


def test_the_gate_on_the_command_line():
    with serving(answering(OK)) as port:
        web = {"endpoint": f"http://127.0.0.1:{port}/", "frequency": "100ms", "threshold": "2", "timeout": "20s"}
        early = run(
            "-foreground", "-fg-exit-early-if-healthy=true", "-healthcheckfile=-", stdin=yaml_of({"web": web}, graceperiod="1h")
        )
        assert early.process.returncode == 0 and "Gate: healthy" in early.out[-1]
        late = run("-foreground", "-healthcheckfile=-", stdin=yaml_of({"web": web}, graceperiod="4s", frequency="300ms"))
        assert late.process.returncode == 0
        assert len([line for line in late.out if "of grace left: web healthy" in line]) >= 2
    failing = run("-foreground", "-healthcheckfile=-", stdin=yaml_of({"web": DEAD}, graceperiod="0"))
    assert failing.process.returncode == 1 and "Gate: unhealthy: web failing (failed 3 in a row" in failing.err[-1]


def test_the_launch_time_shortens_the_grace_period():
    web = {"endpoint": "http://127.0.0.1:1/", "frequency": "100ms"}
    text = yaml_of({"web": web}, graceperiod="1h", frequency="200ms")
    launched = str(int(time.time()) - 1800)
    with Program("-dry-run", "-healthcheckfile=-", f"-launchtime={launched}", stdin=text) as program:
        assert 1700 < float(program.wait_for("grace period: ").split("grace period: ")[1][:-1]) <= 1800
    with Program("-dry-run", "-healthcheckfile=-", "-launchtime", "1", stdin=text) as program:
        program.wait_for("Ready to mark")
        time.sleep(1)  # over long ago (a restart): the whole period from now
        assert not [line for line in program.lines if "Check web" in line]
        assert program.stop()[0] == 0


def test_a_dry_run_needs_neither_boto3_nor_ec2_and_says_what_it_would_have_done():
    text = yaml_of({"web": {"endpoint": "http://127.0.0.1:1/", "frequency": "100ms"}}, graceperiod="0", frequency="200ms", max_unhealthy="40%")
    with Program("-dry-run", "-healthcheckfile=-", stdin=text, env={"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1"}) as program:
        line = program.wait_for("Dry run: would have marked")
        assert "this instance as Unhealthy (max_unhealthy is not evaluated): web failing (" in line
        assert "Marked Instance" not in "\n".join(program.lines)
        assert program.stop() == (0, PROMPTLY)
    assert any("INFO Stopped by SIGTERM" in line for line in program.out)
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO) ", line) for line in program.out)
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (WARNING|ERROR) ", line) for line in program.err)


def test_without_boto3_the_daemon_refuses_to_start(tmp_path, metadata):
    (tmp_path / "f.yml").write_text(EXAMPLE)
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(PROGRAM), "-healthcheckfile", str(tmp_path / "f.yml")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=PATIENCE,
        env={"AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.url},
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search("ERROR This daemon could never mark: .*No module named 'boto3' -- .*install the package python3-boto3$", done.stderr.strip())
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize("content, said", [("raise KeyError('torn\\nin two')", "KeyError: 'torn"), ("(", "SyntaxError"), ("import sys\nsys.exit(0)", "SystemExit")])
def test_with_a_broken_boto3_the_daemon_refuses_to_start(tmp_path, metadata, content, said):
    (tmp_path / "boto3").mkdir()
    (tmp_path / "boto3" / "__init__.py").write_text(content)
    program = run("-healthcheckfile=-", stdin=EXAMPLE, env={"PYTHONPATH": str(tmp_path), "AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.url})
    assert program.process.returncode == 1
    assert said in program.err[-1] and "install the package python3-boto3" in program.err[-1]


RESOLVER = """\
echo nameserver 127.0.0.1 > {0}/resolv.conf
echo options timeout:30 attempts:5 >> {0}/resolv.conf
mount --bind {0}/resolv.conf /etc/resolv.conf
{1} -c '
import socket
deaf = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
deaf.bind(("127.0.0.1", 53))
print("deaf", flush=True)
input()
' < {0}/hold > {0}/deaf &
exec 9> {0}/hold
until grep -q deaf {0}/deaf; do sleep 0.05; done
"""


def test_name_resolution_that_hangs_fails_the_check_and_keeps_nothing_from_ending(tmp_path):
    os.mkfifo(tmp_path / "hold")
    (tmp_path / "f.yml").write_text(
        yaml_of(
            {
                "hangs": {"endpoint": "http://service.example/", "timeout": "300ms", "frequency": "200ms", "threshold": "4"},
                "tcp": {"type": "tcp", "endpoint": "service.example:80", "timeout": "300ms", "threshold": "4", "frequency": "400ms"},
            },
            graceperiod="0", frequency="200ms",
        )
    )  # fmt: skip
    script = RESOLVER.format(tmp_path, sys.executable)
    script += f"ip link set lo up\n{sys.executable} {PROGRAM} -dry-run -verbose -healthcheckfile {tmp_path}/f.yml > {tmp_path}/out 2> {tmp_path}/err 9>&- & "
    script += f"""pid=$!
    for i in $(seq 600); do grep -q 'would have marked.*hangs.*tcp' {tmp_path}/err && break; sleep 0.1; done
    start=$(date +%s%N); kill $pid; wait $pid; echo status $? after $((($(date +%s%N) - start) / 1000000)) ms; exec 9>&-; wait"""
    done = subprocess.run(["unshare", "--net", "--mount", "bash", "-c", "ip link set lo up\n" + script], stdout=subprocess.PIPE, timeout=2 * PATIENCE)
    err = (tmp_path / "err").read_text()
    assert "no end after 0.3s: it hangs, in name resolution most likely" in err and "Traceback" not in err
    assert re.search("would have marked.*hangs failing .*; tcp failing", err)
    status, milliseconds = re.search(r"status (\d+) after (\d+) ms", done.stdout.decode()).groups()
    assert status == "0" and int(milliseconds) / 1000 == PROMPTLY
    stamps = [line[:23] for line in err.splitlines() if "Check hangs" in line]
    moments = [datetime.datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%S.%f") for stamp in stamps]
    assert 0.8 < (moments[1] - moments[0]).total_seconds() < 20  # three more failures, 300 ms apart


class Gateway:
    """Auto Scaling's API as the program sees it: moto, behind a recorder that can break any call.

    `fault` is called with each request and its action first, and may answer, delay or break it.
    """

    def __init__(self, moto):
        self.calls = []  # (time, action, HealthStatus)
        self.fault = None
        self.busy, self.most_at_once = set(), 0
        gateway = self
        address = moto.url.split("//")[1]

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def answer(self, status, text, headers=()):
                self.leave()  # before the next call can come
                self.send_response(status)
                for name, value in [*headers, ("Content-Length", str(len(text)))]:
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode() if isinstance(text, str) else text)

            def leave(self):
                with contextlib.suppress(KeyError):
                    gateway.busy.remove(self)

            def refuse(self, status, code, text):
                kind = "Sender" if status < 500 else "Receiver"
                error = f"<Error><Type>{kind}</Type><Code>{code}</Code><Message>{text}</Message></Error>"
                body = f'<ErrorResponse xmlns="http://autoscaling.amazonaws.com/doc/2011-01-01/">{error}<RequestId>r</RequestId></ErrorResponse>'
                self.answer(status, body, [("Content-Type", "text/xml")])

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                fields = dict(pair.split("=", 1) for pair in body.decode().split("&"))
                gateway.busy.add(self)
                gateway.most_at_once = max(gateway.most_at_once, len(gateway.busy))
                try:
                    gateway.calls.append((time.monotonic(), fields["Action"], fields.get("HealthStatus")))
                    if gateway.fault and gateway.fault(self, fields["Action"]):
                        return
                    import http.client

                    with contextlib.closing(http.client.HTTPConnection(address, timeout=PATIENCE)) as upstream:
                        upstream.request("POST", self.path, body, dict(self.headers))
                        response = upstream.getresponse()
                        self.answer(response.status, response.read(), [("Content-Type", response.getheader("Content-Type"))])
                finally:
                    self.leave()

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def marks(self, status="Unhealthy"):
        return [when for when, _, wanted in list(self.calls) if wanted == status]

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
        wait_until(lambda: not self.busy, "the last call, which may change what the next test begins with")


class Cloud:
    """What an instance has around it: metadata, Auto Scaling, and an id in the group."""

    def __init__(self, moto):
        self.moto = moto
        self.instance = moto.instances()[0]["InstanceId"]
        moto.api.set_instance_health(InstanceId=self.instance, HealthStatus="Healthy")
        self.metadata = Metadata(self.instance)
        self.gateway = Gateway(moto)
        self.env = {
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": self.metadata.url,
            "AWS_ENDPOINT_URL_AUTO_SCALING": self.gateway.url,
            "AWS_METADATA_SERVICE_TIMEOUT": "20",  # the double shares a starved machine
        }

    def health(self):
        return self.moto.health(self.instance)

    def stop(self):
        self.metadata.stop()
        self.gateway.stop()


@pytest.fixture
def cloud(moto):
    cloud = Cloud(moto)
    yield cloud
    cloud.stop()


class Service:
    """A real service from Debian, that can be killed, stopped and started again."""

    def __init__(self, command):
        self.command = command
        self.start()

    def start(self):
        # A session of its own, so that a signal reaches its workers too.
        self.process = subprocess.Popen(self.command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def signal(self, number):
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)


def listens(port):
    with socket.socket() as sock:
        return not sock.connect_ex(("127.0.0.1", port))


@contextlib.contextmanager
def nginx(tmp_path):
    """Debian's nginx on loopback, with /ping.html; yields (service, port)."""
    port = free_port()
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "ping.html").write_text("pong\n")
    (tmp_path / "nginx.conf").write_text(
        f"user root; daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log;\nevents {{}}\n"
        f"http {{ access_log {tmp_path}/access.log; server {{ listen 127.0.0.1:{port}; root {tmp_path}/www; }} }}\n"
    )
    with Service([shutil.which("nginx") or "/usr/sbin/nginx", "-c", str(tmp_path / "nginx.conf")]) as service:
        wait_until(lambda: listens(port), "nginx")
        yield service, port


@contextlib.contextmanager
def memcached():
    port = free_port()
    with Service(["memcached", "-l", "127.0.0.1", "-p", str(port), "-U", "0", "-u", "root"]) as service:
        wait_until(lambda: listens(port), "memcached")
        yield service, port


def scaled_example(nginx_port, memcached_port):
    """The original's example with its ports, and its times ten times as short."""
    text = EXAMPLE.replace("localhost:80", f"localhost:{nginx_port}").replace("11211", str(memcached_port))
    return text.replace("10s", "1s").replace("frequency: 1s\n", "frequency: 100ms\n").replace("frequency: 100ms\nchecks", "frequency: 1s\nchecks")


def test_the_main_job_with_nginx_memcached_boto3_and_auto_scaling(cloud, tmp_path):
    (tmp_path / "f.yml").write_text("")
    with nginx(tmp_path) as (web, web_port), memcached() as (cache, cache_port):
        (tmp_path / "f.yml").write_text(scaled_example(web_port, cache_port).replace("    frequency: 100ms\n  nginx", "    frequency: 1s\n  nginx"))
        with Program("-healthcheckfile", str(tmp_path / "f.yml"), env=cloud.env) as program:
            program.wait_for("Verdict healthy")
            assert cloud.health() == "Healthy" and not cloud.gateway.calls

            killed = time.monotonic()
            web.signal(signal.SIGKILL)
            wait_until(lambda: cloud.health() == "Unhealthy", "the mark")
            # threshold 10, frequency 100 ms: no call can come before the tenth failure, 0.9 s after the kill
            assert 0.9 <= cloud.gateway.marks()[0] - killed
            line = program.wait_for("Marked Instance as Unhealthy")
            assert cloud.instance in line and "nginx failing (" in line and "Connection refused" in line and "memcached" not in line
            assert len(program.err) >= 3 and "Check nginx failed (1 of 10)" in "\n".join(program.err)
            web.start()
            wait_until(lambda: cloud.health() == "Healthy", "the mark to be taken back")
            program.wait_for("Marked Instance as Healthy")

            cache.signal(signal.SIGKILL)
            program.wait_for("memcached failing .*Connection refused")
            wait_until(lambda: cloud.health() == "Unhealthy", "the second mark")
            cache.start()
            wait_until(lambda: cloud.health() == "Healthy", "the second mark to be taken back")
            assert cloud.gateway.most_at_once == 1
            assert program.stop() == (0, PROMPTLY)
    assert {action for _, action, _ in cloud.gateway.calls} == {"SetInstanceHealth"}


def test_a_service_that_is_stopped_passes_tcp_but_not_http(cloud, tmp_path):
    with nginx(tmp_path) as (web, web_port), memcached() as (cache, cache_port):
        text = scaled_example(web_port, cache_port).replace("timeout: 1s", "timeout: 20s", 1).replace("timeout: 1s", "timeout: 200ms")
        with Program("-healthcheckfile=-", "-verbose", stdin=text, env=cloud.env) as program:
            program.wait_for("Verdict healthy")
            cache.signal(signal.SIGSTOP)  # it hangs, but the kernel goes on accepting for it
            before = len([line for line in program.out if "Probe of memcached passed" in line])
            program.wait_for("Probe of memcached passed", before + 20)
            assert not [line for line in program.lines if "memcached failed" in line] and cloud.health() == "Healthy"
            web.signal(signal.SIGSTOP)
            wait_until(lambda: cloud.health() == "Unhealthy", "the mark")
            assert "nginx failing (" in program.wait_for("Marked Instance as Unhealthy: .*timed out after 0.2s waiting for the response")
            web.signal(signal.SIGCONT)
            cache.signal(signal.SIGCONT)
            wait_until(lambda: cloud.health() == "Healthy", "the mark to be taken back")
            assert program.stop() == (0, PROMPTLY)


def gateway_client(cloud):
    import boto3

    options = {"region_name": "eu-west-1", "aws_access_key_id": "A", "aws_secret_access_key": "S"}
    return boto3.client("autoscaling", endpoint_url=cloud.gateway.url, **options)


def describing(instance, *pages):
    """A fault of the gateway: `instance` is in a group, which is described by these pages.

    Each page is a list of groups: (desired capacity, [(id, weight or "", lifecycle state, health status)]).
    """

    def fault(request, action):
        def answer(result):
            opening = f'<{action}Response xmlns="http://autoscaling.amazonaws.com/doc/2011-01-01/"><{action}Result>'
            request.answer(200, f"{opening}{result}</{action}Result></{action}Response>", [("Content-Type", "text/xml")])
            return True

        def member(**fields):
            return "<member>" + "".join(f"<{name}>{text}</{name}>" for name, text in fields.items() if text != "") + "</member>"

        if action == "DescribeAutoScalingInstances":
            row = member(InstanceId=instance, AutoScalingGroupName="group")
            return answer(f"<AutoScalingInstances>{row}</AutoScalingInstances>")
        if action == "DescribeAutoScalingGroups":
            names = ("InstanceId", "WeightedCapacity", "LifecycleState", "HealthStatus")
            page = asked.pop(0)
            groups = "".join(
                member(AutoScalingGroupName="group", DesiredCapacity=desired, Instances="".join(member(**dict(zip(names, row))) for row in rows))
                for desired, rows in page
            )
            token = f"<NextToken>{len(asked)}</NextToken>" if asked else ""
            return answer(f"<AutoScalingGroups>{groups}</AutoScalingGroups>{token}")
        return False

    asked = list(pages)
    return fault


# ---- Faults, from outside of the process -------------------------------------------------------

DEAD = {"endpoint": "http://127.0.0.1:1/", "frequency": "100ms", "threshold": "3"}  # nothing listens there


def sick(cloud, *arguments, checks=None, top=None, env=None, **options):
    """The program on an instance whose service is dead (or with these checks), with times scaled down."""
    text = yaml_of(checks or {"web": DEAD}, **{"graceperiod": "0", "frequency": "300ms", **(top or {})})
    return Program("-healthcheckfile=-", "-verbose", *arguments, stdin=text, env={**cloud.env, **(env or {})}, **options)


@contextlib.contextmanager
def passing_at_first():
    """A service; yields its check, and what makes it fail from then on."""
    answers = [OK]
    with serving(lambda connection: answering(answers[-1])(connection)) as port:
        web = {**DEAD, "endpoint": f"http://127.0.0.1:{port}/", "timeout": "20s"}
        yield web, lambda: answers.append("HTTP/1.1 500 No\r\n\r\n")


def probes(program, name="web"):
    return len([line for line in list(program.out) if f"Probe of {name} " in line])


def refusing(status, code, text):
    return lambda request: request.refuse(status, code, text) or True


def resetting(request):
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.connection.close()
    request.close_connection = True
    return True


def hanging(request):
    request.connection.recv(1)  # returns when the other side has given up
    return True


AWS_FAULTS = {
    "throttling": (refusing(400, "Throttling", "Rate exceeded"), "Throttling.* -- AWS limits the calls"),
    "500": (refusing(500, "InternalFailure", "An internal error"), "InternalFailure.* -- AWS has a fault"),
    "503": (refusing(503, "ServiceUnavailable", "Try later"), "ServiceUnavailable.* -- AWS has a fault"),
    "malformed": (lambda request: request.answer(200, "<html><p>a captive portal") or True, " -- AWS has a fault"),
    "reset": (resetting, "Connection.* -- look at routes"),
    "hang": (hanging, "[Tt]imeout.* -- look at routes"),
    "denied": (refusing(403, "AccessDenied", "User is not authorized"), " -- allow autoscaling:SetInstanceHealth in the policy"),
    "contention": (refusing(500, "ResourceContention", "You already have a pending update"), " -- the group is being changed"),
    "grace": (
        refusing(400, "ValidationError", "The age of the instance (9 seconds) is less than the configured grace period of 300 seconds"),
        " -- a group refuses marks within its health check grace period",
    ),
    "no group": (
        refusing(400, "ValidationError", "Instance Id not found - No managed instance found for instance ID i-0"),
        " -- attach the instance to a group",
    ),
    "expired": (refusing(403, "ExpiredToken", "The security token included in the request is expired"), " -- look at the clock"),
}


@pytest.mark.parametrize("fault", AWS_FAULTS)
def test_the_mark_gets_through_when_a_fault_of_aws_ends(cloud, fault):
    answer, said = AWS_FAULTS[fault]
    cloud.gateway.fault = lambda request, action: answer(request)
    with sick(cloud) as program:
        line = program.wait_for("Could not mark", 1 if fault == "hang" else 2)
        assert re.search(said, line), line
        before = probes(program)
        wait_until(lambda: probes(program) > before + 5, "probes while AWS has a fault")

        def failures():
            return len([line for line in program.err if "Could not mark" in line])

        assert failures() <= len(cloud.gateway.calls)  # one line for each call, of up to three attempts
        wait_until(lambda: len(cloud.gateway.calls) <= 3 * failures() + 3, "the lines")
        cloud.gateway.fault = None
        wait_until(lambda: cloud.health() == "Unhealthy", "the mark")
        program.wait_for("Marked Instance as Unhealthy")
        # (The gateway sees the end of a hung attempt a moment later than the program.)
        assert cloud.gateway.most_at_once <= (2 if fault == "hang" else 1)
        cloud.gateway.fault = lambda request, action: answer(request)
        calls = len(cloud.gateway.calls)
        wait_until(lambda: len(cloud.gateway.calls) > calls, "a call")
        assert program.stop() == (0, PROMPTLY)
    errors = [line for line in program.err if "ERROR" in line]
    assert errors and all(re.search("Could not mark i-[0-9a-f]+ as Unhealthy, again in .*", line) for line in errors)


def test_as_its_unit_runs_it_the_program_begins_anew_compiled_and_marks(cloud):
    with sick(cloud, flags=["-I"]) as program:
        program.wait_for("Ready to mark")
        words = pathlib.Path(f"/proc/{program.process.pid}/cmdline").read_text().split("\0")
        assert words[1:3] == ["-I", "-c"] and words[4:6] == [str(PROGRAM), "-healthcheckfile=-"]
        wait_until(lambda: cloud.health() == "Unhealthy", "the mark")
        assert program.stop() == (0, PROMPTLY)


def test_what_is_imported_later_is_the_real_thing_for_everybody_else():
    script = """
import sys, types, ec2_local_healthchecker as hc
with hc.later("ssl"):
    import http.client
assert "ssl" not in sys.modules and not {"inspect", "pickle"} & set(sys.modules), sys.modules.keys()
import inspect, pickle, ssl, traceback
assert {type(module) for module in (inspect, pickle, ssl, traceback)} == {types.ModuleType}
assert http.client.ssl.SSLContext is ssl.SSLContext and http.client.HTTPSConnection("localhost")
assert hc.logging.handlers.pickle.dumps is pickle.dumps
"""
    if sys.version_info >= (3, 12):  # there, dataclasses imports what imports inspect
        script = script.replace('{"inspect", "pickle"}', '{"pickle"}')
    subprocess.run([sys.executable, "-c", script], cwd=HERE, check=True)


def test_calls_come_at_the_pace_of_the_backoff_whatever_comes_of_them(cloud):
    with sick(cloud) as program:
        wait_until(lambda: len(cloud.gateway.marks()) >= 6, "six calls")
        program.stop()
    times = cloud.gateway.marks()
    for gap, middle in zip((b - a for a, b in zip(times, times[1:])), (0.3, 0.6, 1.2, 2.4, 4.8)):
        assert gap > 0.8 * middle - 0.05


def test_credentials_that_come_late_are_found(cloud):
    held = {name: cloud.metadata.items.pop(name) for name in list(cloud.metadata.items) if name.startswith("iam/")}
    with sick(cloud) as program:
        assert " -- give the instance a profile whose role allows" in program.wait_for("A mark would not succeed now: ")
        program.wait_for("Could not mark .*Unable to locate credentials -- give the instance a profile", 2)
        cloud.metadata.items.update(held)
        wait_until(lambda: cloud.health() == "Unhealthy", "the mark")


def test_credentials_that_have_expired_are_replaced(cloud):
    good = cloud.metadata.items["iam/security-credentials/role"]
    cloud.metadata.items["iam/security-credentials/role"] = json.dumps({**json.loads(good), "Expiration": "2020-01-01T00:00:00Z"})
    cloud.gateway.fault = lambda request, action: request.refuse(403, "ExpiredToken", "The security token is expired") or True
    with sick(cloud) as program:
        program.wait_for("Could not mark .* -- look at the clock", 2)
        cloud.metadata.items["iam/security-credentials/role"] = good
        cloud.gateway.fault = None
        wait_until(lambda: cloud.health() == "Unhealthy", "the mark")


def test_a_proxy_in_the_environment_is_for_aws_and_not_for_metadata_or_probes(cloud):
    seen = []

    def talk(connection):
        head = read_head(connection)
        seen.append(head.split("\r\n")[0])
        left = int(re.search(r"(?i)content-length: (\d+)", head)[1]) - len(head.partition("\r\n\r\n")[2])
        while left > 0:
            left -= len(connection.recv(4096))
        cloud.moto.api.set_instance_health(InstanceId=cloud.instance, HealthStatus="Unhealthy")
        answer = '<SetInstanceHealthResponse xmlns="http://autoscaling.amazonaws.com/doc/2011-01-01/"></SetInstanceHealthResponse>'
        connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Type: text/xml\r\nContent-Length: {len(answer)}\r\n\r\n{answer}".encode())

    with serving(talk) as port:
        proxy = f"http://127.0.0.1:{port}"
        env = {"http_proxy": proxy, "HTTP_PROXY": proxy, "AWS_ENDPOINT_URL_AUTO_SCALING": "http://autoscaling.example"}
        with sick(cloud, env=env) as program:
            program.wait_for("Marked Instance as Unhealthy")
    assert set(seen) == {"POST http://autoscaling.example/ HTTP/1.1"}
    assert ("GET", "/latest/meta-data/iam/security-credentials/role") in cloud.metadata.requests


def test_a_dead_proxy_is_named(cloud):
    env = {"http_proxy": "http://127.0.0.1:1", "AWS_ENDPOINT_URL_AUTO_SCALING": "http://autoscaling.example"}
    with sick(cloud, env=env) as program:
        assert "proxy" in program.wait_for("Could not mark .* -- look at routes, security groups, VPC endpoint and proxy")


@pytest.mark.parametrize("fault", ["down", "hangs", "slow", "503", "no lifecycle state"])
def test_metadata_in_trouble_does_not_keep_a_known_instance_from_being_marked(cloud, fault):
    cloud.env["AWS_METADATA_SERVICE_TIMEOUT"] = "1"
    with sick(cloud, checks={"web": {**DEAD, "threshold": "20"}}) as program:  # there is time to get to know it
        program.wait_for("Ready to mark i-")
        env_credentials = fault in ("down", "hangs", "503")  # then there are none from metadata
        if fault == "down":
            cloud.metadata.stop()
        elif fault == "no lifecycle state":
            del cloud.metadata.items["autoscaling/target-lifecycle-state"]
        else:
            cloud.metadata.fault = {
                "hangs": hanging,
                "slow": lambda request: time.sleep(0.7),
                "503": lambda request: request.answer("", 503) or True,
            }[fault]
        if env_credentials:
            program.wait_for("Could not mark .*Unable to locate credentials")
            assert program.stop() == (0, PROMPTLY)
        else:
            wait_until(lambda: cloud.health() == "Unhealthy", "the mark")
    if env_credentials:
        cloud.env.update(AWS_ACCESS_KEY_ID="A", AWS_SECRET_ACCESS_KEY="S", INSTANCE_ID=cloud.instance, AWS_REGION="eu-west-1")
        with sick(cloud) as program:
            program.wait_for("Instance metadata cannot be read: .* -- enable IMDSv2")
            wait_until(lambda: cloud.health() == "Unhealthy", "the mark")


def test_metadata_that_comes_late_is_read_before_a_call(cloud):
    cloud.metadata.fault = lambda request: request.answer("", 503) or True
    with sick(cloud) as program:
        program.wait_for("Instance metadata cannot be read: HTTP status 503")
        assert " -- enable IMDSv2 for this instance, or set INSTANCE_ID and AWS_REGION" in program.wait_for("Could not mark this instance .*unknown")
        assert not cloud.gateway.calls
        cloud.metadata.fault = None
        wait_until(lambda: cloud.health() == "Unhealthy", "the mark")


def test_a_strangers_id_in_the_environment_is_never_marked(cloud):
    with sick(cloud, env={"INSTANCE_ID": cloud.moto.instances()[1]["InstanceId"]}) as program:
        program.wait_for("WARNING INSTANCE_ID is .*: remove the variable")  # by the rehearsal
        line = program.wait_for("ERROR Not marking")
        assert "remove the variable" in line and cloud.instance in line
        wait_until(lambda: len([1 for _, path in cloud.metadata.requests if path.endswith("instance-id")]) >= 6, "more looks")
        assert len([line for line in program.err if "Not marking" in line]) == 1
    assert not cloud.gateway.calls


@pytest.mark.parametrize("state", ["Standby", "Detached", "Terminated", "Warmed:Stopped", "Warmed:Running"])
def test_out_of_service_it_holds_and_back_in_service_a_grace_period_passes_first(cloud, state):
    cloud.metadata.items["autoscaling/target-lifecycle-state"] = state
    with sick(cloud, "-launchtime=-1", top={"graceperiod": "2s"}) as program:
        program.wait_for(f"Not marking {cloud.instance} as Unhealthy now, looking again in 0s: target lifecycle state {state}")
        looks = len(cloud.metadata.requests)
        wait_until(lambda: len(cloud.metadata.requests) > looks + 12, "looks at each verdict")
        assert len([line for line in program.err if "Not marking" in line]) == 1 and not cloud.gateway.calls
        back = time.monotonic()
        cloud.metadata.items["autoscaling/target-lifecycle-state"] = "InService"
        wait_until(lambda: cloud.health() == "Unhealthy", "the mark")
        assert cloud.gateway.marks()[0] - back >= 2


def test_a_call_that_is_no_longer_wanted_is_not_sent_again_by_botocore(cloud, monkeypatch):
    for name, value in cloud.env.items():
        monkeypatch.setenv(name, value)
    marker = hc.Marker(hc.Inbox(), False)
    marker.wanted = "Unhealthy"

    def fault(request, action):
        marker.wanted = None  # the service recovers while the first attempt is under way
        return request.refuse(500, "InternalFailure", "x") or True

    cloud.gateway.fault = fault
    order = hc.Order("Unhealthy", hc.Seen(), None)
    outcome = marker.carry_out(order)
    assert (outcome.kind, outcome.acted) == (hc.WITHDRAWN, True) and len(cloud.gateway.calls) == 1
    outcome = marker.carry_out(order)
    assert (outcome.kind, outcome.acted) == (hc.WITHDRAWN, False) and len(cloud.gateway.calls) == 1


def test_the_weights_of_a_group_are_read_and_are_one_where_absent(cloud):
    rows = [("i-1", "3", "InService", "Healthy"), ("i-2", "4", "Terminating", "UNHEALTHY"), ("i-3", "", "Pending", "Healthy")]
    cloud.gateway.fault = describing("i-1", [(9, rows)])
    assert hc.describe_group(gateway_client(cloud), "i-1") == (9, 3, [(4, "Terminating", "UNHEALTHY"), (1, "Pending", "Healthy")])


def test_a_group_on_a_later_page_is_found(cloud):
    group = (2, [("i-1", "", "InService", "Healthy"), ("i-2", "", "InService", "Healthy")])
    cloud.gateway.fault = describing("i-1", [], [], [group])
    assert hc.describe_group(gateway_client(cloud), "i-1") == (2, 1, [(1, "InService", "Healthy")])
    assert len(cloud.gateway.calls) == 4


def test_an_instance_that_was_replaced_or_whose_group_is_gone(cloud):
    cloud.gateway.fault = describing("i-1", [(2, [("i-2", "5", "InService", "Healthy"), ("i-3", "5", "Pending", "Healthy")])])
    assert hc.describe_group(gateway_client(cloud), "i-1") == (2, 1, [(5, "InService", "Healthy"), (5, "Pending", "Healthy")])
    cloud.gateway.fault = describing("i-1", [])
    with pytest.raises(hc.NotInGroup):
        hc.describe_group(gateway_client(cloud), "i-1")


@pytest.fixture
def marking(cloud, monkeypatch):
    """Carries out one order under a limit of 40 %; returns its outcome, and what was called for it."""
    for name, value in cloud.env.items():
        monkeypatch.setenv(name, value)
    marker = hc.Marker(hc.Inbox(), False)

    def carry_out(status="Unhealthy", limit=40):
        marker.wanted, before = status, len(cloud.gateway.calls)
        outcome = marker.carry_out(hc.Order(status, hc.Seen(), limit))
        return outcome, [action for _, action, _ in cloud.gateway.calls[before:]]

    return carry_out


LOOK = ["DescribeAutoScalingInstances", "DescribeAutoScalingGroups"]


def test_over_the_limit_no_call_is_made_until_the_group_can_spare_the_instance(cloud, marking):
    other = cloud.moto.instances()[1]["InstanceId"]
    cloud.moto.api.set_instance_health(InstanceId=other, HealthStatus="Unhealthy")
    try:
        outcome, calls = marking()
        assert (outcome.kind, outcome.text, outcome.acted) == (hc.CROWDED, "max_unhealthy: more than 40% of the group is out", False)
        assert calls == LOOK and cloud.health() == "Healthy"
        assert marking(limit=100)[1] == [*LOOK, "SetInstanceHealth"]
        cloud.moto.api.set_instance_health(InstanceId=cloud.instance, HealthStatus="Healthy")
    finally:
        cloud.moto.api.set_instance_health(InstanceId=other, HealthStatus="Healthy")
    outcome, calls = marking()
    assert (outcome.kind, calls) == (hc.CALLED, [*LOOK, "SetInstanceHealth"]) and cloud.health() == "Unhealthy"


def test_a_mark_is_taken_back_whatever_the_limit_says_and_without_a_look(cloud, marking):
    cloud.moto.api.set_instance_health(InstanceId=cloud.instance, HealthStatus="Unhealthy")
    cloud.gateway.fault = lambda request, action: action in LOOK and (request.refuse(403, "AccessDenied", "x") or True)
    outcome, calls = marking("Healthy", limit=1)
    assert (outcome.kind, calls) == (hc.CALLED, ["SetInstanceHealth"]) and cloud.health() == "Healthy"


def test_without_a_limit_the_group_is_not_described(cloud, marking):
    outcome, calls = marking(limit=None)
    assert (outcome.kind, calls) == (hc.CALLED, ["SetInstanceHealth"])


DENIED = "User: arn:aws:sts::1:assumed-role/r/i-1 is not authorized to perform: autoscaling:{0}"


@pytest.mark.parametrize("denied", LOOK)
@pytest.mark.parametrize("status, code", [(403, "AccessDenied"), (400, "Throttling"), (500, "InternalFailure")])
def test_a_group_that_cannot_be_described_is_not_marked_in(cloud, marking, denied, status, code):
    cloud.gateway.fault = lambda request, action: action == denied and (request.refuse(status, code, DENIED.format(action)) or True)
    outcome, calls = marking()
    assert outcome.kind == hc.CROWDED and outcome.level == hc.logging.ERROR and not outcome.acted
    assert "SetInstanceHealth" not in calls and cloud.health() == "Healthy"
    if code == "AccessDenied":
        assert outcome.text.endswith("-- allow autoscaling:DescribeAutoScaling* in the policy of the instance's role")
        assert f"autoscaling:{denied}" in outcome.text


@pytest.fixture
def hurried(monkeypatch, tmp_path):
    """The program waits for up to half a second, and not half a minute, before it looks at the group."""
    text, window = PROGRAM.read_text(), "max(frequency, 30.0)"
    assert text.count(window) == 1
    (tmp_path / "program.py").write_text(text.replace(window, "0.5"))
    monkeypatch.setitem(globals(), "PROGRAM", tmp_path / "program.py")


def test_a_description_that_is_denied_holds_with_one_error_line_and_is_warned_of_at_boot(cloud, hurried):
    cloud.gateway.fault = lambda request, action: action in LOOK and (request.refuse(403, "AccessDenied", DENIED.format(action)) or True)
    with sick(cloud, top={"max_unhealthy": "40%"}) as program:
        allow = "is not authorized to perform: autoscaling:DescribeAutoScalingInstances -- allow autoscaling:DescribeAutoScaling\\* in the policy"
        program.wait_for("WARNING A mark would not succeed now: .*" + allow)
        program.wait_for("ERROR Not marking i-[0-9a-f]+ as Unhealthy now, looking again in [0-9]+s: .*" + allow)
        wait_until(lambda: len(cloud.gateway.calls) > 6, "more looks")
        assert len([line for line in program.err if "ERROR" in line]) == 1
        assert not cloud.gateway.marks()
        cloud.gateway.fault = None
        wait_until(lambda: cloud.health() == "Unhealthy", "the mark")
        assert program.stop() == (0, PROMPTLY)


def test_over_the_limit_the_program_holds_until_the_group_recovers(cloud, hurried):
    other = cloud.moto.instances()[1]["InstanceId"]
    cloud.moto.api.set_instance_health(InstanceId=other, HealthStatus="Unhealthy")
    try:
        with sick(cloud, top={"max_unhealthy": "40%"}) as program:
            program.wait_for("Not marking i-[0-9a-f]+ as Unhealthy now, looking again in [0-9]+s: max_unhealthy: more than 40%")
            looks = len(cloud.gateway.calls)
            wait_until(lambda: len(cloud.gateway.calls) > looks + 6, "more looks")
            assert len([line for line in program.err if "Not marking" in line]) == 1 and not cloud.gateway.marks()
            cloud.moto.api.set_instance_health(InstanceId=other, HealthStatus="Healthy")
            wait_until(lambda: cloud.health() == "Unhealthy", "the mark")
            program.wait_for("Marked Instance as Unhealthy: " + cloud.instance)
    finally:
        cloud.moto.api.set_instance_health(InstanceId=other, HealthStatus="Healthy")


@pytest.mark.parametrize("limit, described", [("40%", LOOK), (None, [])])
def test_the_rehearsal_describes_the_group_when_there_is_a_limit_and_marks_nothing(cloud, limit, described):
    with sick(cloud, checks={"web": {**DEAD, "threshold": "1000"}}, top={"max_unhealthy": limit} if limit else {}) as program:
        program.wait_for("Ready to mark i-")
        assert [action for _, action, _ in cloud.gateway.calls] == described
        program.stop()
        assert not [line for line in program.err if "A mark would not succeed" in line]


def test_a_pause_of_the_process_any_number_of_times_is_no_evidence(cloud):
    with serving(lambda connection: [time.sleep(0.05), answering(OK)(connection)]) as port:
        web = {"endpoint": f"http://127.0.0.1:{port}/", "frequency": "100ms", "timeout": "5s", "threshold": "2"}
        tcp = {"type": "tcp", "endpoint": f"127.0.0.1:{port}", "frequency": "50ms", "timeout": "5s", "threshold": "2"}
        with sick(cloud, checks={"web": web, "tcp": tcp}) as program:
            program.wait_for("Verdict healthy")
            for _ in range(3):
                program.process.send_signal(signal.SIGSTOP)
                time.sleep(6)  # longer than a timeout, and many periods
                program.process.send_signal(signal.SIGCONT)
                before = probes(program)
                wait_until(lambda: probes(program) > before + 5, "probes after a pause")
            for name in ("web", "tcp"):  # at most one failure for each pause, and none after it
                assert len([line for line in program.err if f"Check {name} failed (1 of 2)" in line]) <= 3
            assert not [line for line in program.lines if " failing " in line] and not cloud.gateway.calls
            assert program.stop() == (0, PROMPTLY)


@pytest.mark.parametrize("gap", [0, 0.002, 0.05])
def test_two_signals_at_once_are_both_acted_on(tmp_path, gap):
    (tmp_path / "f.yml").write_text(yaml_of({"web": DEAD}, graceperiod="1h", frequency="1h"))
    for _ in range(6):
        with Program("-dry-run", "-healthcheckfile", str(tmp_path / "f.yml")) as program:
            program.wait_for("Ready")
            program.process.send_signal(signal.SIGHUP)
            time.sleep(gap)
            assert program.stop() == (0, PROMPTLY)


def test_a_signal_at_any_moment_ends_it_within_a_second_and_without_a_traceback(cloud):
    times = []
    for n in range(30):
        with sick(cloud) as program:
            time.sleep(n * 0.03)
            # Before the program is there to see it, Python itself takes SIGINT, and tells.
            status, seconds = program.stop(signal.SIGINT if n % 2 and program.lines else signal.SIGTERM)
            assert status in (0, -signal.SIGTERM) and seconds == PROMPTLY, program.lines
            assert status == 0 or not program.lines
            times.append(seconds)
    assert sorted(times)[20] < 1


def test_reloads_of_all_kinds_while_probes_hang(cloud, tmp_path):
    path = tmp_path / "f.yml"
    with serving(lambda connection: time.sleep(PATIENCE)) as port:
        hangs = {"endpoint": f"http://127.0.0.1:{port}/", "timeout": "20s", "frequency": "100ms", "threshold": "1"}
        path.write_text(yaml_of({"hangs": hangs, "web": {**DEAD, "threshold": "100"}}, graceperiod="0", frequency="300ms"))
        with Program("-verbose", "-healthcheckfile", str(path), env=cloud.env) as program:
            wait_until(lambda: probes(program) > 2, "probes")
            for number, content in enumerate((b"nonsense", None, b"\xff", b"checks:\n"), 1):
                path.write_bytes(content) if content is not None else path.unlink()
                program.process.send_signal(signal.SIGHUP)
                program.wait_for(f"Configuration not reloaded, the old one stays: {path}", number)
            path.unlink()
            os.mkfifo(path)
            program.process.send_signal(signal.SIGHUP)
            program.wait_for("is not a file any more")
            path.unlink()
            before = probes(program)
            path.write_text(yaml_of({"hangs": hangs, "web": {**DEAD, "threshold": "100"}, "new": {**DEAD, "threshold": "1"}}, graceperiod="0", frequency="300ms"))
            program.process.send_signal(signal.SIGHUP)
            program.process.send_signal(signal.SIGHUP)
            program.wait_for("Configuration reloaded: hangs, web, new")
            wait_until(lambda: probes(program) > before + 5, "probes after the reload")
            assert len([line for line in program.err if "Check web failed (1 of 100)" in line]) == 1  # it has kept its count
            wait_until(lambda: cloud.health() == "Unhealthy", "the mark for the new check")
            assert program.stop() == (0, PROMPTLY)


@pytest.mark.parametrize("fault", ["full disk", "closed pipe", "nobody reads"])
def test_a_log_that_cannot_be_written_stops_nothing(cloud, tmp_path, fault):
    (tmp_path / "f.yml").write_text(yaml_of({"web": DEAD}, graceperiod="0", frequency="300ms"))
    reader, writer = os.pipe()
    if fault == "full disk":
        os.close(writer)
        writer = os.open("/dev/full", os.O_WRONLY)
    elif fault == "closed pipe":
        os.close(reader)
        reader = None
    else:
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        os.set_blocking(writer, True)
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), "-verbose", "-healthcheckfile", str(tmp_path / "f.yml")],
        stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, env={**os.environ, **cloud.env},
    )  # fmt: skip
    try:
        wait_until(lambda: cloud.health() == "Unhealthy", "the mark")
        wait_until(lambda: len(cloud.gateway.marks()) >= 3, "more calls")
        start = time.monotonic()
        process.terminate()
        assert process.wait(PATIENCE) == 0 and time.monotonic() - start == PROMPTLY
    finally:
        process.kill()
        process.wait()
        for descriptor in (reader, writer):
            if descriptor is not None:
                os.close(descriptor)


def test_lines_that_nobody_took_are_counted(tmp_path):
    probed = []
    with serving(probed.append) as port:
        tcp = {"type": "tcp", "endpoint": f"127.0.0.1:{port}", "frequency": "10ms"}
        (tmp_path / "f.yml").write_text(yaml_of({f"c{n}": tcp for n in range(20)}, graceperiod="0"))
        reader, writer = os.pipe()
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), "-dry-run", "-verbose", "-healthcheckfile", str(tmp_path / "f.yml")],
            stdin=subprocess.DEVNULL, stdout=writer, stderr=writer,
        )  # fmt: skip
        try:
            os.close(writer)
            wait_until(lambda: len(probed) > 4000, "more lines than pipe and queue hold")
            giving_up = threading.Timer(PATIENCE, process.kill)
            giving_up.start()
            with open(reader) as pipe:
                assert any(re.search(r"WARNING \d+ lines of log were lost here", line) for line in pipe)
            giving_up.cancel()
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("fault", ["gone", "read-only", "a directory in the way"])
def test_a_status_file_in_trouble_stops_nothing(cloud, tmp_path, fault):
    directory = tmp_path / "run"
    directory.mkdir()
    with sick(cloud, env={"RUNTIME_DIRECTORY": str(directory)}, checks={"web": {**DEAD, "threshold": "20"}}) as program:
        wait_until(lambda: (directory / "status.json").exists(), "status.json")
        if fault == "gone":
            directory.rename(tmp_path / "away")
        elif fault == "read-only":
            subprocess.run(["mount", "--bind", "-o", "ro", str(directory), str(directory)], check=True)
        else:

            def put_in_the_way():
                with contextlib.suppress(OSError):  # it was just written again
                    (directory / "status.json").unlink()
                    (directory / "status.json").mkdir()
                return (directory / "status.json").is_dir()

            wait_until(put_in_the_way, "a directory in its place")
        try:
            program.wait_for("WARNING status.json cannot be written: ")
            wait_until(lambda: cloud.health() == "Unhealthy", "the mark")
            assert program.stop() == (0, PROMPTLY)
        finally:
            if fault == "read-only":
                subprocess.run(["umount", str(directory)], check=True)
    assert len([line for line in program.err if "cannot be written" in line]) in (1, 2)  # two, if it came while one was written


def test_a_mark_is_taken_back_by_the_next_run(cloud, tmp_path):
    with service_manager(tmp_path) as (env, messages, stored):
        with sick(cloud, env=env) as program:
            wait_until(lambda: cloud.health() == "Unhealthy", "the mark")
            wait_until(lambda: stored == ["marked"], "systemd to be told")
            program.process.kill()
        with serving(answering(OK)) as port:
            service = {"web": {**DEAD, "endpoint": f"http://127.0.0.1:{port}/"}}
            # As systemd starts it again (sd_listen_fds(3)): with what it has stored, and the names of that.
            again = ["sh", "-c", 'LISTEN_PID=$$ LISTEN_FDNAMES=marked exec "$@"', "sh"]
            with sick(cloud, env=env, checks=service, prefix=again) as program:
                wait_until(lambda: cloud.health() == "Healthy", "the mark to be taken back")
                wait_until(lambda: not stored, "systemd to be told")
                program.stop()


def limit(program, *options):
    subprocess.run(["prlimit", "--pid", str(program.process.pid), *options], check=True)


def test_running_out_of_descriptors_is_no_evidence_and_is_survived(cloud):
    with serving(answering(OK)) as port:
        web = {**DEAD, "endpoint": f"http://localhost:{port}/", "threshold": "2", "timeout": "20s"}
        tcp = {"type": "tcp", "endpoint": f"localhost:{port}", "frequency": "50ms", "threshold": "2", "timeout": "20s"}
        with sick(cloud, checks={"web": web, "tcp": tcp}) as program:
            program.wait_for("Ready to mark")  # (before 3.10, the first thread that ends needs a descriptor)
            program.wait_for("Verdict healthy")
            limit(program, "--nofile=3:4096")
            program.wait_for("ERROR A fault of this program, not counted, spoils the probes of web: OSError: .*Too many open files")
            program.wait_for("ERROR A fault of this program, not counted, spoils the probes of tcp: OSError: .*Too many open files")
            before = probes(program)
            wait_until(lambda: probes(program) > before + 20, "probes in vain")
            assert not [line for line in program.lines if "failed" in line or "failing" in line]
            limit(program, "--nofile=4096:4096")
            before = len([line for line in program.out if "Probe of web passed" in line])
            wait_until(lambda: len([line for line in program.out if "Probe of web passed" in line]) > before + 3, "probes that pass")
            assert not [line for line in program.lines if "failing" in line] and not cloud.gateway.calls


def test_a_mark_without_descriptors_is_made_when_there_are_some_again(cloud):
    with passing_at_first() as (web, fail), sick(cloud, checks={"web": web}) as program:
        program.wait_for("Ready to mark")
        fail()
        cloud.metadata.fault = lambda request: limit(program, "--nofile=3:4096")  # as soon as it begins with an order
        program.wait_for("Could not mark .*Too many open files", 2)
        assert not cloud.gateway.calls
        cloud.metadata.fault = None
        limit(program, "--nofile=4096:4096")
        wait_until(lambda: cloud.health() == "Unhealthy", "the mark")


# The limit on the threads of a user holds for users who are not root.
USER = ["setpriv", "--reuid=54321", "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


def test_threads_that_cannot_be_made_are_made_later(cloud, tmp_path):
    (tmp_path / "f.yml").write_text(yaml_of({f"web{n}": DEAD for n in range(5)}, graceperiod="0", frequency="300ms"))
    prefix = [*USER, "prlimit", "--nproc=4:100"]
    environment = {"PATH": os.environ["PATH"], **cloud.env}
    process = subprocess.Popen(
        [*prefix, sys.executable, str(PROGRAM), "-healthcheckfile", str(tmp_path / "f.yml")],
        stdin=subprocess.DEVNULL, stdout=open(tmp_path / "out", "w"), stderr=open(tmp_path / "err", "w"), env=environment,
    )  # fmt: skip
    try:
        wait_until(lambda: "Threads cannot be started, trying at each verdict" in (tmp_path / "err").read_text(), "the shortage")
        subprocess.run([*USER, "prlimit", "--pid", str(process.pid), "--nproc=100:100"], check=True)
        wait_until(lambda: "web4 failing" in (tmp_path / "err").read_text(), "all five checks")
        wait_until(lambda: cloud.health() == "Unhealthy", "the mark")
        assert (tmp_path / "err").read_text().count("Threads cannot be started") == 1
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("megabytes", [1, 3, 6, 10])
def test_a_memory_limit_reached_while_boto3_is_imported_is_survived(cloud, megabytes):
    with passing_at_first() as (web, fail), sick(cloud, checks={"web": web}) as program:
        program.wait_for("Ready to mark")
        status = pathlib.Path(f"/proc/{program.process.pid}/status").read_text()
        size = int(re.search(r"VmData:\s+(\d+) kB", status)[1]) * 1024
        limit(program, f"--data={size + megabytes * 2**20}:unlimited")
        fail()
        crashed = wait_until(
            lambda: program.process.poll() or re.search("Could not mark|fault of|AWS is gone", "\n".join(program.lines)),
            "the shortage",
        )  # fmt: skip
        # CPython itself may crash when memory runs out; then the service manager starts the program again.
        with contextlib.suppress(subprocess.CalledProcessError):  # (it may have by now)
            limit(program, "--data=unlimited:unlimited")
        wait_until(lambda: program.process.poll() or cloud.health() == "Unhealthy", "the mark")
        crashed = program.process.poll()
        assert crashed in (None, -signal.SIGSEGV, -signal.SIGABRT)
    if crashed:
        with sick(cloud) as program:
            wait_until(lambda: cloud.health() == "Unhealthy", "the mark")


def test_boto3_broken_after_the_start_and_repaired_is_found_again(cloud, tmp_path):
    import boto3

    home = pathlib.Path(boto3.__file__).parent
    (tmp_path / "boto3").symlink_to(home)
    with passing_at_first() as (web, fail), sick(cloud, env={"PYTHONPATH": str(tmp_path)}, checks={"web": web}) as program:
        program.wait_for("Ready to mark")
        (tmp_path / "boto3").unlink()
        (tmp_path / "boto3").mkdir()
        (tmp_path / "boto3" / "__init__.py").write_text("from nowhere import nothing")
        fail()
        program.wait_for("Could not mark .* -- boto3 is missing or broken: install the package python3-boto3", 2)
        shutil.rmtree(tmp_path / "boto3")
        (tmp_path / "boto3").symlink_to(home)
        wait_until(lambda: cloud.health() == "Unhealthy", "the mark")


PRELOADED = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* What the test writes into the file $FAULTS: seconds to step the wall clock by, and a thread to hit. */
struct faults { long step, kill_a_sleeper, hang_a_sleeper, no_files, stillborn, late; };
static volatile struct faults *faults(void) {
    static volatile struct faults *shared;
    if (!shared) shared = mmap(0, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, open(getenv("FAULTS"), O_RDWR), 0);
    return shared;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = syscall(SYS_clock_gettime, clock, now);
    if (!result && clock == CLOCK_REALTIME) now->tv_sec += faults()->step;
    return result;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    now->tv_sec = t.tv_sec, now->tv_usec = t.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *now) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return now ? (*now = t.tv_sec) : t.tv_sec;
}
/* As the kernel does: the wait ends when the wall clock, with its steps, reaches the moment. */
int sem_timedwait(sem_t *sem, const struct timespec *moment) {
    static int (*real)(sem_t *, const struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "sem_timedwait");
    for (;;) {
        struct timespec now, slice = {0, 0};
        clock_gettime(CLOCK_REALTIME, &now);
        if (now.tv_sec > moment->tv_sec || (now.tv_sec == moment->tv_sec && now.tv_nsec >= moment->tv_nsec)) return real(sem, &slice);
        syscall(SYS_clock_gettime, CLOCK_REALTIME, &slice);
        slice.tv_nsec += 5000000;
        if (slice.tv_nsec >= 1000000000) slice.tv_nsec -= 1000000000, slice.tv_sec++;
        int result = real(sem, &slice);
        if (!result || errno != ETIMEDOUT) return result;
    }
}
int sem_clockwait(sem_t *sem, clockid_t clock, const struct timespec *moment) {
    static int (*real)(sem_t *, clockid_t, const struct timespec *);
    if (clock == CLOCK_REALTIME) return sem_timedwait(sem, moment);
    if (!real) real = dlsym(RTLD_NEXT, "sem_clockwait");
    return real(sem, clock, moment);
}
/* The system is out of descriptors (its limit, fs.file-max, is everybody's: no test can lower it). */
int socket(int family, int kind, int protocol) {
    return faults()->no_files ? (errno = ENFILE, -1) : syscall(SYS_socket, family, kind, protocol);
}
int pipe2(int ends[2], int flags) {
    return faults()->no_files ? (errno = ENFILE, -1) : syscall(SYS_pipe2, ends, flags);
}
/* A thread that ends before it begins, as one does for which there is no memory; one that begins late. */
struct beginning { void *(*routine)(void *), *argument; };
static void *ending(void *unused) { return 0; }
static void *late(void *given) {
    struct beginning beginning = *(struct beginning *)given;
    free(given);
    usleep(400000);
    return beginning.routine(beginning.argument);
}
int pthread_create(pthread_t *thread, const pthread_attr_t *options, void *(*routine)(void *), void *argument) {
    static int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    if (!real) real = dlsym(RTLD_NEXT, "pthread_create");
    if (__sync_bool_compare_and_swap(&faults()->stillborn, 1, 0)) routine = ending;
    if (faults()->late) {
        struct beginning *beginning = malloc(sizeof *beginning);
        beginning->routine = routine, beginning->argument = argument;
        routine = late, argument = beginning;
    }
    return real(thread, options, routine, argument);
}
/* A thread in time.sleep(): made to raise SystemExit, or never to wake. */
static void hit(void) {
    if (__sync_bool_compare_and_swap(&faults()->hang_a_sleeper, 1, 0)) for (;;) pause();
    if (__sync_bool_compare_and_swap(&faults()->kill_a_sleeper, 1, 0)) {
        int (*ensure)(void) = dlsym(RTLD_DEFAULT, "PyGILState_Ensure");
        void (*release)(int) = dlsym(RTLD_DEFAULT, "PyGILState_Release");
        unsigned long (*self)(void) = dlsym(RTLD_DEFAULT, "PyThread_get_thread_ident");
        int (*raise)(unsigned long, void *) = dlsym(RTLD_DEFAULT, "PyThreadState_SetAsyncExc");
        void **exit = dlsym(RTLD_DEFAULT, "PyExc_SystemExit");
        int state = ensure();
        raise(self(), *exit);
        release(state);
    }
}
int clock_nanosleep(clockid_t clock, int flags, const struct timespec *moment, struct timespec *left) {
    static int (*real)(clockid_t, int, const struct timespec *, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_nanosleep");
    int result = real(clock, flags, moment, left);
    hit();
    return result;
}
int select(int count, fd_set *r, fd_set *w, fd_set *e, struct timeval *timeout) {
    static int (*real)(int, fd_set *, fd_set *, fd_set *, struct timeval *);
    if (!real) real = dlsym(RTLD_NEXT, "select");
    int result = real(count, r, w, e, timeout);
    if (!count) hit();
    return result;
}
"""


class Faults:
    """A preloaded library that steps the wall clock of a process, and hits its threads."""

    def __init__(self, directory):
        self.library, self.path = directory / "faults.so", directory / "faults"
        (directory / "faults.c").write_text(PRELOADED)
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", self.library, directory / "faults.c", "-ldl"], check=True)
        self.set()

    @property
    def env(self):
        return {"LD_PRELOAD": str(self.library), "FAULTS": str(self.path)}

    def set(self, step=0, kill=0, hang=0, no_files=0, stillborn=0, late=0):
        with open(self.path, "r+b" if self.path.exists() else "wb") as file:
            file.write(struct.pack("llllll", step, kill, hang, no_files, stillborn, late))


@pytest.fixture
def faults(tmp_path):
    return Faults(tmp_path)


YEAR = 365 * 86400


def test_the_preloaded_library_steps_the_clock_of_timed_waits(faults):
    script = "import threading, time; print(flush=True); start = time.monotonic(); threading.Event().wait(8); print(time.monotonic() - start, time.time())"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ, **faults.env})
    process.stdout.readline()
    time.sleep(1)
    faults.set(step=YEAR)
    waited, wall = map(float, process.communicate(timeout=PATIENCE)[0].split())
    assert wall > time.time() + YEAR / 2
    assert waited > 7.9 or sys.version_info < (3, 11)
    assert waited < 7 or sys.version_info >= (3, 9)  # so the fault is real where it can be


@pytest.mark.parametrize("years", [1, -1])
def test_a_wall_clock_stepped_by_a_year_changes_nothing(cloud, faults, years):
    # With credentials of the environment: those of metadata expire by the wall clock.
    env = {**faults.env, "AWS_ACCESS_KEY_ID": "A", "AWS_SECRET_ACCESS_KEY": "S"}
    with serving(answering(OK)) as port:
        web = {**DEAD, "endpoint": f"http://127.0.0.1:{port}/", "frequency": "200ms", "timeout": "20s"}
        with sick(cloud, checks={"web": web}, env=env) as program:
            program.wait_for("Verdict healthy")
            faults.set(step=years * YEAR)
            before, start = probes(program), time.monotonic()
            wait_until(lambda: probes(program) >= before + 15, "probes on their grid")
            assert 1.5 < time.monotonic() - start < 30  # 15 x 200 ms, and never all at once
            faults.set(step=0)
            before, start = probes(program), time.monotonic()
            wait_until(lambda: probes(program) >= before + 10, "probes on their grid")
            assert 1 < time.monotonic() - start < 30
            faults.set(step=years * YEAR)
            assert "failed" not in "\n".join(program.lines)
    with sick(cloud, env=env) as program:
        wait_until(lambda: cloud.health() == "Unhealthy", "the mark")
        faults.set(step=-years * YEAR)
        count = len(cloud.gateway.marks())
        wait_until(lambda: len(cloud.gateway.marks()) >= count + 2, "more calls")
        assert program.stop() == (0, PROMPTLY)


def test_when_the_system_is_out_of_descriptors_its_services_fail_and_the_mark_gets_through_after_it(cloud, faults):
    with serving(answering(OK)) as port:
        web = {**DEAD, "endpoint": f"http://localhost:{port}/"}
        with sick(cloud, checks={"web": web}, env=faults.env) as program:
            program.wait_for("Ready to mark")
            program.wait_for("Verdict healthy")
            faults.set(no_files=1)
            program.wait_for("Check web failing .*Too many open files in system")
            program.wait_for("Could not mark", 5)  # so the next call is seconds away
            faults.set(no_files=0)
            program.wait_for("Verdict healthy", 2)
            assert cloud.health() == "Healthy" and not cloud.gateway.calls
            assert program.stop() == (0, PROMPTLY)


def test_a_check_loop_that_died_is_started_again(cloud, faults):
    with sick(cloud, env=faults.env, checks={"web": {**DEAD, "threshold": "40"}}) as program:
        wait_until(lambda: probes(program) >= 5, "probes")
        for number in range(1, 4):
            faults.set(kill=1)
            program.wait_for("The loop of check web is gone: starting it again", number)
        before = probes(program)
        wait_until(lambda: probes(program) > before + 3, "probes of the new loop")
        wait_until(lambda: cloud.health() == "Unhealthy", "the mark")


def test_a_thread_that_never_begins_holds_up_nothing_and_is_started_again(cloud, faults):
    with sick(cloud, env=faults.env, checks={"web": {**DEAD, "threshold": "40"}}) as program:
        wait_until(lambda: probes(program) >= 5, "probes")
        faults.set(kill=1, stillborn=1)
        program.wait_for("The loop of check web is gone: starting it again", 2)
        before = probes(program)
        wait_until(lambda: probes(program) > before + 3, "probes of the new loop")
        wait_until(lambda: cloud.health() == "Unhealthy", "the mark")
        faults.set(kill=1, stillborn=1)
        program.wait_for("The loop of check web is gone: starting it again", 3)
        assert program.stop() == (0, PROMPTLY)


def test_not_even_one_of_the_first_threads_holds_up_anything_if_it_never_begins(cloud, faults):
    faults.set(stillborn=1)  # the one that waits for the rehearsal
    with sick(cloud, env=faults.env) as program:
        wait_until(lambda: cloud.health() == "Unhealthy", "the mark")
        assert program.stop() == (0, PROMPTLY)
    faults.set(stillborn=1)  # the one that writes the log
    with sick(cloud, "-foreground", env=faults.env) as program:
        assert program.process.wait(PATIENCE) == 1


def test_threads_that_begin_late_are_waited_for_and_hold_up_nothing(cloud, faults):
    faults.set(late=1)
    with sick(cloud, env=faults.env) as program:
        wait_until(lambda: cloud.health() == "Unhealthy", "the mark")
        program.wait_for("Ready to mark")
        wait_until(lambda: len(os.listdir(f"/proc/{program.process.pid}/task")) == 4, "main, log, check, AWS, and no more")
        assert "is gone" not in "\n".join(program.lines)
        assert program.stop() == (0, PROMPTLY)


@contextlib.contextmanager
def service_manager(tmp_path):
    """A notify socket as systemd has one; yields (environment, messages with their times, names of stored descriptors)."""
    messages, stored = [], []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))

        def listen():
            with contextlib.suppress(OSError):
                while True:
                    data, descriptors, _, _ = manager.recvmsg(4096, socket.CMSG_SPACE(4))
                    messages.append((time.monotonic(), data.decode()))
                    name = re.search("^FDNAME=(.*)", data.decode(), re.M)
                    if descriptors:
                        os.close(struct.unpack("i", descriptors[0][2])[0])
                        stored.append(name[1])
                    elif "FDSTOREREMOVE=1" in data.decode():
                        stored.remove(name[1])

        threading.Thread(target=listen, daemon=True).start()
        yield {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "2000000"}, messages, stored
        manager.shutdown(socket.SHUT_RDWR)


def test_systemd_is_told_what_its_protocol_asks_for(cloud, tmp_path):
    path = tmp_path / "f.yml"
    path.write_text(yaml_of({"web": {**DEAD, "threshold": "1000"}}, graceperiod="0", frequency="200ms"))
    with service_manager(tmp_path) as (env, messages, _):

        def said(text, since=0):
            return [when for when, message in list(messages)[since:] if message.startswith(text)]

        with Program("-healthcheckfile", str(path), env={**cloud.env, **env}) as program:
            program.wait_for("Ready to mark")
            wait_until(lambda: said("READY=1"), "READY")
            assert said("STATUS=")
            wait_until(lambda: len(said("WATCHDOG=1")) >= 8, "the watchdog to be fed")
            assert sorted(b - a for a, b in zip(said("WATCHDOG=1"), said("WATCHDOG=1")[1:]))[3] < 1.5
            for content in (path.read_text(), "nonsense"):
                path.write_text(content)
                before = len(messages)
                program.process.send_signal(signal.SIGHUP)
                reloading = wait_until(lambda: said("RELOADING=1\nMONOTONIC_USEC=", before), "RELOADING")[0]
                wait_until(lambda: said("READY=1", before)[-1:] > [reloading], "READY after it")
            program.process.send_signal(signal.SIGSTOP)
            time.sleep(1)
            fed = len(said("WATCHDOG=1"))
            time.sleep(2)
            assert len(said("WATCHDOG=1")) == fed  # a main thread that is stuck feeds nothing
            program.process.send_signal(signal.SIGCONT)
            wait_until(lambda: len(said("WATCHDOG=1")) > fed, "the watchdog to be fed again")
            assert program.stop() == (0, PROMPTLY)
            wait_until(lambda: said("STOPPING=1\nSTATUS=stopped by SIGTERM"), "STOPPING")


def test_the_watchdog_is_withheld_while_a_check_loop_is_stuck(cloud, tmp_path, faults):
    with service_manager(tmp_path) as (env, messages, _):
        with sick(cloud, env={**env, **faults.env}, checks={"web": {**DEAD, "threshold": "100000"}}) as program:
            wait_until(lambda: len([1 for _, message in messages if message == "WATCHDOG=1"]) > 3, "the watchdog to be fed")
            faults.set(hang=1)
            wait_until(lambda: messages[-1][0] - [when for when, message in messages if message == "WATCHDOG=1"][-1] > 3, "it to be withheld")
            assert program.process.poll() is None


def test_a_rehearsal_that_hangs_is_ended_and_told(cloud, tmp_path):
    (tmp_path / "boto3").mkdir()
    (tmp_path / "boto3" / "__init__.py").write_text("import signal, time\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\ntime.sleep(3600)")
    (tmp_path / "quick.py").write_text(
        "import sys\nsys.path.insert(0, sys.argv.pop(1))\nimport ec2_local_healthchecker as hc\nhc.Rehearsal.TIME = 1.0\nimport os\nos._exit(hc.main())"
    )
    with service_manager(tmp_path) as (env, messages, _):
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "quick.py"), str(HERE), "-healthcheckfile=-"], stdin=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **cloud.env, **env, "PYTHONPATH": str(tmp_path)}, universal_newlines=True, start_new_session=True,
        )  # fmt: skip
        process.stdin.write(yaml_of({"web": DEAD}, graceperiod="1h", frequency="1h"))
        process.stdin.close()
        wait_until(lambda: [1 for _, message in messages if message == "READY=1"], "READY in spite of it")
        assert [when for when, message in messages if message == "READY=1"][0] - start > 1  # not before the rehearsal is over
        assert "gave no answer in 1s" in process.stderr.readline()
        process.terminate()
        assert process.wait(PATIENCE) == 0
        children = subprocess.run(["pgrep", "-s", str(process.pid)], stdout=subprocess.PIPE, universal_newlines=True).stdout
        assert not children


def resources(program):
    status = pathlib.Path(f"/proc/{program.process.pid}/status").read_text()
    return {
        "memory": int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]),
        "threads": int(re.search(r"Threads:\s+(\d+)", status)[1]),
        "descriptors": len(os.listdir(f"/proc/{program.process.pid}/fd")),
    }


def test_a_hundred_checks_of_all_sorts_leak_nothing_and_keep_their_rates(cloud, authority):
    drip = endless(b"H", 0.05)
    sorts = [
        answering(OK), lambda connection: None, lambda connection: time.sleep(1), drip, answering(redirect("/")),
        answering("HTTP/1.1 500 No\r\n\r\n"), answering("nonsense\r\n"), answering("HTTP/1.1 103 Hints\r\n\r\n" + OK),
    ]  # fmt: skip
    minute = float(os.environ.get("MINUTES", "0.4")) * 60
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(serving(talk)) for talk in sorts]
        ports.append(stack.enter_context(tls_serving(authority, "127.0.0.1")))
        ports.append(1)
        checks = {}
        for n in range(100):
            sort = n % len(ports)
            scheme = "https" if sort == 8 else "http"
            checks[f"c{n}"] = {
                "endpoint": f"{scheme}://127.0.0.1:{ports[sort]}/", "timeout": "500ms", "frequency": "2s", "threshold": "999999",
                "tls_verify": "false",
            }  # fmt: skip
            if n % 20 == 19:
                checks[f"c{n}"] = {"type": "tcp", "endpoint": f"127.0.0.1:{ports[0]}", "frequency": "1s"}
        with sick(cloud, checks=checks, top={"frequency": "1s"}) as program:
            wait_until(lambda: probes(program, "c99") > 5, "probes")
            before, counts, start = resources(program), collections.Counter(), time.monotonic()
            first = {name: probes(program, name) for name in checks}
            time.sleep(minute)
            seconds = time.monotonic() - start
            counts = {name: probes(program, name) - first[name] for name in checks}
            after = resources(program)
            expected = {name: seconds / float(keys["frequency"][:-1]) for name, keys in checks.items()}
            assert sorted(counts[name] / expected[name] for name in checks)[50] > 0.9
            for name in checks:  # no sort falls behind the others
                assert 0.6 * expected[name] <= counts[name] <= expected[name] + 5, (name, counts[name], expected[name])
            assert after["threads"] == before["threads"] and abs(after["descriptors"] - before["descriptors"]) <= 100
            assert after["memory"] < before["memory"] * 1.1 + 1024
            assert program.stop() == (0, PROMPTLY)
    assert not cloud.gateway.calls


# ---- Service commands; what they do to a real systemd is seen in .ci/boot ----------------------


def systemctl_saying(tmp_path, text):
    """An environment whose systemctl only prints."""
    (tmp_path / "systemctl").write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    (tmp_path / "systemctl").chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


@pytest.mark.parametrize("command", ["install", "remove", "start", "stop"])
def test_what_changes_the_service_needs_root(command):
    program = run("-command", command, prefix=["setpriv", "--reuid=54322", *USER[2:]])
    assert program.process.returncode == 1
    assert program.lines == [f"ec2-local-healthchecker: -command {command} needs root: run it with sudo"]


@pytest.mark.parametrize(
    "version, said",
    [
        (None, "there is no systemctl on this machine, and the service needs it"),
        ("systemd 239 (239-58.el8)", "the service needs systemd 240 or newer"),
        ("toybox 0.8", "the service needs systemd 240 or newer"),
    ],
)
def test_install_refuses_without_a_systemd_that_is_new_enough(tmp_path, version, said):
    env = systemctl_saying(tmp_path, version) if version else {"PATH": str(tmp_path)}
    program = run("-command=install", env=env)
    assert program.process.returncode == 1 and program.lines == [f"ec2-local-healthchecker: {said}"]


def test_install_refuses_to_run_from_standard_input(tmp_path):
    env = systemctl_saying(tmp_path, "systemd 252")
    done = subprocess.run([sys.executable, "-", "-command", "install"], input=PROGRAM.read_bytes(), stderr=subprocess.PIPE, env=env)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1
    assert b"it was run from standard input: fetch it into a file" in done.stderr


def shown_status(tmp_path, state, terminal=False, **env):
    """What -command status prints for an instance with one check of each state, and its exit status."""
    rig = Rig("graceperiod: 0\nchecks:\n" + "".join(f"  {name}:\n    endpoint: http://localhost/\n" for name in ("a", "bbb", "c")))
    rig.now = time.monotonic()  # of the same clock as the command's
    rig.probe("fff", "a", 0)
    rig.probe("fpppp", "bbb", 0)
    rig.daemon.next_verdict = rig.now
    rig.step(0)
    hc.write_status(str(tmp_path), rig.daemon.as_dict(rig.now, rig.daemon.summary(rig.now)))
    command = f"mount -t tmpfs tmpfs /run && mkdir /run/healthchecker && cp {tmp_path}/status.json /run/healthchecker && exec "
    command += f"{sys.executable} {PROGRAM} -command status"
    environment = {**systemctl_saying(tmp_path, state), **env}
    if terminal:
        ours, its = os.openpty()
        done = subprocess.run(["unshare", "-m", "sh", "-c", command], stdout=its, stderr=its, env=environment)
        os.close(its)
        text = os.read(ours, 65536).decode()
        os.close(ours)
        return text.replace("\r\n", "\n"), done.returncode
    done = subprocess.run(["unshare", "-m", "sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    return done.stdout.decode(), done.returncode


ACTIVE = (
    "LoadState=loaded\nActiveState=active\nSubState=running\nStateChangeTimestamp=Sun 2026-11-22\nUnitFileState=enabled\n"
    "NRestarts=0\nMainPID=42"
)


def test_status_says_first_what_an_operator_wants_first(tmp_path):
    text, status = shown_status(tmp_path, ACTIVE)
    assert status == 0
    assert re.fullmatch(
        "healthchecker: active \\(running\\) since Sun 2026-11-22, enabled, restarts: 0\n"
        "i-1, [0-9]+s ago: unhealthy, marking the instance as Unhealthy \\(calls so far: 0\\)\n"
        "CHECK  STATE    STREAK         LAST FAILURE\n"
        "a      failing  failed 3 of 3  [0-9]+s ago: refused\n"
        "bbb    healthy  passed 4 of 3  [0-9]+s ago: refused\n"
        "c      unknown  -              -\n",
        text,
    ), text


def test_status_is_coloured_on_a_terminal_unless_no_color_is_set(tmp_path):
    plain, _ = shown_status(tmp_path, ACTIVE, terminal=True, NO_COLOR="1")
    coloured, _ = shown_status(tmp_path, ACTIVE, terminal=True)
    assert "\x1b" not in plain and "\x1b[31mfailing\x1b[0m" in coloured
    assert re.sub("[0-9]+s", "", re.sub("\x1b\\[[0-9]*m", "", coloured)) == re.sub("[0-9]+s", "", plain)


@pytest.mark.parametrize(
    "state, said",
    [
        (ACTIVE.replace("running", "dead").replace("42", "0"), "healthchecker: inactive (dead) since Sun 2026-11-22, enabled"),
        (ACTIVE.replace("=loaded", "=not-found").replace("42", "0"), "healthchecker is not installed"),
    ],
)
def test_status_exits_with_3_when_the_service_does_not_run(tmp_path, state, said):
    text, status = shown_status(tmp_path, state.replace("ActiveState=active", "ActiveState=inactive"))
    assert status == 3 and text.startswith(said) and "CHECK" not in text


@pytest.mark.parametrize("arguments, said", [(["-command", "restart"], "write one of install, remove"), (["-command=install", "-dry-run"], "-dry-run does not go"), (["-fg-exit-early-if-healthy"], "goes with -foreground")])
def test_a_wrong_service_command_is_a_usage_error(arguments, said):
    program = run(*arguments)
    assert program.process.returncode == 2 and said in program.lines[0] and len(program.lines) == 1


def test_the_help_fits_80_columns_and_names_every_option():
    text = hc.usage()
    assert max(map(len, text.split("\n"))) <= 80
    assert all(f"  -{name} " in text for name in hc.OPTIONS)


# ---- The repository ----------------------------------------------------------------------------


def blocks(language):
    """The code blocks of the README in one language."""
    return re.findall(rf"^```{language}$\n(.*?)^```$", (HERE / "README.md").read_text(), re.M | re.S)


def test_the_examples_of_the_readme_load():
    for text in blocks("yaml"):
        assert not configured(text).warnings
    for text in blocks("json"):
        assert {"Statement", "logs"} & set(json.loads(text))
    script = blocks("bash")[0]
    assert not configured(re.search("<<'END'\n(.*?)^END$", script, re.M | re.S)[1]).warnings


def test_the_user_data_of_the_readme_pins_this_very_file():
    digest = hashlib.sha256(PROGRAM.read_bytes()).hexdigest()
    assert f"sha256={digest}\n" in blocks("bash")[0], f"write sha256={digest} in README.md"
    assert f"-{hc.__version__}.py " in blocks("bash")[0]


def test_the_unit_file_is_the_text_that_install_writes():
    assert (HERE / "healthchecker.service").read_text() == hc.UNIT
    assert f"ExecStart={hc.INTERPRETER} -I {hc.INSTALLED}\n" in hc.UNIT and f"Alias={hc.ORIGINAL}\n" in hc.UNIT


def test_the_readme_names_every_option_and_every_key_with_its_default():
    rows = re.findall(r"^\| (.*?) \| (.*) \|$", (HERE / "README.md").read_text(), re.M)
    named = {name for cell, _ in rows for name in re.findall(r"`-([a-z-]+)", cell)}
    assert named == {*hc.OPTIONS, "h"}
    defaults = dict((cell.strip("`"), rest.split(" | ")[0].strip("` ")) for cell, rest in rows)
    for keys in (hc.TOP_KEYS, hc.CHECK_KEYS):
        for name, key in keys.items():
            if name not in ("endpoint", "checks", "headers", "max_unhealthy") and (name, keys) != ("frequency", hc.CHECK_KEYS):
                told = defaults[name] if name != "frequency" else "10s"
                assert key.read(told) == key.default, name


def test_the_script_metadata_asks_for_what_the_readme_installs():
    def dependencies(path):
        block = re.search(r"^# /// script\n(.*?)^# ///$", path.read_text(), re.M | re.S)[1]
        return re.findall(r'"([\w-]+)"', block.split("dependencies", 1)[1])

    installed = re.search(r"pip install (.*?) &&", blocks("sh")[1].replace("\\\n", ""), re.S)[1].split()
    assert dependencies(HERE / "test_ec2_local_healthchecker.py") == installed
    assert dependencies(PROGRAM) == ["boto3"]


def test_each_room_of_the_program_uses_only_the_rooms_above_it():
    import ast

    text = PROGRAM.read_text()
    rooms = [number for number, line in enumerate(text.splitlines(), 1) if line.startswith("# ---- ")]
    tree = ast.parse(text)
    home = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        for target in targets:
            for part in getattr(target, "elts", [target]):
                home[getattr(part, "id", getattr(part, "name", None))] = sum(room < node.lineno for room in rooms)
    assert home["Health"] == 1 and home["main"] == len(rooms) == 11
    for node in tree.body:
        here = sum(room < node.lineno for room in rooms)
        used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        for name in used & set(home):
            assert home[name] <= here, f"{name} is used on line {node.lineno}, in a room above its own"


def test_nothing_but_the_agreed_files_stands_at_top_level():
    listed = subprocess.run(["git", "ls-files"], cwd=HERE, stdout=subprocess.PIPE, universal_newlines=True, check=True).stdout
    assert {line.split("/")[0] for line in listed.splitlines()} <= {
        "ec2_local_healthchecker.py", "test_ec2_local_healthchecker.py", "healthchecker.service", "README.md", "LICENSE",
        ".ci", ".gitignore",
    }  # fmt: skip
