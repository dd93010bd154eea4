from __future__ import annotations

import socket

import pytest

from qlora_service.errors import InvalidRequest
from qlora_service.webhooks.targets import (
    MAX_URL_CHARS,
    Target,
    is_public,
    parse_target,
    system_addresses,
    vetted_addresses,
)

PUBLIC = ["93.184.215.14", "8.8.8.8", "2606:4700:4700::1111", "2a00:1450:4001:80b::200e"]
NON_PUBLIC = [
    "127.0.0.1", "127.8.9.10", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "203.0.113.7", "224.0.0.1", "239.255.255.250", "240.0.0.1",
    "255.255.255.255", "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::7f00:1", "64:ff9b::a00:1", "fc00::1",
    "fd12:3456::1", "fe80::1", "fe80::1%1", "fec0::1", "ff02::1", "2001:db8::1", "2002:7f00:1::", "2001:0:7f00:1::",
]  # fmt: skip


def target(host: str = "receiver.example") -> Target:
    return parse_target(f"https://{host}/", private=False)


@pytest.mark.parametrize("address", PUBLIC)
def test_unicast_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", NON_PUBLIC)
def test_other_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


def test_url_is_parsed_into_a_target() -> None:
    assert target("receiver.example") == Target("https", "receiver.example", 443, "/")
    parsed = parse_target("https://Receiver.Example.:8443/a%2Fb?c=d&e", private=False)
    assert parsed == Target("https", "receiver.example", 8443, "/a%2Fb?c=d&e")
    assert parsed.authority == "receiver.example:8443"
    assert target().authority == "receiver.example"
    assert parse_target("http://[2001:db8::1]:80?x", private=True) == Target("http", "2001:db8::1", 80, "/?x")
    assert parse_target("http://[2001:db8::1]:81", private=True).authority == "[2001:db8::1]:81"


@pytest.mark.parametrize(
    "url",
    [
        "", "receiver.example", "//receiver.example/", "ftp://receiver.example/", "file:///etc/passwd",
        "http://receiver.example/", "https://", "https:///path", "https://:443/", "https://user@receiver.example/",
        "https://u:p@receiver.example/", "https://@receiver.example/", "https://receiver.example/#part",
        "https://receiver.example:99999/", "https://receiver.example:x/",
        "https://receiver.example:0/", "https://receiver.example:00/",
        "https://receiver.example/a b", "https://receiver.example/\r\nHost: inside", "https://receiver\t.example/",
        "https://réceiver.example/", "https://receiver.example\\@inside/", "https://[::1/", "https://[fe80::1%25eth0]/",
        "https://receiver.example/" + "a" * MAX_URL_CHARS, "https://to ld/", "https://%31%32%37.0.0.1/", "HTTPS://u@x/",
    ],
)  # fmt: skip
def test_url_that_cannot_be_a_target_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_target(url, private=False)
    assert caught.value.location == "/url"


def test_http_requires_private() -> None:
    assert parse_target("http://receiver.example/", private=True).port == 80
    with pytest.raises(InvalidRequest, match="https"):
        parse_target("http://receiver.example/", private=False)


def test_host_with_one_private_address_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"receiver\.example.*QLORA_WEBHOOK_PRIVATE") as caught:
        vetted_addresses(target(), lambda *_: [*PUBLIC, "10.1.2.3"], private=False)
    assert "10.1.2.3" not in str(caught.value)
    assert vetted_addresses(target(), lambda *_: PUBLIC, private=False) == PUBLIC
    assert vetted_addresses(target(), lambda *_: ["10.1.2.3"], private=True) == ["10.1.2.3"]


@pytest.mark.parametrize("host", ["localhost", "127.1", "0x7f000001", "2130706433", "0177.0.0.1", "[::1]", "0"])
def test_loopback_is_refused_in_every_notation(host: str) -> None:
    with pytest.raises(InvalidRequest, match="not on the public internet"):
        vetted_addresses(target(host), system_addresses, private=False)


def test_name_without_an_address_is_refused() -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.raises(InvalidRequest, match=r"receiver\.example.*not known"):
        vetted_addresses(target(), resolve, private=False)
    with pytest.raises(InvalidRequest, match="not a host name"):
        vetted_addresses(target("a..b"), system_addresses, private=False)
