"""Generates with llama-cpp-python when asked to, for benchmarks/engine_llama.py.

PYTHON engine_llama_worker.py MODEL.gguf THREADS
PYTHON is an interpreter that has llama_cpp; nothing else is imported, as this project may be missing there. Greedy, and as long as is
asked for, whatever the model says. A line of JSON for each line of JSON: {"tokens": [...], "num_new": 128} gives {"seconds",
"first_token_s", "tokens"}; before the first one comes a line about the build.
"""

import json
import sys
import time

import llama_cpp


def generate(model: llama_cpp.Llama, tokens: list[int], num_new: int) -> dict[str, object]:
    """From a cold cache: llama-cpp-python would keep what two prompts share."""
    model.reset()
    started = time.perf_counter()
    found: list[int] = []
    first_token_s = 0.0
    for token in model.generate(tokens, temp=0.0):
        found.append(token)
        if len(found) == 1:
            first_token_s = time.perf_counter() - started
        if len(found) == num_new:
            break
    return {"seconds": time.perf_counter() - started, "first_token_s": first_token_s, "tokens": found}


def main() -> None:
    path, threads = sys.argv[1], int(sys.argv[2])
    model = llama_cpp.Llama(path, n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)
    build = {"version": llama_cpp.__version__, "system": llama_cpp.llama_print_system_info().decode()}
    print(json.dumps(build), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(generate(model, asked["tokens"], asked["num_new"])), flush=True)


if __name__ == "__main__":
    main()
