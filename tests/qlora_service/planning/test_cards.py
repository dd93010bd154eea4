from __future__ import annotations

import pytest

from qlora_service.errors import InvalidRequest
from qlora_service.planning.cards import CARDS, Device, named_device
from qlora_service.planning.memory import GIB, MIB


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("rtx3090", "RTX 3090"),
        ("3060 12GB", "RTX 3060"),
        ("Tesla T4", "Tesla T4"),
        ("A100-80GB", "A100 80GB"),
        ("a100", "A100 40GB"),
        ("4060 Ti", "RTX 4060 Ti 16GB"),
    ],
)
def test_card_is_found_by_common_spellings_of_its_name(name: str, card: str) -> None:
    assert named_device(name).name == card


def test_every_card_is_found_by_its_own_name() -> None:
    assert [named_device(card.name) for card in CARDS] == list(CARDS)
    assert all(8 * GIB - 64 * MIB <= card.total_bytes <= 80 * GIB for card in CARDS)


@pytest.mark.parametrize("name", ["24GB", "24 GB", "24g", "24GiB"])
def test_device_can_be_a_memory_size(name: str) -> None:
    assert named_device(name).total_bytes == 24 * GIB


def test_unknown_card_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(InvalidRequest, match="did you mean RTX 3090") as caught:
        named_device("RTX 3091")
    assert caught.value.location == "/device"


@pytest.mark.parametrize("name", ["", "0GB", "9999GB", "abacus", "24", "x" * 5000])
def test_invalid_name_is_refused_with_a_short_message(name: str) -> None:
    with pytest.raises(InvalidRequest, match="24GB") as caught:
        named_device(name)
    assert len(caught.value.message) < 1000


def test_cards_before_ampere_compute_in_float32() -> None:
    dtypes = {name: named_device(name).compute_dtype for name in ("GTX 1080 Ti", "RTX 2080 Ti", "T4", "RTX 3060")}
    assert dtypes == {"GTX 1080 Ti": "float32", "RTX 2080 Ti": "float32", "T4": "float32", "RTX 3060": "bfloat16"}


def test_usable_bytes_exclude_context_workspace_and_the_drivers_share() -> None:
    card = named_device("24GB")
    assert card.usable_bytes == int(24 * GIB * 0.98) - GIB


def test_usable_bytes_exclude_memory_of_other_processes() -> None:
    assert Device("card", 24 * GIB, free_bytes=5 * GIB).usable_bytes == 4 * GIB
    assert Device("card", 24 * GIB, free_bytes=0).usable_bytes == 0
