"""The warning about weights without an adapter."""

from __future__ import annotations

import json

import pytest

from qlora_service.errors import Finding
from qlora_service.planning.attachment import Attachment

EXPERTS = {"model.layers.*.mlp.experts.gate_up_proj": 600, "model.layers.*.mlp.experts.down_proj": 310}
ROUTER = {"model.layers.*.mlp.router.weight": 4}


@pytest.mark.parametrize(
    ("attachment", "warning"),
    [
        (Attachment(1000), None),
        (Attachment(1000, left_out=ROUTER), None),
        (Attachment(unchecked="out of time"),
         "it is not known whether every target module of this base can get an adapter: out of time"),
        (Attachment(1000, left_out=ROUTER, linear_left_out=True),
         "less than 1% of the base's weights (model.layers.*.mlp.router.weight) get no adapter"),
        (Attachment(1000, left_out=ROUTER | EXPERTS),
         "91% of the base's weights (the routed experts: model.layers.*.mlp.experts.gate_up_proj, "
         "model.layers.*.mlp.experts.down_proj, model.layers.*.mlp.router.weight) get no adapter"),
        (Attachment(1000, left_out={f"{name}.weight": 100 for name in "abcdef"}),
         "60% of the base's weights (a.weight, b.weight, c.weight, d.weight, …) get no adapter"),
    ],
)  # fmt: skip
def test_warning_names_share_and_weights_if_they_matter(attachment: Attachment, warning: str | None) -> None:
    if warning is None:
        assert attachment.warning is None
    else:
        assert (attachment.warning or "").startswith(warning)


def test_attachment_survives_json() -> None:
    refused = Attachment(refusal="no", location="/adapter", findings=(Finding("no", "/adapter"), Finding("nor this")))
    for attachment in (Attachment(10, 2, 3, EXPERTS, linear_left_out=True), refused):
        assert Attachment.from_dict(json.loads(json.dumps(attachment.as_dict()))) == attachment
