"""Which URLs may be told anything: a service inside a network must not be made to ask that network's own machines.

What a URL names is resolved once, every address is looked at, and the connection goes to an address that was looked
at: a name that answers differently the second time (DNS rebinding) gains nothing.
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
# All that is routed on the internet; https://www.iana.org/assignments/ipv6-address-space
_GLOBAL_UNICAST = IPv6Network("2000::/3")
# 6to4 and Teredo, which lead to the IPv4 address inside them: RFC 3056, RFC 4380.
_TUNNELS = (IPv6Network("2002::/16"), IPv6Network("2001::/32"))

_PRINTABLE = re.compile(r"[\x21-\x7e]+")
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]*:[0-9a-f:.]*")

Resolve = Callable[[str, int], list[str]]
"""The addresses of a host, at a port. Raises OSError when there are none."""


@dataclass(frozen=True)
class Target:
    """A URL taken apart."""

    scheme: str
    host: str
    port: int
    path: str
    """With the query."""

    @property
    def authority(self) -> str:
        """What the Host header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


def parse_target(url: str, *, private: bool) -> Target:
    """The target that `url` names; http is for those that may also be `private`.

    Raises:
        InvalidRequest: it cannot be one, and why.
    """
    if len(url) > MAX_URL_CHARS or not _PRINTABLE.fullmatch(url):
        raise _refused(f"a URL has at most {MAX_URL_CHARS} printable ASCII characters; write other hosts in Punycode")
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").removesuffix("."), parts.port
    except ValueError:
        raise _refused(f"{url!r} is no URL") from None
    if parts.scheme not in PORTS or (parts.scheme == "http" and not private):
        hint = "" if parts.scheme != "http" else ", or have QLORA_WEBHOOK_PRIVATE=true set where the service runs"
        raise _refused(f"{url!r} does not begin with https://: use a URL that does{hint}")
    if parts.username is not None or parts.password is not None:
        raise _refused("leave user and password out of the URL: every message is signed")
    if parts.fragment or not _HOST.fullmatch(host):
        raise _refused(f"{url!r} names no host, or a place inside a page: write https://host/path")
    if port == 0:
        raise _refused(f"{url!r} names port 0, at which nothing can listen: name another, or none")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, host, port or PORTS[parts.scheme], path)


def vetted_addresses(target: Target, resolve: Resolve, *, private: bool) -> list[str]:
    """Where the target may be reached: every address of its host, all public unless `private` ones are allowed.

    Raises:
        InvalidRequest: there are none, or one that may not be asked.
    """
    try:
        addresses = resolve(target.host, target.port)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no host name"
        raise _refused(f"{target.host!r} has no address: {reason}") from None
    if not private and not all(is_public(address) for address in addresses):
        # Which address a name of the inside has is nobody's business who has to ask.
        raise _refused(
            f"{target.host!r} is not on the public internet: use a host that is, or have QLORA_WEBHOOK_PRIVATE=true "
            "set where the service runs"
        )
    return addresses


def is_public(address: str) -> bool:
    """Whether an address is one machine of the internet, whatever it is written as."""
    ip: IPv4Address | IPv6Address = ip_address(address)
    if isinstance(ip, IPv6Address) and (ip not in _GLOBAL_UNICAST or any(ip in tunnel for tunnel in _TUNNELS)):
        return False
    return ip.is_global and not ip.is_multicast


def system_addresses(host: str, port: int) -> list[str]:
    """What the system's resolver says, each address once."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _refused(reason: str) -> InvalidRequest:
    return InvalidRequest(reason, location="/url")
