"""Messages to frames and back, and frames that are none."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from elasticmoe_protocol import codec
from elasticmoe_protocol.codec import (
    FrameError,
    Malformed,
    TooLarge,
    UnknownType,
    WrongVersion,
    decode_for_coordinator,
    decode_for_sidecar,
    encode,
)
from elasticmoe_protocol.messages import LaunchSpec, Message, Refused, Report
from hypothesis import given, settings
from hypothesis import strategies as st
from support.words import (
    FOR_COORDINATOR,
    FOR_SIDECAR,
    ORDINARY,
    anything,
    facts,
    goal,
    hello,
    report,
    structs,
)

DECODERS = {
    **dict.fromkeys(FOR_COORDINATOR, decode_for_coordinator),
    **dict.fromkeys(FOR_SIDECAR, decode_for_sidecar),
}
HEAD = b"EMOE%d" % codec.VERSION

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


def plain(message: Message) -> Any:
    """What is in the body, as a program in another language would see it."""
    return msgspec.msgpack.decode(encode(message)[1])


def frames_of(content: Any) -> list[bytes]:
    return [HEAD, msgspec.msgpack.encode(content)]


def never_anything_but_frame_error(frames: list[bytes]) -> None:
    for decode in (decode_for_coordinator, decode_for_sidecar):
        with contextlib.suppress(FrameError):
            decode(frames)


# --- round trip ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DECODERS, ids=lambda kind: kind.__name__)
def test_what_is_encoded_comes_back_the_same(kind: type[Message]):
    @given(anything(kind))
    @settings(max_examples=60, deadline=None)
    def comes_back(message: Message) -> None:
        assert DECODERS[kind](encode(message)) == message

    comes_back()


def test_every_type_of_message_is_tried():
    assert {type(message) for message in ORDINARY} == set(DECODERS)


def test_two_frames_travel_the_first_names_protocol_and_version():
    head, body = encode(report())
    assert head == b"EMOE1"
    assert msgspec.msgpack.decode(body)["type"] == "report"


# --- another version -----------------------------------------------------------------------------


@pytest.mark.parametrize("version", [codec.VERSION, codec.VERSION - 1])
def test_this_version_and_the_one_before_are_understood(version: int):
    assert decode_for_coordinator([b"EMOE%d" % version, encode(report())[1]]) == report()


@pytest.mark.parametrize("version", [codec.VERSION + 1, codec.VERSION + 8, 999_999])
def test_another_version_is_refused_in_words_that_name_both(version: int):
    with pytest.raises(WrongVersion) as refusal:
        decode_for_coordinator([b"EMOE%d" % version, encode(report())[1]])
    line = str(refusal.value)
    assert f"version {version}," in line
    assert f"this side {codec.VERSION}" in line
    assert "\n" not in line
    assert refusal.value.kind == "wrong_version"


def test_the_version_is_told_whatever_the_body_looks_like():
    """A later version may have changed all of it."""
    with pytest.raises(WrongVersion):
        decode_for_sidecar([b"EMOE9", b"\xc1"])


@pytest.mark.parametrize(
    "head", [b"", b"EMOE", b"EMOE-1", b"EMOE 1", b"EMOE1 ", b"emoe1", b"1", b"EMOE1234567"]
)
def test_a_first_frame_that_names_no_version_is_malformed(head: bytes):
    with pytest.raises(Malformed, match="does not name the protocol"):
        decode_for_coordinator([head, encode(report())[1]])


@given(st.dictionaries(st.text(min_size=1), values, max_size=3))
@settings(deadline=None)
def test_fields_that_are_not_known_are_ignored_at_every_depth(extra: dict[str, Any]):
    for message in ORDINARY:
        content = plain(message)

        def add(part: Any) -> Any:
            if isinstance(part, list):
                return [add(one) for one in part]
            if not isinstance(part, dict):
                return part
            return {f"new_{key}": value for key, value in extra.items()} | {
                key: add(value) for key, value in part.items()
            }

        assert DECODERS[type(message)](frames_of(add(content))) == message


@pytest.mark.parametrize("kind", DECODERS, ids=lambda kind: kind.__name__)
def test_fields_with_a_default_may_be_missing(kind: type[Message]):
    """What an older version does not say."""
    message = next(one for one in ORDINARY if type(one) is kind)
    content = plain(message)
    required = {field.encode_name for field in msgspec.structs.fields(kind) if field.required}
    found = DECODERS[kind](
        frames_of({key: value for key, value in content.items() if key in {"type", *required}})
    )
    for field in msgspec.structs.fields(kind):
        expected = getattr(message, field.name) if field.required else field.default
        assert getattr(found, field.name) == expected


def test_what_an_older_version_does_not_say_of_commands_is_nothing():
    new = hello(facts=facts(command="a", next_command="b", next_problem="c"), number=2)
    content = plain(new)
    del content["number"]
    for name in ("command", "next_command", "next_problem"):
        del content["facts"][name]
    assert decode_for_coordinator(frames_of(content)) == hello()
    content = plain(report(hello=2))
    del content["hello"]
    assert decode_for_coordinator(frames_of(content)) == report()
    launch = LaunchSpec(
        launch="l",
        rank=0,
        size=2,
        joiner=False,
        master_address="a",
        rpc_port=1,
        redundant_experts=0,
        max_size=4,
        command="a",
        fingerprint="f",
    )
    content = plain(goal(launch=launch))
    del content["launch"]["command"], content["launch"]["fingerprint"]
    plainer = msgspec.structs.replace(launch, command="", fingerprint="")
    assert decode_for_sidecar(frames_of(content)) == goal(launch=plainer)


@pytest.mark.parametrize("kind", DECODERS, ids=lambda kind: kind.__name__)
def test_without_a_required_field_it_is_malformed(kind: type[Message]):
    message = next(one for one in ORDINARY if type(one) is kind)
    for field in msgspec.structs.fields(kind):
        if field.required:
            content = plain(message)
            del content[field.encode_name]
            with pytest.raises(Malformed, match=field.encode_name):
                DECODERS[kind](frames_of(content))


def test_no_word_forbids_unknown_fields():
    for kind in DECODERS:
        for struct in structs(kind):
            assert not struct.__struct_config__.forbid_unknown_fields, struct


# --- what is no message --------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=60), max_size=4))
@settings(deadline=None)
def test_random_frames_raise_nothing_else(frames: list[bytes]):
    never_anything_but_frame_error(frames)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_a_random_body_raises_nothing_else(body: bytes):
    never_anything_but_frame_error([HEAD, body])


@given(values)
@settings(deadline=None)
def test_any_msgpack_raises_nothing_else(content: Any):
    never_anything_but_frame_error(frames_of(content))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_message_raises_nothing_else(data: st.DataObject):
    body = bytearray(encode(data.draw(st.sampled_from(ORDINARY)))[1])
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(body) - 1))
        body[where] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(body)))
    never_anything_but_frame_error([HEAD, bytes(body)])
    never_anything_but_frame_error([HEAD, bytes(body[:cut])])


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_value_in_any_field_raises_nothing_else(data: st.DataObject):
    content = plain(data.draw(st.sampled_from(ORDINARY)))
    part = content
    while True:
        key = data.draw(st.sampled_from(sorted(part)))
        if not (isinstance(part[key], dict) and data.draw(st.booleans())):
            break
        part = part[key]
    part[key] = data.draw(values)
    never_anything_but_frame_error(frames_of(content))


@pytest.mark.parametrize("count", [0, 1, 3, 50])
def test_it_is_two_frames_or_malformed(count: int):
    with pytest.raises(Malformed, match=f"{count} frames"):
        decode_for_coordinator([HEAD] * count)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\xc1", id="no msgpack"),
        pytest.param(b"\x81\xa4type\xa4\xff\xff\xff\xff", id="no text"),
        pytest.param(b"\x82\xa4type\xa7refused\xa1x" + b"\x91" * 100_000, id="too deep"),
        pytest.param(b"\xdd\xff\xff\xff\xff", id="a list that claims 2**32 entries"),
        pytest.param(b"\x81\xa4type\x01", id="a type that is no word"),
        pytest.param(b"\x80", id="no type"),
    ],
)
def test_a_bad_body_is_malformed(body: bytes):
    for decode in (decode_for_coordinator, decode_for_sidecar):
        with pytest.raises(Malformed):
            decode([HEAD, body])


def test_members_that_claim_to_be_many_take_no_memory():
    body = b"\x82\xa4type\xa4goal\xa6record\x81\xa7members\xdd\xff\xff\xff\xff"
    with pytest.raises(Malformed):
        decode_for_sidecar([HEAD, body])


def test_a_value_outside_its_words_is_malformed_not_an_unknown_type():
    content = plain(report())
    content["engine"]["phase"] = "dancing"
    with pytest.raises(Malformed, match="dancing"):
        decode_for_coordinator(frames_of(content))


def test_a_type_that_nobody_knows_has_a_kind_of_its_own():
    with pytest.raises(UnknownType) as refusal:
        decode_for_coordinator(frames_of({"type": "dance", "deployment": "d"}))
    assert refusal.value.kind == "unknown_type"


@pytest.mark.parametrize("message", ORDINARY, ids=lambda message: type(message).__name__)
def test_a_message_that_goes_the_wrong_way_is_an_unknown_type(message: Message):
    for decode, taken in (
        (decode_for_coordinator, FOR_COORDINATOR),
        (decode_for_sidecar, FOR_SIDECAR),
    ):
        if type(message) in taken:
            assert decode(encode(message)) == message
        else:
            with pytest.raises(UnknownType):
                decode(encode(message))


# --- size ----------------------------------------------------------------------------------------


def padded(size: int) -> Report:
    """A report whose body has this many bytes."""
    spare = len(encode(report(error="x" * 70_000))[1]) - 70_000
    return report(error="x" * (size - spare))


def test_the_longest_message_still_travels():
    longest = padded(codec.MAX_BYTES)
    assert len(encode(longest)[1]) == codec.MAX_BYTES
    assert decode_for_coordinator(encode(longest)) == longest


def test_one_byte_more_is_neither_sent_nor_taken():
    longer = padded(codec.MAX_BYTES + 1)
    with pytest.raises(TooLarge, match=str(codec.MAX_BYTES)):
        encode(longer)
    with pytest.raises(TooLarge) as refusal:
        decode_for_coordinator([HEAD, msgspec.msgpack.encode(longer)])
    assert refusal.value.kind == "too_large"


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(Refused(deployment="d", reason="r", term=1 << 64), id="number"),
        pytest.param(Refused(deployment="d", reason="\ud800"), id="text"),
        pytest.param(goal(seq=-(1 << 63) - 1), id="negative"),
    ],
)
def test_what_has_no_form_on_the_wire_is_not_sent(message: Message):
    with pytest.raises(FrameError, match="can't be sent"):
        encode(message)
