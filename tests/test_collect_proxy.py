"""The human editor behind a forwarded port or a reverse proxy (--public-url).

The proxy here passes the Host on or replaces it, and cuts the path of its URL off or keeps it.
"""

import http.client
import http.server
import json
import re
import threading

import pytest

from fgrlhf.collect import __main__ as collect
from fgrlhf.collect.web import Address
from fgrlhf.data.fields import UserError
from fgrlhf.engine.config import parse
from tests.test_collect_page import (                      # the last two are fixtures
    RECORDS, SHOWN, Program, showing, write, browser, start)
from tests.browser import CTRL


class Proxy(http.server.ThreadingHTTPServer):
    """Forwards every request to a port of this machine, as tunnels and notebook servers do.

    own_host: replace the Host by the one of the target. keep_path: send the proxy's path too.
    """

    daemon_threads = True

    def __init__(self, path: str = "", own_host: bool = False, keep_path: bool = False):
        super().__init__(("127.0.0.1", 0), Forward)
        self.path, self.own_host, self.keep_path = path, own_host, keep_path
        self.url, self.target = f"http://localhost:{self.server_port}{path}", 0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *_):
        self.shutdown()
        super().__exit__()


class Forward(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path if self.server.keep_path else self.path.removeprefix(self.server.path)
        headers = dict(self.headers)
        if self.server.own_host:
            headers["Host"] = f"127.0.0.1:{self.server.target}"
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
        connection = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=20)
        connection.request(self.command, path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.getheader("Content-Type"))
        self.end_headers()
        self.wfile.write(data)
        connection.close()

    do_POST = do_GET

    def log_message(self, *_):
        pass


def behind(proxy: Proxy, start) -> Program:
    """A program whose --public-url is the proxy's; `port` and `path` are those of the program."""
    program = start(RECORDS, "--public-url", proxy.url, "--annotator", "Ada")
    own = re.fullmatch(r"It must lead to http://127.0.0.1:(\d+)(/\S+/)\n",
                       program.process.stderr.readline())
    proxy.target = program.port = int(own[1])
    program.path = own[2]
    assert program.url == proxy.url + own[2]
    return program


@pytest.mark.parametrize("options", [
    {}, {"own_host": True}, {"path": "/proxy/8000"}, {"path": "/proxy/8000", "own_host": True},
    {"path": "/proxy/8000", "keep_path": True}], ids=str)
def test_the_page_works_behind_a_forwarded_port_and_a_proxy(start, browser, options):
    with Proxy(**options) as proxy:
        program = behind(proxy, start)
        tab = browser.open(program.url)
        tab.wait(SHOWN)
        write(tab, "Neil Armstrong did, in July 1969.")
        tab.press("Enter", CTRL)
        showing(tab, 1)
        tab.close()
        assert program.edits()["moon"]["edited"] == "Neil Armstrong did, in July 1969."
        assert program.request("GET", program.path)[0] == 200              # directly, as before
        assert program.post("start", {})[0] == 200


def test_a_forwarded_port_without_public_url_says_what_to_do(start, browser):
    program = start()
    with Proxy() as proxy:
        proxy.target = program.port
        tab = browser.open(proxy.url + program.path)
        assert "start the program with --public-url" in tab.wait("document.body?.innerText")
        tab.close()


def test_public_url_adds_exactly_its_own_origin_and_host(start):
    """The attacks above stay refused, directly and through the proxy."""
    with Proxy("/proxy") as proxy:
        program, public = behind(proxy, start), f"localhost:{proxy.server_port}"
        own = f"127.0.0.1:{program.port}"
        for host, origin, status in (
                (public, f"http://{public}", 200), (own, f"http://{public}", 200),
                (own, f"http://{own}", 200), (public, f"http://{own}", 403),
                (public, f"https://{public}", 403), (public, "http://evil.test", 403),
                (own, "http://evil.test", 403), (public, "null", 403), (public, None, 403),
                (public, "http://localhost", 403), ("evil.test", f"http://{public}", 403),
                (f"evil.test:{proxy.server_port}", f"http://{public}", 403),
                ("localhost", f"http://{public}", 403), (f"{public}.evil.test", "null", 403)):
            headers = {"Host": host, "Content-Type": "application/json"}
            headers |= {"Origin": origin} if origin else {}
            for path in (program.path, "/proxy" + program.path):
                assert program.request("POST", path + "start", "{}", **headers)[0] == status, (
                    host, origin)
        for path in ("/", "/proxy/", "/proxy/wrong-token/", "/proxy" + program.path[:-1],
                     "/proxy/proxy" + program.path, "/other" + program.path):
            assert program.request("GET", path, Host=public)[0] == 404


@pytest.mark.parametrize("url, origin, hosts, path", [
    ("http://localhost:9000", "http://localhost:9000", {"localhost:9000"}, "/"),
    ("https://Hub.Example.org/user/ada/proxy/8000/", "https://hub.example.org",
     {"hub.example.org", "hub.example.org:443"}, "/user/ada/proxy/8000/"),
    ("https://hub.example.org:443", "https://hub.example.org",
     {"hub.example.org", "hub.example.org:443"}, "/"),
    ("http://[::1]:9000/x", "http://[::1]:9000", {"[::1]:9000"}, "/x/")])
def test_address_reads_a_public_url(url, origin, hosts, path):
    address = Address(url)
    assert (address.origin, address.hosts, address.path) == (origin, hosts, path)


@pytest.mark.parametrize("url", ["localhost:9000", "ftp://h", "http://", "http://u:p@h", "//h",
                                 "http://h:port", "http://h:0", "http://h:99999", "http://h/?x",
                                 "http://h/#x", "http://a b", "http://h/\u00e4", "http://[::1"])
def test_a_bad_public_url_is_refused_before_anything_is_written(tmp_path, url):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(RECORDS[0]) + "\n")
    with pytest.raises(UserError, match="--public-url .*: expected http"):
        collect.main(parse(collect.Config, argv=[
            "--pairs", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "edits.jsonl"),
            "--editor", "human", "--public-url", url]))
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
