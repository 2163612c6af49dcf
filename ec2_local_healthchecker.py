#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = ["boto3"]
# ///
"""Probe the services on this EC2 instance; when one keeps failing, mark the instance unhealthy in its
Auto Scaling group, so that the group replaces it.

This program can end the machine that it runs on. Three sentences rank every decision in it:

1. It never marks a healthy instance.
2. It always marks an unhealthy one, however sick the machine is, and keeps at it until the group acts.
3. An operator can read the part that decides in one sitting and know that 1 and 2 hold.

The file reads from top to bottom, and each room uses only the rooms above it: deciding; durations and
YAML; configuration; probes; EC2 and Auto Scaling; telling; check loops; marker; daemon and gate;
service commands; command line.

Threads: the main thread owns every piece of state and takes every decision. One thread per check probes,
one talks to AWS, one writes the log, and at first one waits for the rehearsal; they hand the main thread
messages and change nothing.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no KeyboardInterrupt, anywhere

import collections
import contextlib
import errno
import importlib
import io
import itertools
import json
import math
import os
import queue
import random
import re
import select
import selectors
import socket
import struct
import sys
import threading
import time
import types


# The next two save 7 MB of the 25 that the daemon would take on Python 3.11 (.ci/bench): the standard library imports
# much that is not used here.


class Later(types.ModuleType):
    """Stands for a module in the one that imports it, until something of it is used."""

    def __getattr__(self, name):
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]  # it is needed at once
        return getattr(importlib.import_module(self.__name__), name)


@contextlib.contextmanager
def later(*names: str):
    """Have what is imported here import these modules only once it uses them; everybody else, as always.

    For the main thread, while there is no other that imports.
    """
    names = tuple(name for name in names if name not in sys.modules)
    sys.modules.update({name: Later(name) for name in names})
    try:
        yield
    finally:
        for name in names:
            if isinstance(sys.modules.get(name), Later):
                del sys.modules[name]


with later("inspect", "pickle", "traceback"):  # 1.6 MB on Python 3.11; what is done here does not use them
    import logging.handlers
    from dataclasses import dataclass, replace

__version__ = "1.0.0"

PROGRAM = "ec2-local-healthchecker"


# ---- Deciding ----------------------------------------------------------------------------------
# Whether to mark, as functions of plain values. No clock, network, thread or global may come in here:
# whoever wants to know when this program ends a machine need read only this room.

UNKNOWN, HEALTHY, FAILING = "unknown", "healthy", "failing"  # how a check stands
UNDECIDED, UNHEALTHY = "undecided", "unhealthy"  # and, with "healthy", the verdict
MARK_UNHEALTHY, MARK_HEALTHY = "Unhealthy", "Healthy"  # the two values of HealthStatus in the API
IN_SERVICE = "InService"


@dataclass(frozen=True)
class Health:
    """How one check stands, and the run of equal results that it is in."""

    state: str = UNKNOWN
    passed: bool = True  # what every result of the run was
    streak: int = 0  # how many results the run has

    def after(self, passed: bool, threshold: int) -> Health:
        """The health after one more result: only `threshold` equal results in a row change the state."""
        streak = self.streak + 1 if passed == self.passed else 1
        state = self.state if streak < threshold else HEALTHY if passed else FAILING
        return Health(state, passed, streak)


def verdict_of(states) -> str:
    """The verdict on the instance, from the states of its checks (at least one)."""
    states = set(states)
    if FAILING in states:
        return UNHEALTHY
    return HEALTHY if states == {HEALTHY} else UNDECIDED


def wanted_mark(verdict: str, marked: bool, recovery: bool) -> str | None:
    """The HealthStatus to ask Auto Scaling for, or None. `marked`: a mark of our own may stand there."""
    if verdict == UNHEALTHY:
        return MARK_UNHEALTHY
    return MARK_HEALTHY if verdict == HEALTHY and marked and recovery else None


def lifecycle_permits(state: str | None) -> bool:
    """Whether a call may be made in this target lifecycle state; None: the instance has none."""
    return state in (None, IN_SERVICE)


def chance_to_go(percent: int, desired: int, weight: int, others) -> float:
    """By what chance this instance may be marked now: 0 if the group cannot spare it.

    `others` are the (weight, lifecycle state, health status) of the group's other instances. What they do not
    serve of the desired capacity is out; that may come to `percent` of the capacity, rounded down, and always to
    the `weight` of this instance. If it is alone, it goes. If not, what the API answers may be some seconds old,
    and many that look at about the same time see the same room: so each goes by such a chance that a group which
    fails as a whole, its looks spread over look_delay, fills the room in 1/7.5 of that time (4 s of 30).
    """
    serving = sum(w for w, state, health in others if state == IN_SERVICE and health.lower() == MARK_HEALTHY.lower())
    out, limit = desired - serving, max(desired * percent // 100, weight)
    if out <= weight:
        return 1.0
    return min(1.0, 7.5 * (limit - out + weight) / desired) if out <= limit else 0.0


def look_delay(frequency: float, dice: float) -> float:
    """Seconds to wait before looking at the group, so that a failing fleet does not look all at once."""
    return max(frequency, 30.0) * dice


def call_backoff(calls: int, frequency: float, dice: float) -> float:
    """Seconds until the next call after `calls` of them: one frequency, doubling to 5 minutes, ±20 %."""
    longest = max(300.0, frequency)
    return min(frequency * 2.0 ** min(calls - 1, 40), longest) * (0.8 + 0.4 * dice)


def grace_left(graceperiod: float, age: float | None) -> float:
    """Seconds of grace from now on, for a server launched `age` seconds ago (None: not told)."""
    left = graceperiod - (age or 0.0)
    # Over already (a restart, a reboot) or in the future (a wrong clock): the whole period, from now.
    return left if 0 < left <= graceperiod else graceperiod


def next_due(due: float, period: float, now: float) -> float:
    """The next time after `due` at a fixed rate; periods missed by `now` are skipped, not made up."""
    return due + period * max(1, math.ceil((now - due) / period))


# ---- Durations and YAML ------------------------------------------------------------------------
# Text in, plain values out, or ConfigError. What the keys of a configuration mean is the next room's.


class ConfigError(ValueError):
    """A mistake in a configuration: what is wrong and what to write instead, and on which line."""

    def __init__(self, problem: str, line: int | None = None, source: str | None = None):
        super().__init__(problem)
        self.problem, self.line, self.source = problem, line, source

    def __str__(self):
        return "".join(f"{part}:" for part in (self.source, self.line) if part) + f" {self.problem}"


def shown(text: str) -> str:
    """`text` quoted for a message: on one line, and not too much of it."""
    return ascii(text if len(text) <= 60 else text[:60] + "...")


def printable(text: str) -> str:
    """`text` on one line of at most 200 characters: what a server sent never shapes the log."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:200])[:200]


NANOSECONDS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6}  # µ is U+00B5, μ is U+03BC
NANOSECONDS.update(s=10**9, m=60 * 10**9, h=3600 * 10**9)
DURATION_PART = re.compile(r"([0-9]*)(?:\.([0-9]*))?([^0-9.]+)")


def parse_duration(text: str) -> float:
    """Seconds in a duration like 1h30m, 1.5s or 300ms; ConfigError if it is none.

    Grammar and limits are those of Go's time.ParseDuration, which read these files before.
    """
    body = text[text.startswith(("+", "-")) :]
    total = position = 0
    while position < len(body) and body != "0":
        part = DURATION_PART.match(body, position)
        if not part or not (part[1] or part[2]) or part[3] not in NANOSECONDS:
            body = ""
            break
        # Cut to the digits that can matter: Python converts no number of thousands of them.
        whole, fraction = part[1].lstrip("0")[:20], (part[2] or "")[:30]
        total += int(whole or 0) * NANOSECONDS[part[3]]
        total += int(fraction or 0) * NANOSECONDS[part[3]] // 10 ** len(fraction)
        position = part.end()
    if not body:
        raise ConfigError(f"{shown(text)} is no duration: write numbers with units (ns us ms s m h), like 10s or 1h30m")
    if total > 2**63 - (not text.startswith("-")):
        raise ConfigError(f"{shown(text)} is too long: no duration exceeds 292 years")
    return (-total if text.startswith("-") else total) / 10**9


# The law of the parser: for any text, what PyYAML's BaseLoader returns, or ConfigError. So whatever is
# not in these patterns is refused, and UNSUPPORTED only finds the name for what was refused.
FORBIDDEN = re.compile("[^\t\n\r -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
SCALAR = (
    r'''(?:"((?:[^"\\\t]|\\[^\t])*)"|'((?:[^'\t]|'')*)\''''  # double-quoted, single-quoted, plain:
    r"""|((?:[^][ \t?:,{}#&*!|>'"%@`-]|[-?:](?=[^ \t]))(?:[^ \t:#]|:(?=[^ \t])|(?<! )#| +(?![ :#\t]|$)| +:(?=[^ \t]))*))"""
)
ENTRY = re.compile(f"( *){SCALAR} *(:)(?: +{SCALAR})?(?: +#.*| *)$")
DOCUMENT_MARK = re.compile(r"(---|\.\.\.)( .*)?$")
KEY_BEFORE = r"""(?: *(?:[^'"#]|"[^"]*"|'[^']*')*?:)? *"""
UNSUPPORTED = (
    (r"[^#]*\t", "a tab (indent with spaces, and write \\t in double quotes)"),
    (KEY_BEFORE + "-( |$)", "a sequence"), (KEY_BEFORE + r"[\[\]]", "a flow sequence"), (KEY_BEFORE + "[{}]", "a flow mapping"),
    (r" *\?( |$)", "a complex key"), (KEY_BEFORE + "&", "an anchor"), (KEY_BEFORE + r"\*", "an alias"),
    (KEY_BEFORE + "!", "a tag"), (KEY_BEFORE + "[|>]", "a block scalar"), (" *%", "a directive"),
    (KEY_BEFORE + "[%@`,]", "a reserved character"), (KEY_BEFORE + "<<", "a merge key"),
    (KEY_BEFORE + r"""("[^"]*|'[^']*)$""", "a quoted value that does not end on its line"),
    (r""" *(["']).*\1 *[^ #:]""", "text after a quote"), (KEY_BEFORE + r"""(["']).*\1""", "text after a quote"),
    (r".*:( |$).*:( |$)", "': ' in a value"), ("", "no key and value"),
)  # fmt: skip
ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))")
ESCAPES = dict(zip('0abtnvfre "/\\N_LP', '\0\a\b\t\n\v\f\r\x1b "/\\\x85\xa0\u2028\u2029'))
DEEPEST = 20  # levels of mappings; a configuration has four
LONGEST_KEY = 1024  # characters up to the colon, as in YAML 1.1, 7.3.1


def parse_yaml(text: str):
    """The nested mappings of strings in a YAML `text`, and the line of each key path: (data, lines).

    The subset of YAML 1.1 that has block mappings, and scalars that end on their line. ConfigError with
    the line for anything else, whatever it is, in time linear to its length.
    """
    text = text[text.startswith("\ufeff") :]
    forbidden = FORBIDDEN.search(text)
    rows = re.split("\r\n|\r|\n", text[: forbidden.start()] if forbidden else text)
    if forbidden:
        raise ConfigError(f"the character U+{ord(forbidden[0]):04X}: remove it, or escape it in double quotes", len(rows))
    lines: dict = {}
    mappings: list = []  # the open ones, outermost first: (indent, mapping, path)
    childless: tuple = ()  # the path of a key without a value so far: deeper lines may be its mapping
    started = ended = False  # by --- and ...
    for number, row in enumerate(rows, 1):
        entry, mark = ENTRY.match(row), DOCUMENT_MARK.match(row)
        if not row.strip(" ") or row.lstrip(" ").startswith("#"):
            continue
        if ended or mark and mark[1] == "---" and (started or lines):
            raise ConfigError("a second document: keep one", number)
        if mark and not (mark[2] or "").strip(" ").partition("#")[0]:
            started, ended = True, mark[1] == "..."
            continue
        if not entry or mark or entry[4] == "<<":
            row = row[3:] if mark else row[:1000]
            name = next(name for pattern, name in UNSUPPORTED if re.match(pattern, row))
            if lines and not childless and row.startswith(" " * (mappings[-1][0] + 1)):
                name = "a value of several lines"
            raise ConfigError(f"{name}: write 'key: value', the value on one line, in quotes if need be", number)
        indent, key = len(entry[1]), _yaml_scalar(entry.group(2, 3, 4), number)
        while mappings and indent < mappings[-1][0]:
            mappings.pop()
            childless = ()
        if mappings and indent > mappings[-1][0] and not childless or lines and not mappings:
            raise ConfigError("the indentation fits no key above: align it; a value stays on one line", number)
        if not mappings or indent > mappings[-1][0]:
            mappings.append((indent, {}, childless))
            if len(mappings) > 1:
                mappings[-2][1][childless[-1]] = mappings[-1][1]
        path = mappings[-1][2] + (key,)
        if path in lines or len(mappings) > DEEPEST or entry.start(5) - indent > LONGEST_KEY:
            problem = f"on line {lines[path]} already: keep one" if path in lines else "too long or too deep a key"
            raise ConfigError(f"{shown(key)} is {problem}", number)
        value = entry.group(6, 7, 8)
        childless = path if value == (None, None, None) else ()
        mappings[-1][1][key] = "" if childless else _yaml_scalar(value, number)
        lines[path] = number
    if not mappings:
        raise ConfigError("empty: write keys and values, like 'graceperiod: 5m'", 1)
    return mappings[0][1], lines


def _yaml_scalar(groups, number: int) -> str:
    double, single, plain = groups

    def unescaped(escape):
        code = int(escape[1] or escape[2] or escape[3] or "0", 16)
        if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF or escape[4] and escape[4] not in ESCAPES:
            raise ConfigError(f"backslash and {shown(escape[0][1:])} is no escape: write \\\\ for a backslash", number)
        return ESCAPES[escape[4]] if escape[4] else chr(code)

    if double is not None:
        return ESCAPE.sub(unescaped, double)
    return plain if single is None else single.replace("''", "'")


def parse_json(text: str):
    """As parse_yaml, for a JSON object: numbers, true and false come as the text that they are."""
    try:
        data = json.loads(text[text.startswith("\ufeff") :], parse_int=str, parse_float=str, parse_constant=str)
    except json.JSONDecodeError as error:
        raise ConfigError(f"no JSON: {error.msg}", error.lineno) from None
    except RecursionError:
        raise ConfigError("no configuration: nested too deep", 1) from None
    lines: dict = {}
    path: list = []
    line = counted = 0
    # The text is valid JSON by now: only strings and brackets are left to tell apart.
    for token in re.finditer(r'"((?:[^"\\]|\\.)*)"(\s*:)?|[][{}]', text):
        line, counted = line + text.count("\n", counted, token.start()), token.start()
        if token[0] == "[":
            raise ConfigError("a list: no key takes one", line + 1)
        if token[0] == "{":
            path.append("")
            if len(path) > DEEPEST:
                raise ConfigError("no configuration: nested too deep", line + 1)
        elif token[0] == "}":
            path.pop()
        elif token[2]:
            path[-1] = json.loads(f'"{token[1]}"')
            if tuple(path) in lines:
                raise ConfigError(f"{shown(path[-1])} is on line {lines[tuple(path)]} already: keep one", line + 1)
            lines[tuple(path)] = line + 1
    return data, lines


# ---- Configuration -----------------------------------------------------------------------------
# Every key with its reader, default and advice, and all validation: a configuration that loads will run.
# Nothing is resolved or connected to here, and nothing opened but the file itself.

DEFAULT_FILE = "/etc/sysconfig/ec2-local-healthchecker.yml"
LARGEST_FILE = 2**20  # bytes; a configuration has a few hundred
DEFAULT_PORTS = {"http": 80, "https": 443}
HOST = r"(?:[\w-]{1,63}\.)*[\w-]{1,63}"
ENDPOINT = re.compile(
    rf"(?:(https?)://)?(?:\[([0-9a-f:.]+)\]|({HOST}\.?)?)(?::0*([0-9]{{1,5}}|[a-z][\w-]*))?"
    r"([/?](?:[!\x22$&-~]|%[0-9a-f]{2})*)?(#[!-~]*)?",
    re.ASCII | re.IGNORECASE,
)


@dataclass(frozen=True)
class Endpoint:
    """Where to connect: host and port, and for http and https what to request there."""

    scheme: str  # tcp, http or https
    host: str  # an IPv6 address without its brackets
    port: int
    path: str = ""  # with the query

    @classmethod
    def from_text(cls, text: str, schemes) -> Endpoint:
        """The endpoint in a URL, or in host:port where `schemes` has tcp; ConfigError if there is none."""
        form = "a URL with a valid host and port, like http://localhost:80/"
        if "tcp" in schemes:
            form = "host:port with a valid host and port, like localhost:80 or \"[::1]:80\""
        problem = f"{shown(text)} is not {form}"
        if re.match(r"[^?#]*@", text):  # it may hold a password: it is not shown
            problem = "no user or password in a URL: write an Authorization header, and %40 for @"
        match = ENDPOINT.fullmatch(text)
        scheme = match and (match[1] or "tcp").lower()
        if not match or scheme not in schemes or (scheme == "tcp" and (match[5] or match[6] or not match[4])):
            raise ConfigError(problem)
        host = (match[2] or match[3] or "localhost" * (scheme == "tcp")).lower()
        try:
            number = match[4] or str(DEFAULT_PORTS[scheme])
            port = int(number) if number.isdigit() else socket.getservbyname(number, "tcp")
            if match[2] or re.fullmatch("[0-9.]+", host):
                socket.inet_pton(socket.AF_INET6 if match[2] else socket.AF_INET, host)
        except OSError:
            port = 0
        if not host or len(host) > 253 or not 0 < port < 65536:
            raise ConfigError(problem)
        path = match[5] or "/"
        return cls(scheme, host, port, "" if scheme == "tcp" else path if path[0] == "/" else "/" + path)

    def __str__(self):
        return self.authority if self.scheme == "tcp" else f"{self.scheme}://{self.authority}{self.path}"

    @property
    def authority(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _duration(text: str) -> float:
    seconds = parse_duration(text)
    if not 0 < seconds <= 86400:
        raise ValueError
    return seconds


def _graceperiod(text: str) -> float:
    return 0.0 if parse_duration(text) == 0 else _duration(text)


def _number(text: str, largest: int) -> int:
    if not re.fullmatch("[1-9][0-9]{0,5}", text) or int(text) > largest:
        raise ValueError
    return int(text)


def _status(text: str) -> tuple:
    parts = [re.fullmatch(" *([0-9]{3})(?: *- *([0-9]{3}))? *", part) for part in text.split(",")]
    ranges = tuple((int(part[1]), int(part[2] or part[1])) if part else (0, 0) for part in parts)
    # No other 1xx is ever a final code: a check that waits for one would fail for ever.
    if not all(low == high == 101 or 200 <= low <= high <= 599 for low, high in ranges):
        raise ValueError
    return ranges


def _header(name: str, value) -> None:
    """ConfigError unless this header can be sent, and is for the configuration to send."""
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):  # RFC 9110, 5.1
        raise ConfigError(f"{shown(name)} is no header name: write one like Host")
    if name.lower() in ("content-length", "transfer-encoding", "expect"):
        raise ConfigError(f"{name} announces a body, and a probe sends none: remove it")
    if not isinstance(value, str) or not re.fullmatch("[ -~]+", value) or value in ("null", "~"):
        raise ConfigError(f"the value of {name} is not one line of printable ASCII: write one")
    if name.lower() == "host" and not re.fullmatch(rf"({HOST}|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?", value, re.ASCII):
        raise ConfigError(f"{shown(value)} is no host: write one like www.example.com")


BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
TYPES = {"tcp": "tcp", "http": "http", "https": "http"}


@dataclass(frozen=True)
class Key:
    """One key: how its text is read (KeyError, TypeError, ValueError: not at all), and what holds without it."""

    read: collections.abc.Callable
    default: object
    advice: str = ""
    mapping: bool = False  # whether it takes keys and values of its own
    http_only: bool = False


TIME = "write a duration of more than 0 and at most 24h, like 10s"
TOP_KEYS = {
    "graceperiod": Key(_graceperiod, 300.0, TIME + ", or 0"),
    "frequency": Key(_duration, 10.0, TIME),
    "recovery": Key(lambda text: BOOLEANS[text.lower()], True, "write true or false"),
    "max_unhealthy": Key(lambda text: _number(re.fullmatch("(.*)%", text)[1], 100), None, "write a percentage, 1% to 100%"),
    "checks": Key(dict, None, mapping=True),
}
CHECK_KEYS = {
    "type": Key(lambda text: TYPES[text.lower()], "http", "write tcp or http"),
    "endpoint": Key(str, None),
    "timeout": Key(_duration, 1.0, TIME),
    "threshold": Key(lambda text: _number(text, 999999), 3, "write a whole number, 1 to 999999"),
    "frequency": Key(_duration, None, TIME),
    "status": Key(_status, ((200, 200),), "write codes of 200 to 599 (or 101), like 200,204 or 200-299", http_only=True),
    "headers": Key(lambda data: tuple(data.items()), (), mapping=True, http_only=True),
    "tls_verify": Key(lambda text: BOOLEANS[text.lower()], True, "write true or false", http_only=True),
}


@dataclass(frozen=True)
class Check:
    """One check; times in seconds. After a reload, an equal check is the same check."""

    name: str
    type: str  # tcp or http
    endpoint: Endpoint
    timeout: float
    threshold: int
    frequency: float
    status: tuple  # of the ranges of codes that pass
    headers: tuple  # of (name, value)
    tls_verify: bool


@dataclass(frozen=True)
class Config:
    """A configuration, valid; times in seconds, max_unhealthy in percent (None: no limit)."""

    graceperiod: float
    frequency: float
    recovery: bool
    max_unhealthy: int | None
    checks: tuple
    warnings: tuple  # lines to tell the operator

    @classmethod
    def from_text(cls, text: str, source: str) -> Config:
        """The configuration in a YAML or JSON `text`; ConfigError, naming `source`, for the first mistake."""
        warnings: list = []
        try:
            data, lines = (parse_json if text.startswith(("{", "\ufeff{")) else parse_yaml)(text)
            values = _read_keys(data, (), TOP_KEYS, lines, warnings)
            if not values["checks"]:
                raise ConfigError("no checks: write at least one, below 'checks:'", lines.get(("checks",), 1))
            checks = tuple(
                _read_check(name, data, values["frequency"], lines, warnings) for name, data in values.pop("checks").items()
            )
        except ConfigError as error:
            raise ConfigError(error.problem, error.line, source) from None
        return cls(**values, checks=checks, warnings=tuple(f"{source}:{warning}" for warning in warnings))

    def as_dict(self) -> dict:
        """The effective configuration to show: in seconds, and without header values (they may be secrets)."""
        checks = {check.name: dict(vars(check), endpoint=str(check.endpoint)) for check in self.checks}
        for row in checks.values():
            del row["name"]
            row["status"] = ",".join(f"{low}-{high}" if low < high else str(low) for low, high in row["status"])
            row["headers"] = {name: "***" for name, _ in row["headers"]}
            for key in [key for key in row if CHECK_KEYS[key].http_only and row["type"] != "http"]:
                del row[key]
        return {**{key: value for key, value in vars(self).items() if key != "warnings"}, "checks": checks}


def _read_keys(data, path: tuple, keys: dict, lines: dict, warnings: list) -> dict:
    """The value of each of `keys` in one mapping: what is written, or the default."""
    values = {}
    for name, value in data.items():
        line = lines[path + (name,)]
        key = "threshold" if name == "threashold" and name not in keys and "threshold" in keys else name
        if key != name:
            warnings.append(f"{line}: 'threashold' is read as 'threshold': correct the spelling")
        if key not in keys:
            raise ConfigError(f"unknown key {shown(name)}: {nearest(name, keys)}", line)
        if key in values:
            raise ConfigError("threshold is written twice: keep one", line)
        text = value if isinstance(value, (str, dict)) else json.dumps(value)
        if isinstance(value, dict) != keys[key].mapping or value in ("", None):
            form = "keys and values, on lines of their own" if keys[key].mapping else "one value"
            raise ConfigError(f"{key} takes {form}: write {'them' if keys[key].mapping else 'it'}, or leave {key} out", line)
        try:
            values[key] = keys[key].read(text)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error.problem}", line) from None
        except (KeyError, TypeError, ValueError):
            raise ConfigError(f"{key}: {shown(text)} will not do: {keys[key].advice}", line) from None
    return {**{name: key.default for name, key in keys.items()}, **values}


def nearest(name: str, known) -> str:
    """What to write instead of an unknown name."""
    import difflib  # for a mistake only

    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f"did you mean {near[0]}?" if near else "write one of " + ", ".join(known)


def _read_check(name: str, data, frequency: float, lines: dict, warnings: list) -> Check:
    path = ("checks", name)
    if not name.isprintable() or not 0 < len(name.strip()) <= 100 or not isinstance(data, dict):
        advice = "write a printable name of at most 100 characters, and below it at least an endpoint"
        raise ConfigError(f"check {shown(name)}: {advice}", lines[path])
    values = _read_keys(data, path, CHECK_KEYS, lines, warnings)
    names = [header.lower() for header, _ in values["headers"]]
    for number, (header, value) in enumerate(values["headers"]):
        try:
            _header(header, value)
            if names.index(names[number]) < number:
                raise ConfigError(f"{header} is here twice: keep one")
        except ConfigError as error:
            raise ConfigError(f"headers: {error.problem}", lines[path + ("headers", header)]) from None
    for key in data:
        if values["type"] == "tcp" and key in CHECK_KEYS and CHECK_KEYS[key].http_only:
            raise ConfigError(f"{key} is for http checks, and this one is tcp: remove it", lines[path + (key,)])
    if not values["endpoint"]:
        raise ConfigError(f"check {shown(name)} has no endpoint: write one", lines[path])
    try:
        values["endpoint"] = Endpoint.from_text(values["endpoint"], ("tcp",) if values["type"] == "tcp" else DEFAULT_PORTS)
    except ConfigError as error:
        raise ConfigError(f"endpoint: {error.problem}", lines[path + ("endpoint",)]) from None
    return Check(**{**values, "name": name, "frequency": values["frequency"] or frequency})


def load_config(path: str) -> Config:
    """The configuration in a file, or of standard input for "-"; ConfigError if it cannot be used."""
    source = "<stdin>" if path == "-" else printable(path)
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            content = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        advice = "write it, or name another with -healthcheckfile"
        if isinstance(error, PermissionError):
            advice = "the service is a user of its own, make file and folders readable for all"
        raise ConfigError(f"cannot be read ({reason}): {advice}", None, source) from None
    if len(content) > LARGEST_FILE:
        raise ConfigError("larger than 1 MiB: this is no configuration", 1, source)
    try:
        return Config.from_text(content.decode("utf-8"), source)
    except UnicodeDecodeError as error:
        raise ConfigError("not UTF-8: save the file so", content[: error.start].count(b"\n") + 1, source) from None


# ---- Probes ------------------------------------------------------------------------------------
# One attempt each: return, or raise ProbeFailure for what the service did, and anything else for what
# went wrong in this program. One deadline bounds all of it. Nothing is counted or remembered here.

MAX_REDIRECTS = 10
REDIRECTS = (301, 302, 303, 307, 308)


class ProbeFailure(Exception):
    """The service failed the probe; `reason` is one printable line of at most 200 characters."""

    def __init__(self, reason: str):
        self.reason = printable(reason)
        super().__init__(self.reason)


class Deadline:
    """The time by which one attempt is over, `timeout` seconds after it began."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.end = time.monotonic() + timeout

    def left(self, doing: str) -> float:
        """The seconds left for `doing`; ProbeFailure when there are none."""
        self.doing = doing
        left = self.end - time.monotonic()
        if left <= 0:
            raise self.missed()
        return left

    def missed(self) -> ProbeFailure:
        return ProbeFailure(f"timed out after {self.timeout:g}s {self.doing}")


def connect(host: str, port: int, deadline: Deadline) -> socket.socket:
    """A TCP connection to the first address of `host` that answers; ProbeFailure if none does.

    The addresses are raced (RFC 8305): the next one starts when the one before fails, or after 250 ms,
    or after an even share of half the time left, so that the last of many has half of it.
    """
    next_start = 0.0
    failures = []
    race = selectors.PollSelector()  # unlike epoll, it needs no descriptor of its own
    try:
        addresses = collections.deque(_resolve(host, port))
        stagger = min(0.25, deadline.left(f"resolving {host}") / 2 / len(addresses))
        while addresses or race.get_map():
            left = deadline.left(f"connecting to {host} port {port}")
            now = time.monotonic()
            if addresses and (now >= next_start or not race.get_map()):
                family, kind, protocol, _, address = addresses.popleft()
                try:
                    race.register(_connecting(family, kind, protocol, address), selectors.EVENT_WRITE, address)
                    next_start = now + stagger
                except OSError as error:
                    if error.errno == errno.EMFILE:
                        raise
                    failures.append(f"{address[0]} port {port}: {error.strerror}")
                continue
            for key, _ in race.select(min(left, next_start - now) if addresses else left):
                race.unregister(key.fileobj)
                error = key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not error and _joined_to_itself(key.fileobj):
                    error = errno.ECONNREFUSED
                if error in (0, errno.ECONNRESET, errno.EPIPE):  # reset by now, but it was connected
                    return key.fileobj
                key.fileobj.close()
                failures.append(f"{key.data[0]} port {port}: {os.strerror(error)}")
                next_start = 0.0
    except OSError as error:
        raise service_failure(error) from None
    finally:
        for key in race.get_map().values():
            key.fileobj.close()
    raise ProbeFailure("; ".join(failures))


def _connecting(family, kind, protocol, address) -> socket.socket:
    sock = socket.socket(family, kind, protocol)
    sock.setblocking(False)
    error = sock.connect_ex(address)
    if error not in (0, errno.EINPROGRESS):
        sock.close()
        raise OSError(error, os.strerror(error))
    return sock


def _joined_to_itself(sock: socket.socket) -> bool:
    """Whether nobody listens, and the kernel chose the very port for the socket and joined it to itself."""
    try:
        if sock.getsockname() != sock.getpeername():
            return False
    except OSError:  # no longer connected
        return False
    # Closed in order, it would keep the service from taking its port for a minute.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return True


def _resolve(host: str, port: int) -> list:
    try:
        # As bytes: a str would be put through the IDNA codec, which costs a megabyte to load.
        return socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)
    except OSError as error:
        require_descriptors()
        raise ProbeFailure(f"cannot resolve {host}: {error.strerror}") from None


def require_descriptors() -> None:
    """Raise EMFILE if few descriptors are left: then an error of the resolver or of TLS, which need some
    and do not say so, tells nothing of the service."""
    ends: list = []
    try:
        for _ in range(4):
            ends += os.pipe()
    finally:
        for end in ends:
            os.close(end)


def service_failure(error: Exception) -> Exception:
    """The ProbeFailure for an error of an attempt, or the error itself where the fault is our own."""
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return error
    text = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or str(error)
    return ProbeFailure(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def probe_tcp(check: Check, tls: Tls | None = None) -> None:
    """Pass if the endpoint accepts a connection. (The kernel accepts for a service that hangs, too.)"""
    connect(check.endpoint.host, check.endpoint.port, Deadline(check.timeout)).close()


def probe_http(check: Check, tls: Tls | None = None) -> None:
    """Pass if a GET, after redirects, ends in one of the check's codes; the body is not read.

    `tls` is the check's, kept from one attempt to the next.
    """
    tls = tls or Tls(check)
    deadline = Deadline(check.timeout)
    endpoint, headers = check.endpoint, check.headers
    for _ in range(MAX_REDIRECTS + 1):
        with exchange("GET", endpoint, headers, deadline, tls) as response:
            status = response.status
        if any(low <= status <= high for low, high in check.status):
            return
        location = (response.headers.get_all("Location") or [""])[0].strip(" \t")
        if status not in REDIRECTS or not location:
            raise ProbeFailure(f"HTTP status {status} {response.reason}")
        endpoint = _redirected(endpoint, location)
        # The configured headers may hold a secret: another origin (RFC 6454) does not get them.
        same_origin = (endpoint.scheme, endpoint.authority) == (check.endpoint.scheme, check.endpoint.authority)
        headers = check.headers if same_origin else ()
    raise ProbeFailure(f"more than {MAX_REDIRECTS} redirects")


def _redirected(endpoint: Endpoint, location: str) -> Endpoint:
    from urllib.parse import urljoin

    try:
        # http.client reads headers as Latin-1: what is not ASCII there are bytes, to be percent-encoded.
        location = re.sub("[^!-~]", lambda char: f"%{ord(char[0]):02X}", location)
        return Endpoint.from_text(urljoin(str(endpoint), location), DEFAULT_PORTS)
    except ValueError:
        raise ProbeFailure(f"redirected to {shown(location)}, which is no http or https URL") from None


@contextlib.contextmanager
def exchange(method: str, endpoint: Endpoint, headers, deadline: Deadline, tls: Tls | None = None):
    """Send one request on a connection of its own, never through a proxy; yields the final response.

    Raises as a probe does. `tls` is for an https endpoint.
    """
    import http.client

    context = tls.make() if endpoint.scheme == "https" else None
    sock = connect(endpoint.host, endpoint.port, deadline)
    try:
        if context:
            sock.settimeout(deadline.left("in the TLS handshake"))
            # As bytes, for the sake of the IDNA codec again; and no certificate has the final dot.
            sock = context.wrap_socket(sock, server_hostname=endpoint.host.rstrip(".").encode("ascii"))
        connection = http.client.HTTPConnection(endpoint.host, endpoint.port)
        connection.default_port = DEFAULT_PORTS[endpoint.scheme]  # the one that Host leaves out
        connection.sock = sock
        given = {name.lower() for name, _ in headers}
        own = {"User-Agent": f"{PROGRAM}/{__version__}", "Connection": "close"}
        fields = {name: value for name, value in own.items() if name.lower() not in given}
        sock.settimeout(deadline.left("sending the request"))
        connection.request(method, endpoint.path, headers={**fields, **dict(headers)})
        reader = DeadlineReader(sock, deadline)
        source = types.SimpleNamespace(makefile=lambda mode: io.BufferedReader(reader))
        with http.client.HTTPResponse(source, method=method) as response:
            _read_head(response)
            while response.status < 200 and response.status != 101:
                response.headers = None  # that was an interim response (RFC 9110, 15.2): begin anew
                _read_head(response)
            if reader.ended:
                raise http.client.HTTPException("the connection ended within the head of the response")
            yield response
    except socket.timeout:
        raise deadline.missed() from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise (tls.failure if tls else service_failure)(error) from None
    finally:
        sock.close()


def _read_head(response) -> None:
    try:
        response.begin()
    except (TypeError, LookupError, AttributeError, RecursionError) as error:
        # What the parser of mail headers stumbles over was sent by the service.
        raise ValueError(f"unreadable headers, {type(error).__name__}") from None


class DeadlineReader(io.RawIOBase):
    """Reads from a socket until one deadline: a byte now and then does not buy more time."""

    def __init__(self, sock: socket.socket, deadline: Deadline):
        self.sock, self.deadline = sock, deadline
        self.ended = False  # whether the other side has sent its last

    def readable(self):
        return True

    def readinto(self, buffer):
        self.sock.settimeout(self.deadline.left("waiting for the response"))
        count = self.sock.recv_into(buffer)
        self.ended = self.ended or not count
        return count


class Tls:
    """The TLS context of one check: made when it is needed, and anew after a certificate was refused."""

    def __init__(self, check: Check):
        self.check = check
        self.context = None

    def prepare(self) -> None:
        """Load what an attempt needs before its time begins: that time is the service's."""
        import http.client  # noqa: F401

        if self.check.endpoint.scheme == "https":
            self.make()

    def make(self):
        """Python's default context, but with the same verdict on a certificate on every Python."""
        import ssl

        if not self.context:
            try:
                context = ssl.create_default_context()
            except OSError as error:
                raise RuntimeError(f"no TLS context, {error}") from None  # not what the service did
            context.set_ciphers("DEFAULT")  # of the system: Python 3.10 and later offer fewer
            context.verify_flags = ssl.VerifyFlags.VERIFY_X509_TRUSTED_FIRST  # 3.13 sets flags that refuse more
            if not self.check.tls_verify:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            require_descriptors()  # without them, it would have found no certificates of authorities, silently
            self.context = context
        return self.context

    def failure(self, error: Exception) -> Exception:
        """As service_failure; but after a refused certificate, the authorities are read again."""
        if hasattr(error, "verify_code"):
            self.context = None
            require_descriptors()
        return service_failure(error)


# ---- EC2 and Auto Scaling ----------------------------------------------------------------------
# What is asked of instance metadata and of the Auto Scaling API, and what their errors mean to an
# operator. When to ask is the marker's. Only this room imports boto3, and only when it is called.

METADATA_TIMEOUT = 1.0  # seconds for one request
METADATA_ATTEMPTS = 3
# Where each field of Seen comes from, and what it looks like: a web page in its place is not believed.
METADATA_ITEMS = {
    "id": ("instance-id", r"[\w-]{1,64}"),
    "placement": ("placement/region", r"[\w-]{1,64}"),
    "lifecycle": ("autoscaling/target-lifecycle-state", "[A-Za-z:]{1,64}"),
}
BOTO3_PACKAGES = {"boto3", "botocore", "s3transfer", "jmespath", "dateutil", "urllib3"}


@dataclass(frozen=True)
class Seen:
    """What instance metadata has said of this instance, each item as far as it could ever be read."""

    id: str = ""
    placement: str = ""
    lifecycle: str | None = None  # the target lifecycle state; None: there is none

    @property
    def instance(self) -> str:
        """The instance to mark."""
        return os.environ.get("INSTANCE_ID") or self.id

    @property
    def region(self) -> str:
        return os.environ.get("AWS_REGION") or self.placement

    @property
    def mistaken(self) -> str:
        """Why this instance is not the one to mark, if so: an image was baked with a stranger's id."""
        told = f"INSTANCE_ID is {self.instance}, but metadata says {self.id}: remove the variable"
        return told if self.id and self.id != self.instance else ""


def read_metadata(before: Seen):
    """What instance metadata says now, by IMDSv2, and why not all of it: (Seen, reason).

    An item that cannot be read stays as it was `before`.
    """
    seen, reason = before, ""
    try:
        ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
        token = {"X-aws-ec2-metadata-token": _metadata("PUT", "api/token", ttl, "[!-~]+")}
    except ProbeFailure as failure:
        return before, failure.reason
    for field, (path, pattern) in METADATA_ITEMS.items():
        try:
            seen = replace(seen, **{field: _metadata("GET", "meta-data/" + path, token, pattern)})
        except ProbeFailure as failure:
            reason = reason or failure.reason
    return seen, reason


def _metadata(method: str, path: str, headers: dict, pattern: str) -> str | None:
    failure = None
    for _ in range(METADATA_ATTEMPTS):
        try:
            with exchange(method, metadata_endpoint(path), headers.items(), Deadline(METADATA_TIMEOUT)) as response:
                text = response.read(1024).decode("latin-1").strip()
                if response.status == 404 and path.endswith("lifecycle-state"):
                    return None
                if response.status == 200 and not response.length and re.fullmatch(pattern, text, re.ASCII):
                    return text
                raise ProbeFailure(f"HTTP status {response.status} for {path}, {len(text)} characters")
        except ProbeFailure as error:
            failure = error
    raise failure


def metadata_endpoint(path: str) -> Endpoint:
    variable = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
    base = os.environ.get(variable) or "http://169.254.169.254"
    try:
        return Endpoint.from_text(base.rstrip("/") + "/latest/" + path, ("http",))
    except ConfigError as error:
        raise ConfigError(f"in the environment, {error.problem}", None, variable) from None


def bypass_proxy_for_metadata() -> None:
    """Have botocore ask metadata directly: behind a proxy answers another machine's metadata, if any."""
    listed = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = "169.254.169.254", "[fd00:ec2::254]", metadata_endpoint("").authority.rpartition(":")[0]
    if listed != "*":
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, (listed, *hosts)))


@contextlib.contextmanager
def forgetting_boto3():
    """Forget what was imported here if it broke: half imported (no memory) or half replaced (an upgrade),
    a package stays broken until it is imported anew."""
    before = set(sys.modules)
    try:
        yield
    except BaseException as error:
        if boto3_is_broken(error) or isinstance(error, (MemoryError, SystemError)):
            for name in [name for name in sys.modules if name not in before or name.partition(".")[0] in BOTO3_PACKAGES]:
                sys.modules.pop(name, None)
        raise


def boto3_is_broken(error: BaseException) -> bool:
    """Whether an error comes from a missing or damaged boto3, and not from what it was asked to do."""
    damaged = isinstance(error, (ImportError, AttributeError, NameError))
    return damaged or bool(re.search("DataNotFound|UnknownService", type(error).__name__))


def boto3_session():
    """A new boto3 session: one that was made while credentials were missing never finds any."""
    import warnings

    warnings.simplefilter("ignore")  # boto3's remarks on old Pythons are not for this log
    importlib.invalidate_caches()
    with forgetting_boto3():
        try:
            import encodings.idna  # noqa: F401  # and the four: what a call would load, where it would not be forgotten

            import boto3.session
            import botocore.auth  # noqa: F401
            import botocore.httpsession  # noqa: F401
            import botocore.parsers  # noqa: F401
            import botocore.retries.standard  # noqa: F401
            import botocore.session
        except (ImportError, MemoryError, SystemError):
            raise
        except BaseException as error:
            raise ImportError(f"{type(error).__name__}: {error}") from error

        core = botocore.session.Session()
        core.set_config_variable("metadata_service_num_attempts", METADATA_ATTEMPTS)
        return boto3.session.Session(botocore_session=core)


def autoscaling_client(session, region: str):
    """A client whose calls give up after three attempts, each of at most 3 s to connect and 10 s to answer."""
    with forgetting_boto3():
        from botocore.config import Config as ClientConfig

        # Older boto3 does not read these variables.
        endpoint = os.environ.get("AWS_ENDPOINT_URL_AUTO_SCALING") or os.environ.get("AWS_ENDPOINT_URL")
        retries = {"mode": "standard", "total_max_attempts": 3}
        config = ClientConfig(connect_timeout=3, read_timeout=10, retries=retries)
        return session.client("autoscaling", region_name=region, endpoint_url=endpoint, config=config)


class NotInGroup(LookupError):
    """The instance is in no Auto Scaling group."""


class NoCredentials(LookupError):
    """There are none in the environment or in instance metadata."""


def describe_group(client, instance: str):
    """The (desired capacity, weight of `instance`, others) of its group, as chance_to_go takes them."""
    groups = client.describe_auto_scaling_instances(InstanceIds=[instance])["AutoScalingInstances"]
    pages = client.get_paginator("describe_auto_scaling_groups")
    names = [group["AutoScalingGroupName"] for group in groups]  # an empty list would ask for every group
    pages = pages.paginate(AutoScalingGroupNames=names) if names else []
    groups = [group for page in pages for group in page["AutoScalingGroups"]]
    if not groups:
        raise NotInGroup(f"{instance} is in no Auto Scaling group")
    rows = {
        row["InstanceId"]: (int(row.get("WeightedCapacity") or 1), row["LifecycleState"], row["HealthStatus"])
        for row in groups[0]["Instances"]
    }
    weight = rows.pop(instance, (1,))[0]
    return groups[0]["DesiredCapacity"], weight, list(rows.values())


ADVICE = (  # the first pattern that "code: text" of an error begins with says what the operator can do
    (".*grace period", "a group refuses marks within its health check grace period"),
    (".*No managed instance|NotInGroup", "attach the instance to a group, or stop this service"),
    ("AccessDenied|Unauthorized", "allow autoscaling:{call} in the policy of the instance's role"),
    ("NoCred|Partial|Credential|MetadataRetrieval", "give the instance a profile whose role allows autoscaling:{call}"),
    (".*Expired|Signature|InvalidSig|InvalidClient|AuthFailure|.*expired", "look at the clock, then at the credentials"),
    ("Throttl|RequestLimit|TooManyRequests", "AWS limits the calls of the whole account; nothing to do here"),
    ("ResourceContention|ScalingActivity", "the group is being changed; nothing to do here"),
    ("Internal|ServiceUnav|50.:|ResponseParser", "AWS has a fault; nothing to do here"),
    (".*(Connect|Timeout|Proxy|SSL|HTTPClient)", "look at routes, security groups, VPC endpoint and proxy"),
    ("MemoryError", "the instance is out of memory"),
)


def explain(error: BaseException, call: str) -> str:
    """One line: what went wrong in an API call, and what to do about it."""
    code = (getattr(error, "response", None) or {}).get("Error", {}).get("Code") or type(error).__name__
    text = printable(f"{error}" if code in f"{error}" else f"{code}: {error}")
    advice = next((advice for pattern, advice in ADVICE if re.match(pattern, f"{code}: {error}")), "")
    if boto3_is_broken(error):
        advice = "boto3 is missing or broken: install the package python3-boto3"
    return text + f" -- {advice}".format(call=call) * bool(advice)


def was_refused(error: BaseException) -> bool:
    """Whether AWS answered the only attempt of a call, and with a refusal."""
    answer = (getattr(error, "response", None) or {}).get("ResponseMetadata", {})
    return 400 <= answer.get("HTTPStatusCode", 0) < 500 and not answer.get("RetryAttempts")


@dataclass(frozen=True)
class Rehearsed:
    """What the rehearsal found: why this program could never mark, if so, and what to warn of."""

    fatal: str
    warnings: tuple
    seen: Seen


class Rehearsal:
    """This program, run once in a child process that tries what marking takes; its memory goes with it."""

    TIME = 30.0  # seconds

    def __init__(self, config: Config):
        self.pipe, answer = os.pipe()
        self.pid = os.fork()  # there is no other thread yet
        if self.pid == 0:
            try:
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                    signal.signal(number, signal.SIG_DFL)
                for descriptor in (1, 2):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
                os.write(answer, json.dumps(rehearse(config)).encode())
            finally:
                os._exit(0)
        os.close(answer)

    def outcome(self) -> Rehearsed:
        """Wait for the child, and end it if it takes too long."""
        waiting = select.poll()
        waiting.register(self.pipe, select.POLLIN)
        if not waiting.poll(self.TIME * 1000):
            self.kill()
        with open(self.pipe, "rb") as pipe:
            answer = pipe.read()
        with contextlib.suppress(ChildProcessError):  # reaped already, where SIGCHLD is ignored
            os.waitpid(self.pid, 0)
        self.pid = 0
        if answer:
            fatal, warnings, seen = json.loads(answer)
            return Rehearsed(fatal, tuple(warnings), Seen(**seen))
        why = f"The rehearsal of a mark died, or gave no answer in {self.TIME:g}s: look at network, boto3 and memory"
        return Rehearsed("", (why,), Seen())

    def kill(self) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def rehearse(config: Config):
    """Try all that marking takes, but the call; the fields of Rehearsed, as JSON takes them."""
    seen, unread = read_metadata(Seen())
    warnings = [f"Instance metadata cannot be read: {unread} -- enable IMDSv2 for this instance"] if unread else []
    warnings += [seen.mistaken] if seen.mistaken else []
    call = "SetInstanceHealth"
    try:
        session = boto3_session()
        client = autoscaling_client(session, seen.region or "us-east-1")
        credentials = session.get_credentials()
        if not credentials:
            raise NoCredentials("none in the environment, none in instance metadata")
        credentials.get_frozen_credentials()
        if config.max_unhealthy is not None and seen.instance:
            call = "DescribeAutoScaling*"
            describe_group(client, seen.instance)
    except BaseException as error:
        if boto3_is_broken(error):
            return explain(error, call), warnings, vars(seen)
        warnings.append(f"A mark would not succeed now: {explain(error, call)}")
    return "", warnings, vars(seen)


# ---- Telling -----------------------------------------------------------------------------------
# The log, systemd, status.json and the terminal: how the program speaks. Nothing here decides, or
# makes it wait: what nobody takes is lost.

LOG_QUEUE = 1000  # lines that may wait for the writer
FLUSH_TIME = 0.5  # seconds for the last lines at the end

log = logging.getLogger(PROGRAM)
log.propagate = False


class LossyQueueHandler(logging.handlers.QueueHandler):
    """Hands each record to the writer thread; counts those that found its queue full."""

    lost = 0

    def enqueue(self, record):
        try:
            if self.lost:
                note = {"levelno": logging.WARNING, "levelname": "WARNING", "msg": f"{self.lost} lines of log were lost here"}
                self.queue.put_nowait(logging.makeLogRecord(note))
                self.lost = 0
            self.queue.put_nowait(record)
        except queue.Full:
            self.lost += 1


def prepare_logging(verbose: bool):
    """Log to stdout, from WARNING on to stderr: returns what a thread is to run, and what gives it time at the end."""
    logging.raiseExceptions = False  # a log that cannot be written stops nothing
    logging.getLogger().addHandler(logging.NullHandler())  # what libraries log is not for this log
    lines: queue.Queue = queue.Queue(LOG_QUEUE)
    writers = []
    for descriptor in (1, 2):
        raw = io.FileIO(descriptor, "w", closefd=False)  # unbuffered: nothing is kept back, or written twice
        stream = io.TextIOWrapper(raw, "utf-8", "backslashreplace", write_through=True)
        writers.append(logging.StreamHandler(stream))
        writers[-1].setFormatter(logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
        writers[-1].formatter.converter = time.gmtime
    writers[0].addFilter(lambda record: record.levelno < logging.WARNING)
    writers[1].setLevel(logging.WARNING)
    log.addHandler(LossyQueueHandler(lines))
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    listener = logging.handlers.QueueListener(lines, *writers, respect_handler_level=True)

    def write():
        while True:
            try:
                listener.handle(listener.dequeue(True))
                lines.task_done()
            except Exception:  # no memory: it would end the listener's own thread
                time.sleep(0.1)

    def finish():
        end = time.monotonic() + FLUSH_TIME
        while lines.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.005)

    return write, finish


class Systemd:
    """The service manager, by sd_notify(3); where there is none, nothing is said."""

    def __init__(self):
        self.address = re.sub("^@", "\0", os.environ.pop("NOTIFY_SOCKET", ""))
        self.socket = None
        self.watchdog = math.inf  # seconds within which it wants to be fed
        ours = os.environ.pop("LISTEN_PID", "") == str(os.getpid())
        self.keeps_mark = ours and "marked" in os.environ.pop("LISTEN_FDNAMES", "").split(":")
        if self.address:
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self.socket.setblocking(False)
            if os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
                self.watchdog = int(os.environ.get("WATCHDOG_USEC", 0)) / 1e6 or math.inf

    def keep_mark(self, marked: bool) -> None:
        """Have systemd know over a restart whether a mark of ours may stand: a descriptor named so, which it
        keeps and hands to the next process (sd_pid_notify_with_fds(3)), is all that it takes."""
        if self.socket and marked != self.keeps_mark:
            with contextlib.suppress(OSError), open(os.devnull) as null:
                descriptors = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", null.fileno()))] * marked
                message = b"FDSTORE=1\nFDNAME=marked" if marked else b"FDSTOREREMOVE=1\nFDNAME=marked"
                self.socket.sendmsg([message], descriptors, 0, self.address)
                self.keeps_mark = marked

    def notify(self, *lines: str) -> None:
        """Send one message; it is cut, for systemd ignores all of one of more than 4096 bytes."""
        if self.socket:
            with contextlib.suppress(OSError):
                self.socket.sendto("\n".join(lines).encode("ascii", "backslashreplace")[:2000], self.address)


def read_status(directory: str) -> dict:
    """What status.json in `directory` says; nothing if it cannot be read."""
    try:
        with open(os.path.join(directory, "status.json")) as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def write_status(directory: str, status: dict) -> None:
    """Replace status.json in `directory`, readable by all; OSError if that fails."""
    replace_file(os.path.join(directory, "status.json"), json.dumps(status).encode(), 0o644)


def replace_file(path: str, content: bytes, mode: int) -> None:
    """Replace a file in one step (rename(2)), with this mode whatever the umask; OSError if that fails."""
    try:
        with open(path + ".new", "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)
        os.replace(path + ".new", path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path + ".new")
        raise


def say(text: str, stream=None) -> int:
    """Print, where there is something to print on; returns the exit status for that."""
    try:
        stream = stream or sys.stdout
        encoding = stream.encoding or "ascii"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except OSError:
        return 1
    return 0


# ---- Check loops -------------------------------------------------------------------------------
# One thread per check: wait, probe, hand over the result. Nothing is counted or decided here.


class Inbox:
    """Where threads and signal handlers put what they have for the main thread, which waits on it."""

    def __init__(self):
        self._items: collections.deque = collections.deque()
        self._wake, self._waker = socket.socketpair()
        self._wake.setblocking(False)
        self._waker.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)

    def wake_on_signals(self) -> None:
        """Have a signal end the wait too, also when the kernel hands it to another thread."""
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)

    def put(self, item, wake: bool = True) -> None:
        """Hand over `item`, and end the wait; or let it lie there until something else does."""
        self._items.append(item)
        if wake:
            with contextlib.suppress(BlockingIOError):  # so many wake-ups are as good as one more
                self._waker.send(b"\0")

    def wait(self, seconds: float) -> None:
        """Return once something is there, or after `seconds`, whatever the wall clock does."""
        if not self._items:
            self._poll.poll(max(0.0, min(seconds, 3600.0)) * 1000)
        with contextlib.suppress(BlockingIOError):
            self._wake.recv(4096)

    def take(self):
        """Everything that is there, in order."""
        while self._items:
            yield self._items.popleft()


@dataclass(frozen=True)
class Result:
    """What came of one probe: whether it passed; None where a fault of this program spoiled it."""

    loop: object
    number: int  # of the probe, in its loop
    passed: bool | None
    reason: str
    seconds: float


class CheckLoop(threading.Timer):
    """A Timer that goes off again and again: probes one check at a fixed rate, first when it is `due`.

    `due` and `probing` are its own to write and the main thread's to read; `awaited` is the other way round.
    """

    def __init__(self, check: Check, inbox: Inbox, due: float):
        super().__init__(check.frequency, probe_tcp if check.type == "tcp" else probe_http)
        self.daemon = True
        self.made = time.monotonic()
        self.check = check
        self.tls = Tls(check)
        self.inbox = inbox
        self.due = due  # when the next probe starts
        self.probing: tuple | None = None  # (number, start) of the probe under way
        self.awaited = True  # whether a success would be news: if not, it need not wake the main thread

    def run(self):
        for number in itertools.count(1):
            while not self.finished.is_set() and time.monotonic() < self.due:
                # Not finished.wait(): before Python 3.11, that follows the wall clock.
                time.sleep(max(0.0, min(self.due - time.monotonic(), 10.0)))
            if self.finished.is_set():
                return
            start = time.monotonic()
            passed, reason = self.attempt(number)
            end = time.monotonic()
            self.due = next_due(self.due, self.interval, end)
            self.probing = None
            self.inbox.put(Result(self, number, passed, reason, end - start), wake=self.awaited or not passed)

    def attempt(self, number: int):
        try:
            if self.check.type == "http":
                self.tls.prepare()
            self.probing = (number, time.monotonic())
            self.function(self.check, self.tls)
            return True, ""
        except ProbeFailure as failure:
            return False, failure.reason
        except BaseException as fault:  # whatever it is, the loop goes on
            return None, printable(f"{type(fault).__name__}: {fault}")


START_TIME = 0.05  # seconds that a new thread is waited for
LATE = 10.0  # seconds past its time that a thread is thought stuck


def start(thread: threading.Thread) -> threading.Thread:
    """Start a thread, from the main thread, and return it, even if it has not begun yet.

    Thread.start() alone would wait for ever for one that dies of a lack of memory before it begins.
    """

    def stop_waiting(*_):
        if not thread.is_alive():
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise TimeoutError

    signal.signal(signal.SIGALRM, stop_waiting)
    signal.setitimer(signal.ITIMER_REAL, START_TIME, START_TIME)
    try:
        thread.start()
    except TimeoutError:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return thread


def gone(thread, now: float) -> bool:
    """Whether a check loop or the marker has ended; one that has not begun LATE seconds after it was made has died."""
    return not thread.is_alive() and (thread.ident is not None or now > thread.made + LATE)


# ---- Marker ------------------------------------------------------------------------------------
# The one thread that talks to AWS: it carries out one order of the main thread at a time. Whether and
# when to order is the main thread's; whether the call is still wanted is looked at here, as it is sent.

CALLED, FAILED = "called", "failed"  # what may come of an order: the call succeeded; it did not
HELD, CROWDED = "held", "crowded"  # no call now: this instance must not be marked; the group cannot spare it
LOOKED, WITHDRAWN = "looked", "withdrawn"  # no call was ordered; none is wanted any more


@dataclass(frozen=True)
class Order:
    """What the main thread wants done once."""

    status: str  # MARK_UNHEALTHY or MARK_HEALTHY
    seen: Seen  # what metadata said before
    max_unhealthy: int | None
    look: bool = False  # only see whether the lifecycle state permits a call


@dataclass(frozen=True)
class Outcome:
    """What came of an order."""

    order: Order
    kind: str  # CALLED, FAILED, ...
    text: str  # why, for the log
    seen: Seen
    acted: bool = False  # whether the group's view may have changed
    level: int = logging.WARNING


class Withdrawn(Exception):
    """The call is no longer wanted."""


class Marker(threading.Thread):
    """Brings the group's view of this instance to what is wanted, one order at a time."""

    def __init__(self, inbox: Inbox, dry_run: bool):
        super().__init__(daemon=True)
        self.made = time.monotonic()
        self.inbox, self.dry_run = inbox, dry_run
        self.orders: queue.SimpleQueue = queue.SimpleQueue()
        self.wanted: str | None = None  # the HealthStatus wanted now; the main thread's to write

    def run(self):
        while True:
            order = self.orders.get()
            try:
                outcome = self.carry_out(order)
            except BaseException as error:  # whatever it is, the next order is another try
                outcome = Outcome(order, FAILED, explain(error, "SetInstanceHealth"), order.seen)
            self.inbox.put(outcome)

    def carry_out(self, order: Order) -> Outcome:
        """Look at metadata and, if a limit is set, at the group; if all permits it, make the call."""
        seen, unread = read_metadata(order.seen)
        sent: list = []

        def outcome(kind, text="", **fields):
            return Outcome(order, kind, text, seen, **fields)

        def about_to_send(request, **_):
            if self.wanted != order.status:
                raise Withdrawn
            sent.append(request)

        if seen.mistaken:
            return outcome(HELD, seen.mistaken, level=logging.ERROR)
        if not lifecycle_permits(seen.lifecycle):
            return outcome(HELD, f"target lifecycle state {seen.lifecycle}")
        if order.look:
            return outcome(LOOKED, f"target lifecycle state {seen.lifecycle} after a hold, in a new grace period")
        if self.dry_run:
            return outcome(CALLED, acted=True)
        if not seen.instance or not seen.region:
            advice = "enable IMDSv2 for this instance, or set INSTANCE_ID and AWS_REGION"
            return outcome(FAILED, f"instance id or region unknown, metadata: {unread} -- {advice}")
        client = autoscaling_client(boto3_session(), seen.region)
        if order.status == MARK_UNHEALTHY and order.max_unhealthy is not None:
            try:
                group = describe_group(client, seen.instance)
            except Exception as error:
                return outcome(CROWDED, explain(error, "DescribeAutoScaling*"), level=logging.ERROR)
            chance = chance_to_go(order.max_unhealthy, *group)
            if random.random() >= chance:
                crowded = "others of the group go first" if chance else f"more than {order.max_unhealthy}% of the group is out"
                return outcome(CROWDED, f"max_unhealthy: {crowded}")
        # Before every attempt of the call: botocore's retries may come half a minute after the first.
        client.meta.events.register("before-send.auto-scaling.SetInstanceHealth", about_to_send)
        try:
            client.set_instance_health(InstanceId=seen.instance, HealthStatus=order.status)
        except Withdrawn:
            return outcome(WITHDRAWN, acted=bool(sent))
        except Exception as error:
            return outcome(FAILED, explain(error, "SetInstanceHealth"), acted=bool(sent) and not was_refused(error))
        return outcome(CALLED, acted=True)


# ---- Daemon and gate ---------------------------------------------------------------------------
# The main thread: it owns all state and takes every decision, in step(now), where nothing sleeps and
# nothing blocks. The gate (-foreground) is the same loop with another ending.

HANG_SLACK = 0.25  # seconds past its deadline that a probe has to report its own failure
ORDER_TIME = 300.0  # seconds after which an order is thought to hang for ever: three attempts, and more


class Watch:
    """One check, and what is known of it."""

    def __init__(self, check: Check):
        self.check = check
        self.loop = None  # its CheckLoop, once it could be started
        self.health = Health()
        self.reason = ""  # of its last failure
        self.failed_at = None  # when that was counted
        self.results = 0  # how many have been counted
        self.faulty = False  # whether the last probe was spoiled by a fault of this program
        self.hung = None  # the number of the last probe that was counted as failed because it hung
        self.hung_again = 0.0  # when that probe counts as failed once more

    def __str__(self):
        streak = f"{'passed' if self.health.passed else 'failed'} {self.health.streak} in a row"
        text = f"{self.check.name} {self.health.state} ({streak}, threshold {self.check.threshold})"
        if self.health.passed and self.health.state != FAILING:
            return text
        return f"{text}, last failure: {self.reason}" if self.health.passed else f"{text}: {self.reason}"

    def overdue_at(self, probing) -> float:
        """When the probe under way, or the next one, counts as failed if no result has come by then."""
        number, started = probing or (None, self.loop.due)
        return self.hung_again if number and number == self.hung else started + self.check.timeout + HANG_SLACK


class Watcher:
    """What daemon and gate share: the checks, how they stand, and the verdict at each `frequency`."""

    def __init__(self, config: Config, inbox: Inbox, now: float, grace: float, probing_from: float, start_loop):
        self.config = config
        self.inbox = inbox
        self.grace_end = now + grace
        self.probing_from = probing_from
        self.start_loop = start_loop  # (check, due): a CheckLoop, running
        self.next_verdict = now + config.frequency
        self.verdict = UNDECIDED
        self.watches = {check.name: Watch(check) for check in config.checks}
        self.threads_missing = False
        self.status = None  # the exit status, when it is time

    def run(self) -> int:
        """Work until it is time to end; returns the exit status."""
        while self.status is None:
            try:
                wake = self.step(time.monotonic())
                if self.status is None:
                    self.inbox.wait(wake - time.monotonic())
            except Exception as fault:  # rule 2: whatever it is, the next step is another try
                with contextlib.suppress(Exception):  # there may be no memory even for this
                    log.error("A fault of this program: %s", printable(f"{type(fault).__name__}: {fault}"))
                time.sleep(0.5)
        return self.status

    def step(self, now: float) -> float:
        """Take in what was handed over, decide what is due by `now`; returns when to come again."""
        for item in self.inbox.take():
            self.receive(item, now)
            if self.status is not None:
                return now
        self.count_hung(now)
        if now >= self.next_verdict:
            self.next_verdict = next_due(self.next_verdict, self.config.frequency, now)
            self.keep_threads(now)
            self.take_verdict(now)
        overdue = min((w.overdue_at(w.loop.probing) for w in self.watches.values() if w.loop), default=math.inf)
        return min(self.next_verdict, max(overdue, now + 0.1))

    def keep_threads(self, now: float) -> None:
        """Start the threads that are not there: at the beginning all of them, later those that died."""
        try:
            self.start_missing(now)
            self.threads_missing = False
        except Exception as fault:
            if not self.threads_missing:
                log.error("Threads cannot be started, trying at each verdict: %s", printable(str(fault) or repr(fault)))
            self.threads_missing = True

    def start_missing(self, now: float) -> None:
        for watch in self.watches.values():
            if watch.loop and gone(watch.loop, now):
                log.error("The loop of check %s is gone: starting it again", watch.check.name)
                watch.loop.cancel()  # should it begin after all
                watch.loop = None
            if not watch.loop:
                watch.loop, watch.hung = self.start_loop(watch.check, max(now, self.probing_from)), None

    def receive(self, result: Result, now: float) -> None:
        watch = self.watches.get(result.loop.check.name)
        if not watch or watch.loop is not result.loop or watch.hung == result.number:
            return  # of a check that a reload replaced, or late: it has been counted as failed
        name = watch.check.name
        log.debug("Probe of %s %s in %.0f ms", name, result.reason or "passed", result.seconds * 1000)
        if result.passed is not None:
            self.count(watch, now, result.passed, result.reason)
        elif not watch.faulty:
            log.error("A fault of this program, not counted, spoils the probes of %s: %s", name, result.reason)
        watch.faulty = result.passed is None

    def count(self, watch: Watch, now: float, passed: bool, reason: str) -> None:
        """Count one result; log a change of state, and the first failure after a success."""
        before, watch.health = watch.health, watch.health.after(passed, watch.check.threshold)
        watch.results += 1
        watch.loop.awaited = watch.health.state != HEALTHY or not passed or log.isEnabledFor(logging.DEBUG)
        if not passed:
            watch.reason, watch.failed_at = reason, now
        if watch.health.state != before.state:
            log.log(logging.INFO if passed else logging.WARNING, "Check %s", watch)
        elif not passed and watch.health.streak == 1:
            log.warning("Check %s failed (1 of %d): %s", watch.check.name, watch.check.threshold, reason)

    def count_hung(self, now: float) -> None:
        """Count probes that outlive their deadline: name resolution cannot be interrupted.

        Once per probe and step: after a pause of the whole process, the periods that nobody watched
        are no evidence.
        """
        for watch in self.watches.values():
            probing = watch.loop and watch.loop.probing
            if probing and now >= watch.overdue_at(probing) and watch.loop.is_alive():
                watch.hung = probing[0]
                watch.hung_again = now + max(watch.check.frequency, watch.check.timeout)
                self.count(watch, now, False, f"no end after {watch.check.timeout:g}s: it hangs, in name resolution most likely")

    def current_verdict(self) -> str:
        return verdict_of(watch.health.state for watch in self.watches.values())

    def take_verdict(self, now: float) -> None:
        before, self.verdict = self.verdict, self.current_verdict()
        if self.verdict != before:
            level = logging.WARNING if self.verdict == UNHEALTHY else logging.INFO
            log.log(level, "Verdict %s (was %s): %s", self.verdict, before, self.evidence())

    def evidence(self) -> str:
        """How the failing checks stand; when none fails, how all do."""
        watches = self.watches.values()
        return "; ".join(map(str, [w for w in watches if w.health.state == FAILING] or watches))


class Daemon(Watcher):
    """Watches, and has the instance marked while the verdict wants it."""

    def __init__(
        self, config, inbox, now, grace, start_loop, start_marker, dry_run=False,
        read_config=None, systemd=None, directory="",
    ):  # fmt: skip
        super().__init__(config, inbox, now, grace, now + grace, start_loop)
        self.start_marker = start_marker  # () -> a Marker, running
        self.dry_run = dry_run
        self.read_config = read_config  # () -> a Config; None: it came from standard input
        self.systemd = systemd or Systemd()
        self.directory = directory  # where status.json goes, if anywhere
        self.marked = self.systemd.keeps_mark  # whether a mark of our own may stand in the group
        self.marker = None  # while it cannot be started
        self.ready = False  # whether the rehearsal is over
        self.seen = Seen()  # what metadata last said
        self.wanted = None  # the HealthStatus wanted
        self.calls = 0  # made since it is wanted
        self.call_at = 0.0  # when the next order is due
        self.order = None  # the one under way
        self.order_at = 0.0  # when it was given
        self.cause = ""  # what it was given for
        self.held = False  # whether the lifecycle state forbids calls, as far as is known
        self.resumed_until = 0.0  # the end of the grace period after a hold
        self.hold = ""  # why there was no call when there could have been one
        self.last_call = None  # for status.json
        self.feed_at = now  # when systemd's watchdog is fed next
        self.untold = ""  # the last error of writing status.json
        self.keep_threads(now)

    def step(self, now: float) -> float:
        wake = super().step(now)
        if self.marker:
            # A call is wanted only while the checks themselves agree, between verdicts too; and not on the way out.
            agreed = self.wanted and self.wanted == wanted_mark(self.current_verdict(), self.marked, self.config.recovery)
            self.marker.wanted = self.wanted if agreed and self.status is None else None
            if self.marker.wanted and not self.order and now >= self.call_at:
                self.give_order(now)
            elif self.marker.wanted and not self.order:
                wake = min(wake, self.call_at)
        if now >= self.feed_at and not self.stuck(now):
            self.systemd.notify("WATCHDOG=1")
            self.feed_at = now + self.systemd.watchdog / 4
        return min(wake, max(self.feed_at, now + 1.0))

    def receive(self, item, now: float) -> None:
        if isinstance(item, Outcome):
            self.receive_outcome(item, now)
        elif isinstance(item, Rehearsed):
            self.receive_rehearsed(item, now)
        elif item == signal.SIGHUP:
            self.reload(now)
        elif isinstance(item, signal.Signals):
            self.status = 0
            log.info("Stopped by %s", item.name)
            self.systemd.notify("STOPPING=1", f"STATUS=stopped by {item.name}")
        else:
            super().receive(item, now)

    def receive_rehearsed(self, rehearsed: Rehearsed, now: float) -> None:
        if rehearsed.fatal:
            self.status = 1
            log.error("This daemon could never mark: %s", rehearsed.fatal)
            self.systemd.notify(f"STATUS=could never mark: {rehearsed.fatal}")
            return
        for warning in rehearsed.warnings:
            log.warning("%s", warning)
        self.seen = rehearsed.seen
        self.ready = True
        dry = " -- this is a dry run, nothing will be marked" * self.dry_run
        log.info("Ready to mark %s in %s%s", self.seen.instance or "this instance", self.seen.region or "its region", dry)
        self.tell(now)

    def start_missing(self, now: float) -> None:
        hangs = self.order and now > self.order_at + ORDER_TIME
        if self.marker and (hangs or gone(self.marker, now)):
            log.error("The thread that talks to AWS %s: starting another", "hangs" if hangs else "is gone")
            self.marker.wanted = None
            self.marked = self.may_be_marked()
            self.marker, self.order = None, None
        if not self.marker:
            self.marker = self.start_marker()
        super().start_missing(now)

    def may_be_marked(self) -> bool:
        """Whether a mark of our own stands in the group, or may by the order under way."""
        ordered = self.order and self.order.status == MARK_UNHEALTHY and not self.order.look
        return self.marked or bool(ordered)

    def take_verdict(self, now: float) -> None:
        super().take_verdict(now)
        self.want(now)
        self.held = self.held and (self.verdict != HEALTHY or self.wanted is not None)
        self.tell(now)

    def want(self, now: float) -> None:
        """Set what is to be brought about. When that changes, the calls begin anew, at once."""
        wanted = wanted_mark(self.verdict, self.marked, self.config.recovery)
        if wanted != self.wanted:
            self.wanted, self.calls, self.hold, self.call_at = wanted, 0, "", now
            self.call_at += self.first_wait() * (wanted == MARK_UNHEALTHY)

    def first_wait(self) -> float:
        """Seconds before the first look at the group, so that a failing fleet does not look all at once."""
        limited = self.config.max_unhealthy is not None and not self.dry_run
        return limited * look_delay(self.config.frequency, random.random())

    def give_order(self, now: float) -> None:
        look = self.wanted == MARK_UNHEALTHY and (self.held or now < self.resumed_until)
        order = Order(self.wanted, self.seen, self.config.max_unhealthy, look)
        self.cause, self.order_at = self.evidence(), now
        self.marker.orders.put(order)
        self.order = order
        self.tell(now)

    def receive_outcome(self, outcome: Outcome, now: float) -> None:
        """Take in what came of the order, and say when the next is due."""
        status, kind = outcome.order.status, outcome.kind
        if outcome.order is not self.order:
            return  # of a marker that was given up
        self.order, self.seen = None, outcome.seen
        if outcome.acted:
            self.marked = not (status == MARK_HEALTHY and kind == CALLED)
        if not lifecycle_permits(self.seen.lifecycle):
            self.held = True
        elif self.held:
            self.held, self.resumed_until = False, now + self.config.graceperiod + self.first_wait()
        calls = self.calls + 1 if status == self.wanted else 1
        again = call_backoff(calls, self.config.frequency, random.random())
        delay = {
            CALLED: again,
            FAILED: again,
            CROWDED: look_delay(self.config.frequency, random.random()),
            HELD: max(0.0, self.next_verdict - now),
            LOOKED: max(0.0, min(self.next_verdict, self.resumed_until) - now),
            WITHDRAWN: max(0.0, self.call_at - now),
        }[kind]
        self.log_outcome(outcome, delay)
        if status == self.wanted:
            self.call_at = now + delay
            if kind in (CALLED, FAILED):
                self.calls, self.hold = calls, ""
        self.want(now)
        self.tell(now)

    def log_outcome(self, outcome: Outcome, delay: float) -> None:
        status, who = outcome.order.status, self.seen.instance or "this instance"
        if outcome.kind in (CALLED, FAILED):
            self.last_call = {"status": status, "result": outcome.kind, "text": outcome.text, "time": round(time.time())}
        again = f", again in {delay:.0f}s" if status == self.wanted else ""
        if outcome.kind == CALLED and self.dry_run:
            limit = "" if self.config.max_unhealthy is None else " (max_unhealthy is not evaluated)"
            log.warning("Dry run: would have marked %s as %s%s: %s", who, status, limit, self.cause)
        elif outcome.kind == CALLED:
            level = logging.WARNING if status == MARK_UNHEALTHY else logging.INFO
            log.log(level, "Marked Instance as %s: %s: %s", status, who, self.cause)
        elif outcome.kind == FAILED:
            log.error("Could not mark %s as %s%s: %s", who, status, again, outcome.text)
        elif outcome.kind == WITHDRAWN:
            log.info("Did not mark %s as %s: no longer wanted", who, status)
        elif status == self.wanted and re.sub("[0-9]", "", outcome.text) != re.sub("[0-9]", "", self.hold):
            self.hold = outcome.text
            log.log(outcome.level, "Not marking %s as %s now, looking%s: %s", who, status, again.lstrip(","), outcome.text)

    def reload(self, now: float) -> None:
        """Read the configuration again; a check that is equal after defaults keeps its loop and health."""
        if not self.read_config:
            log.warning("SIGHUP ignored: the configuration came from standard input")
            return
        self.systemd.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            config = self.read_config()
            watches = {check.name: Watch(check) for check in config.checks}
        except Exception as error:
            log.error("Configuration not reloaded, the old one stays: %s", printable(str(error) or repr(error)))
        else:
            for name, watch in self.watches.items():
                if name in watches and watches[name].check == watch.check:
                    watches[name] = watch
                elif watch.loop:
                    watch.loop.cancel()
            self.config, self.watches = config, watches
            for warning in self.config.warnings:
                log.warning("%s", warning)
            log.info("Configuration reloaded: %s", ", ".join(self.watches))
            self.next_verdict = now
            self.call_at = min(self.call_at, now + call_backoff(max(self.calls, 1), self.config.frequency, 1.0))
        self.tell(now)

    def stuck(self, now: float) -> bool:
        """Whether a thread is missing, or a check loop neither probes nor waits: then systemd is to restart us."""
        loops = [watch.loop for watch in self.watches.values()]
        late = [loop for loop in loops if not loop or not loop.is_alive() or not loop.probing and now > loop.due + LATE]
        return bool(late) or not self.marker or not self.marker.is_alive()

    def tell(self, now: float) -> None:
        """Say how things stand: to systemd in one line, and in status.json."""
        summary = self.summary(now)
        self.systemd.notify(f"STATUS={summary}: {self.evidence() if now >= self.grace_end else ', '.join(self.watches)}")
        if not self.dry_run:
            self.systemd.keep_mark(self.may_be_marked())
        if self.ready:
            self.systemd.notify("READY=1")  # more than once does no harm, and one may be lost
        if self.directory:
            try:
                write_status(self.directory, self.as_dict(now, summary))
                self.untold = ""
            except OSError as error:
                if str(error) != self.untold:
                    self.untold = str(error)
                    log.warning("status.json cannot be written: %s", printable(self.untold))

    def summary(self, now: float) -> str:
        if now < self.grace_end:
            return f"grace period, probing starts in {self.grace_end - now:.0f}s"
        if self.hold:
            return f"{self.verdict}, not marking now ({self.hold})"
        if not self.wanted:
            return self.verdict
        due = "" if self.order else f", the next in {max(0.0, self.call_at - now):.0f}s"
        return f"{self.verdict}, marking the instance as {self.wanted} (calls so far: {self.calls}{due})"

    def as_dict(self, now: float, summary: str) -> dict:
        """What status.json says; `written` and `failed_at` are of the monotonic clock, last_call.time is since 1970."""
        checks = {
            name: {**vars(watch.health), "threshold": watch.check.threshold, "reason": watch.reason, "failed_at": watch.failed_at}
            for name, watch in self.watches.items()
        }
        return {
            "version": __version__,
            "instance": self.seen.instance,
            "phase": "grace" if now < self.grace_end else "watching",
            "ready": self.ready,
            "verdict": self.verdict,
            "wanted": self.wanted,
            "marked": self.may_be_marked(),
            "summary": summary,
            "last_call": self.last_call,
            "written": now,
            "checks": checks,
        }


class Gate(Watcher):
    """-foreground: ends with 0 if the instance is healthy and with 1 if not, and never calls AWS."""

    def __init__(self, config, inbox, now, grace, start_loop, exit_early):
        super().__init__(config, inbox, now, grace, now, start_loop)
        self.exit_early = exit_early  # with 0, as soon as every check is healthy
        self.keep_threads(now)

    def step(self, now: float) -> float:
        wake = super().step(now)
        if self.status is not None:
            return now
        verdict = self.current_verdict()
        complete = all(watch.results >= watch.check.threshold for watch in self.watches.values())
        if verdict == HEALTHY and self.exit_early or now >= self.grace_end and complete:
            self.status = 0 if verdict == HEALTHY else 1
            log.log(logging.ERROR if self.status else logging.INFO, "Gate: %s: %s", verdict, self.evidence())
        return min(wake, self.grace_end) if now < self.grace_end else wake

    def receive(self, item, now: float) -> None:
        if isinstance(item, signal.Signals):
            self.status = 1
            log.error("Gate: stopped by %s before the instance was found healthy", item.name)
        else:
            super().receive(item, now)

    def take_verdict(self, now: float) -> None:
        super().take_verdict(now)
        left = f"{self.grace_end - now:.0f}s of grace left" if now < self.grace_end else "grace is over"
        log.info("%s: %s", left, "; ".join(map(str, self.watches.values())))


# ---- Service commands --------------------------------------------------------------------------
# install, remove, start, stop, status: what an operator does with the systemd service. They are processes
# of their own: of the daemon they know what systemd and status.json say.

COMMANDS = "install", "remove", "start", "stop", "status"
SERVICE = "healthchecker"
INSTALLED = "/usr/local/bin/ec2_local_healthchecker.py"
UNIT_FILE = f"/etc/systemd/system/{SERVICE}.service"
ORIGINAL = "ec2-local-healthchecker.service"  # the Go daemon's unit, and an alias of ours
UNIT_DIRECTORIES = "/etc/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"
ERROR_LOG = "/var/log/ec2-local-healthchecker.err"
INTERPRETER = "/usr/bin/python3"
RUNTIME_DIRECTORY = f"/run/{SERVICE}"
UNIT = """\
[Unit]
Description=Local health checker: marks this EC2 instance unhealthy when a service on it keeps failing
# Not after cloud-init: started from user data, it would wait for itself.
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart=/usr/bin/python3 -I /usr/local/bin/ec2_local_healthchecker.py
ExecReload=/bin/kill -HUP $MAINPID
Restart=always
RestartSec=5
WatchdogSec=60
TimeoutStopSec=5
StandardOutput=append:/var/log/ec2-local-healthchecker.log
StandardError=append:/var/log/ec2-local-healthchecker.err
RuntimeDirectory=healthchecker
# Here it notes, over a restart, that a mark of its own may stand.
FileDescriptorStoreMax=1
# The last process to die when memory runs out, for then it is needed.
OOMScoreAdjust=-1000

# It needs the network and its configuration, and nothing else of the machine.
DynamicUser=yes
CapabilityBoundingSet=
AmbientCapabilities=
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
PrivateUsers=yes
ProtectProc=invisible
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
Alias=ec2-local-healthchecker.service
"""


class CommandError(Exception):
    """Why a service command was refused, or failed, and what to do."""


def service_command(command: str) -> int:
    """Carry out one -command; returns the exit status."""
    try:
        if command != "status" and os.geteuid() != 0:
            raise CommandError(f"-command {command} needs root: run it with sudo")
        return {"install": install, "remove": remove, "status": print_status}.get(command, lambda: start_or_stop(command))()
    except (CommandError, OSError) as error:
        say(f"{PROGRAM}: {' '.join(str(error).split())}", sys.stderr)
        return 1


def _output_of(*command: str) -> str:
    """What a command prints; CommandError with its last line if it fails."""
    import subprocess

    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise CommandError(f"there is no {command[0]} on this machine, and the service needs it") from None
    text = done.stdout.decode("utf-8", "replace").strip()
    if done.returncode:
        raise CommandError(f"{' '.join(command[:2])}: {text.split(chr(10))[-1] or f'exit status {done.returncode}'}")
    return text


def systemctl(*arguments: str) -> str:
    return _output_of("systemctl", *arguments)


def install() -> int:
    """Copy this file and its unit to where systemd finds them, and enable the service."""
    os.umask(0o022)  # for a folder that has to be made
    source = sys.argv[0]
    if not os.path.isfile(source):
        raise CommandError("it was run from standard input: fetch it into a file, and run that with -command install")
    version = re.match(r"systemd (\d+)", systemctl("--version"))
    if not version or int(version[1]) < 240:
        raise CommandError("the service needs systemd 240 or newer")
    try:
        systemctl("daemon-reload")
    except CommandError as error:
        raise CommandError(f"systemd does not run here: install on a machine that it has booted ({error})") from None
    for directory in UNIT_DIRECTORIES:
        path = os.path.join(directory, ORIGINAL)
        if os.path.isfile(path) and not os.path.islink(path):
            cure = f"systemctl disable --now {ORIGINAL}; rm {path}; systemctl daemon-reload"
            raise CommandError(f"the original daemon's unit is in the way: run '{cure}', then install again")
    _require_own_unit()
    try:
        _output_of(INTERPRETER, "-I", "-c", "import sys, boto3; assert sys.version_info >= (3, 8), 'Python is older than 3.8'")
    except CommandError as error:
        advice = "install the package python3-boto3 (apt-get or dnf install python3-boto3)"
        raise CommandError(f"the service's interpreter cannot run it: {error} -- {advice}") from None
    with open(source, "rb") as file:
        content = file.read()
    before = re.search(rb'__version__ = "(.*)"', _content(INSTALLED) or b"")
    changed = _install_file(INSTALLED, content, 0o755) + _install_file(UNIT_FILE, UNIT.encode(), 0o644)
    systemctl("daemon-reload")
    systemctl("enable", SERVICE)
    if not changed:
        say(f"{SERVICE} {__version__} is installed already: nothing was changed")
    elif before:
        say(f"Installed {SERVICE} {__version__} over {before[1].decode()}")
    else:
        say(f"Installed {SERVICE} {__version__}: it starts at every boot")
    say(_next_step(bool(changed)))
    return 0


def _next_step(changed: bool) -> str:
    """What the operator does after an installation."""
    running = _is_running(_shown_state())
    start = f"systemctl {'restart' if running else 'start'} {SERVICE}"
    folder = os.path.dirname(DEFAULT_FILE)
    try:
        load_config(DEFAULT_FILE)
    except ConfigError as error:
        return f"Next: {f'mend {error}' if os.path.exists(DEFAULT_FILE) else f'write {DEFAULT_FILE}'}; then: {start}"
    if not os.stat(DEFAULT_FILE).st_mode & 0o004 or not os.stat(folder).st_mode & 0o001:
        return f"Next: chmod o+rX {folder} {DEFAULT_FILE}, for the service is a user of its own; then: {start}"
    return f"Next: {start}" if changed or not running else "It is running"


def remove() -> int:
    """Stop and disable the service, and delete what install wrote; the configuration and the logs stay."""
    _require_own_unit()
    there = [path for path in (UNIT_FILE, INSTALLED) if os.path.lexists(path)]
    if UNIT_FILE in there:
        systemctl("disable", "--now", SERVICE)
    for path in there:
        os.unlink(path)
    if there:
        systemctl("daemon-reload")
    say(f"Removed {' and '.join(there)}; the configuration and the logs are still there" if there else "Nothing is installed")
    return 0


def start_or_stop(command: str) -> int:
    if _shown_state()["LoadState"] == "not-found":
        raise CommandError(f"{SERVICE} is not installed: run -command install first")
    try:
        systemctl(command, SERVICE)
    except CommandError as error:
        raise CommandError(f"{error} -- the end of {ERROR_LOG}: {_last_words()}") from None
    return 0


def _last_words() -> str:
    """The last line that the service wrote to its log of errors."""
    try:
        with open(ERROR_LOG, errors="replace") as file:
            return collections.deque(file, 1)[0].strip()
    except (OSError, IndexError):
        return "nothing"


def _require_own_unit() -> None:
    for directory in UNIT_DIRECTORIES:
        path = os.path.join(directory, f"{SERVICE}.service")
        if INSTALLED.encode() not in (_content(path) or b"") and os.path.lexists(path):
            raise CommandError(f"{path} is not of this program, or masked: move it out of the way")


def _content(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def _install_file(path: str, content: bytes, mode: int) -> bool:
    """Whether the file had to be changed."""
    if _content(path) == content and not os.path.islink(path) and os.stat(path).st_mode & 0o7777 == mode:
        return False
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        replace_file(path, content, mode)
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror}") from None
    return True


def _shown_state() -> dict:
    names = "LoadState,ActiveState,SubState,StateChangeTimestamp,UnitFileState,NRestarts,MainPID"
    shown = (line.split("=", 1) for line in systemctl("show", SERVICE, "--property=" + names).splitlines() if "=" in line)
    return collections.defaultdict(str, shown)


def _is_running(state: dict) -> bool:
    return state["MainPID"] not in ("", "0")


def print_status() -> int:
    """Print how the service and each check stand; 0 if it is running, 3 if not."""
    state = _shown_state()
    paint = _painter()
    if state["LoadState"] == "not-found":
        say(f"{SERVICE} is not installed")
        return 3
    running = _is_running(state)
    active = paint(f"{state['ActiveState']} ({state['SubState']})", HEALTHY if running else FAILING)
    say(f"{SERVICE}: {active} since {state['StateChangeTimestamp']}, {state['UnitFileState']}, restarts: {state['NRestarts']}")
    now, told = time.monotonic(), read_status(RUNTIME_DIRECTORY)
    if not running:
        say(f"the end of {ERROR_LOG}: {_last_words()}")
        return 3
    try:
        say("\n".join(_status_lines(told, now, paint)) if told else f"{RUNTIME_DIRECTORY}/status.json says nothing (yet)")
    except (AttributeError, KeyError, TypeError, ValueError):
        say(f"{RUNTIME_DIRECTORY}/status.json is not of this version: systemctl restart {SERVICE}")
    return 0


def _status_lines(told: dict, now: float, paint):
    """The lines for what status.json has told."""
    yield f"{told['instance'] or 'this instance'}, {now - told['written']:.0f}s ago: {paint(told['summary'], told['verdict'])}"
    call = told["last_call"]
    if call:
        text = f": {call['text']}" if call["text"] else ""
        yield f"last call: {call['status']}, {call['result']} {max(0, time.time() - call['time']):.0f}s ago{text}"
    rows = [("CHECK", "STATE", "STREAK", "LAST FAILURE")]
    for name, check in told["checks"].items():
        streak = f"{'passed' if check['passed'] else 'failed'} {check['streak']} of {check['threshold']}" if check["streak"] else "-"
        failure = "-" if check["failed_at"] is None else f"{now - check['failed_at']:.0f}s ago: {check['reason']}"
        rows.append((printable(name), printable(check["state"]), streak, printable(failure)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row, widths)]
        yield "  ".join([cells[0], paint(cells[1], row[1]), cells[2], row[3]])


def _painter():
    """Colours a text by the state that it tells of; on a terminal, and where NO_COLOR is not set (no-color.org)."""
    colours = {HEALTHY: "32", FAILING: "31", UNHEALTHY: "31"} if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else {}
    return lambda text, state: f"\x1b[{colours[state]}m{text}\x1b[0m" if state in colours else text


# ---- Command line ------------------------------------------------------------------------------
# Options in, exit status out. Go's flag rules, because these flags are in units and user data out there.

SYNOPSIS = """\
usage: ec2_local_healthchecker.py [-healthcheckfile FILE] [-launchtime EPOCH]
           [-dry-run | -foreground [-fg-exit-early-if-healthy]] [-verbose]
       ec2_local_healthchecker.py -testconfig [-healthcheckfile FILE]
       ec2_local_healthchecker.py -command install|remove|start|stop|status

Probe the services on this EC2 instance; when one keeps failing, mark the
instance unhealthy in its Auto Scaling group, so that the group replaces it.
"""
# Name: (what it takes, its default, what it does). Without something to take, it is true or false.
OPTIONS = {
    "healthcheckfile": ("FILE", DEFAULT_FILE, "the configuration; - is standard input; without it,\n" + DEFAULT_FILE),
    "testconfig": ("", False, "print the effective configuration as JSON"),
    "launchtime": ("EPOCH", "-1", "when the server was launched, seconds since 1970:\nthe grace period counts from then"),
    "dry-run": ("", False, "log what would have been marked; no AWS, no boto3"),
    "foreground": ("", False, "a gate: probe, then exit 0 healthy or 1 not;\nnever calls AWS"),
    "fg-exit-early-if-healthy": ("", False, "exit 0 as soon as every check is healthy"),
    "verbose": ("", False, "also log every probe"),
    "command": ("ACTION", "", "install, remove, start or stop the systemd service,\nor print its status and that of every check"),
    "version": ("", False, "print the version"),
    "help": ("", False, "print this; so does -h"),
}
EXIT_STATUS = """
Exit status: 0 done, or the daemon was stopped by a signal; 1 not healthy, or
stopped before it was (-foreground), a service command failed, or the daemon
could never mark; 2 a mistake on the command line or in the configuration;
3 not running (-command status).
"""


class UsageError(Exception):
    """A mistake on the command line, and what to write instead."""


def parse_command_line(arguments) -> dict:
    """The value of every option; UsageError for the first mistake."""
    options = {name: default for name, (_, default, _) in OPTIONS.items()}
    arguments = list(arguments)
    while arguments and arguments != ["--"]:
        argument = arguments.pop(0)
        match = re.fullmatch("--?([^-=][^=]*)(=.*)?", argument, re.DOTALL)
        if not match:
            raise UsageError(f"unexpected {shown(argument)}: options begin with a dash, and true or false follow a =")
        name, value = "help" if match[1] == "h" else match[1], match[2] and match[2][1:]
        if name not in OPTIONS:
            raise UsageError(f"unknown option {shown(argument)}: {nearest(name, OPTIONS)}")
        if OPTIONS[name][0]:
            options[name] = value if value is not None or not arguments else arguments.pop(0)
            if not options[name]:
                raise UsageError(f"-{name} takes a value: write -{name} {OPTIONS[name][0]}")
        elif value in (None, "1", "t", "T", "true", "TRUE", "True"):
            options[name] = True
        elif value in ("0", "f", "F", "false", "FALSE", "False"):
            options[name] = False
        else:
            raise UsageError(f"-{name}={shown(value)}: write -{name}=true or -{name}=false")
        if options["help"]:
            return options
    others = [f"-{name}" for name, (_, default, _) in OPTIONS.items() if name != "command" and options[name] != default]
    if options["command"] and options["command"] not in COMMANDS:
        raise UsageError(f"-command {shown(options['command'])}: write one of {', '.join(COMMANDS)}")
    if options["command"] and others:
        raise UsageError(f"{others[0]} does not go with -command: the unit has the options ('systemctl edit {SERVICE}')")
    if options["fg-exit-early-if-healthy"] and not options["foreground"]:
        raise UsageError("-fg-exit-early-if-healthy goes with -foreground: alone, it would start a daemon")
    try:
        options["launchtime"] = float(int(options["launchtime"], 0))
    except (OverflowError, ValueError):
        raise UsageError(f"-launchtime {shown(options['launchtime'])}: write seconds since 1970, like $(date +%s)") from None
    return options


def usage() -> str:
    rows = [SYNOPSIS]
    for name, (takes, _, text) in OPTIONS.items():
        first, *more = text.split("\n")
        rows += [f"  {f'-{name} {takes}':27}{first}"] + [" " * 29 + line for line in more]
    return "\n".join(rows) + "\n" + EXIT_STATUS.rstrip("\n")


def main(argv=None) -> int:
    """Run the program with these arguments (default: the process's own); returns the exit status."""
    try:
        options = parse_command_line(sys.argv[1:] if argv is None else argv)
        if options["help"]:
            return say(usage())
        if options["version"]:
            return say(f"{PROGRAM} {__version__}")
        if options["command"]:
            return service_command(options["command"])
        config = load_config(options["healthcheckfile"])
        if options["testconfig"]:
            for warning in config.warnings:
                say(warning, sys.stderr)
            return say(json.dumps(config.as_dict(), indent=2))
        return run(options, config)
    except UsageError as error:
        say(f"{PROGRAM}: {error}; -h lists the options", sys.stderr)
    except ConfigError as error:
        say(str(error), sys.stderr)
        with contextlib.suppress(Exception):
            Systemd().notify(f"STATUS={error}")
    except Exception as fault:
        say(f"{PROGRAM}: {printable(f'{type(fault).__name__}: {fault}')}", sys.stderr)
        return 1
    return 2


def run(options: dict, config: Config) -> int:
    """Be the daemon, or the gate, until it is time to end; returns the exit status."""
    now = time.monotonic()
    launched = options["launchtime"]
    grace = grace_left(config.graceperiod, None if launched < 0 else time.time() - launched)
    inbox = Inbox()
    if any(check.type == "http" for check in config.checks):
        with later("ssl", "calendar", "datetime"):  # 5 MB; https probes and boto3 use them, http probes do not
            import http.client  # noqa: F401
    foreground, dry_run, path = options["foreground"], options["dry-run"], options["healthcheckfile"]
    for number in (signal.SIGTERM, signal.SIGINT) if foreground else (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: inbox.put(signal.Signals(number)))
    inbox.wake_on_signals()
    bypass_proxy_for_metadata()
    write, finish = prepare_logging(options["verbose"])

    def start_loop(check, due):
        return start(CheckLoop(check, inbox, due))

    def read_config():
        if not os.path.isfile(path):  # a pipe would keep the main thread waiting
            raise ConfigError("is not a file any more: write it", None, path)
        return load_config(path)

    rehearsal = None
    errors, sys.stderr = sys.stderr, None  # where Python would write the traceback of a thread that ends
    try:
        if dry_run and not foreground:
            inbox.put(Rehearsed("", (), Seen()))
        elif not foreground:
            try:
                rehearsal = Rehearsal(config)  # a fork, so before the first thread
                start(threading.Thread(target=lambda: inbox.put(rehearsal.outcome()), daemon=True))
            except (OSError, RuntimeError) as error:
                inbox.put(Rehearsed("", (f"No rehearsal of a mark, no process or thread can be started: {error}",), Seen()))
        start(threading.Thread(target=write, daemon=True))
        for warning in config.warnings:
            log.warning("%s", warning)
        checks = ", ".join(f"{check.name} ({check.endpoint})" for check in config.checks)
        log.info("%s %s watches %s; grace period: %gs", PROGRAM, __version__, checks, grace)
        if foreground:
            return Gate(config, inbox, now, grace, start_loop, options["fg-exit-early-if-healthy"]).run()
        directory = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
        return Daemon(
            config, inbox, now, grace, start_loop, lambda: start(Marker(inbox, dry_run)), dry_run,
            read_config=None if path == "-" else read_config, directory=directory,
        ).run()  # fmt: skip
    finally:
        if rehearsal:
            rehearsal.kill()
        finish()
        sys.stderr = errors


def begin_anew(code: types.CodeType) -> None:
    """Start the program again in this process (execve(2)), from its compiled code.

    To compile this file takes 5 MB, which Python never gives back. Where this is not permitted, nothing happens.
    """
    import marshal

    with contextlib.suppress(Exception):
        if os.path.samefile(sys.executable or "", "/proc/self/exe"):  # another Python would misread it
            file = os.fdopen(os.memfd_create("compiled", 0), "wb")
            marshal.dump(code, file)
            file.seek(0)
            start = f"import marshal, sys; del sys.argv[0]; exec(marshal.load(open({file.fileno()}, 'rb')))"
            os.execv(sys.executable, [sys.executable, "-I", *["-S"] * sys.flags.no_site, "-c", start, *sys.argv])


if __name__ == "__main__":
    for number in range(3):
        with contextlib.suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)  # a closed standard descriptor is not to become another file of ours
    if sys.flags.isolated and "__file__" in globals():  # as the unit runs it, and not yet begun anew
        begin_anew(sys._getframe().f_code)
    sys.stdout, sys.stderr = sys.stdout or open(1, "w"), sys.stderr or open(2, "w")
    # Not sys.exit(): a thread that hangs in the resolver or in a write must not be waited for.
    os._exit(main())
