"""Tune a soft prompt for a model in a swarm: a few vectors before the text learn, the model stays as it is.

pip install -e '.[finetune]'
python examples/finetune_prompt.py --initial-peers /ip4/127.0.0.1/tcp/31337/p2p/12D3KooW...
The text is Python's reference manual, which comes with every Python; the losses are of paragraphs left out.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pydoc_data.topics import topics

import transformers
from datasets import Dataset
from peft import PeftModel, PromptTuningConfig, get_peft_model

import swarm

warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT uses a name that transformers is about to drop


class PrintLoss(transformers.TrainerCallback):
    def on_log(self, args, state, control, logs, **_) -> None:
        if "loss" in logs:
            print(f"  step {state.global_step}: loss {logs['loss']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--initial-peers", nargs="+", required=True, metavar="MULTIADDR")
    parser.add_argument("--model", default="smollm2-135m", help="alias, hub id, directory or GGUF file")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8, help="paragraphs per step")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens of a paragraph; the rest is cut off")
    parser.add_argument("--output", default="soft-prompt", help="folder for the tuned prompt")
    options = parser.parse_args()

    transformers.set_seed(0)
    manual = sorted({text for page in topics.values() for text in page.split("\n\n") if len(text) > 200})
    with swarm.connect(initial_peers=options.initial_peers, model=options.model) as connected:
        model, tokenizer = connected.model(), connected.tokenizer()
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        columns = tokenizer(manual, truncation=True, max_length=options.max_tokens)
        parts = Dataset.from_dict(dict(columns)).train_test_split(32, seed=0)
        prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8, prompt_tuning_init="SAMPLE_VOCAB")
        settings = transformers.TrainingArguments(
            options.output,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=0.03,
            logging_steps=5,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        tuned = get_peft_model(model, prompt)
        collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = transformers.Trainer(tuned, settings, collator, parts["train"], parts["test"], callbacks=[PrintLoss])
        trainer.remove_callback(transformers.PrinterCallback)
        with tuned.disable_adapter():
            print(f"held-out loss without a prompt: {trainer.evaluate()['eval_loss']:.3f}")
        print(f"held-out loss before: {trainer.evaluate()['eval_loss']:.3f}")
        trainer.train()
        print(f"held-out loss after {options.steps} steps: {trainer.evaluate()['eval_loss']:.3f}")
        tuned.save_pretrained(options.output, save_embedding_layers=False)
        trainer.model = PeftModel.from_pretrained(model, options.output)
        print(f"saved in {options.output} and loaded again: {trainer.evaluate()['eval_loss']:.3f}")


if __name__ == "__main__":
    try:
        main()
    except swarm.SwarmError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
