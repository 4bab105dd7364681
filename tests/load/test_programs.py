"""Servers and clients that nobody here wrote, under load: many connections at once, and every answer checked.

`tox run -e load` does more of everything, and runs tests/sockets/test_connections.py with 10,000.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmmc_emu import Cluster, Node

TIMEOUT_S = 100
MORE = "VMMC_TEST_LOAD" in os.environ  # tox run -e load
SECONDS = 3 if MORE else 1


@contextlib.contextmanager
def serving(node: Node, command: list[str], port: int, directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Runs a server on a node until the block ends; it must still live then."""
    with (directory / f"server-{port}.log").open("w+") as log:
        process = node.popen(command, cwd=directory, stdout=log, stderr=subprocess.STDOUT, text=True)
        try:
            node.wait_for_port(port, timeout=30)
            yield process
            assert process.poll() is None
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            finally:
                process.kill()
                process.wait()
                log.seek(0)
                print(log.read()[-10000:])  # shown when the test fails


def received(cluster: Cluster) -> int:
    """Bytes that all its NICs have received."""
    return sum(each["bytes_received"] for each in cluster.counters().values())


@contextlib.contextmanager
def through_the_nics(cluster: Cluster, bytes_at_least: int) -> Iterator[None]:
    """So many bytes came by way of NICs in this block, and not around them."""

    before = received(cluster)
    yield
    assert received(cluster) - before >= bytes_at_least


def run(node: Node, *command: str, **options: Any) -> str:
    """What a program that must succeed writes."""
    done = node.run(list(command), timeout=TIMEOUT_S, **options)
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    out: str = done.stdout
    return out


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.fixture(scope="module")
def four_nodes() -> Iterator[Cluster]:
    with Cluster(nodes=4, name=f"test-{os.urandom(6).hex()}") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 files of up to 200 KB, and a larger one."""
    directory = tmp_path_factory.mktemp("files")
    directory.chmod(0o755)
    source = random.Random(3)
    for i in range(100):
        (directory / f"file{i}").write_bytes(source.randbytes(source.randrange(200_000)))
    (directory / "small").write_bytes(source.randbytes(4000))
    (directory / "medium").write_bytes(source.randbytes(1_000_000))
    (directory / "large").write_bytes(source.randbytes(20_000_000))
    return directory


# ---- redis ----


def redis_values(host: str, worker: int, rounds: int) -> int:
    """Sets and gets values of its own; returns how many it found right."""

    def command(*words: bytes) -> bytes:
        return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)

    source = random.Random(worker)
    with socket.create_connection((host, 6379), timeout=60) as connection:
        stream = connection.makefile("rwb")
        for i in range(rounds):
            key = b"checked:%d:%d" % (worker, i)
            value = source.randbytes(source.choice([1, 100, 5000, 70000]))
            stream.write(command(b"SET", key, value) + command(b"GET", key))
            stream.flush()
            assert stream.readline() == b"+OK\r\n"
            assert stream.readline() == b"$%d\r\n" % len(value)
            assert stream.read(len(value) + 2) == value + b"\r\n"
    return rounds


def redis_info(node: Node) -> dict[str, str]:
    lines = run(node, "redis-cli", "-h", "node0", "info", "persistence").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


@pytest.mark.programs("redis-server", "redis-benchmark", "redis-cli")
def test_redis(four_nodes: Cluster, tmp_path: Path) -> None:
    """200 connections with pipelines, while the server forks to save and to rewrite its log."""
    node, client = four_nodes.node(0), four_nodes.node(1)
    server = ["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""]
    server += ["--appendonly", "yes"]
    rounds, saves, requests = (300, 3, 200_000) if MORE else (100, 1, 40_000)

    # Each value that is checked went there and came back; a command of the benchmark has 20 bytes and more.
    total = 4 * rounds * 2500 + 5 * requests * 20
    with serving(node, server, 6379, tmp_path), through_the_nics(four_nodes, total):
        clients = [four_nodes.node(2 + i % 2).submit(redis_values, "node0", i, rounds) for i in range(4)]
        with client.popen(
            ["redis-benchmark", "-h", "node0", "-c", "200", "-n", str(requests), "-P", "16", "-r", "10000",
             "-q", "-t", "set,get,incr,lpush,lrange_100", "--csv"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) as benchmark:  # fmt: skip
            try:
                for _ in range(saves):
                    for save in ("bgsave", "bgrewriteaof"):
                        run(client, "redis-cli", "-h", "node0", save)
                        deadline = time.monotonic() + 60
                        while True:
                            said = redis_info(client)
                            if said["rdb_bgsave_in_progress"] == said["aof_rewrite_in_progress"] == "0":
                                break
                            assert time.monotonic() < deadline
                            time.sleep(0.05)
                        assert said["rdb_last_bgsave_status"] == said["aof_last_bgrewrite_status"] == "ok"
                output, _ = benchmark.communicate(timeout=TIMEOUT_S)
            finally:
                benchmark.kill()
        assert benchmark.returncode == 0, output
        assert len([line for line in output.splitlines() if line.startswith('"')]) >= 6, output
        assert "rror" not in output
        assert [each.result() for each in clients] == [rounds] * 4
        digest = run(client, "redis-cli", "-h", "node0", "debug", "digest").strip()
        size = run(client, "redis-cli", "-h", "node0", "dbsize")
    # What was answered is what the log has.
    with serving(node, server, 6379, tmp_path):
        deadline = time.monotonic() + 60
        while redis_info(client).get("loading") != "0" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert run(client, "redis-cli", "-h", "node0", "dbsize") == size
        assert run(client, "redis-cli", "-h", "node0", "debug", "digest").strip() == digest
        assert int(size) > 4 * rounds


# ---- memcached ----


def memcached_values(host: str, worker: int, connections: int, rounds: int) -> int:
    """Many connections, all with a command under way before the first answer is read."""
    source = random.Random(worker)
    checked = 0
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_connection((host, 11211), timeout=60))
            for _ in range(connections)
        ]
        streams = [stack.enter_context(each.makefile("rb")) for each in sockets]
        for round in range(rounds):
            values = [source.randbytes(source.choice([1, 50, 3000, 60000])) for _ in sockets]
            for i, (each, value) in enumerate(zip(sockets, values, strict=True)):
                key = b"%d.%d.%d" % (worker, i, round % 3)
                each.sendall(b"set %s 0 0 %d\r\n%s\r\nget %s\r\n" % (key, len(value), value, key))
            for stream, value in zip(streams, values, strict=True):
                assert stream.readline() == b"STORED\r\n"
                assert stream.readline().endswith(b" %d\r\n" % len(value))
                assert stream.read(len(value) + 7) == value + b"\r\nEND\r\n"
                checked += 1
    return checked


@pytest.mark.programs("memcached")
def test_memcached(four_nodes: Cluster, tmp_path: Path) -> None:
    """Four threads behind one listener."""
    command = ["memcached", "-t", "4", "-U", "0", "-m", "256", "-c", "2000", "-l", "0.0.0.0"]
    if os.geteuid() == 0:
        command += ["-u", "root"]
    with serving(four_nodes.node(0), command, 11211, tmp_path):
        rounds = 20 if MORE else 8
        with through_the_nics(four_nodes, 6 * 50 * rounds * 2 * 5000):
            clients = [
                four_nodes.node(1 + i % 3).submit(memcached_values, "node0", i, 50, rounds) for i in range(6)
            ]
            assert [each.result() for each in clients] == [50 * rounds] * 6


# ---- HTTP ----


@contextlib.contextmanager
def nginx(node: Node, files: Path, home: Path) -> Iterator[None]:
    user = "user root;" if os.geteuid() == 0 else ""
    temporary = "".join(
        f"{each}_temp_path {home}/{each};" for each in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (home / "nginx.conf").write_text(f"""
        {user} daemon off; master_process off; pid {home}/pid; error_log stderr;
        events {{ worker_connections 4096; }}
        http {{
            access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000; {temporary}
            server {{ listen 8080; listen [::]:8080; root {files}; }}
        }}""")
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    with serving(node, [program, "-p", str(home), "-c", str(home / "nginx.conf")], 8080, home):
        yield


@pytest.mark.programs("nginx", "wrk")
@pytest.mark.parametrize("name", ["small", "medium"])
def test_nginx_and_wrk(name: str, four_nodes: Cluster, files: Path, tmp_path: Path) -> None:
    """One process, sendfile, keep-alive; 100 connections.  Each small answer is compared with the file."""
    script = tmp_path / "compare.lua"
    script.write_text(f"""
        local file = io.open("{files / name}", "rb"); local want = file:read("*a")
        function response(status, headers, body)
          if status ~= 200 or body ~= want then io.stderr:write("wrong answer\\n"); os.exit(1) end
        end""")
    compare = ["-s", str(script)] if name == "small" else []  # wrk would hold 100 answers at a time
    size = (files / name).stat().st_size
    with nginx(four_nodes.node(0), files, tmp_path):
        before = received(four_nodes)
        said = run(four_nodes.node(1), "wrk", "-t", "2", "-c", "100", "-d", f"{SECONDS}s", "--timeout", "60s",
                   *compare, f"http://node0:8080/{name}")  # fmt: skip
        assert "Socket errors" not in said
        assert "Non-2xx" not in said
        requests = re.search(r"(\d+) requests in", said)
        assert requests and int(requests[1]) > 0, said
        assert received(four_nodes) - before >= int(requests[1]) * size


def curl_parallel(node: Node, urls: list[str], files: Path, directory: Path) -> None:
    """Many transfers at once; each file must be what the server has."""
    lines = []
    for i, url in enumerate(urls):
        lines += [f'url = "{url}"', f'output = "{directory}/{i}"']
    command = ["curl", "-sSf", "--parallel", "--parallel-immediate", "--parallel-max", "100"]
    run(node, *command, "--no-progress-meter", "-K", "-", input="\n".join(lines))
    for i, url in enumerate(urls):
        assert (directory / str(i)).read_bytes() == (files / url.rsplit("/", 1)[1]).read_bytes(), url


@pytest.mark.programs("nginx", "curl")
def test_nginx_and_curl(four_nodes: Cluster, files: Path, tmp_path: Path) -> None:
    urls = [f"http://node0:8080/file{i % 100}" for i in range(500)] + ["http://node0:8080/large"] * 5
    total = sum((files / url.rsplit("/", 1)[1]).stat().st_size for url in urls)
    with nginx(four_nodes.node(0), files, tmp_path), through_the_nics(four_nodes, total):
        curl_parallel(four_nodes.node(1), urls, files, tmp_path)


@pytest.mark.programs("curl")
def test_http_on_every_address(four_nodes: Cluster, files: Path, tmp_path: Path) -> None:
    """A server on [::], with clients of both families."""
    node = four_nodes.node(0)
    command = [sys.executable, "-m", "http.server", "8081", "--bind", "::", "--directory", str(files)]
    with serving(node, command, 8081, tmp_path):
        total = sum((files / f"file{i}").stat().st_size for i in range(100))
        for host in (node.address, f"[{node.address6}]"):
            urls = [f"http://{host}:8081/file{i}" for i in range(100)]
            with through_the_nics(four_nodes, total):
                curl_parallel(four_nodes.node(2), urls, files, tmp_path)


# ---- streams of bytes ----


@pytest.mark.programs("iperf3")
@pytest.mark.parametrize(
    "options", [["-P", "8"], ["-P", "8", "-R"], ["--bidir"], ["-P", "8", "--bidir"]], ids=" ".join
)
def test_iperf3(options: list[str], four_nodes: Cluster, tmp_path: Path) -> None:
    with serving(four_nodes.node(0), ["iperf3", "-s"], 5201, tmp_path):
        before = received(four_nodes)
        command = ["iperf3", "-c", "node0", "-t", str(SECONDS), "-J", *options]
        said = json.loads(run(four_nodes.node(1), *command))
        assert "error" not in said
        end = said["end"]
        assert len(end["streams"]) == (8 if "-P" in options else 1) * (2 if "--bidir" in options else 1)
        assert all(each["receiver"]["bytes"] > 0 for each in end["streams"])
        ways = ["", "_bidir_reverse"] if "--bidir" in options else [""]
        assert received(four_nodes) - before >= sum(end[f"sum_received{way}"]["bytes"] for way in ways)
        for way in ways:
            assert 0 < end[f"sum_received{way}"]["bytes"] <= end[f"sum_sent{way}"]["bytes"]


@pytest.mark.programs("socat")
def test_socat(four_nodes: Cluster, files: Path, tmp_path: Path) -> None:
    """Twenty pairs at once, each with a file in one direction and its echo in the other."""
    server, client = four_nodes.node(0), four_nodes.node(1)
    total = 2 * sum((files / f"file{i}").stat().st_size for i in range(20))
    with through_the_nics(four_nodes, total), contextlib.ExitStack() as stack:
        running = []
        for i in range(20):
            port = 7100 + i
            echo = stack.enter_context(server.popen(["socat", f"TCP-LISTEN:{port}", "PIPE"]))
            stack.callback(echo.kill)
            server.wait_for_port(port)
            output = stack.enter_context((tmp_path / f"echo{i}").open("wb"))
            source = stack.enter_context((files / f"file{i}").open("rb"))
            each = stack.enter_context(
                client.popen(["socat", "-t", "60", "STDIO", f"TCP:node0:{port}"], stdin=source, stdout=output)
            )
            stack.callback(each.kill)
            running += [echo, each]
        assert [each.wait(timeout=TIMEOUT_S) for each in running] == [0] * 40
    for i in range(20):
        assert sha256(tmp_path / f"echo{i}") == sha256(files / f"file{i}")


@pytest.mark.programs("openssl")
def test_openssl(four_nodes: Cluster, files: Path, tmp_path: Path) -> None:
    """TLS: s_server serves files to eight s_clients, one after the other as it does."""
    run(four_nodes.node(0), "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=node0",
        "-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "certificate"))  # fmt: skip
    shutil.copy(files / "large", tmp_path)
    server = ["openssl", "s_server", "-accept", "4433", "-key", "key", "-cert", "certificate"]
    server += ["-WWW", "-quiet"]
    client = ["openssl", "s_client", "-connect", "node0:4433", "-quiet", "-verify_quiet",
              "-CAfile", str(tmp_path / "certificate"), "-verify_return_error"]  # fmt: skip

    def fetch(i: int) -> bytes:
        done = four_nodes.node(1 + i % 3).run(
            client, input=b"GET /large HTTP/1.0\r\n\r\n", capture_output=True, timeout=TIMEOUT_S
        )
        assert done.returncode == 0, done.stderr
        out: bytes = done.stdout
        return out

    with (
        serving(four_nodes.node(0), server, 4433, tmp_path),
        through_the_nics(four_nodes, 8 * 20_000_000),
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        for answer in pool.map(fetch, range(8)):
            head, _, body = answer.partition(b"\r\n\r\n")
            assert b"200 ok" in head
            assert body == (files / "large").read_bytes()


# ---- programs in other languages, with event loops of their own ----

ASYNCIO_SERVER = """
import asyncio

async def echo(reader, writer):
    while line := await reader.readline():
        writer.write(line)
        await writer.drain()
    writer.close()

async def main():
    async with await asyncio.start_server(echo, "0.0.0.0", 7200, backlog=2000) as server:
        await server.serve_forever()

asyncio.run(main())
"""


def asyncio_clients(host: str, port: int, clients: int, rounds: int) -> int:
    """All connected before the first says anything; returns how many answers were right."""
    connected = 0
    all_connected = asyncio.Event()

    async def client(i: int) -> int:
        nonlocal connected
        reader, writer = await asyncio.open_connection(host, port)
        connected += 1
        if connected == clients:
            all_connected.set()
        await all_connected.wait()
        for round in range(rounds):
            line = b"%d %d %s\n" % (i, round, b"x" * (i * 7 % 3000))
            writer.write(line)
            assert await reader.readline() == line
        writer.close()
        await writer.wait_closed()
        return rounds

    async def main() -> int:
        return sum(await asyncio.gather(*(client(i) for i in range(clients))))

    return asyncio.run(main())


def test_asyncio(four_nodes: Cluster, tmp_path: Path) -> None:
    """1,000 clients of one server."""
    with serving(four_nodes.node(0), [sys.executable, "-c", ASYNCIO_SERVER], 7200, tmp_path):
        rounds = 20 if MORE else 5
        with through_the_nics(four_nodes, 1000 * rounds * 2 * 1300):
            clients = [four_nodes.node(i).submit(asyncio_clients, "node0", 7200, 500, rounds) for i in (1, 2)]
            assert [each.result() for each in clients] == [500 * rounds] * 2


NODE_SERVER = """
const http = require("http"), crypto = require("crypto");
http.createServer((request, response) => {
  const hash = crypto.createHash("sha256");
  request.on("data", (piece) => hash.update(piece));
  request.on("end", () => response.end(hash.digest("hex")));
}).listen(7300, "0.0.0.0");
"""

NODE_CLIENT = """
const http = require("http"), crypto = require("crypto");
const agent = new http.Agent({ keepAlive: true, maxSockets: 200 });
let right = 0, total = Number(process.argv[1]);
for (let i = 0; i < total; i++) {
  const body = crypto.randomBytes((i * 7919) % 50000);
  const want = crypto.createHash("sha256").update(body).digest("hex");
  const request = http.request({ host: "node0", port: 7300, method: "POST", agent }, (response) => {
    let got = "";
    response.on("data", (piece) => (got += piece));
    response.on("end", () => {
      if (got !== want) process.exit(1);
      if (++right === total) { console.log(right); agent.destroy(); }
    });
  });
  request.end(body);
}
"""


@pytest.mark.programs("node")
def test_node(four_nodes: Cluster, tmp_path: Path) -> None:
    """node.js (libuv) on both sides: many requests over 200 connections that are kept."""
    requests = 2000 if MORE else 600
    with (
        serving(four_nodes.node(0), ["node", "-e", NODE_SERVER], 7300, tmp_path),
        through_the_nics(four_nodes, requests * 20_000),
    ):
        assert run(four_nodes.node(1), "node", "-e", NODE_CLIENT, str(requests)) == f"{requests}\n"


JAVA = """
import java.io.*; import java.net.*; import java.util.*; import java.util.concurrent.*;
public class Echo {
  public static void main(String[] args) throws Exception {
    if (args[0].equals("serve")) {
      ServerSocket listener = new ServerSocket(7400, 500);
      while (true) {
        Socket one = listener.accept();
        Thread t = new Thread(() -> { try (one) { one.getInputStream().transferTo(one.getOutputStream()); }
                                      catch (IOException e) { e.printStackTrace(); } });
        t.start();
      }
    }
    ExecutorService pool = Executors.newFixedThreadPool(100);
    List<Future<Integer>> all = new ArrayList<>();
    for (int i = 0; i < 100; i++) {
      int seed = i;
      all.add(pool.submit(() -> {
        try (Socket s = new Socket("node0", 7400)) {
          Random random = new Random(seed);
          DataInputStream in = new DataInputStream(s.getInputStream());
          for (int round = 0; round < 50; round++) {
            byte[] sent = new byte[1 + random.nextInt(10000)], got = new byte[sent.length];
            random.nextBytes(sent);
            s.getOutputStream().write(sent);
            in.readFully(got);
            if (!Arrays.equals(sent, got)) throw new IOException("wrong bytes");
          }
          return 50;
        }
      }));
    }
    int sum = 0;
    for (Future<Integer> each : all) sum += each.get();
    System.out.println(sum);
    pool.shutdown();
  }
}
"""


@pytest.mark.skipif(not MORE, reason="node.js stands for both; tox run -e load has it")
@pytest.mark.programs("java", "javac")
def test_java(four_nodes: Cluster, tmp_path: Path) -> None:
    """Java on both sides: a thread a connection, 100 of them."""
    (tmp_path / "Echo.java").write_text(JAVA)
    subprocess.run(["javac", "Echo.java"], cwd=tmp_path, check=True, timeout=TIMEOUT_S)
    java = ["java", "-Xmx256m", "-cp", str(tmp_path), "Echo"]
    with (
        serving(four_nodes.node(0), [*java, "serve"], 7400, tmp_path),
        through_the_nics(four_nodes, 5000 * 2 * 4000),
    ):
        assert run(four_nodes.node(1), *java, "load") == "5000\n"
