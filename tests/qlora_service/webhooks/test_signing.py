from __future__ import annotations

import base64

from qlora_service.webhooks.signing import new_secret, signed_headers


def test_signature_matches_the_standard() -> None:
    # Secret, message and signature from the tests of the reference libraries (github.com/standard-webhooks).
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


def test_two_secrets_give_two_signatures() -> None:
    first, second = new_secret(), new_secret()
    single = [signed_headers([secret], "msg", 1, b"{}")["webhook-signature"] for secret in (first, second)]
    assert signed_headers([first, second], "msg", 1, b"{}")["webhook-signature"] == " ".join(single)
    assert single[0] != single[1]


def test_secrets_are_long_and_unique() -> None:
    first, second = new_secret(), new_secret()
    assert first != second
    assert first.startswith("whsec_")
    assert len(base64.b64decode(first.removeprefix("whsec_"), validate=True)) == 32
