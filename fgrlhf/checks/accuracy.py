"""Warns about a reward model that is too often wrong for PPO to gain much with it.

The accuracy is the share of held-out ordinary pairs whose better side gets the higher reward
(train_rm.py --eval-pairs). The profile study of fgrlhf.reproduce makes reward models worse on
purpose and trains a policy with each; section SECTION of STUDY.md has the figures.
"""

import sys
from pathlib import Path

from fgrlhf.data.fields import UserError
from fgrlhf.data.files import read_object

# Of 15 PPO-RLHF runs below 60%, twelve gained at most 3 points; the 49 others 3 to 20 (STUDY.md).
ACCURACY_NEEDED = 0.6
SECTION = "How right must a reward model be?"


def warn(reward: str | Path, accuracy: float | None) -> None:
    """Prints one line on stderr if the accuracy of the reward model in `reward` is too low.

    accuracy: in [0, 1]; None where it is not known, and then nothing is printed.
    """
    if accuracy is None or not accuracy < ACCURACY_NEEDED:          # NaN is not known either
        return
    print(f"warning: {reward}: this reward model is right on {100 * accuracy:.1f}% of the held-out "
          f"pairs; below about {100 * ACCURACY_NEEDED:.0f}% most PPO runs gained little; annotate "
          f"more, or with less noise (fgrlhf/reproduce/STUDY.md, \"{SECTION}\")", file=sys.stderr)


def recorded(reward: str | Path) -> float | None:
    """Returns the accuracy that train_rm.py recorded for the reward model in `reward`, or None.

    It is in done.json of the run that the folder belongs to. Many reward models have none: one
    without --eval-pairs, a folder that was copied without its run, a reward of one's own.
    """
    done = Path(reward).resolve().parent / "done.json"
    if not (Path(reward) / "reward.json").is_file() or not done.is_file():
        return None
    try:
        accuracy = read_object(done).get("pairs/pair_accuracy")
    except UserError:                               # damaged; PPO does not need this file
        return None
    return accuracy if isinstance(accuracy, float) else None
