#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = ["boto3"]
# ///
"""Probe the services on this EC2 instance; when one keeps failing, mark the instance unhealthy in
its Auto Scaling group, so that the group replaces it.

This program can end the machine that it runs on. Three sentences rank every decision in it:

1. It never marks a healthy instance.
2. It always marks an unhealthy one, however sick the machine is, until the group acts.
3. An operator reads the whole file in one sitting and knows that 1 and 2 hold.

The file reads from top to bottom, and each room uses only the rooms above it. The threads:

    main        owns the checks, their health and the verdict (Daemon)
    one a check probes at the check's rate, and hands main the results (CheckLoop)
    marker      owns the mark: looks what is wanted, looks at metadata, calls, waits (Marker)
    writer      does what may hang on a disk: the log, the file that remembers a mark (Writer)
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import email.utils
import errno
import functools
import gc
import importlib.util
import io
import json
import logging
import math
import os
import random
import re
import signal
import socket
import sys
import threading
import time
import typing
import warnings
from subprocess import DEVNULL, PIPE, STDOUT, Popen, run

sys.modules.setdefault("ssl", None)  # hidden from http.client: 4 MB that only https and boto3 need
import http.client  # noqa: E402
import urllib.parse  # noqa: E402

if sys.modules["ssl"] is None:
    del sys.modules["ssl"]

__version__ = "2.0.0"

PROGRAM = "ec2-local-healthchecker"
LOOK = 1.0  # seconds between two looks of a thread at what the others tell
log = logging.getLogger(PROGRAM)
say = functools.partial(print, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no KeyboardInterrupt, anywhere
    # Whole, this file ends the process in its last line; cut short, it comes to these, last first.
    atexit.register(os._exit, 1)
    atexit.register(say, f"{PROGRAM}: the file is incomplete: fetch it again", file=sys.stderr)


# ---- Deciding ------------------------------------------------------------------------------------
# Whether to mark, as functions of plain values. No clock, network, thread or global may come in
# here: whoever wants to know when this program ends a machine need read only this room.

UNKNOWN, HEALTHY, FAILING = "unknown", "healthy", "failing"  # how a check stands
UNDECIDED, UNHEALTHY = "undecided", "unhealthy"  # and, with "healthy", the verdict
MARK_UNHEALTHY, MARK_HEALTHY = "Unhealthy", "Healthy"  # the values of HealthStatus in the API


class Health(typing.NamedTuple):
    """How one check stands, and the run of equal results that it is in."""

    state: str = UNKNOWN
    passed: bool = True  # what every result of the run was
    streak: int = 0  # how many results the run has

    def after(self, passed: bool, threshold: int) -> Health:
        """The health after one more result: `threshold` equal ones in a row change the state."""
        streak = self.streak + 1 if passed == self.passed else 1
        if streak < threshold:
            return Health(self.state, passed, streak)
        return Health(HEALTHY if passed else FAILING, passed, streak)


def verdict_of(states) -> str:
    """The verdict on the instance, from the states of its checks (at least one)."""
    states = set(states)
    if FAILING in states:
        return UNHEALTHY
    return HEALTHY if states == {HEALTHY} else UNDECIDED


def wanted_mark(verdict: str, marked: bool, recovery: bool) -> str | None:
    """The HealthStatus to ask the group for, or None. `marked`: a mark of our own may stand."""
    if verdict == UNHEALTHY:
        return MARK_UNHEALTHY
    return MARK_HEALTHY if verdict == HEALTHY and marked and recovery else None


def lifecycle_permits(state: str | None) -> bool:
    """Whether to mark unhealthy in this target lifecycle state; None: the instance has none."""
    return state in (None, "InService")


def call_backoff(calls: int, frequency: float, failed: bool, dice: float) -> float:
    """Seconds until the next call, after so many, the last one failed or not; `dice` is 0 to 1."""
    # One frequency (after an error at most 10 s), doubling to 5 minutes or one frequency, ±20 %.
    first = min(frequency, 10.0) if failed else frequency
    doubled = first * 2.0 ** min(calls - 1, 40)
    return min(doubled, max(frequency, 300.0)) * (0.8 + 0.4 * dice)


def grace_left(graceperiod: float, age: float) -> float:
    """Seconds of grace from now on, for a server launched `age` seconds ago."""
    left = graceperiod - age
    # Over already (a restart) or in the future (a wrong clock): the whole period, from now.
    return left if 0 < left <= graceperiod else graceperiod


def next_due(due: float, period: float, now: float) -> float:
    """The next time after `due` at a fixed rate: of those missed by `now`, only the last counts."""
    return due + period * max(1, math.floor((now - due) / period))


# ---- Durations and YAML --------------------------------------------------------------------------
# Text in, plain values out, or ConfigError. What the keys of a configuration mean is the next
# room's. Every pattern is linear in the length of a line: main reads this while it must decide.


class ConfigError(Exception):
    """A mistake in a configuration: what is wrong, and what to write instead."""

    status = 2  # the exit status


def quoted(text):
    """`text` quoted for a message: on one line, and not too much of it."""
    return ascii(text[:60])


def printable(text, most=200):
    """`text` on one line of at most so many characters: what a server sent shapes no log."""
    return re.sub("[^ -~]", lambda char: ascii(char[0])[1:-1], text[:most])[:most]


def named(fault):
    """A fault of this program, printable: its type, and what it says."""
    return printable(f"{type(fault).__name__}: {fault}")


UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
UNITS["\u00b5s"] = UNITS["\u03bcs"] = 1e-6  # with the micro sign, and with the Greek letter
DURATION_PART = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|\u00b5s|\u03bcs|ms|s|m|h)"


def parse_duration(text: str) -> float:
    """Seconds in a duration as Go's time.ParseDuration has it, up to 24h; ConfigError if none."""
    if not re.fullmatch(f"[+-]?(?:0|(?:{DURATION_PART})+)", text):
        is_number = re.fullmatch("[0-9]{1,9}", text)
        advice = f"{text}s" if is_number else "numbers with units, like 10s or 1h30m"
        raise ConfigError(f"{quoted(text)} is no duration: write {advice}")
    parts = re.findall(DURATION_PART, text)
    seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
    if seconds > 86400:
        raise ConfigError(f"{quoted(text)} is too long: write at most 24h")
    return -seconds if text[0] == "-" else seconds


# The law of the parser: for any text, what PyYAML's BaseLoader returns, or ConfigError.
FORBIDDEN = re.compile(
    "[^\t -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffc\U00010000-\U0010ffff]"
)
SILENT = re.compile(r" *(?:#.*)?$")
MARK = re.compile(r"(---|\.\.\.)(?: +(?:#.*)?)?$")
SCALAR = r"""(
      "(?: [^"\\\t] | \\(?: [0abtnvfre "/\\N_LP] | x{H}{2} | u(?!{S}){H}{4}   # double-quoted
                         | U(?: 0000(?!{S}) | 000[1-9A-Fa-f] | 0010 ){H}{4} ) )* "[ ]*
    | '[^'\t]*(?:''[^'\t]*)*'[ ]*                 # single-quoted
    | (?! []\[{},&*!|>%@`"'#\t ] | [-?:](?:[ ]|$) | <<[ ]*(?::|$) )   # plain: not beginning so,
      (?:(?! :(?:[ ]|$) | [ ][#] | \t ) .)+                            # and not containing this
)""".replace("{H}", "[0-9A-Fa-f]").replace("{S}", "[Dd][89A-Fa-f]")  # no surrogate is a character
ENTRY = re.compile(  # indentation, key, colon, value, comment
    rf"(?!---|[.]{{3}})[ ]*{SCALAR}:(?:[ ]|$)[ ]*(?![ ]){SCALAR}?[ ]?(?:(?<=[ ])[#].*)?$",
    re.VERBOSE,
)
ONE_LINE = "write it on one line (tools that fold lines have a width to set)"
ALIGN = f"align it; if it is a value, {ONE_LINE}"
REFUSED = {  # what no key or value begins with: its name, and what to write
    "[": "a flow sequence: write the values without brackets, like 200,204; quote an address",
    "{": "a flow mapping: write each key on a line of its own, indented",
    "&": "an anchor: write the value itself",
    "*": "an alias: write the value itself, or put the text in quotes",
    "!": "a tag: leave it out, or put the text in quotes",
    "|": "a block scalar: write the text on the line of its key",
    ">": "a block scalar: write the text on the line of its key",
    "%": "a directive: leave it out, or put the text in quotes",
    "-": "a sequence: write keys and values, or several values like 200,204",
    "?": "a complex key: write 'key: value' on one line",
    "<": "a merge key: write the keys themselves",
    '"': f"a quoted text with an escape that is none, or not ended by its line: {ONE_LINE}",
    "'": f"a quoted text not ended by its line: {ONE_LINE}",
    **dict.fromkeys(("---", "..."), "text after a document mark: write it on the next line"),
    **dict.fromkeys("]},@`:", "a reserved character: put the text in quotes"),
}
ESCAPE = re.compile(r"\\(?:x(..)|u(.{4})|U(.{8})|(.))")
ESCAPED = str.maketrans('0abtnvfre "/\\N_LP', '\0\a\b\t\n\v\f\r\x1b "/\\\x85\xa0\u2028\u2029')


def parse_yaml(text: str) -> tuple[dict, dict]:
    """The nested mappings of strings in `text`, and the line of each path of keys.

    The subset of YAML 1.1 that has block mappings, and scalars that end on their line; ConfigError
    with the line for anything else, whatever it is, in time linear to its length.
    """
    lines, levels = {}, []  # the mappings that are open, outermost first: (indent, mapping, path)
    waiting = None  # the path of the last key if it has no value: deeper lines may be it
    for number, line in _content(text):
        indent = len(line) - len(line.lstrip(" "))
        while levels and indent < levels[-1][0]:
            levels.pop()
            waiting = None
        if waiting and indent > levels[-1][0]:
            levels.append((indent, {}, waiting))
            levels[-2][1][waiting[-1]] = levels[-1][1]
        elif not lines:
            levels.append((indent, {}, ()))
        elif not levels or indent > levels[-1][0]:
            raise ConfigError(f"{number}: the indentation fits no key above: {ALIGN}")
        entry = ENTRY.match(line)
        if not entry or len(entry[1]) > 1024:  # in which a key ends (YAML 1.1, 7.3.1)
            raise ConfigError(f"{number}: {_refusal(line)}")
        _, mapping, path = levels[-1]
        key = _unquoted(entry[1])
        path += (key,)
        if path in lines:
            raise ConfigError(f"{number}: {quoted(key)} is on line {lines[path]} already: keep one")
        mapping[key] = _unquoted(entry[2]) if entry[2] else ""
        waiting = None if entry[2] else path
        lines[path] = number
    if not levels:
        raise ConfigError("1: empty: write at least 'checks:', with one check below it")
    return levels[0][1], lines


def _content(text):
    """Yields (number, line) of each line that says something."""
    started = ended = False
    for number, line in enumerate(re.split("\r\n|\r|\n", re.sub("^\ufeff", "", text)), 1):
        forbidden, mark = FORBIDDEN.search(line), MARK.match(line)
        if forbidden:
            code = f"U+{ord(forbidden[0]):04X}"
            raise ConfigError(f"{number}: a character {code}: remove it, or save the file as UTF-8")
        if SILENT.match(line):
            continue
        if ended or (started and mark and mark[1] == "---"):
            raise ConfigError(f"{number}: a second document: keep one")
        started, ended = True, mark and mark[1] == "..."
        if not mark:
            yield number, line


def _refusal(line):
    """The name of what is refused in a line, and what to write instead."""
    value = line.partition(": ")[2].lstrip(" ")
    if "\t" in line:
        return "a tab: write spaces, one after a colon"
    for first in line[:3], value[:1], line.lstrip(" ")[:1]:
        if first in REFUSED:
            return REFUSED[first]
    if value:
        return "': ' in a value: put the text in quotes"
    return "no key and value: write 'key: value', with a space after the colon"


def _unquoted(scalar):
    scalar = scalar.rstrip(" ")
    if scalar[0] == '"':
        return ESCAPE.sub(_unescaped, scalar[1:-1])
    return scalar[1:-1].replace("''", "'") if scalar[0] == "'" else scalar


def _unescaped(escape):
    code = escape[1] or escape[2] or escape[3]
    return chr(int(code, 16)) if code else escape[4].translate(ESCAPED)


# ---- Configuration -------------------------------------------------------------------------------
# Every key with its reader and its default, and all validation: a configuration that loads will
# run. Nothing is resolved or connected to here, and no file is opened but the configuration.

DEFAULT_FILE = "/etc/sysconfig/ec2-local-healthchecker.yml"
DEFAULT_PORTS = {"http": 80, "https": 443, "tcp": 0}  # 0: none
AUTHORITY = re.compile(
    r"""(?: \[ ([0-9a-f:.]+) \]                         # an IPv6 address
        |   ((?: [\w-]{1,63} \. )* [\w-]{1,63} \.? )?   # a name, or an IPv4 address
        )
        (?: : (\w[\w-]*)? )?                            # a port, or the name of a service
    """,
    re.VERBOSE | re.ASCII | re.IGNORECASE,
)
LOOPBACK = re.compile(r"localhost|127\.[0-9.]+|::1")  # hosts that are always this machine
ENDPOINTS = "a URL, like http://localhost:80/, or host:port, like localhost:11211"


def hide_secrets(url):
    """`url` for people to read, without what may be a secret: its user, password and query."""
    return re.sub("[?#].*", "?***", re.sub("//[^/?#]*@", "//***@", url), flags=re.DOTALL)


class Endpoint(typing.NamedTuple):
    """Where to connect to, and for http and https what to request there."""

    scheme: str  # tcp, http or https
    host: str  # in lower case; an IPv6 address without its brackets
    port: int
    path: str  # with the query

    @classmethod
    def from_text(cls, text: str) -> Endpoint:
        """The endpoint in an http or https URL, or in host:port; ConfigError if it is neither."""
        is_tcp = "//" not in text
        try:
            parts = urllib.parse.urlsplit("tcp://" + text if is_tcp else text)
            ipv6, name, port = AUTHORITY.fullmatch(parts.netloc).groups()
            host = (ipv6 or name or ("localhost" if is_tcp else "")).lower()
            if ipv6:
                socket.inet_pton(socket.AF_INET6, host)
            elif re.fullmatch("[0-9.]+", host):
                socket.inet_aton(host)  # also short forms like 127.1
            port = port or str(DEFAULT_PORTS[parts.scheme])
            port = int(port) if port.isdigit() else socket.getservbyname(port, "tcp")
            is_whole = parts.netloc == text if is_tcp else parts.scheme in ("http", "https")
            if not (is_whole and host and 0 < port < 65536 and re.fullmatch("[!-~]+", text)):
                raise ValueError
        except (AttributeError, KeyError, OSError, ValueError):
            problem = f"{quoted(hide_secrets(text))} is not an endpoint: write {ENDPOINTS}"
            if "@" in text:
                problem = "a user or password in a URL: write an Authorization header"
            raise ConfigError(problem) from None
        path = "" if is_tcp else parts.path or "/"
        return cls(parts.scheme, host, port, f"{path}?{parts.query}" if parts.query else path)

    def __str__(self):
        return hide_secrets(self.url).replace("tcp://", "")

    @property
    def url(self) -> str:
        """The whole URL; it may hold a secret."""
        return self.origin + self.path

    @property
    def origin(self) -> str:
        """Scheme, host and port (RFC 6454)."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def positive_duration(text):
    """Seconds; ValueError if there are none."""
    seconds = parse_duration(text)
    if seconds <= 0:
        raise ValueError
    return seconds


def grace_period(text):
    return 0.0 if text == "0" else positive_duration(text)


def status_codes(text):
    """A list of codes and ranges, without blanks; ValueError if it is not one."""
    text = text.replace(" ", "")
    for part in text.split(","):
        # 101 is the only 1xx code that can be final: a check of another would always fail.
        if not re.fullmatch("101|[2-5][0-9]{2}(-[2-5][0-9]{2})?", part) or part[:3] > part[-3:]:
            raise ValueError
    return text


def positive_integer(text):
    return int(re.fullmatch("[1-9][0-9]{0,5}", text)[0])


def empty_mapping(data):
    """An empty mapping, which the keys of `data` are read into later."""
    if not data.items():
        raise ValueError
    return {}


TYPES = {"tcp": "tcp", "http": "http", "https": "http"}
BOOLEANS = dict.fromkeys("true yes on t 1".split(), True)
BOOLEANS.update(dict.fromkeys("false no off f 0".split(), False))

# For each key: the function that reads its value (or raises), and what to write instead.
DURATION = (positive_duration, "write a duration of more than 0, like 10s")
BOOLEAN = (lambda text: BOOLEANS[text.lower()], "write true or false")
TOP_KEYS = {
    "graceperiod": (grace_period, DURATION[1]),
    "frequency": DURATION,
    "recovery": BOOLEAN,
    "checks": (empty_mapping, "write at least one check below it, indented"),
}
CHECK_KEYS = {
    "type": (lambda text: TYPES[text.lower()], "write tcp or http"),
    "endpoint": (Endpoint.from_text, f"write {ENDPOINTS}"),
    "timeout": DURATION,
    "threshold": (positive_integer, "write 1 to 999999"),
    "frequency": DURATION,
    "status": (status_codes, "write codes of 200 to 599, like 200,204 or 200-299"),
    "headers": (empty_mapping, "write names and values below it, indented"),
    "tls_verify": BOOLEAN,
}
HTTP_KEYS = ("status", "headers", "tls_verify")  # a tcp check has none of these


class Check(typing.NamedTuple):
    """One check; times in seconds. After a reload, an equal check is the same check."""

    name: str
    type: str = "http"  # or tcp
    endpoint: Endpoint = None
    timeout: float = 1.0
    threshold: int = 3
    frequency: float = 10.0  # unless there is one at the top
    status: str = "200"  # the codes that pass, like 200,204-299
    headers: dict = {}
    tls_verify: bool = True


class Config(typing.NamedTuple):
    """A valid configuration; times in seconds."""

    graceperiod: float = 300.0
    frequency: float = 10.0
    recovery: bool = True
    checks: tuple = ()
    warnings: tuple = ()  # lines for the operator

    @classmethod
    def from_text(cls, text: str, source: str) -> Config:
        """The configuration in `text`; ConfigError with one line, SOURCE:LINE: what to change."""
        values, warnings, place = {}, [], ""
        try:
            data, lines = parse_yaml(text)
            for path, line in lines.items():  # in the order of the file: outer keys come first
                place = f"{line}: {printable(path[-1], 60)}: "
                read_key(path, data, values)
                if path[-1] == "threashold":
                    warnings.append(f"{source}:{place}read as threshold: correct the spelling")
            config, place = cls(**values), "1: "
            if not config.checks:
                raise ConfigError("no checks: write 'checks:', with at least one below it")
        except ConfigError as error:
            raise ConfigError(f"{source}:{place}{error}") from None
        checks = []
        for name, keys in config.checks.items():
            checks.append(Check(name, **{"frequency": config.frequency, **keys}))
            host = checks[-1].endpoint.host
            if not LOOPBACK.fullmatch(host) and host not in ("0.0.0.0", socket.gethostname()):
                place = f"{source}:{lines['checks', name, 'endpoint']}: {name}: "
                advice = 'is another machine, see "Across a group" in the README'
                warnings.append(f"{place}if {host} {advice}")
        return config._replace(checks=tuple(checks), warnings=tuple(warnings))

    def as_dict(self) -> dict:
        """The effective configuration; what may be a secret is masked."""
        checks = {}
        for check in self.checks:
            masked = dict.fromkeys(check.headers, "***")
            row = check._replace(endpoint=str(check.endpoint), headers=masked)._asdict()
            checks[row.pop("name")] = row
        return {**{key: getattr(self, key) for key in TOP_KEYS}, "checks": checks}


def read_key(path, data, values):
    """Read the key at `path` of `data` into its place in `values`; ConfigError if it is wrong."""
    name, value = path[-1], data
    for key in path:
        value = value[key]
    if len(path) == 2:
        values["checks"][name] = {}
        require_check(name, value, data["checks"])
    elif len(path) == 4:
        read_header(values["checks"][path[1]]["headers"], name.title(), value)
    elif len(path) == 3:
        read_value(name, value, CHECK_KEYS, values["checks"][path[1]])
        require_fit(name, values["checks"][path[1]], data["checks"][path[1]])
    else:
        read_value(name, value, TOP_KEYS, values)


def read_value(name, value, keys, values):
    """Read one of these keys into `values`."""
    key = "threshold" if name == "threashold" else name  # it is in files out there
    if key not in keys:
        raise ConfigError(f"unknown key: {nearest(name, keys)}")
    if key in values:
        raise ConfigError("threshold is written twice: keep one")
    read, advice = keys[key]
    try:
        values[key] = read(value)
    except (AttributeError, KeyError, TypeError, ValueError):
        what = "this value" if key == "headers" else quoted(str(value))
        raise ConfigError(f"{what} is not valid: {advice}") from None


def require_check(name, keys, checks):
    """ConfigError unless `keys`, all that the check has, can be those of a check."""
    strays = [key for key in checks if key in CHECK_KEYS and isinstance(checks[key], str)]
    if name in strays:
        raise ConfigError("this is a key of a check: indent it below the name of its check")
    if keys == "" and strays:
        return  # they belong to this check: the mistake is on their own lines
    if not isinstance(keys, dict) or not name.isprintable() or not name.strip():
        raise ConfigError("a check has keys, indented below its name: write at least endpoint")
    if "endpoint" not in keys:
        raise ConfigError("a check has an endpoint: write one below it, indented")


def require_fit(name, values, keys):
    """ConfigError if the key that was read last does not fit the type of its check."""
    is_tcp = TYPES.get(str(keys.get("type")).lower()) == "tcp"
    if is_tcp and name in HTTP_KEYS:
        raise ConfigError(f"{name} is for http checks, and this one is tcp: remove it")
    if name == "endpoint" and is_tcp != (values[name].scheme == "tcp"):
        advice = "a URL: write 'type: http'" if is_tcp else "host:port: write 'type: tcp'"
        raise ConfigError(f"{values[name]} is {advice} beside it")


def read_header(headers, name, value):
    """Read one header, its name in title case: names are equal in any case (RFC 9110, 5.1)."""
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
        raise ConfigError("this is not a header name: write one like Host")
    if name in ("Connection", "Content-Length", "Expect", "Transfer-Encoding"):
        raise ConfigError("a probe sends one request without a body: remove this header")
    if not isinstance(value, str) or not re.fullmatch("[ -~]+", value):
        raise ConfigError("the value is not one line of printable ASCII: write one")
    if name == "Host" and (value[0] == ":" or not AUTHORITY.fullmatch(value)):
        raise ConfigError(f"{quoted(value)} is not a host: write one like www.example.com")
    if name in headers:
        raise ConfigError("this header is here twice: keep one")
    headers[name] = value


def nearest(name, known):
    """What to write instead of an unknown name."""
    import difflib  # only a mistake needs it

    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f"did you mean {near[0]}?" if near else "write one of " + ", ".join(known)


def load_config(path: str) -> Config:
    """The configuration in a file, or on standard input for "-"; ConfigError if there is none."""
    source = "<stdin>" if path == "-" else printable(path)
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            text = file.read().decode("utf-8", "replace")
    except OSError as error:
        advice = "write it, or name another with -healthcheckfile"
        if path.startswith("/run/credentials/"):
            advice = "restart the service: a reload does not get its credentials"
        elif isinstance(error, PermissionError):
            advice = "make file and folders readable for all: the service is not root"
            if os.path.realpath(path).startswith(("/home/", "/root/")):
                advice = "move it to /etc: the service cannot see /home and /root"
        raise ConfigError(f"{source}: cannot be read ({error.strerror}): {advice}") from None
    return Config.from_text(text, source)


# ---- Probes --------------------------------------------------------------------------------------
# One attempt each: return, or raise ProbeFailure for what the service did, and anything else for
# what went wrong on this side. One deadline bounds all of it. Nothing is counted here.

MAX_REDIRECTS = 10
REDIRECTS = (301, 302, 303, 307, 308)
LARGEST_HEAD, LARGEST_BODY = 2**20, 2**20  # bytes of a response that are read
# This machine lacks descriptors, buffers or memory: that is no evidence against a service.
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, socket.EAI_MEMORY)


class ProbeFailure(Exception):
    """The service failed the probe: a printable line of at most 200 characters says how."""

    def __init__(self, reason: str):
        super().__init__(printable(reason))


def failure(error, reason):
    """What to raise for an OSError: a ProbeFailure, or the error itself if it is a shortage."""
    return error if getattr(error, "errno", None) in SHORTAGES else ProbeFailure(reason)


class Deadline:
    """The time by which one attempt must end, `timeout` seconds after its start."""

    def __init__(self, timeout: float):
        self.timeout, self.end = timeout, time.monotonic() + timeout

    def left(self, doing: str) -> float:
        """The seconds left for `doing`; ProbeFailure when there are none."""
        self.doing, left = doing, self.end - time.monotonic()
        if left <= 0:
            raise self.missed()
        return left

    def missed(self):
        return ProbeFailure(f"timed out after {self.timeout:g}s {self.doing}")


def connect(host: str, port: int, deadline: Deadline):
    """A TCP connection to the first address that accepts one, or ProbeFailure."""
    # They are tried in turn, each with an even share of the time left, as Go's dialer does.
    try:
        # As bytes: a str would go through the IDNA codec, which takes a megabyte to load.
        addresses = socket.getaddrinfo(host.encode(), port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise failure(error, f"cannot resolve {host}: {error.strerror}") from None
    reasons = []
    while addresses:
        share = deadline.left(f"connecting to {host} port {port}") / len(addresses)
        family, kind, protocol, _, address = addresses.pop(0)
        sock = None
        try:
            sock = socket.socket(family, kind, protocol)
            sock.settimeout(share)
            sock.connect(address)
            return sock
        except (ConnectionResetError, BrokenPipeError):
            return sock  # reset by now, but it was connected
        except OSError as error:
            if sock:
                sock.close()
            elif error.errno != errno.EAFNOSUPPORT:  # which a kernel without IPv6 answers
                raise
            if error.errno in SHORTAGES:
                raise
            reason = error.strerror or f"no answer in {share:.3g}s"
            reasons.append(f"{address[0]} port {port}: {reason}")
    raise ProbeFailure("; ".join(reasons))


class Tls:
    """The TLS context of one check: made when needed, and again after a certificate was refused."""

    def __init__(self, verify=True):
        self.verify = verify
        self.context = None

    def prepare(self):
        """Python's default context, made to accept the same certificates on every Python."""
        import ssl

        if not self.context:
            context = ssl.create_default_context()
            context.set_ciphers("DEFAULT")  # of the system: Python 3.10 and later offer fewer
            context.set_alpn_protocols(["http/1.1"])  # some servers hang up without it
            # Python 3.13 adds VERIFY_X509_STRICT, which refuses more, and PARTIAL_CHAIN, which
            # trusts every certificate in the store, as curl and Go do. Before 3.10 it has no name.
            context.verify_flags = ssl.VERIFY_X509_TRUSTED_FIRST | 0x80000
            if not self.verify:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            self.context = context
        return self.context


def probe_tcp(check: Check, tls):
    """Pass if the endpoint accepts a connection. (The kernel accepts for a hung service, too.)"""
    connect(check.endpoint.host, check.endpoint.port, Deadline(check.timeout)).close()


def probe_http(check: Check, tls) -> str | None:
    """Pass if a GET ends in one of the check's codes, or in a redirect to another host.

    Redirects on this machine are followed. One that leaves it passes, because the service has
    answered: what a load balancer says there is true of all instances at once. Returns a remark
    on that, or None. `tls` is the check's.
    """
    deadline = Deadline(check.timeout)
    endpoint, headers = check.endpoint, check.headers
    try:
        for _ in range(MAX_REDIRECTS + 1):
            response, _ = exchange("GET", endpoint, headers, deadline, tls)
            code = str(response.status)
            if any(part[:3] <= code <= part[-3:] for part in check.status.split(",")):
                return None
            location = (response.headers["Location"] or "").strip(" \t")
            if response.status not in REDIRECTS or not location:
                raise ProbeFailure(f"HTTP status {code} {response.reason}")
            url, target = follow(endpoint, location, check.endpoint.host)
            if not target:
                return (
                    f"it passes with status {code} to {printable(hide_secrets(url), 100)}, another "
                    "host, which is not probed: probe the path that this leads to, send the "
                    f"header X-Forwarded-Proto, or accept it with 'status: {code}'"
                )
            endpoint = target
            # Headers may hold a secret: another origin does not get them.
            headers = check.headers if endpoint.origin == check.endpoint.origin else {}
        raise ProbeFailure(f"more than {MAX_REDIRECTS} redirects")
    except ProbeFailure as error:
        if endpoint == check.endpoint:
            raise
        raise ProbeFailure(f"{str(error)[:100]} (redirected to {endpoint})") from None


def follow(endpoint, location, own_host):
    """Where a Location leads: (URL, Endpoint), or (URL, None) if that is not on this machine."""
    # http.client reads headers as Latin-1: what is not ASCII there is a byte, to be encoded.
    location = re.sub("[^!-~]", lambda char: f"%{ord(char[0]):02X}", location)
    with contextlib.suppress(ConfigError, ValueError):
        url = urllib.parse.urljoin(endpoint.url, location)
        host = urllib.parse.urlsplit(url).hostname
        # Names are compared as written, and a Host header is not a name of this machine.
        if host and host != own_host and not LOOPBACK.fullmatch(host):
            return url, None
        if host:
            return url, Endpoint.from_text(url)
    where = quoted(hide_secrets(location))
    raise ProbeFailure(f"redirected to {where}, which is not an http or https URL")


def exchange(method, endpoint: Endpoint, headers: dict, deadline: Deadline, tls):
    """Send one request, never through a proxy: (response, body). Raises as a probe does.

    The service sees no reset, because the body is read: up to LARGEST_BODY bytes, for at most half
    of the time left. Failures in it are ignored. The body that is returned is its first piece, or
    empty if the body is incomplete.
    """
    # Outside of the try: a failure here is not the service's.
    context = tls.prepare() if endpoint.scheme == "https" else None
    sock = connect(endpoint.host, endpoint.port, deadline)
    try:
        if context:
            sock.settimeout(deadline.left("in the TLS handshake"))
            # The name for the handshake and the certificate; neither has a final dot.
            name = urllib.parse.urlsplit("//" + headers.get("Host", "")).hostname or endpoint.host
            sock = context.wrap_socket(sock, server_hostname=name.rstrip(".").encode())
        sock.settimeout(deadline.left("sending the request"))
        with contextlib.suppress(OSError):  # an answer may have arrived nevertheless
            send_request(sock, method, endpoint, headers)
        reader = DeadlineReader(sock, deadline)
        response = read_head(sock, io.BufferedReader(reader), method)
        body = b""
        with contextlib.suppress(Exception):
            reader.deadline = Deadline(deadline.left("reading the body") / 2)
            body = read_body(response)
            if context:
                sock.settimeout(reader.deadline.left("closing"))
                sock.unwrap()  # or the service sees a connection that ends within TLS
        return response, b"" if response.length else body
    except socket.timeout:
        raise deadline.missed() from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if hasattr(error, "verify_code"):
            tls.context = None
        raise failure(error, reason_of(error)) from None
    finally:
        sock.close()


def send_request(sock, method, endpoint, headers):
    connection = http.client.HTTPConnection(endpoint.host, endpoint.port)
    connection.default_port = DEFAULT_PORTS[endpoint.scheme]  # the port that Host leaves out
    connection.sock = sock
    own = {"User-Agent": f"{PROGRAM}/{__version__}", "Accept": "*/*", "Connection": "close"}
    connection.request(method, endpoint.path, headers={**own, **headers})


# What OpenSSL calls a first answer that is not TLS, but plain HTTP for example.
NO_TLS = ("WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE")


def reason_of(error):
    if getattr(error, "reason", "") in NO_TLS:
        return "the answer is not TLS: write http:// or another port"
    text = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or error
    return f"{type(error).__name__}: {text}"


INTERIM = re.compile(rb"HTTP/\S+ +1(?!01)[0-9][0-9]\b")  # RFC 9110, 15.2
KEPT = (b"location:", b"content-length:", b"transfer-encoding:")


def read_head(sock, stream, method):
    """The final response that `stream` begins with, ready for its body to be read."""
    # http.client accepts a truncated head, and rejects more than 100 fields or a line over 64 KiB.
    # So the head is read here, and only the fields that matter are passed on.
    head, left = [], LARGEST_HEAD
    while True:
        line = stream.readline(left)
        left -= len(line)
        if not line.endswith(b"\n"):
            what = "the connection ended within" if left else "larger than 1 MiB:"
            raise http.client.HTTPException(f"{what} the head of the response")
        if not head or line.lower().startswith(KEPT):
            head.append(line)
        elif line in (b"\r\n", b"\n"):
            if not INTERIM.match(head[0]):
                break
            head = []
    response = http.client.HTTPResponse(sock, method=method)
    response.fp = io.BytesIO(b"".join([*head, b"\r\n"]))  # begin() reads the head from this
    response.begin()
    response.fp = stream  # and read() the body from this
    return response


def read_body(response):
    """Read up to LARGEST_BODY bytes in pieces, to hold little memory. Returns the first piece."""
    first = piece = response.read(2**16)
    left = LARGEST_BODY - len(piece)
    while piece and left > 0:
        piece = response.read(2**16)
        left -= len(piece)
    return first


class DeadlineReader(io.RawIOBase):
    """Reads from a socket until one deadline: a byte now and then does not buy more time."""

    def __init__(self, sock, deadline):
        self.sock, self.deadline = sock, deadline

    def readable(self):
        return True

    def readinto(self, buffer):
        self.sock.settimeout(self.deadline.left("waiting for the response"))
        return self.sock.recv_into(buffer)


# ---- Marking -------------------------------------------------------------------------------------
# Instance metadata, the Auto Scaling call, the rehearsal of one, and the thread that does all that.
# Whether a mark is wanted is main's to say; here is what it takes to bring it about.

METADATA_ATTEMPTS = 3  # of 1 s each
# The lifecycle state comes first: rule 1 hangs on it.
METADATA_ITEMS = {
    "lifecycle": "autoscaling/target-lifecycle-state",
    "said_id": "instance-id",
    "region": "placement/region",
}


class Instance(typing.NamedTuple):
    """What is known of this instance: what metadata said, each item when it could last be read."""

    lifecycle: str | None = None  # the target lifecycle state; None: there is none
    said_id: str | None = None
    id: str | None = None  # the one to mark
    region: str | None = None
    unread: str = ""  # why metadata could not be read this time

    def mistake(self) -> str:
        """Why no call can be made for this instance, and what to do; nothing if one can."""
        if self.said_id not in (None, self.id):  # an image was baked with a stranger's id
            return f"INSTANCE_ID is {self.id}, metadata says {self.said_id}: remove the variable"
        if self.id and self.region:
            return ""
        advice = "enable IMDSv2 for this instance, or set INSTANCE_ID and AWS_REGION"
        return f"instance metadata cannot be read: {self.unread} -- {advice}"


def read_metadata(before: Instance) -> Instance:
    """What instance metadata says now, by IMDSv2."""
    found = {**before._asdict(), "unread": ""}
    try:
        token = _metadata("PUT", "api/token", "X-aws-ec2-metadata-token-ttl-seconds", "60")
        for item, path in METADATA_ITEMS.items():
            found[item] = _metadata("GET", "meta-data/" + path, "X-aws-ec2-metadata-token", token)
    except ProbeFailure as failure:
        found["unread"] = str(failure)
    found["id"] = os.environ.get("INSTANCE_ID") or found["said_id"]
    found["region"] = os.environ.get("AWS_REGION") or found["region"]
    return Instance(**found)


def _metadata(method, path, header, value):
    """One item; None if there is no lifecycle state."""
    for attempts_left in reversed(range(METADATA_ATTEMPTS)):
        try:
            deadline = Deadline(1.0)
            endpoint = metadata_endpoint(path)
            response, body = exchange(method, endpoint, {header: value}, deadline, Tls())
            if response.status == 404 and "lifecycle" in path:
                return None
            if response.status == 200 and re.fullmatch(rb"[\w:=/+-]{1,200}\s*", body):
                return body.decode().strip()  # a web page in its place is not believed
            raise ProbeFailure(f"HTTP status {response.status} for {path}, {len(body)} bytes")
        except ProbeFailure:
            if not attempts_left:
                raise


def metadata_endpoint(path):
    """Where an item of metadata is; ConfigError if the variable names no URL."""
    base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254"
    return Endpoint.from_text(f"{base.rstrip('/')}/latest/{path}")


def prepare_botocore():
    """Have botocore, too, ask for metadata directly, and as often."""
    listed = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if listed != "*":
        host = metadata_endpoint("").host
        os.environ["no_proxy"] = f"{host},[{host}],{listed}"  # (an IPv6 address in brackets)
    os.environ.setdefault("AWS_METADATA_SERVICE_NUM_ATTEMPTS", str(METADATA_ATTEMPTS))


modules_before = None  # the names of those before boto3, while that is not imported well


def autoscaling(region, is_signed=True):
    """A new client of the Auto Scaling API, credentials in hand; ImportError if boto3 is broken.

    New each time: a session made while credentials were missing never finds any. What was imported
    in vain is forgotten before the next try: there may have been no memory for even that.
    """
    global modules_before
    modules_before = modules_before or set(sys.modules)
    for name in set(sys.modules) - modules_before:
        del sys.modules[name]
    try:
        import boto3.session
        import botocore.config

        session = boto3.session.Session(region_name=region)
        # Older boto3 does not read these variables.
        url = os.environ.get("AWS_ENDPOINT_URL_AUTO_SCALING") or os.environ.get("AWS_ENDPOINT_URL")
        options = {"connect_timeout": 3, "read_timeout": 10, "retries": {"total_max_attempts": 1}}
        if not is_signed:
            options["signature_version"] = botocore.UNSIGNED
        config = botocore.config.Config(**options)
        client = session.client("autoscaling", endpoint_url=url, config=config)
    except BaseException as error:
        raise ImportError(f"{type(error).__name__}: {error}") from error
    modules_before = None
    credentials = session.get_credentials()
    if not credentials:
        raise LookupError("unable to locate credentials")
    credentials.get_frozen_credentials()
    return client


INSTALL_BOTO3 = "install the package python3-boto3 (apt-get or dnf; on RHEL it is in EPEL)"
DENIED = "AccessDenied|Unauthorized"
PERMISSION = "autoscaling:SetInstanceHealth"
PROFILE = f"give the instance a profile whose role allows {PERMISSION}"
ADVICE = {  # the first pattern that "code: text" of an error begins with says what to do
    ".*grace period": "a group refuses marks within its health check grace period",
    ".*No managed instance": "attach the instance to a group, or stop this service",
    DENIED: f"allow {PERMISSION} in the policy of the instance's role",
    ".*locate credentials|Partial|Credential|Metadata": PROFILE,
    ".*[Ee]xpired|Signature|InvalidClient|AuthFail": "look at the clock, then at the credentials",
    "Throttl|RequestLimit|TooManyRequests": "AWS limits the calls of the account; it tries again",
    "ResourceContention|ScalingActivity": "the group is being changed; it tries again",
    "Internal|ServiceUnav|50.:": "AWS has a fault; it tries again",
    ".*no AWS request id|ResponseParser|KeyError": "something else answers there: see the proxy",
    ".*Proxy": "look at the proxy that HTTPS_PROXY names",
    ".*SSL": "trust the authority of the certificate by AWS_CA_BUNDLE, or look at the proxy",
    ".*(Connect|Timeout|HTTPClient)": "look at routes, security groups and the VPC endpoint",
    "ImportError: MemoryError": "the instance is out of memory",
    "ImportError: (Invalid|Profile|Config|ValueError)": "mend the variable or file that says so",
    "ImportError": f"boto3 is missing or broken: {INSTALL_BOTO3}",
}


def headers_of(answer, client):
    """The headers of an answer of AWS; LookupError if it is somebody else's, a proxy's page."""
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    if "x-amzn-requestid" not in headers:
        raise LookupError(f"no AWS request id in an answer of {client.meta.endpoint_url}")
    return headers


def answer_in(error):
    """What AWS answered, as far as an error has it."""
    return getattr(error, "response", None) or {}


def explain(error):
    """One line: what went wrong in an API call, in AWS's words, uncut, and what to do about it."""
    code = answer_in(error).get("Error", {}).get("Code") or type(error).__name__
    text = printable(str(error), 2000)
    advice = [ADVICE[pattern] for pattern in ADVICE if re.match(pattern, f"{code}: {text}")]
    return " -- ".join([text if code in text else f"{code}: {text}", *advice[:1]])


NOT_READY = "A mark would not succeed now: "


def rehearse() -> str:
    """Try all that a mark takes but the call: the line that says whether one would succeed."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # rather this process than any other
    try:
        instance = read_metadata(Instance())
        why_not = instance.mistake() or why_no_call(instance.region)
    except BaseException as error:
        why_not = explain(error)
    return NOT_READY + why_not if why_not else f"Ready to mark {instance.id} in {instance.region}"


def why_no_call(region):
    """Why a call would not succeed, as far as can be told by asking its very endpoint one unsigned
    question; nothing if it would. Raises what boto3 raises."""
    client = autoscaling(region, is_signed=False)
    try:
        answer = client.describe_account_limits()
    except Exception as error:
        answer = answer_in(error)
        if not answer:
            raise
    return why_wrong_clock(headers_of(answer, client).get("date", ""), time.time())


def why_wrong_clock(date: str, now: float) -> str:
    """What is wrong with a clock that says `now`, by the Date header of AWS (RFC 9110, 6.6.1)."""
    try:
        minutes = (now - email.utils.parsedate_to_datetime(date).timestamp()) / 60
    except (TypeError, ValueError):
        return ""
    if abs(minutes) < 5:  # which signatures bear (AWS Signature Version 4)
        return ""
    error = f"{minutes:.0f} minutes fast" if minutes > 0 else f"{-minutes:.0f} minutes slow"
    return f"the clock is {error} -- set it (chronyc makestep)"


class Rehearsal:
    """Runs -rehearse now and then in a child process, so that boto3's memory goes with it."""

    def __init__(self, command):
        self.command = command
        self.child = None  # the process under way
        self.limit = 0.0  # when it has taken too long; math.inf: it is killed, and not waited for
        self.due, self.pause = 0.0, 30.0  # when the next one starts; half the wait after it, if ill

    def step(self, now):
        """Start one that is due; the line of one that has ended, or taken too long."""
        if not self.child and now >= self.due:
            self.child = Popen(self.command, bufsize=0, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT)
            os.set_blocking(self.child.stdout.fileno(), False)
            self.limit = now + 30.0
        status = self.child.poll() if self.child else None
        if status is not None:
            output = (self.child.stdout.read() or b"").decode("utf-8", "replace")
            line = printable(output.strip().split("\n")[-1], 2000)
            self.child = None
            self.pause = min(2 * self.pause, 300.0) if status else 30.0
            self.due = now + (self.pause if status else 86400.0) * random.uniform(0.9, 1.1)
            return None if self.limit == math.inf else line or "a rehearsal gave no answer"
        if self.child and now >= self.limit:
            self.kill()
            return "a rehearsal did not end in 30s"
        return None

    def kill(self):
        """End the one under way; one that cannot be ended is not waited for."""
        if self.child:
            self.child.kill()
            self.limit = math.inf


class Stepper:
    """Does its step(now) again and again: a fault of this program ends nothing."""

    status = None  # the exit status, when it is time
    began = math.inf  # when the step under way did
    is_faulty = False  # whether the last step was
    wait = staticmethod(time.sleep)

    def run(self):
        """Step until it is time to end; returns the exit status."""
        pause = 0.0
        while self.status is None:
            self.wait(pause)
            self.began = time.monotonic()
            pause = self.try_step(self.began)
            self.began = math.inf
        return self.status

    def try_step(self, now):
        """Do what is due; the seconds to wait before the next step."""
        try:
            wake, self.is_faulty = self.step(now), False
            return max(0.0, min(wake - now, LOOK))
        except BaseException as fault:
            with contextlib.suppress(Exception):  # there may be no memory even for this
                if not self.is_faulty:
                    log.error(f"A fault of this program, trying again: {named(fault)}")
            self.is_faulty = True
            return 1.0


class Told(typing.NamedTuple):
    """What main tells the marker."""

    verdict: str = UNDECIDED  # the last one if the checks still agree with it, else undecided
    evidence: str = ""  # for it


class Report(typing.NamedTuple):
    """How the mark stands, for main to show."""

    instance: str | None = None  # its id
    wanted: str | None = None
    marked: str = ""  # the instance on which a mark of our own may stand
    why_not: str | None = None  # why a mark would not succeed; "": it would; None: not known yet
    hold: str = ""  # why no call is made although one is wanted
    calls: int = 0  # made since it is wanted
    last_call: dict | None = None


class Marker(Stepper, threading.Thread):
    """Brings about the mark that is wanted: looks what it is, looks at metadata, calls, waits."""

    def __init__(self, config, rehearsal, writer, marked):
        super().__init__(daemon=True)
        self.told, self.config = Told(), config  # main's to write
        self.report = Report(marked=marked)  # main's to read
        self.rehearsal = rehearsal  # None: this is a dry run
        self.writer = writer  # it remembers over a restart that a mark may stand
        self.instance = Instance()
        self.due = math.inf  # when the next look or call is, for what is wanted
        self.hold_end = 0.0  # math.inf while out of service; then the end of a new grace period
        self.denied = ""  # AWS's words when the permission was lacking: no rehearsal can try that

    def step(self, now):
        """Do what is due for what is wanted; if nothing is wanted, see to the rehearsals."""
        wanted = self.wanted()
        if wanted != self.report.wanted:
            self.due = now
            self.publish(wanted=wanted, hold="", calls=0)
        if self.told.verdict == HEALTHY:
            self.hold_end = 0.0
        if not wanted and self.rehearsal:
            self.rehearse(now)
        elif wanted and now >= self.due:
            if self.rehearsal:
                self.rehearsal.kill()
            self.look()
            self.due = now + self.work(wanted, now)
        return now + LOOK

    def wanted(self):
        return wanted_mark(self.told.verdict, bool(self.report.marked), self.config.recovery)

    def publish(self, **changes):
        self.report = self.report._replace(**changes)

    def look(self):
        self.instance = read_metadata(self.instance)
        self.publish(instance=self.instance.id)
        if self.instance.id and self.report.marked not in ("", self.instance.id):
            self.note_mark("")  # it stands on the instance that this image was made from

    def note_mark(self, instance):
        """Note that a mark of our own may stand on this instance, or ("") that there is none."""
        self.publish(marked=instance)
        self.writer.marks.append(instance)
        self.writer.has_news.set()

    def work(self, wanted, now):
        """Make the call if nothing holds it back; returns the seconds until the next look."""
        frequency, evidence = self.config.frequency, self.told.evidence
        who = self.instance.id or "this instance"
        hold = self.why_hold(wanted, now)
        if hold and hold != self.report.hold:
            level = logging.WARNING if now < self.hold_end else logging.ERROR
            log.log(level, f"Not marking {who} as {wanted}: {hold}")
        self.publish(hold=hold)
        if hold:
            return frequency
        result, calls = "", self.report.calls + 1
        try:
            if not self.call(wanted):
                return 0.0
        except BaseException as error:  # whatever it is, the next call is another try
            result = explain(error)
        if not result or ADVICE[DENIED] in result:
            self.denied = result
        gc.collect()  # what was imported in vain lies there in cycles, and memory may be short
        delay = call_backoff(calls, frequency, bool(result), random.random())
        if result:
            log.error(f"Could not mark {who} as {wanted}, again in {delay:.0f}s: {result}")
            self.rehearsal.due = now  # once nothing is wanted
        else:
            level = logging.WARNING if wanted == MARK_UNHEALTHY else logging.INFO
            done = "Marked Instance" if self.rehearsal else "Dry run: would have marked"
            log.log(level, f"{done} as {wanted}: {who}: {evidence}")
        last_call = {"status": wanted, "error": result, "time": time.time()}
        self.publish(calls=calls, last_call=last_call, why_not=result if self.rehearsal else None)
        return delay

    def why_hold(self, wanted, now):
        """Why no call may be made now; nothing if one may."""
        mistake = self.instance.mistake() if self.rehearsal else ""
        if mistake or wanted == MARK_HEALTHY:
            return mistake
        if not lifecycle_permits(self.instance.lifecycle):
            self.hold_end = math.inf
            return f"its target lifecycle state is {self.instance.lifecycle}"
        if self.hold_end == math.inf:
            self.hold_end = now + self.config.graceperiod
        return "in service again, in a new grace period" if now < self.hold_end else ""

    def call(self, wanted):
        """Ask the group for a HealthStatus, if it is still wanted; raises what boto3 raises."""
        client = autoscaling(self.instance.region) if self.rehearsal else None
        if self.wanted() != wanted:
            return False
        before, instance = self.report.marked, self.instance.id
        if wanted == MARK_UNHEALTHY:
            self.note_mark(instance or "this instance")
        try:
            if client:
                answer = client.set_instance_health(InstanceId=instance, HealthStatus=wanted)
                headers_of(answer, client)
        except Exception as error:
            if 400 <= answer_in(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0) < 500:
                self.note_mark(before)  # AWS has refused this call
            raise
        if wanted == MARK_HEALTHY:
            self.note_mark("")
        return True

    def rehearse(self, now):
        if not self.rehearsal.child and now >= self.rehearsal.due:
            self.look()
        line = self.rehearsal.step(now)
        if line:
            is_well = line.startswith("Ready")
            why_not = self.denied if is_well else line.replace(NOT_READY, "", 1)
            if why_not and why_not != self.report.why_not:
                log.warning(NOT_READY + why_not)
            elif why_not != self.report.why_not:
                log.info(line)
            self.publish(why_not=why_not)


# ---- Telling -------------------------------------------------------------------------------------
# The log, the journal, systemd, status.json and the terminal: how the program speaks. Nothing here
# decides, and nobody waits for it: what nobody takes is lost.


class Systemd:
    """The service manager and its journal; where there is none, nothing is said."""

    def __init__(self):
        self.address = os.environ.pop("NOTIFY_SOCKET", "")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)

    def notify(self, *lines):
        """Send one message (sd_notify(3)); it is cut, for one of over 4096 bytes is ignored."""
        self._send("\n".join(lines)[:1000], self.address)

    def journal(self, level, text):
        """Write one line to the journal (syslog(3)); logging's SysLogHandler would block."""
        priority = 3 if level >= logging.ERROR else 4
        self._send(f"<{priority}>healthchecker: {text}", "/dev/log")

    def _send(self, text, address):
        if self.address:
            with contextlib.suppress(OSError):
                self.socket.sendto(text.encode("utf-8", "backslashreplace"), address)


class Writer(logging.Handler):
    """Has a thread write the log, and the file that remembers a mark: a disk may hang."""

    def __init__(self, systemd, mark_file):
        super().__init__()
        self.systemd = systemd
        self.mark_file = mark_file  # "": there is none
        self.marks = collections.deque()  # what it is to say
        self.lines = collections.deque(maxlen=1000)  # (descriptor, bytes): the oldest are lost
        self.has_news = threading.Event()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()
        line = "%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s"
        self.setFormatter(logging.Formatter(line, "%Y-%m-%dT%H:%M:%S"))
        self.formatter.converter = time.gmtime
        log.addHandler(self)
        log.propagate = False
        logging.getLogger().addHandler(logging.NullHandler())  # for what libraries log

    def emit(self, record):
        with contextlib.suppress(Exception):  # there may be no memory
            text, warns = record.getMessage(), record.levelno >= logging.WARNING
            if warns:  # now, before it may wait for a disk
                self.systemd.journal(record.levelno, text)
            line = self.format(record) + "\n"
            self.lines.append((2 if warns else 1, line.encode("utf-8", "backslashreplace")))
            self.has_news.set()

    def work(self):
        while True:
            if self.marks:  # before any line that waits
                self.write_mark(self.marks[0])
                self.marks.popleft()
            elif self.lines:
                with contextlib.suppress(OSError):
                    os.write(*self.lines[0])
                self.lines.popleft()
            else:
                self.has_news.wait()
                self.has_news.clear()

    def write_mark(self, mark):
        try:
            if self.mark_file:
                replace_file(self.mark_file, mark, 0o644)
        except Exception as error:
            log.warning(f"A mark is not remembered over a restart: {named(error)}")

    def finish(self):
        """Give it a moment for the last mark and the last lines."""
        end = time.monotonic() + 0.5
        while (self.marks or self.lines) and time.monotonic() < end:
            time.sleep(0.005)


def replace_file(path, content, mode):
    """Replace a file in one step (rename(2)), with this mode whatever the umask; or OSError."""
    with open(path + ".new", "wb") as file:
        file.write(content.encode())
        os.fchmod(file.fileno(), mode)
    os.replace(path + ".new", path)


def read_file(path):
    """What a file of ours says; nothing if it cannot be read."""
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
    return ""


HOW_TO_TAKE_BACK = (
    "A mark of this program may stand on {0}, and nobody takes it back now; if it is not to act: "
    "aws autoscaling set-instance-health --instance-id {0} --health-status Healthy"
)


# ---- Check loops ---------------------------------------------------------------------------------
# One thread per check: wait, probe, hand over the result. Nothing is counted or decided here, but
# whose fault a failure was.


class CheckLoop(threading.Timer):
    """A Timer that goes off again and again: probes one check at a fixed rate, first when `due`.

    It puts (loop, number of the probe, passed, text) into the inbox. `passed` is None if a fault
    of this program spoiled the probe; `text` is the reason of a failure, or a remark, or empty.
    """

    def __init__(self, check, inbox, due):
        super().__init__(check.frequency, probe_tcp if check.type == "tcp" else probe_http)
        self.daemon = True
        self.check, self.inbox, self.due = check, inbox, due
        self.tls = Tls(check.tls_verify)
        self.probing = None  # (number, start) of the probe under way; main's to read

    def run(self):
        number = 0
        while not self.finished.is_set():
            begin = time.monotonic()
            if begin < self.due:
                # Not finished.wait(): before Python 3.11, that follows the wall clock.
                time.sleep(min(self.due - begin, 10.0))
                continue
            number += 1
            passed, text = self.attempt(number)
            end = time.monotonic()
            self.due, self.probing = next_due(self.due, self.interval, end), None
            self.inbox.append((self, number, passed, text))
            result = "passed" if passed else text
            log.debug(f"Probe of {self.check.name} {result} in {(end - begin) * 1000:.0f} ms")

    def attempt(self, number):
        """Probe once; returns (passed, text) as they go into the inbox."""
        try:
            if self.check.endpoint.scheme == "https":
                self.tls.prepare()  # before its time begins: that is the service's
            self.probing = (number, time.monotonic())
            return True, self.function(self.check, self.tls) or ""
        except ProbeFailure as failure:
            return (False if can_open_descriptors() else None), str(failure)
        except BaseException as fault:  # whatever it is, the loop goes on
            return None, named(fault)


def can_open_descriptors():
    """Whether four can be opened: the resolver and TLS need some, and do not say if they lack."""
    opened = []
    with contextlib.suppress(OSError):
        opened += os.pipe()
        opened += os.pipe()
    for descriptor in opened:
        os.close(descriptor)
    return len(opened) == 4


# ---- Daemon and gate -----------------------------------------------------------------------------
# The main thread: it owns the checks and takes the verdict, in step(now), where nothing sleeps and
# nothing blocks. The gate (-foreground) is the same loop with another ending.

SPREAD = 0.001  # seconds between the starts of two loops: together they would cost more CPU
HANG_SLACK = 0.25  # seconds past its deadline that a probe has to report its own failure
LONGEST_STEP = 60.0  # seconds of one step of the marker, after which it is thought to hang
LONGEST_SILENCE = 300.0  # seconds that a check may go without evidence, beside those it waits


class Watch:
    """One check, and what is known of it."""

    def __init__(self, check, inbox, due):
        self.check = check
        self.loop = CheckLoop(check, inbox, due)
        self.period = max(check.frequency, check.timeout)
        self.health = Health()
        self.reason, self.failed_at = "", None  # of its last failure, and when that was counted
        self.has_remark = False  # whether a remark of its probes was logged
        self.heard_at = due  # when there was evidence last
        self.is_faulty = False  # whether the last probe was spoiled by a fault of this program
        self.hung = None  # the number of the last probe that was counted as failed because it hung
        self.hung_again = 0.0  # when it counts as failed once more
        self.loop.start()

    def __str__(self):
        check, (state, passed, streak) = self.check, self.health
        if not streak:
            return f"{check.name} not probed yet"
        result = "passed" if passed else "failed"
        text = f"{check.name} {state} ({result} {streak} in a row, threshold {check.threshold})"
        if passed and state != FAILING:
            return text
        return f"{text} at {check.endpoint}: {'last failure: ' if passed else ''}{self.reason}"


class Watcher(Stepper):
    """What daemon and gate share: the checks, how they stand, the verdict at each `frequency`."""

    signals = None  # a socket: the number of each signal comes out of it

    def __init__(self, config, now, grace_end, due):
        self.inbox, self.grace_end = collections.deque(), grace_end
        self.next_verdict = now + config.frequency
        self.verdict = UNDECIDED
        self.is_news = True  # whether something changed that is worth telling
        self.watches = {}
        self.watch(config, due)

    def watch(self, config, due):
        """Watch these checks: one that was watched before, and is equal, keeps its state."""
        before, self.watches, self.config = self.watches, {}, config
        for number, check in enumerate(config.checks):
            watch = before.get(check.name)
            if not watch or watch.check != check:
                watch = Watch(check, self.inbox, due + number * SPREAD)
            self.watches[check.name] = watch
        for watch in before.values():
            if watch not in self.watches.values():
                watch.loop.cancel()
        for warning in config.warnings:
            log.warning(warning)
        checks = ", ".join(f"{check.name} ({check.endpoint})" for check in config.checks)
        log.info(f"Watching {checks}")

    def step(self, now):
        """Take in what was handed over, decide what is due by `now`; returns when to come again."""
        while self.inbox:
            item = self.inbox.popleft()
            if isinstance(item, signal.Signals):
                self.take_signal(item, now)
            else:
                self.receive(item, now)
        look = self.count_hung(now)
        if now >= self.next_verdict and self.status is None:
            self.take_verdict(now)
            self.next_verdict = next_due(self.next_verdict, self.config.frequency, now)
        return min(look, self.next_verdict)

    def wait(self, seconds):
        with contextlib.suppress(OSError):  # none came in this time
            self.signals.settimeout(seconds)
            self.inbox.extend(map(signal.Signals, set(self.signals.recv(4096))))

    def receive(self, result, now):
        loop, number, passed, text = result
        name, watch = loop.check.name, self.watches.get(loop.check.name)
        if not watch or watch.loop is not loop or watch.hung == number:
            return  # of a check that a reload replaced, or late: it has been counted as failed
        if passed is not None:
            self.count(watch, now, passed, text)
        elif not watch.is_faulty:
            log.error(f"Not counted, for it is this program's fault: probe of {name}: {text}")
        if passed and text and not watch.has_remark:
            watch.has_remark = True
            log.warning(f"Check {name}: {text}")
        watch.is_faulty = passed is None

    def count(self, watch, now, passed, reason):
        """Count one result; log a change of state, and the first failure after a success."""
        check, before = watch.check, watch.health
        watch.health = before.after(passed, check.threshold)
        watch.heard_at = now
        if not passed:
            watch.reason, watch.failed_at = reason, now
        if watch.health.state != before.state:
            self.is_news = True
            log.log(logging.INFO if passed else logging.WARNING, f"Check {watch}")
        elif not passed and watch.health.streak == 1:
            log.warning(f"Check {check.name} failed (1 of {check.threshold}): {reason}")

    def count_hung(self, now):
        """Count probes that outlive their deadline: name resolution cannot be interrupted."""
        look = math.inf
        # Once a step: after a pause of the process, periods that nobody watched are no evidence.
        for watch in self.watches.values():
            timeout, (number, start) = watch.check.timeout, watch.loop.probing or (None, now)
            overdue = watch.hung_again if number == watch.hung else start + timeout + HANG_SLACK
            if number and now >= overdue:
                watch.hung, watch.hung_again = number, now + watch.period
                reason = f"no end after {timeout:g}s: it hangs, in name resolution most likely"
                self.count(watch, now, False, reason)
            elif number:
                look = min(look, overdue)
        return look

    def current_verdict(self):
        return verdict_of(watch.health.state for watch in self.watches.values())

    def take_verdict(self, now):
        before, self.verdict = self.verdict, self.current_verdict()
        self.is_news = True
        if self.verdict != before:
            level = logging.WARNING if self.verdict == UNHEALTHY else logging.INFO
            log.log(level, f"Verdict {self.verdict} (was {before}): {self.evidence()}")

    def evidence(self):
        """How the failing checks stand; when none fails, how all do."""
        watches = self.watches.values()
        failing = [watch for watch in watches if watch.health.state == FAILING]
        return "; ".join(str(watch) for watch in failing or watches)


class Daemon(Watcher):
    """Watches, tells the marker the verdict, and tells systemd and status.json how all stands."""

    path = "-"  # of the configuration; this one: it came from standard input
    directory = ""  # where status.json goes; this one: nowhere

    def __init__(self, config, now, grace_end, marker, writer, systemd):
        super().__init__(config, now, grace_end, grace_end)
        self.marker, self.writer, self.systemd = marker, writer, systemd
        self.feed_at = now  # when systemd's watchdog is fed next
        self.shown = None  # the marker's report that was told last

    def step(self, now):
        wake = super().step(now)
        self.tell_marker()
        if self.is_news or self.marker.report is not self.shown:
            self.tell(now)
        if now >= self.feed_at and self.is_well(now):
            self.systemd.notify("WATCHDOG=1")
            self.feed_at = now + 2.0
        return wake

    def tell_marker(self):
        """Tell it the verdict, if the checks still agree with it, between verdicts too."""
        # (Nothing is marked on the way out.)
        is_agreed = self.status is None and self.verdict == self.current_verdict()
        self.marker.told = Told(self.verdict if is_agreed else UNDECIDED, self.evidence())
        self.marker.config = self.config

    def take_signal(self, number, now):
        if number == signal.SIGHUP:
            self.reload(now)
            return
        self.status, marked = 0, self.marker.report.marked
        log.info(f"Stopped by {number.name}")
        if marked and self.marker.rehearsal:
            log.warning(HOW_TO_TAKE_BACK.format(marked))
        self.systemd.notify("STOPPING=1", f"STATUS=stopped by {number.name}")

    def reload(self, now):
        """Read the configuration again; a check that is equal after defaults keeps its state."""
        if not os.path.isfile(self.path):  # standard input, or a pipe: it can be read once
            log.warning(f"SIGHUP ignored: the configuration, {self.path}, is no file")
            return
        try:
            config = load_config(self.path)
        except Exception as error:
            reason = str(error) or named(error)
            log.error(f"Configuration not reloaded, the old one stays: {reason}")
            return
        self.status = 1  # if a thread cannot be made: systemd starts this daemon anew
        self.watch(config, max(now, self.grace_end))
        self.status, self.next_verdict = None, now

    def is_well(self, now):
        """Whether systemd's watchdog is to be fed: if not, it starts this daemon anew."""
        for watch in self.watches.values():
            if not watch.loop.is_alive() or now > watch.heard_at + watch.period + LONGEST_SILENCE:
                return False
        return self.marker.is_alive() and self.writer.thread.is_alive()

    def why_not(self, now):
        """Why a mark would not succeed; "": it would; None: not known yet."""
        if now > self.marker.began + LONGEST_STEP:
            return "the thread that marks hangs, on a disk or in name resolution most likely"
        if self.marker.is_faulty:
            return "a fault of this program: see the log"
        return self.marker.report.why_not

    def tell(self, now):
        """Say how things stand: to systemd in one line, and in status.json."""
        self.is_news, self.shown = False, self.marker.report
        status = self.as_dict(now)
        # READY more than once does no harm, and one may be lost.
        self.systemd.notify("READY=1", f"STATUS={status['summary']}")
        if self.directory:
            with contextlib.suppress(OSError):
                replace_file(f"{self.directory}/status.json", json.dumps(status), 0o644)

    def as_dict(self, now):
        """What status.json says; `failed_at` is of the monotonic clock."""
        report, why_not, checks = self.marker.report, self.why_not(now), {}
        for name, watch in self.watches.items():
            checks[name] = {**watch.health._asdict(), "threshold": watch.check.threshold}
            checks[name].update(reason=watch.reason, failed_at=watch.failed_at)
            checks[name]["endpoint"] = str(watch.check.endpoint)
        return {
            "version": __version__,
            "phase": "grace" if now < self.grace_end else "watching",
            "verdict": self.verdict,
            "summary": self.summary(now, report, why_not),
            **report._asdict(),
            "marked": bool(report.marked and self.marker.rehearsal),
            "could_mark": None if why_not is None else not why_not,
            "why_not": why_not or "",
            "checks": checks,
        }

    def summary(self, now, report, why_not):
        """One line for an operator, the cause first."""
        parts = [NOT_READY + why_not] if why_not else []
        if now < self.grace_end:
            parts.append(f"grace period, probing starts in {self.grace_end - now:.0f}s")
        else:
            parts.append(f"{self.verdict}: {self.evidence()}")
        if report.hold:
            parts.append(f"not marking: {report.hold}")
        elif report.wanted:
            parts.append(f"marking as {report.wanted}, calls so far: {report.calls}")
        return "; ".join(parts)


class Gate(Watcher):
    """-foreground: ends with 0 if the instance is healthy and with 1 if not; never calls AWS."""

    def __init__(self, config, now, grace_end, exit_early):
        super().__init__(config, now, grace_end, now)
        self.exit_early = exit_early  # with 0, as soon as every check is healthy
        self.end = grace_end
        for watch in self.watches.values():  # (heard_at: when its loop starts)
            length = watch.check.threshold * watch.period + watch.check.timeout
            self.end = max(self.end, watch.heard_at + length)  # it can have its results by then

    def step(self, now):
        wake = super().step(now)
        verdict = self.current_verdict()
        if self.status is None and (now >= self.end or (self.exit_early and verdict == HEALTHY)):
            self.status, level = (0, logging.INFO) if verdict == HEALTHY else (1, logging.ERROR)
            log.log(level, f"Gate: {verdict}: {self.evidence()}")
        return min(wake, self.end)

    def take_signal(self, number, now):
        self.status = 1
        log.error(f"Gate: stopped by {number.name} before the instance was found healthy")

    def take_verdict(self, now):
        stands = "; ".join(str(watch) for watch in self.watches.values())
        log.info(f"{max(0.0, self.end - now):.0f}s left: {stands}")


# ---- Service commands ----------------------------------------------------------------------------
# install, remove, start, stop, status: what an operator does with the systemd service. They are
# processes of their own: of the daemon they know what systemd and its files say.

SERVICE = "healthchecker"
ORIGINAL = "ec2-local-healthchecker.service"  # the Go daemon's unit, and an alias of ours
INSTALLED = "/usr/local/bin/ec2_local_healthchecker.py"
UNIT_FILE = "/etc/systemd/system/healthchecker.service"
ENVIRONMENT_FILE = "/etc/sysconfig/healthchecker"
ERROR_LOG = "/var/log/ec2-local-healthchecker.err"
STATUS_FILE = "/run/healthchecker/status.json"
STATE_DIRECTORY = "/var/lib/healthchecker"
MARK_FILE = f"{STATE_DIRECTORY}/marked"
STATE = (
    "MainPID,ActiveState,SubState,UnitFileState,NRestarts,"
    "ActiveEnterTimestamp,InactiveEnterTimestamp"
)
UNIT = """\
[Unit]
Description=EC2 local health checker
# Not after cloud-init: started from user data, it would wait for itself.
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
Type=notify
# Options and variables of your own: OPTIONS=-verbose, INSTANCE_ID=i-...
Environment=OPTIONS= MALLOC_ARENA_MAX=1
EnvironmentFile=-/etc/sysconfig/healthchecker
# Compiled beforehand: Python keeps the 5 MB that compiling takes.
ExecStartPre=/usr/bin/python3 -I -c "import py_compile, sys; sys.exit(not py_compile.compile( \\
  '/usr/local/bin/ec2_local_healthchecker.py', '/run/healthchecker/ec2_local_healthchecker.pyc'))"
ExecStart=/usr/bin/python3 -I /run/healthchecker/ec2_local_healthchecker.pyc $OPTIONS
# A bad configuration fails the reload.
ExecReload=/bin/sh -c 'exec /usr/bin/python3 -I /usr/local/bin/ec2_local_healthchecker.py \\
  -testconfig "$$@" >/dev/null' sh $OPTIONS
ExecReload=/bin/kill -HUP $MAINPID
Restart=always
RestartSec=5
WatchdogSec=60
TimeoutStopSec=5
StandardOutput=append:/var/log/ec2-local-healthchecker.log
StandardError=append:/var/log/ec2-local-healthchecker.err
RuntimeDirectory=healthchecker
# Here it remembers, over a restart, that a mark of its own may stand.
StateDirectory=healthchecker
# The last process to die when memory runs out, for then it is needed; only its rehearsals may.
OOMScoreAdjust=-1000
OOMPolicy=continue
# A core dump would hold credentials.
LimitCORE=0

# It needs the network and its configuration, and nothing else of the machine.
DynamicUser=yes
CapabilityBoundingSet=
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
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
Alias=ec2-local-healthchecker.service
"""


class Refusal(Exception):
    """Why a command is refused, or failed, and what to do: one line."""

    status = 1  # the exit status


class UsageError(Refusal):
    status = 2  # for a mistake on the command line


def service_command(command):
    """Carry out one -command; returns the exit status, or None for 0."""
    if command != "status" and os.geteuid() != 0:
        raise Refusal(f"-command {command} needs root: run it with sudo")
    if not os.path.isdir("/run/systemd/system"):  # sd_booted(3)
        raise Refusal("systemd does not run here: run this where it has booted the machine")
    return COMMANDS[command]()


def output_of(*command):
    """What a command prints; Refusal with the last line of it if it fails."""
    done = run(command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT)
    text = done.stdout.decode("utf-8", "replace")
    if done.returncode:
        raise Refusal(f"{' '.join(command[:2])}: {text.strip().split(chr(10))[-1]}")
    return text


def install():
    """Copy this file and its unit to where systemd finds them, and enable the service."""
    if not os.path.isfile(sys.argv[0]):
        raise Refusal("it was run from standard input: fetch it into a file first, and run that")
    version = re.match("systemd ([0-9]+)", output_of("systemctl", "--version"))
    if not version or int(version[1]) < 240:
        raise Refusal("the service needs systemd 240 or newer")
    require_own_unit()
    test = "import boto3, sys; assert sys.version_info >= (3, 8), 'Python is older than 3.8'"
    try:
        output_of("/usr/bin/python3", "-I", "-c", test)
    except Refusal as error:
        raise Refusal(f"the service cannot run: {error} -- {INSTALL_BOTO3}") from None
    replace_file(INSTALLED, read_file(sys.argv[0]), 0o755)
    replace_file(UNIT_FILE, UNIT, 0o644)
    output_of("systemctl", "daemon-reload")
    output_of("systemctl", "enable", SERVICE)
    say(f"{SERVICE} {__version__} is installed, and starts at every boot")
    state = properties_of(SERVICE, "ActiveState")["ActiveState"]
    next_step = f"systemctl {'start' if state == 'inactive' else 'restart'} {SERVICE}"
    try:
        load_config(DEFAULT_FILE)
    except ConfigError as error:
        next_step = f"mend {error}; then: {next_step}"
    say(f"Next: {next_step}")


def require_own_unit():
    """Refusal with the cure if a unit of another program is in the way."""
    for unit in (ORIGINAL, f"{SERVICE}.service"):
        path = properties_of(unit, "FragmentPath")["FragmentPath"]
        cure = f"systemctl disable --now {unit}; rm {path}; systemctl daemon-reload"
        if os.path.realpath(path) == os.devnull:
            cure = f"systemctl unmask {unit}"
        if path and INSTALLED not in read_file(path):
            raise Refusal(f"{path} is masked, or another program's: run '{cure}', then try again")


def remove():
    """Stop and disable the service, and delete what install wrote, and its state."""
    import shutil

    require_own_unit()
    tell_mark()
    if os.path.lexists(UNIT_FILE):
        output_of("systemctl", "disable", "--now", SERVICE)
    shutil.rmtree(os.path.realpath(STATE_DIRECTORY), ignore_errors=True)
    for path in (UNIT_FILE, INSTALLED, STATE_DIRECTORY):  # the last is a link of a DynamicUser's
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    output_of("systemctl", "daemon-reload")
    say(f"{SERVICE} is removed; the configuration and the logs are still there")


def tell_mark():
    """Say so if a mark of this program may stand, where nobody is left to take it back."""
    marked = read_file(MARK_FILE)
    if marked:
        say(HOW_TO_TAKE_BACK.format(printable(marked)))


def start_service():
    try:
        output_of("systemctl", "start", SERVICE)
    except Refusal as error:
        raise Refusal(f"{error} -- {last_words()}") from None


def stop_service():
    output_of("systemctl", "stop", SERVICE)
    tell_mark()


def last_words():
    return f"the end of {ERROR_LOG}: " + output_of("tail", "-n", "1", ERROR_LOG).strip()


def properties_of(unit, names):
    """Some properties of a unit, as systemctl shows them."""
    lines = output_of("systemctl", "show", unit, "--property=" + names).splitlines()
    return dict(line.partition("=")[::2] for line in lines)


def print_status():
    """Print how the service and each check stand: 0 well, 3 not running, 4 could not mark."""
    state = properties_of(SERVICE, STATE)
    is_running, could_mark = state["MainPID"] not in ("", "0"), None
    since = state["ActiveEnterTimestamp" if is_running else "InactiveEnterTimestamp"]
    lines = [
        f"{SERVICE}: {state['ActiveState']} ({state['SubState']}), since {since or 'ever'}, "
        f"{state['UnitFileState'] or 'not installed'}, restarts: {state['NRestarts']}"
    ]
    if is_running:
        try:
            status = json.loads(read_file(STATUS_FILE))
            could_mark = status["could_mark"]
            lines = [status["summary"], *lines, *status_lines(status, time.monotonic())]
        except Exception:
            lines.append(f"{STATUS_FILE} is not there (yet), or not of this version")
    elif state["ActiveState"] != "inactive":  # as it is once it was stopped on purpose
        lines.append(last_words())
    say("\n".join(lines))
    if is_running:
        return 4 if could_mark is False else 0
    tell_mark()
    return 3


def status_lines(status, now):
    """Yields the lines for what status.json says; `now` is of the monotonic clock."""
    checks, call = status["checks"], status["last_call"]
    width = max(map(len, ["CHECK", *checks]))
    yield f"{'CHECK':{width}}  STATE    IN A ROW          ENDPOINT"
    for name, check in checks.items():
        result = "passed" if check["passed"] else "failed"
        streak = f"{check['streak']} {result} of {check['threshold']}"
        yield f"{name:{width}}  {check['state']:7}  {streak:16}  {check['endpoint']}"
        if check["reason"]:
            yield f"  last failure {now - check['failed_at']:.0f}s ago: {check['reason']}"
    if status["marked"]:
        yield "a mark of its own may stand"
    if call:
        result = call["error"] or "it succeeded"
        yield f"last call: {call['status']}, {time.time() - call['time']:.0f}s ago: {result}"


COMMANDS = dict(
    install=install, remove=remove, start=start_service, stop=stop_service, status=print_status
)


# ---- Command line --------------------------------------------------------------------------------
# Options in, exit status out. Go's flag rules, because these flags are in units and user data.

SYNOPSIS = """\
usage: ec2_local_healthchecker.py [OPTION]...

Probe the services on this EC2 instance; when one keeps failing, mark the
instance unhealthy in its Auto Scaling group, so that the group replaces it.

  -healthcheckfile FILE      the configuration; - is standard input; without it,
                             /etc/sysconfig/ec2-local-healthchecker.yml
  -testconfig                print the effective configuration as JSON
  -rehearse                  try everything that a mark takes, but the call
  -foreground                a gate: probe, then exit 0 healthy or 1 not; no AWS
  -fg-exit-early-if-healthy  of the gate: 0 as soon as every check is healthy
  -launchtime EPOCH          when the server was launched, seconds since 1970:
                             the grace period counts from then
  -dry-run                   log what would have been marked; no AWS, no boto3
  -verbose                   also log every probe
  -command ACTION            install, remove, start or stop the systemd service,
                             or print its status and that of every check
  -version, -h, -help        print the version, or this

Exit status: 0 done, or a daemon stopped by a signal; 1 not healthy, or stopped
before it was (-foreground), a command or a rehearsal failed, or no boto3;
2 a mistake on the command line or in the configuration; -command status:
3 not running, 4 running, but a mark would not succeed."""
OPTIONS = {"healthcheckfile": DEFAULT_FILE, "launchtime": "-1", "command": ""}  # and their defaults
SWITCHES = "testconfig rehearse foreground fg-exit-early-if-healthy dry-run verbose version h help"
OPTIONS.update(dict.fromkeys(SWITCHES.split(), False))


def parse_command_line(arguments) -> dict:
    """The value of every option; UsageError for the first mistake."""
    options, rest = dict(OPTIONS), list(arguments)
    while rest and rest != ["--"]:
        argument = rest.pop(0)
        match = re.fullmatch("--?([^-=][^=]*)(?:=(.*))?", argument, re.DOTALL)
        name, value = match.groups() if match else ("", None)
        if argument in COMMANDS:
            raise UsageError(f"{argument} is no option: write -command {argument}")
        if name not in OPTIONS:
            advice = nearest(argument, [f"-{option}" for option in OPTIONS])
            raise UsageError(f"{quoted(argument)} is no option (-h lists them): {advice}")
        if OPTIONS[name] is False:
            value = True if value is None else BOOLEANS.get(value.lower())
        elif value is None and rest:
            value = rest.pop(0)
        if value in (None, ""):
            raise UsageError(f"the value of -{name} is missing or wrong: -h shows what it takes")
        options[name] = value
    return options


def check_options(options):
    """UsageError if these do not go together."""
    command = options["command"]
    if command and (command not in COMMANDS or options != {**OPTIONS, "command": command}):
        advice = f"and goes alone: the options of the service are in {ENVIRONMENT_FILE}"
        raise UsageError(f"-command takes one of {', '.join(COMMANDS)}, {advice}")
    if options["fg-exit-early-if-healthy"] and not options["foreground"]:
        raise UsageError("-fg-exit-early-if-healthy goes with -foreground: it is for a gate")
    if not re.fullmatch("-1|[0-9]{1,15}", options["launchtime"]):
        raise UsageError("-launchtime takes seconds since 1970, like $(date +%s)")


def main(argv=None) -> int:
    """Run the program with these arguments, or the process's own; returns the exit status."""
    systemd = Systemd()
    try:
        return dispatch(parse_command_line(sys.argv[1:] if argv is None else argv), systemd) or 0
    except Exception as error:
        is_mistake = hasattr(error, "status")  # or a fault of this program
        line = str(error) if is_mistake else named(error)
        systemd.journal(logging.ERROR, line)
        systemd.notify(f"STATUS={line}")
        say(line if isinstance(error, ConfigError) else f"{PROGRAM}: {line}", file=sys.stderr)
        return error.status if is_mistake else 1


def dispatch(options, systemd):
    """Do what the options ask for; returns the exit status, or None for 0."""
    if options["h"] or options["help"] or options["version"]:
        return say(f"{PROGRAM} {__version__}" if options["version"] else SYNOPSIS)
    check_options(options)
    if options["command"]:
        return service_command(options["command"])
    warnings.simplefilter("ignore")  # boto3's remarks on old Pythons are not for the log
    if options["rehearse"]:
        prepare_botocore()
        line = rehearse()
        say(line)
        return int(line.startswith(NOT_READY))
    config = load_config(options["healthcheckfile"])
    if options["testconfig"]:
        for warning in config.warnings:
            say(warning, file=sys.stderr)
        return say(json.dumps(config.as_dict(), indent=2))
    return run_service(options, config, systemd)


def run_service(options, config, systemd):
    """Be the daemon, or the gate, until it is time to end; returns the exit status."""
    is_gate, is_dry_run = options["foreground"], options["dry-run"]
    if not is_gate and not is_dry_run and not importlib.util.find_spec("boto3"):
        raise Refusal(f"boto3 is not installed: {INSTALL_BOTO3}")
    prepare_botocore()
    signals, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP:
        signal.signal(number, lambda *_: None)
    state = "" if is_gate or is_dry_run else os.environ.get("STATE_DIRECTORY")
    writer = Writer(systemd, f"{state}/marked" if state else "")
    log.setLevel(logging.DEBUG if options["verbose"] else logging.INFO)
    threading.excepthook = lambda args: log.error(f"A thread ended: {named(args.exc_value)}")
    now, age = time.monotonic(), time.time() - int(options["launchtime"])
    grace = grace_left(config.graceperiod, age if options["launchtime"] != "-1" else 0.0)
    log.info(f"{PROGRAM} {__version__}, grace period: {grace:g}s")
    if is_gate:
        watcher = Gate(config, now, now + grace, options["fg-exit-early-if-healthy"])
    else:
        marked = read_file(writer.mark_file)
        isolation = ["-I"] if sys.flags.isolated else []
        # Not what was compiled, which an upgrade of Python can make unreadable.
        command = [sys.executable, *isolation, main.__code__.co_filename, "-rehearse"]
        rehearsal = None if is_dry_run else Rehearsal(command)
        marker = Marker(config, rehearsal, writer, marked)
        marker.start()
        watcher = Daemon(config, now, now + grace, marker, writer, systemd)
        watcher.path = options["healthcheckfile"]
        watcher.directory = os.environ.get("RUNTIME_DIRECTORY", "")
    watcher.signals = signals
    status = watcher.run()
    writer.finish()
    return status


if __name__ == "__main__":
    os._exit(main())  # not sys.exit(): a thread that hangs is not waited for
