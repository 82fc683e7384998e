"""The names in results.json and on the report: systems, reward models, comparisons, notes.

A system has one name everywhere. Its key is the name of its folder in the folder of a seed.
"""

SYSTEMS = {
    "sft": ("SFT", "start"),
    "rlhf": ("PPO-RLHF", "baseline"),
    "sequence-edits": ("PPO-RLHF on edits", "ablation"),
    "fine-grained-pairs": ("Fine-grained PPO on pairs", "ablation"),
    "fine-grained-paper": ("Fine-grained PPO, paper's loss", "method"),
    "fine-grained": ("Fine-grained PPO, our loss", "method"),
    "imitation": ("SFT on edits", "rival"),
    "dpo-sft": ("DPO + SFT on edits", "rival"),
    "dpo": ("DPO on edits", "rival"),
    "dpo-pairs": ("DPO on pairs", "rival"),
    "rloo": ("RLOO", "rival"),
    "grpo": ("GRPO", "rival"),
    "tlcr": ("PPO with critic, TLCR's reward", "rival"),
    "best-of-sequence": ("Best of 16 by the sequence reward", "rival"),
    "best-of-paper": ("Best of 16 by the paper's loss", "rival"),
    "best-of-token": ("Best of 16 by our loss", "rival"),
    "rlhf-long": ("PPO-RLHF, twice as long", "ablation"),
    "fine-grained-imperfect": ("Fine-grained PPO, imperfect editor", "imperfect editor"),
    "imitation-imperfect": ("SFT on edits, imperfect editor", "imperfect editor"),
    "dpo-sft-imperfect": ("DPO + SFT, imperfect editor", "imperfect editor"),
    "fine-grained-style": ("Fine-grained PPO, editor with a style", "imperfect editor"),
    "imitation-style": ("SFT on edits, editor with a style", "imperfect editor"),
    "rlhf-ties": ("PPO-RLHF, ties by a coin", "ablation"),
    "fine-grained-sum": ("Fine-grained PPO, sum loss", "ablation"),
    "likelihood": ("PPO, log-likelihood as reward", "control"),
}
REWARD_MODELS = {
    "rm-sequence": "Sequence-level on pairs",
    "rm-sequence-edits": "Sequence-level on edits",
    "rm-token-pairs": "Token-level on pairs",
    "rm-paper": "Token-level, paper's loss",
    "rm-token": "Token-level, our loss",
    "rm-token-imperfect": "Token-level, imperfect editor",
    "rm-token-style": "Token-level, editor with a style",
    "rm-sequence-ties": "Sequence-level, ties by a coin",
    "rm-token-sum": "Token-level, sum loss",
    "rm-tlcr": "Token-level, TLCR's loss",
    "rm-likelihood": "Untrained log-likelihood",
}
REWARD_METRICS = {"edits/pair_accuracy": "edit_accuracy", "pairs/pair_accuracy": "pair_accuracy",
                  "edits/token_auc": "token_auc", "edits/token_auc_within": "token_auc_within",
                  "edits/position_auc_within": "position_auc_within",
                  "edits/r_errors": "r_errors", "edits/r_behind": "r_behind",
                  "edits/r_elsewhere": "r_elsewhere", "edits/u0_drift": "u0_drift",
                  "seconds": "seconds"}
WORDED = ("sft", "rlhf", "fine-grained", "imitation", "fine-grained-imperfect",
          "imitation-imperfect", "fine-grained-style", "imitation-style")
COMPARED = (("fine-grained-paper", "rlhf"), ("fine-grained", "rlhf"),
            ("fine-grained", "imitation"), ("fine-grained", "dpo-sft"), ("rloo", "rlhf"),
            ("grpo", "rlhf"), ("tlcr", "rlhf"), ("fine-grained", "tlcr"), ("rlhf-long", "rlhf"),
            ("best-of-token", "best-of-sequence"), ("sequence-edits", "rlhf"),
            ("fine-grained", "sequence-edits"), ("fine-grained-pairs", "rlhf"),
            ("fine-grained", "fine-grained-pairs"),
            ("fine-grained-imperfect", "imitation-imperfect"),
            ("fine-grained-imperfect", "dpo-sft-imperfect"), ("likelihood", "sft"))
PAPER = [{"label": "win rate gain over PPO-RLHF (LLaMA-7B, AlpacaFarm)",
          "value": "up to 5.1 points"},
         {"label": "reward model accuracy", "value": "about 85.2%"},
         {"label": "time to converge against PPO-RLHF", "value": "half"}]
NOTES = ["The world is built in: it shows the mechanism, not that a 7B model gains as much.",
         "An edit carries more information than a label, so the same number of annotations is not "
         "the same amount of information.",
         "A win rate compares the answers to test prompts with one fixed sample of the SFT model. "
         "The oracle of the world judges: fewer errors win, and a tie counts one half.",
         "PPO-RLHF has a sequence-level reward model trained on pairs, and a critic. SFT on edits "
         "imitates the edits, DPO + SFT also compares them with the originals; both use no reward "
         "model. Two answers with equally many errors are not annotated, unless a row says so.",
         "PPO runs are tested with the checkpoint that was best on dev prompts; SFT and imitation "
         "with the last one."]
IMPERFECT_EDITORS = ("The imperfect editor misses 30% of the errors and makes a needless edit in "
                     "10% of the answers. The editor with a style brings every sentence of 30% of "
                     "the answers into one wording.")
