"""QA-Feedback (Wu et al. 2023, arXiv 2306.01693): its *_feedback.json files as published.

    question                        the prompt
    passages                        the context: lists of a title and sentences
    prediction 1 ... prediction 4   responses of a model
    feedback                        a human's work on prediction 1: "errors", the error spans, and
                                    "corrected-prediction"
    preference                      human choices between the predictions, for the pairs 12, 13, 14,
                                    23, 24 and 34 in this order: 1 or 2 is better, 0 is a tie

The correction of prediction 1 is an edit, which every reader of readers.py reads.
`read_qa_feedback_pairs` reads the human choices as ordinary preferences on the same prompts, so
that the two kinds of reward model can be compared on real data.
"""

from itertools import combinations
from pathlib import Path

from fgrlhf.data.fields import Text, refuse, take
from fgrlhf.data.files import read_records
from fgrlhf.data.records import Edit, NoEdit, Pair, Passage, Prompt, Span, sort_spans

FIELDS = {"question", "passages"}


def build_edit(value: dict, place: str) -> Edit | NoEdit:
    """Builds the edit of prediction 1. Its id is its place, such as "dev_feedback.json: record 3".

    A record whose correction is blank holds no edit, and neither does a question without feedback,
    such as those of train_1k.json.
    """
    prompt, feedback = _prompt(value, place), value.get("feedback")
    if feedback is None:
        return NoEdit(prompt, "the question has no feedback")
    original = take(value, "prediction 1", Text, place)
    corrected = take(feedback, "corrected-prediction", str, place, "feedback.")
    errors = take(feedback, "errors", list, place, "feedback.")
    if not corrected.strip():
        return NoEdit(prompt, "the correction is blank")
    spans = []
    for i, error in enumerate(errors):
        name = f"feedback.errors[{i}]."
        spans.append(Span(take(error, "start", int, place, name), take(error, "end", int, place,
                          name), take(error, "error type", str, place, name)))
    return sort_spans(Edit(prompt.id, prompt.prompt, original, corrected, None, prompt.context,
                           tuple(spans)), place, "feedback.errors")


def _prompt(value: dict, place: str) -> Prompt:
    """Builds the question with its passages. The first sentence of a passage may repeat the title.

    Such a sentence begins with the title and an empty line, which are left out.
    """
    context = []
    for i, passage in enumerate(take(value, "passages", tuple[tuple[str, ...], ...], place)):
        if not passage:
            refuse(place, f"passages[{i}]", "a title and sentences", [])
        title, *sentences = passage
        context.append(Passage(title, " ".join(sentences).removeprefix(f"{title}\n\n")))
    return Prompt(Path(place).name, take(value, "question", Text, place), None, tuple(context))


def read_qa_feedback_pairs(path: str | Path, on_bad_record: str = "stop") -> list[Pair]:
    """Returns a Pair for each human preference between two predictions, in file order.

    The id of a pair names its predictions: "dev_feedback.json: record 3-13". Ties and pairs of two
    equal texts hold no preference. on_bad_record: see files.each.
    """
    return sum(read_records(path, _pairs, on_bad_record), [])


def _pairs(value, place: str) -> list[Pair]:
    texts = {n: take(value, f"prediction {n}", Text, place) for n in "1234"}
    preference = take(value, "preference", tuple[int, ...], place)
    if len(preference) != 6 or not set(preference) <= {0, 1, 2}:
        refuse(place, "preference", "six of 0, 1 and 2", list(preference))
    prompt, pairs = _prompt(value, place), []
    for (first, second), better in zip(combinations("1234", 2), preference):
        if better and texts[first] != texts[second]:
            chosen, rejected = (first, second) if better == 1 else (second, first)
            pairs.append(Pair(f"{prompt.id}-{first}{second}", prompt.prompt, texts[chosen],
                              texts[rejected], None, prompt.context))
    return pairs
