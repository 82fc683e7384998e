"""A language model as the judge of two answers (`python eval.py win-rate --judge llm`)."""

from contextlib import closing

from tqdm import tqdm

from fgrlhf.collect import llm
from fgrlhf.collect.client import Client, Unanswered
from fgrlhf.collect.tasks import load_prompt
from fgrlhf.data.fields import UserError
from fgrlhf.data.outputs import input_of, passages_of
from fgrlhf.data.records import Annotation, Output
from fgrlhf.judge import check_same_prompts

JUDGE_PROMPT = "judge-1"                          # in fgrlhf/collect/prompts


def verdict(text: str) -> float:
    """Reads 1, 2 or 1.5 (tie) from a language model's answer. Raises Flaw for anything else."""
    better = llm.parse_object(text, "better")["better"]
    if better not in ("first", "second", "tie"):
        raise llm.Flaw('better must be "first", "second" or "tie"')
    return {"first": 1.0, "second": 2.0, "tie": 1.5}[better]


def by_llm(client: Client, system: list[Output], reference: list[Output]) -> list[Annotation]:
    """Judges each pair: output_1 is the reference's answer, output_2 the system's.

    Each pair is shown with the passages (`context`) of its prompt, as people see it, and in both
    orders, because models favour one place. `preference` is the mean of the two verdicts, in
    [1, 2]: contradictory verdicts give a tie, and if one verdict is a tie the other decides. Equal
    answers are a tie without a question. `preference` is None when there is no usable verdict after
    asking twice. Raises UserError when questions stay unanswered; the client's cache keeps the
    other answers for the next call.
    """
    check_same_prompts(system, reference)
    prompt = load_prompt(JUDGE_PROMPT)

    def judge(i: int) -> Annotation:
        ours, theirs = system[i], reference[i]
        prompted = ours.instruction, input_of(ours), passages_of(theirs) or passages_of(ours)
        verdicts = [1.5]
        if ours.output != theirs.output:
            verdicts = [llm.ask(client, prompt, llm.tagged(*prompted, first=first.output,
                                                           second=second.output), verdict).value
                        for first, second in ((theirs, ours), (ours, theirs))]
            if None not in verdicts:
                verdicts[1] = 3 - verdicts[1]
        preference = None if None in verdicts else sum(verdicts) / len(verdicts)
        return Annotation(ours.instruction, theirs.output, ours.output, preference,
                          theirs.generator, ours.generator, client.model, input_of(ours))

    judged, problem = {}, ""
    with closing(client.gather(range(len(system)), judge)) as found:
        for i, result in tqdm(found, desc="judge", total=len(system), leave=False):
            if isinstance(result, Unanswered):
                problem = str(result)
            else:
                judged[i] = result
    if left := len(system) - len(judged):
        raise UserError(f"--judge llm: expected a verdict on all {len(system)} pairs, got none on "
                        f"{left} ({problem or client.stopped_by}); start again to ask for them")
    return [judged[i] for i in range(len(system))]
