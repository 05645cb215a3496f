"""Isolation of tenants, and access to the operator's endpoints."""

from __future__ import annotations

import hashlib
import json
import os
import random
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine import Engine, EngineConfig
from engine.front.server.access import Access
from engine.front.server.settings import ServerConfig
from tests.refused import refused
from tests.waiting import wait_until

from .conftest import Live, Serve, serving
from .dialects import bodies

PROMPT = "what a tenant asks, again and again. " * 12


def cache_counts(live: Live, salt: str | None = None, **headers: str) -> dict[str, Any]:
    """Return the prompt token details of a request with ``salt``."""
    body = {"prompt": PROMPT, "max_tokens": 1, "cache_salt": salt}
    answer = live.post("/v1/completions", body, **headers)
    details: dict[str, Any] = answer.json()["usage"]["prompt_tokens_details"]
    return details


def cached_tokens(live: Live, salt: str | None = None, **headers: str) -> int:
    """Return the number of cached tokens of a request with ``salt``."""
    tokens: int = cache_counts(live, salt, **headers)["cached_tokens"]
    return tokens


def are_all_cold(counts: list[dict[str, Any]]) -> bool:
    """Return True if all counts equal those of a first request.

    Loss causes would otherwise reveal token by token which prompts others sent.
    """
    lost = counts[0]["lost_tokens"]
    is_cold = counts[0]["cached_tokens"] == 0 and lost["never_seen"] == sum(lost.values()) > 0
    return is_cold and all(other == counts[0] for other in counts)


def test_keys_share_nothing_with_salt_by_key(serve_oracle: Serve, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n")
    keys = [{"Authorization": f"Bearer {key}"} for key in ("one", "two")]
    both = [(key, salt) for key in keys for salt in (None, "a", "one", "two")]
    live = serve_oracle(ServerConfig(api_key_file=str(tmp_path / "keys"), salt_by_key=True))
    assert are_all_cold([cache_counts(live, salt, **key) for key, salt in both])
    assert all(cached_tokens(live, salt, **key) > 0 for key, salt in both)
    by_default = serve_oracle(ServerConfig(api_key_file=str(tmp_path / "keys")))
    assert are_all_cold([cache_counts(by_default, **key) for key in keys])
    shared = serve_oracle(ServerConfig(api_key_file=str(tmp_path / "keys"), salt_by_key=False))
    assert cached_tokens(shared, **keys[0]) == 0 and cached_tokens(shared, **keys[1]) > 0


def test_salt_header_works_on_every_method(serve_oracle: Serve) -> None:
    live = serve_oracle()
    assert cached_tokens(live, "me") == 0
    assert cached_tokens(live, **{"x-cache-salt": "you"}) == 0
    assert cached_tokens(live, **{"x-cache-salt": "me"}) > 0
    assert cached_tokens(live, "me", **{"X-Cache-Salt": "me"}) > 0
    assert cached_tokens(live, "you") > 0 and cached_tokens(live) == 0
    # The encoding of non-ASCII headers by curl and other clients.
    url, body = live.url + "/v1/completions", {"prompt": PROMPT, "max_tokens": 1}
    assert cached_tokens(live, "é") == 0
    answer = httpx.post(url, json=body, headers=[(b"x-cache-salt", "é".encode())])
    assert int(answer.headers["x-cache-hit-tokens"]) > 0
    for wrong in (b"", b"\xff", "\N{REPLACEMENT CHARACTER}".encode()):
        answer = httpx.post(url, json=body, headers=[(b"x-cache-salt", wrong)])
        assert answer.status_code == 400 and "param" in answer.json()["error"]
    both = httpx.post(url, json=body | {"cache_salt": "me"}, headers={"x-cache-salt": "you"})
    assert both.status_code == 400 and "has one salt" in both.text
    twice = httpx.post(url, json=body, headers=[("x-cache-salt", "me"), ("x-cache-salt", "you")])
    assert twice.status_code == 400
    stored = live.post("/v1/responses", {"input": "x"}, **{"x-cache-salt": "me"}).json()["id"]
    for method, expected in (("GET", 200), ("DELETE", 200), ("GET", 404)):
        path = f"{live.url}/v1/responses/{stored}"
        for salt, status in (("you", 404), ("", 400), ("me", expected)):
            answer = httpx.request(method, path, headers={"x-cache-salt": salt})
            assert answer.status_code == status
        assert httpx.request(method, path).status_code == 404


def test_shown_namespaces_do_not_reveal_salts(serve_oracle: Serve) -> None:
    """The hash of a salt depends on a secret that each server makes at its start."""
    namespaces = []
    for _ in range(2):
        live = serve_oracle()
        cached_tokens(live, "tenant-17")
        tree = live.report()["tree"]
        namespaces.append({line for line in tree if line.startswith("namespace")})
    assert len(namespaces[0]) == len(namespaces[1]) == 1 and namespaces[0] != namespaces[1]
    assert "tenant-17" not in str(namespaces)


@pytest.mark.usefixtures("always_loads")
def test_tenant_entries_are_found_after_a_restart(tmp_path: Path, caplog: Any) -> None:
    """The order of keys in the file does not matter. Files of the folder do not name a tenant."""
    folder, keys = tmp_path / "state", tmp_path / "keys"
    settings = ServerConfig(api_key_file=str(keys))

    def start(*lines: str) -> AbstractContextManager[Live]:
        keys.write_text("\n".join(lines))
        return serving(Engine(EngineConfig(cache_gib=0.05, state_dir=str(folder))), settings)

    def ask(live: Live, key: str, salt: str | None = None) -> int:
        return cached_tokens(live, salt, Authorization=f"Bearer {key}")

    with start("key-one", "key-two") as live:
        assert (ask(live, "key-one"), ask(live, "key-two", "salt-two")) == (0, 0)
    with start("key-three", "key-two", "key-one") as live:
        assert ask(live, "key-one") > 0 and ask(live, "key-two", "salt-two") > 0
        assert [ask(live, "key-three"), ask(live, "key-two"), ask(live, "key-one", "salt-two")] == [
            0
        ] * 3
    secret = folder / "salt-secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    text = b"".join(file.read_bytes() for file in folder.iterdir())
    assert not any(
        secret_text in text for secret_text in (b"key-", b"salt-two", b"key-one".hex().encode())
    )
    assert "salt-secret" not in caplog.text
    secret.write_bytes(b"short")
    with start("key-one", "key-two") as live:
        assert ask(live, "key-one") == 0 < ask(live, "key-one")
    assert "salt-secret cannot be used (it does not have 32 bytes)" in caplog.text
    for odd in (os.mkfifo, lambda file: file.symlink_to("/dev/zero")):  # Of another user.
        secret.unlink()
        odd(secret)
        caplog.clear()
        Access(settings).keep_secret(str(folder))
        assert "salt-secret cannot be used" in caplog.text


PATHS: list[tuple[str, str]] = [
    ("GET", "/v1/cache"),
    ("POST", "/reset_prefix_cache"),
    ("POST", "/flush_cache"),
    ("GET", "/v1/cache/nodes/1"),
    ("GET", "/v1/cache/events"),
    ("GET", "/v1/cache/explanations/none"),
]


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]"}, 200),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "[oops"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1.evil.example"}, 403),
        ({"Origin": "http://[oops"}, 403),
        ({"Origin": "null"}, 403),
        ({"X-Forwarded-For": "10.0.0.1"}, 403),
        ({"Forwarded": "for=10.0.0.1"}, 403),
        ({"Authorization": "Bearer guess"}, 200),
    ],
    ids=str,
)
def test_operator_paths_without_a_key_require_a_local_client(
    live: Live, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    with httpx.stream(method, live.url + path, headers=headers, timeout=120) as answer:
        if status == 403:
            text = answer.read().decode()
            assert "--admin-key-file" in text or ("--allowed-host" in text and "Host" in headers)
    found = 200 if answer.status_code == 404 else answer.status_code
    assert found == status, "there may be no such node or explanation"


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_operator_paths_with_a_key_require_the_key(
    serve_oracle: Serve, tmp_path: Path, method: str, path: str
) -> None:
    file = tmp_path / "key"
    file.write_text("s3cret\n")
    live = serve_oracle(ServerConfig(admin_key_file=str(file)))

    def status(**headers: Any) -> int:
        with httpx.stream(method, live.url + path, headers=headers, timeout=120) as answer:
            return answer.status_code

    assert status(Authorization="Bearer s3cret", Host="cache.example") in (200, 404)
    for wrong in ("", "Bearer", "Bearer s3cre", "Bearer s3cret2", "Basic s3cret", b"Bearer \xff"):
        assert status(Authorization=wrong) == 401
    assert status() == 401, "a proxy on this machine looks like a local client"
    assert live.get("/health").status_code == live.get("/metrics").status_code == 200


def test_an_address_may_send_few_wrong_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right keys that it has sent before are accepted all the same. A trusted proxy names it."""
    (tmp_path / "api").write_text("one\ntwo\n")
    (tmp_path / "admin").write_text("operator\n")
    now_s, files = [1000.0], {f"{name}_key_file": str(tmp_path / name) for name in ("api", "admin")}
    access = Access(ServerConfig(trusted_proxy=("10.0.0.9", "10.9.0.0/16"), **files))
    monkeypatch.setattr("engine.front.server.access.time.monotonic", lambda: now_s[0])

    def status(key: str, address: str = "10.0.0.1", path: str = "/v1/models", **more: str) -> int:
        given = {"authorization": f"Bearer {key}", **more}
        headers = [(name.encode(), value.encode()) for name, value in given.items()]
        scope = {"headers": headers, "path": path, "client": (address, 1), "state": {}}
        refusal = access.refusal(scope)
        return 200 if refusal is None else refusal.status

    assert status("one") == 200 == status("operator", path="/v1/cache")
    guesses = [status(f"{number}", path=("/v1/cache", "/")[number % 2]) for number in range(50)]
    assert guesses[::2] == [401] * 20 + [429] * 5 and guesses[1::2] == [200] * 25
    assert status("two") == 429 and status("one") == 200 == status("operator", path="/v1/cache")
    assert status("two", "10.0.0.2") == 200
    now_s[0] += 5.01
    assert [status("x"), status("x"), status("two")] == [401, 429, 429]
    now_s[0] += 500
    assert status("two") == 200
    via = {"x-forwarded-for": "6.6.6.6, 7.7.7.7"}
    assert [status("x", "10.0.0.9", **via) for _ in range(21)][-1] == 429
    assert status("one", "10.0.0.9", **via | {"x-forwarded-for": "7.7.7.7, 8.8.8.8"}) == 200
    assert status("one", "10.0.0.3", **via) == 200, "this proxy is not trusted"
    assert status("one", "10.0.0.9", **{"x-forwarded-for": "odd"}) == 200
    for proxy in ("10.0.0.9", "10.9.8.7", "::ffff:10.0.0.9"):
        for far in ("7.7.7.7", "7.7.7.7, 10.9.1.1", "::ffff:7.7.7.7, 10.0.0.9,10.9.1.1"):
            assert status("x", proxy, **{"x-forwarded-for": f"6.6.6.6, {far}"}) == 429
    assert status("x", "::ffff:7.7.7.7") == 429
    access = Access(ServerConfig(api_key_file=files["api_key_file"]))
    assert [status("x", path="/v1/cache") for _ in range(21)] == [401] * 20 + [429], "any path"
    for host in ("https://llm.example.com", "llm.example.com:443"):
        refused("--allowed-host must be", ServerConfig, allowed_host=("::1", host))
    refused("--trusted-proxy must be", Access, ServerConfig(trusted_proxy=("10.0.0.0/99",)))


def test_a_client_of_this_machine_is_one_at_every_address() -> None:
    """A server at ``::`` has clients of IPv4 whose addresses are mapped into IPv6."""
    access = Access(ServerConfig(host="::"))
    for address, is_local in (("::ffff:127.0.0.1", True), ("::ffff:10.0.0.1", False)):
        headers = [(b"host", b"localhost")]
        scope = {"type": "http", "headers": headers, "path": "/v1/cache", "client": (address, 1)}
        assert (access.refusal({**scope, "state": {}}) is None) == is_local


@pytest.mark.parametrize(
    ("proxies", "last", "client"), [((), 429, "127.0.0.1"), (("127.0.0.1",), 401, "7.7.7.20")]
)
def test_only_a_trusted_proxy_names_the_client(
    serve_oracle: Serve,
    tmp_path: Path,
    caplog: Any,
    proxies: tuple[str, ...],
    last: int,
    client: str,
) -> None:
    (tmp_path / "keys").write_text("k\n")
    settings = {"api_key_file": str(tmp_path / "keys"), "log_requests": True}
    live = serve_oracle(ServerConfig(trusted_proxy=proxies, **settings))
    for number in range(21):
        via = {"X-Forwarded-For": f"6.6.6.6, 7.7.7.{number}", "Authorization": "Bearer x"}
        status = live.get("/v1/models", **via).status_code
    assert status == last
    wait_until(lambda: f"from {client} " in caplog.messages[-1] + " ")  # After the answer.


def test_a_request_with_two_keys_is_refused(serve_oracle: Serve) -> None:
    """A proxy may have checked the first, and this server would read the last."""
    url = serve_oracle().url + "/v1/models"
    for name in ("Authorization", "X-Api-Key"):
        answer = httpx.get(url, headers=[(name, "Bearer one"), (name, "Bearer two")])
        assert answer.status_code == 400 and "has one Authorization" in answer.text
    assert httpx.get(url, headers={"Authorization": "Bearer a", "X-Api-Key": "b"}).is_success


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "FILE has no key"),
        (b"# a\n", "FILE has no key"),
        (b"a\nb\xff\x00c\n", "line 2 of FILE: each key must be printable ASCII"),
        (b"\x93\xd0\x07", "line 1 of FILE: each key must be printable ASCII"),
        (b"k three words", "line 1 of FILE: the key comes first, then a name"),
        (b"# a\r\n\r\nk na:me\r\n", "line 3 of FILE: the key comes first, then a name"),
        (b"k1 a\n\nk1 b\n", "line 3 of FILE: the key of line 1 of FILE has another name here"),
        (b"key-1 bob\nada a-secret\n", "line 2 of FILE: a line is KEY NAME, the key first"),
        (b"k1\nk1 a\n", "line 2 of FILE: the key of line 1 of FILE has another name here"),
    ],
)
@pytest.mark.parametrize("setting", ["api_key_file", "admin_key_file"])
def test_files_without_a_key_that_clients_can_send_are_refused(
    setting: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(ValueError, match="key") as caught:
        Access(ServerConfig(**{setting: str(tmp_path / "key")}))
    file = f"--{setting.replace('_', '-')} {tmp_path / 'key'}"
    assert str(caught.value).startswith(message.replace("FILE", file))


def ask(live: Live, path: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[str, Any]:
    """Return the text of an answer and its merged JSON objects."""
    answer = live.post(path, body, **headers)
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        return answer.text, answer.json()
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    merged: dict[str, Any] = {}
    for event in map(json.loads, lines):
        merged |= event.get("message") or event.get("response") or event
    return answer.text, merged


def test_one_name_stands_for_a_key_everywhere(
    serve_oracle: Serve, tmp_path: Path, caplog: Any
) -> None:
    """Keys with the same name share the cache and stored answers, so that a key can be replaced."""
    (tmp_path / "api").write_text("key-1 bob # of the team\nkey-2 dave\nkey-3 bob\nkey-4\n")
    (tmp_path / "admin").write_text("key-5\n")
    files = {f"{name}_key_file": str(tmp_path / f"{name}") for name in ("api", "admin")}
    live = serve_oracle(ServerConfig(log_requests=True, **files))
    counts = [cached_tokens(live, Authorization=f"Bearer key-{n}") for n in (1, 2, 3, 4, 4)]
    assert counts[:2] == [0, 0] and counts[2] > 0 == counts[3] and counts[4] > 0
    stored = live.post("/v1/responses", {"input": "x"}, Authorization="Bearer key-1").json()["id"]
    for number, status in ((3, 200), (2, 404)):
        answer = live.get(f"/v1/responses/{stored}", Authorization=f"Bearer key-{number}")
        assert answer.status_code == status
    live.headers["Authorization"] = "Bearer key-5"
    report = live.report()
    nameless = hashlib.sha256(b"key-4").hexdigest()[:8]
    cached = {name: of["cached_tokens"] for name, of in report["keys"].items()}
    assert cached.items() >= {"bob": counts[2], "dave": 0, nameless: counts[4]}.items()
    assert report["keys"]["bob"]["requests"] == 3, "a GET is no request with an answer"
    assert report["keys"].keys() == {"bob", "dave", nameless}, "nor are those of the operator"
    roots = {line.split("'")[1].split(":")[0] for line in report["tree"] if "namespace" in line}
    assert roots == {"bob", "dave", nameless}
    metrics = live.get("/metrics").text
    assert f'engine_key_cached_tokens_total{{key="bob"}} {float(counts[2])}' in metrics
    assert "key bob" in caplog.text and "key dave" in caplog.text and "key-1" not in caplog.text
    answer = live.http.get("/v1/cache", headers={"Authorization": "Bearer key-1"})
    assert answer.status_code == 403 and "may use the API" in answer.text


HERE, ELSEWHERE = "localhost LOCALHOST:8000 127.8.0.1 [::1]:8000", "evil.example [oops"
ELSEWHERE += " localhost.evil.example 127.0.0.1@evil.example"


@pytest.mark.parametrize(
    ("settings", "answered", "refused"),
    [
        ({}, HERE, ELSEWHERE),
        ({"host": "::1"}, HERE, ELSEWHERE),
        ({"host": "0.0.0.0"}, f"{HERE} {ELSEWHERE}", ""),
        ({"host": "0.0.0.0", "allowed_host": ("box.example",)}, f"{HERE} box.example", ELSEWHERE),
        ({"allowed_host": ("Box.example",)}, f"{HERE} box.example:8000", ELSEWHERE),
        ({"allowed_host": ("*",)}, f"{HERE} {ELSEWHERE}", ""),
        ({"api_key_file": "keys"}, f"{HERE} {ELSEWHERE}", ""),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/"])
def test_pages_of_other_sites_cannot_use_a_server_without_keys(
    tmp_path: Path, settings: dict[str, Any], answered: str, refused: str, path: str
) -> None:
    """Their names may be rebound to this address."""
    (tmp_path / "keys").write_text("k\n")
    if "api_key_file" in settings:
        settings = {"api_key_file": str(tmp_path / "keys")}
    access, key = Access(ServerConfig(**settings)), (b"authorization", b"Bearer k")
    for host in (*answered.split(), *refused.split()):
        scope: Any = {"headers": [key, (b"host", host.encode())], "path": path, "state": {}}
        refusal = access.refusal(scope)
        assert (refusal is None) == (host in answered.split()), host
        assert refusal is None or (refusal.status == 403 and "--allowed-host" in str(refusal))
    assert access.refusal({"headers": [key], "path": path, "state": {}}) is None


def test_keys_are_read_again(tmp_path: Path) -> None:
    file, admin = tmp_path / "keys", tmp_path / "admin"
    file.write_text("a\nb\n")
    admin.write_text("operator\n")
    access = Access(ServerConfig(api_key_file=str(file), admin_key_file=str(admin)))

    def accepted(key: str) -> bool:
        headers = [(b"authorization", b"Bearer " + key.encode())]
        scope: Any = {"headers": headers, "path": "/v1/models", "state": {}}
        return access.refusal(scope) is None

    assert [*map(accepted, "abc")] == [True, True, False]
    file.write_text("b\nc\n")
    access.reload()
    assert access.words().startswith("3 accepted; one of 1 character can be guessed")
    assert [*map(accepted, ["a", "b", "c", ""])] == [False, True, True, False]
    line = f"line 1 of --admin-key-file {admin} has the key of line 2 of --api-key-file {file}"
    for text, message in (
        ("", "has no key"),
        ("bb x\nd\nbb y", "line 3 of "),
        ("d\noperator", line),
    ):
        file.write_text(text)
        refused(message, access.reload)
        assert [*map(accepted, ["b", "c", "d", "operator"])] == [True, True, False, True]


@pytest.mark.full("1")
@pytest.mark.parametrize("seed", range(3))
def test_tenants_stay_isolated_in_every_dialect(
    serve_oracle: Serve, tmp_path: Path, seed: int
) -> None:
    """Random requests of several tenants: no answer contains another tenant's text."""
    rng = random.Random(seed)
    (tmp_path / "keys").write_bytes(b"\xef\xbb\xbfkey-one # 1\r\n\n  key-two\t\nkey-one\n")
    (tmp_path / "admin").write_text("operator\n")
    files = {"api_key_file": str(tmp_path / "keys"), "admin_key_file": str(tmp_path / "admin")}
    live = serve_oracle(ServerConfig(**files, salt_by_key=False))
    keys = [{"Authorization": f"Bearer {key}"} for key in ("key-one", "key-two", "operator")]
    live.headers = keys[2]
    tenants = [
        keys[0],
        keys[1],
        keys[0] | {"x-cache-salt": "red"},
        keys[0] | {"x-cache-salt": "blue"},
        keys[1] | {"x-cache-salt": "red"},
    ]
    secrets = [f"secret-{number}-{seed}" for number in range(len(tenants))]
    ids_of: dict[int, dict[str, str]] = {number: {} for number in range(len(tenants))}
    """Dialect of each answer by its id, by tenant."""
    for step in range(70):
        number = rng.randrange(len(tenants))
        path = rng.choice([*bodies("")])
        body = bodies(f"{secrets[number]} and step {step}. " * 3)[path]
        body["stream"] = rng.random() < 0.5
        text, answer = ask(live, path, body, tenants[number])
        foreign = [secret for other, secret in enumerate(secrets) if other != number]
        assert not any(secret in text for secret in foreign)
        assert answer["id"] not in ids_of[number]
        ids_of[number][answer["id"]] = path
        if path == "/v1/responses":
            for other, headers in enumerate(tenants):
                status = live.get(f"/v1/responses/{answer['id']}", **headers).status_code
                assert status == (200 if other == number else 404)
                more = bodies("more")[path] | {"previous_response_id": answer["id"], "store": False}
                status = live.post(path, more, **headers).status_code
                assert status == (200 if other == number else 400)
    live.check_conserved()


def test_reasoning_is_restored_only_in_the_same_chat(serve_answer: Serve) -> None:
    """``preserve_thinking`` restores reasoning that a client left out. A guess of another client's
    answer must not reveal its reasoning, and no guess that of another tenant."""
    live = serve_answer("<think>The card number is 4929.</think>Yes.")
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "Is my card 4929 valid?"}]}
    first = live.post("/v1/chat/completions", chat).json()["choices"][0]["message"]
    assert (first["content"], first["reasoning_content"]) == ("Yes.", "The card number is 4929.")
    answer = {"role": "assistant", "content": "Yes."}

    def prompt(question: str, headers: dict[str, str] | None = None, **more: Any) -> str:
        messages = [{"role": "user", "content": question}, answer]
        body = {"messages": messages, "chat_template_kwargs": {"preserve_thinking": True}} | more
        tokens = live.post("/tokenize", body, **headers or {}).json()["tokens"]
        text: str = live.post("/detokenize", {"tokens": tokens}).json()["prompt"]
        return text

    assert "The card number is 4929." in prompt("Is my card 4929 valid?")
    assert "The card number" not in prompt("Is my card valid?")
    assert "The card number" not in prompt("Is my card 4929 valid?", {"x-cache-salt": "other"})
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert "The card number" not in prompt("Is my card 4929 valid?", tools=[tool])


def test_each_tenant_compiles_its_own_grammars(
    serve_oracle: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of an answer would tell whether another tenant used a schema."""
    guides = pytest.importorskip("engine.plugins.guided.guides")
    pytest.importorskip("llguidance")
    num_compiled, make = [0], guides.make_matcher

    def counting(*args: Any) -> Any:
        num_compiled[0] += 1
        return make(*args)

    monkeypatch.setattr(guides, "make_matcher", counting)
    live, counts = serve_oracle(), []
    for salt in ("victim", "victim", "probe", None, "probe"):
        body = {"prompt": "x", "max_tokens": 2, "cache_salt": salt}
        live.post("/v1/completions", body | {"structured_outputs": {"regex": "[a-c]{3}x"}})
        counts.append(num_compiled[0])
    assert counts == [1, 1, 2, 3, 3]
