"""Validation of webhook URLs against server-side request forgery: only public addresses are allowed by default.

The host of a URL is resolved once per message, every address is checked, and the connection goes to a checked address.
A host name that resolves differently the second time (DNS rebinding) therefore gains nothing.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

from qlora_service.errors import InvalidRequest

MAX_URL_CHARS = 2048
PORTS = {"https": 443, "http": 80}
# All addresses that are routed on the internet: https://www.iana.org/assignments/ipv6-address-space
_GLOBAL_UNICAST = IPv6Network("2000::/3")
# 6to4 and Teredo, which tunnel to the embedded IPv4 address: RFC 3056, RFC 4380.
_TUNNELS = (IPv6Network("2002::/16"), IPv6Network("2001::/32"))

_PRINTABLE = re.compile(r"[\x21-\x7e]+")
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]*:[0-9a-f:.]*")

Resolve = Callable[[str, int], list[str]]
"""Resolver: the addresses of a host and port. Raises OSError if there are none."""


@dataclass(frozen=True)
class Target:
    """The parts of a webhook URL."""

    scheme: str
    host: str
    port: int
    path: str
    """Includes the query."""

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


def parse_target(url: str, *, private: bool) -> Target:
    """The target of `url`; http is allowed only with `private`.

    Raises:
        InvalidRequest: the URL is not a valid target, with the reason.
    """
    if len(url) > MAX_URL_CHARS or not _PRINTABLE.fullmatch(url):
        raise _refused(f"a URL has at most {MAX_URL_CHARS} printable ASCII characters; write other hosts in Punycode")
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").removesuffix("."), parts.port
    except ValueError:
        raise _refused(f"{url!r} is not a URL") from None
    if parts.scheme not in PORTS or (parts.scheme == "http" and not private):
        hint = "" if parts.scheme != "http" else ", or ask the operator to set QLORA_WEBHOOK_PRIVATE=true"
        raise _refused(f"{url!r} does not begin with https://: use a URL that does{hint}")
    if parts.username is not None or parts.password is not None:
        raise _refused("leave user and password out of the URL: signatures authenticate the messages")
    if parts.fragment or not _HOST.fullmatch(host):
        raise _refused(f"{url!r} has no valid host, or has a fragment: write https://host/path")
    if port == 0:
        raise _refused(f"{url!r} has port 0, on which no server can listen: use another port, or none")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, host, port or PORTS[parts.scheme], path)


def vetted_addresses(target: Target, resolve: Resolve, *, private: bool) -> list[str]:
    """Every address of the target's host; all are public unless `private` allows others.

    Raises:
        InvalidRequest: the host has no address, or one that is not allowed.
    """
    try:
        addresses = resolve(target.host, target.port)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a host name"
        raise _refused(f"{target.host!r} has no address: {reason}") from None
    if not private and not all(is_public(address) for address in addresses):
        # The message omits the address, so that it discloses nothing about the internal network.
        raise _refused(
            f"{target.host!r} is not on the public internet: use a public host, or ask the operator to set "
            "QLORA_WEBHOOK_PRIVATE=true"
        )
    return addresses


def is_public(address: str) -> bool:
    """Whether an address, in any notation, is a unicast address on the public internet."""
    ip: IPv4Address | IPv6Address = ip_address(address)
    if isinstance(ip, IPv6Address) and (ip not in _GLOBAL_UNICAST or any(ip in tunnel for tunnel in _TUNNELS)):
        return False
    return ip.is_global and not ip.is_multicast


def system_addresses(host: str, port: int) -> list[str]:
    """The addresses from the system's resolver, without duplicates."""
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in entries))


def _refused(reason: str) -> InvalidRequest:
    return InvalidRequest(reason, location="/url")
