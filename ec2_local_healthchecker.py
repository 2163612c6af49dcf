#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = ["boto3"]
# ///
"""Probe the services on this EC2 instance; when one keeps failing, mark the instance unhealthy in
its Auto Scaling group, so that the group replaces it.

This program can end the machine that it runs on. It follows three rules, the first one first:

1. It never marks a healthy instance.
2. It always marks an unhealthy one, however sick the machine is, until the group acts.
3. An operator reads the whole file in one sitting and can see that 1 and 2 hold.

The file reads from top to bottom: each section uses only the sections above it. The threads:

    main            owns the checks, their health and the verdict; writes to /run (Daemon)
    one per check   probes at a fixed rate and passes the results to main (CheckLoop)
    marker          owns the mark: reads metadata, calls AWS, rehearses (Marker)
    writer          writes to disks: the log, and the file that remembers a mark (Writer)

What happens when something fails, and where to read it:

    memory runs out, a step raises   the call or the step is tried again (try_to_mark, Stepper)
    descriptors run out              probes do not count, until a restart (attempt, is_well)
    a thread ends, or main hangs     the watchdog restarts the daemon, with a grace period (is_well)
    the resolver hangs in a probe    the probe counts as failed, again each period (count_hung)
    the marker hangs                 it makes no call, or a late one; the status says so (why_not)
    things change before a call      the marker asks again just before, and makes none (try_to_mark)
    metadata cannot be read          old values count; without id or region, no call (read_metadata)
    the disk of the log hangs        the writer waits, and nobody waits for the writer (Writer)

All waiting and timing uses time.monotonic. The wall clock is for -launchtime, for stamps in the
log, for the time of the last call in status.json, for the signatures of boto3 and for certificates.
"""

from __future__ import annotations

import atexit
import errno
import gc
import importlib.util
import io
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections import deque
from contextlib import suppress
from functools import partial
from logging import DEBUG, ERROR, INFO, WARNING
from subprocess import DEVNULL, PIPE, STDOUT, Popen, run
from time import monotonic
from typing import NamedTuple

sys.modules.setdefault("ssl", None)  # hide it from http.client: 4 MB that only https and AWS need
import http.client  # noqa: E402
import json  # noqa: E402  (measured: before http.client, it takes 0.2 MB more)
from urllib.parse import urljoin, urlsplit  # noqa: E402

if sys.modules["ssl"] is None:
    del sys.modules["ssl"]

__version__ = "3.0.0"
PROGRAM = "ec2-local-healthchecker"
POLL_INTERVAL = 1.0  # seconds: each thread looks at what the others pass to it at least this often
log = logging.getLogger(PROGRAM)
say = partial(print, flush=True)


def refuse_truncated_file():
    # os._exit() in the last line skips this function. It runs only if the last line is missing.
    say(f"{PROGRAM}: the file is incomplete: fetch it again", file=sys.stderr)
    os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # so that no KeyboardInterrupt is ever raised
    atexit.register(refuse_truncated_file)


# ---- Deciding ------------------------------------------------------------------------------------
# When this program marks the instance (it calls SetInstanceHealth with Unhealthy) or takes a mark
# back (with Healthy), and what holds such a call back: all of that is here, as functions of plain
# values. No clock, network, thread or global belongs here.

UNKNOWN, HEALTHY, FAILING = "unknown", "healthy", "failing"  # the states of a check
UNDECIDED, UNHEALTHY = "undecided", "unhealthy"  # the verdicts; HEALTHY is the third
CALL_UNHEALTHY, CALL_HEALTHY = "Unhealthy", "Healthy"  # the calls, by their HealthStatus
IN_SERVICE = ("InService", None)  # lifecycle states that permit a mark; None: it is not known


class Health(NamedTuple):
    """How one check stands, and its current run of equal results."""

    state: str = UNKNOWN
    passed: bool = True  # whether the run is of passes
    streak: int = 0  # how many results the run has

    def after(self, passed, threshold):
        """The health after one more result: `threshold` equal ones in a row change the state."""
        streak, state = self.streak + 1 if passed == self.passed else 1, self.state
        if streak >= threshold:
            state = HEALTHY if passed else FAILING
        return Health(state, passed, streak)


def verdict_of(states) -> str:
    """The verdict on the instance, from the states of its checks (at least one)."""
    states = set(states)
    if FAILING in states:
        return UNHEALTHY
    return HEALTHY if states == {HEALTHY} else UNDECIDED


def decide(
    # As main reports it: the last one; undecided if the checks now disagree, in a reload or a stop.
    verdict: str,
    recovery: bool,  # whether the configuration lets us take back a mark of our own
    may_stand: bool,  # whether a mark of our own may be in effect: sent, and not taken back
    problem: str,  # why no call can name this instance; empty: there is no such problem
    lifecycle: str | None,  # its target state, as last read; None: never read, or there is none
    grace_end: float,  # when the grace period after its return to service ends; 0: there is none
    now: float,
) -> tuple[str | None, str]:
    """The call to make, and to repeat (see call_backoff), if any; and what holds it back, or ""."""
    if verdict == UNHEALTHY:
        call = CALL_UNHEALTHY
    elif verdict == HEALTHY and may_stand and recovery:
        call = CALL_HEALTHY
    else:
        return None, ""
    if problem:
        return call, problem  # nothing else holds a Healthy call: it never ends an instance
    if call == CALL_UNHEALTHY and lifecycle not in IN_SERVICE:
        return call, f"its target lifecycle state is {lifecycle}"
    if call == CALL_UNHEALTHY and now < grace_end:
        return call, "in service again, in a new grace period"
    return call, ""


class Absence(NamedTuple):
    """Whether an unhealthy instance has left service; its new grace period once it is back."""

    is_out_of_service: bool = False
    grace_end: float = 0.0

    def after(self, verdict, lifecycle, grace_end):
        """The absence after one more reading; `grace_end` is one whole grace period from now."""
        if verdict == HEALTHY:
            return Absence()  # there is nothing to mark: forget it, and its grace period
        if lifecycle not in IN_SERVICE:  # begin an absence, without a grace period, if unhealthy
            return Absence(True) if verdict == UNHEALTHY else self
        # In service: one that is just back starts its grace period, any other keeps what it has.
        return Absence(False, grace_end) if self.is_out_of_service else self


def call_backoff(calls, frequency, failed, jitter) -> float:
    """Seconds until the next call, after `calls` calls, the last of which failed or not."""
    # The first delay is one frequency, or after a failure at most 10 s. Each further call doubles
    # it, up to the longer of 5 minutes and one frequency. `jitter`, 0 to 1, varies it by 20 %.
    first = min(frequency, 10.0) if failed else frequency
    doubled = first * 2.0 ** min(calls - 1, 40)  # 40: no overflow
    return min(doubled, max(frequency, 300.0)) * (0.8 + 0.4 * jitter)


def grace_left(graceperiod, age) -> float:
    """Seconds left of the first grace period, for an instance launched `age` seconds ago."""
    left = graceperiod - age
    # Already over (this is a restart), or in the future (a wrong clock): a whole period from now.
    return left if 0 < left <= graceperiod else graceperiod


def next_due(due, period, now) -> float:
    """The next time at a fixed rate, or the last one that has passed: of 10, 2 and 15, it is 14."""
    return due + period * max(1, math.floor((now - due) / period))


# ---- Durations and YAML --------------------------------------------------------------------------
# Text in, plain values out, or ConfigError. What the keys of a configuration mean is for the next
# section. Every pattern takes linear time: a long line must not keep main from its work.


class ConfigError(Exception):
    """A mistake in a configuration or a variable: what is wrong, and what to write instead."""

    status = 2  # the exit status


def hide_secrets(url):
    """`url` as it is shown: *** stands for a user and password, and for query and fragment."""
    # The other secrets are the values of headers: as_dict masks them, no message has them, and
    # probe_http sends them to the scheme, host and port of the check only.
    return re.sub("(?s)(?<=//)[^/?#]*(?=@)|(?<=[?#]).+", "***", url)


def quoted(text):
    """The start of `text` in quotes, on one line, without what may be a secret."""
    return ascii(hide_secrets(text)[:60])


def printable(text, most=200):
    """At most `most` characters of `text` on one line, so that no server can forge a log line."""
    return re.sub("[^ -~]", lambda char: ascii(char[0])[1:-1], text[:most])[:most]


def describe(error):
    """The type and the message of an exception, printable."""
    return printable(f"{type(error).__name__}: {error}")


UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
UNITS["\u00b5s"] = UNITS["\u03bcs"] = 1e-6  # with the micro sign, and with the Greek letter
DURATION_PART = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|\u00b5s|\u03bcs|ms|s|m|h)"


def parse_duration(text: str, least=-math.inf) -> float:
    """Seconds, as Go's time.ParseDuration reads them; ConfigError, or ValueError below `least`."""
    if not re.fullmatch(f"[+-]?(?:0|(?:{DURATION_PART})+)", text):
        is_number = re.fullmatch("[0-9]{1,9}", text)
        advice = f"{text}s" if is_number else "numbers with units, like 10s or 1h30m"
        raise ConfigError(f"{quoted(text)} is not a duration: write {advice}")
    parts = re.findall(DURATION_PART, text)
    seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
    if seconds > 86400:
        raise ConfigError(f"{quoted(text)} is too long: write at most 24h")
    seconds = -seconds if text[0] == "-" else seconds
    if seconds < least:
        raise ValueError
    return seconds


# For any text, parse_yaml returns what PyYAML's BaseLoader returns, or raises ConfigError. Nobody
# sees that in the patterns: the tests compare both parsers on random text.
FORBIDDEN = re.compile("[\0-\b\n-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffd-\uffff]")
BLANK = re.compile(r" *(?:#.*)?$")
BOUNDARY = re.compile(r"(---|\.\.\.)(?: +(?:#.*)?)?$")  # the start or the end of a document
SCALAR = r"""(
      "(?: [^"\\\t] | \\(?: [0abtnvfre "/\\N_LP] | x{H}{2} | u(?!{S}){H}{4}   # double-quoted
                         | U(?: 0000(?!{S}) | 000[1-9A-Fa-f] | 0010 ){H}{4} ) )* "[ ]*
    | '[^'\t]*(?:''[^'\t]*)*'[ ]*                 # single-quoted
    | (?! []\[{},&*!|>%@`"'#\t ] | [-?:](?:[ ]|$) | <<[ ]*(?::|$) )   # plain: no such beginning,
      (?:(?! :(?:[ ]|$) | [ ][#] | \t ) .)+                            # and none of these in it
)""".replace("{H}", "[0-9A-Fa-f]").replace("{S}", "[Dd][89A-Fa-f]")  # no surrogates
ENTRY = re.compile(  # indentation, key, colon, value, comment; groups 1 and 2: key and value
    rf"(?x)(?!---|[.]{{3}})[ ]*{SCALAR}:(?:[ ]|$)[ ]*(?![ ]){SCALAR}?[ ]?(?:(?<=[ ])[#].*)?$"
)
ONE_LINE = "write it on one line (tools that fold lines have a setting for the width)"
REFUSED = {  # what a key or value must not begin with: its name, and what to write instead
    "[": "a flow sequence: write the values without brackets, like 200,204; quote an address",
    "{": "a flow mapping: write each key on a line of its own, indented",
    "&": "an anchor: write the value itself",
    "*": "an alias: write the value itself, or put the text in quotes",
    "!": "a tag: leave it out, or put the text in quotes",
    **dict.fromkeys("|>", "a block scalar: write the text on the line of its key"),
    "%": "a directive: leave it out, or put the text in quotes",
    "-": "a sequence: write keys and values, or several values like 200,204",
    "?": "a complex key: write 'key: value' on one line",
    "<": "a merge key: write the keys themselves",
    '"': f"quotes that do not end on this line, or an unknown escape in them: {ONE_LINE}",
    "'": f"quotes that do not end on this line: {ONE_LINE}",
    **dict.fromkeys(("---", "..."), "text after --- or ...: write it on the next line"),
    **dict.fromkeys("]},@`:", "a reserved character: put the text in quotes"),
}
ESCAPE = re.compile(r"\\(?:x(..)|u(.{4})|U(.{8})|(.))")
ESCAPED = str.maketrans('0abtnvfre "/\\N_LP', '\0\a\b\t\n\v\f\r\x1b "/\\\x85\xa0\u2028\u2029')


def parse_yaml(text: str) -> tuple[dict, dict]:
    """Nested mappings of strings, and the line of each path of keys; ConfigError for all else."""
    # A subset of YAML 1.1: block mappings, and scalars that end on their line.
    lines, root = {}, {}
    levels = [(-1, root, ())]  # the open mappings, outermost first: (indentation, mapping, path)
    waiting = (root, "", ())  # the key that a deeper line belongs to, if any; at first, root[""]
    for number, line in _content(text):
        indent = len(line) - len(line.lstrip(" "))
        while indent < levels[-1][0]:
            levels.pop()
            waiting = None
        if waiting and indent > levels[-1][0]:
            mapping, key, path = waiting
            mapping[key] = {}
            levels.append((indent, mapping[key], path))
        elif indent > levels[-1][0]:
            advice = f"align it with a key; if it is a value, {ONE_LINE}"
            raise ConfigError(f"{number}: the indentation fits no key above: {advice}")
        entry = ENTRY.match(line)
        if not entry or len(entry[1]) > 1024:  # the longest key (YAML 1.1, 7.3.1)
            raise ConfigError(f"{number}: {_refusal(line)}")
        _, mapping, path = levels[-1]
        key = _unquoted(entry[1])
        path += (key,)
        if path in lines:
            raise ConfigError(f"{number}: {quoted(key)} is already on line {lines[path]}: keep one")
        mapping[key] = _unquoted(entry[2]) if entry[2] else ""
        waiting = None if entry[2] else (mapping, key, path)
        lines[path] = number
    if not lines:
        raise ConfigError("1: empty: write at least 'checks:', with one check below it")
    return root[""], lines


def _content(text):
    """Yields (number, line) for each line with a key."""
    started = ended = False
    for number, line in enumerate(re.split("\r\n|\r|\n", re.sub("^\ufeff", "", text)), 1):
        forbidden, boundary = FORBIDDEN.search(line), BOUNDARY.match(line)
        if forbidden:
            code = f"U+{ord(forbidden[0]):04X}"
            raise ConfigError(f"{number}: a character {code}: remove it, or save the file as UTF-8")
        if BLANK.match(line):
            continue
        if ended or (started and boundary and boundary[1] == "---"):
            raise ConfigError(f"{number}: a second document: keep one")
        started, ended = True, boundary and boundary[1] == "..."
        if not boundary:
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
        return "': ' in a value: put the text in quotes, or a key on a line of its own, indented"
    return "not a key with a value: write 'key: value', with a space after the colon"


def _unquoted(scalar):
    scalar = scalar.rstrip(" ")
    if scalar[0] == '"':
        return ESCAPE.sub(_unescaped, scalar[1:-1])
    return scalar[1:-1].replace("''", "'") if scalar[0] == "'" else scalar


def _unescaped(escape):
    code = escape[escape.lastindex]
    return code.translate(ESCAPED) if escape[4] else chr(int(code, 16))


# ---- Configuration -------------------------------------------------------------------------------
# Every key with its reader and its default, and all validation: a configuration that loads will
# run. Nothing is connected to here, and no other file is read, except for a port given by name.

DEFAULT_FILE = "/etc/sysconfig/ec2-local-healthchecker.yml"
DEFAULT_PORTS = {"http": 80, "https": 443, "tcp": 0}  # 0: there is none
AUTHORITY = re.compile(
    r"""(?xai)  # verbose, ASCII, in any case
        (?: \[ ([0-9a-f:.]+) \]                         # an IPv6 address
        |   ((?: [\w-]{1,63} \. )* [\w-]{1,63} \.? )?   # a name, or an IPv4 address
        )
        (?: : (\w[\w-]*)? )?                            # a port, or the name of a service
    """
)
LOOPBACK = re.compile(r"localhost|127\.[0-9.]+|::1")  # hosts that are always this machine
ENDPOINTS = "a URL, like http://localhost:80/, or host:port, like localhost:11211"


class Endpoint(NamedTuple):
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
            parts = urlsplit("tcp://" + text if is_tcp else text)
            ipv6, name, port = AUTHORITY.fullmatch(parts.netloc).groups()
            host = (ipv6 or name or ("localhost" if is_tcp else "")).lower()
            if ipv6:
                socket.inet_pton(socket.AF_INET6, host)
            elif re.fullmatch("[0-9.]+", host):
                socket.inet_aton(host)  # it knows short forms like 127.1
            port = port or str(DEFAULT_PORTS[parts.scheme])
            port = int(port) if port.isdigit() else socket.getservbyname(port, "tcp")
            is_whole = parts.netloc == text if is_tcp else parts.scheme in ("http", "https")
            if not (is_whole and host and 0 < port < 65536 and re.fullmatch("[!-~]+", text)):
                raise ValueError
        except (AttributeError, KeyError, OSError, ValueError):
            problem = f"{quoted(text)} is not an endpoint: write {ENDPOINTS}"
            if "@" in text:
                problem = "a user or password in a URL: write an Authorization header"
            raise ConfigError(problem) from None
        path = "" if is_tcp else parts.path or "/"
        return cls(parts.scheme, host, port, f"{path}?{parts.query}" if parts.query else path)

    def __str__(self):
        return hide_secrets(self.url).replace("tcp://", "")

    @property
    def url(self):
        """The whole URL, which may hold a secret."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"


def status_codes(text):
    """A list of codes and ranges, without blanks; ValueError if it is not one."""
    text = text.replace(" ", "")
    for part in text.split(","):
        # 101 is the only 1xx code that can be final: a check for another would always fail.
        if not re.fullmatch("101|[2-5][0-9]{2}(-[2-5][0-9]{2})?", part) or part[:3] > part[-3:]:
            raise ValueError
    return text


def nested(data):
    """An empty mapping, for keys that are read later; AttributeError if `data` is a scalar."""
    data.keys()  # a scalar, which is a str, has no keys
    return {}


TYPES = {"tcp": "tcp", "http": "http", "https": "http"}
BOOLEANS = dict.fromkeys("true yes on t 1".split(), True)
BOOLEANS.update(dict.fromkeys("false no off f 0".split(), False))

# For each key, the function that reads its value (or raises), and what to write instead.
DURATION = (partial(parse_duration, least=1e-9), "write a duration of more than 0, like 10s")
BOOLEAN = (lambda text: BOOLEANS[text.lower()], "write true or false")
TOP_KEYS = {
    "graceperiod": (partial(parse_duration, least=0.0), "write 0 or a duration, like 5m"),
    "frequency": DURATION,
    "recovery": BOOLEAN,
    "checks": (nested, "write at least one check below it, indented"),
}
CHECK_KEYS = {
    "type": (lambda text: TYPES[text.lower()], "write tcp or http"),
    "endpoint": (Endpoint.from_text, f"write {ENDPOINTS}"),
    "timeout": DURATION,
    "threshold": (lambda text: int(re.fullmatch("[1-9][0-9]{0,5}", text)[0]), "write 1 to 999999"),
    "frequency": DURATION,
    "status": (status_codes, "write codes of 200 to 599, like 200,204 or 200-299"),
    "headers": (nested, "write names and values below it, indented"),
    "tls_verify": BOOLEAN,
}


class Check(NamedTuple):
    """One check; times in seconds. One that is equal after a reload keeps its health."""

    name: str
    type: str = "http"  # or tcp
    endpoint: Endpoint = None
    timeout: float = 1.0
    threshold: int = 3
    frequency: float = 10.0  # unless there is one at the top
    status: str = "200"  # the codes that pass, like 200,204-299
    headers: dict = {}
    tls_verify: bool = True


class Config(NamedTuple):
    """A valid configuration; times in seconds."""

    graceperiod: float = 300.0
    frequency: float = 10.0
    recovery: bool = True
    checks: tuple = ()
    warnings: tuple = ()  # lines for the operator

    @classmethod
    def from_text(cls, text: str, source: str) -> Config:
        """The configuration in `text`; ConfigError with one line, SOURCE:LINE: what to change."""
        values, checks, warnings, place = {}, [], [], ""
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
            for name, keys in config.checks.items():
                place = f"{lines['checks', name]}: {printable(name, 60)}: "
                if "endpoint" not in keys:
                    raise ConfigError("a check has an endpoint: write one below it, indented")
                checks.append(Check(name, **{"frequency": config.frequency, **keys}))
                host, line = keys["endpoint"].host, lines["checks", name, "endpoint"]
                if not LOOPBACK.fullmatch(host):
                    advice = 'is another machine, see "Across a group" in the README'
                    warnings.append(f"{source}:{line}: {name}: if {host} {advice}")
        except ConfigError as error:
            raise ConfigError(f"{source}:{place}{error}") from None
        return config._replace(checks=tuple(checks), warnings=tuple(warnings))

    def as_dict(self):
        """The effective configuration; what may be a secret is masked."""
        checks = {}
        for check in self.checks:
            masked = dict.fromkeys(check.headers, "***")
            row = check._replace(endpoint=str(check.endpoint), headers=masked)._asdict()
            checks[row.pop("name")] = row
        return {**{key: getattr(self, key) for key in TOP_KEYS}, "checks": checks}


def read_key(path, data, values):
    """Read the key at `path` of `data` into its place in `values`; ConfigError if it is wrong."""
    # Paths: (KEY,), (checks, CHECK), (checks, CHECK, KEY), (checks, CHECK, headers, HEADER)
    *outer, name = path
    for key in outer:
        data, values = data[key], values[key]
    if len(outer) == 1:
        require_check(name, data)
        values[name] = {}
    elif len(outer) == 3:
        read_header(values, name.title(), data[name])
    else:
        read_value(name, data[name], CHECK_KEYS if outer else TOP_KEYS, values)
        if outer:  # the type may come later, be wrong, or be missing
            require_fit(name, values, TYPES.get(str(data.get("type")).lower()) == "tcp")


def read_value(name, value, keys, values):
    """Read one of these keys into `values`."""
    key = "threshold" if name == "threashold" else name  # files for the Go daemon have it
    if key not in keys:
        raise ConfigError(f"unknown key: {nearest(name, keys)}")
    if key in values:  # in both spellings; parse_yaml refuses every other duplicate
        raise ConfigError("threshold is written twice: keep one")
    read, advice = keys[key]
    try:
        values[key] = read(value)
    except (AttributeError, KeyError, TypeError, ValueError):
        what = quoted(value) if isinstance(value, str) and key != "headers" else "this value"
        raise ConfigError(f"{what} is not valid: {advice}") from None


def require_check(name, checks):
    """ConfigError unless what is below this name can be a check."""
    keys = checks[name]
    # Keys beside "web:" instead of below it look like checks: "  web:\n  endpoint: localhost:80".
    strays = [key for key in checks if key in CHECK_KEYS and isinstance(checks[key], str)]
    if name in strays:
        raise ConfigError("a key of a check: indent it below the name of its check")
    if keys == "" and strays:
        return  # from_text reads those next, and reports them on their own lines
    if not isinstance(keys, dict) or not name.isprintable() or not name.strip():
        raise ConfigError("a check has keys, indented below its name: write at least endpoint")


def require_fit(name, values, is_tcp):
    """ConfigError unless the key that was read last fits the type of its check."""
    if is_tcp and name in ("status", "headers", "tls_verify"):
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
        raise ConfigError("the value is not a host: write one like www.example.com")
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
        advice = "write it (not to /tmp: the service has its own), or name another"
        if isinstance(error, PermissionError):
            advice = "make file and folders readable for all: the service is not root"
        if path.startswith("/run/credentials/"):
            advice = "set LoadCredential= and restart: a reload does not read credentials"
        elif re.match("/(home|root)/", os.path.realpath(path)):
            advice = "move it to /etc: the service cannot see /home and /root"
        raise ConfigError(f"{source}: cannot be read ({error.strerror}): {advice}") from None
    return Config.from_text(text, source)


# ---- Probes --------------------------------------------------------------------------------------
# One attempt each: return, or raise ProbeFailure for what the service did, and anything else for
# what went wrong on this side. A hostile service can pass or fail its own check, have a probe send
# GETs to any port of this machine (or of the host that is checked), and cost CPU and some MiB until
# the timeout. It cannot forge a log line, and cannot send a probe, or a header, elsewhere.

MAX_REDIRECTS, REDIRECTS = 10, (301, 302, 303, 307, 308)
LARGEST_HEAD, LARGEST_BODY, PIECE = 2**20, 2**20, 2**13  # bytes
INTERIM = re.compile(rb"HTTP/\S+ +1(?!01)[0-9][0-9]\b")  # the responses to skip: RFC 9110, 15.2
NEEDED = (b"location:", b"content-length:", b"transfer-encoding:")  # the fields that are read
# What this machine lacks is no evidence. (EADDRNOTAVAIL, no local port, is: all clients meet it.)
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, socket.EAI_MEMORY)


class ProbeFailure(Exception):
    """The service failed: a printable line says how. A shortage as __cause__ makes it not count."""

    def __init__(self, reason):  # which may echo the query, and so a secret
        super().__init__(printable(re.sub(r"\?(?!\*\*\*)\S+", "?***", reason)))


def can_open_descriptors():
    """Whether four are free, enough for a probe. The resolver and TLS do not say that some lack."""
    with suppress(Exception), socket.socket(), socket.socket(), socket.socket(), socket.socket():
        return True
    return False


class Deadline:
    """The time by which one attempt must end, `timeout` seconds after its start."""

    def __init__(self, timeout):
        self.timeout, self.end = timeout, monotonic() + timeout

    def left(self, doing):
        """The seconds left for `doing`; ProbeFailure when there are none."""
        self.missed = f"timed out after {self.timeout:g}s {doing}"  # `exchange` raises this, too
        left = self.end - monotonic()
        if left <= 0:
            raise ProbeFailure(self.missed)
        return left


def connect(host, port, deadline):
    """A TCP connection to the first address that accepts one, or ProbeFailure."""
    try:
        # As bytes: a str would go through the IDNA codec, which takes a megabyte to load.
        addresses = socket.getaddrinfo(host.encode(), port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ProbeFailure(f"cannot resolve {host}: {error.strerror}") from error
    reasons = []
    while addresses:  # each gets an even share of the time left, as with Go's dialer
        share = deadline.left(f"connecting to {host} port {port}") / len(addresses)
        family, kind, protocol, _, address = addresses.pop(0)
        sock = None
        try:
            sock = socket.socket(family, kind, protocol)
            sock.settimeout(share)
            sock.connect(address)
            return sock
        except (ConnectionResetError, BrokenPipeError):
            return sock  # accepted, then reset: a tcp check passes, and http fails when it reads
        except OSError as error:
            if sock:
                sock.close()
            if error.errno in SHORTAGES or (not sock and error.errno != errno.EAFNOSUPPORT):
                raise  # this machine's fault; a kernel without IPv6 just skips the address
            reason = error.strerror or f"no answer in {share:.3g}s"
            reasons.append(f"{address[0]} port {port}: {reason}")
    raise ProbeFailure("; ".join(reasons))


class Tls:
    """The TLS context of one check: made when needed, and again once `exchange` has dropped it."""

    def __init__(self, verify):
        self.verify, self.context = verify, None

    def prepare(self):
        """Python's default context, made to accept the same certificates on every Python."""
        import ssl

        if not self.context:
            context = ssl.create_default_context()
            context.set_ciphers("DEFAULT")  # of the system: Python 3.10 and later offer fewer
            context.set_alpn_protocols(["http/1.1"])  # some servers hang up without it
            # Python 3.13 adds VERIFY_X509_STRICT, which refuses more, and PARTIAL_CHAIN, which
            # trusts every certificate in the store, as curl and Go do. Python 3.8 has no name yet.
            context.verify_flags = ssl.VERIFY_X509_TRUSTED_FIRST | 0x80000  # PARTIAL_CHAIN
            if not self.verify:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            self.context = context
        return self.context


def probe_tcp(check, tls):
    """Pass if the endpoint accepts a connection. (The kernel accepts for a hung service, too.)"""
    connect(check.endpoint.host, check.endpoint.port, Deadline(check.timeout)).close()


def probe_http(check, tls):
    """Pass if a GET ends in one of the check's codes, or in a redirect elsewhere: then a remark."""
    # A redirect is followed to the host of the check and to loopback. What is elsewhere, like a
    # load balancer, says nothing about this instance.
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
                    f"host: probe that path, send X-Forwarded-Proto, or accept it: 'status: {code}'"
                )
            endpoint = target
            # Headers may hold a secret: another origin does not get them.
            headers = check.headers if endpoint[:3] == check.endpoint[:3] else {}
        raise ProbeFailure(f"more than {MAX_REDIRECTS} redirects")
    except ProbeFailure as error:
        if endpoint == check.endpoint:
            raise
        raise ProbeFailure(f"{str(error)[:100]} (redirected to {endpoint})") from error.__cause__


def follow(endpoint, location, own_host):
    """Where a Location leads: (URL, Endpoint), or (URL, None) if that is not on this machine."""
    # Names are compared as written. A Host header does not name this machine: it may name a site.
    # http.client reads headers as Latin-1: what is not ASCII there is a byte, to be encoded.
    location = re.sub("[^!-~]", lambda char: f"%{ord(char[0]):02X}", location)
    with suppress(ConfigError, ValueError):
        url = urljoin(endpoint.url, location)
        host = urlsplit(url).hostname
        if host == own_host or LOOPBACK.fullmatch(host or ""):
            return url, Endpoint.from_text(url)
        if host:
            return url, None
    raise ProbeFailure(f"redirected to {quoted(location)}, which cannot be followed")


def exchange(method, endpoint, headers, deadline, tls):
    """Send one request, never through a proxy: (response, body). Raises as a probe does."""
    # `body` is the first PIECE, or empty if the whole did not arrive. Up to LARGEST_BODY bytes are
    # read, for at most half the time left, so that the service sees no reset; a failure is ignored.
    context = tls.prepare() if endpoint.scheme == "https" else None
    sock = connect(endpoint.host, endpoint.port, deadline)
    try:  # from here on, a failure is the service's, unless its cause is a shortage
        if context:
            sock.settimeout(deadline.left("in the TLS handshake"))
            # The name for the handshake and the certificate; neither has a final dot.
            name = urlsplit("//" + headers.get("Host", "")).hostname or endpoint.host
            sock = context.wrap_socket(sock, server_hostname=name.rstrip(".").encode())
        sock.settimeout(deadline.left("sending the request"))
        with suppress(ConnectionError):  # a service may answer and close before it reads
            send_request(sock, method, endpoint, headers)
        reader = DeadlineReader(sock, deadline)
        response = read_head(sock, io.BufferedReader(reader), method)
        body = b""
        with suppress(Exception):
            reader.deadline = Deadline(deadline.left("reading the body") / 2)
            body = read_body(response)
            if context:
                sock.settimeout(reader.deadline.left("closing"))
                sock.unwrap()  # or the service sees a connection that ends within TLS
        return response, b"" if response.length else body  # length: of what did not arrive
    except socket.timeout:
        raise ProbeFailure(deadline.missed) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if hasattr(error, "verify_code"):
            tls.context = None  # read the authorities again: they may have been replaced
        raise ProbeFailure(describe(error)) from error
    finally:
        sock.close()


def send_request(sock, method, endpoint, headers):
    connection = http.client.HTTPConnection(endpoint.host, endpoint.port)
    connection.default_port = DEFAULT_PORTS[endpoint.scheme]  # the port that Host leaves out
    connection.sock = sock
    own = {"User-Agent": f"{PROGRAM}/{__version__}", "Accept": "*/*", "Connection": "close"}
    # No Accept-Encoding: Apache, for one, answers 406 to http.client's "identity".
    connection.putrequest(method, endpoint.path, "Host" in headers, skip_accept_encoding=True)
    for name, value in {**own, **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()


def read_head(sock, stream, method):
    """The final response that `stream` begins with, ready for its body to be read."""
    # http.client accepts a truncated head, and rejects more than 100 fields or a line over 64 KiB.
    # So the head is read here, and only the fields that matter are passed on.
    head, left = [], LARGEST_HEAD
    while True:
        line = stream.readline(left)
        left -= len(line)
        if not line.endswith(b"\n"):
            what = "ended early" if left else "is larger than 1 MiB"
            raise http.client.HTTPException(f"the head of the response {what}")
        if not head or line.lower().startswith(NEEDED):  # the first is the status line
            head.append(line)
        elif line in (b"\r\n", b"\n"):
            if not INTERIM.match(head[0]):
                break
            head = []  # skip an interim response
    response = http.client.HTTPResponse(sock, method=method)
    response.fp = io.BytesIO(b"".join([*head, b"\r\n"]))  # begin() reads the head from here
    response.begin()
    response.fp = stream  # read() reads the body from here
    return response


def read_body(response):
    """Read up to LARGEST_BODY bytes, in pieces to hold little memory. Returns the first piece."""
    first = response.read(PIECE)
    for _ in range(LARGEST_BODY // PIECE - 1):
        if not response.read(PIECE):
            break
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
# Instance metadata, the Auto Scaling call, the rehearsal of it, and the thread that does all that.
# The verdict comes from main, and `decide` says which call to make; this section makes it.

METADATA = "AWS_EC2_METADATA_SERVICE_ENDPOINT"  # the variable that says where metadata is
METADATA_ATTEMPTS = 3  # of 1 s each
MODULES_BEFORE_BOTO3 = frozenset(sys.modules)
LIFECYCLE = "meta-data/autoscaling/target-lifecycle-state"
METADATA_ITEMS = {  # the path of each, and the variable, if any, that stands in for it
    "lifecycle": (LIFECYCLE, ""),
    "id": ("meta-data/instance-id", "INSTANCE_ID"),
    "region": ("meta-data/placement/region", "AWS_REGION"),
}


class Instance(NamedTuple):
    """What is known of this instance: each item as last read, or as its variable says."""

    lifecycle: str | None = None  # the target lifecycle state; None: there is none, or never read
    id: str | None = None
    region: str | None = None
    unread: str = ""  # why an item could not be read this time (it keeps its value)
    problem: str = ""  # why no call can name this instance


def read_metadata(before: Instance) -> Instance:
    """Read each item of metadata by itself (IMDSv2); one that cannot be read keeps its value."""
    found, unread, problem = before._asdict(), "", ""
    try:
        token = ask_metadata("PUT", "api/token", "X-aws-ec2-metadata-token-ttl-seconds", "60")
    except (OSError, ProbeFailure) as error:
        token, unread = "", str(error)
    for item, (path, variable) in METADATA_ITEMS.items():
        try:
            if token:
                found[item] = ask_metadata("GET", path, "X-aws-ec2-metadata-token", token)
        except (OSError, ProbeFailure) as error:
            unread = str(error)
        value = variable and os.getenv(variable)
        if value and found[item] is None:  # it was never read
            found[item] = value
        elif value and value != found[item]:  # it came with the image, from another instance
            problem = f"{variable} is {value}, metadata says {found[item]}: remove the variable"
    if not (problem or (found["id"] and found["region"])):  # one was neither read nor set
        advice = f"{METADATA_ADVICE}, or set INSTANCE_ID and AWS_REGION"
        problem = f"instance metadata cannot be read: {unread} -- {advice}"
    return Instance(**{**found, "unread": unread, "problem": problem})


def ask_metadata(method, path, header, value):
    """One item; None if there is no lifecycle state. Raises as a probe does."""
    endpoint = Endpoint.from_text(f"{os.environ[METADATA]}latest/{path}")
    for attempts_left in reversed(range(METADATA_ATTEMPTS)):
        try:
            response, body = exchange(method, endpoint, {header: value}, Deadline(1.0), Tls(True))
            if response.status == 404 and path == LIFECYCLE:
                return None
            if response.status == 200 and re.fullmatch(rb"[\w:=/+-]{1,200}\s*", body):
                return body.decode().strip()  # anything else, like a web page, is refused
            raise ProbeFailure(f"HTTP status {response.status} for {path}, {len(body)} bytes")
        except ProbeFailure:
            if not attempts_left:
                raise


def prepare_environment():
    """Complete botocore's variables about metadata; ConfigError if its endpoint is not a URL."""
    is_ipv6 = os.getenv(METADATA + "_MODE", "").lower() == "ipv6"  # older botocore does not read it
    default = "http://[fd00:ec2::254]/" if is_ipv6 else "http://169.254.169.254/"
    url = (os.getenv(METADATA) or default).rstrip("/") + "/"  # older botocore needs the slash
    try:
        host = Endpoint.from_text(url).host
    except ConfigError as error:
        raise ConfigError(f"{METADATA}: {error}") from None
    os.environ[METADATA] = url
    os.environ.setdefault("AWS_METADATA_SERVICE_NUM_ATTEMPTS", str(METADATA_ATTEMPTS))
    others = os.getenv("no_proxy") or os.getenv("NO_PROXY") or ""
    if others != "*":  # metadata is never asked for through a proxy
        os.environ["no_proxy"] = f"{host},[{host}],{others}"  # botocore writes IPv6 in brackets


def autoscaling(instance, is_broken=False):
    """A new client of the Auto Scaling API, with credentials; ImportError if none can be made."""
    if is_broken:  # the last import failed, perhaps without memory: drop what was imported since
        for name in set(sys.modules) - MODULES_BEFORE_BOTO3:
            sys.modules.pop(name, None)
    importlib.invalidate_caches()
    try:
        import boto3.session
        import botocore.config

        # Make a new session for each call: one that found no credentials never looks again.
        session = boto3.session.Session(region_name=instance.region)
        # Older boto3 does not read these variables.
        url = os.getenv("AWS_ENDPOINT_URL_AUTO_SCALING") or os.getenv("AWS_ENDPOINT_URL")
        retries = {"total_max_attempts": 1}
        config = botocore.config.Config(connect_timeout=3, read_timeout=10, retries=retries)
        client = session.client("autoscaling", endpoint_url=url, config=config)
    except BaseException as error:
        raise ImportError(f"{type(error).__name__}: {error}") from error
    credentials = session.get_credentials()
    if not credentials:
        why = instance.unread or "it has none"
        raise LookupError(f"unable to locate credentials; instance metadata: {why}")
    credentials.get_frozen_credentials()  # fetch them now, not within the call
    return client


def response_of(error):
    """The response to SetInstanceHealth in an error that boto3 raises for it, or {}."""
    return error.response if getattr(error, "operation_name", "") == "SetInstanceHealth" else {}


def set_health(client, instance_id, status):
    """Call SetInstanceHealth once. Unless AWS accepts it, raises as boto3 does, or LookupError."""
    # A name resolves without a timeout, so a call may go out late. AWS refuses it after 5 minutes.
    try:
        response = client.set_instance_health(InstanceId=instance_id, HealthStatus=status)
        refusal = None
    except Exception as error:
        response, refusal = response_of(error), error
        if not response:
            raise
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    if "x-amzn-requestid" not in headers:  # a proxy has answered
        raise LookupError(f"no AWS request id in an answer of {client.meta.endpoint_url}")
    if refusal:
        raise refusal


def code_of(error):
    """The error code in AWS's response, or the type of an error that has none."""
    return response_of(error).get("Error", {}).get("Code") or type(error).__name__


def explain(error):
    """One line: what went wrong in a call, in its own words (no password), and what to do."""
    code, text = code_of(error), printable(re.sub(r"//\S+@", "//***@", str(error)), 2000)
    advice = [ADVICE[pattern] for pattern in ADVICE if re.match(pattern, f"{code}: {text}")]
    return " -- ".join([text if code in text else f"{code}: {text}", *advice[:1]])


INSTALL_BOTO3 = "install the package python3-boto3 (apt-get or dnf; on RHEL it is in EPEL)"
METADATA_ADVICE = "enable IMDSv2 for this instance (for a container: a hop limit of 2)"
PERMISSION = "autoscaling:SetInstanceHealth"
DENIED = "AccessDenied|Unauthorized"
ADVICE = {  # what to do about an error: the first pattern that matches "CODE: TEXT" decides
    "ImportError: MemoryError": "the instance is out of memory",
    "ImportError.*nvalid endpoint": "correct AWS_ENDPOINT_URL_AUTO_SCALING or AWS_ENDPOINT_URL",
    "ImportError: (Inv|Prof|Conf|Val|Part|Cred|Infin)": "correct the AWS_ variable or the profile",
    "ImportError": f"boto3 is missing or broken: {INSTALL_BOTO3}",
    ".*grace period": "a group refuses marks within its health check grace period",
    ".*[Nn]o managed instance": "attach the instance to a group, or stop this service",
    ".*explicit deny": "remove the deny from that policy: nothing overrides it; then restart",
    DENIED: f"allow {PERMISSION} in that policy or in the instance's role; then restart",
    ".*AssumeRole": "correct the role, or the policy that lets this instance assume it",
    ".*[Ee]xpired|Signature|InvalidClient|AuthF": "check the clock and the credentials",
    ".*locate credentials(?!.* has none)": METADATA_ADVICE,
    ".*(locate credentials|Credential|Metadata)": f"attach a profile that allows {PERMISSION}",
    "Throttl|RequestLimit|TooManyRequests": "AWS limits the calls of the account; it tries again",
    "Internal|ServiceUnav|50.:|Resource|Scaling": "AWS has a fault, or is busy; it tries again",
    ".*no AWS request id|ResponseParser|KeyError": "something else answers there: check the proxy",
    ".*(Proxy|Failed to parse)": "check the URL of the proxy in HTTPS_PROXY",
    ".*SSL": "trust the authority of the certificate by AWS_CA_BUNDLE, or check the proxy",
    ".*(Connect|Timeout|HTTPClient)": "check routes, security groups and the VPC endpoint",
}


def rehearse():
    """Returns (instance, reason): why a mark of it would not succeed now, or "" if it would."""
    # It makes the call of a mark with a HealthStatus that does not exist. AWS refuses that with
    # ValidationError, or as it would refuse the mark. It does not try the group's own grace period,
    # what holds a call back in `decide`, or what AWS may check after the HealthStatus.
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # when memory runs out, the kernel ends a rehearsal first
    instance = read_metadata(Instance())
    if instance.problem:
        return instance, instance.problem
    try:
        set_health(autoscaling(instance), instance.id, "Rehearsal")
    except BaseException as error:
        if code_of(error) != "ValidationError" or "managed instance" in str(error):
            return instance, explain(error)  # "No managed instance" is a ValidationError, too
    return instance, ""


class Rehearsal:
    """Runs -rehearse in a child process, so that the memory of boto3 goes with it.

    The first is due at once; the next a day after the end of one that went well; 1, 2, 4, 5, 5, ...
    minutes after the start of one that did not; after a failed call, as soon as no call is wanted.
    """

    def __init__(self, command):
        self.command = command  # empty in a dry run
        self.child = None  # the process under way
        self.deadline = 0.0  # when it has taken too long
        self.is_killed = False
        self.due = 0.0
        self.pause = 60.0  # seconds from one start to the next, until one goes well

    def start(self, now):
        self.child = Popen(self.command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT)
        os.set_blocking(self.child.stdout.fileno(), False)
        self.deadline, self.is_killed = now + 30.0, False
        self.due, self.pause = now + self.pause, min(2 * self.pause, 300.0)

    def poll(self, now):
        """The reason, as `rehearse` has it, of one that ended or takes too long; else None."""
        if not self.child:
            return None
        status = self.child.poll()
        if status is None:  # it has not ended
            if self.is_killed or now < self.deadline:
                return None
            self.kill()
            return "a rehearsal did not end in 30s"
        output = (self.child.stdout.read() or b"").decode("utf-8", "replace").strip()
        self.child = None
        if self.is_killed:
            return None
        if status == 0:
            self.due, self.pause = now + 86400.0, 60.0
            return ""
        return printable(output.split("\n")[-1], 2000) or f"a rehearsal ended with status {status}"

    def kill(self):
        """End the one under way, without waiting: a process may hang even when it is killed."""
        if self.child:
            self.child.kill()
            self.is_killed = True


class Stepper:
    """Calls its step(now) again and again; a fault of this program does not end it."""

    status = None  # the exit status, when it is time to end
    began = math.inf  # when the step under way began, for `why_not`
    is_faulty = False  # whether the last step ended in a fault
    clock, wait = monotonic, time.sleep  # builtins are not bound; a subclass may have its own

    def run(self):
        """Step until it is time to end; returns the exit status."""
        pause = 0.0
        while self.status is None:
            self.wait(pause)
            self.began = self.clock()
            pause = self.try_step(self.began)
            self.began = math.inf
        return self.status

    def try_step(self, now):
        """Do what is due; returns the seconds to wait before the next step."""
        try:
            wake, self.is_faulty = self.step(now), False
            return max(0.0, min(wake - now, POLL_INTERVAL))
        except BaseException as fault:
            with suppress(Exception):  # without memory, the line is lost
                if not self.is_faulty:
                    log.error(f"A fault of this program, trying again: {describe(fault)}")
            self.is_faulty = True
            return 1.0


class Findings(NamedTuple):
    """What main tells the marker, a new value each time. It counts until main tells another."""

    config: Config
    verdict: str = UNDECIDED  # the last one, or undecided: see Daemon.step
    evidence: str = ""


class Report(NamedTuple):
    """What the marker tells main, which shows it: a new value each time."""

    instance: Instance = Instance()
    wanted: str | None = None  # the call to make
    hold: str = ""  # what holds it back
    calls: int = 0  # tries of it, also those that failed
    # "ID REGION" of a mark of our own that may stand: from before an Unhealthy call is sent, until
    # AWS refuses that very call, a Healthy call succeeds, or metadata names another instance.
    marked: str = ""
    why_not: str | None = None  # why a mark would not succeed; empty: it would; None: not known yet
    last_call: dict | None = None


class Marker(Stepper, threading.Thread):
    """Makes the call that `decide` asks for, or rehearses one. It alone reads metadata."""

    def __init__(self, config, rehearsal, writer, marked):
        super().__init__(daemon=True)
        self.findings, self.report = Findings(config), Report(marked=marked)
        self.rehearsal, self.writer = rehearsal, writer
        self.is_dry_run = not rehearsal.command
        self.absence = Absence()
        self.due = 0.0  # when the wanted call is tried next
        self.denial = ""  # why AWS denied a call, until one succeeds: a rehearsal may not see it
        self.is_import_broken = False  # whether the last call ended in an ImportError

    def step(self, now):
        """Try the wanted call if it is due; if none is wanted, rehearse."""
        findings = self.findings
        wanted, _ = self.decision(findings, now)
        if wanted != self.report.wanted:
            self.due = now
            self.publish(wanted=wanted, hold="", calls=0)
        if not wanted:
            self.update_absence(findings)
            self.rehearse_if_due(now)
        elif now >= self.due:
            self.due = self.try_to_mark(wanted) + self.clock()
        return now + POLL_INTERVAL

    def try_to_mark(self, wanted):
        """Ask, make a client, ask again; call if both agree. Returns seconds until the next try."""
        self.rehearsal.kill()
        error = client = findings = None
        try:
            findings = self.ask(wanted)
            if findings and not self.is_dry_run:
                client = autoscaling(self.report.instance, self.is_import_broken)
                findings = self.ask(wanted)  # again: importing boto3 takes seconds
            if not findings:
                return self.findings.config.frequency  # held: ask again after this
            self.call(client, wanted)
        except BaseException as fault:  # even a MemoryError: the call is tried again
            error = fault
        return self.note_result(wanted, findings, error)

    def ask(self, wanted):
        """Read metadata; the findings, if they want this call and nothing holds it; else None."""
        self.read_metadata()
        findings = self.findings
        call, hold = self.decision(findings, self.clock())
        if call != wanted:
            self.publish(wanted=None, hold="")  # so the next step sees a change, and does not wait
            return None
        if hold and hold != self.report.hold:
            log.warning(f"Not marking as {wanted}: {hold}")
        self.publish(hold=hold)
        return None if hold else findings

    def read_metadata(self):
        """Read metadata. Forget a mark of another instance: its file came with the image."""
        instance, marked = read_metadata(self.report.instance), self.report.marked
        if self.is_dry_run:  # it needs no identity
            instance = instance._replace(id=instance.id or "this-instance", problem="")
        self.publish(instance=instance)
        self.update_absence(self.findings)
        if marked and not instance.problem and marked.split(" ")[0] != instance.id:
            self.note_mark("")

    def decision(self, findings, now):
        instance, may_stand = self.report.instance, bool(self.report.marked)
        return decide(
            findings.verdict, findings.config.recovery, may_stand, instance.problem,
            instance.lifecycle, self.absence.grace_end, now,
        )  # fmt: skip

    def update_absence(self, findings):
        end = self.clock() + findings.config.graceperiod
        self.absence = self.absence.after(findings.verdict, self.report.instance.lifecycle, end)

    def call(self, client, wanted):
        """Make the call, or none in a dry run; raises as set_health does."""
        before, instance = self.report.marked, self.report.instance
        if wanted == CALL_UNHEALTHY:
            self.note_mark(f"{instance.id} {instance.region}")  # first: the answer may be lost
        try:
            if client:
                set_health(client, instance.id, wanted)
        except Exception as error:
            if response_of(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 500) < 500:
                self.note_mark(before)  # AWS has refused it (what a proxy answers counts as 500)
            raise
        if wanted == CALL_HEALTHY:
            self.note_mark("")

    def note_mark(self, marked):
        self.publish(marked=marked)
        self.writer.remember(marked)  # in a dry run, it has no file

    def note_result(self, wanted, findings, error):
        """Log and publish how a call ended; returns the seconds until the next one."""
        who, calls = self.report.instance.id, self.report.calls + 1
        result = explain(error) if error else ""
        self.is_import_broken = isinstance(error, ImportError)
        gc.collect()  # a failed import leaves cycles, and memory may be short
        delay = call_backoff(calls, self.findings.config.frequency, error, os.urandom(1)[0] / 255)
        if error:
            self.rehearsal.due = 0.0  # as soon as no call is wanted
            log.error(f"Could not mark {who} as {wanted}, again in {delay:.0f}s: {result}")
        else:
            done = "Dry run: would have marked" if self.is_dry_run else "Marked Instance"
            line = f"{done} as {wanted}: {who}: {findings.evidence}"
            log.log(WARNING if wanted == CALL_UNHEALTHY else INFO, line)
        if not error or re.match(DENIED, code_of(error)):
            self.denial = result
        last_call = {"status": wanted, "error": result, "time": time.time()}
        self.publish(calls=calls, last_call=last_call, why_not=result)
        return delay

    def rehearse_if_due(self, now):
        """Start a rehearsal if it is due (never in a dry run), and publish how one went."""
        rehearsal = self.rehearsal
        if rehearsal.command and not rehearsal.child and now >= rehearsal.due:
            self.read_metadata()  # for main, which shows it, and to forget another's mark
            rehearsal.start(now)
        why_not = rehearsal.poll(now)
        if why_not is not None:
            self.read_metadata()
            self.publish(why_not=why_not or self.denial)

    def publish(self, **changes):
        self.report = self.report._replace(**changes)


# ---- Telling -------------------------------------------------------------------------------------
# The log, the journal, systemd and the file that remembers a mark: how the program speaks. Nothing
# here decides. What cannot be written is lost. The end waits for the writer, for half a second.

READY = "Ready to mark {0.id} in {0.region}"
NOT_READY = "A mark would not succeed now: "
DRY_RUN = "dry run, nothing is marked"
FORMATTER = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%FT%T")
FORMATTER.converter = time.gmtime


class Systemd:
    """The service manager and its journal; without them, nothing is sent."""

    def __init__(self):
        self.address = re.sub("^@", "\0", os.environ.pop("NOTIFY_SOCKET", ""))  # @: abstract
        self.is_service = bool(os.environ.pop("INVOCATION_ID", ""))  # whether systemd started this
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def notify(self, *lines):
        """Send one message (sd_notify(3)), cut short: systemd ignores more than 4096 bytes."""
        self.send("\n".join(lines)[:1000], self.address)

    def journal(self, level, text):
        """Write one line to the journal (syslog(3)); logging's SysLogHandler would block."""
        line = f"<{3 if level >= ERROR else 4}>healthchecker: {text:.9999}"
        self.send(line, "/dev/log" if self.is_service else "")

    def send(self, text, address):
        if address:
            with suppress(OSError):
                self.socket.sendto(text.encode("utf-8", "backslashreplace"), address)


class Writer(logging.Handler):
    """Writes the log, and the file that remembers a mark, in a thread: a disk may hang."""

    def __init__(self, systemd, mark_file):
        super().__init__()
        self.systemd, self.mark_file = systemd, mark_file  # empty: there is no such file
        self.marks = deque()  # the contents that the file is to have
        self.lines = deque(maxlen=1000)  # (descriptor, bytes): the oldest are lost
        self.has_news = threading.Event()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()
        self.setFormatter(FORMATTER)
        log.addHandler(self)
        log.propagate = False
        logging.getLogger().addHandler(logging.NullHandler())  # for what libraries log

    def emit(self, record):
        with suppress(Exception):  # without memory, the line is lost
            text, is_warning = record.getMessage(), record.levelno >= WARNING
            if is_warning:  # at once, before it may wait for a disk
                self.systemd.journal(record.levelno, text)
            line = self.format(record) + "\n"
            self.lines.append((2 if is_warning else 1, line.encode("utf-8", "backslashreplace")))
            self.has_news.set()

    def remember(self, marked):
        """Have the file say that this mark may stand; the lines that wait come after it."""
        self.marks.append(marked)
        self.has_news.set()

    def work(self):
        while True:
            if self.marks:
                try:
                    if self.mark_file:
                        replace_file(self.mark_file, self.marks[0], 0o644)
                except Exception as error:
                    log.warning(f"Cannot write the file that remembers a mark: {describe(error)}")
                self.marks.popleft()
            elif self.lines:
                with suppress(OSError):
                    os.write(*self.lines[0])
                self.lines.popleft()
            else:
                self.has_news.wait()
                self.has_news.clear()

    def finish(self):
        """Wait up to half a second for the last mark and the last lines."""
        for _ in range(100):
            if self.marks or self.lines:
                time.sleep(0.005)


def replace_file(path, content, mode):
    """Replace a file in one step (rename(2)), with this mode whatever the umask; or OSError."""
    with open(path + ".new", "wb") as file:
        file.write(content.encode())
        os.fchmod(file.fileno(), mode)
    os.replace(path + ".new", path)


def read_file(path):
    """The content of a file of ours; empty if it cannot be read."""
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
    return ""


def summarize(state, why_not, report):
    """One line for an operator, the cause first."""
    parts = [state]
    if why_not:
        parts.insert(0, why_not if why_not == DRY_RUN else NOT_READY + why_not)
    if report.hold and report.hold != why_not:
        parts.append(f"not marking: {report.hold}")
    elif report.wanted and not report.hold:
        parts.append(f"marking as {report.wanted}, calls so far: {report.calls}")
    return "; ".join(parts)


def how_to_take_back(marked):
    """What an operator does about a mark that may stand while this program is stopped."""
    instance, _, region = marked.partition(" ")
    return (
        f"The group may still hold {instance} as Unhealthy because of this program. While the "
        "program is stopped, nothing takes that back. To keep the instance, run: aws autoscaling "
        f"set-instance-health --region {region or 'REGION'} --instance-id {instance} "
        "--health-status Healthy"
    )


# ---- Check loops ---------------------------------------------------------------------------------
# One thread per check: wait, probe, pass the result on. Nothing is counted or decided here, except
# whether a failure is the service's or this machine's.


class CheckLoop(threading.Timer):
    """A Timer that repeats: it probes one check at a fixed rate, for the first time when `due`.

    It has `interval`, `function`, `finished` and `cancel` of Timer. Each probe puts (loop, start of
    the probe, passed, text) into the inbox. `passed` is None if the probe says nothing about the
    service; `text` says why, or why it failed, or is a remark, or empty.
    """

    def __init__(self, check, inbox, due):
        super().__init__(check.frequency, probe_tcp if check.type == "tcp" else probe_http)
        self.daemon = True
        self.check, self.inbox, self.due = check, inbox, due
        self.tls = Tls(check.tls_verify)
        self.probing = None  # when the probe under way started; main reads it

    def run(self):
        while not self.finished.is_set():
            begin = monotonic()
            if begin < self.due:
                # Not finished.wait(): before Python 3.11, that follows the wall clock.
                time.sleep(min(self.due - begin, 10.0))
                continue
            start, passed, text = self.attempt()
            end = monotonic()
            self.due = next_due(self.due, self.interval, end)
            self.inbox.append((self, start, passed, text))
            result = "passed" if passed else f"{'spoiled' if passed is None else 'failed'}: {text}"
            log.debug(f"Probe of {self.check.name} {result} in {(end - begin) * 1000:.0f} ms")

    def attempt(self):
        """Probe once; returns (start, passed, text) for the inbox."""
        start = None
        try:
            if self.check.endpoint.scheme == "https":
                self.tls.prepare()  # not on the service's time
            start = self.probing = monotonic()
            return start, True, self.function(self.check, self.tls) or ""
        except ProbeFailure as failure:
            is_shortage = getattr(failure.__cause__, "errno", None) in SHORTAGES
            is_evidence = not is_shortage and can_open_descriptors()
            return start, False if is_evidence else None, str(failure)
        except BaseException as fault:  # whatever it is, the loop goes on
            return start, None, describe(fault)
        finally:
            self.probing = None  # also if this thread dies here: the probe does not hang


# ---- Daemon and gate -----------------------------------------------------------------------------
# The main thread: it counts results and takes the verdict, in step(now). A step waits for nothing,
# except for the configuration in a reload (/run is memory). A gate does the same until it exits.

SPREAD = 0.001  # seconds between the starts of two loops: in one burst, they would cost more CPU
HANG_SLACK = 0.25  # seconds past its deadline that a probe has to report its own failure
LONGEST_STEP = 60.0  # seconds: a step of the marker that takes longer is reported as hanging
LONGEST_SILENCE = 300.0  # seconds that a check may go without a result, in addition to its period


class Record:
    """One check, and what is known of it. Only main changes it."""

    def __init__(self, check, inbox, due):
        self.check = check
        self.loop = CheckLoop(check, inbox, due)
        self.period = max(check.frequency, check.timeout)
        self.health = Health()
        self.reason, self.failed_at = "", None  # why it last failed, and when that was counted
        self.heard_at = due  # when a result was last counted; at first, when its loop starts
        self.has_remark = False  # whether a remark of its probes was logged
        self.is_faulty = False  # whether the last probe was spoiled by a fault of this program
        self.hung_start = 0.0  # the start of the last probe that was counted because it hung
        self.hung_due = 0.0  # when it counts once more, if it still hangs
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


class Monitor(Stepper):
    """What daemon and gate share: the records of the checks, and an act(now) each `frequency`."""

    def __init__(self, config, now, grace_end, due, signals):
        self.inbox, self.grace_end = deque(), grace_end
        self.signals = signals  # a socket: the number of each signal comes out of it
        self.next_act = now + config.frequency
        self.show_at = now  # when to show how everything stands, at the latest
        self.records = {}
        self.use(config, due)

    def use(self, config, due):
        """Use a configuration; a check that is equal to one before keeps its record."""
        before, self.records, self.config = self.records, {}, config
        for record in before.values():
            if record.check not in config.checks:
                record.loop.cancel()
        for number, check in enumerate(config.checks):
            record = before.get(check.name)
            if not record or record.check != check:
                record = Record(check, self.inbox, due + number * SPREAD)
            self.records[check.name] = record
        for warning in config.warnings:
            log.warning(warning)
        log.info(f"Watching {', '.join(self.records)}")

    def step(self, now):
        """Take what the inbox holds, and do what is due; returns when to come again."""
        while self.inbox:
            item = self.inbox.popleft()
            if isinstance(item, signal.Signals):
                self.take_signal(item, now)
            else:
                self.receive(item, now)
        wake = self.count_hung(now)
        if now >= self.next_act and self.status is None:
            self.act(now)
            self.next_act = next_due(self.next_act, self.config.frequency, now)
        return min(wake, self.next_act)

    def wait(self, seconds):
        with suppress(Exception):  # no signal came in this time, or there is no memory
            self.signals.settimeout(seconds)
            numbers = sorted(set(self.signals.recv(4096)))  # SIGHUP first: no reload after a stop
            self.inbox.extend(map(signal.Signals, numbers))

    def receive(self, result, now):
        loop, start, passed, text = result
        record = self.records.get(loop.check.name)
        if loop.finished.is_set() or start == record.hung_start:
            return  # a reload removed the check (and its record), or count_hung counted the probe
        if passed is not None:
            self.count(record, now, passed, text)
        elif not record.is_faulty:
            log.error(f"Not counted, a fault of this program: probe of {loop.check.name}: {text}")
        record.is_faulty = passed is None
        if passed and text and not record.has_remark:
            record.has_remark = True
            log.warning(f"Check {loop.check.name}: {text}")

    def count(self, record, now, passed, reason):
        """Count one result; log a change of state, and the first failure after a success."""
        check, before = record.check, record.health
        record.health = before.after(passed, check.threshold)
        record.heard_at = now
        if not passed:
            record.reason, record.failed_at = reason, now
        if record.health.state != before.state:
            self.show_at = now
            log.log(INFO if passed else WARNING, f"Check {record}")
        elif not passed and record.health.streak == 1:
            log.warning(f"Check {check.name} failed (1 of {check.threshold}): {reason}")

    def count_hung(self, now):
        """Count probes that hang in name resolution, once per period; returns when to come back."""
        wake = math.inf
        for record in self.records.values():
            start, timeout = record.loop.probing, record.check.timeout
            if start is None:
                continue
            due = record.hung_due if start == record.hung_start else start + timeout + HANG_SLACK
            if now >= due:  # once per step: a long pause of this process is one failure, not many
                record.hung_start, record.hung_due = start, now + record.period
                reason = f"no end after {timeout:g}s: it hangs, probably in name resolution"
                self.count(record, now, False, reason)
            else:
                wake = min(wake, due)
        return wake

    def verdict_now(self):
        return verdict_of(record.health.state for record in self.records.values())

    def evidence(self):
        """How the failing checks stand; if there are none, the unknown ones; else only a count."""
        records = self.records.values()
        for state in FAILING, UNKNOWN:
            found = [str(record) for record in records if record.health.state == state]
            if found:
                return "; ".join(found)
        return "1 check" if len(records) == 1 else f"{len(records)} checks"


class Daemon(Monitor):
    """Takes the verdict, reports it to the marker, and shows how everything stands."""

    def __init__(self, config, path, now, grace_end, signals, marker, writer, systemd):
        super().__init__(config, now, grace_end, due=grace_end, signals=signals)
        self.marker, self.writer, self.systemd = marker, writer, systemd
        self.path = path  # of the configuration
        self.directory = os.getenv("RUNTIME_DIRECTORY", "").split(":")[0]  # of status.json
        self.verdict = UNDECIDED
        self.report = marker.report  # as it was shown last
        self.last_why_not = self.why_not(now)  # so that a dry run does not log it

    def step(self, now):
        wake = super().step(now)
        if self.status is not None:
            return wake
        # The last verdict counts only for as long as the checks still say the same.
        agreed = self.verdict if self.verdict == self.verdict_now() else UNDECIDED
        self.marker.findings = Findings(self.config, agreed, self.evidence())
        if now >= self.show_at or self.marker.report is not self.report:
            self.show(now)
        if self.is_well(now):
            self.systemd.notify("WATCHDOG=1")
        return wake

    def act(self, now):
        before, self.verdict = self.verdict, self.verdict_now()
        self.show_at = now
        if self.verdict != before:
            line = f"Verdict {self.verdict} (was {before}): {self.evidence()}"
            log.log(WARNING if self.verdict == UNHEALTHY else INFO, line)

    def take_signal(self, number, now):
        # No call starts during a stop, or while a reload reads a disk that may hang.
        self.marker.findings = self.marker.findings._replace(verdict=UNDECIDED)
        if number == signal.SIGHUP:
            self.reload(now)
            return
        self.status, words = 0, f"Stopped by {number.name}"
        log.info(words)
        if self.marker.report.marked and not self.marker.is_dry_run:
            words = how_to_take_back(self.marker.report.marked)
            log.warning(words)
        self.systemd.notify("STOPPING=1", f"STATUS={words}")

    def reload(self, now):
        """Read the configuration again; if it is bad, the old one stays."""
        # Changed checks start unknown; probes under way of the old ones are dropped. Equal checks
        # and their probes, a mark and the grace period stay. The verdict is taken again at once.
        if not os.path.isfile(self.path):  # standard input or a pipe can be read only once
            log.warning(f"SIGHUP ignored: the configuration, {self.path}, is not a file")
            return
        try:
            config = load_config(self.path)
        except Exception as error:
            reason = str(error) if isinstance(error, ConfigError) else describe(error)
            log.error(f"Configuration not reloaded, the old one stays: {reason}")
            return
        self.status = 1  # if `use` raises (no thread), this ends `run`; systemd starts us again
        self.use(config, max(now, self.grace_end))
        self.status, self.next_act = None, now
        log.info("Configuration reloaded; the grace period does not start again")

    def is_well(self, now):
        """Whether all threads live and all checks have results: then systemd's watchdog is fed."""
        # Unfed for 60 s, it restarts the daemon. A hanging marker would hang again: see `why_not`.
        for record in self.records.values():
            limit = record.heard_at + record.period + LONGEST_SILENCE
            if now > limit or not record.loop.is_alive():
                return False
        return self.marker.is_alive() and self.writer.thread.is_alive()

    def why_not(self, now):
        """Why a mark would not succeed; empty: it would; None: not known yet."""
        if self.marker.is_dry_run:
            return DRY_RUN
        if now > self.marker.began + LONGEST_STEP:
            return "the thread that marks hangs, probably on a disk or in name resolution"
        if self.marker.is_faulty:
            return "a fault of this program: see the log"
        return self.marker.report.instance.problem or self.marker.report.why_not

    def show(self, now):
        """Say how everything stands: in the log, to systemd in one line, and in status.json."""
        self.report, self.show_at = self.marker.report, now + 60.0
        why_not = self.why_not(now)
        if why_not not in (None, self.last_why_not):  # each change is logged
            line = NOT_READY + why_not if why_not else READY.format(self.report.instance)
            log.log(WARNING if why_not else INFO, line)
            self.last_why_not = why_not
        status = self.as_dict(now, why_not)
        # Send READY each time: more than one does no harm, and one may be lost.
        self.systemd.notify("READY=1", f"STATUS={status['summary']}")
        if self.directory:
            with suppress(OSError):
                replace_file(f"{self.directory}/status.json", json.dumps(status), 0o644)

    def as_dict(self, now, why_not):
        """The content of status.json; `written` and `failed_at` are of the monotonic clock."""
        state, checks = f"grace period, probing starts in {self.grace_end - now:.0f}s", {}
        if now >= self.grace_end:
            wait = f", next verdict in {max(0.0, self.next_act - now):.0f}s"
            wait = "" if self.verdict == self.verdict_now() else wait
            state = f"{self.verdict}{wait}: {self.evidence()}"
        for name, record in self.records.items():
            checks[name] = {**record.health._asdict(), "threshold": record.check.threshold}
            checks[name].update(reason=record.reason, failed_at=record.failed_at)
            checks[name].update(endpoint=str(record.check.endpoint))
        return {
            **self.report._asdict(),  # wanted, hold, calls, last_call; the others are replaced
            "version": __version__,
            "written": now,
            "instance": self.report.instance.id,
            "phase": "grace" if now < self.grace_end else "watching",
            "verdict": self.verdict,
            "summary": summarize(state, why_not, self.report),
            "marked": bool(self.report.marked) and not self.marker.is_dry_run,
            "could_mark": None if why_not is None else not why_not,
            "why_not": why_not,
            "checks": checks,
        }


class Gate(Monitor):
    """-foreground: ends with 0 if the instance is healthy and with 1 if not; never calls AWS."""

    def __init__(self, config, now, grace_end, signals, is_early):
        super().__init__(config, now, grace_end, due=now, signals=signals)
        self.is_early = is_early  # end as soon as every check is healthy
        self.end = grace_end
        for record in self.records.values():  # by then, each can have `threshold` results
            length = record.check.threshold * record.period + record.check.timeout
            self.end = max(self.end, record.heard_at + length)

    def step(self, now):
        wake, verdict = super().step(now), self.verdict_now()
        if self.status is None and (now >= self.end or (self.is_early and verdict == HEALTHY)):
            self.status, level = (0, INFO) if verdict == HEALTHY else (1, ERROR)
            log.log(level, f"Gate: {verdict}: {self.evidence()}")
        return min(wake, self.end)

    def act(self, now):
        checks = "; ".join(map(str, self.records.values()))
        log.info(f"{max(0.0, self.end - now):.0f}s left: {checks}")

    def take_signal(self, number, now):
        if number != signal.SIGHUP:
            self.status = 1
            log.error(f"Gate: stopped by {number.name} before the instance was found healthy")


# ---- Service commands ----------------------------------------------------------------------------
# install, remove, start, stop, status: what an operator does with the systemd service. Each is a
# process of its own: what it knows of the daemon, it knows from systemd and from files.

SERVICE = "healthchecker"
ORIGINAL = "ec2-local-healthchecker.service"  # the Go daemon's unit, and an alias of ours
INSTALLED = "/usr/local/bin/ec2_local_healthchecker.py"
UNIT_FILE = "/etc/systemd/system/healthchecker.service"
ENVIRONMENT_FILE = "/etc/sysconfig/healthchecker"
STATUS_FILE = "/run/healthchecker/status.json"
STATE_DIRECTORY = "/var/lib/healthchecker"
UNIT = """\
[Unit]
Description=EC2 local health checker
# Not after cloud-init, which may start this service from user data: they would wait forever.
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
# A bad file fails the reload. sh gets $OPTIONS as its arguments, and $$@ passes them on.
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
StateDirectory=healthchecker
# When memory runs out, the kernel ends it last: it is needed then. Its rehearsals go first.
OOMScoreAdjust=-1000
OOMPolicy=continue
LimitNOFILE=65536
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


def output_of(*command):
    """What a command prints; Refusal with its last line if it fails."""
    done = run(command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT)
    text = done.stdout.decode("utf-8", "replace")
    if done.returncode:
        lines = [line for line in text.split("\n") if line.strip() and not line.startswith("See ")]
        raise Refusal(f"{' '.join(command[:2])}: {' '.join(lines[-1:])}")
    return text


def properties():
    """The properties of the service, as systemctl shows them."""
    lines = output_of("systemctl", "show", "--all", SERVICE).splitlines()
    return dict(line.partition("=")[::2] for line in lines)


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
    say(f"Next: write {DEFAULT_FILE} if it is not there; systemctl restart {SERVICE}")


def require_own_unit():
    """Refusal with the cure if a unit of another program is in the way."""
    for unit in (ORIGINAL, f"{SERVICE}.service"):
        path = f"/etc/systemd/system/{unit}"
        cure = f"systemctl disable --now {unit}; rm {path}; systemctl daemon-reload"
        if os.path.realpath(path) == os.devnull:
            cure = f"systemctl unmask {unit}"
        if os.path.exists(path) and INSTALLED not in read_file(path):
            raise Refusal(f"{path} is masked, or another program's: run '{cure}', then try again")


def remove():
    """Stop and disable the service, and delete what install wrote, and its state."""
    import shutil

    require_own_unit()
    replace_file(UNIT_FILE, UNIT, 0o644)  # if it was deleted by hand, systemd needs it once more
    output_of("systemctl", "disable", "--now", SERVICE)
    print_mark()
    shutil.rmtree(os.path.realpath(STATE_DIRECTORY), ignore_errors=True)
    for path in (UNIT_FILE, INSTALLED, STATE_DIRECTORY):  # with DynamicUser=, the last is a link
        with suppress(FileNotFoundError):
            os.unlink(path)
    output_of("systemctl", "daemon-reload")
    say(f"{SERVICE} is removed; the configuration and the logs are still there")


def control(action):
    """Have systemd start or stop the service."""
    try:
        output_of("systemctl", action, SERVICE)
    except Refusal as error:
        raise Refusal(f"{error} {properties()['StatusText']}") from None
    if action == "stop":
        print_mark()


def print_mark():
    """Say so if a mark of this program may stand, where nobody is left to take it back."""
    if marked := read_file(f"{STATE_DIRECTORY}/marked"):
        say(how_to_take_back(marked))


def print_status():
    """Print how the service and each check stand; returns the exit status."""
    state = properties()
    is_running = state["MainPID"] not in ("", "0")
    since = state["ActiveEnterTimestamp" if is_running else "InactiveEnterTimestamp"]
    service = (
        f"{SERVICE}: {state['ActiveState']} ({state['SubState']}){since and ' since ' + since}, "
        f"{state['UnitFileState'] or 'not installed'}, restarts: {state['NRestarts']}"
    )
    if not is_running:
        words = state["StatusText"]  # the last that the program said of itself, if anything
        say(f"{service}\nits last words: {words}" if words else service)
        if "set-instance-health" not in words:  # else they have just said so
            print_mark()
        return 3
    try:
        status = json.loads(read_file(STATUS_FILE))
        say("\n".join(status_lines(status, service, monotonic())))
    except Exception:
        say(f"{service}\n{STATUS_FILE} is not there (yet), or not of this version")
        return 0
    return 4 if status["could_mark"] is False else 0


def status_lines(status, service, now):
    """Yields the lines for the content of status.json; `now` is of the monotonic clock."""
    checks, call, age = status["checks"], status["last_call"], now - status["written"]
    if age > 120:
        yield f"{STATUS_FILE} is {age:.0f}s old: is /run full? Then, it said:"
    yield status["summary"]
    yield service
    width = max(map(len, ["CHECK", *checks]))
    yield f"{'CHECK':{width}}  STATE    IN A ROW                ENDPOINT"
    for name, check in checks.items():
        result = "passed" if check["passed"] else "failed"
        streak = f"{result} {check['streak']} (threshold {check['threshold']})"
        yield f"{name:{width}}  {check['state']:7}  {streak:22}  {check['endpoint']}"
        if check["reason"]:
            yield f"  last failure {now - check['failed_at']:.0f}s ago: {check['reason']}"
    if status["marked"]:
        yield "a mark of its own may stand"
    if call:
        result = "it failed" if call["error"] else "it succeeded"
        yield f"last call: {call['status']}, {time.time() - call['time']:.0f}s ago: {result}"


COMMANDS = {"install": install, "remove": remove, "status": print_status}
COMMANDS.update(start=partial(control, "start"), stop=partial(control, "stop"))


# ---- Command line --------------------------------------------------------------------------------
# Options in, exit status out. Go's flag rules, because these flags are in units and user data.

SYNOPSIS = """\
usage: ec2_local_healthchecker.py [OPTION]...

Probe the services on this EC2 instance; when one keeps failing, mark the
instance unhealthy in its Auto Scaling group, so that the group replaces it.

  -healthcheckfile FILE      the configuration; - is standard input; default
                             /etc/sysconfig/ec2-local-healthchecker.yml
  -testconfig                print the effective configuration as JSON
  -rehearse                  try all that a mark takes, and change nothing
  -foreground                a gate: probe, then exit 0 healthy or 1 not; no AWS
  -fg-exit-early-if-healthy  of the gate: 0 as soon as every check is healthy
  -launchtime EPOCH          when the server was launched, in seconds since 1970
  -dry-run                   log what would be marked; no AWS, no boto3
  -verbose                   also log every probe
  -command ACTION            install, remove, start or stop the systemd service,
                             or print its status and that of every check
  -version, -h, -help        print the version, or this text

Exit status: 0 done, or a daemon stopped by a signal; 1 not healthy, or failed;
2 a mistake in usage or configuration; -command status: 3 not running, 4 a mark
would not succeed."""
OPTION = re.compile("(?s)--?([^-=][^=]*)(?:=(.*))?|.*")  # name and value; .* is for what is none
SWITCHES = "testconfig rehearse foreground fg-exit-early-if-healthy dry-run verbose version h help"
OPTIONS = dict.fromkeys(SWITCHES.split(), False)  # all of them, with their defaults
OPTIONS.update(healthcheckfile=DEFAULT_FILE, launchtime="-1", command="")


def parse_command_line(arguments):
    """The value of every option; UsageError for the first mistake."""
    options, rest = dict(OPTIONS), list(arguments)
    while rest and rest != ["--"]:  # a last -- ends the options
        argument = rest.pop(0)
        name, value = OPTION.fullmatch(argument).groups()
        if name not in OPTIONS:
            advice = nearest(argument, [f"-{option}" for option in OPTIONS])
            raise UsageError(f"{quoted(argument)} is not an option (-h lists them): {advice}")
        if OPTIONS[name] is False:
            value = True if value is None else BOOLEANS.get(value.lower())
        elif value is None and rest:
            value = rest.pop(0)
        if value in (None, ""):
            raise UsageError(f"the value of -{name} is missing or wrong: -h shows what it takes")
        options[name] = value
    return options


def check_options(options):
    """UsageError if these do not go together, Refusal if they need root."""
    command = options["command"]
    if command and (command not in COMMANDS or options != {**OPTIONS, "command": command}):
        advice = f"and goes alone: the options of the service are in {ENVIRONMENT_FILE}"
        raise UsageError(f"-command takes one of {', '.join(COMMANDS)}, {advice}")
    if options["fg-exit-early-if-healthy"] and not options["foreground"]:
        raise UsageError("-fg-exit-early-if-healthy goes with -foreground: it is for a gate")
    if not re.fullmatch("-1|[0-9]{1,15}", options["launchtime"]):
        raise UsageError("-launchtime takes seconds since 1970, like $(date +%s)")
    if command not in ("", "status") and os.geteuid() != 0:
        raise Refusal(f"-command {command} needs root: run it with sudo")
    if options["foreground"] and os.getenv("WATCHDOG_PID") == str(os.getpid()):
        raise UsageError(f"-foreground is not for a service: remove it from {ENVIRONMENT_FILE}")


def main(argv=None) -> int:
    """Run the program with these arguments, or the process's own; returns the exit status."""
    if None in (sys.stdin, sys.stdout, sys.stderr):  # else a socket becomes descriptor 0, 1 or 2
        while os.open(os.devnull, os.O_RDWR) < 2:
            pass
    systemd = Systemd()
    try:
        return dispatch(parse_command_line(sys.argv[1:] if argv is None else argv), systemd) or 0
    except Exception as error:
        line = str(error) if hasattr(error, "status") else describe(error)
        systemd.journal(ERROR, line)
        systemd.notify(f"STATUS={line}")
        complain(systemd, "ERROR", line if isinstance(error, ConfigError) else f"{PROGRAM}: {line}")
        return getattr(error, "status", 1)  # without one, it is a fault of this program


def complain(systemd, level, line):
    """Write a line to stderr; if systemd has started us, in the format of the log."""
    if systemd.is_service:
        line = FORMATTER.format(logging.makeLogRecord({"levelname": level, "msg": line}))
    say(line, file=sys.stderr)


def dispatch(options, systemd):
    """Do what the options ask for; returns the exit status, or None for 0."""
    if options["h"] or options["help"] or options["version"]:
        return say(f"{PROGRAM} {__version__}" if options["version"] else SYNOPSIS)
    check_options(options)
    if options["command"]:
        if not os.path.isdir("/run/systemd/system"):  # sd_booted(3)
            raise Refusal("systemd does not run here: run this where it has booted the machine")
        return COMMANDS[options["command"]]()
    warnings.simplefilter("ignore")  # boto3's remarks on old Pythons are not for the log
    if options["rehearse"]:
        prepare_environment()
        instance, why_not = rehearse()
        say(why_not or READY.format(instance))
        return int(bool(why_not))
    config = load_config(options["healthcheckfile"])
    if options["testconfig"]:
        for warning in config.warnings:
            complain(systemd, "WARNING", warning)
        return say(json.dumps(config.as_dict(), indent=2))
    return run_service(options, config, systemd)


def run_service(options, config, systemd):
    """Run the daemon or the gate until it is time to end; returns the exit status."""
    is_gate, is_dry_run = options["foreground"], options["dry-run"]
    if not is_gate and not is_dry_run and not importlib.util.find_spec("boto3"):
        raise Refusal(f"boto3 is not installed: {INSTALL_BOTO3}")
    signals, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP:
        signal.signal(number, lambda *_: None)  # its number goes to `wakeup`
    state = os.getenv("STATE_DIRECTORY")
    writer = Writer(systemd, "" if is_gate or is_dry_run or not state else f"{state}/marked")
    log.setLevel(DEBUG if options["verbose"] else INFO)
    threading.excepthook = lambda args: log.error(f"A thread ended: {describe(args.exc_value)}")
    now, launched = monotonic(), int(options["launchtime"])
    grace = grace_left(config.graceperiod, time.time() - launched if launched >= 0 else 0.0)
    mode = f", {DRY_RUN}" if is_dry_run else ""
    log.info(f"{PROGRAM} {__version__}{mode}, grace period: {grace:g}s")
    if is_gate:
        monitor = Gate(config, now, now + grace, signals, options["fg-exit-early-if-healthy"])
    else:
        prepare_environment()
        isolation = ["-I"] if sys.flags.isolated else []
        # co_filename: the .py, though the unit runs a .pyc, which an upgraded Python may not read.
        command = [sys.executable, *isolation, main.__code__.co_filename, "-rehearse"]
        rehearsal = Rehearsal([] if is_dry_run else command)
        marker = Marker(config, rehearsal, writer, read_file(writer.mark_file))
        marker.start()
        path = options["healthcheckfile"]
        monitor = Daemon(config, path, now, now + grace, signals, marker, writer, systemd)
    status = monitor.run()
    writer.finish()
    return status


if __name__ == "__main__":
    os._exit(main())  # not sys.exit(): a thread that hangs is not waited for
