# /// script
# requires-python = ">=3.8"
# dependencies = [
#     "boto3", "moto", "flask", "flask-cors", "pytest", "pytest-xdist", "hypothesis", "pyyaml",
#     "trustme",
# ]
# ///
"""Every test of ec2_local_healthchecker, in the order of its rooms.

Where time can be passed in, no test sleeps; where the real thing is the point, it is used: nginx
and memcached, PyYAML, boto3 against moto's server, namespaces and the freezer of Linux (root). A
test that waits, waits for a condition, with a limit that only a broken program reaches.
"""

import ast
import collections
import contextlib
import datetime
import errno
import fractions
import hashlib
import http.client
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
import socketserver
import ssl
import struct
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
import types
import urllib.parse

import hypothesis
import pytest
import trustme
import yaml
from hypothesis import stateful, strategies as st
from hypothesis.stateful import initialize, rule

import ec2_local_healthchecker as hc

HERE = pathlib.Path(hc.__file__).resolve().parent
PROGRAM = HERE / "ec2_local_healthchecker.py"
README = (HERE / "README.md").read_text()
PATIENCE = 60  # seconds: more than any machine needs
# Seconds: less than anything that it must not wait for, and more than a starved machine needs.
PROMPTLY = pytest.approx(0, abs=15)
EXAMPLES = int(os.environ.get("EXAMPLES", "1500"))  # for each law
hypothesis.settings.register_profile(
    "laws", max_examples=EXAMPLES, deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("laws")


# ---- Doubles -------------------------------------------------------------------------------------

WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
PORTS = itertools.cycle(range(10000 + 1000 * WORKER, 11000 + 1000 * WORKER))
OK = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
LO, IP, SITE = "localhost", "127.0.0.1", "www.example.com"
AUTHORITY = trustme.CA()
DEAD = {"endpoint": "http://127.0.0.1:1/", "frequency": "100ms", "threshold": "3"}  # nobody listens
STOPPED = (0, PROMPTLY)
STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z "
CAPTURED = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def wait_until(condition, what="the condition"):
    """The first true value of condition()."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"waited {PATIENCE}s in vain for {what}")


def in_namespace(script):
    """What a shell script prints in a network of its own, in which nothing is up."""
    command = ["unshare", "--net", "--mount", "bash", "-c", script]
    return subprocess.run(command, stdout=subprocess.PIPE, timeout=2 * PATIENCE, text=True)


def listens(port):
    with socket.socket() as sock:
        return not sock.connect_ex(("127.0.0.1", port))


def free_port():
    """A port that stays free until it is used: the kernel takes none of PORTS for others."""
    for port in PORTS:
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
            return port


class Service:
    """A real service from Debian on loopback, that can be killed and started again."""

    def __init__(self, command, port):
        self.command, self.port = command, port
        self.start()
        wait_until(lambda: listens(port), command[0])

    def start(self):
        # A session of its own, so that a signal reaches its workers too.
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(self.command, start_new_session=True, **silent)

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def nginx(tmp_path, request):
    """nginx with a page of 1 MiB, on its port `secure` with TLS, and its log of errors."""
    (tmp_path / "page").write_bytes(b"x" * 2**20)
    AUTHORITY.issue_cert(IP).private_key_and_cert_chain_pem.write_to_path(f"{tmp_path}/cert.pem")
    port, secure = free_port(), free_port()
    (tmp_path / "nginx.conf").write_text(f"""
        user root; daemon off; pid pid; error_log error.log info; events {{}}
        http {{ server {{
            listen 127.0.0.1:{port} sndbuf=4k; listen 127.0.0.1:{secure} ssl sndbuf=4k;
            ssl_certificate cert.pem; ssl_certificate_key cert.pem;
            access_log off; root {tmp_path};
        }} }}""")
    command = ["nginx", "-p", str(tmp_path), "-c", "nginx.conf", "-e", "error.log"]
    service = Service(command, port)
    service.secure, service.log = secure, tmp_path / "error.log"
    yield service
    service.kill()


def redirect(location, status=302):
    return f"HTTP/1.1 {status} Moved\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n"


class Server(socketserver.ThreadingTCPServer):
    """A service on loopback. It reads each request and sends the next of these answers, the last
    one again and again; or it has `talk(connection)` with each client."""

    request_queue_size = 64

    def __init__(self, *answers, talk=None, host="127.0.0.1", tls=None):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, 0), None)
        self.port = self.server_address[1]
        self.answers, self.talk, self.tls = collections.deque(answers), talk or self.answer, tls
        self.requests, self.names, self.errors = [], [], []
        if tls:
            tls.sni_callback = lambda sock, name, context: self.names.append(name)
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    def finish_request(self, client, address):
        client.settimeout(PATIENCE)
        if self.tls:
            client = self.tls.wrap_socket(client, True, suppress_ragged_eofs=False)
        with client:
            self.talk(client)

    def handle_error(self, client, address):
        self.errors.append(sys.exc_info()[1])

    def answer(self, connection):
        self.requests.append(connection.recv(4096).decode("latin-1"))
        answer = self.answers.popleft() if len(self.answers) > 1 else self.answers[0]
        connection.sendall(answer.encode("latin-1"))

    def stop(self):
        self.shutdown()
        self.server_close()  # when every client has been served


def sending(*data, drip=b"", pause=0.0):
    """A talk that reads a request, sends this, then drip after drip, and waits for the end."""

    def talk(connection):
        connection.recv(4096)
        time.sleep(pause)
        connection.sendall(b"".join(data))
        end = time.monotonic() + PATIENCE
        while drip and time.monotonic() < end:
            connection.sendall(drip)
            time.sleep(0.02)
        connection.recv(1)

    return talk


@pytest.fixture
def serve(request):
    """Starts servers, which end with the test."""

    def start(*answers, **options):
        server = Server(*answers, **options)
        request.addfinalizer(server.stop)
        return server

    return start


@pytest.fixture
def trusted(tmp_path, monkeypatch):
    """Has AUTHORITY trusted."""
    AUTHORITY.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))


def certified(*names, authority=AUTHORITY, **options):
    """The context of a server that has a certificate with these names."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.certificate = authority.issue_cert(*names, **options)
    context.certificate.configure_cert(context)
    return context


@pytest.fixture
def resolve(monkeypatch):
    """Has every name resolve to these addresses (host, port)."""

    def resolve_to(*addresses):
        families = {False: socket.AF_INET, True: socket.AF_INET6}
        rows = [(families[":" in to[0]], 1, 6, "", to) for to in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: list(rows))

    return resolve_to


@pytest.fixture
def deaf(request):
    """Starts listeners whose queues are full: they answer no more than a dead machine would."""

    def start(*address):
        for sock in [socket.create_server(address, backlog=0), *(socket.socket() for _ in "123")]:
            request.addfinalizer(sock.close)
            sock.setblocking(False)
            sock.connect_ex(address)  # the listener refuses that
        return address

    return start


def configured(text):
    return hc.Config.from_text(text, "f.yml")


def check_of(lines):
    return configured("checks:\n  web:\n" + textwrap.indent(lines, "    ")).checks[0]


def http_check(server, lines="", host="127.0.0.1", path="/", scheme="http", timeout="40s"):
    port = getattr(server, "port", server)
    return check_of(f"endpoint: '{scheme}://{host}:{port}{path}'\ntimeout: {timeout}\n" + lines)


def tcp_check(endpoint, timeout="40s"):
    return check_of(f"type: tcp\nendpoint: '{endpoint}'\ntimeout: {timeout}\n")


def yaml_of(checks, **top):
    rows = [f"{key}: {value}" for key, value in top.items()] + ["checks:"]
    for name, keys in checks.items():
        rows += [f"  {name}:"] + [f"    {key}: '{value}'" for key, value in keys.items()]
    return "\n".join(rows) + "\n"


class Double(http.server.BaseHTTPRequestHandler):
    """What the doubles of AWS share: each request goes to the `owner`, which may have a `fault`.

    A fault gets each request first; it may answer it (then it returns true), delay it or break it.
    """

    owner = None

    @classmethod
    def serve(cls, owner):
        handler = type("Handler", (cls,), {"owner": owner})
        owner.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        owner.server.handle_error, owner.fault = print, None  # a client that left: no traceback
        owner.url = f"http://127.0.0.1:{owner.server.server_port}"
        threading.Thread(target=owner.server.serve_forever, args=[0.05], daemon=True).start()

    def log_message(self, *args):
        pass

    def answer(self, text, status=200, **fields):
        self.send_response(status)
        for name, value in {**fields, "Content-Length": len(text)}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(text.encode())
        return True

    def refuse(self, status, code, text):
        kind = "Sender" if status < 500 else "Receiver"
        error = f"<Error><Type>{kind}</Type><Code>{code}</Code><Message>{text}</Message></Error>"
        namespace = "http://autoscaling.amazonaws.com/doc/2011-01-01/"
        body = f'<ErrorResponse xmlns="{namespace}">{error}<RequestId>r</RequestId></ErrorResponse>'
        return self.answer(body, status, Content_Type="text/xml", x_amzn_RequestId="r")


class Metadata:
    """Instance metadata (IMDSv2) on loopback; `items` may be changed at any time."""

    STATE, ROLE = "autoscaling/target-lifecycle-state", "iam/security-credentials/"

    def __init__(self, instance="i-0123456789abcdef0"):
        credentials = {"Code": "Success", "AccessKeyId": "A", "SecretAccessKey": "S", "Token": "T"}
        end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=6)
        credentials["Expiration"] = end.strftime("%Y-%m-%dT%H:%M:%SZ")
        self.items = {"instance-id": instance, "placement/region": "eu-west-1"}
        self.items.update({self.STATE: "InService", self.ROLE: "role"})
        self.items[self.ROLE + "role"] = json.dumps(credentials)
        self.requests = []
        MetadataHandler.serve(self)


class MetadataHandler(Double):
    def do_GET(self):
        self.owner.requests.append((self.command, self.path))
        if self.owner.fault and self.owner.fault(self):
            return
        if self.command == "PUT" and self.path == "/latest/api/token":
            ttl = int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"])
            self.answer("TOKEN==", 200 if 1 <= ttl <= 21600 else 400)
        elif self.headers.get("X-aws-ec2-metadata-token") != "TOKEN==":
            self.answer("", 401)
        else:
            text = self.owner.items.get(self.path.replace("/latest/meta-data/", "", 1))
            self.answer(text or "Not Found", 404 if text is None else 200)

    do_PUT = do_GET


class Gateway:
    """Auto Scaling's API as the program sees it: a recorder that answers as AWS does.

    Calls that AWS accepts go on to moto; without moto, each is just accepted.
    """

    def __init__(self, moto):
        self.moto = moto
        self.calls, self.rehearsals = [], []  # (time, HealthStatus), times
        self.busy, self.most_at_once = set(), 0
        self.clock = 0  # seconds that it is ahead
        GatewayHandler.serve(self)

    def marks(self, status="Unhealthy"):
        return [when for when, wanted in list(self.calls) if wanted == status]


class GatewayHandler(Double):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        fields, gateway = dict(urllib.parse.parse_qsl(body)), self.owner
        assert fields["Action"] == "SetInstanceHealth"
        if fields["HealthStatus"] == "Rehearsal":
            gateway.rehearsals.append(time.monotonic())
        else:
            gateway.calls.append((time.monotonic(), fields["HealthStatus"]))
        gateway.busy.add(self)
        gateway.most_at_once = max(gateway.most_at_once, len(gateway.busy))
        try:
            if not gateway.fault or not gateway.fault(self):
                self.answer_as_aws(body, fields, gateway.moto)
        finally:
            gateway.busy.discard(self)

    def answer_as_aws(self, body, fields, moto):
        credential = re.search(r"Credential=(\w+)/\d+/([\w-]+)/", self.headers["Authorization"])
        key, region = credential.groups()
        made = datetime.datetime.strptime(self.headers["X-Amz-Date"] + "+0000", "%Y%m%dT%H%M%SZ%z")
        if key != "A":
            return self.refuse(403, "InvalidClientTokenId", "The security token is invalid.")
        if self.headers["X-Amz-Security-Token"] == "EXPIRED":
            return self.refuse(403, "ExpiredToken", "The security token is expired")
        if abs(made.timestamp() - time.time() - self.owner.clock) > 300:
            return self.refuse(403, "SignatureDoesNotMatch", "Signature expired: it is now earlier")
        if moto and (region != "eu-west-1" or fields["InstanceId"] not in moto.instances()):
            return self.refuse(400, "ValidationError", "No managed instance found for instance ID")
        if fields["HealthStatus"] not in ("Healthy", "Unhealthy"):
            text = "Valid instance health states are: [Healthy, Unhealthy]."
            return self.refuse(400, "ValidationError", text)
        if not moto:
            return self.answer("<a/>", x_amzn_RequestId="r")
        return self.forward(body, moto.url)

    def forward(self, body, url):
        upstream = http.client.HTTPConnection(url.split("//")[1], timeout=PATIENCE)
        with contextlib.closing(upstream):
            upstream.request("POST", self.path, body, dict(self.headers))
            response = upstream.getresponse()
            text = response.read().decode()
            self.owner.busy.discard(self)  # before the next call can come
            fields = {"Content_Type": response.getheader("Content-Type"), "x_amzn_RequestId": "r"}
            self.answer(text, response.status, **fields)


MARKED = '<SetInstanceHealthResponse xmlns="http://autoscaling.amazonaws.com/doc/2011-01-01/"/>'
MARKED = f"x-amzn-RequestId: r\r\nContent-Length: {len(MARKED)}\r\n\r\n{MARKED}"
MARKED = OK.replace("Content-Length: 2\r\n\r\nok", MARKED)


class Moto:
    """moto's server as Auto Scaling, with a group of two instances."""

    def __init__(self, folder):
        import boto3

        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        with open(folder / "moto.log", "w") as output:
            self.server = subprocess.Popen(command, stdout=output, stderr=output)
        wait_until(lambda: self.server.poll() is not None or listens(port), "moto")
        options = {"region_name": "eu-west-1", "endpoint_url": self.url}
        options.update(aws_access_key_id="A", aws_secret_access_key="S")
        self.api, ec2 = boto3.client("autoscaling", **options), boto3.client("ec2", **options)
        config = {"LaunchConfigurationName": "config", "InstanceType": "t3.nano"}
        config["ImageId"] = ec2.describe_images()["Images"][0]["ImageId"]
        self.api.create_launch_configuration(**config)
        group = {"AutoScalingGroupName": "group", "LaunchConfigurationName": "config"}
        group.update(MinSize=0, MaxSize=9, DesiredCapacity=2, AvailabilityZones=["eu-west-1a"])
        self.api.create_auto_scaling_group(**group)

    def instances(self):
        groups = self.api.describe_auto_scaling_groups()["AutoScalingGroups"]
        return {row["InstanceId"]: row["HealthStatus"] for row in groups[0]["Instances"]}

    def stop(self):
        self.server.terminate()
        self.server.wait()


class Cloud:
    """What an instance has around it: metadata, Auto Scaling, and an id in the group."""

    def __init__(self, moto=None):
        self.moto, self.instance = moto, "i-0123456789abcdef0"
        if moto:
            self.instance, _ = moto.instances()
            moto.api.set_instance_health(InstanceId=self.instance, HealthStatus="Healthy")
        self.metadata, self.gateway = Metadata(self.instance), Gateway(moto)
        self.env = {
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"{self.metadata.url}/",  # (for old botocore)
            "AWS_ENDPOINT_URL_AUTO_SCALING": self.gateway.url,
            "AWS_METADATA_SERVICE_TIMEOUT": "20",  # the double shares a starved machine
        }

    def health(self):
        return self.moto.instances()[self.instance]

    def stop(self):
        for double in (self.metadata, self.gateway):
            double.server.shutdown()
            double.server.server_close()
        wait_until(lambda: not self.gateway.busy, "the last call, which may change the next test")


@pytest.fixture(scope="session")
def moto(tmp_path_factory):
    moto = Moto(tmp_path_factory.mktemp("moto"))
    yield moto
    moto.stop()


@pytest.fixture
def cloud(moto):
    cloud = Cloud(moto)
    yield cloud
    cloud.stop()


@pytest.fixture
def metadata(monkeypatch):
    for name in ("INSTANCE_ID", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    double = Metadata()
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"{double.url}/")
    yield double
    double.server.shutdown()
    double.server.server_close()


class Answer(Exception):
    """An error as botocore raises it for an answer of AWS, or of a proxy."""

    operation_name = "SetInstanceHealth"

    def __init__(self, code, text, status=400, headers=("x-amzn-requestid",)):
        call = "when calling the SetInstanceHealth operation"
        super().__init__(f"An error occurred ({code}) {call}: {text}")
        metadata = {"HTTPStatusCode": status, "HTTPHeaders": dict.fromkeys(headers, "r")}
        self.response = {"Error": {"Code": code}, "ResponseMetadata": metadata}


@contextlib.contextmanager
def service_manager(tmp_path, is_abstract=False):
    """A notify socket as systemd has one; yields (environment, messages with their times)."""
    messages, address = [], f"{'@' if is_abstract else ''}{tmp_path}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address.replace("@", "\0"))

        def listen():
            with contextlib.suppress(OSError):
                while True:
                    messages.append((time.monotonic(), manager.recv(65536).decode()))

        threading.Thread(target=listen, daemon=True).start()
        yield {"NOTIFY_SOCKET": address}, messages
        manager.shutdown(socket.SHUT_RDWR)


class Recorder:
    """Stands for a Systemd or a Writer where only what they are told matters."""

    def __init__(self):
        self.said, self.mark = [], None
        self.thread = threading.current_thread()  # (alive)

    def remember(self, mark):
        self.mark = mark

    def notify(self, *lines):
        self.said += lines

    def journal(self, level, text):
        self.said.append((level, text))


@contextlib.contextmanager
def writer(systemd=None, mark_file=""):
    """A Writer whose descriptors are pipes; yields it and what can be read from them."""
    before, hc.log.propagate = list(hc.log.handlers), False
    writer = hc.Writer(systemd or Recorder(), mark_file)
    try:
        yield writer
    finally:
        hc.log.handlers[:], hc.log.propagate = before, True


def full_pipe():
    """The ends of a pipe to which no byte can be written."""
    reader, end = os.pipe()
    os.set_blocking(end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(end, b"x" * 4096)
    os.set_blocking(end, True)
    return reader, end


@pytest.fixture
def logged(monkeypatch):
    """What is logged: (level name, line)."""
    lines = []
    hc.log.setLevel("INFO")

    def handle(record):
        lines.append((record.levelname, record.getMessage()))

    monkeypatch.setattr(hc.log, "handle", handle)
    return lines


def texts(logged, level=""):
    return [text for name, text in logged if level in name]


SIMPLE = """\
graceperiod: 0
frequency: 10s
checks:
  web:
    endpoint: http://localhost/
    frequency: 1s
    threshold: 3
"""


class FakeLoop:
    """A check loop that the test plays."""

    def __init__(self, check, inbox, due):
        self.check, self.due, self.probing, self.alive = check, due, None, True
        self.finished, self.starts = threading.Event(), itertools.count(1.0)

    def start(self):
        self.started = True

    def is_alive(self):
        return self.alive

    def cancel(self):
        self.alive = False
        self.finished.set()


class FakeRehearsal:
    """A rehearsal that the test plays: what one would say is in `why_not`; None: it goes on."""

    def __init__(self):
        self.command, self.child, self.due, self.why_not = ["-rehearse"], None, 0.0, ""
        self.starts = []

    def start(self, now):
        assert not self.child and now >= self.due
        self.child = "under way"
        self.starts.append(now)

    def poll(self, now):
        if self.child and self.why_not is not None:
            self.child, self.due = None, now + (60.0 if self.why_not else 86400.0)
            return self.why_not
        return None

    def kill(self):
        self.child = None


class World:
    """What lies outside: metadata and Auto Scaling, as the marker sees them."""

    meta = types.SimpleNamespace(endpoint_url="https://aws.example")

    def __init__(self):
        self.instance = hc.Instance("InService", "i-1", "eu-west-1")
        self.is_readable, self.clients, self.group, self.forgotten = True, 0, "Healthy", 0
        self.fate = None  # what a call raises, if it does
        self.before_call = None  # what happens while the credentials are fetched
        self.calls = []  # (status, whether it came to be)

    def read_metadata(self, before):
        return self.instance if self.is_readable else before._replace(unread="timed out")

    def autoscaling(self, instance, is_broken):
        self.clients += 1
        self.forgotten += is_broken
        if self.before_call:
            self.before_call()
        if isinstance(self.fate, ImportError):
            raise self.fate
        return self

    def set_instance_health(self, InstanceId, HealthStatus):
        metadata = getattr(self.fate, "response", {"ResponseMetadata": {"HTTPStatusCode": 599}})
        acted = not self.fate or 500 <= metadata["ResponseMetadata"]["HTTPStatusCode"]
        self.calls.append((HealthStatus, acted))
        if acted:
            self.group = HealthStatus
        if self.fate:
            raise self.fate
        return {"ResponseMetadata": {"HTTPHeaders": {"x-amzn-requestid": "r"}}}


class Rig:
    """A daemon (or a gate) and its marker: the test plays their threads, and moves their clock."""

    def __init__(
        self, text=SIMPLE, gate=None, marked="", instance=None, start=5.0, is_idle=False,
        dry_run=False,
    ):  # fmt: skip
        self.patch = pytest.MonkeyPatch()
        self.world, self.loops, self.now = World(), [], start
        self.world.instance = instance or self.world.instance
        self.patch.setattr(hc, "CheckLoop", self.new_loop)
        self.patch.setattr(hc, "read_metadata", self.world.read_metadata)
        self.patch.setattr(hc, "autoscaling", self.world.autoscaling)
        self.patch.setattr(hc.gc, "collect", lambda: 0)  # it takes long in a process full of tests
        self.config = configured(text)
        self.systemd, self.writer = Recorder(), Recorder()
        self.rehearsal = FakeRehearsal()
        self.rehearsal.command = [] if dry_run else self.rehearsal.command
        self.marker = hc.Marker(self.config, self.rehearsal, self.writer, marked)
        self.marker.is_alive, self.marker.clock = lambda: True, lambda: self.now
        grace_end = self.now + self.config.graceperiod
        if gate is not None:
            self.main = hc.Gate(self.config, self.now, grace_end, None, gate == "early")
        else:
            things = (None, self.marker, self.writer, self.systemd)
            self.main = hc.Daemon(self.config, "-", self.now, grace_end, *things)
        self.is_gate, self.inbox = gate is not None, self.main.inbox
        if not is_idle:
            self.step()

    def new_loop(self, check, inbox, due):
        self.loops.append(FakeLoop(check, inbox, due))
        return self.loops[-1]

    def status(self, now=None):
        """What status.json says."""
        now = now or self.now
        return self.main.as_dict(now, self.main.why_not(now))

    def loop(self, name="web"):
        return self.main.records[name].loop

    def step(self, seconds=0.0):
        """Let time pass: main and the marker step as they do, every second or sooner."""
        end = self.now + seconds
        while True:
            wake = self.main.step(self.now)
            if not self.is_gate:
                wake = min(wake, self.marker.step(self.now))
                self.main.step(self.now)
            if self.now >= end or self.main.status is not None:
                return
            self.now = min(end, max(self.now + 0.001, min(wake, self.now + hc.POLL_INTERVAL)))

    def probe(self, results, name="web", seconds=1.0):
        """One result after another (p passes, f fails, x is spoiled), `seconds` apart."""
        for result in results:
            loop, passed = self.loop(name), {"p": True, "f": False, "x": None}[result]
            self.inbox.append((loop, next(loop.starts), passed, "" if passed else "refused"))
            self.step(seconds)


@pytest.fixture
def rig():
    """Makes rigs, and takes back what they patch."""
    rigs = []

    def make(*arguments, **options):
        rigs.append(Rig(*arguments, **options))
        return rigs[-1]

    yield make
    for each in reversed(rigs):
        each.patch.undo()


def reloaded(rig, text, tmp_path):
    rig.main.path = str(tmp_path / "f.yml")
    (tmp_path / "f.yml").write_text(text)
    rig.inbox.append(signal.SIGHUP)
    rig.main.try_step(rig.now)


def text_of(top, checks):
    """A configuration from lines at its top and lines for each check."""
    lines = [*top, "checks:"]
    for name, keys in checks.items():
        lines += [f"  {name}:", "    endpoint: http://localhost/", *(f"    {key}" for key in keys)]
    return "\n".join(lines)


class Program:
    """The program running, with what it wrote so far."""

    def __init__(self, *arguments, stdin="", env=None, prefix=(), flags=(), program=PROGRAM):
        command = [*prefix, sys.executable, *flags, str(program), *arguments]
        env = {"PATH": os.environ["PATH"], **(env or {})}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        options = {"text": True, "env": env, "start_new_session": True}
        self.process = subprocess.Popen(command, **pipes, **options)
        self.process.stdin.write(stdin)
        self.process.stdin.close()
        self.out, self.err = [], []
        pairs = (self.process.stdout, self.out), (self.process.stderr, self.err)
        self.readers = [threading.Thread(target=self.read, args=pair) for pair in pairs]
        for reader in self.readers:
            reader.start()

    def read(self, stream, lines):
        for line in stream:
            lines.append(line.rstrip("\n"))

    @property
    def lines(self):
        return self.out + self.err

    def count(self, pattern):
        return sum(bool(re.search(pattern, line)) for line in self.lines)

    def wait_for(self, pattern, count=1):
        """The `count`th line that contains `pattern`, as soon as it is there."""

        def found():
            assert self.count(pattern) >= count or self.process.poll() is None, self.lines
            return [line for line in self.lines if re.search(pattern, line)][count - 1 : count]

        return wait_until(found, pattern)[0]

    def more(self, pattern, count):
        """Wait for `count` more lines."""
        self.wait_for(pattern, self.count(pattern) + count)

    def wait(self):
        status = self.process.wait(PATIENCE)
        for reader in self.readers:
            reader.join(PATIENCE)
        return status

    def stop(self, number=signal.SIGTERM):
        """End it by a signal; returns the exit status and the seconds that it took."""
        start = time.monotonic()
        self.process.send_signal(number)
        return self.wait(), time.monotonic() - start

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        # (The interpreter speaks for itself when it dies of a lack of memory.)
        crashes = (-signal.SIGSEGV, -signal.SIGABRT)
        assert "Traceback" not in "\n".join(self.lines) or self.process.returncode in crashes


def run(*arguments, **options):
    with Program(*arguments, **options) as program:
        program.wait()
    return program


def sick(cloud, *arguments, checks=None, top=None, env=None, **options):
    """The program where the service is dead (or with these checks), with times scaled down."""
    top = {"graceperiod": "0", "frequency": "300ms", **(top or {})}
    text = yaml_of(checks or {"web": DEAD}, **top)
    env = {**cloud.env, **(env or {})}
    return Program("-healthcheckfile=-", "-verbose", *arguments, stdin=text, env=env, **options)


@pytest.fixture
def passing_at_first(serve):
    """A service that passes: its check, and what makes it fail from then on."""
    server = serve(OK)
    web = {**DEAD, "endpoint": f"http://127.0.0.1:{server.port}/", "timeout": "20s"}
    return web, lambda: server.answers.extend(["HTTP/1.1 500 No\r\n\r\n"] * 2)


def marked(cloud):
    return wait_until(lambda: cloud.health() == "Unhealthy", "the mark")


def limit(program, *options):
    subprocess.run(["prlimit", "--pid", str(program.process.pid), *options], check=True)


# ---- Deciding ------------------------------------------------------------------------------------

STATES = {"u": "unknown", "H": "healthy", "F": "failing"}


@pytest.mark.parametrize("threshold, results, states", [
    (1, "f", "F"), (1, "pfp", "HFH"), (2, "pfpfpf", "uuuuuu"), (3, "fff", "uuF"),
    (3, "ffpfff", "uuuuuF"), (3, "ppp", "uuH"), (3, "pppffpffpfff", "uuHHHHHHHHHF"),
    (3, "fffppfppp", "uuFFFFFFH"), (4, "ffffpppfpppp", "uuuFFFFFFFFH"),
])  # fmt: skip
def test_only_threshold_equal_results_in_a_row_change_a_state(threshold, results, states):
    health, seen = hc.Health(), []
    for result in results:
        health = health.after(result == "p", threshold)
        seen.append(health.state)
        assert health.passed == (result == "p")
    assert seen == [STATES[letter] for letter in states]
    assert health.streak == len(re.search("(p+|f+)$", results)[0])


@pytest.mark.parametrize("states, verdict", [
    ("H", "healthy"), ("HH", "healthy"), ("F", "unhealthy"), ("HF", "unhealthy"),
    ("uF", "unhealthy"), ("uHF", "unhealthy"), ("u", "undecided"), ("uH", "undecided"),
])  # fmt: skip
def test_the_verdict_is_a_function_of_the_states(states, verdict):
    assert hc.verdict_of(STATES[letter] for letter in states) == verdict


LIFECYCLES = ["InService", None, "Standby", "Warmed:Running", "Terminated", "Detached", ""]
SITUATIONS = itertools.product(
    ["healthy", "unhealthy", "undecided"], [True, False], [True, False], ["", "no id"], LIFECYCLES,
    [0.0, 99.9, 100.0, 100.1], [100.0],
)  # fmt: skip


def test_every_combination_of_what_a_call_depends_on_keeps_rules_1_and_2():
    for situation in SITUATIONS:
        verdict, recovery, may_stand, problem, lifecycle, grace_end, now = situation
        call, hold = hc.decide(*situation)
        is_made = call is not None and not hold
        may_be_replaced = lifecycle in ("InService", None) and grace_end <= now
        # Rule 1: no call hurts an instance that is not unhealthy, is out of service, has just come
        # back, or is not this one.
        if is_made and call == "Unhealthy":
            assert verdict == "unhealthy" and may_be_replaced and not problem
        # A call saves an instance only from our own mark.
        if is_made and call == "Healthy":
            assert verdict == "healthy" and may_stand and recovery and not problem
        # Rule 2: nothing else keeps a call back, and what does is said.
        if verdict == "unhealthy" and may_be_replaced and not problem:
            assert is_made and call == "Unhealthy"
        if verdict == "healthy" and may_stand and recovery and not problem:
            assert is_made and call == "Healthy"
        if verdict == "unhealthy":
            assert call == "Unhealthy" and bool(hold) == (not is_made)
            is_said = is_made or problem or "lifecycle" in hold or "grace" in hold
            assert is_said and problem in hold
        if verdict == "undecided":
            assert (call, hold) == (None, "")


@pytest.mark.parametrize("readings, end", [
    # (verdict, lifecycle state, when a grace period would end that starts with this reading)
    ([("unhealthy", "InService", 1)], 0), ([("unhealthy", None, 1)], 0),
    ([("unhealthy", "Standby", 1), ("unhealthy", "InService", 2)], 2),
    ([("unhealthy", "Standby", 1), ("unhealthy", None, 2), ("unhealthy", "InService", 3)], 2),
    ([("unhealthy", "Standby", 1), ("undecided", "Pending", 2), ("undecided", "InService", 3)], 3),
    ([("undecided", "Standby", 1), ("unhealthy", "InService", 2)], 0),
    ([("healthy", "Standby", 1), ("unhealthy", "InService", 2)], 0),
    ([("unhealthy", "Standby", 1), ("healthy", "Standby", 2), ("unhealthy", "InService", 3)], 0),
    ([("unhealthy", "Standby", 1), ("unhealthy", "InService", 2), ("unhealthy", "Standby", 3),
      ("unhealthy", "InService", 4)], 4),
    ([("unhealthy", "Standby", 1), ("unhealthy", "InService", 2), ("healthy", "InService", 3)], 0),
])  # fmt: skip
def test_a_grace_period_follows_a_hold_until_a_verdict_is_healthy(readings, end):
    absence = hc.Absence()
    for reading in readings:
        absence = absence.after(*reading)
    assert absence.grace_end == end


@pytest.mark.parametrize("frequency, failed, seconds", [
    (10.0, False, [10, 20, 40, 80, 160, 300, 300]), (10.0, True, [10, 20, 40, 80, 160, 300, 300]),
    (60.0, False, [60, 120, 240, 300, 300]), (60.0, True, [10, 20, 40, 80, 160, 300, 300]),
    (2.0, True, [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]), (3600.0, False, [3600, 3600, 3600]),
    (3600.0, True, [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 3600, 3600]),
])  # fmt: skip
def test_calls_back_off_to_five_minutes_or_one_frequency(frequency, failed, seconds):
    middle = [hc.call_backoff(n + 1, frequency, failed, 0.5) for n in range(len(seconds))]
    assert middle == pytest.approx(seconds)
    assert hc.call_backoff(10**6, frequency, failed, 0.5) == pytest.approx(seconds[-1])
    jittered = [hc.call_backoff(1, frequency, failed, dice) for dice in (0.0, 1.0)]
    assert jittered == pytest.approx([0.8 * seconds[0], 1.2 * seconds[0]])


@pytest.mark.parametrize("age, left", [
    (0, 300), (100, 200), (299.5, 0.5), (300, 300), (10**9, 300), (-100, 300), (-(10**9), 300),
])  # fmt: skip
def test_grace_counts_from_the_launch_and_is_never_longer_than_its_period(age, left):
    assert hc.grace_left(300.0, age) == left


@pytest.mark.parametrize("now, due", [(9, 12), (11, 12), (12, 12), (12.1, 12), (14, 14), (99, 98)])
def test_times_keep_their_grid_and_of_those_missed_only_the_last_counts(now, due):
    assert hc.next_due(10.0, 2.0, now) == due


# ---- Durations and YAML --------------------------------------------------------------------------


@pytest.mark.parametrize("text, seconds", [
    # those of Go's own tests of time.ParseDuration that are of at most 24h
    ("0", 0), ("5s", 5), ("1478s", 1478), ("-5s", -5), ("+5s", 5), ("-0", 0), ("+0", 0),
    ("5.0s", 5), ("5.6s", 5.6), ("5.s", 5), (".5s", 0.5), ("1.00s", 1), ("1s1s", 2), ("00001s", 1),
    ("1.004s", 1.004), ("1.0040s", 1.004), ("100.00100s", 100.001), ("10ns", 1e-8), ("14s", 14),
    ("11us", 1.1e-5), ("12µs", 1.2e-5), ("12μs", 1.2e-5), ("13ms", 0.013), ("15m", 900),
    ("16h", 57600), ("3h30m", 12600), ("10.5s4m", 250.5), ("-2m3.4s", -123.4),
    ("1h2m3s4ms5us6ns", 3723.004005006), ("52763797000ns", 52.763797), ("24h", 86400),
    ("0.3333333333333333333h", 1200), ("0.100000000000000000000h", 360), ("-24h", -86400),
    ("0.830103483285477580700h", 2988.372539827719), ("86400000000000ns", 86400),
    ("1h0.0000000000000000000000000000000000001ns", 3600), ("23h59m60s", 86400),
])  # fmt: skip
def test_durations_have_the_values_of_go(text, seconds):
    assert hc.parse_duration(text) == pytest.approx(seconds, rel=0, abs=1e-9)


@pytest.mark.parametrize("said, texts", [
    ("is not a duration: write numbers with units, like 10s or 1h30m", [
        "", "-", "s", ".", "-.", ".s", "+.s", "1d", "1w", "1S", "1 s", " 1s", "1s ", "1s\n", "one",
        "1e3s", "0x1s", "--1s", "+-1s", "1,5s", "1..5s", "1.5.5s", "١s", "1٠s", "1sm", "NaN", "inf",
        "\x85\x85", "\xffff", "1.5", "-3"]),
    ("is not a duration: write 5s", ["5"]), ("is not a duration: write 300s", ["300"]),
    ("is too long: write at most 24h", [
        "24h1ns", "-24h1ns", "25h", "39h9m14.425s", "9223372036854775807ns", "3000000h",
        "9" * 10000 + "s", "1" * 5000 + "." + "1" * 5000 + "h"]),
])  # fmt: skip
def test_what_is_not_a_duration_or_is_over_a_day_is_refused(said, texts):
    for text in texts:
        error = str(pytest.raises(hc.ConfigError, hc.parse_duration, text).value)
        assert said in error and error.isprintable() and len(error) < 200


@hypothesis.given(st.text(st.sampled_from("0123456789.+-nuµmsh \n٣"), max_size=12))
def test_any_text_is_a_duration_of_go_or_a_configerror(text):
    part = r"([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|ms|s|m|h)"
    units = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9}
    units["h"] = 60 * units["m"]
    is_one = re.fullmatch(rf"[+-]?(0|({part})+)", text)
    parts = re.findall(part, text)
    total = sum(fractions.Fraction(number) * units[unit] for number, unit in parts) / 10**9
    try:
        value = hc.parse_duration(text)
    except hc.ConfigError:
        assert not is_one or total > 24 * 3600
    else:
        assert is_one and total <= 24 * 3600
        assert abs(value - (-total if text[0] == "-" else total)) <= 1e-9


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
ANSIBLE = yaml.dump(yaml.load(EXAMPLE, yaml.BaseLoader), default_flow_style=False, indent=4)
TERRAFORM = """\
"checks":
  "nginx":
    "endpoint": "http://localhost:80/ping.html?a=\\"b\\"\\u0026c=\\u003cd\\u003e"
    "headers":
      "Host": "www.example.com"
    "threshold": 4
"graceperiod": "10s"
"""
DOCUMENTS = [
    EXAMPLE, ANSIBLE, TERRAFORM, TERRAFORM.replace("\n", "\r\n"), "\ufeff" + ANSIBLE,
    "checks:\n  n:\n    e: 'x'\n    t: \"y\\n\"\n  m:\n    q: 1 # c\nz: -1\n",
    "---\n'a b': c\n\"k\\\"\" : ?x\n...\n",
    "--- # a\n\n'it''s' : '' # b\n  # c\nd:#e: f#g\nh:   # i\n   j: \"k\"\n... # l\n# m",
    "\ufeff  a: ''\r\n  b:\r\n      c: :d\r\n  e: -f\r\n",
    "a:\r  b: \"\\x41b\\u263ac\\U0001F600d\\N\\_\\L\\P\\e\\/\\ \"\r",
    "k" * 1024 + ": v\n",
]  # fmt: skip
FRAGMENTS = [
    "a", "key", "- ", "? ", ": ", ":", "#", " #", "'", '"', "''", "\\n", "\\x41", "\\u263a", "\\",
    "{", "}", "[", "]", ",", "&a", "*a", "!t", "|", ">", "%", "@", "`", "<<", "---", "...", "\n",
    "\n  ", "\n    ", "\r\n", "\r", "\t", " ", "  ", "é", "\xa0", "\ufeff", "\u2028", "\x85", "1",
    "~", "-", "?", "=", "a: b", "\n  a: b", "\nc: 'd'", '\ne: "f"', "\n# c", "\ufffe", "😀", "\x07",
    "\n--- ", "\n...\n", " : ", "a:\n", "\n", "\ud800", "\0", "\\ud800", "\\U00110000", "\\/",
]  # fmt: skip
OUTSIDE = "\n\x85\u2028\u2029\ufffd"


def parsed(text):
    """What the parser makes of a text, or None if it refuses it: and its law holds."""
    try:
        data, _ = hc.parse_yaml(text)
    except hc.ConfigError as error:
        line, _, problem = str(error).partition(": ")
        assert 1 <= int(line) <= len(re.split("\r\n|\r|\n", text)) and problem.isprintable()
        return None
    assert data == yaml.load(text, Loader=yaml.BaseLoader)
    return data


@st.composite
def mutated(draw, documents, inserts):
    """One of these documents, with a few places cut out or replaced."""
    text = draw(st.sampled_from(documents))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(inserts) + text[at + draw(st.integers(0, 4)) :]
    return text


@pytest.mark.parametrize("texts", [
    st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join),
    st.text(max_size=40), mutated(DOCUMENTS, st.sampled_from(FRAGMENTS)),
], ids=["fragments", "raw", "mutated"])  # fmt: skip
@hypothesis.given(data=st.data())
def test_the_law_of_the_parser(texts, data):
    parsed(data.draw(texts))


# What PyYAML writes as complex keys, on several lines, or as U+FFFD is outside of the subset.
values = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters=OUTSIDE))
values |= st.sampled_from([text for text in FRAGMENTS if not set(OUTSIDE + "\ud800") & set(text)])
keys = values.filter(lambda text: 0 < len(text) < 100 and text != "<<")
mappings = st.deferred(lambda: st.dictionaries(keys, values | mappings, min_size=1, max_size=3))


@hypothesis.given(
    mappings, st.sampled_from([None, "'", '"']), st.booleans(), st.integers(2, 8), st.booleans()
)
def test_what_pyyaml_writes_in_block_style_is_accepted(data, style, unicode, indent, is_marked):
    text = yaml.dump(
        data, default_flow_style=False, default_style=style, allow_unicode=unicode, indent=indent,
        explicit_start=is_marked, explicit_end=is_marked, width=10**6,
    )  # fmt: skip
    assert parsed(text) == data


def test_what_people_and_their_tools_write_is_accepted():
    assert all(map(parsed, DOCUMENTS))


def test_the_lines_of_the_key_paths_are_those_of_the_text_in_its_order():
    _, lines = hc.parse_yaml("# a comment\n\n---\na: 1\r\nb:\r  c:\n\n    d: x # y\n  e: 'z'\n")
    assert list(lines) == [("a",), ("b",), ("b", "c"), ("b", "c", "d"), ("b", "e")]
    assert list(lines.values()) == [4, 5, 6, 8, 9]


REFUSED = {  # by the name of what their last line has
    "a sequence": ["a:\n  - b", "- a", "a: - b", "a: -", "a:\n- b"],
    "a flow mapping: write each key on a line of its": ["a: {b: c}", "{a: b}", '{"a": 1}'],
    "a flow sequence: write the values without brackets, like 200,204": ["a: [200, 204]", "[a]"],
    "an anchor": ["a: &x b", "&x a: b"], "an alias": ["a: *x", "*x : b"], "a tag": ["a: !b", "!b"],
    "a block scalar": ["a: |", "a: >-"], "a complex key": ["? a"], "a merge key": ["a: b\n<<: c"],
    "a directive": ["%YAML 1.1"], "a reserved character": ["a: @b", "a: `b", ": a", "a: ]", "}: a"],
    "a second document": ["a: b\n---", "---\n---", "a: b\n...\nc: d", "a: b\n...\n..."],
    "text after --- or ...": ["--- a: b", "...x: b", "---a: b"],
    "a tab: write spaces, one after a colon": ["a:\n\tb: c", "a:\tb", "a: 'b\tc'", "a: b\t# c"],
    "a character U+FEFF: remove it": ["a: b\ufeff", "\ufeff\ufeffa: b", "a: b\n\ufeffc: d"],
    "a character U+0085": ["a: b\nc: \x85"], "a character U+2028": ["a: b\u2028"],
    "a character U+0000": ["# \0"], "U+D800": ["a: \ud800"], "U+007F": ["a: \x7f"],
    "a character U+FFFD: remove it, or save the file as UTF-8": ["a: \ufffd"],
    "quotes that do not end on this line: write it on one line (tools that fold": [
        "a: 'b", "a: 'b' c", "'a' b: c", "a: 'b'#c"],
    "or an unknown escape in them: write it on one line": [
        'a: "b', 'a: "b \\', 'a: "\\q"', 'a: "\\ud800"', 'a: "\\U00110000"', 'a: "\\x4"'],
    "if it is a value, write it on one line (tools that fold lines have a sett": ["a: b\n  c"],
    "the indentation fits no key": [
        "a: b\n  c: d", "a:\n    b: c\n  d: e", "a:\n    b:\n  c: d", "  a: b\nc: d", "  a:\nb: c"],
    "': ' in a value": ["a: b: c", "a: b:", "k" * 1025 + ": v"],
    "write 'key: value', with a space after the colon": ["a", "a:b", "a: b\nc d"],
    "'a' is already on line 1: keep one": ["a: b\nc: d\na: e", 'a: b\n"\\x61": c', "a: b\n'a': "],
    "empty: write at least 'checks:'": ["", "# nothing", "---", "..."],
}  # fmt: skip


@pytest.mark.parametrize("name, text", [(name, text) for name in REFUSED for text in REFUSED[name]])
def test_what_is_outside_of_the_subset_is_refused_by_name(name, text):
    error = str(pytest.raises(hc.ConfigError, hc.parse_yaml, text).value)
    assert error.startswith(str(text.count("\n") + 1) + ": ") and name in error
    assert parsed(text + "\n") is None


@pytest.fixture
def ten_seconds():
    """Ten seconds of CPU, which what is linear never needs: then the test fails."""
    before = signal.signal(signal.SIGVTALRM, lambda *_: pytest.fail("ten seconds of CPU are over"))
    signal.setitimer(signal.ITIMER_VIRTUAL, 10)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


@pytest.mark.parametrize("before, unit, after", [
    ("", "b: ", ""), ("--- ", " ", "x"), ("... ", " ", "x"), ("", " ", "a: b"), ("a", " ", "x"),
    ("a: b", " ", "x"), ("a: b", " ", "# c"), ("a: b", " #", ""), ("a: 'b'", " ", "x"),
    ('a: "b"', " ", "x"), ("'a'", " ", "x"), ("", '"', ""), ("", "'", ""), ("a: '", "'", "x"),
    ("", "\\", ""), ('a: "', "\\", ""), ('"', "\\", '" x'), ('a: "', "\\\\", '"'),
    ('a: "', "\\u0041", '" x'), ('a: "', "\\q", '"'), ("", "a:", ""), ("", "a: ", ""),
    ("a: ", "b:", ""), ("", ":", ""), ("", ": ", ""), ("", "\t", ""), ("a: b", "\t", "x"),
    ("", "#", ""), ("", "-", ""), ("a: ", "x", ""), ("a: '", "x", ""), ('a: "', "x", ""),
    ("a: ", "'' ", ""), ("a: ", '\'"', ""), ("", "a: b\n", ""), ("", "\ufeff", ""), ("", "1", "s"),
    ("0.", "3", "s"), ("", ".", ""), ("", "1m", ""), ("", "1ms", "x"), ("localhost:", "1", ""),
    ("", "/", "@"), ("http://", "a.", "!"), ("http://[", ":", "]"),
])  # fmt: skip
def test_every_reader_is_linear(before, unit, after, ten_seconds):
    for read in (hc.parse_yaml, hc.parse_duration, hc.Endpoint.from_text):
        with contextlib.suppress(hc.ConfigError):
            read(before + unit * 200_000 + after)


@pytest.mark.parametrize("last", ["x: y", "x: [y", "x"])
def test_no_depth_is_too_much_for_the_parser(last, ten_seconds):
    text = "\n".join(" " * depth + "a:" for depth in range(3000)) + "\n" + " " * 3000 + last
    if last == "x: y":
        assert hc.parse_yaml(text)[1][("a",) * 3000 + ("x",)] == 3001
    else:
        with pytest.raises(hc.ConfigError, match="^3001: "):
            hc.parse_yaml(text)


# ---- Configuration -------------------------------------------------------------------------------

ENDPOINT = "checks:\n  web:\n    endpoint: "
WEB = ENDPOINT + "http://localhost/\n"
TCP = "checks:\n  web:\n    type: tcp\n    endpoint: localhost:80\n"


def test_what_is_left_out_has_the_defaults_of_the_contract():
    config = configured(WEB)
    check = dict(type="http", endpoint="http://localhost:80/", timeout=1, threshold=3, frequency=10)
    check.update(status="200", headers={}, tls_verify=True)
    top = {"graceperiod": 300, "frequency": 10, "recovery": True}
    assert config.as_dict() == {**top, "checks": {"web": check}} and config.warnings == ()


def test_a_check_has_the_frequency_at_the_top_unless_it_has_its_own():
    text = TCP + WEB.replace("checks:\n  web", "  b") + "    frequency: 2s\nfrequency: 7s\n"
    assert [check.frequency for check in configured(text).checks] == [7, 2]


def test_the_values_of_headers_are_shown_to_nobody():
    config = configured(WEB + "    headers:\n      x-token: s3cret\n      X: s3cret\n")
    assert config.checks[0].headers == {"X-Token": "s3cret", "X": "s3cret"}
    assert config.as_dict()["checks"]["web"]["headers"] == {"X-Token": "***", "X": "***"}


@pytest.mark.parametrize("kind, text, host, port, shown", [
    ("http", "http://localhost", "localhost", 80, "http://localhost:80/"),
    ("HTTP", "HTTPS://Example.COM?a=b#c", "example.com", 443, "https://example.com:443/?***"),
    ("https", "http://[::1]:81/a%20b?c=d/e?f", "::1", 81, "http://[::1]:81/a%20b?***"),
    ("Https", "http://127.1/", "127.1", 80, "http://127.1:80/"),
    ("http", "http://a_.:1/a@b", "a_.", 1, "http://a_.:1/a@b"), ("tcp", "a:ssh", "a", 22, "a:22"),
    ("http", "http://a://b//c?", "a", 80, "http://a:80//b//c"),
    ("TCP", "[::FFFF:1.2.3.4]:65535", "::ffff:1.2.3.4", 65535, "[::ffff:1.2.3.4]:65535"),
    ("Tcp", ":8", "localhost", 8, "localhost:8"),
])  # fmt: skip
def test_endpoints(kind, text, host, port, shown):
    check = check_of(f"type: {kind}\nendpoint: '{text}'")
    assert check.type == kind.lower().replace("https", "http")
    assert check.endpoint[1:3] == (host, port) and str(check.endpoint) == shown


@pytest.mark.parametrize("key, text, value", [
    ("recovery", "Yes", True), ("recovery", "on", True), ("recovery", "FALSE", False),
    ("recovery", "off", False), ("graceperiod", "0", 0), ("graceperiod", "24h", 86400),
])  # fmt: skip
def test_values(key, text, value):
    assert getattr(configured(f"{key}: {text}\n{WEB}"), key) == value


@pytest.mark.parametrize("host, warns", [
    ("localhost", False), ("LOCALHOST", False), ("127.0.0.1", False), ("127.1.2.3", False),
    ("127.1", False), ("[::1]", False), ("", False),
    ("10.0.0.1", True), ("[fe80::1]", True), ("db.internal", True), ("localhost.evil", True),
])  # fmt: skip
def test_an_endpoint_that_may_be_of_another_machine_gets_one_warning(host, warns):
    warnings = configured(ENDPOINT + f"'{host}:80'\n    type: tcp\n").warnings
    said = f'f.yml:3: web: if {host.strip("[]")} is another machine, see "Across a group"'
    assert len(warnings) == warns and all(line.startswith(said) for line in warnings)


HEADER = WEB + "    headers:\n      "
MISTAKES = [  # what is said, of which line, after which beginning, of each of these
    ("empty: write at least 'checks:', with one check below it", 1, "", [""]),
    ("no checks: write 'checks:', with at least one below it", 1, "", ["frequency: 10s"]),
    ("' is not valid: write at least one check below it, indented", 1, "checks:", [
        "", " web", "\nweb:\n  endpoint: http://localhost/"]),
    ("web: a check has keys, indented below its name: write at least endpoint", 2, "", [
        "checks:\n  web:", "checks:\n  web: x", "checks:\n  web:\n  type:\n    endpoint: :1"]),
    (": a key of a check: indent it below the name of its check", 3, "checks:\n  web:\n", [
        "  type: tcp\n  endpoint: :1", "  endpoint: :1", "  timeout: 5s\n  type:\n    a: b"]),
    (": a check has keys, indented", 2, "checks:\n  ", [
        "'':\n    a: b", '"a\\nb":\n    a: b', "' ': b"]),
    ("web: a check has an endpoint: write one below it", 2, "", ["checks:\n  web:\n    type: tcp"]),
    ("unknown key: did you mean recovery?", 1, "", ["recover: true", "Recovery: true"]),
    ("unknown key: write one of graceperiod, frequency, recovery, checks", 1, "", [
        "zzz: 10s", "max_unhealthy: 40%", "timeout: 1s", "threashold: 3"]),
    ("endpont: unknown key: did you mean endpoint?", 3, "checks:\n  web:\n", ["    endpont: :1"]),
    ("graceperiod: ", 1, "graceperiod:", ["", " ''", "\n  a: b"]),
    ("' is too long: write at most 24h", 1, "", ["graceperiod: 25h", "frequency: 24h1ns"]),
    ("graceperiod: '-1s' is not valid: write 0 or a duration", 1, "", ["graceperiod: -1s"]),
    ("' is not valid: write a duration of more than 0, like 10s", 1, "", [
        "frequency: 0", "frequency: 0s", "frequency: -1s", "frequency: -0"]),
    ("timeout: '5' is not a duration: write 5s", 4, WEB, ["    timeout: 5"]),
    ("' is not valid: write true or false", 1, "recovery: ", ["maybe", "2", "''"]),
    (" is not valid: write 1 to 999999", 4, WEB + "    threshold: ", [
        "0", "03", "3.0", "1_0", "1000000", "-1", "٣", "''", "\n      a: b"]),
    (": keep one", 5, WEB + "    threshold: 3\n", ["    threshold: 3", "    threashold: 3"]),
    ("type: 'udp' is not valid: write tcp or http", 4, WEB, ["    type: udp"]),
    ("http://localhost:80/ is a URL: write 'type: http' beside it", 3, WEB, ["    type: tcp"]),
    ("http://a:80/?*** is a URL: write 'type: http'", 4, "checks:\n  web:\n    type: tcp\n", [
        "    endpoint: http://a/?s3cr"]),
    ("localhost:11211 is host:port: write 'type: tcp' beside it", 3, ENDPOINT, ["localhost:11211"]),
    ("' is not valid: write codes of 200 to 599, like 200,204", 4, WEB + "    status: ", [
        "2xx", "103", "299-200", "'200,'", "600", "-299", "101-200", "20", "''", "200-204-299"]),
    (" is for http", 5, TCP + "    ", ["status: 200", "tls_verify: on", "headers:\n      A: b"]),
    ("status: status is for http", 3, "checks:\n  web:\n", [
        "    status: 200\n    type: TCP\n    endpoint: :80"]),
    ("write names and values below it", 4, WEB, ["    headers: x", "    headers: 'a: s3cr'"]),
    ("this value is", 4, WEB, ["    timeout:\n      A: s3cr", "    status:\n      A: s3cr"]),
    ("this is not a header name", 5, HEADER, ["a b: c", "é: c", "'': c", "'a:': b"]),
    ("twice", 6, HEADER, ["a: b\n      A: c"]),
    ("remove this header", 5, HEADER, ["Content-length: 5"]),
    (": the value is not one line of printable ASCII", 5, HEADER, [
        'a: "s3cr\\r\\nc: d"', 'a: "s3cr\\n"', "a: s3crét", "a:\n        s3cr: c", "a:", "a: ''"]),
    ("the value is not a host: write one like www.example.com", 5, HEADER, [
        "Host: a b", "Host: http://localhost", "host: s3cr/ping", "Host: ':80'", "Host: '['"]),
    ("' is not an endpoint: write a URL, like http://localhost:80/, or host:port", 3, ENDPOINT, [
        "http:/a", "ftp://a/", "http:///", "http://a:0/", "http://a:65536/", "a:80/",
        "http://a:x-y/", "http://[::g]/", "http://[1:2]/", "http://[::1", "http://./",
        "http://a..b/", "'http://a/a b?s3cr'", '"http://a/\\r\\nX: y"', "http://é/", "a:0",
        "http://10.0.0.300/", f"http://{'a' * 64}/", f"http://a:{'1' * 5000}/", "a:80?a", "a:80#8",
        "tcp://a:80", "'::1:80'", "a:no-such-service", "http://a../", "'a:'", "'a:-1'", "a", "''"]),
    ("endpoint: a user or password in a URL: write an Authorization header", 3, ENDPOINT, [
        "http://user@a/", "http://u:s3cr@a/", "u:s3cr@a:80", "http://u:s3cr/x@a/", "u:s3cr/@a:80",
        "http://u:s3cr?x@a/", "http://u:s3cr#x@a/", "http:/u:s3cr@a/", "http://[u:s3cr@a/",
        "ftp://u:s3cr@a/", "//u:s3cr@a/", "'http://u:s3cr @a/'"]),
]  # fmt: skip
MISTAKES = [(first + last, line, said) for said, line, first, texts in MISTAKES for last in texts]


@pytest.mark.parametrize("text, line, said", MISTAKES, ids=[row[0][-60:] for row in MISTAKES])
def test_every_mistake_is_one_line_that_says_where_and_what(text, line, said):
    error = str(pytest.raises(hc.ConfigError, hc.Config.from_text, text, "f.yml").value)
    assert error.startswith(f"f.yml:{line}: ") and said in error
    assert error.isprintable() and len(error) < 300 and "s3cr" not in error


@hypothesis.given(mutated([EXAMPLE, ANSIBLE, TERRAFORM], st.text(max_size=3)))
def test_any_text_is_a_configuration_or_one_line_about_it(text):
    try:
        config = hc.Config.from_text(text, "f")
    except hc.ConfigError as error:
        assert re.match(r"f:\d+: .", str(error)) and str(error).isprintable()
    else:
        assert config.checks and json.dumps(config.as_dict()) and str(config.warnings).isprintable()


@pytest.mark.parametrize("path, content, said", [
    ("f.yml", FileNotFoundError(2, "No such file"), "(No such file): write it (not to /tmp: the s"),
    ("f.yml", PermissionError(13, "Permission denied"), "make file and folders readable for all"),
    ("/home/x/f.yml", PermissionError(13, "x"), "move it to /etc: the service cannot see /home"),
    ("/root/f.yml", PermissionError(13, "x"), "move it to /etc: the service cannot see /home"),
    ("/run/credentials/x/f.yml", FileNotFoundError(2, "x"), "set LoadCredential= and restart: a"),
    ("f.yml", b"a: b\nc: \xff\n", "2: a character U+FFFD: remove it, or save the file as UTF-8"),
])  # fmt: skip
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, path, content, said):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        pathlib.Path("f.yml").write_bytes(content)
    else:
        monkeypatch.setattr("builtins.open", lambda *_, **__: (_ for _ in ()).throw(content))
    with pytest.raises(hc.ConfigError, match=f"^{path}:[ -~]*" + re.escape(said)):
        hc.load_config(path)


# ---- Probes --------------------------------------------------------------------------------------


def probe(check):
    attempt = hc.probe_tcp if check.type == "tcp" else hc.probe_http
    return attempt(check, hc.Tls(check.tls_verify))


def failure_of(check):
    """Why a probe of this check fails."""
    reason = str(pytest.raises(hc.ProbeFailure, probe, check).value)
    assert re.fullmatch("[ -~]{1,200}", reason)
    return reason


def test_a_request_says_what_the_contract_says(serve):
    server = serve(OK)
    probe(http_check(server, path="/a?b=c"))
    lines = "headers:\n  host: www.example.com\n  user-agent: mine\n  accept: a/b\n  X-A: b\n"
    probe(http_check(server, lines))
    first, second = (request.split("\r\n") for request in server.requests)
    assert first[0] == "GET /a?b=c HTTP/1.1"
    assert {f"Host: 127.0.0.1:{server.port}", "Connection: close", "Accept: */*"} < set(first)
    assert f"User-Agent: ec2-local-healthchecker/{hc.__version__}" in first
    assert {"Host: www.example.com", "User-Agent: mine", "Accept: a/b", "X-A: b"} < set(second)
    assert len(re.findall("(?im)^(host|user-agent|accept.*):", server.requests[1])) == 3


@pytest.mark.parametrize("url, host", [
    ("http://localhost/", "localhost"), ("http://[::1]/", "[::1]"), ("http://a:443/", "a:443"),
    ("https://localhost/", "localhost"), ("https://localhost:80/", "localhost:80"),
])  # fmt: skip
def test_only_the_default_port_is_left_out_of_host(serve, resolve, trusted, url, host):
    server = serve(OK, tls=certified(LO) if "https" in url else None)
    resolve(("127.0.0.1", server.port))
    probe(check_of(f"endpoint: '{url}'\ntimeout: 40s\n"))
    assert f"\r\nHost: {host}\r\n" in server.requests[0]


@pytest.mark.parametrize("listed, passing, failing", [
    ("200", [200], [201, 404, 101]), ("200-299, 404", [200, 204, 299, 404], [300, 403, 405]),
    ("200,204", [200, 204], [202]), ("500-599", [503], [200, 499]), ("101", [101], [200]),
])  # fmt: skip
def test_the_codes_that_are_listed_pass_and_no_others(serve, listed, passing, failing):
    for status in passing + failing:
        check = http_check(serve(f"HTTP/1.1 {status} Text\r\n\r\n"), f"status: '{listed}'\n")
        if status in passing:
            assert probe(check) is None
        else:
            assert failure_of(check) == f"HTTP status {status} Text"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_unless_their_code_is_listed(serve, status):
    server = serve(redirect("/there", status), OK)
    probe(http_check(server, f"status: {status}\n"))
    assert len(server.requests) == 1
    server.answers.appendleft(redirect("/there", status))
    probe(http_check(server, "headers:\n  Authorization: secret\n"))
    assert server.requests[2].startswith("GET /there HTTP/1.1\r\n")
    assert "\r\nAuthorization: secret\r\n" in server.requests[2]


@pytest.mark.parametrize("location, line", [
    ("/there?x", "/there?x"), ("there", "/a/there"), ("../there", "/there"), ("?x", "/a/b?x"),
    ("//127.0.0.1:PORT/x", "/x"), ("http://127.0.0.1:PORT", "/"), ("HTTP://127.1:PORT/x", "/x"),
    ("http://127.1:PORT/", "/"), ("http://127.0.1:PORT/", "/"), ("/a b\xe9?c#d", "/a%20b%E9?c"),
    ("/x \t", "/x"), ("http://127.1:PORT//x", "//x"), ("\t/x", "/x"),
    ("http://LocalHost:PORT/x", "/x"),
    ("/x\r\nLocation: /elsewhere", "/x"),
])  # fmt: skip
def test_where_a_location_leads(serve, location, line):
    server = serve("", OK)
    server.answers[0] = redirect(location.replace("PORT", str(server.port)))
    probe(http_check(server, path="/a/b"))
    assert server.requests[1].startswith(f"GET {line} HTTP/1.1\r\n")


@pytest.mark.parametrize("location", [
    "ftp://localhost/", "javascript:alert(1)", "http://[::1", "file:///etc/x", "mailto:x@y",
    "http://u:s3cr@localhost/?s3cr", "http://localhost:99999/", "http://localhost:x/#s3cr",
    "https:///a", "http://127.0.0.1:80:80/", "ftp://127.0.0.1/\x1b[" + "y" * 1000,
])  # fmt: skip
def test_a_redirect_to_nonsense_on_this_machine_is_a_failure(serve, location):
    reason = failure_of(http_check(serve(redirect(location))))
    assert "redirected to '" in reason and "s3cr" not in reason
    assert "s3cr" not in failure_of(http_check(serve("HTTP/1.1 500 (/?s=(1)s3cr)\r\n\r\n")))


@pytest.mark.parametrize("location, shown", [
    ("https://www.example.com/x?s3cr#s3cr", "https://www.example.com/x?***"),
    ("//elsewhere", "http://elsewhere"), ("http://10.0.0.1:99999/", "http://10.0.0.1:99999/"),
    ("http://u:s3cr@elsewhere/", "http://***@elsewhere/"), ("ftp://a..b/", "ftp://a..b/"),
    ("http://localhost.evil/", "http://localhost.evil/"), ("http://[::2]/", "http://[::2]/"),
    (f"http://{socket.gethostname()}/", f"http://{socket.gethostname()}/"),
    ("http://\xe9\x9b b/" + "y" * 1000, "http://%E9%9B%20b/yyy"), (f"//{SITE}", f"http://{SITE}"),
])  # fmt: skip
def test_a_redirect_to_another_host_passes_with_a_remark(serve, location, shown):
    first = serve(redirect(location, 308))
    other = serve(redirect(f"http://localhost:{first.port}/"))
    for server in (first, other):
        remark = probe(http_check(server, f"headers:\n  Host: {SITE}\n"))
        assert f"passes with status 308 to {shown}" in remark and remark.isprintable()
        assert "'status: 308'" in remark and "s3cr" not in remark and len(remark) < 300
    assert len(first.requests) == 2 and len(other.requests) == 1


def test_another_origin_gets_neither_headers_nor_name_and_the_first_does_again(serve, trusted):
    first, other = serve("", OK, tls=certified(SITE)), serve("", tls=certified(LO))
    first.answers[0] = redirect(f"https://localhost:{other.port}/x")
    other.answers[0] = redirect(f"https://127.0.0.1:{first.port}/y")
    lines = f"headers:\n  Authorization: secret\n  Host: {SITE}\n"
    probe(http_check(first, lines, scheme="https"))
    assert ["secret" in request for request in first.requests] == [True, True]
    assert "secret" not in other.requests[0]
    assert f"\r\nHost: localhost:{other.port}\r\n" in other.requests[0]
    assert first.names == [SITE, SITE] and other.names == [LO]


def test_ten_redirects_are_followed_and_no_more(serve):
    server = serve(*[redirect("/")] * 10, OK)
    probe(http_check(server))
    server.answers[0] = redirect("/")
    assert failure_of(http_check(server)) == "more than 10 redirects"
    assert len(server.requests) == 22


def test_the_reason_names_the_url_that_failed_where_a_redirect_led_elsewhere(serve, trusted):
    dead, ill = serve(OK), serve("HTTP/1.1 500 No" + "o" * 500 + "\r\n\r\n")
    stranger = serve(OK, tls=certified(IP, authority=trustme.CA()))
    dead.stop()
    for url, said in [
        (f"http://127.0.0.1:{dead.port}/x", f"127.0.0.1 port {dead.port}: Connection refused"),
        (f"https://127.0.0.1:{stranger.port}/x", "SSLCertVerificationError: "),
        (f"http://127.0.0.1:{ill.port}/" + "x" * 500, "HTTP status 500 No"),
    ]:
        reason = failure_of(http_check(serve(redirect(url))))
        assert reason.startswith(said) and f" (redirected to {url})"[:100] in reason


@pytest.mark.parametrize("interim", ["100 Continue", "102 Processing", "103 Early Hints"])
def test_interim_responses_are_skipped(serve, interim):
    answer = f"HTTP/1.1 {interim}\r\nLocation: /a\r\nContent-Length: 5\r\n\r\n" * 3
    probe(http_check(serve(answer + OK)))
    assert "status 404" in failure_of(http_check(serve(answer + OK.replace("200", "404"))))


@pytest.mark.parametrize("fields", [
    "X-Y: z\r\n" * 120, "Set-Cookie: name=value; Path=/\r\n" * 900, "X-Y: zzzzzzzzz\r\n" * 50_000,
    "Cookie: " + "y" * 70_000 + "\r\n", "X-Y: z\r\n folded\r\n", "no field at all\r\n", "X: \x80\n",
    "Content-Type: multipart/mixed; boundary*=a; boundary*0=b\r\n",
    "Content-Type: message/rfc822\r\r" * 2000 + "\r\n",
], ids=range(9))  # fmt: skip
def test_any_head_of_a_healthy_service_passes_and_is_read_to_its_end(serve, fields):
    server = serve(f"HTTP/1.1 302 Found\r\n{fields}Location: /there\r\n\r\n", OK)
    probe(http_check(server))
    assert server.requests[1].startswith("GET /there ")


def test_a_head_of_one_mib_passes_and_no_longer_one(serve):
    head = "HTTP/1.1 200 OK\r\nX: ".ljust(2**20 - 4, "y") + "\r\n\r\n"
    probe(http_check(serve(head)))
    lines = head[:-4].replace("y" * 18, "y\r\nX:" + "y" * 13) + "yy\r\n\r\n"
    for answer in (head[:-4] + "y\r\n\r\n", lines, "HTTP/1.1 103 Early\r\n\r\n" * 60_000):
        assert "larger than 1 MiB" in failure_of(http_check(serve(answer)))


def test_a_head_that_is_cut_short_anywhere_fails(serve):
    server = serve("")
    for end in range(len(OK) - 2):
        server.answers[0] = OK[:end]
        assert "the head of the response ended early" in failure_of(http_check(server))


@pytest.mark.parametrize("answer, reason", [
    ("SSH-2.0-OpenSSH_9.2\r\n\r\n", "BadStatusLine"), ("\r\n\r\n", "BadStatusLine"),
    ("HTTP/1.1 abc\r\n\r\n", "BadStatusLine"), ("HTTP/1.1 99999 OK\r\n\r\n", "BadStatusLine"),
    ("HTTP/3 200 OK\r\n\r\n", "UnknownProtocol"), ("\x00\x1b[31m\r\n\r\n", "BadStatusLine"),
    ("HTTP/1.1 500 \x1b[31mr\x07\x9b\r\n\r\n", r"HTTP status 500 \x1b[31mr\x07\x9b"),
    ("HTTP/1.1 500 " + "\x9b" * 1000 + "\r\n\r\n", r"HTTP status 500 \x9b\x9b"),
    ("HTTP/1.1 302 Found\n\n", "HTTP status 302 Found"),
    ("HTTP/1.1 302 Found\r\nLocation: \t \r\n\r\n", "HTTP status 302 Found"),
])  # fmt: skip
def test_a_server_that_lies_fails_with_a_printable_reason(serve, answer, reason):
    assert reason in failure_of(http_check(serve(answer)))


def test_a_service_that_resets_what_it_accepted_passes_tcp_and_fails_http(serve):
    def reset(connection):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    server = serve(talk=reset)
    for _ in range(200):
        probe(tcp_check(f"127.0.0.1:{server.port}"))
    assert re.search("reset|ended early", failure_of(http_check(server)))


def test_an_answer_counts_though_the_request_could_not_be_sent(serve, monkeypatch):
    def answer_and_reset(connection):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(OK.encode())

    server, send = serve(talk=answer_and_reset), hc.send_request

    def send_late(sock, *arguments):
        with contextlib.suppress(OSError):
            while sock.send(b"x"):  # until the server has closed
                time.sleep(0.001)
        send(sock, *arguments)

    monkeypatch.setattr(hc, "send_request", send_late)
    for _ in range(50):
        probe(http_check(server))


@pytest.mark.parametrize("scheme, talk", [
    ("http", sending()), ("https", sending()), ("http", sending(drip=b"H")),
    ("http", sending(drip=b"HTTP/1.1 103 Early Hints\r\n\r\n")),
    ("http", sending(b"HTTP/1.1 200 OK\r\n", drip=b"a")),
    ("http", sending(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n")),
    ("http", sending(redirect("/").encode(), pause=0.15)),
    ("https", sending(b"\x16\x03\x03\x40\x00", drip=b"\x00")),
])  # fmt: skip
def test_no_server_gets_more_time_than_the_timeout(serve, scheme, talk):
    start = time.monotonic()
    reason = failure_of(http_check(serve(talk=talk), scheme=scheme, timeout="500ms"))
    # A noisy machine may add to it, but a server that drips must not: it would for ever.
    assert 0.49 < time.monotonic() - start < 30
    assert "timed out after 0.5s" in reason


def in_pieces(size, frame):
    """A talk that answers in pieces. What the probe did to it shows as an error of the server."""
    pieces = [b"x" * min(6000, size - start) for start in range(0, size, 6000)]
    field = f"Content-Length: {size}\r\n" if frame == "length" else ""
    if frame == "chunked":
        field = "Transfer-Encoding: chunked\r\n"
        pieces = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""]]

    def talk(connection):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.recv(4096)
        for piece in [f"HTTP/1.1 200 OK\r\n{field}\r\n".encode(), *pieces]:
            connection.sendall(piece)
            time.sleep(0.001)
        if frame == "end":
            if isinstance(connection, ssl.SSLSocket):
                connection = connection.unwrap()
            connection.shutdown(socket.SHUT_WR)
        connection.recv(1)  # an error, if the probe reset it, or cut TLS short

    return talk


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("frame", ["length", "chunked", "end"])
@pytest.mark.parametrize("size", [0, 2, 600, 200_000])
def test_a_service_that_writes_in_pieces_sees_no_error(serve, trusted, size, frame, scheme):
    tls = certified(IP) if scheme == "https" else None
    server, context = serve(talk=in_pieces(size, frame), tls=tls), hc.Tls(True)
    for _ in range(10):
        hc.probe_http(http_check(server, scheme=scheme), context)
    server.stop()
    assert server.errors == []


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_nginx_sees_no_error(nginx, trusted, scheme):
    tls, port = hc.Tls(True), nginx.port if scheme == "http" else nginx.secure
    for _ in range(100):
        hc.probe_http(http_check(port, path="/page", scheme=scheme), tls)
    time.sleep(0.2)  # for nginx to see the last client go
    (line,) = re.findall(r"\[(?:info|error)\] .*", nginx.log.read_text())
    assert " *1 client closed connection while waiting for request" in line  # ours, at its start


@pytest.mark.parametrize("frame", ["Content-Length: 1048576", "Transfer-Encoding: chunked"])
def test_a_large_page_does_not_take_memory(serve, frame):
    chunks = b"10000\r\n%b\r\n" % bytes(2**16) if "chunked" in frame else bytes(2**16)
    answer = [f"HTTP/1.1 200 OK\r\n{frame}\r\n\r\n".encode(), *[chunks] * 16]
    server = serve(talk=lambda connection: [connection.sendall(part) for part in answer])
    tracemalloc.start()
    probe(http_check(server))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**19


@pytest.mark.parametrize("timeout, seconds, head, drip", [
    (4, (1.9, 3.9), "200 OK\r\n", b"x"), (100, (0, 45), "200 OK\r\n", bytes(2**20)),
    (4, (1.9, 3.9), "200 OK\r\nContent-Length: 9999999\r\n", b""),
    (4, (1.9, 3.9), "200 OK\r\nTransfer-Encoding: chunked\r\n", b"1\r\nx\r\n"),
    (4, (1.9, 3.9), "200 OK\r\nTransfer-Encoding: chunked\r\n", b"f"),
    (4, (1.9, 3.9), "302 Found\r\nLocation: /\r\n", b"x"),
])  # fmt: skip
def test_an_endless_body_passes_after_1_mib_or_half_the_time(serve, timeout, seconds, head, drip):
    endless = sending(f"HTTP/1.1 {head}\r\n".encode(), drip=drip)
    talks = collections.deque([endless, sending(OK.encode())])
    server = serve(talk=lambda connection: talks.popleft()(connection))
    start = time.monotonic()
    probe(http_check(server, timeout=f"{timeout}s"))
    assert seconds[0] < time.monotonic() - start < seconds[1]


def test_addresses_get_an_even_share_of_the_time_each_and_every_reason_is_told(deaf, resolve):
    port = free_port()
    addresses = [deaf(f"127.0.0.{number}", port) for number in range(1, 5)]
    resolve(*addresses)
    start = time.monotonic()
    reason = failure_of(tcp_check(f"many:{port}", timeout="4s"))
    assert 3.9 < time.monotonic() - start < 30
    told = re.findall(r"([0-9.]+) port (\d+): no answer in ([0-9.]+)s(?:; |$)", reason)
    assert [(host, int(port)) for host, port, _ in told] == addresses
    assert [float(share) for _, _, share in told] == pytest.approx([1] * 4, abs=0.4)


@pytest.mark.parametrize("served", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("first, second", [("127.0.0.1", "::1"), ("::1", "127.0.0.1")])
def test_localhost_passes_where_one_address_is_served(serve, resolve, served, first, second):
    server = serve(OK, host=served)
    resolve((first, server.port), (second, server.port))
    probe(http_check(server, host="localhost"))
    probe(tcp_check(f"localhost:{server.port}"))


def test_ipv6_addresses_keep_their_brackets_in_host_after_a_redirect_too(serve):
    server = serve(OK, host="::1")
    other = serve(redirect(f"http://[::1]:{server.port}/"))
    for check in (http_check(server, host="[::1]"), http_check(other)):
        probe(check)
        assert f"\r\nHost: [::1]:{server.port}\r\n" in server.requests.pop()
    probe(tcp_check(f"[::1]:{server.port}"))


@pytest.mark.parametrize("name, options, reason", [
    (IP, {"authority": trustme.CA()}, "certificate"), (SITE, {}, "IP address mismatch"),
    (IP, {"not_after": datetime.datetime(2020, 1, 1)}, "certificate has expired"),
])  # fmt: skip
def test_a_bad_certificate_fails_unless_it_is_not_verified(serve, trusted, name, options, reason):
    server = serve(OK, tls=certified(name, **options))
    assert reason in failure_of(http_check(server, scheme="https"))
    probe(http_check(server, "tls_verify: false\n", scheme="https"))


@pytest.mark.parametrize("case", [  # host, Host, name in the certificate, SNI, whether it passes
    # Without a Host, the name is that of the endpoint; no name is sent for an address.
    (LO, "", LO, LO, True), (LO, "", SITE, LO, False), (LO + ".", "", LO, LO, True),
    (IP, "", IP, None, True), (IP, "", LO, None, False), ("[::1]", "", "::1", None, True),
    # The name is that of Host, however the service is reached.
    (LO, SITE, SITE, SITE, True), (LO, SITE, LO, SITE, False), (IP, SITE, SITE, SITE, True),
    (IP, SITE, IP, SITE, False), (IP, SITE + ":8443", SITE, SITE, True),
    (IP, SITE.upper() + ".", SITE, SITE, True), (LO, IP + ":443", IP, None, True),
    (IP, "[::1]:443", "::1", None, True), (IP, "[::1]", IP, None, False),
])  # fmt: skip
def test_the_name_of_the_site_is_in_handshake_and_certificate(serve, trusted, resolve, case):
    host, header, certificate, sni, passes = case
    server = serve(OK, tls=certified(certificate))
    resolve(("127.0.0.1", server.port))
    lines = f"headers:\n  Host: '{header}'\n" if header else ""
    check = http_check(server, lines, host=host, scheme="https")
    if passes:
        probe(check)
        assert f"\r\nHost: {header}" in server.requests[0]
    else:
        assert "mismatch" in failure_of(check)
    assert server.names == [sni]


def test_the_handshake_offers_http_1_1(serve, trusted):
    tls, offered = certified(IP), []
    tls.set_alpn_protocols(["h2", "http/1.1"])

    def talk(connection):
        offered.append(connection.selected_alpn_protocol())
        sending(OK.encode())(connection)

    probe(http_check(serve(talk=talk, tls=tls), scheme="https"))
    assert offered == ["http/1.1"]


def test_authorities_are_read_again_after_a_refused_certificate(serve, tmp_path, monkeypatch):
    late = tmp_path / "late.pem"  # not there yet
    monkeypatch.setenv("SSL_CERT_FILE", str(late))
    check, tls = http_check(serve(OK, tls=certified(IP)), scheme="https"), hc.Tls(True)
    with pytest.raises(hc.ProbeFailure, match="certificate"):
        hc.probe_http(check, tls)
    AUTHORITY.cert_pem.write_to_path(str(late))
    hc.probe_http(check, tls)
    late.unlink()
    hc.probe_http(check, tls)


def test_a_certificate_that_only_python_3_13_refuses_passes(serve, tmp_path, monkeypatch):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    times = datetime.datetime(2020, 1, 1), datetime.datetime(2099, 1, 1)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, *times)
    names = x509.SubjectAlternativeName([x509.DNSName(LO)])  # and no key identifiers
    certificate = builder.add_extension(names, False).sign(key, hashes.SHA256())
    form = Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    pem = certificate.public_bytes(Encoding.PEM) + key.private_bytes(*form)
    (tmp_path / "cert.pem").write_bytes(pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem")
    probe(http_check(serve(OK, tls=context), host="localhost", scheme="https"))


@pytest.mark.parametrize("anchor, name, passes", [
    ("issuer", IP, True), ("leaf", IP, True), ("leaf", SITE, False), ("stranger", IP, False),
])  # fmt: skip
def test_what_is_in_the_store_is_an_anchor(serve, tmp_path, monkeypatch, anchor, name, passes):
    issuer = AUTHORITY.create_child_ca()
    tls = certified(name, authority=issuer)
    leaf = tls.certificate.cert_chain_pems[0]
    stores = {"issuer": issuer.cert_pem, "leaf": leaf, "stranger": trustme.CA().cert_pem}
    stores[anchor].write_to_path(str(tmp_path / "store.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "store.pem"))
    check = http_check(serve(OK, tls=tls), scheme="https")
    assert "ertificate" in failure_of(check) if not passes else not probe(check)


def test_no_proxy_is_ever_used(serve, trusted, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    probe(http_check(serve(OK)))
    probe(http_check(serve(OK, tls=certified(IP)), scheme="https"))


@pytest.mark.parametrize("owner, name, fault, passed", [
    (socket.socket, "connect", OSError(errno.ECONNREFUSED, "x"), False),
    (hc, "read_head", OSError(5, "x"), False), (hc, "read_head", ValueError("x"), False),
    (hc, "read_head", http.client.HTTPException("x"), False),
    (socket, "getaddrinfo", socket.gaierror(socket.EAI_AGAIN, "x"), False),
    (socket, "socket", OSError(errno.EAFNOSUPPORT, "x"), False),
    *[(owner, name, OSError(number, "x"), None)
      for owner, name in [(socket, "socket"), (socket, "getaddrinfo"), (socket.socket, "connect"),
                          (hc, "send_request"), (hc, "read_head")]
      for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)],
    (socket, "socket", OSError(errno.EPERM, "x"), None),
    (socket, "getaddrinfo", socket.gaierror(socket.EAI_MEMORY, "x"), None),
    (socket.socket, "connect", MemoryError(), None),
    (hc, "read_head", RecursionError("\n\x1b" + "x" * 1000), None),
    (socket.socket, "connect", SystemExit(1), None),
])  # fmt: skip
def test_only_what_the_service_did_is_evidence(serve, monkeypatch, owner, name, fault, passed):
    def fail_once(*args, **options):
        monkeypatch.undo()
        assert loop.probing
        raise fault

    loop = hc.CheckLoop(http_check(serve(OK)), collections.deque(), 0.0)
    monkeypatch.setattr(owner, name, fail_once)
    _, seen, reason = loop.attempt()
    assert seen is passed and re.fullmatch("[ -~]{1,200}", reason) and loop.probing is None


def test_a_loop_that_dies_leaves_no_probe_that_seems_to_hang(monkeypatch):
    loop = hc.CheckLoop(tcp_check("127.0.0.1:1"), collections.deque(), 0.0)
    monkeypatch.setattr(hc, "can_open_descriptors", None)
    with pytest.raises(TypeError):
        loop.attempt()
    assert loop.probing is None


def test_a_kernel_without_ipv6_skips_its_addresses(serve, resolve, monkeypatch):
    server, make = serve(OK), socket.socket

    def socket_of(family=-1, *arguments, **options):
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "x")
        return make(family, *arguments, **options)

    resolve(("::1", server.port), (IP, server.port))
    monkeypatch.setattr(socket, "socket", socket_of)
    probe(tcp_check(f"localhost:{server.port}"))
    probe(http_check(server, host="localhost"))


SCARCE = """
import collections, resource, sys
import ec2_local_healthchecker as hc
checks = hc.Config.from_text(sys.argv[1], "").checks
loops = [hc.CheckLoop(check, collections.deque(), 0.0) for check in checks]
for descriptors in [100, *range(3, 13)]:  # at first also for what is imported late
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, 100))
    print(*[loop.attempt()[1] for loop in loops], flush=True)
"""


def test_own_lack_of_descriptors_is_no_evidence(serve, trusted):
    secure, plain, dead = serve(OK, tls=certified(LO)), serve(OK), serve(OK)
    dead.stop()
    text = f"""
  tcp: endpoint: localhost:{serve(talk=sending()).port}, type: tcp, timeout: 40s
  http: endpoint: http://localhost:{plain.port}/, timeout: 40s
  https: endpoint: https://localhost:{secure.port}/, timeout: 40s
  dead: endpoint: 127.0.0.1:{dead.port}, type: tcp"""
    text = "checks:" + text.replace(": endpoint", ":\n    endpoint").replace(", ", "\n    ")
    run = [sys.executable, "-c", SCARCE, text]
    done = subprocess.run(run, stdout=subprocess.PIPE, timeout=2 * PATIENCE, cwd=HERE)
    before, *rows = [row.split() for row in done.stdout.decode().splitlines()]
    assert before == rows[9] == ["True", "True", "True", "False"] and len(rows) == 10
    for spare, (*healthy, refused) in enumerate(rows):
        assert set(healthy) <= {"True", "None"}
        assert refused == ("None" if spare < 4 else "False")


# ---- Marking -------------------------------------------------------------------------------------

READ = hc.Instance("InService", "i-0123456789abcdef0", "eu-west-1")
BEFORE = hc.Instance("Standby", "i-old", "old-1")
HANGS = "import time; time.sleep(3600)"


def test_metadata_is_read_with_a_token(metadata):
    assert hc.read_metadata(hc.Instance()) == READ
    assert metadata.requests[0] == ("PUT", "/latest/api/token")
    del metadata.items[metadata.STATE]  # one that is in no group
    assert hc.read_metadata(BEFORE) == READ._replace(lifecycle=None)


@pytest.mark.parametrize("status", [None, 403, 404, 500])
@pytest.mark.parametrize("item, path", [("lifecycle", 1), ("id", 2), ("region", 3)])
def test_an_item_that_cannot_be_read_hides_no_other(metadata, monkeypatch, item, path, status):
    path = ["api/token", metadata.STATE, "instance-id", "placement/region"][path]

    def fail(request):
        return request.path.endswith(path) and (resetting(request) if not status
                                                else request.answer("no", status))  # fmt: skip

    metadata.fault = fail
    for before in (hc.Instance(), BEFORE):
        instance = hc.read_metadata(before)
        kept = None if status == 404 and item == "lifecycle" else getattr(before, item)
        assert instance[:3] == READ._replace(**{item: kept})[:3]
        assert bool(instance.unread) == (status != 404 or item != "lifecycle")
        missing = instance.problem.startswith("instance metadata cannot be read: ")
        assert missing == (item != "lifecycle" and not before.id)


@pytest.mark.parametrize("variable, item, other", [
    ("INSTANCE_ID", "id", "i-other"), ("AWS_REGION", "region", "us-west-2"),
])  # fmt: skip
def test_a_variable_that_is_another_s_is_named(metadata, monkeypatch, variable, item, other):
    monkeypatch.setenv(variable, other)
    instance = hc.read_metadata(hc.Instance())
    said = f"{variable} is {other}, metadata says {getattr(READ, item)}: remove the variable"
    assert instance.problem == said
    metadata.fault = lambda request: request.answer("", 503)
    assert hc.read_metadata(instance).problem == said  # what was read once is kept
    monkeypatch.setenv(variable, getattr(READ, item))
    metadata.fault = None
    assert hc.read_metadata(instance) == READ


@pytest.mark.parametrize("status", [200, 403, 404, 503])
def test_metadata_gets_three_attempts_and_what_it_said_before_is_kept(metadata, status):
    failing = iter([True, True, False])
    metadata.fault = lambda request: next(failing, False) and request.answer("<a page>", status)
    assert hc.read_metadata(hc.Instance()) == READ
    metadata.fault = lambda request: request.answer("<a page>", status)
    metadata.requests.clear()
    instance = hc.read_metadata(BEFORE)
    assert instance == BEFORE._replace(unread=f"HTTP status {status} for api/token, 8 bytes")
    assert len(metadata.requests) == 3
    unknown = hc.read_metadata(hc.Instance()).problem
    assert re.match("instance metadata cannot be read: HTTP status .* -- enable IMDSv2", unknown)


def test_metadata_that_hangs_gets_a_second_for_each_attempt(metadata):
    metadata.fault = lambda request: time.sleep(PATIENCE)
    start = time.monotonic()
    assert "timed out after 1s" in hc.read_metadata(hc.Instance()).unread
    assert 2.9 < time.monotonic() - start < 20


@pytest.mark.parametrize("page", ["<html> <body>\nlogin</body></html>", "x" * 5000, ""])
def test_a_web_page_or_a_truncated_answer_is_not_believed_as_metadata(metadata, page):
    metadata.items = dict.fromkeys(metadata.items, page)
    assert hc.read_metadata(BEFORE)[:3] == BEFORE[:3]

    def cut(request):
        if request.path.endswith(metadata.STATE):
            request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nInServ")
            request.close_connection = True
            return True

    metadata.fault = cut
    assert hc.read_metadata(BEFORE).lifecycle == "Standby"


@pytest.mark.parametrize("listed", ["", "internal.example", "*"])
@pytest.mark.parametrize("env, url", [
    ({}, "http://169.254.169.254/"), ({"_MODE": "ipv4"}, "http://169.254.169.254/"),
    ({"_MODE": "IPv6"}, "http://[fd00:ec2::254]/"), ({"": "http://[::1]:8"}, "http://[::1]:8/"),
    ({"": "http://a:1/", "_MODE": "IPv6"}, "http://a:1/"),
])  # fmt: skip
def test_metadata_is_where_botocore_looks_and_never_asked_by_proxy(monkeypatch, env, url, listed):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, listed)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv(hc.METADATA, "")
    for name, value in env.items():
        monkeypatch.setenv(hc.METADATA + name, value)
    asked = []
    monkeypatch.setattr(hc, "connect", lambda host, port, _: asked.append((host, port)) or 1 / 0)
    hc.prepare_environment()
    with contextlib.suppress(ZeroDivisionError):
        hc.read_metadata(hc.Instance())
    from botocore.utils import get_environ_proxies, urlparse

    assert os.environ[hc.METADATA] == url and get_environ_proxies(url) == {}
    assert asked == [(urlparse(url).hostname, urlparse(url).port or 80)]
    assert bool(get_environ_proxies("http://example.com/")) == (listed != "*")
    assert listed in os.environ["no_proxy"]


def named(name, text=""):
    return type(name, (Exception,), {})(text)


PAGE, XHTML = "<html><p>a captive portal", "<html><body>sign in</body></html>"
PROXY = {"http_proxy": "http://127.0.0.1:1", "AWS_ENDPOINT_URL_AUTO_SCALING": "http://aws.example"}
TO = "AWS_ENDPOINT_URL_AUTO_SCALING"
ROLE = "arn:aws:sts::123456789012:assumed-role/" + "r" * 200 + "/i-0123456789abcdef0"
DENIAL = (
    f"User: {ROLE} is not authorized to perform: autoscaling:SetInstanceHealth on resource: "
    "arn:aws:autoscaling:eu-west-1:123456789012:autoScalingGroup:*:autoScalingGroupName/web "
    "with an explicit deny in a service control policy"
)


@pytest.mark.parametrize("error, advice", [
    (Answer("ValidationError", "... grace period of 300 s"), "within its health check grace"),
    (Answer("RequestExpired", "x"), "check the clock"), (named("Odd", "what\nis this"), ""),
    (Answer("SignatureDoesNotMatch", "x"), "check the clock"),
    (Answer("Throttling", "Rate exceeded"), "AWS limits the calls"),
    (Answer("ResourceContention", "x", 500), "AWS has a fault, or is busy"),
    (Answer("InternalFailure", "x", 500), "AWS has a fault, or is busy"),
    (Answer("503", "Service Unavailable", 503), "AWS has a fault"),
    (named("MetadataRetrievalError"), "attach a profile that allows"),
    (named("ConnectTimeoutError"), "check routes"), (ImportError("MemoryError: "), "of memory"),
    (Answer("AccessDenied", DENIAL, 403), "remove the deny from that policy"),
])  # fmt: skip
def test_every_aws_error_becomes_one_line_that_says_what_to_do(error, advice):
    line = hc.explain(error)
    assert line.isprintable() and advice in "".join(line.split(" -- ")[1:])
    if "explicit deny" in str(error):  # it is not cut, and to allow it elsewhere does not help
        assert DENIAL in line and len(line) > 500 and "allow autoscaling" not in line


def test_a_rehearsal_makes_the_call_and_changes_nothing(cloud):
    for health in ("Healthy", "Unhealthy"):
        cloud.moto.api.set_instance_health(InstanceId=cloud.instance, HealthStatus=health)
        program = run("-rehearse", env=cloud.env)
        assert program.lines == [f"Ready to mark {cloud.instance} in eu-west-1"]
        assert cloud.health() == health
    cloud.gateway.fault = lambda request: request.answer("<a/>", x_amzn_RequestId="r")
    assert run("-rehearse", env=cloud.env).process.returncode == 0  # AWS accepts it
    assert len(cloud.gateway.rehearsals) == 3 and not cloud.gateway.calls
    assert any(path.endswith(Metadata.ROLE + "role") for _, path in cloud.metadata.requests)


def refusing(status, code, text):
    return lambda request: request.refuse(status, code, text)


def metadata_silent(cloud):
    cloud.metadata.fault = lambda request: request.answer("", 503)


def with_gateway(**attributes):
    """A fault: the gateway has these attributes."""
    return lambda cloud: vars(cloud.gateway).update(attributes)


def page(status, text=PAGE):
    return with_gateway(fault=lambda asked: asked.answer(text, status, Content_Type="text/html"))


DENIED, DENIED_BY = (refusing(403, "AccessDenied", text) for text in ("not authorized", DENIAL))
STATIC_KEYS = {"AWS_ACCESS_KEY_ID": "A", "AWS_SECRET_ACCESS_KEY": "S"}
HERE_BY_VARIABLES = {"INSTANCE_ID": "i-0123456789abcdef0", "AWS_REGION": "us-east-1"}


@pytest.mark.parametrize("fault, env, said", [
    (lambda cloud: cloud.metadata.items.pop(Metadata.ROLE), {},
     "unable to locate credentials; .* -- attach a profile that allows"),
    (None, {TO: "http://127.0.0.1:1"}, "Could not connect .* -- check routes"),
    (None, PROXY, "proxy .* -- check the URL of the proxy in HTTPS_PROXY"),
    (None, {**PROXY, "http_proxy": "http://u:s3cr@127.0.0.1:99999"}, "-- check the URL of the pro"),
    (None, {TO: "https://127.0.0.1:{tls}"}, "SSL .* -- trust the authority of .* AWS_CA_BUNDLE"),
    (None, {"AWS_CA_BUNDLE": "/no", TO: "https://127.0.0.1:{tls}"}, "SSL.* -- trust .* AWS_CA_BUN"),
    (None, {TO: "nonsense"}, "Invalid endpoint.* -- correct AWS_ENDPOINT_URL_AUTO_SCALING or AWS_"),
    (None, {**STATIC_KEYS, "AWS_ACCESS_KEY_ID": "B"}, "InvalidClientTokenId.* -- check the clock"),
    (None, {**STATIC_KEYS, "AWS_SESSION_TOKEN": "EXPIRED"}, "ExpiredToken.* -- check the clock"),
    (with_gateway(clock=-900), {}, "Signature expired.* -- check the clock"),
    (with_gateway(clock=900), {}, "Signature expired.* -- check the clock"),
    (None, {"AWS_REGION": "us-east-1"}, "AWS_REGION is us-east-1, metadata says eu-west-1: remove"),
    (None, {"INSTANCE_ID": "i-strange"}, "INSTANCE_ID is i-strange, metadata says .*: remove"),
    (metadata_silent, {**STATIC_KEYS, **HERE_BY_VARIABLES}, "No managed instance .* -- attach the"),
    (metadata_silent, HERE_BY_VARIABLES, "HTTP status 503 .* -- enable IMDSv2.* hop limit of 2"),
    (lambda cloud: cloud.metadata.items.update({"instance-id": "i-0fedcba9876543210"}), {},
     "No managed instance .* -- attach the instance to a group, or stop this"),
    (with_gateway(fault=DENIED_BY), {}, "explicit deny .* -- remove the deny"),
    (with_gateway(fault=DENIED), {}, f"-- allow {hc.PERMISSION}"),
    (with_gateway(fault=refusing(503, "ServiceUnavailable", "x")), {}, "-- AWS has a fault, or is"),
    *[(page(status), {}, "something else answers there: check") for status in (200, 400, 403, 503)],
    *[(page(status, XHTML), {}, "something else answers there") for status in (200, 400, 403)],
    (metadata_silent, {}, "metadata cannot be read: HTTP status 503 .* -- enable IMDSv2"),
    (None, {"PYTHONPATH": "{broken}"}, "torn in two' -- boto3 is missing or broken: install the"),
    (None, {"AWS_PROFILE": "none"}, "ProfileNotFound: .* -- correct the AWS_ var"),
    (None, {"AWS_ACCESS_KEY_ID": "A"}, "Partial.* -- correct the AWS_ variable"),
    (None, {hc.METADATA: "a b"}, f"{hc.METADATA}: 'a b/' is not an endpoint: write a URL"),
    (None, {hc.METADATA: "localhost:80"}, f"{hc.METADATA}: 'localhost:80/' is not an endpoint"),
])  # fmt: skip
def test_a_rehearsal_says_what_is_wrong_and_what_to_do(cloud, serve, tmp_path, fault, env, said):
    (tmp_path / "boto3").mkdir()
    (tmp_path / "boto3" / "__init__.py").write_text("raise KeyError('torn in two')")
    if fault:
        fault(cloud)
    port = serve(OK, tls=certified(IP)).port
    env = {name: value.format(tls=port, broken=tmp_path) for name, value in env.items()}
    program = run("-rehearse", env={**cloud.env, **env})
    assert program.process.returncode in (1, 2) and len(program.lines) == 1
    assert re.search(said, program.lines[0]) and "s3cr" not in program.lines[0], program.lines
    assert not cloud.gateway.calls and cloud.health() == "Healthy"


def test_a_rehearsal_is_what_the_oom_killer_takes_first():
    script = f"import sys; sys.path.insert(0, '{HERE}'); import ec2_local_healthchecker as hc\n"
    script += "hc.read_metadata = lambda before: sys.exit(open('/proc/self/oom_score_adj').read())"
    done = subprocess.run([sys.executable, "-c", script + "\nhc.rehearse()"], **CAPTURED)
    assert done.stderr.split() == ["1000"]


def child(script):
    """A Rehearsal whose child runs this script."""
    return hc.Rehearsal([sys.executable, "-c", script])


def outcome_of(rehearsal, now):
    """Start one, and wait until it has ended; returns what it says."""
    rehearsal.start(now)
    said = wait_until(lambda: [rehearsal.poll(now)] if rehearsal.child.poll() is not None else [])
    assert not rehearsal.child
    return said[0]


def test_rehearsals_come_again_after_a_minute_then_up_to_five_then_daily():
    rehearsal, pauses = child("print('no route -- check routes'); exit(1)"), []
    for _ in range(5):
        assert outcome_of(rehearsal, 1000.0) == "no route -- check routes"
        pauses.append(rehearsal.due - 1000.0)
    assert pauses == [60, 120, 240, 300, 300]
    rehearsal.command[2] = "print('Ready to mark i-1 in r')"
    assert outcome_of(rehearsal, 1000.0) == ""
    assert rehearsal.due - 1000.0 == 86400
    rehearsal.command[2] = "exit(1)"
    outcome_of(rehearsal, 1000.0)
    assert rehearsal.due - 1000.0 == 60  # it starts over


@pytest.mark.parametrize("script, said", [
    ("exit(3)", "a rehearsal ended with status 3"),
    ("1 / 0", "ZeroDivisionError: division by zero"),
    ("import os; os.kill(os.getpid(), 9)", "a rehearsal ended with status -9"),
    ("print('Ready'); exit(2)", "Ready"), ("import os; os.write(1, b'\\xff'); exit(1)", "\\ufffd"),
])  # fmt: skip
def test_a_rehearsal_goes_well_by_its_exit_status_alone(script, said):
    rehearsal = child(script)
    assert outcome_of(rehearsal, 0.0).startswith(said) and rehearsal.due == 60


def test_a_rehearsal_that_hangs_is_ended_at_its_limit_and_reported_once():
    rehearsal = child(HANGS)
    rehearsal.start(1000.0)
    assert rehearsal.poll(1029.9) is None
    assert rehearsal.poll(1030.1) == "a rehearsal did not end in 30s"
    wait_until(lambda: rehearsal.poll(1030.2) is None and not rehearsal.child, "its end")
    assert rehearsal.due == 1060


def test_a_rehearsal_that_was_killed_has_not_gone_well():
    rehearsal = child("print('Ready to mark i-1 in r')")
    rehearsal.start(0.0)
    rehearsal.child.wait()
    rehearsal.kill()  # too late: it has ended with 0
    assert rehearsal.poll(0.0) is None and rehearsal.due == 60


def test_a_rehearsal_that_cannot_be_killed_gets_no_second_beside_it():
    rehearsal = child(HANGS)
    rehearsal.start(0.0)
    process = rehearsal.child
    group = pathlib.Path(f"/sys/fs/cgroup/freezer/healthchecker-{process.pid}")
    group.mkdir()
    try:  # as one in state D: the freezer of cgroup v1
        (group / "cgroup.procs").write_text(str(process.pid))
        (group / "freezer.state").write_text("FROZEN")
        wait_until(lambda: (group / "freezer.state").read_text() == "FROZEN\n", "the freezer")
        rehearsal.kill()
        start = time.monotonic()
        assert [rehearsal.poll(now) for now in (0.0, 31.0, 1e6)] == [None] * 3
        assert time.monotonic() - start == PROMPTLY and rehearsal.child is process
    finally:
        (group / "freezer.state").write_text("THAWED")
        wait_until(lambda: not (group / "cgroup.procs").read_text(), "its end")
        group.rmdir()
    wait_until(lambda: rehearsal.poll(1e6) is None and not rehearsal.child, "its end")


def resetting(request):
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.connection.close()
    request.close_connection = True
    return True


AWS_FAULTS = {
    "page": (lambda request: request.answer(XHTML), "no AWS request id .* -- something else answ"),
    "reset": (resetting, "Connection.* -- check routes"),
    "hang": (lambda request: [request.connection.recv(1)], "[Tt]imeout.* -- check routes"),
    "denied": (DENIED_BY, "explicit deny .* -- remove the deny"),
}  # fmt: skip


@pytest.mark.parametrize("fault", AWS_FAULTS)
def test_the_mark_gets_through_when_a_fault_of_aws_ends(cloud, fault):
    cloud.gateway.fault, said = AWS_FAULTS[fault]
    broken = cloud.gateway.fault
    with sick(cloud) as program:
        line = program.wait_for("Could not mark", 1 if fault == "hang" else 2)
        start = f"ERROR Could not mark {cloud.instance} as Unhealthy, again in "
        assert re.search(f"{start}.*{said}", line), line
        program.more("Probe of web failed: .*refused in", 5)
        threads = os.listdir(f"/proc/{program.process.pid}/task")
        assert len(threads) == 4  # main, writer, check, marker: never a second marker
        assert 0 <= len(cloud.gateway.calls) - program.count("Could not mark") <= 1
        cloud.gateway.fault = None
        marked(cloud)
        program.wait_for("Marked Instance as Unhealthy")
        # (The gateway sees the end of a hung attempt a moment later than the program.)
        assert cloud.gateway.most_at_once <= (2 if fault == "hang" else 1)
        cloud.gateway.fault, calls = broken, len(cloud.gateway.calls)
        wait_until(lambda: len(cloud.gateway.calls) > calls, "a call")
        assert program.stop() == STOPPED


def test_a_call_by_https_works_though_ssl_was_hidden_from_http_client(cloud, serve, tmp_path):
    AUTHORITY.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    url = f"https://127.0.0.1:{serve(MARKED, tls=certified(IP)).port}"
    env = {"AWS_ENDPOINT_URL_AUTO_SCALING": url, "AWS_CA_BUNDLE": str(tmp_path / "ca.pem")}
    with sick(cloud, env=env) as program:
        program.wait_for("Marked Instance as Unhealthy")


def test_credentials_that_come_late_are_found(cloud):
    held = cloud.metadata.items.pop(Metadata.ROLE)
    with sick(cloud, top={"graceperiod": "3s"}) as program:
        why = ".*locate credentials; .* -- attach a profile that allows"
        program.wait_for("A mark would not succeed now: " + why)
        program.wait_for("Could not mark " + why, 2)
        cloud.metadata.items[Metadata.ROLE] = held
        marked(cloud)


def test_a_proxy_in_the_environment_is_for_aws_and_not_for_metadata_or_probes(cloud, serve):
    proxy = serve(MARKED)
    env = dict.fromkeys(("http_proxy", "HTTP_PROXY"), f"http://127.0.0.1:{proxy.port}")
    with sick(cloud, env={**env, "AWS_ENDPOINT_URL_AUTO_SCALING": "http://aws.example"}) as program:
        program.wait_for("Marked Instance as Unhealthy")
    asked = {request.partition("\r")[0] for request in proxy.requests}
    assert asked == {"POST http://aws.example/ HTTP/1.1"}
    assert any(path.endswith(Metadata.ROLE + "role") for _, path in cloud.metadata.requests)


def test_a_mark_is_remembered_over_a_restart_and_taken_back_once(cloud, serve, tmp_path):
    env, mark = {"STATE_DIRECTORY": str(tmp_path)}, tmp_path / "marked"
    with sick(cloud, env=env) as program:
        marked(cloud)
        wait_until(mark.exists, "the note of it")
        assert mark.read_text() == f"{cloud.instance} eu-west-1"
        program.process.kill()
        program.wait()
    web = {"web": {**DEAD, "endpoint": f"http://127.0.0.1:{serve(OK).port}/"}}
    # As version 2.0 wrote it; and of the machine that an image was made from.
    for note in (cloud.instance, "i-0parent eu-west-1", "i-0parent", ""):
        mark.write_text(note)
        with sick(cloud, env=env, checks=web) as program:
            program.wait_for("Verdict healthy")
            wait_until(lambda: not mark.read_text(), "the end of the note")
            program.more("Probe of web passed in", 8)
            assert program.stop() == STOPPED
        assert cloud.health() == "Healthy" and len(cloud.gateway.marks("Healthy")) == 1


@pytest.mark.parametrize("megabytes", [1, 3, 6])
def test_a_lack_of_memory_for_boto3_is_survived(cloud, passing_at_first, megabytes):
    web, fail = passing_at_first
    with sick(cloud, checks={"web": web}) as program:
        program.wait_for("Ready to mark")
        status = pathlib.Path(f"/proc/{program.process.pid}/status").read_text()
        size = int(re.search(r"VmData:\s+(\d+) kB", status)[1]) * 1024
        limit(program, f"--data={size + megabytes * 2**20}:unlimited")
        fail()
        said, end = "Could not mark|fault of this program", time.monotonic() + 10
        # (There may be no memory for a line on it.)
        wait_until(lambda: program.count(said) or time.monotonic() > end, "the shortage")
        # Without memory, CPython may crash, or the program end; then systemd starts it again.
        with contextlib.suppress(subprocess.CalledProcessError):  # (it may have by now)
            limit(program, "--data=unlimited:unlimited")
        wait_until(lambda: program.process.poll() or cloud.health() == "Unhealthy", "the mark")
        crashed = program.process.poll()
        assert crashed in (None, 1, -signal.SIGSEGV, -signal.SIGABRT)
    if crashed:
        with sick(cloud) as program:
            marked(cloud)


def test_boto3_that_breaks_and_is_repaired_is_found_again(cloud, passing_at_first, tmp_path):
    import boto3

    home, ours = pathlib.Path(boto3.__file__).parent, tmp_path / "boto3"
    ours.symlink_to(home)
    (tmp_path / "part.py").touch()
    web, fail = passing_at_first
    with sick(cloud, env={"PYTHONPATH": str(tmp_path)}, checks={"web": web}) as program:
        program.wait_for("Ready to mark")
        ours.unlink()
        ours.mkdir()
        fault = "import sys; assert 'part' not in sys.modules; import part, no"
        (ours / "__init__.py").write_text(fault)
        fail()
        program.wait_for("Could not mark .*named 'no' -- boto3 is missing or broken: install", 2)
        later = tmp_path / "later"  # as on a disk that comes back
        fault = f"__path__[:] = ['{later}']; import boto3.compat; "
        (ours / "__init__.py").write_text(fault + f"exec(open('{later}/__init__.py').read())")
        program.wait_for("Could not mark .*No module named 'boto3.compat'", 2)
        later.symlink_to(home)
        marked(cloud)


# ---- Telling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_abstract", [False, True])
def test_notify_speaks_the_protocol_and_no_message_is_too_long(tmp_path, monkeypatch, is_abstract):
    with service_manager(tmp_path, is_abstract) as (env, messages):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        systemd = hc.Systemd()
        assert "NOTIFY_SOCKET" not in os.environ
        systemd.notify("READY=1", "STATUS=" + "ü" * 5000)
        wait_until(lambda: messages, "the message")
        (when, message) = messages[0]
        assert message.startswith("READY=1\nSTATUS=ü") and len(message.encode()) < 4096
    systemd.notify("WATCHDOG=1")  # nobody is there: nothing happens


def test_a_line_has_time_and_level_and_a_warning_goes_to_stderr_and_the_journal(capfd):
    systemd = Recorder()
    with writer(systemd) as ours:
        hc.log.setLevel("INFO")
        hc.log.info("well \ud800")
        hc.log.warning("ill")
        hc.log.error("worse")
        hc.log.debug("nothing")
        ours.finish()
        wait_until(lambda: not ours.has_news.is_set(), "a pause of the thread")
    out, err = capfd.readouterr()
    assert re.fullmatch(STAMP + r"INFO well \\ud800\n", out)
    assert re.fullmatch(STAMP + "WARNING ill\n" + STAMP + "ERROR worse\n", err)
    assert systemd.said == [(hc.logging.WARNING, "ill"), (hc.logging.ERROR, "worse")]


def test_the_file_that_remembers_a_mark_is_written_before_lines_that_wait(tmp_path, capfd):
    file, (reader, end) = tmp_path / "marked", full_pipe()

    with writer(mark_file=str(file)) as ours:
        ours.lines.append((end, b"this waits\n"))
        ours.remember("i-1 eu-west-1")
        wait_until(file.exists, "the file")
        assert file.read_text() == "i-1 eu-west-1"
        os.read(reader, 65536)
        ours.remember("")
        wait_until(lambda: file.read_text() == "", "its end")
        file.unlink()
        file.mkdir()
        ours.remember("i-2 r")
        said = "Cannot write the file that remembers a mark"
        wait_until(lambda: said in capfd.readouterr().err, "a word of it")
        file.rmdir()
        ours.remember("i-2 r")  # at the next call
        wait_until(file.exists, "the file again")
    os.close(reader)
    os.close(end)


@pytest.mark.parametrize("fault", ["full disk", "closed pipe", "nobody reads"])
def test_a_log_that_cannot_be_written_stops_nothing(cloud, tmp_path, fault):
    (tmp_path / "f.yml").write_text(yaml_of({"web": DEAD}, graceperiod="0", frequency="300ms"))
    reader, end = full_pipe()
    if fault == "full disk":
        end = os.open("/dev/full", os.O_WRONLY)
    elif fault == "closed pipe":
        os.close(reader)
    command = [sys.executable, str(PROGRAM), "-verbose", "-healthcheckfile", f"{tmp_path}/f.yml"]
    env = {**os.environ, **cloud.env, "STATE_DIRECTORY": str(tmp_path)}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=end, stderr=end, env=env)
    try:
        marked(cloud)
        wait_until(lambda: len(cloud.gateway.marks()) >= 3, "more calls")
        start = time.monotonic()
        process.terminate()
        assert process.wait(PATIENCE) == 0 and time.monotonic() - start == PROMPTLY
    finally:
        process.kill()
        process.wait()


JOURNAL = """\
import pathlib, socket, subprocess, sys
journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
journal.bind("/dev/log")
subprocess.run(sys.argv[1:])
journal.setblocking(False)
while True:
    try:
        print(journal.recv(65536).decode(), flush=True)
    except BlockingIOError:
        break
"""


@pytest.mark.parametrize("is_unit, name", [(1, "f.yml"), (1, "bad.yml"), (0, "bad.yml")])
def test_what_warns_goes_to_the_journal_of_a_service(tmp_path, is_unit, name):
    (tmp_path / "f.yml").write_text(yaml_of({"web": DEAD}, graceperiod="0", frequency="200ms"))
    (tmp_path / "bad.yml").write_text("checks:\n  a: b\n")
    script = "mount -t tmpfs tmpfs /dev && mknod /dev/null c 1 3 && "
    script += f"{sys.executable} -c '{JOURNAL}' "
    script += f"timeout 4 {sys.executable} {PROGRAM} -dry-run -healthcheckfile {tmp_path}/{name}"
    env = {**os.environ, **({"INVOCATION_ID": "0"} if is_unit else {})}
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], env=env, **CAPTURED)
    lines = [line for line in done.stdout.splitlines() if line.startswith("<")]
    said = f"{tmp_path}/bad.yml:2: a: a check has keys, indented below its name: write at least"
    if not is_unit:
        assert not lines and (name == "f.yml" or done.stderr.startswith(said))
    elif name == "bad.yml":
        assert len(lines) == 1 and lines[0].startswith(f"<3>healthchecker: {said}")
        assert re.match(STAMP + "ERROR " + re.escape(said), done.stderr)
    else:  # nobody reads, and the socket takes some ten: it has ended in its time all the same
        said = "Check web failed (1 of 3): 127.0.0.1 port 1: Connection refused"
        assert lines[0] == f"<4>healthchecker: {said}" and "INFO" not in "".join(lines)
        assert "INFO Stopped by SIGTERM" in done.stdout


# ---- Check loops ---------------------------------------------------------------------------------


def test_probes_keep_a_fixed_rate_and_do_not_overlap():
    starts, inbox = [], collections.deque()
    check = check_of("endpoint: http://localhost/\nfrequency: 100ms")
    loop = hc.CheckLoop(check, inbox, time.monotonic() + 0.2)
    faults = {3: hc.ProbeFailure("refused"), 4: SystemExit("odd")}

    def probe(check, tls):
        starts.append(time.monotonic())
        time.sleep(0.25 if len(starts) == 2 else 0.01)
        if len(starts) in faults:
            raise faults[len(starts)]
        return "a remark" if len(starts) == 6 else None

    loop.function, due = probe, loop.due
    loop.start()
    results = wait_until(lambda: len(inbox) >= 6 and list(inbox), "probes")
    loop.cancel()
    loop.join(PATIENCE)
    assert not loop.is_alive()
    assert [result[2:] for result in results[:6]] == [
        (True, ""), (True, ""), (False, "refused"), (None, "SystemExit: odd"), (True, ""),
        (True, "a remark"),
    ]  # fmt: skip
    assert [result[1] for result in results[:6]] == pytest.approx(starts[:6], abs=0.05)
    assert min(starts) >= due  # never early, and never two at once
    assert starts[2] - starts[1] >= 0.25 and starts == sorted(set(starts))


# ---- Daemon and gate -----------------------------------------------------------------------------


def test_the_log_tells_the_story_of_a_mark_from_the_first_failure_on(rig, logged):
    others = "  tcp:\n    type: tcp\n    endpoint: :1\n  well:\n    endpoint: http://127.1/w\n"
    rig = rig(SIMPLE + others)
    rig.probe("ppp", "well", 0)
    rig.probe("fffpp", "web", 0)
    rig.probe("ffff", "tcp", 0)
    rig.step(12)
    tcp = "tcp failing (failed 3 in a row, threshold 3) at localhost:1: refused"
    both = "web failing (passed 2 in a row, threshold 3) at http://localhost:80/: last failure: "
    both += "refused; " + tcp.replace("failed 3", "failed 4")
    assert texts(logged, "WARNING") == [
        "Check web failed (1 of 3): refused",
        "Check web failing (failed 3 in a row, threshold 3) at http://localhost:80/: refused",
        "Check tcp failed (1 of 3): refused",
        "Check " + tcp,
        "Verdict unhealthy (was undecided): " + both,
        "Marked Instance as Unhealthy: i-1: " + both,
    ]
    assert rig.world.calls == [("Unhealthy", True)] and rig.writer.mark == "i-1 eu-west-1"


def test_nothing_is_probed_before_the_grace_period_is_over(rig):
    rig = rig(SIMPLE.replace("graceperiod: 0", "graceperiod: 5m"), start=3.0)
    assert [loop.due for loop in rig.loops] == [303.0] and rig.loops[0].started
    assert "STATUS=grace period, probing starts in 300s" in rig.systemd.said
    early, late = rig.status(5.0), rig.status(303.0)
    assert (early["phase"], early["calls"], late["phase"]) == ("grace", 0, "watching")


def test_check_loops_start_one_millisecond_apart(rig, tmp_path):
    checks = "".join(f"  c{n}:\n    endpoint: http://localhost/\n" for n in range(1000))
    many = rig("graceperiod: 10s\nchecks:\n" + checks)
    assert [loop.due for loop in many.loops] == pytest.approx([15 + n / 1000 for n in range(1000)])
    many.step(60)
    reloaded(many, "checks:\n" + checks.replace("localhost", "127.0.0.1"), tmp_path)
    dues = [loop.due - many.now for loop in many.loops[1000:]]
    assert dues == pytest.approx([n / 1000 for n in range(1000)])
    gate = rig("graceperiod: 0\nchecks:\n" + checks, gate="late")
    assert gate.main.end == pytest.approx(gate.now + 0.999 + 3 * 10 + 1)


def test_a_remark_is_logged_once_for_each_check(rig, logged, tmp_path):
    rig = rig(SIMPLE + "  other:\n    endpoint: http://localhost/\n")
    for threshold in ("3", "3", "2"):  # the last reload changes the check
        reloaded(rig, SIMPLE.replace("threshold: 3", f"threshold: {threshold}"), tmp_path)
        for n in range(3):
            rig.inbox.append((rig.loop(), 10.0 + n, True, "it leads elsewhere"))
        rig.step()
    assert texts(logged, "WARNING") == ["Check web: it leads elsewhere"] * 2


def test_no_secret_in_a_query_is_shown_anywhere(rig, logged, tmp_path, serve):
    text = SIMPLE.replace("localhost/", "localhost/health?token=s3cr")
    for each in (rig(text, gate="late"), rig(text)):
        each.main.directory = str(tmp_path)
        each.probe("fff", seconds=4)
    shown = [*map(str, logged), *map(str, each.systemd.said)]
    shown += [(tmp_path / "status.json").read_text(), str(configured(text).as_dict())]
    assert each.world.calls and sum("/health?***" in text for text in shown) > 5
    assert "s3cr" not in "".join(shown)
    url = f"http://127.0.0.1:{serve('HTTP/1.1 500 No').port}/?s3cr"
    reason = failure_of(http_check(serve(redirect(url))))
    assert "127.0.0.1" in reason and "s3cr" not in reason


def test_faults_of_this_program_are_logged_once_in_a_run_and_steps_tried_again(rig, logged):
    rig = rig()
    rig.probe("ppp" + "x" * 50 + "p" + "x", seconds=0.1)
    said = texts(logged, "ERROR")
    assert said == ["Not counted, a fault of this program: probe of web: refused"] * 2
    logged.clear()
    rig.main.act = lambda now: 1 / 0
    assert [rig.main.try_step(rig.now + 10 + n) for n in range(3)] == [1.0] * 3
    del rig.main.act
    assert rig.main.try_step(rig.now + 20) <= 1 and not rig.main.is_faulty
    said = "A fault of this program, trying again: ZeroDivisionError: division by zero"
    assert texts(logged, "ERROR") == [said]
    rig.patch.setattr(hc, "read_metadata", lambda before: sys.exit("odd"))
    assert rig.marker.try_step(rig.rehearsal.due) == 1.0 and rig.marker.is_faulty
    assert rig.main.why_not(rig.now) == "a fault of this program: see the log"


def test_a_hold_says_why_once_and_a_healthy_verdict_ends_the_memory_of_it(rig, logged):
    rig = rig(SIMPLE.replace("graceperiod: 0", "graceperiod: 5m"))
    rig.step(300)
    in_service, why = rig.world.instance, "its target lifecycle state is Standby"
    rig.world.instance = in_service._replace(lifecycle="Standby")
    rig.probe("fff", seconds=4)
    rig.step(1000)
    assert f"not marking: {why}" in rig.status()["summary"]
    rig.world.instance = in_service
    rig.step(200)
    held = [text for text in texts(logged, "WARNING") if "Not marking" in text]
    again = "Not marking as Unhealthy: in service again, in a new grace period"
    assert held == [f"Not marking as Unhealthy: {why}", again] and not rig.world.calls
    rig.probe("pppfff", seconds=5)
    assert rig.world.calls


@pytest.mark.parametrize("instance, said", [
    (hc.Instance("InService", "i-1", "r", "", "INSTANCE_ID is i-2: remove"), "is i-2: remove"),
    (hc.Instance(problem="cannot be read: timed out -- enable"), "cannot be read: timed out -- "),
])  # fmt: skip
def test_a_stranger_or_an_unknown_instance_is_held_with_one_error(rig, logged, instance, said):
    for results, marked in (("fff", ""), ("ppp", instance.id)):
        logged.clear()
        each = rig(marked=marked or "", instance=instance, is_idle=True)
        each.rehearsal.why_not = None  # the first one goes on
        each.step()
        assert each.status()["could_mark"] is False
        each.probe(results, seconds=4)
        each.step(200)
        assert not each.world.calls and not each.world.clients
        held = [text for text in texts(logged) if "Not marking" in text and said in text]
        assert len(held) == (results == "fff" or bool(marked))
        assert each.status()["could_mark"] is False and said in each.status()["why_not"]
        assert each.status()["summary"].count(said) == 1


@pytest.mark.parametrize("instance", [hc.Instance(problem="no EC2"), None])
def test_a_dry_run_says_that_it_is_one_and_each_call_that_it_would_make(rig, logged, instance):
    rig = rig(instance=instance, dry_run=True)
    rig.probe("fffppp", seconds=4)
    rig.step(20)
    dry = [text for text in texts(logged) if "Dry run" in text]
    who = "i-1" if not instance else "this-instance"
    for said, status in (dry[0], "Unhealthy"), (dry[-1], "Healthy"):
        assert said.startswith(f"Dry run: would have marked as {status}: {who}: ")
    status = rig.status()
    assert not rig.world.clients and status["marked"] is False and status["could_mark"] is False
    assert status["summary"] == "dry run, nothing is marked; healthy: 1 check"
    assert not rig.rehearsal.starts and "A mark would not" not in str(logged)


def test_a_dry_run_is_held_by_whatever_holds_a_call(rig, logged):
    rig = rig(instance=hc.Instance("Standby", problem="no EC2"), dry_run=True)
    rig.probe("fff", seconds=40)
    assert "target lifecycle state is Standby" in str(logged) and "Dry run" not in str(logged)


def test_could_mark_is_shown_as_long_as_it_holds_and_logged_when_it_changes(rig, logged):
    rig, why = rig(is_idle=True), "no route -- check routes"
    rig.rehearsal.why_not = None  # the first one goes on
    rig.step()
    assert rig.status()["could_mark"] is None
    for rig.rehearsal.why_not in ("", why, why, ""):
        rig.rehearsal.due = rig.now
        rig.step(1)
    said = [item for item in logged if "mark" in item[1]]
    ready = ("INFO", "Ready to mark i-1 in eu-west-1")
    assert said == [ready, ("WARNING", f"A mark would not succeed now: {why}"), ready]
    rig.rehearsal.why_not, rig.rehearsal.due = "a rehearsal did not end in 30s", rig.now
    rig.step(1)
    assert not rig.status()["could_mark"] and rig.status()["why_not"] == rig.rehearsal.why_not
    first = f"STATUS=A mark would not succeed now: {rig.rehearsal.why_not}; undecided: web not pro"
    assert any(line.startswith(first) for line in rig.systemd.said)
    rig.marker.began = rig.now - 61
    rig.step(61)
    assert "the thread that marks hangs" in rig.status()["why_not"]
    assert "the thread that marks hangs" in texts(logged, "WARNING")[-1]


@pytest.mark.parametrize("code, status, sticks", [
    ("AccessDenied", 403, True), ("Throttling", 400, False),
])  # fmt: skip
def test_a_refused_call_shows_until_a_rehearsal_or_a_call_goes_well(rig, code, status, sticks):
    rig = rig()
    rig.world.fate = Answer(code, "User: x is not authorized", status)
    rig.probe("fff", seconds=4)
    assert code in rig.status()["why_not"] and rig.status()["could_mark"] is False
    first = f"STATUS=A mark would not succeed now: An error occurred ({code})"
    assert any(line.startswith(first) for line in rig.systemd.said)
    rig.probe("ppp", seconds=4)  # no call is wanted any more: a rehearsal, at once
    rig.step(12)
    assert len(rig.rehearsal.starts) == 2 and rig.status()["could_mark"] is (not sticks)
    rig.world.fate = None
    for results in ("fff", "ppp"):  # a call goes well, and the rehearsal after it
        rig.probe(results, seconds=5)
        rig.rehearsal.due = rig.now
        rig.step(12)
        assert rig.status()["could_mark"] is True


def test_a_verdict_that_is_withdrawn_for_a_moment_delays_no_call(rig):
    def withdraw():
        rig.marker.findings = rig.marker.findings._replace(verdict="undecided")

    rig = rig()
    rig.world.before_call = withdraw
    rig.probe("fff", seconds=4)
    assert rig.world.clients and not rig.world.calls
    rig.world.before_call = None
    rig.step(2)
    assert rig.world.calls


def test_imports_are_forgotten_whenever_the_last_call_ended_in_an_importerror(rig):
    rig = rig()
    rig.probe("fff", seconds=4)
    broken = ImportError("x")
    for rig.world.fate, forgotten in (None, 0), (broken, 0), (broken, 1), (None, 2), (None, 2):
        rig.marker.due = rig.now
        rig.marker.step(rig.now)
        assert rig.world.forgotten == forgotten


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("marked", ["", "i-1 eu-west-1"])
def test_a_signal_ends_the_daemon_and_a_mark_that_stands_is_said(rig, logged, number, marked):
    rig = rig(marked=marked)
    rig.inbox.append(number)
    rig.step()
    assert rig.main.status == 0 and "STOPPING=1" in rig.systemd.said
    assert f"Stopped by {number.name}" in texts(logged, "INFO")
    stands = "The group may still hold i-1 as Unhealthy .* run: aws autoscaling set-instance-"
    stands += "health --region eu-west-1 --instance-id i-1 --health-status Healthy$"
    assert bool(re.search(stands, texts(logged)[-1])) == bool(marked)
    assert bool(re.search("STATUS=" + stands, rig.systemd.said[-1])) == bool(marked)
    said = list(rig.systemd.said)
    rig.step()
    assert rig.systemd.said == said


def test_a_reload_starts_and_ends_the_loops_of_what_has_changed(rig, logged, tmp_path):
    rig = rig(SIMPLE + "  old:\n    endpoint: http://localhost/old\n")
    kept, gone = rig.loop(), rig.loop("old")
    new = SIMPLE.replace("checks:", "recovery: no\nchecks:")
    reloaded(rig, new + "  new:\n    threashold: 1\n    endpoint: http://10.1.2.3/\n", tmp_path)
    assert rig.loop() is kept and kept.alive and not gone.alive and rig.loop("new").started
    assert list(rig.main.records) == ["web", "new"]
    assert rig.marker.findings.config is rig.main.config and not rig.main.config.recovery
    warned = "\n".join(texts(logged, "WARNING"))
    assert "threashold" in warned and "Across a group" in warned
    said = "Configuration reloaded; the grace period does not start again"
    assert texts(logged, "INFO")[-1] == said
    reloaded(rig, SIMPLE.replace("threshold: 3", "threshold: 2"), tmp_path)
    assert rig.loop() is not kept and not kept.alive


def test_a_reload_brings_no_new_grace_period(rig, tmp_path):
    rig = rig(SIMPLE.replace("graceperiod: 0", "graceperiod: 1m"))
    other = SIMPLE.replace("threshold: 3", "threshold: 2")
    reloaded(rig, other.replace("graceperiod: 0", "graceperiod: 1h"), tmp_path)
    assert rig.loop().due == 65.0
    rig.step(100)
    reloaded(rig, SIMPLE.replace("threshold: 3", "threshold: 4"), tmp_path)
    assert rig.loop().due == rig.now


def test_a_reload_of_a_bad_file_or_of_none_changes_nothing_and_is_told(rig, logged, tmp_path):
    rig = rig()
    watches = dict(rig.main.records)
    rig.inbox.append(signal.SIGHUP)
    rig.step()
    reloaded(rig, "nonsense", tmp_path)
    (tmp_path / "f.yml").unlink()
    os.mkfifo(tmp_path / "f.yml")  # it would keep the main thread waiting
    rig.inbox.append(signal.SIGHUP)
    rig.step()
    assert rig.main.records == watches and rig.main.status is None
    ignored = "SIGHUP ignored: the configuration, {}, is not a file".format
    assert texts(logged, "WARNING") == [ignored("-"), ignored(f"{tmp_path}/f.yml")]
    (error,) = texts(logged, "ERROR")
    assert f"not reloaded, the old one stays: {tmp_path}/f.yml:1: not a key" in error


def test_signals_that_arrive_together_are_taken_once_each_and_a_stop_is_last(rig):
    rig = rig()
    rig.main.signals, wakeup = socket.socketpair()
    wakeup.send(bytes([signal.SIGTERM, signal.SIGHUP, signal.SIGHUP]))
    rig.main.wait(PATIENCE)
    assert list(rig.inbox) == [signal.SIGHUP, signal.SIGTERM]


def test_a_reload_for_which_no_thread_can_be_made_ends_the_daemon(rig, logged, tmp_path):
    rig = rig()
    rig.patch.setattr(hc, "CheckLoop", None)
    reloaded(rig, SIMPLE.replace("threshold: 3", "threshold: 4"), tmp_path)
    assert rig.main.status == 1 and "not callable" in texts(logged, "ERROR")[0]


@pytest.mark.parametrize("ill", ["loop", "marker", "writer", "silence"])
def test_the_watchdog_is_not_fed_without_a_thread_or_without_results(rig, ill):
    rig = rig()
    rig.probe("p" * 60)
    assert rig.systemd.said.count("WATCHDOG=1") >= 60
    if ill == "loop":
        rig.loop().alive = False
    elif ill == "marker":
        rig.marker.is_alive = lambda: False
    elif ill == "writer":
        rig.writer.thread = threading.Thread()
    else:
        rig.probe("x" * 299)
        assert rig.systemd.said.count("WATCHDOG=1") > 150
        rig.probe("x" * 20)
    rig.systemd.said.clear()
    rig.probe("x" * 60)
    assert "WATCHDOG=1" not in rig.systemd.said and rig.main.verdict == "healthy"
    rig.probe("p" * 2)
    assert ("WATCHDOG=1" in rig.systemd.said) == (ill == "silence")


def test_the_watchdog_is_fed_for_a_check_s_period_and_five_minutes(rig):
    rig = rig(SIMPLE.replace("frequency: 1s", "frequency: 10m"))
    for seconds, is_fed in (890, True), (20, False):
        rig.step(seconds)
        assert rig.systemd.said.count("READY=1") < 100  # shown at each verdict, not at each step
        rig.systemd.said.clear()
        rig.step()
        assert ("WATCHDOG=1" in rig.systemd.said) == is_fed


def test_status_json_says_how_things_stand(rig, tmp_path):
    rig = rig()
    assert not os.path.exists("/status.json")  # it has no directory yet
    rig.main.directory = str(tmp_path)
    rig.probe("ffff", seconds=3)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (tmp_path / "status.json").stat().st_mode & 0o777 == 0o644
    web = {"endpoint": "http://localhost:80/", "state": "failing", "passed": False, "streak": 4}
    web.update(threshold=3, reason="refused", failed_at=rig.now - 3)
    assert status.pop("checks") == {"web": web}
    expected = dict(version=hc.__version__, instance="i-1", phase="watching", wanted="Unhealthy")
    expected.update(verdict="unhealthy", marked=True, could_mark=True, why_not="", calls=1, hold="")
    assert {key: status.get(key) for key in expected} == expected
    assert status["last_call"]["status"] == "Unhealthy" and not status["last_call"]["error"]
    assert status["summary"].endswith("; marking as Unhealthy, calls so far: 1")
    shutil.rmtree(tmp_path)
    rig.step(20)  # nowhere to write: nothing happens


def test_the_gate_exits_early_as_soon_as_every_check_is_healthy(rig, logged):
    rig = rig(SIMPLE.replace("graceperiod: 0", "graceperiod: 1h"), gate="early")
    assert [loop.due for loop in rig.loops] == [5.0]  # probing starts at once
    rig.probe("ppp", seconds=0)
    assert rig.main.status == 0 and "Gate: healthy" in texts(logged, "INFO")[-1]


@pytest.mark.parametrize("results, status", [
    ("ppp", 0), ("fff", 1), ("pfp", 1), ("fffppp", 0), ("pppf", 0), ("pppfff", 1), ("", 1),
    ("xxxxxx", 1),
])  # fmt: skip
@pytest.mark.parametrize("grace, end", [("60s", 60), ("1s", 3 * 2 + 2)])
def test_the_gate_ends_at_its_time_whatever_came_or_did_not(rig, results, status, grace, end):
    text = SIMPLE.replace("graceperiod: 0", f"graceperiod: {grace}")
    rig = rig(text.replace("threshold: 3", "threshold: 3\n    timeout: 2s"), gate="late")
    rig.probe(results, seconds=0)
    rig.step(end - 0.01)
    assert rig.main.status is None
    rig.step(0.02)
    assert rig.main.status == status


def test_the_gate_says_at_each_frequency_how_each_check_stands_and_what_is_left(rig, logged):
    rig = rig(SIMPLE.replace("graceperiod: 0", "graceperiod: 25s"), gate="late")
    rig.probe("pp", seconds=10)
    said = [text for text in texts(logged, "INFO") if " left: " in text]
    assert said[0] == "15s left: web unknown (passed 1 in a row, threshold 3)"
    assert said[1] == "5s left: web unknown (passed 2 in a row, threshold 3)"
    rig.inbox.append(signal.SIGTERM)
    rig.step()
    assert rig.main.status == 1 and "stopped by SIGTERM before" in texts(logged, "ERROR")[0]


CODES = {"refused": Answer("AccessDenied", "x", 403), "lost": Answer("InternalFailure", "x", 500)}
CODES["page"] = Answer("403", "x", 403, headers=())  # of a proxy
FATES = {"good": None, **CODES, "unsent": ImportError("x")}  # what becomes of a call
SET_HEALTH = hc.set_health


def one_of(*values):
    return st.sampled_from(values)


TOPS = st.tuples(
    one_of("graceperiod: 0", "graceperiod: 90s"), one_of("frequency: 5s", "frequency: 20s"),
    one_of("recovery: true", "recovery: true", "recovery: false"),
)  # fmt: skip
KEYS = st.tuples(one_of("", "threshold: 2", "threshold: 1"), one_of("", "timeout: 3s"))
CONFIGS = st.builds(text_of, TOPS, st.dictionaries(one_of("a", "b"), KEYS, min_size=1, max_size=2))
SECONDS = one_of(0, 1, 6, 25, 25, 100)  # after an event
RESULTS = {"p": True, "f": False, "x": None}  # passed, failed, spoiled by a fault of the program


class Machine(stateful.RuleBasedStateMachine):
    """Drives daemon and marker through whatever may happen to them, and holds them to the contract:

    - Every check stands as its last `threshold` results in a row say; what a probe that hung says
      late, and what a fault of the program spoiled, does not count; a pause counts as one at most.
    - Unhealthy is called only by the last verdict, while the checks agree, as `decide` permits;
      then at the pace of the backoff: no call before its time, none late.
    - Healthy is called until one call succeeds. A mark that may stand is never forgotten, in the
      report or by the writer; one that AWS refused is not made up.
    - A rehearsal runs only while no call is wanted; while main reads, and after SIGTERM, none is.
    - A reload keeps the results of equal checks only; a bad file changes nothing.
    """

    @initialize(
        text=CONFIGS, marked=one_of("", "", "i-1 eu-west-1", "i-1", "i-parent eu-west-1"),
        state=one_of("InService", None, "Standby"),
    )  # fmt: skip
    def begin(self, text, marked, state):
        instance = hc.Instance(state, "i-1", "eu-west-1")
        self.rig = rig = Rig(text, marked=marked, instance=instance, is_idle=True)
        rig.main.path, self.file = "f.yml", None
        rig.patch.setattr(hc, "load_config", self.load_config)
        rig.patch.setattr(os.path, "isfile", lambda path: True)
        rig.patch.setattr(hc, "read_metadata", self.read_metadata)
        rig.patch.setattr(hc, "set_health", self.set_health)
        rig.world.before_call = self.build_client
        self.config, self.fate = rig.config, "good"
        self.results = {check.name: [] for check in self.config.checks}
        self.hung = {}  # (loop, start) of each probe that was counted: when it is once more
        self.stands = bool(marked)  # whether a mark of ours may stand
        self.verdict, self.next_verdict = "undecided", rig.now + self.config.frequency
        self.wanted, self.tries, self.was_good, self.last_try = None, 0, True, -math.inf
        self.known, self.hold_end = None, 0.0  # lifecycle state, end of the new grace period
        self.is_stranger = False  # whether INSTANCE_ID and metadata last contradicted each other
        self.complaint = None  # what was wrong with a call
        self.latest = math.inf  # when the marker must have looked again
        self.step()

    # -- what should be

    def state(self, check):
        results = self.results[check.name]
        for end in range(len(results), check.threshold - 1, -1):
            if len(set(results[end - check.threshold : end])) == 1:
                return "healthy" if results[end - 1] else "failing"
        return "unknown"

    def health(self, check):
        results = self.results[check.name]
        last = results[-1] if results else True
        run = itertools.takewhile(lambda result: result == last, reversed(results))
        return (self.state(check), last, len(list(run)))

    def current(self):
        states = {self.state(check) for check in self.config.checks}
        if "failing" in states:
            return "unhealthy"
        return "healthy" if states == {"healthy"} else "undecided"

    def expected(self):
        """What is wanted: by the last verdict, if the checks say so still."""
        verdict = self.verdict if self.verdict == self.current() else "undecided"
        take_back = "Healthy" if self.stands and self.config.recovery else None
        return {"unhealthy": "Unhealthy", "healthy": take_back, "undecided": None}[verdict]

    def is_held(self):
        out = self.known not in (None, "InService") or self.rig.now < self.hold_end
        return self.is_stranger or (out and self.wanted == "Unhealthy")

    def pace(self):
        if not self.tries:
            return 0
        first = self.config.frequency if self.was_good else min(self.config.frequency, 10)
        return min(first * 2.0 ** (self.tries - 1), max(300, self.config.frequency))

    # -- what the marker does, as it is seen from outside

    def read_metadata(self, before):
        now, world = self.rig.now, self.rig.world
        instance = world.read_metadata(before)
        if world.is_readable:
            self.known, self.is_stranger = instance.lifecycle, bool(instance.problem)
        if not self.is_stranger and self.rig.marker.report.marked.startswith("i-parent"):
            self.stands = False
        if self.known in (None, "InService"):
            if self.hold_end == math.inf:
                self.hold_end = now + self.config.graceperiod
        elif self.wanted == "Unhealthy":
            self.hold_end = math.inf
        self.latest = now + self.config.frequency
        self.has_looked = True
        return instance

    def build_client(self):
        self.judge("wanted")
        if self.fate == "recovers":
            for loop in self.idle():
                self.ends(loop, "p" * 9)
            self.rig.main.step(self.rig.now)
            self.verdicts(self.rig.now)
        if self.fate == "leaves":
            self.rig.world.instance = self.rig.world.instance._replace(lifecycle="Standby")
        if self.fate == "unsent":
            self.note_try(False)

    def set_health(self, client, instance_id, status):
        self.judge(status)
        self.note_try(self.fate not in FATES or not FATES[self.fate])
        if status == "Healthy":
            self.stands = not self.was_good
        elif self.fate != "refused":
            self.stands = True
        SET_HEALTH(client, instance_id, status)

    def judge(self, status):
        """The marker takes whatever is raised here for an error of the call."""
        try:
            now, wanted = self.rig.now, self.rig.marker.report.wanted
            assert wanted == self.wanted == self.expected(), "a call that is not wanted"
            assert status in ("wanted", wanted) and not self.is_held(), "a call in a hold"
            assert now >= self.last_try + 0.8 * self.pace() - 0.01, "a call before its time"
        except AssertionError as complaint:
            self.complaint = complaint
            raise

    def note_try(self, was_good):
        self.tries, self.last_try, self.was_good = self.tries + 1, self.rig.now, was_good
        self.latest = self.rig.now + 1.2 * self.pace()
        self.has_called = True

    def load_config(self, path):
        """The disk takes its time: meanwhile nothing is called."""
        calls, wanted = len(self.rig.world.calls), self.wanted
        self.rig.marker.step(self.rig.now + 1000.0)
        assert len(self.rig.world.calls) == calls, "a call while the configuration is read"
        if wanted:
            self.wanted, self.tries, self.was_good, self.last_try = None, 0, True, -math.inf
            self.latest = self.rig.now
        return configured(self.file)

    # -- time

    def idle(self):
        return [watch.loop for watch in self.rig.main.records.values() if not watch.loop.probing]

    def ends(self, loop, results):
        for result in results:
            passed = RESULTS[result]
            self.rig.inbox.append((loop, next(loop.starts), passed, "reason"))
            if passed is not None:
                self.results[loop.check.name].append(passed)

    def verdicts(self, now):
        for check in self.config.checks:
            loop = self.rig.loop(check.name)
            if loop.probing:
                key = (loop, loop.probing)
                if now >= self.hung.get(key, loop.probing + check.timeout + hc.HANG_SLACK):
                    self.results[check.name].append(False)
                    self.hung[key] = now + max(check.frequency, check.timeout)
        if now >= self.next_verdict:
            self.verdict = self.current()
            missed = (now - self.next_verdict) // self.config.frequency
            self.next_verdict += self.config.frequency * max(1, missed)
        if self.verdict == "healthy" and self.verdict == self.current():
            self.hold_end = 0.0
        self.note_wanted()

    def note_wanted(self):
        if self.expected() != self.wanted:
            self.wanted, self.tries, self.was_good = self.expected(), 0, True
            self.last_try, self.latest = -math.inf, self.rig.now

    def step(self):
        """Both threads step once; then everything is as it should be."""
        rig, now = self.rig, self.rig.now
        rig.world.fate = FATES.get(self.fate)
        rig.main.step(now)
        self.verdicts(now)
        self.has_looked = self.has_called = False
        starts = len(rig.rehearsal.starts)
        rig.marker.step(now)
        if self.complaint:
            raise self.complaint
        self.note_wanted()
        if self.wanted:
            assert now <= self.latest + 2, "the marker does not look, or call, in time"
        if self.has_looked and self.wanted and not self.is_held() and self.fate != "recovers":
            assert self.has_called or starts != len(rig.rehearsal.starts), "a call is not made"
        assert starts == len(rig.rehearsal.starts) or not self.wanted, "a rehearsal beside a mark"
        assert not (self.has_called and rig.rehearsal.child), "a rehearsal goes on beside a mark"
        marked = rig.marker.report.marked
        assert bool(marked) == self.stands, "a mark is forgotten, or made up"
        assert rig.writer.mark in (None, marked)
        assert rig.world.group != "Unhealthy" or self.stands
        for check in self.config.checks:
            assert rig.main.records[check.name].health == self.health(check)
        assert rig.main.verdict == self.verdict

    def let_pass(self, seconds):
        end = self.rig.now + seconds
        while True:
            self.step()
            if self.rig.now >= end:
                return
            self.rig.now = min(end, self.rig.now + hc.POLL_INTERVAL)

    # -- what may happen

    @rule(
        names=one_of("ab", "a", "b"), seconds=SECONDS,
        results=one_of("pp", "ff", "p", "f", "x", "fp", "ffxf", "ppp"),
    )  # fmt: skip
    def probes_end(self, names, results, seconds):
        for loop in self.idle():
            if loop.check.name in names:
                self.ends(loop, results)
        self.let_pass(seconds)

    @rule(results=one_of("fff", "ppp"), seconds=SECONDS)
    def all_services_are_down_or_up(self, results, seconds):
        self.begun_probes_end("x", 0)
        self.probes_end("ab", results, seconds)

    @rule(seconds=SECONDS)
    def probes_begin_and_hang_if_they_do_not_end_soon(self, seconds):
        for loop in self.idle():
            loop.probing = self.rig.now + next(loop.starts) * 1e-9
        self.let_pass(seconds)

    @rule(result=one_of("p", "f", "x"), seconds=SECONDS)
    def begun_probes_end(self, result, seconds):
        for loop in self.rig.loops:
            if loop.probing:
                start, loop.probing, passed = loop.probing, None, RESULTS[result]
                self.rig.inbox.append((loop, start, passed, "late"))
                record = self.rig.main.records.get(loop.check.name)
                is_known = record and record.loop is loop
                if is_known and (loop, start) not in self.hung and passed is not None:
                    self.results[loop.check.name].append(passed)
        self.let_pass(seconds)

    @rule(seconds=one_of(3.0, 45.0, 400.0, 86400.0))
    def the_whole_process_is_paused(self, seconds):
        self.step()
        before = {name: results.count(False) for name, results in self.results.items()}
        self.rig.now += seconds
        self.latest = max(self.latest, self.rig.now)
        self.step()
        self.begun_probes_end("f", 0)
        for name in before:
            assert self.results[name].count(False) <= before[name] + 1, "a pause is evidence"

    @rule(text=CONFIGS | st.none(), seconds=SECONDS)  # None: from a bad file
    def the_configuration_is_reloaded(self, text, seconds):
        old = {check.name: check for check in self.config.checks}
        self.file = text or "checks:\n"
        if text:
            self.config = configured(text)
            same = {check.name: check == old.get(check.name) for check in self.config.checks}
            self.results = {name: self.results[name] if same[name] else [] for name in same}
            self.next_verdict = self.rig.now
        self.rig.inbox.append(signal.SIGHUP)
        self.let_pass(seconds)

    @rule(
        state=one_of("InService", "InService", "InService", None, "Standby", "Warmed:Stopped"),
        problem=one_of("", "", "", "INSTANCE_ID is another machine's"),
        is_readable=one_of(True, True, False), seconds=SECONDS,
    )  # fmt: skip
    def metadata_changes(self, state, problem, is_readable, seconds):
        instance = self.rig.world.instance._replace(lifecycle=state, problem=problem)
        self.rig.world.instance, self.rig.world.is_readable = instance, is_readable
        self.let_pass(seconds)

    @rule(
        fate=one_of("good", "good", "refused", "page", "lost", "unsent", "recovers", "leaves"),
        seconds=one_of(0, 25, 400, 700),
    )  # fmt: skip
    def calls_have_this_fate_from_now_on(self, fate, seconds):
        self.fate = fate
        self.let_pass(seconds)

    @rule(why_not=one_of(None, "", "no route"), seconds=one_of(0, 100))
    def rehearsals_end_so_from_now_on(self, why_not, seconds):
        self.rig.rehearsal.why_not, self.rig.rehearsal.due = why_not, self.rig.now
        self.let_pass(seconds)

    def teardown(self):
        if hasattr(self, "rig"):
            self.rig.inbox.append(signal.SIGTERM)
            calls, self.rig.now = len(self.rig.world.calls), self.rig.now + 1000.0
            self.rig.main.step(self.rig.now)
            self.rig.marker.step(self.rig.now)
            self.rig.patch.undo()
            assert self.rig.main.status == 0 and len(self.rig.world.calls) == calls


def test_daemon_and_marker_keep_the_contract_whatever_happens_to_them(logged):
    settings = hypothesis.settings(max_examples=EXAMPLES // 10, stateful_step_count=50)
    stateful.run_state_machine_as_test(Machine, settings=settings)


RESOLVER = """\
echo nameserver 127.0.0.1 > {0}/resolv.conf
echo options timeout:30 attempts:5 >> {0}/resolv.conf
mount --bind {0}/resolv.conf /etc/resolv.conf
ip link set lo up
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
    http = {"endpoint": "http://service.example/", "frequency": "200ms"}
    tcp = {"type": "tcp", "endpoint": "service.example:80", "frequency": "400ms"}
    keys = {"timeout": "300ms", "threshold": "4"}
    text = yaml_of({"hangs": {**http, **keys}, "tcp": {**tcp, **keys}}, frequency="200ms")
    (tmp_path / "f.yml").write_text("graceperiod: 0\n" + text)
    command = f"{sys.executable} {PROGRAM} -healthcheckfile {tmp_path}/f.yml"
    script = RESOLVER.format(tmp_path, sys.executable) + f"""
    {command} -dry-run > {tmp_path}/out 2> {tmp_path}/err 9>&- &
    pid=$!
    for i in $(seq 600); do
        grep -q 'would have marked.*hangs.*tcp' {tmp_path}/err && break; sleep 0.1
    done
    start=$(date +%s%N); kill $pid; wait $pid
    echo status $? after $((($(date +%s%N) - start) / 1000000)) ms
    {command} -foreground 9>&- > /dev/null 2>&1; echo gate $?
    exec 9>&-; wait"""  # fmt: skip
    output, err = in_namespace(script).stdout, (tmp_path / "err").read_text()
    assert "no end after 0.3s: it hangs, probably in name resolution" in err
    assert re.search("would have marked.*hangs failing .*; tcp failing", err)
    status, milliseconds = re.search(r"status (\d+) after (\d+) ms", output).groups()
    assert status == "0" and int(milliseconds) / 1000 == PROMPTLY and "gate 1" in output
    stamps = [line[:23] for line in err.splitlines() if "Check hangs" in line]
    moments = [datetime.datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%S.%f") for stamp in stamps]
    assert 0.8 < (moments[1] - moments[0]).total_seconds() < 20  # three more failures, 300 ms apart


def test_a_pause_of_the_process_any_number_of_times_is_no_evidence(cloud, serve):
    port = serve(talk=sending(OK.encode(), pause=0.05)).port
    web = {"endpoint": f"http://127.0.0.1:{port}/", "frequency": "100ms"}
    tcp = {"type": "tcp", "endpoint": f"127.0.0.1:{port}", "frequency": "50ms"}
    checks = {"web": web, "tcp": tcp}
    checks = {name: {**check, "timeout": "4s", "threshold": "2"} for name, check in checks.items()}
    with sick(cloud, checks=checks) as program:
        program.wait_for("Verdict healthy")
        for _ in range(2):
            program.process.send_signal(signal.SIGSTOP)
            time.sleep(5)  # longer than a timeout, and many periods
            program.process.send_signal(signal.SIGCONT)
            program.more("Probe of web", 5)
        for name in checks:  # at most one failure for each pause, and none after it
            assert program.count(rf"Check {name} failed \(1 of 2\)") <= 2
        assert not program.count(" failing ") and not cloud.gateway.calls
        assert program.stop() == STOPPED


# ---- Service commands ----------------------------------------------------------------------------

BOOTED = "mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system /run/healthchecker && "
USER = "setpriv --reuid=54321 --inh-caps=+dac_read_search --ambient-caps=+dac_read_search"
NOTE = "mount -t tmpfs tmpfs /var/lib && cd /var/lib && mkdir healthchecker && "
NOTE += "printf 'i-1 eu-west-1' > healthchecker/marked &&"


def service_command(tmp_path, command, systemctl="", script="", prefix="", program=PROGRAM):
    """A -command where systemd seems to run (a mount namespace), and systemctl prints this."""
    (tmp_path / "systemctl").write_text(f"#!/bin/sh\ncat <<'END'\n{systemctl}\nEND\n")
    (tmp_path / "systemctl").chmod(0o755)
    line = f"{BOOTED}{script} exec {prefix} {sys.executable} {program} -command {command}"
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["unshare", "--mount", "sh", "-c", line], env=env, **CAPTURED)
    output = done.stdout + done.stderr.replace("ec2-local-healthchecker: ", "")
    return done.returncode, output.strip()


@pytest.mark.parametrize("command", ["install", "remove", "start", "stop"])
def test_what_changes_the_service_needs_root(tmp_path, command):
    said = service_command(tmp_path, command, prefix=USER)
    assert said == (1, f"-command {command} needs root: run it with sudo")


@pytest.mark.parametrize("systemctl, options, said", [
    ("systemd 239 (239-58.el8)", {}, "the service needs systemd 240 or newer"),
    ("toybox 0.8", {}, "the service needs systemd 240 or newer"),
    ("", {"script": f"cat {PROGRAM} |", "program": "-"},
     "it was run from standard input: fetch it into a file first, and run that"),
])  # fmt: skip
def test_install_refuses_what_cannot_work(tmp_path, systemctl, options, said):
    assert service_command(tmp_path, "install", systemctl, **options) == (1, said)


@pytest.mark.parametrize("command", hc.COMMANDS)
def test_where_systemd_does_not_run_each_command_says_so(command):
    program = run("-command", command)  # systemd is not PID 1 here
    said = "systemd does not run here: run this where it has booted the machine"
    assert program.process.returncode == 1 and program.lines == [f"ec2-local-healthchecker: {said}"]


ACTIVE = """\
ActiveState=active
SubState=running
ActiveEnterTimestamp=Sun 2026-11-22
InactiveEnterTimestamp=Sat 2026-11-21
UnitFileState=enabled
NRestarts=0
StatusText=
MainPID=42"""
STOPPED_STATE = ACTIVE.replace("=active", "=inactive").replace("running", "dead").replace("42", "0")


@pytest.mark.parametrize("could_mark, status", [(True, 0), (False, 4), (None, 0)])
def test_status_says_first_what_an_operator_wants_first(rig, tmp_path, could_mark, status):
    start = time.monotonic() - 15
    rig = rig(text_of(["graceperiod: 0"], {"a": [], "bbb": [], "c": []}), start=start)
    rig.probe("fff", "a", 0)
    rig.probe("fpppp", "bbb", 0)
    rig.step(10)
    why_not = {True: "", False: "no route -- check routes", None: None}[could_mark]
    rig.marker.publish(why_not=why_not)
    rig.main.directory = str(tmp_path)
    rig.main.show(rig.now)
    copy = f"cp {tmp_path}/status.json /run/healthchecker && "
    code, text = service_command(tmp_path, "status", ACTIVE, copy)
    assert code == status
    first = "unhealthy: a failing (failed 3 in a row, threshold 3) at http://localhost:80/: refused"
    if could_mark is False:
        first = f"A mark would not succeed now: {why_not}; {first}"
    assert text.startswith(f"{first}; marking as Unhealthy, calls so far: 1\n")
    ago = "-?[0-9]+s ago"
    assert re.fullmatch(fr"""
healthchecker: active \(running\) since Sun 2026-11-22, enabled, restarts: 0
CHECK  STATE    IN A ROW                ENDPOINT
a      failing  failed 3 \(threshold 3\)  http://localhost:80/
  last failure {ago}: refused
bbb    healthy  passed 4 \(threshold 3\)  http://localhost:80/
  last failure {ago}: refused
c      unknown  passed 0 \(threshold 3\)  http://localhost:80/
a mark of its own may stand
last call: Unhealthy, {ago}: it succeeded""", text[text.index("\n"):]), text  # fmt: skip


def test_status_exits_with_3_when_the_service_does_not_run(tmp_path):
    said = "healthchecker: inactive (dead) since Sat 2026-11-21, enabled, restarts: 0"
    assert service_command(tmp_path, "status", STOPPED_STATE) == (3, said)
    never = re.sub("(Timestamp|UnitFileState)=.*", r"\1=", STOPPED_STATE)
    said = "healthchecker: inactive (dead), not installed, restarts: 0"
    code, text = service_command(tmp_path, "status", never, NOTE)
    take_back = hc.how_to_take_back("i-1 eu-west-1")
    assert (code, text) == (3, f"{said}\n{take_back}")
    words = STOPPED_STATE.replace("Text=", f"Text={take_back}")  # as an ordinary user sees it too
    for script in ("", NOTE):
        code, text = service_command(tmp_path, "status", words, script)
        assert code == 3 and text.count("The group may still hold i-1 as Unhealthy") == 1


def test_status_shows_why_a_service_does_not_come_up(tmp_path):
    state = STOPPED_STATE.replace("inactive", "activating").replace("dead", "auto-restart")
    state = state.replace("StatusText=", "StatusText=f.yml:3: why")
    code, text = service_command(tmp_path, "status", state)
    assert code == 3 and text.endswith("\nits last words: f.yml:3: why")


@pytest.mark.parametrize("age, is_old", [(119, False), (121, True)])
def test_an_old_status_file_is_told_as_such(rig, tmp_path, age, is_old):
    rig = rig(start=time.monotonic() - age)
    rig.main.directory = str(tmp_path)
    rig.main.show(rig.now)
    copy = f"cp {tmp_path}/status.json /run/healthchecker && "
    code, text = service_command(tmp_path, "status", ACTIVE, copy)
    assert code == 0 and text.startswith(f"{hc.STATUS_FILE} is 1") == is_old


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0.0"}'])
def test_a_status_file_of_another_version_is_told_as_such(tmp_path, content):
    write = f"echo '{content}' > {hc.STATUS_FILE} && "
    code, text = service_command(tmp_path, "status", ACTIVE, write)
    assert code == 0 and "is not there (yet), or not of this version" in text


# ---- Command line --------------------------------------------------------------------------------


@pytest.mark.parametrize("dashes", ["-", "--"])
def test_version_and_help_which_fits_80_columns(dashes):
    assert run(dashes + "version").out == [f"ec2-local-healthchecker {hc.__version__}"]
    for name in ("h", "help"):
        program = run("-verbose", dashes + name)
        assert program.process.returncode == 0 and not program.err
        assert all(f" -{option}" in "\n".join(program.out) for option in hc.OPTIONS)
        assert all(len(line) <= 80 for line in program.out)


@pytest.mark.parametrize("line, said", [
    ("-nonsense", "'-nonsense' is not an option"), ("-healthcheckfil x", "mean -healthcheckfile?"),
    ("-test", "is not an option"), ("-testconfig=maybe", "of -testconfig is missing or wrong"),
    ("-foreground true", "'true' is not an option"), ("-healthcheckfile", "file is missing"),
    ("-launchtime soon", "since 1970"), ("-launchtime=1.5", "since 197"), ("-foreground=", "wrong"),
    ("---foreground", "an option"), ("-", "an option"), ("-- x", "an option"), ("-=x", "an option"),
    ("-launchtime 0x10", "seconds since 1970"), ("-healthcheckfile=", "is missing or wrong"),
    ("help", "did you mean -help?"), ("status", "'status' is not an option (-h lists them)"),
    ("-command restart", "-command takes one of install, remove, status, start, stop"),
    ("-command=install -dry-run", "goes alone: the options of the service are in /etc/sysconfig"),
    ("-fg-exit-early-if-healthy", "-fg-exit-early-if-healthy goes with -foreground"),
])  # fmt: skip
def test_usage_errors_are_one_line_and_status_2(line, said):
    program = run(*line.split())
    assert program.process.returncode == 2 and not program.out
    assert len(program.err) == 1 and said in program.err[0]


def test_testconfig_prints_the_effective_configuration():
    text = EXAMPLE + "    headers:\n      Authorization: secret\n"
    program = run("-testconfig", "-dry-run", "-verbose=true", "--healthcheckfile=-", stdin=text)
    assert program.process.returncode == 0
    assert program.err == ["<stdin>:14: threashold: read as threshold: correct the spelling"]
    shown = json.loads("\n".join(program.out))
    rest = {"status": "200", "headers": {}, "tls_verify": True, "timeout": 1, "frequency": 10}
    nginx = {**rest, "type": "http", "endpoint": "http://localhost:80/ping.html", "threshold": 10}
    nginx.update(frequency=1, headers={"Authorization": "***"})
    memcached = {**rest, "type": "tcp", "endpoint": "localhost:11211", "threshold": 4}
    checks = {"memcached": memcached, "nginx": nginx}
    assert shown == {"graceperiod": 10, "frequency": 10, "recovery": True, "checks": checks}


def test_testconfig_needs_no_boto3_and_no_network(tmp_path):
    (tmp_path / "f.yml").write_text(EXAMPLE)
    command = f"{sys.executable} -I -S {PROGRAM} -testconfig -healthcheckfile {tmp_path}/f.yml"
    done = in_namespace(f"exec {command}")
    assert done.returncode == 0 and '"nginx"' in done.stdout


@pytest.mark.parametrize("option", [["-testconfig"], ["-foreground"], ["-dry-run"], []])
def test_a_bad_configuration_is_one_line_and_status_2(option):
    program = run("-healthcheckfile", "-", *option, stdin="frequency: 10\n")
    assert program.process.returncode == 2 and not program.out
    assert program.err == ["<stdin>:1: frequency: '10' is not a duration: write 10s"]


@pytest.mark.parametrize("target", ["> /dev/full", ">&-"])
def test_output_that_cannot_be_written_is_no_traceback(target):
    command = f"exec {sys.executable} {PROGRAM} -help {target}"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in done.stderr and done.returncode in (0, 1)


@pytest.mark.parametrize("cut", [0.2, 0.5, 0.8, 0.97])
def test_a_truncated_download_does_not_run_half_of_the_program_and_exit_0(tmp_path, cut):
    lines = PROGRAM.read_text().splitlines(keepends=True)
    starts = [n for n, line in enumerate(lines) if re.match("def |class ", line)]
    place = min(starts, key=lambda start: abs(start - cut * len(lines)))  # the worst ones
    (tmp_path / "half.py").write_text("".join(lines[:place]))
    program = run("-version", program=tmp_path / "half.py")
    assert program.process.returncode == 1 and not program.out
    assert program.err == ["ec2-local-healthchecker: the file is incomplete: fetch it again"]


def test_a_gate_is_refused_as_the_main_process_of_a_service(serve):
    web = {**DEAD, "endpoint": f"http://127.0.0.1:{serve(OK).port}/", "timeout": "20s"}
    gate = ["-foreground", "-fg-exit-early-if-healthy", "-healthcheckfile=-"]
    for pid, status in ("$$", 2), ("1", 0):
        prefix = ["sh", "-c", f'WATCHDOG_PID={pid} NOTIFY_SOCKET=/no exec "$@"', "sh"]
        program = run(*gate, prefix=prefix, stdin=yaml_of({"web": web}))
        assert program.process.returncode == status
        said = "-foreground is not for a service: remove it from /etc/sysconfig/healthchecker"
        assert (program.err == [f"ec2-local-healthchecker: {said}"]) == (status == 2)


def test_a_daemon_without_standard_streams_works(cloud, tmp_path):
    (tmp_path / "f.yml").write_text(yaml_of({"web": DEAD}, graceperiod="0", frequency="200ms"))
    words = [sys.executable, str(PROGRAM), "-healthcheckfile", f"{tmp_path}/f.yml"]
    env = {**os.environ, **cloud.env, "RUNTIME_DIRECTORY": f"{tmp_path}:/elsewhere"}
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    process = subprocess.Popen(closed + words, env=env)
    try:
        marked(cloud)
        links = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
        assert links == ["/dev/null"] * 3
        assert json.loads((tmp_path / "status.json").read_text())["verdict"] == "unhealthy"
        process.terminate()
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


def test_the_launch_time_shortens_the_grace_period():
    web = {"endpoint": "http://127.0.0.1:1/", "frequency": "100ms"}
    text = yaml_of({"web": web}, graceperiod="1h", frequency="200ms")
    launched = str(int(time.time()) - 1800)
    with Program("-dry-run", "-healthcheckfile=-", "-launchtime", launched, stdin=text) as program:
        seconds = re.search("grace period: (.*)s", program.wait_for("grace period"))[1]
        assert 1700 < float(seconds) <= 1800
        assert program.stop() == STOPPED


def test_a_dry_run_needs_neither_boto3_nor_ec2_and_says_what_it_would_have_done():
    text = yaml_of({"web": DEAD}, graceperiod="0", frequency="200ms")
    env = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1"}
    program = Program("-dry-run", "-healthcheckfile=-", stdin=text, env=env, flags=["-S"])
    with program:
        line = program.wait_for("Dry run: would have marked")
        assert "as Unhealthy: this-instance: web failing (failed " in line
        assert program.stop() == STOPPED and not program.count("Marked Instance|may stand")
    assert any("INFO Stopped by SIGTERM" in line for line in program.out)
    assert all(re.match(STAMP + "(DEBUG|INFO) ", line) for line in program.out)
    assert all(re.match(STAMP + "(WARNING|ERROR) ", line) for line in program.err)


def test_without_boto3_the_daemon_refuses_to_start():
    program = run("-healthcheckfile=-", stdin=EXAMPLE, flags=["-I", "-S"])
    assert program.process.returncode == 1 and not program.out
    said = "ec2-local-healthchecker: boto3 is not installed: install the package python3-boto3 "
    assert program.err == [said + "(apt-get or dnf; on RHEL it is in EPEL)"]


def test_the_main_job_with_nginx_memcached_boto3_and_auto_scaling(cloud, nginx, request):
    port = free_port()
    cache = Service(["memcached", "-l", IP, "-p", str(port), "-U", "0", "-u", "root"], port)
    request.addfinalizer(cache.kill)
    text = EXAMPLE.replace("11211", str(port)).replace("80/ping.html", f"{nginx.port}/page")
    # Its times are ten times as short.
    text = text.replace("frequency: 1s", "frequency: 100ms").replace("10s", "1s")
    with Program("-healthcheckfile=-", stdin=text, env=cloud.env) as program:
        program.wait_for("Verdict healthy")
        assert cloud.health() == "Healthy" and not cloud.gateway.calls
        killed = time.monotonic()
        nginx.kill()
        wait_until(lambda: cloud.health() == "Unhealthy", "the mark")
        # Threshold 10, frequency 100 ms: no call before the tenth failure, 0.9 s after the kill.
        assert 0.9 <= cloud.gateway.marks()[0] - killed
        line = program.wait_for("Marked Instance as Unhealthy")
        assert cloud.instance in line and re.search("nginx failing .* Connection refused", line)
        assert "memcached" not in line and program.count(r"Check nginx failed \(1 of 10\)") == 1
        nginx.start()
        wait_until(lambda: cloud.health() == "Healthy", "the mark to be taken back")
        program.wait_for("Marked Instance as Healthy")
        cache.kill()
        program.wait_for("memcached failing .*Connection refused")
        wait_until(lambda: cloud.health() == "Unhealthy", "the second mark")
        cache.start()
        wait_until(lambda: cloud.health() == "Healthy", "the second mark to be taken back")
        assert cloud.gateway.most_at_once == 1 and program.stop() == STOPPED


def test_a_signal_at_any_moment_ends_it_within_a_second_and_without_a_traceback(cloud):
    times = []
    for n in range(20):
        with sick(cloud) as program:
            time.sleep(n * 0.04)
            # (Python itself may lose a SIGINT while it starts.)
            number = signal.SIGINT if n % 2 and program.out else signal.SIGTERM
            status, seconds = program.stop(number)
            early = status == -signal.SIGTERM and not program.out  # it was not there to see it
            assert (status == 0 or early) and seconds == PROMPTLY, program.lines
            times.append(seconds)
    assert sorted(times)[13] < 1


# ---- The repository ------------------------------------------------------------------------------


def test_no_wait_depends_on_the_wall_clock():
    """time.sleep and sockets never do; before 3.11, timed waits of threading and queue do."""
    text = PROGRAM.read_text()
    assert re.findall(r"\S+\.wait\([^)]+\)", text) == ["self.wait(pause)"]  # of class Stepper
    assert not re.search(r"thread\.join|acquire\(|import queue|get\(timeout", text)
    assert hc.Stepper.wait is time.sleep


def blocks(language):
    return re.findall(rf"^```{language}$\n(.*?)^```$", README, re.M | re.S)


def test_the_examples_of_the_readme_load():
    written = re.findall(r"healthchecker.yml <<'END'\n(.*?)^END$", README, re.M | re.S)
    assert len(blocks("yaml")) >= 1 and len(written) >= 1 and len(blocks("json")) == 2
    for text in blocks("yaml") + written:
        assert not configured(text).warnings
    assert all(map(json.loads, blocks("json")))


def test_the_timeline_of_the_readme_is_what_its_quick_start_does(rig, monkeypatch):
    monkeypatch.setattr(os, "urandom", lambda size: b"\x7f")
    rig, calls, failed = rig(blocks("yaml")[0], start=0.0), [], []
    rig.step(300)
    rig.probe("pp", seconds=10)
    rig.probe("p", seconds=0)
    assert rig.main.records["web"].health.state == "healthy"
    assert f"at {rig.now:.0f} s, after 3 probes, it is healthy" in README
    died = int(rig.now)
    for rig.now in range(died + 1, died + 1000):
        rig.step()  # a verdict comes before the end of the probe that is due with it
        if rig.now % 10 == 0:
            rig.probe("f", seconds=0)
            failed.append(rig.now - died)
        calls += [rig.now - died] * (len(rig.world.calls) - len(calls))
    lines = dict(re.findall(r"^ +(\d+) s   (.+(?:\n {11,}.+)*)$", blocks("text")[0], re.M))
    for number, second in enumerate(failed[:3], 1):
        assert lines[str(second)].startswith(f"probe: failed ({number} of 3)")
    assert "SetInstanceHealth, Unhealthy" in lines[str(calls[0])]
    assert lines[str(calls[1])].startswith("the call again")
    pauses = re.search(r"after (.*?) s more, then every 300 s", lines[str(calls[1])])[1]
    pauses = map(int, re.findall("[0-9]+", pauses))
    assert calls[1:] == [*itertools.accumulate([calls[1], *pauses, 300])]
    promise = int(re.search(r"\(here (\d+) s\)", README)[1])
    assert calls[0] < promise == 3 * max(10, 1) + 1 + 10 + 3


def test_the_readme_pins_this_very_file():
    digest = hashlib.sha256(PROGRAM.read_bytes()).hexdigest()
    pinned = re.findall(r"sha256=(\w+)", README)
    assert pinned and set(pinned) == {digest}, f"write sha256={digest} in README.md"


def test_the_unit_file_is_the_text_that_install_writes():
    assert (HERE / "healthchecker.service").read_text() == hc.UNIT
    for line in (f"Alias={hc.ORIGINAL}", f"EnvironmentFile=-{hc.ENVIRONMENT_FILE}"):
        assert line + "\n" in hc.UNIT


def test_the_readme_names_every_option_and_every_key_with_its_default():
    rows = re.findall(r"^\| (.*?) \| (.*) \|$", README, re.M)
    told = {name for cell, _ in rows for name in re.findall(r"`-([a-z-]+)", cell)}
    assert told == set(hc.OPTIONS)
    defaults = {cell.strip("`"): rest.split(" | ")[0].strip("` ") for cell, rest in rows}
    for keys, kind in ((hc.TOP_KEYS, hc.Config), (hc.CHECK_KEYS, hc.Check)):
        for name in set(keys) - {"endpoint", "checks", "headers", "frequency"}:
            assert keys[name][0](defaults[name]) == kind._field_defaults[name], name


def test_the_script_metadata_asks_for_what_the_readme_installs():
    def dependencies(path):
        block = re.search(r"^# /// script\n(.*?)^# ///$", path.read_text(), re.M | re.S)[1]
        return re.findall(r'"([\w-]+)"', block.split("dependencies", 1)[1])

    command = blocks("sh")[1].replace("\\\n", "")
    installed = re.search(r"pip install (.*?) &&", command, re.S)[1].split()
    assert dependencies(HERE / "test_ec2_local_healthchecker.py") == installed
    assert dependencies(PROGRAM) == ["boto3"]


def test_each_room_of_the_program_uses_only_the_rooms_above_it():
    text = PROGRAM.read_text()
    lines, tree, home = text.splitlines(), ast.parse(text), {}
    rooms = [number for number, line in enumerate(lines, 1) if line.startswith("# ---- ")]
    assert all(lines[room].startswith("# ") for room in rooms) and len(rooms) == 10

    def room_of(node):
        return sum(room < node.lineno for room in rooms)

    for node in tree.body:
        for target in node.targets if isinstance(node, ast.Assign) else [node]:
            for part in getattr(target, "elts", [target]):
                home[getattr(part, "id", getattr(part, "name", None))] = room_of(node)
    assert home["Health"] == 1 and home["main"] == 10
    for node in tree.body:
        used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        early = {name for name in used & set(home) if home[name] > room_of(node)}
        assert not early, f"used on line {node.lineno}, in a room above their own: {early}"
