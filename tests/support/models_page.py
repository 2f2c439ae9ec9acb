"""docs/models.md: which model types can be served, written from the survey of them.

    python -m tests.support.models_page [FILE]

`scripts/gen_models` runs it. A new column is one more entry in COLUMNS, and what it says is in Outcome.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers
from transformers.utils import logging as transformers_logging

from tests.support.survey import ALL_TYPES, NOT_BUILT, REFUSED, WORKS, Outcome, survey

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"

COLUMNS: list[tuple[str, Callable[[str, Outcome], str]]] = [
    ("model type", lambda model_type, _: f"`{model_type}`"),
    ("served", lambda _, outcome: {WORKS: "yes", REFUSED: "refused", NOT_BUILT: "not tried"}[outcome.verdict]),
    (
        "many sessions at once",
        lambda _, outcome: {True: "yes", False: "one at a time"}[outcome.together] if outcome.verdict == WORKS else "",
    ),
    ("notes", lambda _, outcome: _notes(outcome)),
]

_TEXT = """\
# Models

<!-- Written by `scripts/gen_models`; do not edit. `tests/contract/test_decoder_families.py` finds out the same and compares. -->

Any causal language model of transformers {version} can be tried: nodes and clients cut it by what transformers builds, with no code for a family.
A model that cannot be cut is refused when it is loaded, with the reason. Here is what became of a tiny random model of each of its {num_types} model types
(`model_type` in config.json): **{works} are served, {refused} are refused**{not_built}.

*Served* means: saved in several safetensors files, loaded in spans of one and of several blocks, and equal to the whole model in a forward, in decoding with a cache,
beside padding, after a rewind, after the rows of a beam search were reordered, with two sessions at a time, and in the gradients behind it. *Refused* gives what the
user reads; MODEL stands for the checkpoint.

A checkpoint of a type that is served may have options of its own that are refused, with the reason: blocks with a recurrent state, with caches of other things than keys
and values, or that read the caches of others; rotary tables of type `dynamic`. With tables of type `longrope` a session holds as many tokens as the model's
`original_max_position_embeddings`. Where the notes name kinds of blocks, those were tried.

{table}
"""


def render(outcomes: Mapping[str, Outcome]) -> str:
    """The page."""
    counts = Counter(outcome.verdict for outcome in outcomes.values())
    head = ["| " + " | ".join(title for title, _ in COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return _TEXT.format(
        version=".".join(transformers.__version__.split(".")[:2]),
        num_types=len(outcomes),
        works=counts[WORKS],
        refused=counts[REFUSED],
        not_built=f", and {counts[NOT_BUILT]} could not be built here" if counts[NOT_BUILT] else "",
        table="\n".join([*head, *(row(model_type, outcome) for model_type, outcome in sorted(outcomes.items()))]),
    )


def row(model_type: str, outcome: Outcome) -> str:
    """The line of the table for one type."""
    return "| " + " | ".join(render_cell(model_type, outcome).replace("|", "\\|") for _, render_cell in COLUMNS) + " |"


def rows_of(page: str) -> dict[str, str]:
    """The lines of the page's table by model type."""
    return {match[1]: match[0] for match in re.finditer(r"^\| `([^`]+)` \|.*\|$", page, re.M)}


def _notes(outcome: Outcome) -> str:
    notes = [outcome.reason] if outcome.reason else []
    if outcome.is_option:
        notes.append("with `is_decoder`, else refused")
    if outcome.kinds:
        notes.append("blocks: " + ", ".join(outcome.kinds))
    return "; ".join(notes)


def main() -> int:
    page = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    outcomes = {}
    for number, model_type in enumerate(ALL_TYPES, 1):
        with tempfile.TemporaryDirectory() as folder:
            outcomes[model_type] = survey(model_type, Path(folder))
        print(f"{number}/{len(ALL_TYPES)} {model_type}: {outcomes[model_type].verdict}", flush=True)
    page.write_text(render(outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
