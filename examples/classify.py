"""Train a classifier on a model in a swarm: a small head learns, here, from what the model makes of each text.

pip install -e '.[finetune]'
python examples/classify.py --initial-peers /ip4/127.0.0.1/tcp/31337/p2p/12D3KooW...
It learns to tell Python's reference manual from the licences of installed packages; accuracy is on paragraphs left out.
"""

from __future__ import annotations

import argparse
import random
import sys
from importlib.metadata import distributions
from pydoc_data.topics import topics

import transformers
from datasets import Dataset

import swarm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--initial-peers", nargs="+", required=True, metavar="MULTIADDR")
    parser.add_argument("--model", default="smollm2-135m", help="alias, hub id, directory or GGUF file")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8, help="paragraphs per step")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens of a paragraph; the rest is cut off")
    parser.add_argument("--output", default="classifier", help="folder for the trained head")
    options = parser.parse_args()

    transformers.set_seed(0)
    transformers.logging.disable_progress_bar()
    manual, licences = paragraphs(list(topics.values())), paragraphs(licence_files())
    count = min(len(manual), len(licences))
    texts, labels = manual[:count] + licences[:count], [0] * count + [1] * count
    with swarm.connect(initial_peers=options.initial_peers, model=options.model) as connected:
        model, tokenizer = connected.classifier(num_labels=2), connected.tokenizer()
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        columns = tokenizer(texts, truncation=True, max_length=options.max_tokens)
        parts = Dataset.from_dict({**columns, "label": labels}).train_test_split(64, seed=0)
        settings = transformers.TrainingArguments(
            options.output,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=0.003,
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = transformers.Trainer(model, settings, None, parts["train"], parts["test"], processing_class=tokenizer)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.compute_metrics = lambda guess: {"accuracy": (guess.predictions.argmax(-1) == guess.label_ids).mean()}
        print(f"held-out accuracy before: {trainer.evaluate()['eval_accuracy']:.1%}")
        trainer.train()
        print(f"held-out accuracy after {options.steps} steps: {trainer.evaluate()['eval_accuracy']:.1%}")
        trainer.save_model()
        print(f"the head is in {options.output}")


def licence_files() -> list[str]:
    files = [file for package in distributions() for file in package.files or [] if file.name.startswith("LICENSE")]
    return [file.locate().read_text(errors="ignore") for file in files if file.locate().is_file()]


def paragraphs(texts: list[str]) -> list[str]:
    """The longer paragraphs, each once, in random order; without line breaks, which would tell where they are from."""
    found = {" ".join(part.split()) for text in texts for part in text.split("\n\n") if len(part) > 200}
    return random.sample(sorted(found), len(found))


if __name__ == "__main__":
    try:
        main()
    except swarm.SwarmError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
