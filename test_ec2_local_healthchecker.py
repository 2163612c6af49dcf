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
import datetime
import http.server
import itertools
import json
import os
import pathlib
import re
import select
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
from hypothesis import strategies as st

import ec2_local_healthchecker as hc

HERE = pathlib.Path(hc.__file__).resolve().parent
PROGRAM = HERE / "ec2_local_healthchecker.py"
PATIENCE = 60  # seconds: more than any machine needs
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

hypothesis.settings.register_profile(
    "all", max_examples=int(os.environ.get("EXAMPLES", "2000")), deadline=None, derandomize=True, database=None
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


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


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
    assert f"Host: [::1]:{port}\r\n" in heads[-1]


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
        reason = failure_of(check_of(f"type: tcp\nendpoint: 127.0.0.1:{listener.getsockname()[1]}\ntimeout: 300ms"))
        assert reason == f"timed out after 0.3s connecting to 127.0.0.1 port {listener.getsockname()[1]}"
    for sock in crowd:
        sock.close()


@pytest.mark.parametrize("dead", [1, 4])
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
        hc.probe_tcp(check_of(f"type: tcp\nendpoint: many:{port}\ntimeout: 2s"))
        assert min(0.25, 1 / (dead + 1)) * dead < time.monotonic() - start < 2
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
lines = "checks:\\n  a:\\n    type: %s\\n    endpoint: '%s'\\n"
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
    now = datetime.datetime(2026, 1, 1)
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
        reason = failure_of(http_check(port, scheme="https", timeout="400ms"))
        assert "TLS handshake" in reason or "SSL" in reason
        assert time.monotonic() - start < 5


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
        (SyntaxError("x"), "boto3 is missing or broken: install the package python3-boto3"),
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


# ---- Daemon and gate, with a clock of their own ------------------------------------------------


class FakeLoop:
    def __init__(self, check, due):
        self.check, self.due, self.probing, self.alive, self.number = check, due, None, True, 0

    def is_alive(self):
        return self.alive

    def cancel(self):
        self.alive = False


class FakeMarker:
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

    def __init__(self):
        self.said = []

    def notify(self, *lines):
        self.said += lines


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
        self.systemd = FakeSystemd()
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
    assert "not marking now (max_unhealthy: more than 40% of the group is out)" in rig.systemd.said[-2]
    rig.outcome(hc.CALLED)
    assert 8 <= rig.until_order() <= 12.5  # from now on at the pace of the calls


def test_a_withdrawn_order_does_not_shorten_the_wait():
    rig = Rig(LIMITED)
    rig.probe("fff")
    rig.until_order()
    rig.probe("ppp")
    rig.step(10)
    rig.probe("fff")
    rig.step(8)
    due = rig.daemon.call_at
    rig.outcome(hc.WITHDRAWN, acted=False)
    assert rig.daemon.call_at == pytest.approx(due)


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


def test_a_mark_of_an_earlier_run_is_taken_back_too(tmp_path):
    rig = Rig(directory=str(tmp_path))
    rig.probe("fff")
    rig.step(10)
    assert json.loads((tmp_path / "status.json").read_text())["marked"]  # as soon as the call may be on its way
    rig = Rig(marked=hc.read_status(str(tmp_path))["marked"])
    rig.probe("ppp")
    rig.step(10)
    assert rig.marker.order.status == "Healthy"


@pytest.mark.parametrize("content", [None, "", "{", "[]", "3", '{"marked": {}}'])
def test_a_status_file_that_says_nothing_is_no_mark(tmp_path, content):
    if content is not None:
        (tmp_path / "status.json").write_text(content)
    assert not hc.read_status(str(tmp_path)).get("marked")


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


def test_status_json_says_how_things_stand(tmp_path):
    os.umask(0o77)
    rig = Rig(directory=str(tmp_path))
    rig.probe("pff")
    rig.step(10)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (tmp_path / "status.json").stat().st_mode & 0o777 == 0o644
    assert (status["version"], status["instance"], status["phase"], status["verdict"]) == (hc.__version__, "i-1", "watching", "undecided")
    assert status["wanted"] is None and status["last_call"] is None and status["marked"] is False
    assert status["checks"]["web"] == {"state": "unknown", "passed": False, "streak": 2, "threshold": 3, "reason": "refused"}
    rig.probe("f")
    rig.step(10)
    rig.outcome(hc.FAILED, "throttled")
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["wanted"] == "Unhealthy" and status["last_call"]["result"] == "failed" and status["last_call"]["text"] == "throttled"
    rig.until_order()
    rig.outcome(hc.HELD, "target lifecycle state Standby", seen=STANDBY)
    status = json.loads((tmp_path / "status.json").read_text())
    assert "not marking now (target lifecycle state Standby)" in status["headline"] and status["last_call"]["result"] == "failed"


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


# ---- The program, as a process -----------------------------------------------------------------


class Program:
    """The program running, with what it wrote so far."""

    def __init__(self, *arguments, stdin=None, env=None, prefix=(), **options):
        environment = {name: os.environ[name] for name in ("PATH", "LANG", "HOME") if name in os.environ}
        environment.update(env or {})
        command = [*prefix, sys.executable, str(PROGRAM), *arguments]
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
        assert "Traceback" not in "\n".join(self.lines)


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
        web = {"endpoint": f"http://127.0.0.1:{port}/", "frequency": "100ms", "threshold": "2"}
        early = run(
            "-foreground", "-fg-exit-early-if-healthy=true", "-healthcheckfile=-", stdin=yaml_of({"web": web}, graceperiod="1h")
        )
        assert early.process.returncode == 0 and "Gate: healthy" in early.out[-1]
        late = run("-foreground", "-healthcheckfile=-", stdin=yaml_of({"web": web}, graceperiod="1s", frequency="300ms"))
        assert late.process.returncode == 0
        assert len([line for line in late.out if "of grace left: web healthy" in line]) >= 2
    failing = run("-foreground", "-healthcheckfile=-", stdin=yaml_of({"web": web}, graceperiod="0"))
    assert failing.process.returncode == 1 and "Gate: unhealthy: web failing (failed 2 in a row" in failing.err[-1]


def test_the_launch_time_shortens_the_grace_period():
    web = {"endpoint": "http://127.0.0.1:1/", "frequency": "100ms"}
    text = yaml_of({"web": web}, graceperiod="1h", frequency="200ms")
    launched = str(int(time.time()) - 3598)
    with Program("-dry-run", "-healthcheckfile=-", f"-launchtime={launched}", stdin=text) as program:
        program.wait_for("Check web failing")
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
        assert program.stop() == (0, pytest.approx(0, abs=1))
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


@pytest.mark.parametrize("content, said", [("raise SystemError('torn\\nin two')", "SystemError: torn"), ("(", "SyntaxError"), ("import sys\nsys.exit(0)", "SystemExit")])
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
    assert status == "0" and int(milliseconds) < 1000
    stamps = [line[:23] for line in err.splitlines() if "Check hangs" in line]
    moments = [datetime.datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%S.%f") for stamp in stamps]
    assert 0.8 < (moments[1] - moments[0]).total_seconds() < 3  # three more failures, 300 ms apart


class Gateway:
    """Auto Scaling's API as the program sees it: moto, behind a recorder that can break any call.

    `fault` is called with each request and its action first, and may answer, delay or break it.
    """

    def __init__(self, moto):
        self.calls = []  # (time, action, HealthStatus)
        self.fault = None
        self.busy = self.most_at_once = 0
        gateway = self
        address = moto.url.split("//")[1]

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def answer(self, status, text, headers=()):
                self.send_response(status)
                for name, value in [*headers, ("Content-Length", str(len(text)))]:
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode() if isinstance(text, str) else text)

            def refuse(self, status, code, text):
                kind = "Sender" if status < 500 else "Receiver"
                error = f"<Error><Type>{kind}</Type><Code>{code}</Code><Message>{text}</Message></Error>"
                body = f'<ErrorResponse xmlns="http://autoscaling.amazonaws.com/doc/2011-01-01/">{error}<RequestId>r</RequestId></ErrorResponse>'
                self.answer(status, body, [("Content-Type", "text/xml")])

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                fields = dict(pair.split("=", 1) for pair in body.decode().split("&"))
                gateway.busy += 1
                gateway.most_at_once = max(gateway.most_at_once, gateway.busy)
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
                    gateway.busy -= 1

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def marks(self, status="Unhealthy"):
        return [when for when, _, wanted in list(self.calls) if wanted == status]

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


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
            assert program.stop() == (0, pytest.approx(0, abs=1))
    assert {action for _, action, _ in cloud.gateway.calls} == {"SetInstanceHealth"}


def test_a_service_that_is_stopped_passes_tcp_but_not_http(cloud, tmp_path):
    with nginx(tmp_path) as (web, web_port), memcached() as (cache, cache_port):
        text = scaled_example(web_port, cache_port).replace("timeout: 1s", "timeout: 200ms")
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
            assert program.stop() == (0, pytest.approx(0, abs=1))


# ---- The repository ----------------------------------------------------------------------------


def blocks(language):
    """The code blocks of the README in one language."""
    return re.findall(rf"^```{language}$\n(.*?)^```$", (HERE / "README.md").read_text(), re.M | re.S)


def test_the_examples_of_the_readme_load():
    for text in blocks("yaml"):
        assert not configured(text).warnings
    for text in blocks("json"):
        assert json.loads(text)["Statement"]


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
