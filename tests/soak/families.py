"""Model types with options that no test has: each switch of a type's config the other way round, as some checkpoint may have it.

    scripts/soak families [TYPE ...]

Each is to be served right, or refused: what is computed must be the model. Prints what became of each, and exits with 1 if anything was
computed wrong. All types take some 5 minutes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.survey import ALL_TYPES, BUILDING_ERRORS, survey
from tests.support.tiny_configs import tiny_config

# They say what a forward is to return besides, or are no matter of the model's.
NOT_TRIED = {
    "is_encoder_decoder",
    "use_cache",
    "return_dict",
    "output_router_logits",
    "output_hidden_states",
    "output_attentions",
}


def switches_of(model_type: str) -> dict[str, bool]:
    """The options of a type's tiny config that are true or false."""
    try:
        config = tiny_config(model_type)
    except BUILDING_ERRORS:
        return {}
    values = {name: vars(config).get(name) for name in type(config).__dataclass_fields__}
    return {name: value for name, value in values.items() if isinstance(value, bool) and name not in NOT_TRIED}


def main() -> int:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    tally: Counter[str] = Counter()
    wrong = []
    started = time.monotonic()
    for model_type in sys.argv[1:] or ALL_TYPES:
        for name, value in switches_of(model_type).items():
            tried = f"{model_type} {name}={not value}"
            with tempfile.TemporaryDirectory() as folder:
                try:
                    outcome = survey(model_type, Path(folder), **{name: not value})
                except AssertionError as error:
                    wrong.append(tried)
                    print(f"{tried}: WRONG {error}", flush=True)
                    continue
            tally[outcome.verdict] += 1
            print(f"{tried}: {outcome.verdict} {outcome.reason}", flush=True)
    print(f"{dict(tally)}, wrong: {wrong}, {time.monotonic() - started:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
