"""The judge of the built-in world: the answer with fewer errors wins (paper, section 3.2)."""

from dataclasses import dataclass, replace

from fgrlhf.data.outputs import joined
from fgrlhf.data.readers import read_outputs, read_prompts
from fgrlhf.data.records import Output, Prompt
from fgrlhf.evaluate import compare
from fgrlhf.judge import answer_to, check_same_prompts
from fgrlhf.simulate.origin import check_requests
from fgrlhf.simulate.world import World


def count_errors(world: World, outputs: list[Output], file: str | None = None) -> list[int]:
    """Counts the errors of each answer. Raises UserError for a request of another world.

    file: where the answers come from, for messages (origin.py).
    """
    check_requests(world, outputs, file)
    return [len(world.errors(output.instruction, output.output)) for output in outputs]


def by_oracle(world: World, system: list[Output], reference: list[Output],
              files: tuple[str | None, str | None] = (None, None)) -> list[float]:
    """The preferences of the oracle: 1 when the system wins, 0.5 for a tie, 0 when it loses.

    files: where the two lists come from, for messages.
    """
    check_same_prompts(system, reference)
    return compare(count_errors(world, system, files[0]), count_errors(world, reference, files[1]))


@dataclass(frozen=True)
class OracleJudge:
    """The oracle with the prompts and the reference's errors, for the dev evaluations of PPO."""

    world: World
    prompts: list[Prompt]
    reference_errors: list[int]

    @staticmethod
    def load(world: int | str, prompts: str, reference: str) -> "OracleJudge":
        """Reads the prompts and the reference's answers to them, in any order, from files."""
        judge = OracleJudge(World(world), read_prompts(prompts), [])
        check_requests(judge.world, judge.prompts, prompts)
        outputs = read_outputs(reference)
        check_requests(judge.world, outputs, reference)
        outputs = joined(outputs, judge.unanswered(), (reference, prompts))
        return replace(judge, reference_errors=judge.errors(outputs))

    def unanswered(self) -> list[Output]:
        """Returns blank answers to `prompts`."""
        return [answer_to(prompt, "", "") for prompt in self.prompts]

    def errors(self, outputs: list[Output]) -> list[int]:
        """Counts the errors of each answer; the answers must be to `prompts`, in this order."""
        check_same_prompts(outputs, self.unanswered())
        return count_errors(self.world, outputs)

    def compare(self, outputs: list[Output]) -> dict[str, float]:
        """Returns the win rate against the reference, and the mean number of errors per answer."""
        errors = self.errors(outputs)
        preferences = compare(errors, self.reference_errors)
        return {"eval/win_rate": sum(preferences) / len(preferences),
                "eval/errors": sum(errors) / len(errors)}
