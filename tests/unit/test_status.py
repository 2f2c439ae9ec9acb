"""What `swarm status` prints, also of peers that write markup into their records."""

from __future__ import annotations

import io
import time

import pytest

from swarm.client.status import records_as_table
from swarm.span import Span
from tests.support.records import make_record


@pytest.mark.parametrize("text", ["[/x]", "[red]", "[link=http://example.org]here"])
def test_what_peers_wrote_is_printed_as_they_wrote_it(text):
    record = make_record("12D3KooWpeer", Span(0, 30), source=text, numeric_class=text, model_name=text)
    out = io.StringIO()
    records_as_table([record], time.time(), out)
    assert text[:6] in out.getvalue().splitlines()[0]
