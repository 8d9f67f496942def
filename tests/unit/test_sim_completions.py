from typing import Any

import pytest
from elasticmoe_sim.completions import BadRequestError, parse, text_of


def read(chat: bool = False, **body: Any) -> Any:
    return parse(body, chat, ("m", "alias"), 100)


def test_defaults_are_vllms() -> None:
    request = read(prompt="hi")
    assert (request.model, request.prompt, request.max_tokens) == ("m", [104, 105], 16)
    assert not request.stream
    chat = read(chat=True, messages=[{"role": "user", "content": "hi"}])
    assert chat.max_tokens == 100 - len(chat.prompt)


def test_token_ids_are_a_prompt_too() -> None:
    assert read(prompt=[5, 6, 7], model="alias").prompt == [5, 6, 7]


def test_a_long_prompt_leaves_room_for_what_fits() -> None:
    assert read(prompt="x" * 90, max_tokens=50).max_tokens == 10


@pytest.mark.parametrize(
    ("body", "param", "status"),
    [
        ({"prompt": "x", "model": "other"}, "model", 404),
        ({}, "prompt", 400),
        ({"prompt": ["a", "b"]}, "prompt", 400),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens", 400),
        ({"prompt": "x", "max_tokens": 101}, "max_tokens", 400),
        ({"prompt": "x", "max_tokens": "many"}, "max_tokens", 400),
    ],
)
def test_bad_requests_name_what_is_wrong(body: dict[str, Any], param: str, status: int) -> None:
    with pytest.raises(BadRequestError) as caught:
        read(**body)
    assert (caught.value.param, caught.value.status) == (param, status)


def test_bad_chat() -> None:
    with pytest.raises(BadRequestError, match="messages"):
        read(chat=True, messages="hi")


def test_every_token_has_a_text_of_its_own_length() -> None:
    assert {len(text_of(token)) for token in range(512)} == {5}
