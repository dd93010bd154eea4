from __future__ import annotations

import base64

from qlora_service.webhooks.signing import new_secret, signed_headers


def test_signature_is_that_of_the_standard() -> None:
    # Secret, message and signature of the reference libraries' own tests (github.com/standard-webhooks).
    headers = signed_headers(
        ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330,
        b'{"test": 2432232314}',
    )
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_message_of_two_secrets_has_the_signature_of_each() -> None:
    one, other = new_secret(), new_secret()
    alone = [signed_headers([secret], "msg", 1, b"{}")["webhook-signature"] for secret in (one, other)]
    assert signed_headers([one, other], "msg", 1, b"{}")["webhook-signature"] == " ".join(alone)
    assert alone[0] != alone[1]


def test_secrets_are_long_and_never_the_same() -> None:
    one, other = new_secret(), new_secret()
    assert one != other
    assert one.startswith("whsec_")
    assert len(base64.b64decode(one.removeprefix("whsec_"), validate=True)) == 32
