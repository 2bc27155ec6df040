"""Bodies of bytes for schemathesis: good groups, damaged ones and noise."""

from __future__ import annotations

import schemathesis
from hypothesis import strategies as st
from pydantic import BaseModel

from buffer import payload
from buffer.service import frames
from buffer.service.bodies import PushEntry, PutEntry
from tests.builders import make_group

_uids = st.sampled_from([f"{i:016x}" for i in range(7)])
_good = st.builds(
    lambda uid, rewards, version: payload.encode(make_group(rewards, uid=uid, version=version)),
    _uids,
    st.lists(st.floats(-1, 1), max_size=3),
    st.integers(0, 2),
)


@st.composite
def _damaged(draw: st.DrawFn, bodies: st.SearchStrategy[bytes]) -> bytes:
    body = draw(bodies)
    start = draw(st.integers(0, len(body)))
    return body[:start] + draw(st.binary(max_size=8)) + body[start + draw(st.integers(0, 8)) :]


_groups = st.one_of(_good, _damaged(_good), st.binary(max_size=64))
_entries: st.SearchStrategy[BaseModel] = st.one_of(
    st.builds(PutEntry, ordinal=st.integers(0, 9), attempt=st.integers(0, 2), drop=st.sampled_from([None, "flat"])),
    st.builds(PushEntry, request=st.from_regex(r"[a-z]{1,2}", fullmatch=True)),
)
_frames = st.lists(st.tuples(_entries, _groups), max_size=4).map(frames.pack)

schemathesis.openapi.media_type(payload.CONTENT_TYPE, _groups)
schemathesis.openapi.media_type(frames.MEDIA_TYPE, st.one_of(_frames, _damaged(_frames), st.binary(max_size=64)))
